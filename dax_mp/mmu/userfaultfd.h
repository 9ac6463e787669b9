/* Faults that arrive through userfaultfd(2): userfaultfd.c, and of threads whose access failed: verdict.c. */

#ifndef DAX_MP_USERFAULTFD_H
#define DAX_MP_USERFAULTFD_H

#include "mmu.h"

#include <signal.h>

/* --- the descriptor and its thread -------------------------------------------------------------------------------- */

/* Opens the descriptor and starts the thread that reads it, once. 0 or an errno: EPERM where the process may not have
 * one (a seccomp filter), ENOSYS where the kernel has none, ENOTSUP where it lacks what is needed (Linux 6.4 has it). */
int userfaultfd_start(void);
/* Whether system calls that meet an unmapped page wait for it too; else they fail with EFAULT. After the start. */
bool userfaultfd_serves_kernel(void);
/* How much of a buffer a system call can use, for a store into it if `store`, without waiting for a page. */
size_t userfaultfd_present_bytes(const void *buffer, size_t count, bool store);
/* In the child of a fork: the descriptor shows the parent's memory, and the thread is not here. `wanted`: there are
 * windows here whose faults are to arrive so. 0 or an errno. */
int userfaultfd_after_fork_in_child(bool wanted);

/* --- unmapped memory ------------------------------------------------------------------------------------------------ */

/* Makes reserved memory, which nobody accesses yet, unmapped memory that may be accessed so. 0 or an errno. */
int userfaultfd_arm(void *address, uint64_t length_bytes, int prot);
/* Puts unmapped memory in the place of what is mapped, in one atomic step. Not from the descriptor's own thread. */
int userfaultfd_take_out(void *address, uint64_t length_bytes, int prot);
/* Maps zeroes over the page at `address`, and over unmapped pages behind it up to `length_bytes`, so that a store to
 * one is a fault. What is there already stays. Safe in a signal handler. `*mapped`: bytes. 0 or an errno: ENOENT where
 * something else than unmapped memory is there. */
int userfaultfd_map_zeroes(void *address, uint64_t length_bytes, uint64_t *mapped);
/* Lets the threads go on that wait for a page of the range. Takes no lock. */
void userfaultfd_wake(uintptr_t address, uint64_t length_bytes);

/* --- faults --------------------------------------------------------------------------------------------------------- */

/* Returns when the descriptor's thread works on no window that it found before. */
void userfaultfd_await_reader(void);
/* Answers a fault of the descriptor's thread, and frees it. */
void userfaultfd_answer(struct fault *fault);
void userfaultfd_fail(struct fault *fault, int error);

/* --- verdicts (verdict.c) ------------------------------------------------------------------------------------------- */

/* Tells the thread that sleeps in `fault` that it failed: by a SIGBUS that only our handler understands. False: that
 * thread does not take it now. `*asleep`: it sleeps there all the same. */
bool verdict_send(const struct fault *fault, bool *asleep);
/* In the handler of SIGBUS. True: `info` is a verdict, and `fault` holds it; `*applies`: for the instruction that was
 * interrupted. */
bool verdict_take(const siginfo_t *info, const void *context, struct fault *fault, bool *applies);
/* Whether any thread of this process may be sent one. */
bool verdicts_wanted(void);
void verdicts_after_fork_in_child(void);

#endif
