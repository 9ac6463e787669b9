/* What has a beginning and an end, around Python code that may be left between any two of its bytecodes.
 *
 * A signal handler's exception (KeyboardInterrupt, a timeout) is raised wherever the interpreter looks for signals: also
 * behind a call that has taken something, before its result is stored, and in a `finally` before its first statement. No
 * Python code can be sure of its own end. Here nothing is between the beginning and the call, nor between the call and
 * the end; and an end that is Python code is called again where it was left too early.
 *
 * What fork(2) calls before and afterwards (os.register_at_fork) must raise nothing: Python prints the exception and drops
 * it. So an exception there is postponed until os.fork() has returned. Only one of the main thread can be: the
 * interpreter has no way to raise an exception that is there already in another.
 */

#include <Python.h>

#include "bus_error.h"
#include "module.h"

#include <unistd.h>

enum {
    TRIES_MAX = 100 /* of an end that is interrupted each time */
};

static int at_least(Py_ssize_t count, Py_ssize_t minimum)
{
    if (count >= minimum)
        return 0;
    PyErr_Format(PyExc_TypeError, "%zd arguments at least, not %zd", minimum, count);
    return -1;
}

/* The exception that is set, taken out of the thread's state, so that more Python code can run before it is raised. */
struct held {
    PyObject *type, *value, *traceback;
};

static struct held hold_exception(void)
{
    struct held held;

    PyErr_Fetch(&held.type, &held.value, &held.traceback);
    return held;
}

/* --- settled ----------------------------------------------------------------------------------------------------- */

/* Calls `conclude(failed)` to its end. An exception in it is the call's, where that had none: it has failed then. */
static PyObject *conclude_call(PyObject *conclude, PyObject *result)
{
    PyObject *done = NULL;
    struct held held = hold_exception();

    for (int tries = 0; !done && tries < TRIES_MAX; tries++) {
        done = PyObject_CallOneArg(conclude, held.type ? Py_True : Py_False);
        if (done)
            continue;
        if (held.type)
            PyErr_Clear();
        else
            held = hold_exception();
    }
    Py_XDECREF(done);
    if (held.type) {
        Py_CLEAR(result);
        PyErr_Restore(held.type, held.value, held.traceback);
    }
    return result;
}

PyObject *settled(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    (void)module;
    if (at_least(count, 2))
        return NULL;
    return conclude_call(args[0], PyObject_Vectorcall(args[1], args + 2, (size_t)count - 2, NULL));
}

/* --- locked ------------------------------------------------------------------------------------------------------ */

static PyObject *call_method(PyObject *object, const char *name, struct held *held)
{
    PyObject *result = PyObject_CallMethod(object, name, NULL);

    if (result || !held->type)
        return result;
    PyErr_Clear(); /* the call's own exception is the one that counts */
    return Py_NewRef(Py_None);
}

PyObject *locked(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    PyObject *result, *done;
    struct held held = {NULL, NULL, NULL};

    (void)module;
    if (at_least(count, 2))
        return NULL;
    done = call_method(args[0], "acquire", &held);
    if (!done)
        return NULL;
    Py_DECREF(done);
    result = PyObject_Vectorcall(args[1], args + 2, (size_t)count - 2, NULL);
    held = hold_exception();
    done = call_method(args[0], "release", &held);
    if (!done)
        Py_CLEAR(result);
    Py_XDECREF(done);
    if (held.type)
        PyErr_Restore(held.type, held.value, held.traceback);
    return result;
}

/* --- borrowed ---------------------------------------------------------------------------------------------------- */

/* The last item of a list, taken out; NULL without an exception where there is none. */
static PyObject *pop(PyObject *list)
{
    Py_ssize_t last = PyList_GET_SIZE(list) - 1;
    PyObject *item = last >= 0 ? Py_NewRef(PyList_GET_ITEM(list, last)) : NULL;

    if (item && PyList_SetSlice(list, last, last + 1, NULL))
        Py_CLEAR(item);
    return item;
}

