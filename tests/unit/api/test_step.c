/* Engine, sessions and steps over a model and a tokenizer of a few lines, which take the place of
 * the real ones at link time.
 *
 * The model's state is a hash of all it was given, of every position included at which a prefill
 * was cut off a multiple of DE_CHUNK: if the engine cut according to load, tokens would differ.
 * Token i < 256 is the byte i; 300 is "<tag>", added; 400 ends a turn. */
#include "support/tap.h"

#include "delta/delta.h"
#include "model/forward.h"

enum {
    VOCAB = 2048,
    TOKENS = 500,
    TAG = 300,
    CLOSE = 301,
    EOS = 400,
    NAN_TOKEN = 401,
    FAULT_TOKEN = 402
};

/* ---- the tokenizer ---- */

struct delta_tokenizer {
    int unused;
};
static struct delta_tokenizer the_tokenizer;
int delta_tokenizer_open(const char *dir, delta_tokenizer **ret_tok, delta_error *err)
{
    (void)dir, (void)err;
    *ret_tok = &the_tokenizer;
    return 0;
}
void delta_tokenizer_free(delta_tokenizer *t)
{
    (void)t;
}
uint32_t delta_tokenizer_size(const delta_tokenizer *t)
{
    (void)t;
    return TOKENS;
}
enum delta_token_kind delta_token_kind(const delta_tokenizer *t, uint32_t id)
{
    (void)t;
    return id < 256                   ? DELTA_TOKEN_TEXT
           : id == TAG || id == CLOSE ? DELTA_TOKEN_ADDED
           : id == EOS                ? DELTA_TOKEN_SPECIAL
                                      : DELTA_TOKEN_NONE;
}
const uint8_t *delta_token_bytes(const delta_tokenizer *t, uint32_t id, size_t *ret_len)
{
    static uint8_t bytes[256];
    (void)t;
    *ret_len = id < 256 ? 1 : id == TAG || id == EOS ? 5 : id == CLOSE ? 8 : 0;
    if (id == CLOSE)
        return (const uint8_t *)"</think>";
    if (id >= 256)
        return *ret_len ? (const uint8_t *)"<tag>" : NULL;
    bytes[id] = (uint8_t)id;
    return &bytes[id];
}
int64_t delta_tokenizer_added_id(const delta_tokenizer *t, const char *text)
{
    (void)t;
    return strcmp(text, "</think>") == 0 ? CLOSE : -1;
}
/* Bytes, and "</think>". */
int delta_tokenize(const delta_tokenizer *t, const char *text, size_t len, bool plain,
                   uint32_t **ret_ids, size_t *ret_n, delta_error *err)
{
    (void)t, (void)plain, (void)err;
    uint32_t *ids = malloc((len + 1) * sizeof *ids);
    size_t n = 0;
    for (size_t i = 0; i < len; i++) {
        const bool closes = len - i >= 8 && memcmp(text + i, "</think>", 8) == 0;
        ids[n++] = closes ? CLOSE : (uint8_t)text[i];
        i += closes ? 7 : 0;
    }
    *ret_ids = ids;
    *ret_n = n;
    return 0;
}
/* ASCII, and two-byte characters. */
size_t delta_detok_push(delta_detok *d, const uint8_t *bytes, size_t len, char *out, size_t cap)
{
    size_t n = 0;
    for (size_t i = 0; i < len && n + 3 < cap; i++) {
        if (bytes[i] >= 0xc2 && bytes[i] < 0xe0 && !d->n_held) {
            d->held[d->n_held++] = bytes[i];
            continue;
        }
        if (d->n_held) {
            d->n_held = 0;
            out[n++] = (char)d->held[0];
        }
        out[n++] = (char)bytes[i];
    }
    return n;
}
size_t delta_detok_flush(delta_detok *d, char *out, size_t cap)
{
    (void)cap;
    if (!d->n_held)
        return 0;
    d->n_held = 0;
    memcpy(out, "\xef\xbf\xbd", 3);
    return 3;
}

/* ---- the model ---- */

struct de_model {
    de_model_options o;
    struct {
        uint64_t hash;
        uint32_t n;
    } slot[64];
};
static uint32_t script[4096]; /* where the model is sure of its next token: by position, or 0 */
static delta_session *cancel_in_forward;
static uint32_t n_forwards, n_rows_last;

