/* What the coordinator orders on the pager channel, carried out one after the other on the pager's thread. */

#include "pager.h"

#include <errno.h>

/* messages.py: Target and Access */
enum target { TARGET_PMEM, TARGET_DRAM, TARGET_ZERO };
enum { ACCESS_READ = 1, ACCESS_WRITE = 2 };

struct segment {
    uint64_t pgoff;
    uint64_t length_pages;
    uint64_t target;
    uint64_t pfn;
    uint64_t access;
};
_Static_assert(sizeof(struct segment) == 5 * sizeof(uint64_t), "a segment is five items of a Map");

struct range {
    uint64_t vma_id;
    uint64_t pgoff;
    uint64_t length_pages;
};
_Static_assert(sizeof(struct range) == 3 * sizeof(uint64_t), "a range is three items of an Unmap");

/* Whether frames have an offset in their region. Pages need no such check: they are clipped to the window. */
static bool has_offset(uint64_t pfn, uint64_t length_pages)
{
    uint64_t frames_max = INT64_MAX / page_size_bytes();

    return length_pages <= frames_max && pfn <= frames_max - length_pages;
}

static int region_fd(const struct pager *pager, uint64_t target)
{
    return target == TARGET_PMEM ? pager->config.pmem_fd : target == TARGET_DRAM ? pager->config.dram_fd : -1;
}

static bool is_valid_segment(const struct pager *pager, const struct segment *segment)
{
    if (segment->target > TARGET_ZERO || (segment->target != TARGET_ZERO && region_fd(pager, segment->target) < 0))
        return false;
    if (!segment->access || segment->access > (ACCESS_READ | ACCESS_WRITE))
        return false;
    /* Frame 0 of either region is its superblock. */
    return (segment->target == TARGET_ZERO || segment->pfn) && has_offset(segment->pfn, segment->length_pages);
}

static int prot_of(const struct window *window, const struct segment *segment)
{
    bool writable = segment->access & ACCESS_WRITE && segment->target != TARGET_ZERO && window->writable;

    return PROT_READ | (writable ? PROT_WRITE : 0);
}

/* wanted_pgoff: the page that is waited for, for which room is made; UINT64_MAX: none of these. */
static int map_segment(struct pager *pager, struct window *window, const struct segment *segment, bool populate,
                       uint64_t wanted_pgoff, uint64_t *end_pgoff)
{
    struct frames frames = {
        .pgoff = segment->pgoff,
        .length_pages = segment->length_pages,
        .prot = prot_of(window, segment),
        .fd = region_fd(pager, segment->target),
        .pfn = segment->pfn,
        .is_hole = segment->target != TARGET_PMEM,
        .wanted_pgoff = wanted_pgoff,
        .populate = populate,
    };

    return window_map(window, &frames, wanted_pgoff != UINT64_MAX, end_pgoff);
}

/* What nobody waits for takes the place of a pinned hole page. Where it cannot, that may not stay either. */
static void replace_segment(struct pager *pager, struct window *window, const struct segment *segment)
{
    if (map_segment(pager, window, segment, false, segment->pgoff, NULL))
        window_unmap(window, segment->pgoff, segment->length_pages, false);
}

static bool has_page(const struct segment *segment, uint64_t pgoff)
{
    return pgoff >= segment->pgoff && pgoff - segment->pgoff < segment->length_pages;
}

/* The end of what is mapped without a gap from the fault's page on. Segments come by page; those from `rest` on were left
 * out, but for the wanted one. */
static uint64_t mapped_end(const struct window *window, const struct fault *fault, const struct segment *wanted,
                           const struct segment *rest)
{
    uint64_t end = wanted->pgoff + wanted->length_pages;

    for (const struct segment *next = wanted + 1; next < rest && next->pgoff == end; next++) {
        if ((fault->as_write && !(next->access & ACCESS_WRITE)) || maps_only_wanted(window, prot_of(window, next)))
            break;
        end += next->length_pages;
    }
    return end;
}

/* Maps them, the one that the fault waits for last: what makes room for one may not take that away again, and no room
 * is made for the others, which nobody has asked for. 0, or why the fault has no page. */
