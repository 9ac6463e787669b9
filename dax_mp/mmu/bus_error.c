/* What becomes of an access that has nothing to map: an exception in the thread that made it.
 *
 * The Window type's own methods raise it at once (window_access.c).
 *
 * Any other access (numpy, memoryview, C code) cannot be left: the instruction has to end. The pager puts a scratch
 * page under it, and an asynchronous exception waits for the thread at the next place where the interpreter looks for
 * one: after a call of a C function, at the entry of a Python function, at a jump back. (So a lone `array[0] = 1` in a
 * `try` raises behind it.) The exception's constructor calls bus_error_take(), which drops the scratch pages, so that
 * later accesses fault again.
 *
 * The exception is set with PyThreadState_SetAsyncExc(), which needs the GIL. Who calls it:
 * - The handler itself, when this thread holds the GIL. The call takes the lock of the list of threads and sets a
 *   flag. That is safe here, though not in signal handlers at large, because this signal is no interruption at a
 *   random place: it is raised by a load or store on window memory, which no code makes that holds a lock of the
 *   interpreter or of malloc.
 * - The delivery thread, when this thread has let the GIL go (numpy does in long loops). The faulting thread waits for
 *   it, so that the exception is there before the thread comes back to bytecode; but for a second at most, because a
 *   thread that holds the GIL in C may be waiting for this one. Then the exception comes late.
 * - The delivery thread for the main thread, when this thread is not one of Python's at all.
 */

#include <Python.h>

#include "bus_error.h"
#include "thread.h"

#include <errno.h>
#include <string.h>

enum { SLOTS = 64 };
static const int64_t DELIVERY_TIMEOUT_NS = 1000000000;
static const struct timespec SLOT_RETRY = {.tv_nsec = 1000000};

#define THREAD_LOCAL static _Thread_local __attribute__((tls_model("initial-exec")))

/* This thread's first failed raw access that has not been taken, and what a method of Window is about to raise. */
THREAD_LOCAL struct bus_error record;
THREAD_LOCAL struct bus_error noted;

/* With the GIL: one of a thread that is not Python's, for the main thread to take. */
static struct bus_error foreign_record;
static unsigned long main_thread;

/* Borrowed from the module, and read with the GIL. */
static PyObject *exception_class;

/* --- delivery ---------------------------------------------------------------------------------------------------- */

/* A slot goes FREE -> FILLING -> WAITED_FOR or LEFT -> (DONE ->) FREE. The poster moves it up to WAITED_FOR, or LEFT
 * when it does not wait (any more), and from DONE to FREE; the delivery thread moves it from WAITED_FOR to DONE and
 * from LEFT to FREE. So whoever is last frees it, and nobody writes to the stack of a thread that has gone on.
 */
enum slot_state { FREE, FILLING, WAITED_FOR, LEFT, DONE };

static struct slot {
    _Atomic uint32_t state;
    unsigned long thread; /* 0: the one with this tid, if it is one of Python's, else the main thread */
    pid_t tid;
    struct bus_error foreign; /* error 0: the thread has its own record */
} slots[SLOTS];

static pthread_t delivery_thread;
static _Atomic uint32_t delivery_running;
static _Atomic uint32_t delivery_calls; /* futex: changes whenever there is something to do */
static bool delivery_ended;             /* with the GIL: the interpreter is about to end */

static unsigned long thread_of(pid_t tid)
{
    PyThreadState *state = PyInterpreterState_ThreadHead(PyInterpreterState_Main());

    for (; state; state = PyThreadState_Next(state))
        if (state->native_thread_id == (unsigned long)tid)
            return state->thread_id;
    return main_thread;
}

static void deliver(struct slot *slot)
{
    uint32_t state = WAITED_FOR;

    if (slot->foreign.error && !foreign_record.error)
        foreign_record = slot->foreign;
    PyThreadState_SetAsyncExc(slot->thread ? slot->thread : thread_of(slot->tid), exception_class);
    if (atomic_compare_exchange_strong(&slot->state, &state, DONE))
        futex_wake(&slot->state);
    else
        atomic_store(&slot->state, FREE);
}

static bool is_to_deliver(struct slot *slot)
{
    uint32_t state = atomic_load(&slot->state);

    return state == WAITED_FOR || state == LEFT;
}

static void deliver_all(void)
{
    PyGILState_STATE gil;
    size_t i = 0;

    while (i < SLOTS && !is_to_deliver(&slots[i]))
        i++;
    if (i == SLOTS)
        return;
    gil = PyGILState_Ensure();
    for (; i < SLOTS; i++)
        if (is_to_deliver(&slots[i]))
            deliver(&slots[i]);
    PyGILState_Release(gil);
}

static void *run_delivery(void *unused)
{
    (void)unused;
    while (atomic_load(&delivery_running)) {
        uint32_t calls = atomic_load(&delivery_calls);

        deliver_all();
        futex_wait(&delivery_calls, calls, NULL);
    }
    return NULL;
}

static void call_delivery(void)
{
    atomic_fetch_add(&delivery_calls, 1);
    futex_wake(&delivery_calls);
}

int bus_error_start_delivery(void)
{
    int error;

    if (atomic_load(&delivery_running) || delivery_ended)
        return 0;
    atomic_store(&delivery_running, 1);
    error = thread_start(&delivery_thread, "dax-delivery", run_delivery, NULL);
    if (error)
        atomic_store(&delivery_running, 0);
    return error;
}

