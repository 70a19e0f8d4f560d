/* notify.c -- sd_notify(3) and the watchdog's timer.
 *
 * The watchdog is fed four times in its period. Each time the heartbeat is asked: if it has not
 * moved since the last feeding there is none, and systemd ends the process with SIGABRT once the
 * period is over. The loop's own life needs no extra proof: the timer runs on it.
 *
 * Type=notify-reload does not exist in systemd 252, so RELOADING carries MONOTONIC_USEC and is
 * followed by READY, which both it and the newer type understand. */
#include "daemon/notify.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <systemd/sd-daemon.h>

#include "daemon/log.h"

enum { EXTEND_MS = 60000 }; /* what one report of progress is good for */

struct dd_notify {
    uv_timer_t watchdog;
    uv_loop_t *loop;
    uint64_t (*heartbeat)(void *arg);
    void *arg;
    uint64_t period_ms; /* 0: systemd asks for no watchdog */
    uint64_t seen;      /* heartbeat at the last feeding */
    uint64_t told_ms;   /* last dd_notify_loading that was sent */
    double told_progress;
    char told_phase[64];
    dd_log_limit stuck;
};

int dd_notify_new(uv_loop_t *loop, uint64_t (*heartbeat)(void *arg), void *arg, dd_notify **ret_n,
                  delta_error *err)
{
    uint64_t usec = 0;
    dd_notify *n = calloc(1, sizeof *n);
    if (!n)
        return delta_fail(err, DELTA_ENOMEM, "notify: %zu bytes", sizeof *n);
    n->loop = loop;
    n->heartbeat = heartbeat;
    n->arg = arg;
    if (sd_watchdog_enabled(0, &usec) > 0)
        n->period_ms = usec / 1000 < 4 ? 4 : usec / 1000;
    (void)uv_timer_init(loop, &n->watchdog);
    n->watchdog.data = n;
    *ret_n = n;
    return 0;
}

static void feed(uv_timer_t *t)
{
    dd_notify *n = t->data;
    uint64_t now = n->heartbeat(n->arg);
    if (now == n->seen) {
        dd_log_limited(&n->stuck, 1, DD_LOG_DEBUG,
                       "the engine has not moved since the last look; the watchdog is not fed");
        return;
    }
    n->seen = now;
    (void)sd_notify(0, "WATCHDOG=1");
}

/* STATUS= is one line: what comes from elsewhere must not begin another assignment. */
static void tell(const char *what, const char *status)
{
    char text[512];
    int len = snprintf(text, sizeof text, "%s\nSTATUS=%s", what, status);
    if (len < 0)
        return;
    for (char *s = text + strlen(what) + 1; *s; s++)
        if (*s == '\n')
            *s = ' ';
    (void)sd_notify(0, text);
}

void dd_notify_loading(dd_notify *n, const char *phase, double progress)
{
    uv_update_time(n->loop);
    uint64_t now = uv_now(n->loop);
    bool is_new = strncmp(n->told_phase, phase, sizeof n->told_phase - 1) != 0;
    if (!is_new && progress <= n->told_progress)
        return; /* it stands */
    if (!is_new && now - n->told_ms < 1000 && progress < 1)
        return;
    (void)snprintf(n->told_phase, sizeof n->told_phase, "%s", phase);
    char status[200], what[64];
    (void)snprintf(status, sizeof status, "Loading %.150s: %.0f %%", phase, progress * 100);
    (void)snprintf(what, sizeof what, "EXTEND_TIMEOUT_USEC=%d000", EXTEND_MS);
    tell(what, status);
    n->told_ms = now;
    n->told_progress = progress;
}

void dd_notify_ready(dd_notify *n, const char *status)
{
    tell("READY=1", status);
    if (n->period_ms && !uv_is_active((uv_handle_t *)&n->watchdog)) {
        n->seen = n->heartbeat(n->arg);
        (void)sd_notify(0, "WATCHDOG=1");
        (void)uv_timer_start(&n->watchdog, feed, n->period_ms / 4, n->period_ms / 4);
    }
}

void dd_notify_reloading(dd_notify *n)
{
    char text[80];
    (void)n;
    (void)snprintf(text, sizeof text, "RELOADING=1\nMONOTONIC_USEC=%" PRIu64, uv_hrtime() / 1000);
    (void)sd_notify(0, text);
}

void dd_notify_stopping(dd_notify *n, const char *status)
{
    (void)n;
    tell("STOPPING=1", status);
}

static void on_closed(uv_handle_t *h)
{
    free(h->data);
}

void dd_notify_free(dd_notify *n)
{
    if (n)
        uv_close((uv_handle_t *)&n->watchdog, on_closed);
}
