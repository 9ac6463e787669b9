/* The pager thread: one per session, between the threads that fault and the coordinator.
 *
 * Everything about the session's translations goes down one ZeroMQ connection (zmtp.c) in order, and this thread alone
 * acts on what comes: a Map is in place before the next message is read, and an Unmap is acknowledged after the last
 * page is gone. It never takes the GIL, so an unmap is answered whatever Python does.
 *
 * Posting. A faulting thread pushes its `struct fault` on `posted`, sends its Fault itself, and sleeps. The pager takes
 * the whole list in one exchange before it looks for the fault that an answer is for: the push came before the send,
 * and that before the answer, so it is there. No limit, no allocation, and no entry that comes back while someone looks
 * (ABA). When the pager has stopped serving, `posted` is SEALED: nothing can be pushed any more, and whatever was
 * pushed before has been failed by the one who sealed it. So no thread waits for ever. `posting` counts the threads
 * between their push and the end of their send: the socket is closed when there are none.
 *
 * Why it stops serving (`error`):
 * - ESTALE, or the reason given, after Evict or pager_stop(): nothing is mapped any more. After Evict the thread goes
 *   on to acknowledge unmaps.
 * - EIO, the coordinator has closed the connection: it is gone, however it ended. What is mapped stays, because the
 *   region is still there.
 * - EPROTO, the coordinator sent what it may not: nothing is mapped any more, because what it meant is not known.
 */

#include "mmu.h"
#include "thread.h"
#include "wire.h"
#include "zmtp.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

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

enum { A_WHILE_MS = 100 };

#define SEALED (&sealed)
static struct fault sealed;

static struct pager *pagers; /* windows_lock() */

void pager_count(struct pager *pager, enum pager_counter counter, uint64_t by)
{
    atomic_fetch_add_explicit(&pager->counters[counter], by, memory_order_relaxed);
}

/* --- posting: in the signal handler ------------------------------------------------------------------------------ */

/* What an access gets from a pager that does not serve: a broken session looks like a broken device. */
static int fault_error(struct pager *pager)
{
    int error = atomic_load(&pager->error);

    return error == EPROTO ? EIO : error;
}

/* Sends a message: from a faulting thread or the pager's. What it answers, if it must be answered, comes never when
 * the connection is gone; the pager thread sees that too, and seals. */
static void send_message(struct pager *pager, enum message_type type, const uint64_t *fields, size_t count)
{
    uint8_t bytes[WIRE_SENT_BYTES_MAX];
    struct pollfd writable = {.fd = pager->zmtp.fd, .events = POLLOUT};
    size_t size = wire_encode(bytes, type, fields, count);

    while (zmtp_send(pager->zmtp.fd, bytes, (uint8_t)size) == EAGAIN && !atomic_load(&pager->stopping))
        poll(&writable, 1, A_WHILE_MS);
}

/* False: the pager does not serve any more. */
static bool post(struct pager *pager, struct fault *fault)
{
    struct fault *head;
    bool serving;

    atomic_fetch_add(&pager->posting, 1);
    fault->id = atomic_fetch_add(&pager->last_fault_id, 1) + 1;
    head = atomic_load(&pager->posted);
    do
        fault->next = head;
    while (head != SEALED && !atomic_compare_exchange_weak(&pager->posted, &head, fault));
    serving = head != SEALED;
    if (serving) {
        uint64_t fields[] = {fault->id, fault->vma_id, fault->pgoff, fault->as_write};

        pager_count(pager, COUNT_FAULTS, 1);
        send_message(pager, MESSAGE_FAULT, fields, 4);
    }
    atomic_fetch_sub(&pager->posting, 1);
    return serving;
}

/* Whether the page is a private copy that was inaccessible for a moment (private.c): there is nothing to fail. */
static bool is_copy(const struct fault *fault)
{
    const struct window *window = fault->window;

    return window->is_private && private_is_copy(window->base + (fault->pgoff - window->pgoff) * page_size_bytes());
}

void pager_serve(struct pager *pager, struct fault *fault)
{
    if (fault->kind != FAULT_FRAME_GONE && post(pager, fault)) {
        while (!atomic_load_explicit(&fault->done, memory_order_acquire))
            futex_wait(&fault->done, 0, NULL);
        return;
    }
    if (is_copy(fault))
        return;
    fault->error = fault->kind == FAULT_FRAME_GONE ? EIO : fault_error(pager);
    if (fault->raw)
        fault->has_scratch = !window_map_scratch(fault->window, fault->pgoff, 1, fault->write);
    pager_count(pager, COUNT_BUS_ERRORS, 1);
}

/* --- the thread's lists of faults -------------------------------------------------------------------------------- */

static void answer(struct fault *fault, int error)
{
    fault->error = error;
    atomic_store_explicit(&fault->done, 1, memory_order_release);
    futex_wake(&fault->done);
}

