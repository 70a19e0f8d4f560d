/* sessions.c -- named sessions: a transcript, its tools, and a timeline at the engine.
 *
 * The timeline is the truth of what was sampled; the transcript is what is needed to render the
 * next suffix and to show. A turn renders and computes only what is new. If its place is needed by
 * somebody who waits the timeline is parked: its tokens stay, and what was computed of them is in
 * the engine's cache as long as there is room. Where it cannot be continued (reasoning is to be left
 * out of it, memory ran out) it is dropped, and the next turn renders the whole transcript anew.
 *
 * Limits     limits.max_named_sessions; DD_SESSION_MESSAGES and DD_SESSION_BYTES each. */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/live.h"

static void session_free(dd_service *s, dd_session *x)
{
    for (dd_session **p = &s->sessions; *p; p = &(*p)->next)
        if (*p == x) {
            *p = x->next;
            s->n_sessions--;
            s->n_pinned -= x->is_pinned;
            break;
        }
    for (size_t i = 0; i < x->n_messages; i++) {
        free((void *)x->messages[i].data);
        free((void *)x->sampled[i].text.p);
        free((void *)x->sampled[i].ids);
    }
    for (size_t i = 0; i < x->n_tools; i++)
        free((void *)x->tools[i].data);
    free(x->messages);
    free(x->sampled);
    free(x->borders);
    free(x->tools);
    free(x->name);
    free(x->save_path);
    dd_timeline_free(x->timeline);
    free(x);
}

static int copy(dd_bytes from, dd_bytes *to)
{
    uint8_t *p = malloc(from.len ? from.len : 1);
    if (!p)
        return -1;
    if (from.len)
        memcpy(p, from.data, from.len);
    *to = (dd_bytes){ p, from.len };
    return 0;
}

/* Takes the bytes, also on failure. */
static int add_message(dd_session *x, uint8_t *data, size_t len)
{
    if (!data)
        return -1;
    if (x->n_messages == x->cap_messages) {
        size_t cap = x->cap_messages ? x->cap_messages * 2 : 8;
        dd_bytes *more = realloc(x->messages, cap * sizeof *more);
        if (!more) {
            free(data);
            return -1;
        }
        x->messages = more;
        dd_sampled *sampled = realloc(x->sampled, cap * sizeof *sampled);
        if (!sampled) {
            free(data);
            return -1;
        }
        x->sampled = sampled;
        x->cap_messages = cap;
    }
    x->sampled[x->n_messages] = (dd_sampled){ 0 };
    x->messages[x->n_messages++] = (dd_bytes){ data, len };
    x->bytes += len;
    return 0;
}

dd_session *dd_session_find(dd_service *s, const char *id, const dd_peer *p,
                            bool (*may)(const dd_peer *p, const dd_peer *owner), dd_status *st)
{
    for (dd_session *x = s->sessions; x; x = x->next)
        if (strcmp(x->id, id) == 0 && may(p, &x->owner))
            return x;
    dd_status_set(st, DD_NOT_FOUND, "SESSION_UNKNOWN", "there is no session of this id");
    st->missing = "deltad.v1.Session";
    (void)snprintf(st->missing_name, sizeof st->missing_name, "%s", id);
    return NULL;
}

