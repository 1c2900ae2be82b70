/* The guest agent's protocol, as QEMU's own agent speaks it, over the virtio port org.qemu.guest_agent.0: as
 * much of it as hosts use. One command at a time: the next is read when the last is answered.
 *
 * There is no file system to freeze. What stands for it is the disk checker: frozen, it has written a mark that
 * says up to which block the disk is whole, and writes nothing more until it is thawed. */
#define _GNU_SOURCE
#include "guest.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/reboot.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#define PORT "org.qemu.guest_agent.0"
#define PORTS "/sys/class/virtio-ports"
#define VERSION "nahtlos-probe-1"
#define FIND_EVERY_MS 100
#define FIND_TIMES 100
#define DELIMITER '\xff'

static struct watch channel = {.fd = -1}, finder, settled;
static int looked;
static char line[2048];
static size_t length;
static bool settling; /* a freeze or a thaw is under way on the disk's thread */

static void say(const char *text)
{
    (void)!write(channel.fd, text, strlen(text));
}

static void say_return(const char *value)
{
    char text[2200];
    snprintf(text, sizeof text, "{\"return\": %s}\n", value);
    say(text);
}

static void say_error(const char *class, const char *why)
{
    char text[300];
    snprintf(text, sizeof text, "{\"error\": {\"class\": \"%s\", \"desc\": \"%s\"}}\n", class, why);
    say(text);
}

/* The value behind "name":, NULL if there is none. Commands are flat: no name stands twice. */
static char *value_of(char *text, const char *name)
{
    char quoted[40];
    snprintf(quoted, sizeof quoted, "\"%s\"", name);
    char *found = strstr(text, quoted);
    if (!found)
        return NULL;
    found += strlen(quoted);
    found += strspn(found, " :");
    return found;
}

static bool string_of(char *text, const char *name, char *out, size_t size)
{
    char *value = value_of(text, name);
    char *end = value && *value == '"' ? strchr(value + 1, '"') : NULL;
    if (!end || (size_t)(end - value) > size)
        return false;
    memcpy(out, value + 1, end - value - 1);
    out[end - value - 1] = 0;
    return true;
}

static void answer_sync(char *text)
{
    char number[32], *id = value_of(text, "id");
    snprintf(number, sizeof number, "%lld", id ? strtoll(id, NULL, 10) : 0);
    say_return(number);
}

static void answer_time(void)
{
    char number[32];
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    snprintf(number, sizeof number, "%lld", now.tv_sec * 1000000000ll + now.tv_nsec);
    say_return(number);
}

static void set_time(char *text)
{
    char *value = value_of(text, "time");
    long long ns = value ? strtoll(value, NULL, 10) : 0;
    struct timespec wanted = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
    if (ns <= 0 || clock_settime(CLOCK_REALTIME, &wanted) != 0)
        say_error("GenericError", "the time cannot be set to that");
    else
        say_return("{}");
}

static int prefix_of(const struct sockaddr *mask)
{
    int bits = 0;
    const uint8_t *bytes = mask->sa_family == AF_INET
                               ? (const uint8_t *)&((const struct sockaddr_in *)mask)->sin_addr
                               : (const uint8_t *)&((const struct sockaddr_in6 *)mask)->sin6_addr;
    for (int i = 0; i < (mask->sa_family == AF_INET ? 4 : 16); i++)
        bits += __builtin_popcount(bytes[i]);
    return bits;
}

static void answer_interfaces(void)
{
    char list[2048], *at = list, *end = list + sizeof list - 4;
    struct ifaddrs *all = NULL;
    getifaddrs(&all);
    *at++ = '[';
    for (struct if_nameindex *names = if_nameindex(), *name = names; name && name->if_index; name++) {
        at += snprintf(at, end - at, "%s{\"name\": \"%s\", \"ip-addresses\": [", name == names ? "" : ", ",
                       name->if_name);
        bool first = true;
        for (struct ifaddrs *each = all; each && end - at > 200; each = each->ifa_next) {
            int family = each->ifa_addr ? each->ifa_addr->sa_family : AF_UNSPEC;
            if (strcmp(each->ifa_name, name->if_name) || (family != AF_INET && family != AF_INET6))
                continue;
            char address[64];
            inet_ntop(family,
                      family == AF_INET ? (void *)&((struct sockaddr_in *)each->ifa_addr)->sin_addr
                                        : (void *)&((struct sockaddr_in6 *)each->ifa_addr)->sin6_addr,
                      address, sizeof address);
            at += snprintf(at, end - at,
                           "%s{\"ip-address\": \"%s\", \"ip-address-type\": \"%s\", \"prefix\": %d}",
                           first ? "" : ", ", address, family == AF_INET ? "ipv4" : "ipv6",
                           prefix_of(each->ifa_netmask));
            first = false;
        }
        at += snprintf(at, end - at, "]}");
        if (end - at < 300)
            break;
    }
    strcpy(at, "]");
    freeifaddrs(all);
    say_return(list);
}

static void answer_system(void)
{
    char text[400];
    struct utsname system;
    uname(&system);
    snprintf(text, sizeof text,
             "{\"id\": \"nahtlos-probe\", \"name\": \"nahtlos\", \"pretty-name\": \"nahtlos probe guest\", "
             "\"kernel-release\": \"%s\", \"machine\": \"%s\"}",
             system.release, system.machine);
    say_return(text);
}

