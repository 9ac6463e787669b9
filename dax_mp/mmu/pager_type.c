/* Pager: a struct pager with Python's reference count. Its windows hold a reference to it. */

#include <Python.h>

#include "module.h"
#include "userfaultfd.h"

#include <errno.h>
#include <string.h>
#include <structmember.h>

/* What __init__ is given, before it is looked at. */
struct arguments {
    const char *path;
    Py_buffer token;
    unsigned int version;
    int pmem_fd;
    int dram_fd;
    int timeout_ms;
    int sigbus;
    int by_userfaultfd;
    int answer_timeout_ms;
};

static int parse(PyObject *args, PyObject *kwargs, struct arguments *given)
{
    static char *names[] = {"path",    "token",      "version", "pmem_fd",
                            "dram_fd", "timeout_ms", "sigbus",  "answer_timeout_ms",
                            "userfaultfd", NULL};

    return PyArg_ParseTupleAndKeywords(args, kwargs, "$sy*Iiiipip:Pager", names, &given->path, &given->token,
                                       &given->version, &given->pmem_fd, &given->dram_fd, &given->timeout_ms,
                                       &given->sigbus, &given->answer_timeout_ms, &given->by_userfaultfd);
}

static int configure(const struct arguments *given, struct pager_config *config)
{
    if (given->token.len != TOKEN_BYTES) {
        PyErr_Format(PyExc_ValueError, "a token is %d bytes, not %zd", TOKEN_BYTES, given->token.len);
        return -1;
    }
    config->path = given->path;
    memcpy(config->token, given->token.buf, TOKEN_BYTES);
    config->version = given->version;
    config->pmem_fd = given->pmem_fd;
    config->dram_fd = given->dram_fd;
    config->timeout_ms = given->timeout_ms;
    config->answer_timeout_ms = given->answer_timeout_ms;
    config->sigbus = given->sigbus;
    config->by_userfaultfd = given->by_userfaultfd;
    return 0;
}

static int start(struct pager_object *self, const struct pager_config *config)
{
    struct pager *pager;
    int error = config->by_userfaultfd ? userfaultfd_start() : 0;

    if (!config->by_userfaultfd)
        signals_want_faults();
    if (!error)
        error = signals_claim();
    if (!error)
        error = bus_error_start_delivery();
    if (!error) {
        Py_BEGIN_ALLOW_THREADS
        error = pager_start(config, &pager);
        Py_END_ALLOW_THREADS
    }
    if (error) {
        raise_errno(error);
        return -1;
    }
    self->pager = pager;
    return 0;
}

static int pager_init(PyObject *object, PyObject *args, PyObject *kwargs)
{
    struct pager_object *self = (struct pager_object *)object;
    struct arguments given = {.timeout_ms = 0};
    struct pager_config config;
    int result;

    if (self->pager) {
        PyErr_SetString(PyExc_RuntimeError, "Pager.__init__ was called before");
        return -1;
    }
    if (!self->closed_vmas)
        self->closed_vmas = PyList_New(0);
    if (!self->closed_vmas || !parse(args, kwargs, &given))
        return -1;
    result = configure(&given, &config);
    if (!result)
        result = start(self, &config);
    PyBuffer_Release(&given.token);
    return result;
}

static void stop(struct pager *pager, int error)
{
    Py_BEGIN_ALLOW_THREADS
    pager_stop(pager, error);
    Py_END_ALLOW_THREADS
}

static void pager_dealloc(PyObject *object)
{
    struct pager_object *self = (struct pager_object *)object;
    PyTypeObject *type = Py_TYPE(object);

    if (self->pager) {
        stop(self->pager, ESTALE);
        pager_free(self->pager);
    }
    Py_XDECREF(self->closed_vmas);
    type->tp_free(object);
    Py_DECREF(type);
}

static struct pager *started(PyObject *object)
{
    struct pager *pager = ((struct pager_object *)object)->pager;

    if (!pager)
        PyErr_SetString(PyExc_ValueError, "this Pager was not started: its __init__ did not succeed");
    return pager;
}