/* Fails a fault; there is nothing to map at [pgoff, pgoff + length_pages). */
static void fail(struct pager *pager, struct fault *fault, int error, uint64_t pgoff, uint64_t length_pages)
{
    uint64_t scratch_pages = 1;

    if (fault->window->serial == fault->serial && is_copy(fault)) {
        answer(fault, 0);
        return;
    }
    if (fault->pgoff >= pgoff && fault->pgoff - pgoff < length_pages)
        scratch_pages = length_pages - (fault->pgoff - pgoff);
    if (fault->raw) {
        windows_lock();
        if (fault->window->serial == fault->serial)
            do
                fault->has_scratch = !window_map_scratch(fault->window, fault->pgoff, scratch_pages, fault->write);
            while (!fault->has_scratch && windows_give_up_mappings());
        windows_unlock();
    }
    pager_count(pager, COUNT_BUS_ERRORS, 1);
    answer(fault, error);
}

static void fail_all(struct pager *pager, struct fault *fault)
{
    struct fault *next;

    for (; fault; fault = next) {
        next = fault->next;
        fail(pager, fault, fault_error(pager), fault->pgoff, 1);
    }
}

/* Stops serving. What waits and what comes fails with `error`, or with what was there before. */
static void seal(struct pager *pager, int error)
{
    int serving = 0;
    struct fault *pending = pager->pending, *posted;

    atomic_compare_exchange_strong(&pager->error, &serving, error);
    posted = atomic_exchange(&pager->posted, SEALED);
    pager->pending = NULL;
    fail_all(pager, pending);
    if (posted != SEALED)
        fail_all(pager, posted);
}

/* Moves what has been posted to what is pending. */
static void take_posted(struct pager *pager)
{
    struct fault *list = atomic_load(&pager->posted), *next;

    if (!list || list == SEALED)
        return;
    for (list = atomic_exchange(&pager->posted, NULL); list; list = next) {
        next = list->next;
        list->next = pager->pending;
        pager->pending = list;
    }
}

/* The fault that an answer is for; NULL when it has been answered. */
static struct fault *take_pending(struct pager *pager, uint64_t id)
{
    struct fault **link = &pager->pending;
    struct fault *fault;

    take_posted(pager);
    while (*link && (*link)->id != id)
        link = &(*link)->next;
    fault = *link;
    if (fault)
        *link = fault->next;
    return fault;
}

/* --- messages from the coordinator ------------------------------------------------------------------------------- */

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
    return has_offset(segment->pfn, segment->length_pages);
}

static int map_segment(struct pager *pager, struct window *window, const struct segment *segment)
{
    bool writable = segment->access & ACCESS_WRITE && segment->target != TARGET_ZERO && window->writable;

    return window_map(window, segment->pgoff, segment->length_pages, PROT_READ | (writable ? PROT_WRITE : 0),
                      region_fd(pager, segment->target), segment->pfn);
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
    windows_lock();
    window = window_of(pager, message->fields[1]); /* NULL: it was closed meanwhile */
    for (size_t i = 0; window && i < count && !error; i++)
        error = map_segment(pager, window, &segments[i]);
    windows_unlock();
    pager_count(pager, COUNT_MAPS, 1);
    fault = take_pending(pager, message->fields[0]);
    if (fault && error)
        fail(pager, fault, error, fault->pgoff, 1);
    else if (fault)
        answer(fault, 0);
    return 0;
}

static int on_fault_error(struct pager *pager, const struct message *message)
{
    uint64_t pgoff = message->fields[2], length_pages = message->fields[3], error = message->fields[4];
    struct fault *fault;

    if (!error || error > INT16_MAX)
        return EPROTO;
    fault = take_pending(pager, message->fields[0]);
    if (fault)
        fail(pager, fault, (int)error, pgoff, length_pages);
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
    windows_unlock();
    pager_count(pager, COUNT_UNMAPS, 1);
    send_message(pager, MESSAGE_UNMAP_ACK, &message->fields[0], 1);
    return 0;
}

static void unmap_all(struct pager *pager)
{
    windows_lock();
    pager_windows_unmap(pager);
    windows_unlock();
}

static int on_evict(struct pager *pager, const struct message *message)
{
    if (!message->fields[0] || message->fields[0] > INT16_MAX)
        return EPROTO;
    seal(pager, (int)message->fields[0]);
    unmap_all(pager);
    pager_await_copies(pager);
    send_message(pager, MESSAGE_DROPPED, NULL, 0);
    return 0;
}

static int on_message(struct pager *pager, const struct message *message)
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

/* --- the thread -------------------------------------------------------------------------------------------------- */

/* Acts on all that has been received. */
static int on_received(struct pager *pager)
{
    struct message message;
    const uint8_t *bytes;
    size_t size;
    int error;

    while (!(error = zmtp_take(&pager->zmtp, &bytes, &size))) {
        error = wire_decode(bytes, size, &message);
        if (!error)
            error = on_message(pager, &message);
        if (error)
            return error;
    }
    return error == EAGAIN ? 0 : error;
}

/* Until the connection ends, which pager_stop() brings about too. Returns why. */
static int serve(struct pager *pager)
{
    int error = 0;

    while (!error) {
        error = on_received(pager);
        if (!error && zmtp_fill(&pager->zmtp, true))
            error = EIO;
    }
    return error;
}

