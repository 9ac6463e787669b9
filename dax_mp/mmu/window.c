/* The windows of this process, and what is mapped in them.
 *
 * A window is reserved as private anonymous PROT_NONE memory. To map is one mmap(MAP_FIXED) of the region's frames
 * over it, to unmap one mmap(MAP_FIXED) of PROT_NONE memory: each replaces what was there in one atomic step, so that
 * an access at any moment finds the old page, the new page, or a fault. No kernel mapping of a window is inherited
 * over fork (MADV_DONTFORK): the coordinator knows nothing of the child, and its unmaps would not reach it.
 *
 * The table. The signal handler must find the window of an address at any moment and may take no lock. So windows
 * live in chunks that are added and never freed, and an entry is published by the release store of its base address,
 * after all else, and withdrawn by clearing it, before all else. A search reads the two dense arrays of each chunk.
 *
 * Too many mappings. The kernel gives a process vm.max_map_count VMAs. A lone page mapped in a window takes two (the
 * page, and the rest of the reservation that it cuts off). Mappings are counted; at three quarters of the limit, or
 * when mmap says ENOMEM before that, whole windows are unmapped, from the one with the most mappings on in the order
 * of the table, until half of all are gone. Translations are only a cache: what is still used is faulted in again.
 */

#include "mmu.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    CHUNK_WINDOWS = 256,
    MAX_MAP_COUNT_DEFAULT = 65530,
    VMAS_PER_MAPPING = 2,
    SCRATCH_BYTES_MAX = 2 << 20,
    RESERVED_TIMES = 8,
};
static const uint64_t RESERVED_BYTES_MIN = 1ull << 30, RESERVED_BYTES_MAX = 1ull << 45;

