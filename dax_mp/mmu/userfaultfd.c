/* The second way for faults to arrive: userfaultfd(2), where threads block signals or handle SIGSEGV themselves.
 *
 * Unmapped memory of a window is private anonymous memory that may be accessed as the window may, registered with the
 * process's descriptor. An access to it makes the thread sleep in the kernel, whatever signals it blocks; a thread of
 * ours reads who it is and where, and posts the fault to the window's pager. What the pager maps over the page is not
 * registered, and UFFDIO_WAKE lets the thread go on.
 *
 * No access may slip through. What is mapped is replaced by unmapped memory in one step: memory that was registered
 * elsewhere beforehand is moved over it by mremap(MREMAP_FIXED), and stays registered because the descriptor asks to be
 * told (UFFD_FEATURE_EVENT_REMAP; mremap_userfaultfd_prep() in fs/userfaultfd.c). Threads that fault meanwhile wait for
 * mmap_lock, and find the registered memory. To map over the page and register it then would leave a moment in which a
 * load reads zeroes and a store is lost. mremap returns when the event has been read: by a thread that waits for
 * nothing but events and the coordinator's socket. The pager's thread could not read it, since it is the one that moves.
 *
 * What may be read and not stored to is zeroes (I5: only holes are mapped with less than the VMA may do). They are put
 * into the unmapped memory itself, write-protected in the same step (UFFDIO_COPY_MODE_WP): PROT_READ would be a SIGSEGV.
 * They are pages of this process's own, so only some are mapped around a fault, and a window that has many drops them.
 */

#include "userfaultfd.h"

#include "pager.h"
#include "system_calls.h"
#include "thread.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef UFFD_FEATURE_EXACT_ADDRESS
#define UFFD_FEATURE_EXACT_ADDRESS (1 << 11)
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

static const uint64_t FEATURES = UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_THREAD_ID | UFFD_FEATURE_PAGEFAULT_FLAG_WP;
static const uint64_t MODES = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP;
static const uint64_t IOCTLS = 1ull << _UFFDIO_WAKE | 1ull << _UFFDIO_COPY | 1ull << _UFFDIO_WRITEPROTECT;
enum { ZEROES_BYTES = 2 << 20 };

static pthread_mutex_t start_lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic int descriptor = -1;
static bool serves_kernel;
static int pagemap_fd = -1;
static const uint64_t PAGE_PRESENT = 1ull << 63, PAGE_IS_PROTECTED = 1ull << 57;
static const char *zeroes;

/* --- the descriptor ------------------------------------------------------------------------------------------------- */

static int open_device(void)
{
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC), opened;

    if (device < 0)
        return -1;
    opened = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    close(device);
    return opened;
}

/* One that serves system calls too, where the process may have it. -1 with errno. */
static int open_for_kernel(void)
{
    int opened = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

    return opened < 0 ? open_device() : opened;
}

/* Interposed system calls (system_calls.c) must hear of a missing page by EFAULT: a fault of the kernel's that has
 * nothing to map ends on a scratch page, and the call says that it has moved zeroes. -1 with errno. */
static int open_descriptor(bool *kernel_too)
{
    int opened = system_calls_are_interposed() ? -1 : open_for_kernel();

    *kernel_too = opened >= 0;
    return opened < 0 ? (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY) : opened;
}

static int agree(int fd)
{
    struct uffdio_api api = {.api = UFFD_API, .features = FEATURES | UFFD_FEATURE_EXACT_ADDRESS};

    if (!ioctl(fd, UFFDIO_API, &api))
        return 0;
    api = (struct uffdio_api){.api = UFFD_API, .features = FEATURES}; /* before Linux 5.18: the page's address */
    if (ioctl(fd, UFFDIO_API, &api))
        return errno == EINVAL ? ENOTSUP : errno;
    return 0;
}

static int register_memory(int fd, void *address, uint64_t length_bytes)
{
    struct uffdio_register memory = {.range = {(uintptr_t)address, length_bytes}, .mode = MODES};

    if (ioctl(fd, UFFDIO_REGISTER, &memory))
        return errno == EINVAL ? ENOTSUP : errno;
    return (memory.ioctls & IOCTLS) == IOCTLS ? 0 : ENOTSUP;
}

bool verdicts_wanted(void)
{
    return atomic_load_explicit(&descriptor, memory_order_relaxed) >= 0;
}

bool userfaultfd_serves_kernel(void)
{
    return serves_kernel;
}

/* --- unmapped memory ------------------------------------------------------------------------------------------------ */

int userfaultfd_arm(void *address, uint64_t length_bytes, int prot)
{
    int error = register_memory(atomic_load(&descriptor), address, length_bytes);

    if (!error && mprotect(address, length_bytes, prot))
        error = errno;
    return error;
}

