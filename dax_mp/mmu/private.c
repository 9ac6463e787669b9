/* Private windows: MAP_PRIVATE of a file here.
 *
 * The region's frames are mapped MAP_PRIVATE and writable, so that the kernel itself copies a page when it is stored
 * to, at memory speed and without a word to anybody. What the coordinator orders then concerns the pages that are no
 * copies, and only a truncate drops copies as well (even_cows, unmap_mapping_range() in mm/memory.c).
 *
 * Which pages are copies says /proc/self/pagemap: present or swapped out, and not a page of a file (bit 61;
 * Documentation/admin-guide/mm/pagemap.rst). So that this holds for holes too, what they are read from is a file: a
 * memfd of zeroes, of which a page of the file shows the one at its offset modulo the memfd's size.
 *
 * To drop what lies between copies by mapping over it would make two VMAs of each copy, and there may be more copies
 * than a process may have VMAs. From Linux 6.15 on guard regions do it (MADV_GUARD_INSTALL): the pages' entries in the
 * page table say that an access is a SIGSEGV, and the VMA stays whole.
 *
 * A file in many pieces takes a VMA for each of them all the same. Where VMAs run out, copies are gathered: those of
 * some pages are put into memory of their own, one VMA with guards between them, which then takes their place.
 *
 * A store of another thread could make a copy between the look and the deed. So the range is first made inaccessible:
 * after mprotect(PROT_NONE) no copy comes up, and none is lost by it. Who touches the range meanwhile faults, asks the
 * coordinator, and finds the copy in its place, because a Map leaves copies alone.
 */

#include "mmu.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { ENTRIES = 512, ZEROES_BYTES = 2 << 20 };
static const uint64_t PAGE_PRESENT = 1ull << 63, PAGE_SWAPPED = 1ull << 62, PAGE_OF_FILE = 1ull << 61;
static const uint64_t PAGE_IS_GUARD = 1ull << 58;
#ifndef MADV_GUARD_INSTALL
enum { MADV_GUARD_INSTALL = 102 };
#endif

static int pagemap_fd = -1;
static int zeroes_fd = -1;
static int mem_fd = -1; /* reads what is inaccessible, too */
static bool has_guards;

static int open_pagemap(void)
{
    return open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
}

static int open_mem(void)
{
    return open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
}

static int make_zeroes(void)
{
    int fd = memfd_create("dax-mp-zeroes", MFD_CLOEXEC | MFD_ALLOW_SEALING);

    if (fd < 0)
        return -1;
    if (ftruncate(fd, ZEROES_BYTES) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)) {
        close(fd);
        return -1;
    }
    return fd;
}

static bool is_copy(uint64_t entry)
{
    return entry & (PAGE_PRESENT | PAGE_SWAPPED) && !(entry & (PAGE_OF_FILE | PAGE_IS_GUARD));
}

/* Reads the entries of `count` pages. False: not to be told. */
static bool read_pagemap(uintptr_t address, size_t count, uint64_t *entries)
{
    off_t offset = (off_t)(address / page_size_bytes() * sizeof *entries);

    return pread(pagemap_fd, entries, count * sizeof *entries, offset) == (ssize_t)(count * sizeof *entries);
}

/* Whether the kernel has guard regions, for memory of files too, and tells them in pagemap: all since 6.15. */
static bool can_guard(void)
{
    uint64_t page_size = page_size_bytes(), entry = 0;
    void *page = mmap(NULL, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, zeroes_fd, 0);

    if (page == MAP_FAILED)
        return false;
    if (!madvise(page, page_size, MADV_GUARD_INSTALL))
        read_pagemap((uintptr_t)page, 1, &entry);
    munmap(page, page_size);
    return entry & PAGE_IS_GUARD;
}

