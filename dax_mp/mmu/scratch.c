/* Scratch pages: what an access ends on that has nothing to map, where its instruction cannot be given up.
 *
 * A window remembers the ranges it has scratch pages in, each in one word, so that the handler can add one without the
 * lock when the pager is no more. To drop a page that is not scratch (any more) would mostly cost a fault and no more;
 * but when the coordinator is gone, what is mapped is all there will ever be. So only when there are more ranges than
 * can be remembered is the whole window dropped.
 *
 * A failed load is given read-only pages, which take no memory, as far as nothing can be mapped. A failed store is given
 * one page, since what another thread stores next to it may be good by then. But of those that fail before an exception
 * is raised each gets twice as many as the one before: it is a loop, which goes on until it is through. What that has
 * left behind is given back as it goes; to read it there would be zeroes. So a store of any length takes STORED_BYTES_MAX
 * of memory, and one round trip for 2 MiB.
 *
 * A scratch page is there for all threads. What another one stores to that page by a raw access, until the exception of
 * the first is raised, ends there as well, and nobody can tell. Methods and slices can be given up, and repeated: they
 * take scratch pages away before, and look afterwards whether any has come meanwhile.
 */

#include "window.h"

#include <errno.h>
#include <sched.h>

enum { SCRATCH_BYTES_MAX = 2 << 20, STORED_BYTES_MAX = 32 << 20 };
static _Atomic bool any_scratch;

enum { SCRATCH_LENGTH_BITS = 24 };
static const uint64_t SCRATCH_LENGTH_MASK = (1 << SCRATCH_LENGTH_BITS) - 1;

static uint64_t scratch_range(uint64_t first_page, uint64_t length_pages)
{
    return first_page << SCRATCH_LENGTH_BITS | length_pages;
}

static uint64_t scratch_first(uint64_t range)
{
    return range >> SCRATCH_LENGTH_BITS;
}

static uint64_t scratch_length(uint64_t range)
{
    return range & SCRATCH_LENGTH_MASK;
}

/* A loop over an array leaves one range, however long it is. */
static bool extend_scratch(_Atomic uint64_t *range, uint64_t first_page, uint64_t length_pages)
{
    uint64_t old = atomic_load(range), new;

    do {
        if (!old || scratch_first(old) + scratch_length(old) != first_page ||
            scratch_length(old) + length_pages > SCRATCH_LENGTH_MASK)
            return false;
        new = scratch_range(scratch_first(old), scratch_length(old) + length_pages);
    } while (!atomic_compare_exchange_weak(range, &old, new));
    return true;
}

static void remember_scratch(struct window *window, uint64_t first_page, uint64_t length_pages)
{
    uint64_t range = scratch_range(first_page, length_pages);
    bool remembered = false;

    for (size_t i = 0; i < SCRATCH_RANGES && !remembered; i++)
        remembered = extend_scratch(&window->scratch[i], first_page, length_pages);
    for (size_t i = 0; i < SCRATCH_RANGES && !remembered; i++) {
        uint64_t none = 0;

        remembered = atomic_compare_exchange_strong(&window->scratch[i], &none, range);
    }
    if (!remembered)
        atomic_store(&window->scratch_everywhere, true);
    atomic_store(&any_scratch, true);
}

/* How many pages a failed store may get. */
static uint64_t pages_for_store(struct window *window)
{
    uint32_t failed = atomic_fetch_add(&window->scratch_stores, 1);
    uint64_t most = SCRATCH_BYTES_MAX / page_size_bytes();

    return failed < SCRATCH_LENGTH_BITS && (1ull << failed) < most ? 1ull << failed : most;
}

/* Takes what was stored, and leaves the pages. The memory of a shared window is either scratch, which is anonymous and
 * private, or the region's, which stays. Private windows have copies that must stay, and scratch that is shared. */
