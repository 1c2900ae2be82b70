/* Sockets of services: one for both families. */
#define _GNU_SOURCE
#include "guest.h"

#include <sys/socket.h>

int service_socket(int type, int port)
{
    int fd = socket(AF_INET6, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1, off = 0;
    if (fd >= 0) {
        struct sockaddr_in6 here = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
        bind(fd, (struct sockaddr *)&here, sizeof here);
        return fd;
    }
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(port)};
    fd = socket(AF_INET, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    bind(fd, (struct sockaddr *)&here, sizeof here);
    return fd;
}
