/* What sessions leave behind and find again: random trees of sessions that append, generate, fork,
 * rewind, park, are cancelled and freed, in pools too small for them, say what each timeline says
 * alone and cold. The model (support/toy_engine.h) looks after the pages itself. */
#include "support/random_sessions.h"
#include "support/toy_engine.h"

enum { OPERATIONS = 100000 };

__attribute__((constructor)) static void slow(void)
{
    tap_timeout_s = 300;
}

static delta_engine *open_with(uint32_t seats, uint64_t kv_tokens, uint32_t checkpoints)
{
    return open_tiers(DELTA_BACKEND_AUTO, seats, kv_tokens, checkpoints, 0);
}

/* What a timeline says next, alone and cold. */
static uint32_t cold_token(const uint32_t *ids, uint32_t n)
{
    static delta_engine *e;
    static result x;
    if (!e)
        e = open_with(1, 1024, 0);
    delta_session *s = new_session(e, n + 1, &x);
    CHECK_EQ(delta_session_append(s, ids, n, NULL), 0);
    generate(s, 1);
    run(e, s);
    delta_session_free(s);
    return x.ids[0];
}

static uint32_t toy_token(uint32_t salt, uint32_t at)
{
    return (salt + at) % 250;
}

/* ids [n + 1]: the last is what was said. */
static void says_the_same(const uint32_t *ids, uint32_t n, float logprob)
{
    (void)logprob;
    CHECK_EQ(ids[n], cold_token(ids, n));
}

static void random_tiers(uint64_t host_bytes)
{
    uint32_t no_room = 0;
    delta_engine_stats st;
    toy_ignores_cuts = true;
    memset(script, 0, sizeof script);
    delta_engine *e = open_tiers(DELTA_BACKEND_AUTO, SEATS, 40 * 64, 9, host_bytes);
    random_operations(e, OPERATIONS, toy_token, says_the_same, &st, &no_room);
    CHECK(st.cache_hits > 1000 && st.cache_evictions > 1000 && no_room > 1000);
    CHECK(host_bytes == 0 ? st.cache_moves == 0 : st.cache_moves > 500);
    CHECK(st.host_pages <= st.host_pages_total && st.host_checkpoints <= st.host_checkpoints_max);
    delta_engine_free(e);
    toy_ignores_cuts = false;
}

TEST(random_operations_say_what_cold_prompts_say)
{
    random_tiers(0);
}

TEST(random_operations_over_two_tiers_too)
{
    random_tiers(100000); /* 10 states and 76 pages */
    random_tiers(20000);
    random_tiers(1000000);
}

/* Tokens that a new session of `owner` finds of ids [n], after which it says one token. */
static uint32_t found(delta_engine *e, uint64_t owner, const uint32_t *ids, uint32_t n)
{
    static result x;
    delta_session *s = NULL;
    uint32_t cached = 0, shared = 0;
    memset(&x, 0, sizeof x);
    CHECK_EQ(delta_session_new(e, owner, &x, &s, NULL), 0);
    CHECK_EQ(delta_session_append(s, ids, n, NULL), 0);
    CHECK_EQ(delta_session_reserve(s, n + 10, NULL), 0);
    generate(s, 1);
    run(e, s);
    CHECK_EQ(x.n, 1);
    CHECK_EQ(x.n_prompt, n);
    CHECK_EQ(x.prefill_done, n);
    CHECK_EQ(x.prefill_total, n);
    delta_session_reuse(s, &cached, &shared);
    CHECK_EQ(x.n_cached, cached);
    CHECK(shared >= cached);
    delta_session_free(s);
    return cached;
}

static void count(uint32_t *ids, uint32_t n, uint32_t salt)
{
    for (uint32_t i = 0; i < n; i++)
        ids[i] = (salt * 31 + i * 7) % 250;
}