struct de_backend {
    const char *name;
};
static const de_backend fake_backend = { "cpu" };

const de_backend *de_backend_find(const char *name)
{
    return strcmp(name, "cuda") == 0 ? NULL : &fake_backend;
}
const char *de_backend_name(const de_backend *b)
{
    return b->name;
}
uint64_t de_backend_memory(const de_backend *b)
{
    (void)b;
    return UINT64_C(64) << 30;
}
void *de_backend_host_alloc(const de_backend *b, size_t bytes)
{
    (void)b;
    return calloc(1, bytes);
}
void de_backend_host_free(const de_backend *b, void *p)
{
    (void)b;
    free(p);
}
int de_model_plan(const de_shape *shape, const de_binding *b, const de_model_options *o,
                  de_memory_plan *ret_plan, delta_error *err)
{
    (void)shape, (void)b, (void)err;
    *ret_plan = (de_memory_plan){ 1000, (uint64_t)o->n_pages * 65536, 1000, 1000 };
    return 0;
}
int de_model_open(const de_weights *w, const de_shape *shape, const de_binding *b,
                  const de_model_options *o, de_model **ret_m, delta_error *err)
{
    (void)w, (void)shape, (void)b, (void)err;
    *ret_m = calloc(1, sizeof **ret_m);
    (*ret_m)->o = *o;
    return 0;
}
void de_model_free(de_model *m)
{
    free(m);
}
void de_model_slot_clear(de_model *m, uint32_t slot)
{
    m->slot[slot].hash = 1;
    m->slot[slot].n = 0;
}
static uint64_t mix(uint64_t h, uint64_t v)
{
    h = (h ^ v) * 0x9e3779b97f4a7c15u;
    return h ^ (h >> 29);
}
int de_forward(de_model *m, const de_batch *b, float *logits, const de_capture *c, delta_error *err)
{
    (void)c;
    bool page_used[4096] = { false };
    n_forwards++;
    n_rows_last = b->n_rows;
    if (cancel_in_forward)
        delta_session_cancel(cancel_in_forward);
    if (b->n_rows > m->o.max_rows || b->n_seqs > m->o.max_seqs || b->n_out > m->o.max_out)
        return delta_fail(err, DELTA_EINTERNAL, "batch too large");
    for (uint32_t i = 0; i < b->n_seqs; i++) {
        const de_batch_seq *s = &b->seqs[i];
        if (s->start != m->slot[s->slot].n || s->n_rows == 0)
            return delta_fail(err, DELTA_EINTERNAL, "does not continue");
        for (uint32_t p = 0; p < (s->start + s->n_rows + DE_PAGE - 1) / DE_PAGE; p++) {
            if (s->pages[p] >= m->o.n_pages || page_used[s->pages[p]])
                return delta_fail(err, DELTA_EINTERNAL, "page %u is not this session's alone",
                                  s->pages[p]);
            page_used[s->pages[p]] = true;
        }
        uint64_t h = m->slot[s->slot].hash;
        for (uint32_t k = 0; k < s->n_rows; k++) {
            const uint32_t tok = b->tokens[s->row + k];
            if (b->pos[s->row + k][0] != s->start + k)
                return delta_fail(err, DELTA_EINTERNAL, "position");
            if (tok == FAULT_TOKEN)
                return delta_fail(err, DELTA_EDEVICE, "the device is gone");
            h = mix(h, tok);
        }
        m->slot[s->slot].n += s->n_rows;
        if (m->slot[s->slot].n % DE_CHUNK)
            h = mix(h, 0xc07u); /* the cut */
        m->slot[s->slot].hash = h;
        if (s->n_out) {
            float *l = logits + (size_t)s->first_out * VOCAB;
            for (uint32_t k = 0; k < VOCAB; k++)
                l[k] = (float)(mix(h, k) >> 40) * 0x1p-22f;
            if (m->slot[s->slot].n < 4096 && script[m->slot[s->slot].n])
                l[script[m->slot[s->slot].n]] = 50;
            if (b->tokens[s->row + s->n_rows - 1] == NAN_TOKEN)
                l[17] = NAN;
        }
    }
    return 0;
}

/* ---- helpers ---- */

