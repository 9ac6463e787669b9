/* BusErrors: the context manager behind `with bus_errors()`, and check().
 *
 * They are in C because the interpreter looks for asynchronous exceptions where Python functions begin: what has failed
 * in the block would be raised in the middle of its end.
 */

#include <Python.h>

#include "module.h"

struct bus_errors {
    PyObject_HEAD
    struct watched watched;
    bool entered;
};

/* The exception for a failed access; NULL with another one raised. */
static PyObject *exception_for(const struct bus_error *failure)
{
    PyObject *class = bus_error_class(), *exception;

    bus_error_note(failure);
    exception = PyObject_CallNoArgs(class);
    Py_DECREF(class);
    return exception;
}

static void raise(PyObject *exception)
{
    PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
}

PyObject *bus_errors_check(PyObject *module, PyObject *unused)
{
    struct bus_error failure;
    PyObject *exception;

    (void)module;
    (void)unused;
    if (!bus_error_take_pending(&failure))
        Py_RETURN_NONE;
    exception = exception_for(&failure);
    if (exception)
        raise(exception);
    Py_XDECREF(exception);
    return NULL;
}

static PyObject *enter(PyObject *object, PyObject *unused)
{
    struct bus_errors *self = (struct bus_errors *)object;

    (void)unused;
    if (self->entered) {
        PyErr_SetString(PyExc_RuntimeError, "this bus_errors() block has begun: make another");
        return NULL;
    }
    if (!watch_begin(PyThread_get_thread_ident(), &self->watched)) {
        PyErr_SetString(PyExc_RuntimeError, "too many threads are in bus_errors() blocks");
        return NULL;
    }
    self->entered = true;
    Py_RETURN_NONE;
}

/* What ends the thread or the task goes on ending it, and tells of the failure. */
static void tell_with(PyObject *under_way, PyObject *exception)
{
    PyObject *context = PyException_GetContext(under_way);

    if (!context)
        PyException_SetContext(under_way, Py_NewRef(exception));
    Py_XDECREF(context);
}

static PyObject *leave(PyObject *object, PyObject *args)
{
    struct bus_errors *self = (struct bus_errors *)object;
    PyObject *class, *under_way, *traceback, *exception;
    struct bus_error failure;
    bool failed;

    if (!PyArg_ParseTuple(args, "OOO:__exit__", &class, &under_way, &traceback))
        return NULL;
    failed = self->entered && watch_end(&self->watched, &failure);
    self->entered = false;
    failed = bus_error_take_pending(&failure) || failed; /* its own before those of threads of C */
    if (!failed)
        Py_RETURN_FALSE;
    exception = exception_for(&failure);
    if (!exception)
        return NULL;
    if (PyExceptionInstance_Check(under_way) && !PyObject_TypeCheck(under_way, (PyTypeObject *)PyExc_Exception)) {
        tell_with(under_way, exception);
        Py_DECREF(exception);
        Py_RETURN_FALSE;
    }
    raise(exception);
    Py_DECREF(exception);
    return NULL;
}

static void dealloc(PyObject *object)
{
    struct bus_errors *self = (struct bus_errors *)object;
    PyTypeObject *type = Py_TYPE(object);
    struct bus_error ignored;

    if (self->entered)
        watch_end(&self->watched, &ignored);
    type->tp_free(object);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"__enter__", enter, METH_NOARGS, NULL},
    {"__exit__", leave, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Raises at its end what has failed in the block."},
    {Py_tp_dealloc, dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};

PyType_Spec bus_errors_spec = {
    .name = "dax_mp.mmu._mmu.BusErrors",
    .basicsize = sizeof(struct bus_errors),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};