TEST(a_prompt_is_found_by_its_owner_at_marks_and_ends)
{
    uint32_t ids[600];
    static result x;
    delta_engine *e = open_with(4, 4096, 20);
    delta_engine_stats st;
    count(ids, 600, 1);
    CHECK_EQ(found(e, 1, ids, 300), 0);
    CHECK_EQ(found(e, 1, ids, 400), 300); /* the end of the first */
    CHECK_EQ(found(e, 2, ids, 300), 0);   /* another owner */
    CHECK_EQ(found(e, DELTA_OWNER_NONE, ids, 400), 0);
    CHECK_EQ(found(e, DELTA_OWNER_NONE, ids, 400), 0);
    ids[350] = 249; /* parts from the others there */
    CHECK_EQ(found(e, 1, ids, 400), 300);
    ids[200] = 249;
    CHECK_EQ(found(e, 1, ids, 400), 0); /* nothing was marked before */

    count(ids, 600, 9);
    delta_session *s = NULL;
    memset(&x, 0, sizeof x);
    CHECK_EQ(delta_session_new(e, 1, &x, &s, NULL), 0);
    CHECK_EQ(delta_session_append(s, ids, 500, NULL), 0);
    delta_session_mark(s, 200);
    delta_session_mark(s, 10000);
    CHECK_EQ(delta_session_reserve(s, 500, NULL), 0);
    const uint32_t forwards = n_forwards;
    run(e, s);
    CHECK_EQ(n_forwards - forwards, 4); /* 128 rows a step, marks or not */
    ids[210] = 249;
    CHECK_EQ(found(e, 1, ids, 400), 192);
    ids[210] = (9 * 31 + 210 * 7) % 250;
    ids[460] = 249;
    CHECK_EQ(found(e, 1, ids, 500), 448);
    delta_session_free(s);
    delta_engine_stats_get(e, &st);
    CHECK_EQ(st.pages_used, 0);
    CHECK(st.pages_cached > 0 && st.checkpoints > 3);
    CHECK_EQ(st.cache_tokens, 300 + 300 + 192 + 448);
    delta_engine_free(e);
}

TEST(a_long_prompt_is_kept_every_4096_tokens)
{
    static uint32_t ids[10000];
    delta_engine *e = open_with(1, 16384, 20);
    count(ids, 10000, 1);
    CHECK_EQ(found(e, 1, ids, 9000), 0);
    ids[8500] = 249;
    CHECK_EQ(found(e, 1, ids, 9000), 8192);
    ids[5000] = 249;
    CHECK_EQ(found(e, 1, ids, 9000), 4096);
    delta_engine_free(e);
}

TEST(forks_share_what_was_computed_and_say_what_one_would)
{
    enum { N = 8 };
    static result x[N + 1], alone;
    uint32_t ids[200];
    delta_engine *e = open_with(N + 1, 40 * 64, 20);
    count(ids, 200, 3);
    delta_session *s[N + 1];
    s[0] = new_session(e, 260, &x[0]);
    CHECK_EQ(delta_session_append(s[0], ids, 200, NULL), 0);
    CHECK_EQ(delta_session_fork(s[0], NULL, &s[1], NULL), DELTA_ESTATE);
    run(e, s[0]);
    delta_engine_stats before, after;
    delta_engine_stats_get(e, &before);
    for (int i = 1; i <= N; i++) {
        memset(&x[i], 0, sizeof x[i]);
        CHECK_EQ(delta_session_fork(s[0], &x[i], &s[i], NULL), 0);
        CHECK_EQ(delta_session_generate(s[i], &greedy, &(delta_stopping){ .max_tokens = 1 }, NULL),
                 DELTA_ESTATE); /* no room yet */
        CHECK_EQ(delta_session_reserve(s[i], 256, NULL), 0);
        generate(s[i], 20);
    }
    const uint32_t forwards = n_forwards;
    for (int i = 1; i <= N; i++)
        run(e, s[i]);
    CHECK_EQ(n_forwards - forwards,
             19); /* all as one batch, the first token from the logits kept */
    delta_engine_stats_get(e, &after);
    CHECK_EQ(after.prefill_tokens, before.prefill_tokens);
    CHECK_EQ(before.pages_used, 5);
    CHECK_EQ(after.pages_used, 5 + N); /* three pages are everybody's, and one each */
    delta_engine *other = open_with(1, 1024, 0);
    delta_session *a = new_session(other, 256, &alone);
    CHECK_EQ(delta_session_append(a, ids, 200, NULL), 0);
    generate(a, 20);
    run(other, a);
    for (int i = 1; i <= N; i++)
        CHECK_MEM(x[i].ids, 20 * sizeof *ids, alone.ids, 20 * sizeof *ids);
    delta_session_free(a);
    delta_engine_free(other);
    for (int i = 0; i <= N; i++)
        delta_session_free(s[i]);
    delta_engine_free(e);
}

