/* The handler of SIGSEGV and SIGBUS.
 *
 * A fault is ours when the kernel raised it for an access that its window allows. It is posted to the window's pager
 * and the thread sleeps until it is answered; then the instruction runs again, or there is a bus error (bus_error.c).
 * Anything else goes to the handler that was there before, as if this one were not.
 *
 * The handler runs with no signal blocked (SA_NODEFER and an empty mask): a thread that waits for the coordinator can
 * be ended by SIGTERM, a handler that runs meanwhile may fault on a window itself, and a bus error may leave by
 * siglongjmp() without a mask to restore.
 *
 * faulthandler, and others that install and restore handlers, do not know that there is more than one. What matters is
 * that this handler is the first: signals_claim() makes it so and remembers what it found. If that one calls or raises
 * its way back to here, the thread's `chaining` mark ends the circle with the default action.
 */

#include "mmu.h"

#include "userfaultfd.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/ucontext.h>
#include <unistd.h>

/* What is behind our handler. The copy that is in use is never written: a claim fills the other one and switches. */
struct chained {
    int signal;
    struct sigaction actions[2];
    _Atomic unsigned current;
};

static struct chained chained[] = {{.signal = SIGSEGV}, {.signal = SIGBUS}};
enum { SIGNALS = sizeof chained / sizeof *chained };

/* The signal that this thread is passing on, of each kind. A handler that left by longjmp() leaves it behind, so it
 * only counts for a call from further down the stack. initial-exec: a handler may not make the loader allocate. */
struct passing {
    const void *context;
    uintptr_t frame;
};

static _Thread_local __attribute__((tls_model("initial-exec"))) volatile struct passing chaining[SIGNALS];

/* This thread has a SIGBUS of ours pending, for our own handler to pass on. */
static _Thread_local __attribute__((tls_model("initial-exec"))) volatile bool raised_sigbus;

/* --- read or write ----------------------------------------------------------------------------------------------- */

enum access { ACCESS_READ, ACCESS_WRITE, ACCESS_OTHER };

#if defined(__x86_64__)

enum { PAGE_FAULT_WRITE = 1 << 1, PAGE_FAULT_FETCH = 1 << 4 };

static enum access access_of(const ucontext_t *context)
{
    greg_t error = context->uc_mcontext.gregs[REG_ERR];

    if (error & PAGE_FAULT_FETCH)
        return ACCESS_OTHER;
    return error & PAGE_FAULT_WRITE ? ACCESS_WRITE : ACCESS_READ;
}

#elif defined(__aarch64__)

#include <asm/sigcontext.h>

enum { ESR_CLASS_SHIFT = 26, ESR_CLASS_DATA_ABORT_LOW = 0x24, ESR_WRITE_NOT_READ = 1 << 6 };

static enum access access_of(const ucontext_t *context)
{
    const unsigned char *records = (const unsigned char *)context->uc_mcontext.__reserved;
    size_t left = sizeof context->uc_mcontext.__reserved;
    struct _aarch64_ctx head;
    struct esr_context esr;

    while (left >= sizeof head) {
        memcpy(&head, records, sizeof head);
        if (head.magic == ESR_MAGIC && left >= sizeof esr) {
            memcpy(&esr, records, sizeof esr);
            if (esr.esr >> ESR_CLASS_SHIFT != ESR_CLASS_DATA_ABORT_LOW)
                return ACCESS_OTHER;
            return esr.esr & ESR_WRITE_NOT_READ ? ACCESS_WRITE : ACCESS_READ;
        }
        if (head.size < sizeof head || head.size > left)
            break;
        records += head.size;
        left -= head.size;
    }
    return ACCESS_OTHER;
}

#else
#error "dax_mp does not know how to tell a read from a write fault on this machine: only x86-64 and aarch64"
#endif

/* --- the chain --------------------------------------------------------------------------------------------------- */

static size_t index_of(int signal)
{
    return signal == SIGSEGV ? 0 : 1;
}

static bool was_sent(const siginfo_t *info)
{
    return info->si_code <= 0; /* by kill() and its like, not by the kernel for an access */
}

/* A real fault happens again when we return; a signal that was sent, or that we make, has to be sent again. */
static void default_action(int signal, siginfo_t *info, bool send)
{
    struct sigaction action = {.sa_handler = SIG_DFL};
    sigset_t set;

    sigaction(signal, &action, NULL);
    if (!send)
        return;
    syscall(SYS_rt_tgsigqueueinfo, getpid(), gettid(), signal, info);
    sigemptyset(&set);
    sigaddset(&set, signal);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}

