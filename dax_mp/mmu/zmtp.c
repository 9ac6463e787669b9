/* ZMTP 3.0, ZeroMQ's own protocol (https://rfc.zeromq.org/spec/23/), spoken to the coordinator (daemons/connection.py).
 *
 * Why not libzmq: it moves every message through a thread of its own, and its sockets belong to one
 * thread. A fault would wake that thread, and before it the pager's, on its way out, and that thread again on its way
 * back. With the socket itself, the faulting thread sends its request from the signal handler with one system call, and
 * the answer wakes the pager and nobody before it: two wake-ups in the place of five, of some ten microseconds each.
 *
 * A connection opens with a greeting of 64 bytes from each side, then a READY command from each (mechanism NULL). After
 * that come messages. Each is one frame here: flags, length (one byte, or eight where the flags say LONG), body.
 *
 * A frame is sent with one send() on a stream socket that does not block. The kernel takes so small a one as a whole or
 * not at all (unix_stream_sendmsg fills one buffer for it), so senders need no lock against each other. */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include "zmtp.h"

#include "thread.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

enum { FLAG_MORE = 1 << 0, FLAG_LONG = 1 << 1, FLAG_COMMAND = 1 << 2 };
enum { GREETING_BYTES = 64, LONG_HEAD_BYTES = 9, SHORT_HEAD_BYTES = 2 };

/* Signature, version 3.0, mechanism "NULL" in twenty bytes, not the server side of it, and filler. */
static const uint8_t GREETING[GREETING_BYTES] = {0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0x7f, 3, 0, 'N', 'U', 'L', 'L'};
enum { GREETING_MAJOR = 10, GREETING_MECHANISM = 12, MECHANISM_BYTES = 20 };

/* --- sending ----------------------------------------------------------------------------------------------------- */

static int send_whole(int fd, const uint8_t *bytes, size_t count)
{
    ssize_t sent;

    do
        sent = send(fd, bytes, count, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    if (sent < 0)
        return errno == EWOULDBLOCK ? EAGAIN : errno;
    return (size_t)sent == count ? 0 : EIO;
}

static int send_frame(int fd, uint8_t flags, const uint8_t *body, uint8_t body_bytes)
{
    uint8_t frame[SHORT_HEAD_BYTES + UINT8_MAX] = {flags, body_bytes};

    memcpy(frame + SHORT_HEAD_BYTES, body, body_bytes);
    return send_whole(fd, frame, SHORT_HEAD_BYTES + (size_t)body_bytes);
}

int zmtp_send(int fd, const uint8_t *message, uint8_t message_bytes)
{
    return send_frame(fd, 0, message, message_bytes);
}

/* --- receiving --------------------------------------------------------------------------------------------------- */

int zmtp_fill(struct zmtp *zmtp, bool wait)
{
    ssize_t received;

    memmove(zmtp->buffer, zmtp->buffer + zmtp->begin, zmtp->end - zmtp->begin);
    zmtp->end -= zmtp->begin;
    zmtp->begin = 0;
    do
        received = recv(zmtp->fd, zmtp->buffer + zmtp->end, sizeof zmtp->buffer - zmtp->end,
                        wait ? 0 : MSG_DONTWAIT);
    while (received < 0 && errno == EINTR);
    if (received < 0)
        return errno == EWOULDBLOCK ? EAGAIN : errno;
    if (!received)
        return ECONNRESET;
    zmtp->end += (size_t)received;
    return 0;
}

struct frame {
    uint8_t flags;
    const uint8_t *body;
    uint64_t body_bytes;
};

/* Takes a frame out of the buffer. EAGAIN: it is not there as a whole. */
static int take_frame(struct zmtp *zmtp, struct frame *frame)
{
    const uint8_t *at = zmtp->buffer + zmtp->begin;
    size_t there = zmtp->end - zmtp->begin;
    size_t head_bytes;

    if (there < SHORT_HEAD_BYTES)
        return EAGAIN;
    frame->flags = at[0];
    head_bytes = frame->flags & FLAG_LONG ? LONG_HEAD_BYTES : SHORT_HEAD_BYTES;
    if (there < head_bytes)
        return EAGAIN;
    frame->body_bytes = 0;
    for (size_t i = 1; i < head_bytes; i++)
        frame->body_bytes = frame->body_bytes << 8 | at[i];
    if (frame->body_bytes > ZMTP_MESSAGE_BYTES_MAX)
        return EPROTO;
    if (there - head_bytes < frame->body_bytes)
        return EAGAIN;
    frame->body = at + head_bytes;
    zmtp->begin += head_bytes + frame->body_bytes;
    return 0;
}

int zmtp_take(struct zmtp *zmtp, const uint8_t **message, size_t *message_bytes)
{
    struct frame frame;
    int error = take_frame(zmtp, &frame);

    if (error)
        return error;
    if (frame.flags & (FLAG_MORE | FLAG_COMMAND)) /* our messages have one frame; no command is due after READY */
        return EPROTO;
    *message = frame.body;
    *message_bytes = frame.body_bytes;
    return 0;
}

/* --- the handshake ----------------------------------------------------------------------------------------------- */

/* Receives something, by the deadline. */
static int fill_until(struct zmtp *zmtp, int64_t deadline_ns)
{
    struct pollfd readable = {.fd = zmtp->fd, .events = POLLIN};
    int64_t left_ms;
    int error;

    while ((error = zmtp_fill(zmtp, false)) == EAGAIN) {
        left_ms = (deadline_ns - monotonic_ns()) / 1000000;
        if (left_ms <= 0)
            return ETIMEDOUT;
        poll(&readable, 1, left_ms > INT_MAX ? INT_MAX : (int)left_ms);
    }
    return error;
}

/* connect() again where a signal ended it: nothing has come of it then (unix_stream_connect). */
static int connect_path(int fd, const struct sockaddr_un *address)
{
    int result;

    do
        result = connect(fd, (const struct sockaddr *)address, sizeof *address);
    while (result < 0 && errno == EINTR);
    return result < 0 ? errno : 0;
}

/* Anyone may have made what is found at a path: nothing is sent to a process of another user. */
static int check_peer(int fd)
{
    struct ucred peer;
    socklen_t length = sizeof peer;

    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length))
        return errno;
    return peer.uid == geteuid() ? 0 : EPERM;
}

