/* How the Window type's methods reach its memory.
 *
 * An access goes on piece by piece (guard.c). A piece that touches a page which is not mapped is left, the page is
 * asked for, and the piece is repeated. So a piece must bear that: what overlaps its own source is copied through a
 * buffer, and goes on where it was. In a piece that had to be left it goes on page by page, so that a small page cache
 * needs to hold no more pages at once than one instruction touches.
 *
 * A wait begins with the GIL held: most faults are answered in less time than it takes to get the GIL back from a
 * thread that computes. After 5 ms, for which a thread may keep it in Python too (sys.getswitchinterval()), it is given
 * up. It is taken again from time to time and at each signal, to run the program's signal handlers: what one raises ends
 * the wait. The fault is then withdrawn. What the coordinator was asked for it still does, and the Map that comes of it
 * is in the rmap and in the window, as if the page were used later.
 *
 * A thread without the GIL keeps the window open by holding it (`held`). After a fork the child counts anew: of those
 * who held it, only the thread that forked is there, in a signal handler that has interrupted its access.
 */

#include <Python.h>

#include "window_object.h"

#include "thread.h"

#include <errno.h>
#include <string.h>

enum {
    GIL_ACCESS_BYTES = 1 << 20, /* of this size and up lets other Python threads run */
    PIECE_BYTES = 1 << 16,
    BUFFER_BYTES = 1 << 12,
};
/* A wait that ends before the kernel's next tick needs a timer of its own. On a virtual machine that made a fault cost a
 * quarter more. */
static const int64_t GIL_NS_MAX = 5000000, HANDLERS_NS = 50000000;

/* What is not an errno: */
enum { DONE = 0, RAISED = -1, AGAIN = -2 };

/* An access under way, in a list of those of its thread. */
struct access {
    struct access *outer;
    struct window_object *object;
    PyThreadState *saved; /* NULL: this thread has the GIL */
    bool without_gil;
    int64_t handlers_ns; /* when it had to wait first, or signal handlers were run last */
    int64_t gil_ns;      /* how long it has waited with the GIL */
    struct fault fault;
};

static _Thread_local struct access *innermost;

/* --- the GIL ------------------------------------------------------------------------------------------------------ */

static void take_gil(struct access *access)
{
    if (access->saved)
        PyEval_RestoreThread(access->saved);
    access->saved = NULL;
}

static void let_gil_go(struct access *access)
{
    if (!access->saved)
        access->saved = PyEval_SaveThread();
}

static void begin(struct access *access, struct window_object *self, size_t count)
{
    access->outer = innermost;
    access->object = self;
    access->saved = NULL;
    access->handlers_ns = access->gil_ns = 0;
    access->without_gil = count >= GIL_ACCESS_BYTES;
    innermost = access;
    self->held++;
    if (access->without_gil)
        let_gil_go(access);
}

static void end(struct access *access)
{
    innermost = access->outer;
    access->object->held--;
}

void window_count_held(struct window_object *self)
{
    self->held = 0;
    for (struct access *access = innermost; access; access = access->outer)
        self->held += access->object == self;
}

/* Returns with the GIL. False: a handler has raised. */
static bool run_handlers(struct access *access)
{
    take_gil(access);
    access->handlers_ns = monotonic_ns();
    return !PyErr_CheckSignals();
}

/* --- waiting ------------------------------------------------------------------------------------------------------ */

/* Where the GIL may be given up: waits for the answer. Only the main thread runs handlers. It alone may take the GIL
 * while its fault is posted: others do not survive that when the interpreter ends, nor does their stack. */
static int wait_without_gil(struct access *access, struct pager *pager)
{
    bool runs_handlers = bus_error_is_main_thread();

    do {
        if (runs_handlers && !run_handlers(access)) {
            pager_withdraw(pager, &access->fault, EINTR);
            return RAISED;
        }
        let_gil_go(access);
    } while (!pager_wait(pager, &access->fault, runs_handlers ? monotonic_ns() + HANDLERS_NS : INT64_MAX));
    return access->fault.error;
}

/* For a moment in all: true when it is answered. */
static bool wait_with_gil(struct access *access, struct pager *pager, int64_t now_ns)
{
    bool answered = access->gil_ns < GIL_NS_MAX &&
                    pager_wait(pager, &access->fault, now_ns + GIL_NS_MAX - access->gil_ns);

    access->gil_ns += monotonic_ns() - now_ns;
    return answered;
}

/* Has the page of the fault mapped. AGAIN: it was; RAISED, or an errno. */
static int await_page(struct access *access)
{
    struct pager *pager = access->fault.window->pager;
    int64_t now_ns = monotonic_ns();
    int error;

    if (!access->handlers_ns)
        access->handlers_ns = now_ns;
    if (now_ns - access->handlers_ns > HANDLERS_NS && bus_error_is_main_thread() && !run_handlers(access))
        return RAISED;
    if (!pager_ask(pager, &access->fault) || (!access->saved && wait_with_gil(access, pager, now_ns)))
        error = access->fault.error;
    else
        error = wait_without_gil(access, pager);
    if (access->without_gil)
        let_gil_go(access);
    else
        take_gil(access);
    return error ? error : AGAIN;
}