static int out_of_memory(dd_status *st)
{
    dd_status_set(st, DD_RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", "no memory for the session");
    return -1;
}

int dd_session_check_count(const dd_service *s, uint32_t count, dd_status *st)
{
    if (s->n_sessions + count <= s->o.config->limits.max_named_sessions)
        return 0;
    dd_status_set(st, DD_RESOURCE_EXHAUSTED, "SESSION_LIMIT", "%u sessions are open of %u",
                  s->n_sessions, s->o.config->limits.max_named_sessions);
    st->retry_ms = DD_RETRY_MS;
    return -1;
}

/* An empty session in the list. */
static dd_session *add_session(dd_service *s, const char *name, const dd_bytes *tools,
                               size_t n_tools, const dd_peer *owner, dd_status *st)
{
    dd_session *x = calloc(1, sizeof *x);
    if (!x) {
        (void)out_of_memory(st);
        return NULL;
    }
    x->next = s->sessions;
    s->sessions = x;
    s->n_sessions++;
    x->name = strdup(name);
    x->tools = calloc(n_tools ? n_tools : 1, sizeof *x->tools);
    bool bad = !x->name || !x->tools || dd_random_text(x->id, 24) < 0;
    for (size_t k = 0; !bad && k < n_tools; k++) {
        bad = copy(tools[k], &x->tools[k]) < 0;
        x->n_tools += !bad;
        x->bytes += tools[k].len;
    }
    if (bad) {
        (void)out_of_memory(st);
        session_free(s, x);
        return NULL;
    }
    x->owner = *owner;
    x->created_ns = x->used_ns = de_now_ns();
    return x;
}

static dd_session *create(dd_live *l, dd_status *st)
{
    dd_service *s = l->s;
    const dd_request *q = &l->req;
    dd_session *x = NULL;
    if (dd_session_check_count(s, 1, st) == 0)
        x = add_session(s, q->name, q->packed_tools, q->n_tools, &l->peer, st);
    if (!x)
        return NULL;
    x->idle_timeout_ns =
        q->has_idle_timeout ? q->idle_timeout_ns : s->o.config->limits.session_idle_ns;
    x->thinking = q->thinking;
    x->preserve = q->has_preserve ? q->preserve : true;
    x->omit_reasoning = q->omit_reasoning;
    x->ctx_wanted = q->ctx_tokens;
    return x;
}

int dd_session_check_idle(const dd_session *x, const dd_request *q, dd_status *st)
{
    if (x->busy) {
        dd_status_set(st, DD_ABORTED, "SESSION_BUSY", "the session's last turn still runs");
        st->retry_ms = DD_RETRY_MS;
        return -1;
    }
    if (q->has_expect && q->expect_generation != x->generation) {
        dd_status_set(st, DD_FAILED_PRECONDITION, "GENERATION", "the session is at generation %llu",
                      (unsigned long long)x->generation);
        st->meta[0].key = "actual";
        (void)snprintf(st->meta[0].value, sizeof st->meta[0].value, "%llu",
                       (unsigned long long)x->generation);
        st->meta[1].key = "expected";
        (void)snprintf(st->meta[1].value, sizeof st->meta[1].value, "%llu",
                       (unsigned long long)q->expect_generation);
        st->n_meta = 2;
        return -1;
    }
    return 0;
}

static int check_turn(const dd_session *x, const dd_request *q, dd_status *st)
{
    size_t bytes = 0;
    if (dd_session_check_idle(x, q, st) < 0)
        return -1;
    for (size_t i = 0; i < q->n_messages; i++)
        bytes += q->packed[i].len;
    if (x->n_messages + q->n_messages > DD_SESSION_MESSAGES ||
        x->bytes + bytes > DD_SESSION_BYTES) {
        dd_status_set(st, DD_RESOURCE_EXHAUSTED, "SESSION_LIMIT",
                      "a session has at most %d messages and %d bytes", DD_SESSION_MESSAGES,
                      DD_SESSION_BYTES);
        return -1;
    }
    if (q->n_tools) {
        dd_status_set(st, DD_INVALID_ARGUMENT, "FIELD_INVALID",
                      "a session has the tools it was created with");
        (void)snprintf(st->field, sizeof st->field, "tools");
        return -1;
    }
    return 0;
}

static void forget_timeline(dd_session *x)
{
    dd_timeline_free(x->timeline);
    x->timeline = NULL;
    x->n_rendered = 0;
    x->n_borders = 0;
    x->n_tokens = x->ctx_tokens = 0;
    x->needs_end = x->is_open = false;
}

int dd_session_begin(dd_live *l, dd_status *st)
{
    dd_request *q = &l->req;
    dd_session *x;
    if (l->method == DD_M_CREATE)
        x = create(l, st);
    else
        x = dd_session_find(l->s, q->session_id, &l->peer, dd_peer_may_use, st);
    if (!x || (l->method != DD_M_CREATE && check_turn(x, q, st) < 0))
        return -1;
    l->session = x;
    x->busy = l;
    x->used_ns = de_now_ns();
    if (l->method == DD_M_CHAT && !q->has_thinking)
        q->thinking = x->thinking;
    q->preserve = q->has_preserve ? q->preserve : x->preserve;
    q->omit_reasoning = q->omit_reasoning || x->omit_reasoning;
    /* The whole conversation: transcript, then what is new. */
    size_t old = x->n_messages, n = old + q->n_messages;
    delta_message *all = malloc((n ? n : 1) * sizeof *all);
    if (!all)
        return out_of_memory(st);
    int r = 0;
    for (size_t i = 0; r == 0 && i < old; i++) {
        r = dd_codec_message(q, x->messages[i], &all[i], st);
    }
    if (q->n_messages)
        memcpy(all + old, q->messages, q->n_messages * sizeof *all);
    q->arena.limit +=
        n * sizeof *all + 64 + x->n_tools * (sizeof *q->tools + sizeof *q->tool_strict) + 128;
    q->messages = de_arena_array(&q->arena, n, sizeof *all);
    q->tools = l->method == DD_M_CREATE ? q->tools
                                        : de_arena_array(&q->arena, x->n_tools, sizeof *q->tools);
    if (l->method != DD_M_CREATE)
        q->tool_strict = de_arena_array(&q->arena, x->n_tools, sizeof *q->tool_strict);
    if (!q->messages || !q->tools || !q->tool_strict)
        r = out_of_memory(st);
    else if (n)
        memcpy(q->messages, all, n * sizeof *all);
    free(all);
    q->n_messages = n;
    if (l->method != DD_M_CREATE) {
        for (size_t i = 0; r == 0 && i < x->n_tools; i++)
            r = dd_codec_tool(q, x->tools[i], &q->tools[i], &q->tool_strict[i], st);
        q->n_tools = x->n_tools;
    }
    /* Reasoning that is in the timeline cannot be left out of it, nor put back. */
    if (l->method == DD_M_CHAT && x->timeline && (!q->preserve || !x->is_whole))
        forget_timeline(x);
    l->turn.first = x->timeline ? x->n_rendered : 0;
    if (l->turn.first == 0)
        x->is_whole = q->preserve;
    l->turn.join = x->is_open ? DELTA_JOIN_OPEN : DELTA_JOIN_AUTO;
    if (r == 0 && l->method == DD_M_CHAT && n == 0) {
        dd_status_set(st, DD_INVALID_ARGUMENT, "FIELD_INVALID", "the session has no messages yet");
        (void)snprintf(st->field, sizeof st->field, "messages");
        r = -1;
    }
    return r;
}

static int add_answer(dd_live *l, const dd_note *note)
{
    dd_session *x = l->session;
    dd_event *calls = calloc(l->n_calls ? l->n_calls : 1, sizeof *calls);
    size_t n = 0, len = 0;
    if (!calls)
        return -1;
    for (size_t i = 0; i < l->n_calls; i++)
        if (l->calls[i].complete && l->calls[i].arguments) /* a cut call is no call */
            calls[n++] = (dd_event){ .id = l->calls[i].id,
                                     .name = l->calls[i].name ? l->calls[i].name : "",
                                     .text = { l->calls[i].arguments, l->calls[i].arguments_len } };
    uint8_t *msg =
        dd_answer_encode(l->req.thinking, (delta_str){ l->reasoning.p, l->reasoning.len },
                         (delta_str){ l->content.p, l->content.len }, calls, n, &len);
    free(calls);
    if (add_message(x, msg, len) < 0)
        return -1;
    /* A stop string was sampled and is not in the text: the parts must do. */
    if (l->sampled.p && note->finish != DELTA_FINISH_STOP_STRING) {
        x->sampled[x->n_messages - 1] = (dd_sampled){ .text = { l->sampled.p, l->sampled.len },
                                                      .ids = l->sampled_ids,
                                                      .n_ids = dd_live_n_sampled(l, note),
                                                      .thought = l->req.thinking };
        x->bytes += l->sampled.len + l->n_sampled * sizeof *l->sampled_ids;
        l->sampled = (de_text){ 0 };
        l->sampled_ids = NULL;
    }
    return 0;
}

/* The new messages, of the request, into the transcript. */
static int add_new(dd_live *l)
{
    size_t old = l->session->n_messages;
    for (size_t i = old; i < l->req.n_messages; i++) {
        dd_bytes b;
        if (copy(l->req.packed[i - old], &b) < 0 ||
            add_message(l->session, (uint8_t *)b.data, b.len) < 0)
            return -1;
    }
    return 0;
}

/* Where it is now. */
static int add_border(dd_session *x)
{
    if (x->n_borders == x->cap_borders) {
        const size_t cap = x->cap_borders ? x->cap_borders * 2 : 8;
        dd_border *more = realloc(x->borders, cap * sizeof *more);
        if (!more)
            return -1;
        x->borders = more;
        x->cap_borders = cap;
    }
    x->borders[x->n_borders++] = (dd_border){ .n_messages = (uint32_t)x->n_messages,
                                              .n_tokens = x->n_tokens,
                                              .needs_end = x->needs_end,
                                              .is_open = x->is_open };
    return 0;
}

bool dd_session_turn_counts(const dd_note *n)
{
    return n->finish != DELTA_FINISH_ERROR &&
           !(n->finish == DELTA_FINISH_CANCELLED && n->n_generated == 0);
}

void dd_session_end(dd_live *l, const dd_note *n)
{
    dd_session *x = l->session;
    x->busy = NULL;
    x->used_ns = de_now_ns();
    if (!n) { /* it never ran: nothing has changed */
        if (l->method == DD_M_CREATE)
            session_free(l->s, x);
        return;
    }
    if (l->method == DD_M_CREATE && (!dd_session_turn_counts(n) || !l->rpc)) {
        session_free(l->s, x); /* nobody knows its id */
        return;
    }
    if (!dd_session_turn_counts(n)) {    /* it did not happen */
        if (n->n_timeline < x->n_tokens) /* more is cut off by the next run */
            forget_timeline(x);
        return;
    }
    free(x->save_path); /* its state is here now */
    x->save_path = NULL;
    bool is_kept = add_new(l) == 0;
    if (l->method == DD_M_CHAT)
        is_kept = is_kept && add_answer(l, n) == 0;
    int64_t end = delta_tokenizer_added_id(dd_engine_tokenizer(l->s->engine), "<|im_end|>");
    x->n_rendered = x->n_messages;
    x->n_tokens = n->n_timeline;
    x->needs_end = l->method == DD_M_CHAT && (int64_t)n->last_token != end;
    x->is_open = l->turn.leaves_open;
    if (l->method != DD_M_CREATE)
        x->generation++;
    dd_keep_changed(l->s, x);
    if (!is_kept || add_border(x) < 0)
        forget_timeline(x); /* the transcript lost something for want of memory */
}

static dd_session_view view(const dd_session *x)
{
    uint64_t now = de_now_ns();
    return (dd_session_view){ .id = x->id,
                              .name = x->name,
                              .generation = x->generation,
                              .n_messages = (uint32_t)x->n_messages,
                              .n_tokens = x->n_tokens,
                              .ctx_tokens = x->ctx_tokens,
                              .owner_uid = x->owner.uid,
                              .busy = x->busy != NULL,
                              .parked = x->timeline && dd_timeline_is_parked(x->timeline),
                              .pinned = x->is_pinned,
                              .age_ns = now - x->created_ns,
                              .idle_ns = x->busy ? 0 : now - x->used_ns,
                              .idle_timeout_ns = x->idle_timeout_ns };
}

void dd_session_put(dd_wire_out *o, const dd_session *x)
{
    const dd_session_view v = view(x);
    size_t len = 0;
    uint8_t *p = dd_session_encode(&v, &len);
    if (p)
        dd_wire_put_bytes(o, 1, p, len);
    o->failed = o->failed || !p;
    free(p);
}

uint8_t *dd_session_answer(dd_live *l, size_t *ret_len)
{
    dd_wire_out o = { 0 };
    dd_session_put(&o, l->session);
    if (l->method == DD_M_APPEND) {
        size_t len = 0;
        uint8_t *p = dd_usage_encode(&l->usage, &len);
        if (p)
            dd_wire_put_bytes(&o, 2, p, len);
        o.failed = o.failed || !p;
        free(p);
    }
    return dd_wire_take(&o, ret_len);
}

static void get(dd_service *s, dd_rpc *r, const dd_request *q)
{
    dd_status st;
    dd_wire_out o = { 0 };
    size_t len = 0;
    const dd_session *x = dd_session_find(s, q->session_id, &r->peer, dd_peer_may_end, &st);
    if (!x) {
        dd_refuse(r, &st);
        return;
    }
    dd_session_put(&o, x);
    for (size_t i = 0; q->with_messages && i < x->n_messages; i++)
        dd_wire_put_bytes(&o, 2, x->messages[i].data, x->messages[i].len);
    for (size_t i = 0; q->with_messages && i < x->n_tools; i++)
        dd_wire_put_bytes(&o, 3, x->tools[i].data, x->tools[i].len);
    uint8_t *msg = dd_wire_take(&o, &len);
    dd_answer(r, msg, len);
}

static void close_session(dd_service *s, dd_rpc *r, const dd_request *q)
{
    dd_status st;
    dd_session *x = dd_session_find(s, q->session_id, &r->peer, dd_peer_may_end, &st);
    if (x && x->busy) {
        dd_status_set(&st, DD_ABORTED, "SESSION_BUSY", "a turn runs; cancel it first");
        st.retry_ms = DD_RETRY_MS;
        x = NULL;
    }
    if (!x) {
        dd_refuse(r, &st);
        return;
    }
    dd_keep_forget(s, x);
    session_free(s, x);
    dd_answer(r, calloc(1, 1), 0);
}

static void drop_message(dd_session *x)
{
    const size_t i = --x->n_messages;
    x->bytes -= x->messages[i].len + x->sampled[i].text.len +
                x->sampled[i].n_ids * sizeof *x->sampled[i].ids;
    free((void *)x->messages[i].data);
    free((void *)x->sampled[i].text.p);
    free((void *)x->sampled[i].ids);
}

/* Its first n messages stay, and of the timeline what ended with a turn among them; the next turn
 * renders what is missing, and finds most of it computed. */
static void shorten(dd_session *x, size_t n)
{
    while (x->n_messages > n)
        drop_message(x);
    while (x->n_borders && x->borders[x->n_borders - 1].n_messages > n)
        x->n_borders--;
    if (!x->n_borders) {
        forget_timeline(x);
        return;
    }
    const dd_border *b = &x->borders[x->n_borders - 1];
    x->n_rendered = b->n_messages;
    x->n_tokens = b->n_tokens;
    x->needs_end = b->needs_end;
    x->is_open = b->is_open;
}

static int check_keep(const dd_session *x, const dd_request *q, dd_status *st)
{
    if (q->keep_messages == UINT32_MAX || q->keep_messages <= x->n_messages)
        return 0;
    dd_status_set(st, DD_INVALID_ARGUMENT, "FIELD_INVALID", "%u: the session has %zu messages",
                  q->keep_messages, x->n_messages);
    (void)snprintf(st->field, sizeof st->field, "n_messages");
    return -1;
}

static void rewind_session(dd_service *s, dd_rpc *r, const dd_request *q)
{
    dd_status st;
    dd_wire_out o = { 0 };
    size_t len = 0;
    dd_session *x = dd_session_find(s, q->session_id, &r->peer, dd_peer_may_use, &st);
    if (!x || dd_session_check_idle(x, q, &st) < 0 || check_keep(x, q, &st) < 0) {
        dd_refuse(r, &st);
        return;
    }
    shorten(x, q->keep_messages);
    x->generation++;
    x->used_ns = de_now_ns();
    dd_keep_changed(s, x);
    dd_session_put(&o, x);
    uint8_t *msg = dd_wire_take(&o, &len);
    dd_answer(r, msg, len);
}

static void pin_session(dd_service *s, dd_rpc *r, const dd_request *q)
{
    dd_status st;
    dd_wire_out o = { 0 };
    size_t len = 0;
    const uint32_t most = s->o.config->limits.max_pinned_sessions;
    dd_session *x = dd_session_find(s, q->session_id, &r->peer, dd_peer_may_use, &st);
    if (x && !q->unpin && !x->is_pinned && s->n_pinned >= most) {
        dd_status_set(&st, DD_RESOURCE_EXHAUSTED, "PIN_LIMIT", "%u sessions are pinned of %u",
                      s->n_pinned, most);
        x = NULL;
    }
    if (!x) {
        dd_refuse(r, &st);
        return;
    }
    if (x->is_pinned == q->unpin) {
        x->is_pinned = !q->unpin;
        s->n_pinned += x->is_pinned ? 1 : UINT32_MAX;
        x->used_ns = de_now_ns(); /* its time to live begins anew */
        if (x->timeline)
            dd_timeline_pin(x->timeline, x->is_pinned);
        dd_keep_changed(s, x);
    }
    dd_session_put(&o, x);
    uint8_t *msg = dd_wire_take(&o, &len);
    dd_answer(r, msg, len);
    dd_live_timer(s);
}

dd_saved dd_session_saved(const dd_service *s, const dd_session *x)
{
    return (dd_saved){
        .model = dd_engine_info(s->engine)->model_name,
        .id = x->id,
        .name = x->name,
        .generation = x->generation,
        .idle_timeout_ns = x->idle_timeout_ns,
        .owner_is_unix = x->owner.is_unix,
        .owner_uid = x->owner.uid,
        .owner_address = { x->owner.address, sizeof x->owner.address },
        .thinking = x->thinking,
        .omit_reasoning = x->omit_reasoning,
        .preserve = x->preserve,
        .pinned = x->is_pinned,
        .ctx_tokens = x->ctx_wanted,
        .tools = x->tools,
        .n_tools = x->n_tools,
        .messages = x->messages,
        .n_messages = x->n_messages,
        .sampled = x->sampled,
    };
}

static void export_session(dd_service *s, dd_rpc *r, const dd_request *q)
{
    dd_status st;
    const dd_session *x = dd_session_find(s, q->session_id, &r->peer, dd_peer_may_end, &st);
    if (x)
        dd_export_begin(s, r, x, q->with_sampled);
    else
        dd_refuse(r, &st);
}

int dd_session_add(dd_session *x, dd_bytes message, const dd_sampled *from)
{
    dd_bytes b;
    if (copy(message, &b) < 0 || add_message(x, (uint8_t *)b.data, b.len) < 0)
        return -1;
    if (!from->text.p)
        return 0;
    const size_t bytes = from->n_ids * sizeof *from->ids;
    char *text = malloc(from->text.len + 1);
    uint32_t *ids = malloc(bytes + 1);
    x->sampled[x->n_messages - 1] = (dd_sampled){
        .text = { text, from->text.len }, .ids = ids, .n_ids = from->n_ids, .thought = from->thought
    };
    if (!text || !ids)
        return -1;
    memcpy(text, from->text.p, from->text.len);
    if (bytes)
        memcpy(ids, from->ids, bytes);
    x->bytes += from->text.len + bytes;
    return 0;
}

dd_session *dd_session_restore(dd_service *s, const dd_saved *saved, const dd_peer *owner)
{
    dd_status st;
    dd_session *x = add_session(s, saved->name, saved->tools, saved->n_tools, owner, &st);
    if (!x)
        return NULL;
    if (saved->id)
        (void)snprintf(x->id, sizeof x->id, "%s", saved->id);
    x->generation = saved->generation;
    x->idle_timeout_ns = saved->idle_timeout_ns;
    x->thinking = saved->thinking;
    x->omit_reasoning = saved->omit_reasoning;
    x->preserve = saved->preserve;
    x->ctx_wanted = saved->ctx_tokens;
    x->is_pinned = saved->pinned;
    s->n_pinned += x->is_pinned;
    return x;
}

void dd_session_drop(dd_service *s, dd_session *x)
{
    if (x)
        session_free(s, x);
}

static int copy_turns(const dd_session *x, dd_session *to)
{
    for (size_t i = 0; i < x->n_messages; i++)
        if (dd_session_add(to, x->messages[i], &x->sampled[i]) < 0)
            return -1;
    to->borders = calloc(x->n_borders + 1, sizeof *to->borders);
    if (!to->borders)
        return -1;
    if (x->n_borders)
        memcpy(to->borders, x->borders, x->n_borders * sizeof *to->borders);
    to->n_borders = x->n_borders;
    to->cap_borders = x->n_borders + 1;
    return 0;
}

static dd_session *fork_session(dd_service *s, const dd_session *x, const dd_request *q,
                                const dd_peer *peer, dd_status *st)
{
    dd_session *to = add_session(s, q->name[0] ? q->name : x->name, x->tools, x->n_tools, peer, st);
    if (!to)
        return NULL;
    to->generation = x->generation;
    to->idle_timeout_ns = x->idle_timeout_ns;
    to->thinking = x->thinking;
    to->omit_reasoning = x->omit_reasoning;
    to->preserve = x->preserve;
    to->ctx_wanted = x->ctx_wanted;
    to->is_whole = x->is_whole;
    bool bad = copy_turns(x, to) < 0;
    if (!bad && x->timeline) {
        to->timeline = dd_timeline_fork(x->timeline);
        bad = !to->timeline;
        to->n_rendered = x->n_rendered;
        to->n_tokens = x->n_tokens;
        to->needs_end = x->needs_end;
        to->is_open = x->is_open;
    }
    if (bad) {
        (void)out_of_memory(st);
        session_free(s, to);
        return NULL;
    }
    if (q->keep_messages != UINT32_MAX)
        shorten(to, q->keep_messages);
    return to;
}

static void fork_sessions(dd_service *s, dd_rpc *r, const dd_request *q)
{
    dd_status st;
    dd_wire_out o = { 0 };
    size_t len = 0;
    dd_session *x = dd_session_find(s, q->session_id, &r->peer, dd_peer_may_use, &st),
               *made[DD_FORKS];
    if (!x || dd_session_check_idle(x, q, &st) < 0 || check_keep(x, q, &st) < 0 ||
        dd_session_check_count(s, q->count, &st) < 0) {
        dd_refuse(r, &st);
        return;
    }
    for (uint32_t i = 0; i < q->count; i++) {
        made[i] = fork_session(s, x, q, &r->peer, &st);
        if (!made[i]) {
            while (i--)
                session_free(s, made[i]);
            dd_refuse(r, &st);
            return;
        }
    }
    for (uint32_t i = 0; i < q->count; i++) {
        dd_session_put(&o, made[i]);
        dd_keep_changed(s, made[i]);
    }
    x->used_ns = de_now_ns();
    uint8_t *msg = dd_wire_take(&o, &len);
    dd_answer(r, msg, len);
}

void dd_session_call(dd_service *s, dd_rpc *r, const uint8_t *msg, size_t len)
{
    dd_request q;
    dd_status st = { 0 };
    enum dd_method_id m = (enum dd_method_id)r->method->id;
    enum dd_request_kind kind = m == DD_M_GET           ? DD_REQ_GET
                                : m == DD_M_LIST        ? DD_REQ_LIST
                                : m == DD_M_FORK        ? DD_REQ_FORK
                                : m == DD_M_REWIND      ? DD_REQ_REWIND
                                : m == DD_M_PIN         ? DD_REQ_PIN
                                : m == DD_M_EXPORT      ? DD_REQ_EXPORT
                                : m == DD_M_SAVE        ? DD_REQ_SAVE
                                : m == DD_M_RESTORE     ? DD_REQ_RESTORE
                                : m == DD_M_SAVES       ? DD_REQ_SAVES
                                : m == DD_M_DELETE_SAVE ? DD_REQ_DELETE_SAVE
                                                        : DD_REQ_CLOSE;
    if (dd_request_decode(kind, msg, len, &q, &st) < 0) {
        dd_refuse(r, &st);
    } else if (m == DD_M_GET) {
        get(s, r, &q);
    } else if (m == DD_M_CLOSE) {
        close_session(s, r, &q);
    } else if (m == DD_M_FORK) {
        fork_sessions(s, r, &q);
    } else if (m == DD_M_REWIND) {
        rewind_session(s, r, &q);
    } else if (m == DD_M_PIN) {
        pin_session(s, r, &q);
    } else if (m == DD_M_EXPORT) {
        export_session(s, r, &q);
    } else if (m == DD_M_SAVE || m == DD_M_RESTORE || m == DD_M_SAVES || m == DD_M_DELETE_SAVE) {
        dd_saves_call(s, r, &q);
    } else if (q.all_users && !dd_peer_is_admin(&r->peer)) {
        dd_status_set(&st, DD_PERMISSION_DENIED, "NOT_ADMIN",
                      "all_users is for members of policy.admin_group");
        dd_refuse(r, &st);
    } else {
        dd_wire_out o = { 0 };
        size_t n = 0;
        for (const dd_session *x = s->sessions; x; x = x->next)
            if (q.all_users || dd_peer_is_same_client(&r->peer, &x->owner))
                dd_session_put(&o, x);
        uint8_t *answer = dd_wire_take(&o, &n);
        dd_answer(r, answer, n);
    }
    dd_request_done(&q);
}

void dd_sessions_timer(dd_service *s, uint64_t now, uint64_t *next)
{
    for (dd_session *x = s->sessions, *after; x; x = after) {
        after = x->next;
        if (!x->idle_timeout_ns || x->busy || x->is_pinned)
            continue;
        uint64_t at = dd_after_ns(x->used_ns, x->idle_timeout_ns);
        if (now >= at) {
            dd_keep_forget(s, x);
            session_free(s, x);
        } else if (!*next || at < *next)
            *next = at;
    }
}

void dd_sessions_free(dd_service *s)
{
    while (s->sessions)
        session_free(s, s->sessions);
}
