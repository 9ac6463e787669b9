/* Guarded accesses: those of the Window type's own methods.
 *
 * Their code is here, so they can be left: where one touches a page that is not mapped, the handler leaves it by
 * siglongjmp(), and the method asks the pager and waits outside of the handler, with the GIL given up (window_access.c). Then
 * it repeats what it was at. Nothing is put in the place of a page that cannot be had, so no store is lost unseen.
 *
 * Only a fault on the memory that the access is for leaves it: a signal handler of the program that interrupts it and
 * touches another window is not jumped out of.
 *
 * Where faults arrive through userfaultfd(2), threads in guarded accesses are listed, so that the thread that reads them
 * can have one left at once (verdict.c), and they let SIGBUS in, by which it does.
 */

#include "mmu.h"

#include "userfaultfd.h"

#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

enum { LISTED_MAX = 64 };

static struct listed {
    _Atomic pid_t tid; /* 0: free; written last */
    const struct piece *piece;
} listed[LISTED_MAX];

struct guard {
    sigjmp_buf here;
    const struct piece *piece;
    struct fault *left;
};

/* volatile: the handler reads it in the middle of an access. initial-exec: it may not make the loader allocate. */
static _Thread_local __attribute__((tls_model("initial-exec"))) struct guard *volatile guard;

/* --- in the signal handler ---------------------------------------------------------------------------------------- */

static bool is_in(const char *address, const char *first, ptrdiff_t step, size_t count)
{
    const char *last = first + step * (ptrdiff_t)(count - 1);

    return step < 0 ? address >= last && address <= first : address >= first && address <= last;
}

static bool is_of(const struct piece *piece, const char *at)
{
    return is_in(at, piece->to, piece->to_step, piece->count) || is_in(at, piece->from, piece->from_step, piece->count);
}

void guard_leave(uintptr_t address, const struct fault *fault)
{
    struct guard *mine = guard;
    const char *at = (const char *)address;

    if (!mine || !is_of(mine->piece, at))
        return;
    *mine->left = *fault;
    mine->left->raw = false;
    siglongjmp(mine->here, 1);
}

/* --- the list ----------------------------------------------------------------------------------------------------- */

bool guard_covers(pid_t tid, uintptr_t address)
{
    for (size_t i = 0; i < LISTED_MAX; i++)
        if (atomic_load(&listed[i].tid) == tid)
            return is_of(listed[i].piece, (const char *)address);
    return false;
}

void guards_after_fork_in_child(void)
{
    for (size_t i = 0; i < LISTED_MAX; i++)
        atomic_store(&listed[i].tid, 0);
}

/* NULL: the list is full, and the thread waits in the kernel. */
static struct listed *list(const struct piece *piece)
{
    static _Thread_local pid_t pid, tid; /* of the process, since a fork's child is another thread */

    if (pid != getpid()) {
        pid = getpid();
        tid = gettid();
    }
    for (size_t i = 0; i < LISTED_MAX; i++) {
        pid_t none = 0;

        if (atomic_compare_exchange_strong(&listed[i].tid, &none, -1)) {
            listed[i].piece = piece;
            atomic_store(&listed[i].tid, tid);
            return &listed[i];
        }
    }
    return NULL;
}

static void delist(struct listed *entry)
{
    if (entry)
        atomic_store(&entry->tid, 0);
}

/* A thread that blocks SIGBUS could not be told that its access failed (verdict.c). True: it did. */
static bool accept_verdicts(void)
{
    sigset_t set, old;

    sigemptyset(&set);
    sigaddset(&set, SIGBUS);
    return !pthread_sigmask(SIG_UNBLOCK, &set, &old) && sigismember(&old, SIGBUS) == 1;
}

static void refuse_verdicts(void)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGBUS);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
}

/* --- accesses ----------------------------------------------------------------------------------------------------- */

static void touch(const struct piece *piece)
{
    char *byte = piece->to, *end = piece->to + piece->count;
    uint64_t page_size = page_size_bytes();

    for (; byte < end; byte += page_size - (uintptr_t)byte % page_size)
        if (piece->kind == PIECE_TOUCH_TO_STORE)
            __atomic_fetch_or((unsigned char *)byte, 0, __ATOMIC_RELAXED);
        else
            (void)*(volatile char *)byte;
}

__attribute__((noinline)) void access_piece(const struct piece *piece)
{
    if (piece->kind != PIECE_COPY)
        touch(piece);
    else if (piece->to_step == 1 && piece->from_step == 1)
        memmove(piece->to, piece->from, piece->count);
    else
        for (ptrdiff_t i = 0; i < (ptrdiff_t)piece->count; i++) /* a step past the last byte may be no address at all */
            *(volatile char *)(piece->to + i * piece->to_step) =
                *(const volatile char *)(piece->from + i * piece->from_step);
}

/* The first byte of the piece in the page of `address`. A processor that moves many bytes by one instruction may stop at
 * any of them. */
static uintptr_t first_in_page(const struct piece *piece, uintptr_t address)
{
    uintptr_t page = address - address % page_size_bytes();
    uintptr_t to = (uintptr_t)piece->to, from = (uintptr_t)piece->from;
    uintptr_t first = address >= to && address - to < piece->count ? to : from;

    if (piece->to_step != 1 || piece->from_step != 1)
        return address;
    return page > first ? page : first;
}

static bool guarded_here(const struct piece *piece, struct fault *left)
{
    struct guard mine = {.piece = piece, .left = left};

    if (sigsetjmp(mine.here, 0)) {
        guard = NULL;
        left->address = first_in_page(piece, left->address);
        return false;
    }
    guard = &mine;
    atomic_signal_fence(memory_order_seq_cst);
    access_piece(piece);
    atomic_signal_fence(memory_order_seq_cst);
    guard = NULL;
    return true;
}

bool guarded_access(const struct piece *piece, struct fault *left)
{
    struct listed *entry;
    bool done, refused;

    if (!verdicts_wanted())
        return guarded_here(piece, left);
    entry = list(piece);
    refused = accept_verdicts();
    done = guarded_here(piece, left);
    if (refused)
        refuse_verdicts();
    delist(entry);
    return done;
}