/* Runs the previous handler with the signals blocked that it asked for; our own return restores the mask. */
static void call(const struct sigaction *previous, int signal, siginfo_t *info, void *context)
{
    sigset_t mask = previous->sa_mask;

    if (!(previous->sa_flags & SA_NODEFER))
        sigaddset(&mask, signal);
    pthread_sigmask(SIG_BLOCK, &mask, NULL);
    if (previous->sa_flags & SA_SIGINFO)
        previous->sa_sigaction(signal, info, context);
    else
        previous->sa_handler(signal);
}

void default_sigbus(void)
{
    siginfo_t info;

    memset(&info, 0, sizeof info);
    info.si_signo = SIGBUS;
    info.si_code = BUS_ADRERR;
    default_action(SIGBUS, &info, true);
}

static struct sigaction action_behind(int signal)
{
    struct chained *behind = &chained[index_of(signal)];

    return behind->actions[atomic_load(&behind->current)];
}

/* Gives the signal to what is behind. made: it is ours, and not one that the kernel has raised. */
static void pass_on(int signal, siginfo_t *info, void *context, bool made)
{
    struct sigaction previous = action_behind(signal);
    volatile struct passing *mark = &chaining[index_of(signal)];
    uintptr_t frame = (uintptr_t)__builtin_frame_address(0);
    bool circle = frame < mark->frame && (mark->context == context || was_sent(info));

    if (!circle && previous.sa_handler == SIG_IGN && was_sent(info))
        return;
    if (circle || previous.sa_handler == SIG_DFL || previous.sa_handler == SIG_IGN) {
        default_action(signal, info, made || was_sent(info));
        return;
    }
    mark->context = context;
    mark->frame = frame;
    call(&previous, signal, info, context);
    mark->frame = 0;
}

/* --- the handler ------------------------------------------------------------------------------------------------- */

/* Whether the kernel has raised it for a load or store. */
static bool is_of_access(int signal, const siginfo_t *info)
{
    if (was_sent(info))
        return false;
    return signal == SIGSEGV ? info->si_code == SEGV_MAPERR || info->si_code == SEGV_ACCERR
                             : info->si_code == BUS_ADRERR;
}

/* Fills `fault` and returns true when this is an access to a window that the pager can do something about. */
static bool is_ours(int signal, const siginfo_t *info, const ucontext_t *context, struct fault *fault)
{
    enum access access;
    struct window *window;
    uint64_t page;

    if (!is_of_access(signal, info))
        return false;
    window = window_at((uintptr_t)info->si_addr);
    access = access_of(context);
    if (!window || access == ACCESS_OTHER || (access == ACCESS_WRITE && !window->writable))
        return false;
    page = ((uintptr_t)info->si_addr - window->base) / page_size_bytes();
    if (!window_allows(window, page, access == ACCESS_WRITE))
        return false;
    *fault = (struct fault){
        .address = (uintptr_t)info->si_addr,
        .window = window,
        .serial = window->serial,
        .vma_id = window->vma_id,
        .pgoff = window->pgoff + page,
        .kind = signal == SIGBUS ? FAULT_FRAME_GONE : access == ACCESS_WRITE ? FAULT_WRITE : FAULT_READ,
        .write = access == ACCESS_WRITE,
        .as_write = access == ACCESS_WRITE && !window->is_private,
        .raw = !window->pager->config.sigbus,
    };
    return true;
}

static void on_fault(int signal, siginfo_t *info, void *context);

static bool is_on_fault(const struct sigaction *action)
{
    return action->sa_flags & SA_SIGINFO && action->sa_sigaction == on_fault;
}

/* What the kernel does where it has nothing to map: SIGBUS, to whoever wants it. It is left pending, for the kernel to
 * deliver when we return: to the handler that is installed then, on the stack and with the mask that this one asks for.
 * (The handler of the program may need more stack than the alternate one, which we may be on, has.) */
static void raise_sigbus(const siginfo_t *fault, const ucontext_t *context)
{
    struct sigaction wanted;
    siginfo_t info;
    sigset_t set;

    memset(&info, 0, sizeof info);
    info.si_signo = SIGBUS;
    info.si_code = BUS_ADRERR;
    info.si_addr = fault->si_addr;
    sigaction(SIGBUS, NULL, &wanted);
    raised_sigbus = is_on_fault(&wanted);
    if (raised_sigbus)
        wanted = action_behind(SIGBUS);
    if (wanted.sa_handler == SIG_IGN || sigismember(&context->uc_sigmask, SIGBUS) == 1) {
        default_action(SIGBUS, &info, true); /* force_sig_fault() in kernel/signal.c */
        return;
    }
    sigemptyset(&set);
    sigaddset(&set, SIGBUS);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    syscall(SYS_rt_tgsigqueueinfo, getpid(), gettid(), SIGBUS, &info);
}

