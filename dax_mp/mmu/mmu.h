/* Windows, faults and pagers: what the signal handler, the pager threads and Python's types share. No Python in here.
 *
 * Who may do what:
 * - The signal handler (fault.c) takes no lock, allocates nothing and frees nothing. It searches the window table,
 *   posts a `struct fault` that lies on its own stack to the window's pager, and sleeps until that is done.
 * - A pager thread (pager.c, orders.c) never takes the GIL. It is the only one that maps anything but scratch pages.
 * - `windows_lock()` is held by whoever opens or closes a window, changes what it has mapped, or forks. A holder
 *   touches no window's memory and waits for nothing but mmap(2), so it may be taken with the GIL held.
 *
 * Lock order: the GIL, then a pager's `join_lock`, then windows_lock().
 */

#ifndef DAX_MP_MMU_H
#define DAX_MP_MMU_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/types.h>

#include "zmtp.h"

struct pager;

/* --- windows (window.c, window_table.c) -------------------------------------------------------------------------- */

enum { SCRATCH_RANGES = 16 };

/* Pages of a window, which count from its first one. */
struct kept {
    uint64_t first;
    uint64_t end;
    struct kept *next;
};

struct protections;

/* A range of reserved address space that shows the pages of a file from `pgoff` on. The fields are written under
 * windows_lock() before the window can be found, and stay as they are until it is closed; those of the last group
 * change meanwhile. The memory of the structure itself is never freed, so a late reader reads something valid.
 */
struct window {
    uintptr_t base; /* 0: not open */
    _Atomic uint64_t length_pages;
    uint64_t pgoff;
    uint64_t vma_id;
    uint64_t reserved_pages; /* address space, from `base` on; the window may grow so far in its place */
    uint64_t reach_pages;    /* how long it has been while its address was out: an access past its end is a fault too */
    bool is_private;         /* a store makes a copy that this process alone sees: see private.c */
    _Atomic uint64_t serial; /* tells this window from earlier and later ones in the same structure; never 0 */
    bool writable;
    bool by_userfaultfd; /* how faults arrive */
    struct pager *pager;
    void *object;        /* its Python object, borrowed: valid while the window is open, used with the GIL only */
    bool is_out;         /* the GIL: somebody has got its address, and may use it when it is closed */
    struct window *next; /* in its pager's hash chain; when not open, in the list of free ones */
    size_t index;        /* in its chunk */
    struct chunk *chunk;

    uint64_t mappings; /* windows_lock(): mmap(2) calls since nothing was mapped, about its number of VMAs */
    bool mapped;       /* windows_lock(): there may be translations */
    _Atomic(struct protections *) protections; /* see protection.c; written under windows_lock() */
    _Atomic uint32_t readers;                  /* of it, that hold no lock */
    uint64_t sequence_pgoff; /* windows_lock(): where what the last fault has mapped ends */
    struct kept *kept; /* windows_lock(): pinned ranges, whose translations are not given up */
    _Atomic uint64_t touched_first, touched_end; /* private ones: no page outside has ever been mapped */
    _Atomic uint64_t scratch[SCRATCH_RANGES]; /* where it has scratch pages, see scratch.c; 0 no range */
    _Atomic uint64_t zeroes_pages; /* userfaultfd: about how many pages of zeroes there are */
    _Atomic bool scratch_everywhere;          /* there were more ranges than that */
    _Atomic uint32_t scratch_stores;          /* that failed since the last exception was raised */
    _Atomic uint64_t scratch_stored_pages;    /* mapped for them since their memory was given back */
    _Atomic uint32_t scratch_making;          /* threads that are about to add some */
    _Atomic uint64_t scratch_made;            /* how often any has been added, counted beforehand */
};

/* Reads the page size and the limit on mappings, and arranges for fork(). Once, before anything else. 0 or an errno. */
int windows_init(void);
uint64_t page_size_bytes(void);
void windows_lock(void);
void windows_unlock(void);

