/* test_scheduler.c -- the line and the planner together, on a machine that is a formula.
 *
 * A trace says who comes when with how long a prompt and answer. The simulator does with it what
 * the engine thread and a step do: line.h says who gets a seat, plan.h who gets rows; a step of
 * r rows takes base + r * each. What docs/SCHEDULER.md promises is checked in each step, or at the end. */
#include "daemon/line.h"
#include "sched/plan.h"
#include "support/tap.h"

enum { LOW = -1, NORMAL, HIGH };
enum { CUT = 64, SEATS_MAX = 128, MS = 1000000, JOBS_MAX = 8192 };
#define SECOND UINT64_C(1000000000)

typedef struct arrival {
    uint64_t at_ms;
    uint32_t user;
    int priority;
    uint32_t n_prompt, n_answer;
} arrival;

typedef struct job {
    dd_place place; /* first */
    arrival a;
    uint64_t came_ns, started_ns;
    uint32_t n_before;                    /* runs its user had when it came */
    uint32_t came, started, first, ended; /* steps, from 1 on; 0: not yet */
    uint32_t computed, n, waited;
    uint32_t longest_waited;
} job;

typedef struct world {
    uint32_t n_seats, step_tokens;
    uint64_t base_ns, row_ns;
    uint32_t max_queue, max_of_user; /* as dd_user_limit() and admit() have it */
    de_pace pace;
    de_shares shares;
    dd_line line;
    uint32_t n_waiting;
    job *seats[SEATS_MAX];
    job jobs[JOBS_MAX];
    uint32_t n_jobs, n_turned_away, step;
    uint64_t now_ns;
    uint64_t longest_gap_ns; /* of a step in which somebody decodes */
} world;

static world *new_world(uint32_t n_seats)
{
    world *w = calloc(1, sizeof *w);
    if (!w)
        abort();
    w->n_seats = n_seats;
    w->step_tokens = 512;
    w->base_ns = 5 * MS;
    w->row_ns = MS / 10;
    w->max_queue = w->max_of_user = JOBS_MAX;
    w->pace.gap_ns = 30 * MS;
    w->step = 1;
    return w;
}

static void seat(world *w)
{
    for (uint32_t i = 0; i < w->n_seats && w->line.first; i++) {
        if (w->seats[i])
            continue;
        job *j = (job *)w->line.first;
        dd_line_remove(&w->line, &j->place);
        w->n_waiting--;
        j->started = w->step;
        j->started_ns = w->now_ns;
        w->seats[i] = j;
    }
}

static uint32_t runs_of(const world *w, uint32_t user)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < w->n_seats; i++)
        n += w->seats[i] && w->seats[i]->a.user == user;
    for (const dd_place *p = w->line.first; p; p = p->next)
        n += ((const job *)p)->a.user == user;
    return n;
}

/* NULL: turned away. */
static job *come(world *w, arrival a)
{
    const uint32_t mine = runs_of(w, a.user);
    if (w->n_jobs == JOBS_MAX)
        abort();
    if (mine >= w->max_of_user || w->n_waiting >= w->max_queue) {
        w->n_turned_away++;
        return NULL;
    }
    job *j = &w->jobs[w->n_jobs++];
    *j = (job){ .a = a, .came_ns = w->now_ns, .came = w->step, .n = a.n_prompt, .n_before = mine };
    j->place.rank = dd_line_rank(w->now_ns, a.priority, mine);
    (void)dd_line_add(&w->line, &j->place);
    w->n_waiting++;
    seat(w);
    return j;
}

/* The longest that a step may take in which n_decode rows are decode's: one row of prefill takes at
 * least row_ns, so there are never more of them than fit into the gap, or one cut. */
static uint64_t step_bound_ns(const world *w, uint32_t n_decode)
{
    const uint64_t cut = 4 * CUT * w->row_ns; /* as long as nothing was measured */
    const uint64_t prefill = w->pace.gap_ns > cut ? w->pace.gap_ns : cut;
    return w->base_ns + prefill + n_decode * w->row_ns;
}

