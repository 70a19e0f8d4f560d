/* random_sessions.h -- random trees of sessions that append, generate, fork, rewind, park, are cancelled and freed. */
#ifndef RANDOM_SESSIONS_H
#define RANDOM_SESSIONS_H

#include "support/engine_steps.h"

#include <dirent.h>
#include <unistd.h>

enum { SESSIONS = 24, SEATS = 6, CTX = 700 };

static const delta_sampling with_logprobs = { .top_p = 1,
                                              .repetition_penalty = 1,
                                              .logprobs = true };

static uint64_t random_state;
static uint32_t rnd(uint32_t n)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 33) % n;
}

static delta_engine *open_tiers(enum delta_backend backend, uint32_t seats, uint64_t kv_tokens,
                                uint32_t checkpoints, uint64_t host_bytes)
{
    const delta_engine_options o = { .model_dir = DEMO_MODEL_DIR,
                                     .backend = backend,
                                     .max_sessions = seats,
                                     .kv_tokens = kv_tokens,
                                     .step_tokens = 128,
                                     .checkpoints = checkpoints,
                                     .cache_host_bytes = host_bytes,
                                     .no_cache = checkpoints == 0 };
    delta_engine *e = NULL;
    delta_error err = { 0 };
    if (delta_engine_open(&o, &e, &err) < 0) {
        printf("# %s\n", err.text);
        exit(1);
    }
    return e;
}

/* ---- the third tier */

static char disk_folder[64];
static uint32_t n_disk_warnings;
static char disk_warning[512]; /* the last */

static void on_disk_note(void *arg, enum delta_note_level level, const char *text)
{
    (void)arg;
    n_disk_warnings += level == DELTA_NOTE_WARNING;
    if (level == DELTA_NOTE_WARNING)
        (void)snprintf(disk_warning, sizeof disk_warning, "%s", text);
}

/* A disk of so many bytes, where everything is idle at once. */
static void open_disk(delta_engine *e, uint64_t max_bytes)
{
    if (!disk_folder[0]) {
        (void)snprintf(disk_folder, sizeof disk_folder, "/tmp/test-cache-XXXXXX");
        CHECK(mkdtemp(disk_folder) != NULL);
    }
    delta_error err = { 0 };
    const int r = delta_cache_open(e,
                                   &(delta_cache_options){ .folder = disk_folder,
                                                           .max_bytes = max_bytes,
                                                           .on_note = on_disk_note },
                                   &err);
    if (r < 0)
        printf("# %s\n", err.text);
    CHECK_EQ(r, 0);
}

/* Calls f with the path of each file of the disk. */
static void each_file(void (*f)(const char *path))
{
    DIR *d = opendir(disk_folder);
    for (struct dirent *x; d && (x = readdir(d));) {
        char path[400];
        (void)snprintf(path, sizeof path, "%s/%s", disk_folder, x->d_name);
        if (x->d_name[0] != '.')
            f(path);
    }
    if (d)
        (void)closedir(d);
}

static void remove_path(const char *path)
{
    (void)unlink(path);
}

static void remove_disk(void)
{
    each_file(remove_path);
    (void)rmdir(disk_folder);
    disk_folder[0] = 0;
}

static void work_disk(delta_engine *e)
{
    uint64_t again;
    CHECK(delta_cache_work(e, &again, NULL) >= 0);
}

/* What the disk has of s. */
static void fetch(delta_engine *e, delta_session *s)
{
    while (delta_session_fetch(s) == 1)
        work_disk(e);
}

typedef struct one {
    delta_session *s;
    uint32_t ids[CTX], n;
    result x;
    bool is_generating;
} one;

static void check_timeline(const one *o)
{
    size_t n = 0;
    const uint32_t *ids = delta_session_tokens(o->s, &n);
    CHECK_EQ(n, o->n);
    CHECK_MEM(ids, n * sizeof *ids, o->ids, o->n * sizeof *ids);
}