int private_init(void)
{
    if (pagemap_fd < 0)
        pagemap_fd = open_pagemap();
    if (pagemap_fd < 0)
        return ENOTSUP;
    if (zeroes_fd < 0) {
        zeroes_fd = make_zeroes();
        has_guards = zeroes_fd >= 0 && can_guard();
        mem_fd = has_guards ? open_mem() : -1;
    }
    return zeroes_fd < 0 ? errno : 0;
}

/* The descriptors show the address space of the process that opened them. */
void private_after_fork_in_child(void)
{
    if (pagemap_fd < 0)
        return;
    close(pagemap_fd);
    pagemap_fd = open_pagemap();
    if (mem_fd < 0)
        return;
    close(mem_fd);
    mem_fd = open_mem();
}

bool private_is_copy(uintptr_t address)
{
    uint64_t entry;

    return read_pagemap(address, 1, &entry) && is_copy(entry);
}

int private_open(uintptr_t address, int prot)
{
    return mprotect((void *)address, page_size_bytes(), prot) ? errno : 0;
}

/* What is done to a run of pages that are no copies. */
struct deed {
    bool map;    /* else drop */
    bool gather; /* and leave few VMAs */
    int prot;    /* of copies, and of what is mapped */
    uintptr_t start;
    int fd;
    uint64_t offset_bytes;
    uint64_t *mappings;
};

static int map_zeroes(uintptr_t address, uint64_t length_bytes, const struct deed *deed, uint64_t offset_bytes)
{
    while (length_bytes) {
        uint64_t within = offset_bytes % ZEROES_BYTES;
        uint64_t piece = ZEROES_BYTES - within < length_bytes ? ZEROES_BYTES - within : length_bytes;

        if (mmap((void *)address, piece, deed->prot, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, zeroes_fd,
                 (off_t)within) == MAP_FAILED)
            return errno;
        ++*deed->mappings;
        address += piece;
        offset_bytes += piece;
        length_bytes -= piece;
    }
    return 0;
}

static int do_run(const struct deed *deed, uintptr_t address, uint64_t length_bytes)
{
    uint64_t offset_bytes = deed->offset_bytes + (address - deed->start);
    int flags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE;

    if (!deed->map)
        return mmap((void *)address, length_bytes, PROT_NONE, flags | MAP_ANONYMOUS, -1, 0) == MAP_FAILED ? errno : 0;
    if (deed->fd < 0)
        return map_zeroes(address, length_bytes, deed, offset_bytes);
    if (mmap((void *)address, length_bytes, deed->prot, flags, deed->fd, (off_t)offset_bytes) == MAP_FAILED)
        return errno;
    ++*deed->mappings;
    return 0;
}

static bool any_copy(const uint64_t *entries, size_t count)
{
    size_t i = 0;

    while (i < count && !is_copy(entries[i]))
        i++;
    return i < count;
}

/* Puts a guard in the place of each run that is no copy in a range of up to ENTRIES pages, and makes all of them
 * accessible again, as the VMA that they were. */
static int guard_chunk(uintptr_t address, size_t count, const uint64_t *entries, int prot)
{
    uint64_t page_size = page_size_bytes();

    for (size_t first = 0, end; first < count; first = end) {
        bool copies = is_copy(entries[first]);

        for (end = first + 1; end < count && is_copy(entries[end]) == copies; end++)
            continue;
        if (!copies && madvise((void *)(address + first * page_size), (end - first) * page_size, MADV_GUARD_INSTALL))
            return errno;
    }
    return mprotect((void *)address, count * page_size, prot) ? errno : 0;
}

static int read_copies(char *to, uintptr_t address, uint64_t length_bytes)
{
    return pread(mem_fd, to, length_bytes, (off_t)address) == (ssize_t)length_bytes ? 0 : EIO;
}

/* Moves memory to another place, over what is there. mremap() unmaps that before it moves; should it fail after that,
 * the copies would be where nobody finds them. */
