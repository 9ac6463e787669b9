/* Window: a struct window with Python's buffer protocol, and indexes and slices as mmap.mmap has them.
 *
 * A window's memory is there until close(), and close() refuses while a buffer is out. So whoever reads or writes it
 * holds an export, or holds the GIL since the check that it is open; a thread that sleeps in a fault with the GIL held
 * keeps it open too.
 */

#include <Python.h>

#include "module.h"

#include <errno.h>
#include <string.h>
#include <structmember.h>

/* A copy of this size and up lets other Python threads run. */
enum { GIL_COPY_BYTES = 1 << 20 };

struct window_object {
    PyObject_HEAD
    PyObject *weak_references;
    struct pager_object *pager; /* for as long as the object lives: the handler uses it */
    struct window *window;      /* NULL: closed, or not opened */
    Py_ssize_t length_bytes;
    Py_ssize_t exports;
    unsigned long long vma_id;
    bool writable;
    bool is_private;
};

static struct window_object *window_object(PyObject *object)
{
    return (struct window_object *)object;
}

static char *memory(struct window_object *self)
{
    return (char *)self->window->base;
}

static bool is_open(struct window_object *self)
{
    if (!self->window)
        PyErr_SetString(PyExc_ValueError, "mmap closed or invalid");
    return self->window != NULL;
}

static bool is_writable(struct window_object *self)
{
    if (!self->writable)
        PyErr_SetString(PyExc_TypeError, "mmap can't modify a readonly memory map.");
    return self->writable;
}

/* --- life -------------------------------------------------------------------------------------------------------- */

static int open_window(struct window_object *self, struct pager_object *pager, unsigned long long pgoff)
{
    uint64_t page_size = page_size_bytes();
    uint64_t length_pages = ((uint64_t)self->length_bytes + page_size - 1) / page_size;
    int error = pager->pager ? signals_claim() : EBADF;

    if (!error && (self->length_bytes <= 0 || pgoff > INT64_MAX / page_size - length_pages))
        error = EINVAL;
    if (!error)
        error = window_open(pager->pager, self->vma_id, pgoff, length_pages, self->writable,
                            self->is_private, self, &self->window);
    if (error) {
        raise_errno(error);
        return -1;
    }
    Py_INCREF(pager);
    self->pager = pager;
    return 0;
}

static int unsigned_long_long(PyObject *object, void *result)
{
    unsigned long long value = PyLong_AsUnsignedLongLong(object);

    *(unsigned long long *)result = value;
    return value != (unsigned long long)-1 || !PyErr_Occurred();
}

static int window_init(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"pager", "vma_id", "pgoff", "length_bytes", "writable", "private", NULL};
    struct window_object *self = window_object(object);
    struct pager_object *pager;
    unsigned long long pgoff;
    int writable, is_private = 0;

    if (self->pager) {
        PyErr_SetString(PyExc_RuntimeError, "Window.__init__ was called before");
        return -1;
    }
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!O&O&np|p:Window", names, state_of(object)->pager_type, &pager,
                                     unsigned_long_long, &self->vma_id, unsigned_long_long, &pgoff,
                                     &self->length_bytes, &writable, &is_private))
        return -1;
    self->writable = writable;
    self->is_private = is_private;
    return open_window(self, pager, pgoff);
}

/* Puts the VMA on its pager's list, for Python to tell the coordinator. It is done here because no Python code can run
 * in an object's destructor after this point, and before it the translations are still there. */
static void report_closed(struct window_object *self)
{
    PyObject *type, *value, *traceback, *vma_id;

    PyErr_Fetch(&type, &value, &traceback);
    vma_id = PyLong_FromUnsignedLongLong(self->vma_id);
    if (!vma_id || PyList_Append(self->pager->closed_vmas, vma_id))
        PyErr_Clear(); /* no memory: the VMA goes with its session */
    Py_XDECREF(vma_id);
    PyErr_Restore(type, value, traceback);
}

static void close_window(struct window_object *self)
{
    if (!self->window)
        return;
    window_close(self->window);
    self->window = NULL;
    report_closed(self);
}

static PyObject *window_method_close(PyObject *object, PyObject *unused)
{
    struct window_object *self = window_object(object);

    (void)unused;
    if (self->exports > 0) {
        PyErr_SetString(PyExc_BufferError, "cannot close exported pointers exist");
        return NULL;
    }
    close_window(self);
    Py_RETURN_NONE;
}

static int window_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(window_object(object)->pager);
    return 0;
}

static void window_dealloc(PyObject *object)
{
    struct window_object *self = window_object(object);
    PyTypeObject *type = Py_TYPE(object);

    PyObject_GC_UnTrack(object);
    if (self->weak_references)
        PyObject_ClearWeakRefs(object);
    close_window(self);
    Py_CLEAR(self->pager);
    type->tp_free(object);
    Py_DECREF(type);
}