PyObject *borrowed(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    PyObject *item, *result, *stack[8];
    struct held held;

    (void)module;
    if (at_least(count, 2))
        return NULL;
    if (!PyList_Check(args[0]) || count > 8) {
        PyErr_SetString(PyExc_TypeError, "borrowed() takes a list, a function, and few arguments of it");
        return NULL;
    }
    item = pop(args[0]);
    if (!item)
        return PyErr_Occurred() ? NULL : Py_NewRef(Py_False);
    stack[0] = item;
    memcpy(stack + 1, args + 2, ((size_t)count - 2) * sizeof *stack);
    result = PyObject_Vectorcall(args[1], stack, (size_t)count - 1, NULL);
    held = hold_exception();
    if (result != Py_False && PyList_Append(args[0], item) && !held.type) {
        held = hold_exception();
        Py_CLEAR(result);
    }
    Py_DECREF(item);
    if (held.type)
        PyErr_Restore(held.type, held.value, held.traceback);
    return result;
}

/* --- marked ------------------------------------------------------------------------------------------------------ */

PyObject *marked(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    PyObject *result, *done;
    struct held held;

    (void)module;
    if (at_least(count, 3))
        return NULL;
    if (!PyList_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "marked() takes a list, a mark, a function, and its arguments");
        return NULL;
    }
    if (PyList_Append(args[0], args[1]))
        return NULL;
    result = PyObject_Vectorcall(args[2], args + 3, (size_t)count - 3, NULL);
    held = hold_exception();
    done = PyObject_CallMethod(args[0], "remove", "O", args[1]);
    if (!done)
        PyErr_Clear(); /* somebody has emptied the list */
    Py_XDECREF(done);
    if (held.type)
        PyErr_Restore(held.type, held.value, held.traceback);
    return result;
}

/* --- postponed --------------------------------------------------------------------------------------------------- */

struct postponed {
    struct held exception;
    pid_t process; /* a fork's child has these calls too, and nothing to raise */
    PyFrameObject *frame; /* whose call it is that must have returned first; NULL: nobody's */
};

static void free_postponed(struct postponed *postponed)
{
    Py_XDECREF(postponed->exception.type);
    Py_XDECREF(postponed->exception.value);
    Py_XDECREF(postponed->exception.traceback);
    Py_XDECREF(postponed->frame);
    PyMem_RawFree(postponed);
}

/* Is a function under way that `frame` has called, by whatever others? */
static bool is_in_a_call_of(PyFrameObject *frame)
{
    PyFrameObject *back, *current = (PyFrameObject *)Py_XNewRef((PyObject *)PyEval_GetFrame());

    if (!frame || current == frame) {
        Py_XDECREF(current);
        return false;
    }
    while (current && current != frame) {
        back = PyFrame_GetBack(current);
        Py_DECREF(current);
        current = back;
    }
    Py_XDECREF(current);
    return current != NULL;
}

/* The interpreter calls it between two bytecodes of the main thread. The frame has its turn before it calls anything else:
 * a function that it has called is one that still belongs to the fork. */
static int raise_postponed(void *argument)
{
    struct postponed *postponed = argument;
    struct held held = postponed->exception;

    if (postponed->process != getpid()) {
        free_postponed(postponed);
        return 0;
    }
    if (is_in_a_call_of(postponed->frame) && !Py_AddPendingCall(raise_postponed, postponed))
        return 0;
    postponed->exception = (struct held){NULL, NULL, NULL};
    free_postponed(postponed);
    PyErr_Restore(held.type, held.value, held.traceback);
    return -1;
}

PyObject *postponed(PyObject *module, PyObject *function)
{
    PyObject *result = conclude_call(function, Py_NewRef(Py_None));
    struct postponed *postponed;

    (void)module;
    if (result || !bus_error_is_main_thread())
        return result;
    postponed = PyMem_RawCalloc(1, sizeof *postponed);
    if (!postponed)
        return NULL;
    postponed->exception = hold_exception();
    postponed->process = getpid();
    postponed->frame = (PyFrameObject *)Py_XNewRef((PyObject *)PyEval_GetFrame());
    if (!Py_AddPendingCall(raise_postponed, postponed))
        Py_RETURN_NONE;
    PyErr_Restore(postponed->exception.type, postponed->exception.value, postponed->exception.traceback);
    postponed->exception = (struct held){NULL, NULL, NULL};
    free_postponed(postponed);
    return NULL;
}
