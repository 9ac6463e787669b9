/* Indexes and slices of a Window, as mmap.mmap has them, and the copies that they are made of. */

#include <Python.h>

#include "window_object.h"

#include <errno.h>

/* A copy of this size and up lets other Python threads run. */
enum { GIL_COPY_BYTES = 1 << 20 };

/* --- copies ------------------------------------------------------------------------------------------------------- */

void raise_bus_error(PyObject *object)
{
    PyObject *class = Py_NewRef(state_of(object)->bus_error);
    PyObject *exception = PyObject_CallNoArgs(class); /* now, while the failed access is this thread's last */

    if (exception)
        PyErr_SetObject(class, exception);
    Py_XDECREF(exception);
    Py_DECREF(class);
}

/* Copies what does not end on the scratch page of another thread. */
static bool copy_truly(struct window *window, const struct copy *what)
{
    uint64_t cleared;
    bool done;

    do {
        cleared = window_clear_scratch(window);
        done = guarded_copy(what->to, what->to_step, what->from, what->from_step, what->count);
    } while (done && !what->overlaps && window_scratch_came(window, cleared));
    if (done && window_scratch_came(window, cleared)) {
        bus_error_note(window, window->serial, (uint64_t)(what->to - (char *)window->base), EAGAIN);
        done = false;
    }
    return done;
}

int copy(struct window_object *self, const struct copy *what)
{
    bool done;

    if (what->count < GIL_COPY_BYTES) {
        done = copy_truly(self->window, what);
    } else {
        self->exports++; /* so that it is not closed meanwhile */
        Py_BEGIN_ALLOW_THREADS
        done = copy_truly(self->window, what);
        Py_END_ALLOW_THREADS
        self->exports--;
    }
    if (!done)
        raise_bus_error((PyObject *)self);
    return done ? 0 : -1;
}

/* --- indexes and slices ------------------------------------------------------------------------------------------- */

Py_ssize_t window_length(PyObject *object)
{
    struct window_object *self = window_object(object);

    return is_open(self) ? self->length_bytes : -1;
}

/* The byte that an index means, or -1 with IndexError. */
static Py_ssize_t index_in(struct window_object *self, PyObject *key)
{
    Py_ssize_t index = PyNumber_AsSsize_t(key, PyExc_IndexError);

    if (index == -1 && PyErr_Occurred())
        return -1;
    if (index < 0)
        index += self->length_bytes;
    if (index < 0 || index >= self->length_bytes) {
        PyErr_SetString(PyExc_IndexError, "mmap index out of range");
        return -1;
    }
    return is_open(self) ? index : -1; /* the key's __index__ may have closed it */
}

static PyObject *get_byte(struct window_object *self, Py_ssize_t index)
{
    unsigned char byte;

    if (copy(self, &(struct copy){(char *)&byte, 1, memory(self) + index, 1, 1, false}))
        return NULL;
    return PyLong_FromLong(byte);
}

static PyObject *get_slice(struct window_object *self, PyObject *key)
{
    Py_ssize_t start, stop, step, count;
    PyObject *bytes;

    if (PySlice_Unpack(key, &start, &stop, &step) < 0)
        return NULL;
    count = PySlice_AdjustIndices(self->length_bytes, &start, &stop, step);
    if (!is_open(self))
        return NULL;
    bytes = PyBytes_FromStringAndSize(NULL, count);
    if (bytes && count &&
        copy(self, &(struct copy){PyBytes_AS_STRING(bytes), 1, memory(self) + start, step, (size_t)count, false}))
        Py_CLEAR(bytes);
    return bytes;
}

PyObject *window_subscript(PyObject *object, PyObject *key)
{
    struct window_object *self = window_object(object);

    if (!is_open(self))
        return NULL;
    if (PyIndex_Check(key)) {
        Py_ssize_t index = index_in(self, key);

        return index < 0 ? NULL : get_byte(self, index);
    }
    if (PySlice_Check(key))
        return get_slice(self, key);
    PyErr_SetString(PyExc_TypeError, "mmap indices must be integers");
    return NULL;
}

/* Iteration gives bytes of length 1. */
PyObject *window_item(PyObject *object, Py_ssize_t index)
{
    struct window_object *self = window_object(object);
    char byte;

    if (!is_open(self))
        return NULL;
    if (index < 0 || index >= self->length_bytes) {
        PyErr_SetString(PyExc_IndexError, "mmap index out of range");
        return NULL;
    }
    if (copy(self, &(struct copy){&byte, 1, memory(self) + index, 1, 1, false}))
        return NULL;
    return PyBytes_FromStringAndSize(&byte, 1);
}

static int set_byte(struct window_object *self, Py_ssize_t index, PyObject *value)
{
    Py_ssize_t number;
    char byte;

    if (!value) {
        PyErr_SetString(PyExc_TypeError, "mmap doesn't support item deletion");
        return -1;
    }
    if (!PyIndex_Check(value)) {
        PyErr_SetString(PyExc_TypeError, "mmap item value must be an int");
        return -1;
    }
    number = PyNumber_AsSsize_t(value, PyExc_TypeError);
    if (number == -1 && PyErr_Occurred())
        return -1;
    if (number < 0 || number > UINT8_MAX) {
        PyErr_SetString(PyExc_ValueError, "mmap item value must be in range(0, 256)");
        return -1;
    }
    if (!is_open(self))
        return -1;
    byte = (char)number;
    return copy(self, &(struct copy){memory(self) + index, 1, &byte, 1, 1, false});
}

/* Whether the bytes are of this window: another view of it, perhaps. */
static bool lies_in(struct window_object *self, const char *bytes, Py_ssize_t count)
{
    return bytes < memory(self) + self->length_bytes && bytes + count > memory(self);
}

static int set_slice(struct window_object *self, PyObject *key, PyObject *value)
{
    Py_ssize_t start, stop, step, count;
    Py_buffer source;
    int result = -1;

    if (!value) {
        PyErr_SetString(PyExc_TypeError, "mmap object doesn't support slice deletion");
        return -1;
    }
    if (PySlice_Unpack(key, &start, &stop, &step) < 0)
        return -1;
    count = PySlice_AdjustIndices(self->length_bytes, &start, &stop, step);
    if (PyObject_GetBuffer(value, &source, PyBUF_SIMPLE) < 0)
        return -1;
    if (source.len != count)
        PyErr_SetString(PyExc_IndexError, "mmap slice assignment is wrong size");
    else if (is_open(self))
        result = count ? copy(self, &(struct copy){memory(self) + start, step, source.buf, 1, (size_t)count,
                                                   lies_in(self, source.buf, count)})
                       : 0;
    PyBuffer_Release(&source);
    return result;
}

int window_ass_subscript(PyObject *object, PyObject *key, PyObject *value)
{
    struct window_object *self = window_object(object);

    if (!is_open(self) || !is_writable(self))
        return -1;
    if (PyIndex_Check(key)) {
        Py_ssize_t index = index_in(self, key);

        return index < 0 ? -1 : set_byte(self, index, value);
    }
    if (PySlice_Check(key))
        return set_slice(self, key, value);
    PyErr_SetString(PyExc_TypeError, "mmap indices must be integer");
    return -1;
}
