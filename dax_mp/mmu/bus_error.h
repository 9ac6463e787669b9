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
/* The class that is raised, and a function that gives the idents of the threads that may have called what runs in a
 * thread that is not Python's; NULL: it is always the main one. The caller keeps references to both. Before anything can
 * fault. */
void bus_error_set_class(PyObject *class, PyObject *suspects);
/* A new reference to the class. */
PyObject *bus_error_class(void);

/* Makes this the failed access that bus_error_take() gives next in this thread. */
void bus_error_note(const struct bus_error *failure);

/* Takes what is to be raised in this thread, so that it does not come asynchronously any more: its own failed access, or
 * that of a thread that is not Python's. False: there is none. The scratch pages are there until bus_error_take(). */
bool bus_error_take_pending(struct bus_error *failure);

/* Takes this thread's failed access and drops the scratch pages. False: there was none. */
bool bus_error_take(struct bus_error *taken);

/* The thread that raises in threads that do not hold the GIL. Starting it twice is once; after its end it never
 * starts again: a thread that meets the interpreter's finalization does not survive it. */
int bus_error_start_delivery(void);
void bus_error_end_delivery(void);

/* --- threads in a bus_errors() block (watch.c) --------------------------------------------------------------------- */

struct watched {
    struct watch *watch;
    uint64_t use;
};

/* A block of the thread begins. False: there are too many. */
bool watch_begin(unsigned long thread, struct watched *watched);
/* It ends, in any thread. True: with a failure. */
bool watch_end(const struct watched *watched, struct bus_error *failure);
/* Takes the failure that the thread has been left. */
bool watch_take(unsigned long thread, struct bus_error *failure);
/* From the signal handler: leaves a failure with every thread that is in a block. False: there is none. */
bool watches_note(const struct bus_error *failure);
/* In the child of a fork, where this thread is the only one. */
void watches_after_fork_in_child(unsigned long thread);

#endif
