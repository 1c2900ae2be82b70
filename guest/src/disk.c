/* The disk checker: numbered blocks, written past every cache, counted only once the disk has said that they
 * are safe. Block i holds number i + 1. It goes on behind what an earlier boot left, never wraps, and stops
 * before the last block of the partition. That one is the mark: whether it is frozen, and after which block. */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MAGIC "nahtlos1"
#define MARK_MAGIC "nahtmark"
#define HEADER 32
#define FILLER_WORDS ((BLOCK_BYTES - HEADER) / 8)
#define READ_BLOCKS 64
#define FASTEST 10000

struct block {
    char magic[8];
    uint64_t sequence, boot, crc;
    uint64_t filler[FILLER_WORDS];
};
struct mark {
    char magic[8];
    uint64_t frozen, blocks, boot;
    uint64_t rest[FILLER_WORDS];
};
_Static_assert(sizeof(struct mark) == BLOCK_BYTES, "a mark is a block");
_Static_assert(sizeof(struct block) == BLOCK_BYTES, "a block is a block");

static atomic_uint wanted_per_s;
static atomic_uint_fast64_t acknowledged, errors, capacity;
static atomic_bool full;
static atomic_bool verifying; /* from the request until its result is taken */
static atomic_bool verify_wanted;
static atomic_bool frozen, freeze_wanted; /* the first follows the second, on the checker's thread */
static uint64_t checked, wrong, verified_up_to;
static int wake = -1, verified = -1, settled = -1, disk = -1;
static uint32_t crc_table[256];
static struct block *buffer;

struct disk_status disk_status(void)
{
    return (struct disk_status){.per_s = wanted_per_s, .acknowledged = acknowledged, .errors = errors,
                                .capacity = capacity, .full = full, .frozen = frozen};
}

static void wake_up(void)
{
    uint64_t one = 1;
    (void)!write(wake, &one, sizeof one);
}

const char *disk_set(long per_s)
{
    if (per_s > FASTEST)
        return "disk_per_s: at most 10000";
    if (per_s > 0 && disk < 0)
        return "disk_per_s: this machine has no data partition";
    wanted_per_s = per_s;
    wake_up();
    return NULL;
}

bool disk_verify_begin(void)
{
    if (disk < 0 || atomic_exchange(&verifying, true))
        return false;
    verify_wanted = true;
    wake_up();
    return true;
}

int disk_verify_done_fd(void)
{
    return verified;
}

void disk_verify_result(uint64_t *checked_out, uint64_t *wrong_out, uint64_t *acknowledged_out)
{
    *checked_out = checked;
    *wrong_out = wrong;
    *acknowledged_out = verified_up_to;
    verifying = false;
}

bool disk_freeze_begin(bool freeze)
{
    if (disk < 0 || freeze == frozen)
        return false;
    freeze_wanted = freeze;
    wake_up();
    return true;
}

int disk_freeze_done_fd(void)
{
    return settled;
}

bool disk_frozen(void)
{
    return frozen;
}

static void prepare_crc(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; bit++)
            value = value & 1 ? value >> 1 ^ 0xEDB88320u : value >> 1;
        crc_table[i] = value;
    }
}

static uint32_t crc32(const void *data, size_t length)
{
    const uint8_t *bytes = data;
    uint32_t value = ~0u;
    while (length--)
        value = value >> 8 ^ crc_table[(value ^ *bytes++) & 255];
    return ~value;
}

static inline uint64_t filler_word(uint64_t sequence, uint64_t index)
{
    return sequence * 0x9E3779B97F4A7C15u + index * 0xBF58476D1CE4E5B9u;
}

static void make_block(struct block *block, uint64_t sequence)
{
    memcpy(block->magic, MAGIC, sizeof block->magic);
    block->sequence = sequence;
    block->boot = boot_number;
    for (uint64_t i = 0; i < FILLER_WORDS; i++)
        block->filler[i] = filler_word(sequence, i);
    block->crc = crc32(block->filler, sizeof block->filler);
}

static bool right(const struct block *block, uint64_t sequence)
{
    if (memcmp(block->magic, MAGIC, sizeof block->magic) != 0 || block->sequence != sequence)
        return false;
    for (uint64_t i = 0; i < FILLER_WORDS; i++)
        if (block->filler[i] != filler_word(sequence, i))
            return false;
    return block->crc == crc32(block->filler, sizeof block->filler);
}

