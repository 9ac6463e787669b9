/* What is mapped in the windows.
 *
 * To map is one mmap(MAP_FIXED) of the region's frames over a window's reservation, to unmap one mmap(MAP_FIXED) of
 * PROT_NONE memory: each replaces what was there in one atomic step, so that an access at any moment finds the old
 * page, the new page, or a fault.
 *
 * Too many mappings. The kernel gives a process vm.max_map_count VMAs. A lone page mapped in a window takes two (the
 * page, and the rest of the reservation that it cuts off). Mappings are counted; at three quarters of the limit, or
 * when mmap says ENOMEM before that, whole windows are unmapped, from the one with the most mappings on in the order
 * of the table, until half of all are gone. Translations are only a cache: what is still used is faulted in again.
 * Pinned ranges and private copies stay. With all VMAs in use, to unmap needs one too: a few are kept in reserve.
 *
 * To drop may not fail, or a translation would be left that nobody can take back. But to cut a hole into a VMA makes
 * two of it, and a program that has used up all VMAs by itself gets no mmap at all. What always works is to make the
 * whole window inaccessible: that cuts nothing, since what lies on either side of a window is inaccessible as well.
 */

#include "window.h"

#include "userfaultfd.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ZEROES_PAGES_AROUND = 16, ZEROES_PAGES_MAX = 8192 };
enum { MAX_MAP_COUNT_DEFAULT = 65530, VMAS_PER_MAPPING = 2, SPARE_VMAS = 16 };

static uint64_t mappings; /* the sum of all windows' */
static uint64_t mappings_max;
static void *spare; /* pages that have a VMA each; NULL: none */

static uint64_t read_max_map_count(void)
{
    FILE *file = fopen("/proc/sys/vm/max_map_count", "re");
    unsigned long long count;

    if (!file)
        return MAX_MAP_COUNT_DEFAULT;
    if (fscanf(file, "%llu", &count) != 1)
        count = MAX_MAP_COUNT_DEFAULT;
    fclose(file);
    return count;
}

void fill_spare(void)
{
    uint64_t page_size = page_size_bytes();
    char *pages = spare ? MAP_FAILED
                        : mmap(NULL, SPARE_VMAS * page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                               -1, 0);

    if (pages == MAP_FAILED)
        return;
    for (uint64_t i = 0; i < SPARE_VMAS; i += 2) /* unlike its neighbour, so that the kernel does not merge the two */
        mprotect(pages + i * page_size, page_size, PROT_READ);
    spare = pages;
}

bool windows_use_spare(void)
{
    bool used = spare && !munmap(spare, SPARE_VMAS * page_size_bytes());

    if (used)
        spare = NULL;
    return used;
}

void translations_init(void)
{
    uint64_t max_map_count = read_max_map_count();

    fill_spare();
    mappings_max = max_map_count / VMAS_PER_MAPPING / 4 * 3;
    closed_init(max_map_count);
}

static void count_none(struct window *window)
{
    mappings -= window->mappings;
    window->mappings = 0;
}

static void count_more(struct window *window, uint64_t made)
{
    window->mappings += made;
    mappings += made;
}

void forget_mappings(struct window *window)
{
    count_none(window);
    window->mapped = false;
}

static char *page(const struct window *window, uint64_t index)
{
    return (char *)window->base + index * page_size_bytes();
}

static void extend_touched(struct window *window, uint64_t first, uint64_t end)
{
    uint64_t was = atomic_load(&window->touched_first);

    while (first < was && !atomic_compare_exchange_weak(&window->touched_first, &was, first))
        continue;
    was = atomic_load(&window->touched_end);
    while (end > was && !atomic_compare_exchange_weak(&window->touched_end, &was, end))
        continue;
}

/* --- dropping ----------------------------------------------------------------------------------------------------- */

/* Unmapped memory may be accessed as the window and its protections say, so that what they forbid is no fault of ours. */
static int take_out(struct window *window, uint64_t first, uint64_t end)
{
    int access = PROT_READ | (window->writable ? PROT_WRITE : 0), error = 0;

    for (uint64_t next = end; first < end && !error; first = next, next = end) {
        int prot = protection_at(window, first, &next) & access;

        error = userfaultfd_take_out(page(window, first), (next - first) * page_size_bytes(), prot);
    }
    return error;
}

static int reserve_pages(struct window *window, uint64_t first, uint64_t end)
{
    uint64_t length_bytes = (end - first) * page_size_bytes();
    void *ignored;

    if (window->by_userfaultfd)
        return take_out(window, first, end);
    return reserve(page(window, first), length_bytes, window->is_private, MAP_FIXED, &ignored);
}

static int drop_all_but_copies(struct window *window, uint64_t first, uint64_t end, bool gather)
{
    uint64_t touched_first = atomic_load(&window->touched_first), touched_end = atomic_load(&window->touched_end);

    int error = 0;

    first = first < touched_first ? touched_first : first;
    end = end > touched_end ? touched_end : end;
    for (uint64_t next = end; first < end && !error; first = next, next = end) {
        int prot = protection_at(window, first, &next);

        error = private_unmap((uintptr_t)page(window, first), (next - first) * page_size_bytes(), prot, gather);
    }
    return error;
}

