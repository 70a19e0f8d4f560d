/* test_notify.c -- what systemd is told, and the watchdog that a stuck engine does not get. */
#include "daemon/notify.h"
#include "support/tap.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

static int listener;
static uint64_t beats, beats_per_ask;

static uint64_t heartbeat(void *arg)
{
    (void)arg;
    return beats += beats_per_ask;
}

static dd_notify *start(uv_loop_t *loop, const char *watchdog_usec)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    dd_notify *n = NULL;
    delta_error err;
    (void)snprintf(a.sun_path, sizeof a.sun_path, "/tmp/test_notify.%d", (int)getpid());
    (void)unlink(a.sun_path);
    listener = socket(AF_UNIX, SOCK_DGRAM, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&a, sizeof a) < 0)
        exit(2);
    (void)setenv("NOTIFY_SOCKET", a.sun_path, 1);
    (void)unsetenv("WATCHDOG_PID");
    if (watchdog_usec)
        (void)setenv("WATCHDOG_USEC", watchdog_usec, 1);
    else
        (void)unsetenv("WATCHDOG_USEC");
    (void)uv_loop_init(loop);
    if (dd_notify_new(loop, heartbeat, NULL, &n, &err) < 0)
        exit(2);
    return n;
}

static void finish(uv_loop_t *loop, dd_notify *n)
{
    dd_notify_free(n);
    (void)uv_run(loop, UV_RUN_DEFAULT);
    CHECK_EQ(uv_loop_close(loop), 0);
    (void)unlink(getenv("NOTIFY_SOCKET"));
}

/* The next message, "" if there is none. */
static const char *got(void)
{
    static char text[2048];
    struct pollfd p = { .fd = listener, .events = POLLIN };
    text[0] = 0;
    if (poll(&p, 1, 0) == 1) {
        ssize_t len = recv(listener, text, sizeof text - 1, 0);
        text[len > 0 ? len : 0] = 0;
    }
    return text;
}

static void stop_loop(uv_timer_t *t)
{
    uv_stop(t->loop);
}

/* Runs the loop for so long; how many WATCHDOG=1 came. */
static int watchdogs_within(uv_loop_t *loop, uint64_t ms)
{
    uv_timer_t t;
    int n = 0;
    (void)uv_timer_init(loop, &t);
    (void)uv_timer_start(&t, stop_loop, ms, 0);
    (void)uv_run(loop, UV_RUN_DEFAULT);
    uv_close((uv_handle_t *)&t, NULL);
    (void)uv_run(loop, UV_RUN_NOWAIT);
    for (const char *s; *(s = got());)
        n += strcmp(s, "WATCHDOG=1") == 0;
    return n;
}

TEST(watchdog_is_fed_only_while_the_engine_moves)
{
    uv_loop_t loop;
    dd_notify *n = start(&loop, "200000");
    beats_per_ask = 1;
    CHECK_EQ(watchdogs_within(&loop, 150), 0); /* not before it is ready */
    dd_notify_ready(n, "Serving");
    CHECK_STR(got(), "READY=1\nSTATUS=Serving");
    CHECK_STR(got(), "WATCHDOG=1");
    CHECK(watchdogs_within(&loop, 500) >= 3);
    beats_per_ask = 0; /* stuck */
    (void)watchdogs_within(&loop, 60);
    CHECK_EQ(watchdogs_within(&loop, 500), 0);
    beats_per_ask = 1;
    CHECK(watchdogs_within(&loop, 500) >= 3);
    finish(&loop, n);
}

TEST(no_watchdog_where_systemd_asks_for_none)
{
    uv_loop_t loop;
    dd_notify *n = start(&loop, NULL);
    beats_per_ask = 1;
    dd_notify_ready(n, "Serving");
    CHECK_STR(got(), "READY=1\nSTATUS=Serving");
    CHECK_EQ(watchdogs_within(&loop, 100), 0);
    finish(&loop, n);
}

TEST(loading_is_told_once_a_second_and_at_its_end)
{
    uv_loop_t loop;
    dd_notify *n = start(&loop, NULL);
    dd_notify_loading(n, "weights", 0.1);
    CHECK_STR(got(), "EXTEND_TIMEOUT_USEC=60000000\nSTATUS=Loading weights: 10 %");
    for (int i = 0; i < 1000; i++)
        dd_notify_loading(n, "weights", 0.1 + i / 2000.0);
    CHECK_STR(got(), "");
    (void)watchdogs_within(&loop, 1100);
    dd_notify_loading(n, "weights", 0.6);
    CHECK_STR(got(), "EXTEND_TIMEOUT_USEC=60000000\nSTATUS=Loading weights: 60 %");
    (void)watchdogs_within(&loop, 1100);
    dd_notify_loading(n, "weights", 0.6); /* it stands: no more time for it */
    CHECK_STR(got(), "");
    dd_notify_loading(n, "weights", 1);
    CHECK_STR(got(), "EXTEND_TIMEOUT_USEC=60000000\nSTATUS=Loading weights: 100 %");
    dd_notify_loading(n, "weights", 1);
    CHECK_STR(got(), "");
    dd_notify_loading(n, "warm-up", 0); /* another phase begins anew */
    CHECK_STR(got(), "EXTEND_TIMEOUT_USEC=60000000\nSTATUS=Loading warm-up: 0 %");
    finish(&loop, n);
}

TEST(status_cannot_carry_another_assignment)
{
    uv_loop_t loop;
    dd_notify *n = start(&loop, NULL);
    dd_notify_stopping(n, "x\nMAINPID=1");
    CHECK_STR(got(), "STOPPING=1\nSTATUS=x MAINPID=1");
    dd_notify_reloading(n);
    CHECK(strncmp(got(), "RELOADING=1\nMONOTONIC_USEC=", 27) == 0);
    finish(&loop, n);
}
