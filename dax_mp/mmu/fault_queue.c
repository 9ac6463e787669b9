/* The queue of faults: between the threads that fault and the pager's.
 *
 * A faulting thread pushes its `struct fault` on `posted`, sends its Fault itself, and sleeps. The pager takes the
 * whole list in one exchange before it looks for the fault that an answer is for: the push came before the send, and
 * that before the answer, so it is there. No limit, no allocation, and no entry that comes back while someone looks
 * (ABA). When the pager has stopped serving, `posted` is SEALED: nothing can be pushed any more, and whatever was
 * pushed before has been failed by the one who sealed it. `posting` counts the threads between their push and the end
 * of their send: the socket is closed when there are none.
 *
 * A thread may stop waiting: at the deadline, which a coordinator that lives but says nothing has too, or when a signal
 * handler has raised. It takes its fault off the list by itself. So `pending` has a lock, of which a holder does nothing
 * but look through the list, and blocks all signals if it is not the pager's thread, which always does: nobody who waits
 * for the lock waits for more than that. A fault that is not on the list is about to be answered.
 */

#include "pager.h"

#include "thread.h"
#include "userfaultfd.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>

static const int64_t A_WHILE_NS = 10000000;

#define SEALED (&sealed)
static struct fault sealed;

void pager_count(struct pager *pager, enum pager_counter counter, uint64_t by)
{
    atomic_fetch_add_explicit(&pager->counters[counter], by, memory_order_relaxed);
}

/* --- the list of what is pending ---------------------------------------------------------------------------------- */

static void lock_pending(struct pager *pager)
{
    static const struct timespec A_MOMENT = {.tv_nsec = 50000};

    while (atomic_exchange(&pager->pending_lock, 1))
        nanosleep(&A_MOMENT, NULL);
}

static void block_signals(sigset_t *mask)
{
    sigset_t all;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, mask);
}

static void unlock_pending(struct pager *pager)
{
    atomic_store(&pager->pending_lock, 0);
}

/* Moves what has been posted to what is pending. */
static void take_posted(struct pager *pager)
{
    struct fault *list = atomic_load(&pager->posted), *next;

    if (!list || list == SEALED)
        return;
    for (list = atomic_exchange(&pager->posted, NULL); list && list != SEALED; list = next) {
        next = list->next;
        list->next = pager->pending;
        pager->pending = list;
    }
}

struct fault *pager_take_fault(struct pager *pager, uint64_t id)
{
    struct fault **link = &pager->pending;
    struct fault *fault;

    lock_pending(pager);
    take_posted(pager);
    while (*link && (*link)->id != id)
        link = &(*link)->next;
    fault = *link;
    if (fault)
        *link = fault->next;
    unlock_pending(pager);
    return fault;
}

/* --- posting and waiting ------------------------------------------------------------------------------------------ */

/* What an access gets from a pager that does not serve: a broken session looks like a broken device. */
static int fault_error(struct pager *pager)
{
    int error = atomic_load(&pager->error);

    return error == EPROTO ? EIO : error;
}

static bool send_fault(struct pager *pager, const struct fault *fault)
{
    uint64_t fields[] = {fault->id, fault->vma_id, fault->pgoff, fault->as_write};

    return pager_try_to_send(pager, MESSAGE_FAULT, fields, 4);
}

/* False: the pager does not serve any more. */
static bool push(struct pager *pager, struct fault *fault)
{
    struct fault *head = atomic_load(&pager->posted);

    do
        fault->next = head;
    while (head != SEALED && !atomic_compare_exchange_weak(&pager->posted, &head, fault));
    return head != SEALED;
}

static bool post(struct pager *pager, struct fault *fault)
{
    bool serving;

    atomic_fetch_add(&pager->posting, 1);
    fault->sent = false;
    fault->id = atomic_fetch_add(&pager->last_fault_id, 1) + 1;
    serving = push(pager, fault);
    if (serving) {
        pager_count(pager, COUNT_FAULTS, 1);
        fault->sent = send_fault(pager, fault);
    }
    atomic_fetch_sub(&pager->posting, 1);
    return serving;
}

/* For a fault that could not be sent when it was posted. */
static void send_late(struct pager *pager, struct fault *fault)
{
    atomic_fetch_add(&pager->posting, 1);
    if (!atomic_load(&fault->done)) /* else the socket may be closed */
        fault->sent = send_fault(pager, fault);
    atomic_fetch_sub(&pager->posting, 1);
}

static uintptr_t page_of(const struct fault *fault)
{
    return fault->window->base + (fault->pgoff - fault->window->pgoff) * page_size_bytes();
}

