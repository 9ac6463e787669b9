/* Threads that are in a `with bus_errors()` block: who gets the failed accesses of threads that are not Python's.
 *
 * A pool of a native library computes for a thread that has called into it. Which one that is, the pool's threads do not
 * tell. A thread that is in such a block has said that it wants to hear of them. The faulting thread itself leaves the
 * failure there, in the signal handler, so that it is there before the call returns; where several threads are in a
 * block, with each, since any of them may be the one.
 *
 * A watch has one word for its state and for which use of it this is. A handler writes to one only between its steps
 * from OPEN to WRITING and on to FAILED, so the thread that closes it waits for that moment at most.
 */

#include "bus_error.h"

#include <sched.h>

enum { WATCHES = 1024, STATE_BITS = 2, STATE_MASK = 3 };
enum state { CLOSED, OPEN, WRITING, FAILED };

static struct watch {
    _Atomic uint64_t word; /* the number of its use, and the state */
    unsigned long thread;
    size_t depth; /* blocks in blocks */
    struct bus_error failure;
} watches[WATCHES];

static _Atomic size_t watches_end; /* none from here on has ever been open */

static uint64_t use_of(uint64_t word)
{
    return word >> STATE_BITS;
}

/* The word, once nobody writes to the watch. */
static uint64_t settled(struct watch *watch)
{
    uint64_t word;

    while (((word = atomic_load(&watch->word)) & STATE_MASK) == WRITING)
        sched_yield();
    return word;
}

static struct watch *watch_of(unsigned long thread)
{
    size_t end = atomic_load(&watches_end);

    for (size_t i = 0; i < end; i++)
        if ((atomic_load(&watches[i].word) & STATE_MASK) != CLOSED && watches[i].thread == thread)
            return &watches[i];
    return NULL;
}

static struct watch *free_watch(void)
{
    for (size_t i = 0; i < WATCHES; i++)
        if ((atomic_load(&watches[i].word) & STATE_MASK) == CLOSED)
            return &watches[i];
    return NULL;
}

bool watch_begin(unsigned long thread, struct watched *watched)
{
    struct watch *watch = watch_of(thread);

    if (!watch && (watch = free_watch())) {
        watch->thread = thread;
        watch->depth = 0;
        if (atomic_load(&watches_end) <= (size_t)(watch - watches))
            atomic_store(&watches_end, (size_t)(watch - watches) + 1);
        atomic_store(&watch->word, (use_of(atomic_load(&watch->word)) + 1) << STATE_BITS | OPEN);
    }
    if (!watch)
        return false;
    watch->depth++;
    *watched = (struct watched){watch, use_of(atomic_load(&watch->word))};
    return true;
}

static bool take(struct watch *watch, struct bus_error *failure)
{
    uint64_t word = settled(watch);

    if ((word & STATE_MASK) != FAILED)
        return false;
    *failure = watch->failure;
    atomic_store(&watch->word, use_of(word) << STATE_BITS | OPEN);
    return true;
}

bool watch_take(unsigned long thread, struct bus_error *failure)
{
    struct watch *watch = watch_of(thread);

    return watch && take(watch, failure);
}

bool watch_end(const struct watched *watched, struct bus_error *failure)
{
    struct watch *watch = watched->watch;
    uint64_t open = watched->use << STATE_BITS | OPEN;
    bool failed;

    if (use_of(atomic_load(&watch->word)) != watched->use || (settled(watch) & STATE_MASK) == CLOSED)
        return false; /* a fork's child has closed it */
    failed = take(watch, failure);
    if (--watch->depth)
        return failed;
    while (!atomic_compare_exchange_strong(&watch->word, &open, watched->use << STATE_BITS | CLOSED)) {
        open = watched->use << STATE_BITS | OPEN;
        failed |= take(watch, failure); /* one that came just now */
    }
    return failed;
}

bool watches_note(const struct bus_error *failure)
{
    size_t end = atomic_load(&watches_end);
    bool noted = false;

    for (size_t i = 0; i < end; i++) {
        uint64_t word = atomic_load(&watches[i].word);

        noted |= (word & STATE_MASK) != CLOSED; /* one that has a failure already raises that one */
        if ((word & STATE_MASK) != OPEN || !atomic_compare_exchange_strong(&watches[i].word, &word, word + 1))
            continue;
        watches[i].failure = *failure;
        atomic_store(&watches[i].word, word - OPEN + FAILED);
    }
    return noted;
}

void watches_after_fork_in_child(unsigned long thread)
{
    for (size_t i = 0; i < WATCHES; i++) {
        uint64_t word = atomic_load(&watches[i].word);

        if ((word & STATE_MASK) == WRITING) /* by a thread that is not here */
            atomic_store(&watches[i].word, use_of(word) << STATE_BITS | OPEN);
        if (watches[i].thread != thread)
            atomic_store(&watches[i].word, use_of(word) << STATE_BITS | CLOSED);
    }
}