static int try_to_drop(struct window *window, uint64_t first, uint64_t end, bool even_cows)
{
    return window->is_private && !even_cows ? drop_all_but_copies(window, first, end, false)
                                            : reserve_pages(window, first, end);
}

/* Makes the whole window inaccessible. What is mapped there stays, in its VMAs, but nobody reaches it; copies are
 * accessible again after the next Map of their page. */
static void close_off(struct window *window, uint64_t first, uint64_t end, bool even_cows)
{
    int error = 0;

    if (window->by_userfaultfd)
        error = windows_use_spare() ? reserve_pages(window, 0, window->reach_pages) : ENOMEM;
    else if (mprotect(page(window, 0), window->reach_pages * page_size_bytes(), PROT_NONE))
        error = errno;

    if (!error && window->is_private && even_cows && /* this needs no VMA */
        madvise(page(window, first), (end - first) * page_size_bytes(), MADV_DONTNEED))
        error = errno;
    if (error) {
        fprintf(stderr, "dax_mp: a window cannot be unmapped: %s\n", strerror(error));
        abort();
    }
    if (!window->is_private && !reserve_pages(window, 0, window->reach_pages))
        forget_mappings(window);
}

void drop_pages(struct window *window, uint64_t first, uint64_t end, bool even_cows)
{
    if (try_to_drop(window, first, end, even_cows))
        close_off(window, first, end, even_cows);
}

void unmap_whole(struct window *window)
{
    if (!has_range(window) || (!window->mapped && !has_scratch(window)))
        return;
    if (try_to_drop(window, 0, window->reach_pages, false))
        close_off(window, 0, window->reach_pages, false);
    else
        forget_mappings(window);
}

void window_unmap(struct window *window, uint64_t pgoff, uint64_t length_pages, bool even_cows)
{
    uint64_t first = pgoff, end = pgoff + length_pages;

    if (length_pages > UINT64_MAX - pgoff)
        end = UINT64_MAX;
    if (has_range(window) && clip(window, &first, &end))
        drop_pages(window, first - window->pgoff, end - window->pgoff, even_cows);
}

void pager_windows_unmap(struct pager *pager)
{
    for (size_t i = 0; i < PAGER_BUCKETS; i++)
        for (struct window *window = pager->windows[i]; window; window = window->next)
            unmap_whole(window);
}

/* --- giving up ---------------------------------------------------------------------------------------------------- */

const struct kept *next_kept(const struct window *window, uint64_t first)
{
    const struct kept *next = NULL;

    for (const struct kept *kept = window->kept; kept; kept = kept->next)
        if (kept->end > first && (!next || kept->first < next->first))
            next = kept;
    return next;
}

static void try_hard_to_drop(struct window *window, uint64_t first, uint64_t end, bool gather)
{
    if (gather && window->is_private)
        windows_use_spare(); /* to move takes some */
    if (gather && window->is_private)
        drop_all_but_copies(window, first, end, true);
    else if (try_to_drop(window, first, end, false) && windows_use_spare())
        try_to_drop(window, first, end, false);
}

/* Drops what is not pinned, as far as that goes. */
static void give_up_window(struct window *window, bool gather)
{
    const struct kept *kept;
    uint64_t first = 0;

    pager_count(window->pager, COUNT_DROPS, window->mappings);
    for (; (kept = next_kept(window, first)); first = kept->end)
        if (first < kept->first)
            try_hard_to_drop(window, first, kept->first, gather);
    if (first < window->reach_pages)
        try_hard_to_drop(window, first, window->reach_pages, gather);
    count_none(window); /* but for the pinned ones, of which mmap will say when they are too many */
}

static struct window *window_with_most_mappings(void)
{
    struct window *first = next_in_table(NULL);
    struct window *most = first;

    for (struct window *window = next_in_table(first); window != first; window = next_in_table(window))
        if (window->mappings > most->mappings)
            most = window;
    return most;
}

bool windows_give_up_mappings(bool gather)
{
    uint64_t keep = mappings / 2;
    struct window *first = mappings ? window_with_most_mappings() : NULL, *window = first;

    if (!first)
        return closed_give_back();
    do {
        if (window->mappings)
            give_up_window(window, gather);
        window = next_in_table(window);
    } while (mappings > keep && window != first);
    fill_spare();
    return true;
}

/* --- mapping ------------------------------------------------------------------------------------------------------ */

static int map_over(void *address, uint64_t length_bytes, int prot, int fd, uint64_t offset_bytes, bool populate)
{
    int flags = MAP_FIXED | (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED);

    if (populate && fd >= 0)
        flags |= MAP_POPULATE;
    if (mmap(address, length_bytes, prot, flags, fd, (off_t)offset_bytes) == MAP_FAILED)
        return errno;
    return madvise(address, length_bytes, MADV_DONTFORK) ? errno : 0;
}

