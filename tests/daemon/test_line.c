/* test_line.c -- who waits for how long. */
#include "daemon/line.h"
#include "support/tap.h"

enum { LOW = -1, NORMAL, HIGH };
#define SECOND UINT64_C(1000000000)

typedef struct run {
    dd_place place; /* first */
    uint64_t came;
    int priority;
} run;

static uint32_t come(dd_line *l, run *r, uint64_t now, int priority)
{
    *r = (run){ .came = now, .priority = priority };
    r->place.rank = dd_line_rank(now, priority, 0);
    return dd_line_add(l, &r->place);
}

static run *serve(dd_line *l)
{
    run *r = (run *)l->first;
    dd_line_remove(l, &r->place);
    return r;
}

TEST(line_is_first_come_first_served_within_a_priority)
{
    dd_line l = { 0 };
    run r[4];
    for (int i = 0; i < 4; i++)
        CHECK_EQ(come(&l, &r[i], 5, NORMAL), i);
    for (int i = 0; i < 4; i++)
        CHECK(serve(&l) == &r[i]);
    CHECK(!l.first);
}

TEST(line_gives_priority_a_head_start)
{
    dd_line l = { 0 };
    run low, normal, high;
    CHECK(dd_line_is_next(&l, 0));
    (void)come(&l, &low, 0, LOW);
    CHECK_EQ(come(&l, &normal, SECOND, NORMAL), 0);
    CHECK(dd_line_is_next(&l, dd_line_rank(2 * SECOND, HIGH, 0)));
    CHECK(!dd_line_is_next(&l, dd_line_rank(2 * SECOND, NORMAL, 0)));
    CHECK_EQ(come(&l, &high, 2 * SECOND, HIGH), 0);
    CHECK(serve(&l) == &high && serve(&l) == &normal && serve(&l) == &low);
}

TEST(line_forgets_who_is_removed_and_minds_no_stranger)
{
    dd_line l = { 0 };
    run a, b, c, stranger = { 0 };
    (void)come(&l, &a, 1, NORMAL);
    (void)come(&l, &b, 2, NORMAL);
    (void)come(&l, &c, 3, NORMAL);
    dd_line_remove(&l, &b.place);
    dd_line_remove(&l, &stranger.place);
    CHECK(serve(&l) == &a && serve(&l) == &c && !l.first);
}

/* More of high priority than can be served kept all others waiting for ever. */
TEST(line_serves_everybody_while_higher_priorities_keep_coming)
{
    enum { SECONDS = 300, N = 3 * SECONDS };
    static run r[N];
    dd_line l = { 0 };
    uint64_t longest[3] = { 0 };
    unsigned served[3] = { 0 };
    size_t n = 0;
    for (uint64_t s = 0; s < SECONDS; s++) {
        (void)come(&l, &r[n++], s * SECOND, HIGH);
        if (s % 20 == 0)
            (void)come(&l, &r[n++], s * SECOND, LOW);
        if (s % 20 == 10)
            (void)come(&l, &r[n++], s * SECOND, NORMAL);
        run *x = serve(&l); /* one a second: fewer than come */
        uint64_t waited = s * SECOND - x->came;
        longest[x->priority + 1] =
            longest[x->priority + 1] > waited ? longest[x->priority + 1] : waited;
        served[x->priority + 1]++;
    }
    printf("# served %u low, %u normal, %u high; waited %u, %u, %u s at most\n", served[0],
           served[1], served[2], (unsigned)(longest[0] / SECOND), (unsigned)(longest[1] / SECOND),
           (unsigned)(longest[2] / SECOND));
    CHECK(served[0] >= 12 && served[1] >= 12);
    /* The head start, and what the line is longer for all. */
    CHECK(longest[0] <= longest[2] + 2 * DD_LINE_STEP_NS);
    CHECK(longest[1] <= longest[2] + DD_LINE_STEP_NS);
}

/* A day of requests in a second's steps: one user asks for a hundred things at once, again and again;
 * another now and then for one; a third keeps as many waiting as he may. Two are served at a time,
 * each for four seconds: half of what comes, at the worst. */
TEST(line_lets_those_with_little_in_work_go_first)
{
    enum { SECONDS = 20000, SEATS = 2, LENGTH = 4, MOST = 64, USERS = 3 };
    typedef struct job {
        dd_place place;
        uint64_t came, until;
        uint32_t user, n_before;
    } job;
    static job jobs[SECONDS * 4];
    size_t n = 0;
    dd_line l = { 0 };
    job *seats[SEATS] = { NULL };
    uint32_t mine[USERS] = { 0 }, served[USERS] = { 0 }, turned_away = 0, random = 1;
    uint64_t longest[USERS] = { 0 };
    double over = 0;
    for (uint64_t s = 0; s < SECONDS; s++) {
        for (int k = 0; k < SEATS; k++)
            if (seats[k] && seats[k]->until <= s) {
                mine[seats[k]->user]--;
                seats[k] = NULL;
            }
        random = random * 1664525u + 1013904223u;
        const uint32_t wanted[USERS] = { s % 500 == 0 ? 100 : 0, random >> 26 == 0 ? 1 : 0, 3 };
        for (uint32_t user = 0; user < USERS; user++)
            for (uint32_t i = 0; i < wanted[user] && n < sizeof jobs / sizeof *jobs; i++) {
                if (mine[user] == MOST) { /* limits.max_requests_per_uid */
                    turned_away++;
                    continue;
                }
                job *j = &jobs[n++];
                *j = (job){ .came = s, .user = user, .n_before = mine[user]++ };
                j->place.rank = dd_line_rank(s * SECOND, NORMAL, j->n_before);
                (void)dd_line_add(&l, &j->place);
            }
        for (int k = 0; k < SEATS && l.first; k++) {
            if (seats[k])
                continue;
            job *j = (job *)l.first;
            dd_line_remove(&l, &j->place);
            j->until = s + LENGTH;
            seats[k] = j;
            served[j->user]++;
            const uint64_t waited = s - j->came;
            longest[j->user] = longest[j->user] > waited ? longest[j->user] : waited;
            /* those that came later than its step allows cannot have gone before it */
            for (size_t i = n; i-- && jobs[i].came > j->came + (j->n_before + 1) * 10u;)
                over += jobs[i].until != 0 && jobs[i].n_before >= j->n_before && &jobs[i] != j;
        }
    }
    printf("# served %u, %u, %u; waited %u, %u, %u s at most; %u turned away\n", served[0],
           served[1], served[2], (unsigned)longest[0], (unsigned)longest[1], (unsigned)longest[2],
           turned_away);
    CHECK(served[1] > 200);
    CHECK(longest[1] <=
          2 * LENGTH + 10); /* his own one comes next, or behind one of each other user */
    CHECK(longest[0] <= MOST * 10 + 60);
    CHECK(longest[2] <= MOST * 10 + 60);
    CHECK(served[0] > served[2] / 3); /* both ask for all they may */
    CHECK(over == 0);
}
