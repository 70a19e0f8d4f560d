/* plan.c -- see plan.h. */
#include "sched/plan.h"

/* Smaller goes first. */
static int64_t rank(const de_plan_item *i, uint32_t budget)
{
    return (int64_t)i->remaining - (int64_t)i->waited * budget;
}

static bool is_decode(const de_plan_item *i)
{
    return i->decodes || i->remaining == 1;
}

static bool goes_before(const de_plan_item *items, uint32_t a, uint32_t b, uint32_t budget)
{
    const de_plan_item *x = &items[a], *y = &items[b];
    if (is_decode(x) != is_decode(y))
        return is_decode(x);
    if (!is_decode(x) && x->user_rows != y->user_rows)
        return x->user_rows < y->user_rows;
    const int64_t rx = rank(x, budget), ry = rank(y, budget);
    return rx != ry ? rx < ry : a < b;
}

/* Shell sort: at most a thousand entries, no memory of its own. */
static void sort(const de_plan_item *items, uint32_t *order, uint32_t n, uint32_t budget)
{
    static const uint32_t gaps[] = { 701, 301, 132, 57, 23, 10, 4, 1 };
    for (uint32_t g = 0; g < sizeof gaps / sizeof *gaps; g++) {
        const uint32_t gap = gaps[g];
        for (uint32_t i = gap; i < n; i++) {
            const uint32_t v = order[i];
            uint32_t j = i;
            for (; j >= gap && goes_before(items, v, order[j - gap], budget); j -= gap)
                order[j] = order[j - gap];
            order[j] = v;
        }
    }
}

/* The most rows of an item that fit into `left`, cut where it may be cut. */
static uint32_t fit(const de_plan_item *i, uint32_t left, uint32_t cut)
{
    if (i->segment <= left)
        return i->segment;
    const uint64_t end = ((uint64_t)i->start + left) / cut * cut;
    return end > i->start ? (uint32_t)(end - i->start) : 0;
}

/* Rows that decode leaves to a prefill that has waited long. */
static uint32_t kept_for_prefill(const de_plan_item *items, uint32_t n, uint32_t cut)
{
    uint32_t prefill = 0, decode = 0; /* the longest that one has waited */
    for (uint32_t i = 0; i < n; i++) {
        uint32_t *longest = is_decode(&items[i]) ? &decode : &prefill;
        *longest = items[i].waited > *longest ? items[i].waited : *longest;
    }
    return prefill >= DE_PLAN_PATIENCE && decode < DE_PLAN_PATIENCE ? cut : 0;
}

uint32_t de_plan(de_plan_item *items, uint32_t n, uint32_t budget, uint32_t cut, uint32_t *order)
{
    for (uint32_t i = 0; i < n; i++)
        order[i] = i;
    sort(items, order, n, budget);
    const uint32_t kept = kept_for_prefill(items, n, cut);
    uint32_t left = budget, chosen = 0;
    for (uint32_t i = 0; i < n; i++) {
        de_plan_item *item = &items[order[i]];
        const uint32_t not_its = is_decode(item) ? kept : 0;
        item->ret_rows = left > not_its ? fit(item, left - not_its, cut) : 0;
        left -= item->ret_rows;
        if (item->ret_rows)
            order[chosen++] = order[i];
    }
    return chosen;
}

uint32_t de_shares_of(const de_shares *s, uint64_t user)
{
    for (uint32_t i = 0; i < DE_SHARE_USERS; i++)
        if (s->of[i].rows && s->of[i].user == user)
            return s->of[i].rows;
    return 0;
}

void de_shares_add(de_shares *s, uint64_t user, uint32_t rows)
{
    uint32_t at = 0; /* the user's own, else the one with least */
    for (uint32_t i = 0; i < DE_SHARE_USERS; i++) {
        if (s->of[i].rows && s->of[i].user == user) {
            s->of[i].rows += rows;
            return;
        }
        if (s->of[i].rows < s->of[at].rows)
            at = i;
    }
    if (rows < s->of[at].rows)
        return;
    s->of[at].user = user;
    s->of[at].rows = rows;
}

void de_shares_decay(de_shares *s)
{
    for (uint32_t i = 0; i < DE_SHARE_USERS; i++)
        s->of[i].rows -= (s->of[i].rows + DE_SHARE_STEPS - 1) / DE_SHARE_STEPS;
}

void de_pace_note(de_pace *p, uint32_t rows, uint64_t ns)
{
    if (rows < 2)
        return;
    de_pace_point *x = rows <= DE_PACE_FEW ? &p->few : &p->many;
    /* What a step of another size took says little about this one: a prompt alone has had ten times the rows. */
    const bool is_like = x->rows > rows / 2.0 && x->rows < rows * 2.0;
    const double weight = is_like ? 0.5 : 1;
    x->rows += ((double)rows - x->rows) * weight;
    x->ns += ((double)ns - x->ns) * weight;
}

/* Rows that take gap_ns. */
static double rows_in_gap(const de_pace *p)
{
    const de_pace_point *x = p->many.rows > 0 ? &p->many : &p->few;
    double each = x->ns / x->rows, base = 0;
    if (p->many.rows > 0 && p->few.rows > 0) {
        const double seen = (p->many.ns - p->few.ns) / (p->many.rows - p->few.rows);
        /* never steeper than through nothing, and never nearly flat, whatever two steps of bad luck say */
        each = seen < each / 4 ? each / 4 : seen < each ? seen : each;
        base = x->ns - each * x->rows;
    }
    return ((double)p->gap_ns - base) / each;
}

uint32_t de_pace_budget(const de_pace *p, uint32_t n_decode, uint32_t step_tokens, uint32_t cut)
{
    if (n_decode == 0 || p->gap_ns == 0)
        return step_tokens;
    /* Before anything was measured: what costs little more than the decode alone. */
    double rows = p->many.rows > 0 || p->few.rows > 0 ? rows_in_gap(p) : 4.0 * cut;
    rows = rows > 0 ? rows : 0;
    uint64_t n = rows < (double)step_tokens ? (uint64_t)rows / cut * cut : step_tokens;
    n = n < cut ? cut : n;
    n += n_decode;
    return n < step_tokens ? (uint32_t)n : step_tokens;
}
