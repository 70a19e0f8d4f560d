/* loop.c -- the daemon from its first socket to its last.
 *
 * Start      sockets are opened before the weights are looked at, so that a second instance fails
 *            within milliseconds; the engine thread loads meanwhile, and early callers are told to
 *            come back (UNAVAILABLE, LOADING). READY=1 is said when the model answers.
 * Stop       SIGTERM, SIGINT: no new connections and requests; answers run on up to
 *            limits.drain_limit, then they are cut; a second signal cuts them at once.
 * Reload     SIGHUP: [limits] and [log] change; a wrong file changes nothing and is told.
 * Fault      the engine's end is the process's end: calls are failed, systemd starts it anew.
 *
 * A thread that is reading weights cannot be stopped, so the two ways out that may meet one
 * (a signal or a socket error while loading) end the process without joining it.
 *
 * Threads    all of this is the loop thread. */
#include "daemon/loop.h"

#include <assert.h>
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include <uv.h>

#include "daemon/listen.h"
#include "daemon/log.h"
#include "daemon/notify.h"
#include "daemon/service.h"

enum {
    LAST_WORDS_MS = 1000, /* streams that are cut may tell their usage for so long */
    FLUSH_MS = 1000,      /* connections may take their last bytes for so long */
    CUT_MS = 5000,        /* what was cut must be gone after so long */
    FDS_BESIDE = 256,     /* descriptors that are not connections */
};

struct daemon {
    uv_loop_t loop;
    dd_config *config;
    int argc;
    char **argv;
    dd_service *service;
    dd_listen *listen;
    dd_notify *notify;
    uv_signal_t signals[3]; /* SIGTERM, SIGINT, SIGHUP */
    uv_timer_t timer;       /* of the phase that runs */
    enum { LOADING, SERVING, DRAINING, CLOSING, GONE } phase;
    bool cut;  /* live requests were ended by force */
    bool join; /* the engine thread will end when asked */
    int status;
    char told_phase[64]; /* of loading */
};

static const char *ready_status(const struct daemon *d, char *to, size_t size)
{
    const char *slash = strrchr(d->config->model.path, '/');
    (void)snprintf(to, size, "Serving %s", slash && slash[1] ? slash + 1 : d->config->model.path);
    return to;
}

int dd_loop_log_level(const dd_config *c)
{
    static const struct {
        const char *name;
        enum dd_log_level level;
    } levels[] = { { "error", DD_LOG_ERROR },
                   { "warning", DD_LOG_WARNING },
                   { "notice", DD_LOG_NOTICE },
                   { "info", DD_LOG_INFO },
                   { "debug", DD_LOG_DEBUG } };
    for (size_t i = 0; i < sizeof levels / sizeof levels[0]; i++)
        if (strcmp(c->log.level, levels[i].name) == 0)
            return levels[i].level;
    return DD_LOG_INFO;
}

/* ---- stop ---- */

static void on_gone(void *arg)
{
    struct daemon *d = arg;
    d->phase = GONE;
    uv_stop(&d->loop); /* the rest is done outside of everybody's callbacks */
}

static void on_still_there(uv_timer_t *t)
{
    struct daemon *d = t->data;
    dd_log(DD_LOG_ERROR, "requests did not end %d s after they were cut; leaving without them",
           CUT_MS / 1000);
    _exit(d->status ? d->status : DD_EXIT_INTERNAL);
}

static void on_not_flushed(uv_timer_t *t)
{
    struct daemon *d = t->data;
    (void)uv_timer_start(&d->timer, on_still_there, CUT_MS, 0);
    dd_listen_shutdown(d->listen, true, on_gone, d);
}

/* No request is left: let the last bytes out, then close the connections. */
static void on_drained(void *arg)
{
    struct daemon *d = arg;
    if (d->phase >= CLOSING)
        return;
    d->phase = CLOSING;
    (void)uv_timer_start(&d->timer, on_not_flushed, FLUSH_MS, 0);
    dd_listen_shutdown(d->listen, false, on_gone, d);
}

static void on_last_words_over(uv_timer_t *t)
{
    struct daemon *d = t->data;
    (void)uv_timer_start(&d->timer, on_still_there, CUT_MS, 0);
    dd_service_abort_all(d->service);
}

static void cut(struct daemon *d)
{
    if (d->cut)
        return;
    d->cut = true;
    (void)uv_timer_start(&d->timer, on_last_words_over, LAST_WORDS_MS, 0);
    dd_service_abort_all(d->service);
}

static void on_drain_limit(uv_timer_t *t)
{
    struct daemon *d = t->data;
    dd_log(DD_LOG_WARNING, "the drain limit has passed; the answers that still run are cut");
    cut(d);
}