/* --- buffer protocol --------------------------------------------------------------------------------------------- */

static int window_getbuffer(PyObject *object, Py_buffer *view, int flags)
{
    struct window_object *self = window_object(object);

    view->obj = NULL;
    if (!is_open(self))
        return -1;
    if (PyBuffer_FillInfo(view, object, memory(self), self->length_bytes, !self->writable, flags))
        return -1;
    self->exports++;
    return 0;
}

static void window_releasebuffer(PyObject *object, Py_buffer *view)
{
    (void)view;
    window_object(object)->exports--;
}

/* --- copies ------------------------------------------------------------------------------------------------------ */

struct copy {
    char *to;
    ptrdiff_t to_step;
    const char *from;
    ptrdiff_t from_step;
    size_t count;
};

static void raise_bus_error(PyObject *object)
{
    PyObject *class = Py_NewRef(state_of(object)->bus_error);
    PyObject *exception = PyObject_CallNoArgs(class); /* now, while the failed access is this thread's last */

    if (exception)
        PyErr_SetObject(class, exception);
    Py_XDECREF(exception);
    Py_DECREF(class);
}

/* Copies from or to the window's memory. -1 with BusError. */
static int copy(struct window_object *self, const struct copy *what)
{
    bool done;

    if (what->count < GIL_COPY_BYTES) {
        done = guarded_copy(what->to, what->to_step, what->from, what->from_step, what->count);
    } else {
        self->exports++; /* so that it is not closed meanwhile */
        Py_BEGIN_ALLOW_THREADS
        done = guarded_copy(what->to, what->to_step, what->from, what->from_step, what->count);
        Py_END_ALLOW_THREADS
        self->exports--;
    }
    if (!done)
        raise_bus_error((PyObject *)self);
    return done ? 0 : -1;
}

/* --- indexes and slices, as mmap.mmap has them ------------------------------------------------------------------- */

static Py_ssize_t window_length(PyObject *object)
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

    if (copy(self, &(struct copy){(char *)&byte, 1, memory(self) + index, 1, 1}))
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
        copy(self, &(struct copy){PyBytes_AS_STRING(bytes), 1, memory(self) + start, step, (size_t)count}))
        Py_CLEAR(bytes);
    return bytes;
}

static PyObject *window_subscript(PyObject *object, PyObject *key)
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
static PyObject *window_item(PyObject *object, Py_ssize_t index)
{
    struct window_object *self = window_object(object);
    char byte;

    if (!is_open(self))
        return NULL;
    if (index < 0 || index >= self->length_bytes) {
        PyErr_SetString(PyExc_IndexError, "mmap index out of range");
        return NULL;
    }
    if (copy(self, &(struct copy){&byte, 1, memory(self) + index, 1, 1}))
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
    return copy(self, &(struct copy){memory(self) + index, 1, &byte, 1, 1});
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
        result = count ? copy(self, &(struct copy){memory(self) + start, step, source.buf, 1, (size_t)count}) : 0;
    PyBuffer_Release(&source);
    return result;
}

static int window_ass_subscript(PyObject *object, PyObject *key, PyObject *value)
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

/* --- attributes -------------------------------------------------------------------------------------------------- */

static PyObject *get_closed(PyObject *object, void *unused)
{
    (void)unused;
    return PyBool_FromLong(!window_object(object)->window);
}

static PyObject *get_address(PyObject *object, void *unused)
{
    struct window_object *self = window_object(object);

    (void)unused;
    return PyLong_FromVoidPtr(self->window ? memory(self) : NULL);
}

static PyObject *get_exports(PyObject *object, void *unused)
{
    (void)unused;
    return PyLong_FromSsize_t(window_object(object)->exports);
}

static PyObject *get_vma_id(PyObject *object, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(window_object(object)->vma_id);
}

static PyObject *get_writable(PyObject *object, void *unused)
{
    (void)unused;
    return PyBool_FromLong(window_object(object)->writable);
}

static PyObject *get_private(PyObject *object, void *unused)
{
    (void)unused;
    return PyBool_FromLong(window_object(object)->is_private);
}

/* --- methods on ranges ------------------------------------------------------------------------------------------- */

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

static PyObject *none_or_bus_error(struct window_object *self, bool done)
{
    if (done)
        Py_RETURN_NONE;
    raise_bus_error((PyObject *)self);
    return NULL;
}

