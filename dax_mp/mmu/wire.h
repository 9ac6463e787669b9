/* The messages of the pager channel as bytes: the C side of dax_mp/messages.py, which defines them. */

#ifndef DAX_MP_WIRE_H
#define DAX_MP_WIRE_H

#include <stddef.h>
#include <stdint.h>

enum message_type {
    MESSAGE_PAGER_HELLO = 1,
    MESSAGE_FAULT = 2,
    MESSAGE_UNMAP_ACK = 3,
    MESSAGE_DROPPED = 4,
    MESSAGE_PAGER_READY = 16,
    MESSAGE_MAP = 17,
    MESSAGE_FAULT_ERROR = 18,
    MESSAGE_UNMAP = 19,
    MESSAGE_EVICT = 20,
};

enum {
    WIRE_FIELDS_MAX = 5,
    WIRE_ENTRIES_MAX = 64, /* limits.SEGMENTS_MAX */
    WIRE_ITEMS_MAX = 5 * WIRE_ENTRIES_MAX,
    /* The type, the fields and the items at nine bytes each, and the heads of two arrays. */
    WIRE_BYTES_MAX = 9 * (1 + WIRE_FIELDS_MAX + WIRE_ITEMS_MAX) + 10,
    /* One that the pager sends: the head, the type and the fields of a Fault. */
    WIRE_SENT_BYTES_MAX = 1 + 9 * (1 + 4),
};

struct message {
    uint64_t type;
    uint64_t fields[WIRE_FIELDS_MAX]; /* the unsigned integers after the type */
    size_t items_count;
    uint64_t items[WIRE_ITEMS_MAX]; /* the flat array at the end of a Map or an Unmap */
};

/* Writes a message of `count` unsigned integers into `buffer` (WIRE_SENT_BYTES_MAX bytes) and returns its length. */
size_t wire_encode(uint8_t *buffer, enum message_type type, const uint64_t *fields, size_t count);

/* Reads a message that a coordinator may send. 0, or EPROTO when it is not one or breaks a limit; `message` is then
 * not to be used. */
int wire_decode(const uint8_t *data, size_t size, struct message *message);

#endif