static PyObject *pager_close(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"errno", NULL};
    int error = ESTALE;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|i:close", names, &error))
        return NULL;
    if (error <= 0) {
        PyErr_Format(PyExc_ValueError, "%d is no errno", error);
        return NULL;
    }
    if (!started(object))
        return NULL;
    stop(started(object), error);
    Py_RETURN_NONE;
}

static PyObject *pager_errno(PyObject *object, void *unused)
{
    struct pager *pager = started(object);

    (void)unused;
    return pager ? PyLong_FromLong(atomic_load(&pager->error)) : NULL;
}

static PyObject *pager_last_unmap(PyObject *object, void *unused)
{
    struct pager *pager = started(object);
    uint64_t last_unmap;

    (void)unused;
    if (!pager)
        return NULL;
    windows_lock();
    last_unmap = pager->last_unmap;
    windows_unlock();
    return PyLong_FromUnsignedLongLong(last_unmap);
}

static PyObject *pager_serves_system_calls(PyObject *object, void *unused)
{
    struct pager *pager = started(object);

    (void)unused;
    return pager ? PyBool_FromLong(pager->config.by_userfaultfd && userfaultfd_serves_kernel()) : NULL;
}

static PyObject *pager_closed_vmas(PyObject *object, void *unused)
{
    (void)unused;
    return started(object) ? Py_NewRef(((struct pager_object *)object)->closed_vmas) : NULL;
}

static PyObject *pager_counters(PyObject *object, PyObject *unused)
{
    struct pager *pager = started(object);

    (void)unused;
    if (!pager)
        return NULL;
#define COUNTER(counter) (unsigned long long)atomic_load(&pager->counters[counter])
    return Py_BuildValue("{sKsKsKsKsK}", "faults", COUNTER(COUNT_FAULTS), "bus_errors", COUNTER(COUNT_BUS_ERRORS),
                         "maps", COUNTER(COUNT_MAPS), "unmaps", COUNTER(COUNT_UNMAPS), "drops", COUNTER(COUNT_DROPS));
#undef COUNTER
}

/* Copies to or from lent frames; returns how many bytes. */
static PyObject *copy_lent(PyObject *object, PyObject *args, bool to_region)
{
    struct pager *pager = started(object);
    unsigned long long offset_bytes;
    Py_buffer buffer;
    ssize_t done;
    int error;

    if (!pager || !PyArg_ParseTuple(args, to_region ? "y*K:store" : "w*K:load", &buffer, &offset_bytes))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    done = to_region ? pager_store(pager, buffer.buf, (size_t)buffer.len, offset_bytes, &error)
                     : pager_load(pager, buffer.buf, (size_t)buffer.len, offset_bytes, &error);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&buffer);
    return done < 0 ? raise_errno(error) : PyLong_FromSsize_t(done);
}

static PyObject *pager_method_store(PyObject *object, PyObject *args)
{
    return copy_lent(object, args, true);
}

static PyObject *pager_method_load(PyObject *object, PyObject *args)
{
    return copy_lent(object, args, false);
}

static PyMethodDef pager_methods[] = {
    {"close", (PyCFunction)(void (*)(void))pager_close, METH_VARARGS | METH_KEYWORDS, NULL},
    {"counters", pager_counters, METH_NOARGS, NULL},
    {"store", pager_method_store, METH_VARARGS, NULL},
    {"load", pager_method_load, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef pager_getset[] = {
    {"errno", pager_errno, NULL, NULL, NULL},
    {"last_unmap", pager_last_unmap, NULL, NULL, NULL},
    {"serves_system_calls", pager_serves_system_calls, NULL, NULL, NULL},
    {"closed_vmas", pager_closed_vmas, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot pager_slots[] = {
    {Py_tp_doc, "One session's native pager: a ZeroMQ DEALER and the thread that serves it."},
    {Py_tp_init, pager_init},
    {Py_tp_dealloc, pager_dealloc},
    {Py_tp_methods, pager_methods},
    {Py_tp_getset, pager_getset},
    {0, NULL},
};

PyType_Spec pager_spec = {
    .name = "dax_mp.mmu._mmu.Pager",
    .basicsize = sizeof(struct pager_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = pager_slots,
};