int userfaultfd_take_out(void *address, uint64_t length_bytes, int prot)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *aside = mmap(NULL, length_bytes, prot, flags, -1, 0);
    int error = aside == MAP_FAILED ? errno : 0;

    if (error)
        return error;
    if (madvise(aside, length_bytes, MADV_DONTFORK))
        error = errno;
    if (!error)
        error = register_memory(atomic_load(&descriptor), aside, length_bytes);
    if (!error && mremap(aside, length_bytes, length_bytes, MREMAP_MAYMOVE | MREMAP_FIXED, address) == MAP_FAILED)
        error = errno;
    if (error)
        munmap(aside, length_bytes);
    return error;
}

/* 0, and how many bytes; or an errno. EEXIST: something is mapped at `address`. */
static int copy_zeroes(uintptr_t address, uint64_t length_bytes, uint64_t *copied)
{
    struct uffdio_copy copy = {
        .dst = address,
        .src = (uintptr_t)zeroes,
        .len = length_bytes,
        .mode = UFFDIO_COPY_MODE_WP | UFFDIO_COPY_MODE_DONTWAKE,
    };
    int error;

    do
        error = ioctl(atomic_load(&descriptor), UFFDIO_COPY, &copy) ? errno : 0;
    while (error == EAGAIN && copy.copy <= 0); /* a move of another window is under way */
    *copied = copy.copy > 0 ? (uint64_t)copy.copy : 0;
    return *copied ? 0 : error;
}

int userfaultfd_map_zeroes(void *address, uint64_t length_bytes, uint64_t *mapped)
{
    uint64_t page_size = page_size_bytes(), copied = 0;
    int error = copy_zeroes((uintptr_t)address, page_size, &copied);

    *mapped = copied;
    if (error)
        return error == EEXIST ? 0 : error;
    while (*mapped < length_bytes) { /* the rest as far as it is unmapped: nobody has asked for it */
        uint64_t rest = length_bytes - *mapped < ZEROES_BYTES ? length_bytes - *mapped : ZEROES_BYTES;

        if (copy_zeroes((uintptr_t)address + *mapped, rest, &copied))
            break;
        *mapped += copied;
    }
    return 0;
}

void userfaultfd_wake(uintptr_t address, uint64_t length_bytes)
{
    struct uffdio_range range = {address, length_bytes};

    ioctl(atomic_load(&descriptor), UFFDIO_WAKE, &range);
}

/* --- system calls ---------------------------------------------------------------------------------------------------- */

static bool is_present(uintptr_t address, bool store)
{
    uint64_t entry = 0;

    if (pread(pagemap_fd, &entry, sizeof entry, (off_t)(address / page_size_bytes() * sizeof entry)) != sizeof entry)
        return false;
    return entry & PAGE_PRESENT && !(store && entry & PAGE_IS_PROTECTED);
}

size_t userfaultfd_present_bytes(const void *buffer, size_t count, bool store)
{
    uintptr_t start = (uintptr_t)buffer, at = start, end = start + count;

    if (!serves_kernel)
        return count;
    while (at < end) {
        const struct window *window = window_at(at);

        if (window && window->by_userfaultfd && !is_present(at, store))
            return at - start;
        at += page_size_bytes() - at % page_size_bytes();
    }
    return count;
}

/* --- faults --------------------------------------------------------------------------------------------------------- */

/* Each thread that waits, but for moments: one that a signal interrupts comes again. */
static pthread_mutex_t waiting_lock = PTHREAD_MUTEX_INITIALIZER;
static struct fault *waiting;

static uintptr_t page_at(const struct fault *fault)
{
    return fault->address & ~(uintptr_t)(page_size_bytes() - 1);
}

/* False: the same thread waits for the same already; it was interrupted by a signal. */
static bool enlist(struct fault *fault)
{
    struct fault *other;

    pthread_mutex_lock(&waiting_lock);
    for (other = waiting; other; other = other->next_waiting)
        if (other->tid == fault->tid && page_at(other) == page_at(fault) && other->write == fault->write)
            break;
    if (!other) {
        fault->next_waiting = waiting;
        waiting = fault;
    }
    pthread_mutex_unlock(&waiting_lock);
    return !other;
}

static void release(struct fault *fault)
{
    struct fault **link = &waiting;

    pthread_mutex_lock(&waiting_lock);
    while (*link != fault)
        link = &(*link)->next_waiting;
    *link = fault->next_waiting;
    pthread_mutex_unlock(&waiting_lock);
    userfaultfd_wake(page_at(fault), page_size_bytes()); /* behind the list: what comes again is a new one */
    free(fault);
}

void userfaultfd_answer(struct fault *fault)
{
    release(fault);
}

