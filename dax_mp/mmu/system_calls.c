/* read(2), write(2) and their kin, for buffers in windows.
 *
 * A call whose buffer lies in no window is the libc's, after one comparison. For one in a window, what must be right is
 * that the call moves what it would move in ordinary memory, and that nothing is lost where it fails.
 *
 * *Calls that load from the buffer* (write). All pages of the buffer are looked at before the call, and the missing ones
 * mapped; so it is one call for the kernel, and as atomic as it is otherwise (O_APPEND, a position that processes share,
 * pipes). Where that would be much for a call that may take little (a large buffer to something that is no file), and
 * where it matters to nobody (pwrite), the call is tried first: it takes what is before the missing page, and says so.
 *
 * *Calls that store into the buffer* (read) are tried first, since who knows how much comes: a buffer of 1 GiB gets no
 * blocks for 100 bytes. What the kernel does at a missing page depends on what it reads from (Linux 6.18):
 * - Files, block devices and memory devices (mm/filemap.c, drivers/char/mem.c): as much as fitted has been read, the
 *   position is behind it, and the next call goes on there. So the call is repeated until there is no more: a file's
 *   reader counts on full reads. How much the file has bounds what is asked for.
 * - Pipes and stream sockets (fs/pipe.c, net/ipv4/tcp.c, net/unix/af_unix.c): what did not fit stays in the queue. The
 *   pages for what waits there (FIONREAD) are mapped, and the call repeated; once it has read anything it is over, since
 *   the next might wait.
 * - All else (terminals, eventfd, inotify, drivers): it may be lost. Pages for 64 KiB, more than these give at a time,
 *   are mapped before the call.
 *
 * Where there is no page to map, the call fails with the errno that says why: EFAULT past the end of the file, ENOSPC,
 * ESTALE, EIO. No exception is left pending, as the caller hears of it.
 */

#include "system_calls.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum { LOOKED_ANYWAY_BYTES = 1 << 20, FILE_LOOKED_BYTES = 16 << 20, CHUNK_BYTES = 128 << 10 };
enum { OTHERS_BYTES = 64 << 10, MEMORY_MAJOR = 1 };

/* A call with all its arguments, but for the buffers. */
struct transfer {
    enum { PLAIN, VECTOR, AT, VECTOR_AT, VECTOR_AT_FLAGS } form; /* read, readv, pread, preadv, preadv2 */
    bool store;
    int fd;
    off_t offset_bytes; /* of the last three */
    int flags;          /* of the last */
};

/* --- the call itself ---------------------------------------------------------------------------------------------- */

static ssize_t load(const struct transfer *call, const struct iovec *parts, int count, off_t offset)
{
    switch (call->form) {
    case PLAIN:
        return write(call->fd, parts->iov_base, parts->iov_len);
    case VECTOR:
        return writev(call->fd, parts, count);
    case AT:
        return pwrite(call->fd, parts->iov_base, parts->iov_len, offset);
    case VECTOR_AT:
        return pwritev(call->fd, parts, count, offset);
    default:
        return pwritev2(call->fd, parts, count, offset, call->flags);
    }
}

static ssize_t store(const struct transfer *call, const struct iovec *parts, int count, off_t offset)
{
    switch (call->form) {
    case PLAIN:
        return read(call->fd, parts->iov_base, parts->iov_len);
    case VECTOR:
        return readv(call->fd, parts, count);
    case AT:
        return pread(call->fd, parts->iov_base, parts->iov_len, offset);
    case VECTOR_AT:
        return preadv(call->fd, parts, count, offset);
    default:
        return preadv2(call->fd, parts, count, offset, call->flags);
    }
}

static bool at_position(const struct transfer *call)
{
    return call->form == PLAIN || call->form == VECTOR || (call->form == VECTOR_AT_FLAGS && call->offset_bytes == -1);
}

/* One round, for what is not done yet. False: it is over. */
static bool call_once(const struct transfer *call, const struct buffers *buffers, struct rounds *rounds)
{
    struct iovec rest[buffers->count];
    int count = (int)buffers_rest(buffers, rounds->done, rest);
    off_t offset = at_position(call) ? -1 : call->offset_bytes + (off_t)rounds->done;
    ssize_t moved = call->store ? store(call, rest, count, offset) : load(call, rest, count, offset);

    return rounds_count(rounds, buffers, moved);
}

/* --- calls that load from the buffer ------------------------------------------------------------------------------- */

/* Whether it is of no consequence to others that the call is made in two: nobody else moves where it writes. */
static bool can_be_parted(const struct transfer *call)
{
    int flags;

    if (at_position(call) || (call->form == VECTOR_AT_FLAGS && call->flags))
        return false;
    flags = fcntl(call->fd, F_GETFL);
    return flags >= 0 && !(flags & O_APPEND);
}