static void begin_drain(struct daemon *d, const char *why)
{
    bool loading = dd_service_phase(d->service) == DD_LOADING;
    uint64_t limit_ms = d->config->limits.drain_limit_ns / 1000000;
    d->phase = DRAINING;
    d->join = !loading;
    dd_log(DD_LOG_NOTICE, "%s: stopping; answers may run on for %llu s", why,
           (unsigned long long)(limit_ms / 1000));
    dd_notify_stopping(d->notify, "Draining");
    dd_listen_stop(d->listen);
    if (limit_ms)
        (void)uv_timer_start(&d->timer, on_drain_limit, limit_ms, 0);
    dd_service_drain(d->service, on_drained, d);
    if (!limit_ms && d->phase == DRAINING)
        cut(d);
}

static void on_stop_signal(uv_signal_t *s, int number)
{
    struct daemon *d = s->data;
    const char *name = number == SIGTERM ? "SIGTERM" : "SIGINT";
    if (d->phase < DRAINING) {
        begin_drain(d, name);
    } else if (d->phase == DRAINING) {
        dd_log(DD_LOG_NOTICE, "%s again: the answers that still run are cut", name);
        cut(d);
    }
}

/* ---- reload ---- */

static bool is_same(const dd_config *a, const dd_config *b)
{
    char *x = dd_config_print(a), *y = dd_config_print(b);
    bool same = x && y && strcmp(x, y) == 0;
    free(x);
    free(y);
    return same;
}

static void reload(struct daemon *d)
{
    dd_config fresh;
    enum dd_action action;
    delta_error err;
    if (dd_config_load(d->argc, d->argv, &fresh, &action, &err) < 0) {
        dd_log(DD_LOG_ERROR, "the configuration stays as it was: %s", err.text);
        return;
    }
    free(d->config->log.level);
    d->config->log = fresh.log;
    d->config->limits = fresh.limits;
    dd_log_set_level(dd_loop_log_level(d->config));
    dd_log(DD_LOG_NOTICE, "configuration read again%s",
           is_same(d->config, &fresh) ? ""
                                      : "; changes outside of [limits] and [log] need a restart");
    fresh.log.level = NULL; /* ours now */
    dd_config_done(&fresh);
}

static void on_hup(uv_signal_t *s, int number)
{
    struct daemon *d = s->data;
    char status[128];
    (void)number;
    if (d->phase > SERVING)
        return;
    /* Before READY=1 systemd awaits nothing but it. */
    if (d->phase == SERVING)
        dd_notify_reloading(d->notify);
    reload(d);
    if (d->phase == SERVING)
        dd_notify_ready(d->notify, ready_status(d, status, sizeof status));
}

/* ---- what the service tells ---- */

static void on_load(void *arg, const char *phase, double progress)
{
    struct daemon *d = arg;
    if (d->phase != LOADING)
        return;
    if (strncmp(d->told_phase, phase, sizeof d->told_phase - 1) != 0) {
        (void)snprintf(d->told_phase, sizeof d->told_phase, "%s", phase);
        dd_log(DD_LOG_INFO, "loading: %s", phase);
    }
    dd_notify_loading(d->notify, phase, progress);
}

static void on_ready(void *arg)
{
    struct daemon *d = arg;
    char status[128];
    if (d->phase != LOADING)
        return;
    d->phase = SERVING;
    d->join = true;
    dd_log(DD_LOG_NOTICE, "ready: %s on %s", d->config->model.path,
           d->config->server.socket[0]         ? d->config->server.socket
           : d->config->server.ttrpc_socket[0] ? d->config->server.ttrpc_socket
                                               : d->config->server.listen);
    dd_notify_ready(d->notify, ready_status(d, status, sizeof status));
}

static void on_fatal(void *arg, const char *why)
{
    struct daemon *d = arg;
    bool loading = d->phase == LOADING;
    const char *path = d->config->model.path;
    if (loading) {
        bool hidden = getenv("INVOCATION_ID") &&
                      (strncmp(path, "/home/", 6) == 0 || strncmp(path, "/root/", 6) == 0);
        dd_log(
            DD_LOG_ERROR,
            "the model cannot be opened: %s. Name the folder of a checkpoint with --model DIR or "
            "model.path in the configuration file%s.",
            why,
            hidden ? "; the unit hides home folders (ProtectHome), so keep models elsewhere, "
                     "such as /var/lib/deltad"
                   : "");
    } else {
        dd_log(DD_LOG_ERROR, "the engine has failed: %s", why);
    }
    d->status = loading ? DD_EXIT_CONFIG : DD_EXIT_INTERNAL;
    if (d->phase >= CLOSING)
        return;
    d->join = loading; /* it said so as its last act; a device that hangs is another matter */
    d->phase = DRAINING;
    dd_notify_stopping(d->notify, loading ? "The model cannot be opened" : "The engine has failed");
    dd_listen_stop(d->listen);
    dd_service_drain(d->service, on_drained, d);
    cut(d);
}

