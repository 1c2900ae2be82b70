/* The guest's interface: up, and an address by DHCP.
 *
 * INIT --discover--> SELECTING --offer/request--> REQUESTING --ack--> BOUND --half the lease--> RENEWING
 *   ^------- nak, or no answer to the request -------'                  ^--------- ack ----------'
 *
 * An address once had is kept even if it cannot be renewed: a server's address is fixed for its life, and a
 * guest that fell silent because nobody renewed its lease would be the worse failure.
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

#define INTERFACE "eth0"
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

static enum { INIT, SELECTING, REQUESTING, BOUND, RENEWING } state;
static struct watch packets = {.fd = -1};
static struct watch retry = {.fd = -1};
static unsigned retry_ms = FIRST_RETRY_MS;
static int interface_index;
static uint8_t mac[6];
static uint32_t transaction;
static struct answer offer;
static char address_text[INET_ADDRSTRLEN];
static void (*address_is_there)(struct in_addr);

const char *link_address(void)
{
    return address_text;
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

static void send_message(int type)
{
    struct message m = {0};
    m.op = 1;
    m.hardware = 1;
    m.hardware_length = sizeof mac;
    m.transaction = transaction;
    m.cookie = htonl(COOKIE);
    memcpy(m.address, mac, sizeof mac);
    uint8_t kind = type, wishes[] = {OPT_MASK, OPT_ROUTER, OPT_MTU, OPT_LEASE};
    uint8_t *at = option(m.options, OPT_TYPE, &kind, 1);
    if (state == RENEWING) {
        m.client = offer.yours;
    } else if (type == REQUEST) {
        at = option(at, OPT_WANTED, &offer.yours, 4);
        at = option(at, OPT_SERVER, &offer.server, 4);
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
                             .sll_ifindex = interface_index, .sll_halen = 6};
    memset(to.sll_addr, 0xff, 6);
    sendto(packets.fd, &m, size, MSG_DONTWAIT, (struct sockaddr *)&to, sizeof to);
}

static uint32_t raw32(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static bool parse(const struct message *m, size_t size, struct answer *answer)
{
    if (size < offsetof(struct message, options) || m->op != 2 || m->transaction != transaction ||
        m->cookie != htonl(COOKIE) || memcmp(m->address, mac, sizeof mac) != 0)
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

static void use_address(const struct answer *answer)
{
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq request = {0};
    strncpy(request.ifr_name, INTERFACE, IFNAMSIZ - 1);
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
                                .rt_genmask = inet(0), .rt_flags = RTF_UP | RTF_GATEWAY};
        ioctl(control, SIOCADDRT, &route);
    }
    close(control);
}

/* Only DHCP answers wake us: without a filter every datagram of a busy server would be copied here. */
static void open_packets(void)
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
                               .sll_ifindex = interface_index};
    if (packets.fd >= 0)
        return;
    packets.fd = socket(AF_PACKET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(packets.fd, SOL_SOCKET, SO_ATTACH_FILTER, &filter, sizeof filter);
    bind(packets.fd, (struct sockaddr *)&here, sizeof here);
    loop_add(&packets, EPOLLIN);
}

static void close_packets(void)
{
    loop_remove(&packets);
    close(packets.fd);
    packets.fd = -1;
}

static void ask(void)
{
    open_packets();
    transaction = (uint32_t)(now_ns() >> 10) ^ raw32(mac + 2);
    state = SELECTING;
    send_message(DISCOVER);
    timer_set(retry.fd, retry_ms, 0);
    retry_ms = retry_ms * 2 > LAST_RETRY_MS ? LAST_RETRY_MS : retry_ms * 2;
}

static void bound(const struct answer *answer)
{
    bool changed = !address_text[0] || answer->yours != offer.yours;
    offer = *answer;
    state = BOUND;
    retry_ms = FIRST_RETRY_MS;
    close_packets();
    uint64_t half = (uint64_t)answer->lease * 500;
    timer_set(retry.fd, half < 5000 ? 5000 : half, 0);
    if (!changed)
        return;
    struct in_addr address = {.s_addr = answer->yours};
    use_address(answer);
    inet_ntop(AF_INET, &address, address_text, sizeof address_text);
    address_is_there(address);
}

static void packet_ready(struct watch *watch, uint32_t events)
{
    (void)events;
    struct message m;
    for (;;) {
        ssize_t size = recv(watch->fd, &m, sizeof m, MSG_DONTWAIT);
        struct answer answer;
        if (size <= 0)
            return;
        if (!parse(&m, size, &answer))
            continue;
        if (state == SELECTING && answer.type == OFFER && answer.server) {
            struct answer chosen = answer;
            uint32_t had = offer.yours;
            offer = chosen;
            state = REQUESTING;
            send_message(REQUEST);
            timer_set(retry.fd, 1000, 0);
            if (address_text[0] && had != chosen.yours)
                address_text[0] = 0; /* moved to another network: announce the new address */
        } else if ((state == REQUESTING || state == RENEWING) && answer.type == ACK) {
            bound(&answer);
            return;
        } else if ((state == REQUESTING || state == RENEWING) && answer.type == NAK) {
            ask();
        }
    }
}

static void retry_ready(struct watch *watch, uint32_t events)
{
    (void)events;
    timer_read(watch->fd);
    if (state == BOUND) {
        state = RENEWING;
        open_packets();
        transaction++;
        send_message(REQUEST);
        timer_set(retry.fd, 2000, 0);
    } else {
        ask();
    }
}

void link_start(void (*on_address)(struct in_addr address))
{
    address_is_there = on_address;
    int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq request = {0};
    strncpy(request.ifr_name, INTERFACE, IFNAMSIZ - 1);
    interface_up(control, "lo");
    if (ioctl(control, SIOCGIFHWADDR, &request) != 0 || !interface_up(control, INTERFACE)) {
        console_print("no network interface\n");
        close(control);
        return;
    }
    memcpy(mac, request.ifr_hwaddr.sa_data, sizeof mac);
    ioctl(control, SIOCGIFINDEX, &request);
    interface_index = request.ifr_ifindex;
    close(control);
    packets.ready = packet_ready;
    retry = (struct watch){.ready = retry_ready, .fd = timer_open()};
    loop_add(&retry, EPOLLIN);
    ask();
}