TEST(a_session_goes_back_and_another_way)
{
    static result x;
    uint32_t ids[300];
    delta_engine *e = open_with(2, 4096, 20);
    count(ids, 300, 5);
    delta_session *s = new_session(e, 400, &x);
    CHECK_EQ(delta_session_append(s, ids, 200, NULL), 0);
    CHECK_EQ(delta_session_rewind(s, 100, NULL), DELTA_ESTATE);
    delta_session_mark(s, 130);
    run(e, s);
    CHECK_EQ(delta_session_rewind(s, 201, NULL), DELTA_EINVALID);
    CHECK_EQ(delta_session_rewind(s, 150, NULL), 0);
    ids[150] = 249;
    CHECK_EQ(delta_session_append(s, ids + 150, 100, NULL), 0);
    CHECK_EQ(delta_session_reserve(s, 400, NULL), 0);
    CHECK_EQ(delta_session_computed(s), 128);
    generate(s, 3);
    run(e, s);
    CHECK_EQ(x.n_cached, 128);
    CHECK_EQ(x.n_prompt, 250);
    /* what it was before is still known */
    ids[150] = (5 * 31 + 150 * 7) % 250;
    CHECK_EQ(found(e, 0, ids, 201), 200);
    delta_session_free(s);
    delta_engine_free(e);
}

/* A state that gave no numbers is nobody's to go on from, nor are those kept on the way to it. */
TEST(a_bad_state_is_forgotten)
{
    static result x;
    uint32_t ids[200];
    delta_engine *e = open_with(2, 4096, 20);
    count(ids, 200, 6);
    ids[150] = NAN_TOKEN;
    delta_session *s = new_session(e, 300, &x);
    CHECK_EQ(delta_session_append(s, ids, 151, NULL), 0);
    delta_session_mark(s, 128);
    generate(s, 3);
    run(e, s);
    CHECK_EQ(x.reason, DELTA_FINISH_ERROR);
    delta_session_free(s);
    delta_engine_stats st;
    delta_engine_stats_get(e, &st);
    CHECK_EQ(st.checkpoints, 0);
    CHECK_EQ(st.pages_cached, 0);
    delta_engine_free(e);
}

/* The pool is as large as one session: a prompt that is known but for its last token is still taken,
 * although the page it ends in must be there twice. */
TEST(a_hit_that_leaves_no_room_is_no_obstacle)
{
    uint32_t ids[256];
    delta_engine *e = open_with(1, 256, 4);
    count(ids, 256, 7);
    CHECK_EQ(found(e, 1, ids, 245), 0);
    CHECK_EQ(found(e, 1, ids, 246), 0);
    delta_engine_free(e);
}

TEST(the_background_gets_what_nobody_else_wants)
{
    static result x, y;
    delta_engine *e = open_with(2, 4096, 4);
    delta_session *a = new_session(e, 400, &x), *b = new_session(e, 600, &y);
    delta_session_set_background(b, true);
    append_count(a, 20, 1);
    append_count(b, 500, 2);
    generate(a, 10);
    run(e, a);
    CHECK_EQ(delta_session_computed(b), 0);
    memset(&x, 0, sizeof x);
    append_count(a, 300, 3);
    delta_session_pause(a, true); /* its reader is slow */
    CHECK(step(e) > 0);
    CHECK_EQ(delta_session_computed(b), 128);
    delta_session_pause(a, false);
    CHECK(step(e) > 0);
    CHECK_EQ(delta_session_computed(b), 128);
    run(e, a);
    run(e, b);
    CHECK_EQ(delta_session_computed(b), 500);
    delta_session_free(a);
    delta_session_free(b);
    delta_engine_free(e);
}

static uint32_t read_all(delta_engine *e, const char *path, int *ret_last)
{
    delta_cache_reader *r = NULL;
    delta_error err = { 0 };
    uint32_t n = 0;
    *ret_last = delta_cache_open(e, path, &r, &err);
    while (*ret_last == 0 || *ret_last == 1) {
        *ret_last = delta_cache_read(r, &err);
        n += *ret_last == 1;
        if (*ret_last == 0)
            break;
    }
    delta_cache_close(r);
    return n;
}

/* What one engine leaves another finds: all of it, with pages and states that are right (the model
 * looks), also from the second tier; and nothing of a file that is damaged, cut or another's. */
