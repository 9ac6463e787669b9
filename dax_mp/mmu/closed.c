/* The address space of windows that are closed.
 *
 * A pointer into a window may outlive it: np.ndarray(buffer=mapping) keeps no export, and nor does C code that was
 * given an address. If the range were given back to the kernel, the next mmap(2) of anybody would get it, and the
 * pointer would read and write that. So the range stays reserved, inaccessible, and findable: an access to it is a bus
 * error that says so (ESTALE), and a raw one ends on a scratch page, as in an open window.
 *
 * For how long: always, while the Window object lives; an array that was made of it keeps it alive (array.base). After
 * that only raw pointers are left, and the range is kept until address space or VMAs are scarce. The oldest goes first.
 *
 * What it costs: address space, but no memory. A range is of the same kind as the reservation of an open window, so the
 * kernel merges it with its neighbours into one VMA. The end of a reservation, which no view can have reached, becomes
 * the reservation of the next window; and where one range begins at the end of another, both become one entry here. So
 * a program that opens and closes small windows for ever has a few entries, and a VMA for all of them. Page tables do
 * take memory: a part that one table maps is mapped anew at once when all of it is kept, and the kernel frees the table.
 *
 * The signal handler searches without a lock. The store of its start publishes an entry, after all else, and clearing
 * it withdraws it. `visitors` counts the handlers that are between their search and the end of their work. Who takes an
 * entry away withdraws it first, waits until there are no visitors, and only then is the range anybody else's. So a
 * scratch page is never put over memory that is not a closed window's. A visitor waits for nothing.
 */

#include "window.h"

#include "userfaultfd.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/resource.h>

enum { CHUNK_ENTRIES = 256, CHUNKS_MAX = 1024, VMAS_SHARE = 16, SCRATCH_LOAD_BYTES = 2 << 20, STORES_GIVEN_BACK = 16 };
static const uint64_t BUDGET_BYTES = 1ull << 42, BUDGET_SHARE = 8;

struct closed {
    _Atomic uintptr_t start; /* 0: not in use */
    _Atomic uintptr_t end;   /* of what a view can have reached; from here to `reserved_end` none can */
    uintptr_t reserved_end;
    const void *owner; /* the Window object; NULL: it is gone */
    uint64_t age;      /* larger: closed later */
    bool sigbus;       /* an access ends in SIGBUS */
    bool by_userfaultfd; /* how it gets to the pager */
    _Atomic bool has_scratch;
    _Atomic uint32_t stores; /* that failed since the last exception was raised */
};

static struct closed *chunks[CHUNKS_MAX]; /* never freed */
static _Atomic size_t entries_count;      /* the store of it publishes a chunk */
static _Atomic uint32_t visitors;
static _Atomic bool any_scratch;
static uint64_t last_age;
static uint64_t entries_max;
static uint64_t ownerless, ownerless_bytes; /* what can be given back */

static struct closed *entry_at(size_t index)
{
    return &chunks[index / CHUNK_ENTRIES][index % CHUNK_ENTRIES];
}

/* The first entry in use from `*index` on, which is moved behind it. NULL: there is no more. */
static struct closed *next_in_use(size_t *index)
{
    size_t count = atomic_load(&entries_count);

    while (*index < count) {
        struct closed *entry = entry_at((*index)++);

        if (atomic_load(&entry->start))
            return entry;
    }
    return NULL;
}

/* Counts it in or out of what can be given back, where it can. */
static void count(const struct closed *entry, int by)
{
    if (entry->owner)
        return;
    ownerless += by;
    ownerless_bytes += by * (entry->reserved_end - atomic_load(&entry->start));
}

static struct closed *find(uintptr_t address)
{
    struct closed *entry;

    for (size_t i = 0; (entry = next_in_use(&i));)
        if (address >= atomic_load(&entry->start) && address < atomic_load(&entry->end))
            return entry;
    return NULL;
}

/* Until nobody can be about to do something to an entry that was withdrawn before. */
static void await_visitors(void)
{
    while (atomic_load(&visitors))
        sched_yield();
}

/* --- adding ------------------------------------------------------------------------------------------------------- */

static struct closed *free_entry(void)
{
    size_t all = atomic_load(&entries_count);
    struct closed **chunk = &chunks[all / CHUNK_ENTRIES];

    for (size_t i = 0; i < all; i++)
        if (!atomic_load(&entry_at(i)->start))
            return entry_at(i);
    if (all == (size_t)CHUNK_ENTRIES * CHUNKS_MAX)
        return NULL;
    *chunk = calloc(CHUNK_ENTRIES, sizeof **chunk);
    if (!*chunk)
        return NULL;
    atomic_store(&entries_count, all + CHUNK_ENTRIES);
    return *chunk;
}

