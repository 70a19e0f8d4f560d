/* texts.c -- RenderPrompt, ParseOutput, Tokenize, Detokenize: one answer, from the request's text
 * and the tokenizer alone.
 *
 * Each is a pure function from request to answer, so that a long one runs on a worker thread
 * while the loop serves others. A client that goes meanwhile leaves a job that nobody waits for:
 * it is dropped if no worker has begun it, else a drain waits for it.
 *
 * Limits     DD_JOBS_HELD at once; they count among limits.max_requests_per_uid. Short texts are
 *            answered at once and count nowhere. */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/live.h"

struct dd_job {
    uv_work_t work;
    dd_job *prev, *next; /* of those on workers */
    dd_service *s;
    dd_rpc *rpc; /* NULL: gone */
    dd_peer peer;
    enum dd_method_id method;
    dd_request req;
    uint8_t *msg; /* the answer, or NULL and st */
    size_t len;
    dd_status st;
};

static void render(dd_job *j)
{
    const dd_turn turn = { .join = DELTA_JOIN_AUTO };
    delta_rendered text = { 0 };
    uint32_t *ids = NULL;
    size_t n = 0;
    if (j->req.session_id[0]) {
        dd_status_set(&j->st, DD_UNIMPLEMENTED, "NOT_IMPLEMENTED",
                      "chat.session_id is not implemented for RenderPrompt");
        return;
    }
    if (dd_render(j->s, &j->req, &turn, true, &text, &ids, &n, &j->st) < 0)
        return;
    j->msg = dd_render_encode(&text, j->req.n_messages, ids, n, j->req.omit_ids, &j->len);
    free(ids);
    delta_rendered_done(&text);
}

static const uint32_t parse_reasons[] = {
    [DELTA_OUT_STOP] = DD_FINISH_STOP,
    [DELTA_OUT_TOOL_CALLS] = DD_FINISH_TOOL_CALLS,
    [DELTA_OUT_LENGTH] = DD_FINISH_LENGTH,
};

/* A ParseOutputResponse: reasoning 1, content 2, calls 3, reason 4, events 5. */
static void parse(dd_job *j)
{
    const dd_request *q = &j->req;
    /* A live request that no engine runs gathers the events, and keeps the whole texts. */
    dd_rpc nobody = { 0 };
    dd_session keeps = { 0 };
    dd_live l = { .s = j->s, .rpc = &nobody, .session = &keeps, .method = DD_M_CHAT };
    dd_wire_out o = { 0 };
    enum delta_out_finish how = DELTA_OUT_STOP;
    const delta_out_event *events = NULL;
    size_t n = 0;
    int e = dd_parser_new(j->s, q, &l.parser, &j->st);
    if (e < 0)
        return;
    for (size_t i = 0; e == 0 && i < q->n_chunks; i++) {
        e = delta_output_push(l.parser, (const char *)q->chunks[i].data, q->chunks[i].len, false,
                              &events, &n, NULL);
        e = e < 0 ? e : dd_live_outputs(&l, events, n);
    }
    if (e == 0)
        e = delta_output_finish(l.parser, q->cut ? DELTA_OUT_END_LENGTH : DELTA_OUT_END_STOP,
                                &events, &n, &how, NULL);
    e = e < 0 ? e : dd_live_outputs(&l, events, n);
    dd_wire_put_bytes(&o, 1, l.reasoning.p, l.reasoning.len);
    dd_wire_put_bytes(&o, 2, l.content.p, l.content.len);
    dd_wire_put_varint(&o, 4, parse_reasons[how]);
    for (const dd_item *i = l.first; i; i = i->next) {
        const dd_event text = { .kind = i->kind,
                                .index = i->index,
                                .text = { i->text.p, i->text.len } };
        size_t len = i->len;
        uint8_t *msg = i->encoded ? i->encoded : dd_event_encode(true, i->seq, &text, &len);
        if (msg)
            dd_wire_put_bytes(&o, 5, msg, len);
        o.failed = o.failed || !msg;
        /* A ToolCallEnd inside its event: the same bytes, one level up. */
        if (msg && i->kind == DD_EVENT_CALL_END) {
            dd_bytes rest = { msg, len };
            dd_wire_field f;
            while (dd_wire_next(&rest, &f) > 0)
                if (f.number == 10)
                    dd_wire_put_bytes(&o, 3, f.bytes.data, f.bytes.len);
        }
        if (!i->encoded)
            free(msg);
    }
    dd_live_done(&l);
    o.failed = o.failed || e < 0;
    j->msg = dd_wire_take(&o, &j->len);
}

