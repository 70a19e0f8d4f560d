/* server.c -- see server.h.
 *
 * Nothing a handler calls (send, finish) writes to a socket or calls back: it appends to the
 * connection's queue and marks it. Once per turn of the loop the marked connections are flushed,
 * several frames in one write, and the handlers whose sends were taken are told. */
#include "daemon/ttrpc/server.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "daemon/codec_std.h"
#include "daemon/limits.h"
#include "daemon/log.h"
#include "daemon/ttrpc/frame.h"

enum {
    READ_BYTES = 16384,
    READS_AT_ONCE = 8, /* of one connection, before others get their turn */
    SWEEP_MS = 250,    /* how exactly the stall limit is kept */
};

typedef struct conn conn;
typedef struct call call;

struct call {
    dd_rpc rpc; /* first: the handlers' view is ours */
    dd_ttrpc_server *server;
    conn *conn; /* NULL: gone, or the answer has been given without the handler */
    call *next, **link;
    uint32_t stream;
    uint8_t *held; /* the answer of a unary call until it finishes */
    size_t held_len;
    bool is_sent_due, is_closed_due;
    uint64_t told_turn; /* turn of the loop in which sent was told last */
};

struct conn {
    dd_ttrpc_server *server;
    conn *next, **link;
    uv_poll_t poll;
    int fd, events;
    dd_peer peer;
    dd_frame_reader reader;
    uint8_t *out; /* bytes [out_at, out_len) are to be written */
    size_t out_at, out_len, out_size;
    uint64_t progress_ns; /* when the peer last took something, or had nothing to take */
    call *calls;
    uint32_t n_calls;
    size_t held_bytes; /* answers of unary calls that have not finished */
    bool is_marked, is_closed, is_failed;
    bool is_stalled; /* its calls were ended, and it has taken nothing since */
};

struct dd_ttrpc_server {
    uv_loop_t *loop;
    const dd_config *config;
    dd_service *service;
    void (*on_closed)(void *arg, const dd_peer *peer);
    void *arg;
    uv_idle_t turn;   /* runs while something is marked */
    uv_timer_t sweep; /* runs while there are connections */
    uv_timer_t deadline;
    uint64_t deadline_ns; /* what the timer waits for; 0: nothing */
    uint64_t turns;
    conn *conns;
    call *orphans; /* calls without a connection that handlers still hold */
    uint32_t n_handles;
    bool is_shutting;
    void (*on_gone)(void *arg);
    void *on_gone_arg;
    dd_log_limit refused;
};

static void on_turn(uv_idle_t *h);

static void mark(conn *c)
{
    c->is_marked = true;
    (void)uv_idle_start(&c->server->turn, on_turn);
}

static size_t queued(const conn *c)
{
    return c->out_len - c->out_at;
}

/* A peer with so much to take is not listened to. */
static bool is_choked(const conn *c)
{
    return queued(c) + c->held_bytes > DD_TTRPC_QUEUE_BYTES;
}

/* ---- calls ---- */

static void link_call(call **list, call *k)
{
    k->next = *list;
    k->link = list;
    if (k->next)
        k->next->link = &k->next;
    *list = k;
}

static void unlink_call(call *k)
{
    *k->link = k->next;
    if (k->next)
        k->next->link = k->link;
}

/* Takes the call off its connection; its handler still holds it. */
static void orphan(call *k)
{
    dd_ttrpc_server *t = k->server;
    unlink_call(k);
    k->conn->n_calls--;
    k->conn->held_bytes -= k->held_len;
    k->held_len = 0; /* nobody will see it */
    k->conn = NULL;
    k->is_sent_due = false;
    link_call(&t->orphans, k);
}

static void free_call(call *k)
{
    free(k->held);
    free(k);
}

/* ---- queue ---- */

static bool append(conn *c, const dd_frame *f, const uint8_t *payload)
{
    size_t n = DD_FRAME_HEADER + (size_t)f->len;
    if (queued(c) == 0) {
        c->out_at = c->out_len = 0;
        c->progress_ns = uv_hrtime();
    }
    if (n > c->out_size - c->out_len && c->out_at) {
        memmove(c->out, c->out + c->out_at, queued(c));
        c->out_len -= c->out_at;
        c->out_at = 0;
    }
    if (n > c->out_size - c->out_len) {
        size_t size = c->out_size ? c->out_size : READ_BYTES;
        while (size - c->out_len < n)
            size *= 2; /* ends: messages are bounded, and so are calls */
        uint8_t *p = realloc(c->out, size);
        if (!p) {
            c->is_failed = true; /* a stream with a hole is worse than none */
            mark(c);
            return false;
        }
        c->out = p;
        c->out_size = size;
    }
    dd_frame_put(c->out + c->out_len, f);
    if (f->len)
        memcpy(c->out + c->out_len + DD_FRAME_HEADER, payload, f->len);
    c->out_len += n;
    mark(c);
    return true;
}

