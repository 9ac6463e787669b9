/* What is done to ranges of a Window: populate, move, drop, keep, protect, resize. */

#include <Python.h>

#include "window_object.h"

#include <errno.h>

/* Whether [offset, offset + length) lies in the open window; raises where not. */
static bool has_bytes(struct window_object *self, Py_ssize_t offset, Py_ssize_t length)
{
    if (!is_open(self))
        return false;
    if (offset >= 0 && length >= 0 && offset <= self->length_bytes && length <= self->length_bytes - offset)
        return true;
    PyErr_SetString(PyExc_ValueError, "the range is not in the mapping");
    return false;
}

PyObject *window_method_populate(PyObject *object, PyObject *args)
{
    struct window_object *self = window_object(object);
    Py_ssize_t offset, length;
    int write;

    if (!PyArg_ParseTuple(args, "nnp:populate", &offset, &length, &write) || !has_bytes(self, offset, length))
        return NULL;
    if (write && !is_writable(self))
        return NULL;
    if (window_touch(self, memory(self) + offset, (size_t)length, write))
        return NULL;
    Py_RETURN_NONE;
}

PyObject *window_method_move(PyObject *object, PyObject *args)
{
    struct window_object *self = window_object(object);
    Py_ssize_t dest, src, count;
    struct copy what;

    if (!is_open(self) || !PyArg_ParseTuple(args, "nnn:move", &dest, &src, &count) || !is_open(self) ||
        !is_writable(self)) /* asked again: an __index__ may have closed it */
        return NULL;
    if (dest < 0 || src < 0 || count < 0 || self->length_bytes - dest < count || self->length_bytes - src < count) {
        PyErr_SetString(PyExc_ValueError, "source, destination, or count out of range");
        return NULL;
    }
    what = (struct copy){
        .to = memory(self) + dest,
        .to_step = 1,
        .from = memory(self) + src,
        .from_step = 1,
        .count = (size_t)count,
        .overlaps = dest < src + count && src < dest + count,
    };
    if (window_copy(self, &what))
        return NULL;
    Py_RETURN_NONE;
}

PyObject *window_method_drop(PyObject *object, PyObject *args)
{
    struct window_object *self = window_object(object);
    uint64_t page_size = page_size_bytes();
    Py_ssize_t offset, length;
    uint64_t first, end;

    if (!PyArg_ParseTuple(args, "nn:drop", &offset, &length) || !has_bytes(self, offset, length))
        return NULL;
    first = ((uint64_t)offset + page_size - 1) / page_size;
    end = offset + length == self->length_bytes ? self->window->length_pages : (uint64_t)(offset + length) / page_size;
    windows_lock();
    if (first < end)
        window_unmap(self->window, self->window->pgoff + first, end - first, true);
    windows_unlock();
    Py_RETURN_NONE;
}

PyObject *window_method_keep(PyObject *object, PyObject *args)
{
    struct window_object *self = window_object(object);
    uint64_t page_size = page_size_bytes(), first, end;
    Py_ssize_t offset, length;
    int keep, error;

    if (!PyArg_ParseTuple(args, "nnp:keep", &offset, &length, &keep))
        return NULL;
    if (keep ? !has_bytes(self, offset, length) : !is_open(self)) /* it may have shrunk since */
        return NULL;
    first = (uint64_t)offset / page_size;
    end = ((uint64_t)offset + (uint64_t)length + page_size - 1) / page_size;
    error = keep ? window_keep(self->window, first, end) : window_let_go(self->window, first, end);
    if (error)
        return raise_errno(error);
    Py_RETURN_NONE;
}

PyObject *window_method_protect(PyObject *object, PyObject *args)
{
    struct window_object *self = window_object(object);
    uint64_t page_size = page_size_bytes(), first, end;
    Py_ssize_t offset, length;
    int prot, error;

    if (!PyArg_ParseTuple(args, "nni:protect", &offset, &length, &prot) || !has_bytes(self, offset, length))
        return NULL;
    first = (uint64_t)offset / page_size;
    end = ((uint64_t)offset + (uint64_t)length + page_size - 1) / page_size;
    self->exports++;
    Py_BEGIN_ALLOW_THREADS
    error = (uint64_t)offset % page_size ? EINVAL : window_protect_pages(self->window, first, end, prot);
    Py_END_ALLOW_THREADS
    self->exports--;
    if (error)
        return raise_errno(error);
    Py_RETURN_NONE;
}

PyObject *window_method_resize(PyObject *object, PyObject *args)
{
    struct window_object *self = window_object(object);
    uint64_t page_size = page_size_bytes();
    Py_ssize_t length;
    int error;

    if (!PyArg_ParseTuple(args, "n:resize", &length) || !is_open(self))
        return NULL;
    if (length <= 0 || self->window->pgoff > INT64_MAX / page_size - ((uint64_t)length + page_size - 1) / page_size)
        return raise_errno(EINVAL);
    error = window_resize(self->window, ((uint64_t)length + page_size - 1) / page_size, !self->exports && !self->held);
    if (error == EBUSY) {
        PyErr_SetString(PyExc_BufferError, "the mapping would have to move, and exported pointers exist");
        return NULL;
    }
    if (error)
        return raise_errno(error);
    self->length_bytes = length;
    Py_RETURN_NONE;
}
