/* Guarded accesses: those of the Window type's own methods.
 *
 * Their code is here, so they can be left: where one touches a page that is not mapped, the handler leaves it by
 * siglongjmp(), and the method asks the pager and waits outside of the handler, with the GIL given up (access.c). Then
 * it repeats what it was at. Nothing is put in the place of a page that cannot be had, so no store is lost unseen.
 *
 * Only a fault on the memory that the access is for leaves it: a signal handler of the program that interrupts it and
 * touches another window is not jumped out of.
 */

#include "mmu.h"

#include <setjmp.h>
#include <string.h>

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

void guard_leave(uintptr_t address, const struct fault *fault)
{
    struct guard *mine = guard;
    const char *at = (const char *)address;

    if (!mine || !(is_in(at, mine->piece->to, mine->piece->to_step, mine->piece->count) ||
                   is_in(at, mine->piece->from, mine->piece->from_step, mine->piece->count)))
        return;
    *mine->left = *fault;
    mine->left->raw = false;
    siglongjmp(mine->here, 1);
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

bool guarded_access(const struct piece *piece, struct fault *left)
{
    struct guard mine = {.piece = piece, .left = left};

    if (sigsetjmp(mine.here, 0)) {
        guard = NULL;
        return false;
    }
    guard = &mine;
    atomic_signal_fence(memory_order_seq_cst);
    access_piece(piece);
    atomic_signal_fence(memory_order_seq_cst);
    guard = NULL;
    return true;
}
