/* Interposition: a process that runs already calls our functions in the place of the libc's.
 *
 * A call of a libc function goes through a slot of the caller's global offset table, which the loader fills. The slots
 * of all loaded objects that stand for one of our names are given our functions. This object's own slots stay: what our
 * functions call, and what the pager calls, is the libc's. So are the slots that lead somewhere else (a library that has
 * a function of that name for its own use).
 *
 * What is loaded later gets into use by dlsym(): whoever has called dlopen() asks for a function next. So dlsym is
 * interposed too, and looks first whether the loader has loaded anything since. (dlopen itself must see who calls it, by
 * the return address: it looks for libraries where that object's RPATH says.) dlsym also gives our functions to who asks
 * for the libc's by name, as ctypes does. It is a jump in front of the libc's dlsym, for the return address again.
 *
 * Slots are written under the loader's lock, which is held by dlopen() from beginning to end: no object is half loaded,
 * or about to be unmapped, and the loader changes no protection. The lock has no name outside the libc, but dlsym()
 * holds it while it runs the resolver of an indirect function; ours does the work.
 *
 * Nothing is taken back: without a window all of it costs one comparison a call.
 */

#include "system_calls.h"

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <string.h>

#if defined(__x86_64__)
enum { RELOCATION_JUMP_SLOT = R_X86_64_JUMP_SLOT, RELOCATION_GLOB_DAT = R_X86_64_GLOB_DAT };
#elif defined(__aarch64__)
enum { RELOCATION_JUMP_SLOT = R_AARCH64_JUMP_SLOT, RELOCATION_GLOB_DAT = R_AARCH64_GLOB_DAT };
#endif

typedef _Atomic(void *) slot;

/* A name, what stands for it here, and the functions whose place that may take: as this object finds it, and the
 * libc's own, where something is loaded in front of that. */
static struct interposed {
    const char *name;
    void *ours;
    void *found;
    void *libc;
} interposed[64];
static size_t interposed_count;

/* --- objects ------------------------------------------------------------------------------------------------------ */

/* What there is to know of a loaded object. */
struct object {
    uintptr_t base;
    uintptr_t begin, end;              /* its memory */
    uintptr_t relro_begin, relro_end;  /* of which this has been made read-only; whole pages */
    const ElfW(Sym) *symbols;
    const char *strings;
    const ElfW(Rela) *tables[2]; /* DT_RELA, DT_JMPREL */
    size_t counts[2];
    bool open; /* the read-only part is writable at the moment */
};

/* The loader has added the base in place, but where it may not write. */
static uintptr_t address_in(const struct object *object, ElfW(Addr) value)
{
    return value < object->base ? value + object->base : value;
}

static void read_dynamic(struct object *object, const ElfW(Dyn) *dynamic)
{
    for (; dynamic->d_tag != DT_NULL; dynamic++)
        switch (dynamic->d_tag) {
        case DT_SYMTAB:
            object->symbols = (const ElfW(Sym) *)address_in(object, dynamic->d_un.d_ptr);
            break;
        case DT_STRTAB:
            object->strings = (const char *)address_in(object, dynamic->d_un.d_ptr);
            break;
        case DT_RELA:
            object->tables[0] = (const ElfW(Rela) *)address_in(object, dynamic->d_un.d_ptr);
            break;
        case DT_RELASZ:
            object->counts[0] = dynamic->d_un.d_val / sizeof(ElfW(Rela));
            break;
        case DT_JMPREL:
            object->tables[1] = (const ElfW(Rela) *)address_in(object, dynamic->d_un.d_ptr);
            break;
        case DT_PLTRELSZ:
            object->counts[1] = dynamic->d_un.d_val / sizeof(ElfW(Rela));
            break;
        default:
            break;
        }
}

static void read_headers(struct object *object, const struct dl_phdr_info *info)
{
    const uintptr_t page_mask = ~(uintptr_t)(page_size_bytes() - 1);
    const ElfW(Dyn) *dynamic = NULL;

    *object = (struct object){.base = info->dlpi_addr, .begin = UINTPTR_MAX};
    for (size_t i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *header = &info->dlpi_phdr[i];
        uintptr_t begin = info->dlpi_addr + header->p_vaddr, end = begin + header->p_memsz;

        if (header->p_type == PT_LOAD) {
            object->begin = begin < object->begin ? begin : object->begin;
            object->end = end > object->end ? end : object->end;
        } else if (header->p_type == PT_GNU_RELRO) {
            object->relro_begin = begin & page_mask;
            object->relro_end = end & page_mask;
        } else if (header->p_type == PT_DYNAMIC) {
            dynamic = (const ElfW(Dyn) *)begin;
        }
    }
    if (dynamic)
        read_dynamic(object, dynamic);
}

