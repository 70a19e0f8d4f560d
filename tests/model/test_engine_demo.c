/* The engine over the demo model: many sessions give the bits that each gives alone, and all they
 * took comes back. */
#include "support/tap.h"

#include "delta/delta.h"

#include <math.h>

__attribute__((constructor)) static void more_time(void)
{
    tap_timeout_s = 240;
}

enum { N = 16, TOKENS_MAX = 48, PROMPT_MAX = 400 };

typedef struct result {
    uint32_t ids[TOKENS_MAX];
    float logprobs[TOKENS_MAX], top[TOKENS_MAX][3];
    uint32_t n;
    char text[4096];
    size_t len;
    bool finished;
    enum delta_finish reason;
    uint32_t n_prompt;
} result;

static delta_engine *open_engine(uint32_t step_tokens, uint32_t threads)
{
    delta_engine_options o = { .model_dir = DEMO_MODEL_DIR,
                               .max_sessions = N,
                               .kv_tokens = 16384,
                               .ctx_max = 4096,
                               .threads = threads,
                               .step_tokens = step_tokens };
    delta_engine *e = NULL;
    delta_error err = { 0 };
    if (delta_engine_open(&o, &e, &err) < 0) {
        printf("# %s\n", err.text);
        exit(1);
    }
    return e;
}

static void step(delta_engine *e)
{
    const delta_event *v;
    size_t n;
    delta_error err = { 0 };
    if (delta_step(e, &v, &n, &err) < 0) {
        printf("# %s\n", err.text);
        exit(1);
    }
    for (size_t i = 0; i < n; i++) {
        result *x = v[i].user;
        if (v[i].kind == DELTA_EVENT_TOKEN && x->n < TOKENS_MAX) {
            x->ids[x->n] = v[i].token.id;
            for (uint32_t k = 0; k < v[i].token.n_top && k < 3; k++)
                x->top[x->n][k] = v[i].token.top[k].logprob;
            x->logprobs[x->n++] = v[i].token.logprob;
        } else if (v[i].kind == DELTA_EVENT_TEXT && x->len + v[i].text.len < sizeof x->text) {
            memcpy(x->text + x->len, v[i].text.bytes, v[i].text.len);
            x->len += v[i].text.len;
        } else if (v[i].kind == DELTA_EVENT_FINISHED) {
            x->finished = true;
            x->reason = v[i].finished.reason;
            x->n_prompt = v[i].finished.n_prompt;
        }
    }
}

static void run(delta_engine *e, delta_session *s)
{
    while (delta_session_busy(s))
        step(e);
}

/* Ordinary ids, without those at the vocabulary's ends. */
static uint32_t prompt(uint32_t which, uint32_t *ids)
{
    const uint32_t n = 1 + which * 23 % PROMPT_MAX + (which == 7 ? 64 : 0);
    uint64_t x = which + 1;
    for (uint32_t i = 0; i < n; i++) {
        x = x * 6364136223846793005u + 1442695040888963407u;
        ids[i] = 100 + (uint32_t)(x >> 33) % 1500;
    }
    return n;
}

static delta_session *begin_with(delta_engine *e, uint32_t which, bool logprobs, result *x)
{
    uint32_t ids[PROMPT_MAX + 64];
    delta_session *s = NULL;
    const uint32_t n = prompt(which, ids);
    delta_sampling p = delta_sampling_default(which % 4 == 3);
    p.temperature = which % 2 ? 0 : p.temperature;
    p.seed = 1000 + which;
    p.logprobs = logprobs;
    p.top_logprobs = logprobs ? 3 : 0;
    p.repetition_penalty = which % 3 ? 1 : 1.2f;
    memset(x, 0, sizeof *x);
    CHECK_EQ(delta_session_new(e, 0, x, &s, NULL), 0);
    CHECK_EQ(delta_session_reserve(s, n + 100, NULL), 0);
    CHECK_EQ(delta_session_append(s, ids, n, NULL), 0);
    const delta_stopping st = { .max_tokens = 12 + which, .ignore_eos = which % 2 };
    CHECK_EQ(delta_session_generate(s, &p, &st, NULL), 0);
    return s;
}

