/* test_reuse.c -- what unit/api/test_cache.c asks of the engine, of a real model on a real backend: after random operations on
 * sessions, in pools too small for them and over up to three tiers, a timeline goes on as its tokens would cold. States, pages and marks are
 * copied by the backend here. A cold prompt is computed by prefill alone and cut elsewhere, so numbers are near, not equal.
 *
 * TEST_BACKEND: cpu (default) or cuda; TEST_OPERATIONS: how many. */
#include "support/random_sessions.h"

#include <math.h>

__attribute__((constructor)) static void slow(void)
{
    tap_timeout_s = 600;
}

/* On CUDA numbers are BF16, summed otherwise in decode than in prefill, and random text is what the model is least sure of: where a
 * router's choice hangs on the last bit, a prompt may part from itself. So few may differ by more than the bound, and all in the mean by
 * far less. */
static enum delta_backend backend(void)
{
    const char *name = getenv("TEST_BACKEND");
    return name && strcmp(name, "cuda") == 0 ? DELTA_BACKEND_CUDA : DELTA_BACKEND_CPU;
}

static double largest, sum; /* of differences of logprobs */
static uint32_t n_cold, n_far;

/* Another token may be as likely, but not more so. */
static void is_as_likely(const uint32_t *ids, uint32_t n, float logprob)
{
    static delta_engine *e;
    static result x;
    if (!e)
        e = open_tiers(backend(), 1, 1024, 0, 0);
    delta_session *s = new_session(e, n + 1, &x);
    CHECK_EQ(delta_session_append(s, ids, n, NULL), 0);
    CHECK_EQ(delta_session_generate(s, &with_logprobs, &(delta_stopping){ .max_tokens = 1 }, NULL),
             0);
    run(e, s);
    const double d = fabs((double)x.logprobs[0] - (double)logprob);
    largest = d > largest ? d : largest;
    sum += d;
    n_cold++;
    n_far += d > 0.25;
    CHECK(backend() == DELTA_BACKEND_CUDA ? isfinite(d) : d < 1e-3);
    delta_session_free(s);
}

static uint32_t word(uint32_t salt, uint32_t at)
{
    return 300 + (salt * 97 + at * 31) % 500;
}

TEST(random_operations_say_what_cold_prompts_say)
{
    const char *n = getenv("TEST_OPERATIONS");
    const uint32_t operations = n ? (uint32_t)strtoul(n, NULL, 10) : 1000;
    for (int tiers = 1; tiers <= 3; tiers++) {
        uint32_t no_room = 0;
        delta_engine_stats st;
        delta_engine *e = open_tiers(backend(), SEATS, 40 * 64, 9, tiers == 2 ? 16u << 20 : 0);
        if (tiers == 3)
            open_disk(e, 64u << 20);
        random_operations(e, operations, word, is_as_likely, &st, &no_room);
        CHECK(st.cache_hits > operations / 100 && st.cache_evictions > operations / 100);
        CHECK(tiers != 2 ? st.cache_moves == 0 : st.cache_moves > operations / 200);
        CHECK(tiers != 3 || (st.disk_writes > 10 && st.disk_reads > 0 && n_disk_warnings == 0));
        delta_engine_free(e);
        if (tiers == 3)
            remove_disk();
    }
    printf("# %u cold prompts, logprobs differ by %.1e, at most %.1e; %u by more than 0.25\n",
           n_cold, sum / n_cold, largest, n_far);
    CHECK(sum / n_cold < 0.03 && n_far <= n_cold / 50);
}

/* What comes from the disk has the bits that were kept: a long greedy answer with its logprobs is the same after a restart as it is
 * without one. */
TEST(a_state_from_the_disk_has_the_same_bits)
{
    enum { N = 300, SAID = 40 };
    static uint32_t ids[N + 30];
    static result x[2];
    for (uint32_t i = 0; i < N + 30; i++)
        ids[i] = word(5, i);
    for (int again = 0; again < 2; again++) {
        delta_session *s = NULL;
        delta_engine *e = open_tiers(backend(), 2, 1024, 9, 0);
        open_disk(e, 64u << 20);
        if (!again) {
            static result first;
            delta_session *a = new_session(e, N, &first);
            CHECK_EQ(delta_session_append(a, ids, N, NULL), 0);
            run(e, a);
            delta_session_free(a);
            delta_cache_flush(e);
        }
        CHECK_EQ(delta_session_new(e, 0, &x[again], &s, NULL), 0);
        CHECK_EQ(delta_session_append(s, ids, N + 30, NULL), 0);
        fetch(e, s);
        CHECK_EQ(delta_session_reserve(s, N + 30 + SAID, NULL), 0);
        CHECK_EQ(delta_session_computed(s), N);
        CHECK_EQ(delta_session_generate(s, &with_logprobs,
                                        &(delta_stopping){ .max_tokens = SAID, .ignore_eos = true },
                                        NULL),
                 0);
        run(e, s);
        delta_session_free(s);
        delta_engine_stats st;
        delta_engine_stats_get(e, &st);
        CHECK_EQ(st.disk_reads, again);
        delta_engine_free(e);
    }
    CHECK_EQ(x[0].n, SAID);
    CHECK_MEM(x[1].ids, SAID * sizeof *ids, x[0].ids, SAID * sizeof *ids);
    CHECK_MEM(x[1].logprobs, SAID * sizeof *x[0].logprobs, x[0].logprobs,
              SAID * sizeof *x[0].logprobs);
    remove_disk();
}
