/* The libzmq that pyzmq has loaded. */

#ifndef DAX_MP_LIBZMQ_H
#define DAX_MP_LIBZMQ_H

#include <stddef.h>

/* From zmq.h, whose numbers are part of libzmq's ABI. */
enum {
    ZMQ_DEALER = 5,
    ZMQ_ROUTING_ID = 5,
    ZMQ_RCVMORE = 13,
    ZMQ_FD = 14,
    ZMQ_LINGER = 17,
    ZMQ_SNDHWM = 23,
    ZMQ_RCVHWM = 24,
    ZMQ_DONTWAIT = 1,
};

struct libzmq {
    void *(*socket)(void *context, int type);
    int (*close)(void *socket);
    int (*connect)(void *socket, const char *endpoint);
    int (*setsockopt)(void *socket, int option, const void *value, size_t size);
    int (*getsockopt)(void *socket, int option, void *value, size_t *size);
    int (*send)(void *socket, const void *data, size_t size, int flags);
    int (*recv)(void *socket, void *data, size_t size, int flags);
    int (*error)(void); /* zmq_errno */
};

/* Fills `zmq` with the functions reached through the shared object at `path`. NULL, or what is missing: dlerror()'s
 * text, valid until the next call of a dl function in this thread. */
const char *libzmq_load(struct libzmq *zmq, const char *path);

#endif