static delta_session *begin(delta_engine *e, uint32_t which, result *x)
{
    return begin_with(e, which, true, x);
}

static void check_same(const result *a, const result *b)
{
    CHECK(a->finished && b->finished);
    CHECK_EQ(a->n, b->n);
    CHECK_EQ(a->reason, b->reason);
    CHECK(memcmp(a->ids, b->ids, sizeof a->ids) == 0);
    CHECK(memcmp(a->logprobs, b->logprobs, sizeof a->logprobs) == 0);
    CHECK(memcmp(a->top, b->top, sizeof a->top) == 0);
    CHECK_MEM(a->text, a->len, b->text, b->len);
}

static void check_all_came_back(const delta_engine *e)
{
    delta_engine_stats st;
    delta_engine_stats_get(e, &st);
    CHECK_EQ(st.pages_used, 0);
    CHECK_EQ(st.sessions_used, 0);
}

TEST(sixteen_sessions_at_once_give_the_bits_of_each_alone)
{
    static result alone[N], x[N];
    delta_session *s[N];
    delta_engine *e = open_engine(512, 0);
    for (uint32_t i = 0; i < N; i++) {
        s[i] = begin(e, i, &alone[i]);
        run(e, s[i]);
        delta_session_free(s[i]);
        CHECK(alone[i].n > 0);
    }
    check_all_came_back(e);
    for (int round = 0; round < 4; round++) {
        static const uint32_t steps[] = { 512, 64, 200, 1024 };
        if (round) {
            delta_engine_free(e);
            e = open_engine(steps[round], 1 + (uint32_t)round % 2);
        }
        for (uint32_t k = 0; k < N; k++) {
            const uint32_t i = round % 2 ? N - 1 - k : (k * 5 + (uint32_t)round) % N;
            s[i] = begin(e, i, &x[i]);
            if (round == 3)
                step(e); /* each joins while the others run */
        }
        for (uint32_t i = 0; i < N; i++) {
            run(e, s[i]);
            check_same(&x[i], &alone[i]);
            delta_session_free(s[i]);
        }
        check_all_came_back(e);
    }
    delta_engine_free(e);
}

/* Without log probabilities a device gives the first few in rank alone. */
TEST(log_probabilities_change_no_draw)
{
    static result with[N], without[N];
    uint32_t n = 0;
    for (int pass = 0; pass < 2; pass++) {
        delta_engine *e = open_engine(512, 0);
        delta_session *s[N];
        for (uint32_t i = 0; i < N; i++)
            s[i] = begin_with(e, i, pass == 0, pass == 0 ? &with[i] : &without[i]);
        for (uint32_t i = 0; i < N; i++)
            run(e, s[i]);
        for (uint32_t i = 0; i < N; i++)
            delta_session_free(s[i]);
        delta_engine_free(e);
    }
    for (uint32_t i = 0; i < N; i++) {
        CHECK(with[i].n > 0 && with[i].n == without[i].n);
        CHECK(memcmp(with[i].ids, without[i].ids, sizeof with[i].ids) == 0);
        CHECK_MEM(with[i].text, with[i].len, without[i].text, without[i].len);
        CHECK(isnan(without[i].logprobs[0]) && !isnan(with[i].logprobs[0]));
        n += with[i].n;
    }
    CHECK(n > 100);
}

