/* The prefix tree: what it finds is there, whole, the longest, and nobody else's; what it holds goes
 * back. Pages and slots are tables here that say which prefix they hold the end of. */
#include "support/tap.h"

#include "cache/prefix.h"

enum { PAGE = 4, PAGES = 200, SLOTS = 40, LEN = 60, SESSIONS = 6, STEPS = 60000 };

typedef struct world {
    de_kv_pages kv;
    de_gdn_slots slots;
    de_prefix tree;
    uint64_t in_page[PAGES][PAGE]; /* hash of the prefix that the token there ends */
    uint64_t in_slot[SLOTS];
} world;

typedef struct timeline {
    uint64_t owner;
    uint32_t ids[LEN], pages[LEN / PAGE], n, n_pages, slot;
} timeline;

static uint64_t random_state = 1;
static uint32_t rnd(uint32_t n)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 33) % n;
}

static uint64_t hash(uint64_t owner, const uint32_t *ids, uint32_t n)
{
    uint64_t h = owner * 1000003 + 7;
    for (uint32_t i = 0; i < n; i++)
        h = (h ^ ids[i]) * 1099511628211u + 1;
    return h;
}

static bool setup(world *w)
{
    memset(w, 0, sizeof *w);
    bool ok = de_kv_pages_init(&w->kv, PAGES, NULL) == 0 &&
              de_gdn_slots_init(&w->slots, SLOTS, NULL) == 0;
    de_prefix_init(&w->tree, &w->kv, &w->slots, NULL, PAGE, 100, 10);
    return ok;
}

static void teardown(world *w)
{
    de_prefix_done(&w->tree);
    CHECK_EQ(w->slots.n_free, SLOTS);
    CHECK_EQ(w->kv.n_free, PAGES);
    CHECK_EQ(w->kv.n_idle, 0);
    CHECK_EQ(w->tree.stats.nodes, 0);
    CHECK_EQ(w->tree.stats.tokens, 0);
    de_gdn_slots_done(&w->slots);
    de_kv_pages_done(&w->kv);
}

static uint32_t slot_for(world *w)
{
    uint32_t slot = 0;
    while (de_gdn_slots_take(&w->slots, &slot, NULL) < 0)
        if (!de_prefix_evict(&w->tree, false))
            TAP_FAIL("no slot can be had");
    return slot;
}

static bool pages_for(world *w, uint32_t n, uint32_t *to)
{
    while (de_kv_pages_take(&w->kv, n, to, NULL) < 0)
        if (!de_prefix_evict(&w->tree, true))
            return false;
    return true;
}

/* What a session does that goes on from the tree; false: no room. */
static bool begin(world *w, timeline *t, const uint32_t *ids, uint32_t n)
{
    uint32_t shared = 0, most = 0;
    de_prefix_node *x = de_prefix_find(&w->tree, t->owner, ids, n, n ? n - 1 : 0, &shared);
    for (uint32_t k = 1; k < n; k++)
        if (de_prefix_has(&w->tree, t->owner, ids, k))
            most = k;
    CHECK_EQ(x ? x->end : 0, most);
    CHECK(shared >= most && shared <= n);
    const uint32_t at = x ? x->end : 0, whole = at / PAGE, total = LEN / PAGE;
    uint32_t had[LEN / PAGE];
    if (x) {
        CHECK_EQ(w->in_slot[x->slot], hash(t->owner, ids, at));
        de_prefix_pages(&w->tree, x, had);
        for (uint32_t i = 0; i < at; i++)
            CHECK_EQ(w->in_page[had[i / PAGE]][i % PAGE], hash(t->owner, ids, i + 1));
        x->pins++;
    }
    const bool ok = pages_for(w, total - whole, t->pages + whole);
    if (ok) {
        t->slot = slot_for(w);
        memcpy(t->pages, had, whole * sizeof *had);
        de_kv_pages_share(&w->kv, had, whole);
        if (at % PAGE)
            memcpy(w->in_page[t->pages[whole]], w->in_page[had[whole]], sizeof *w->in_page);
        memcpy(t->ids, ids, at * sizeof *ids);
        t->n = at;
        t->n_pages = total;
    }
    if (x)
        x->pins--;
    return ok;
}

static void put(world *w, timeline *t, uint32_t id)
{
    t->ids[t->n] = id;
    t->n++;
    w->in_page[t->pages[(t->n - 1) / PAGE]][(t->n - 1) % PAGE] = hash(t->owner, t->ids, t->n);
}

static void keep(world *w, const timeline *t)
{
    const uint32_t slot = slot_for(w);
    w->in_slot[slot] = hash(t->owner, t->ids, t->n);
    const bool had = de_prefix_has(&w->tree, t->owner, t->ids, t->n);
    const bool added = de_prefix_add(&w->tree, t->owner, t->ids, t->n, t->pages, slot);
    CHECK_EQ(added, !had && t->n > 0);
    if (!added)
        de_gdn_slots_give(&w->slots, slot);
}