/* Whether the page is a private copy that was inaccessible for a moment (private.c): there is nothing to fail. */
static bool is_copy(const struct fault *fault)
{
    return fault->window->is_private && private_is_copy(page_of(fault));
}

/* From the page of a fault on, when the pager serves no more. ESTALE: then the whole window is dropped. */
static uint64_t pages_with_nothing(int error)
{
    return error == ESTALE ? UINT32_MAX : 1;
}

/* Fails a fault that the pager has not got, or has no more. */
static void fail(struct pager *pager, struct fault *fault, int error)
{
    if (is_copy(fault))
        return;
    fault->error = error;
    if (fault->raw) {
        int no_scratch = window_map_scratch(fault->window, fault->serial, fault->pgoff, pages_with_nothing(error),
                                            fault->write);

        fault->has_scratch = !no_scratch;
        if (no_scratch == ESTALE) /* the window is closed since: that is what the access finds now */
            fault->error = 0;
    }
    pager_count(pager, COUNT_BUS_ERRORS, 1);
}

bool pager_ask(struct pager *pager, struct fault *fault)
{
    int64_t timeout_ms = pager->config.answer_timeout_ms;

    fault->error = 0;
    fault->end_pgoff = 0;
    fault->forks = atomic_load(&pager->forks);
    fault->deadline_ns = timeout_ms < 0 ? INT64_MAX : monotonic_ns() + timeout_ms * 1000000;
    atomic_store(&fault->done, 0);
    if (fault->kind != FAULT_FRAME_GONE && post(pager, fault))
        return true;
    fail(pager, fault, fault->kind == FAULT_FRAME_GONE ? EIO : fault_error(pager));
    return false;
}

/* Sleeps until it may be answered, a signal handler has run, or it is `until_ns`. False: it is. */
static bool sleep_until(_Atomic uint32_t *done, int64_t until_ns)
{
    int64_t left_ns = until_ns == INT64_MAX ? 0 : until_ns - monotonic_ns();
    struct timespec left = {.tv_sec = left_ns / 1000000000, .tv_nsec = left_ns % 1000000000};

    if (left_ns < 0)
        return false;
    futex_wait(done, 0, until_ns == INT64_MAX ? NULL : &left);
    return true;
}

/* After a fork by a handler that has interrupted the wait: this process has not asked. The access is made again. */
static bool is_of_the_parent(struct pager *pager, const struct fault *fault)
{
    return atomic_load(&pager->forks) != fault->forks;
}

/* Until when to sleep. */
static int64_t next_ns(struct pager *pager, struct fault *fault, int64_t until_ns)
{
    if (!fault->sent)
        send_late(pager, fault);
    if (!fault->sent && monotonic_ns() + A_WHILE_NS < until_ns)
        until_ns = monotonic_ns() + A_WHILE_NS;
    return until_ns < fault->deadline_ns ? until_ns : fault->deadline_ns;
}

bool pager_wait(struct pager *pager, struct fault *fault, int64_t until_ns)
{
    bool slept;

    if (atomic_load_explicit(&fault->done, memory_order_acquire))
        return true;
    slept = sleep_until(&fault->done, next_ns(pager, fault, until_ns));
    if (atomic_load_explicit(&fault->done, memory_order_acquire) || is_of_the_parent(pager, fault))
        return true;
    if (slept || monotonic_ns() < fault->deadline_ns)
        return false;
    pager_withdraw(pager, fault, ETIMEDOUT);
    return true;
}

void pager_withdraw(struct pager *pager, struct fault *fault, int error)
{
    struct fault **link = &pager->pending;
    sigset_t mask;
    bool found;

    if (is_of_the_parent(pager, fault))
        return;
    block_signals(&mask);
    lock_pending(pager);
    take_posted(pager);
    while (*link && *link != fault)
        link = &(*link)->next;
    found = *link != NULL;
    if (found)
        *link = fault->next;
    unlock_pending(pager);
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    if (found)
        fail(pager, fault, error);
    else
        while (!atomic_load_explicit(&fault->done, memory_order_acquire))
            sleep_until(&fault->done, INT64_MAX);
}

void pager_serve(struct pager *pager, struct fault *fault)
{
    if (pager_ask(pager, fault))
        while (!pager_wait(pager, fault, INT64_MAX))
            continue;
}