static delta_engine *open_engine(uint32_t sessions, uint64_t kv_tokens, uint32_t step_tokens)
{
    delta_engine_options o = { .model_dir = DEMO_MODEL_DIR,
                               .max_sessions = sessions,
                               .kv_tokens = kv_tokens,
                               .step_tokens = step_tokens };
    delta_engine *e = NULL;
    delta_error err = { 0 };
    if (delta_engine_open(&o, &e, &err) < 0) {
        printf("# %s\n", err.text);
        exit(1);
    }
    return e;
}

typedef struct result {
    uint32_t ids[600];
    float logprobs[600];
    uint32_t n;
    char text[2000];
    size_t len;
    bool finished;
    uint32_t n_added, prefill_done, prefill_total;
    enum delta_finish reason;
    uint32_t stop, n_prompt, n_cached, n_generated;
    delta_error error;
} result;

static int step(delta_engine *e)
{
    const delta_event *v;
    size_t n;
    int r = delta_step(e, &v, &n, NULL);
    for (size_t i = 0; r == 0 && i < n; i++) {
        result *x = v[i].user;
        CHECK(!x->finished);
        switch (v[i].kind) {
        case DELTA_EVENT_PREFILL:
            x->prefill_done = v[i].prefill.done;
            x->prefill_total = v[i].prefill.total;
            break;
        case DELTA_EVENT_TOKEN:
            x->ids[x->n] = v[i].token.id;
            x->logprobs[x->n++] = v[i].token.logprob;
            break;
        case DELTA_EVENT_TEXT:
            memcpy(x->text + x->len, v[i].text.bytes, v[i].text.len);
            x->len += v[i].text.len;
            x->n_added += v[i].text.added_id == TAG;
            break;
        case DELTA_EVENT_FINISHED:
            x->finished = true;
            x->reason = v[i].finished.reason;
            x->stop = v[i].finished.stop;
            x->n_prompt = v[i].finished.n_prompt;
            x->n_cached = v[i].finished.n_cached;
            x->n_generated = v[i].finished.n_generated;
            x->error = v[i].finished.error;
            break;
        }
    }
    return r < 0 ? r : (int)n;
}

static void run(delta_engine *e, delta_session *s)
{
    for (int i = 0; i < 5000 && delta_session_busy(s); i++)
        (void)step(e);
    CHECK(!delta_session_busy(s));
}

static const delta_sampling greedy = { .top_p = 1, .repetition_penalty = 1 };

static delta_session *new_session(delta_engine *e, uint32_t ctx, result *x)
{
    delta_session *s = NULL;
    memset(x, 0, sizeof *x);
    CHECK_EQ(delta_session_new(e, ctx, x, &s, NULL), 0);
    return s;
}

static void append_count(delta_session *s, uint32_t n, uint32_t salt)
{
    uint32_t ids[2000];
    for (uint32_t i = 0; i < n; i++)
        ids[i] = (salt * 31 + i * 7) % 250;
    CHECK_EQ(delta_session_append(s, ids, n, NULL), 0);
}

static void generate(delta_session *s, uint32_t max)
{
    CHECK_EQ(delta_session_generate(s, &greedy, &(delta_stopping){ .max_tokens = max }, NULL), 0);
}

/* The next tokens of a session that has n tokens, as the model is sure of them. */
static void say(uint32_t n, const uint32_t *ids, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        script[n + i] = ids[i];
}
static void say_text(uint32_t n, const char *text)
{
    for (uint32_t i = 0; text[i]; i++)
        script[n + i] = (uint8_t)text[i];
}

/* ---- tests ---- */

TEST(open_reports_the_checkpoint)
{
    delta_engine *e = open_engine(4, 4096, 128);
    const delta_engine_info *i = delta_engine_info_get(e);
    CHECK_STR(i->model_name, "w8a16");
    CHECK_STR(i->backend, "cpu");
    CHECK_EQ(i->n_vocab, VOCAB);
    CHECK_EQ(i->n_tokens, TOKENS);
    CHECK_EQ(i->n_eos_ids, 2);
    CHECK_EQ(i->eos_ids[0], 2014);
    CHECK_EQ(i->eos_ids[1], 2012);
    CHECK_NEAR((double)i->sampling_plain.temperature, 0.6, 1e-6);
    CHECK(i->template_known && strlen(i->template_sha256) == 64);
    CHECK_EQ(i->ctx_max, 4096); /* no longer than all pages */
    delta_engine_free(e);
}