static int open_socket(const char *path, int64_t deadline_ns, int *opened)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int64_t left_ns = deadline_ns - monotonic_ns();
    struct timeval left = {.tv_sec = left_ns / 1000000000, .tv_usec = left_ns % 1000000000 / 1000};
    size_t length = strlen(path);
    int error;

    if (length >= sizeof address.sun_path)
        return ENAMETOOLONG;
    memcpy(address.sun_path, path, length + 1);
    *opened = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (*opened < 0)
        return errno;
    /* connect() waits while the listener's queue is full; this is its only time limit (unix_stream_connect). */
    if (left_ns <= 0 || setsockopt(*opened, SOL_SOCKET, SO_SNDTIMEO, &left, sizeof left))
        return ETIMEDOUT;
    error = connect_path(*opened, &address);
    if (error)
        return error == EAGAIN ? ETIMEDOUT : error;
    return check_peer(*opened);
}

static int receive_greeting(struct zmtp *zmtp, int64_t deadline_ns)
{
    int error = 0;

    while (!error && zmtp->end < GREETING_BYTES)
        error = fill_until(zmtp, deadline_ns);
    if (error)
        return error;
    zmtp->begin = GREETING_BYTES;
    if (zmtp->buffer[0] != 0xff || zmtp->buffer[GREETING_MAJOR] < 3 ||
        memcmp(zmtp->buffer + GREETING_MECHANISM, GREETING + GREETING_MECHANISM, MECHANISM_BYTES))
        return EPROTO;
    return 0;
}

static uint8_t *put_property(uint8_t *at, const char *name, const void *value, uint8_t value_bytes)
{
    size_t name_bytes = strlen(name);

    *at++ = (uint8_t)name_bytes;
    memcpy(at, name, name_bytes);
    at += name_bytes;
    memset(at, 0, 3); /* the length has four bytes */
    at[3] = value_bytes;
    memcpy(at + 4, value, value_bytes);
    return at + 4 + value_bytes;
}

static int send_ready(int fd, const uint8_t *identity, uint8_t identity_bytes)
{
    uint8_t command[UINT8_MAX] = "\5READY";
    uint8_t *end = put_property(command + 6, "Socket-Type", "DEALER", 6);

    end = put_property(end, "Identity", identity, identity_bytes);
    return send_frame(fd, FLAG_COMMAND, command, (uint8_t)(end - command));
}

static int receive_ready(struct zmtp *zmtp, int64_t deadline_ns)
{
    struct frame frame;
    int error;

    while ((error = take_frame(zmtp, &frame)) == EAGAIN)
        if ((error = fill_until(zmtp, deadline_ns)))
            break;
    if (error)
        return error;
    if (!(frame.flags & FLAG_COMMAND) || frame.body_bytes < 6 || memcmp(frame.body, "\5READY", 6))
        return EPROTO;
    return 0;
}

int zmtp_take_until(struct zmtp *zmtp, int64_t deadline_ns, const uint8_t **message, size_t *message_bytes)
{
    int error;

    while ((error = zmtp_take(zmtp, message, message_bytes)) == EAGAIN)
        if ((error = fill_until(zmtp, deadline_ns)))
            break;
    return error;
}

int zmtp_connect(struct zmtp *zmtp, const char *path, const uint8_t *identity, uint8_t identity_bytes,
                 int64_t deadline_ns)
{
    int error;

    *zmtp = (struct zmtp){.fd = -1};
    error = open_socket(path, deadline_ns, &zmtp->fd);
    if (!error)
        error = send_whole(zmtp->fd, GREETING, sizeof GREETING);
    if (!error)
        error = receive_greeting(zmtp, deadline_ns);
    if (!error)
        error = send_ready(zmtp->fd, identity, identity_bytes);
    if (!error)
        error = receive_ready(zmtp, deadline_ns);
    return error;
}
