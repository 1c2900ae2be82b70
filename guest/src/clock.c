/* Which clock the guest keeps time by.
 *
 * Under emulation reading the TSC costs nothing and reading the HPET an exit: a guest under traffic took half
 * the processor with the first (23 against 40 per cent). But on a busy host the kernel may measure the TSC's
 * frequency wrongly at boot (a factor of two was seen), and another host's may differ. So the TSC is compared
 * with the ACPI timer every few seconds, and given up for the HPET when the two do not agree. */
#include "guest.h"

#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/io.h>

#define ACPI_TIMER 0x608 /* where SeaBIOS puts it on q35 */
#define ACPI_HZ 3579545
#define ACPI_MASK 0xffffff /* wraps after 4.7 s */
#define FIRST_MS 500
#define EVERY_MS 3000
#define TRIES 200
#define PATIENCE_NS 200000
#define SPAN_NS 4500000000 /* beyond it the ACPI timer may have wrapped unseen */
#define TOLERANCE_PER_MILLE 10
#define SOURCE "/sys/devices/system/clocksource/clocksource0/current_clocksource"

struct sample {
    uint64_t ns;
    uint32_t ticks;
};

static struct watch timer;
static struct sample last;
static bool have_last;

/* Both clocks at one moment: a try during which the host took the processor away does not count. */
static bool take(struct sample *sample)
{
    for (int i = 0; i < TRIES; i++) {
        uint64_t before = now_ns();
        sample->ticks = inl(ACPI_TIMER) & ACPI_MASK;
        sample->ns = now_ns();
        if (sample->ns - before < PATIENCE_NS)
            return true;
    }
    return false;
}

static bool agree(const struct sample *from, const struct sample *to)
{
    int64_t by_kernel = to->ns - from->ns;
    int64_t by_acpi = (int64_t)((to->ticks - from->ticks) & ACPI_MASK) * 1000000000 / ACPI_HZ;
    return llabs(by_kernel - by_acpi) * 1000 <= by_acpi * TOLERANCE_PER_MILLE;
}

static void compare(struct watch *watch, uint32_t events)
{
    (void)events;
    timer_read(watch->fd);
    struct sample now;
    if (!take(&now)) {
        have_last = false;
        return;
    }
    bool comparable = have_last && now.ticks != last.ticks && now.ns - last.ns < SPAN_NS;
    if (comparable && !agree(&last, &now)) {
        bool changed = write_file(SOURCE, "hpet\n");
        console_print("the TSC does not keep time; clock %s\n", changed ? "hpet" : "unchanged");
        timer_set(watch->fd, 0, 0);
        return;
    }
    have_last = true;
    last = now;
}

void clock_start(void)
{
    if (ioperm(ACPI_TIMER, 4, 1) != 0)
        return; /* no such timer here: then a hypervisor gives a clock of its own */
    have_last = take(&last);
    timer = (struct watch){.fd = timer_open(), .ready = compare};
    timer_set(timer.fd, FIRST_MS, EVERY_MS);
    loop_add(&timer, EPOLLIN);
}