/* The pool of pages where nothing says how large it is to be. */
TEST(the_default_pool_holds_one_long_session_or_all_at_8192)
{
    delta_engine_stats st;
    delta_engine *e = open_engine(0, 0, 64);
    delta_engine_stats_get(e, &st);
    CHECK_EQ(delta_engine_info_get(e)->max_sessions, 16);
    CHECK_EQ(delta_engine_info_get(e)->ctx_max, 32768);
    CHECK_EQ(st.pages_total, 16 * 8192 / 64);
    delta_engine_free(e);
    e = open_engine(1, 0, 64);
    delta_engine_stats_get(e, &st);
    CHECK_EQ(st.pages_total, 32768 / 64);
    delta_engine_free(e);
}

/* What a session of one token says under a budget, told `text` by the model. */
static void say_within(const char *text, uint32_t budget, bool logprobs, result *x)
{
    delta_engine *e = open_engine(2, 4096, 64);
    delta_session *s = new_session(e, 600, x);
    delta_sampling p = greedy;
    p.logprobs = logprobs;
    memset(script, 0, sizeof script);
    say_text(1, text);
    append_count(s, 1, 1);
    const delta_guide g = { .thinking = true, .has_budget = true, .budget_tokens = budget };
    CHECK_EQ(delta_session_guide(s, &g, NULL), 0);
    CHECK_EQ(delta_session_generate(s, &p, &(delta_stopping){ .max_tokens = 60 }, NULL), 0);
    CHECK_EQ(delta_session_guide(s, &g, NULL), DELTA_ESTATE);
    run(e, s);
    x->text[x->len] = '\0';
    CHECK_EQ(x->n, 60);
    delta_session_free(s);
    delta_engine_free(e);
}

TEST(a_budget_closes_reasoning)
{
    static result x, y;
    say_within("let me think about it", 6, false, &x);
    CHECK(strncmp(x.text, "let me\n</think>\n\n", 17) == 0);
    /* The same tokens where each of them wants its log probability, one a step. */
    say_within("let me think about it", 6, true, &y);
    CHECK(memcmp(x.ids, y.ids, sizeof x.ids[0] * 10) == 0);
    CHECK(isfinite(y.logprobs[7]) && isfinite(y.logprobs[8]));
    say_within("let me\nthink about it", 7, false, &x);
    CHECK(strncmp(x.text, "let me\n</think>\n\n", 17) == 0);
    say_within("let me think about it", 0, false, &x);
    CHECK(strncmp(x.text, "\n</think>\n\n", 11) == 0);
    /* Not inside a character. */
    say_within("1234\xc3\xa4", 5, false, &x);
    CHECK(strncmp(x.text, "1234\xc3\xa4\n</think>\n\n", 17) == 0);
    /* Not inside a call; but a mention of the tag is no call. */
    say_within("<tool_call>\n<function=f>\n</function>\n</tool_call> and", 20, false, &x);
    CHECK(strstr(x.text, "</tool_call>\n</think>\n\n") != NULL);
    say_within("<tool_call><tool_call><function=f></function></tool_call>", 30, false, &x);
    CHECK(strstr(x.text, "</tool_call>\n</think>") != NULL);
    say_within("a <tool_call> tag is what I write", 16, false, &x);
    CHECK(strncmp(x.text, "a <tool_call> ta\n</think>\n\n", 27) == 0);
}

TEST(a_budget_ends_with_its_generation)
{
    static result x;
    delta_engine *e = open_engine(2, 4096, 64);
    delta_session *s = new_session(e, 600, &x);
    const delta_guide g = { .thinking = true, .has_budget = true, .budget_tokens = 3 };
    memset(script, 0, sizeof script);
    say_text(1, "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz");
    append_count(s, 1, 1);
    CHECK_EQ(delta_session_guide(s, &g, NULL), 0);
    generate(s, 5); /* ends among the forced tokens */
    run(e, s);
    CHECK_EQ(x.reason, DELTA_FINISH_LENGTH);
    CHECK_EQ(x.n_generated, 5);
    x.finished = false;
    generate(s, 10);
    run(e, s);
    x.text[x.len] = '\0';
    CHECK_STR(x.text, "abc\n</think>fghijklmno");
    /* The model closes in time: nothing is added. */
    result y;
    delta_session *t = new_session(e, 600, &y);
    memset(script, 0, sizeof script);
    say_text(1, "ab");
    script[3] = CLOSE;
    say_text(4, "cdefghijklmno");
    append_count(t, 1, 1);
    CHECK_EQ(delta_session_guide(t, &g, NULL), 0);
    generate(t, 10);
    run(e, t);
    y.text[y.len] = '\0';
    CHECK_STR(y.text, "ab</think>cdefghi");
    delta_session_free(s);
    delta_session_free(t);
    delta_engine_free(e);
}

