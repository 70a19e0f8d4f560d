/* server.c -- see server.h.
 *
 * Completions cross to the loop by a list under a mutex and one uv_async, which is woken only
 * when the list was empty. The core's callback queue is not used: nothing polls it on Linux.
 * Logging of the core is led to the log, limited, as peers can provoke it. */
#include "daemon/grpc/server.h"

#include <assert.h>
#include <grpc/grpc_posix.h>
#include <grpc/grpc_security.h>
#include <grpc/support/log.h>
#include <grpc/support/time.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/grpc/internal.h"
#include "daemon/log.h"

enum {
    STREAMS_MAX = 100,         /* calls of a connection at once */
    METADATA_BYTES = 8192,     /* headers of a call */
    PING_MS = 15000,           /* a peer that answers no ping for PING_LIMIT_MS is gone */
    PING_LIMIT_MS = 10000,     /* so half-open TCP is found within 25 s */
    PEER_PING_MIN_MS = 10000,  /* peers that ping more often are sent away */
    REQUESTS_OUTSTANDING = 4,  /* calls of a method that are asked for at once; more queue up */
    SWEEP_MS = 250,            /* how exactly the stall limit is kept */
    LOG_LINES_PER_SECOND = 10, /* from the core */
};

/* ---- completions ---- */

