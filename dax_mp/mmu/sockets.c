/* send(2), recv(2) and their kin, for buffers in windows. What system_calls.c says of read and write holds here, and:
 *
 * - A call that sends is tried first. A stream takes up to the missing page and says how much; a datagram is sent as a
 *   whole or not at all. A message with ancillary data (descriptors) is not continued where a stream took a part of it:
 *   the data has gone with that part.
 * - A call that receives from a stream is tried first, and what did not fit stays in the queue. MSG_WAITALL waits for
 *   all: it goes on where a page was missing.
 * - A datagram that does not fit is lost (net/ipv4/udp.c: the copy comes after it has been taken from the queue). So one
 *   is waited for first, by a look that takes nothing (MSG_PEEK) and says how long it is (MSG_TRUNC), and its pages are
 *   mapped. Another process may have them taken away at once: it is received into other memory, and copied from there
 *   by process_vm_writev(), which can be repeated. (In a sandbox that forbids that call it is received where it is to
 *   be, and lost in that case.)
 */

#include "system_calls.h"

#include <unistd.h>

enum { CHUNK_BYTES = 128 << 10, DATAGRAM_BYTES = 64 << 10, COPIED_BYTES = 256 << 10 };

struct transfer {
    enum { PLAIN, ADDRESS, MESSAGE } form; /* send, sendto, sendmsg */
    bool store;
    int fd;
    int flags;
    struct sockaddr *address; /* of `ADDRESS`; where it sends it only reads it */
    socklen_t *length;
    struct msghdr *message; /* of `MESSAGE`; where it sends it only reads it */
};

/* --- the call itself ---------------------------------------------------------------------------------------------- */

static ssize_t send_message(const struct transfer *call, struct iovec *parts, size_t count, size_t done)
{
    struct msghdr message = *call->message;

    message.msg_iov = parts;
    message.msg_iovlen = count;
    if (done)
        message.msg_controllen = 0;
    return sendmsg(call->fd, &message, call->flags);
}

/* What comes with the bytes goes into the caller's structure. */
static ssize_t receive_message(const struct transfer *call, struct iovec *parts, size_t count)
{
    struct msghdr message = *call->message;
    ssize_t received;

    message.msg_iov = parts;
    message.msg_iovlen = count;
    received = recvmsg(call->fd, &message, call->flags);
    if (received >= 0) {
        call->message->msg_namelen = message.msg_namelen;
        call->message->msg_controllen = message.msg_controllen;
        call->message->msg_flags = message.msg_flags;
    }
    return received;
}

static ssize_t do_call(const struct transfer *call, struct iovec *parts, size_t count, size_t done)
{
    void *buffer = parts->iov_base;
    size_t length = parts->iov_len;

    if (call->form == MESSAGE)
        return call->store ? receive_message(call, parts, count) : send_message(call, parts, count, done);
    if (call->form == ADDRESS)
        return call->store ? recvfrom(call->fd, buffer, length, call->flags, call->address, call->length)
                           : sendto(call->fd, buffer, length, call->flags, call->address, *call->length);
    return call->store ? recv(call->fd, buffer, length, call->flags) : send(call->fd, buffer, length, call->flags);
}

/* One round, for what is not done yet. False: it is over. */
static bool call_once(const struct transfer *call, const struct buffers *buffers, struct rounds *rounds)
{
    struct iovec rest[buffers->count];
    size_t count = buffers_rest(buffers, rounds->done, rest);
    ssize_t moved = do_call(call, rest, count, rounds->done);

    return rounds_count(rounds, buffers, moved);
}

/* --- sending ------------------------------------------------------------------------------------------------------- */

static ssize_t send_out(const struct transfer *call, const struct buffers *buffers)
{
    bool once = call->form == MESSAGE && call->message->msg_controllen;
    struct look look = {.look_bytes = buffers->length_bytes, .ask_bytes = SIZE_MAX};
    struct rounds rounds = {0};
    int saved_errno = errno;

    if (once)
        buffers_map(buffers, &look);
    while (call_once(call, buffers, &rounds) && !(once && rounds.done) &&
           rounds_go_on(&rounds, buffers, rounds.error ? SIZE_MAX : CHUNK_BYTES, false))
        continue;
    return rounds_result(&rounds, saved_errno);
}

/* --- receiving ----------------------------------------------------------------------------------------------------- */

static bool is_stream(int fd)
{
    int type = SOCK_STREAM;
    socklen_t size = sizeof type;

    return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) || type == SOCK_STREAM;
}

