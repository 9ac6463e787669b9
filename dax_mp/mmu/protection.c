/* mprotect(2) for windows.
 *
 * What is mapped in a window is a cache: a fault maps it again, with all that the window allows. So the kernel's own
 * mprotect(2) would hold until the next fault. Here a window keeps what its pages may be used for, as ranges that
 * differ from the rest; all that is mapped is mapped with no more than that, and an access that it forbids is no fault
 * of ours: the signal goes to the program, as after mprotect(2).
 *
 * To change it: the new ranges are there first, then what is mapped is dropped, under the lock that a Map takes too. So
 * after the call nothing is mapped with more than is allowed. Private copies stay and get the protection themselves.
 * Pinned pages are asked for again at once, for what is still allowed.
 *
 * The handler looks without a lock. The ranges lie in an array that nobody changes: a change publishes another one,
 * waits until no handler reads the old one (`readers`; a reader waits for nothing), and frees it.
 */

#include "window.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>

enum { PROT_ALL = PROT_READ | PROT_WRITE };

struct protected_range {
    uint64_t first, end; /* pages that count from the window's first one */
    int prot;            /* never PROT_ALL */
};

struct protections {
    size_t count;
    struct protected_range ranges[]; /* in order */
};

/* --- looking ------------------------------------------------------------------------------------------------------ */

static int look_up(const struct protections *all, uint64_t page, uint64_t *end)
{
    size_t count = all ? all->count : 0;

    for (size_t i = 0; i < count; i++) {
        const struct protected_range *range = &all->ranges[i];

        if (page < range->first)
            *end = range->first < *end ? range->first : *end;
        if (page < range->first)
            return PROT_ALL;
        if (page < range->end)
            *end = range->end < *end ? range->end : *end;
        if (page < range->end)
            return range->prot;
    }
    return PROT_ALL;
}

bool window_allows(struct window *window, uint64_t page, bool write)
{
    uint64_t end = UINT64_MAX;
    int prot;

    atomic_fetch_add(&window->readers, 1);
    prot = look_up(atomic_load(&window->protections), page, &end);
    atomic_fetch_sub(&window->readers, 1);
    return prot & (write ? PROT_WRITE : PROT_READ);
}

int protection_at(const struct window *window, uint64_t page, uint64_t *end)
{
    return look_up(atomic_load(&window->protections), page, end);
}

/* --- changing ----------------------------------------------------------------------------------------------------- */

static void publish_protections(struct window *window, struct protections *changed)
{
    struct protections *old = atomic_exchange(&window->protections, changed);

    while (old && atomic_load(&window->readers))
        sched_yield();
    free(old);
}

static void append(struct protections *to, uint64_t first, uint64_t end, int prot)
{
    struct protected_range *last = to->count ? &to->ranges[to->count - 1] : NULL;

    if (first >= end || prot == PROT_ALL)
        return;
    if (last && last->end == first && last->prot == prot)
        last->end = end;
    else
        to->ranges[to->count++] = (struct protected_range){first, end, prot};
}

/* The old ranges, with [first, end) in their midst. NULL: no memory. */
static struct protections *changed_protections(const struct protections *old, uint64_t first, uint64_t end, int prot)
{
    size_t count = old ? old->count : 0;
    struct protections *changed = malloc(sizeof *changed + (count + 2) * sizeof *changed->ranges);

    if (!changed)
        return NULL;
    changed->count = 0;
    for (size_t i = 0; i < count; i++)
        append(changed, old->ranges[i].first, old->ranges[i].end < first ? old->ranges[i].end : first,
               old->ranges[i].prot);
    append(changed, first, end, prot);
    for (size_t i = 0; i < count; i++)
        append(changed, old->ranges[i].first > end ? old->ranges[i].first : end, old->ranges[i].end,
               old->ranges[i].prot);
    return changed;
}

static int change(struct window *window, uint64_t first, uint64_t end, int prot)
{
    struct protections *changed = changed_protections(atomic_load(&window->protections), first, end, prot);

    if (!changed)
        return ENOMEM;
    if (!changed->count) {
        free(changed);
        changed = NULL;
    }
    publish_protections(window, changed);
    return 0;
}

void protection_cut(struct window *window, uint64_t end)
{
    if (atomic_load(&window->protections))
        change(window, end, UINT64_MAX, PROT_ALL); /* no memory: pages that come there later are protected as these */
}

void protection_free(struct window *window)
{
    publish_protections(window, NULL);
}

/* --- what is asked for -------------------------------------------------------------------------------------------- */

static int check(const struct window *window, uint64_t first, uint64_t end, int prot)
{
    if (prot & ~(PROT_ALL | PROT_EXEC))
        return EINVAL;
    if (first > end || end > window->length_pages)
        return ENOMEM; /* as where nothing is mapped */
    return prot & PROT_EXEC || (prot & PROT_WRITE && !window->writable) ? EACCES : 0;
}

/* With windows_lock() held. */
static int set_protection(struct window *window, uint64_t first, uint64_t end, int prot)
{
    int allowed = prot & PROT_WRITE ? PROT_ALL : prot; /* what can be stored to can be loaded, on all machines */
    int error = check(window, first, end, prot);

    if (!error && first < end)
        error = change(window, first, end, allowed);
    if (!error && first < end)
        drop_pages(window, first, end, false);
    return error;
}

/* The first pinned pages from `*first` on. False: there are none before `*end`. */
static bool next_pinned(struct window *window, uint64_t *first, uint64_t *end)
{
    const struct kept *kept;

    windows_lock();
    kept = next_kept(window, *first);
    if (kept && kept->first > *first)
        *first = kept->first;
    if (kept && kept->end < *end)
        *end = kept->end;
    windows_unlock();
    return kept && *first < *end;
}

/* Has the pinned pages of the range mapped again. */
static void request_pinned(struct window *window, uint64_t first, uint64_t end, bool write)
{
    for (uint64_t pinned_end = end; next_pinned(window, &first, &pinned_end); pinned_end = end)
        while (first < pinned_end) {
            uint64_t page = window->pgoff + first, next = page;

            window_request_pages(window, page, write, &next);
            first = next > page ? next - window->pgoff : first + 1;
        }
}

int window_protect_pages(struct window *window, uint64_t first, uint64_t end, int prot)
{
    bool pinned;
    int error;

    windows_lock();
    error = set_protection(window, first, end, prot);
    pinned = window->kept;
    windows_unlock();
    if (!error && pinned && prot)
        request_pinned(window, first, end, prot & PROT_WRITE);
    return error;
}

int window_protect(uintptr_t address, size_t length_bytes, int prot)
{
    uint64_t page_size = page_size_bytes(), first = 0, end = 0;
    uintptr_t start = address, after = address + (length_bytes + page_size - 1) / page_size * page_size;
    struct window *window;
    bool pinned = false;
    int error = -1;

    if (after <= start || !window_overlaps(start, after)) /* the common case takes no lock */
        return -1;
    windows_lock();
    window = window_at(address);
    if (address % page_size) {
        error = EINVAL;
    } else if (!window) {
        error = window_overlaps(start, after) ? ENOMEM : -1;
    } else {
        first = (start - window->base) / page_size;
        end = (after - window->base) / page_size;
        error = set_protection(window, first, end, prot);
        pinned = window->kept;
    }
    windows_unlock();
    if (!error && pinned && prot) /* whoever has pinned it keeps it open */
        request_pinned(window, first, end, prot & PROT_WRITE);
    return error;
}
