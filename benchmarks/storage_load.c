/* What a server does to its disk, and how long it waited: an NBD client of a unix socket, one thread, a fixed
 * number of requests under way.
 *
 *     storage_load SOCKET KIND BLOCK DEPTH SECONDS [STATE]
 *
 * KIND: seqread seqwrite randread randwrite: says what was done as JSON, with completions per hundredth second.
 *       check: writes random blocks of which each carries the number of its write, without a flush, until
 *       SECONDS are over or its input ends; then reads all of them. A block must hold a write that is at least
 *       the last acknowledged one, and none that was never sent.
 * hold: the same as a guest whose disk stops it when a request fails: once nothing is under way any more it stands
 *       still ('s' in the file STATE), and sends what has failed again when it is let go on (by a 'g' there).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { READ = 0, WRITE = 1, DEPTH = 64, BINS = 1 << 16, HISTOGRAM = 1 << 20 };
static const double BIN = 0.01, HELD_AT_MOST = 60;

struct request { uint32_t magic; uint16_t flags, kind; uint64_t handle, offset; uint32_t length; } __attribute__((packed));
struct reply { uint32_t magic, error; uint64_t handle; } __attribute__((packed));
struct slot { double began; uint64_t block; uint32_t number; int busy, failed; };

static struct slot slots[DEPTH];
static uint32_t *acknowledged, *sent;
static uint32_t bins[BINS];
static uint32_t histogram[HISTOGRAM]; /* by 10 microseconds */
static uint64_t operations, errors, size_;
static double longest, longest_at;
static int disk, state = -1;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void die(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(2);
}

static void get(void *to, size_t length) {
    for (char *at = to; length;) {
        ssize_t got = recv(disk, at, length, MSG_WAITALL);
        if (got <= 0) die("the disk is gone");
        at += got, length -= got;
    }
}

static void put(const void *from, size_t length, int more) {
    for (const char *at = from; length;) {
        ssize_t done = send(disk, at, length, MSG_NOSIGNAL | (more ? MSG_MORE : 0));
        if (done <= 0) die("the disk is gone");
        at += done, length -= done;
    }
}

static void connect_to(const char *path) {
    struct sockaddr_un where = {.sun_family = AF_UNIX};
    char greeting[18], answer[10];
    uint32_t flags = htonl(3), option[2] = {htonl(1), htonl(6)};
    strncpy(where.sun_path, path, sizeof where.sun_path - 1);
    disk = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(disk, (void *)&where, sizeof where)) die(path);
    get(greeting, 18);
    put(&flags, 4, 1);
    put("IHAVEOPT", 8, 1);
    put(option, 8, 1);
    put("volume", 6, 0);
    get(answer, 10);
    memcpy(&size_, answer, 8);
    size_ = be64toh(size_);
}

static void ask(int index, int kind, uint64_t block, uint32_t length, char *data) {
    struct request request = {htonl(0x25609513), 0, htons(kind), index, htobe64(block * length), htonl(length)};
    slots[index].began = now(), slots[index].block = block, slots[index].busy = 1;
    put(&request, sizeof request, kind == WRITE);
    if (kind == WRITE) put(data, length, 0);
}

static int answer(int kind, uint32_t length, char *data) {
    struct reply reply;
    get(&reply, sizeof reply);
    int index = reply.handle;
    if (reply.error) errors++;
    else if (kind == READ) get(data, length);
    slots[index].busy = 0;
    return reply.error ? -1 - index : index;
}

static void count(int index, double began) {
    double at = now(), took = at - slots[index].began;
    uint64_t bin = (at - began) / BIN, step = took * 1e5;
    if (took > longest) longest = took, longest_at = slots[index].began - began;
    bins[bin < BINS ? bin : BINS - 1]++;
    histogram[step < HISTOGRAM ? step : HISTOGRAM - 1]++;
    operations++;
}

static uint64_t random_block(uint64_t blocks) {
    static uint64_t state = 88172645463325252ull;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state % blocks;
}

static int input_ended(void) {
    struct pollfd input = {0, POLLIN, 0};
    char ignored[64];
    return poll(&input, 1, 0) > 0 && read(0, ignored, sizeof ignored) == 0;
}

static void fill(char *data, uint32_t length, uint64_t block, uint32_t number) {
    uint64_t *word = (void *)data;
    for (uint32_t i = 0; i < length / 8; i++) word[i] = block << 32 | number;
}

static void stand_still(void) {
    struct timespec moment = {0, 500000};
    double since = now();
    char said = 's';
    if (pwrite(state, &said, 1, 0) != 1) die("state");
    while (said != 'g') {
        if (now() - since > HELD_AT_MOST) die("nobody lets it go on");
        nanosleep(&moment, 0);
        if (pread(state, &said, 1, 0) != 1) die("state");
    }
    if (pwrite(state, "r", 1, 0) != 1) die("state");
}

