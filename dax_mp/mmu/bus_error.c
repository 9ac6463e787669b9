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
 * - The delivery thread, when this thread is not one of Python's at all, for the threads that may have called into C:
 *   those that are in a bus_errors() block (watch.c), without any delivery; else those that look as if they were in a
 *   call of C (`suspects`, clients/bus_error.py); else the main thread.
 *
 * check() and the end of a bus_errors() block raise what is pending, and take the asynchronous exception back.
 */

#include <Python.h>

#include "bus_error.h"
#include "thread.h"

#include <errno.h>
#include <string.h>

enum { SLOTS = 64, FOREIGN = 64 };
static const int64_t DELIVERY_TIMEOUT_NS = 1000000000;
static const struct timespec SLOT_RETRY = {.tv_nsec = 1000000};

#define THREAD_LOCAL static _Thread_local __attribute__((tls_model("initial-exec")))

/* This thread's first failed raw access that has not been taken, and what a method of Window is about to raise. */
THREAD_LOCAL struct bus_error record;
THREAD_LOCAL struct bus_error noted;

/* With the GIL: those of threads that are not Python's, for the threads to take that may have called them. */
static struct foreign {
    unsigned long thread;
    struct bus_error failure; /* error 0: not in use */
    pid_t by;                 /* the thread that has failed */
    int64_t taken_ns;         /* 0, or when it was raised */
} foreign[FOREIGN];
static size_t foreign_next;
static unsigned long main_thread;

/* Borrowed from the module, and read with the GIL. */
static PyObject *exception_class, *suspects;

/* --- delivery ---------------------------------------------------------------------------------------------------- */

/* A slot goes FREE -> FILLING -> WAITED_FOR or LEFT -> (DONE ->) FREE. The poster moves it up to WAITED_FOR, or LEFT
 * when it does not wait (any more), and from DONE to FREE; the delivery thread moves it from WAITED_FOR to DONE and
 * from LEFT to FREE. So whoever is last frees it, and nobody writes to the stack of a thread that has gone on.
 */
enum slot_state { FREE, FILLING, WAITED_FOR, LEFT, DONE };

static struct slot {
    _Atomic uint32_t state;
    unsigned long thread;
    struct bus_error foreign; /* error 0: the thread has its own record */
    pid_t by;                 /* of a foreign one */
    int64_t failed_ns;
} slots[SLOTS];

static pthread_t delivery_thread;
static _Atomic uint32_t delivery_running;
static _Atomic uint32_t delivery_calls; /* futex: changes whenever there is something to do */
static bool delivery_ended;             /* with the GIL: the interpreter is about to end */

static struct foreign *foreign_of(unsigned long thread)
{
    for (size_t i = 0; i < FOREIGN; i++)
        if (foreign[i].failure.error && foreign[i].thread == thread)
            return &foreign[i];
    return NULL;
}

/* Whether one like this was raised since it came: by the same thread, or `by` 0, any. The call that it came in has then
 * returned, and its caller has been told. */
static bool is_told(const struct slot *slot, pid_t by)
{
    for (size_t i = 0; i < FOREIGN; i++)
        if (foreign[i].taken_ns >= slot->failed_ns && (!by || foreign[i].by == by))
            return true;
    return false;
}

static void deliver_foreign(unsigned long thread, const struct slot *slot)
{
    if (!foreign_of(thread)) /* else that one is raised */
        foreign[foreign_next++ % FOREIGN] = (struct foreign){thread, slot->foreign, slot->by, 0};
    PyThreadState_SetAsyncExc(thread, exception_class);
}

/* To each thread that may have called what has failed: that one must get it, and it cannot be told from the others. */
static void deliver_to_suspects(const struct slot *slot)
{
    PyObject *idents = suspects ? PyObject_CallNoArgs(suspects) : NULL;
    PyObject *list = idents ? PySequence_Fast(idents, "suspects") : NULL;
    Py_ssize_t count = list ? PySequence_Fast_GET_SIZE(list) : 0;

    for (Py_ssize_t i = 0; i < count; i++)
        deliver_foreign(PyLong_AsUnsignedLong(PySequence_Fast_GET_ITEM(list, i)), slot);
    if (!count && !is_told(slot, 0))
        deliver_foreign(main_thread, slot);
    PyErr_Clear();
    Py_XDECREF(list);
    Py_XDECREF(idents);
}

/* Whose ident that is, if it is one of Python's threads; else 0. */
static unsigned long thread_of(pid_t tid)
{
    PyThreadState *state = PyInterpreterState_ThreadHead(PyInterpreterState_Main());

    for (; state; state = PyThreadState_Next(state))
        if (state->native_thread_id == (unsigned long)tid)
            return state->thread_id;
    return 0;
}

/* All that are there, as one: they mostly come of one call. A poster has left; its slot is free before Python code may
 * let the GIL go. */
static void deliver_all_foreign(void)
{
    struct slot first = {.foreign = {0}};

    for (size_t i = 0; i < SLOTS; i++) {
        unsigned long owner;

        if (atomic_load(&slots[i].state) != LEFT || !slots[i].foreign.error)
            continue;
        owner = thread_of(slots[i].by);
        if (owner)
            deliver_foreign(owner, &slots[i]);
        else if (!first.foreign.error && !is_told(&slots[i], slots[i].by)) {
            first.foreign = slots[i].foreign;
            first.by = slots[i].by;
            first.failed_ns = slots[i].failed_ns;
        }
        atomic_store(&slots[i].state, FREE);
    }
    if (first.foreign.error)
        deliver_to_suspects(&first);
}

