/* Sampling against a sorted reference in double precision, and the generator against the published
 * vectors. */
#include "support/tap.h"

#include "sample/philox.h"
#include "sample/sample.h"

/* Known answers of Random123 (kat_vectors, philox4x32 10). */
TEST(philox_gives_the_published_answers)
{
    static const struct {
        uint32_t counter[4], key[2], want[4];
    } cases[] = {
        { { 0, 0, 0, 0 }, { 0, 0 }, { 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8 } },
        { { 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff },
          { 0xffffffff, 0xffffffff },
          { 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd } },
        { { 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344 },
          { 0xa4093822, 0x299f31d0 },
          { 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1 } },
    };
    for (size_t i = 0; i < 3; i++) {
        uint32_t got[4];
        de_philox4x32_10(cases[i].counter, cases[i].key, got);
        for (int k = 0; k < 4; k++)
            CHECK_EQ(got[k], cases[i].want[k]);
    }
}

static uint64_t state = 1;
static uint32_t random_u32(uint32_t n)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % n;
}

enum { N = 300, TOKENS = 280 };
static const uint32_t holes[] = { 5, 77 };
static const de_vocab_mask mask = {
    .n_vocab = N, .n_tokens = TOKENS, .holes = holes, .n_holes = 2
};

typedef struct ranked {
    double logit;
    uint32_t id;
} ranked;

