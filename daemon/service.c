/* service.c -- the table of methods, phases, health; see service.h.
 *
 * READ THIS to find who answers a call: dd_service_message() is the one switch. */
#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "daemon/live.h"
#include "daemon/log.h"
#include "daemon/reflection.h"

struct dd_watcher {
    dd_watcher *prev, *next;
    dd_service *s;
    dd_rpc *rpc;
    bool is_known, is_sending;
    enum dd_health told; /* 0: nothing yet */
};

#define INFERENCE "/deltad.v1.InferenceService/"
#define SESSION "/deltad.v1.SessionService/"
#define MODEL "/deltad.v1.ModelService/"
static const dd_method methods[] = {
    { INFERENCE "Chat", DD_SERVER_STREAM, DD_M_CHAT },
    { INFERENCE "Generate", DD_SERVER_STREAM, DD_M_GENERATE },
    { INFERENCE "Resume", DD_SERVER_STREAM, DD_M_RESUME },
    { INFERENCE "Cancel", DD_UNARY, DD_M_CANCEL },
    { INFERENCE "RenderPrompt", DD_UNARY, DD_M_RENDER },
    { INFERENCE "ParseOutput", DD_UNARY, DD_M_PARSE },
    { INFERENCE "Tokenize", DD_UNARY, DD_M_TOKENIZE },
    { INFERENCE "Detokenize", DD_UNARY, DD_M_DETOKENIZE },
    { SESSION "CreateSession", DD_UNARY, DD_M_CREATE },
    { SESSION "GetSession", DD_UNARY, DD_M_GET },
    { SESSION "ListSessions", DD_UNARY, DD_M_LIST },
    { SESSION "CloseSession", DD_UNARY, DD_M_CLOSE },
    { SESSION "ForkSession", DD_UNARY, DD_M_FORK },
    { SESSION "RewindSession", DD_UNARY, DD_M_REWIND },
    { SESSION "PinSession", DD_UNARY, DD_M_PIN },
    { SESSION "ExportSession", DD_SERVER_STREAM, DD_M_EXPORT },
    { SESSION "SaveSession", DD_UNARY, DD_M_SAVE },
    { SESSION "RestoreSession", DD_UNARY, DD_M_RESTORE },
    { SESSION "ListSaves", DD_UNARY, DD_M_SAVES },
    { SESSION "DeleteSave", DD_UNARY, DD_M_DELETE_SAVE },
    { SESSION "AppendMessages", DD_UNARY, DD_M_APPEND },
    { MODEL "GetModelInfo", DD_UNARY, DD_M_INFO },
    { MODEL "GetStats", DD_UNARY, DD_M_STATS },
    { "/grpc.health.v1.Health/Check", DD_UNARY, DD_M_HEALTH_CHECK },
    { "/grpc.health.v1.Health/Watch", DD_SERVER_STREAM, DD_M_HEALTH_WATCH },
    { "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", DD_BIDI, DD_M_REFLECTION },
    { "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", DD_BIDI, DD_M_REFLECTION },
};
enum { N_METHODS = sizeof methods / sizeof methods[0] };

const dd_method *dd_service_methods(size_t *ret_n)
{
    *ret_n = N_METHODS;
    return methods;
}

const dd_method *dd_service_method_find(const char *path, size_t len)
{
    for (size_t i = 0; i < N_METHODS; i++)
        if (strlen(methods[i].path) == len && memcmp(methods[i].path, path, len) == 0)
            return &methods[i];
    return NULL;
}

uint64_t dd_after_ns(uint64_t t, uint64_t ns)
{
    return ns < UINT64_MAX - t ? t + ns : UINT64_MAX;
}