static void tokenize(dd_job *j)
{
    const delta_tokenizer *t = dd_engine_tokenizer(j->s->engine);
    uint32_t *ids = NULL;
    size_t n = 0;
    delta_error err = { 0 };
    int e = delta_tokenize(t, j->req.text.p, j->req.text.len, j->req.plain_text, &ids, &n, &err);
    if (e < 0) {
        err.code = e;
        dd_status_of_error(&j->st, &err, "text");
        return;
    }
    j->msg = dd_tokens_encode(t, ids, n, j->req.with_bytes, &j->len);
    free(ids);
}

static void detokenize(dd_job *j)
{
    char *text = NULL;
    size_t n = 0;
    delta_error err = { 0 };
    dd_wire_out o = { 0 };
    int e = delta_detokenize(dd_engine_tokenizer(j->s->engine), j->req.ids, j->req.n_ids,
                             j->req.skip_special, &text, &n, &err);
    if (e < 0) {
        err.code = e;
        dd_status_of_error(&j->st, &err, "ids");
        return;
    }
    dd_wire_put_bytes(&o, 1, text, n);
    free(text);
    j->msg = dd_wire_take(&o, &j->len);
}

/* ---- the job */

static void run(dd_job *j)
{
    switch (j->method) {
    case DD_M_RENDER:
        render(j);
        return;
    case DD_M_PARSE:
        parse(j);
        return;
    case DD_M_TOKENIZE:
        tokenize(j);
        return;
    default:
        assert(j->method == DD_M_DETOKENIZE);
        detokenize(j);
        return;
    }
}

/* The answer, if anybody waits for it. */
static void end(dd_job *j)
{
    dd_rpc *r = j->rpc;
    if (r && !j->msg && j->st.code != DD_OK)
        dd_refuse(r, &j->st);
    else if (r)
        dd_answer(r, j->msg, j->len);
    else
        free(j->msg);
    dd_request_done(&j->req);
    free(j);
}

static void on_work(uv_work_t *w)
{
    run(w->data);
}

static void on_worked(uv_work_t *w, int status)
{
    dd_job *j = w->data;
    dd_service *s = j->s;
    (void)status; /* UV_ECANCELED: nobody waits for it */
    if (j->prev)
        j->prev->next = j->next;
    else
        s->jobs = j->next;
    if (j->next)
        j->next->prev = j->prev;
    s->n_jobs--;
    end(j);
}

static void give_to_worker(dd_job *j)
{
    dd_service *s = j->s;
    j->work.data = j;
    (void)uv_queue_work(s->o.loop, &j->work, on_work, on_worked); /* fails without on_work only */
    j->rpc->handler = j;
    j->next = s->jobs;
    if (s->jobs)
        s->jobs->prev = j;
    s->jobs = j;
    s->n_jobs++;
}

void dd_texts_fail(dd_job *j, const dd_status *st)
{
    dd_rpc *r = j->rpc;
    if (!r)
        return;
    j->rpc = NULL;
    (void)uv_cancel((uv_req_t *)&j->work); /* one that runs goes on to its end */
    dd_refuse(r, st);
}

void dd_texts_call(dd_service *s, dd_rpc *r, const uint8_t *msg, size_t len)
{
    const enum dd_method_id m = (enum dd_method_id)r->method->id;
    const enum dd_request_kind kind = m == DD_M_RENDER     ? DD_REQ_RENDER
                                      : m == DD_M_PARSE    ? DD_REQ_PARSE
                                      : m == DD_M_TOKENIZE ? DD_REQ_TOKENIZE
                                                           : DD_REQ_DETOKENIZE;
    dd_job *j = calloc(1, sizeof *j);
    if (!j) {
        dd_answer(r, NULL, 0);
        return;
    }
    j->s = s;
    j->rpc = r;
    j->peer = r->peer;
    j->method = m;
    if (dd_request_decode(kind, msg, len, &j->req, &j->st) < 0 ||
        dd_request_recall(s, j->peer.uid, NULL, &j->req, &j->st) < 0) {
        end(j);
        return;
    }
    if (dd_request_text_bytes(&j->req) < DD_INLINE_BYTES) {
        run(j);
        end(j);
        return;
    }
    if (dd_user_limit(s, r, &j->st) < 0) {
        end(j);
        return;
    }
    if (s->n_jobs >= DD_JOBS_HELD) {
        dd_status_set(&j->st, DD_RESOURCE_EXHAUSTED, "QUEUE_FULL",
                      "%u long texts are being worked on, the most there may be", s->n_jobs);
        j->st.retry_ms = DD_RETRY_MS;
        end(j);
        return;
    }
    give_to_worker(j);
}

uint32_t dd_texts_of(const dd_service *s, const dd_peer *p,
                     bool (*is_same)(const dd_peer *a, const dd_peer *b))
{
    uint32_t n = 0;
    for (const dd_job *j = s->jobs; j; j = j->next)
        n += j->rpc && is_same(&j->peer, p);
    return n;
}

void dd_texts_abort(dd_service *s, const dd_status *st)
{
    for (dd_job *j = s->jobs; j; j = j->next)
        dd_texts_fail(j, st);
}
