/* fread(3) and fwrite(3), for buffers in windows.
 *
 * The libc calls read and write for them by itself, past what is interposed, and copies what it buffers by touching it.
 * So the pages of each part of the buffer are mapped before the part is given to the libc. Where one is taken away
 * meanwhile, and the libc's call fails with EFAULT, the stream has moved as far as it says (_IO_new_file_xsputn and
 * _IO_file_xsgetn in libio/fileops.c): the rest is repeated, and the stream's error mark taken off.
 */

#include "system_calls.h"

#include <stdio.h>

enum { FIRST_BYTES = 64 << 10 };



static size_t load_part(char *buffer, size_t length_bytes, FILE *file)
{
    return fwrite(buffer, 1, length_bytes, file);
}

static size_t store_part(char *buffer, size_t length_bytes, FILE *file)
{
    return fread(buffer, 1, length_bytes, file);
}

/* Moves one part. False: it is over. */
static bool move_part(struct rounds *rounds, char *buffer, size_t part_bytes, FILE *file, bool store)
{
    struct iovec part = {buffer + rounds->done, part_bytes};
    struct buffers buffers = buffers_of(&part, 1);
    struct look look = {.look_bytes = part_bytes, .ask_bytes = SIZE_MAX, .store = store};
    bool had_error = ferror(file);
    int mapped = buffers_map(&buffers, &look);
    size_t moved;

    if (mapped < 0) {
        rounds->error = -mapped;
        file->_flags |= _IO_ERR_SEEN;
        return false;
    }
    errno = 0;
    moved = (store ? store_part : load_part)(part.iov_base, part_bytes, file);
    rounds->error = errno;
    rounds->done += moved;
    rounds->in_vain = moved ? 0 : rounds->in_vain + 1;
    if (moved == part_bytes)
        return true;
    if (rounds->error != EFAULT || had_error || !ferror(file) || rounds->in_vain > ROUNDS_MAX)
        return false;
    clearerr(file);
    return true;
}

/* In parts: small ones first, since who reads may come to the end. Returns the number of whole items. */
static size_t move(void *buffer, size_t size, size_t count, FILE *file, bool store)
{
    size_t length_bytes = size * count, part_bytes = FIRST_BYTES, left;
    struct rounds rounds = {0};
    int saved_errno = errno;
    bool more = true;

    flockfile(file);
    while (more && (left = length_bytes - rounds.done)) {
        more = move_part(&rounds, buffer, left < part_bytes ? left : part_bytes, file, store);
        part_bytes = part_bytes < ASKED_BYTES ? 2 * part_bytes : ASKED_BYTES;
    }
    funlockfile(file);
    errno = rounds.done < length_bytes && rounds.error ? rounds.error : saved_errno;
    return rounds.done / size;
}

static bool is_in_window(const void *buffer, size_t size, size_t count)
{
    struct iovec part = {(void *)buffer, 1};

    return size && count && count <= SSIZE_MAX / size && buffers_in_window(&part, 1);
}

/* --- the replacements ---------------------------------------------------------------------------------------------- */

static size_t our_fread(void *buffer, size_t size, size_t count, FILE *file)
{
    return is_in_window(buffer, size, count) ? move(buffer, size, count, file, true)
                                             : fread(buffer, size, count, file);
}

static size_t our_fwrite(const void *buffer, size_t size, size_t count, FILE *file)
{
    return is_in_window(buffer, size, count) ? move((void *)buffer, size, count, file, false)
                                             : fwrite(buffer, size, count, file);
}

static size_t our_fread_unlocked(void *buffer, size_t size, size_t count, FILE *file)
{
    return is_in_window(buffer, size, count) ? move(buffer, size, count, file, true)
                                             : fread_unlocked(buffer, size, count, file);
}

static size_t our_fwrite_unlocked(const void *buffer, size_t size, size_t count, FILE *file)
{
    return is_in_window(buffer, size, count) ? move((void *)buffer, size, count, file, false)
                                             : fwrite_unlocked(buffer, size, count, file);
}

/* With _FORTIFY_SOURCE. They end the process where the items are more than `bytes`, as the libc's own do. */

extern size_t __fread_chk(void *buffer, size_t bytes, size_t size, size_t count, FILE *file);
extern size_t __fread_unlocked_chk(void *buffer, size_t bytes, size_t size, size_t count, FILE *file);

static size_t our_fread_chk(void *buffer, size_t bytes, size_t size, size_t count, FILE *file)
{
    return is_in_window(buffer, size, count) && size * count <= bytes ? move(buffer, size, count, file, true)
                                                                      : __fread_chk(buffer, bytes, size, count, file);
}

static size_t our_fread_unlocked_chk(void *buffer, size_t bytes, size_t size, size_t count, FILE *file)
{
    return is_in_window(buffer, size, count) && size * count <= bytes
               ? move(buffer, size, count, file, true)
               : __fread_unlocked_chk(buffer, bytes, size, count, file);
}

#define REPLACES(name, function) {name, (void (*)(void))(function)}

const struct replacement stdio_replacements[] = {
    REPLACES("fread", our_fread),
    REPLACES("fread_unlocked", our_fread_unlocked),
    REPLACES("__fread_chk", our_fread_chk),
    REPLACES("__fread_unlocked_chk", our_fread_unlocked_chk),
    REPLACES("fwrite", our_fwrite),
    REPLACES("fwrite_unlocked", our_fwrite_unlocked),
    {NULL, NULL},
};
