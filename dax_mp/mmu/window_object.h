/* The Window type's object, for the files that make it up: window_type.c, window_access.c, window_items.c,
 * window_ranges.c. */

#ifndef DAX_MP_WINDOW_OBJECT_H
#define DAX_MP_WINDOW_OBJECT_H

#include "module.h"

struct window_object {
    PyObject_HEAD
    PyObject *weak_references;
    struct pager_object *pager; /* for as long as the object lives: the handler uses it */
    struct window *window;      /* NULL: closed, or not opened */
    Py_ssize_t length_bytes;
    Py_ssize_t exports;
    Py_ssize_t held; /* accesses that are under way, perhaps without the GIL */
    unsigned long long vma_id;
    bool writable;
    bool is_private;
};

static inline struct window_object *window_object(PyObject *object)
{
    return (struct window_object *)object;
}

static inline char *memory(struct window_object *self)
{
    return (char *)self->window->base;
}

/* False, with ValueError, when it is closed. */
bool is_open(struct window_object *self);
/* False, with TypeError, when it is read-only. */
bool is_writable(struct window_object *self);

/* --- accesses (window_access.c) ----------------------------------------------------------------------------------- */

struct copy {
    char *to;
    ptrdiff_t to_step;
    const char *from;
    ptrdiff_t from_step;
    size_t count;
    bool overlaps; /* what it copies from lies in what it copies to */
};

/* Copies from or to the window's memory. May let other threads and signal handlers run. -1 with BusError, or with what
 * a signal handler has raised. */
int window_copy(struct window_object *self, const struct copy *what);
/* Touches a byte in each page of the range, without changing any. Otherwise as window_copy(). */
int window_touch(struct window_object *self, char *first, size_t count, bool to_store);
/* In the child of a fork: forgets the accesses of threads that are not there. */
void window_count_held(struct window_object *self);

/* --- indexes and slices (window_items.c) -------------------------------------------------------------------------- */

Py_ssize_t window_length(PyObject *object);
PyObject *window_item(PyObject *object, Py_ssize_t index);
PyObject *window_subscript(PyObject *object, PyObject *key);
int window_ass_subscript(PyObject *object, PyObject *key, PyObject *value);

/* --- methods on ranges (window_ranges.c) -------------------------------------------------------------------------- */

PyObject *window_method_populate(PyObject *object, PyObject *args);
PyObject *window_method_move(PyObject *object, PyObject *args);
PyObject *window_method_drop(PyObject *object, PyObject *args);
PyObject *window_method_keep(PyObject *object, PyObject *args);
PyObject *window_method_protect(PyObject *object, PyObject *args);
PyObject *window_method_resize(PyObject *object, PyObject *args);

#endif
