/* fake_engine.c -- delta/{engine,session,step}.h without a model: scripted tokens.
 *
 * For tests of the daemon: it answers what a script says, at a rate that the
 * script says, and fails where the script says. The tokenizer, the checks of
 * parameters, stop strings and streaming text are the real ones; everything
 * else is as small as the contract allows. Test support only.
 *
 * DELTA_FAKE in the environment names the script, a JSON object; no DELTA_FAKE:
 * all defaults. Keys:
 *   "replies": [{"prompt": "part of the prompt's text", "text": "what is said"}]
 *              the first whose prompt is found in the timeline since the last generation; its
 *              added tokens are recognised; the end-of-turn token follows
 *   "reply": "text"         where none fits (default "Hello from the fake engine.")
 *   "tokens_per_second": N  of one session (0: as fast as it goes)
 *   "open_ms": N            the model takes that long to open
 *   "open_error": "text"    and then fails (DELTA_EFORMAT)
 *   "hang_step": N          the N-th step that has work never comes back (from 1)
 *   "fault_step": N         the N-th step that has work fails (DELTA_EDEVICE)
 *   "error_token": N        a session's N-th token is an error of that session (from 1)
 *   "busy_sessions": N      DELTA_EBUSY from the N-th session on (from 1)
 *
 * Every token's log probability is log(1/2), alternatives are the ids after it. */
#include <assert.h>
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "api/checkpoint.h"
#include "base/arena.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/json.h"
#include "delta/delta.h"
#include "model/shape.h"
#include "sample/stop.h"

enum {
    SESSIONS_MAX = 1024,
    PAGE = 64,
    PREFILL_ROWS = 512,
    EVENTS_PER_SESSION = 8,
    TEXT_MAX = 8192, /* of one session in one step */
    FILE_MAX = 4 << 20,
};

struct delta_engine {
    delta_engine_info info;
    delta_tokenizer *tokenizer;
    char name[256];
    de_arena arena;
    const de_json *script;
    delta_session *sessions[SESSIONS_MAX];
    uint64_t pages_used, pages_total;
    delta_event *events; /* [max_sessions * EVENTS_PER_SESSION] */
    size_t n_events;
    delta_engine_stats stats;
    bool gone;
};

struct delta_session {
    delta_engine *engine;
    void *user;
    uint32_t index;
    uint32_t *tokens;
    uint32_t n, computed, room, limit, capacity, said; /* said: where the last generation ended */
    uint32_t appended_from, sampled_end;
    atomic_bool cancel;
    bool paused, generating, in_turn;
    uint32_t turn_cached, n_prompt, n_generated, max_tokens;
    uint64_t turn_ns, prefill_ns, first_ns, last_ns, next_ns;
    uint32_t *reply; /* ids to say, malloc'ed */
    size_t n_reply, at_reply;
    uint32_t stop_ids[DELTA_MAX_STOP_IDS + DE_CHECKPOINT_EOS], n_stop_ids;
    delta_sampling sampling;
    de_stop stop;
    delta_detok detok;
    char text[TEXT_MAX];
    size_t text_used;
    delta_top_logprob top[DELTA_MAX_TOP_LOGPROBS];
};

static void sleep_ns(uint64_t ns)
{
    const struct timespec t = { (time_t)(ns / 1000000000u), (long)(ns % 1000000000u) };
    (void)nanosleep(&t, NULL);
}

static uint64_t script_number(const delta_engine *e, const char *key)
{
    uint64_t n = 0;
    (void)de_json_u64(de_json_get(e->script, key), &n);
    return n;
}

/* ---- engine ---- */

static int read_script(delta_engine *e, delta_error *err)
{
    const char *path = getenv("DELTA_FAKE");
    char *text = NULL;
    size_t len;
    de_json *v = NULL;
    de_arena_init(&e->arena, 64u << 20);
    if (!path || !*path)
        return 0;
    int r = de_file_read(path, FILE_MAX, &text, &len, err);
    if (r == 0)
        r = de_json_parse(&e->arena, text, len, &v, err);
    free(text);
    e->script = v;
    return r;
}

