/* UDP: what arrives at the echo port goes back as it is; who subscribes at the other gets heartbeats. */
#define _GNU_SOURCE
#include "guest.h"

#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define ECHO_PORT 7
#define HEARTBEAT_PORT 9
#define BEAT_MS 20
#define SUBSCRIPTION_NS (600ull * 1000000000)
#define SUBSCRIBERS 32
#define BATCH 64
#define LARGEST 9216
#define BUFFER (8 << 20)

static struct watch echo, subscriptions, beat;
static struct mmsghdr messages[BATCH];
static struct iovec vectors[BATCH];
static struct sockaddr_in6 peers[BATCH]; /* large enough for both families */
static char data[BATCH][LARGEST];
static struct { struct sockaddr_in6 address; uint64_t until; } subscribers[SUBSCRIBERS];
static uint64_t beats, last_beat_ns, longest_gap_ns;

uint64_t heartbeat_count(void)
{
    return beats;
}

double heartbeat_longest_gap_ms(void)
{
    return longest_gap_ns / 1e6;
}

static int udp_socket(int port)
{
    int fd = service_socket(SOCK_DGRAM, port), size = BUFFER;
    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size);
    setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size);
    return fd;
}

/* Everything that was received is sent, however full the queue: an echo lost here would look like a packet
 * the cloud lost. An address that cannot be answered is skipped. */
static void send_all(int fd, int count)
{
    for (int sent = 0; sent < count;) {
        int more = sendmmsg(fd, messages + sent, count - sent, 0);
        if (more > 0) {
            sent += more;
            continue;
        }
        struct epoll_event unused;
        int waiting = epoll_create1(EPOLL_CLOEXEC);
        struct epoll_event want = {.events = EPOLLOUT};
        epoll_ctl(waiting, EPOLL_CTL_ADD, fd, &want);
        if (epoll_wait(waiting, &unused, 1, 20) != 0)
            sent++; /* there was room: it was refused for another reason */
        close(waiting);
    }
}

static void echo_ready(struct watch *watch, uint32_t events)
{
    (void)events;
    for (int rounds = 0; rounds < 4; rounds++) {
        for (int i = 0; i < BATCH; i++) {
            vectors[i] = (struct iovec){data[i], LARGEST};
            messages[i].msg_hdr = (struct msghdr){.msg_name = &peers[i], .msg_namelen = sizeof peers[i],
                                                  .msg_iov = &vectors[i], .msg_iovlen = 1};
        }
        int count = recvmmsg(watch->fd, messages, BATCH, MSG_DONTWAIT, NULL);
        if (count <= 0)
            return;
        for (int i = 0; i < count; i++)
            vectors[i].iov_len = messages[i].msg_len;
        send_all(watch->fd, count);
        if (count < BATCH)
            return;
    }
}

static bool same(const struct sockaddr_in6 *left, const struct sockaddr_in6 *right)
{
    return memcmp(left, right, sizeof *left) == 0;
}

/* The place of `who`, else a free one, else the one that would end first. */
static int place_for(const struct sockaddr_in6 *who)
{
    int best = 0;
    for (int i = 0; i < SUBSCRIBERS; i++) {
        if (same(&subscribers[i].address, who))
            return i;
        if (subscribers[i].until < subscribers[best].until)
            best = i;
    }
    return best;
}

static void subscription_ready(struct watch *watch, uint32_t events)
{
    (void)events;
    char word[16];
    struct sockaddr_in6 from = {0};
    socklen_t length = sizeof from;
    ssize_t size;
    while ((size = recvfrom(watch->fd, word, sizeof word, MSG_DONTWAIT, (struct sockaddr *)&from, &length)) >= 0) {
        if (size >= 9 && memcmp(word, "subscribe", 9) == 0) {
            int place = place_for(&from);
            subscribers[place].address = from;
            subscribers[place].until = now_ns() + SUBSCRIPTION_NS;
        }
        memset(&from, 0, sizeof from);
        length = sizeof from;
    }
}

static void beat_ready(struct watch *watch, uint32_t events)
{
    (void)events;
    if (timer_read(watch->fd) == 0)
        return;
    uint64_t now = now_ns();
    if (last_beat_ns && now - last_beat_ns > longest_gap_ns)
        longest_gap_ns = now - last_beat_ns;
    last_beat_ns = now;
    beats++;
    struct disk_status disk = disk_status();
    struct memory_status memory = memory_status();
    uint64_t words[5] = {beats, now, boot_number, disk.acknowledged, memory.errors};
    for (int i = 0; i < SUBSCRIBERS; i++) {
        if (subscribers[i].until <= now)
            continue;
        sendto(subscriptions.fd, words, sizeof words, MSG_DONTWAIT,
               (struct sockaddr *)&subscribers[i].address, sizeof subscribers[i].address);
    }
}

void datagram_start(void)
{
    echo = (struct watch){.ready = echo_ready, .fd = udp_socket(ECHO_PORT)};
    subscriptions = (struct watch){.ready = subscription_ready, .fd = udp_socket(HEARTBEAT_PORT)};
    beat = (struct watch){.ready = beat_ready, .fd = timer_open()};
    timer_set(beat.fd, BEAT_MS, BEAT_MS);
    loop_add(&echo, EPOLLIN);
    loop_add(&subscriptions, EPOLLIN);
    loop_add(&beat, EPOLLIN);
}