TEST(open_refuses_options_that_cannot_be)
{
    const struct {
        delta_engine_options o;
        int code;
    } cases[] = {
        { { .model_dir = NULL }, DELTA_EINVALID },
        { { .model_dir = "/nowhere" }, DELTA_ENOTFOUND },
        { { .model_dir = DEMO_MODEL_DIR, .backend = DELTA_BACKEND_CUDA }, DELTA_EUNSUPPORTED },
        { { .model_dir = DEMO_MODEL_DIR, .max_sessions = 1025 }, DELTA_EINVALID },
        { { .model_dir = DEMO_MODEL_DIR, .step_tokens = 63 }, DELTA_EINVALID },
        { { .model_dir = DEMO_MODEL_DIR, .ctx_max = 1u << 30 }, DELTA_EINVALID },
        { { .model_dir = DEMO_MODEL_DIR, .kv_tokens = 1ull << 36 }, DELTA_ENOMEM },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        delta_engine *e = NULL;
        delta_error err = { 0 };
        CHECK_EQ(delta_engine_open(&cases[i].o, &e, &err), cases[i].code);
        CHECK(e == NULL && err.text[0]);
    }
}

TEST(session_new_gives_back_its_pages_when_no_slot_is_left)
{
    delta_engine *e = open_engine(1, 1024, 64);
    result x, y;
    delta_session *a = new_session(e, 100, &x), *b = NULL;
    CHECK_EQ(delta_session_new(e, 100, &y, &b, NULL), DELTA_EBUSY);
    delta_engine_stats st;
    delta_engine_stats_get(e, &st);
    CHECK_EQ(st.pages_used, 2);
    CHECK_EQ(st.sessions_used, 1);
    CHECK_EQ(delta_session_reserve(a, 1025, NULL), DELTA_EINVALID);
    CHECK_EQ(delta_session_reserve(a, 1024, NULL), 0);
    delta_engine_stats_get(e, &st);
    CHECK_EQ(st.pages_used, 16);
    delta_session_free(a);
    delta_engine_stats_get(e, &st);
    CHECK_EQ(st.pages_used + st.sessions_used, 0);
    delta_engine_free(e);
}

/* Sixteen sessions at once, in any order and with any size of step, say what each says alone. */
TEST(sessions_do_not_depend_on_load)
{
    enum { N = 16 };
    static result alone[N], x[N];
    for (int round = 0; round < 5; round++) {
        static const uint32_t steps[] = { 512, 64, 100, 256, 64 };
        delta_engine *e = open_engine(N, 32768, steps[round]);
        delta_session *s[N];
        for (uint32_t k = 0; k < N; k++) {
            const uint32_t i = round % 2 ? N - 1 - k : k;
            delta_sampling p = i % 2 ? greedy : delta_sampling_default(true);
            p.seed = i;
            p.logprobs = true;
            p.presence_penalty = i % 3 == 0 ? 0.5f : 0;
            result *r = round ? &x[i] : &alone[i];
            s[i] = new_session(e, 1200, r);
            append_count(s[i], 1 + i * 61, i);
            for (uint32_t k2 = 0; k2 < 3 && round > 1; k2++)
                (void)step(e); /* the first append is computed, or not, or in part */
            append_count(s[i], 30 + i, i + 1); /* a second append: a cut off 64 */
            CHECK_EQ(delta_session_generate(s[i], &p, &(delta_stopping){ .max_tokens = 20 + i * 2 },
                                            NULL),
                     0);
            for (uint32_t k2 = 0; k2 < i % 5 && round > 2; k2++)
                (void)step(e); /* joins while others run */
            if (round == 0) {
                run(e, s[i]);
                delta_session_free(s[i]);
            }
        }
        for (uint32_t i = 0; i < N && round; i++) {
            run(e, s[i]);
            CHECK(x[i].finished && x[i].reason == alone[i].reason);
            CHECK_EQ(x[i].n, alone[i].n);
            CHECK(memcmp(x[i].ids, alone[i].ids, sizeof x[i].ids) == 0);
            CHECK(memcmp(x[i].logprobs, alone[i].logprobs, sizeof x[i].logprobs) == 0);
            delta_session_free(s[i]);
        }
        delta_engine_stats st;
        delta_engine_stats_get(e, &st);
        CHECK_EQ(st.pages_used + st.sessions_used, 0);
        delta_engine_free(e);
    }
}

