/* TCP: a line echo, and HTTP for status, settings and the check of the disk.
 *
 * A connection reads into its input buffer, handles what is complete, and sends from its output buffer. It
 * reads nothing further while output waits, so a client that does not read holds up only itself. */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define LINE_PORT 7000
#define HTTP_PORT 80
#define INPUT 4096
#define OUTPUT 8192
#define CONNECTIONS 1500

struct connection {
    struct watch watch; /* first: the loop hands it back */
    bool http, closing, waits_for_disk;
    size_t in, out, sent;
    char input[INPUT], output[OUTPUT];
};

static struct watch line_listener, http_listener, disk_result;
static struct connection *disk_client;
static int connections;

static void end(struct connection *connection)
{
    if (connection == disk_client)
        disk_client = NULL;
    loop_remove(&connection->watch);
    close(connection->watch.fd);
    free(connection);
    connections--;
}

/* False once the connection is gone. */
static bool flush(struct connection *connection)
{
    while (connection->sent < connection->out) {
        ssize_t count = send(connection->watch.fd, connection->output + connection->sent,
                             connection->out - connection->sent, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (count < 0 && errno == EAGAIN) {
            loop_change(&connection->watch, EPOLLOUT);
            return true;
        }
        if (count <= 0) {
            end(connection);
            return false;
        }
        connection->sent += count;
    }
    connection->out = connection->sent = 0;
    if (connection->closing) {
        end(connection);
        return false;
    }
    return true;
}

static void consume(struct connection *connection, size_t count)
{
    connection->in -= count;
    memmove(connection->input, connection->input + count, connection->in);
}

/* --- line echo --- */

static void echo_lines(struct connection *connection)
{
    char *last = memrchr(connection->input, '\n', connection->in);
    size_t complete = last ? (size_t)(last - connection->input) + 1 : 0;
    if (!complete && connection->in == INPUT) {
        connection->closing = true; /* no line is that long */
        return;
    }
    memcpy(connection->output, connection->input, complete);
    connection->out = complete;
    consume(connection, complete);
}

/* --- HTTP --- */

static void answer(struct connection *connection, int code, const char *type, const char *body)
{
    const char *reason = code == 200 ? "OK" : code == 404 ? "Not Found" : code == 503 ? "Busy" : "Bad Request";
    connection->out = snprintf(connection->output, OUTPUT,
                               "HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\n"
                               "Connection: %s\r\n\r\n%s",
                               code, reason, type, strlen(body),
                               connection->closing ? "close" : "keep-alive", body);
    connection->sent = 0;
}

static void refuse(struct connection *connection, int code, const char *why)
{
    char body[256];
    snprintf(body, sizeof body, "{\"error\": \"%s\"}\n", why);
    answer(connection, code, "application/json", body);
}

/* Seconds since 1970, as this guest believes. */
static double time_of_day(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

size_t status_json(char *out, size_t size)
{
    struct memory_status memory = memory_status();
    struct disk_status disk = disk_status();
    struct work_status work = work_status();
    return snprintf(out, size,
                    "{\"boot_id\": \"%s\", \"uptime_ms\": %.1f, \"heartbeat\": %llu, "
                    "\"heartbeat_longest_gap_ms\": %.3f, "
                    "\"memory\": {\"mib\": %u, \"mb_per_s\": %u, \"verified_pages\": %llu, \"passes\": %llu, "
                    "\"errors\": %llu, \"total_mib\": %ld}, "
                    "\"cpu\": {\"online\": %ld, \"workers\": %u, \"turns\": %llu}, "
                    "\"disk\": {\"acknowledged\": %llu, \"errors\": %llu, \"per_s\": %u, \"capacity\": %llu, "
                    "\"full\": %s, \"frozen\": %s}, \"time\": %.3f}\n",
                    boot_id, now_ns() / 1e6, (unsigned long long)heartbeat_count(), heartbeat_longest_gap_ms(),
                    memory.mib, memory.mb_per_s, (unsigned long long)memory.verified_pages,
                    (unsigned long long)memory.passes, (unsigned long long)memory.errors, total_mib(), work.online,
                    work.workers, (unsigned long long)work.turns,
                    (unsigned long long)disk.acknowledged, (unsigned long long)disk.errors, disk.per_s,
                    (unsigned long long)disk.capacity, disk.full ? "true" : "false", disk.frozen ? "true" : "false",
                    time_of_day());
}

static void answer_status(struct connection *connection)
{
    char body[1024];
    status_json(body, sizeof body);
    answer(connection, 200, "application/json", body);
}

/* Reads `name=value&...`. NULL, or what is wrong with it; values not named stay -1. */
static const char *parse_settings(char *query, long *mib, long *rate, long *disk, long *workers)
{
    static char why[96];
    for (char *save, *pair = strtok_r(query, "&", &save); pair; pair = strtok_r(NULL, "&", &save)) {
        char *value = strchr(pair, '='), *rest = NULL;
        if (value)
            *value++ = 0;
        long number = value && *value >= '0' && *value <= '9' ? strtol(value, &rest, 10) : -1;
        long *target = !strcmp(pair, "memory_mib") ? mib : !strcmp(pair, "memory_mb_per_s") ? rate
                     : !strcmp(pair, "disk_per_s") ? disk : !strcmp(pair, "cpu_workers") ? workers : NULL;
        for (char *c = pair; *c; c++) /* it is quoted back within JSON */
            if (*c < ' ' || *c == '"' || *c == '\\')
                *c = '?';
        if (!target || number < 0 || number > 1000000 || *rest) {
            snprintf(why, sizeof why, "%.40s: %s", pair,
                     target ? "a whole number is expected" : "unknown setting");
            return why;
        }
        *target = number;
    }
    return NULL;
}

const char *settings_change(char *query)
{
    long mib = -1, rate = -1, disk = -1, workers = -1;
    const char *wrong = parse_settings(query, &mib, &rate, &disk, &workers);
    if (!wrong && (mib >= 0 || rate >= 0))
        wrong = memory_set(mib, rate);
    if (!wrong && disk >= 0)
        wrong = disk_set(disk);
    if (!wrong && workers >= 0)
        wrong = work_set(workers);
    return wrong;
}

static void change_settings(struct connection *connection, char *query)
{
    const char *wrong = settings_change(query);
    if (wrong)
        refuse(connection, 400, wrong);
    else
        answer_status(connection);
}

static void verify_disk(struct connection *connection)
{
    if (!disk_verify_begin()) {
        refuse(connection, 503, "no data partition, or it is being verified");
        return;
    }
    connection->waits_for_disk = true;
    disk_client = connection;
    loop_change(&connection->watch, 0);
}

static void handle_request(struct connection *connection, char *head)
{
    char *target = strchr(head, ' '), *after = target ? strchr(target + 1, ' ') : NULL;
    connection->closing = strcasestr(head, "\nConnection: close") || strstr(head, " HTTP/1.0");
    if (!after || strncmp(head, "GET ", 4) != 0) {
        connection->closing = true;
        refuse(connection, 400, "only GET");
        return;
    }
    *after = 0;
    target++;
    char *query = strchr(target, '?');
    if (query)
        *query++ = 0;
    if (!strcmp(target, "/")) {
        char body[64];
        snprintf(body, sizeof body, "ok %s\n", boot_id);
        answer(connection, 200, "text/plain", body);
    } else if (!strcmp(target, "/status")) {
        answer_status(connection);
    } else if (!strcmp(target, "/set")) {
        change_settings(connection, query ? query : target + strlen(target));
    } else if (!strcmp(target, "/disk/verify")) {
        verify_disk(connection);
    } else {
        refuse(connection, 404, "there are /, /status, /set and /disk/verify");
    }
}

static void serve_http(struct connection *connection)
{
    char *end_of_head = memmem(connection->input, connection->in, "\r\n\r\n", 4);
    if (!end_of_head) {
        if (connection->in == INPUT) {
            connection->closing = true;
            refuse(connection, 400, "request too long");
        }
        return;
    }
    size_t length = end_of_head + 4 - connection->input;
    char head[INPUT];
    memcpy(head, connection->input, length - 2);
    head[length - 2] = 0;
    consume(connection, length);
    handle_request(connection, head);
}

/* Handle all that is complete. False once the connection is gone. */
static bool work(struct connection *connection)
{
    for (;;) {
        if (connection->http)
            serve_http(connection);
        else
            echo_lines(connection);
        if (connection->waits_for_disk)
            return true;
        if (!connection->out) {
            if (!connection->closing)
                return true;
            end(connection);
            return false;
        }
        if (!flush(connection))
            return false;
        if (connection->out) /* it waits for the client to read */
            return true;
    }
}

static void connection_ready(struct watch *watch, uint32_t events)
{
    struct connection *connection = (struct connection *)watch;
    if (connection->out) {
        if (!flush(connection) || connection->out)
            return;
        loop_change(watch, EPOLLIN);
        work(connection);
        return;
    }
    if (connection->waits_for_disk) { /* only errors are reported now */
        if (events & (EPOLLERR | EPOLLHUP))
            end(connection);
        return;
    }
    ssize_t count = recv(watch->fd, connection->input + connection->in, INPUT - connection->in, MSG_DONTWAIT);
    if (count < 0 && errno == EAGAIN)
        return;
    if (count <= 0) {
        end(connection);
        return;
    }
    connection->in += count;
    work(connection);
}

static void disk_ready(struct watch *watch, uint32_t events)
{
    (void)events;
    uint64_t drop, checked, wrong, acknowledged;
    char body[160];
    (void)!read(watch->fd, &drop, sizeof drop);
    disk_verify_result(&checked, &wrong, &acknowledged);
    struct connection *connection = disk_client;
    if (!connection)
        return;
    disk_client = NULL;
    connection->waits_for_disk = false;
    snprintf(body, sizeof body, "{\"checked\": %llu, \"wrong\": %llu, \"acknowledged\": %llu}\n",
             (unsigned long long)checked, (unsigned long long)wrong, (unsigned long long)acknowledged);
    answer(connection, 200, "application/json", body);
    loop_change(&connection->watch, EPOLLIN);
    if (flush(connection) && !connection->out)
        work(connection);
}

static void listener_ready(struct watch *watch, uint32_t events)
{
    (void)events;
    int fd, on = 1, idle = 300, interval = 60, count = 5;
    while ((fd = accept4(watch->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct connection *connection = connections < CONNECTIONS ? malloc(sizeof *connection) : NULL;
        if (!connection) {
            close(fd);
            continue;
        }
        memset(connection, 0, offsetof(struct connection, input));
        connection->watch = (struct watch){.ready = connection_ready, .fd = fd};
        connection->http = watch == &http_listener;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
        setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
        setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
        setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof count);
        connections++;
        loop_add(&connection->watch, EPOLLIN);
    }
}

static int listener(int port)
{
    int fd = service_socket(SOCK_STREAM, port);
    listen(fd, 1024);
    return fd;
}

void stream_start(void)
{
    write_file("/proc/sys/net/core/somaxconn", "1024");
    line_listener = (struct watch){.ready = listener_ready, .fd = listener(LINE_PORT)};
    http_listener = (struct watch){.ready = listener_ready, .fd = listener(HTTP_PORT)};
    loop_add(&line_listener, EPOLLIN);
    disk_result = (struct watch){.ready = disk_ready, .fd = disk_verify_done_fd()};
    loop_add(&http_listener, EPOLLIN);
    loop_add(&disk_result, EPOLLIN);
}
