/* The windows of this process: their address space, and their life.
 *
 * A window is reserved as private anonymous PROT_NONE memory; what is mapped over it is in translations.c. No kernel
 * mapping of a shared window is inherited over fork (MADV_DONTFORK): the coordinator knows nothing of the child, and
 * its unmaps would not reach it.
 *
 * What is reserved is never given back while a view may point there: see closed.c.
 */

#include "window.h"

#include "userfaultfd.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>

enum { RESERVED_TIMES = 16 };
static const uint64_t RESERVED_BYTES_MIN = 1ull << 31, RESERVED_BYTES_MAX = 1ull << 46;
static const uint64_t LIMIT_SHARE = 1024;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t last_serial;
static uint64_t page_size; /* bytes */

uint64_t page_size_bytes(void)
{
    return page_size;
}

void windows_lock(void)
{
    pthread_mutex_lock(&lock);
}

void windows_unlock(void)
{
    pthread_mutex_unlock(&lock);
}

/* --- address space ------------------------------------------------------------------------------------------------ */

int reserve(void *address, uint64_t length_bytes, bool is_private, int flags, void **reserved)
{
    *reserved = mmap(address, length_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);
    if (*reserved == MAP_FAILED)
        return errno;
    return !is_private && madvise(*reserved, length_bytes, MADV_DONTFORK) ? errno : 0;
}

/* What is reserved for a window of `length_pages`, so that it may grow: sixteen times as much, and 2 GiB at least. 60000
 * windows of up to 128 MiB, or a few of many TiB, then fit into 47 bits. Where address space is limited (ulimit -v), a
 * small part of that: as many windows as then fit are worth more than that each can grow far. */
static uint64_t pages_wanted(uint64_t length_pages)
{
    uint64_t pages_min = RESERVED_BYTES_MIN / page_size, more_max;
    uint64_t pages = length_pages > RESERVED_BYTES_MAX / page_size / RESERVED_TIMES ? length_pages
                                                                                    : length_pages * RESERVED_TIMES;
    struct rlimit limit;

    if (pages < pages_min)
        pages = pages_min;
    if (getrlimit(RLIMIT_AS, &limit) || limit.rlim_cur == RLIM_INFINITY)
        return pages;
    more_max = limit.rlim_cur / LIMIT_SHARE / page_size;
    return pages - length_pages > more_max ? length_pages + more_max : pages;
}

/* Reserves for a window of `length_pages` that may grow. The rest of what was reserved for one that is closed will do
 * where it has half as much as a new one would get: so each can grow to eight times its length, and a GiB at least. Less,
 * or the place of a closed window, where the process may not have so much. */
static int reserve_ahead(uint64_t length_pages, bool is_private, void **reserved, uint64_t *reserved_pages)
{
    uint64_t pages = pages_wanted(length_pages), rest_min = pages / 2 > length_pages ? pages / 2 : length_pages;
    uintptr_t rest;
    int error;

    *reserved_pages = is_private ? 0 : closed_take_rest(rest_min * page_size, pages * page_size, &rest) / page_size;
    if (*reserved_pages) {
        *reserved = (void *)rest;
        return 0;
    }
    while ((error = reserve(NULL, pages * page_size, is_private, 0, reserved)) &&
           (pages > length_pages || closed_give_back()))
        pages = pages / 2 > length_pages ? pages / 2 : length_pages;
    *reserved_pages = pages;
    return error;
}

/* Where faults arrive through userfaultfd(2): makes reserved pages, which nobody accesses yet, such that do. */
static int arm(struct window *window, uint64_t first, uint64_t end)
{
    int access = PROT_READ | (window->writable ? PROT_WRITE : 0), error = 0;

    for (uint64_t next = end; window->by_userfaultfd && first < end && !error; first = next, next = end) {
        int prot = protection_at(window, first, &next) & access;

        error = userfaultfd_arm((void *)(window->base + first * page_size), (next - first) * page_size, prot);
    }
    return error;
}

bool clip(const struct window *window, uint64_t *pgoff, uint64_t *end)
{
    uint64_t window_end = window->pgoff + window->length_pages;

    if (*pgoff < window->pgoff)
        *pgoff = window->pgoff;
    if (*end > window_end)
        *end = window_end;
    return *pgoff < *end;
}

/* --- life --------------------------------------------------------------------------------------------------------- */

