/* call.c -- see call.h.
 *
 * Batches of a call: RECV_CLOSE_ON_SERVER at once, which alone tells that the peer has gone;
 * initial metadata at once for streams and with the first message or the status for unary
 * calls; one message at a time; the status last. A completed send means that flow control
 * took the message, not that somebody read it.
 *
 * After a batch of a call has failed nothing is done but wait for RECV_CLOSE, which follows. */
#include "daemon/grpc/call.h"

#include <assert.h>
#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/support/alloc.h>
#include <grpc/support/time.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/grpc/internal.h"
#include "daemon/log.h"

static void release(dd_grpc_call *c)
{
    dd_grpc_server *g = c->server;
    if (--c->n_refs)
        return;
    if (c->is_linked) {
        *c->link = c->next;
        if (c->next)
            c->next->link = c->link;
    }
    grpc_byte_buffer_destroy(c->in);
    grpc_byte_buffer_destroy(c->out);
    grpc_metadata_array_destroy(&c->metadata);
    grpc_call_details_destroy(&c->details);
    if (c->call)
        grpc_call_unref(c->call);
    free(c->last);
    free(c);
    if (--g->n_allocated == 0 && g->is_shutting)
        (void)uv_async_send(&g->wake); /* the last one may go outside of an event */
}

/* Starts a batch; its end comes as an event. */
static bool start(dd_grpc_call *c, enum dd_tag_kind kind, const grpc_op *ops, size_t n)
{
    grpc_call_error e = grpc_call_start_batch(c->call, ops, n, &c->tags[kind], NULL);
    if (e != GRPC_CALL_OK) {
        static dd_log_limit limit;
        dd_log_limited(&limit, 1, DD_LOG_ERROR, "gRPC refused a batch: %s",
                       grpc_call_error_to_string(e));
        return false;
    }
    c->n_refs++;
    return true;
}

static grpc_op metadata_op(dd_grpc_call *c)
{
    c->has_metadata_out = true;
    return (grpc_op){ .op = GRPC_OP_SEND_INITIAL_METADATA };
}

bool dd_grpc_call_request(dd_grpc_server *g, const dd_grpc_slot *slot)
{
    dd_grpc_call *c = calloc(1, sizeof *c);
    grpc_call_error e;
    if (!c)
        return false;
    c->server = g;
    c->slot = slot;
    c->n_refs = 1;
    g->n_allocated++;
    grpc_metadata_array_init(&c->metadata);
    grpc_call_details_init(&c->details);
    for (int i = 0; i <= DD_TAG_STATUS; i++)
        c->tags[i] = (dd_tag){ .call = c, .kind = (enum dd_tag_kind)i };
    if (slot->registered)
        e = grpc_server_request_registered_call(g->server, slot->registered, &c->call, &c->deadline,
                                                &c->metadata,
                                                slot->method->shape == DD_BIDI ? NULL : &c->in,
                                                g->queue, g->queue, &c->tags[DD_TAG_NEW]);
    else
        e = grpc_server_request_call(g->server, &c->call, &c->details, &c->metadata, g->queue,
                                     g->queue, &c->tags[DD_TAG_NEW]);
    if (e != GRPC_CALL_OK) {
        if (!g->is_shutting)
            dd_log(DD_LOG_ERROR, "gRPC takes no more requests: %s", grpc_call_error_to_string(e));
        release(c);
        return false;
    }
    return true;
}

/* ---- the end ---- */

static void send_status(dd_grpc_call *c, const dd_status *st)
{
    grpc_op ops[2] = { 0 };
    size_t n = 0, len = 0;
    grpc_metadata detail = { 0 };
    uint8_t *bytes = st->code == DD_OK ? NULL : dd_status_encode(st, &len);
    grpc_slice text = grpc_slice_from_copied_string(st->message);
    if (!c->has_metadata_out)
        ops[n++] = metadata_op(c);
    if (bytes) {
        detail.key = grpc_slice_from_static_string("grpc-status-details-bin");
        detail.value = grpc_slice_from_copied_buffer((const char *)bytes, len);
        free(bytes);
    }
    ops[n].op = GRPC_OP_SEND_STATUS_FROM_SERVER;
    ops[n].data.send_status_from_server.status = (grpc_status_code)st->code;
    ops[n].data.send_status_from_server.status_details = &text;
    ops[n].data.send_status_from_server.trailing_metadata_count = bytes ? 1 : 0;
    ops[n].data.send_status_from_server.trailing_metadata = &detail;
    n++;
    if (!start(c, DD_TAG_STATUS, ops, n))
        (void)grpc_call_cancel(c->call, NULL);
    grpc_slice_unref(text);
    if (bytes)
        grpc_slice_unref(detail.value); /* the call holds its own */
}