void bus_error_end_delivery(void)
{
    delivery_ended = true;
    if (!atomic_exchange(&delivery_running, 0))
        return;
    call_delivery();
    Py_BEGIN_ALLOW_THREADS
    pthread_join(delivery_thread, NULL);
    Py_END_ALLOW_THREADS
}

/* A free slot, or NULL. */
static struct slot *take_slot_now(void)
{
    for (size_t i = 0; i < SLOTS; i++) {
        uint32_t state = FREE;

        if (atomic_compare_exchange_strong(&slots[i].state, &state, FILLING))
            return &slots[i];
    }
    return NULL;
}

/* A free slot, waited for if need be; NULL when nothing is delivered any more. */
static struct slot *take_slot(void)
{
    struct slot *slot = NULL;

    while (atomic_load(&delivery_running) && !(slot = take_slot_now()))
        nanosleep(&SLOT_RETRY, NULL);
    return slot;
}

static void wait_for_delivery(struct slot *slot)
{
    int64_t deadline_ns = monotonic_ns() + DELIVERY_TIMEOUT_NS;
    uint32_t state = WAITED_FOR;

    while (atomic_load(&slot->state) == WAITED_FOR) {
        int64_t left_ns = deadline_ns - monotonic_ns();
        struct timespec left = {.tv_sec = left_ns / 1000000000, .tv_nsec = left_ns % 1000000000};

        if (left_ns <= 0)
            break;
        futex_wait(&slot->state, WAITED_FOR, &left);
    }
    if (!atomic_compare_exchange_strong(&slot->state, &state, LEFT))
        atomic_store(&slot->state, FREE);
}

static void post_delivery(bool is_python_thread)
{
    struct slot *slot = take_slot();

    if (!slot)
        return;
    slot->thread = is_python_thread ? PyThread_get_thread_ident() : main_thread;
    slot->foreign = is_python_thread ? (struct bus_error){0} : record;
    if (!is_python_thread)
        record.error = 0;
    atomic_store(&slot->state, is_python_thread ? WAITED_FOR : LEFT);
    call_delivery();
    if (is_python_thread)
        wait_for_delivery(slot);
}

/* --- bus errors -------------------------------------------------------------------------------------------------- */

static PyThreadState *current_thread_state(void)
{
#if PY_VERSION_HEX >= 0x030d0000
    return PyThreadState_GetUnchecked();
#else
    return _PyThreadState_UncheckedGet();
#endif
}

void bus_error_note(struct window *window, uint64_t serial, uint64_t offset_bytes, int error)
{
    noted = (struct bus_error){error, window, serial, offset_bytes};
}

bool bus_error_is_main_thread(void)
{
    return PyThread_get_thread_ident() == main_thread;
}

void bus_error(struct window *window, uint64_t serial, uint64_t offset_bytes, int error)
{
    PyThreadState *mine;

    if (!record.error)
        record = (struct bus_error){error, window, serial, offset_bytes};
    /* Not PyGILState_Check(): it says yes to everything once there has been a subinterpreter. */
    mine = PyGILState_GetThisThreadState();
    if (mine && mine->async_exc == exception_class) /* a loop that goes on failing */
        return;
    if (mine && mine == current_thread_state())
        PyThreadState_SetAsyncExc(PyThread_get_thread_ident(), exception_class);
    else
        post_delivery(mine != NULL);
}

/* 0, or an errno: ESTALE where the access is to be made again. */
static int give_scratch(const struct fault *fault)
{
    enum closed_access served;

    if (fault->window && fault->window->pager->config.sigbus)
        return ENOTSUP;
    if (fault->window)
        return window_map_scratch(fault->window, fault->serial, fault->pgoff, 1, fault->write);
    served = closed_serve(fault->address, fault->write);
    return served == CLOSED_SCRATCH ? 0 : served == CLOSED_NOT ? ESTALE : ENOTSUP;
}

void bus_error_elsewhere(struct fault *fault)
{
    uint64_t offset_bytes = fault->window ? fault->address - fault->window->base : fault->address;
    struct slot *slot = NULL;
    int error = give_scratch(fault);

    if (error && error != ESTALE)
        default_sigbus(); /* as the kernel does to a process of which a thread blocks the signal */
    if (!error)
        slot = take_slot_now();
    if (!slot)
        return;
    slot->thread = 0;
    slot->tid = fault->tid;
    slot->foreign = (struct bus_error){fault->error, fault->window, fault->serial, offset_bytes};
    atomic_store(&slot->state, LEFT);
    call_delivery();
}

bool bus_error_take(struct bus_error *taken)
{
    struct bus_error *source = noted.error ? &noted : record.error ? &record : &foreign_record;

    *taken = *source;
    source->error = 0;
    if (taken->error)
        windows_drop_scratch();
    return taken->error != 0;
}

void bus_error_set_class(PyObject *class)
{
    exception_class = class;
}

/* The delivery thread and those that waited for it are not in the child, and the thread that forked is its main one. */
static void after_fork_in_child(void)
{
    atomic_store(&delivery_running, 0);
    for (size_t i = 0; i < SLOTS; i++)
        atomic_store(&slots[i].state, FREE);
    main_thread = PyThread_get_thread_ident();
}

int bus_error_init(unsigned long main_thread_ident)
{
    main_thread = main_thread_ident;
    return pthread_atfork(NULL, NULL, after_fork_in_child);
}