static void give_memory_back(struct window *window)
{
    uint64_t page_size = page_size_bytes();

    if (!window->is_private)
        madvise((void *)window->base, window->reach_pages * page_size, MADV_DONTNEED);
    for (size_t i = 0; i < SCRATCH_RANGES && window->is_private; i++) {
        uint64_t range = atomic_load(&window->scratch[i]);
        void *first = (void *)(window->base + scratch_first(range) * page_size);

        if (range) /* it does not do it to what is not shared (any more) */
            madvise(first, scratch_length(range) * page_size, MADV_REMOVE);
    }
}

static void bound_memory(struct window *window, uint64_t length_pages)
{
    uint64_t pages_max = STORED_BYTES_MAX / page_size_bytes();

    if (atomic_fetch_add(&window->scratch_stored_pages, length_pages) + length_pages < pages_max)
        return;
    atomic_store(&window->scratch_stored_pages, 0);
    give_memory_back(window);
}

/* With `scratch_making` counted, so that the window is not closed meanwhile. */
static int map_and_remember(struct window *window, uint64_t first, uint64_t length_pages, bool writable)
{
    uint64_t pages_max = writable ? pages_for_store(window) : SCRATCH_BYTES_MAX / page_size_bytes();
    uint64_t end = first + (length_pages < pages_max ? length_pages : pages_max);
    int error;

    if (end > window->reach_pages)
        end = window->reach_pages;
    if (first >= end)
        return EFAULT;
    if (writable)
        bound_memory(window, end - first);
    error = map_scratch(window, first, end, writable);
    if (!error) /* after the mapping is there: whoever drops the range from here on drops this too */
        remember_scratch(window, first, end - first);
    return error;
}

int window_map_scratch(struct window *window, uint64_t serial, uint64_t pgoff, uint64_t length_pages, bool writable)
{
    int error = ESTALE;

    atomic_fetch_add(&window->scratch_making, 1);
    atomic_fetch_add(&window->scratch_made, 1);
    if (atomic_load(&window->serial) == serial)
        error = map_and_remember(window, pgoff - window->pgoff, length_pages, writable);
    atomic_fetch_sub(&window->scratch_making, 1);
    return error;
}

void await_scratch(struct window *window)
{
    while (atomic_load(&window->scratch_making))
        sched_yield();
}

bool has_scratch(const struct window *window)
{
    bool any = atomic_load(&window->scratch_everywhere);

    for (size_t i = 0; i < SCRATCH_RANGES && !any; i++)
        any = atomic_load(&window->scratch[i]);
    return any;
}

void forget_scratch(struct window *window)
{
    for (size_t i = 0; i < SCRATCH_RANGES; i++)
        atomic_store(&window->scratch[i], 0);
    atomic_store(&window->scratch_everywhere, false);
    atomic_store(&window->scratch_stores, 0);
    atomic_store(&window->scratch_stored_pages, 0);
    atomic_store(&window->scratch_making, 0); /* after a fork: who was about to is not here */
}

static void drop_scratch(struct window *window)
{
    if (!has_range(window))
        return;
    atomic_store(&window->scratch_stores, 0);
    atomic_store(&window->scratch_stored_pages, 0);
    if (atomic_exchange(&window->scratch_everywhere, false))
        drop_pages(window, 0, window->reach_pages, false);
    for (size_t i = 0; i < SCRATCH_RANGES; i++) {
        uint64_t range = atomic_exchange(&window->scratch[i], 0);

        if (range)
            drop_pages(window, scratch_first(range), scratch_first(range) + scratch_length(range), true);
    }
}

void windows_drop_scratch(void)
{
    windows_lock();
    if (atomic_exchange(&any_scratch, false))
        for_each_window(drop_scratch);
    closed_drop_scratch();
    fill_spare();
    windows_unlock();
}

uint64_t window_clear_scratch(struct window *window)
{
    uint64_t made = atomic_load(&window->scratch_made);

    await_scratch(window); /* one that is counted, and cannot be dropped yet */
    if (has_scratch(window))
        windows_drop_scratch();
    return made;
}

bool window_scratch_came(const struct window *window, uint64_t cleared)
{
    return atomic_load(&window->scratch_made) != cleared;
}