static bool has_address(const struct object *object, const void *address)
{
    return (uintptr_t)address >= object->begin && (uintptr_t)address < object->end;
}

/* --- slots -------------------------------------------------------------------------------------------------------- */

static const struct interposed *find(const char *name)
{
    for (size_t i = 0; i < interposed_count; i++)
        if (interposed[i].name[0] == name[0] && !strcmp(interposed[i].name, name))
            return &interposed[i];
    return NULL;
}

static bool protect_relro(struct object *object, int protection)
{
    return !mprotect((void *)object->relro_begin, object->relro_end - object->relro_begin, protection);
}

static void write_slot(struct object *object, slot *at, void *function)
{
    bool read_only = (uintptr_t)at >= object->relro_begin && (uintptr_t)at < object->relro_end;

    if (read_only && !object->open && !(object->open = protect_relro(object, PROT_READ | PROT_WRITE)))
        return;
    atomic_store(at, function);
}

/* Whether what is in the slot is the function of that name; or, in a jump slot that has not been used yet, the way to
 * the loader, which is in the object itself. */
static bool is_replaceable(const struct object *object, const struct interposed *name, void *value, bool jump)
{
    return value && value != name->ours &&
           (value == name->found || value == name->libc || (jump && has_address(object, value)));
}

static void patch_relocation(struct object *object, const ElfW(Rela) *relocation)
{
    const unsigned type = ELF64_R_TYPE(relocation->r_info);
    const ElfW(Sym) *symbol = &object->symbols[ELF64_R_SYM(relocation->r_info)];
    const struct interposed *name;
    slot *at = (slot *)(object->base + relocation->r_offset);

    if ((type != RELOCATION_JUMP_SLOT && type != RELOCATION_GLOB_DAT) || symbol->st_shndx != SHN_UNDEF)
        return;
    name = find(object->strings + symbol->st_name);
    if (name && is_replaceable(object, name, atomic_load(at), type == RELOCATION_JUMP_SLOT))
        write_slot(object, at, name->ours);
}

static void patch_object(struct object *object)
{
    if (!object->symbols || !object->strings)
        return;
    for (size_t table = 0; table < 2; table++)
        for (size_t i = 0; object->tables[table] && i < object->counts[table]; i++)
            patch_relocation(object, &object->tables[table][i]);
    if (object->open)
        protect_relro(object, PROT_READ);
}

/* --- all that is loaded ------------------------------------------------------------------------------------------- */

/* What the loader had loaded and unloaded, in all, when everything was patched; and how many objects that were, which
 * it goes over in the order in which they came. */
static _Atomic uint64_t seen_loads;
static uint64_t seen_unloads;
static size_t seen_objects;

struct pass {
    size_t objects;
    size_t skip;
    uint64_t loads, unloads;
};

static int patch_one(struct dl_phdr_info *info, size_t size, void *data)
{
    struct pass *pass = data;
    struct object object;

    (void)size;
    if (!pass->objects++) {
        pass->loads = info->dlpi_adds;
        pass->unloads = info->dlpi_subs;
        pass->skip = pass->unloads == seen_unloads ? seen_objects : 0;
    }
    if (pass->objects <= pass->skip)
        return 0;
    read_headers(&object, info);
    if (!has_address(&object, &interposed)) /* not this object */
        patch_object(&object);
    return 0;
}

/* Under the loader's lock. */
static void patch_all(void)
{
    struct pass pass = {0};

    dl_iterate_phdr(patch_one, &pass);
    seen_objects = pass.objects;
    seen_unloads = pass.unloads;
    atomic_store(&seen_loads, pass.loads);
}

static int read_loads(struct dl_phdr_info *info, size_t size, void *loads)
{
    (void)size;
    *(uint64_t *)loads = info->dlpi_adds;
    return 1;
}

static bool has_loaded(void)
{
    uint64_t loads = 0;

    dl_iterate_phdr(read_loads, &loads);
    return loads != atomic_load(&seen_loads);
}

static void nothing(void)
{
}

static void (*resolve(void))(void)
{
    if (interposed_count)
        patch_all();
    return nothing;
}

/* Called by nobody: asking dlsym() for it is what runs resolve(). */
__attribute__((visibility("default"), ifunc("resolve"))) void dax_mp_patch_all(void);

static void *this_object; /* a handle */

static void patch_under_lock(void)
{
    if (this_object)
        dlsym(this_object, "dax_mp_patch_all");
}

/* --- dlsym -------------------------------------------------------------------------------------------------------- */

extern void dax_mp_dlsym(void) __attribute__((visibility("hidden")));
void *dax_mp_dlsym_first(void *handle, const char *name) __attribute__((visibility("hidden")));
void *(*dax_mp_libc_dlsym)(void *, const char *) __attribute__((visibility("hidden"))) = dlsym;