bool closed_add(uintptr_t base, uint64_t reach_bytes, uint64_t reserved_bytes, const struct pager_config *config,
                const void *owner)
{
    struct closed *entry = free_entry();

    if (!entry)
        return false;
    entry->reserved_end = base + reserved_bytes;
    entry->owner = owner;
    entry->age = reach_bytes ? ++last_age : 0; /* what nobody can have reached goes first */
    entry->sigbus = config->sigbus;
    entry->by_userfaultfd = config->by_userfaultfd;
    atomic_store(&entry->has_scratch, false);
    atomic_store(&entry->stores, 0);
    atomic_store(&entry->end, base + reach_bytes);
    atomic_store(&entry->start, base);
    count(entry, 1);
    return true;
}

/* --- giving back -------------------------------------------------------------------------------------------------- */

bool closed_give_back(void)
{
    struct closed *oldest = NULL, *entry;
    uintptr_t start;
    bool given;

    for (size_t i = 0; (entry = next_in_use(&i));)
        if (!entry->owner && (!oldest || entry->age < oldest->age))
            oldest = entry;
    if (!oldest)
        return false;
    start = atomic_load(&oldest->start);
    count(oldest, -1);
    atomic_store(&oldest->start, 0);
    await_visitors();
    given = !munmap((void *)start, oldest->reserved_end - start); /* it may cut a VMA in two, where none is left */
    atomic_store(&oldest->start, given ? 0 : start);
    if (!given)
        count(oldest, 1);
    return given;
}

/* How much address space may be kept for raw pointers. */
static uint64_t budget_bytes(void)
{
    struct rlimit limit;

    if (getrlimit(RLIMIT_AS, &limit) || limit.rlim_cur / BUDGET_SHARE > BUDGET_BYTES)
        return BUDGET_BYTES;
    return limit.rlim_cur / BUDGET_SHARE;
}

/* --- the end of the object ---------------------------------------------------------------------------------------- */

/* Makes one entry of two, where the second begins at the end of the first. */
static void join(struct closed *first, struct closed *second)
{
    if (first->owner || second->owner || first->sigbus != second->sigbus ||
        first->by_userfaultfd != second->by_userfaultfd ||
        atomic_load(&first->end) != first->reserved_end || first->reserved_end != atomic_load(&second->start))
        return;
    count(first, -1);
    count(second, -1);
    atomic_store(&first->end, atomic_load(&second->end));
    atomic_store(&second->start, 0);
    await_visitors(); /* they have said at the entry that they found that it has scratch pages */
    if (atomic_load(&second->has_scratch))
        atomic_store(&first->has_scratch, true);
    first->reserved_end = second->reserved_end;
    first->age = first->age > second->age ? first->age : second->age;
    count(first, 1);
}

static void disown(struct closed *entry)
{
    struct closed *other;

    entry->owner = NULL;
    count(entry, 1);
    for (size_t i = 0; (other = next_in_use(&i));)
        join(entry, other);
    for (size_t i = 0; (other = next_in_use(&i));)
        join(other, entry);
}

/* Of the parts around a range that are kept. The kernel does not free a table of which a neighbour has a part. Where
 * faults arrive through userfaultfd(2) they stay: memory mapped anew would not be registered for a moment, and an access to
 * it not be ours. */
static void free_page_tables(uintptr_t start, uintptr_t end)
{
    uint64_t table_bytes = page_size_bytes() / sizeof(uint64_t) * page_size_bytes();
    uintptr_t first = start / table_bytes * table_bytes, last = (end + table_bytes - 1) / table_bytes * table_bytes;
    const struct closed *entry = find(start);
    void *ignored;

    if (!entry || entry->by_userfaultfd)
        return;
    if (first < atomic_load(&entry->start))
        first += table_bytes;
    if (last > entry->reserved_end)
        last -= table_bytes;
    if (first < last)
        reserve((void *)first, last - first, false, MAP_FIXED, &ignored);
}

void closed_disown(const void *owner)
{
    uint64_t bytes_max = budget_bytes();
    struct closed *entry;

    for (size_t i = 0; (entry = next_in_use(&i));) {
        uintptr_t start = atomic_load(&entry->start), end = atomic_load(&entry->end);

        if (entry->owner != owner)
            continue;
        disown(entry);
        free_page_tables(start, end);
    }
    while ((ownerless > entries_max || ownerless_bytes > bytes_max) && closed_give_back())
        continue;
}

/* --- reuse -------------------------------------------------------------------------------------------------------- */

uint64_t closed_take_rest(uint64_t bytes_min, uint64_t bytes_max, uintptr_t *base)
{
    struct closed *entry;

    for (size_t i = 0; (entry = next_in_use(&i));) {
        uintptr_t end = atomic_load(&entry->end);
        uint64_t bytes = entry->reserved_end - end;

        if (bytes < bytes_min || bytes > bytes_max)
            continue;
        count(entry, -1);
        entry->reserved_end = end;
        *base = end;
        if (atomic_load(&entry->start) == end) /* nothing of it is kept */
            atomic_store(&entry->start, 0);
        else
            count(entry, 1);
        return bytes;
    }
    return 0;
}

/* --- what is asked for an address --------------------------------------------------------------------------------- */

