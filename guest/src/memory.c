/* The memory checker: every page holds words that follow from its number and from how often it was written.
 * Round and round, each page is compared with what it must hold and then given its next content. One word in
 * each cache line is looked at and written: a page lost, doubled or old shows, at an eighth of the work. */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define WORDS (PAGE_BYTES / 8)
#define STRIDE 8 /* words: one cache line */
#define SPARE_MIB 24 /* never taken from the guest itself */
#define BACKLOG_MS 100 /* what was missed for longer than this is not made up for */

static atomic_uint wanted_mib, wanted_mb_per_s;
static atomic_uint_fast64_t verified_pages, passes, errors;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

struct memory_status memory_status(void)
{
    return (struct memory_status){.mib = wanted_mib, .mb_per_s = wanted_mb_per_s,
                                  .verified_pages = verified_pages, .passes = passes, .errors = errors};
}

const char *memory_set(long mib, long mb_per_s)
{
    static char why[96];
    if (mb_per_s > 100000)
        return "memory_mb_per_s: at most 100000";
    if (mib >= 0 && mib > (long)wanted_mib && mib - (long)wanted_mib + SPARE_MIB > available_mib()) {
        long most = (long)wanted_mib + available_mib() - SPARE_MIB;
        snprintf(why, sizeof why, "memory_mib: at most %ld here", most < 0 ? 0 : most);
        return why;
    }
    pthread_mutex_lock(&lock);
    if (mib >= 0)
        wanted_mib = mib;
    if (mb_per_s >= 0)
        wanted_mb_per_s = mb_per_s;
    pthread_cond_signal(&changed);
    pthread_mutex_unlock(&lock);
    return NULL;
}

static inline uint64_t seed(uint64_t page, uint64_t generation)
{
    uint64_t x = page * 0x9E3779B97F4A7C15u ^ generation * 0xC2B2AE3D27D4EB4Fu;
    return x ^ x >> 29;
}

/* Write generation `next` into a page; compare with the one before unless this is the first. */
static bool renew(volatile uint64_t *page, uint64_t number, uint64_t next)
{
    uint64_t expected = seed(number, next - 1), content = seed(number, next), wrong = 0;
    if (next == 1) {
        for (int i = 0; i < WORDS; i += STRIDE)
            page[i] = content + i;
        return true;
    }
    for (int i = 0; i < WORDS; i += STRIDE) {
        wrong |= page[i] ^ (expected + i);
        page[i] = content + i;
    }
    return wrong == 0;
}

static void *check(void *unused)
{
    (void)unused;
    setpriority(PRIO_PROCESS, syscall(SYS_gettid), 5);
    uint64_t *memory = NULL, at = 0, generation = 1, done = 0, since = now_ns();
    unsigned mib = 0, rate = 0;
    for (;;) {
        pthread_mutex_lock(&lock);
        while (!wanted_mb_per_s || !wanted_mib) {
            rate = 0;
            if (!wanted_mib && memory) {
                munmap(memory, (size_t)mib << 20);
                memory = NULL;
                mib = 0;
            }
            pthread_cond_wait(&changed, &lock);
        }
        unsigned want_mib = wanted_mib, want_rate = wanted_mb_per_s;
        pthread_mutex_unlock(&lock);
        if (want_mib != mib) {
            if (memory)
                munmap(memory, (size_t)mib << 20);
            memory = mmap(NULL, (size_t)want_mib << 20, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            mib = want_mib;
            at = 0;
            generation = 1;
        }
        if (want_rate != rate) {
            rate = want_rate;
            done = 0;
            since = now_ns();
        }
        uint64_t pages = ((uint64_t)mib << 20) / PAGE_BYTES, start = now_ns();
        uint64_t due = (start - since) / 1000 * rate / PAGE_BYTES;
        uint64_t most = (uint64_t)BACKLOG_MS * 1000 * rate / PAGE_BYTES;
        if (due > done + most) {
            since = start;
            done = 0;
            due = most;
        }
        for (; done < due; done++) {
            if (!renew(memory + at * WORDS, at, generation))
                errors++;
            if (generation > 1)
                verified_pages++;
            if (++at == pages) {
                passes += generation > 1;
                at = 0;
                generation++;
            }
        }
        struct timespec turn = {.tv_nsec = rate <= 16 ? 20000000 : 4000000};
        clock_nanosleep(CLOCK_MONOTONIC, 0, &turn, NULL);
    }
    return NULL;
}

void memory_start(unsigned mib, unsigned mb_per_s)
{
    pthread_t thread;
    memory_set(mib, mb_per_s);
    pthread_create(&thread, NULL, check, NULL);
}