/* The Response frame that ends a stream. */
static void respond(conn *c, uint32_t stream, const dd_status *st, dd_bytes payload)
{
    static const dd_status too_long = { .code = DD_RESOURCE_EXHAUSTED,
                                        .reason = "MESSAGE_TOO_LONG",
                                        .message = "the answer is longer than a frame of 4 MiB" };
    size_t len = 0;
    uint8_t *response = dd_ttrpc_response_encode(st, payload, &len);
    if (response && len > DD_FRAME_MAX) {
        free(response);
        response = dd_ttrpc_response_encode(&too_long, (dd_bytes){ 0 }, &len);
    }
    if (!response) {
        c->is_failed = true;
        mark(c);
        return;
    }
    (void)append(c,
                 &(dd_frame){ .len = (uint32_t)len, .stream = stream, .type = DD_FRAME_RESPONSE },
                 response);
    free(response);
}

static void refuse(conn *c, uint32_t stream, enum dd_grpc_code code, const char *reason,
                   const char *text)
{
    dd_status st;
    dd_status_set(&st, code, reason, "%s", text);
    bool passes = strcmp(reason, "MESSAGE_TOO_LONG") != 0; /* that one is as long next time */
    if (code == DD_UNAVAILABLE || (code == DD_RESOURCE_EXHAUSTED && passes))
        st.retry_ms = DD_RETRY_MS;
    respond(c, stream, &st, (dd_bytes){ 0 });
}

/* Answers a call that its handler still holds; the handler hears of it in the next turn. */
static void end_early(call *k, enum dd_grpc_code code, const char *reason, const char *text)
{
    refuse(k->conn, k->stream, code, reason, text);
    orphan(k);
    k->is_closed_due = true;
}

/* ---- what handlers call ---- */

static void call_send(dd_rpc *r, uint8_t *msg, size_t len)
{
    call *k = (call *)r;
    if (!k->conn) {
        free(msg);
        return;
    }
    assert(!k->is_sent_due);
    if (len > DD_FRAME_MAX) {
        free(msg);
        end_early(k, DD_RESOURCE_EXHAUSTED, "MESSAGE_TOO_LONG",
                  "a message is longer than a frame of 4 MiB");
        return;
    }
    k->is_sent_due = true;
    if (r->method->shape == DD_UNARY) {
        free(k->held);
        k->conn->held_bytes += len - k->held_len;
        k->held = msg;
        k->held_len = len;
        mark(k->conn);
        return;
    }
    (void)append(k->conn,
                 &(dd_frame){ .len = (uint32_t)len, .stream = k->stream, .type = DD_FRAME_DATA },
                 msg);
    free(msg);
}

static void call_finish(dd_rpc *r, const dd_status *st)
{
    call *k = (call *)r;
    conn *c = k->conn;
    if (c && st->code == DD_OK && r->method->shape != DD_UNARY)
        (void)append(c,
                     &(dd_frame){ .stream = k->stream,
                                  .type = DD_FRAME_DATA,
                                  .flags = DD_FRAME_CLOSED | DD_FRAME_NO_DATA },
                     NULL);
    else if (c)
        respond(c, k->stream, st, (dd_bytes){ k->held, k->held_len });
    unlink_call(k);
    if (c) {
        c->n_calls--;
        c->held_bytes -= k->held_len;
    } else {
        (void)uv_idle_start(&k->server->turn, on_turn); /* it may have been the last one */
    }
    free_call(k);
}

static const dd_rpc_vtable vtable = { call_send, call_finish };

/* ---- connections ---- */

static void on_conn_closed(uv_handle_t *h)
{
    conn *c = h->data;
    dd_frame_reader_done(&c->reader);
    free(c->out);
    free(c);
}

static void close_conn(conn *c)
{
    dd_ttrpc_server *t = c->server;
    if (c->is_closed)
        return;
    c->is_closed = true;
    uv_close((uv_handle_t *)&c->poll, on_conn_closed);
    (void)close(c->fd);
    *c->link = c->next;
    if (c->next)
        c->next->link = c->link;
    while (c->calls) {
        call *k = c->calls;
        orphan(k);
        k->is_closed_due = true;
    }
    (void)uv_idle_start(&t->turn, on_turn);
    if (!t->conns)
        (void)uv_timer_stop(&t->sweep);
    t->on_closed(t->arg, &c->peer);
}