static void end(world *w, timeline *t)
{
    de_kv_pages_give(&w->kv, t->pages, t->n_pages);
    de_gdn_slots_give(&w->slots, t->slot);
    t->n_pages = t->n = 0;
}

TEST(random_sessions_find_what_they_left)
{
    static world w;
    timeline all[SESSIONS] = { 0 };
    uint32_t refused = 0;
    REQUIRE(setup(&w));
    for (int step = 0; step < STEPS; step++) {
        timeline *t = &all[rnd(SESSIONS)];
        const uint32_t what = rnd(10);
        if (!t->n_pages) {
            uint32_t ids[LEN];
            const uint32_t n = rnd(LEN);
            for (uint32_t i = 0; i < n; i++)
                ids[i] = rnd(20) ? i % 3 : rnd(3); /* much in common */
            t->owner = rnd(2);
            if (!begin(&w, t, ids, n)) {
                refused++;
                continue;
            }
            for (uint32_t i = t->n; i < n; i++)
                put(&w, t, ids[i]);
        } else if (what < 6) {
            if (t->n < LEN)
                put(&w, t, rnd(3));
        } else if (what < 9) {
            keep(&w, t);
        } else {
            keep(&w, t);
            end(&w, t);
        }
    }
    printf("# %llu finds, %llu hits, %llu evictions, %u refused\n",
           (unsigned long long)w.tree.stats.finds, (unsigned long long)w.tree.stats.hits,
           (unsigned long long)w.tree.stats.evictions, refused);
    CHECK(w.tree.stats.hits > 100 && w.tree.stats.evictions > 100);
    for (int i = 0; i < SESSIONS; i++)
        if (all[i].n_pages)
            end(&w, &all[i]);
    while (de_prefix_evict(&w.tree, true))
        ;
    CHECK_EQ(w.tree.stats.nodes, 0);
    teardown(&w);
}

/* Of a long prompt's checkpoints those go that its end was reached from, before the end. */
TEST(who_was_passed_goes_before_the_end)
{
    static world w;
    uint32_t ids[LEN], pages[LEN / PAGE];
    REQUIRE(setup(&w));
    for (uint32_t i = 0; i < LEN; i++)
        ids[i] = i;
    w.tree.slot_bytes = 1 << 20; /* beside that pages are small */
    CHECK_EQ(de_kv_pages_take(&w.kv, LEN / PAGE, pages, NULL), 0);
    for (uint32_t n = 12; n <= 48; n += 12)
        CHECK(de_prefix_add(&w.tree, 1, ids, n, pages, slot_for(&w)));
    de_kv_pages_give(&w.kv, pages, LEN / PAGE);
    for (uint32_t n = 12; n < 48; n += 12) {
        CHECK(de_prefix_evict(&w.tree, false));
        CHECK(de_prefix_has(&w.tree, 1, ids, 48));
    }
    CHECK_EQ(w.tree.stats.nodes, 1);
    while (de_prefix_evict(&w.tree, true))
        ;
    teardown(&w);
}

/* A chain of checkpoints: the tree gives up what costs least to compute again. */
TEST(the_cheapest_to_make_again_goes_first)
{
    static world w;
    uint32_t ids[LEN], pages[LEN / PAGE];
    REQUIRE(setup(&w));
    for (uint32_t i = 0; i < LEN; i++)
        ids[i] = i;
    CHECK_EQ(de_kv_pages_take(&w.kv, LEN / PAGE, pages, NULL), 0);
    CHECK(de_prefix_add(&w.tree, 1, ids, 50, pages, slot_for(&w)));
    CHECK(de_prefix_add(&w.tree, 1, ids, 52, pages, slot_for(&w)));
    CHECK(de_prefix_add(&w.tree, 1, ids, 20, pages, slot_for(&w)));
    CHECK(!de_prefix_add(&w.tree, 1, ids, 20, pages, 0));
    CHECK(!de_prefix_has(&w.tree, 2, ids, 20));
    de_kv_pages_give(&w.kv, pages, LEN / PAGE);
    CHECK_EQ(w.kv.n_idle, 13);
    CHECK_EQ(w.kv.n_free, PAGES - 13);
    CHECK_EQ(w.tree.stats.tokens, 52);
    CHECK(de_prefix_evict(&w.tree, false)); /* 2 tokens behind 50 */
    CHECK(!de_prefix_has(&w.tree, 1, ids, 52));
    CHECK(de_prefix_has(&w.tree, 1, ids, 50));
    CHECK(de_prefix_evict(&w.tree, true)); /* pages: the leaf, though its parent is cheaper */
    CHECK(de_prefix_has(&w.tree, 1, ids, 20));
    CHECK_EQ(w.kv.n_idle, 5);
    uint32_t shared = 0;
    de_prefix_node *x = de_prefix_find(&w.tree, 1, ids, 30, 30, &shared);
    REQUIRE(x);
    x->pins++;
    CHECK(!de_prefix_evict(&w.tree, false));
    x->pins--;
    CHECK(de_prefix_evict(&w.tree, false));
    teardown(&w);
}

