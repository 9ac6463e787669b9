/* A context is a pointer into one copy of libzmq, so the functions that use it must be of that same copy. pyzmq's
 * wheel brings its own, under a name with a hash in it; pyzmq's extension module is linked to it, and dlsym() on that
 * module's handle searches what it is linked to. So there is no name to guess, and no header and no system package
 * are needed.
 */

#include "libzmq.h"

#include <dlfcn.h>
#include <string.h>

static const char *load_function(void *library, const char *name, void *function)
{
    void *symbol = dlsym(library, name);

    if (!symbol)
        return dlerror();
    memcpy(function, &symbol, sizeof symbol); /* ISO C has no conversion from object to function pointer */
    return NULL;
}

const char *libzmq_load(struct libzmq *zmq, const char *path)
{
    const struct {
        const char *name;
        void *function;
    } functions[] = {
        {"zmq_socket", &zmq->socket},         {"zmq_close", &zmq->close},
        {"zmq_connect", &zmq->connect},       {"zmq_setsockopt", &zmq->setsockopt},
        {"zmq_getsockopt", &zmq->getsockopt}, {"zmq_send", &zmq->send},
        {"zmq_recv", &zmq->recv},             {"zmq_errno", &zmq->error},
    };
    void *library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    const char *missing = NULL;

    if (!library)
        library = dlopen(path, RTLD_LAZY);
    if (!library)
        return dlerror();
    /* The handle stays open: the functions are used for as long as the process lives. */
    for (size_t i = 0; i < sizeof functions / sizeof *functions && !missing; i++)
        missing = load_function(library, functions[i].name, functions[i].function);
    return missing;
}
