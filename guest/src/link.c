/* The guest's interfaces: up, and an IPv4 address each by DHCP. The first one's is the guest's name for itself.
 *
 * INIT --discover--> SELECTING --offer/request--> REQUESTING --ack--> BOUND --half the lease--> RENEWING
 *   ^------- nak, or no answer to the request -------'                  ^--------- ack ----------'
 *
 * An address once had is kept even if it cannot be renewed: a server's address is fixed for its life, and a
 * guest that fell silent because nobody renewed its lease would be the worse failure.
 *
 * IPv6 is the kernel's: it makes its addresses of what routers advertise; link6.c asks for the rest.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <arpa/inet.h>
#include <linux/filter.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <net/route.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define FIRST_RETRY_MS 250
#define LAST_RETRY_MS 4000
#define COOKIE 0x63825363u
enum { DISCOVER = 1, OFFER = 2, REQUEST = 3, ACK = 5, NAK = 6 };
enum { OPT_MASK = 1, OPT_ROUTER = 3, OPT_MTU = 26, OPT_WANTED = 50, OPT_LEASE = 51, OPT_TYPE = 53,
       OPT_SERVER = 54, OPT_LIST = 55, OPT_END = 255 };

struct __attribute__((packed)) message {
    struct __attribute__((packed)) { /* IPv4 */
        uint8_t version, service;
        uint16_t length, id, fragment;
        uint8_t ttl, protocol;
        uint16_t checksum;
        uint32_t source, destination;
    } ip;
    struct __attribute__((packed)) {
        uint16_t source, destination, length, checksum;
    } udp;
    uint8_t op, hardware, hardware_length, hops;
    uint32_t transaction;
    uint16_t seconds, flags;
    uint32_t client, yours, next, relay;
    uint8_t address[16], server_name[64], file[128];
    uint32_t cookie;
    uint8_t options[312];
};

struct answer {
    int type;
    uint32_t yours, mask, router, server, lease, mtu;
};

struct link {
    struct watch packets, retry;
    enum { INIT, SELECTING, REQUESTING, BOUND, RENEWING } state;
    unsigned retry_ms;
    int number, index;
    uint8_t mac[6];
    char name[IFNAMSIZ];
    uint32_t transaction;
    struct answer offer;
    char address_text[INET_ADDRSTRLEN];
};

static struct link links[INTERFACES];
static void (*address_is_there)(struct in_addr);

#define LINK_OF(watch, member) ((struct link *)((char *)(watch) - offsetof(struct link, member)))

const char *link_address(void)
{
    return links[0].address_text;
}

static bool interface_up(int control, const char *name)
{
    struct ifreq request = {0};
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    if (ioctl(control, SIOCGIFFLAGS, &request) != 0)
        return false;
    request.ifr_flags |= IFF_UP;
    return ioctl(control, SIOCSIFFLAGS, &request) == 0;
}

static uint16_t ip_checksum(const void *data, size_t length)
{
    const uint16_t *words = data;
    uint32_t sum = 0;
    for (size_t i = 0; i < length / 2; i++)
        sum += words[i];
    sum = (sum & 0xffff) + (sum >> 16);
    return ~((sum & 0xffff) + (sum >> 16));
}

static uint8_t *option(uint8_t *at, int code, const void *value, int length)
{
    *at++ = code;
    *at++ = length;
    memcpy(at, value, length);
    return at + length;
}