static void call_finish(dd_rpc *r, const dd_status *st)
{
    dd_grpc_call *c = (dd_grpc_call *)r;
    assert(!c->is_finished);
    c->is_finished = true;
    if (c->is_over) {
        release(c);
    } else if (c->is_sending) {
        c->is_waiting = true;
        c->last = malloc(sizeof *c->last);
        if (c->last)
            *c->last = *st;
        else
            (void)grpc_call_cancel_with_status(c->call, GRPC_STATUS_RESOURCE_EXHAUSTED,
                                               "out of memory", NULL);
    } else {
        send_status(c, st);
        release(c);
    }
}

/* ---- messages ---- */

static void call_send(dd_rpc *r, uint8_t *msg, size_t len)
{
    dd_grpc_call *c = (dd_grpc_call *)r;
    grpc_op ops[2] = { 0 };
    size_t n = 0;
    assert(!c->is_sending && !c->is_finished);
    if (c->is_over) {
        free(msg);
        return;
    }
    grpc_slice slice = grpc_slice_new_with_user_data(msg, len, free, msg);
    c->out = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    if (!c->has_metadata_out)
        ops[n++] = metadata_op(c);
    ops[n].op = GRPC_OP_SEND_MESSAGE;
    ops[n].data.send_message.send_message = c->out;
    n++;
    c->is_sending = start(c, DD_TAG_SENT, ops, n);
    if (!c->is_sending)
        (void)grpc_call_cancel(c->call, NULL);
    c->sending_since_ns = uv_hrtime();
}

static const dd_rpc_vtable vtable = { call_send, call_finish };

/* One piece of memory for a message that came in several; the caller drops *ret_slice. */
static const uint8_t *flatten(grpc_byte_buffer *b, size_t *ret_len, grpc_slice *ret_slice)
{
    grpc_byte_buffer_reader reader;
    if (!grpc_byte_buffer_reader_init(&reader, b))
        return NULL;
    *ret_slice = grpc_byte_buffer_reader_readall(&reader);
    grpc_byte_buffer_reader_destroy(&reader);
    *ret_len = GRPC_SLICE_LENGTH(*ret_slice);
    return GRPC_SLICE_START_PTR(*ret_slice);
}

/* Hands the message in c->in to the handlers and drops it. */
static void deliver(dd_grpc_call *c)
{
    grpc_slice slice;
    size_t len = 0;
    grpc_byte_buffer *in = c->in;
    c->in = NULL;
    const uint8_t *bytes = flatten(in, &len, &slice);
    grpc_byte_buffer_destroy(in);
    if (bytes) {
        dd_service_message(c->server->service, &c->rpc, bytes, len);
        grpc_slice_unref(slice);
    } else {
        (void)grpc_call_cancel_with_status(c->call, GRPC_STATUS_INTERNAL, "unreadable message",
                                           NULL);
    }
}

/* A bidi call's next message is asked for when the answer to the last one was taken. */
static void receive(dd_grpc_call *c)
{
    grpc_op op = { .op = GRPC_OP_RECV_MESSAGE };
    if (c->rpc.method->shape != DD_BIDI || c->is_receiving || c->is_sending || c->is_half_closed ||
        c->is_finished || c->is_over)
        return;
    op.data.recv_message.recv_message = &c->in;
    c->is_receiving = start(c, DD_TAG_RECEIVED, &op, 1);
}

/* ---- the beginning ---- */

static bool identify(dd_grpc_call *c)
{
    char *text = grpc_call_get_peer(c->call);
    const dd_peer *p = NULL;
    if (text && strncmp(text, "fd:", 3) == 0)
        p = c->server->peer_of(c->server->arg, atoi(text + 3));
    gpr_free(text);
    if (p)
        c->rpc.peer = *p;
    return p != NULL;
}

static uint64_t deadline_ns(gpr_timespec at, uint64_t now_ns)
{
    if (gpr_time_cmp(at, gpr_inf_future(at.clock_type)) == 0)
        return 0;
    gpr_timespec left = gpr_time_sub(at, gpr_now(at.clock_type));
    int64_t ns = left.tv_sec > INT64_MAX / 2000000000 ? INT64_MAX / 2
                                                      : left.tv_sec * 1000000000 + left.tv_nsec;
    return ns > 0 ? now_ns + (uint64_t)ns : now_ns;
}

static void copy_request_id(dd_grpc_call *c)
{
    for (size_t i = 0; i < c->metadata.count; i++) {
        grpc_metadata *m = &c->metadata.metadata[i];
        if (grpc_slice_str_cmp(m->key, "x-request-id") != 0)
            continue;
        size_t n = GRPC_SLICE_LENGTH(m->value);
        const uint8_t *from = GRPC_SLICE_START_PTR(m->value);
        if (n > sizeof c->rpc.request_id - 1)
            n = sizeof c->rpc.request_id - 1;
        for (size_t k = 0; k < n; k++)
            c->rpc.request_id[k] = from[k] > 0x20 && from[k] < 0x7f ? (char)from[k] : '_';
        c->rpc.request_id[n] = '\0';
        return;
    }
}