/* Reserves address space and makes the window findable. `*window` when 0, else an errno. */
int window_open(struct pager *pager, uint64_t vma_id, uint64_t pgoff, uint64_t length_pages, bool writable,
                bool is_private, void *object, struct window **window);
/* Lets the window end after `length_pages`. Where its address space cannot grow in place, it gets another, if
 * `may_move` says that nobody has an address in it; else EBUSY. 0 or an errno. */
int window_resize(struct window *window, uint64_t length_pages, bool may_move);
/* In the child of a fork: the window is that VMA of that pager from now on. */
void window_rebind(struct window *window, struct pager *pager, uint64_t vma_id);
/* Never gives up the translations of these pages of the window to make room for others. 0 or an errno. */
int window_keep(struct window *window, uint64_t first, uint64_t end);
/* Takes one such call back. ENOENT: there was none. */
int window_let_go(struct window *window, uint64_t first, uint64_t end);
/* Drops its translations. Where its address was out, the address space stays out of use: for as long as its object
 * lives, until windows_forget(object), and after that while there is enough. */
void window_close(struct window *window);
/* The object of windows that are closed is gone. */
void windows_forget(const void *object);

/* The open window that `address` is in, or NULL. Takes no lock. */
struct window *window_at(uintptr_t address);

/* Where the first window begins and the last one ends; none is open where they are equal. */
extern _Atomic uintptr_t windows_first, windows_end;

/* Whether any window is open, about: for who would look for one in vain. Takes no lock. */
static inline bool windows_near(void)
{
    return atomic_load_explicit(&windows_end, memory_order_relaxed) != 0;
}

/* Whether `address` may be in a window: false for most that are in none, at the cost of a comparison. */
static inline bool window_near(uintptr_t address)
{
    return address < atomic_load_explicit(&windows_end, memory_order_relaxed) &&
           address >= atomic_load_explicit(&windows_first, memory_order_relaxed);
}

enum closed_access { CLOSED_NOT, CLOSED_SCRATCH, CLOSED_SIGBUS, CLOSED_NO_VMA };
/* For an access in no open window: whether it is in a closed one, and what is to become of it; with CLOSED_SCRATCH the
 * instruction can end. Takes no lock. */
enum closed_access closed_serve(uintptr_t address, bool writable);
/* With windows_lock() held: the object, if it is still there, of the closed window that has `address`; NULL: none. */
/* Whether it is in the address space of a window that is closed. Takes no lock. */
bool closed_at(uintptr_t address);
const void *closed_owner(uintptr_t address, uint64_t *offset_bytes);

/* Whether any window is open, or closed and kept. Takes windows_lock() itself. */
bool windows_any(void);

/* With windows_lock() held. */
struct window *window_of(struct pager *pager, uint64_t vma_id);

/* --- protections (protection.c) ---------------------------------------------------------------------------------- */

/* mprotect(2) for window memory. For who stands in for it: call this first, with the same arguments.
 * -1: no page of the range has to do with a window, and the kernel's mprotect() is to be called. Else it must not be:
 * 0: done. From the return on no access, of whatever thread, does what `prot` forbids; one that tries gets the signal
 * as after mprotect(2). PROT_WRITE includes PROT_READ. It holds until it is changed, the window shrinks, or is closed.
 * EINVAL: `address` is not a page's, or `prot` has other bits than PROT_READ, PROT_WRITE, PROT_EXEC. EACCES: PROT_EXEC,
 * or PROT_WRITE in a read-only window. ENOMEM: not all of the range lies in one open window, or there is no memory;
 * nothing has changed. (A window has its full length here, also past the file's end.)
 * Pinned pages are mapped again before it returns, as far as `prot` allows; private copies keep what they hold.
 * With the GIL or without, with any signals blocked, in a handler of SIGSEGV; it takes windows_lock() where the range
 * has to do with a window, and no lock else. */
int window_protect(uintptr_t address, size_t length_bytes, int prot);
/* The same for pages of a window that stays open meanwhile; they count from its first one. */
int window_protect_pages(struct window *window, uint64_t first, uint64_t end, int prot);
/* Whether loads, or stores, of the page are allowed. Takes no lock. */
bool window_allows(struct window *window, uint64_t page, bool write);

