/* inference.c -- Chat and Generate from request to last event, and Cancel.
 *
 *   start    decode, admit, prepare the prompt (prepare.c), post a run to the engine thread, Accepted
 *   notes    tokens and text -> output parser -> events -> the request's queue
 *   pump     one event at a time to the transport; a full queue pauses the sequence
 *   end      Finished and OK; or, if it goes wrong after Accepted, Finished with the usage so far
 *            and a status; before Accepted the status alone; the client's leaving cancels */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/live.h"
#include "daemon/log.h"

static void drop_items(dd_live *l)
{
    for (dd_item *i = l->first, *next; i; i = next) {
        next = i->next;
        free(i->encoded);
        de_text_done(&i->text);
        free(i);
    }
    l->first = l->last = NULL;
    l->n_items = 0;
    l->item_bytes = 0;
}

void dd_live_done(dd_live *l)
{
    drop_items(l);
    for (size_t i = 0; i < l->n_calls; i++) {
        free(l->calls[i].name);
        free(l->calls[i].arguments);
    }
    free(l->calls);
    de_text_done(&l->reasoning);
    de_text_done(&l->content);
    de_text_done(&l->sampled);
    free(l->sampled_ids);
    delta_output_free(l->parser);
}

static void live_free(dd_live *l)
{
    dd_service *s = l->s;
    assert(!l->rpc && !l->is_running && !l->is_preparing);
    if (l->prev)
        l->prev->next = l->next;
    else
        s->live = l->next;
    if (l->next)
        l->next->prev = l->prev;
    s->n_live--;
    s->n_resting -= l->kept_until_ns != 0;
    dd_ahead_begin(l);
    dd_resume_done(l);
    dd_live_done(l);
    if (!l->session)
        dd_timeline_free(l->timeline);
    delta_grammar_free(l->grammar);
    free(l->ids);
    dd_request_done(&l->req);
    free(l);
}

static void finish(dd_live *l, const dd_status *st)
{
    dd_rpc *r = l->rpc;
    l->rpc = NULL;
    if (st->code != DD_OK && st->code != DD_CANCELLED)
        l->s->stats.failed++;
    dd_refuse(r, st);
}

void dd_live_fail(dd_live *l, const dd_status *st)
{
    drop_items(l);
    if (l->rpc)
        finish(l, st);
    if (l->is_preparing) {
        (void)uv_cancel((uv_req_t *)&l->work); /* if no worker has begun it */
        return;                                /* on_prepared() frees it */
    }
    if (l->is_running)
        dd_timeline_cancel(l->timeline);
    else
        live_free(l);
}

void dd_live_end(dd_live *l, const dd_status *st)
{
    const bool streams = l->method == DD_M_CHAT || l->method == DD_M_GENERATE;
    if (!(l->rpc || l->is_kept) || !streams || l->is_ending || !(l->is_running || l->is_ended)) {
        dd_live_fail(l, st);
        return;
    }
    l->is_ending = true;
    l->queue_until_ns = 0;
    if (l->is_running) {
        l->outcome = *st;
        dd_timeline_cancel(l->timeline); /* on_finished() tells the usage, and then *st */
    }
}

