/* What the three files about pagers share: pager.c, fault_queue.c, orders.c. */

#ifndef DAX_MP_PAGER_H
#define DAX_MP_PAGER_H

#include "mmu.h"
#include "wire.h"

/* Sends a message from a faulting thread. What is to answer it comes never when the connection is gone; the pager thread
 * sees that too, and seals. False: the coordinator has not read what was sent before, and nothing was sent. */
bool pager_try_to_send(struct pager *pager, enum message_type type, const uint64_t *fields, size_t count);
/* The same from the pager's thread, which waits. */
void pager_send(struct pager *pager, enum message_type type, const uint64_t *fields, size_t count);

/* Drops all translations of the pager's windows. Takes windows_lock() itself. */
void pager_drop_all(struct pager *pager);

/* --- the queue of faults (fault_queue.c), on the pager's thread or when there is none ----------------------------- */

/* Takes the fault that an answer is for; NULL when it has been answered. */
struct fault *pager_take_fault(struct pager *pager, uint64_t id);
/* Answers a fault: `error` 0 lets its instruction run again. It is its thread's again, and may be gone. */
void fault_answer(struct fault *fault, int error);
/* Posts a fault of a thread that sleeps in the kernel. It is answered, or failed, later or at once. */
void pager_post(struct pager *pager, struct fault *fault);
/* Fails a fault; there is nothing to map at [pgoff, pgoff + length_pages). */
void fault_fail(struct pager *pager, struct fault *fault, int error, uint64_t pgoff, uint64_t length_pages);
/* Stops serving. What waits and what comes fails with `error`, or with what was there before. */
void pager_seal(struct pager *pager, int error);
/* The same in the child of a fork, where nothing waits. */
void pager_seal_after_fork(struct pager *pager);

/* --- what the coordinator orders (orders.c) ----------------------------------------------------------------------- */

/* Acts on a message. 0, or EPROTO for one that it may not send now. */
int pager_obey(struct pager *pager, const struct message *message);

#endif