void userfaultfd_fail(struct fault *fault, int error)
{
    bool asleep;

    fault->error = error;
    if (!verdict_send(fault, &asleep) && asleep)
        bus_error_elsewhere(fault);
    release(fault);
}

/* --- the thread ----------------------------------------------------------------------------------------------------- */

static void fill_in(struct fault *fault, struct window *window)
{
    fault->window = window;
    fault->serial = atomic_load(&window->serial);
    fault->vma_id = window->vma_id;
    fault->pgoff = window->pgoff + (fault->address - window->base) / page_size_bytes();
    fault->as_write = fault->write && !window->is_private;
}

static void on_page_fault(const struct uffd_msg *event)
{
    uintptr_t address = (uintptr_t)event->arg.pagefault.address;
    struct window *window = window_at(address);
    bool write = event->arg.pagefault.flags & (UFFD_PAGEFAULT_FLAG_WRITE | UFFD_PAGEFAULT_FLAG_WP);
    struct fault *fault = window || closed_at(address) ? calloc(1, sizeof *fault) : NULL;
    bool asleep;

    if (!fault) { /* given back meanwhile, or no memory: it comes again, if it is still there */
        userfaultfd_wake(address & ~(uintptr_t)(page_size_bytes() - 1), page_size_bytes());
        return;
    }
    *fault = (struct fault){
        .address = address,
        .tid = (pid_t)event->arg.pagefault.feat.ptid,
        .kind = write ? FAULT_WRITE : FAULT_READ,
        .write = write,
    };
    if (window)
        fill_in(fault, window);
    if (!enlist(fault))
        free(fault);
    else if (window && guard_covers(fault->tid, address) && verdict_send(fault, &asleep))
        release(fault);
    else if (window)
        pager_post(window->pager, fault);
    else
        userfaultfd_fail(fault, ESTALE);
}

static _Atomic bool reading;

void userfaultfd_await_reader(void)
{
    while (atomic_load(&reading))
        sched_yield();
}

static void *run(void *unused)
{
    struct pollfd readable = {.fd = atomic_load(&descriptor), .events = POLLIN};
    struct uffd_msg event;

    (void)unused;
    for (;;) {
        poll(&readable, 1, -1);
        while (read(readable.fd, &event, sizeof event) == sizeof event)
            if (event.event == UFFD_EVENT_PAGEFAULT) {
                atomic_store(&reading, true);
                on_page_fault(&event);
                atomic_store(&reading, false);
            }
    }
    return NULL;
}

/* --- life ----------------------------------------------------------------------------------------------------------- */

static int make_zeroes(void)
{
    void *made = zeroes ? (void *)zeroes
                        : mmap(NULL, ZEROES_BYTES, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (made == MAP_FAILED)
        return errno;
    zeroes = made;
    return 0;
}

/* Whether memory can be registered as it has to be. */
static int try_out(int fd)
{
    uint64_t page_size = page_size_bytes();
    void *page = mmap(NULL, page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    int error = page == MAP_FAILED ? errno : register_memory(fd, page, page_size);

    if (page != MAP_FAILED)
        munmap(page, page_size);
    return error;
}

static int open_pagemap(void)
{
    if (pagemap_fd >= 0)
        close(pagemap_fd); /* it shows the memory of the process that opened it */
    pagemap_fd = serves_kernel ? open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC) : -1;
    return serves_kernel && pagemap_fd < 0 ? errno : 0;
}

static int start(void)
{
    pthread_t thread;
    int fd = open_descriptor(&serves_kernel);
    int error = fd < 0 ? errno : agree(fd);

    if (!error)
        error = open_pagemap();
    if (!error)
        error = make_zeroes();
    if (!error)
        error = try_out(fd);
    if (!error) {
        atomic_store(&descriptor, fd);
        error = thread_start(&thread, "dax-faults", run, NULL);
    }
    if (!error) {
        pthread_detach(thread);
    } else if (fd >= 0) {
        atomic_store(&descriptor, -1);
        close(fd);
    }
    return error;
}

int userfaultfd_start(void)
{
    int error;

    pthread_mutex_lock(&start_lock);
    error = atomic_load(&descriptor) < 0 ? start() : 0;
    pthread_mutex_unlock(&start_lock);
    return error;
}

int userfaultfd_after_fork_in_child(bool wanted)
{
    int fd = atomic_exchange(&descriptor, -1);

    if (fd >= 0)
        close(fd);
    waiting = NULL; /* those of the parent */
    pthread_mutex_init(&waiting_lock, NULL);
    pthread_mutex_init(&start_lock, NULL);
    atomic_store(&reading, false);
    verdicts_after_fork_in_child();
    guards_after_fork_in_child();
    return fd >= 0 && wanted ? userfaultfd_start() : 0;
}