static void step(world *w)
{
    de_plan_item items[SEATS_MAX];
    uint32_t order[SEATS_MAX], n = 0, n_decode = 0, rows = 0, prefill = 0;
    job *of[SEATS_MAX];
    for (uint32_t i = 0; i < w->n_seats; i++) {
        job *j = w->seats[i];
        if (!j)
            continue;
        const bool decodes = j->computed >= j->a.n_prompt;
        n_decode += decodes;
        of[n] = j;
        items[n++] = (de_plan_item){ .start = j->computed,
                                     .segment = j->n - j->computed,
                                     .remaining = j->n - j->computed,
                                     .waited = j->waited,
                                     .user_rows = de_shares_of(&w->shares, j->a.user),
                                     .decodes = decodes };
    }
    const uint32_t budget = de_pace_budget(&w->pace, n_decode, w->step_tokens, CUT);
    (void)de_plan(items, n, budget, CUT, order);
    de_shares_decay(&w->shares);
    w->step++;
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t got = items[i].ret_rows;
        job *j = of[i];
        j->waited = got ? 0 : j->waited + 1;
        j->longest_waited = j->waited > j->longest_waited ? j->waited : j->longest_waited;
        rows += got;
        if (items[i].decodes) {
            if (n_decode + CUT <= w->step_tokens)
                CHECK(got == 1); /* a running stream has a row in every step */
        } else if (items[i].remaining > 1) {
            prefill += got;
            CHECK(got == items[i].remaining || (items[i].start + got) % CUT == 0 || got == 0);
            de_shares_add(&w->shares, j->a.user, got);
        }
    }
    CHECK(rows <= w->step_tokens && (n == 0 || rows > 0));
    const uint64_t ns = n ? w->base_ns + rows * w->row_ns : MS;
    if (n_decode) {
        CHECK(ns <= step_bound_ns(w, n_decode));
        w->longest_gap_ns = ns > w->longest_gap_ns ? ns : w->longest_gap_ns;
    }
    de_pace_note(&w->pace, prefill, ns);
    w->now_ns += ns;
    for (uint32_t i = 0; i < n; i++) {
        job *j = of[i];
        j->computed += items[i].ret_rows;
        if (items[i].ret_rows == 0 || j->computed < j->n)
            continue;
        j->first = j->first ? j->first : w->step;
        j->n++; /* a token is drawn */
        if (j->n >= j->a.n_prompt + j->a.n_answer) {
            j->ended = w->step;
            for (uint32_t k = 0; k < w->n_seats; k++)
                if (w->seats[k] == j)
                    w->seats[k] = NULL;
        }
    }
    seat(w);
}

/* Until all that came has ended. */
static void finish(world *w)
{
    for (uint32_t i = 0; i < w->n_jobs; i++)
        while (!w->jobs[i].ended)
            step(w);
}

static void play(world *w, const arrival *a, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        while (w->now_ns < a[i].at_ms * MS)
            step(w);
        (void)come(w, a[i]);
    }
    finish(w);
}

/* Of two who were in line together, who counts as having come earlier goes first; and whoever went
 * first although he came later, came within the bound. Returns how many pairs changed their order. */
static uint32_t check_order(const world *w)
{
    uint32_t n_overtook = 0;
    for (uint32_t i = 0; i < w->n_jobs; i++)
        for (uint32_t k = i + 1; k < w->n_jobs; k++) {
            const job *a = &w->jobs[i], *b = &w->jobs[k]; /* b came later */
            const int64_t step_ns = (int64_t)DD_LINE_STEP_NS,
                          levels = b->a.priority - a->a.priority;
            const int64_t later = (int64_t)(b->came_ns - a->came_ns);
            const int64_t ahead = (levels + a->n_before - b->n_before) * step_ns;
            if (a->started > b->came)
                CHECK(later < ahead ? b->started <= a->started : a->started <= b->started);
            if (b->started < a->started) {
                CHECK(later < (levels + a->n_before) * step_ns);
                n_overtook++;
            }
        }
    return n_overtook;
}

/* An agent's turns, a person who chats, a batch at night; as a server's log has them. */
static const arrival office[] = {
    { 0, 1, NORMAL, 6012, 80 },     { 10, 2, NORMAL, 41, 300 },    { 900, 1, NORMAL, 350, 60 },
    { 1200, 3, LOW, 2900, 200 },    { 1200, 3, LOW, 3100, 200 },   { 1201, 3, LOW, 2750, 200 },
    { 1201, 3, LOW, 64, 200 },      { 1202, 3, LOW, 8000, 200 },   { 1900, 1, NORMAL, 410, 90 },
    { 2500, 2, HIGH, 77, 250 },     { 2600, 4, NORMAL, 128, 1 },   { 2600, 4, NORMAL, 129, 1 },
    { 3300, 1, NORMAL, 1, 120 },    { 3301, 5, HIGH, 65, 20 },     { 6000, 2, NORMAL, 500, 400 },
    { 9000, 1, NORMAL, 12000, 10 }, { 9001, 4, NORMAL, 700, 30 },  { 9500, 2, NORMAL, 33, 64 },
    { 30000, 3, LOW, 5000, 100 },   { 30001, 2, NORMAL, 50, 500 }, { 30500, 1, HIGH, 4000, 40 },
};

