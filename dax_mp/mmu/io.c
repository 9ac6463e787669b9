/* Direct I/O: copies between a buffer of this process and frames that the coordinator has lent it.
 *
 * The copy is a system call on the region's descriptor, so a page of the buffer that is not mapped ends it early, and
 * raises no signal. Where system calls wait for a page (userfaultfd.c), it is looked first whether they would have to, and
 * only a page that goes in that moment is waited for with the frames lent.
 *
 * `copying` counts the threads in it. An evicted process says Dropped, after which the coordinator gives the frames to
 * others, only when there are none: a thread counts itself first and looks at `error` then, the pager thread sets `error`
 * first and looks at the count then, so that one of the two sees the other.
 */

#include "mmu.h"

#include "userfaultfd.h"

#include <errno.h>
#include <time.h>
#include <unistd.h>

static const struct timespec A_MOMENT = {.tv_nsec = 50000};

void pager_await_copies(struct pager *pager)
{
    while (atomic_load(&pager->copying))
        nanosleep(&A_MOMENT, NULL);
}

/* 0, or why nothing may be copied; end_copying() in any case. */
static int begin_copying(struct pager *pager)
{
    int error;

    atomic_fetch_add(&pager->copying, 1);
    error = atomic_load(&pager->error);
    return error == EPROTO ? EIO : error;
}

static void end_copying(struct pager *pager)
{
    atomic_fetch_sub(&pager->copying, 1);
}

/* Goes on after a system call that copied `result` bytes? */
static bool goes_on(ssize_t result, int *error)
{
    if (result < 0 && errno != EINTR)
        *error = errno;
    return result > 0 || (result < 0 && errno == EINTR);
}

static ssize_t result_of(size_t done, size_t count, int error)
{
    return done || !count || error == EFAULT ? (ssize_t)done : -1;
}

ssize_t pager_store(struct pager *pager, const char *from, size_t count, uint64_t offset_bytes, int *error)
{
    size_t done = 0;
    bool more = !(*error = begin_copying(pager));

    count = userfaultfd_present_bytes(from, count, false);
    while (more && done < count) {
        ssize_t result = pwrite(pager->config.pmem_fd, from + done, count - done, (off_t)(offset_bytes + done));

        done += result > 0 ? (size_t)result : 0;
        more = goes_on(result, error);
    }
    end_copying(pager);
    return result_of(done, count, *error);
}

ssize_t pager_load(struct pager *pager, char *to, size_t count, uint64_t offset_bytes, int *error)
{
    size_t done = 0;
    bool more = !(*error = begin_copying(pager));

    count = userfaultfd_present_bytes(to, count, true);
    while (more && done < count) {
        ssize_t result = pread(pager->config.pmem_fd, to + done, count - done, (off_t)(offset_bytes + done));

        done += result > 0 ? (size_t)result : 0;
        more = goes_on(result, error);
    }
    end_copying(pager);
    return result_of(done, count, *error);
}
