/* Two processes that know what their memory has to hold, and do nothing unless they are asked.
 *
 *   subject SEED
 *
 * It prints "ready". For each line on standard input both check all their memory, and change a
 * little of it; then it prints "right N". Whatever is not as it must be is printed as "wrong: ..."
 * and ends the process with status 3. If the second process was killed the first ends with 4. */

#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, PAGES = 160, HEAP_PAGES = 24, FILE_PAGES = 200 };

static uint64_t seed;
static uint32_t *versions; /* of the pages, in one list; 0 for zeros */
static char *anonymous, *heap, *file;
static char data[3 * PAGE] = {1}; /* of the program's own data segment */

static void fail(const char *what) {
    fprintf(stderr, "%s\n", what);
    _exit(4);
}

static uint64_t mix(uint64_t x) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* What word `i` of a page holds; an eighth of them is like nothing else. */
static uint64_t word(unsigned page, uint32_t version, unsigned i) {
    if (!version) return 0;
    uint64_t of_page = mix(version % 8 < 6 ? page : seed ^ page << 24 ^ version);
    return i % 8 ? (of_page & 0xff00ff) | (uint64_t)version << 32 : mix(of_page + i);
}

static char *place(unsigned page) {
    if (page < PAGES) return anonymous + page * PAGE;
    page -= PAGES;
    if (page < HEAP_PAGES) return heap + page * PAGE;
    page -= HEAP_PAGES;
    if (page < 2) return data + (PAGE - (uintptr_t)data % PAGE) % PAGE + page * PAGE;
    /* Few of many pages of a file. */
    return file + (page - 2) * 40 * PAGE;
}
enum { ALL = PAGES + HEAP_PAGES + 2 + 4 };

static void renew(unsigned page, uint32_t version) {
    volatile uint64_t *words = (uint64_t *)place(page);
    for (unsigned i = 0; i < WORDS; i++) words[i] = word(page, version, i);
    versions[page] = version;
}

static const char *who = "parent";

static void check(unsigned round) {
    for (unsigned page = 0; page < ALL; page++) {
        volatile uint64_t *words = (uint64_t *)place(page);
        for (unsigned i = 0; i < WORDS; i++) {
            if (words[i] == word(page, versions[page], i)) continue;
            char line[200];
            int length = snprintf(line, sizeof line, "wrong: %s, page %u at %p, version %u, word %u: %lx\n",
                                  who, page, place(page), versions[page], i, words[i]);
            if (write(1, line, length) < 0) {}
            _exit(3);
        }
    }
    for (unsigned n = 0; n < 6; n++) renew(mix(seed ^ round << 8 ^ n) % ALL, (uint32_t)mix(round + n) | 1);
}

static void *wait_for_nothing(void *none) {
    int fd = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event;
    for (;;) epoll_wait(fd, &event, 1, -1);
    return none;
}

static void start_thread(void) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, wait_for_nothing, NULL)) fail("no thread");
}

/* The other process is gone: killed, or for some other reason, which is wrong. */
static void end(void) {
    int status = 0;
    wait(&status);
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL) {
        char line[60];
        int length = snprintf(line, sizeof line, "wrong: the child ended with %x\n", status);
        if (write(1, line, length) < 0) {}
    }
    _exit(4);
}

int main(int count, char **values) {
    seed = count > 1 ? strtoull(values[1], NULL, 10) : 1;
    setvbuf(stdout, NULL, _IONBF, 0);
    int protection = PROT_READ | PROT_WRITE;
    anonymous = mmap(NULL, PAGES * PAGE, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    FILE *own = tmpfile();
    static char content[PAGE];
    for (unsigned page = 0; page < FILE_PAGES; page++) {
        memset(content, 'a' + (int)page % 26, PAGE);
        if (!own || fwrite(content, PAGE, 1, own) != 1) fail("no file");
    }
    fflush(own);
    file = mmap(NULL, FILE_PAGES * PAGE, protection, MAP_PRIVATE, fileno(own), 0);
    heap = sbrk((HEAP_PAGES + 1) * PAGE);
    if (anonymous == MAP_FAILED || file == MAP_FAILED || heap == (char *)-1) fail("no memory");
    heap += (PAGE - (uintptr_t)heap % PAGE) % PAGE;
    versions = calloc(ALL, sizeof *versions);
    for (unsigned page = 0; page < ALL; page++) renew(page, page % 5 ? (uint32_t)mix(page) | 1 : 0);
    signal(SIGPIPE, SIG_IGN);
    int down[2], up[2];
    char byte;
    if (pipe(down) || pipe(up)) fail("no pipes");
    if (!fork()) {
        who = "child";
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        seed++;
        for (unsigned page = 0; page < ALL; page++) renew(page, versions[page]);
        close(down[1]);
        start_thread();
        if (write(up[1], "r", 1) != 1) fail("no parent");
        for (unsigned round = 0; read(down[0], &byte, 1) == 1; round++) {
            check(round);
            if (write(up[1], "r", 1) != 1) fail("no parent");
        }
        return 0;
    }
    close(up[1]);
    start_thread();
    if (read(up[0], &byte, 1) != 1) fail("no child");
    if (write(1, "ready\n", 6) != 6) return 5;
    for (unsigned round = 0; read(0, &byte, 1) == 1;) {
        if (byte != '\n') continue;
        check(round);
        if (write(down[1], "?", 1) != 1 || read(up[0], &byte, 1) != 1) end();
        char line[40];
        int length = snprintf(line, sizeof line, "right %u\n", ++round);
        if (write(1, line, length) != length) return 5;
    }
    return 0;
}