struct chunk {
    _Atomic uintptr_t base[CHUNK_WINDOWS]; /* 0: no window; the release store of it publishes all else */
    _Atomic uintptr_t end[CHUNK_WINDOWS];
    _Atomic(struct chunk *) next;
    struct window windows[CHUNK_WINDOWS];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic(struct chunk *) chunks;
static struct window *free_windows;
static uint64_t last_serial;
static size_t windows_open;

static uint64_t mappings; /* the sum of all windows' */
static uint64_t mappings_max;
static uint64_t page_size; /* bytes */
static _Atomic bool any_scratch;

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

/* --- address space ----------------------------------------------------------------------------------------------- */

static int reserve(void *address, uint64_t length_bytes, bool is_private, int flags, void **reserved)
{
    *reserved = mmap(address, length_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);
    if (*reserved == MAP_FAILED)
        return errno;
    return !is_private && madvise(*reserved, length_bytes, MADV_DONTFORK) ? errno : 0;
}

/* Reserves for a window of `length_pages` that may grow: eight times as much, and a GiB at least, so that 65536 windows
 * of up to 128 MiB, or a few of many TiB, fit into 47 bits; less where the process may not have so much. */
static int reserve_ahead(uint64_t length_pages, bool is_private, void **reserved, uint64_t *reserved_pages)
{
    uint64_t pages_min = RESERVED_BYTES_MIN / page_size;
    uint64_t pages = length_pages > RESERVED_BYTES_MAX / page_size / RESERVED_TIMES ? length_pages
                                                                                    : length_pages * RESERVED_TIMES;
    int error;

    if (pages < pages_min)
        pages = pages_min;
    for (; (error = reserve(NULL, pages * page_size, is_private, 0, reserved)) && pages > length_pages;
         pages = pages / 2 > length_pages ? pages / 2 : length_pages)
        continue;
    *reserved_pages = pages;
    return error;
}

static char *page_address(const struct window *window, uint64_t pgoff)
{
    return (char *)window->base + (pgoff - window->pgoff) * page_size;
}

/* Clips a range of the file to the window. False: nothing is left. */
static bool clip(const struct window *window, uint64_t *pgoff, uint64_t *end)
{
    uint64_t window_end = window->pgoff + window->length_pages;

    if (*pgoff < window->pgoff)
        *pgoff = window->pgoff;
    if (*end > window_end)
        *end = window_end;
    return *pgoff < *end;
}

/* Whether the window is open and has its address space: after a fork it may have lost it. */
static bool has_range(const struct window *window)
{
    return atomic_load_explicit(&window->chunk->base[window->index], memory_order_relaxed) != 0;
}

static int unmap(struct window *window, uint64_t pgoff, uint64_t end, bool even_cows)
{
    void *ignored;

    if (!window->is_private || even_cows)
        return reserve(page_address(window, pgoff), (end - pgoff) * page_size, window->is_private, MAP_FIXED, &ignored);
    if (pgoff < window->touched_first)
        pgoff = window->touched_first;
    if (end > window->touched_end)
        end = window->touched_end;
    return pgoff < end ? private_unmap((uintptr_t)page_address(window, pgoff), (end - pgoff) * page_size) : 0;
}

/* A translation would be left that nobody can take back. */
static _Noreturn void give_up(const char *why)
{
    fprintf(stderr, "dax_mp: a window cannot be unmapped: %s\n", why);
    abort();
}

/* Drops all translations, but no copies. This cannot fail for the limit on mappings: it cuts at most the two VMAs at the edges, and the kernel lets that go
 * over the limit for a moment. If it does fail, a translation would be left that nobody can take back. */
static void unmap_whole(struct window *window)
{
    int error = has_range(window) ? unmap(window, window->pgoff, window->pgoff + window->length_pages, false) : 0;

    if (error)
        give_up(strerror(error));
    mappings -= window->mappings;
    window->mappings = 0;
}

/* --- the table --------------------------------------------------------------------------------------------------- */

static void forget_scratch(struct window *window)
{
    for (size_t i = 0; i < SCRATCH_RANGES; i++)
        atomic_store(&window->scratch[i], 0);
    atomic_store(&window->scratch_everywhere, false);
}

static bool add_chunk(void)
{
    struct chunk *chunk = calloc(1, sizeof *chunk);

    if (!chunk)
        return false;
    for (size_t i = CHUNK_WINDOWS; i-- > 0;) {
        chunk->windows[i].chunk = chunk;
        chunk->windows[i].index = i;
        chunk->windows[i].next = free_windows;
        free_windows = &chunk->windows[i];
    }
    atomic_store_explicit(&chunk->next, atomic_load_explicit(&chunks, memory_order_relaxed), memory_order_relaxed);
    atomic_store_explicit(&chunks, chunk, memory_order_release);
    return true;
}

static struct window **bucket(struct pager *pager, uint64_t vma_id)
{
    return &pager->windows[vma_id % PAGER_BUCKETS];
}

static void publish(struct window *window)
{
    uintptr_t end = window->base + window->length_pages * page_size;

    window->next = *bucket(window->pager, window->vma_id);
    *bucket(window->pager, window->vma_id) = window;
    windows_open++;
    atomic_store_explicit(&window->chunk->end[window->index], end, memory_order_relaxed);
    atomic_store_explicit(&window->chunk->base[window->index], window->base, memory_order_release);
}

static void withdraw(struct window *window)
{
    struct window **link = bucket(window->pager, window->vma_id);

    atomic_store_explicit(&window->chunk->base[window->index], 0, memory_order_release);
    while (*link != window)
        link = &(*link)->next;
    *link = window->next;
    windows_open--;
}

int window_open(struct pager *pager, uint64_t vma_id, uint64_t pgoff, uint64_t length_pages, bool writable,
                bool is_private, void *object, struct window **opened)
{
    struct window *window;
    void *base = NULL;
    uint64_t reserved_pages = 0;
    int error;

    windows_lock();
    error = free_windows || add_chunk() ? 0 : ENOMEM;
    if (!error && is_private)
        error = private_init();
    if (!error)
        error = reserve_ahead(length_pages, is_private, &base, &reserved_pages);
    if (!error) {
        window = free_windows;
        free_windows = window->next;
        window->base = (uintptr_t)base;
        window->length_pages = length_pages;
        window->pgoff = pgoff;
        window->reserved_pages = reserved_pages;
        window->is_private = is_private;
        window->touched_first = UINT64_MAX;
        window->touched_end = 0;
        window->kept = 0;
        window->vma_id = vma_id;
        window->serial = ++last_serial;
        window->writable = writable;
        window->pager = pager;
        window->object = object;
        window->mappings = 0;
        forget_scratch(window);
        publish(window);
        *opened = window;
    } else if (base && base != MAP_FAILED) {
        munmap(base, reserved_pages * page_size);
    }
    windows_unlock();
    return error;
}

static void set_range(struct window *window, uintptr_t base, uint64_t length_pages)
{
    window->base = base;
    window->length_pages = length_pages;
    atomic_store_explicit(&window->chunk->end[window->index], base + length_pages * page_size, memory_order_relaxed);
    atomic_store_explicit(&window->chunk->base[window->index], base, memory_order_release);
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

/* Gives the window other address space. Nothing is mapped there; what is used is faulted in again. */
static int move_window(struct window *window, uint64_t length_pages)
{
    uint64_t reserved_pages;
    void *base;
    int error = reserve_ahead(length_pages, false, &base, &reserved_pages);

    if (error)
        return error;
    unmap_whole(window);
    munmap((void *)window->base, window->reserved_pages * page_size);
    window->reserved_pages = reserved_pages;
    set_range(window, (uintptr_t)base, length_pages);
    return 0;
}

int window_resize(struct window *window, uint64_t length_pages, bool may_move)
{
    uint64_t old_end = window->pgoff + window->length_pages;
    int error = 0;

    windows_lock();
    if (!has_range(window)) {
        error = ESTALE;
    } else if (length_pages <= window->reserved_pages || !(error = reserve_behind(window, length_pages))) {
        set_range(window, window->base, length_pages);
        if (window->pgoff + length_pages < old_end) {
            window->length_pages = old_end - window->pgoff;
            window_unmap(window, window->pgoff + length_pages, old_end, true);
            window->length_pages = length_pages;
        }
    } else if (may_move && !window->is_private) { /* copies cannot move */
        error = move_window(window, length_pages);
    } else {
        error = window->is_private ? ENOMEM : EBUSY;
    }
    windows_unlock();
    return error;
}

void window_rebind(struct window *window, struct pager *pager, uint64_t vma_id)
{
    struct window **link;

    windows_lock();
    for (link = bucket(window->pager, window->vma_id); *link != window; link = &(*link)->next)
        continue;
    *link = window->next;
    window->pager = pager;
    window->vma_id = vma_id;
    window->next = *bucket(pager, vma_id);
    *bucket(pager, vma_id) = window;
    windows_unlock();
}

void window_keep(struct window *window, bool keep)
{
    windows_lock();
    window->kept += keep ? 1 : -1ull;
    windows_unlock();
}

void window_close(struct window *window)
{
    bool reserved;

    windows_lock();
    reserved = has_range(window);
    withdraw(window);
    if (reserved)
        munmap((void *)window->base, window->reserved_pages * page_size);
    mappings -= window->mappings;
    window->mappings = 0;
    window->base = 0;
    window->serial = 0;
    window->object = NULL;
    window->next = free_windows;
    free_windows = window;
    windows_unlock();
}

struct window *window_at(uintptr_t address)
{
    struct chunk *chunk = atomic_load_explicit(&chunks, memory_order_acquire);

    for (; chunk; chunk = atomic_load_explicit(&chunk->next, memory_order_relaxed))
        for (size_t i = 0; i < CHUNK_WINDOWS; i++) {
            uintptr_t base = atomic_load_explicit(&chunk->base[i], memory_order_acquire);

            if (base && address >= base && address < atomic_load_explicit(&chunk->end[i], memory_order_relaxed))
                return &chunk->windows[i];
        }
    return NULL;
}

struct window *window_of(struct pager *pager, uint64_t vma_id)
{
    struct window *window = *bucket(pager, vma_id);

    while (window && window->vma_id != vma_id)
        window = window->next;
    return window;
}

bool windows_any(void)
{
    bool any;

    windows_lock();
    any = windows_open != 0;
    windows_unlock();
    return any;
}

/* The window after `window` in the order of the table, round and round; open or not. */
static struct window *next_in_table(struct window *window)
{
    struct chunk *chunk = window->chunk;

    if (window->index + 1 < CHUNK_WINDOWS)
        return window + 1;
    chunk = atomic_load_explicit(&chunk->next, memory_order_relaxed);
    if (!chunk)
        chunk = atomic_load_explicit(&chunks, memory_order_relaxed);
    return &chunk->windows[0];
}

/* --- mapping ----------------------------------------------------------------------------------------------------- */

/* How many mappings of the window can be given up. */
static uint64_t can_give_up(const struct window *window)
{
    return window->kept ? 0 : window->mappings;
}

static struct window *window_with_most_mappings(void)
{
    struct window *first = &atomic_load_explicit(&chunks, memory_order_relaxed)->windows[0];
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

static int map_over(void *address, uint64_t length_bytes, int prot, int fd, uint64_t offset_bytes)
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
    offset_bytes = fd < 0 ? first * page_size : (pfn + (first - pgoff)) * page_size;
    if (window->is_private) {
        window->touched_first = first < window->touched_first ? first : window->touched_first;
        window->touched_end = end > window->touched_end ? end : window->touched_end;
    }
    do {
        char *address = page_address(window, first);
        uint64_t length_bytes = (end - first) * page_size, made = 0;

        if (window->is_private)
            error = private_map((uintptr_t)address, length_bytes, fd, offset_bytes, &made);
        else
            made = !(error = map_over(address, length_bytes, prot, fd, offset_bytes));
        window->mappings += made;
        mappings += made;
    } while (error == ENOMEM && windows_give_up_mappings());
    return error;
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

/* --- scratch pages ----------------------------------------------------------------------------------------------- */

/* A window remembers the ranges it has scratch pages in, each in one word, so that the handler can add one without the
 * lock when the pager is no more. To drop a page that is not scratch (any more) would mostly cost a fault and no more;
 * but when the coordinator is gone, what is mapped is all there will ever be. So only when there are more ranges than
 * can be remembered is the whole window dropped.
 */
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

int window_map_scratch(struct window *window, uint64_t pgoff, uint64_t length_pages, bool writable)
{
    uint64_t pages_max = SCRATCH_BYTES_MAX / page_size;
    uint64_t first = pgoff, end = pgoff + (length_pages < pages_max ? length_pages : pages_max);
    int prot = PROT_READ | (writable ? PROT_WRITE : 0);
    int error;

    if (!clip(window, &first, &end))
        return EFAULT;
    error = map_over(page_address(window, first), (end - first) * page_size, prot, -1, 0);
    if (!error) /* after the mapping is there: whoever drops the range from here on drops this too */
        remember_scratch(window, first - window->pgoff, end - first);
    return error;
}

static void drop_scratch(struct window *window)
{
    if (!has_range(window))
        return;
    if (atomic_exchange(&window->scratch_everywhere, false))
        unmap_whole(window);
    for (size_t i = 0; i < SCRATCH_RANGES; i++) {
        uint64_t range = atomic_exchange(&window->scratch[i], 0);

        if (range)
            window_unmap(window, window->pgoff + scratch_first(range), scratch_length(range), true);
    }
}

void windows_drop_scratch(void)
{
    struct chunk *chunk = atomic_load(&chunks);

    windows_lock();
    if (!atomic_exchange(&any_scratch, false))
        chunk = NULL;
    for (; chunk; chunk = atomic_load(&chunk->next))
        for (size_t i = 0; i < CHUNK_WINDOWS; i++)
            drop_scratch(&chunk->windows[i]);
    windows_unlock();
}

/* --- fork -------------------------------------------------------------------------------------------------------- */

/* The child has none of the shared windows' memory, but it has the views and arrays that point there. So that they fault,
 * and do not reach memory that something else has got meanwhile, each range is reserved again at its address. One
 * whose address is taken already is not a window any more. Private windows are inherited whole, for their copies; all
 * else in them is dropped here, before any other code of the child runs.
 */
static void reserve_again(struct window *window)
{
    uint64_t length_bytes = window->reserved_pages * page_size;
    void *base = (void *)window->base;
    void *reserved;

    if (window->is_private)
        unmap_whole(window);
    else if (reserve(base, length_bytes, false, MAP_FIXED_NOREPLACE, &reserved) && reserved == MAP_FAILED)
        atomic_store(&window->chunk->base[window->index], 0);
    window->mappings = 0;
    forget_scratch(window);
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
    for (struct chunk *chunk = atomic_load(&chunks); chunk; chunk = atomic_load(&chunk->next))
        for (size_t i = 0; i < CHUNK_WINDOWS; i++)
            if (chunk->windows[i].base)
                reserve_again(&chunk->windows[i]);
    mappings = 0;
    pagers_after_fork_in_child();
    pthread_mutex_init(&lock, NULL);
}

int windows_init(void)
{
    page_size = (uint64_t)sysconf(_SC_PAGESIZE);
    mappings_max = read_max_map_count() / VMAS_PER_MAPPING / 4 * 3;
    return pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}
