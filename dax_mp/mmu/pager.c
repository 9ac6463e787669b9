/* The pager thread: one per session, between the threads that fault and the coordinator.
 *
 * Everything about the session's translations goes down one ZeroMQ connection (zmtp.c) in order, and this thread alone
 * acts on what comes (orders.c): a Map is in place before the next message is read, and an Unmap is acknowledged after
 * the last page is gone. It never takes the GIL, so an unmap is answered whatever Python does. How faults get here, and
 * their answers back, is in fault_queue.c.
 *
 * Why it stops serving (`error`):
 * - ESTALE, or the reason given, after Evict or pager_stop(): nothing is mapped any more. After Evict the thread goes
 *   on to acknowledge unmaps.
 * - EIO, the coordinator has closed the connection: it is gone, however it ended. What is mapped stays, because the
 *   region is still there.
 * - EPROTO, the coordinator sent what it may not: nothing is mapped any more, because what it meant is not known.
 */

#include "pager.h"

#include "thread.h"
#include "userfaultfd.h"
#include "zmtp.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { A_WHILE_MS = 100 };

static struct pager *pagers; /* windows_lock() */

bool pager_try_to_send(struct pager *pager, enum message_type type, const uint64_t *fields, size_t count)
{
    uint8_t bytes[WIRE_SENT_BYTES_MAX];
    size_t size = wire_encode(bytes, type, fields, count);

    return zmtp_send(pager->zmtp.fd, bytes, (uint8_t)size) != EAGAIN;
}

void pager_send(struct pager *pager, enum message_type type, const uint64_t *fields, size_t count)
{
    struct pollfd writable = {.fd = pager->zmtp.fd, .events = POLLOUT};

    while (!pager_try_to_send(pager, type, fields, count) && !atomic_load(&pager->stopping))
        poll(&writable, 1, A_WHILE_MS);
}

void pager_drop_all(struct pager *pager)
{
    windows_lock();
    pager_windows_unmap(pager);
    windows_unlock();
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
            error = pager_obey(pager, &message);
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
    pager_send(pager, MESSAGE_PAGER_HELLO, (uint64_t[]){pager->config.version}, 1);
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

    pager_seal(pager, error); /* where pager_stop() ended it, that has said why */
    if (error == EPROTO)
        pager_drop_all(pager);
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
    pager_seal(pager, error);
    while (atomic_load(&pager->posting))
        nanosleep(&A_MOMENT, NULL);
    pager_await_copies(pager);
    close_fds(pager);
    pager_drop_all(pager);
    pthread_mutex_unlock(&pager->join_lock);
}

void pager_free(struct pager *pager)
{
    delist(pager);
    userfaultfd_await_reader(); /* it may have found a window of this pager */
    pthread_mutex_destroy(&pager->join_lock);
    free((char *)pager->config.path);
    free(pager);
}

void pagers_after_fork_in_child(void)
{
    for (struct pager *pager = pagers; pager; pager = pager->next) {
        pager_seal_after_fork(pager);
        atomic_store(&pager->copying, 0);
        pthread_mutex_init(&pager->join_lock, NULL);
        pager->joined = true;
        close_fd(&pager->zmtp.fd); /* the parent's connection stays open */
    }
}