static int read_model(delta_engine *e, const delta_engine_options *o, delta_error *err)
{
    char *path = de_path_join(o->model_dir, "config.json"), *config = NULL;
    size_t len;
    de_shape shape;
    de_checkpoint_use use;
    int r = path ? de_file_read(path, FILE_MAX, &config, &len, err) : DELTA_ENOMEM;
    if (r == 0)
        r = de_shape_parse(config, len, &shape, err);
    if (r == 0)
        r = de_checkpoint_use_read(o->model_dir, config, len, shape.vocab, &use, err);
    if (r == 0)
        r = delta_tokenizer_open(o->model_dir, &e->tokenizer, err);
    free(path);
    free(config);
    if (r < 0)
        return r;
    delta_engine_info *i = &e->info;
    const char *slash = strrchr(o->model_dir, '/');
    (void)snprintf(e->name, sizeof e->name, "%s", slash ? slash + 1 : o->model_dir);
    i->model_name = e->name;
    i->backend = "fake";
    i->quantization = "none";
    i->n_layers = shape.n_layers;
    i->n_gdn_layers = shape.n_gdn;
    i->n_attn_layers = shape.n_attn;
    i->hidden = shape.hidden;
    i->n_experts = shape.n_experts;
    i->n_experts_per_token = shape.top_k;
    i->n_vocab = shape.vocab;
    i->n_tokens = delta_tokenizer_size(e->tokenizer);
    i->max_sessions = o->max_sessions ? o->max_sessions : 16;
    i->page_tokens = PAGE;
    i->ctx_max = o->ctx_max && o->ctx_max < shape.ctx_max ? o->ctx_max : shape.ctx_max;
    if (o->kv_tokens && i->ctx_max > o->kv_tokens)
        i->ctx_max = (uint32_t)o->kv_tokens;
    e->pages_total =
        (o->kv_tokens ? o->kv_tokens : (uint64_t)i->max_sessions * i->ctx_max) / PAGE + 1;
    memcpy(i->eos_ids, use.eos_ids, sizeof i->eos_ids);
    i->n_eos_ids = use.n_eos_ids;
    i->sampling_thinking = use.thinking;
    i->sampling_plain = use.plain;
    memcpy(i->template_sha256, use.template_sha256, sizeof i->template_sha256);
    i->template_known = delta_template_known(use.template_sha256) != 0;
    return 0;
}

int delta_engine_open(const delta_engine_options *o, delta_engine **ret_e, delta_error *err)
{
    if (!o->model_dir || o->max_sessions > SESSIONS_MAX)
        return delta_fail(err, DELTA_EINVALID, "model_dir or max_sessions");
    if (o->backend == DELTA_BACKEND_CUDA)
        return delta_fail(err, DELTA_EUNSUPPORTED, "the fake engine has no CUDA backend");
    const uint64_t start = de_now_ns();
    delta_engine *e = calloc(1, sizeof *e);
    if (!e)
        return delta_fail(err, DELTA_ENOMEM, "engine");
    int r = read_script(e, err);
    const uint64_t open_ms = script_number(e, "open_ms");
    for (uint64_t ms = 0; r == 0 && ms < open_ms; ms += 10) {
        if (o->on_progress)
            o->on_progress(o->arg, "weights", ms, open_ms);
        sleep_ns(10000000);
    }
    const de_json *error = de_json_get(e->script, "open_error");
    if (r == 0 && error)
        r = delta_fail(err, DELTA_EFORMAT, "%s", error->text ? error->text : "open_error");
    if (r == 0)
        r = read_model(e, o, err);
    if (r == 0 &&
        !(e->events = calloc((size_t)e->info.max_sessions * EVENTS_PER_SESSION, sizeof *e->events)))
        r = delta_fail(err, DELTA_ENOMEM, "events");
    if (r < 0) {
        delta_engine_free(e);
        return r;
    }
    e->info.load_ns = de_now_ns() - start;
    *ret_e = e;
    return 0;
}

