/* The module dax_mp.mmu._mmu: its functions, its state, and what it does when the interpreter starts and ends.
 *
 * One instance a process: the signal handler, the windows and the pagers are of the process, not of an interpreter.
 */

#include <Python.h>

#include "module.h"
#include "system_calls.h"

#include <errno.h>

struct module_state *state_of(PyObject *object)
{
    return PyModule_GetState(PyType_GetModuleByDef(Py_TYPE(object), &mmu_module));
}

PyObject *raise_errno(int error)
{
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *none_or_errno(int error)
{
    return error ? raise_errno(error) : Py_NewRef(Py_None);
}

/* --- functions --------------------------------------------------------------------------------------------------- */

static PyObject *set_bus_error(PyObject *module, PyObject *args)
{
    struct module_state *state = PyModule_GetState(module);
    PyObject *class, *suspects = NULL;

    if (!PyArg_ParseTuple(args, "O|O:set_bus_error", &class, &suspects))
        return NULL;
    if (!PyExceptionClass_Check(class)) {
        PyErr_Format(PyExc_TypeError, "an exception class, not %R", class);
        return NULL;
    }
    bus_error_set_class(class, suspects);
    Py_XSETREF(state->bus_error, Py_NewRef(class));
    Py_XSETREF(state->suspects, Py_XNewRef(suspects));
    Py_RETURN_NONE;
}

/* The Python object of the window, if it still is that window. */
static PyObject *window_object_of(struct bus_error *taken)
{
    PyObject *object;

    windows_lock();
    if (!taken->window) /* it was closed when the access came */
        object = (PyObject *)closed_owner(taken->offset_bytes, &taken->offset_bytes);
    else
        object = taken->window->serial == taken->serial ? taken->window->object : NULL;
    windows_unlock();
    return Py_NewRef(object && Py_REFCNT(object) ? object : Py_None); /* not one that is being deallocated */
}

static PyObject *take_bus_error(PyObject *module, PyObject *unused)
{
    struct bus_error taken;
    PyObject *object;

    (void)module;
    (void)unused;
    if (!bus_error_take(&taken))
        Py_RETURN_NONE;
    object = window_object_of(&taken);
    return Py_BuildValue("iNK", taken.error, object, (unsigned long long)taken.offset_bytes);
}

static PyObject *claim_signals(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return none_or_errno(signals_claim());
}

static PyObject *release_signals(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return none_or_errno(signals_release());
}

/* Waits for the loader, in which another thread may be waiting for the GIL. */
static PyObject *interpose_system_calls(PyObject *module, PyObject *unused)
{
    int error;

    (void)module;
    (void)unused;
    Py_BEGIN_ALLOW_THREADS
    error = system_calls_interpose();
    Py_END_ALLOW_THREADS
    return none_or_errno(error);
}

/* Takes a reference that nobody gives back. */
static PyObject *keep_forever(PyObject *module, PyObject *object)
{
    (void)module;
    Py_INCREF(object);
    Py_RETURN_NONE;
}

/* Called by os.fork() in the child. Windows that came with the fork may fail in any thread here. */
static PyObject *after_fork_in_child(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return none_or_errno(windows_any() ? bus_error_start_delivery() : 0);
}

/* Called by atexit. */
static PyObject *end_delivery(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    bus_error_end_delivery();
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"set_bus_error", set_bus_error, METH_VARARGS, NULL},
    {"check", bus_errors_check, METH_NOARGS, NULL},
    {"take_bus_error", take_bus_error, METH_NOARGS, NULL},
    {"claim_signals", claim_signals, METH_NOARGS, NULL},
    {"release_signals", release_signals, METH_NOARGS, NULL},
    {"interpose_system_calls", interpose_system_calls, METH_NOARGS, NULL},
    {"keep_forever", keep_forever, METH_O, NULL},
    {"settled", (PyCFunction)(void (*)(void))settled, METH_FASTCALL, NULL},
    {"locked", (PyCFunction)(void (*)(void))locked, METH_FASTCALL, NULL},
    {"borrowed", (PyCFunction)(void (*)(void))borrowed, METH_FASTCALL, NULL},
    {"marked", (PyCFunction)(void (*)(void))marked, METH_FASTCALL, NULL},
    {"postponed", postponed, METH_O, NULL},
    {"_after_fork_in_child", after_fork_in_child, METH_NOARGS, NULL},
    {"_end_delivery", end_delivery, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

/* --- the module -------------------------------------------------------------------------------------------------- */

/* Calls `function` of the module called `name`; takes over the reference to `argument`. */
static int call(const char *name, const char *function, PyObject *args, PyObject *kwargs)
{
    PyObject *module = PyImport_ImportModule(name);
    PyObject *callable = module ? PyObject_GetAttrString(module, function) : NULL;
    PyObject *result = callable && args ? PyObject_Call(callable, args, kwargs) : NULL;

    Py_XDECREF(result);
    Py_XDECREF(callable);
    Py_XDECREF(module);
    Py_XDECREF(args);
    Py_XDECREF(kwargs);
    return result ? 0 : -1;
}

static int register_callbacks(PyObject *module)
{
    PyObject *end = PyObject_GetAttrString(module, "_end_delivery");
    PyObject *after_fork = PyObject_GetAttrString(module, "_after_fork_in_child");
    int result = -1;

    if (end && after_fork && !call("atexit", "register", Py_BuildValue("(O)", end), NULL))
        result = call("os", "register_at_fork", PyTuple_New(0), Py_BuildValue("{sO}", "after_in_child", after_fork));
    Py_XDECREF(end);
    Py_XDECREF(after_fork);
    return result;
}

static int main_thread_ident(unsigned long *ident)
{
    PyObject *threading = PyImport_ImportModule("threading");
    PyObject *thread = threading ? PyObject_CallMethod(threading, "main_thread", NULL) : NULL;
    PyObject *number = thread ? PyObject_GetAttrString(thread, "ident") : NULL;

    *ident = number ? PyLong_AsUnsignedLong(number) : 0;
    Py_XDECREF(number);
    Py_XDECREF(thread);
    Py_XDECREF(threading);
    return PyErr_Occurred() ? -1 : 0;
}

/* What there is one of in a process. */
static int init_process(void)
{
    static bool done;
    unsigned long ident;
    int error;

    if (done) {
        PyErr_SetString(PyExc_ImportError, "dax_mp.mmu._mmu can be loaded once in a process");
        return -1;
    }
    if (main_thread_ident(&ident))
        return -1;
    error = windows_init();
    if (!error)
        error = bus_error_init(ident);
    if (error)
        raise_errno(error);
    done = !error;
    return error ? -1 : 0;
}

static PyTypeObject *add_type(PyObject *module, PyType_Spec *spec)
{
    PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);

    if (type && PyModule_AddType(module, type))
        Py_CLEAR(type);
    return type;
}

static int module_exec(PyObject *module)
{
    struct module_state *state = PyModule_GetState(module);

    if (init_process())
        return -1;
    state->bus_error = Py_NewRef(PyExc_OSError);
    bus_error_set_class(state->bus_error, NULL);
    state->pager_type = add_type(module, &pager_spec);
    state->window_type = state->pager_type ? add_type(module, &window_spec) : NULL;
    state->bus_errors_type = state->window_type ? add_type(module, &bus_errors_spec) : NULL;
    return state->bus_errors_type ? register_callbacks(module) : -1;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    struct module_state *state = PyModule_GetState(module);

    Py_VISIT(state->pager_type);
    Py_VISIT(state->window_type);
    Py_VISIT(state->bus_error);
    Py_VISIT(state->suspects);
    Py_VISIT(state->bus_errors_type);
    return 0;
}

static int module_clear(PyObject *module)
{
    struct module_state *state = PyModule_GetState(module);

    if (state->bus_error) /* not of another interpreter's import, which has failed */
        bus_error_set_class(PyExc_OSError, NULL); /* a window may outlive the module */
    Py_CLEAR(state->pager_type);
    Py_CLEAR(state->window_type);
    Py_CLEAR(state->bus_error);
    Py_CLEAR(state->suspects);
    Py_CLEAR(state->bus_errors_type);
    return 0;
}

static void module_free(void *module)
{
    module_clear(module);
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
#if PY_VERSION_HEX >= 0x030c0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, NULL},
};

struct PyModuleDef mmu_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "dax_mp.mmu._mmu",
    .m_size = sizeof(struct module_state),
    .m_methods = functions,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__mmu(void)
{
    return PyModuleDef_Init(&mmu_module);
}
