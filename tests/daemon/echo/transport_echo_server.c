/* transport_echo_server.c -- both transports in front of handlers that need no model.
 *
 * Takes deltad's flags and configuration. It stands in for service.c at link time, so that
 * sockets, gRPC and ttrpc are tested alone and quickly. Messages are plain bytes:
 *
 *   /test.Echo/Unary    answers what it gets
 *   /test.Echo/Stream   "COUNT SIZE": so many messages of so many bytes; COUNT 0 never ends
 *   /test.Echo/Slow     never answers; the peer must cancel
 *   /test.Echo/Fail     INVALID_ARGUMENT with all details
 *   /test.Echo/Peer     the peer's text, request id, and milliseconds to the deadline
 *   /test.Echo/Stats    live calls, calls seen closed, connections now and in all, messages sent
 *   reflection          the real one */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "daemon/listen.h"
#include "daemon/log.h"
#include "daemon/reflection.h"

enum { UNARY, STREAM, SLOW, FAIL, PEER, STATS, REFLECTION };
static const dd_method methods[] = {
    { "/test.Echo/Unary", DD_UNARY, UNARY },
    { "/test.Echo/Stream", DD_SERVER_STREAM, STREAM },
    { "/test.Echo/Slow", DD_UNARY, SLOW },
    { "/test.Echo/Fail", DD_UNARY, FAIL },
    { "/test.Echo/Peer", DD_UNARY, PEER },
    { "/test.Echo/Stats", DD_UNARY, STATS },
    { "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", DD_BIDI, REFLECTION },
    { "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", DD_BIDI, REFLECTION },
};
enum { N_METHODS = sizeof methods / sizeof methods[0] };

struct stream {
    unsigned long left, size;
    bool is_endless, is_last;
};
struct dd_service {
    unsigned live, closed, now;
    unsigned long long total, sent;
};
static struct dd_service service;
static const dd_status ok = { .code = DD_OK };

const dd_method *dd_service_methods(size_t *ret_n)
{
    *ret_n = N_METHODS;
    return methods;
}

const dd_method *dd_service_method_find(const char *path, size_t len)
{
    for (int i = 0; i < N_METHODS; i++)
        if (strlen(methods[i].path) == len && memcmp(methods[i].path, path, len) == 0)
            return &methods[i];
    return NULL;
}

static void finish(dd_rpc *r, const dd_status *st)
{
    free(r->handler);
    service.live--;
    r->vt->finish(r, st);
}

static void answer(dd_rpc *r, const void *data, size_t len)
{
    uint8_t *msg = malloc(len ? len : 1);
    if (!msg)
        abort();
    if (len)
        memcpy(msg, data, len);
    r->vt->send(r, msg, len);
}

void dd_service_start(dd_service *s, dd_rpc *r)
{
    if (r->method->id != REFLECTION) /* it finishes its calls itself */
        s->live++;
}

static void send_next(dd_rpc *r)
{
    struct stream *k = r->handler;
    uint8_t *msg = malloc(k->size + 1);
    if (!msg)
        abort();
    memset(msg, 'x', k->size);
    service.sent++;
    if (!k->is_endless)
        k->left--;
    r->vt->send(r, msg, k->size);
}

static void start_stream(dd_rpc *r, const uint8_t *msg, size_t len)
{
    char text[64];
    struct stream *k = calloc(1, sizeof *k);
    if (!k)
        abort();
    (void)snprintf(text, sizeof text, "%.*s", (int)len, (const char *)msg);
    if (sscanf(text, "%lu %lu", &k->left, &k->size) != 2)
        abort();
    k->is_endless = k->left == 0;
    r->handler = k;
    send_next(r);
}

static void fail(dd_rpc *r)
{
    dd_status st;
    dd_status_set(&st, DD_INVALID_ARGUMENT, "FIELD_INVALID", "top_p is %s", "wrong \xff");
    (void)snprintf(st.field, sizeof st.field, "sampling.top_p");
    st.retry_ms = 1500;
    st.meta[0].key = "limit";
    (void)snprintf(st.meta[0].value, sizeof st.meta[0].value, "1");
    st.n_meta = 1;
    finish(r, &st);
}

