/* What sessions leave behind and find again: random trees of sessions that append, generate, fork,
 * rewind, park, are cancelled and freed, in pools too small for them, say what each timeline says
 * alone and cold. The model (support/toy_engine.h) looks after the pages itself. */
#include "support/random_sessions.h"
#include "support/toy_engine.h"

#include "base/clock.h"
#include "cache/record.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

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

static void random_tiers(uint64_t host_bytes, uint64_t disk_bytes)
{
    uint32_t no_room = 0;
    delta_engine_stats st;
    toy_ignores_cuts = true;
    memset(script, 0, sizeof script);
    delta_engine *e = open_tiers(DELTA_BACKEND_AUTO, SEATS, 40 * 64, 9, host_bytes);
    if (disk_bytes)
        open_disk(e, disk_bytes);
    random_operations(e, OPERATIONS, toy_token, says_the_same, &st, &no_room);
    CHECK(st.cache_hits > 1000 && st.cache_evictions > 1000 && no_room > 1000);
    CHECK(disk_bytes == 0 || (st.disk_writes > 30 && st.disk_reads > 10 && n_disk_warnings == 0));
    CHECK(st.disk_bytes <= disk_bytes);
    CHECK(host_bytes == 0 ? st.cache_moves == 0 : st.cache_moves > 500);
    CHECK(st.host_pages <= st.host_pages_total && st.host_checkpoints <= st.host_checkpoints_max);
    delta_engine_free(e);
    toy_ignores_cuts = false;
}

TEST(random_operations_say_what_cold_prompts_say)
{
    random_tiers(0, 0);
}

TEST(random_operations_over_two_tiers_too)
{
    random_tiers(100000, 0); /* 10 states and 76 pages */
    random_tiers(20000, 0);
    random_tiers(1000000, 0);
}