TEST(scheduler_keeps_streams_at_their_rate_in_a_day_at_the_office)
{
    for (uint32_t seats = 2; seats <= 16; seats *= 2) {
        world *w = new_world(seats);
        play(w, office, sizeof office / sizeof *office);
        (void)check_order(w);
        printf("# %u seats: %u steps, longest gap %.1f ms\n", seats, w->step,
               (double)w->longest_gap_ns / MS);
        free(w);
    }
}

TEST(scheduler_keeps_its_promises_in_random_traces)
{
    uint32_t n_overtook = 0;
    for (uint32_t seed = 1; seed <= 12; seed++) {
        enum { N = 600 };
        static arrival a[N];
        uint64_t x = seed * 88172645463325252u, at = 0;
        for (int i = 0; i < N; i++) {
            x ^= x << 13, x ^= x >> 7, x ^= x << 17;
            at += x % 16 == 0 ? x >> 50 : x >> 57; /* bursts, and pauses up to 16 s */
            const uint32_t kind = (uint32_t)(x >> 8) % 8;
            a[i] = (arrival){ .at_ms = at,
                              .user = (uint32_t)(x >> 16) % 8 < 5 ? 0 : (uint32_t)(x >> 20) % 6,
                              .priority = (int)((x >> 24) % 8) / 3 - 1,
                              .n_prompt = 1 + (uint32_t)(x >> 32) % (kind == 0 ? 9000 : 400),
                              .n_answer = 1 + (uint32_t)(x >> 44) % 100 };
        }
        world *w = new_world(seed % 3 ? 8 : 24);
        w->max_queue = 64;
        w->max_of_user = 32;
        play(w, a, N);
        const uint32_t n = check_order(w);
        printf("# seed %u: %u turned away, %u pairs changed their order\n", seed, w->n_turned_away,
               n);
        n_overtook += n;
        free(w);
    }
    CHECK(n_overtook > 100); /* or nothing was shown */
}

/* Steps from coming to the first token for one who comes after `many` of another user's, and steps
 * that he was in line. */
static void one_beside(uint32_t many, uint32_t n_seats, uint32_t *ret_first, uint32_t *ret_line)
{
    world *w = new_world(n_seats);
    for (uint32_t i = 0; i < many; i++)
        (void)come(w, (arrival){ .user = 1, .n_prompt = 900, .n_answer = 20 });
    for (int i = 0; i < 40; i++)
        step(w);
    /* longer than theirs: shortest-first alone would not help */
    const job *j = come(w, (arrival){ .user = 2, .n_prompt = 1000, .n_answer = 20 });
    if (!j)
        abort();
    finish(w);
    *ret_first = j->first - j->came;
    *ret_line = j->started - j->came;
    free(w);
}

TEST(scheduler_serves_one_of_a_user_beside_a_hundred_of_another)
{
    /* All at the engine: he has at least every other step's prefill, one cut at the least. */
    static const uint32_t many[] = { 50, 100, 127 };
    for (size_t i = 0; i < sizeof many / sizeof *many; i++) {
        uint32_t first, line;
        one_beside(many[i], SEATS_MAX, &first, &line);
        printf("# beside %u at the engine: first token after %u steps\n", many[i], first);
        CHECK_EQ(line, 0);
        CHECK(first <= 2 * (1000 / CUT + 1));
    }
    /* In line: he is next when one of the four ends, which takes them their prefill (each waits for
     * three others) and their answer. */
    for (size_t i = 0; i < sizeof many / sizeof *many; i++) {
        uint32_t first, line;
        one_beside(many[i], 4, &first, &line);
        printf("# beside %u, four seats: %u steps in line, first token after %u\n", many[i], line,
               first);
        CHECK(line <= 4 * (900 / CUT + 1) + 20);
        CHECK(first <= line + 2 * (1000 / CUT + 1));
    }
}

/* A prompt of n tokens while in every step a short one comes that fills the step: of the same user, of
 * ever new ones. Steps until it is read. */