/* Takes steps until nothing comes of them or, with `steps`, so many; timelines follow what was said. */
static void work(delta_engine *e, one *all, uint32_t steps)
{
    uint64_t last = ~0ull;
    uint32_t idle = 0; /* steps may compute without a word */
    for (uint32_t i = 0; steps == 0 || i < steps; i++) {
        delta_engine_stats st;
        for (int k = 0; k < SESSIONS; k++) { /* more room, or none at all for now */
            const uint32_t needs = all[k].s ? delta_session_short(all[k].s) : 0;
            if (needs && delta_session_resident(all[k].s) &&
                delta_session_reserve(all[k].s, needs, NULL) < 0)
                delta_session_park(all[k].s);
        }
        const int n = step(e);
        work_disk(e);
        CHECK(n >= 0);
        delta_engine_stats_get(e, &st);
        idle = n == 0 && st.prefill_tokens == last ? idle + 1 : 0;
        if (n < 0 || idle == 20)
            break;
        last = st.prefill_tokens;
    }
    for (int i = 0; i < SESSIONS; i++) {
        one *o = &all[i];
        if (!o->s)
            continue;
        memcpy(o->ids + o->n, o->x.ids, o->x.n * sizeof *o->ids);
        o->n += o->x.n;
        o->x.n = 0;
        if (o->x.finished) {
            o->is_generating = false;
            o->x.finished = false;
            size_t length = 0; /* a cancel drops what was never computed */
            (void)delta_session_tokens(o->s, &length);
            if (o->x.reason == DELTA_FINISH_CANCELLED && length < o->n)
                o->n = (uint32_t)length;
        }
    }
}

/* Random operations on e, seats for six. The token at `at` of a timeline is token(salt, at); every tenth time a timeline is checked:
 * its tokens, and one more against cold(), which gets it with the last token and its logprob said. Ends with all sessions freed. */