static int move_over(char *from, uintptr_t to, size_t count)
{
    uint64_t entries[ENTRIES], length_bytes = count * page_size_bytes();
    int error;

    if (mremap(from, length_bytes, length_bytes, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)to) != MAP_FAILED)
        return 0;
    error = errno;
    if (read_pagemap(to, count, entries) && any_copy(entries, count))
        return error;
    fprintf(stderr, "dax_mp: private copies cannot be moved: %s\n", strerror(error));
    abort();
}

/* Puts memory with the copies, and guards where there is none, in the place of a range of up to ENTRIES pages. */
static int gather_chunk(uintptr_t address, size_t count, const uint64_t *entries, int prot)
{
    uint64_t page_size = page_size_bytes(), length_bytes = count * page_size;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    char *gathered = mmap(NULL, length_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    int error = 0;

    if (gathered == MAP_FAILED)
        return errno;
    for (size_t first = 0, end; first < count && !error; first = end) {
        uint64_t start = first * page_size;
        bool copies = is_copy(entries[first]);

        for (end = first + 1; end < count && is_copy(entries[end]) == copies; end++)
            continue;
        if (copies)
            error = read_copies(gathered + start, address + start, (end - first) * page_size);
        else if (madvise(gathered + start, (end - first) * page_size, MADV_GUARD_INSTALL))
            error = errno;
    }
    if (!error && mprotect(gathered, length_bytes, prot))
        error = errno;
    if (!error)
        error = move_over(gathered, address, count);
    if (error)
        munmap(gathered, length_bytes);
    return error;
}

static bool drop_between_copies(const struct deed *deed, uintptr_t address, size_t count, const uint64_t *entries)
{
    if (deed->gather && mem_fd >= 0 && !gather_chunk(address, count, entries, deed->prot))
        return true;
    return !guard_chunk(address, count, entries, deed->prot);
}

/* Does it to every run that is no copy in a range of up to ENTRIES pages, and makes the copies accessible again. */
static int do_chunk(const struct deed *deed, uintptr_t address, size_t count)
{
    uint64_t entries[ENTRIES];
    uint64_t page_size = page_size_bytes();
    int error = 0;

    if (!read_pagemap(address, count, entries))
        return EIO;
    if (!deed->map && has_guards && any_copy(entries, count) && drop_between_copies(deed, address, count, entries))
        return 0;
    for (size_t first = 0, end; first < count && !error; first = end) {
        bool copies = is_copy(entries[first]);

        for (end = first + 1; end < count && is_copy(entries[end]) == copies; end++)
            continue;
        if (!copies)
            error = do_run(deed, address + first * page_size, (end - first) * page_size);
        else if (mprotect((void *)(address + first * page_size), (end - first) * page_size, deed->prot))
            error = errno;
    }
    return error;
}

/* An error may leave copies inaccessible: an access to one then faults, and the next Map puts that right. */
static int do_all(const struct deed *deed, uint64_t length_bytes)
{
    uint64_t page_size = page_size_bytes(), chunk_bytes = ENTRIES * page_size;
    uintptr_t address = deed->start, end = deed->start + length_bytes;
    int error = mprotect((void *)address, length_bytes, PROT_NONE) ? errno : 0;

    for (; address < end && !error; address += chunk_bytes)
        error = do_chunk(deed, address, (end - address < chunk_bytes ? end - address : chunk_bytes) / page_size);
    return error;
}

int private_map(uintptr_t address, uint64_t length_bytes, int prot, int fd, uint64_t offset_bytes, uint64_t *mappings)
{
    struct deed deed = {
        .map = true,
        .prot = prot,
        .start = address,
        .fd = fd,
        .offset_bytes = offset_bytes,
        .mappings = mappings,
    };

    return do_all(&deed, length_bytes);
}

int private_unmap(uintptr_t address, uint64_t length_bytes, int prot, bool gather)
{
    return do_all(&(struct deed){.start = address, .prot = prot, .gather = gather}, length_bytes);
}
