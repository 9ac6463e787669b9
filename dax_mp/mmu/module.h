/* The Python side: two types and a few functions. */

#ifndef DAX_MP_MODULE_H
#define DAX_MP_MODULE_H

#include <Python.h>

#include "bus_error.h"
#include "mmu.h"

struct module_state {
    PyTypeObject *pager_type;
    PyTypeObject *window_type;
    PyTypeObject *bus_errors_type;
    PyObject *bus_error; /* the class that is raised */
    PyObject *suspects;  /* NULL, or a function: see bus_error.h */
};

struct pager_object {
    PyObject_HEAD
    struct pager *pager;   /* NULL: __init__ has not succeeded */
    PyObject *closed_vmas; /* list of int: the vma_id of each of its windows that has been closed */
};

extern struct PyModuleDef mmu_module;
extern PyType_Spec pager_spec;
extern PyType_Spec window_spec;
extern PyType_Spec bus_errors_spec;

PyObject *bus_errors_check(PyObject *module, PyObject *unused);

/* The state of the module that `object`'s type is of. */
struct module_state *state_of(PyObject *object);

/* Functions of the module; what they do is in _mmu.pyi. */
PyObject *settled(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *locked(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *borrowed(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *marked(PyObject *module, PyObject *const *args, Py_ssize_t count);
PyObject *postponed(PyObject *module, PyObject *function);

/* Raises OSError for an errno; returns NULL. */
PyObject *raise_errno(int error);

#endif