static PyObject *window_method_populate(PyObject *object, PyObject *args)
{
    struct window_object *self = window_object(object);
    Py_ssize_t offset, length;
    int write;
    bool done;

    if (!PyArg_ParseTuple(args, "nnp:populate", &offset, &length, &write) || !has_bytes(self, offset, length))
        return NULL;
    if (write && !is_writable(self))
        return NULL;
    self->exports++;
    Py_BEGIN_ALLOW_THREADS
    done = guarded_touch(memory(self) + offset, (size_t)length, page_size_bytes(), write);
    Py_END_ALLOW_THREADS
    self->exports--;
    return none_or_bus_error(self, done);
}

static PyObject *window_method_move(PyObject *object, PyObject *args)
{
    struct window_object *self = window_object(object);
    Py_ssize_t dest, src, count;
    struct copy what;

    if (!PyArg_ParseTuple(args, "nnn:move", &dest, &src, &count) || !is_open(self) || !is_writable(self))
        return NULL;
    if (dest < 0 || src < 0 || count < 0 || self->length_bytes - dest < count || self->length_bytes - src < count) {
        PyErr_SetString(PyExc_ValueError, "source, destination, or count out of range");
        return NULL;
    }
    what = (struct copy){memory(self) + dest, 1, memory(self) + src, 1, (size_t)count};
    if (copy(self, &what))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *window_method_drop(PyObject *object, PyObject *args)
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

static PyObject *window_method_keep(PyObject *object, PyObject *keep)
{
    struct window_object *self = window_object(object);
    int kept = PyObject_IsTrue(keep);

    if (kept < 0 || !is_open(self))
        return NULL;
    window_keep(self->window, kept);
    Py_RETURN_NONE;
}

static PyObject *window_method_rebind(PyObject *object, PyObject *args)
{
    struct window_object *self = window_object(object);
    struct pager_object *pager, *old = self->pager;
    unsigned long long vma_id;

    if (!PyArg_ParseTuple(args, "O!O&:rebind", state_of(object)->pager_type, &pager, unsigned_long_long, &vma_id) ||
        !is_open(self))
        return NULL;
    if (!pager->pager)
        return raise_errno(EBADF);
    window_rebind(self->window, pager->pager, vma_id);
    self->vma_id = vma_id;
    self->pager = (struct pager_object *)Py_NewRef(pager);
    Py_DECREF(old);
    Py_RETURN_NONE;
}

static PyObject *window_method_resize(PyObject *object, PyObject *args)
{
    struct window_object *self = window_object(object);
    uint64_t page_size = page_size_bytes();
    Py_ssize_t length;
    int error;

    if (!PyArg_ParseTuple(args, "n:resize", &length) || !is_open(self))
        return NULL;
    if (length <= 0 || self->window->pgoff > INT64_MAX / page_size - ((uint64_t)length + page_size - 1) / page_size)
        return raise_errno(EINVAL);
    error = window_resize(self->window, ((uint64_t)length + page_size - 1) / page_size, !self->exports);
    if (error == EBUSY) {
        PyErr_SetString(PyExc_BufferError, "the mapping would have to move, and exported pointers exist");
        return NULL;
    }
    if (error)
        return raise_errno(error);
    self->length_bytes = length;
    Py_RETURN_NONE;
}

static PyMethodDef window_methods[] = {
    {"close", window_method_close, METH_NOARGS, NULL},
    {"populate", window_method_populate, METH_VARARGS, NULL},
    {"move", window_method_move, METH_VARARGS, NULL},
    {"drop", window_method_drop, METH_VARARGS, NULL},
    {"keep", window_method_keep, METH_O, NULL},
    {"rebind", window_method_rebind, METH_VARARGS, NULL},
    {"resize", window_method_resize, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef window_getset[] = {
    {"closed", get_closed, NULL, NULL, NULL},     {"address", get_address, NULL, NULL, NULL},
    {"exports", get_exports, NULL, NULL, NULL},   {"vma_id", get_vma_id, NULL, NULL, NULL},
    {"writable", get_writable, NULL, NULL, NULL}, {"private", get_private, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef window_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(struct window_object, weak_references), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot window_slots[] = {
    {Py_tp_doc, "A range of reserved address space that shows a file from one of its pages on."},
    {Py_tp_init, window_init},
    {Py_tp_dealloc, window_dealloc},
    {Py_tp_traverse, window_traverse},
    {Py_tp_methods, window_methods},
    {Py_tp_getset, window_getset},
    {Py_tp_members, window_members},
    {Py_bf_getbuffer, window_getbuffer},
    {Py_bf_releasebuffer, window_releasebuffer},
    {Py_mp_length, window_length},
    {Py_mp_subscript, window_subscript},
    {Py_mp_ass_subscript, window_ass_subscript},
    {Py_sq_length, window_length},
    {Py_sq_item, window_item},
    {0, NULL},
};

PyType_Spec window_spec = {
    .name = "dax_mp.mmu._mmu.Window",
    .basicsize = sizeof(struct window_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = window_slots,
};
