/* The serial console: what happens during boot, and two commands for who attaches to it. */
#define _GNU_SOURCE
#include "guest.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <termios.h>
#include <unistd.h>

static struct watch console = {.fd = -1};
static char line[128];
static size_t length;

/* Nobody may be listening at the other end of the line: what does not fit is dropped, never waited for. */
void console_print(const char *format, ...)
{
    char text[1400], out[1500];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    size_t size = 0;
    for (const char *c = text; *c && size < sizeof out - 2; c++) {
        if (*c == '\n')
            out[size++] = '\r';
        out[size++] = *c;
    }
    if (console.fd >= 0)
        (void)!write(console.fd, out, size);
}

static void obey(char *command)
{
    char text[1024];
    if (!strcmp(command, "status")) {
        status_json(text, sizeof text);
        console_print("address %s\n%s", link_address(), text);
    } else if (!strncmp(command, "set ", 4)) {
        const char *wrong = settings_change(command + 4);
        console_print("%s\n", wrong ? wrong : "done");
    } else if (!strcmp(command, "help")) {
        console_print("status      what the checkers have seen so far\n"
                      "set a=1&b=2 as /set does\n"
                      "help        this list\n");
    } else if (*command) {
        console_print("unknown command '%s'; try help\n", command);
    }
    console_print("> ");
}

static void typed(char c)
{
    if (c == '\r' || c == '\n') {
        line[length] = 0;
        length = 0;
        console_print("\n");
        obey(line);
    } else if ((c == 127 || c == '\b') && length) {
        length--;
        console_print("\b \b");
    } else if (c >= ' ' && c < 127 && length < sizeof line - 1) {
        line[length++] = c;
        console_print("%c", c);
    }
}

static void console_ready(struct watch *watch, uint32_t events)
{
    (void)events;
    char text[128];
    ssize_t count;
    while ((count = read(watch->fd, text, sizeof text)) > 0)
        for (ssize_t i = 0; i < count; i++)
            typed(text[i]);
}

void console_start(void)
{
    struct termios settings;
    console = (struct watch){.ready = console_ready,
                             .fd = open("/dev/ttyS0", O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC)};
    if (console.fd < 0)
        return;
    tcgetattr(console.fd, &settings);
    cfmakeraw(&settings);
    settings.c_cflag |= CLOCAL;
    tcsetattr(console.fd, TCSANOW, &settings);
    loop_add(&console, EPOLLIN);
}
