/* Window: a struct window with Python's buffer protocol, and indexes and slices as mmap.mmap has them.
 *
 * A window's memory is there until close(), and close() refuses while a buffer is out or an access is under way. So
 * whoever reads or writes it holds an export, or is one of those that window_access.c counts. Who keeps the address and
 * no export (np.ndarray(buffer=mapping)) finds the range closed afterwards: see closed.c. The object is what such an
 * array keeps alive.
 */

#include <Python.h>

#include "window_object.h"

#include <errno.h>
#include <structmember.h>

bool is_open(struct window_object *self)
{
    if (!self->window)
        PyErr_SetString(PyExc_ValueError, "mmap closed or invalid");
    return self->window != NULL;
}

bool is_writable(struct window_object *self)
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
    if (self->exports > 0 || self->held > 0) {
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
    windows_forget(self);
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
    self->window->is_out = true;
    return 0;
}

static void window_releasebuffer(PyObject *object, Py_buffer *view)
{
    (void)view;
    window_object(object)->exports--;
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
    if (self->window)
        self->window->is_out = true;
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

/* --- the child of a fork ------------------------------------------------------------------------------------------ */

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
    window_count_held(self);
    if (!self->held) /* else an access that the fork was in the middle of looks at the old one, which so lives on */
        Py_DECREF(old);
    Py_RETURN_NONE;
}

/* --- the type ----------------------------------------------------------------------------------------------------- */

static PyMethodDef window_methods[] = {
    {"close", window_method_close, METH_NOARGS, NULL},
    {"populate", window_method_populate, METH_VARARGS, NULL},
    {"move", window_method_move, METH_VARARGS, NULL},
    {"drop", window_method_drop, METH_VARARGS, NULL},
    {"keep", window_method_keep, METH_VARARGS, NULL},
    {"protect", window_method_protect, METH_VARARGS, NULL},
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