/* Connects, sends PagerHello and waits for PagerReady. */
static int shake_hands(struct pager *pager)
{
    int64_t deadline_ns = monotonic_ns() + pager->config.timeout_ms * 1000000;
    struct message message;
    const uint8_t *bytes;
    size_t size;
    int error = zmtp_connect(&pager->zmtp, pager->config.path, pager->config.token, TOKEN_BYTES, deadline_ns);

    if (error)
        return error;
    send_message(pager, MESSAGE_PAGER_HELLO, (uint64_t[]){pager->config.version}, 1);
    error = zmtp_take_until(&pager->zmtp, deadline_ns, &bytes, &size);
    if (!error)
        error = wire_decode(bytes, size, &message);
    if (error)
        return error;
    if (message.type == MESSAGE_EVICT && message.fields[0] && message.fields[0] <= INT16_MAX)
        return (int)message.fields[0];
    return message.type == MESSAGE_PAGER_READY && message.fields[0] == pager->config.version ? 0 : EPROTO;
}

static void *run(void *argument)
{
    struct pager *pager = argument;
    int error = serve(pager);

    seal(pager, error); /* where pager_stop() ended it, that has said why */
    if (error == EPROTO)
        unmap_all(pager);
    shutdown(pager->zmtp.fd, SHUT_RDWR); /* the coordinator sees that nobody reads, and who waits to send goes on */
    return NULL;
}

/* --- life -------------------------------------------------------------------------------------------------------- */

static int duplicate(int *fd)
{
    if (*fd < 0)
        return 0;
    *fd = fcntl(*fd, F_DUPFD_CLOEXEC, 0);
    return *fd < 0 ? errno : 0;
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* Gives the pager file descriptors and a path of its own. On failure pager_free() undoes what was done. */
static int acquire(struct pager *pager, const struct pager_config *config)
{
    int pmem_fd = config->pmem_fd, dram_fd = config->dram_fd;
    int error;

    pager->config = *config;
    pager->config.path = strdup(config->path);
    pager->zmtp.fd = -1;
    error = pager->config.path ? duplicate(&pmem_fd) : ENOMEM;
    pager->config.pmem_fd = error ? -1 : pmem_fd;
    if (!error)
        error = duplicate(&dram_fd);
    pager->config.dram_fd = error ? -1 : dram_fd;
    return error;
}

static void enlist(struct pager *pager)
{
    windows_lock();
    pager->next = pagers;
    pagers = pager;
    windows_unlock();
}

static void delist(struct pager *pager)
{
    struct pager **link = &pagers;

    windows_lock();
    while (*link && *link != pager)
        link = &(*link)->next;
    if (*link)
        *link = pager->next;
    windows_unlock();
}

int pager_start(const struct pager_config *config, struct pager **started)
{
    struct pager *pager = calloc(1, sizeof *pager);
    int error = pager ? acquire(pager, config) : ENOMEM;

    if (!pager)
        return error;
    pthread_mutex_init(&pager->join_lock, NULL);
    pager->joined = true;
    enlist(pager);
    if (!error)
        error = shake_hands(pager);
    if (!error)
        error = thread_start(&pager->thread, "dax-pager", run, pager);
    if (!error)
        pager->joined = false;
    if (error) {
        pager_stop(pager, error);
        pager_free(pager);
    } else {
        *started = pager;
    }
    return error;
}

static void close_fds(struct pager *pager)
{
    close_fd(&pager->zmtp.fd);
    close_fd(&pager->config.pmem_fd);
    close_fd(&pager->config.dram_fd);
}

void pager_stop(struct pager *pager, int error)
{
    static const struct timespec A_MOMENT = {.tv_nsec = 50000};
    int serving = 0;

    atomic_compare_exchange_strong(&pager->error, &serving, error);
    pthread_mutex_lock(&pager->join_lock);
    if (!pager->joined) {
        atomic_store(&pager->stopping, true);
        shutdown(pager->zmtp.fd, SHUT_RDWR);
        pthread_join(pager->thread, NULL);
        pager->joined = true;
    }
    seal(pager, error);
    while (atomic_load(&pager->posting))
        nanosleep(&A_MOMENT, NULL);
    pager_await_copies(pager);
    close_fds(pager);
    unmap_all(pager);
    pthread_mutex_unlock(&pager->join_lock);
}

void pager_free(struct pager *pager)
{
    delist(pager);
    pthread_mutex_destroy(&pager->join_lock);
    free((char *)pager->config.path);
    free(pager);
}

void pagers_after_fork_in_child(void)
{
    for (struct pager *pager = pagers; pager; pager = pager->next) {
        int serving = 0;

        atomic_compare_exchange_strong(&pager->error, &serving, ESTALE);
        atomic_store(&pager->posted, SEALED);
        atomic_store(&pager->posting, 0);
        atomic_store(&pager->copying, 0);
        pthread_mutex_init(&pager->join_lock, NULL);
        pager->joined = true;
        close_fd(&pager->zmtp.fd); /* the parent's connection stays open */
        pager->pending = NULL;
    }
}