static int by_rank(const void *a, const void *b)
{
    const ranked *x = a, *y = b;
    if (x->logit != y->logit)
        return x->logit > y->logit ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

/* The set that is left, as flags and weights; adjusted: f32 logits after step 2. */
static void reference(const delta_sampling *p, const float *adjusted, double *weights)
{
    ranked r[N];
    uint32_t n = 0;
    for (uint32_t i = 0; i < N; i++) {
        weights[i] = 0;
        if (adjusted[i] > -INFINITY)
            r[n++] = (ranked){ (double)adjusted[i], i };
    }
    qsort(r, n, sizeof *r, by_rank);
    double w[N], total = 0, sum = 0;
    for (uint32_t i = 0; i < n; i++)
        w[i] = exp((r[i].logit - r[0].logit) / (double)p->temperature);
    uint32_t left = 0;
    while (left < n && w[left] >= (double)p->min_p)
        left++;
    if (p->top_k && p->top_k < left)
        left = p->top_k;
    for (uint32_t i = 0; i < left; i++)
        total += w[i];
    for (uint32_t i = 0; i < left; i++) {
        weights[r[i].id] = w[i];
        sum += w[i];
        if (p->top_p < 1 && sum >= (double)p->top_p * total)
            break;
    }
}

static void fill(float *logits)
{
    const bool coarse = random_u32(2); /* many ties */
    for (uint32_t i = 0; i < N; i++)
        logits[i] = coarse ? (float)random_u32(12) : (float)random_u32(1 << 20) * 0x1p-16f - 8;
    if (random_u32(4) == 0)
        logits[random_u32(N)] = -INFINITY;
}

TEST(sample_draws_what_the_sorted_reference_draws)
{
    de_sample_scratch x;
    REQUIRE(de_sample_scratch_init(&x, N, NULL) == 0);
    for (int round = 0; round < 4000; round++) {
        static const float temperatures[] = { 0.2f, 0.7f, 1, 3, 50 };
        delta_sampling p = delta_sampling_default(true);
        p.temperature = temperatures[random_u32(5)];
        p.top_k = random_u32(3) ? random_u32(40) : 0;
        p.top_p = random_u32(3) ? 0.05f + (float)random_u32(94) * 0.01f : 1;
        p.min_p = random_u32(3) ? 0 : (float)random_u32(30) * 0.01f;
        p.seed = ((uint64_t)random_u32(1u << 31) << 32) | random_u32(1u << 31);
        p.any_id = random_u32(4) == 0;
        float logits[N], adjusted[N];
        fill(logits);
        const uint32_t barred[] = { random_u32(N), random_u32(N) };
        memcpy(adjusted, logits, sizeof logits);
        for (uint32_t i = 0; i < N; i++)
            if ((!p.any_id && (i >= TOKENS || i == 5 || i == 77)) || i == barred[0] ||
                i == barred[1])
                adjusted[i] = -INFINITY;
        double weights[N], total = 0, sum = 0;
        reference(&p, adjusted, weights);
        const uint64_t position = random_u32(1000000);
        for (uint32_t i = 0; i < N; i++)
            total += weights[i];
        const double target = de_philox_uniform(p.seed, position) * total;
        uint32_t want = 0;
        bool close = false; /* the order of a sum decides: nothing to compare */
        for (uint32_t i = 0; i < N; i++) {
            sum += weights[i];
            close |= weights[i] > 0 && fabs(sum - target) < 1e-12 * total;
            if (weights[i] > 0)
                want = i;
            if (sum > target)
                break;
        }
        de_sampler s;
        de_drawn d;
        REQUIRE(de_sampler_start(&s, &p, N, NULL, 0, 1, NULL) == 0);
        CHECK_EQ(de_sample(&s, &(de_choice){ .mask = &mask, .barred = barred, .n_barred = 2 },
                           logits, position, &x, &d, NULL, NULL),
                 0);
        if (!close)
            CHECK_EQ(d.id, want);
        CHECK(weights[d.id] > 0 || close);
        CHECK(isnan(d.logprob));
        de_sampler_done(&s);
    }
    de_sample_scratch_done(&x);
}

/* What a device would give of a row. */
static uint32_t first_in_rank(const float *logits, uint32_t most, de_candidate *ret_first,
                              bool *ret_sound)
{
    uint32_t n = 0;
    *ret_sound = true;
    for (uint32_t i = 0; i < N; i++)
        *ret_sound &= logits[i] < INFINITY;
    for (uint32_t i = 0; i < TOKENS; i++) { /* behind what is as large */
        uint32_t at = n;
        while (at > 0 && logits[i] > ret_first[at - 1].logit)
            at--;
        if (at == most)
            continue;
        n += n < most;
        memmove(ret_first + at + 1, ret_first + at, (n - 1 - at) * sizeof *ret_first);
        ret_first[at] = (de_candidate){ logits[i], i };
    }
    return n;
}

TEST(sample_draws_the_same_from_the_first_in_rank)
{
    de_sample_scratch x;
    REQUIRE(de_sample_scratch_init(&x, N, NULL) == 0);
    uint32_t n_drawn = 0, n_refused = 0;
    for (int round = 0; round < 20000; round++) {
        delta_sampling p = delta_sampling_default(true);
        p.temperature = random_u32(4) ? 0.1f + (float)random_u32(30) * 0.1f : 0;
        p.top_k = random_u32(10) ? 1 + random_u32(40) : 0;
        p.top_p = random_u32(3) ? 0.05f + (float)random_u32(94) * 0.01f : 1;
        p.min_p = random_u32(3) ? 0 : (float)random_u32(30) * 0.01f;
        p.seed = (uint64_t)random_u32(1u << 31);
        p.logprobs = random_u32(20) == 0;
        float logits[N];
        fill(logits);
        if (random_u32(50) == 0)
            logits[random_u32(N)] = random_u32(2) ? NAN : INFINITY;
        if (random_u32(30) == 0) /* fewer than top_k are left */
            for (uint32_t i = 3; i < N; i++)
                logits[i] = -INFINITY;
        const uint32_t barred[] = { random_u32(N), random_u32(N) }, position = random_u32(1000000);
        const de_choice c = { .mask = &mask, .barred = barred, .n_barred = 2 };
        de_candidate first[DE_TOP_LOGITS];
        bool is_sound;
        const uint32_t n = first_in_rank(logits, DE_TOP_LOGITS, first, &is_sound);
        de_sampler s;
        de_drawn want = { 0 }, got = { 0 };
        REQUIRE(de_sampler_start(&s, &p, N, NULL, 0, 1, NULL) == 0);
        const uint32_t ranks = de_sampler_ranks(&s);
        CHECK_EQ(ranks, p.logprobs ? 0 : p.temperature > 0 ? p.top_k : 1);
        if (ranks) {
            const int r = de_sample_ranked(&s, &c, first, n, is_sound, position, &x, &got, NULL);
            CHECK_EQ(de_sample(&s, &c, logits, position, &x, &want, NULL, NULL), r);
            CHECK_EQ(got.id, want.id);
            n_drawn += r == 0;
            n_refused += r < 0;
        }
        de_sampler_done(&s);
    }
    CHECK(n_drawn > 10000 && n_refused > 100);
    de_sample_scratch_done(&x);
}

TEST(sample_frequencies_follow_the_probabilities)
{
    enum { DRAWS = 40000 };
    de_sample_scratch x;
    REQUIRE(de_sample_scratch_init(&x, N, NULL) == 0);
    delta_sampling p = { .temperature = 1, .top_p = 1, .repetition_penalty = 1, .seed = 42 };
    uint32_t count[4] = { 0 };
    for (uint32_t i = 0; i < DRAWS; i++) {
        float logits[N];
        for (uint32_t k = 0; k < N; k++)
            logits[k] = k < 4 ? logf((float)(k + 1)) : -INFINITY;
        de_sampler s;
        de_drawn d;
        REQUIRE(de_sampler_start(&s, &p, N, NULL, 0, 1, NULL) == 0);
        REQUIRE(de_sample(&s, &(de_choice){ .mask = &mask }, logits, i, &x, &d, NULL, NULL) == 0);
        REQUIRE(d.id < 4);
        count[d.id]++;
        de_sampler_done(&s);
    }
    for (uint32_t k = 0; k < 4; k++) /* 5 standard deviations */
        CHECK_NEAR((double)count[k] / DRAWS, (k + 1) / 10.0, 5 * sqrt(0.25 / DRAWS));
    de_sample_scratch_done(&x);
}

TEST(sample_greedy_takes_the_lowest_id_on_a_tie_and_masks_what_is_no_token)
{
    de_sample_scratch x;
    REQUIRE(de_sample_scratch_init(&x, N, NULL) == 0);
    delta_sampling p = { .top_p = 1, .repetition_penalty = 1 };
    float logits[N] = { 0 };
    logits[290] = 9; /* behind the tokenizer */
    logits[5] = 8;   /* a hole */
    logits[40] = logits[30] = logits[200] = 7;
    float copy[N];
    memcpy(copy, logits, sizeof copy);
    de_sampler s;
    de_drawn d;
    REQUIRE(de_sampler_start(&s, &p, N, NULL, 0, 1, NULL) == 0);
    CHECK_EQ(de_sample(&s, &(de_choice){ .mask = &mask }, logits, 0, &x, &d, NULL, NULL), 0);
    CHECK_EQ(d.id, 30);
    s.p.any_id = true;
    CHECK_EQ(de_sample(&s, &(de_choice){ .mask = &mask }, copy, 0, &x, &d, NULL, NULL), 0);
    CHECK_EQ(d.id, 290);
    de_sampler_done(&s);
    de_sample_scratch_done(&x);
}

TEST(sample_penalties_and_bias_are_those_of_the_formula)
{
    de_sample_scratch x;
    REQUIRE(de_sample_scratch_init(&x, N, NULL) == 0);
    const delta_logit_bias bias[] = { { 9, 3 }, { 1, -2 } };
    delta_sampling p = { .top_p = 1,
                         .repetition_penalty = 2,
                         .presence_penalty = 0.5f,
                         .frequency_penalty = 0.25f,
                         .bias = bias,
                         .n_bias = 2 };
    const uint32_t prompt[] = { 1, 2, 2, 9 };
    de_sampler s;
    REQUIRE(de_sampler_start(&s, &p, N, prompt, 4, 8, NULL) == 0);
    for (int round = 0; round < 3; round++) {
        float l[N];
        de_drawn d;
        for (uint32_t i = 0; i < N; i++)
            l[i] = -20;
        l[1] = 6, l[2] = -1, l[3] = 20;
        CHECK_EQ(de_sample(&s, &(de_choice){ .mask = &mask }, l, 0, &x, &d, NULL, NULL), 0);
        CHECK_EQ(d.id, 3);
        CHECK_NEAR(l[1], (6 - 2) / 2.0, 0); /* only in the prompt */
        CHECK_NEAR(l[2], -1 * 2, 0);
        CHECK_NEAR(l[9], (-20 + 3) * 2, 0);
        CHECK_NEAR(l[3], round == 0 ? 20 : 20 / 2.0 - 0.5 - 0.25 * round, 0);
    }
    de_sampler_done(&s);
    de_sample_scratch_done(&x);
}

TEST(sample_log_probabilities_are_of_the_raw_logits)
{
    de_sample_scratch x;
    REQUIRE(de_sample_scratch_init(&x, N, NULL) == 0);
    for (int round = 0; round < 200; round++) {
        const delta_logit_bias bias = { random_u32(TOKENS), 100 };
        delta_sampling p = delta_sampling_default(true);
        p.logprobs = true;
        p.top_logprobs = random_u32(21);
        p.bias = &bias;
        p.n_bias = 1;
        float logits[N], raw[N];
        fill(logits);
        memcpy(raw, logits, sizeof raw);
        ranked r[N];
        double sum = 0;
        for (uint32_t i = 0; i < N; i++) {
            r[i] = (ranked){ (double)raw[i], i };
            sum += exp((double)raw[i]);
        }
        qsort(r, N, sizeof *r, by_rank);
        de_sampler s;
        de_drawn d;
        de_top top[DELTA_MAX_TOP_LOGPROBS];
        REQUIRE(de_sampler_start(&s, &p, N, NULL, 0, 1, NULL) == 0);
        REQUIRE(de_sample(&s, &(de_choice){ .mask = &mask }, logits, 7, &x, &d, top, NULL) == 0);
        if (raw[d.id] > -INFINITY)
            CHECK_NEAR((double)d.logprob, (double)raw[d.id] - log(sum), 1e-5);
        CHECK_EQ(d.n_top, p.top_logprobs);
        for (uint32_t i = 0; i < d.n_top; i++) {
            CHECK_EQ(top[i].id, r[i].id);
            CHECK_NEAR((double)top[i].logprob, r[i].logit - log(sum), 1e-5);
        }
        de_sampler_done(&s);
    }
    de_sample_scratch_done(&x);
}

TEST(sample_refuses_bad_logits_and_an_empty_choice)
{
    de_sample_scratch x;
    REQUIRE(de_sample_scratch_init(&x, N, NULL) == 0);
    delta_sampling p = delta_sampling_default(true);
    de_sampler s;
    de_drawn d;
    REQUIRE(de_sampler_start(&s, &p, N, NULL, 0, 1, NULL) == 0);
    static const float bad[] = { NAN, INFINITY };
    for (uint32_t at = 0; at < N; at += 43)
        for (int k = 0; k < 2; k++) {
            float logits[N] = { 0 };
            logits[at] = bad[k];
            CHECK_EQ(de_sample(&s, &(de_choice){ .mask = &mask }, logits, 0, &x, &d, NULL, NULL),
                     DELTA_EINTERNAL);
        }
    float none[N];
    for (uint32_t i = 0; i < N; i++)
        none[i] = i < TOKENS ? -INFINITY : 1;
    CHECK_EQ(de_sample(&s, &(de_choice){ .mask = &mask }, none, 0, &x, &d, NULL, NULL),
             DELTA_EINTERNAL);
    de_sampler_done(&s);
    de_sample_scratch_done(&x);
}

TEST(sampling_check_names_field_value_and_range)
{
    const struct {
        delta_sampling p;
        const char *text;
    } cases[] = {
#define WITH(...) { .top_p = 1, .repetition_penalty = 1, __VA_ARGS__ }
        { WITH(.temperature = 101), "temperature 101 is not in 0..100" },
        { WITH(.temperature = NAN), "temperature nan is not in 0..100" },
        { WITH(.min_p = -0.5f), "min_p -0.5 is not in 0..1" },
        { WITH(.presence_penalty = 3), "presence_penalty 3 is not in -2..2" },
        { WITH(.frequency_penalty = -3), "frequency_penalty -3 is not in -2..2" },
        { WITH(.top_logprobs = 21), "top_logprobs 21 is not in 0..20" },
        { { .top_p = 0, .repetition_penalty = 1 }, "top_p 0 is not in (0, 1]" },
        { { .top_p = 1 }, "repetition_penalty 0 is not in (0, 10]" },
        { WITH(.n_bias = 1, .bias = &(delta_logit_bias){ 300, 0 }),
          "logit_bias[0]: token 300 is not in 0..299" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        delta_error err = { 0 };
        CHECK_EQ(delta_sampling_check(&cases[i].p, N, &err), DELTA_EINVALID);
        CHECK_STR(err.text, cases[i].text);
    }
    for (int thinking = 0; thinking < 2; thinking++) {
        delta_sampling p = delta_sampling_default(thinking);
        CHECK_EQ(delta_sampling_check(&p, N, NULL), 0);
    }
}

TEST(stopping_check_refuses_what_cannot_be_matched)
{
    delta_stop_string s = { "\x80", 1 };
    const uint32_t id = N;
    delta_stopping bad[] = {
        { .max_tokens = 0 },
        { .max_tokens = 1, .min_tokens = 2 },
        { .max_tokens = 1, .strings = &s, .n_strings = 1 },
        { .max_tokens = 1, .strings = &(delta_stop_string){ "", 0 }, .n_strings = 1 },
        { .max_tokens = 1, .strings = &s, .n_strings = 17 },
        { .max_tokens = 1, .ids = &id, .n_ids = 1 },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK_EQ(delta_stopping_check(&bad[i], N, NULL), DELTA_EINVALID);
    s = (delta_stop_string){ "\xf0\x9f\x98\x80", 4 };
    delta_stopping good = { .max_tokens = 1, .strings = &s, .n_strings = 1 };
    CHECK_EQ(delta_stopping_check(&good, N, NULL), 0);
}