static void *take_completions(void *arg)
{
    dd_grpc_server *g = arg;
    for (;;) {
        grpc_event e =
            grpc_completion_queue_next(g->queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
        if (e.type == GRPC_QUEUE_SHUTDOWN)
            return NULL;
        if (e.type != GRPC_OP_COMPLETE)
            continue;
        dd_tag *tag = e.tag;
        tag->next = NULL;
        tag->ok = e.success != 0;
        (void)pthread_mutex_lock(&g->mutex);
        bool was_empty = !g->first;
        *g->last = tag;
        g->last = &tag->next;
        (void)pthread_mutex_unlock(&g->mutex);
        if (was_empty)
            (void)uv_async_send(&g->wake);
    }
}

static void handle_completions(dd_grpc_server *g)
{
    (void)pthread_mutex_lock(&g->mutex);
    dd_tag *tag = g->first;
    g->first = NULL;
    g->last = &g->first;
    (void)pthread_mutex_unlock(&g->mutex);
    while (tag) {
        dd_tag *next = tag->next; /* the tag may be in flight again after its event */
        if (tag->kind == DD_TAG_SHUTDOWN)
            g->is_shut = true;
        else
            dd_grpc_call_event(tag->call, tag);
        tag = next;
    }
}

static void on_wake(uv_async_t *h)
{
    dd_grpc_server *g = h->data;
    handle_completions(g);
    if (g->is_shut && g->n_allocated == 0 && g->on_gone) {
        void (*on_gone)(void *) = g->on_gone;
        g->on_gone = NULL;
        on_gone(g->on_gone_arg);
    }
}

static void on_sweep(uv_timer_t *h)
{
    dd_grpc_server *g = h->data;
    uint64_t now = uv_hrtime(), limit = g->config->limits.stall_limit_ns;
    for (dd_grpc_call *c = g->calls; c && now > limit; c = c->next)
        dd_grpc_call_check_stall(c, now - limit);
    if (!g->calls)
        (void)uv_timer_stop(h);
}

void dd_grpc_server_watch(dd_grpc_server *g)
{
    if (!uv_is_active((uv_handle_t *)&g->sweep))
        (void)uv_timer_start(&g->sweep, on_sweep, SWEEP_MS, SWEEP_MS);
}

/* ---- the core's own log ---- */

static void on_core_log(gpr_log_func_args *a)
{
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    static dd_log_limit limit;
    enum dd_log_level level = a->severity == GPR_LOG_SEVERITY_ERROR ? DD_LOG_WARNING : DD_LOG_DEBUG;
    (void)pthread_mutex_lock(&mutex);
    dd_log_limited(&limit, LOG_LINES_PER_SECOND, level, "gRPC core: %s", a->message);
    (void)pthread_mutex_unlock(&mutex);
}

/* ---- life ---- */

static grpc_server *make_server(const dd_config *c)
{
    struct {
        const char *key;
        int value;
    } table[] = {
        { GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, (int)c->server.max_message_bytes },
        { GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, -1 },
        { GRPC_ARG_MAX_CONCURRENT_STREAMS, STREAMS_MAX },
        { GRPC_ARG_MAX_METADATA_SIZE, METADATA_BYTES },
        { GRPC_ARG_KEEPALIVE_TIME_MS, PING_MS },
        { GRPC_ARG_KEEPALIVE_TIMEOUT_MS, PING_LIMIT_MS },
        { GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1 },
        { GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, PEER_PING_MIN_MS },
        { GRPC_ARG_ALLOW_REUSEPORT, 0 },
        { GRPC_ARG_ENABLE_PER_MESSAGE_COMPRESSION, 0 },
        { GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET, 1 << GRPC_COMPRESS_NONE },
    };
    enum { N = sizeof table / sizeof table[0] };
    grpc_arg args[N];
    for (int i = 0; i < N; i++) {
        union {
            const char *in;
            char *out;
        } key = { table[i].key }; /* the core does not write to it */
        args[i] = (grpc_arg){ .type = GRPC_ARG_INTEGER, .key = key.out };
        args[i].value.integer = table[i].value;
    }
    return grpc_server_create(&(grpc_channel_args){ .num_args = N, .args = args }, NULL);
}

static int register_methods(dd_grpc_server *g, delta_error *err)
{
    size_t n;
    const dd_method *methods = dd_service_methods(&n);
    g->slots = calloc(n + 1, sizeof *g->slots);
    if (!g->slots)
        return delta_fail(err, DELTA_ENOMEM, "gRPC: %zu methods", n);
    g->n_slots = n + 1; /* the last one is for all the rest */
    for (size_t i = 0; i < n; i++) {
        g->slots[i].method = &methods[i];
        g->slots[i].registered = grpc_server_register_method(
            g->server, methods[i].path, NULL,
            methods[i].shape == DD_BIDI ? GRPC_SRM_PAYLOAD_NONE
                                        : GRPC_SRM_PAYLOAD_READ_INITIAL_BYTE_BUFFER,
            0);
        if (!g->slots[i].registered)
            return delta_fail(err, DELTA_EINTERNAL, "gRPC does not take the method %s",
                              methods[i].path);
    }
    return 0;
}

static void on_handle_closed(uv_handle_t *h)
{
    dd_grpc_server *g = h->data;
    if (--g->n_handles)
        return;
    (void)pthread_mutex_destroy(&g->mutex);
    free(g->slots);
    free(g);
}

static void destroy(dd_grpc_server *g)
{
    if (g->server)
        grpc_server_destroy(g->server);
    grpc_completion_queue_destroy(g->queue);
    grpc_shutdown();
    uv_close((uv_handle_t *)&g->wake, on_handle_closed);
    uv_close((uv_handle_t *)&g->sweep, on_handle_closed);
}

int dd_grpc_server_new(uv_loop_t *loop, const dd_config *c, dd_service *s,
                       const dd_peer *(*peer_of)(void *arg, int fd), void *arg,
                       dd_grpc_server **ret_g, delta_error *err)
{
    dd_grpc_server *g = calloc(1, sizeof *g);
    if (!g)
        return delta_fail(err, DELTA_ENOMEM, "gRPC: %zu bytes", sizeof *g);
    g->loop = loop;
    g->config = c;
    g->service = s;
    g->peer_of = peer_of;
    g->arg = arg;
    g->last = &g->first;
    int r = uv_async_init(loop, &g->wake, on_wake);
    if (r < 0) {
        free(g);
        return delta_fail(err, DELTA_EIO, "gRPC: %s", uv_strerror(r));
    }
    (void)uv_timer_init(loop, &g->sweep);
    g->wake.data = g->sweep.data = g;
    g->n_handles = 2;
    (void)pthread_mutex_init(&g->mutex, NULL);

    gpr_set_log_function(on_core_log);
    grpc_init();
    g->queue = grpc_completion_queue_create_for_next(NULL);
    g->server = make_server(c);
    r = register_methods(g, err);
    if (r < 0) {
        grpc_completion_queue_shutdown(g->queue);
        g->server = NULL; /* never started: the core has no way to end such a one */
        destroy(g);
        return r;
    }
    grpc_server_register_completion_queue(g->server, g->queue, NULL);
    grpc_server_start(g->server);
    if (pthread_create(&g->thread, NULL, take_completions, g) != 0) {
        uv_close((uv_handle_t *)&g->wake, NULL);
        uv_close((uv_handle_t *)&g->sweep, NULL);
        return delta_fail(err, DELTA_EIO, "gRPC: no thread"); /* the process ends */
    }
    for (size_t i = 0; i < g->n_slots; i++)
        for (int k = 0; k < REQUESTS_OUTSTANDING; k++)
            (void)dd_grpc_call_request(g, &g->slots[i]);
    *ret_g = g;
    return 0;
}

void dd_grpc_server_add(dd_grpc_server *g, int fd)
{
    grpc_server_credentials *creds = grpc_insecure_server_credentials_create();
    grpc_server_add_channel_from_fd(g->server, fd, creds);
    grpc_server_credentials_release(creds);
}

void dd_grpc_server_shutdown(dd_grpc_server *g, bool now, void (*on_gone)(void *arg), void *arg)
{
    if (!g->is_shutting) {
        g->is_shutting = true;
        g->on_gone = on_gone;
        g->on_gone_arg = arg;
        g->shutdown_tag.kind = DD_TAG_SHUTDOWN;
        grpc_server_shutdown_and_notify(g->server, g->queue, &g->shutdown_tag);
    }
    if (now)
        grpc_server_cancel_all_calls(g->server);
}

void dd_grpc_server_free(dd_grpc_server *g)
{
    if (!g)
        return;
    assert(g->is_shut && g->n_allocated == 0);
    (void)uv_timer_stop(&g->sweep);
    grpc_completion_queue_shutdown(g->queue);
    (void)pthread_join(g->thread, NULL);
    assert(!g->first);
    destroy(g);
}