/* A failed write once more; it has waited since it was sent first. */
static void again(int index, uint32_t length, char *data) {
    double began = slots[index].began;
    fill(data, length, slots[index].block, slots[index].number);
    ask(index, WRITE, slots[index].block, length, data);
    slots[index].began = began;
    slots[index].failed = 0;
}

static int under_way(uint64_t block, int depth) {
    for (int i = 0; i < depth; i++)
        if (slots[i].busy && slots[i].block == block) return 1;
    return 0;
}

static double load(int kind, int random, int checked, int held, uint32_t length, int depth, double seconds) {
    char *data = aligned_alloc(4096, length);
    uint64_t blocks = size_ / length, next = 0;
    double began = now(), ended = began + seconds;
    int busy = 0, failed = 0, stopping = 0, turn = 0;
    fill(data, length, 1, 1);
    for (;;) {
        if (now() >= ended || (checked && (++turn & 15) == 0 && input_ended())) stopping = 1;
        for (int i = 0; i < depth && !stopping && !failed; i++) {
            if (slots[i].busy) continue;
            uint64_t block = random ? random_block(blocks) : next++ % blocks;
            if (checked) {
                while (under_way(block, depth)) block = random_block(blocks);
                fill(data, length, block, slots[i].number = ++sent[block]);
            }
            ask(i, kind, block, length, data);
            busy++;
        }
        if (failed && !busy) {
            stand_still();
            for (int i = 0; i < depth; i++)
                if (slots[i].failed) again(i, length, data), busy++, failed--;
        }
        if (!busy) break;
        int index = answer(kind, length, data);
        busy--;
        if (index < 0 && held) {
            struct slot *slot = &slots[-1 - index];
            slot->failed = slot->busy = 1, failed++, errors--;
            continue;
        }
        if (index < 0) continue;
        count(index, began);
        if (checked) acknowledged[slots[index].block] = slots[index].number;
    }
    free(data);
    return now() - began;
}

static void verify(uint32_t length, uint64_t *lost, uint64_t *wrong) {
    char *data = aligned_alloc(4096, length);
    for (uint64_t block = 0; block < size_ / length; block++) {
        if (!sent[block]) continue;
        ask(0, READ, block, length, data);
        if (answer(READ, length, data) < 0) { (*wrong)++; continue; }
        uint64_t *word = (void *)data, number = word[0] & 0xffffffff;
        int torn = 0;
        for (uint32_t i = 1; i < length / 8; i++) torn |= word[i] != word[0];
        if (word[0] && (torn || word[0] >> 32 != block || number > sent[block])) (*wrong)++;
        else if (number < acknowledged[block]) (*lost)++;
    }
    free(data);
}

static double percentile(double part) {
    uint64_t seen = 0;
    for (uint64_t step = 0; step < HISTOGRAM; step++)
        if ((seen += histogram[step]) >= part * operations) return step * 1e-5;
    return longest;
}

int main(int count_, char **words) {
    if (count_ != 6 && count_ != 7) return 2;
    const char *what = words[2];
    uint32_t length = atoi(words[3]);
    int depth = atoi(words[4]), checked = !strcmp(what, "check");
    int held = !strcmp(what, "hold");
    checked |= held;
    if (held && (count_ != 7 || (state = open(words[6], O_RDWR)) < 0)) die("state");
    int random = checked || !strncmp(what, "rand", 4), kind = checked || strstr(what, "write") ? WRITE : READ;
    uint64_t lost = 0, wrong = 0;
    if (depth > DEPTH) return 2;
    connect_to(words[1]);
    acknowledged = calloc(size_ / length, sizeof *acknowledged), sent = calloc(size_ / length, sizeof *sent);
    double seconds = load(kind, random, checked, held, length, depth, atof(words[5]));
    uint64_t failed = errors;
    if (checked) verify(length, &lost, &wrong);
    printf("{\"operations\": %lu, \"seconds\": %.6f, \"errors\": %lu, \"lost\": %lu, \"wrong\": %lu, ", operations,
           seconds, failed, lost, wrong);
    printf("\"longest\": %.6f, \"longest_at\": %.6f, \"p50\": %.6f, \"p99\": %.6f, \"bins\": [", longest, longest_at,
           percentile(0.5), percentile(0.99));
    uint64_t last = seconds / BIN;
    for (uint64_t bin = 0; bin <= last && bin < BINS; bin++) printf(bin ? ",%u" : "%u", bins[bin]);
    printf("]}\n");
    return 0;
}
