/* mprotect(2), for memory of windows.
 *
 * What the kernel would be told holds until the next fault, when the pager maps the page again. So the window is told
 * (protection.c), whoever calls: C code, or Python by ctypes. Memory of no window is the kernel's alone.
 */

#include "system_calls.h"

static int our_mprotect(void *address, size_t length_bytes, int prot)
{
    uintptr_t begin = (uintptr_t)address;
    int error = windows_near() ? window_protect(begin, length_bytes, prot) : -1;

    if (error < 0)
        return mprotect(address, length_bytes, prot);
    if (error)
        errno = error;
    return error ? -1 : 0;
}

const struct replacement memory_replacements[] = {
    {"mprotect", (void (*)(void))our_mprotect},
    {NULL, NULL},
};