TEST(generate_after_a_finished_prefill_needs_no_forward_and_says_the_same)
{
    delta_engine *e = open_engine(2, 4096, 128);
    static result x, y;
    delta_session *a = new_session(e, 400, &x), *b = new_session(e, 400, &y);
    append_count(a, 150, 3);
    run(e, a);
    CHECK_EQ(x.prefill_done, 150);
    CHECK_EQ(x.prefill_total, 150);
    CHECK_EQ(delta_session_computed(a), 150);
    const uint32_t before = n_forwards;
    generate(a, 5);
    (void)step(e);
    CHECK_EQ(n_forwards, before);
    CHECK_EQ(x.n, 1);
    run(e, a);
    append_count(b, 150, 3);
    generate(b, 5);
    run(e, b);
    CHECK_EQ(x.n, 5);
    CHECK(memcmp(x.ids, y.ids, sizeof x.ids) == 0);
    CHECK_EQ(x.reason, DELTA_FINISH_LENGTH);
    CHECK_EQ(delta_session_computed(a), 154); /* the last one waits */
    delta_session_free(a);
    delta_session_free(b);
    delta_engine_free(e);
}

TEST(turns_go_on_where_the_last_ended)
{
    delta_engine *e = open_engine(2, 4096, 128);
    static result x, y;
    delta_session *a = new_session(e, 400, &x);
    append_count(a, 10, 3);
    generate(a, 5);
    run(e, a);
    memset(&x, 0, sizeof x);
    append_count(a, 10, 4);
    run(e, a);
    CHECK(!x.finished);
    CHECK_EQ(x.prefill_total, 10);
    CHECK_EQ(x.prefill_done, 10);
    generate(a, 5);
    run(e, a);
    CHECK_EQ(x.n_prompt, 25);
    CHECK_EQ(x.n_cached, 14); /* the last sampled token was not computed */
    CHECK_EQ(x.n_generated, 5);
    memset(&x, 0, sizeof x);
    generate(a, 3); /* without an append */
    run(e, a);
    CHECK_EQ(x.n, 3);
    size_t n;
    (void)delta_session_tokens(a, &n);
    CHECK_EQ(n, 33);
    (void)y;
    delta_session_free(a);
    delta_engine_free(e);
}

TEST(stop_ids_end_a_turn_and_stay_in_the_timeline_without_text)
{
    delta_engine *e = open_engine(2, 4096, 128);
    static result x;
    delta_session *a = new_session(e, 400, &x);
    append_count(a, 10, 3);
    say(10, (const uint32_t[]){ 'a', 'b', 0xc3, EOS }, 4);
    const uint32_t id = EOS;
    delta_stopping st = { .max_tokens = 50, .ids = &id, .n_ids = 1 };
    CHECK_EQ(delta_session_generate(a, &greedy, &st, NULL), 0);
    run(e, a);
    CHECK_EQ(x.reason, DELTA_FINISH_STOP_ID);
    CHECK_EQ(x.stop, EOS);
    CHECK_EQ(x.n_generated, 4);
    CHECK_MEM(x.text, x.len, "ab\xef\xbf\xbd", 5); /* half a character was left */
    size_t n;
    CHECK_EQ(delta_session_tokens(a, &n)[13], EOS);
    CHECK_EQ(n, 14);
    /* not before min_tokens */
    memset(&x, 0, sizeof x);
    say(14, (const uint32_t[]){ EOS, EOS, EOS }, 3);
    st.min_tokens = 2;
    CHECK_EQ(delta_session_generate(a, &greedy, &st, NULL), 0);
    run(e, a);
    CHECK_EQ(x.n_generated, 3);
    CHECK(x.ids[0] != EOS && x.ids[1] != EOS && x.ids[2] == EOS);
    delta_session_free(a);
    delta_engine_free(e);
}