static void deliver(struct slot *slot)
{
    uint32_t state = WAITED_FOR;

    PyThreadState_SetAsyncExc(slot->thread, exception_class);
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
        if (is_to_deliver(&slots[i]) && !slots[i].foreign.error)
            deliver(&slots[i]);
    deliver_all_foreign();
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

/* A free slot. NULL: there is none, and `waits` is false; or nothing is delivered any more. */
static struct slot *take_slot(bool waits)
{
    while (atomic_load(&delivery_running)) {
        for (size_t i = 0; i < SLOTS; i++) {
            uint32_t state = FREE;

            if (atomic_compare_exchange_strong(&slots[i].state, &state, FILLING))
                return &slots[i];
        }
        if (!waits)
            break;
        nanosleep(&SLOT_RETRY, NULL);
    }
    return NULL;
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

static void post_delivery(void)
{
    struct slot *slot = take_slot(true);

    if (!slot)
        return;
    slot->thread = PyThread_get_thread_ident();
    slot->foreign.error = 0;
    atomic_store(&slot->state, WAITED_FOR);
    call_delivery();
    wait_for_delivery(slot);
}

/* For the thread with this tid, which does not do it itself. It waits for nothing. Where there is no slot, as many
 * failures have yet to be told. */
static void post_for(pid_t tid, const struct bus_error *failure)
{
    struct slot *slot = take_slot(false);

    if (!slot)
        return;
    slot->foreign = *failure;
    slot->by = tid;
    slot->failed_ns = monotonic_ns();
    atomic_store(&slot->state, LEFT);
    call_delivery();
}

/* This thread is not Python's. A thread that has the GIL may wait for it. */
static void post_foreign(void)
{
    struct bus_error failure = record;

    record.error = 0;
    if (!watches_note(&failure))
        post_for((pid_t)syscall(SYS_gettid), &failure);
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

void bus_error_note(const struct bus_error *failure)
{
    noted = *failure;
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
    else if (mine)
        post_delivery();
    else
        post_foreign();
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
    int error = give_scratch(fault);

    if (error && error != ESTALE)
        default_sigbus(); /* as the kernel does to a process of which a thread blocks the signal */
    if (!error)
        post_for(fault->tid, &(struct bus_error){fault->error, fault->window, fault->serial, offset_bytes});
}

static bool move(struct bus_error *from, struct bus_error *to)
{
    bool any = from && from->error;

    if (any) {
        *to = *from;
        from->error = 0;
    }
    return any;
}

static bool take_given(struct bus_error *taken)
{
    struct foreign *given = foreign_of(PyThread_get_thread_ident());

    if (!given)
        return false;
    given->taken_ns = monotonic_ns();
    return move(&given->failure, taken);
}

/* This thread's own, or one that it has been given. */
static bool take(struct bus_error *taken)
{
    return move(&record, taken) || watch_take(PyThread_get_thread_ident(), taken) || take_given(taken);
}

bool bus_error_take(struct bus_error *taken)
{
    bool any = move(&noted, taken) || take(taken);

    if (any)
        windows_drop_scratch();
    return any;
}

static bool is_of_another(const struct slot *slot)
{
    unsigned long owner = slot->foreign.error ? thread_of(slot->by) : 0;

    return owner && owner != PyThread_get_thread_ident();
}

/* Takes what no thread has been given yet: this one asks. */
static bool take_from_slots(struct bus_error *taken)
{
    bool any = false;

    for (size_t i = 0; i < SLOTS; i++) {
        struct bus_error failure;

        if (atomic_load(&slots[i].state) != LEFT || is_of_another(&slots[i]) || !move(&slots[i].foreign, &failure))
            continue;
        if (!any) {
            *taken = failure;
            foreign[foreign_next++ % FOREIGN] = (struct foreign){.by = slots[i].by, .taken_ns = monotonic_ns()};
        }
        any = true;
        atomic_store(&slots[i].state, FREE);
    }
    return any;
}

bool bus_error_take_pending(struct bus_error *failure)
{
    PyThreadState *mine = current_thread_state();
    bool any = take(failure) || take_from_slots(failure);

    if (any && mine->async_exc == exception_class)
        PyThreadState_SetAsyncExc(PyThread_get_thread_ident(), NULL);
    return any;
}

void bus_error_set_class(PyObject *class, PyObject *function)
{
    exception_class = class;
    suspects = function;
}

PyObject *bus_error_class(void)
{
    return Py_NewRef(exception_class);
}

/* The delivery thread and those that waited for it are not in the child, and the thread that forked is its main one. */
static void after_fork_in_child(void)
{
    atomic_store(&delivery_running, 0);
    for (size_t i = 0; i < SLOTS; i++)
        atomic_store(&slots[i].state, FREE);
    main_thread = PyThread_get_thread_ident();
    watches_after_fork_in_child(main_thread);
}

int bus_error_init(unsigned long main_thread_ident)
{
    main_thread = main_thread_ident;
    return pthread_atfork(NULL, NULL, after_fork_in_child);
}