void pager_post(struct pager *pager, struct fault *fault)
{
    struct pollfd writable = {.fd = pager->zmtp.fd, .events = POLLOUT};
    struct fault copy = *fault; /* once it is posted it may be answered, and gone, at any moment */

    atomic_fetch_add(&pager->posting, 1); /* the socket stays open */
    fault->id = copy.id = atomic_fetch_add(&pager->last_fault_id, 1) + 1;
    if (push(pager, fault)) {
        pager_count(pager, COUNT_FAULTS, 1);
        while (!send_fault(pager, &copy) && !atomic_load(&pager->error) && !atomic_load(&pager->stopping))
            poll(&writable, 1, A_WHILE_NS / 1000000);
    } else {
        fault_fail(pager, fault, fault_error(pager), fault->pgoff, pages_with_nothing(fault_error(pager)));
    }
    atomic_fetch_sub(&pager->posting, 1);
}

int window_request_pages(struct window *window, uint64_t pgoff, bool write, uint64_t *end_pgoff)
{
    struct fault fault = {
        .window = window,
        .serial = window->serial,
        .vma_id = window->vma_id,
        .pgoff = pgoff,
        .kind = write ? FAULT_WRITE : FAULT_READ,
        .write = write,
        .as_write = write && !window->is_private,
    };

    if ((write && !window->writable) || !window_allows(window, pgoff - window->pgoff, write))
        return EFAULT;
    pager_serve(window->pager, &fault);
    *end_pgoff = fault.end_pgoff > pgoff ? fault.end_pgoff : pgoff + 1;
    return fault.error;
}

/* --- answering ---------------------------------------------------------------------------------------------------- */

void fault_answer(struct fault *fault, int error)
{
    if (fault->tid && error) {
        userfaultfd_fail(fault, error);
    } else if (fault->tid) {
        userfaultfd_answer(fault);
    } else {
        fault->error = error;
        atomic_store_explicit(&fault->done, 1, memory_order_release);
        futex_wake(&fault->done);
    }
}

static int protection_of(const struct fault *fault)
{
    uint64_t page = fault->pgoff - fault->window->pgoff;
    bool load = window_allows(fault->window, page, false), store = window_allows(fault->window, page, true);

    return (load ? PROT_READ : 0) | (store ? PROT_WRITE : 0);
}

/* A copy that cannot be made accessible has no scratch page put in its place: what was stored there would be lost. */
static void answer_copy(struct pager *pager, struct fault *fault)
{
    int error;

    windows_lock();
    do
        error = private_open(page_of(fault), protection_of(fault));
    while (error == ENOMEM && (windows_give_up_mappings(true) || windows_use_spare()));
    windows_unlock();
    if (error)
        pager_count(pager, COUNT_BUS_ERRORS, 1);
    fault_answer(fault, error);
}

void fault_fail(struct pager *pager, struct fault *fault, int error, uint64_t pgoff, uint64_t length_pages)
{
    uint64_t scratch_pages = 1;

    if (fault->window->serial != fault->serial) { /* it is closed since: that is what the access finds now */
        fault_answer(fault, 0);
        return;
    }
    if (is_copy(fault)) {
        answer_copy(pager, fault);
        return;
    }
    if (fault->pgoff >= pgoff && fault->pgoff - pgoff < length_pages)
        scratch_pages = length_pages - (fault->pgoff - pgoff);
    fault->end_pgoff = fault->pgoff + scratch_pages;
    if (fault->raw) {
        int failure;

        windows_lock();
        do
            failure = window_map_scratch(fault->window, fault->serial, fault->pgoff, scratch_pages, fault->write);
        while (failure && failure != ESTALE && (windows_give_up_mappings(true) || windows_use_spare()));
        windows_unlock();
        fault->has_scratch = !failure;
        error = failure == ESTALE ? 0 : error;
    }
    pager_count(pager, COUNT_BUS_ERRORS, 1);
    fault_answer(fault, error);
}

static void fail_all(struct pager *pager, struct fault *fault)
{
    struct fault *next;

    for (; fault; fault = next) {
        next = fault->next;
        fault_fail(pager, fault, fault_error(pager), fault->pgoff, 1);
    }
}

void pager_seal(struct pager *pager, int error)
{
    int serving = 0;
    struct fault *pending, *posted;
    sigset_t mask;

    atomic_compare_exchange_strong(&pager->error, &serving, error);
    block_signals(&mask);
    lock_pending(pager);
    posted = atomic_exchange(&pager->posted, SEALED);
    pending = pager->pending;
    pager->pending = NULL;
    unlock_pending(pager);
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    fail_all(pager, pending);
    if (posted != SEALED)
        fail_all(pager, posted);
}

void pager_seal_after_fork(struct pager *pager)
{
    int serving = 0;

    atomic_compare_exchange_strong(&pager->error, &serving, ESTALE);
    atomic_store(&pager->posted, SEALED);
    atomic_store(&pager->posting, 0);
    atomic_store(&pager->pending_lock, 0);
    atomic_fetch_add(&pager->forks, 1);
    pager->pending = NULL;
}