/* Too long (then gRPC has answered already), or missing. */
static void finish_empty(dd_grpc_call *c)
{
    dd_status st;
    dd_status_set(&st, DD_INVALID_ARGUMENT, "NO_MESSAGE", "the call holds no request message");
    call_finish(&c->rpc, &st);
}

static void finish_unknown(dd_grpc_call *c)
{
    dd_status st;
    int n = (int)GRPC_SLICE_LENGTH(c->details.method);
    dd_status_set(&st, DD_UNIMPLEMENTED, "UNKNOWN_METHOD", "unknown method %.*s", n < 128 ? n : 128,
                  (const char *)GRPC_SLICE_START_PTR(c->details.method));
    call_finish(&c->rpc, &st);
}

static void begin(dd_grpc_call *c)
{
    dd_grpc_server *g = c->server;
    grpc_op op = { .op = GRPC_OP_RECV_CLOSE_ON_SERVER };
    c->next = g->calls;
    c->link = &g->calls;
    if (c->next)
        c->next->link = &c->next;
    g->calls = c;
    c->is_linked = true;
    dd_grpc_server_watch(g);
    c->rpc.vt = &vtable;
    c->rpc.method = c->slot->method;
    c->rpc.arrived_ns = uv_hrtime();
    op.data.recv_close_on_server.cancelled = &c->cancelled;
    if (!start(c, DD_TAG_CLOSE, &op, 1) || !identify(c)) {
        /* the connection went while the call was on its way */
        c->is_finished = true;
        (void)grpc_call_cancel(c->call, NULL);
        release(c);
        return;
    }
    if (!c->rpc.method) {
        finish_unknown(c);
        return;
    }
    c->rpc.deadline_ns = deadline_ns(c->deadline, c->rpc.arrived_ns);
    copy_request_id(c);
    bool is_unary = c->rpc.method->shape == DD_UNARY, is_bidi = c->rpc.method->shape == DD_BIDI;
    if (!is_bidi && !c->in) {
        finish_empty(c);
        return;
    }
    if (!is_unary) {
        op = metadata_op(c);
        (void)start(c, DD_TAG_METADATA, &op, 1);
    }
    c->n_refs++; /* start and message may end the call */
    dd_service_start(g->service, &c->rpc);
    if (!is_bidi && !c->is_finished)
        deliver(c);
    receive(c);
    release(c);
}

/* ---- events ---- */

static void on_sent(dd_grpc_call *c, bool ok)
{
    c->is_sending = false;
    grpc_byte_buffer_destroy(c->out);
    c->out = NULL;
    if (c->is_waiting) {
        c->is_waiting = false;
        if (ok && !c->is_over && c->last)
            send_status(c, c->last);
        release(c);
    } else if (ok && !c->is_over && !c->is_finished) {
        dd_service_sent(c->server->service, &c->rpc);
        receive(c);
    }
}

static void on_received(dd_grpc_call *c, bool ok)
{
    c->is_receiving = false;
    if (!ok || c->is_finished || c->is_over)
        return;
    if (c->in) {
        deliver(c);
        receive(c);
    } else {
        c->is_half_closed = true;
        dd_service_half_closed(c->server->service, &c->rpc);
    }
}

static void on_over(dd_grpc_call *c)
{
    c->is_over = true;
    if (!c->is_finished)
        dd_service_closed(c->server->service, &c->rpc);
}

void dd_grpc_call_event(dd_grpc_call *c, dd_tag *tag)
{
    bool ok = tag->ok;
    switch (tag->kind) {
    case DD_TAG_NEW:
        if (ok) {
            (void)dd_grpc_call_request(c->server, c->slot); /* the next one */
            begin(c);
        } else {
            release(c); /* shutting down */
        }
        return; /* the reference is the handler's */
    case DD_TAG_CLOSE:
        on_over(c);
        break;
    case DD_TAG_RECEIVED:
        on_received(c, ok);
        break;
    case DD_TAG_SENT:
        on_sent(c, ok);
        break;
    case DD_TAG_METADATA:
    case DD_TAG_STATUS:
    case DD_TAG_SHUTDOWN:
        break;
    }
    release(c);
}

void dd_grpc_call_check_stall(dd_grpc_call *c, uint64_t then_ns)
{
    if (!c->is_sending || c->is_over || c->sending_since_ns > then_ns)
        return;
    dd_log(DD_LOG_INFO, "%s, gRPC: takes nothing; call cancelled", c->rpc.peer.text);
    (void)grpc_call_cancel_with_status(c->call, GRPC_STATUS_RESOURCE_EXHAUSTED,
                                       "the client takes no messages", NULL);
    c->sending_since_ns = UINT64_MAX; /* once */
}