/* --- piece by piece ----------------------------------------------------------------------------------------------- */

/* DONE, AGAIN, RAISED, or an errno. */
static int try_piece(struct access *access, const struct piece *piece)
{
    struct window *window = access->object->window;
    uint64_t cleared = window_clear_scratch(window);
    int result;

    if (guarded_access(piece, &access->fault)) /* it may have ended on the scratch page of another thread */
        return window_scratch_came(window, cleared) ? AGAIN : DONE;
    result = await_page(access);
    if (result > 0 && window->pager->config.sigbus) { /* SIGBUS is for the access itself */
        let_gil_go(access);
        access_piece(piece);
        result = AGAIN;
    }
    return result;
}

/* How many bytes, `step` apart from here on, are in the page of the first. */
static size_t count_in_page(const char *address, ptrdiff_t step)
{
    size_t page_size = page_size_bytes(), offset = (uintptr_t)address % page_size;

    return step > 0 ? (page_size - 1 - offset) / (size_t)step + 1 : offset / -(size_t)step + 1;
}

static size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

static size_t step_size(ptrdiff_t step)
{
    return step < 0 ? -(size_t)step : (size_t)step;
}

/* What is to be done after `done` bytes; careful: one page of either side alone. */
static struct piece next_piece(const struct piece *whole, size_t done, bool careful)
{
    struct piece piece = *whole;
    size_t step = step_size(whole->to_step) > step_size(whole->from_step) ? step_size(whole->to_step)
                                                                           : step_size(whole->from_step);

    piece.to += (ptrdiff_t)done * piece.to_step;
    piece.from += (ptrdiff_t)done * piece.from_step;
    piece.count = smaller(whole->count - done, step < PIECE_BYTES ? PIECE_BYTES / step : 1);
    if (careful)
        piece.count = smaller(piece.count, smaller(count_in_page(piece.to, piece.to_step),
                                                   count_in_page(piece.from, piece.from_step)));
    return piece;
}

/* 0, RAISED, or an errno, of an access that failed at the fault. */
static int do_pieces(struct access *access, const struct piece *whole)
{
    size_t done = 0, careful_until = 0;

    while (done < whole->count) {
        struct piece piece = next_piece(whole, done, done < careful_until);
        int result = try_piece(access, &piece);

        if (result == DONE)
            done += piece.count;
        else if (result != AGAIN)
            return result;
        else if (done + piece.count > careful_until)
            careful_until = done + piece.count;
    }
    return DONE;
}

static int insist(struct access *access, const struct piece *piece)
{
    int result;

    do
        result = try_piece(access, piece);
    while (result == AGAIN);
    return result;
}

/* As memmove() where neither has a step; else byte by byte. */
static int do_overlapping_pieces(struct access *access, const struct piece *whole)
{
    bool backwards = whole->to_step == 1 && whole->from_step == 1 && whole->to > whole->from;
    struct piece from_end = *whole;
    char buffer[BUFFER_BYTES];
    int result = DONE;

    if (backwards) {
        from_end.to += whole->count - 1;
        from_end.from += whole->count - 1;
        from_end.to_step = from_end.from_step = -1;
    }
    for (size_t done = 0; done < whole->count && result == DONE;) {
        struct piece load = next_piece(&from_end, done, true), store = load;

        load.count = smaller(load.count, load.to_step == load.from_step ? BUFFER_BYTES : 1);
        store.count = load.count;
        load.to = buffer;
        store.from = buffer;
        load.to_step = store.from_step = 1;
        result = insist(access, &load);
        if (result == DONE)
            result = insist(access, &store);
        done += load.count;
    }
    return result;
}

static void raise_bus_error(struct window_object *self, const struct fault *fault, int error)
{
    PyObject *class = Py_NewRef(state_of((PyObject *)self)->bus_error), *exception;
    uint64_t offset_bytes = fault->address - self->window->base;

    bus_error_note(&(struct bus_error){error, fault->window, fault->serial, offset_bytes});
    exception = PyObject_CallNoArgs(class); /* now, while that is this thread's last */
    if (exception)
        PyErr_SetObject(class, exception);
    Py_XDECREF(exception);
    Py_DECREF(class);
}

static int end_with(struct access *access, int result)
{
    take_gil(access);
    if (result > 0)
        raise_bus_error(access->object, &access->fault, result);
    end(access);
    return result == DONE ? 0 : -1;
}

int window_copy(struct window_object *self, const struct copy *what)
{
    struct piece piece = {PIECE_COPY, what->to, what->to_step, what->from, what->from_step, what->count};
    struct access access;
    int result;

    begin(&access, self, what->count);
    result = what->overlaps ? do_overlapping_pieces(&access, &piece) : do_pieces(&access, &piece);
    return end_with(&access, result);
}

int window_touch(struct window_object *self, char *first, size_t count, bool to_store)
{
    struct piece piece = {to_store ? PIECE_TOUCH_TO_STORE : PIECE_TOUCH, first, 1, first, 1, count};
    struct access access;
    int result;

    begin(&access, self, GIL_ACCESS_BYTES);
    result = do_pieces(&access, &piece);
    return end_with(&access, result);
}