TEST(stop_strings_cut_the_text_across_tokens)
{
    delta_engine *e = open_engine(2, 4096, 128);
    static result x;
    delta_session *a = new_session(e, 400, &x);
    append_count(a, 10, 3);
    say_text(10, "one\ntwo\n\nthree");
    const delta_stop_string strings[] = { { "zzz", 3 }, { "\n\nt", 3 } };
    delta_stopping st = { .max_tokens = 50, .strings = strings, .n_strings = 2 };
    CHECK_EQ(delta_session_generate(a, &greedy, &st, NULL), 0);
    run(e, a);
    CHECK_EQ(x.reason, DELTA_FINISH_STOP_STRING);
    CHECK_EQ(x.stop, 1);
    CHECK_MEM(x.text, x.len, "one\ntwo", 7);
    CHECK_EQ(x.n, 10);
    /* what is held comes out when the tokens run out */
    memset(&x, 0, sizeof x);
    say_text(20, "x\n\n");
    st.max_tokens = 3;
    CHECK_EQ(delta_session_generate(a, &greedy, &st, NULL), 0);
    run(e, a);
    CHECK_EQ(x.reason, DELTA_FINISH_LENGTH);
    CHECK_MEM(x.text, x.len, "x\n\n", 3);
    delta_session_free(a);
    delta_engine_free(e);
}

TEST(added_tokens_are_pieces_of_their_own)
{
    delta_engine *e = open_engine(2, 4096, 128);
    static result x;
    delta_session *a = new_session(e, 400, &x);
    append_count(a, 10, 3);
    say(10, (const uint32_t[]){ 'a', TAG, 0xc3, TAG, '<', TAG, 'b' }, 7);
    const delta_stop_string string = { "<b", 2 };
    delta_stopping st = { .max_tokens = 7, .strings = &string, .n_strings = 1 };
    CHECK_EQ(delta_session_generate(a, &greedy, &st, NULL), 0);
    run(e, a);
    CHECK_EQ(x.n_added, 3);
    CHECK_MEM(x.text, x.len, "a<tag>\xef\xbf\xbd<tag><<tag>b", 21);
    delta_session_free(a);
    delta_engine_free(e);
}

TEST(cancel_in_a_step_ends_at_its_end_and_keeps_what_was_sampled)
{
    delta_engine *e = open_engine(2, 4096, 128);
    static result x;
    delta_session *a = new_session(e, 400, &x);
    append_count(a, 10, 3);
    generate(a, 50);
    (void)step(e);
    (void)step(e);
    CHECK_EQ(x.n, 2);
    cancel_in_forward = a;
    (void)step(e);
    cancel_in_forward = NULL;
    CHECK(x.finished && x.reason == DELTA_FINISH_CANCELLED);
    CHECK_EQ(x.n, 2);
    CHECK_EQ(x.n_generated, 2);
    size_t n;
    (void)delta_session_tokens(a, &n);
    CHECK_EQ(n, 12);
    /* an idle session ignores it, and goes on as if nothing had been */
    delta_session_cancel(a);
    CHECK_EQ(step(e), 0);
    memset(&x, 0, sizeof x);
    generate(a, 4);
    run(e, a);
    CHECK_EQ(x.n, 4);
    static result y;
    delta_session *b = new_session(e, 400, &y);
    append_count(b, 10, 3);
    generate(b, 6);
    run(e, b);
    CHECK(memcmp(y.ids + 2, x.ids, 4 * sizeof *x.ids) == 0);
    delta_session_free(a);
    delta_session_free(b);
    delta_engine_free(e);
}

TEST(cancelled_prefill_drops_what_is_not_computed)
{
    delta_engine *e = open_engine(2, 4096, 64);
    static result x;
    delta_session *a = new_session(e, 1000, &x);
    append_count(a, 300, 3);
    append_count(a, 300, 3);
    (void)step(e);
    delta_session_cancel(a);
    (void)step(e);
    CHECK(x.finished && x.reason == DELTA_FINISH_CANCELLED && !delta_session_busy(a));
    size_t n;
    (void)delta_session_tokens(a, &n);
    CHECK_EQ(n, 64);
    CHECK_EQ(delta_session_computed(a), 64);
    delta_stopping st = { .max_tokens = 2 };
    CHECK_EQ(delta_session_generate(a, &greedy, &st, NULL), DELTA_ESTATE);
    memset(&x, 0, sizeof x);
    append_count(a, 50, 1);
    generate(a, 2);
    run(e, a);
    CHECK_EQ(x.n, 2);
    CHECK_EQ(x.n_prompt, 114);
    delta_session_free(a);
    delta_engine_free(e);
}

