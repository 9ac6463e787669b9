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
 */

#include "window.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_MAP_COUNT_DEFAULT = 65530, VMAS_PER_MAPPING = 2 };

static uint64_t mappings; /* the sum of all windows' */
static uint64_t mappings_max;

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

void translations_init(void)
{
    mappings_max = read_max_map_count() / VMAS_PER_MAPPING / 4 * 3;
}

void forget_mappings(struct window *window)
{
    mappings -= window->mappings;
    window->mappings = 0;
}

/* --- dropping ----------------------------------------------------------------------------------------------------- */

static int unmap(struct window *window, uint64_t pgoff, uint64_t end, bool even_cows)
{
    void *ignored;

    if (!window->is_private || even_cows)
        return reserve(page_address(window, pgoff), (end - pgoff) * page_size_bytes(), window->is_private, MAP_FIXED,
                       &ignored);
    if (pgoff < window->touched_first)
        pgoff = window->touched_first;
    if (end > window->touched_end)
        end = window->touched_end;
    return pgoff < end ? private_unmap((uintptr_t)page_address(window, pgoff), (end - pgoff) * page_size_bytes()) : 0;
}

/* A translation would be left that nobody can take back. */
static _Noreturn void give_up(const char *why)
{
    fprintf(stderr, "dax_mp: a window cannot be unmapped: %s\n", why);
    abort();
}

/* This cannot fail for the limit on mappings: it cuts at most the two VMAs at the edges, and the kernel lets that go
 * over the limit for a moment. If it does fail, a translation would be left that nobody can take back. */
void unmap_whole(struct window *window)
{
    int error = has_range(window) ? unmap(window, window->pgoff, window->pgoff + window->length_pages, false) : 0;

    if (error)
        give_up(strerror(error));
    forget_mappings(window);
}

void window_unmap(struct window *window, uint64_t pgoff, uint64_t length_pages, bool even_cows)
{
    uint64_t first = pgoff, end = pgoff + length_pages;

    if (length_pages > UINT64_MAX - pgoff)
        end = UINT64_MAX;
    /* To cut a hole into a VMA makes two of it, and that may be one too many. */
    if (!clip(window, &first, &end) || !unmap(window, first, end, even_cows))
        return;
    unmap_whole(window);
    if (window->is_private && even_cows && unmap(window, first, end, true))
        give_up("copies cannot be dropped");
}

void pager_windows_unmap(struct pager *pager)
{
    for (size_t i = 0; i < PAGER_BUCKETS; i++)
        for (struct window *window = pager->windows[i]; window; window = window->next)
            unmap_whole(window);
}

/* --- mapping ------------------------------------------------------------------------------------------------------ */

/* How many mappings of the window can be given up. */
static uint64_t can_give_up(const struct window *window)
{
    return window->kept ? 0 : window->mappings;
}

static struct window *window_with_most_mappings(void)
{
    struct window *first = next_in_table(NULL);
    struct window *most = first;

    for (struct window *window = next_in_table(first); window != first; window = next_in_table(window))
        if (can_give_up(window) > can_give_up(most))
            most = window;
    return most;
}

/* Unmaps windows until half of all mappings are gone. False: there was nothing to give up. */
bool windows_give_up_mappings(void)
{
    uint64_t keep = mappings / 2;
    struct window *first = mappings ? window_with_most_mappings() : NULL, *window = first;

    if (!first || !can_give_up(first))
        return false;
    do {
        if (can_give_up(window)) {
            pager_count(window->pager, COUNT_DROPS, window->mappings);
            unmap_whole(window);
        }
        window = next_in_table(window);
    } while (mappings > keep && window != first);
    return true;
}

int map_over(void *address, uint64_t length_bytes, int prot, int fd, uint64_t offset_bytes)
{
    int flags = MAP_FIXED | (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED);

    if (mmap(address, length_bytes, prot, flags, fd, (off_t)offset_bytes) == MAP_FAILED)
        return errno;
    return madvise(address, length_bytes, MADV_DONTFORK) ? errno : 0;
}

int window_map(struct window *window, uint64_t pgoff, uint64_t length_pages, int prot, int fd, uint64_t pfn)
{
    uint64_t first = pgoff, end = pgoff + length_pages;
    uint64_t offset_bytes;
    int error;

    if (!clip(window, &first, &end))
        return 0;
    if (mappings >= mappings_max)
        windows_give_up_mappings();
    offset_bytes = fd < 0 ? first * page_size_bytes() : (pfn + (first - pgoff)) * page_size_bytes();
    if (window->is_private) {
        window->touched_first = first < window->touched_first ? first : window->touched_first;
        window->touched_end = end > window->touched_end ? end : window->touched_end;
    }
    do {
        char *address = page_address(window, first);
        uint64_t length_bytes = (end - first) * page_size_bytes(), made = 0;

        if (window->is_private)
            error = private_map((uintptr_t)address, length_bytes, fd, offset_bytes, &made);
        else
            made = !(error = map_over(address, length_bytes, prot, fd, offset_bytes));
        window->mappings += made;
        mappings += made;
    } while (error == ENOMEM && windows_give_up_mappings());
    return error;
}