TEST(what_is_kept_survives_the_engine)
{
    enum { PROMPTS = 12 };
    static uint32_t ids[PROMPTS][600];
    static char text[4 << 20];
    char folder[] = "/tmp/test-cache-XXXXXX", path[64];
    uint32_t n = 0;
    int last = 0;
    REQUIRE(mkdtemp(folder) != NULL);
    (void)snprintf(path, sizeof path, "%s/cache", folder);
    toy_ignores_cuts = true;
    memset(script, 0, sizeof script);
    for (int i = 0; i < PROMPTS; i++) {
        count(ids[i], 600, 1);
        for (uint32_t k = 0; k < 600; k++)
            ids[i][k] =
                k < (uint32_t)(i % 4) * 100 ? ids[0][k] : (ids[i][k] + (uint32_t)i * 17) % 250;
    }
    for (int tiers = 0; tiers < 2; tiers++) {
        delta_engine *e = open_tiers(DELTA_BACKEND_AUTO, 2, 120 * 64, tiers ? 4 : 30,
                                     tiers ? 400000 : 0),
                     *f;
        for (int i = 0; i < PROMPTS; i++)
            (void)found(e, (uint64_t)i % 2, ids[i], 300 + (uint32_t)i * 20);
        delta_engine_stats before, after;
        delta_engine_stats_get(e, &before);
        CHECK(before.checkpoints >= PROMPTS);
        CHECK(!tiers || before.host_checkpoints > 3);
        CHECK_EQ(delta_cache_save(e, path, UINT64_MAX, &n, NULL), 0);
        CHECK_EQ(n, before.checkpoints);

        f = open_with(2, 120 * 64, 40);
        CHECK_EQ(read_all(f, path, &last), n);
        CHECK_EQ(last, 0);
        delta_engine_stats_get(f, &after);
        CHECK_EQ(after.checkpoints, n);
        CHECK_EQ(after.pages_used, 0);
        for (int i = 0; i < PROMPTS; i++) {
            const uint32_t len = 300 + (uint32_t)i * 20;
            CHECK_EQ(found(f, (uint64_t)i % 2, ids[i], len + 1), len);
        }
        delta_engine_free(f);

        /* less room: parents first, and no more than there is */
        f = open_with(2, 30 * 64, 5);
        const uint32_t fit = read_all(f, path, &last);
        CHECK(fit > 0 && fit <= 5 + 2 && last == 0);
        delta_engine_stats_get(f, &after);
        CHECK(after.pages_cached <= 30);
        (void)found(f, 0, ids[0], 250);
        delta_engine_free(f);
        CHECK_EQ(delta_cache_save(e, path, 40000, &n, NULL), 0);
        CHECK(n > 0 && n < before.checkpoints);
        CHECK_EQ(delta_cache_save(e, "/nowhere/at/all", 40000, &n, NULL), DELTA_EIO);
        CHECK_EQ(delta_cache_save(e, path, UINT64_MAX, &n, NULL), 0);
        delta_engine_free(e);
    }
    /* damage anywhere: what was before it is taken, nothing that is wrong */
    FILE *file = fopen(path, "rb");
    REQUIRE(file);
    const size_t len = fread(text, 1, sizeof text, file);
    (void)fclose(file);
    REQUIRE(len > 1000 && len < sizeof text);
    random_state = 42;
    for (int i = 0; i < 60; i++) {
        const size_t at = i < 2 ? (size_t)i * 16 : rnd((uint32_t)len), cut = i % 3 ? len : at;
        text[at] ^= 1;
        file = fopen(path, "wb");
        REQUIRE(file && fwrite(text, 1, cut, file) == cut);
        (void)fclose(file);
        text[at] ^= 1;
        delta_engine *f = open_with(2, 120 * 64, 40);
        CHECK(read_all(f, path, &last) <= n);
        CHECK(last == DELTA_EFORMAT ||
              at / 8 == 5); /* the number of records is no part of a hash */
        for (int k = 0; k < PROMPTS; k++)
            (void)found(f, (uint64_t)k % 2, ids[k], 290);
        delta_engine_free(f);
    }
    delta_engine *f = open_with(2, 4096, 4);
    CHECK_EQ(read_all(f, "/nowhere/at/all", &last), 0);
    CHECK_EQ(last, DELTA_ENOTFOUND);
    delta_engine_free(f);
    (void)remove(path);
    (void)remove(folder);
    toy_ignores_cuts = false;
}