int window_open(struct pager *pager, uint64_t vma_id, uint64_t pgoff, uint64_t length_pages, bool writable,
                bool is_private, void *object, struct window **opened)
{
    struct window *window = NULL;
    void *base = NULL;
    uint64_t reserved_pages = 0;
    int error;

    windows_lock();
    error = is_private ? private_init() : 0;
    if (!error && is_private && pager->config.by_userfaultfd)
        error = ENOTSUP;
    if (!error)
        error = reserve_ahead(length_pages, is_private, &base, &reserved_pages);
    if (!error && !(window = take_free_window()))
        error = ENOMEM;
    if (!error) {
        window->base = (uintptr_t)base;
        window->writable = writable;
        window->by_userfaultfd = pager->config.by_userfaultfd;
        atomic_store(&window->protections, NULL);
        if ((error = arm(window, 0, length_pages)))
            give_back_window(window);
    }
    if (!error) {
        window->length_pages = length_pages;
        window->pgoff = pgoff;
        window->reserved_pages = reserved_pages;
        window->reach_pages = 0;
        window->is_private = is_private;
        atomic_store(&window->touched_first, UINT64_MAX);
        atomic_store(&window->touched_end, 0);
        window->vma_id = vma_id;
        window->serial = ++last_serial;
        window->pager = pager;
        window->object = object;
        window->is_out = false;
        window->mappings = 0;
        window->mapped = false;
        window->sequence_pgoff = UINT64_MAX;
        forget_scratch(window);
        publish(window);
        *opened = window;
    } else if (base && base != MAP_FAILED) {
        munmap(base, reserved_pages * page_size);
    }
    windows_unlock();
    return error;
}

/* Takes the address space behind the window's, up to `length_pages` in all. EEXIST where something else has it. */
static int reserve_behind(struct window *window, uint64_t length_pages)
{
    uint64_t more_pages = length_pages - window->reserved_pages;
    void *behind = (char *)window->base + window->reserved_pages * page_size;
    void *reserved;
    int error = reserve(behind, more_pages * page_size, window->is_private, MAP_FIXED_NOREPLACE, &reserved);

    if (!error && reserved != behind) { /* a kernel that does not know the flag takes it for a wish */
        munmap(reserved, more_pages * page_size);
        error = EEXIST;
    }
    if (!error)
        window->reserved_pages = length_pages;
    return error;
}

/* Drops all that is mapped there, of a window that can no more be found. */
static void drop_for_ever(struct window *window)
{
    void *reserved = MAP_FAILED;

    if (window->is_private) /* now as any other: a fork does not inherit it */
        reserve((void *)window->base, window->reserved_pages * page_size, false, MAP_FIXED, &reserved);
    if (reserved == MAP_FAILED && (window->is_private || window->mapped || has_scratch(window)))
        drop_pages(window, 0, window->reach_pages, true);
}

/* Makes inaccessible what no view can have reached: it may be the reservation of a window with faults of another way. */
static bool is_reserved_again(struct window *window)
{
    void *reserved;

    return !reserve((void *)window->base, window->reach_pages * page_size, false, MAP_FIXED, &reserved);
}

/* Takes the window's address space away from it, with all that is mapped there. An access finds the window or the closed
 * range at any moment. Who is about to put a scratch page there is waited for, or sees that it is another window. */
static void retire_range(struct window *window)
{
    uint64_t reach_bytes = window->is_out ? window->reach_pages * page_size : 0;
    bool kept = closed_add(window->base, reach_bytes, window->reserved_pages * page_size,
                           &window->pager->config, window->is_out ? window->object : NULL);

    clear_range(window);
    atomic_store(&window->serial, 0);
    await_scratch(window);
    if (kept || munmap((void *)window->base, window->reserved_pages * page_size)) /* no VMA left to cut it out */
        if (!window->by_userfaultfd || window->is_out || !is_reserved_again(window))
            drop_for_ever(window);
    forget_mappings(window);
    forget_scratch(window);
}

/* Gives the window other address space. Nothing is mapped there; what is used is faulted in again. */
static int move_window(struct window *window, uint64_t length_pages)
{
    uint64_t reserved_pages;
    void *base;
    int error = reserve_ahead(length_pages, false, &base, &reserved_pages);

    if (error)
        return error;
    retire_range(window);
    window->serial = ++last_serial;
    window->is_out = false;
    window->reserved_pages = reserved_pages;
    window->reach_pages = 0;
    window->base = (uintptr_t)base;
    error = arm(window, 0, length_pages);
    set_range(window, window->base, length_pages);
    return error;
}