static int map_segments(struct pager *pager, struct window *window, struct fault *fault,
                        const struct segment *segments, size_t count)
{
    /* Then all of it will be stored to, most likely. Loads find 16 pages by each of the kernel's faults anyway. */
    bool populate = fault && fault->write && fault->pgoff == window->sequence_pgoff;
    const struct segment *wanted = NULL, *rest = segments + count;
    uint64_t wanted_end;
    int error;

    for (size_t i = 0; i < count; i++)
        if (!fault)
            replace_segment(pager, window, &segments[i]);
        else if (!wanted && has_page(&segments[i], fault->pgoff))
            wanted = &segments[i];
        else if (&segments[i] < rest && map_segment(pager, window, &segments[i], populate, UINT64_MAX, NULL))
            rest = &segments[i];
    if (fault && fault->pgoff >= window->pgoff + window->length_pages)
        return EFAULT; /* it has shrunk meanwhile */
    if (!wanted)
        return 0;
    wanted_end = wanted->pgoff + wanted->length_pages;
    fault->end_pgoff = mapped_end(window, fault, wanted, rest);
    error = map_segment(pager, window, wanted, populate, fault->pgoff, &fault->end_pgoff);
    window->sequence_pgoff = fault->end_pgoff < wanted_end ? fault->end_pgoff : wanted_end;
    return error;
}

static int on_map(struct pager *pager, const struct message *message)
{
    const struct segment *segments = (const struct segment *)message->items;
    size_t count = message->items_count / 5;
    struct window *window;
    struct fault *fault;
    int error = 0;

    for (size_t i = 0; i < count; i++)
        if (!is_valid_segment(pager, &segments[i]))
            return EPROTO;
    if (atomic_load(&pager->error)) /* nothing is mapped any more, and that stays so */
        return 0;
    fault = pager_take_fault(pager, message->fields[0]);
    windows_lock();
    window = window_of(pager, message->fields[1]); /* NULL: it was closed meanwhile */
    if (window)
        error = map_segments(pager, window, fault, segments, count);
    windows_unlock();
    pager_count(pager, COUNT_MAPS, 1);
    if (fault && error)
        fault_fail(pager, fault, error, fault->pgoff, 1);
    else if (fault)
        fault_answer(fault, 0);
    return 0;
}

static int on_fault_error(struct pager *pager, const struct message *message)
{
    uint64_t pgoff = message->fields[2], length_pages = message->fields[3], error = message->fields[4];
    struct fault *fault;

    if (!error || error > INT16_MAX)
        return EPROTO;
    fault = pager_take_fault(pager, message->fields[0]);
    if (fault)
        fault_fail(pager, fault, (int)error, pgoff, length_pages);
    return 0;
}

static int on_unmap(struct pager *pager, const struct message *message)
{
    const struct range *ranges = (const struct range *)message->items;
    size_t count = message->items_count / 3;

    windows_lock();
    for (size_t i = 0; i < count; i++) {
        struct window *window = window_of(pager, ranges[i].vma_id);

        if (window)
            window_unmap(window, ranges[i].pgoff, ranges[i].length_pages, message->fields[1] != 0);
    }
    pager->last_unmap = message->fields[0];
    windows_unlock();
    pager_count(pager, COUNT_UNMAPS, 1);
    pager_send(pager, MESSAGE_UNMAP_ACK, &message->fields[0], 1);
    return 0;
}

static int on_evict(struct pager *pager, const struct message *message)
{
    if (!message->fields[0] || message->fields[0] > INT16_MAX)
        return EPROTO;
    pager_seal(pager, (int)message->fields[0]);
    pager_drop_all(pager);
    pager_await_copies(pager);
    pager_send(pager, MESSAGE_DROPPED, NULL, 0);
    return 0;
}

int pager_obey(struct pager *pager, const struct message *message)
{
    switch (message->type) {
    case MESSAGE_MAP:
        return on_map(pager, message);
    case MESSAGE_FAULT_ERROR:
        return on_fault_error(pager, message);
    case MESSAGE_UNMAP:
        return on_unmap(pager, message);
    case MESSAGE_EVICT:
        return on_evict(pager, message);
    default:
        return EPROTO; /* a second PagerReady */
    }
}
