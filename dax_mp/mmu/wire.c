/* A message is one msgpack array of unsigned integers: its type, its fields and, in a Map or an Unmap, one flat array
 * of them at the end. Nothing else of msgpack is understood, each read is checked against what is left of the data,
 * and each count against the table below, so that no byte a coordinator sends can lead out of a buffer.
 */

#include "wire.h"

#include <errno.h>
#include <stdbool.h>

enum {
    MSGPACK_FIXARRAY = 0x90,
    MSGPACK_FIXARRAY_MAX = 15,
    MSGPACK_POSITIVE_FIXINT_MAX = 0x7f,
    MSGPACK_UINT8 = 0xcc,
    MSGPACK_UINT16 = 0xcd,
    MSGPACK_UINT32 = 0xce,
    MSGPACK_UINT64 = 0xcf,
    MSGPACK_ARRAY16 = 0xdc,
    MSGPACK_ARRAY32 = 0xdd,
};

/* What each message from a coordinator is made of. */
static const struct schema {
    enum message_type type;
    size_t fields;
    size_t width;     /* items to an entry of its array; 0 where it has none */
    int u32_field;    /* the field that is 32 bits; -1 where none is */
} schemas[] = {
    {MESSAGE_PAGER_READY, 1, 0, 0},
    {MESSAGE_MAP, 2, 5, -1},
    {MESSAGE_FAULT_ERROR, 5, 0, 4},
    {MESSAGE_UNMAP, 2, 3, -1},
    {MESSAGE_EVICT, 1, 0, 0},
};

struct reader {
    const uint8_t *next;
    size_t left;
};

static uint8_t *put_uint(uint8_t *out, uint64_t value)
{
    int width = value <= UINT8_MAX ? 1 : value <= UINT16_MAX ? 2 : value <= UINT32_MAX ? 4 : 8;

    if (value <= MSGPACK_POSITIVE_FIXINT_MAX) {
        *out++ = (uint8_t)value;
        return out;
    }
    *out++ = width == 1 ? MSGPACK_UINT8 : width == 2 ? MSGPACK_UINT16 : width == 4 ? MSGPACK_UINT32 : MSGPACK_UINT64;
    while (width-- > 0)
        *out++ = (uint8_t)(value >> (8 * width));
    return out;
}

size_t wire_encode(uint8_t *buffer, enum message_type type, const uint64_t *fields, size_t count)
{
    uint8_t *out = buffer;

    *out++ = (uint8_t)(MSGPACK_FIXARRAY + 1 + count);
    out = put_uint(out, type);
    for (size_t i = 0; i < count; i++)
        out = put_uint(out, fields[i]);
    return (size_t)(out - buffer);
}

static bool get_bigendian(struct reader *reader, size_t width, uint64_t *value)
{
    if (reader->left < width)
        return false;
    *value = 0;
    for (size_t i = 0; i < width; i++)
        *value = *value << 8 | reader->next[i];
    reader->next += width;
    reader->left -= width;
    return true;
}

static bool get_uint(struct reader *reader, uint64_t *value)
{
    uint64_t head;

    if (!get_bigendian(reader, 1, &head))
        return false;
    if (head <= MSGPACK_POSITIVE_FIXINT_MAX) {
        *value = head;
        return true;
    }
    if (head < MSGPACK_UINT8 || head > MSGPACK_UINT64)
        return false;
    return get_bigendian(reader, (size_t)1 << (head - MSGPACK_UINT8), value) && *value <= INT64_MAX;
}

static bool get_array(struct reader *reader, uint64_t *count)
{
    uint64_t head;

    if (!get_bigendian(reader, 1, &head))
        return false;
    if (head >= MSGPACK_FIXARRAY && head <= MSGPACK_FIXARRAY + MSGPACK_FIXARRAY_MAX) {
        *count = head - MSGPACK_FIXARRAY;
        return true;
    }
    if (head == MSGPACK_ARRAY16)
        return get_bigendian(reader, 2, count);
    return head == MSGPACK_ARRAY32 && get_bigendian(reader, 4, count);
}

static const struct schema *schema_of(uint64_t type)
{
    for (size_t i = 0; i < sizeof schemas / sizeof *schemas; i++)
        if (schemas[i].type == type)
            return &schemas[i];
    return NULL;
}

static bool get_items(struct reader *reader, size_t width, struct message *message)
{
    uint64_t count;

    if (!get_array(reader, &count) || count % width || count > width * WIRE_ENTRIES_MAX)
        return false;
    message->items_count = count;
    for (size_t i = 0; i < count; i++)
        if (!get_uint(reader, &message->items[i]))
            return false;
    return true;
}

static bool get_message(struct reader *reader, struct message *message)
{
    const struct schema *schema;
    uint64_t count;

    if (!get_array(reader, &count) || !count || !get_uint(reader, &message->type))
        return false;
    schema = schema_of(message->type);
    if (!schema || count != 1 + schema->fields + (schema->width != 0))
        return false;
    for (size_t i = 0; i < schema->fields; i++)
        if (!get_uint(reader, &message->fields[i]))
            return false;
    if (schema->u32_field >= 0 && message->fields[schema->u32_field] > UINT32_MAX)
        return false;
    message->items_count = 0;
    return !schema->width || get_items(reader, schema->width, message);
}

int wire_decode(const uint8_t *data, size_t size, struct message *message)
{
    struct reader reader = {data, size};

    return get_message(&reader, message) && !reader.left ? 0 : EPROTO;
}