void delta_engine_free(delta_engine *e)
{
    if (!e)
        return;
    delta_tokenizer_free(e->tokenizer);
    de_arena_done(&e->arena);
    free(e->events);
    free(e);
}

const delta_engine_info *delta_engine_info_get(const delta_engine *e)
{
    return &e->info;
}

const delta_tokenizer *delta_engine_tokenizer(const delta_engine *e)
{
    return e->tokenizer;
}

void delta_engine_stats_get(const delta_engine *e, delta_engine_stats *ret_stats)
{
    *ret_stats = e->stats;
    ret_stats->sessions_max = e->info.max_sessions;
    ret_stats->pages_used = e->pages_used;
    ret_stats->pages_total = e->pages_total;
}

/* ---- sessions ---- */

static uint64_t pages(uint32_t tokens)
{
    return ((uint64_t)tokens + PAGE - 1) / PAGE;
}

static int grow(delta_session *s, uint32_t n, delta_error *err)
{
    if (n <= s->capacity)
        return 0;
    uint32_t *t = realloc(s->tokens, n * sizeof *t);
    if (!t)
        return delta_fail(err, DELTA_ENOMEM, "session of %u tokens", n);
    s->tokens = t;
    s->capacity = n;
    return 0;
}

int delta_session_reserve(delta_session *s, uint32_t ctx_tokens, delta_error *err)
{
    delta_engine *e = s->engine;
    if (ctx_tokens == 0 || ctx_tokens > e->info.ctx_max || ctx_tokens < s->n)
        return delta_fail(err, DELTA_EINVALID, "ctx_tokens %u is not in 1..%u", ctx_tokens,
                          e->info.ctx_max);
    ctx_tokens = ctx_tokens > s->limit ? ctx_tokens : s->limit;
    if (ctx_tokens <= s->room)
        return 0;
    uint32_t index = 0;
    const uint64_t busy = script_number(e, "busy_sessions");
    while (index < e->info.max_sessions && e->sessions[index])
        index++;
    if (s->index == UINT32_MAX &&
        (index == e->info.max_sessions || (busy && e->stats.sessions_used + 1 >= busy)))
        return delta_fail(err, DELTA_EBUSY, "no slot");
    const uint64_t more = pages(ctx_tokens) - pages(s->room);
    if (e->pages_used + more > e->pages_total)
        return delta_fail(err, DELTA_EBUSY, "too few pages");
    int r = grow(s, ctx_tokens, err);
    if (r < 0)
        return r;
    s->room = ctx_tokens;
    e->pages_used += more;
    if (s->index == UINT32_MAX) {
        s->index = index;
        e->sessions[index] = s;
        e->stats.sessions_used++;
    }
    return 0;
}

int delta_session_new(delta_engine *e, uint64_t owner, void *user, delta_session **ret_s,
                      delta_error *err)
{
    (void)owner;
    delta_session *s = calloc(1, sizeof *s);
    if (!s)
        return delta_fail(err, DELTA_ENOMEM, "session");
    s->engine = e;
    s->user = user;
    s->index = UINT32_MAX;
    *ret_s = s;
    return 0;
}

/* What was computed stays so: a cache that forgets nothing. */
void delta_session_set_pinned(delta_session *s, bool pinned)
{
    (void)s;
    (void)pinned;
}

void delta_session_park(delta_session *s)
{
    if (s->index == UINT32_MAX)
        return;
    s->engine->sessions[s->index] = NULL;
    s->engine->stats.sessions_used--;
    s->engine->pages_used -= pages(s->room);
    s->room = 0;
    s->index = UINT32_MAX;
}

/* It has pages for all of the limit as soon as it has a place. */
void delta_session_set_limit(delta_session *s, uint32_t ctx_tokens)
{
    s->limit = ctx_tokens;
}

uint32_t delta_session_short(const delta_session *s)
{
    (void)s;
    return 0;
}

void delta_session_set_background(delta_session *s, bool background)
{
    (void)s;
    (void)background;
}

void delta_session_mark(delta_session *s, uint32_t n_tokens)
{
    (void)s;
    (void)n_tokens;
}