int window_resize(struct window *window, uint64_t length_pages, bool may_move)
{
    int error = 0;

    windows_lock();
    if (!has_range(window)) {
        error = ESTALE;
    } else if (length_pages <= window->reserved_pages || !(error = reserve_behind(window, length_pages))) {
        if (length_pages < window->length_pages)
            drop_pages(window, length_pages, window->length_pages, true);
        protection_cut(window, length_pages);
        error = arm(window, window->reach_pages, length_pages);
        if (may_move && !window->is_out) /* nobody has an address past the end */
            window->reach_pages = 0;
        if (!error)
            set_range(window, window->base, length_pages);
    } else if (may_move && !window->is_private) { /* copies cannot move */
        error = move_window(window, length_pages);
    } else {
        error = window->is_private ? ENOMEM : EBUSY;
    }
    windows_unlock();
    return error;
}

int window_keep(struct window *window, uint64_t first, uint64_t end)
{
    struct kept *kept = malloc(sizeof *kept);

    if (!kept)
        return ENOMEM;
    windows_lock();
    *kept = (struct kept){first, end, window->kept};
    window->kept = kept;
    windows_unlock();
    return 0;
}

int window_let_go(struct window *window, uint64_t first, uint64_t end)
{
    struct kept **link = &window->kept;
    struct kept *found;

    windows_lock();
    while (*link && ((*link)->first != first || (*link)->end != end))
        link = &(*link)->next;
    found = *link;
    if (found)
        *link = found->next;
    windows_unlock();
    free(found);
    return found ? 0 : ENOENT;
}

static void free_kept(struct window *window)
{
    for (struct kept *next; window->kept; window->kept = next) {
        next = window->kept->next;
        free(window->kept);
    }
}

void window_close(struct window *window)
{
    windows_lock();
    withdraw(window);
    if (has_range(window))
        retire_range(window);
    forget_mappings(window);
    free_kept(window);
    protection_free(window);
    window->base = 0;
    window->serial = 0;
    window->object = NULL;
    give_back_window(window);
    windows_unlock();
}

void windows_forget(const void *object)
{
    windows_lock();
    closed_disown(object);
    windows_unlock();
}

/* --- fork --------------------------------------------------------------------------------------------------------- */

/* The child has none of the shared windows' memory, but it has the views and arrays that point there. So that they
 * fault, and do not reach memory that something else has got meanwhile, each range is reserved again at its address.
 * One whose address is taken already is not a window any more. Private windows are inherited whole, for their copies;
 * all else in them is dropped here, before any other code of the child runs.
 */
static void reserve_again(struct window *window)
{
    uint64_t length_bytes = window->reserved_pages * page_size;
    void *base = (void *)window->base;
    void *reserved;

    atomic_store(&window->readers, 0); /* they are not here */
    if (!has_range(window))
        return;
    if (window->is_private)
        drop_pages(window, 0, window->reach_pages, false);
    else if ((reserve(base, length_bytes, false, MAP_FIXED_NOREPLACE, &reserved) && reserved == MAP_FAILED) ||
             arm(window, 0, window->reach_pages))
        clear_range(window);
    forget_mappings(window);
    forget_scratch(window);
}

static bool any_by_userfaultfd;

static void look_for_userfaultfd(struct window *window)
{
    any_by_userfaultfd |= has_range(window) && window->by_userfaultfd;
}

static void before_fork(void)
{
    windows_lock(); /* no thread is between mmap and madvise, and the child finds the table whole */
}

static void after_fork_in_parent(void)
{
    windows_unlock();
}

static void after_fork_in_child(void)
{
    private_after_fork_in_child();
    any_by_userfaultfd = closed_any_by_userfaultfd();
    for_each_window(look_for_userfaultfd);
    userfaultfd_after_fork_in_child(any_by_userfaultfd); /* where it fails, so does arm() */
    for_each_window(reserve_again);
    closed_after_fork_in_child();
    pagers_after_fork_in_child();
    pthread_mutex_init(&lock, NULL);
}

int windows_init(void)
{
    page_size = (uint64_t)sysconf(_SC_PAGESIZE);
    translations_init();
    return pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}
