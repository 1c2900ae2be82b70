/* PID 1: boots, then runs the event loop. */
#define _GNU_SOURCE
#include "guest.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define MEMORY_MIB 16
#define MEMORY_MB_PER_S 4

char boot_id[37];
uint64_t boot_number;

static int epoll_fd;

/* Watches removed while a batch of events is handled must not be called any more. */
static struct epoll_event batch[64];
static int batch_size;

void loop_add(struct watch *watch, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = watch};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, watch->fd, &event);
}

void loop_change(struct watch *watch, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = watch};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, watch->fd, &event);
}

void loop_remove(struct watch *watch)
{
    epoll_ctl(epoll_fd, EPOLL_CTL_DEL, watch->fd, NULL);
    for (int i = 0; i < batch_size; i++)
        if (batch[i].data.ptr == watch)
            batch[i].data.ptr = NULL;
}

static void loop_run(void)
{
    for (;;) {
        int count = epoll_wait(epoll_fd, batch, sizeof batch / sizeof *batch, -1);
        batch_size = count > 0 ? count : 0;
        for (int i = 0; i < batch_size; i++) {
            struct watch *watch = batch[i].data.ptr;
            if (watch)
                watch->ready(watch, batch[i].events);
        }
        batch_size = 0;
    }
}

int timer_open(void)
{
    return timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
}

static struct timespec from_ms(uint64_t ms)
{
    return (struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
}

void timer_set(int fd, uint64_t first_ms, uint64_t every_ms)
{
    struct itimerspec when = {.it_value = from_ms(first_ms), .it_interval = from_ms(every_ms)};
    timerfd_settime(fd, 0, &when, NULL);
}

uint64_t timer_read(int fd)
{
    uint64_t expired = 0;
    return read(fd, &expired, sizeof expired) == sizeof expired ? expired : 0;
}

uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

bool write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    bool written = write(fd, text, strlen(text)) == (ssize_t)strlen(text);
    close(fd);
    return written;
}

static size_t read_file(const char *path, char *out, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? 0 : read(fd, out, size - 1);
    if (fd >= 0)
        close(fd);
    out[length > 0 ? length : 0] = 0;
    return length > 0 ? (size_t)length : 0;
}

static long meminfo_mib(const char *name)
{
    char text[1024];
    read_file("/proc/meminfo", text, sizeof text);
    char *found = strstr(text, name);
    return found ? atol(found + strlen(name)) / 1024 : 0;
}

long available_mib(void)
{
    return meminfo_mib("MemAvailable:");
}

long total_mib(void)
{
    return meminfo_mib("MemTotal:");
}

static void mount_kernel_file_systems(void)
{
    mkdir("/dev", 0755);
    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, NULL);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
}

/* Modules are stored as /modules/NN-name.ko, in the order in which they depend on each other. */
static int by_name(const struct dirent **left, const struct dirent **right)
{
    return strcmp((*left)->d_name, (*right)->d_name);
}

static void load_modules(void)
{
    struct dirent **names;
    int count = scandir("/modules", &names, NULL, by_name);
    for (int i = 0; i < count; i++) {
        char path[300];
        snprintf(path, sizeof path, "/modules/%s", names[i]->d_name);
        int fd = names[i]->d_name[0] == '.' ? -1 : open(path, O_RDONLY | O_CLOEXEC);
        if (fd >= 0 && syscall(SYS_finit_module, fd, "", 0) != 0 && errno != EEXIST)
            console_print("module %s: %s\n", names[i]->d_name, strerror(errno));
        if (fd >= 0)
            close(fd);
    }
}

static int hex(char digit)
{
    return digit <= '9' ? digit - '0' : (digit | 32) - 'a' + 10;
}

static void learn_boot_id(void)
{
    read_file("/proc/sys/kernel/random/boot_id", boot_id, sizeof boot_id);
    uint8_t bytes[8];
    const char *digit = boot_id;
    for (int i = 0; i < 8; i++) {
        digit += *digit == '-';
        bytes[i] = hex(digit[0]) << 4 | hex(digit[1]);
        digit += 2;
    }
    memcpy(&boot_number, bytes, sizeof bytes);
}

static void allow_many_connections(void)
{
    struct rlimit files = {8192, 8192};
    setrlimit(RLIMIT_NOFILE, &files);
}

/* Says that a guest boots here at all; nothing else of the machine is needed for that. */
static void answer_probe(const char *arguments)
{
    const char *probe = strstr(arguments, "nahtlos.probe=");
    if (!probe)
        return;
    console_print("NAHTLOS-PROBE-OK\n");
    if (strncmp(probe, "nahtlos.probe=idle", 18) == 0)
        for (;;)
            pause();
    usleep(20000); /* the last characters are still on their way */
    reboot(RB_POWER_OFF);
}

static void announce(struct in_addr address)
{
    (void)address;
    console_print("NAHTLOS-READY %s %s\n", link_address(), boot_id);
}

int main(void)
{
    char arguments[2048];
    signal(SIGPIPE, SIG_IGN);
    mount_kernel_file_systems();
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    console_start();
    read_file("/proc/cmdline", arguments, sizeof arguments);
    answer_probe(arguments);

    load_modules();
    learn_boot_id();
    char clock_source[32];
    read_file("/sys/devices/system/clocksource/clocksource0/current_clocksource", clock_source,
              sizeof clock_source);
    clock_source[strcspn(clock_source, "\n")] = 0;
    console_print("boot %s, kernel up after %.2f s, clock %s\n", boot_id, now_ns() / 1e9, clock_source);
    allow_many_connections();
    setpriority(PRIO_PROCESS, 0, -10); /* answers before checkers; those lower theirs */
    datagram_start();
    disk_start(); /* before the streams, which offer its check */
    stream_start();
    link_start(announce);
    memory_start(MEMORY_MIB, MEMORY_MB_PER_S);
    work_start();
    clock_start();
    agent_start();
    loop_run();
}