static void no_memory(dd_live *l)
{
    dd_status st;
    dd_status_set(&st, DD_RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", "no memory for the answer");
    dd_live_fail(l, &st);
}

/* ---- events to the reader */

/* The first event of the queue as bytes, which is kept if the request's are; NULL: no memory. */
static uint8_t *take_item(dd_live *l, size_t *ret_len)
{
    dd_item *i = l->first;
    uint8_t *msg = i->encoded;
    *ret_len = i->len;
    if (!msg) {
        const dd_event e = { .kind = i->kind,
                             .index = i->index,
                             .text = { i->text.p, i->text.len } };
        msg = dd_event_encode(l->method == DD_M_CHAT, i->seq, &e, ret_len);
    }
    if (!msg || (l->is_kept && dd_resume_keep(l, i->seq, msg, *ret_len) < 0)) {
        if (!i->encoded)
            free(msg);
        return NULL;
    }
    l->first = i->next;
    if (!l->first)
        l->last = NULL;
    l->n_items--;
    l->item_bytes -= i->encoded ? i->len : i->text.len;
    de_text_done(&i->text);
    free(i);
    return msg;
}

/* It has ended, and nobody reads it: it goes, or stays a while for Resume. */
static void rest(dd_live *l)
{
    dd_service *s = l->s;
    if (!l->is_kept || s->phase == DD_DRAINING) {
        live_free(l);
        return;
    }
    dd_ahead_begin(l);
    l->was_answered = false;
    l->kept_until_ns = dd_after_ns(de_now_ns(), s->o.config->limits.resume_limit_ns);
    dd_resume_make_room(s);
}

/* May free l. */
static void pump(dd_live *l)
{
    size_t len = 0;
    uint8_t *msg = NULL;
    if (!l->rpc && l->is_kept) {
        while (l->first) {
            msg = take_item(l, &len);
            free(msg);
            if (!msg) {
                no_memory(l);
                return;
            }
        }
        if (l->is_ended && !l->is_running && !l->kept_until_ns)
            rest(l);
        return;
    }
    if (!l->rpc || l->is_sending)
        return;
    if (l->replay || l->first) {
        msg = l->replay ? dd_resume_next(l, &len) : take_item(l, &len);
        if (!msg) {
            no_memory(l);
            return;
        }
        l->is_sending = true;
        l->rpc->vt->send(l->rpc, msg, len);
        if (l->is_paused && l->is_running && l->n_items <= DD_EVENTS_HELD / 2 &&
            l->item_bytes <= DD_EVENT_BYTES_HELD / 2) {
            l->is_paused = false;
            dd_timeline_pause(l->timeline, false);
        }
    }
    if (l->is_ended && !l->first && !l->replay) {
        finish(l, &l->outcome);
        if (!l->is_running)
            rest(l);
    }
}

/* Its reader goes, with *st, and it runs on. */
static void detach(dd_live *l, const dd_status *st)
{
    finish(l, st);
    l->is_sending = false;
    l->replay = NULL;
    l->detached_until_ns = dd_after_ns(de_now_ns(), l->s->o.config->limits.detach_limit_ns);
    if (l->is_paused && l->is_running)
        dd_timeline_pause(l->timeline, false);
    l->is_paused = false;
    pump(l);
}

void dd_live_attach(dd_live *l, dd_rpc *r)
{
    l->rpc = r;
    r->handler = l;
    l->is_sending = false;
    l->detached_until_ns = l->kept_until_ns = 0;
    dd_resume_make_room(l->s); /* counts */
    pump(l);
}

/* 0, or -1 when memory ran out. */
static int push_event(dd_live *l, const dd_event *e)
{
    bool is_text =
        e->kind == DD_EVENT_REASONING || e->kind == DD_EVENT_TEXT || e->kind == DD_EVENT_CALL_ARGS;
    if (!l->rpc && !l->is_kept)
        return 0; /* nobody listens */
    if (is_text && l->last && !l->last->encoded && l->last->kind == e->kind &&
        l->last->index == e->index) {
        de_text_add(&l->last->text, e->text.p, e->text.len);
        l->item_bytes += e->text.len;
        return l->last->text.failed ? -1 : 0;
    }
    dd_item *i = calloc(1, sizeof *i);
    if (!i)
        return -1;
    i->kind = e->kind;
    i->index = e->index;
    i->seq = l->seq + 1;
    if (is_text) {
        de_text_add(&i->text, e->text.p, e->text.len);
        i->len = i->text.len;
    } else {
        i->encoded = dd_event_encode(l->method == DD_M_CHAT, i->seq, e, &i->len);
    }
    if (is_text ? i->text.failed : !i->encoded) {
        de_text_done(&i->text);
        free(i);
        return -1;
    }
    l->seq++;
    if (l->last)
        l->last->next = i;
    else
        l->first = i;
    l->last = i;
    l->n_items++;
    l->item_bytes += i->len;
    return 0;
}

/* May free l. */
static void flow(dd_live *l)
{
    if (!l->is_paused && l->is_running && l->rpc &&
        (l->n_items >= DD_EVENTS_HELD || l->item_bytes >= DD_EVENT_BYTES_HELD)) {
        l->is_paused = true;
        dd_timeline_pause(l->timeline, true);
    }
    pump(l);
}

void dd_live_sent(dd_live *l)
{
    dd_service *s = l->s;
    const uint32_t resting = s->n_resting;
    l->is_sending = false;
    pump(l);
    if (s->n_resting != resting)
        dd_live_timer(s);
}

void dd_live_closed(dd_live *l)
{
    dd_status st;
    dd_status_set(&st, DD_CANCELLED, "CANCELLED", "the call was closed");
    if (l->is_kept && l->s->phase != DD_DRAINING &&
        (l->is_running || l->is_preparing || l->is_ended)) {
        dd_service *s = l->s;
        detach(l, &st);
        dd_live_timer(s);
        return;
    }
    l->s->stats.cancelled++;
    dd_live_fail(l, &st);
}

void dd_live_cancel(dd_live *l, enum dd_end why)
{
    if (!(l->is_running || l->is_preparing) || l->end)
        return;
    l->end = why;
    if (why == DD_END_CANCEL)
        l->s->stats.cancelled++;
    if (l->is_running)
        dd_timeline_cancel(l->timeline); /* else launch() does */
}

/* ---- the start */

static void context_length(dd_status *st, size_t n, uint32_t max)
{
    dd_status_set(st, DD_INVALID_ARGUMENT, "CONTEXT_LENGTH",
                  "%zu tokens of prompt leave no room: a sequence has at most %u", n, max);
    (void)snprintf(st->field, sizeof st->field, "messages");
    st->meta[0].key = "prompt_tokens";
    (void)snprintf(st->meta[0].value, sizeof st->meta[0].value, "%zu", n);
    st->meta[1].key = "max_context_tokens";
    (void)snprintf(st->meta[1].value, sizeof st->meta[1].value, "%u", max);
    st->n_meta = 2;
}

static uint32_t count_requests(const dd_service *s, const dd_peer *p,
                               bool (*is_same)(const dd_peer *a, const dd_peer *b))
{
    uint32_t n = dd_texts_of(s, p, is_same);
    for (const dd_live *l = s->live; l; l = l->next)
        n += (l->rpc || (l->is_kept && !l->is_ended)) && is_same(&l->peer, p);
    return n;
}

int dd_user_limit(dd_service *s, const dd_rpc *r, dd_status *st)
{
    const dd_config *c = s->o.config;
    const dd_peer *p = &r->peer;
    uint32_t n = count_requests(s, p, dd_peer_is_same_user);
    const char *who = p->is_unix ? "user" : "address";
    bool is_over = n >= c->limits.max_requests_per_uid;
    if (!is_over && !p->is_unix) {
        n = count_requests(s, p, dd_peer_is_same_client);
        who = "connection";
        is_over = n >= c->limits.max_requests_per_connection;
    }
    if (!is_over)
        return 0;
    dd_status_set(st, DD_RESOURCE_EXHAUSTED, "USER_LIMIT",
                  "this %s has %u requests already, the most there may be", who, n);
    st->retry_ms = DD_RETRY_MS;
    return -1;
}

static int admit(dd_service *s, const dd_rpc *r, dd_status *st)
{
    const dd_config *c = s->o.config;
    if (dd_user_limit(s, r, st) < 0)
        return -1;
    if (s->n_live - s->n_resting >= c->limits.max_queue + dd_engine_info(s->engine)->max_sessions ||
        (s->n_waiting && s->n_waiting >= c->limits.max_queue))
        dd_status_set(st, DD_RESOURCE_EXHAUSTED, "QUEUE_FULL", "%u requests are waiting",
                      s->n_waiting);
    else
        return 0;
    st->retry_ms = DD_RETRY_MS;
    return -1;
}

static int take_request_id(dd_live *l, const char *wanted, dd_status *st)
{
    if (!wanted[0])
        wanted = l->rpc->request_id;
    if (wanted[0]) {
        (void)snprintf(l->request_id, sizeof l->request_id, "%s", wanted);
    } else {
        l->has_own_id = true;
        memcpy(l->request_id, "req_", 4);
        if (dd_random_text(l->request_id + 4, 24) < 0) {
            dd_status_set(st, DD_INTERNAL, "INTERNAL", "no random numbers");
            return -1;
        }
    }
    for (const dd_live *o = l->s->live; o; o = o->next)
        if (o != l && dd_peer_is_same_client(&o->peer, &l->peer) &&
            strcmp(o->request_id, l->request_id) == 0) {
            dd_status_set(st, DD_ALREADY_EXISTS, "REQUEST_ID_IN_USE",
                          "a request of this id is running");
            (void)snprintf(st->field, sizeof st->field, "request_id");
            return -1;
        }
    return 0;
}

/* Room, sampling and Accepted; then the run. */
static int launch(dd_live *l, dd_status *st)
{
    dd_service *s = l->s;
    dd_request *q = &l->req;
    const delta_engine_info *info = dd_engine_info(s->engine);
    delta_engine_stats stats;
    dd_engine_stats(s->engine, &stats);
    uint64_t pool = stats.pages_total * info->page_tokens;
    uint32_t max = pool && pool < info->ctx_max ? (uint32_t)pool : info->ctx_max;
    bool generates = l->method == DD_M_CHAT || l->method == DD_M_GENERATE;
    size_t before = l->session && l->session->timeline ? l->session->n_tokens : 0;
    if (l->n_ids + before + (generates ? 1 : 0) > max) {
        context_length(st, l->n_ids + before, max);
        return -1;
    }
    uint32_t n = (uint32_t)(l->n_ids + before), room = max - n;
    l->usage.prompt = n;
    if (generates) {
        uint32_t wanted = q->stopping.max_tokens ? q->stopping.max_tokens
                                                 : s->o.config->limits.default_max_tokens;
        q->stopping.max_tokens = wanted && wanted < room ? wanted : room;
        if (q->stopping.min_tokens > q->stopping.max_tokens)
            q->stopping.min_tokens = q->stopping.max_tokens;
        if (dd_request_sampling(q, info, st) < 0)
            return -1;
        l->in_reasoning = l->method == DD_M_CHAT && q->thinking;
        l->guide = (delta_guide){ .thinking = l->in_reasoning,
                                  .has_budget = q->has_budget,
                                  .budget_tokens = q->budget_tokens,
                                  .grammar = l->grammar };
        l->think_end = delta_tokenizer_added_id(dd_engine_tokenizer(s->engine), "</think>");
    }
    const uint64_t owner = dd_reuse_owner(l);
    uint32_t reserve = 0, ctx = n + (generates ? q->stopping.max_tokens : 0);
    if (l->session) {
        reserve = l->session->ctx_wanted < max ? l->session->ctx_wanted : max;
        ctx = ctx < reserve ? reserve : ctx;
        ctx = ctx > max ? max : ctx;
        if (!l->session->timeline) {
            l->session->timeline = dd_timeline_new(s->engine, owner, true);
            if (l->session->timeline && l->session->is_pinned)
                dd_timeline_pin(l->session->timeline, true);
        }
        l->timeline = l->session->timeline;
        l->session->ctx_tokens = ctx > l->session->ctx_tokens ? ctx : l->session->ctx_tokens;
    } else {
        l->timeline = dd_timeline_new(s->engine, owner, false);
    }
    const dd_event accepted = { .kind = DD_EVENT_ACCEPTED,
                                .request_id = l->request_id,
                                .session_id = l->session ? l->session->id : "",
                                .generation = l->session ? l->session->generation : 0,
                                .sampling = &q->sampling,
                                .max_tokens = q->stopping.max_tokens,
                                .thinking = l->method == DD_M_CHAT && q->thinking,
                                .usage = { .prompt = n } };
    if (!l->timeline || (generates && push_event(l, &accepted) < 0)) {
        dd_status_set(st, DD_RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", "no memory for the request");
        return -1;
    }
    const dd_run run = { .id = l->run,
                         .ids = l->ids,
                         .n_before = (uint32_t)before,
                         .n_ids = l->n_ids,
                         .marks = l->marks,
                         .n_marks = l->n_marks,
                         .ctx_tokens = ctx ? ctx : 1,
                         .reserve_tokens = reserve,
                         .generate = generates,
                         .priority = q->priority,
                         .user = dd_peer_key(&l->peer),
                         .sampling = &q->sampling,
                         .stopping = &q->stopping,
                         .guide = &l->guide,
                         .save_path = l->session ? l->session->save_path : NULL,
                         .save_at = l->session ? l->session->save_at : 0 };
    l->is_running = true;
    s->stats.prompt_tokens += l->n_ids;
    dd_timeline_run(l->timeline, &run);
    if (l->end)
        dd_timeline_cancel(l->timeline);
    return 0;
}

/* Nothing to compute and nothing to reserve: no need of the engine yet. */
static bool is_empty_session(const dd_live *l)
{
    return l->method == DD_M_CREATE && l->n_ids == 0 && !l->req.ctx_tokens;
}

/* The prompt is there, or *st says why not. May free l. */
static void proceed(dd_live *l, int prepared, dd_status *st)
{
    dd_service *s = l->s;
    if (prepared < 0 || (!is_empty_session(l) && launch(l, st) < 0)) {
        if (l->session)
            dd_session_end(l, NULL);
        dd_live_fail(l, st);
        dd_live_timer(s); /* the session rests again */
        return;
    }
    if (is_empty_session(l)) {
        dd_rpc *r = l->rpc;
        size_t n = 0;
        l->session->busy = NULL;
        dd_keep_changed(s, l->session);
        uint8_t *answer = dd_session_answer(l, &n);
        l->rpc = NULL;
        dd_answer(r, answer, n);
        live_free(l);
        dd_live_timer(s);
        return;
    }
    dd_live_timer(s);
    pump(l);
}

static void on_prepare(uv_work_t *w)
{
    dd_live *l = w->data;
    l->prepare_result = dd_prepare(l, &l->prepared);
}

static void on_prepared(uv_work_t *w, int status)
{
    dd_live *l = w->data;
    dd_service *s = l->s;
    (void)status; /* UV_ECANCELED: nobody waits for it */
    l->is_preparing = false;
    if (l->rpc || l->is_kept) {
        proceed(l, l->prepare_result, &l->prepared);
        return;
    }
    if (l->session) /* the client has gone */
        dd_session_end(l, NULL);
    live_free(l);
    dd_live_timer(s); /* the session rests again */
}

void dd_live_start(dd_service *s, dd_rpc *r, enum dd_method_id m, const uint8_t *msg, size_t len)
{
    dd_status st = { 0 };
    dd_live *l;
    if (admit(s, r, &st) < 0) {
        s->stats.failed++;
        dd_refuse(r, &st);
        return;
    }
    l = calloc(1, sizeof *l);
    if (!l) {
        dd_status_set(&st, DD_RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", "no memory for the request");
        dd_refuse(r, &st);
        return;
    }
    l->s = s;
    l->rpc = r;
    l->method = m;
    l->peer = r->peer;
    l->run = ++s->next_run;
    l->arrived_ns = r->arrived_ns ? r->arrived_ns : de_now_ns();
    l->next = s->live;
    if (s->live)
        s->live->prev = l;
    s->live = l;
    s->n_live++;
    s->stats.requests_total++;
    r->handler = l;
    enum dd_request_kind kind = m == DD_M_CHAT       ? DD_REQ_CHAT
                                : m == DD_M_GENERATE ? DD_REQ_GENERATE
                                : m == DD_M_CREATE   ? DD_REQ_CREATE
                                                     : DD_REQ_APPEND;
    const int decoded = dd_request_decode(kind, msg, len, &l->req, &st);
    if (decoded == 0 && dd_resume_known(l, msg, len, &st)) {
        l->is_kept = false;
        if (st.code == DD_OK)
            live_free(l);
        else
            dd_live_fail(l, &st);
        dd_live_timer(s);
        return;
    }
    if (decoded < 0 || take_request_id(l, l->req.request_id, &st) < 0 ||
        dd_prepare_begin(l, &st) < 0) {
        proceed(l, -1, &st);
        return;
    }
    if (l->req.max_queue_ns)
        l->queue_until_ns = dd_after_ns(l->arrived_ns, l->req.max_queue_ns);
    if (l->req.max_wall_ns)
        l->wall_until_ns = dd_after_ns(l->arrived_ns, l->req.max_wall_ns);
    l->work.data = l;
    if ((dd_request_text_bytes(&l->req) >= DD_INLINE_BYTES || dd_request_is_constrained(&l->req)) &&
        uv_queue_work(s->o.loop, &l->work, on_prepare, on_prepared) == 0) {
        l->is_preparing = true;
        dd_live_timer(s);
        return;
    }
    const int prepared = dd_prepare(l, &st);
    proceed(l, prepared, &st);
}

/* ---- what the engine says */

static dd_call *call_of(dd_live *l, const delta_out_event *e)
{
    while (l->n_calls <= e->call) {
        if (l->n_calls == l->cap_calls) {
            size_t cap = l->cap_calls ? l->cap_calls * 2 : 4;
            dd_call *more = realloc(l->calls, cap * sizeof *more);
            if (!more)
                return NULL;
            l->calls = more;
            l->cap_calls = cap;
        }
        dd_call *c = &l->calls[l->n_calls];
        memset(c, 0, sizeof *c);
        memcpy(c->id, "call_", 5);
        if (dd_random_text(c->id + 5, 24) < 0)
            return NULL;
        l->n_calls++;
    }
    return &l->calls[e->call];
}

/* One event of the parser; 0 or -1 (no memory). */
static int on_output(dd_live *l, const delta_out_event *o)
{
    dd_event e = { .text = o->text, .index = o->call, .complete = o->complete };
    dd_call *c = NULL;
    if (o->kind >= DELTA_OUT_CALL_START && !(c = call_of(l, o)))
        return -1;
    switch (o->kind) {
    case DELTA_OUT_REASONING:
        de_text_add(&l->reasoning, o->text.p, l->session ? o->text.len : 0);
        if (l->req.omit_reasoning)
            return l->reasoning.failed ? -1 : 0;
        e.kind = DD_EVENT_REASONING;
        break;
    case DELTA_OUT_CONTENT:
        de_text_add(&l->content, o->text.p, l->session || !l->is_long ? o->text.len : 0);
        e.kind = DD_EVENT_TEXT;
        break;
    case DELTA_OUT_CALL_START:
        free(c->name);
        c->name = strndup(o->text.p ? o->text.p : "", o->text.len);
        if (!c->name)
            return -1;
        e.kind = DD_EVENT_CALL_START;
        break;
    case DELTA_OUT_CALL_ARGS:
        e.kind = DD_EVENT_CALL_ARGS;
        break;
    case DELTA_OUT_CALL_END:
        c->complete = o->complete;
        if (l->session && o->complete) {
            free(c->arguments);
            c->arguments = strndup(o->text.p ? o->text.p : "", o->text.len);
            c->arguments_len = o->text.len;
            if (!c->arguments)
                return -1;
        }
        e.kind = DD_EVENT_CALL_END;
        break;
    }
    if (c) {
        e.id = c->id;
        e.name = c->name ? c->name : "";
    }
    if (l->reasoning.failed || l->content.failed)
        return -1;
    return push_event(l, &e);
}

int dd_live_outputs(dd_live *l, const delta_out_event *o, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (on_output(l, &o[i]) < 0)
            return -1;
    return 0;
}

static void forget_sampled(dd_live *l)
{
    l->is_long = true;
    de_text_done(&l->sampled);
    free(l->sampled_ids);
    l->sampled_ids = NULL;
    l->n_sampled = 0;
}

/* Keeps the answer's text as it is sampled. */
static void keep_sampled(dd_live *l, const char *text, size_t len)
{
    if (l->is_long)
        return;
    l->is_long = l->sampled.len + len > DD_RECALL_TURN_BYTES;
    if (!l->is_long)
        de_text_add(&l->sampled, text, len);
    if (l->is_long || l->sampled.failed)
        forget_sampled(l);
}

/* And its tokens. */
static void keep_token(dd_live *l, uint32_t id)
{
    if (l->is_long)
        return;
    if (l->n_sampled == l->cap_sampled) {
        const size_t cap = l->cap_sampled ? l->cap_sampled * 2 : 64;
        uint32_t *more = realloc(l->sampled_ids, cap * sizeof *more);
        if (!more) {
            forget_sampled(l);
            return;
        }
        l->sampled_ids = more;
        l->cap_sampled = cap;
    }
    l->sampled_ids[l->n_sampled++] = id;
}

/* Those that are the text's: the id that ended the turn is not. */
size_t dd_live_n_sampled(const dd_live *l, const dd_note *n)
{
    return l->n_sampled && n->finish == DELTA_FINISH_STOP_ID ? l->n_sampled - 1 : l->n_sampled;
}

/* The turn is over: its calls' ids stand for it from now on, or its content. */
static void remember(dd_live *l, const dd_note *n)
{
    char content[DD_CONTENT_NAME];
    const size_t n_names = l->n_calls ? l->n_calls : 1;
    bool is_whole = n->finish == DELTA_FINISH_STOP_ID && !l->is_long && l->sampled.p &&
                    n_names <= DD_RECALL_CALLS;
    delta_str names[DD_RECALL_CALLS];
    for (size_t i = 0; is_whole && i < l->n_calls; i++) {
        is_whole = l->calls[i].complete;
        names[i] = (delta_str){ l->calls[i].id, strlen(l->calls[i].id) };
    }
    if (!is_whole)
        return;
    if (l->n_calls == 0) {
        dd_content_name((delta_str){ l->content.p ? l->content.p : "", l->content.len }, content);
        names[0] = (delta_str){ content, strlen(content) };
    }
    dd_recall_put(l->s->recall, l->peer.uid, names, n_names,
                  &(dd_sampled){ .text = { l->sampled.p, l->sampled.len },
                                 .ids = l->sampled_ids,
                                 .n_ids = dd_live_n_sampled(l, n),
                                 .thought = l->req.thinking });
}

static int on_text(dd_live *l, const dd_note *n)
{
    const delta_out_event *o;
    size_t n_o;
    if (l->method == DD_M_GENERATE)
        return push_event(l, &(dd_event){ .kind = DD_EVENT_TEXT, .text = { n->text, n->len } });
    keep_sampled(l, n->text, n->len);
    if (delta_output_push(l->parser, n->text, n->len, n->added_id >= 0, &o, &n_o, NULL) < 0)
        return -1;
    return dd_live_outputs(l, o, n_o);
}

static int on_token(dd_live *l, const dd_note *n)
{
    l->usage.completion++;
    if (l->method == DD_M_CHAT)
        keep_token(l, n->id);
    l->s->stats.completion_tokens++;
    if (!l->first_token_ns)
        l->first_token_ns = de_now_ns();
    if (l->in_reasoning) {
        l->usage.reasoning++;
        l->in_reasoning = n->id != l->think_end;
    }
    if (!l->req.include_tokens)
        return 0;
    return push_event(l, &(dd_event){ .kind = DD_EVENT_TOKEN,
                                      .token = n->id,
                                      .logprob = n->logprob,
                                      .top = n->top,
                                      .n_top = n->n_top,
                                      .tokenizer = dd_engine_tokenizer(l->s->engine) });
}

static void error_status(dd_status *st, int code, const char *text)
{
    switch ((enum delta_code)code) {
    case DELTA_EDEVICE:
        dd_status_set(st, DD_UNAVAILABLE, "DEVICE_FAULT", "%s", text);
        st->retry_ms = DD_RETRY_MS;
        return;
    case DELTA_EINVALID:
    case DELTA_EUNSUPPORTED:
        dd_status_set(st, DD_INVALID_ARGUMENT, "FIELD_INVALID", "%s", text);
        return;
    case DELTA_ENOMEM:
    case DELTA_EBUSY:
    case DELTA_ELIMIT:
        dd_status_set(st, DD_RESOURCE_EXHAUSTED, "NO_ROOM", "%s", text);
        return;
    case DELTA_ECANCELLED:
        dd_status_set(st, DD_CANCELLED, "CANCELLED", "%s", text);
        return;
    case DELTA_OK:
    case DELTA_EFORMAT:
    case DELTA_EIO:
    case DELTA_ENOTFOUND:
    case DELTA_ESTATE:
    case DELTA_EINTERNAL:
        break;
    }
    dd_status_set(st, DD_INTERNAL, "INTERNAL", "%s", text);
}

/* Finished, with everything that is known; -1: no memory. */
static int push_finished(dd_live *l, const dd_note *n)
{
    uint64_t now = de_now_ns();
    dd_event e = { .kind = DD_EVENT_FINISHED,
                   .sampling = &l->req.sampling,
                   .usage = l->usage,
                   .generation = l->session ? l->session->generation : 0,
                   .queue_ns = (l->started_ns ? l->started_ns : now) - l->arrived_ns,
                   .prefill_ns = n->prefill_ns,
                   .decode_ns = n->decode_ns,
                   .first_token_ns = l->first_token_ns ? l->first_token_ns - l->arrived_ns : 0,
                   .total_ns = now - l->arrived_ns };
    char stop[DELTA_MAX_STOP_BYTES + 1];
    enum delta_out_finish out = DELTA_OUT_STOP;
    bool cut = n->finish != DELTA_FINISH_STOP_ID && n->finish != DELTA_FINISH_STOP_STRING;
    if (l->parser) {
        const delta_out_event *o;
        size_t n_o;
        if (delta_output_finish(l->parser, cut ? DELTA_OUT_END_LENGTH : DELTA_OUT_END_STOP, &o,
                                &n_o, &out, NULL) < 0 ||
            dd_live_outputs(l, o, n_o) < 0)
            return -1;
        for (int i = 0; i < DELTA_REPAIR_N; i++)
            l->s->stats.repairs[i] += delta_output_repairs(l->parser, (enum delta_repair)i);
    }
    switch (n->finish) {
    case DELTA_FINISH_STOP_ID:
        e.has_stop_token = true;
        e.stop_token = n->stop;
        e.reason = out == DELTA_OUT_TOOL_CALLS ? DD_FINISH_TOOL_CALLS : DD_FINISH_STOP;
        break;
    case DELTA_FINISH_STOP_STRING:
        if (n->stop < l->req.stopping.n_strings) {
            const delta_stop_string *x = &l->req.stopping.strings[n->stop];
            memcpy(stop, x->bytes, x->len);
            stop[x->len] = '\0';
            e.matched_stop = stop;
        }
        e.reason = out == DELTA_OUT_TOOL_CALLS ? DD_FINISH_TOOL_CALLS : DD_FINISH_STOP;
        break;
    case DELTA_FINISH_LENGTH:
        e.reason = DD_FINISH_LENGTH;
        break;
    case DELTA_FINISH_CANCELLED:
    case DELTA_FINISH_ERROR:
        e.reason = l->outcome.code != DD_OK ? DD_FINISH_ERROR
                   : l->end == DD_END_TIME  ? DD_FINISH_TIME
                                            : DD_FINISH_CANCELLED;
        break;
    }
    if (l->session && dd_session_turn_counts(n))
        e.generation = l->session->generation + 1; /* dd_session_end() does that */
    return push_event(l, &e);
}

/* May free l. */
static void on_finished(dd_live *l, const dd_note *n)
{
    dd_status st;
    bool failed = n->finish == DELTA_FINISH_ERROR;
    bool generates = l->method == DD_M_CHAT || l->method == DD_M_GENERATE;
    int r = 0;
    l->is_running = false;
    if (l->is_waiting)
        l->s->n_waiting--;
    l->is_waiting = false;
    l->usage.cached = n->n_cached < l->usage.prompt ? n->n_cached : l->usage.prompt;
    if (l->is_started)
        dd_reuse_note(l, l->usage.cached, n->n_shared, l->usage.note, sizeof l->usage.note);
    if (failed)
        error_status(&l->outcome, n->error, n->text ? n->text : "");
    else if (n->finish != DELTA_FINISH_CANCELLED)
        l->outcome = (dd_status){ .code = DD_OK }; /* it was complete before it could be ended */
    if (generates)
        r = push_finished(l, n);
    l->was_answered = l->method == DD_M_CHAT && n->finish == DELTA_FINISH_STOP_ID;
    if (!failed && l->method == DD_M_CHAT)
        remember(l, n);
    if (l->session)
        dd_session_end(l, n);
    if (!l->rpc && !l->is_kept) {
        live_free(l);
        return;
    }
    if (r < 0) {
        no_memory(l);
        return;
    }
    if (!generates) {
        dd_rpc *rpc = l->rpc;
        if (failed) {
            dd_live_fail(l, &l->outcome);
            return;
        }
        if (n->finish == DELTA_FINISH_CANCELLED) {
            dd_status_set(&st, DD_CANCELLED, "CANCELLED", "the request was cancelled");
            dd_live_fail(l, &st);
            return;
        }
        size_t len = 0;
        uint8_t *msg = dd_session_answer(l, &len);
        l->rpc = NULL;
        dd_answer(rpc, msg, len);
        live_free(l);
        return;
    }
    l->is_ended = true;
    pump(l);
}

void dd_live_note(dd_service *s, const dd_note *n)
{
    dd_live *l = s->live;
    int r = 0;
    while (l && l->run != n->run)
        l = l->next;
    if (!l && dd_ahead_note(s, n))
        return;
    if (!l || !l->is_running)
        return;
    switch (n->kind) {
    case DD_NOTE_QUEUED:
        s->n_waiting += !l->is_waiting;
        l->is_waiting = true;
        if (l->is_started)
            break; /* it was preempted */
        if (s->n_waiting > s->o.config->limits.max_queue) {
            dd_status st;
            dd_status_set(&st, DD_RESOURCE_EXHAUSTED, "QUEUE_FULL", "%u requests are waiting",
                          s->n_waiting - 1);
            st.retry_ms = DD_RETRY_MS;
            dd_live_end(l, &st);
            return;
        }
        /* The engine thread says so at every failed try: told again only if it is news, so that a
         * reader who takes nothing holds no more than max_queue of them. */
        if (l->req.include_queued && (!l->was_told_queued || n->n < l->queue_position)) {
            l->was_told_queued = true;
            l->queue_position = n->n;
            r = push_event(l, &(dd_event){ .kind = DD_EVENT_QUEUED, .done = n->n });
        }
        break;
    case DD_NOTE_STARTED:
        if (l->is_waiting)
            s->n_waiting--;
        l->is_waiting = false;
        if (!l->is_started)
            l->started_ns = de_now_ns();
        l->is_started = true;
        break;
    case DD_NOTE_PREFILL:
        if (l->req.include_prefill)
            r = push_event(l, &(dd_event){ .kind = DD_EVENT_PREFILL,
                                           .done = n->done,
                                           .total = n->total,
                                           .cached = n->cached });
        break;
    case DD_NOTE_TOKEN:
        r = on_token(l, n);
        break;
    case DD_NOTE_TEXT:
        r = on_text(l, n);
        break;
    case DD_NOTE_FINISHED:
        on_finished(l, n);
        /* Last: it may free the session, which is idle now, and any request, l too. */
        dd_live_timer(s);
        return;
    case DD_NOTE_LOAD:
    case DD_NOTE_READY:
    case DD_NOTE_FATAL:
    case DD_NOTE_LOG:
    case DD_NOTE_SAVED:
        return;
    }
    if (r < 0)
        no_memory(l);
    else
        flow(l);
}

/* ---- time */

static void on_timer(uv_timer_t *t)
{
    dd_live_timer(t->data);
}

static void earliest(uint64_t *next, uint64_t t)
{
    if (t && (!*next || t < *next))
        *next = t;
}

/* Ends what is over its time and sleeps until the next. */
void dd_live_timer(dd_service *s)
{
    uint64_t now = de_now_ns(), next = 0;
    for (dd_live *l = s->live, *after; l; l = after) {
        dd_status st;
        after = l->next;
        if (l->kept_until_ns && now >= l->kept_until_ns) {
            live_free(l);
            continue;
        }
        if (l->rpc && l->rpc->deadline_ns && now >= l->rpc->deadline_ns) {
            dd_status_set(&st, DD_DEADLINE_EXCEEDED, "DEADLINE", "the call's deadline has passed");
            if (l->is_kept && (l->is_running || l->is_preparing || l->is_ended))
                detach(l, &st);
            else
                dd_live_fail(l, &st);
            continue;
        }
        if (l->is_kept && !l->rpc && !l->is_ended && now >= l->detached_until_ns) {
            l->detached_until_ns = UINT64_MAX;
            dd_live_cancel(l, DD_END_CANCEL);
        }
        if ((l->rpc || l->is_kept) && l->queue_until_ns && !l->is_started &&
            now >= l->queue_until_ns) {
            dd_status_set(&st, DD_RESOURCE_EXHAUSTED, "QUEUE_TIME",
                          "the request was not started within max_queue_ns");
            st.retry_ms = DD_RETRY_MS;
            dd_live_end(l, &st);
            continue;
        }
        if (l->wall_until_ns && now >= l->wall_until_ns) {
            l->wall_until_ns = 0;
            dd_live_cancel(l, DD_END_TIME);
        }
        if (l->rpc) {
            earliest(&next, l->rpc->deadline_ns);
            earliest(&next, l->is_started ? 0 : l->queue_until_ns);
        } else if (l->is_kept) {
            earliest(&next, l->kept_until_ns ? l->kept_until_ns : l->detached_until_ns);
        }
        earliest(&next, l->wall_until_ns);
    }
    dd_sessions_timer(s, now, &next);
    if (next)
        (void)uv_timer_start(&s->timer, on_timer, next > now ? (next - now) / 1000000 + 1 : 1, 0);
    else
        (void)uv_timer_stop(&s->timer);
}

/* ---- Cancel */

/* A name that a client of TCP chose may be guessed by others there. */
static bool may_cancel(const dd_peer *p, const dd_live *l)
{
    return dd_peer_is_same_client(p, &l->peer) ||
           ((p->is_unix || l->has_own_id) && dd_peer_may_end(p, &l->peer));
}

void dd_live_cancel_call(dd_service *s, dd_rpc *r, const uint8_t *msg, size_t len)
{
    dd_request q;
    dd_status st = { 0 };
    dd_live *l = NULL;
    if (dd_request_decode(DD_REQ_CANCEL, msg, len, &q, &st) == 0) {
        for (l = s->live; l; l = l->next)
            if ((l->rpc || (l->is_kept && !l->is_ended)) && may_cancel(&r->peer, l) &&
                strcmp(l->request_id, q.request_id) == 0)
                break;
        if (!l) {
            dd_status_set(&st, DD_NOT_FOUND, "REQUEST_UNKNOWN", "no request of this id is running");
            st.missing = "deltad.v1.Request";
            (void)snprintf(st.missing_name, sizeof st.missing_name, "%s", q.request_id);
        }
    }
    if (l) {
        dd_live_cancel(l, DD_END_CANCEL);
        dd_answer(r, calloc(1, 1), 0);
    } else {
        dd_refuse(r, &st);
    }
    dd_request_done(&q);
}
