/* System calls whose buffer lies in a window. What the files about them share: buffers.c, system_calls.c, sockets.c,
 * stdio.c, memory_calls.c, interpose.c. */

#ifndef DAX_MP_SYSTEM_CALLS_H
#define DAX_MP_SYSTEM_CALLS_H

#include "mmu.h"

#include <errno.h>
#include <limits.h>
#include <sys/socket.h>
#include <sys/uio.h>

/* --- buffers (buffers.c) ------------------------------------------------------------------------------------------ */

/* What a system call is given: parts of memory, one after the other. */
struct buffers {
    const struct iovec *parts;
    size_t count;
    size_t length_bytes; /* of all parts, or what the kernel moves in one call at most */
};

/* Whether any part begins in a window. Cheap where none does. False too for what no call would take. */
bool buffers_in_window(const struct iovec *parts, size_t count);
struct buffers buffers_of(const struct iovec *parts, size_t count);
/* Fills `rest` with the parts, but for their first `done` bytes. Returns how many there are. */
size_t buffers_rest(const struct buffers *buffers, size_t done, struct iovec *rest);

enum { BUFFERS_PARTS_MAX = 1024 /* IOV_MAX */, ROUNDS_MAX = 16 /* in vain, before a call fails */ };

/* How far one round of a call asks for pages. */
enum { ASKED_BYTES = 1 << 20 };

/* What to look for, in bytes of the buffers from `from` on: at `look_bytes` of them, and from the first page that is
 * missing on at `ask_bytes`. */
struct look {
    size_t from;
    size_t look_bytes;
    size_t ask_bytes;
    bool store;  /* the kernel is to store there */
    bool unseen; /* ask for the pages that seem to be there, too */
};

/* Has the missing pages mapped. 0: none is missing; 1: some were, and are mapped now; else the negative errno that says
 * why the first of them cannot be. */
int buffers_map(const struct buffers *buffers, const struct look *look);
int buffers_init(void);

/* A call that is repeated: what became of the last round. */
struct rounds {
    size_t done;       /* bytes that were moved */
    unsigned in_vain;  /* rounds in a row that moved none */
    int error;         /* of the last round; 0 none */
};

/* Counts what a call has moved; -1 with errno. True: it may be worth while to go on. */
bool rounds_count(struct rounds *rounds, const struct buffers *buffers, ssize_t moved);
/* Whether it is worth while to go on after a round found a page missing: has pages mapped from `done` on, of `look_bytes`.
 * False: `error` says why not. */
bool rounds_go_on(struct rounds *rounds, const struct buffers *buffers, size_t look_bytes, bool store);
/* What the caller gets of it all. errno is what it was before where the call has succeeded. */
ssize_t rounds_result(const struct rounds *rounds, int saved_errno);
/* How much a pipe or a socket has ready to be read; one byte at least. */
size_t waiting_in(int fd);

/* --- the calls ---------------------------------------------------------------------------------------------------- */

/* A libc function, and what takes its place. A table of them ends with a NULL name. */
struct replacement {
    const char *name;
    void (*function)(void);
};

extern const struct replacement file_replacements[], socket_replacements[], stdio_replacements[], memory_replacements[];

/* --- interposition (interpose.c) ---------------------------------------------------------------------------------- */

/* Puts the replacements in the place of the functions, for all that is loaded and all that will be. Again: nothing more.
 * Waits for the loader: without the GIL. 0 or an errno. */
int system_calls_interpose(void);
/* Whether that has been done. */
bool system_calls_are_interposed(void);

#endif