static void send_message(struct link *link, int type)
{
    struct message m = {0};
    m.op = 1;
    m.hardware = 1;
    m.hardware_length = sizeof link->mac;
    m.transaction = link->transaction;
    m.cookie = htonl(COOKIE);
    memcpy(m.address, link->mac, sizeof link->mac);
    uint8_t kind = type, wishes[] = {OPT_MASK, OPT_ROUTER, OPT_MTU, OPT_LEASE};
    uint8_t *at = option(m.options, OPT_TYPE, &kind, 1);
    if (link->state == RENEWING) {
        m.client = link->offer.yours;
    } else if (type == REQUEST) {
        at = option(at, OPT_WANTED, &link->offer.yours, 4);
        at = option(at, OPT_SERVER, &link->offer.server, 4);
    }
    at = option(at, OPT_LIST, wishes, sizeof wishes);
    *at++ = OPT_END;
    size_t size = at - (uint8_t *)&m;
    if (size < 300 + 28) /* some servers want what BOOTP wanted */
        size = 300 + 28;
    m.ip.version = 0x45;
    m.ip.ttl = 64;
    m.ip.protocol = IPPROTO_UDP;
    m.ip.length = htons(size);
    m.ip.source = m.client;
    m.ip.destination = 0xffffffff;
    m.ip.checksum = ip_checksum(&m.ip, sizeof m.ip);
    m.udp.source = htons(68);
    m.udp.destination = htons(67);
    m.udp.length = htons(size - sizeof m.ip); /* the checksum stays 0: none */
    struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP),
                             .sll_ifindex = link->index, .sll_halen = 6};
    memset(to.sll_addr, 0xff, 6);
    sendto(link->packets.fd, &m, size, MSG_DONTWAIT, (struct sockaddr *)&to, sizeof to);
}

static uint32_t raw32(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static bool parse(const struct link *link, const struct message *m, size_t size, struct answer *answer)
{
    if (size < offsetof(struct message, options) || m->op != 2 || m->transaction != link->transaction ||
        m->cookie != htonl(COOKIE) || memcmp(m->address, link->mac, sizeof link->mac) != 0)
        return false;
    const uint8_t *at = m->options, *end = (const uint8_t *)m + size;
    *answer = (struct answer){.yours = m->yours, .lease = 3600};
    while (at < end && *at != OPT_END) {
        if (*at == 0) {
            at++;
            continue;
        }
        if (at + 2 > end || at + 2 + at[1] > end)
            return false;
        int code = at[0], length = at[1];
        const uint8_t *value = at + 2;
        if (code == OPT_TYPE && length == 1)
            answer->type = *value;
        if (code == OPT_MTU && length == 2)
            answer->mtu = value[0] << 8 | value[1];
        if (length >= 4) {
            if (code == OPT_MASK) answer->mask = raw32(value);
            if (code == OPT_ROUTER) answer->router = raw32(value);
            if (code == OPT_SERVER) answer->server = raw32(value);
            if (code == OPT_LEASE) answer->lease = ntohl(raw32(value));
        }
        at = value + length;
    }
    return answer->type != 0;
}

static struct sockaddr inet(uint32_t address)
{
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = address};
    struct sockaddr out;
    memcpy(&out, &in, sizeof out);
    return out;
}

static void use_address(struct link *link, const struct answer *answer)
{
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq request = {0};
    memcpy(request.ifr_name, link->name, IFNAMSIZ);
    if (answer->mtu >= 576) {
        request.ifr_mtu = answer->mtu;
        ioctl(control, SIOCSIFMTU, &request);
    }
    request.ifr_addr = inet(answer->yours);
    ioctl(control, SIOCSIFADDR, &request);
    request.ifr_netmask = inet(answer->mask ? answer->mask : htonl(0xffffff00));
    ioctl(control, SIOCSIFNETMASK, &request);
    if (answer->router) {
        struct rtentry route = {.rt_dst = inet(0), .rt_gateway = inet(answer->router),
                                .rt_genmask = inet(0), .rt_flags = RTF_UP | RTF_GATEWAY,
                                .rt_dev = link->name, .rt_metric = link->number + 1};
        ioctl(control, SIOCADDRT, &route);
    }
    close(control);
}

/* Only DHCP answers wake us: without a filter every datagram of a busy server would be copied here. */
static void open_packets(struct link *link)
{
    static struct sock_filter program[] = {
        BPF_STMT(BPF_LD | BPF_B | BPF_ABS, 9),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, IPPROTO_UDP, 0, 4),
        BPF_STMT(BPF_LDX | BPF_B | BPF_MSH, 0),
        BPF_STMT(BPF_LD | BPF_H | BPF_IND, 2),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 68, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, 0xffff),
        BPF_STMT(BPF_RET | BPF_K, 0),
    };
    struct sock_fprog filter = {.len = sizeof program / sizeof *program, .filter = program};
    struct sockaddr_ll here = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP),
                               .sll_ifindex = link->index};
    if (link->packets.fd >= 0)
        return;
    link->packets.fd = socket(AF_PACKET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(link->packets.fd, SOL_SOCKET, SO_ATTACH_FILTER, &filter, sizeof filter);
    bind(link->packets.fd, (struct sockaddr *)&here, sizeof here);
    loop_add(&link->packets, EPOLLIN);
}