/* Zeroes such that a store to one is a fault, which PROT_READ is not where faults arrive through userfaultfd(2). They take
 * memory: where there are many, they go, if none is pinned. Needs no lock. `*mapped_end`: where they end. 0 or an errno. */
static int map_zeroes(struct window *window, uint64_t first, uint64_t end, uint64_t *mapped_end)
{
    uint64_t page_size = page_size_bytes(), mapped = 0;
    int error;

    if (atomic_load(&window->zeroes_pages) > ZEROES_PAGES_MAX && !window->kept) {
        atomic_store(&window->zeroes_pages, 0); /* frames only leave the page table, and the kernel finds them again */
        madvise(page(window, 0), window->reach_pages * page_size, MADV_DONTNEED);
    }
    error = userfaultfd_map_zeroes(page(window, first), (end - first) * page_size, &mapped);
    atomic_fetch_add(&window->zeroes_pages, mapped / page_size);
    *mapped_end = first + mapped / page_size;
    return error;
}

/* As window_map(), of frames that may not be stored to. */
static int map_hole(struct window *window, uint64_t first, uint64_t end, const struct frames *frames,
                    uint64_t *end_pgoff)
{
    bool in_sequence = frames->wanted_pgoff == window->sequence_pgoff;
    uint64_t mapped_end;
    int error;

    if (!frames->is_hole)
        return ENOTSUP;
    if (frames->wanted_pgoff < first || frames->wanted_pgoff >= end)
        return 0; /* nobody has asked for it */
    first = frames->wanted_pgoff;
    if (!in_sequence && end - first > ZEROES_PAGES_AROUND)
        end = first + ZEROES_PAGES_AROUND;
    window->mapped = true;
    first -= window->pgoff;
    end -= window->pgoff;
    error = map_zeroes(window, first, end, &mapped_end);
    if (error == ENOENT && !(error = reserve_pages(window, first, first + 1))) /* frames that nobody has taken out */
        error = map_zeroes(window, first, first + 1, &mapped_end);
    if (end_pgoff)
        *end_pgoff = window->pgoff + mapped_end;
    return error;
}

static int map_pages(struct window *window, uint64_t first, uint64_t end, const struct frames *frames,
                     uint64_t offset_bytes, int prot)
{
    uint64_t length_bytes = (end - first) * page_size_bytes(), made = 0;
    int error;

    window->mapped = true;
    if (window->is_private) {
        extend_touched(window, first, end);
        error = private_map((uintptr_t)page(window, first), length_bytes, prot, frames->fd, offset_bytes, &made);
    } else {
        error = map_over(page(window, first), length_bytes, frames->prot & prot, frames->fd, offset_bytes, frames->populate);
        made = !error;
    }
    count_more(window, made);
    return error;
}

/* Maps no more than what the pages may be used for. */
static int map_as_protected(struct window *window, uint64_t first, uint64_t end, const struct frames *frames,
                            uint64_t offset_bytes)
{
    int error = 0;

    for (uint64_t next = end; first < end && !error; first = next, next = end) {
        int prot = protection_at(window, first, &next);

        if (prot)
            error = map_pages(window, first, next, frames, offset_bytes, prot);
        offset_bytes += (next - first) * page_size_bytes();
    }
    return error;
}

bool maps_only_wanted(const struct window *window, int prot)
{
    return window->by_userfaultfd && window->writable && !(prot & PROT_WRITE);
}

int window_map(struct window *window, const struct frames *frames, bool make_room, uint64_t *end_pgoff)
{
    uint64_t first = frames->pgoff, end = frames->pgoff + frames->length_pages;
    uint64_t offset_bytes;
    int error;

    if (!has_range(window) || !clip(window, &first, &end))
        return 0;
    if (maps_only_wanted(window, frames->prot))
        return map_hole(window, first, end, frames, end_pgoff);
    if (mappings >= mappings_max && !(make_room && windows_give_up_mappings(false)))
        return ENOMEM;
    offset_bytes = (frames->fd < 0 ? first : frames->pfn + (first - frames->pgoff)) * page_size_bytes();
    do
        error = map_as_protected(window, first - window->pgoff, end - window->pgoff, frames, offset_bytes);
    while (error == ENOMEM && make_room && windows_give_up_mappings(true));
    return error;
}

/* Memory with no name, but a file's all the same: so it is told from a private copy. */
int map_scratch(struct window *window, uint64_t first, uint64_t end, bool writable)
{
    uint64_t length_bytes = (end - first) * page_size_bytes();
    int prot = PROT_READ | (writable ? PROT_WRITE : 0);

    uint64_t mapped_end;

    if (window->by_userfaultfd && window->writable && !writable) /* so that a store to it is a fault */
        if (map_zeroes(window, first, end, &mapped_end) != ENOENT)
            return 0;
    if (window->by_userfaultfd && window->writable)
        prot |= PROT_WRITE; /* in the place of a frame that is gone */
    if (!window->is_private)
        return map_over(page(window, first), length_bytes, prot, -1, 0, false);
    extend_touched(window, first, end);
    return mmap(page(window, first), length_bytes, prot, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED
               ? errno
               : 0;
}