int delta_session_rewind(delta_session *s, uint32_t n_tokens, delta_error *err)
{
    if (delta_session_busy(s))
        return delta_fail(err, DELTA_ESTATE, "the session is at work");
    if (n_tokens > s->n)
        return delta_fail(err, DELTA_EINVALID, "rewind to %u of %u", n_tokens, s->n);
    s->n = n_tokens;
    s->computed = s->computed < n_tokens ? s->computed : n_tokens;
    s->sampled_end = s->sampled_end < n_tokens ? s->sampled_end : n_tokens;
    return 0;
}

int delta_session_fork(delta_session *s, void *user, delta_session **ret_s, delta_error *err)
{
    delta_session *x = NULL;
    if (delta_session_busy(s))
        return delta_fail(err, DELTA_ESTATE, "the session is at work");
    int r = delta_session_new(s->engine, 0, user, &x, err);
    if (r == 0)
        r = grow(x, s->n, err);
    if (r < 0) {
        delta_session_free(x);
        return r;
    }
    if (s->n)
        memcpy(x->tokens, s->tokens, s->n * sizeof *x->tokens);
    x->n = s->n;
    x->computed = s->computed;
    x->sampled_end = s->sampled_end;
    *ret_s = x;
    return 0;
}

void delta_session_free(delta_session *s)
{
    if (!s)
        return;
    delta_session_park(s);
    free(s->tokens);
    free(s->reply);
    free(s);
}

bool delta_session_busy(const delta_session *s)
{
    return s->generating || s->computed < (s->n > s->sampled_end ? s->n : 0);
}

static void begin(delta_session *s)
{
    if (!delta_session_busy(s))
        atomic_store(&s->cancel, false);
    if (s->in_turn)
        return;
    s->in_turn = true;
    s->turn_cached = s->computed;
    s->turn_ns = de_now_ns();
    s->n_generated = 0;
}

int delta_session_append(delta_session *s, const uint32_t *ids, size_t n, delta_error *err)
{
    if (s->generating)
        return delta_fail(err, DELTA_ESTATE, "append while generating");
    if (n > s->engine->info.ctx_max - s->n)
        return delta_fail(err, DELTA_ELIMIT, "%zu tokens do not fit", n);
    for (size_t i = 0; i < n; i++)
        if (ids[i] >= s->engine->info.n_vocab)
            return delta_fail(err, DELTA_EINVALID, "token %u at %zu", ids[i], i);
    if (n == 0)
        return 0;
    int r = grow(s, s->n + (uint32_t)n, err);
    if (r < 0)
        return r;
    const bool idle = !delta_session_busy(s);
    begin(s);
    if (idle)
        s->appended_from = s->n;
    memcpy(s->tokens + s->n, ids, n * sizeof *ids);
    s->n += (uint32_t)n;
    return 0;
}

/* The ids to say after what was appended since the last generation. */
static int find_reply(delta_session *s, delta_error *err)
{
    const delta_engine *e = s->engine;
    const de_json *v = de_json_get(e->script, "reply");
    const char *text = v && v->kind == DE_JSON_STRING ? v->text : "Hello from the fake engine.";
    size_t len = strlen(text), prompt_len;
    char *prompt = NULL;
    int r = delta_detokenize(e->tokenizer, s->tokens + s->said, s->n - s->said, false, &prompt,
                             &prompt_len, err);
    if (r < 0)
        return r;
    const de_json *list = de_json_get(e->script, "replies");
    for (v = list ? list->child : NULL; v; v = v->next) {
        const de_json *part = de_json_get(v, "prompt"), *said = de_json_get(v, "text");
        if (part && said && memmem(prompt, prompt_len, part->text, part->n)) {
            text = said->text;
            len = said->n;
            break;
        }
    }
    free(prompt);
    free(s->reply);
    s->reply = NULL;
    s->at_reply = 0;
    return delta_tokenize(e->tokenizer, text, len, false, &s->reply, &s->n_reply, err);
}

