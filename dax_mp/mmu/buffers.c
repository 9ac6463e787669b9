/* Buffers of system calls, in windows: which pages the kernel could not reach, and having them mapped.
 *
 * Whether the kernel can reach a page is asked of the kernel, by calls that do nothing else, need no descriptor, and
 * which no sandbox forbids. To load: rt_sigprocmask() with no valid `how` copies the new mask in, and then says EINVAL;
 * or it says EFAULT. To store: FUTEX_WAKE_OP or-s zero into a word, as an atomic store would, and wakes who waits for a
 * word of ours, where nobody does. Neither raises a signal. Of many pages that the kernel is to load from it is asked at
 * once, by MADV_POPULATE_READ, whether it can reach all; mostly it can.
 *
 * A page that is missing is asked for (window_request_pages()), and never touched: the thread may block signals.
 * Nothing here allocates, takes a lock or needs the GIL; it may run in a signal handler.
 */

#include "system_calls.h"

#include "thread.h"

#include <signal.h>
#include <sys/ioctl.h>

enum { KERNEL_SIGSET_BYTES = 8 };
static const size_t CALL_BYTES_MAX = 0x7ffff000; /* MAX_RW_COUNT in the kernel */

static _Atomic pid_t process; /* whose pagers serve; not that of a vfork()'s child, which runs in the same memory */

#ifndef MADV_POPULATE_READ
enum { MADV_POPULATE_READ = 22 };
#endif

static bool can_load(uintptr_t address)
{
    return !syscall(SYS_rt_sigprocmask, -1, address, NULL, KERNEL_SIGSET_BYTES) || errno != EFAULT;
}

static bool can_store(uintptr_t address)
{
    static _Atomic uint32_t nobody_waits;
    /* *address |= 0; and wake one of those who wait there, if it was -2048: a wake-up that comes for nothing is allowed */
    const unsigned operation = FUTEX_OP(FUTEX_OP_OR, 0, FUTEX_OP_CMP_EQ, -2048);

    return syscall(SYS_futex, &nobody_waits, FUTEX_WAKE_OP_PRIVATE, 1, 1, address, operation) >= 0 || errno != EFAULT;
}

/* Whether it can load from all of whole pages. False where it does not tell (before Linux 5.14). */
static bool can_load_all(uintptr_t address, size_t length_bytes)
{
    return !madvise((void *)address, length_bytes, MADV_POPULATE_READ);
}

/* --- parts -------------------------------------------------------------------------------------------------------- */

bool buffers_in_window(const struct iovec *parts, size_t count)
{
    if (!parts || count > BUFFERS_PARTS_MAX)
        return false;
    for (size_t i = 0; i < count; i++)
        if (window_near((uintptr_t)parts[i].iov_base) && window_at((uintptr_t)parts[i].iov_base))
            break;
        else if (i + 1 == count)
            return false;
    for (size_t i = 0; i < count; i++)
        if (parts[i].iov_len > SSIZE_MAX)
            return false;
    return count != 0;
}

struct buffers buffers_of(const struct iovec *parts, size_t count)
{
    struct buffers buffers = {.parts = parts, .count = count};

    for (size_t i = 0; i < count && buffers.length_bytes < CALL_BYTES_MAX; i++)
        buffers.length_bytes += parts[i].iov_len;
    if (buffers.length_bytes > CALL_BYTES_MAX)
        buffers.length_bytes = CALL_BYTES_MAX;
    return buffers;
}

size_t buffers_rest(const struct buffers *buffers, size_t done, struct iovec *rest)
{
    size_t count = 0;

    for (size_t i = 0; i < buffers->count; i++) {
        size_t skipped = done < buffers->parts[i].iov_len ? done : buffers->parts[i].iov_len;

        done -= skipped;
        if (!done)
            rest[count++] = (struct iovec){(char *)buffers->parts[i].iov_base + skipped,
                                           buffers->parts[i].iov_len - skipped};
    }
    return count;
}

/* --- pages -------------------------------------------------------------------------------------------------------- */

/* A walk over pages that have been looked at. */
struct walk {
    const struct look *look;
    size_t asked_bytes; /* from the first page that was missing on */
    bool asked;
    int error;
};

