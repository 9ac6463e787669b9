/* The table of windows.
 *
 * The signal handler must find the window of an address at any moment and may take no lock. So windows live in chunks
 * that are added and never freed, and an entry is published by the release store of its base address, after all else,
 * and withdrawn by clearing it, before all else. A search reads the two dense arrays of each chunk.
 */

#include "window.h"

#include <stdlib.h>

enum { CHUNK_WINDOWS = 256 };

struct chunk {
    _Atomic uintptr_t base[CHUNK_WINDOWS]; /* 0: no window; the release store of it publishes all else */
    _Atomic uintptr_t end[CHUNK_WINDOWS];
    _Atomic size_t used; /* no entry from here on has been published */
    _Atomic(struct chunk *) next;
    struct window windows[CHUNK_WINDOWS];
};

static _Atomic(struct chunk *) chunks;
static struct window *free_windows;
static size_t windows_open;
_Atomic uintptr_t windows_first = UINTPTR_MAX, windows_end;

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

struct window *take_free_window(void)
{
    struct window *window;

    if (!free_windows && !add_chunk())
        return NULL;
    window = free_windows;
    free_windows = window->next;
    return window;
}

void give_back_window(struct window *window)
{
    window->next = free_windows;
    free_windows = window;
}

/* Has windows_first and windows_end take in a range; before anybody can have an address in it. */
static void extend_span(uintptr_t base, uintptr_t end)
{
    if (base < atomic_load(&windows_first))
        atomic_store(&windows_first, base);
    if (end > atomic_load(&windows_end))
        atomic_store(&windows_end, end);
}

/* Makes them as narrow as the windows are. */
static void narrow_span(void)
{
    uintptr_t first = UINTPTR_MAX, last = 0;

    for (struct chunk *chunk = atomic_load(&chunks); chunk; chunk = atomic_load(&chunk->next))
        for (size_t i = 0; i < chunk->used; i++)
            if (atomic_load(&chunk->base[i])) {
                first = chunk->base[i] < first ? chunk->base[i] : first;
                last = chunk->end[i] > last ? chunk->end[i] : last;
            }
    atomic_store(&windows_first, first);
    atomic_store(&windows_end, last);
}

void set_range(struct window *window, uintptr_t base, uint64_t length_pages)
{
    uintptr_t end;

    window->base = base;
    window->length_pages = length_pages;
    window->reach_pages = length_pages > window->reach_pages ? length_pages : window->reach_pages;
    end = base + window->reach_pages * page_size_bytes();
    extend_span(base, end);
    if (window->chunk->used <= window->index)
        atomic_store(&window->chunk->used, window->index + 1);
    atomic_store_explicit(&window->chunk->end[window->index], end, memory_order_relaxed);
    atomic_store_explicit(&window->chunk->base[window->index], base, memory_order_release);
}

void clear_range(struct window *window)
{
    atomic_store(&window->chunk->base[window->index], 0);
    narrow_span();
}

bool has_range(const struct window *window)
{
    return atomic_load_explicit(&window->chunk->base[window->index], memory_order_relaxed) != 0;
}

void publish(struct window *window)
{
    window->next = *bucket(window->pager, window->vma_id);
    *bucket(window->pager, window->vma_id) = window;
    windows_open++;
    set_range(window, window->base, window->length_pages);
}

void withdraw(struct window *window)
{
    struct window **link = bucket(window->pager, window->vma_id);

    while (*link != window)
        link = &(*link)->next;
    *link = window->next;
    windows_open--;
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

struct window *window_at(uintptr_t address)
{
    struct chunk *chunk = atomic_load_explicit(&chunks, memory_order_acquire);

    for (; chunk; chunk = atomic_load_explicit(&chunk->next, memory_order_relaxed))
        for (size_t i = 0, used = atomic_load_explicit(&chunk->used, memory_order_relaxed); i < used; i++) {
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

bool window_overlaps(uintptr_t start, uintptr_t end)
{
    for (struct chunk *chunk = atomic_load(&chunks); chunk; chunk = atomic_load(&chunk->next))
        for (size_t i = 0; i < CHUNK_WINDOWS; i++) {
            uintptr_t base = atomic_load(&chunk->base[i]);

            if (base && start < base + chunk->windows[i].reserved_pages * page_size_bytes() && end > base)
                return true;
        }
    return closed_overlaps(start, end);
}

bool windows_any(void)
{
    bool any;

    windows_lock();
    any = windows_open != 0 || closed_any();
    windows_unlock();
    return any;
}

struct window *next_in_table(struct window *window)
{
    struct chunk *chunk = window ? window->chunk : NULL;

    if (window && window->index + 1 < CHUNK_WINDOWS)
        return window + 1;
    if (chunk)
        chunk = atomic_load_explicit(&chunk->next, memory_order_relaxed);
    if (!chunk)
        chunk = atomic_load_explicit(&chunks, memory_order_relaxed);
    return chunk ? &chunk->windows[0] : NULL;
}

void for_each_window(void (*function)(struct window *window))
{
    for (struct chunk *chunk = atomic_load(&chunks); chunk; chunk = atomic_load(&chunk->next))
        for (size_t i = 0; i < CHUNK_WINDOWS; i++)
            function(&chunk->windows[i]);
}