/* The script says what is said, guided or not. */
int delta_session_guide(delta_session *s, const delta_guide *g, delta_error *err)
{
    (void)g;
    return s->generating ? delta_fail(err, DELTA_ESTATE, "a generation is running") : 0;
}

int delta_session_generate(delta_session *s, const delta_sampling *sampling,
                           const delta_stopping *stopping, delta_error *err)
{
    const delta_engine_info *i = &s->engine->info;
    if (s->generating || s->n == 0)
        return delta_fail(err, DELTA_ESTATE, "generating, or nothing to go on from");
    if (s->n == s->room)
        return delta_fail(err, DELTA_ELIMIT, "all %u tokens are used", s->room);
    int r = delta_sampling_check(sampling, i->n_vocab, err);
    if (r == 0)
        r = delta_stopping_check(stopping, i->n_vocab, err);
    if (r == 0)
        r = find_reply(s, err);
    if (r < 0)
        return r;
    begin(s);
    s->sampling = *sampling;
    s->sampling.bias = NULL;
    s->max_tokens = stopping->max_tokens < s->room - s->n ? stopping->max_tokens : s->room - s->n;
    s->n_stop_ids = 0;
    for (uint32_t k = 0; k < stopping->n_ids; k++)
        s->stop_ids[s->n_stop_ids++] = stopping->ids[k];
    for (uint32_t k = 0; k < i->n_eos_ids && !stopping->ignore_eos; k++)
        s->stop_ids[s->n_stop_ids++] = i->eos_ids[k];
    de_stop_init(&s->stop, stopping->strings, stopping->n_strings);
    s->detok = (delta_detok){ 0 };
    s->n_prompt = s->n;
    s->n_generated = 0;
    s->first_ns = s->last_ns = s->next_ns = 0;
    s->generating = true;
    return 0;
}

void delta_session_cancel(delta_session *s)
{
    atomic_store(&s->cancel, true);
}

void delta_session_pause(delta_session *s, bool paused)
{
    s->paused = paused;
}

const uint32_t *delta_session_tokens(const delta_session *s, size_t *ret_n)
{
    *ret_n = s->n;
    return s->tokens;
}

void delta_session_reuse(const delta_session *s, uint32_t *ret_cached, uint32_t *ret_shared)
{
    *ret_cached = *ret_shared = s->turn_cached;
}

size_t delta_session_computed(const delta_session *s)
{
    return s->computed;
}

/* ---- a step ---- */

static delta_event *push(delta_session *s, enum delta_event_kind kind)
{
    delta_engine *e = s->engine;
    assert(e->n_events < (size_t)e->info.max_sessions * EVENTS_PER_SESSION);
    delta_event *v = &e->events[e->n_events++];
    *v = (delta_event){ .kind = kind, .session = s, .user = s->user };
    return v;
}

static void push_text(delta_session *s, size_t len, int64_t added_id)
{
    if (len) {
        delta_event *v = push(s, DELTA_EVENT_TEXT);
        v->text.bytes = s->text + s->text_used;
        v->text.len = len;
        v->text.added_id = added_id;
    }
    s->text_used += len;
}

static int release(delta_session *s, const char *piece, size_t len, int64_t added_id)
{
    const size_t held = s->stop.n_held;
    int match = -1;
    size_t n = de_stop_push(&s->stop, piece, len, s->text + s->text_used, &match);
    if (added_id >= 0 && n == held + len) {
        push_text(s, held, -1);
        push_text(s, len, added_id);
    } else {
        push_text(s, n, -1);
    }
    return match;
}