/* Goes over [address, end) of a window; false: no further. */
static bool walk_window(struct walk *walk, struct window *window, uintptr_t address, uintptr_t end)
{
    uint64_t page_size = page_size_bytes();
    bool store = walk->look->store;

    while (address < end) {
        uintptr_t page = address - address % page_size, next = page + page_size;

        if (walk->look->unseen || !(store ? can_store(page) : can_load(page))) {
            uint64_t end_pgoff, pgoff = window->pgoff + (page - window->base) / page_size;

            walk->error = window_request_pages(window, pgoff, store, &end_pgoff);
            if (walk->error)
                return false;
            walk->asked = true;
            next = page + (end_pgoff - pgoff) * page_size;
        }
        if (next > end)
            next = end;
        walk->asked_bytes += walk->asked ? next - address : 0;
        if (walk->asked_bytes >= walk->look->ask_bytes)
            return false;
        address = next;
    }
    return true;
}

/* Of memory that may or may not lie in a window. */
static bool walk_memory(struct walk *walk, uintptr_t address, size_t length_bytes)
{
    struct window *window = window_near(address) ? window_at(address) : NULL;
    uint64_t page_size = page_size_bytes();
    uintptr_t end = address + length_bytes, page = address - address % page_size;

    if (!window)
        return true;
    if (end > window->base + window->reach_pages * page_size)
        end = window->base + window->reach_pages * page_size;
    if (!walk->look->store && !walk->look->unseen && !walk->asked && end > page + page_size &&
        can_load_all(page, end - page))
        return true;
    return walk_window(walk, window, address, end);
}

int buffers_map(const struct buffers *buffers, const struct look *look)
{
    struct walk walk = {.look = look};
    size_t skip = look->from, left = look->look_bytes;
    int saved_errno = errno;
    bool more = getpid() == atomic_load(&process);

    for (size_t i = 0; i < buffers->count && left && more; i++) {
        size_t length = buffers->parts[i].iov_len, skipped = skip < length ? skip : length;

        skip -= skipped;
        length = length - skipped < left ? length - skipped : left;
        left -= length;
        if (length)
            more = walk_memory(&walk, (uintptr_t)buffers->parts[i].iov_base + skipped, length);
    }
    errno = saved_errno;
    return walk.asked ? 1 : -walk.error;
}

/* --- rounds ------------------------------------------------------------------------------------------------------- */

bool rounds_count(struct rounds *rounds, const struct buffers *buffers, ssize_t moved)
{
    rounds->error = moved < 0 ? errno : 0;
    if (moved > 0) {
        rounds->done += (size_t)moved;
        rounds->in_vain = 0;
    }
    return (moved > 0 && rounds->done < buffers->length_bytes) || rounds->error == EFAULT;
}

ssize_t rounds_result(const struct rounds *rounds, int saved_errno)
{
    bool failed = !rounds->done && rounds->error;

    errno = failed ? rounds->error : saved_errno;
    return failed ? -1 : (ssize_t)rounds->done;
}

size_t waiting_in(int fd)
{
    int waiting_bytes = 0;

    return !ioctl(fd, FIONREAD, &waiting_bytes) && waiting_bytes > 0 ? (size_t)waiting_bytes : 1;
}

/* Between the answer and the call, another process may have the pages taken away; and where a cache of hole pages is
 * small, the last page asked for takes the place of the first. So each round in vain asks for half of what the one before
 * has asked for, and after a few the call fails with EFAULT: it has not moved a byte meanwhile.
 */
bool rounds_go_on(struct rounds *rounds, const struct buffers *buffers, size_t look_bytes, bool store)
{
    struct look look = {
        .from = rounds->done,
        .look_bytes = look_bytes,
        .ask_bytes = (size_t)ASKED_BYTES >> rounds->in_vain,
        .store = store,
    };
    int mapped;

    if (rounds->in_vain == ROUNDS_MAX)
        return false;
    mapped = buffers_map(buffers, &look);
    if (!mapped && rounds->error) { /* another thread has had them mapped, or the kernel does not tell */
        look.unseen = rounds->in_vain > 0;
        mapped = look.unseen ? buffers_map(buffers, &look) : rounds->in_vain == 0;
    }
    rounds->in_vain++;
    if (mapped < 0)
        rounds->error = -mapped;
    return mapped > 0;
}

/* --- processes ---------------------------------------------------------------------------------------------------- */

static void after_fork_in_child(void)
{
    atomic_store(&process, getpid());
}

int buffers_init(void)
{
    atomic_store(&process, getpid());
    return pthread_atfork(NULL, NULL, after_fork_in_child);
}