TEST(random_operations_over_three_tiers_too)
{
    random_tiers(0, 300000); /* some twenty records */
    remove_disk();
    random_tiers(20000, 1u << 30); /* what every engine wrote before, too */
    random_tiers(0, 100000);
    remove_disk();
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
    fetch(e, s);
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

/* ---- what is on disk */

enum { PROMPTS = 12 };
static uint32_t kept[PROMPTS][600]; /* some begin alike */

static uint32_t kept_length(int i)
{
    return 300 + (uint32_t)i * 20;
}

static void make_prompts(void)
{
    toy_ignores_cuts = true;
    memset(script, 0, sizeof script);
    for (int i = 0; i < PROMPTS; i++) {
        count(kept[i], 600, 1);
        for (uint32_t k = 0; k < 600; k++)
            kept[i][k] =
                k < (uint32_t)(i % 4) * 100 ? kept[0][k] : (kept[i][k] + (uint32_t)i * 17) % 250;
    }
}

static void compute_prompts(delta_engine *e)
{
    for (int i = 0; i < PROMPTS; i++)
        (void)found(e, (uint64_t)i % 2, kept[i], kept_length(i));
}

/* How many of the prompts are there to the end; what they go on with is right (the model looks). */
static int whole_prompts(delta_engine *e)
{
    int n = 0;
    for (int i = 0; i < PROMPTS; i++) {
        const uint32_t len = kept_length(i);
        n += found(e, (uint64_t)i % 2, kept[i], len + 1) == len;
    }
    return n;
}

static uint32_t n_records;
static uint64_t n_bytes;
static char some_path[400];
static void count_file(const char *path)
{
    struct stat st;
    CHECK_EQ(stat(path, &st), 0);
    n_records++;
    n_bytes += (uint64_t)st.st_size;
    if (rnd(3) == 0 || !some_path[0])
        (void)snprintf(some_path, sizeof some_path, "%s", path);
}

/* Are the files what the engine says they are? */
static void check_disk(delta_engine *e)
{
    delta_engine_stats st;
    delta_engine_stats_get(e, &st);
    n_records = 0;
    n_bytes = 0;
    some_path[0] = 0;
    each_file(count_file);
    CHECK_EQ(n_records, st.disk_checkpoints);
    CHECK_EQ(n_bytes, st.disk_bytes);
    CHECK(st.disk_bytes <= st.disk_bytes_max);
}

/* What one engine leaves another finds: all of it, with pages and states that are right, also from the
 * second tier. */
TEST(what_is_kept_survives_the_engine)
{
    make_prompts();
    for (int tiers = 0; tiers < 2; tiers++) {
        delta_engine *e =
            open_tiers(DELTA_BACKEND_AUTO, 2, 120 * 64, tiers ? 4 : 30, tiers ? 400000 : 0);
        delta_engine_stats st;
        n_disk_warnings = 0;
        open_disk(e, 1u << 30);
        compute_prompts(e);
        delta_engine_stats_get(e, &st);
        CHECK(!tiers || st.host_checkpoints > 3);
        delta_cache_flush(e);
        check_disk(e);
        CHECK(n_records >= PROMPTS);
        CHECK_EQ(whole_prompts(e), PROMPTS);
        delta_engine_free(e);

        e = open_with(2, 120 * 64, 40);
        open_disk(e, 1u << 30);
        check_disk(e);
        CHECK_EQ(whole_prompts(e), PROMPTS);
        delta_engine_stats_get(e, &st);
        CHECK_EQ(st.disk_reads, PROMPTS);
        CHECK_EQ(st.pages_used, 0);
        delta_engine_free(e);

        e = open_with(1, 12 * 64, 2); /* nearly all has to be read again and again */
        open_disk(e, 1u << 30);
        CHECK_EQ(whole_prompts(e), PROMPTS);
        CHECK_EQ(whole_prompts(e), PROMPTS);
        delta_engine_free(e);

        e = open_with(2, 120 * 64, 40);
        open_disk(e, 60000); /* less than there is */
        check_disk(e);
        CHECK(n_records > 0 && n_records < PROMPTS);
        const int n = whole_prompts(e);
        CHECK(n > 0 && n < PROMPTS);
        delta_engine_free(e);
        CHECK_EQ(n_disk_warnings, 0);
        remove_disk();
    }
    toy_ignores_cuts = false;
}

TEST(a_session_that_rests_on_the_device_is_on_disk_too)
{
    static result x;
    make_prompts();
    delta_engine *e = open_with(2, 120 * 64, 30);
    open_disk(e, 1u << 30);
    delta_session *s = new_session(e, 400, &x);
    CHECK_EQ(delta_session_append(s, kept[0], 300, NULL), 0);
    run(e, s);
    delta_engine_stats st;
    for (int i = 0; i < 10000; i++) {
        work_disk(e);
        delta_engine_stats_get(e, &st);
        if (st.disk_checkpoints)
            break;
        (void)usleep(1000);
    }
    CHECK_EQ(st.disk_checkpoints, 1);
    delta_session_free(s);
    delta_engine_free(e);
    e = open_with(2, 120 * 64, 30);
    open_disk(e, 1u << 30);
    CHECK_EQ(found(e, 0, kept[0], 301), 300);
    delta_engine_free(e);
    remove_disk();
    toy_ignores_cuts = false;
}

/* A bit, or the end, anywhere: what is wrong is told and not used, the rest is. */
TEST(damage_is_told_and_computed_again)
{
    static uint8_t text[1 << 20];
    make_prompts();
    random_state = 42;
    int whole = 0, told = 0;
    for (int i = 0; i < 150; i++) {
        delta_engine *e = open_with(2, 120 * 64, 30);
        open_disk(e, 1u << 30);
        compute_prompts(e);
        delta_cache_flush(e);
        delta_engine_free(e);
        some_path[0] = 0;
        each_file(count_file);
        REQUIRE(some_path[0]);
        FILE *f = fopen(some_path, "rb");
        REQUIRE(f);
        const size_t len = fread(text, 1, sizeof text, f);
        (void)fclose(f);
        REQUIRE(len > 4096 && len < sizeof text);
        const size_t at = i % 2 ? rnd((uint32_t)len) : rnd(2000);
        text[at] ^= (uint8_t)(1 << rnd(8));
        f = fopen(some_path, "wb");
        REQUIRE(f && fwrite(text, 1, i % 3 ? len : at, f) == (i % 3 ? len : at));
        (void)fclose(f);
        n_disk_warnings = 0;
        e = open_with(2, 120 * 64, 40);
        open_disk(e, 1u << 30);
        const int n = whole_prompts(e);
        CHECK(n == PROMPTS || n_disk_warnings > 0);
        if (n_disk_warnings)
            CHECK(strstr(disk_warning, disk_folder) != NULL);
        whole += n == PROMPTS;
        told += n_disk_warnings > 0;
        delta_engine_free(e);
        remove_disk();
    }
    printf("# %d of 150 told, %d without an effect\n", told, whole);
    CHECK(told > 50);
    toy_ignores_cuts = false;
}

/* Writes and gives up until it is killed. */
static void work_until_killed(uint64_t seed)
{
    random_state = seed;
    delta_engine *e = open_with(2, 120 * 64, 12);
    open_disk(e, 150000);
    for (;;) {
        const int i = (int)rnd(PROMPTS);
        (void)found(e, (uint64_t)i % 2, kept[i], kept_length(i) - rnd(200));
        if (rnd(4) == 0)
            delta_cache_flush(e);
    }
}

static uint32_t n_torn;
static void count_torn(const char *path)
{
    n_torn += strstr(path, "write.new") != NULL;
}

TEST(a_killed_engine_leaves_whole_states)
{
    enum { KILLS = 500 };
    make_prompts();
    uint64_t found_warm = 0, records = 0, seed = de_now_ns();
    printf("# seed %llu\n", (unsigned long long)seed);
    delta_engine *e = open_with(2, 120 * 64, 30);
    open_disk(e, 150000);
    delta_engine_free(e);
    for (int k = 0; k < KILLS; k++) {
        (void)fflush(stdout);
        const pid_t child = fork();
        if (child == 0)
            work_until_killed(seed + (uint64_t)k);
        random_state = seed ^ (uint64_t)k * 977;
        (void)rnd(1);
        (void)usleep(3000 + rnd(30000));
        CHECK_EQ(kill(child, SIGKILL), 0);
        int status = 0;
        CHECK_EQ(waitpid(child, &status, 0), child);
        CHECK(WIFSIGNALED(status));
        each_file(count_torn);
        n_disk_warnings = 0;
        e = open_with(2, 120 * 64, 40);
        open_disk(e, 150000);
        check_disk(e);
        records += n_records;
        for (int i = 0; i < PROMPTS && k % 4 == 0; i++)
            found_warm += found(e, (uint64_t)i % 2, kept[i], kept_length(i)) > 0;
        CHECK_EQ(n_disk_warnings, 0);
        delta_engine_free(e);
        if (tap_failed) {
            printf("# %s\n", disk_warning);
            break;
        }
    }
    printf(
        "# %u of %d kills came while a state was written; %.1f records there, %llu prompts found\n",
        n_torn, KILLS, (double)records / KILLS, (unsigned long long)found_warm);
    CHECK(n_torn > KILLS / 50 && records > KILLS && found_warm > KILLS / 4);
    remove_disk();
    toy_ignores_cuts = false;
}

TEST(a_full_disk_leaves_what_is_there_and_says_so_once)
{
    make_prompts();
    delta_engine *e = open_with(2, 120 * 64, 30);
    open_disk(e, 1u << 30);
    (void)found(e, 0, kept[0], 300);
    delta_cache_flush(e);
    check_disk(e);
    const uint32_t before = n_records;
    (void)signal(SIGXFSZ, SIG_IGN);
    struct rlimit old;
    CHECK_EQ(getrlimit(RLIMIT_FSIZE, &old), 0);
    CHECK_EQ(setrlimit(RLIMIT_FSIZE, &(struct rlimit){ 5000, old.rlim_max }), 0);
    n_disk_warnings = 0;
    compute_prompts(e);
    for (int i = 0; i < 300; i++) {
        work_disk(e);
        (void)usleep(1000);
    }
    CHECK_EQ(n_disk_warnings, 1);
    CHECK(strstr(disk_warning, "File too large; what is there stays") != NULL);
    check_disk(e);
    CHECK_EQ(n_records, before);
    CHECK_EQ(setrlimit(RLIMIT_FSIZE, &old), 0);
    CHECK_EQ(whole_prompts(e), PROMPTS);
    delta_cache_flush(e); /* there is room again */
    check_disk(e);
    CHECK(n_records >= PROMPTS);
    delta_engine_free(e);
    remove_disk();
    delta_engine *f = open_with(2, 4096, 4);
    delta_error err = { 0 };
    CHECK_EQ(delta_cache_open(f, &(delta_cache_options){ .folder = "/nowhere/at/all" }, &err),
             DELTA_EIO);
    delta_engine_free(f);
    toy_ignores_cuts = false;
}

/* ---- saves */

static char save_path[80];
enum { SAVE_TEXT = 5000 };
static char save_text[SAVE_TEXT];

static int save(delta_engine *e, delta_session *s, uint64_t max_bytes, uint32_t *ret_tokens,
                delta_error *err)
{
    uint64_t bytes = 0;
    int r;
    (void)snprintf(save_path, sizeof save_path, "%s.save", disk_folder);
    const delta_save o = { save_path, save_text, SAVE_TEXT, max_bytes };
    while ((r = delta_cache_save(s, &o, err)) == 1)
        work_disk(e);
    if (r < 0)
        return r;
    while ((r = delta_cache_saved(e, &bytes, ret_tokens, err)) == 1)
        work_disk(e);
    return r;
}

static int check(const delta_engine *e, uint32_t *ret_tokens, delta_error *err)
{
    return delta_cache_check(e, save_path, delta_save_state_at(SAVE_TEXT), ret_tokens, err);
}

static int adopt(delta_engine *e, uint64_t owner)
{
    return delta_cache_adopt(e, save_path, delta_save_state_at(SAVE_TEXT), owner, NULL);
}

/* The file with its record changed by f. */
static size_t read_save(uint8_t *to, size_t size)
{
    FILE *f = fopen(save_path, "rb");
    const size_t n = f ? fread(to, 1, size, f) : 0;
    CHECK(f && n > 0 && n < size);
    if (f)
        (void)fclose(f);
    return n;
}

static void write_save(const uint8_t *bytes, size_t n)
{
    FILE *f = fopen(save_path, "wb");
    CHECK(f && fwrite(bytes, 1, n, f) == n);
    if (f)
        (void)fclose(f);
}

TEST(a_save_is_found_by_who_adopts_it_and_says_what_is_wrong)
{
    static result x;
    static uint8_t bytes[1 << 20], other[1 << 20];
    static _Alignas(8) uint8_t meta[1 << 16];
    uint32_t tokens = 0;
    delta_error err = { 0 };
    make_prompts();
    delta_engine *e = open_with(2, 120 * 64, 30);
    open_disk(e, 1u << 30);
    delta_session *s = new_session(e, 400, &x);
    CHECK_EQ(save(e, s, 1u << 30, &tokens, &err), DELTA_ENOTFOUND);
    CHECK_EQ(delta_session_append(s, kept[3], 330, NULL), 0);
    CHECK_EQ(save(e, s, 1u << 30, &tokens, &err), DELTA_ESTATE);
    run(e, s);
    CHECK_EQ(save(e, s, 10000, &tokens, &err), DELTA_ELIMIT);
    CHECK_EQ(save(e, s, 1u << 30, &tokens, &err), 0);
    CHECK_EQ(tokens, 330);
    delta_session_park(s);
    CHECK_EQ(save(e, s, 1u << 30, &tokens, &err), 0);
    CHECK_EQ(tokens, 330);
    delta_session_free(s);
    delta_engine_free(e);
    remove_disk();

    for (int owner = 3; owner < 5; owner++) {
        e = open_with(2, 120 * 64, 30);
        open_disk(e, 20000); /* a save is not of the limit */
        CHECK_EQ(check(e, &tokens, &err), 0);
        CHECK_EQ(tokens, 330);
        CHECK_EQ(adopt(e, (uint64_t)owner), 0);
        CHECK_EQ(adopt(e, (uint64_t)owner), 0);
        CHECK_EQ(found(e, 1, kept[3], 331), 0);
        CHECK_EQ(found(e, (uint64_t)owner, kept[3], 331), 330);
        delta_cache_flush(e);
        check_disk(e);
        delta_engine_free(e);
        remove_disk();
    }

    e = open_with(2, 120 * 64, 30);
    open_disk(e, 1u << 30);
    const size_t n = read_save(bytes, sizeof bytes), at = (size_t)delta_save_state_at(SAVE_TEXT);
    CHECK_MEM(bytes, SAVE_TEXT, save_text, SAVE_TEXT);
    random_state = 3;
    for (int i = 0; i < 200; i++) {
        memcpy(other, bytes, n);
        const size_t where = at + (i % 2 ? rnd((uint32_t)(n - at)) : rnd(1700));
        other[where] ^= 4;
        write_save(other, i % 3 ? n : where);
        const int r = check(e, &tokens, &err);
        CHECK(r == DELTA_EFORMAT || r == 0);
        CHECK(r == 0 || (strstr(err.text, save_path) && strstr(err.text, "offset")));
        if (r < 0 && adopt(e, 9) == 0) /* only what is read is damaged */
            (void)found(e, 9, kept[3], 331);
    }
    CHECK(found(e, 9, kept[3], 332) < 332);

    de_record r;
    memcpy(meta, bytes + at, sizeof meta < n - at ? sizeof meta : n - at);
    CHECK_EQ(de_record_parse(meta, sizeof meta, &r, &err), 0);
    r.head.kind.model ^= 1;
    (void)snprintf(r.head.kind.name, sizeof r.head.kind.name, "another on cpu");
    memcpy(other, bytes, n);
    de_record_write(&r, other + at);
    write_save(other, n);
    CHECK_EQ(check(e, &tokens, &err), DELTA_ESTATE);
    CHECK(strstr(err.text, "is of another on cpu (") && strstr(err.text, " on cpu ("));
    CHECK_EQ(adopt(e, 1), DELTA_ESTATE);
    (void)unlink(save_path);
    CHECK_EQ(check(e, &tokens, &err), DELTA_ENOTFOUND);
    delta_engine_free(e);
    remove_disk();
    toy_ignores_cuts = false;
}

/* Saves one length after the other until it is killed. */
static void save_until_killed(uint32_t k)
{
    static result x;
    delta_engine *e = open_with(2, 120 * 64, 12);
    open_disk(e, 1u << 30);
    delta_session *s = new_session(e, 600, &x);
    for (uint32_t n = 0;; n += 30) {
        uint32_t tokens;
        if (n + 30 > 500) {
            CHECK_EQ(delta_session_rewind(s, 0, NULL), 0);
            CHECK_EQ(delta_session_reserve(s, 600, NULL), 0);
            n = 0;
        }
        CHECK_EQ(delta_session_append(s, kept[k % PROMPTS] + n, 30, NULL), 0);
        run(e, s);
        memset(save_text, (int)n & 127, SAVE_TEXT);
        if (save(e, s, 1u << 30, &tokens, NULL) < 0)
            _exit(1);
    }
}

TEST(a_killed_save_leaves_the_old_one_or_the_new_one)
{
    enum { KILLS = 500 };
    static uint8_t bytes[1 << 20];
    make_prompts();
    uint32_t torn = 0, last = 0, changed = 0;
    uint64_t seed = de_now_ns();
    printf("# seed %llu\n", (unsigned long long)seed);
    delta_engine *e = open_with(2, 120 * 64, 30);
    open_disk(e, 1u << 30);
    (void)snprintf(save_path, sizeof save_path, "%s.save", disk_folder);
    for (uint32_t k = 0; k < KILLS; k++) {
        (void)fflush(stdout);
        const pid_t child = fork();
        if (child == 0)
            save_until_killed(k);
        random_state = seed ^ (uint64_t)k * 977;
        (void)rnd(1);
        (void)usleep(2000 + rnd(20000));
        CHECK_EQ(kill(child, SIGKILL), 0);
        int status = 0;
        CHECK_EQ(waitpid(child, &status, 0), child);
        CHECK(WIFSIGNALED(status));
        char new[90];
        struct stat st;
        (void)snprintf(new, sizeof new, "%s.new", save_path);
        torn += stat(new, &st) == 0;
        if (stat(save_path, &st) < 0)
            continue; /* killed before the first */
        uint32_t tokens = 0;
        delta_error err = { 0 };
        CHECK_EQ(check(e, &tokens, &err), 0);
        (void)read_save(bytes, sizeof bytes);
        CHECK_EQ(bytes[0], (uint8_t)((tokens - 30) & 127)); /* the text is of the same save */
        CHECK_EQ(bytes[SAVE_TEXT - 1], bytes[0]);
        changed += tokens != last;
        last = tokens;
        if (tap_failed)
            break;
    }
    printf("# %u of %d kills came while a save was written, %u found another one than before\n",
           torn, KILLS, changed);
    CHECK(torn > KILLS / 50 && changed > KILLS / 10);
    delta_engine_free(e);
    memset(save_text, 0, sizeof save_text);
    (void)unlink(save_path);
    remove_disk();
    toy_ignores_cuts = false;
}

TEST(a_save_on_a_full_disk_leaves_the_old_one)
{
    static result x;
    uint32_t tokens = 0;
    delta_error err = { 0 };
    make_prompts();
    delta_engine *e = open_with(2, 120 * 64, 30);
    open_disk(e, 1u << 30);
    delta_session *s = new_session(e, 600, &x);
    CHECK_EQ(delta_session_append(s, kept[0], 100, NULL), 0);
    run(e, s);
    CHECK_EQ(save(e, s, 1u << 30, &tokens, &err), 0);
    CHECK_EQ(delta_session_append(s, kept[0] + 100, 200, NULL), 0);
    run(e, s);
    struct rlimit old;
    (void)signal(SIGXFSZ, SIG_IGN);
    CHECK_EQ(getrlimit(RLIMIT_FSIZE, &old), 0);
    CHECK_EQ(setrlimit(RLIMIT_FSIZE, &(struct rlimit){ 15000, old.rlim_max }), 0);
    CHECK_EQ(save(e, s, 1u << 30, &tokens, &err), DELTA_ELIMIT);
    CHECK(strstr(err.text, "File too large"));
    CHECK_EQ(setrlimit(RLIMIT_FSIZE, &old), 0);
    CHECK_EQ(check(e, &tokens, &err), 0);
    CHECK_EQ(tokens, 100);
    CHECK_EQ(save(e, s, 1u << 30, &tokens, &err), 0);
    CHECK_EQ(tokens, 300);
    delta_session_free(s);
    delta_engine_free(e);
    (void)unlink(save_path);
    remove_disk();
    toy_ignores_cuts = false;
}