static void answer_info(void);

static void settle(bool frozen)
{
    if (!disk_freeze_begin(frozen))
        say_return("0"); /* there is no disk, or nothing changes */
    else
        settling = true;
}

static void freeze(void)
{
    if (disk_frozen())
        say_error("GenericError", "Command guest-fsfreeze-freeze has been disabled: the command is not allowed");
    else
        settle(true);
}

static void thaw(void)
{
    settle(false);
}

static void answer_freeze_status(void)
{
    say_return(disk_frozen() ? "\"frozen\"" : "\"thawed\"");
}

static void answer_ping(void)
{
    say_return("{}");
}

static void power_off(void)
{
    sync();
    reboot(RB_POWER_OFF);
}

static const struct command {
    const char *name;
    void (*plain)(void);
    void (*given)(char *text);
    bool while_frozen;
} commands[] = {
    {"guest-sync-delimited", .given = answer_sync, .while_frozen = true},
    {"guest-sync", .given = answer_sync, .while_frozen = true},
    {"guest-ping", .plain = answer_ping, .while_frozen = true},
    {"guest-info", .plain = answer_info, .while_frozen = true},
    {"guest-get-time", .plain = answer_time},
    {"guest-set-time", .given = set_time},
    {"guest-get-osinfo", .plain = answer_system},
    {"guest-network-get-interfaces", .plain = answer_interfaces},
    {"guest-fsfreeze-status", .plain = answer_freeze_status, .while_frozen = true},
    {"guest-fsfreeze-freeze", .plain = freeze},
    {"guest-fsfreeze-thaw", .plain = thaw, .while_frozen = true},
    {"guest-shutdown", .plain = power_off},
};

static void answer_info(void)
{
    char list[2048], *at = list, *end = list + sizeof list;
    at += snprintf(at, end - at, "{\"version\": \"%s\", \"supported_commands\": [", VERSION);
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        at += snprintf(at, end - at, "%s{\"name\": \"%s\", \"enabled\": %s, \"success-response\": %s}",
                       i ? ", " : "", commands[i].name,
                       commands[i].while_frozen || !disk_frozen() ? "true" : "false",
                       commands[i].plain == power_off ? "false" : "true");
    snprintf(at, end - at, "]}");
    say_return(list);
}

static void obey(char *text)
{
    char name[64];
    if (!string_of(text, "execute", name, sizeof name)) {
        say_error("GenericError", "Invalid JSON syntax");
        return;
    }
    if (!strcmp(name, "guest-sync-delimited"))
        say("\xff");
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        if (strcmp(commands[i].name, name))
            continue;
        if (disk_frozen() && !commands[i].while_frozen)
            say_error("CommandNotFound", "Command has been disabled: the file systems are frozen");
        else if (commands[i].plain)
            commands[i].plain();
        else
            commands[i].given(text);
        return;
    }
    say_error("CommandNotFound", "The command has not been found");
}

static void heard(char c)
{
    if (c == DELIMITER) {
        length = 0;
    } else if (c == '\n') {
        line[length] = 0;
        bool any = length > 0;
        length = 0;
        if (any)
            obey(line);
    } else if (length < sizeof line - 1) {
        line[length++] = c;
    }
}

/* By single bytes: what follows a freeze is left where it is until that has ended. */
static void channel_ready(struct watch *watch, uint32_t events)
{
    (void)events;
    char c;
    while (!settling && read(watch->fd, &c, 1) == 1)
        heard(c);
}

static void disk_settled(struct watch *watch, uint32_t events)
{
    uint64_t drop;
    if (read(watch->fd, &drop, sizeof drop) != sizeof drop || !settling)
        return;
    settling = false;
    say_return("1");
    channel_ready(&channel, events);
}

static bool open_port(const char *folder)
{
    char path[300], name[64];
    snprintf(path, sizeof path, PORTS "/%s/name", folder);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? 0 : read(fd, name, sizeof name - 1);
    if (fd >= 0)
        close(fd);
    name[size > 0 ? size : 0] = 0;
    name[strcspn(name, "\n")] = 0;
    if (strcmp(name, PORT))
        return false;
    snprintf(path, sizeof path, "/dev/%s", folder);
    channel = (struct watch){.ready = channel_ready, .fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC)};
    if (channel.fd < 0)
        return false;
    /* By edges: while no host listens the port says all the time that its other end is closed. */
    loop_add(&channel, EPOLLIN | EPOLLET);
    return true;
}

/* The port comes a moment after its driver. */
static void find(struct watch *watch, uint32_t events)
{
    (void)events;
    timer_read(watch->fd);
    bool found = false;
    DIR *ports = opendir(PORTS);
    for (struct dirent *entry; ports && !found && (entry = readdir(ports));)
        found = entry->d_name[0] != '.' && open_port(entry->d_name);
    if (ports)
        closedir(ports);
    if (found || ++looked == FIND_TIMES) {
        loop_remove(watch);
        close(watch->fd);
    }
}

void agent_start(void)
{
    settled = (struct watch){.fd = disk_freeze_done_fd(), .ready = disk_settled};
    if (settled.fd >= 0)
        loop_add(&settled, EPOLLIN);
    finder = (struct watch){.fd = timer_open(), .ready = find};
    timer_set(finder.fd, 1, FIND_EVERY_MS);
    loop_add(&finder, EPOLLIN);
}