static size_t looked_before(const struct transfer *call, const struct buffers *buffers)
{
    struct stat status;

    if (can_be_parted(call))
        return 0;
    if (buffers->length_bytes <= LOOKED_ANYWAY_BYTES)
        return buffers->length_bytes;
    return !fstat(call->fd, &status) && S_ISREG(status.st_mode) ? FILE_LOOKED_BYTES : 0;
}

static ssize_t write_out(const struct transfer *call, const struct buffers *buffers)
{
    struct rounds rounds = {0};
    int saved_errno = errno;
    struct look look = {.look_bytes = looked_before(call, buffers), .ask_bytes = SIZE_MAX};

    if (look.look_bytes)
        buffers_map(buffers, &look);
    /* After a short result a page is missing in the chunk that the kernel was at, or none is. */
    while (call_once(call, buffers, &rounds) &&
           rounds_go_on(&rounds, buffers, rounds.error ? SIZE_MAX : CHUNK_BYTES, false))
        continue;
    return rounds_result(&rounds, saved_errno);
}

/* --- calls that store into the buffer ------------------------------------------------------------------------------ */

enum source { A_FILE, A_STREAM, ANOTHER };

static enum source source_of(const struct transfer *call, struct stat *status)
{
    int type = 0;
    socklen_t size = sizeof type;

    if (fstat(call->fd, status))
        return A_STREAM; /* the call will say what is wrong */
    if (S_ISREG(status->st_mode) || S_ISBLK(status->st_mode))
        return A_FILE;
    if (S_ISCHR(status->st_mode) && major(status->st_rdev) == MEMORY_MAJOR)
        return A_FILE;
    if (S_ISFIFO(status->st_mode))
        return A_STREAM;
    if (S_ISSOCK(status->st_mode) && !getsockopt(call->fd, SOL_SOCKET, SO_TYPE, &type, &size) && type == SOCK_STREAM)
        return A_STREAM;
    return ANOTHER;
}

/* How much a file may have for the rest of the call. */
static size_t left_in_file(const struct transfer *call, const struct stat *before, const struct rounds *rounds)
{
    struct stat status;
    off_t at = at_position(call) ? lseek(call->fd, 0, SEEK_CUR) : call->offset_bytes + (off_t)rounds->done;

    if (!S_ISREG(before->st_mode) || at < 0 || fstat(call->fd, &status))
        return SIZE_MAX;
    if (at < status.st_size)
        return (size_t)(status.st_size - at);
    return rounds->error ? OTHERS_BYTES : 0; /* of /proc, whose files have no size */
}

static ssize_t read_file(const struct transfer *call, const struct buffers *buffers, const struct stat *status)
{
    struct rounds rounds = {0};
    int saved_errno = errno;
    bool more = call_once(call, buffers, &rounds);

    while (more) {
        size_t left = left_in_file(call, status, &rounds);

        more = left && rounds_go_on(&rounds, buffers, left, true) && call_once(call, buffers, &rounds);
    }
    return rounds_result(&rounds, saved_errno);
}

static ssize_t read_stream(const struct transfer *call, const struct buffers *buffers)
{
    struct rounds rounds = {0};
    int saved_errno = errno;

    while (call_once(call, buffers, &rounds) && !rounds.done &&
           rounds_go_on(&rounds, buffers, waiting_in(call->fd), true))
        continue;
    return rounds_result(&rounds, saved_errno);
}

static ssize_t read_other(const struct transfer *call, const struct buffers *buffers)
{
    struct rounds rounds = {0};
    struct look look = {.look_bytes = OTHERS_BYTES, .ask_bytes = SIZE_MAX, .store = true};
    int saved_errno = errno, mapped = buffers_map(buffers, &look);

    if (mapped < 0)
        rounds.error = -mapped;
    else
        call_once(call, buffers, &rounds);
    return rounds_result(&rounds, saved_errno);
}

static ssize_t transfer(const struct transfer *call, const struct iovec *parts, size_t count)
{
    struct buffers buffers = buffers_of(parts, count);
    struct stat status;

    if (!call->store)
        return write_out(call, &buffers);
    switch (source_of(call, &status)) {
    case A_FILE:
        return read_file(call, &buffers, &status);
    case A_STREAM:
        return read_stream(call, &buffers);
    default:
        return read_other(call, &buffers);
    }
}

/* --- the replacements ---------------------------------------------------------------------------------------------- */

static ssize_t our_read(int fd, void *buffer, size_t count)
{
    struct iovec part = {buffer, count};

    if (!buffers_in_window(&part, 1))
        return read(fd, buffer, count);
    return transfer(&(struct transfer){PLAIN, true, fd, 0, 0}, &part, 1);
}

