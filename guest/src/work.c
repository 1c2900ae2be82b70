/* What the guest makes of its processors: those plugged while it runs are taken into use, and workers, if asked
 * for, count the turns they get (one worker keeps one processor busy). */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <linux/netlink.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define WORKERS 64
#define TURN 100000 /* rounds of a calculation nobody reads */

static atomic_uint wanted;
static atomic_uint_fast64_t turns;
static unsigned started; /* by the event loop alone */

static void *plug(void *unused)
{
    struct sockaddr_nl here = {.nl_family = AF_NETLINK, .nl_groups = 1};
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_KOBJECT_UEVENT);
    char text[4096], path[128];
    unsigned number;
    (void)unused;
    if (fd < 0 || bind(fd, (struct sockaddr *)&here, sizeof here) != 0)
        return NULL;
    for (;;) {
        ssize_t length = recv(fd, text, sizeof text - 1, 0);
        if (length < 0 && errno != EINTR && errno != ENOBUFS)
            return NULL;
        text[length > 0 ? length : 0] = 0;
        if (sscanf(text, "add@/devices/system/cpu/cpu%u", &number) != 1)
            continue;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%u/online", number);
        write_file(path, "1");
    }
}

static void *work(void *number)
{
    uint64_t x = 1;
    setpriority(PRIO_PROCESS, syscall(SYS_gettid), 5);
    for (;;) {
        while ((uintptr_t)number >= wanted)
            usleep(20000);
        for (int i = 0; i < TURN; i++)
            x = x * 6364136223846793005u + 1442695040888963407u;
        turns += 1 + (x == 0);
    }
    return NULL;
}

const char *work_set(long workers)
{
    pthread_t thread;
    if (workers > WORKERS)
        return "cpu_workers: at most 64";
    for (; started < (unsigned)workers; started++)
        pthread_create(&thread, NULL, work, (void *)(uintptr_t)started);
    wanted = workers;
    return NULL;
}

struct work_status work_status(void)
{
    return (struct work_status){.online = sysconf(_SC_NPROCESSORS_ONLN), .workers = wanted, .turns = turns};
}

void work_start(void)
{
    pthread_t thread;
    pthread_create(&thread, NULL, plug, NULL);
}