/* False: it is no access to a window that was closed. */
static bool serve_closed_access(int signal, siginfo_t *info, const ucontext_t *context, bool write)
{
    enum closed_access served = closed_serve((uintptr_t)info->si_addr, write);

    if (served == CLOSED_SCRATCH)
        bus_error(NULL, 0, (uintptr_t)info->si_addr, ESTALE);
    else if (served == CLOSED_SIGBUS)
        raise_sigbus(info, context);
    else if (served == CLOSED_NO_VMA)
        default_action(signal, info, false); /* the instruction can neither go on nor be given up */
    return served != CLOSED_NOT;
}

static bool serve_closed(int signal, siginfo_t *info, const ucontext_t *context)
{
    enum access access = is_of_access(signal, info) ? access_of(context) : ACCESS_OTHER;

    return access != ACCESS_OTHER && serve_closed_access(signal, info, context, access == ACCESS_WRITE);
}

static int map_scratch_of(const struct fault *fault)
{
    return window_map_scratch(fault->window, fault->serial, fault->pgoff, fault->end_pgoff - fault->pgoff, fault->write);
}

/* What on_fault() does after pager_serve(), for a thread that has waited in the kernel. */
static void on_verdict(siginfo_t *info, const ucontext_t *context, const struct fault *fault)
{
    int error;

    info->si_addr = (void *)fault->address;
    if (!fault->window) {
        serve_closed_access(SIGBUS, info, context, fault->write);
        return;
    }
    guard_leave(fault->address, fault); /* where it is a guarded one, its thread asks and raises by itself */
    if (fault->window->pager->config.sigbus) {
        raise_sigbus(info, context);
        return;
    }
    error = map_scratch_of(fault);
    if (error && error != ESTALE) /* closed meanwhile: the access is made again */
        default_action(SIGBUS, info, true); /* the instruction can neither go on nor be given up */
    else if (!error)
        bus_error(fault->window, fault->serial, fault->address - fault->window->base, fault->error);
}

static void on_fault(int signal, siginfo_t *info, void *context)
{
    int saved_errno = errno;
    struct fault fault;
    bool applies;

    if (signal == SIGBUS && verdict_take(info, context, &fault, &applies)) {
        if (applies)
            on_verdict(info, context, &fault);
    } else if (signal == SIGBUS && raised_sigbus && !was_sent(info)) {
        raised_sigbus = false;
        pass_on(signal, info, context, true);
    } else if (!is_ours(signal, info, context, &fault)) {
        if (!serve_closed(signal, info, context))
            pass_on(signal, info, context, false);
    } else {
        guard_leave(fault.address, &fault);
        pager_serve(fault.window->pager, &fault);
        if (fault.error && fault.window->pager->config.sigbus && signal == SIGBUS)
            pass_on(signal, info, context, false);
        else if (fault.error && fault.window->pager->config.sigbus)
            raise_sigbus(info, context);
        else if (fault.error && fault.raw && !fault.has_scratch)
            default_action(signal, info, false); /* the instruction can neither go on nor be given up */
        else if (fault.error)
            bus_error(fault.window, fault.serial, fault.address - fault.window->base, fault.error);
    }
    errno = saved_errno;
}

static _Atomic bool faults_wanted;

/* --- who is first ------------------------------------------------------------------------------------------------ */

/* On the alternate stack, where a thread has one, for SIGSEGV alone: it may be a stack that has overflowed. */
static int claim(struct chained *behind)
{
    struct sigaction ours = {
        .sa_sigaction = on_fault,
        .sa_flags = SA_SIGINFO | SA_NODEFER | (behind->signal == SIGSEGV ? SA_ONSTACK : 0),
    };
    unsigned other = !atomic_load(&behind->current);

    if (sigaction(behind->signal, NULL, &behind->actions[other]))
        return errno;
    if (is_on_fault(&behind->actions[other]))
        return 0;
    atomic_store(&behind->current, other);
    sigemptyset(&ours.sa_mask);
    return sigaction(behind->signal, &ours, NULL) ? errno : 0;
}

static int release(struct chained *behind)
{
    struct sigaction installed;

    if (sigaction(behind->signal, NULL, &installed))
        return errno;
    if (!is_on_fault(&installed))
        return 0;
    return sigaction(behind->signal, &behind->actions[atomic_load(&behind->current)], NULL) ? errno : 0;
}

void signals_want_faults(void)
{
    atomic_store(&faults_wanted, true);
}

int signals_claim(void)
{
    int error = 0;

    for (size_t i = 0; i < SIGNALS && !error; i++)
        if (chained[i].signal == SIGBUS || atomic_load(&faults_wanted))
            error = claim(&chained[i]);
    return error;
}

int signals_release(void)
{
    int error = 0;

    for (size_t i = 0; i < SIGNALS && !error; i++)
        error = release(&chained[i]);
    return error;
}