static void random_operations(delta_engine *e, uint32_t operations,
                              uint32_t (*token)(uint32_t salt, uint32_t at),
                              void (*cold)(const uint32_t *ids, uint32_t n, float logprob),
                              delta_engine_stats *ret_stats, uint32_t *ret_no_room)
{
    static one all[SESSIONS];
    memset(all, 0, sizeof all);
    const char *seed = getenv("TEST_SEED");
    random_state = seed ? strtoull(seed, NULL, 10) : 4711;
    uint32_t counts[9] = { 0 }, n_busy = 0;
    for (int op = 0; (uint32_t)op < operations; op++) {
        one *o = &all[rnd(SESSIONS)];
        if (!o->s) {
            memset(o, 0, sizeof *o);
            CHECK_EQ(delta_session_new(e, rnd(2), &o->x, &o->s, NULL), 0);
        }
        const uint32_t what = rnd(9);
        const bool is_busy = delta_session_busy(o->s);
        counts[what]++;
        switch (what) {
        case 0:
        case 1: { /* append: often what others have appended, too */
            const uint32_t n = rnd(150), salt = rnd(3);
            if (o->is_generating || o->n + n + 20 > CTX)
                break;
            for (uint32_t i = 0; i < n; i++)
                o->ids[o->n + i] = token(rnd(400) ? salt : rnd(250), o->n + i);
            CHECK_EQ(delta_session_append(o->s, o->ids + o->n, n, NULL), 0);
            o->n += n;
            delta_session_mark(o->s, rnd(o->n + 1));
            break;
        }
        case 2: {                                                  /* say something */
            if (o->is_generating && !delta_session_resident(o->s)) /* it was parked in the middle */
                n_busy += delta_session_reserve(o->s, o->n + 20 > CTX ? CTX : o->n + 20, NULL) < 0;
            if (o->n == 0 || o->is_generating)
                break;
            if (delta_session_fetch(o->s) == 1 && rnd(2))
                break; /* another time, when it is there */
            fetch(e, o->s);
            delta_error err = { 0 };
            const uint32_t most = o->n + 20 > CTX ? CTX : o->n + 20;
            delta_session_set_limit(o->s, most);
            int r = delta_session_reserve(o->s, rnd(2) ? most : o->n, &err);
            if (r == DELTA_EBUSY) {
                n_busy++;
                break;
            }
            CHECK_EQ(r, 0);
            r = delta_session_generate(o->s, &with_logprobs,
                                       &(delta_stopping){ .max_tokens = 1 + rnd(8) }, &err);
            if (r == DELTA_ESTATE || r == DELTA_ELIMIT)
                break; /* cut short before, or full */
            CHECK_EQ(r, 0);
            o->is_generating = true;
            o->x.finished = false;
            break;
        }
        case 3: /* take a few steps, or all */
            work(e, all, rnd(3) ? 1 + rnd(4) : 0);
            break;
        case 4: { /* fork */
            one *to = &all[rnd(SESSIONS)];
            if (to == o || is_busy)
                break;
            delta_session_free(to->s);
            memcpy(to, o, sizeof *to);
            memset(&to->x, 0, sizeof to->x);
            CHECK_EQ(delta_session_fork(o->s, &to->x, &to->s, NULL), 0);
            break;
        }
        case 5: { /* rewind */
            const uint32_t n = rnd(o->n + 1);
            const int r = delta_session_rewind(o->s, n, NULL);
            CHECK(r == 0 || (is_busy && r == DELTA_ESTATE));
            o->n = r == 0 ? n : o->n;
            break;
        }
        case 6:
            if (delta_session_resident(o->s)) {
                delta_session_cancel(o->s);
            } else {
                const delta_event *events;
                size_t n;
                delta_session_abort(o->s, &events, &n);
                note_events(events, n);
            }
            work(e, all, 1);
            break;
        case 7:
            delta_session_park(o->s);
            break;
        case 8:
            if (rnd(3) == 0) {
                delta_session_free(o->s);
                o->s = NULL;
                work(e, all, 1);
            }
            break;
        }
        if (!o->s || op % 10)
            continue;
        work(e, all, 0);
        check_timeline(o);
        if (delta_session_busy(o->s) || o->n == 0 || o->n + 2 > CTX)
            continue;
        /* one more token, from wherever the engine found it best to go on */
        fetch(e, o->s);
        if (delta_session_reserve(o->s, o->n + 1, NULL) < 0)
            continue;
        work(e, all, 0);
        if (delta_session_generate(o->s, &with_logprobs, &(delta_stopping){ .max_tokens = 1 },
                                   NULL) < 0)
            continue;
        const uint32_t n = o->n;
        o->x.finished = false;
        work(e, all, 0);
        CHECK_EQ(o->n, n + 1);
        cold(o->ids, n, o->x.logprobs[0]);
        if (tap_failed) {
            printf("# operation %d\n", op);
            break;
        }
    }
    for (int i = 0; i < 9; i++)
        CHECK(counts[i] > operations / 18);
    delta_engine_stats_get(e, ret_stats);
    printf("# %llu of %llu lookups hit, %llu tokens found, %llu computed, %llu evictions, %llu "
           "moves, %u times no room\n",
           (unsigned long long)ret_stats->cache_hits, (unsigned long long)ret_stats->cache_finds,
           (unsigned long long)ret_stats->cache_tokens,
           (unsigned long long)ret_stats->prefill_tokens,
           (unsigned long long)ret_stats->cache_evictions,
           (unsigned long long)ret_stats->cache_moves, n_busy);
    if (ret_stats->disk_bytes_max)
        printf("# disk: %llu written, %llu read, %llu given up, %u there in %llu bytes\n",
               (unsigned long long)ret_stats->disk_writes,
               (unsigned long long)ret_stats->disk_reads,
               (unsigned long long)ret_stats->disk_evictions, ret_stats->disk_checkpoints,
               (unsigned long long)ret_stats->disk_bytes);
    *ret_no_room = n_busy;
    for (int i = 0; i < SESSIONS; i++)
        delta_session_free(all[i].s);
    delta_engine_stats st;
    do {
        work_disk(e);
        delta_engine_stats_get(e, &st);
    } while (st.disk_is_reading);
    CHECK_EQ(st.sessions_used, 0);
    CHECK_EQ(st.pages_used, 0);
}

#endif
