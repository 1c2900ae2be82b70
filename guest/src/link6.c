/* IPv6 besides what the kernel does by itself: an address by DHCPv6 where a router advertisement says that there
 * are any (the flag "managed"). One question and one answer (rapid commit), asked again until it is answered;
 * the address is kept for good, as the IPv4 one is. */
#define _GNU_SOURCE
#include "guest.h"

#include <arpa/inet.h>
#include <linux/rtnetlink.h>
#include <netinet/icmp6.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define FIRST_RETRY_MS 500
#define LAST_RETRY_MS 30000
#define CLIENT_PORT 546
#define SERVER_PORT 547
enum { SOLICIT = 1, REPLY = 7 };
enum { OPT_CLIENT = 1, OPT_IA = 3, OPT_ADDRESS = 5, OPT_RAPID = 14 };

struct link6 {
    struct watch advertisements, answers, retry;
    unsigned retry_ms;
    int index;
    uint8_t mac[6];
    uint32_t transaction;
    enum { UNMANAGED, ASKING, DONE } state;
};

static struct link6 links[INTERFACES];
static int count;

#define LINK_OF(watch, member) ((struct link6 *)((char *)(watch) - offsetof(struct link6, member)))

static uint8_t *option(uint8_t *at, int code, int length)
{
    uint16_t head[2] = {htons(code), htons(length)};
    memcpy(at, head, sizeof head);
    memset(at + sizeof head, 0, length);
    return at + sizeof head;
}

static void ask(struct link6 *link)
{
    uint8_t message[64], *at = message + 4;
    uint32_t head = htonl((uint32_t)SOLICIT << 24 | link->transaction);
    memcpy(message, &head, sizeof head);
    at = option(at, OPT_CLIENT, 10);
    memcpy(at, "\0\3\0\1", 4); /* identified by its MAC */
    memcpy(at + 4, link->mac, sizeof link->mac);
    at = option(at + 10, OPT_IA, 12);
    at[3] = 1;
    at = option(at + 12, OPT_RAPID, 0);
    struct sockaddr_in6 to = {.sin6_family = AF_INET6, .sin6_port = htons(SERVER_PORT),
                              .sin6_scope_id = link->index};
    inet_pton(AF_INET6, "ff02::1:2", &to.sin6_addr);
    sendto(link->answers.fd, message, at - message, MSG_DONTWAIT, (struct sockaddr *)&to, sizeof to);
    timer_set(link->retry.fd, link->retry_ms, 0);
    link->retry_ms = link->retry_ms * 2 > LAST_RETRY_MS ? LAST_RETRY_MS : link->retry_ms * 2;
}

/* The content of option `code`, or NULL. */
static const uint8_t *find(const uint8_t *at, const uint8_t *end, int code, int at_least, int *length)
{
    while (at + 4 <= end) {
        int kind = at[0] << 8 | at[1];
        *length = at[2] << 8 | at[3];
        if (at + 4 + *length > end)
            return NULL;
        if (kind == code && *length >= at_least)
            return at + 4;
        at += 4 + *length;
    }
    return NULL;
}

static bool use_address(int index, const uint8_t *address)
{
    struct {
        struct nlmsghdr head;
        struct ifaddrmsg body;
        struct rtattr kind;
        uint8_t address[16];
    } request = {
        .head = {.nlmsg_len = sizeof request, .nlmsg_type = RTM_NEWADDR,
                 .nlmsg_flags = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_REPLACE},
        .body = {.ifa_family = AF_INET6, .ifa_prefixlen = 128, .ifa_index = index},
        .kind = {.rta_len = sizeof(struct rtattr) + 16, .rta_type = IFA_LOCAL},
    };
    memcpy(request.address, address, sizeof request.address);
    int netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    bool sent = send(netlink, &request, sizeof request, 0) == sizeof request;
    close(netlink);
    return sent;
}

static void answer_ready(struct watch *watch, uint32_t events)
{
    (void)events;
    struct link6 *link = LINK_OF(watch, answers);
    uint8_t message[1500];
    ssize_t size;
    while ((size = recv(watch->fd, message, sizeof message, MSG_DONTWAIT)) >= 0) {
        uint32_t head = htonl((uint32_t)REPLY << 24 | link->transaction);
        if (link->state != ASKING || size < 4 || memcmp(message, &head, sizeof head) != 0)
            continue;
        int length;
        const uint8_t *ia = find(message + 4, message + size, OPT_IA, 12, &length);
        const uint8_t *address = ia ? find(ia + 12, ia + length, OPT_ADDRESS, 24, &length) : NULL;
        if (!address || !use_address(link->index, address))
            continue;
        char text[INET6_ADDRSTRLEN];
        link->state = DONE;
        timer_set(link->retry.fd, 0, 0);
        console_print("address %s by DHCPv6\n", inet_ntop(AF_INET6, address, text, sizeof text));
    }
}

static void retry_ready(struct watch *watch, uint32_t events)
{
    (void)events;
    timer_read(watch->fd);
    ask(LINK_OF(watch, retry));
}

static void advertisement_ready(struct watch *watch, uint32_t events)
{
    (void)events;
    struct link6 *link = LINK_OF(watch, advertisements);
    struct nd_router_advert message;
    while (recv(watch->fd, &message, sizeof message, MSG_DONTWAIT) >= (ssize_t)sizeof message)
        if (message.nd_ra_flags_reserved & ND_RA_FLAG_MANAGED && link->state == UNMANAGED) {
            link->state = ASKING;
            timer_set(link->retry.fd, FIRST_RETRY_MS, 0); /* its own address is being checked until then */
        }
}

static int advertisements_on(const char *name)
{
    int fd = socket(AF_INET6, SOCK_RAW | SOCK_NONBLOCK | SOCK_CLOEXEC, IPPROTO_ICMPV6);
    struct icmp6_filter filter;
    ICMP6_FILTER_SETBLOCKALL(&filter);
    ICMP6_FILTER_SETPASS(ND_ROUTER_ADVERT, &filter);
    setsockopt(fd, IPPROTO_ICMPV6, ICMP6_FILTER, &filter, sizeof filter);
    setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, name, strlen(name));
    return fd;
}

static int client_on(const char *name)
{
    int fd = socket(AF_INET6, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;
    struct sockaddr_in6 here = {.sin6_family = AF_INET6, .sin6_port = htons(CLIENT_PORT)};
    setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, name, strlen(name));
    bind(fd, (struct sockaddr *)&here, sizeof here);
    return fd;
}

void link6_start(const char *name, int index, const uint8_t mac[6])
{
    struct link6 *link = &links[count];
    link->advertisements = (struct watch){.ready = advertisement_ready, .fd = advertisements_on(name)};
    if (link->advertisements.fd < 0)
        return; /* a kernel without IPv6 */
    count++;
    link->index = index;
    link->retry_ms = FIRST_RETRY_MS;
    link->transaction = (now_ns() >> 10 ^ mac[5]) & 0xffffff;
    memcpy(link->mac, mac, sizeof link->mac);
    link->answers = (struct watch){.ready = answer_ready, .fd = client_on(name)};
    link->retry = (struct watch){.ready = retry_ready, .fd = timer_open()};
    loop_add(&link->advertisements, EPOLLIN);
    loop_add(&link->answers, EPOLLIN);
    loop_add(&link->retry, EPOLLIN);
}