static void finish(delta_session *s, enum delta_finish reason, uint32_t stop)
{
    char rest[DELTA_DETOK_ROOM + 4];
    if (s->generating && reason != DELTA_FINISH_STOP_STRING) {
        (void)release(s, rest, delta_detok_flush(&s->detok, rest, sizeof rest), -1);
        push_text(s, de_stop_flush(&s->stop, s->text + s->text_used), -1);
    }
    delta_event *v = push(s, DELTA_EVENT_FINISHED);
    v->finished.reason = reason;
    v->finished.stop = stop;
    v->finished.n_prompt = s->generating ? s->n_prompt : s->n;
    v->finished.n_cached = s->turn_cached;
    v->finished.n_generated = s->generating ? s->n_generated : 0;
    v->finished.prefill_ns = s->prefill_ns;
    v->finished.decode_ns = s->last_ns - s->first_ns;
    if (reason == DELTA_FINISH_ERROR)
        (void)delta_fail(&v->finished.error, DELTA_EINTERNAL, "the script wants an error here");
    s->generating = s->in_turn = false;
    s->said = s->n;
}

static void finish_cancelled(delta_session *s)
{
    s->n = s->computed > s->sampled_end ? s->computed : s->sampled_end;
    finish(s, DELTA_FINISH_CANCELLED, 0);
}

void delta_session_abort(delta_session *s, const delta_event **ret_events, size_t *ret_n)
{
    s->engine->n_events = 0;
    if (s->index == UINT32_MAX && delta_session_busy(s))
        finish_cancelled(s);
    *ret_events = s->engine->events;
    *ret_n = s->engine->n_events;
}

static bool is_stop(const delta_session *s, uint32_t id)
{
    for (uint32_t i = 0; i < s->n_stop_ids; i++)
        if (s->stop_ids[i] == id)
            return true;
    return false;
}

static void say(delta_session *s, uint64_t now)
{
    const delta_engine *e = s->engine;
    const uint64_t bad = script_number(e, "error_token");
    if (bad && s->n_generated + 1 >= bad) {
        finish(s, DELTA_FINISH_ERROR, 0);
        return;
    }
    /* After its text a reply ends the turn, or says it again where nothing may. */
    if (s->at_reply > s->n_reply || (s->at_reply == s->n_reply && !s->n_stop_ids && s->n_reply))
        s->at_reply = 0;
    const uint32_t id = s->at_reply < s->n_reply ? s->reply[s->at_reply]
                        : e->info.n_eos_ids      ? e->info.eos_ids[0]
                                                 : 0;
    s->at_reply++;
    if (s->n_generated++ == 0) {
        s->first_ns = now;
        s->prefill_ns = now - s->turn_ns;
    }
    s->last_ns = now;
    s->tokens[s->n++] = id;
    s->sampled_end = s->n;
    delta_event *v = push(s, DELTA_EVENT_TOKEN);
    v->token.id = id;
    v->token.logprob = s->sampling.logprobs || s->sampling.top_logprobs ? logf(0.5f) : NAN;
    v->token.top = s->top;
    v->token.n_top = s->sampling.top_logprobs;
    for (uint32_t i = 0; i < v->token.n_top; i++)
        s->top[i] = (delta_top_logprob){ (id + i) % e->info.n_tokens, -(float)(i + 1) * logf(2) };
    if (is_stop(s, id)) {
        finish(s, DELTA_FINISH_STOP_ID, id);
        return;
    }
    const enum delta_token_kind kind = delta_token_kind(e->tokenizer, id);
    const bool added = kind == DELTA_TOKEN_ADDED || kind == DELTA_TOKEN_SPECIAL;
    char piece[4096];
    size_t len, n = 0;
    const uint8_t *bytes = delta_token_bytes(e->tokenizer, id, &len);
    if (len && len <= sizeof piece / 4)
        n = delta_detok_push(&s->detok, bytes, len, piece, sizeof piece);
    const int match = release(s, piece, n, added && n == len ? (int64_t)id : -1);
    if (match >= 0)
        finish(s, DELTA_FINISH_STOP_STRING, (uint32_t)match);
    else if (s->n_generated == s->max_tokens)
        finish(s, DELTA_FINISH_LENGTH, 0);
}