static void on_poll(uv_poll_t *p, int status, int events);

static void update_events(conn *c)
{
    int events = UV_DISCONNECT;
    if (!is_choked(c))
        events |= UV_READABLE;
    if (queued(c))
        events |= UV_WRITABLE;
    if (events == c->events)
        return;
    c->events = events;
    if (uv_poll_start(&c->poll, events, on_poll) < 0)
        close_conn(c);
}

static void flush(conn *c)
{
    while (queued(c) && !c->is_closed) {
        ssize_t n = send(c->fd, c->out + c->out_at, queued(c), MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return;
        if (n <= 0) {
            close_conn(c);
            return;
        }
        c->out_at += (size_t)n;
        c->progress_ns = uv_hrtime();
        c->is_stalled = false;
    }
    if (c->out_size > DD_TTRPC_QUEUE_BYTES && !c->is_closed) { /* a big answer has gone */
        free(c->out);
        c->out = NULL;
        c->out_at = c->out_len = c->out_size = 0;
    }
}

/* ---- requests ---- */

static void arm_deadline(dd_ttrpc_server *t, uint64_t at_ns);

static call *find_call(conn *c, uint32_t stream)
{
    call *k = c->calls;
    while (k && k->stream != stream)
        k = k->next;
    return k;
}

static const dd_method *find_method(const dd_ttrpc_request *q)
{
    char path[256];
    size_t n = q->service.len + q->method.len + 2;
    if (n > sizeof path || !q->service.len || !q->method.len)
        return NULL;
    path[0] = '/';
    memcpy(path + 1, q->service.data, q->service.len);
    path[1 + q->service.len] = '/';
    memcpy(path + 2 + q->service.len, q->method.data, q->method.len);
    return dd_service_method_find(path, n);
}

static void start_call(conn *c, uint32_t stream, const dd_ttrpc_request *q, const dd_method *m)
{
    dd_ttrpc_server *t = c->server;
    call *k = calloc(1, sizeof *k);
    if (!k) {
        refuse(c, stream, DD_RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", "out of memory");
        return;
    }
    uint64_t now = uv_hrtime();
    k->server = t;
    k->conn = c;
    k->stream = stream;
    k->rpc = (dd_rpc){ .vt = &vtable, .method = m, .peer = c->peer, .arrived_ns = now };
    if (q->timeout_ns > 0 && (uint64_t)q->timeout_ns < UINT64_MAX - now)
        k->rpc.deadline_ns = now + (uint64_t)q->timeout_ns;
    for (size_t i = 0; i < q->request_id.len && i < sizeof k->rpc.request_id - 1; i++) {
        uint8_t b = q->request_id.data[i];
        k->rpc.request_id[i] = b > 0x20 && b < 0x7f ? (char)b : '_';
    }
    link_call(&c->calls, k);
    c->n_calls++;
    if (k->rpc.deadline_ns)
        arm_deadline(t, k->rpc.deadline_ns);
    dd_service_start(t->service, &k->rpc);
    /* start may have ended the call, and then it is no longer ours to touch */
    if (find_call(c, stream) == k)
        dd_service_message(t->service, &k->rpc, q->payload.data, q->payload.len);
}

/* How much of a name is quoted back. */
static int shown(dd_bytes name)
{
    return name.len < 64 ? (int)name.len : 64;
}

static void take_request(conn *c, const dd_frame *f, const uint8_t *payload)
{
    dd_ttrpc_request q;
    char text[160];
    if (dd_ttrpc_request_decode(payload, f->len, &q) < 0) {
        refuse(c, f->stream, DD_INVALID_ARGUMENT, "MALFORMED_MESSAGE",
               "the frame holds no ttrpc.Request");
        return;
    }
    const dd_method *m = find_method(&q);
    if (!m || m->shape == DD_BIDI) {
        (void)snprintf(text, sizeof text, "unknown method /%.*s/%.*s", shown(q.service),
                       (const char *)q.service.data, shown(q.method), (const char *)q.method.data);
        refuse(c, f->stream, DD_UNIMPLEMENTED, "UNKNOWN_METHOD",
               m ? "ttrpc has no calls with messages in both directions; use gRPC" : text);
    } else if (q.timeout_ns < 0) {
        refuse(c, f->stream, DD_DEADLINE_EXCEEDED, "DEADLINE", "the deadline had passed");
    } else if (c->server->is_shutting) {
        refuse(c, f->stream, DD_UNAVAILABLE, "DRAINING", "the daemon is stopping");
    } else if (c->n_calls >= DD_TTRPC_CALLS_MAX) {
        refuse(c, f->stream, DD_RESOURCE_EXHAUSTED, "TOO_MANY_CALLS",
               "too many calls at once on this connection");
    } else {
        start_call(c, f->stream, &q, m);
    }
}

/* After its request a client has nothing more to say but that it is done. */
static void take_data(conn *c, const dd_frame *f)
{
    call *k = find_call(c, f->stream);
    if (k && f->len)
        end_early(k, DD_INVALID_ARGUMENT, "ONE_MESSAGE", "the method takes one message only");
}

static void take_frames(conn *c)
{
    dd_frame f;
    const uint8_t *payload;
    int r = 0;
    while (!c->is_closed && !c->is_failed && !is_choked(c) &&
           (r = dd_frame_next(&c->reader, &f, &payload)) > 0) {
        if (f.type == DD_FRAME_REQUEST)
            take_request(c, &f, payload);
        else
            take_data(c, &f);
    }
    if (r < 0 && !c->is_closed) {
        dd_log_limited(&c->server->refused, 5, DD_LOG_INFO, "%s, ttrpc: %s; closed", c->peer.text,
                       c->reader.broken);
        close_conn(c);
    }
}

static void take_bytes(conn *c)
{
    for (int i = 0; i < READS_AT_ONCE && !c->is_closed && !is_choked(c); i++) {
        uint8_t *to = dd_frame_room(&c->reader, READ_BYTES);
        ssize_t n = to ? read(c->fd, to, READ_BYTES) : -1;
        if (to && n < 0 && (errno == EAGAIN || errno == EINTR || errno == EWOULDBLOCK))
            return;
        if (n <= 0) {
            close_conn(c);
            return;
        }
        dd_frame_fed(&c->reader, (size_t)n);
        take_frames(c);
        if (n < READ_BYTES)
            return;
    }
}

static void on_poll(uv_poll_t *p, int status, int events)
{
    conn *c = p->data;
    if (status < 0) {
        close_conn(c);
        return;
    }
    if (events & UV_WRITABLE)
        mark(c);
    if (events & UV_READABLE)
        take_bytes(c);
    /* With something left to read the end is found by reading. */
    else if (events & UV_DISCONNECT)
        close_conn(c);
}

/* ---- once per turn ---- */

static void tell_sent(conn *c)
{
    dd_ttrpc_server *t = c->server;
    call *k = c->calls;
    while (k && !c->is_closed && queued(c) <= DD_TTRPC_QUEUE_BYTES) {
        if (!k->is_sent_due || k->told_turn == t->turns) {
            k = k->next;
            continue;
        }
        k->is_sent_due = false;
        k->told_turn = t->turns;
        dd_service_sent(t->service, &k->rpc);
        k = c->calls; /* anything may have ended meanwhile */
    }
    for (k = c->is_closed ? NULL : c->calls; k; k = k->next)
        if (k->is_sent_due && queued(c) <= DD_TTRPC_QUEUE_BYTES)
            mark(c);
}

static void serve(conn *c)
{
    c->is_marked = false;
    if (c->is_failed) {
        close_conn(c);
        return;
    }
    flush(c);
    if (!c->is_closed)
        take_frames(c); /* what was left while the queue was full */
    if (!c->is_closed)
        tell_sent(c);
    if (!c->is_closed)
        flush(c);
    if (!c->is_closed)
        update_events(c);
    if (!c->is_closed && c->server->is_shutting && !c->n_calls && !queued(c))
        close_conn(c);
}

static void tell_closed(dd_ttrpc_server *t)
{
    call *k = t->orphans;
    while (k) {
        if (!k->is_closed_due) {
            k = k->next;
            continue;
        }
        k->is_closed_due = false;
        dd_service_closed(t->service, &k->rpc);
        k = t->orphans;
    }
}

static void on_turn(uv_idle_t *h)
{
    dd_ttrpc_server *t = h->data;
    (void)uv_idle_stop(h);
    t->turns++;
    tell_closed(t);
    conn *c = t->conns;
    while (c) {
        conn *next = c->next; /* connections close only here, one by one, or when polled */
        if (c->is_marked)
            serve(c);
        c = next;
    }
    tell_closed(t);
    if (t->is_shutting && !t->conns && !t->orphans && t->on_gone) {
        void (*on_gone)(void *) = t->on_gone;
        t->on_gone = NULL;
        on_gone(t->on_gone_arg);
    }
}

/* The calls of one who takes nothing end, and he is told why if he ever reads on; if he takes
 * nothing for as long again he is sent away. */
static void cut_stalled(conn *c)
{
    if (c->is_stalled || !c->calls) {
        dd_log(DD_LOG_INFO, "%s, ttrpc: takes nothing; closed", c->peer.text);
        close_conn(c);
        return;
    }
    dd_log(DD_LOG_INFO, "%s, ttrpc: takes nothing; calls cancelled", c->peer.text);
    c->is_stalled = true;
    c->progress_ns = uv_hrtime();
    while (c->calls)
        end_early(c->calls, DD_RESOURCE_EXHAUSTED, "STALLED",
                  "the client took no messages for stall_limit");
}

static void on_sweep(uv_timer_t *h)
{
    dd_ttrpc_server *t = h->data;
    uint64_t now = uv_hrtime();
    for (conn *c = t->conns, *next; c; c = next) {
        next = c->next;
        if (queued(c) && now - c->progress_ns > t->config->limits.stall_limit_ns)
            cut_stalled(c);
    }
}

static void on_deadline(uv_timer_t *h)
{
    dd_ttrpc_server *t = h->data;
    uint64_t now = uv_hrtime(), next_ns = 0;
    t->deadline_ns = 0;
    for (conn *c = t->conns; c; c = c->next)
        for (call *k = c->calls, *next; k; k = next) {
            next = k->next;
            uint64_t at = k->rpc.deadline_ns;
            if (at && at <= now)
                end_early(k, DD_DEADLINE_EXCEEDED, "DEADLINE", "the deadline has passed");
            else if (at && (!next_ns || at < next_ns))
                next_ns = at;
        }
    if (next_ns)
        arm_deadline(t, next_ns);
}

static void arm_deadline(dd_ttrpc_server *t, uint64_t at_ns)
{
    if (t->deadline_ns && t->deadline_ns <= at_ns)
        return;
    uint64_t now = uv_hrtime();
    t->deadline_ns = at_ns;
    uv_update_time(t->loop);
    (void)uv_timer_start(&t->deadline, on_deadline,
                         at_ns > now ? (at_ns - now + 999999) / 1000000 : 0, 0);
}

/* ---- life ---- */

int dd_ttrpc_server_new(uv_loop_t *loop, const dd_config *c, dd_service *s,
                        void (*on_closed)(void *arg, const dd_peer *peer), void *arg,
                        dd_ttrpc_server **ret_t, delta_error *err)
{
    dd_ttrpc_server *t = calloc(1, sizeof *t);
    if (!t)
        return delta_fail(err, DELTA_ENOMEM, "ttrpc: %zu bytes", sizeof *t);
    t->loop = loop;
    t->config = c;
    t->service = s;
    t->on_closed = on_closed;
    t->arg = arg;
    (void)uv_idle_init(loop, &t->turn);
    (void)uv_timer_init(loop, &t->sweep);
    (void)uv_timer_init(loop, &t->deadline);
    t->turn.data = t->sweep.data = t->deadline.data = t;
    t->n_handles = 3;
    *ret_t = t;
    return 0;
}

int dd_ttrpc_server_add(dd_ttrpc_server *t, int fd, const dd_peer *peer)
{
    conn *c = calloc(1, sizeof *c);
    if (!c || uv_poll_init(t->loop, &c->poll, fd) < 0) {
        free(c);
        (void)close(fd);
        return -1;
    }
    c->server = t;
    c->fd = fd;
    c->peer = *peer;
    c->poll.data = c;
    c->next = t->conns;
    c->link = &t->conns;
    if (c->next)
        c->next->link = &c->next;
    t->conns = c;
    if (!c->next)
        (void)uv_timer_start(&t->sweep, on_sweep, SWEEP_MS, SWEEP_MS);
    mark(c);
    return 0;
}

void dd_ttrpc_server_shutdown(dd_ttrpc_server *t, bool now, void (*on_gone)(void *arg), void *arg)
{
    if (!t->is_shutting) {
        t->is_shutting = true;
        t->on_gone = on_gone;
        t->on_gone_arg = arg;
    }
    for (conn *c = t->conns, *next; c; c = next) {
        next = c->next;
        if (now)
            close_conn(c);
        else
            mark(c);
    }
    (void)uv_idle_start(&t->turn, on_turn);
}

static void on_handle_closed(uv_handle_t *h)
{
    dd_ttrpc_server *t = h->data;
    if (--t->n_handles == 0)
        free(t);
}

void dd_ttrpc_server_free(dd_ttrpc_server *t)
{
    if (!t)
        return;
    assert(!t->conns && !t->orphans);
    uv_close((uv_handle_t *)&t->turn, on_handle_closed);
    uv_close((uv_handle_t *)&t->sweep, on_handle_closed);
    uv_close((uv_handle_t *)&t->deadline, on_handle_closed);
}