TEST(bad_logits_end_their_session_alone)
{
    delta_engine *e = open_engine(2, 4096, 64);
    static result x, y;
    delta_session *a = new_session(e, 100, &x), *b = new_session(e, 100, &y);
    const uint32_t bad = NAN_TOKEN;
    CHECK_EQ(delta_session_append(a, &bad, 1, NULL), 0);
    append_count(b, 10, 3);
    generate(a, 5);
    generate(b, 5);
    run(e, b);
    CHECK(x.finished && x.reason == DELTA_FINISH_ERROR);
    CHECK_EQ(x.error.code, DELTA_EINTERNAL);
    CHECK_EQ(y.n, 5);
    delta_session_free(a);
    delta_session_free(b);
    delta_engine_free(e);
}

TEST(a_device_fault_is_the_engines_end)
{
    delta_engine *e = open_engine(2, 4096, 64);
    static result x;
    delta_session *a = new_session(e, 100, &x);
    const uint32_t bad = FAULT_TOKEN;
    CHECK_EQ(delta_session_append(a, &bad, 1, NULL), 0);
    CHECK_EQ(step(e), DELTA_EDEVICE);
    CHECK_EQ(step(e), DELTA_EDEVICE);
    delta_session_free(a);
    delta_engine_free(e);
}

TEST(a_paused_session_gets_no_rows_and_loses_nothing)
{
    delta_engine *e = open_engine(2, 4096, 64);
    static result x, y;
    delta_session *a = new_session(e, 100, &x), *b = new_session(e, 100, &y);
    append_count(a, 10, 3);
    generate(a, 10);
    append_count(b, 10, 3);
    generate(b, 10);
    (void)step(e);
    delta_session_pause(a, true);
    (void)step(e);
    CHECK_EQ(n_rows_last, 1);
    run(e, b);
    CHECK_EQ(x.n, 1);
    CHECK_EQ(step(e), 0);
    delta_session_pause(a, false);
    run(e, a);
    CHECK_EQ(x.n, 10);
    CHECK(memcmp(x.ids, y.ids, sizeof x.ids) == 0);
    delta_session_free(a);
    delta_session_free(b);
    delta_engine_free(e);
}

TEST(calls_in_the_wrong_state_or_out_of_range_are_refused)
{
    delta_engine *e = open_engine(2, 4096, 64);
    static result x;
    delta_session *a = NULL;
    CHECK_EQ(delta_session_new(e, 0, &x, &a, NULL), DELTA_EINVALID);
    a = new_session(e, 20, &x);
    delta_stopping st = { .max_tokens = 100 };
    CHECK_EQ(delta_session_generate(a, &greedy, &st, NULL), DELTA_ESTATE);
    uint32_t ids[21] = { 0 };
    CHECK_EQ(delta_session_append(a, ids, 21, NULL), DELTA_ELIMIT);
    ids[3] = VOCAB;
    CHECK_EQ(delta_session_append(a, ids, 10, NULL), DELTA_EINVALID);
    ids[3] = 3;
    CHECK_EQ(delta_session_append(a, ids, 10, NULL), 0);
    CHECK_EQ(delta_session_generate(a, &greedy, &st, NULL), 0);
    CHECK_EQ(delta_session_append(a, ids, 1, NULL), DELTA_ESTATE);
    CHECK_EQ(delta_session_generate(a, &greedy, &st, NULL), DELTA_ESTATE);
    run(e, a); /* the session's room is its end */
    CHECK_EQ(x.reason, DELTA_FINISH_LENGTH);
    CHECK_EQ(x.n, 10);
    CHECK_EQ(delta_session_generate(a, &greedy, &st, NULL), DELTA_ELIMIT);
    delta_session_free(a);
    a = new_session(e, 20, &x);
    append_count(a, 5, 1);
    generate(a, 5);
    (void)step(e);
    delta_session_free(a); /* while it runs */
    CHECK_EQ(step(e), 0);
    delta_engine_free(e);
}