static bool read_blocks(uint64_t first, uint64_t count)
{
    ssize_t size = count * BLOCK_BYTES;
    return pread(disk, buffer, size, first * BLOCK_BYTES) == size;
}

/* How many blocks lie there already: they are contiguous, so halving finds the end. */
static uint64_t blocks_there(void)
{
    uint64_t low = 0, high = capacity;
    while (low < high) {
        uint64_t middle = (low + high) / 2;
        bool there = read_blocks(middle, 1) && memcmp(buffer->magic, MAGIC, 8) == 0 &&
                     buffer->sequence == middle + 1;
        if (there)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static void verify(void)
{
    uint64_t end = acknowledged;
    checked = wrong = 0;
    for (uint64_t first = 0; first < end; first += READ_BLOCKS) {
        uint64_t count = end - first < READ_BLOCKS ? end - first : READ_BLOCKS;
        bool readable = read_blocks(first, count);
        for (uint64_t i = 0; i < count; i++, checked++)
            if (!readable || !right(buffer + i, first + i + 1))
                wrong++;
    }
    verified_up_to = end;
    uint64_t one = 1;
    (void)!write(verified, &one, sizeof one);
}

static void write_next(void)
{
    uint64_t next = acknowledged;
    if (next >= capacity) {
        if (!full)
            console_print("disk checker: the partition is full after %lu blocks, it stops\n",
                          (unsigned long)next);
        full = true;
        return;
    }
    make_block(buffer, next + 1);
    if (pwrite(disk, buffer, BLOCK_BYTES, next * BLOCK_BYTES) == BLOCK_BYTES && fdatasync(disk) == 0)
        acknowledged = next + 1;
    else
        errors++;
}

/* Between two writes: nothing is on its way. Frozen is who has written so; who thaws writes that first, too. */
static void settle_freeze(bool freeze)
{
    struct mark *mark = (struct mark *)buffer;
    memset(mark, 0, sizeof *mark);
    memcpy(mark->magic, MARK_MAGIC, sizeof mark->magic);
    mark->frozen = freeze;
    mark->blocks = acknowledged;
    mark->boot = boot_number;
    if (pwrite(disk, mark, BLOCK_BYTES, capacity * BLOCK_BYTES) != BLOCK_BYTES || fdatasync(disk) != 0)
        errors++;
    frozen = freeze;
    uint64_t one = 1;
    (void)!write(settled, &one, sizeof one);
}

static void *check(void *unused)
{
    (void)unused;
    setpriority(PRIO_PROCESS, syscall(SYS_gettid), 0);
    uint64_t due = now_ns();
    for (;;) {
        bool writes = wanted_per_s && !full && !frozen;
        uint64_t now = now_ns();
        if (writes && due < now && now - due > 1000000000)
            due = now; /* a disk that stood still is not flooded afterwards */
        int wait_ms = !writes ? -1 : due <= now ? 0 : (int)((due - now) / 1000000) + 1;
        struct pollfd event = {.fd = wake, .events = POLLIN};
        if (poll(&event, 1, wait_ms) > 0) {
            uint64_t drop;
            (void)!read(wake, &drop, sizeof drop);
            due = now_ns();
        }
        if (atomic_exchange(&verify_wanted, false))
            verify();
        if (freeze_wanted != frozen)
            settle_freeze(freeze_wanted);
        unsigned rate = wanted_per_s;
        if (rate && !full && !frozen && now_ns() >= due) {
            write_next();
            due += 1000000000ull / rate;
        }
    }
    return NULL;
}

void disk_start(void)
{
    wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    verified = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    settled = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    disk = open(DATA_PARTITION, O_RDWR | O_DIRECT | O_CLOEXEC);
    if (disk < 0) {
        console_print("no data partition\n");
        return;
    }
    uint64_t bytes = 0;
    pthread_t thread;
    prepare_crc();
    ioctl(disk, BLKGETSIZE64, &bytes);
    capacity = bytes / BLOCK_BYTES - 1;
    buffer = aligned_alloc(BLOCK_BYTES, READ_BLOCKS * BLOCK_BYTES);
    acknowledged = blocks_there();
    pthread_create(&thread, NULL, check, NULL);
}