/* --- translations (translations.c) ------------------------------------------------------------------------------- */

/* With windows_lock() held. Ranges are in pages of the file, and are clipped to the window. */
struct frames {
    uint64_t pgoff;
    uint64_t length_pages;
    int prot;
    int fd; /* -1: zeroes */
    uint64_t pfn;
    bool is_hole;  /* they read as zero */
    uint64_t wanted_pgoff; /* what the fault waits for; UINT64_MAX: none of them */
    bool populate; /* in the page tables too, at once: else each page takes a fault of the kernel's own when it is used */
};

/* Maps frames, or some of them around what is wanted: `*end_pgoff`, where not NULL, is where those end. make_room: gives
 * up other translations where there are too many mappings. 0 or an errno. */
int window_map(struct window *window, const struct frames *frames, bool make_room, uint64_t *end_pgoff);
/* Whether it leaves frames of this `prot` out where nobody has asked for them. */
bool maps_only_wanted(const struct window *window, int prot);
/* Drops the translations of a range: an access to it is a fault again. even_cows: private copies too. */
void window_unmap(struct window *window, uint64_t pgoff, uint64_t length_pages, bool even_cows);
void pager_windows_unmap(struct pager *pager);
/* Gives up translations until half of all mappings are gone. False: there was nothing to give up. gather: mmap has said
 * ENOMEM, so that it is worth while to move private copies. */
bool windows_give_up_mappings(bool gather);
/* Lets go of the few VMAs that are kept in reserve. False: they are in use already. */
bool windows_use_spare(void);

/* --- scratch pages (scratch.c) ----------------------------------------------------------------------------------- */

/* Drops the scratch pages of all windows. Takes windows_lock() itself. */
void windows_drop_scratch(void);
/* For an access that can be given up, and must not end on the scratch page of another thread: takes those of the window
 * away, and returns a number for window_scratch_came(), which says whether the access may have met one all the same. */
uint64_t window_clear_scratch(struct window *window);
bool window_scratch_came(const struct window *window, uint64_t cleared);

/* Puts private memory under a page whose access failed, so that the instruction can end; and under the pages after
 * it, as far as `length_pages` goes and a bound allows. Needs no lock. 0 or an errno; ESTALE where the window is
 * closed, or has moved, since it had that serial. */
int window_map_scratch(struct window *window, uint64_t serial, uint64_t pgoff, uint64_t length_pages, bool writable);

/* --- private windows (private.c) --------------------------------------------------------------------------------- */

/* Opens what private windows need, once. 0 or an errno: ENOTSUP where the kernel does not tell copies. */
int private_init(void);
/* Whether the page is a copy. Needs no lock; safe in a signal handler. */
bool private_is_copy(uintptr_t address);
/* With windows_lock() held, on whole pages of a private window's memory: */
/* Makes a copy accessible again. 0 or an errno. */
int private_open(uintptr_t address, int prot);
/* Maps over all but copies. fd -1: pages that read as zero, of which `offset_bytes` is the one in the file. prot: of
 * what is mapped, and of copies. */
int private_map(uintptr_t address, uint64_t length_bytes, int prot, int fd, uint64_t offset_bytes, uint64_t *mappings);
/* Drops all but copies, whose protection is `prot` then; gather: and moves those into few VMAs. 0 or an errno. */
int private_unmap(uintptr_t address, uint64_t length_bytes, int prot, bool gather);
/* In the child of a fork. */
void private_after_fork_in_child(void);

/* --- faults (fault.c) -------------------------------------------------------------------------------------------- */

enum fault_kind {
    FAULT_READ,
    FAULT_WRITE,
    FAULT_FRAME_GONE, /* the mapping is there, but the region has no frame behind it: it was truncated under us */
};