static uint64_t heartbeat(void *arg)
{
    struct daemon *d = arg;
    return dd_service_heartbeat(d->service);
}

/* ---- start ---- */

/* The folder a socket lies in, for one that is on its own (systemd makes /run/deltad). */
static void make_folder_of(const char *socket)
{
    char folder[112];
    const char *slash = strrchr(socket, '/');
    if (!slash || slash == socket)
        return;
    (void)snprintf(folder, sizeof folder, "%.*s", (int)(slash - socket), socket);
    if (mkdir(folder, 0755) < 0 && errno != EEXIST)
        dd_log(DD_LOG_DEBUG, "%s: %s", folder, strerror(errno)); /* bind tells the rest */
}

static void raise_fd_limit(const dd_config *c)
{
    struct rlimit l;
    rlim_t wanted = (rlim_t)c->server.max_connections + FDS_BESIDE;
    if (getrlimit(RLIMIT_NOFILE, &l) < 0 || l.rlim_cur >= wanted)
        return;
    l.rlim_cur = wanted < l.rlim_max ? wanted : l.rlim_max;
    (void)setrlimit(RLIMIT_NOFILE, &l); /* accept copes with too few */
}

static void watch_signals(struct daemon *d)
{
    static const int numbers[3] = { SIGTERM, SIGINT, SIGHUP };
    for (int i = 0; i < 3; i++) {
        (void)uv_signal_init(&d->loop, &d->signals[i]);
        d->signals[i].data = d;
        (void)uv_signal_start(&d->signals[i], numbers[i] == SIGHUP ? on_hup : on_stop_signal,
                              numbers[i]);
    }
    (void)uv_timer_init(&d->loop, &d->timer);
    d->timer.data = d;
}

static int start(struct daemon *d, delta_error *err)
{
    const dd_service_options o = { .loop = &d->loop,
                                   .config = d->config,
                                   .on_load = on_load,
                                   .on_ready = on_ready,
                                   .on_fatal = on_fatal,
                                   .arg = d };
    int r = dd_notify_new(&d->loop, heartbeat, d, &d->notify, err);
    if (r < 0)
        return r;
    make_folder_of(d->config->server.socket);
    make_folder_of(d->config->server.ttrpc_socket);
    r = dd_service_new(&o, &d->service, err);
    if (r < 0)
        return r;
    r = dd_listen_new(&d->loop, d->config, d->service, &d->listen, err);
    if (r < 0)
        return r;
    dd_listen_start(d->listen);
    return 0;
}

/* Closes what this file opened on the loop and lets the loop finish. */
static void close_loop(struct daemon *d)
{
    dd_notify_free(d->notify);
    for (int i = 0; i < 3; i++)
        uv_close((uv_handle_t *)&d->signals[i], NULL);
    uv_close((uv_handle_t *)&d->timer, NULL);
    (void)uv_run(&d->loop, UV_RUN_DEFAULT);
    int r = uv_loop_close(&d->loop);
    if (r < 0)
        dd_log(DD_LOG_ERROR, "the loop was left with open handles: %s", uv_strerror(r));
}

int dd_loop_run(dd_config *c, int argc, char **argv)
{
    struct daemon d = { .config = c, .argc = argc, .argv = argv };
    delta_error err;
    int r = uv_loop_init(&d.loop);
    if (r < 0) {
        dd_log(DD_LOG_ERROR, "event loop: %s", uv_strerror(r));
        dd_config_done(c);
        return DD_EXIT_INTERNAL;
    }
    raise_fd_limit(c);
    watch_signals(&d);
    r = start(&d, &err);
    if (r < 0) {
        dd_log(DD_LOG_ERROR, "%s", err.text);
        if (d.service)
            _exit(DD_EXIT_CONFIG); /* the engine thread is loading: see the head */
        close_loop(&d);
        dd_config_done(c);
        return r == DELTA_ENOMEM ? DD_EXIT_INTERNAL : DD_EXIT_CONFIG;
    }
    (void)uv_run(&d.loop, UV_RUN_DEFAULT);
    assert(d.phase == GONE);

    dd_listen_free(d.listen);
    if (!d.join) {
        dd_log(DD_LOG_INFO, "stopped");
        _exit(d.status);
    }
    dd_service_free(d.service);
    close_loop(&d);
    dd_log(DD_LOG_INFO, "stopped");
    dd_config_done(c);
    return d.status;
}
