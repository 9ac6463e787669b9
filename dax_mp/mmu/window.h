/* What the files about windows share: window.c, window_table.c, closed.c, protection.c, translations.c, scratch.c. */

#ifndef DAX_MP_WINDOW_H
#define DAX_MP_WINDOW_H

#include "mmu.h"

/* --- address space (window.c) ------------------------------------------------------------------------------------- */

/* Reserves private memory without access, at `address` with MAP_FIXED or the like in `flags`. What is not private is
 * not inherited by a fork. 0 or an errno; `*reserved` is MAP_FAILED where nothing was reserved. */
int reserve(void *address, uint64_t length_bytes, bool is_private, int flags, void **reserved);
/* Clips a range of the file to the window. False: nothing is left. */
bool clip(const struct window *window, uint64_t *pgoff, uint64_t *end);

/* --- the table (window_table.c) ----------------------------------------------------------------------------------- */

/* A window that is not open, for the caller to fill; NULL: no memory. */
struct window *take_free_window(void);
void give_back_window(struct window *window);
void publish(struct window *window);
/* Takes it from its pager: no Map finds it. */
void withdraw(struct window *window);
/* The window is at `base` now, and that long. */
void set_range(struct window *window, uintptr_t base, uint64_t length_pages);
/* It has no address space any more. */
void clear_range(struct window *window);
/* Whether any window, open or closed, has reserved any of it. Needs no lock. */
bool window_overlaps(uintptr_t start, uintptr_t end);
/* Whether the window is open and has its address space: after a fork it may have lost it. */
bool has_range(const struct window *window);
/* The window after `window` in the order of the table, round and round; open or not. NULL: the first one, if any. */
struct window *next_in_table(struct window *window);
/* Calls it for every window of the table, open or not. */
void for_each_window(void (*function)(struct window *window));

/* --- address space of closed windows (closed.c) ------------------------------------------------------------------- */

void closed_init(uint64_t max_map_count);
void closed_after_fork_in_child(void);
/* With windows_lock() held: */
/* Keeps a range that was a window's, of which views can have reached the first `reach_bytes`: always while there is an
 * owner, the Window object, and after that for as long as can be. False: no memory. */
bool closed_add(uintptr_t base, uint64_t reach_bytes, uint64_t reserved_bytes, const struct pager_config *config,
                const void *owner);
void closed_disown(const void *owner);
/* Gives address space back to the kernel. False: there is none that may be. */
bool closed_give_back(void);
/* Takes address space that is reserved, and that no view has reached, for a new window. 0: there is none that long. */
uint64_t closed_take_rest(uint64_t bytes_min, uint64_t bytes_max, uintptr_t *base);
/* Needs no lock: whether any of it is kept. */
bool closed_overlaps(uintptr_t start, uintptr_t end);
bool closed_any(void);
bool closed_any_by_userfaultfd(void);
void closed_drop_scratch(void);

/* --- protections (protection.c) ----------------------------------------------------------------------------------- */

/* With windows_lock() held: what a page may be used for, and until where that holds, if that is before `*end`. */
int protection_at(const struct window *window, uint64_t page, uint64_t *end);
/* Forgets those of pages from `end` on. */
void protection_cut(struct window *window, uint64_t end);
void protection_free(struct window *window);

/* --- translations (translations.c) -------------------------------------------------------------------------------- */

void translations_init(void);
/* Keeps a few VMAs in reserve, where there are any. */
void fill_spare(void);
/* With windows_lock() held: */
/* Drops the translations of pages of the window, which count from its first one; even_cows: private copies too. */
void drop_pages(struct window *window, uint64_t first, uint64_t end, bool even_cows);
/* Drops all translations, but no copies. */
void unmap_whole(struct window *window);
/* The window's memory is gone, with all that was mapped there. */
void forget_mappings(struct window *window);
/* The pinned range that ends after page `first` and begins before all others that do. NULL: none. */
const struct kept *next_kept(const struct window *window, uint64_t first);
/* Needs no lock. Maps memory that is no file's over pages that count from the window's first. 0 or an errno. */
int map_scratch(struct window *window, uint64_t first, uint64_t end, bool writable);

/* --- scratch pages (scratch.c) ------------------------------------------------------------------------------------ */

bool has_scratch(const struct window *window);
void forget_scratch(struct window *window);
/* Until nobody is about to add some. Who began before the window's serial changed has ended then. */
void await_scratch(struct window *window);

#endif