void dd_service_message(dd_service *s, dd_rpc *r, const uint8_t *msg, size_t len)
{
    char text[256];
    switch (r->method->id) {
    case UNARY:
        answer(r, msg, len);
        break;
    case STREAM:
        start_stream(r, msg, len);
        break;
    case FAIL:
        fail(r);
        break;
    case PEER:
        (void)snprintf(text, sizeof text, "%s|%s|%lld", r->peer.text, r->request_id,
                       r->deadline_ns ? (long long)(r->deadline_ns - r->arrived_ns) / 1000000 : 0);
        answer(r, text, strlen(text));
        break;
    case STATS:
        (void)snprintf(text, sizeof text, "%u %u %u %llu %llu", s->live - 1, s->closed, s->now,
                       s->total, s->sent);
        answer(r, text, strlen(text));
        break;
    case REFLECTION:
        dd_reflection_message(r, msg, len);
        break;
    default: /* SLOW */
        break;
    }
}

void dd_service_half_closed(dd_service *s, dd_rpc *r)
{
    (void)s;
    dd_reflection_half_closed(r);
}

void dd_service_sent(dd_service *s, dd_rpc *r)
{
    struct stream *k = r->handler;
    (void)s;
    if (r->method->id == REFLECTION)
        dd_reflection_sent(r);
    else if (r->method->id == STREAM && (k->is_endless || k->left))
        send_next(r);
    else
        finish(r, &ok);
}

void dd_service_closed(dd_service *s, dd_rpc *r)
{
    dd_status st;
    s->closed++;
    if (r->method->id == REFLECTION) {
        dd_reflection_closed(r);
        return;
    }
    dd_status_set(&st, DD_CANCELLED, "CANCELLED", "cancelled");
    finish(r, &st);
}

void dd_service_connections(dd_service *s, uint32_t now, uint64_t total)
{
    s->now = now;
    s->total = total;
}

/* ---- the program ---- */

static uv_loop_t loop;
static uv_signal_t term;
static uv_timer_t timer;
static dd_listen *listener;

static void on_gone(void *arg)
{
    (void)arg;
    uv_close((uv_handle_t *)&term, NULL);
    uv_close((uv_handle_t *)&timer, NULL);
    dd_listen_free(listener);
}

static void on_late(uv_timer_t *t)
{
    (void)t;
    dd_listen_shutdown(listener, true, on_gone, NULL);
}

static void on_term(uv_signal_t *s, int number)
{
    (void)s;
    (void)number;
    dd_listen_shutdown(listener, false, on_gone, NULL);
    (void)uv_timer_start(&timer, on_late, 300, 0);
}

int main(int argc, char **argv)
{
    dd_config c;
    enum dd_action action;
    delta_error err;
    dd_log_init(DD_LOG_INFO);
    if (dd_config_load(argc, argv, &c, &action, &err) < 0 || uv_loop_init(&loop) < 0) {
        fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    (void)uv_signal_init(&loop, &term);
    (void)uv_timer_init(&loop, &timer);
    (void)uv_signal_start(&term, on_term, SIGTERM);
    if (dd_listen_new(&loop, &c, &service, &listener, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        uv_close((uv_handle_t *)&term, NULL);
        uv_close((uv_handle_t *)&timer, NULL);
        (void)uv_run(&loop, UV_RUN_DEFAULT);
        dd_config_done(&c);
        return uv_loop_close(&loop) == 0 ? 2 : 3;
    }
    dd_listen_start(listener);
    (void)uv_run(&loop, UV_RUN_DEFAULT);
    dd_config_done(&c);
    return uv_loop_close(&loop) == 0 && service.live == 0 ? 0 : 3;
}
