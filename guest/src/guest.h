/* What the parts of the guest's init share.
 *
 *   main.c      boot: mounts, modules, kernel arguments; the event loop
 *   link.c      the interfaces and their IPv4 addresses (DHCP)
 *   link6.c     IPv6 addresses by DHCPv6; others are the kernel's business
 *   service.c   sockets of services, for both families
 *   datagram.c  UDP: echo (7), heartbeats (9)
 *   stream.c    TCP: line echo (7000), HTTP (80)
 *   memory.c    the memory checker, a thread of its own
 *   disk.c      the disk checker, a thread of its own
 *   work.c      processors that are plugged, workers that keep them busy: threads of their own
 *   console.c   the serial console
 *   agent.c     the guest agent's protocol
 *
 * The event loop runs on one thread and never blocks; the two checkers publish counters it only reads.
 */
#ifndef GUEST_H
#define GUEST_H

#include <netinet/in.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BLOCK_BYTES 4096
#define PAGE_BYTES 4096
#define INTERFACES 8
#define DATA_PARTITION "/dev/vda2"

/* --- event loop (main.c) --- */

struct watch {
    void (*ready)(struct watch *watch, uint32_t events);
    int fd;
};

void loop_add(struct watch *watch, uint32_t events);
void loop_change(struct watch *watch, uint32_t events);
void loop_remove(struct watch *watch);

/* A timerfd that calls `ready` first after `first_ms`, then every `every_ms` (0: once). */
int timer_open(void);
void timer_set(int fd, uint64_t first_ms, uint64_t every_ms);
uint64_t timer_read(int fd);

uint64_t now_ns(void); /* monotonic: stands still while the guest is stopped */

extern char boot_id[37];
extern uint64_t boot_number; /* the first 8 bytes of boot_id as they lie in memory */

bool write_file(const char *path, const char *text);
long available_mib(void);
long total_mib(void);

/* --- parts --- */

void link_start(void (*on_address)(struct in_addr address));
const char *link_address(void); /* "" until there is one */
void link6_start(const char *name, int index, const uint8_t mac[6]);

/* A socket bound to `port` at every address of both families (IPv4 ones look like ::ffff:192.0.2.1); of IPv4
 * alone where the kernel has no other. `type` as for socket(). */
int service_socket(int type, int port);

void datagram_start(void);
uint64_t heartbeat_count(void);
double heartbeat_longest_gap_ms(void);

void stream_start(void);
size_t status_json(char *out, size_t size);
/* `name=value&...`; NULL, or why not. */
const char *settings_change(char *query);

/* Keeps an eye on the clock the kernel chose. */
void clock_start(void);

void memory_start(unsigned mib, unsigned mb_per_s);
/* NULL, or why not; nothing has changed then. */
const char *memory_set(long mib, long mb_per_s); /* -1: leave as it is */
struct memory_status {
    unsigned mib, mb_per_s;
    uint64_t verified_pages, passes, errors;
};
struct memory_status memory_status(void);

void work_start(void);
const char *work_set(long workers);
struct work_status {
    long online;
    unsigned workers;
    uint64_t turns;
};
struct work_status work_status(void);

void disk_start(void);
const char *disk_set(long per_s);
struct disk_status {
    unsigned per_s;
    uint64_t acknowledged, errors, capacity;
    bool full, frozen;
};
struct disk_status disk_status(void);
/* Reads everything back on the disk thread; `done` becomes readable then. One at a time: false if busy. */
bool disk_verify_begin(void);
int disk_verify_done_fd(void);
void disk_verify_result(uint64_t *checked, uint64_t *wrong, uint64_t *acknowledged);

/* Frozen: nothing is written until thawed, and the disk says so (see disk.c). True: it is being settled on the
 * disk thread, and `done` becomes readable then. False: there is nothing to settle. */
bool disk_freeze_begin(bool freeze);
int disk_freeze_done_fd(void);
bool disk_frozen(void);

void agent_start(void);

void console_start(void);
void console_print(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
