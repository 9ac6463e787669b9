/* The queue of faults: between the threads that fault and the pager's.
 *
 * A faulting thread pushes its `struct fault` on `posted`, sends its Fault itself, and sleeps. The pager takes the
 * whole list in one exchange before it looks for the fault that an answer is for: the push came before the send, and
 * that before the answer, so it is there. No limit, no allocation, and no entry that comes back while someone looks
 * (ABA). When the pager has stopped serving, `posted` is SEALED: nothing can be pushed any more, and whatever was
 * pushed before has been failed by the one who sealed it. So no thread waits for ever. `posting` counts the threads
 * between their push and the end of their send: the socket is closed when there are none.
 */

#include "pager.h"

#include "thread.h"

#include <errno.h>

#define SEALED (&sealed)
static struct fault sealed;

void pager_count(struct pager *pager, enum pager_counter counter, uint64_t by)
{
    atomic_fetch_add_explicit(&pager->counters[counter], by, memory_order_relaxed);
}

/* --- posting, in the signal handler ------------------------------------------------------------------------------ */

/* What an access gets from a pager that does not serve: a broken session looks like a broken device. */
static int fault_error(struct pager *pager)
{
    int error = atomic_load(&pager->error);

    return error == EPROTO ? EIO : error;
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
        pager_send(pager, MESSAGE_FAULT, fields, 4);
    }
    atomic_fetch_sub(&pager->posting, 1);
    return serving;
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
    if (fault->raw) {
        int error = window_map_scratch(fault->window, fault->serial, fault->pgoff, 1, fault->write);

        fault->has_scratch = !error;
        if (error == ESTALE) /* the window is closed since: that is what the access finds now */
            fault->error = 0;
    }
    pager_count(pager, COUNT_BUS_ERRORS, 1);
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

    if (write && !window->writable)
        return EFAULT;
    pager_serve(window->pager, &fault);
    *end_pgoff = fault.end_pgoff > pgoff ? fault.end_pgoff : pgoff + 1;
    return fault.error;
}

/* --- the thread's lists of faults -------------------------------------------------------------------------------- */

void fault_answer(struct fault *fault, int error)
{
    fault->error = error;
    atomic_store_explicit(&fault->done, 1, memory_order_release);
    futex_wake(&fault->done);
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

struct fault *pager_take_fault(struct pager *pager, uint64_t id)
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

void pager_seal_after_fork(struct pager *pager)
{
    int serving = 0;

    atomic_compare_exchange_strong(&pager->error, &serving, ESTALE);
    atomic_store(&pager->posted, SEALED);
    atomic_store(&pager->posting, 0);
    pager->pending = NULL;
}