/* What is done before the libc's dlsym(). NULL: that is to be asked; else the answer. Who asks for what comes next
 * (RTLD_NEXT) is in front of the libc, and is not to get what is in front of it again. */
void *dax_mp_dlsym_first(void *handle, const char *name)
{
    const struct interposed *found;
    void *function;

    if (has_loaded())
        patch_under_lock();
    found = name && handle != RTLD_NEXT ? find(name) : NULL;
    function = found ? dlsym(handle, name) : NULL;
    return function && (function == found->found || function == found->libc) ? found->ours : NULL;
}

#if defined(__x86_64__)
__asm__(".text\n"
        ".p2align 4\n"
        ".hidden dax_mp_dlsym\n"
        ".globl dax_mp_dlsym\n"
        ".type dax_mp_dlsym, @function\n"
        "dax_mp_dlsym:\n"
        ".cfi_startproc\n"
        "    endbr64\n"
        "    push %rdi\n"
        ".cfi_adjust_cfa_offset 8\n"
        "    push %rsi\n"
        ".cfi_adjust_cfa_offset 8\n"
        "    sub $8, %rsp\n"
        ".cfi_adjust_cfa_offset 8\n"
        "    call dax_mp_dlsym_first\n"
        "    add $8, %rsp\n"
        ".cfi_adjust_cfa_offset -8\n"
        "    pop %rsi\n"
        ".cfi_adjust_cfa_offset -8\n"
        "    pop %rdi\n"
        ".cfi_adjust_cfa_offset -8\n"
        "    test %rax, %rax\n"
        "    jnz 1f\n"
        "    jmp *dax_mp_libc_dlsym(%rip)\n"
        "1:  ret\n"
        ".cfi_endproc\n"
        ".size dax_mp_dlsym, . - dax_mp_dlsym\n");
#elif defined(__aarch64__)
__asm__(".text\n"
        ".p2align 4\n"
        ".hidden dax_mp_dlsym\n"
        ".globl dax_mp_dlsym\n"
        ".type dax_mp_dlsym, %function\n"
        "dax_mp_dlsym:\n"
        ".cfi_startproc\n"
        "    hint #34\n" /* bti c */
        "    stp x29, x30, [sp, #-32]!\n"
        ".cfi_def_cfa_offset 32\n"
        ".cfi_offset 29, -32\n"
        ".cfi_offset 30, -24\n"
        "    stp x0, x1, [sp, #16]\n"
        "    bl dax_mp_dlsym_first\n"
        "    mov x16, x0\n"
        "    ldp x0, x1, [sp, #16]\n"
        "    ldp x29, x30, [sp], #32\n"
        ".cfi_restore 30\n"
        ".cfi_restore 29\n"
        ".cfi_def_cfa_offset 0\n"
        "    cbz x16, 1f\n"
        "    mov x0, x16\n"
        "    ret\n"
        "1:  adrp x16, dax_mp_libc_dlsym\n"
        "    ldr x16, [x16, #:lo12:dax_mp_libc_dlsym]\n"
        "    br x16\n"
        ".cfi_endproc\n"
        ".size dax_mp_dlsym, . - dax_mp_dlsym\n");
#endif

/* --- the beginning ------------------------------------------------------------------------------------------------ */

/* A name that the libc does not have is left out. */
static void add(void *libc, const char *name, void (*ours)(void))
{
    struct interposed *next = &interposed[interposed_count];

    *next = (struct interposed){name, (void *)ours, dlsym(RTLD_DEFAULT, name), libc ? dlsym(libc, name) : NULL};
    if (next->found && interposed_count + 1 < sizeof interposed / sizeof *interposed)
        interposed_count++;
}

static void add_all(void *libc, const struct replacement *replacements)
{
    for (; replacements->name; replacements++)
        add(libc, replacements->name, replacements->function);
}

static int find_names(void)
{
    void *libc = dlopen("libc.so.6", RTLD_LAZY | RTLD_NOLOAD);
    Dl_info info;

    if (dladdr(&interposed, &info) && info.dli_fname)
        this_object = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (!this_object)
        return ENOTSUP;
    add_all(libc, file_replacements);
    add_all(libc, socket_replacements);
    add_all(libc, stdio_replacements);
    add_all(libc, memory_replacements);
    add(libc, "dlsym", dax_mp_dlsym);
    return 0;
}

static _Atomic bool are_interposed;

bool system_calls_are_interposed(void)
{
    return atomic_load(&are_interposed);
}

int system_calls_interpose(void)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    int error = 0;

    pthread_mutex_lock(&lock);
    if (!interposed_count) {
        error = buffers_init();
        if (!error)
            error = find_names();
    }
    pthread_mutex_unlock(&lock);
    if (!error) {
        patch_under_lock();
        atomic_store(&are_interposed, true);
    }
    return error;
}
