/* A ZeroMQ DEALER on a Unix socket, as far as the pager needs one. */

#ifndef DAX_MP_ZMTP_H
#define DAX_MP_ZMTP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { ZMTP_BUFFER_BYTES = 1 << 16, ZMTP_MESSAGE_BYTES_MAX = ZMTP_BUFFER_BYTES / 2 };

/* A connection. What has been received and not yet read lies in buffer[begin, end). */
struct zmtp {
    int fd;
    size_t begin;
    size_t end;
    uint8_t buffer[ZMTP_BUFFER_BYTES];
};

/* Connects to `path` as a DEALER of that identity and shakes hands, by `deadline_ns` of the monotonic clock at the
 * latest. 0 or an errno: ETIMEDOUT, EPROTO, EPERM where another user listens there, ECONNREFUSED, ... Close `zmtp->fd`
 * in any case, where it is not -1. */
int zmtp_connect(struct zmtp *zmtp, const char *path, const uint8_t *identity, uint8_t identity_bytes,
                 int64_t deadline_ns);

/* Sends a message of one frame, whole or not at all. Safe in a signal handler, and from several threads at once.
 * 0; EAGAIN: it does not fit into the socket's buffer now; else the connection is gone. */
int zmtp_send(int fd, const uint8_t *message, uint8_t message_bytes);

/* Receives what there is, waiting until there is something where `wait` says so. 0, EAGAIN, or ECONNRESET and others
 * when the connection is gone. */
int zmtp_fill(struct zmtp *zmtp, bool wait);

/* Takes the next message that has been received; it stays valid until the next zmtp_fill(). 0, EAGAIN when there is
 * none, or EPROTO. */
int zmtp_take(struct zmtp *zmtp, const uint8_t **message, size_t *message_bytes);

/* The same, receiving until there is one, or the deadline: ETIMEDOUT. */
int zmtp_take_until(struct zmtp *zmtp, int64_t deadline_ns, const uint8_t **message, size_t *message_bytes);

#endif