static ssize_t our_write(int fd, const void *buffer, size_t count)
{
    struct iovec part = {(void *)buffer, count};

    if (!buffers_in_window(&part, 1))
        return write(fd, buffer, count);
    return transfer(&(struct transfer){PLAIN, false, fd, 0, 0}, &part, 1);
}

static ssize_t our_pread(int fd, void *buffer, size_t count, off_t offset)
{
    struct iovec part = {buffer, count};

    if (!buffers_in_window(&part, 1))
        return pread(fd, buffer, count, offset);
    return transfer(&(struct transfer){AT, true, fd, offset, 0}, &part, 1);
}

static ssize_t our_pwrite(int fd, const void *buffer, size_t count, off_t offset)
{
    struct iovec part = {(void *)buffer, count};

    if (!buffers_in_window(&part, 1))
        return pwrite(fd, buffer, count, offset);
    return transfer(&(struct transfer){AT, false, fd, offset, 0}, &part, 1);
}

static ssize_t our_readv(int fd, const struct iovec *parts, int count)
{
    if (!buffers_in_window(parts, (size_t)count))
        return readv(fd, parts, count);
    return transfer(&(struct transfer){VECTOR, true, fd, 0, 0}, parts, (size_t)count);
}

static ssize_t our_writev(int fd, const struct iovec *parts, int count)
{
    if (!buffers_in_window(parts, (size_t)count))
        return writev(fd, parts, count);
    return transfer(&(struct transfer){VECTOR, false, fd, 0, 0}, parts, (size_t)count);
}

static ssize_t our_preadv(int fd, const struct iovec *parts, int count, off_t offset)
{
    if (!buffers_in_window(parts, (size_t)count))
        return preadv(fd, parts, count, offset);
    return transfer(&(struct transfer){VECTOR_AT, true, fd, offset, 0}, parts, (size_t)count);
}

static ssize_t our_pwritev(int fd, const struct iovec *parts, int count, off_t offset)
{
    if (!buffers_in_window(parts, (size_t)count))
        return pwritev(fd, parts, count, offset);
    return transfer(&(struct transfer){VECTOR_AT, false, fd, offset, 0}, parts, (size_t)count);
}

static ssize_t our_preadv2(int fd, const struct iovec *parts, int count, off_t offset, int flags)
{
    if (!buffers_in_window(parts, (size_t)count))
        return preadv2(fd, parts, count, offset, flags);
    return transfer(&(struct transfer){VECTOR_AT_FLAGS, true, fd, offset, flags}, parts, (size_t)count);
}

static ssize_t our_pwritev2(int fd, const struct iovec *parts, int count, off_t offset, int flags)
{
    if (!buffers_in_window(parts, (size_t)count))
        return pwritev2(fd, parts, count, offset, flags);
    return transfer(&(struct transfer){VECTOR_AT_FLAGS, false, fd, offset, flags}, parts, (size_t)count);
}

/* With _FORTIFY_SOURCE. They end the process where `size` is less than `count`, as the libc's own do. */

extern ssize_t __read_chk(int fd, void *buffer, size_t count, size_t size);
extern ssize_t __pread_chk(int fd, void *buffer, size_t count, off_t offset, size_t size);

static ssize_t our_read_chk(int fd, void *buffer, size_t count, size_t size)
{
    return count > size ? __read_chk(fd, buffer, count, size) : our_read(fd, buffer, count);
}

static ssize_t our_pread_chk(int fd, void *buffer, size_t count, off_t offset, size_t size)
{
    return count > size ? __pread_chk(fd, buffer, count, offset, size) : our_pread(fd, buffer, count, offset);
}

#define REPLACES(name, function) {name, (void (*)(void))(function)}

const struct replacement file_replacements[] = {
    REPLACES("read", our_read),
    REPLACES("__read", our_read),
    REPLACES("__read_chk", our_read_chk),
    REPLACES("write", our_write),
    REPLACES("__write", our_write),
    REPLACES("pread", our_pread),
    REPLACES("pread64", our_pread),
    REPLACES("__pread64", our_pread),
    REPLACES("__pread_chk", our_pread_chk),
    REPLACES("__pread64_chk", our_pread_chk),
    REPLACES("pwrite", our_pwrite),
    REPLACES("pwrite64", our_pwrite),
    REPLACES("__pwrite64", our_pwrite),
    REPLACES("readv", our_readv),
    REPLACES("writev", our_writev),
    REPLACES("preadv", our_preadv),
    REPLACES("preadv64", our_preadv),
    REPLACES("pwritev", our_pwritev),
    REPLACES("pwritev64", our_pwritev),
    REPLACES("preadv2", our_preadv2),
    REPLACES("preadv64v2", our_preadv2),
    REPLACES("pwritev2", our_pwritev2),
    REPLACES("pwritev64v2", our_pwritev2),
    {NULL, NULL},
};