/* Prefill of one chunk, or one token; false: it is not time yet. */
static bool work(delta_session *s, uint64_t now)
{
    if (s->n - s->computed > 1 || !s->generating) {
        const uint32_t left = s->n - s->computed;
        const uint32_t rows = left < PREFILL_ROWS ? left : PREFILL_ROWS;
        s->computed += rows;
        s->engine->stats.prefill_tokens += rows;
        if (s->computed > s->appended_from) {
            delta_event *v = push(s, DELTA_EVENT_PREFILL);
            v->prefill.done = s->computed - s->appended_from;
            v->prefill.total = s->n - s->appended_from;
        }
        return true;
    }
    const uint64_t rate = script_number(s->engine, "tokens_per_second");
    if (rate && now < s->next_ns)
        return false;
    s->next_ns = rate ? now + 1000000000u / rate : 0;
    if (s->computed < s->n && s->n_generated == 0 && s->n > s->sampled_end) {
        delta_event *v = push(s, DELTA_EVENT_PREFILL);
        v->prefill.done = v->prefill.total = s->n - s->appended_from;
    }
    s->computed = s->n;
    s->engine->stats.decode_tokens++;
    say(s, now);
    return true;
}

int delta_step(delta_engine *e, const delta_event **ret_events, size_t *ret_n, delta_error *err)
{
    const uint64_t start = de_now_ns();
    bool wanted = false, worked = false;
    e->n_events = 0;
    for (uint32_t i = 0; i < e->info.max_sessions; i++) {
        delta_session *s = e->sessions[i];
        if (!s || !delta_session_busy(s))
            continue;
        s->text_used = 0;
        if (atomic_exchange(&s->cancel, false))
            finish_cancelled(s);
        else
            wanted |= !s->paused;
    }
    if (wanted) {
        const uint64_t hang = script_number(e, "hang_step"), fault = script_number(e, "fault_step");
        e->stats.steps++;
        while (hang && e->stats.steps >= hang)
            (void)pause();
        e->gone |= fault && e->stats.steps >= fault;
    }
    if (e->gone)
        return delta_fail(err, DELTA_EDEVICE, "the script wants a device fault here");
    for (uint32_t i = 0; i < e->info.max_sessions && wanted; i++) {
        delta_session *s = e->sessions[i];
        if (s && !s->paused && delta_session_busy(s))
            worked |= work(s, start);
    }
    if (wanted && !worked)
        sleep_ns(1000000); /* a forward takes its time, too */
    e->stats.step_ns += de_now_ns() - start;
    *ret_events = e->events;
    *ret_n = e->n_events;
    return 0;
}

/* The fake engine keeps nothing. */
int delta_cache_open(delta_engine *e, const delta_cache_options *o, delta_error *err)
{
    (void)e, (void)o, (void)err;
    return 0;
}

int delta_cache_work(delta_engine *e, uint64_t *ret_again_ns, delta_error *err)
{
    (void)e, (void)err;
    *ret_again_ns = UINT64_MAX;
    return 0;
}

uint64_t delta_save_state_at(uint64_t text_bytes)
{
    return text_bytes;
}

static int no_disk(delta_error *err)
{
    return delta_fail(err, DELTA_ESTATE, "there is no cache on disk");
}

int delta_cache_save(delta_session *s, const delta_save *save, delta_error *err)
{
    (void)s, (void)save;
    return no_disk(err);
}

int delta_cache_saved(delta_engine *e, uint64_t *ret_bytes, uint32_t *ret_tokens, delta_error *err)
{
    (void)e, (void)ret_bytes, (void)ret_tokens;
    return no_disk(err);
}

int delta_cache_check(const delta_engine *e, const char *path, uint64_t at, uint32_t *ret_tokens,
                      delta_error *err)
{
    (void)e, (void)path, (void)at, (void)ret_tokens;
    return no_disk(err);
}

int delta_cache_adopt(delta_engine *e, const char *path, uint64_t at, uint64_t owner,
                      delta_error *err)
{
    (void)e, (void)path, (void)at, (void)owner;
    return no_disk(err);
}

void delta_cache_flush(delta_engine *e)
{
    (void)e;
}

bool delta_session_resident(const delta_session *s)
{
    return s->index != UINT32_MAX;
}

int delta_session_fetch(delta_session *s)
{
    (void)s;
    return 0;
}