static uint32_t long_beside_short(uint32_t n, bool same_user, uint32_t *ret_longest)
{
    world *w = new_world(SEATS_MAX);
    const job *j = come(w, (arrival){ .user = 1, .n_prompt = n, .n_answer = 1 });
    for (uint32_t user = 2; !j->ended && w->n_jobs < JOBS_MAX; user++) {
        uint32_t n_now = 0; /* as many seats as there are: the rest is in line */
        for (uint32_t i = 0; i < w->n_seats; i++)
            n_now += w->seats[i] != NULL;
        if (n_now < w->n_seats)
            (void)come(w,
                       (arrival){ .user = same_user ? 1 : user, .n_prompt = 512, .n_answer = 1 });
        step(w);
    }
    CHECK(j->ended);
    const uint32_t steps = j->ended - j->came;
    *ret_longest = j->longest_waited;
    free(w);
    return steps;
}

TEST(scheduler_ends_a_long_prompt_under_an_endless_stream_of_short_ones)
{
    enum { B = 512 };
    static const uint32_t lengths[] = { 1024, 4096, 12000 };
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        const uint32_t n = lengths[i], pieces = (n + B - 1) / B;
        uint32_t waited;
        const uint32_t same = long_beside_short(n, true, &waited);
        printf("# %u tokens beside short ones: %u steps, waited %u at most\n", n, same, waited);
        CHECK(waited <= pieces + 1); /* n / budget, and then it is first */
        CHECK(same <= pieces * (pieces + 2));
        const uint32_t strangers = long_beside_short(n, false, &waited);
        printf("# %u tokens beside ever new users: %u steps, waited %u at most\n", n, strangers,
               waited);
        /* Forgotten, then by age: who was there before has his piece of B rows first. */
        const double bound = DE_SHARE_STEPS * (log(DE_SHARE_STEPS * B) + 1) + 2 * pieces + 2;
        CHECK(waited <= bound);
        CHECK(strangers <= pieces * (bound + 1));
    }
}

TEST(scheduler_lets_priority_go_first_and_nobody_wait_for_ever)
{
    world *w = new_world(1);
    const job *running = come(w, (arrival){ .user = 1, .n_prompt = 64, .n_answer = 50 });
    const job *low = come(w, (arrival){ .user = 2, .priority = LOW, .n_prompt = 9, .n_answer = 9 });
    const job *high = NULL;
    uint32_t n_high = 0;
    for (uint32_t user = 3; !low->started && w->n_jobs < JOBS_MAX; user++) {
        if (w->n_waiting < 3) { /* always more of them than can be served */
            const job *j =
                come(w, (arrival){ .user = user, .priority = HIGH, .n_prompt = 9, .n_answer = 90 });
            high = high ? high : j;
            n_high++;
        }
        step(w);
    }
    REQUIRE(low->started && high);
    printf("# %u of high priority came before one of low had waited %u ms\n", n_high,
           (unsigned)((low->started_ns - low->came_ns) / MS));
    CHECK(high->started > running->started && high->started < low->started);
    CHECK(low->started_ns - low->came_ns >= SECOND); /* priority means something */
    /* two levels, and the two of high priority that came within them and are still in line; one of
     * 99 steps runs */
    CHECK(low->started_ns - low->came_ns <=
          2 * DD_LINE_STEP_NS + 4 * 99 * (w->base_ns + w->step_tokens * w->row_ns));
    finish(w);
    (void)check_order(w);
    free(w);
}

/* More streams than rows: nobody has a row in every step, and nobody waits for long. */
TEST(scheduler_takes_turns_where_streams_and_prefill_do_not_both_fit)
{
    enum { STREAMS = 100, B = 64 };
    world *w = new_world(SEATS_MAX);
    w->step_tokens = B;
    for (uint32_t i = 0; i < STREAMS; i++)
        (void)come(w, (arrival){ .user = 1 + i, .n_prompt = 1, .n_answer = 3000 });
    for (int i = 0; i < 50; i++)
        step(w);
    for (uint32_t i = 0; i < STREAMS; i++)
        w->jobs[i].longest_waited = w->jobs[i].waited;
    job *late = NULL;
    for (uint32_t i = 0; i < SEATS_MAX - STREAMS; i++)
        late = come(w, (arrival){ .user = 200 + i, .n_prompt = 2000, .n_answer = 1 });
    while (!late->ended && w->step < 20000)
        step(w);
    uint32_t longest = 0;
    for (uint32_t i = 0; i < STREAMS; i++)
        longest = w->jobs[i].longest_waited > longest ? w->jobs[i].longest_waited : longest;
    printf("# %u steps; a stream waited %u at most\n", w->step, longest);
    CHECK(late->ended);
    CHECK(longest <= DE_PLAN_PATIENCE + STREAMS / B + 1);
    free(w);
}