/* A page that a thread waits for, on whose stack this lies: in the signal handler, or in what asks without touching. */
struct fault {
    struct fault *next; /* in the pager's list of posted, then of pending ones */
    struct fault *next_waiting;
    pid_t tid; /* who sleeps in the kernel, and this was allocated (userfaultfd.c); 0: it lies on a stack */
    uintptr_t address;
    struct window *window;
    uint64_t serial; /* of the window */
    uint64_t vma_id;
    uint64_t pgoff;
    uint64_t id; /* on the wire */
    int64_t deadline_ns; /* monotonic; the answer is not waited for any longer */
    uint32_t forks;      /* of the pager, when it was posted */
    enum fault_kind kind;
    bool write;  /* a store */
    bool as_write; /* what is asked for: a store to a private window needs no more than a load */
    bool sent;
    bool raw; /* the access cannot be given up: if it fails, it needs a scratch page to end on */

    /* The answer. After `done` is set the structure is the handler's alone again, and may be gone. */
    int error;        /* 0: the instruction can run again */
    uint64_t end_pgoff; /* pages from `pgoff` to here are mapped, so far as is known; with an error: have nothing to map */
    bool has_scratch; /* with an error and `raw` */
    _Atomic uint32_t done;
};

/* SIGSEGV is the handler's too from the next claim on. */
void signals_want_faults(void);
/* Makes the handler the first of SIGBUS, and of SIGSEGV if that is wanted, with what is installed now behind it. 0 or an
 * errno. */
int signals_claim(void);
/* Ends the process as by a SIGBUS that nobody handles. */
void default_sigbus(void);
/* Puts back what was behind the handler, where it is the first. 0 or an errno. */
int signals_release(void);

/* --- pagers (pager.c, fault_queue.c, io.c) ----------------------------------------------------------------------- */

enum { TOKEN_BYTES = 16, PAGER_BUCKETS = 256 };

enum pager_counter { COUNT_FAULTS, COUNT_BUS_ERRORS, COUNT_MAPS, COUNT_UNMAPS, COUNT_DROPS, COUNTERS };

struct pager_config {
    const char *path; /* of the coordinator's pager socket */
    uint8_t token[TOKEN_BYTES];
    uint32_t version;
    int pmem_fd;
    int dram_fd; /* -1: none */
    int64_t timeout_ms;        /* of the start */
    int64_t answer_timeout_ms; /* of a fault; negative: none */
    bool sigbus; /* an access that has nothing to map ends in SIGBUS */
    bool by_userfaultfd; /* faults arrive through userfaultfd(2), else as SIGSEGV */
};

struct pager {
    /* Constant while the thread runs. */
    struct pager_config config; /* with file descriptors and a path of its own */
    pthread_t thread;

    /* Shared with the signal handler: see fault_queue.c. */
    _Atomic(struct fault *) posted;
    _Atomic uint64_t last_fault_id;
    _Atomic uint32_t posting;
    _Atomic uint32_t forks;
    _Atomic uint32_t pending_lock; /* guards `pending` */

    _Atomic uint32_t copying; /* threads in pager_store() and pager_load() */

    _Atomic int error; /* 0 while it serves, then once and for all why it does not */
    _Atomic bool stopping;
    _Atomic uint64_t counters[COUNTERS];

    pthread_mutex_t join_lock; /* guards `joined` */
    bool joined;               /* there is no thread (any more) */

    /* windows_lock() */
    uint64_t last_unmap;                   /* the id of the last Unmap that was carried out */
    struct window *windows[PAGER_BUCKETS]; /* by vma_id */
    struct pager *next;                    /* in the list of all pagers, for fork() */

    struct fault *pending; /* pending_lock: taken from `posted`, not answered */
    struct zmtp zmtp; /* the thread's own; faulting threads send on its descriptor */
};

/* Starts a pager and waits until the coordinator has answered PagerHello. 0, or an errno: ETIMEDOUT, ECONNRESET when
 * the coordinator is gone, EPROTO. Blocks: without the GIL. */
