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
    r->place.rank = dd_line_rank(now, priority);
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
    CHECK(dd_line_is_next(&l, dd_line_rank(2 * SECOND, HIGH)));
    CHECK(!dd_line_is_next(&l, dd_line_rank(2 * SECOND, NORMAL)));
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
    CHECK(longest[0] <= longest[2] + 2 * DD_LINE_HEAD_START_NS);
    CHECK(longest[1] <= longest[2] + DD_LINE_HEAD_START_NS);
}
