/* Indexes and slices of a Window, as mmap.mmap has them. */

#include <Python.h>

#include "window_object.h"

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

    if (window_copy(self, &(struct copy){(char *)&byte, 1, memory(self) + index, 1, 1, false}))
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
        window_copy(self, &(struct copy){PyBytes_AS_STRING(bytes), 1, memory(self) + start, step, (size_t)count, false}))
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
    if (window_copy(self, &(struct copy){&byte, 1, memory(self) + index, 1, 1, false}))
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
    return window_copy(self, &(struct copy){memory(self) + index, 1, &byte, 1, 1, false});
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
        result = count ? window_copy(self, &(struct copy){memory(self) + start, step, source.buf, 1, (size_t)count,
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