int pager_start(const struct pager_config *config, struct pager **pager);
/* Ends the thread and drops all translations; faults fail with `error` from now on. Blocks: without the GIL. */
void pager_stop(struct pager *pager, int error);
/* Frees a stopped pager that has no window. */
void pager_free(struct pager *pager);
/* In the child of a fork: this pager's thread is not here. windows_lock() is held. */
void pagers_after_fork_in_child(void);

/* The next three serve a fault in steps, on any thread, with or without the GIL. They take no lock that another thread
 * holds for more than a moment, so they are for signal handlers too. The caller fills in what fault.c's is_ours() does;
 * the page need not have been touched.
 *
 * Asks the coordinator for the page. True: pager_wait() until that returns true, or pager_withdraw(), before the
 * structure goes. False: `fault` holds the answer already. */
bool pager_ask(struct pager *pager, struct fault *fault);
/* True: `fault` holds the answer; ETIMEDOUT after the pager's answer_timeout_ms. False: it is `until_ns` now, or a signal
 * handler has run. */
bool pager_wait(struct pager *pager, struct fault *fault, int64_t until_ns);
/* Waits no longer: returns when `fault` holds the answer, or `error` for an answer. */
void pager_withdraw(struct pager *pager, struct fault *fault, int error);
/* All of it: returns when `fault` holds the answer. */
void pager_serve(struct pager *pager, struct fault *fault);
void pager_count(struct pager *pager, enum pager_counter counter, uint64_t by);

/* Has a page of the window mapped, for a store if `write`, by a fault that no access made: nothing is touched, so the
 * thread may have any signals blocked. 0, and pages of the file from `pgoff` to `*end_pgoff` are mapped; or why there
 * is nothing to map, as an access would get it. They may be unmapped again at once. Safe in a signal handler and with
 * the GIL held; what it waits for needs neither. Precondition: the window is open, and stays so. */
int window_request_pages(struct window *window, uint64_t pgoff, bool write, uint64_t *end_pgoff);

/* Copies between a buffer and lent frames of the PMem region, in system calls. Returns how many bytes: fewer where a
 * page of the buffer is not mapped. -1: nothing was copied, and `*error` says why. Blocks: without the GIL. */
ssize_t pager_store(struct pager *pager, const char *from, size_t count, uint64_t offset_bytes, int *error);
ssize_t pager_load(struct pager *pager, char *to, size_t count, uint64_t offset_bytes, int *error);
/* Returns when no thread is in one of the two. */
void pager_await_copies(struct pager *pager);

/* --- guarded accesses (guard.c) ----------------------------------------------------------------------------------- */

enum piece_kind { PIECE_COPY, PIECE_TOUCH, PIECE_TOUCH_TO_STORE };

/* `count` bytes, not 0, that lie `to_step` and `from_step` bytes apart. To touch: one in each page from `to` on, which
 * is `from` too, without changing any. */
struct piece {
    enum piece_kind kind;
    char *to;
    ptrdiff_t to_step;
    const char *from;
    ptrdiff_t from_step;
    size_t count;
};

/* Does it. False: it was left on the way, at `left`, which can be given to pager_ask(). */
bool guarded_access(const struct piece *piece, struct fault *left);
/* Does it like any other code: where a page is not mapped, in the signal handler. */
void access_piece(const struct piece *piece);
/* From the signal handler: where this thread's access at `address` is a guarded one, leaves it and does not return. */
void guard_leave(uintptr_t address, const struct fault *fault);
/* Whether the access of that thread at `address` is a guarded one. Of a thread that sleeps in it. */
bool guard_covers(pid_t tid, uintptr_t address);
void guards_after_fork_in_child(void);

/* --- bus errors (bus_error.c) ------------------------------------------------------------------------------------ */

/* From the signal handler, for an access that failed: sees to it that this thread raises the exception at its next
 * bytecode, and returns. */
void bus_error(struct window *window, uint64_t serial, uint64_t offset_bytes, int error);
/* For a failed access of another thread, which sleeps in it and takes no signal: gives it a scratch page to end on, and
 * sees to it that it raises the exception, a little later. */
void bus_error_elsewhere(struct fault *fault);

#endif
