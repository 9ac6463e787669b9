/* Tells a thread that sleeps in an access, in the kernel, that there is nothing to map.
 *
 * What becomes of a failed access is decided in its own thread, in the middle of the access: a guarded copy is left by
 * siglongjmp(), an exception is set for this thread. So the thread is sent a SIGBUS with a verdict, and our handler does
 * there what it would have done in a SIGSEGV. The signal ends its sleep before the instruction is tried again.
 *
 * But a signal that is sent may arrive anywhere: the sleeper may have been interrupted by another one meanwhile, and be
 * in that handler. So /proc/self/task/TID/syscall is read first, which says of a thread that sleeps outside of a system
 * call where it is; the handler compares the program counter and the stack pointer, and ignores what does not fit. That
 * access faults again when its turn comes.
 *
 * A thread that blocks SIGBUS gets no verdict, nor does one in a system call: the kernel's own accesses go on until there
 * is a page, whatever signals are pending (fault_signal_pending() in include/linux/sched/signal.h).
 */

#include "userfaultfd.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { VERDICTS = 64, STATUS_BYTES = 4096 };
enum verdict_state { FREE, FILLING, SENT };

static struct verdict {
    _Atomic uint32_t state;
    uintptr_t pc, sp;
    struct fault fault;
} verdicts[VERDICTS];

#if defined(__x86_64__)
static uintptr_t pc_of(const ucontext_t *context)
{
    return (uintptr_t)context->uc_mcontext.gregs[REG_RIP];
}

static uintptr_t sp_of(const ucontext_t *context)
{
    return (uintptr_t)context->uc_mcontext.gregs[REG_RSP];
}
#elif defined(__aarch64__)
static uintptr_t pc_of(const ucontext_t *context)
{
    return context->uc_mcontext.pc;
}

static uintptr_t sp_of(const ucontext_t *context)
{
    return context->uc_mcontext.sp;
}
#endif

/* --- the thread, as the kernel shows it ------------------------------------------------------------------------------ */

/* The text of a file of the thread; empty where there is none. */
static void read_of_thread(pid_t tid, const char *name, char text[STATUS_BYTES])
{
    char path[64];
    ssize_t size = -1;
    int fd;

    snprintf(path, sizeof path, "/proc/self/task/%d/%s", (int)tid, name);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) {
        size = read(fd, text, STATUS_BYTES - 1);
        close(fd);
    }
    text[size > 0 ? size : 0] = 0;
}

enum place { NOWHERE, IN_ACCESS, IN_THE_KERNEL };

/* Where the thread is: asleep in an access of its own, or in a system call, which it is too while it tries again. */
static enum place place_of(pid_t tid, uintptr_t *pc, uintptr_t *sp)
{
    char text[STATUS_BYTES];
    unsigned long long at_sp, at_pc;

    read_of_thread(tid, "syscall", text);
    if (sscanf(text, "-1 %llx %llx", &at_sp, &at_pc) != 2)
        return text[0] ? IN_THE_KERNEL : NOWHERE;
    *sp = (uintptr_t)at_sp;
    *pc = (uintptr_t)at_pc;
    return IN_ACCESS;
}

static bool takes_sigbus(pid_t tid)
{
    char text[STATUS_BYTES];
    const char *line;

    read_of_thread(tid, "status", text);
    line = strstr(text, "\nSigBlk:");
    return line && !(strtoull(line + sizeof "\nSigBlk:" - 1, NULL, 16) >> (SIGBUS - 1) & 1);
}

/* --- sending ---------------------------------------------------------------------------------------------------------- */

static struct verdict *take_free(void)
{
    for (size_t i = 0; i < VERDICTS; i++) {
        uint32_t state = FREE;

        if (atomic_compare_exchange_strong(&verdicts[i].state, &state, FILLING))
            return &verdicts[i];
    }
    return NULL;
}

static bool send(struct verdict *verdict)
{
    siginfo_t info;

    memset(&info, 0, sizeof info);
    info.si_signo = SIGBUS;
    info.si_code = SI_QUEUE;
    info.si_value.sival_ptr = verdict;
    atomic_store(&verdict->state, SENT);
    if (!syscall(SYS_rt_tgsigqueueinfo, getpid(), verdict->fault.tid, SIGBUS, &info))
        return true;
    atomic_store(&verdict->state, FREE);
    return false;
}

bool verdict_send(const struct fault *fault, bool *asleep)
{
    struct verdict *verdict;
    uintptr_t pc, sp;
    enum place place = place_of(fault->tid, &pc, &sp);

    *asleep = place == IN_ACCESS || (place == IN_THE_KERNEL && userfaultfd_serves_kernel());
    if (place != IN_ACCESS || !takes_sigbus(fault->tid) || signals_claim() || !(verdict = take_free()))
        return false;
    verdict->pc = pc;
    verdict->sp = sp;
    verdict->fault = *fault;
    return send(verdict);
}

/* --- receiving, in the signal handler --------------------------------------------------------------------------------- */

bool verdict_take(const siginfo_t *info, const void *context, struct fault *fault, bool *applies)
{
    struct verdict *verdict = info->si_value.sival_ptr;

    if (info->si_code != SI_QUEUE || verdict < verdicts || verdict >= verdicts + VERDICTS ||
        atomic_load(&verdict->state) != SENT)
        return false;
    *fault = verdict->fault;
    fault->tid = 0; /* from now on it is on this thread's stack */
    *applies = verdict->pc == pc_of(context) && verdict->sp == sp_of(context);
    atomic_store(&verdict->state, FREE);
    return true;
}

void verdicts_after_fork_in_child(void)
{
    for (size_t i = 0; i < VERDICTS; i++)
        atomic_store(&verdicts[i].state, FREE);
}