/* As many as in scratch.c: a store gets one page, the next one twice as many. Their memory is given back meanwhile. */
static uint64_t bytes_for_store(struct closed *entry)
{
    uint32_t failed = atomic_fetch_add(&entry->stores, 1);
    uint64_t bytes = page_size_bytes() << (failed < 8 ? failed : 8);

    if (failed % STORES_GIVEN_BACK == STORES_GIVEN_BACK - 1)
        madvise((void *)atomic_load(&entry->start), atomic_load(&entry->end) - atomic_load(&entry->start),
                MADV_DONTNEED);
    return bytes;
}

/* A store to what a load was given must be no SIGSEGV where that is not ours: with userfaultfd it can be stored to. */
static bool map_scratch_at(struct closed *entry, uintptr_t address, bool write)
{
    bool writable = write || entry->by_userfaultfd;
    uint64_t page_size = page_size_bytes(), length_bytes = writable ? bytes_for_store(entry) : SCRATCH_LOAD_BYTES;
    uintptr_t page = address / page_size * page_size, left = atomic_load(&entry->end) - page;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;

    if (length_bytes > left)
        length_bytes = left;
    if (mmap((void *)page, length_bytes, PROT_READ | (writable ? PROT_WRITE : 0), flags, -1, 0) == MAP_FAILED)
        return false;
    madvise((void *)page, length_bytes, MADV_DONTFORK);
    atomic_store(&entry->has_scratch, true); /* after it is there: who drops them from here on drops this too */
    atomic_store(&any_scratch, true);
    return true;
}

enum closed_access closed_serve(uintptr_t address, bool writable)
{
    enum closed_access result = CLOSED_NOT;
    struct closed *entry;

    atomic_fetch_add(&visitors, 1);
    entry = find(address);
    if (entry && entry->sigbus)
        result = CLOSED_SIGBUS;
    else if (entry)
        result = map_scratch_at(entry, address, writable) ? CLOSED_SCRATCH : CLOSED_NO_VMA;
    atomic_fetch_sub(&visitors, 1);
    return result;
}

bool closed_at(uintptr_t address)
{
    bool found;

    atomic_fetch_add(&visitors, 1);
    found = find(address) != NULL;
    atomic_fetch_sub(&visitors, 1);
    return found;
}

const void *closed_owner(uintptr_t address, uint64_t *offset_bytes)
{
    struct closed *entry = find(address);

    *offset_bytes = entry ? address - atomic_load(&entry->start) : 0;
    return entry ? entry->owner : NULL;
}

bool closed_overlaps(uintptr_t start, uintptr_t end)
{
    struct closed *entry;

    for (size_t i = 0; (entry = next_in_use(&i));)
        if (start < entry->reserved_end && end > atomic_load(&entry->start))
            return true;
    return false;
}

bool closed_any(void)
{
    size_t first = 0;

    return next_in_use(&first) != NULL;
}

bool closed_any_by_userfaultfd(void)
{
    struct closed *entry;

    for (size_t i = 0; (entry = next_in_use(&i));)
        if (entry->by_userfaultfd)
            return true;
    return false;
}

void closed_drop_scratch(void)
{
    struct closed *entry;
    void *dropped;

    if (!atomic_exchange(&any_scratch, false))
        return;
    for (size_t i = 0; (entry = next_in_use(&i));) {
        uintptr_t start = atomic_load(&entry->start);
        uint64_t length_bytes = atomic_load(&entry->end) - start;

        if (!atomic_exchange(&entry->has_scratch, false))
            continue;
        atomic_store(&entry->stores, 0);
        if (entry->by_userfaultfd)
            dropped = userfaultfd_take_out((void *)start, length_bytes, PROT_READ | PROT_WRITE) ? MAP_FAILED : (void *)start;
        else
            reserve((void *)start, length_bytes, false, MAP_FIXED, &dropped);
        if (dropped == MAP_FAILED && (entry->by_userfaultfd || mprotect((void *)start, length_bytes, PROT_NONE))) {
            /* no VMA: the next time */
            atomic_store(&entry->has_scratch, true);
            atomic_store(&any_scratch, true);
        }
    }
}

/* --- life --------------------------------------------------------------------------------------------------------- */

/* The memory was not inherited (MADV_DONTFORK); pointers to it were. */
void closed_after_fork_in_child(void)
{
    struct closed *entry;
    void *reserved;

    atomic_store(&visitors, 0); /* they are not here */
    for (size_t i = 0; (entry = next_in_use(&i));) {
        uintptr_t start = atomic_load(&entry->start);

        atomic_store(&entry->has_scratch, false);
        reserve((void *)start, entry->reserved_end - start, false, MAP_FIXED_NOREPLACE, &reserved);
        if (reserved != MAP_FAILED && entry->by_userfaultfd)
            userfaultfd_arm(reserved, atomic_load(&entry->end) - start, PROT_READ | PROT_WRITE);
        if (reserved == MAP_FAILED) { /* something else is there already */
            count(entry, -1);
            atomic_store(&entry->start, 0);
        }
    }
}

void closed_init(uint64_t max_map_count)
{
    entries_max = max_map_count / VMAS_SHARE;
}