static ssize_t receive_stream(const struct transfer *call, const struct buffers *buffers)
{
    bool all = call->flags & MSG_WAITALL && !(call->flags & MSG_PEEK);
    struct rounds rounds = {0};
    int saved_errno = errno;

    while (call_once(call, buffers, &rounds) && (all || !rounds.done) &&
           rounds_go_on(&rounds, buffers, waiting_in(call->fd), true))
        continue;
    return rounds_result(&rounds, saved_errno);
}

/* Copies what has been received to where it is to be. 0 or an errno. */
static int copy_out(const struct buffers *buffers, char *from, size_t count)
{
    struct rounds rounds = {0};

    while (rounds.done < count) {
        struct iovec rest[buffers->count], local = {from + rounds.done, count - rounds.done};
        size_t parts = buffers_rest(buffers, rounds.done, rest);

        rounds_count(&rounds, buffers, process_vm_writev(getpid(), &local, 1, rest, parts, 0));
        if (rounds.done < count &&
            ((rounds.error && rounds.error != EFAULT) || !rounds_go_on(&rounds, buffers, count - rounds.done, true)))
            return rounds.error ? rounds.error : EFAULT;
    }
    return 0;
}

/* Receives by way of other memory: not less than may be first in the queue now, if another thread receives too. */
static void receive_by_copy(const struct transfer *call, const struct buffers *buffers, size_t waiting_bytes,
                            struct rounds *rounds)
{
    size_t size = waiting_bytes > COPIED_BYTES ? waiting_bytes : COPIED_BYTES;
    struct iovec part = {.iov_len = size < buffers->length_bytes ? size : buffers->length_bytes};
    ssize_t received;

