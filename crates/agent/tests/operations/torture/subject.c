/* A process that does one thing to its address space all the time and checks, all the time, that
 * its memory holds what it wrote there.
 *
 *   subject MODE SEED [ANSWERED]
 *
 * It prints "ready", then works in rounds. For each line on standard input it prints "right N"
 * after a round that began after the line came. Whatever is not as it must be is printed as
 * "wrong: ..." and ends the process with status 3. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8 };

#define MADV_POPULATE_READ_ 22
#define MADV_POPULATE_WRITE_ 23
#define MADV_COLLAPSE_ 25

static const char *mode;
static char **arguments;
static uint64_t seed;
static unsigned long answered;
static int due; /* An answer, at the end of this round. */

static void wrong(const char *format, ...) {
    char line[400] = "wrong: ";
    int at = (int)strlen(line);
    va_list list;
    va_start(list, format);
    at += vsnprintf(line + at, sizeof line - at - 32, format, list);
    va_end(list);
    at += snprintf(line + at, 32, " (mode %.10s, process %d)\n", mode, getpid());
    if (write(1, line, at) < 0) {}
    syscall(SYS_exit_group, 3);
}

#define MUST(what)                                                                             \
    do {                                                                                       \
        if (!(what)) wrong("line %d: %s: %s", __LINE__, #what, strerror(errno));               \
    } while (0)

/* --- randomness and patterns --- */

static uint64_t mix(uint64_t x) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static __thread uint64_t state;

static uint64_t random_word(void) {
    if (!state) state = mix(seed ^ (uint64_t)syscall(SYS_gettid) << 20 ^ (uint64_t)time(NULL));
    return mix(state += 0x9e3779b97f4a7c15u);
}

static uint64_t below(uint64_t n) { return random_word() % n; }

/* What word `i` of a page holds; an eighth of them is like nothing else. */
static uint64_t pattern(uint64_t id, uint64_t page, uint32_t version, unsigned i) {
    uint64_t of_page = mix(seed ^ id << 48 ^ page << 24 ^ version);
    return i % 8 ? (of_page & 0xff00ff) | (uint64_t)version << 32 : mix(of_page + i);
}

static void write_page(void *at, uint64_t id, uint64_t page, uint32_t version) {
    volatile uint64_t *words = at;
    for (unsigned i = 0; i < WORDS; i++) words[i] = version ? pattern(id, page, version, i) : 0;
}

/* The index of the first word that differs, or -1. */
static int find_difference(const void *at, uint64_t id, uint64_t page, uint32_t version) {
    const volatile uint64_t *words = at;
    for (unsigned i = 0; i < WORDS; i++)
        if (words[i] != (version ? pattern(id, page, version, i) : 0)) return (int)i;
    return -1;
}

/* --- arenas: memory that knows what it holds --- */

struct arena {
    char *base;
    uint64_t id;
    size_t pages;
    uint32_t *versions; /* by page; 0 for zeros */
};

static char *map(size_t pages, int protection, int flags) {
    char *at = mmap(NULL, pages * PAGE, protection, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    MUST(at != MAP_FAILED);
    return at;
}

static struct arena arena_at(char *base, size_t pages, size_t room) {
    static uint64_t next = 1;
    struct arena a = {base, next++, pages, calloc(room, sizeof(uint32_t))};
    return a;
}

static void check(struct arena *a, size_t page) {
    int at = find_difference(a->base + page * PAGE, a->id, page, a->versions[page]);
    if (at >= 0)
        wrong("arena %lu at %p: page %zu of %zu, version %u, word %d: %lx", a->id, a->base, page,
              a->pages, a->versions[page], at,
              ((uint64_t *)(a->base + page * PAGE))[at]);
}

static void renew(struct arena *a, size_t page) {
    uint32_t version = (uint32_t)random_word() | 1;
    write_page(a->base + page * PAGE, a->id, page, version);
    a->versions[page] = version;
}

static void check_all(struct arena *a) {
    for (size_t page = 0; page < a->pages; page++) check(a, page);
}

static void fill(struct arena *a) {
    for (size_t page = 0; page < a->pages; page++) renew(a, page);
}

/* Checks some pages and changes half of them. */
static void touch(struct arena *a, int times) {
    while (times--) {
        size_t page = below(a->pages);
        check(a, page);
        if (below(2)) renew(a, page);
    }
}

static struct arena common;

static void some_range(struct arena *a, size_t *from, size_t *pages) {
    *from = below(a->pages);
    *pages = 1 + below(a->pages - *from < 24 ? a->pages - *from : 24);
}

static void expect_success(pid_t child) {
    int status;
    pid_t ended;
    do ended = waitpid(child, &status, 0);
    while (ended < 0 && errno == EINTR);
    MUST(ended == child);
    if (!WIFEXITED(status) || WEXITSTATUS(status)) wrong("a child ended with %x", status);
}

/* --- fork --- */

static void round_fork(void) {
    pid_t child = fork();
    MUST(child >= 0);
    if (!child) {
        state = 0;
        check_all(&common);
        touch(&common, 64);
        if (!below(4)) round_fork();
        check_all(&common);
        _exit(0);
    }
    touch(&common, 64);
    expect_success(child);
}

/* --- exec: of children, and of itself --- */

static void round_exec(void) {
    char number[32], seeds[32];
    snprintf(seeds, sizeof seeds, "%lu", seed);
    snprintf(number, sizeof number, "%lu", answered);
    if (due || below(8)) {
        pid_t child = fork();
        MUST(child >= 0);
        if (!child) {
            execl("/proc/self/exe", "subject", "once", seeds, NULL);
            _exit(4);
        }
        touch(&common, 32);
        expect_success(child);
    } else {
        check_all(&common);
        execl("/proc/self/exe", "subject", mode, seeds, number, NULL);
        wrong("exec: %s", strerror(errno));
    }
}

/* --- a tree of processes that live on --- */

enum { CHILDREN = 3 };
static struct { pid_t pid; int ask, answer; } children[CHILDREN];

static void child_life(int ask, int answer, int depth) {
    struct arena own = arena_at(map(128, PROT_READ | PROT_WRITE, 0), 128, 128);
    pid_t grandchild = 0;
    int down[2], up[2];
    char byte;
    state = 0;
    fill(&own);
    if (depth) {
        MUST(!pipe(down) && !pipe(up) && (grandchild = fork()) >= 0);
        if (!grandchild) {
            close(down[1]);
            close(up[0]);
            child_life(down[0], up[1], depth - 1);
        }
        close(down[0]);
        close(up[1]);
    }
    for (;;) {
        struct pollfd ready = {ask, POLLIN, 0};
        touch(&own, 8);
        touch(&common, 8);
        if (poll(&ready, 1, 1) <= 0) continue;
        if (read(ask, &byte, 1) != 1) break;
        check_all(&own);
        check_all(&common);
        if (grandchild) MUST(write(down[1], &byte, 1) == 1 && read(up[0], &byte, 1) == 1);
        MUST(write(answer, &byte, 1) == 1);
    }
    if (grandchild) {
        close(down[1]);
        expect_success(grandchild);
    }
    _exit(0);
}

static void bear(int n) {
    int down[2], up[2];
    MUST(!pipe2(down, O_CLOEXEC) && !pipe2(up, O_CLOEXEC));
    children[n].pid = fork();
    MUST(children[n].pid >= 0);
    if (!children[n].pid) {
        close(down[1]);
        close(up[0]);
        for (int other = 0; other < n; other++) close(children[other].ask);
        for (int other = n + 1; other < CHILDREN; other++)
            if (children[other].pid) close(children[other].ask);
        child_life(down[0], up[1], n == 0);
    }
    close(down[0]);
    close(up[1]);
    children[n].ask = down[1];
    children[n].answer = up[0];
}

static void set_up_tree(void) {
    for (int n = 0; n < CHILDREN; n++) bear(n);
}

static void round_tree(void) {
    char byte = 'x';
    for (int n = 0; n < CHILDREN; n++) MUST(write(children[n].ask, &byte, 1) == 1);
    touch(&common, 32);
    for (int n = 0; n < CHILDREN; n++) MUST(read(children[n].answer, &byte, 1) == 1);
    if (!below(8)) {
        int n = (int)below(CHILDREN);
        close(children[n].ask);
        expect_success(children[n].pid);
        close(children[n].answer);
        children[n].pid = 0;
        bear(n);
    }
}

/* --- threads --- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void *short_life(void *argument) {
    char frames[16 * PAGE];
    uint64_t id = 1000 + (uint64_t)argument;
    for (int n = 0; n < 16; n++) write_page(frames + n * PAGE, id, n, 7);
    pthread_mutex_lock(&lock);
    touch(&common, 16);
    pthread_mutex_unlock(&lock);
    if (below(2)) usleep(below(2000));
    for (int n = 0; n < 16; n++)
        if (find_difference(frames + n * PAGE, id, n, 7) >= 0) wrong("a thread's stack");
    return argument;
}

static void round_threads(void) {
    pthread_t threads[6];
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 256 << 10);
    for (uint64_t n = 0; n < 6; n++)
        MUST(!pthread_create(&threads[n], &small, short_life, (void *)n));
    pthread_mutex_lock(&lock);
    touch(&common, 16);
    pthread_mutex_unlock(&lock);
    for (uint64_t n = 0; n < 6; n++) {
        void *result;
        MUST(!pthread_join(threads[n], &result) && result == (void *)n);
    }
}

/* --- mremap --- */

enum { MOVING = 6, ROOM = 160 };
static struct arena moving[MOVING];

static void set_up_mremap(void) {
    for (int n = 0; n < MOVING; n++) {
        size_t pages = 32 + below(64);
        moving[n] = arena_at(map(pages, PROT_READ | PROT_WRITE, 0), pages, ROOM);
        fill(&moving[n]);
    }
}

/* While a userfaultfd is being released, two mappings that belong together can be two for the
 * kernel for a moment, and mremap says EFAULT. */
static char *move(char *at, size_t old, size_t new, int flags, char *to) {
    for (int n = 0;; n++) {
        char *got = mremap(at, old * PAGE, new * PAGE, flags, to);
        if (got != MAP_FAILED || errno != EFAULT || n == 100) return got;
        usleep(1000);
    }
}

static void round_mremap(void) {
    struct arena *a = &moving[below(MOVING)];
    size_t pages = 16 + below(ROOM - 16);
    char *at, *target;
    switch (below(4)) {
    case 0: /* grow or shrink, and move if need be */
        at = move(a->base, a->pages, pages, MREMAP_MAYMOVE, NULL);
        MUST(at != MAP_FAILED);
        break;
    case 1: /* onto something else */
        target = map(ROOM, PROT_READ | PROT_WRITE, 0);
        memset(target, 0x5a, ROOM * PAGE);
        at = move(a->base, a->pages, pages, MREMAP_MAYMOVE | MREMAP_FIXED, target);
        MUST(at == target && !munmap(target + pages * PAGE, (ROOM - pages) * PAGE));
        break;
    case 2: { /* leave an empty mapping behind */
        struct arena empty = *a;
        uint32_t none[ROOM] = {0};
        pages = a->pages;
        at = move(a->base, pages, pages, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
        MUST(at != MAP_FAILED);
        empty.versions = none;
        check_all(&empty);
        MUST(!munmap(empty.base, pages * PAGE));
        break;
    }
    default: /* one half of it, and back */
        pages = a->pages;
        target = map(pages, PROT_NONE, MAP_NORESERVE);
        at = move(a->base, pages / 2, pages / 2, MREMAP_MAYMOVE | MREMAP_FIXED, target);
        MUST(at == target);
        {
            struct arena half = *a;
            half.base = at;
            half.pages = pages / 2;
            touch(&half, 8);
        }
        target = move(at, pages / 2, pages / 2, MREMAP_MAYMOVE | MREMAP_FIXED, a->base);
        MUST(target == a->base && !munmap(at, pages * PAGE));
        at = a->base;
    }
    for (size_t page = a->pages; page < pages; page++) a->versions[page] = 0;
    a->base = at;
    a->pages = pages;
    touch(a, 8);
    check_all(a);
    touch(&common, 8);
}

/* --- munmap and mmap over what is there --- */

static struct arena holey;
static char *is_mapped;

/* Where the kernel, which looks from the top, puts nothing of its own accord: what it finds unmapped
 * in between would be mapped over. */
static char *const low = (char *)0x100000000000;

static void set_up_munmap(void) {
    char *at = mmap(low, 256 * PAGE, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    MUST(at == low);
    holey = arena_at(at, 256, 256);
    is_mapped = malloc(256);
    memset(is_mapped, 1, 256);
    fill(&holey);
}

static void round_munmap(void) {
    size_t from, pages;
    for (int times = 0; times < 4; times++) {
        some_range(&holey, &from, &pages);
        if (below(2)) {
            MUST(!munmap(holey.base + from * PAGE, pages * PAGE));
            memset(is_mapped + from, 0, pages);
        } else {
            char *at = holey.base + from * PAGE;
            char *got = mmap(at, pages * PAGE, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
            MUST(got == at);
            memset(is_mapped + from, 1, pages);
            for (size_t page = from; page < from + pages; page++) {
                holey.versions[page] = 0;
                if (below(2)) renew(&holey, page);
            }
        }
    }
    for (size_t page = 0; page < holey.pages; page++)
        if (is_mapped[page]) check(&holey, page);
    touch(&common, 8);
}

/* --- mprotect --- */

static struct arena guarded;
static int *protections;
static __thread sigjmp_buf *volatile escape;

static void on_fault(int signal) {
    if (!escape) wrong("signal %d", signal);
    siglongjmp(*escape, signal);
}

static void handle_faults(void) {
    struct sigaction action = {.sa_handler = on_fault, .sa_flags = SA_NODEFER};
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
}

static void set_up_mprotect(void) {
    guarded = arena_at(map(256, PROT_READ | PROT_WRITE, 0), 256, 256);
    protections = malloc(256 * sizeof(int));
    for (int n = 0; n < 256; n++) protections[n] = PROT_READ | PROT_WRITE;
    fill(&guarded);
}

/* Whether reading, or writing the word there again, raises a signal. */
static int faults(char *at, int writing) {
    sigjmp_buf here;
    volatile uint64_t *word = (uint64_t *)at;
    handle_faults();
    if (sigsetjmp(here, 1)) {
        escape = NULL;
        return 1;
    }
    escape = &here;
    uint64_t value = *word;
    if (writing) *word = value;
    escape = NULL;
    return 0;
}

static void round_mprotect(void) {
    static const int kinds[] = {PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE};
    size_t from, pages;
    int kind = kinds[below(3)];
    some_range(&guarded, &from, &pages);
    MUST(!mprotect(guarded.base + from * PAGE, pages * PAGE, kind));
    for (size_t page = from; page < from + pages; page++) protections[page] = kind;
    for (int times = 0; times < 32; times++) {
        size_t page = below(guarded.pages);
        char *at = guarded.base + page * PAGE;
        int reads = !faults(at, 0), writes = !faults(at, 1);
        if (reads != !!(protections[page] & PROT_READ) || writes != !!(protections[page] & PROT_WRITE))
            wrong("page %zu of protection %d: reads %d, writes %d", page, protections[page], reads, writes);
        if (reads) check(&guarded, page);
        if (writes && below(2)) renew(&guarded, page);
    }
    touch(&common, 8);
}

/* --- madvise --- */

static struct arena advised;

static void set_up_madvise(void) {
    char *at = map(2048, PROT_READ | PROT_WRITE, 0);
    at += -(uintptr_t)at & ((2 << 20) - 1);
    advised = arena_at(at, 1024, 1024);
    fill(&advised);
}

static void round_madvise(void) {
    static const int harmless[] = {
        MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_COLLAPSE_, MADV_COLD, MADV_PAGEOUT, MADV_WILLNEED,
        MADV_POPULATE_READ_, MADV_POPULATE_WRITE_, MADV_DONTDUMP, MADV_DODUMP, MADV_MERGEABLE,
        MADV_UNMERGEABLE,
    };
    size_t from, pages;
    some_range(&advised, &from, &pages);
    char *at = advised.base + from * PAGE;
    switch (below(4)) {
    case 0:
        MUST(!madvise(at, pages * PAGE, MADV_DONTNEED));
        memset(advised.versions + from, 0, pages * sizeof(uint32_t));
        break;
    case 1:
        MUST(!madvise(at, pages * PAGE, MADV_FREE));
        /* Until it is written to, each page may become zeros, and stays so. */
        for (size_t page = from; page < from + pages; page++) {
            char *of_page = advised.base + page * PAGE;
            char copy[PAGE];
            memcpy(copy, of_page, PAGE);
            if (find_difference(copy, advised.id, page, advised.versions[page]) >= 0 &&
                find_difference(copy, advised.id, page, 0) >= 0)
                wrong("a page given up by MADV_FREE holds something else");
            renew(&advised, page);
        }
        break;
    case 2: {
        int advice = harmless[below(sizeof harmless / sizeof *harmless)];
        if (advice == MADV_COLLAPSE_ || advice == MADV_HUGEPAGE) {
            from = 512 * below(2);
            pages = 512;
            at = advised.base + from * PAGE;
        }
        /* Some kernels lack some of these. */
        if (madvise(at, pages * PAGE, advice)) {}
        break;
    }
    default:
        for (size_t page = from; page < from + pages; page++) renew(&advised, page);
    }
    for (size_t page = from; page < from + pages; page++) check(&advised, page);
    touch(&advised, 64);
    if (!below(16)) check_all(&advised);
    touch(&common, 8);
}

/* --- what fork does to memory that was marked --- */

static void round_wipe(void) {
    struct arena wiped = arena_at(map(64, PROT_READ | PROT_WRITE, 0), 64, 64);
    struct arena kept = arena_at(map(64, PROT_READ | PROT_WRITE, 0), 64, 64);
    MUST(!madvise(wiped.base, 64 * PAGE, MADV_WIPEONFORK));
    MUST(!madvise(kept.base, 64 * PAGE, MADV_DONTFORK));
    fill(&wiped);
    fill(&kept);
    usleep(below(1000));
    pid_t child = fork();
    MUST(child >= 0);
    if (!child) {
        state = 0;
        memset(wiped.versions, 0, 64 * sizeof(uint32_t));
        check_all(&wiped);
        touch(&wiped, 16);
        if (!faults(kept.base, 0)) wrong("a child has memory that was not to be copied");
        check_all(&common);
        _exit(0);
    }
    check_all(&wiped);
    check_all(&kept);
    expect_success(child);
    munmap(wiped.base, 64 * PAGE);
    munmap(kept.base, 64 * PAGE);
    free(wiped.versions);
    free(kept.versions);
}

/* --- brk --- */

static struct arena heap;

static void set_up_brk(void) {
    /* Whole pages, and nothing of the C library's above. */
    uintptr_t end = (uintptr_t)sbrk(0);
    MUST(sbrk(-end & (PAGE - 1)) != (void *)-1);
    heap = arena_at(sbrk(0), 0, 512);
}

static void round_brk(void) {
    size_t pages = 16 + below(400);
    if (sbrk(0) != heap.base + heap.pages * PAGE) return;
    MUST(sbrk(((intptr_t)pages - (intptr_t)heap.pages) * PAGE) != (void *)-1);
    for (size_t page = heap.pages; page < pages; page++) heap.versions[page] = 0;
    heap.pages = pages;
    touch(&heap, 64);
    check_all(&heap);
    touch(&common, 8);
}

/* --- stacks that grow --- */

static void __attribute__((noinline)) descend(int depth) {
    char frame[PAGE];
    uint32_t version = (uint32_t)(depth + 1);
    write_page(frame, 2000, depth, version);
    if (depth) descend(depth - 1);
    else usleep(below(500));
    if (find_difference(frame, 2000, depth, version) >= 0) wrong("a frame at depth %d", depth);
}

static void round_stack(void) {
    descend((int)below(900));
    touch(&common, 8);
}

/* --- a debugger and its debuggee --- */

static pid_t debuggee;

static void set_up_debug(void) {
    debuggee = fork();
    MUST(debuggee >= 0);
    if (!debuggee) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;) {
            check_all(&common);
            usleep(300);
        }
    }
}

static void round_debug(void) {
    int status;
    usleep(2000);
    if (ptrace(PTRACE_SEIZE, debuggee, 0, 0)) {
        /* Somebody else traces it now: whoever takes its memory. */
        MUST(errno == EPERM);
        return;
    }
    MUST(!ptrace(PTRACE_INTERRUPT, debuggee, 0, 0));
    MUST(waitpid(debuggee, &status, __WALL) == debuggee && WIFSTOPPED(status));
    for (int times = 0; times < 32; times++) {
        size_t page = below(common.pages), word = below(WORDS);
        char *at = common.base + page * PAGE + word * 8;
        errno = 0;
        uint64_t value = (uint64_t)ptrace(PTRACE_PEEKDATA, debuggee, at, 0);
        /* A page that is not back yet; the kernel waits for it in process_vm_readv only. */
        struct iovec local = {&value, 8}, remote = {at, 8};
        if (errno == EIO) MUST(process_vm_readv(debuggee, &local, 1, &remote, 1, 0) == 8);
        else MUST(!errno);
        uint64_t expected = pattern(common.id, page, common.versions[page], (unsigned)word);
        if (value != expected) wrong("a debugger reads %lx for %lx", value, expected);
        MUST(!ptrace(PTRACE_POKEDATA, debuggee, at, value));
    }
    MUST(!ptrace(PTRACE_DETACH, debuggee, 0, 0));
}

/* --- core dumps --- */

static void round_core(void) {
    static const char marker[] = "what was in memory at the end %d";
    char *text = NULL, name[64];
    int status;
    char directory[] = "/tmp/medes-torture-XXXXXX";
    MUST(mkdtemp(directory));
    pid_t child = fork();
    MUST(child >= 0);
    if (!child) {
        struct rlimit all = {RLIM_INFINITY, RLIM_INFINITY};
        setrlimit(RLIMIT_CORE, &all);
        signal(SIGABRT, SIG_DFL);
        MUST(!chdir(directory));
        MUST(asprintf(&text, marker, getpid()) > 0);
        touch(&common, 8);
        abort();
    }
    do status = 0;
    while (waitpid(child, &status, 0) != child);
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGABRT) wrong("status %x, not SIGABRT", status);
    int found = 0;
    for (int with_pid = 0; with_pid < 2; with_pid++) {
        if (with_pid) snprintf(name, sizeof name, "%s/core.%d", directory, child);
        else snprintf(name, sizeof name, "%s/core", directory);
        int fd = open(name, O_RDONLY);
        if (fd < 0) continue;
        size_t size = (size_t)lseek(fd, 0, SEEK_END);
        char *core = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
        MUST(core != MAP_FAILED);
        MUST(asprintf(&text, marker, child) > 0);
        if (!memmem(core, size, text, strlen(text))) wrong("a core file without the last words");
        found = 1;
        munmap(core, size);
        free(text);
        close(fd);
        unlink(name);
    }
    (void)found; /* The host may send core files elsewhere. */
    rmdir(directory);
    touch(&common, 8);
}

/* --- signals and timers --- */

static atomic_ulong ticks, queued;
static struct arena constant;

static void on_tick(int signal) {
    (void)signal;
    int saved = errno;
    char frame[2 * PAGE];
    write_page(frame, 3000, 0, 5);
    for (int n = 0; n < 4; n++) check(&constant, mix(ticks + n) % constant.pages);
    if (find_difference(frame, 3000, 0, 5) >= 0) wrong("a handler's frame");
    atomic_fetch_add(&ticks, 1);
    errno = saved;
}

static void on_queued(int signal, siginfo_t *info, void *context) {
    (void)signal;
    (void)context;
    atomic_fetch_add(&queued, (unsigned long)info->si_value.sival_int);
}

static void set_up_signals(void) {
    constant = arena_at(map(128, PROT_READ | PROT_WRITE, 0), 128, 128);
    fill(&constant);
    MUST(!mprotect(constant.base, 128 * PAGE, PROT_READ));
    stack_t stack = {.ss_sp = map(16, PROT_READ | PROT_WRITE, 0), .ss_size = 16 * PAGE};
    MUST(!sigaltstack(&stack, NULL));
    struct sigaction action = {.sa_handler = on_tick, .sa_flags = SA_ONSTACK | SA_RESTART};
    struct sigaction with_value = {.sa_sigaction = on_queued, .sa_flags = SA_SIGINFO | SA_RESTART};
    MUST(!sigaction(SIGALRM, &action, NULL) && !sigaction(SIGUSR1, &action, NULL));
    MUST(!sigaction(SIGRTMIN, &with_value, NULL));
    struct itimerval every = {{0, 1500}, {0, 1500}};
    MUST(!setitimer(ITIMER_REAL, &every, NULL));
}

static void round_signals(void) {
    static atomic_ulong sent;
    sigset_t some, before;
    unsigned long seen = ticks;
    sigemptyset(&some);
    sigaddset(&some, SIGRTMIN);
    sigaddset(&some, SIGUSR1);
    sigprocmask(SIG_BLOCK, &some, &before);
    for (int n = 1; n < 20; n++) {
        union sigval value = {n};
        MUST(!sigqueue(getpid(), SIGRTMIN, value));
        sent += n;
    }
    raise(SIGUSR1);
    touch(&common, 32);
    sigprocmask(SIG_SETMASK, &before, NULL);
    if (queued != sent) wrong("%lu came of %lu that were sent", queued, sent);
    for (int n = 0; ticks < seen + 2; n++) {
        if (n > 20000) wrong("the timer stands still");
        usleep(500);
    }
}

/* --- /proc/self/mem and its like --- */

static int read_page(int fd, void *to, char *at) {
    ssize_t length = pread(fd, to, PAGE, (off_t)(uintptr_t)at);
    if (length != PAGE && errno != EIO) wrong("/proc/self/mem: %zd, %s", length, strerror(errno));
    return length == PAGE ? 0 : -1;
}

static void round_procmem(void) {
    int fd = open("/proc/self/mem", O_RDWR);
    MUST(fd >= 0);
    for (int times = 0; times < 32; times++) {
        size_t page = below(common.pages);
        char *at = common.base + page * PAGE;
        char copy[PAGE];
        struct iovec local = {copy, PAGE}, remote = {at, PAGE};
        /* For a page that is not back yet the file says EIO, and nothing wrong. */
        int by_file = below(2) && !read_page(fd, copy, at);
        if (!by_file) MUST(process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == PAGE);
        if (find_difference(copy, common.id, page, common.versions[page]) >= 0)
            wrong("/proc/self/mem reads something else");
        uint32_t version = (uint32_t)random_word() | 1;
        write_page(copy, common.id, page, version);
        by_file = below(2) && pwrite(fd, copy, PAGE, (off_t)(uintptr_t)at) == PAGE;
        if (!by_file) MUST(process_vm_writev(getpid(), &local, 1, &remote, 1, 0) == PAGE);
        common.versions[page] = version;
        check(&common, page);
    }
    close(fd);
}

/* --- locked memory --- */

static struct arena locked;

static void set_up_locked(void) {
    locked = arena_at(map(256, PROT_READ | PROT_WRITE, 0), 256, 256);
    fill(&locked);
    MUST(!mlock(locked.base, 256 * PAGE));
}

static void round_locked(void) {
    size_t from, pages;
    some_range(&locked, &from, &pages);
    char *at = locked.base + from * PAGE;
    switch (below(4)) {
    case 0: MUST(!munlock(at, pages * PAGE)); break;
    case 1: MUST(!mlock(at, pages * PAGE)); break;
    case 2: MUST(!mlock2(at, pages * PAGE, MLOCK_ONFAULT)); break;
    default:
        /* What is locked can't be given back, as other modes want to. */
        if (!below(8) && strcmp(mode, "all")) MUST(!mlockall(MCL_CURRENT));
    }
    touch(&locked, 32);
    check_all(&locked);
    touch(&common, 8);
}

/* --- shared memory --- */

struct counters { atomic_ulong turn, stop; };
static struct counters *between;
static struct arena both, of_file;

static void set_up_shared(void) {
    between = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    char *at = mmap(NULL, 128 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    MUST(between != MAP_FAILED && at != MAP_FAILED);
    both = arena_at(at, 128, 128);
    /* The list of versions, too, is common to both. */
    free(both.versions);
    both.versions = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    fill(&both);
    int fd = memfd_create("shared", MFD_CLOEXEC);
    MUST(fd >= 0 && !ftruncate(fd, 64 * PAGE));
    at = mmap(NULL, 64 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    MUST(at != MAP_FAILED);
    of_file = arena_at(at, 64, 64);
    fill(&of_file);
    pid_t child = fork();
    MUST(child >= 0);
    if (!child) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        state = 0;
        for (;;) {
            if (between->turn % 2) {
                touch(&both, 16);
                check_all(&both);
                atomic_fetch_add(&between->turn, 1);
            }
            touch(&common, 2);
            usleep(200);
        }
    }
}

static void round_shared(void) {
    for (int n = 0; between->turn % 2; n++) {
        if (n > 100000) wrong("the other process stands still");
        usleep(100);
    }
    check_all(&both);
    touch(&both, 16);
    atomic_fetch_add(&between->turn, 1);
    touch(&of_file, 8);
    touch(&common, 8);
}

/* --- reservations --- */

enum { RESERVED = 16 << 20, PIECE = 32, PIECES = 16 };
static char *reservation;
static struct { struct arena arena; size_t at; int open; } pieces[PIECES];

static void set_up_reserve(void) {
    reservation = map(RESERVED, PROT_NONE, MAP_NORESERVE);
    for (int n = 0; n < PIECES; n++) {
        pieces[n].at = n * (RESERVED / PIECES) + below(RESERVED / PIECES - PIECE);
        pieces[n].arena = arena_at(reservation + pieces[n].at * PAGE, PIECE, PIECE);
    }
}

static void round_reserve(void) {
    for (int times = 0; times < 4; times++) {
        int n = (int)below(PIECES);
        struct arena *a = &pieces[n].arena;
        if (!pieces[n].open) {
            MUST(!mprotect(a->base, PIECE * PAGE, PROT_READ | PROT_WRITE));
            pieces[n].open = 1;
        }
        check_all(a);
        touch(a, 32);
        switch (below(4)) {
        case 0: /* given back */
            MUST(!madvise(a->base, PIECE * PAGE, MADV_DONTNEED));
            memset(a->versions, 0, PIECE * sizeof(uint32_t));
            /* fall through */
        case 1: /* closed, and kept */
            MUST(!mprotect(a->base, PIECE * PAGE, PROT_NONE));
            pieces[n].open = 0;
            break;
        case 2: /* given back by mapping over it */
            MUST(mmap(a->base, PIECE * PAGE, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == a->base);
            memset(a->versions, 0, PIECE * sizeof(uint32_t));
            pieces[n].open = 0;
        }
    }
    touch(&common, 8);
}

/* --- huge pages --- */

static struct arena huge;

static void set_up_huge(void) {
    char *at = map(6 * 512, PROT_READ | PROT_WRITE, 0);
    at += -(uintptr_t)at & ((2 << 20) - 1);
    huge = arena_at(at, 5 * 512, 5 * 512);
    madvise(at, 5 * 512 * PAGE, MADV_HUGEPAGE);
    fill(&huge);
}

static void round_huge(void) {
    touch(&huge, 64);
    size_t part = 512 * below(5);
    switch (below(6)) {
    case 0:
        madvise(huge.base + part * PAGE, 512 * PAGE, MADV_COLLAPSE_);
        break;
    case 1: /* splits one */
        MUST(!madvise(huge.base + (part + 100) * PAGE, 7 * PAGE, MADV_DONTNEED));
        memset(huge.versions + part + 100, 0, 7 * sizeof(uint32_t));
        break;
    case 2: /* a whole one */
        MUST(!madvise(huge.base + part * PAGE, 512 * PAGE, MADV_DONTNEED));
        memset(huge.versions + part, 0, 512 * sizeof(uint32_t));
        renew(&huge, part + below(512));
        break;
    case 3:
        check_all(&huge);
    }
    for (int n = 0; n < 64; n++) check(&huge, part + below(512));
    touch(&common, 8);
}

/* --- private file mappings, and code that writes itself --- */

static struct arena written;
static unsigned char *code;
static uint32_t answer_of_code;

static void set_up_file(void) {
    char name[] = "/tmp/medes-torture-file-XXXXXX";
    int fd = mkstemp(name);
    char page[PAGE];
    MUST(fd >= 0 && !unlink(name));
    written = arena_at(NULL, 128, 128);
    for (size_t n = 0; n < 128; n++) {
        written.versions[n] = 9;
        write_page(page, written.id, n, 9);
        MUST(write(fd, page, PAGE) == PAGE);
    }
    written.base = mmap(NULL, 128 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    MUST(written.base != MAP_FAILED);
    close(fd);
    touch(&written, 40);
    code = (unsigned char *)map(1, PROT_READ | PROT_WRITE | PROT_EXEC, 0);
}

static void round_file(void) {
    if (answer_of_code && ((uint32_t(*)(void))code)() != answer_of_code) wrong("the wrong code ran");
    answer_of_code = (uint32_t)random_word() | 1;
    code[0] = 0xb8; /* mov eax, ... */
    memcpy(code + 1, &answer_of_code, 4);
    code[5] = 0xc3; /* ret */
    if (((uint32_t(*)(void))code)() != answer_of_code) wrong("the wrong code ran");
    if (!below(8)) MUST(!mprotect(written.base + 64 * PAGE, 64 * PAGE, PROT_READ));
    check_all(&written);
    MUST(!mprotect(written.base, 128 * PAGE, PROT_READ | PROT_WRITE));
    touch(&written, 8);
    touch(&common, 8);
}

/* --- the kernel reads and writes the memory for it --- */

static void round_syscalls(void) {
    int ends[2], file = memfd_create("calls", MFD_CLOEXEC);
    MUST(file >= 0 && !socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
    for (int times = 0; times < 16; times++) {
        size_t from = below(common.pages), to = below(common.pages);
        char *at = common.base + from * PAGE, copy[PAGE];
        MUST(write(ends[0], at, PAGE) == PAGE);
        MUST(recv(ends[1], copy, PAGE, MSG_WAITALL) == PAGE);
        if (find_difference(copy, common.id, from, common.versions[from]) >= 0)
            wrong("a socket carries something else");
        uint32_t version = (uint32_t)random_word() | 1;
        write_page(copy, common.id, to, version);
        MUST(pwrite(file, copy, PAGE, 0) == PAGE);
        struct iovec halves[] = {{common.base + to * PAGE, PAGE / 2}, {common.base + to * PAGE + PAGE / 2, PAGE / 2}};
        MUST(preadv(file, halves, 2, 0) == PAGE);
        common.versions[to] = version;
        check(&common, to);
    }
    close(ends[0]);
    close(ends[1]);
    close(file);
}

/* --- waits that nothing may cut short --- */

static atomic_ulong waits;

static void *wait_on(void *kind) {
    int epoll = epoll_create1(EPOLL_CLOEXEC), ends[2];
    MUST(epoll >= 0 && !pipe2(ends, O_CLOEXEC));
    struct epoll_event event = {.events = EPOLLIN};
    MUST(!epoll_ctl(epoll, EPOLL_CTL_ADD, ends[0], &event));
    for (;;) {
        struct pollfd ready = {ends[0], POLLIN, 0};
        struct timespec pause = {0, 4000000};
        sigset_t set;
        uint32_t word = 1;
        int result, expected = 0;
        switch ((uintptr_t)kind) {
        case 0: result = epoll_wait(epoll, &event, 1, 4); break;
        case 1: result = poll(&ready, 1, 4); break;
        case 2: result = nanosleep(&pause, NULL); break;
        case 3:
            result = (int)syscall(SYS_futex, &word, 0, 1, &pause, NULL, 0);
            if (result < 0 && errno == ETIMEDOUT) result = 0;
            break;
        default:
            sigemptyset(&set);
            sigaddset(&set, SIGUSR2);
            result = sigtimedwait(&set, NULL, &pause);
            if (result < 0 && errno == EAGAIN) result = 0;
        }
        if (result != expected) wrong("wait %lu: %d, %s", (uintptr_t)kind, result, strerror(errno));
        atomic_fetch_add(&waits, 1);
    }
    return NULL;
}

static void set_up_waits(void) {
    for (uintptr_t kind = 0; kind < 5; kind++) {
        pthread_t thread;
        MUST(!pthread_create(&thread, NULL, wait_on, (void *)kind));
    }
}

static void round_waits(void) {
    unsigned long before = waits;
    touch(&common, 16);
    for (int n = 0; waits < before + 5; n++) {
        if (n > 20000) wrong("nobody's wait ends");
        usleep(500);
    }
}

/* --- what keeps its memory from being taken --- */

static void set_up_uring(void) {
    char parameters[120] = {0};
    if (syscall(SYS_io_uring_setup, 8, parameters) < 0) wrong("no io_uring here: %s", strerror(errno));
}

static void set_up_userfault(void) {
    MUST(syscall(SYS_userfaultfd, O_CLOEXEC) >= 0);
}

static void set_up_aio(void) {
    static unsigned long context;
    MUST(!syscall(SYS_io_setup, 8, &context));
}

static void set_up_traced(void) {
    pid_t target = getpid();
    int ends[2];
    char byte;
    MUST(!pipe(ends));
    pid_t tracer = fork();
    MUST(tracer >= 0);
    if (!tracer) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        MUST(!ptrace(PTRACE_SEIZE, target, 0, 0));
        MUST(write(ends[1], "x", 1) == 1);
        for (;;) waitpid(target, NULL, __WALL);
    }
    MUST(read(ends[0], &byte, 1) == 1);
}

static void round_plain(void) { touch(&common, 64); }

/* --- all at once --- */

struct mode { const char *name; void (*set_up)(void), (*round)(void); int mixes; };
static const struct mode modes[] = {
    {"plain", NULL, round_plain, 1},
    {"fork", NULL, round_fork, 1},
    {"exec", NULL, round_exec, 0},
    {"tree", set_up_tree, round_tree, 0},
    {"threads", NULL, round_threads, 1},
    {"mremap", set_up_mremap, round_mremap, 1},
    {"munmap", set_up_munmap, round_munmap, 1},
    {"mprotect", set_up_mprotect, round_mprotect, 1},
    {"madvise", set_up_madvise, round_madvise, 1},
    {"wipe", NULL, round_wipe, 1},
    {"brk", set_up_brk, round_brk, 1},
    {"stack", NULL, round_stack, 1},
    {"debug", set_up_debug, round_debug, 0},
    {"core", NULL, round_core, 0},
    {"signals", set_up_signals, round_signals, 0},
    {"procmem", NULL, round_procmem, 1},
    {"locked", set_up_locked, round_locked, 1},
    {"shared", set_up_shared, round_shared, 0},
    {"reserve", set_up_reserve, round_reserve, 1},
    {"huge", set_up_huge, round_huge, 1},
    {"file", set_up_file, round_file, 1},
    {"syscalls", NULL, round_syscalls, 1},
    {"waits", set_up_waits, round_waits, 0},
    {"uring", set_up_uring, round_plain, 0},
    {"userfault", set_up_userfault, round_plain, 0},
    {"aio", set_up_aio, round_plain, 0},
    {"traced", set_up_traced, round_plain, 0},
};
enum { MODES = sizeof modes / sizeof *modes };

static void round_all(void) {
    const struct mode *chosen;
    do chosen = &modes[below(MODES)];
    while (!chosen->mixes);
    chosen->round();
}

int main(int count, char **values) {
    arguments = values;
    mode = count > 1 ? values[1] : "plain";
    seed = count > 2 ? strtoull(values[2], NULL, 10) : 1;
    answered = count > 3 ? strtoul(values[3], NULL, 10) : 0;
    /* What would otherwise end in the middle of the heap that "brk" measures. */
    setvbuf(stdout, NULL, _IONBF, 0);
    common = arena_at(map(512, PROT_READ | PROT_WRITE, 0), 512, 512);
    fill(&common);
    if (!strcmp(mode, "once")) {
        check_all(&common);
        return 0;
    }
    void (*round)(void) = NULL;
    for (int n = 0; n < MODES; n++) {
        int all = !strcmp(mode, "all") && modes[n].mixes;
        if (!all && strcmp(mode, modes[n].name)) continue;
        if (modes[n].set_up) modes[n].set_up();
        round = all ? round_all : modes[n].round;
    }
    if (!round) wrong("no such mode");
    if (count < 4) MUST(write(1, "ready\n", 6) == 6);
    for (;;) {
        struct pollfd ready = {0, POLLIN, 0};
        char line[8];
        due = 0;
        if (poll(&ready, 1, 0) > 0) {
            ssize_t length = read(0, line, 1);
            if (length == 0) return 0;
            if (length < 0 && errno != EINTR) return 5;
            due = length == 1 && line[0] == '\n';
        }
        round();
        if (due) {
            check_all(&common);
            char answer[40];
            int length = snprintf(answer, sizeof answer, "right %lu\n", ++answered);
            MUST(write(1, answer, length) == length);
        }
    }
}