int dd_random_text(char *to, size_t n)
{
    static const char alphabet[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-";
    unsigned char raw[64];
    assert(n <= sizeof raw);
    if (getrandom(raw, n, 0) != (ssize_t)n)
        return -1;
    for (size_t i = 0; i < n; i++)
        to[i] = alphabet[raw[i] & 63];
    to[n] = '\0';
    return 0;
}

void dd_refuse(dd_rpc *r, const dd_status *st)
{
    r->handler = NULL;
    r->vt->finish(r, st);
}

void dd_answer(dd_rpc *r, uint8_t *msg, size_t len)
{
    dd_status st = { .code = DD_OK };
    if (msg)
        r->vt->send(r, msg, len);
    else
        dd_status_set(&st, DD_RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", "no memory for the answer");
    dd_refuse(r, &st);
}

/* ---- health */

static bool is_service(dd_bytes name)
{
    if (name.len == 0)
        return true;
    for (size_t i = 0; i < N_METHODS; i++) {
        const char *service = methods[i].path + 1;
        const char *slash = strchr(service, '/');
        if ((size_t)(slash - service) == name.len && memcmp(service, name.data, name.len) == 0)
            return true;
    }
    return false;
}

static enum dd_health health(const dd_service *s)
{
    return s->phase == DD_SERVING ? DD_HEALTH_SERVING : DD_HEALTH_NOT_SERVING;
}

static void watcher_tell(dd_watcher *w)
{
    enum dd_health now = w->is_known ? health(w->s) : DD_HEALTH_UNKNOWN_SERVICE;
    size_t len;
    if (w->is_sending || w->told == now)
        return;
    uint8_t *msg = dd_health_response_encode(now, &len);
    if (!msg)
        return; /* told at the next change */
    w->told = now;
    w->is_sending = true;
    w->rpc->vt->send(w->rpc, msg, len);
}

static void watcher_end(dd_watcher *w, const dd_status *st)
{
    if (w->prev)
        w->prev->next = w->next;
    else
        w->s->watchers = w->next;
    if (w->next)
        w->next->prev = w->prev;
    w->s->n_watchers--;
    dd_refuse(w->rpc, st);
    free(w);
}

static void on_health(dd_service *s, dd_rpc *r, const uint8_t *msg, size_t len)
{
    dd_bytes name;
    dd_status st;
    if (dd_health_request_decode(msg, len, &name) < 0) {
        dd_status_set(&st, DD_INVALID_ARGUMENT, "MALFORMED", "this is no HealthCheckRequest");
        dd_refuse(r, &st);
        return;
    }
    if (r->method->id == DD_M_HEALTH_CHECK) {
        if (is_service(name)) {
            size_t n = 0;
            uint8_t *answer = dd_health_response_encode(health(s), &n);
            dd_answer(r, answer, n);
        } else {
            dd_status_set(&st, DD_NOT_FOUND, "SERVICE_UNKNOWN", "there is no such service");
            dd_refuse(r, &st);
        }
        return;
    }
    dd_watcher *w = s->n_watchers < DD_WATCHERS ? calloc(1, sizeof *w) : NULL;
    if (!w) {
        dd_status_set(&st, DD_RESOURCE_EXHAUSTED, "TOO_MANY_WATCHERS", "too many watch already");
        st.retry_ms = DD_RETRY_MS;
        dd_refuse(r, &st);
        return;
    }
    w->s = s;
    w->rpc = r;
    w->is_known = is_service(name);
    w->next = s->watchers;
    if (s->watchers)
        s->watchers->prev = w;
    s->watchers = w;
    s->n_watchers++;
    r->handler = w;
    watcher_tell(w);
}

static void set_phase(dd_service *s, enum dd_phase phase)
{
    s->phase = phase;
    for (dd_watcher *w = s->watchers; w; w = w->next)
        watcher_tell(w);
}

/* ---- calls */

static void on_stats(dd_service *s, dd_rpc *r)
{
    dd_stats x = s->stats;
    size_t len = 0;
    x.uptime_ns = de_now_ns() - s->started_ns;
    for (const dd_live *l = s->live; l; l = l->next)
        if (l->kept_until_ns)
            continue; /* ended, and kept for Resume */
        else if (l->is_started && !l->is_waiting)
            x.running++;
        else
            x.queued++;
    x.sessions = s->n_sessions;
    x.phase = s->phase == DD_LOADING ? 1 : s->phase == DD_SERVING ? 2 : 3;
    dd_engine_stats(s->engine, &x.engine);
    dd_grammars_stats(s->grammars, &x.grammars);
    uint8_t *msg = dd_stats_encode(&x, &len);
    dd_answer(r, msg, len);
}

void dd_service_start(dd_service *s, dd_rpc *r)
{
    (void)s;
    r->handler = NULL;
}

void dd_service_message(dd_service *s, dd_rpc *r, const uint8_t *msg, size_t len)
{
    enum dd_method_id m = (enum dd_method_id)r->method->id;
    dd_status st;
    if (m == DD_M_REFLECTION) {
        if (r->peer.is_unix || s->o.config->server.tcp_reflection) {
            dd_reflection_message(r, msg, len);
            return;
        }
        dd_status_set(&st, DD_UNIMPLEMENTED, "REFLECTION_OFF",
                      "reflection is off on TCP (server.tcp_reflection)");
        dd_refuse(r, &st);
        return;
    }
    if (m == DD_M_HEALTH_CHECK || m == DD_M_HEALTH_WATCH) {
        on_health(s, r, msg, len);
        return;
    }
    if (m == DD_M_STATS) {
        on_stats(s, r);
        return;
    }
    if (!s->is_ready || (s->phase == DD_DRAINING && m != DD_M_CANCEL)) {
        bool draining = s->phase == DD_DRAINING;
        dd_status_set(&st, DD_UNAVAILABLE, draining ? "DRAINING" : "LOADING",
                      draining ? "the daemon is stopping" : "the model is being loaded");
        st.retry_ms = DD_RETRY_MS;
        dd_refuse(r, &st);
        return;
    }
    switch (m) {
    case DD_M_CHAT:
    case DD_M_GENERATE:
    case DD_M_CREATE:
    case DD_M_APPEND:
        dd_live_start(s, r, m, msg, len);
        return;
    case DD_M_RESUME:
        dd_resume_call(s, r, msg, len);
        return;
    case DD_M_CANCEL:
        dd_live_cancel_call(s, r, msg, len);
        return;
    case DD_M_RENDER:
    case DD_M_PARSE:
    case DD_M_TOKENIZE:
    case DD_M_DETOKENIZE:
        dd_texts_call(s, r, msg, len);
        return;
    case DD_M_GET:
    case DD_M_LIST:
    case DD_M_CLOSE:
    case DD_M_FORK:
    case DD_M_REWIND:
    case DD_M_PIN:
    case DD_M_EXPORT:
    case DD_M_SAVE:
    case DD_M_RESTORE:
    case DD_M_SAVES:
    case DD_M_DELETE_SAVE:
        dd_session_call(s, r, msg, len);
        return;
    case DD_M_INFO: {
        size_t n = 0;
        uint8_t *answer = dd_info_encode(dd_engine_info(s->engine), &n);
        dd_answer(r, answer, n);
        return;
    }
    case DD_M_STATS:
    case DD_M_HEALTH_CHECK:
    case DD_M_HEALTH_WATCH:
    case DD_M_REFLECTION:
        return; /* above */
    }
}

/* Its handler, if any, is a dd_job. */
static bool is_text_call(const dd_rpc *r)
{
    const uint32_t m = r->method->id;
    return m == DD_M_RENDER || m == DD_M_PARSE || m == DD_M_TOKENIZE || m == DD_M_DETOKENIZE;
}

void dd_service_half_closed(dd_service *s, dd_rpc *r)
{
    (void)s;
    if (r->method->id == DD_M_REFLECTION)
        dd_reflection_half_closed(r);
}

void dd_service_sent(dd_service *s, dd_rpc *r)
{
    (void)s;
    if (r->method->id == DD_M_REFLECTION) {
        dd_reflection_sent(r);
    } else if (r->method->id == DD_M_HEALTH_WATCH && r->handler) {
        dd_watcher *w = r->handler;
        w->is_sending = false;
        watcher_tell(w);
    } else if (r->method->id == DD_M_EXPORT && r->handler) {
        dd_export_sent(r->handler);
    } else if (r->handler && !is_text_call(r)) {
        dd_live_sent(r->handler);
    }
}

void dd_service_closed(dd_service *s, dd_rpc *r)
{
    dd_status st;
    (void)s;
    dd_status_set(&st, DD_CANCELLED, "CANCELLED", "the call was closed");
    if (r->method->id == DD_M_REFLECTION)
        dd_reflection_closed(r);
    else if (r->method->id == DD_M_HEALTH_WATCH && r->handler)
        watcher_end(r->handler, &st);
    else if (r->method->id == DD_M_EXPORT && r->handler)
        dd_export_end(r->handler, &st);
    else if ((r->method->id == DD_M_SAVE || r->method->id == DD_M_RESTORE) && r->handler)
        dd_saves_closed(r->handler);
    else if (r->handler && is_text_call(r))
        dd_texts_fail(r->handler, &st);
    else if (r->handler)
        dd_live_closed(r->handler);
    else
        dd_refuse(r, &st); /* it never sent its message */
}

/* ---- life */

static void on_note(void *arg, const dd_note *n)
{
    dd_service *s = arg;
    switch (n->kind) {
    case DD_NOTE_LOAD:
        s->o.on_load(s->o.arg, n->text, n->progress);
        return;
    case DD_NOTE_LOG:
        dd_log(n->n ? DD_LOG_WARNING : DD_LOG_INFO, "%s", n->text);
        return;
    case DD_NOTE_READY:
        s->is_ready = true;
        dd_keep_load(s);
        if (s->phase == DD_LOADING)
            set_phase(s, DD_SERVING);
        s->o.on_ready(s->o.arg);
        return;
    case DD_NOTE_FATAL:
        s->is_faulty = true;
        s->is_ready = false;
        set_phase(s, DD_DRAINING);
        s->o.on_fatal(s->o.arg, n->text);
        return;
    case DD_NOTE_QUEUED:
    case DD_NOTE_STARTED:
    case DD_NOTE_PREFILL:
    case DD_NOTE_TOKEN:
    case DD_NOTE_TEXT:
    case DD_NOTE_FINISHED:
        dd_live_note(s, n);
        return;
    case DD_NOTE_SAVED:
        dd_saves_note(s, n);
        return;
    }
}

static void on_drain_timer(uv_timer_t *t)
{
    dd_service *s = t->data;
    dd_status st;
    if (!s->on_drained || s->live || s->n_jobs || s->n_ahead || s->n_keeping || s->n_exports ||
        s->n_saves)
        return;
    dd_status_set(&st, DD_UNAVAILABLE, "DRAINING", "the daemon is stopping");
    st.retry_ms = DD_RETRY_MS;
    while (s->watchers)
        watcher_end(s->watchers, &st);
    uv_timer_stop(t);
    void (*f)(void *) = s->on_drained;
    s->on_drained = NULL;
    f(s->drained_arg);
}

int dd_service_new(const dd_service_options *o, dd_service **ret_s, delta_error *err)
{
    dd_service *s = calloc(1, sizeof *s);
    if (!s)
        return delta_fail(err, DELTA_ENOMEM, "service: %zu bytes", sizeof *s);
    s->grammars = dd_grammars_new();
    if (!s->grammars) {
        free(s);
        return delta_fail(err, DELTA_ENOMEM, "cache of grammars");
    }
    s->o = *o;
    s->phase = DD_LOADING;
    s->started_ns = de_now_ns();
    (void)uv_timer_init(o->loop, &s->timer);
    (void)uv_timer_init(o->loop, &s->drain_timer);
    s->timer.data = s->drain_timer.data = s;
    s->recall = dd_recall_new();
    if (!s->recall) {
        dd_service_free(s);
        return delta_fail(err, DELTA_ENOMEM, "service: no memory");
    }
    int r = dd_engine_new(o->loop, o->config, on_note, s, &s->engine, err);
    if (r < 0) {
        dd_service_free(s);
        return r;
    }
    *ret_s = s;
    return 0;
}

void dd_service_drain(dd_service *s, void (*on_drained)(void *arg), void *arg)
{
    s->on_drained = on_drained;
    s->drained_arg = arg;
    set_phase(s, DD_DRAINING);
    dd_ahead_cancel(s);
    dd_resume_drain(s);
    (void)uv_timer_start(&s->drain_timer, on_drain_timer, 0, 20);
}

void dd_service_abort_all(dd_service *s)
{
    dd_status st;
    dd_status_set(&st, DD_UNAVAILABLE, "DRAINING", "the daemon is stopping");
    st.retry_ms = DD_RETRY_MS;
    for (dd_live *l = s->live, *next; l; l = next) {
        next = l->next;
        dd_live_end(l, &st);
    }
    dd_texts_abort(s, &st);
    dd_exports_abort(s, &st);
    dd_saves_abort(s, &st);
}

static void on_closed(uv_handle_t *h)
{
    dd_service *s = h->data;
    if (--s->n_closing == 0)
        free(s);
}

void dd_service_free(dd_service *s)
{
    if (!s)
        return;
    assert(!s->live && !s->n_jobs && !s->n_ahead && !s->n_keeping && !s->n_exports && !s->n_saves);
    dd_sessions_free(s);
    dd_recall_free(s->recall);
    dd_grammars_free(s->grammars); /* before the engine, whose tokenizer they read */
    dd_engine_free(s->engine);
    s->n_closing = 2;
    uv_close((uv_handle_t *)&s->timer, on_closed);
    uv_close((uv_handle_t *)&s->drain_timer, on_closed);
}

enum dd_phase dd_service_phase(const dd_service *s)
{
    return s->phase;
}

uint64_t dd_service_heartbeat(const dd_service *s)
{
    return dd_engine_heartbeat(s->engine);
}

void dd_service_connections(dd_service *s, uint32_t now, uint64_t total)
{
    s->stats.connections = now;
    s->stats.connections_total = total;
}