TEST(turns_of_a_session_say_what_one_cold_prompt_says)
{
    static result x, cold;
    const delta_sampling greedy = { .top_p = 1, .repetition_penalty = 1 };
    const delta_stopping st = { .max_tokens = 10, .ignore_eos = true };
    delta_engine *e = open_engine(256, 0);
    delta_session *a = NULL, *b = NULL;
    CHECK_EQ(delta_session_new(e, 0, &x, &a, NULL), 0);
    CHECK_EQ(delta_session_reserve(a, 2000, NULL), 0);
    for (uint32_t turn = 0; turn < 4; turn++) {
        uint32_t ids[PROMPT_MAX + 64];
        const uint32_t n = prompt(turn * 3 + 2, ids);
        CHECK_EQ(delta_session_append(a, ids, n, NULL), 0);
        if (turn % 2)
            run(e, a); /* prefill now, generate later */
        size_t len;
        const uint32_t *timeline = delta_session_tokens(a, &len);
        CHECK_EQ(delta_session_new(e, 0, &cold, &b, NULL), 0);
        CHECK_EQ(delta_session_reserve(b, 2000, NULL), 0);
        CHECK_EQ(delta_session_append(b, timeline, len, NULL), 0);
        memset(&x, 0, sizeof x);
        memset(&cold, 0, sizeof cold);
        CHECK_EQ(delta_session_generate(a, &greedy, &st, NULL), 0);
        CHECK_EQ(delta_session_generate(b, &greedy, &st, NULL), 0);
        run(e, a);
        run(e, b);
        CHECK_EQ(x.n, 10);
        CHECK_EQ(x.n_prompt, len);
        CHECK(memcmp(x.ids, cold.ids, sizeof x.ids) == 0);
        delta_session_free(b);
    }
    delta_session_free(a);
    check_all_came_back(e);
    delta_engine_free(e);
}

TEST(a_cancelled_session_leaves_the_others_as_they_were)
{
    static result alone, x[3];
    delta_engine *e = open_engine(64, 0);
    delta_session *s = begin(e, 5, &alone);
    run(e, s);
    delta_session_free(s);
    delta_session *t[3];
    for (uint32_t i = 0; i < 3; i++)
        t[i] = begin(e, 5 + i, &x[i]);
    for (int i = 0; i < 6; i++)
        step(e);
    delta_session_cancel(t[1]);
    step(e);
    CHECK(x[1].finished && x[1].reason == DELTA_FINISH_CANCELLED);
    delta_session_free(t[1]);
    delta_session_free(t[2]); /* while it runs */
    run(e, t[0]);
    check_same(&x[0], &alone);
    delta_session_free(t[0]);
    check_all_came_back(e);
    delta_engine_free(e);
}

/* A stop string out of the middle of what the model says ends it there. */
TEST(a_stop_string_ends_the_text_before_it)
{
    static result free_run, x;
    const delta_sampling greedy = { .top_p = 1, .repetition_penalty = 1 };
    delta_engine *e = open_engine(256, 0);
    uint32_t *ids = NULL;
    size_t n;
    static const char text[] = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
                               "<|im_start|>assistant\n<think>\n";
    REQUIRE(delta_tokenize(delta_engine_tokenizer(e), text, sizeof text - 1, false, &ids, &n,
                           NULL) == 0);
    for (int round = 0; round < 2; round++) {
        delta_session *s = NULL;
        result *r = round ? &x : &free_run;
        char stop[6] = "";
        REQUIRE(delta_session_new(e, 0, r, &s, NULL) == 0 &&
                delta_session_reserve(s, (uint32_t)n + 100, NULL) == 0);
        CHECK_EQ(delta_session_append(s, ids, n, NULL), 0);
        REQUIRE(round == 0 || free_run.len > 12);
        memcpy(stop, free_run.text + 6, 5);
        const delta_stop_string string = { stop, 5 };
        const delta_stopping st = { .max_tokens = TOKENS_MAX,
                                    .strings = &string,
                                    .n_strings = round ? 1 : 0 };
        CHECK_EQ(delta_session_generate(s, &greedy, &st, NULL), 0);
        run(e, s);
        delta_session_free(s);
        if (round == 0)
            continue;
        const char *at = strstr(free_run.text, stop);
        CHECK_EQ(x.reason, DELTA_FINISH_STOP_STRING);
        CHECK_MEM(x.text, x.len, free_run.text, (size_t)(at - free_run.text));
    }
    free(ids);
    delta_engine_free(e);
}