/* What is guarded goes when nothing else is left, and a guard ends with its node. */
TEST(the_guarded_goes_last)
{
    static world w;
    uint32_t ids[LEN], other[LEN], pages[LEN / PAGE], end = 0;
    uint64_t serial = 0, gone = 0;
    REQUIRE(setup(&w));
    for (uint32_t i = 0; i < LEN; i++)
        other[i] = (ids[i] = i) + 1;
    CHECK_EQ(de_kv_pages_take(&w.kv, LEN / PAGE, pages, NULL), 0);
    CHECK(de_prefix_add(&w.tree, 1, ids, 2, pages, slot_for(&w)));
    CHECK(de_prefix_add(&w.tree, 1, other, 50, pages, slot_for(&w)));
    de_kv_pages_give(&w.kv, pages, LEN / PAGE);
    de_prefix_guard(&w.tree, 1, ids, 9, &end, &serial);
    CHECK_EQ(end, 2);
    CHECK(de_prefix_evict(&w.tree, false)); /* 50 tokens, and yet first */
    CHECK(de_prefix_has(&w.tree, 1, ids, 2) && !de_prefix_has(&w.tree, 1, other, 50));
    CHECK(de_prefix_evict(&w.tree, true));
    CHECK(!de_prefix_has(&w.tree, 1, ids, 2));
    de_prefix_unguard(&w.tree, 1, ids, end, serial); /* it has gone: no harm */
    gone = serial;
    CHECK_EQ(de_kv_pages_take(&w.kv, LEN / PAGE, pages, NULL), 0);
    CHECK(de_prefix_add(&w.tree, 1, ids, 2, pages, slot_for(&w)));
    de_kv_pages_give(&w.kv, pages, LEN / PAGE);
    de_prefix_guard(&w.tree, 1, ids, 2, &end, &serial);
    CHECK(serial != gone);
    de_prefix_unguard(&w.tree, 1, ids, end, gone); /* another node of the same tokens */
    CHECK(de_prefix_evict(&w.tree, false));
    de_prefix_guard(&w.tree, 1, ids, 2, &end, &serial);
    CHECK_EQ(end, 0);
    teardown(&w);
}

/* An inner node goes, and its children still know their whole prefix. */
TEST(children_inherit_the_edge)
{
    static world w;
    uint32_t a[LEN], b[LEN], pages[LEN / PAGE], more[LEN / PAGE], shared = 0, got[LEN / PAGE];
    REQUIRE(setup(&w));
    for (uint32_t i = 0; i < LEN; i++) {
        a[i] = i;
        b[i] = i < 10 ? i : 100 + i;
    }
    CHECK_EQ(de_kv_pages_take(&w.kv, 5, pages, NULL), 0);
    CHECK_EQ(de_kv_pages_take(&w.kv, 5, more, NULL), 0);
    CHECK(de_prefix_add(&w.tree, 1, a, 10, pages, slot_for(&w)));
    CHECK(de_prefix_add(&w.tree, 1, a, 20, pages, slot_for(&w)));
    de_kv_pages_give(&w.kv, more, 2);
    memcpy(more, pages, 2 * sizeof *more); /* whole pages are shared, the third is a copy */
    CHECK(de_prefix_add(&w.tree, 1, b, 17, more, slot_for(&w)));
    de_prefix_node *x = de_prefix_find(&w.tree, 1, a, 10, 10, &shared);
    REQUIRE(x && x->end == 10);
    CHECK(de_prefix_remove(&w.tree, x));
    CHECK(!de_prefix_find(&w.tree, 1, a, 15, 15, &shared));
    CHECK_EQ(shared, 15);
    x = de_prefix_find(&w.tree, 1, b, LEN, LEN, &shared);
    REQUIRE(x && x->end == 17);
    de_prefix_pages(&w.tree, x, got);
    CHECK_MEM(got, 5 * sizeof *got, more, 5 * sizeof *got);
    x = de_prefix_find(&w.tree, 1, a, LEN, LEN, &shared);
    REQUIRE(x && x->end == 20);
    de_prefix_pages(&w.tree, x, got);
    CHECK_MEM(got, 5 * sizeof *got, pages, 5 * sizeof *got);
    de_kv_pages_give(&w.kv, pages, 5);
    de_kv_pages_give(&w.kv, more + 2, 3);
    teardown(&w);
}
