/* Bus errors as Python sees them: bus_error.c. With the GIL, all of it. */

#ifndef DAX_MP_BUS_ERROR_H
#define DAX_MP_BUS_ERROR_H

#include <Python.h>

#include "mmu.h"

struct bus_error {
    int error; /* errno; 0: none */
    struct window *window; /* NULL: one that was closed already, and `offset_bytes` is the address */
    uint64_t serial; /* of the window */
    uint64_t offset_bytes;
};

/* The main thread is the one that Python runs signal handlers in. */
bool bus_error_is_main_thread(void);

/* Once. 0 or an errno. */
int bus_error_init(unsigned long main_thread_ident);
/* The class that is raised. The caller keeps a reference to it. Before anything can fault. */
void bus_error_set_class(PyObject *class);

/* Makes this the failed access that bus_error_take() gives next in this thread. */
void bus_error_note(struct window *window, uint64_t serial, uint64_t offset_bytes, int error);

/* Takes this thread's failed access and drops the scratch pages. False: there was none. */
bool bus_error_take(struct bus_error *taken);

/* The thread that raises in threads that do not hold the GIL. Starting it twice is once; after its end it never
 * starts again: a thread that meets the interpreter's finalization does not survive it. */
int bus_error_start_delivery(void);
void bus_error_end_delivery(void);

#endif
