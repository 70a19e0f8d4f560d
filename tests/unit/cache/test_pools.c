/* Page pool and slot pool: what is taken comes back, shared pages when the last user and keeper go. */
#include "support/tap.h"

#include "cache/gdn_slots.h"
#include "cache/kv_pages.h"

TEST(kv_pages_take_is_all_or_nothing)
{
    de_kv_pages p;
    REQUIRE(de_kv_pages_init(&p, 5, NULL) == 0);
    uint32_t a[5], b[5] = { 99, 99, 99, 99, 99 };
    delta_error err = { 0 };
    CHECK_EQ(de_kv_pages_take(&p, 3, a, NULL), 0);
    CHECK_EQ(de_kv_pages_take(&p, 3, b, &err), DELTA_EBUSY);
    CHECK_STR(err.text, "3 KV pages wanted, 2 of 5 are free");
    CHECK_EQ(b[0], 99);
    CHECK_EQ(p.n_free, 2);
    CHECK_EQ(de_kv_pages_take(&p, 2, b, NULL), 0);
    for (int i = 0; i < 3; i++)
        for (int k = 0; k < 2; k++)
            CHECK(a[i] != b[k]);
    de_kv_pages_give(&p, a, 3);
    de_kv_pages_give(&p, b, 2);
    CHECK_EQ(p.n_free, 5);
    de_kv_pages_done(&p);
}

TEST(kv_pages_shared_pages_go_back_with_their_last_owner)
{
    de_kv_pages p;
    REQUIRE(de_kv_pages_init(&p, 4, NULL) == 0);
    uint32_t a[4];
    CHECK_EQ(de_kv_pages_take(&p, 4, a, NULL), 0);
    de_kv_pages_share(&p, a, 2);
    de_kv_pages_give(&p, a, 4);
    CHECK_EQ(p.n_free, 2);
    de_kv_pages_give(&p, a, 2);
    CHECK_EQ(p.n_free, 4);
    de_kv_pages_done(&p);
}

TEST(kv_pages_that_are_kept_are_idle_without_users)
{
    de_kv_pages p;
    REQUIRE(de_kv_pages_init(&p, 4, NULL) == 0);
    uint32_t a[4];
    CHECK_EQ(de_kv_pages_take(&p, 3, a, NULL), 0);
    de_kv_pages_keep(&p, a, 2);
    de_kv_pages_keep(&p, a, 1);
    CHECK_EQ(p.n_idle, 0);
    de_kv_pages_give(&p, a, 3);
    CHECK_EQ(p.n_idle, 2);
    CHECK_EQ(p.n_free, 2);
    de_kv_pages_share(&p, a, 1);
    CHECK_EQ(p.n_idle, 1);
    de_kv_pages_drop(&p, a, 2);
    CHECK_EQ(p.n_idle, 0);
    CHECK_EQ(p.n_free, 3);
    de_kv_pages_give(&p, a, 1);
    CHECK_EQ(p.n_idle, 1);
    de_kv_pages_drop(&p, a, 1);
    CHECK_EQ(p.n_idle, 0);
    CHECK_EQ(p.n_free, 4);
    de_kv_pages_done(&p);
}

TEST(gdn_slots_are_distinct_and_run_out)
{
    de_gdn_slots s;
    REQUIRE(de_gdn_slots_init(&s, 2, NULL) == 0);
    uint32_t a = 9, b = 9, c = 9;
    CHECK_EQ(de_gdn_slots_take(&s, &a, NULL), 0);
    CHECK_EQ(de_gdn_slots_take(&s, &b, NULL), 0);
    CHECK(a != b && a < 2 && b < 2);
    CHECK_EQ(de_gdn_slots_take(&s, &c, NULL), DELTA_EBUSY);
    CHECK_EQ(c, 9);
    de_gdn_slots_give(&s, a);
    CHECK_EQ(de_gdn_slots_take(&s, &c, NULL), 0);
    CHECK_EQ(c, a);
    de_gdn_slots_done(&s);
}