static void close_packets(struct link *link)
{
    loop_remove(&link->packets);
    close(link->packets.fd);
    link->packets.fd = -1;
}

static void ask(struct link *link)
{
    open_packets(link);
    link->transaction = (uint32_t)(now_ns() >> 10) ^ raw32(link->mac + 2);
    link->state = SELECTING;
    send_message(link, DISCOVER);
    timer_set(link->retry.fd, link->retry_ms, 0);
    link->retry_ms = link->retry_ms * 2 > LAST_RETRY_MS ? LAST_RETRY_MS : link->retry_ms * 2;
}

static void bound(struct link *link, const struct answer *answer)
{
    bool changed = !link->address_text[0] || answer->yours != link->offer.yours;
    link->offer = *answer;
    link->state = BOUND;
    link->retry_ms = FIRST_RETRY_MS;
    close_packets(link);
    uint64_t half = (uint64_t)answer->lease * 500;
    timer_set(link->retry.fd, half < 5000 ? 5000 : half, 0);
    if (!changed)
        return;
    struct in_addr address = {.s_addr = answer->yours};
    use_address(link, answer);
    inet_ntop(AF_INET, &address, link->address_text, sizeof link->address_text);
    if (link->number == 0)
        address_is_there(address);
    else
        console_print("address %s on %s\n", link->address_text, link->name);
}

static void packet_ready(struct watch *watch, uint32_t events)
{
    (void)events;
    struct link *link = LINK_OF(watch, packets);
    struct message m;
    for (;;) {
        ssize_t size = recv(watch->fd, &m, sizeof m, MSG_DONTWAIT);
        struct answer answer;
        if (size <= 0)
            return;
        if (!parse(link, &m, size, &answer))
            continue;
        bool awaited = link->state == REQUESTING || link->state == RENEWING;
        if (link->state == SELECTING && answer.type == OFFER && answer.server) {
            uint32_t had = link->offer.yours;
            link->offer = answer;
            link->state = REQUESTING;
            send_message(link, REQUEST);
            timer_set(link->retry.fd, 1000, 0);
            if (link->address_text[0] && had != answer.yours)
                link->address_text[0] = 0; /* moved to another network: announce the new address */
        } else if (awaited && answer.type == ACK) {
            bound(link, &answer);
            return;
        } else if (awaited && answer.type == NAK) {
            ask(link);
        }
    }
}

static void retry_ready(struct watch *watch, uint32_t events)
{
    (void)events;
    struct link *link = LINK_OF(watch, retry);
    timer_read(watch->fd);
    if (link->state == BOUND) {
        link->state = RENEWING;
        open_packets(link);
        link->transaction++;
        send_message(link, REQUEST);
        timer_set(link->retry.fd, 2000, 0);
    } else {
        ask(link);
    }
}

/* False if there is no such interface. */
static bool start(int control, int number)
{
    struct link *link = &links[number];
    struct ifreq request = {0};
    snprintf(link->name, sizeof link->name, "eth%d", number);
    memcpy(request.ifr_name, link->name, IFNAMSIZ);
    if (ioctl(control, SIOCGIFHWADDR, &request) != 0)
        return false;
    memcpy(link->mac, request.ifr_hwaddr.sa_data, sizeof link->mac);
    ioctl(control, SIOCGIFINDEX, &request);
    link->index = request.ifr_ifindex;
    link->number = number;
    link->retry_ms = FIRST_RETRY_MS;
    link6_start(link->name, link->index, link->mac); /* before the kernel asks for routers */
    if (!interface_up(control, link->name))
        return false;
    link->packets = (struct watch){.ready = packet_ready, .fd = -1};
    link->retry = (struct watch){.ready = retry_ready, .fd = timer_open()};
    loop_add(&link->retry, EPOLLIN);
    ask(link);
    return true;
}

void link_start(void (*on_address)(struct in_addr address))
{
    address_is_there = on_address;
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), number = 0;
    interface_up(control, "lo");
    while (number < INTERFACES && start(control, number))
        number++;
    if (number == 0)
        console_print("no network interface\n");
    close(control);
}