    part.iov_base = mmap(NULL, part.iov_len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (part.iov_base == MAP_FAILED) {
        rounds->error = ENOMEM;
        return;
    }
    received = do_call(call, &part, 1, 0);
    rounds_count(rounds, buffers, received);
    if (received > 0)
        rounds->error = copy_out(buffers, part.iov_base, (size_t)received < part.iov_len ? (size_t)received : part.iov_len);
    if (received > 0 && rounds->error)
        rounds->done = 0;
    munmap(part.iov_base, part.iov_len);
}

static bool can_copy(void)
{
    char from = 0, to;
    struct iovec local = {&from, 1}, remote = {&to, 1};

    return process_vm_writev(getpid(), &local, 1, &remote, 1, 0) == 1;
}

static ssize_t receive_datagram(const struct transfer *call, const struct buffers *buffers)
{
    struct rounds rounds = {0};
    struct look look = {.look_bytes = DATAGRAM_BYTES, .ask_bytes = SIZE_MAX, .store = true};
    int saved_errno = errno, mapped;
    ssize_t waiting = 0;
    char none;

    if (!(call->flags & MSG_ERRQUEUE))
        waiting = recv(call->fd, &none, 0, (call->flags & ~MSG_WAITALL) | MSG_PEEK | MSG_TRUNC);
    if (waiting < 0)
        return -1;
    if (waiting)
        look.look_bytes = (size_t)waiting;
    mapped = buffers_map(buffers, &look);
    if (mapped < 0)
        rounds.error = -mapped;
    else if (buffers->length_bytes && can_copy())
        receive_by_copy(call, buffers, (size_t)waiting, &rounds);
    else
        call_once(call, buffers, &rounds);
    return rounds_result(&rounds, saved_errno);
}

static ssize_t transfer(const struct transfer *call, const struct iovec *parts, size_t count)
{
    struct buffers buffers = buffers_of(parts, count);

    if (!call->store)
        return send_out(call, &buffers);
    return is_stream(call->fd) ? receive_stream(call, &buffers) : receive_datagram(call, &buffers);
}

/* --- the replacements ---------------------------------------------------------------------------------------------- */

static ssize_t our_recv(int fd, void *buffer, size_t count, int flags)
{
    struct iovec part = {buffer, count};

    if (!buffers_in_window(&part, 1))
        return recv(fd, buffer, count, flags);
    return transfer(&(struct transfer){.form = PLAIN, .store = true, .fd = fd, .flags = flags}, &part, 1);
}

static ssize_t our_send(int fd, const void *buffer, size_t count, int flags)
{
    struct iovec part = {(void *)buffer, count};

    if (!buffers_in_window(&part, 1))
        return send(fd, buffer, count, flags);
    return transfer(&(struct transfer){.form = PLAIN, .fd = fd, .flags = flags}, &part, 1);
}

static ssize_t our_recvfrom(int fd, void *buffer, size_t count, int flags, struct sockaddr *address, socklen_t *length)
{
    struct iovec part = {buffer, count};

    if (!buffers_in_window(&part, 1))
        return recvfrom(fd, buffer, count, flags, address, length);
    return transfer(&(struct transfer){.form = ADDRESS, .store = true, .fd = fd, .flags = flags, .address = address,
                                       .length = length},
                    &part, 1);
}

static ssize_t our_sendto(int fd, const void *buffer, size_t count, int flags, const struct sockaddr *address,
                          socklen_t length)
{
    struct iovec part = {(void *)buffer, count};

    if (!buffers_in_window(&part, 1))
        return sendto(fd, buffer, count, flags, address, length);
    return transfer(&(struct transfer){.form = ADDRESS, .fd = fd, .flags = flags,
                                       .address = (struct sockaddr *)address, .length = &length},
                    &part, 1);
}

static ssize_t our_recvmsg(int fd, struct msghdr *message, int flags)
{
    if (!message || !buffers_in_window(message->msg_iov, message->msg_iovlen))
        return recvmsg(fd, message, flags);
    return transfer(&(struct transfer){.form = MESSAGE, .store = true, .fd = fd, .flags = flags, .message = message},
                    message->msg_iov, message->msg_iovlen);
}

static ssize_t our_sendmsg(int fd, const struct msghdr *message, int flags)
{
    if (!message || !buffers_in_window(message->msg_iov, message->msg_iovlen))
        return sendmsg(fd, message, flags);
    return transfer(&(struct transfer){.form = MESSAGE, .fd = fd, .flags = flags, .message = (struct msghdr *)message},
                    message->msg_iov, message->msg_iovlen);
}

/* Of many messages each gets its pages before the call, which is then made once. */
static void map_all(struct mmsghdr *messages, unsigned count, bool store)
{
    for (unsigned i = 0; messages && i < count; i++) {
        const struct msghdr *message = &messages[i].msg_hdr;
        struct look look = {.look_bytes = store ? DATAGRAM_BYTES : SIZE_MAX, .ask_bytes = SIZE_MAX, .store = store};
        struct buffers buffers = buffers_of(message->msg_iov, message->msg_iovlen);

        if (buffers_in_window(message->msg_iov, message->msg_iovlen))
            buffers_map(&buffers, &look);
    }
}

static int our_recvmmsg(int fd, struct mmsghdr *messages, unsigned count, int flags, struct timespec *timeout)
{
    if (windows_near())
        map_all(messages, count, true);
    return recvmmsg(fd, messages, count, flags, timeout);
}

static int our_sendmmsg(int fd, struct mmsghdr *messages, unsigned count, int flags)
{
    if (windows_near())
        map_all(messages, count, false);
    return sendmmsg(fd, messages, count, flags);
}

/* With _FORTIFY_SOURCE. They end the process where `size` is less than `count`, as the libc's own do. */

extern ssize_t __recv_chk(int fd, void *buffer, size_t count, size_t size, int flags);
extern ssize_t __recvfrom_chk(int fd, void *buffer, size_t count, size_t size, int flags, struct sockaddr *address,
                              socklen_t *length);

static ssize_t our_recv_chk(int fd, void *buffer, size_t count, size_t size, int flags)
{
    return count > size ? __recv_chk(fd, buffer, count, size, flags) : our_recv(fd, buffer, count, flags);
}

static ssize_t our_recvfrom_chk(int fd, void *buffer, size_t count, size_t size, int flags, struct sockaddr *address,
                                socklen_t *length)
{
    return count > size ? __recvfrom_chk(fd, buffer, count, size, flags, address, length)
                        : our_recvfrom(fd, buffer, count, flags, address, length);
}

#define REPLACES(name, function) {name, (void (*)(void))(function)}

const struct replacement socket_replacements[] = {
    REPLACES("recv", our_recv),
    REPLACES("__recv_chk", our_recv_chk),
    REPLACES("recvfrom", our_recvfrom),
    REPLACES("__recvfrom_chk", our_recvfrom_chk),
    REPLACES("recvmsg", our_recvmsg),
    REPLACES("recvmmsg", our_recvmmsg),
    REPLACES("send", our_send),
    REPLACES("__send", our_send),
    REPLACES("sendto", our_sendto),
    REPLACES("sendmsg", our_sendmsg),
    REPLACES("sendmmsg", our_sendmmsg),
    {NULL, NULL},
};
