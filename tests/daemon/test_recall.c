/* What was sampled, by the ids of its calls: who gets it back, and what goes when there is too much. */
#include "support/tap.h"

#include "daemon/limits.h"
#include "daemon/recall.h"

static delta_str str(const char *s)
{
    return (delta_str){ s, strlen(s) };
}

static bool find(dd_recall *r, uint32_t uid, const char *a, const char *b, const char *want)
{
    dd_sampled got;
    if (!dd_recall_find(r, uid, (delta_str[]){ str(a), str(b ? b : "") }, b ? 2 : 1, &got))
        return false;
    CHECK(got.thought);
    CHECK_EQ(got.text.len, strlen(want));
    CHECK_EQ(got.n_ids, strlen(want) < 64 ? strlen(want) : 0);
    for (size_t i = 0; i < got.n_ids; i++)
        CHECK_EQ(got.ids[i], (uint32_t)want[i]);
    return got.text.len == strlen(want) && memcmp(got.text.p, want, got.text.len) == 0;
}

/* Its tokens are its characters. */
static void put(dd_recall *r, uint32_t uid, const char *a, const char *b, const char *text)
{
    uint32_t ids[64];
    const size_t n = strlen(text) < 64 ? strlen(text) : 0;
    for (size_t i = 0; i < n; i++)
        ids[i] = (uint32_t)text[i];
    const dd_sampled x = { .text = str(text), .ids = ids, .n_ids = n, .thought = true };
    dd_recall_put(r, uid, (delta_str[]){ str(a), str(b ? b : "") }, b ? 2 : 1, &x);
}

TEST(all_ids_in_order_and_the_same_user)
{
    dd_recall *r = dd_recall_new();
    put(r, 7, "call_a", "call_b", "two");
    put(r, 7, "call_c", NULL, "one");
    CHECK(find(r, 7, "call_a", "call_b", "two"));
    CHECK(find(r, 7, "call_c", NULL, "one"));
    CHECK(!find(r, 7, "call_b", "call_a", ""));
    CHECK(!find(r, 7, "call_a", NULL, ""));
    CHECK(!find(r, 7, "call_c", "call_a", ""));
    CHECK(!find(r, 7, "call", NULL, ""));
    CHECK(!find(r, 7, "", NULL, ""));
    CHECK(!find(r, 8, "call_c", NULL, ""));
    dd_recall_free(r);
}

TEST(the_one_used_longest_ago_goes_first)
{
    dd_recall *r = dd_recall_new();
    char id[16];
    enum { SHARE = DD_RECALL_TURNS / 4 };
    for (int i = 0; i < SHARE; i++) {
        (void)snprintf(id, sizeof id, "a%d", i);
        put(r, 1, id, NULL, "x");
    }
    put(r, 2, "other", NULL, "y");
    CHECK(find(r, 1, "a0", NULL, "x")); /* used: a1 is the oldest now */
    put(r, 1, "more", NULL, "z");
    CHECK(find(r, 1, "a0", NULL, "x"));
    CHECK(!find(r, 1, "a1", NULL, ""));
    CHECK(find(r, 1, "a2", NULL, "x"));
    CHECK(find(r, 2, "other", NULL, "y")); /* of another user: not his share */
    for (uint32_t user = 3; user < 10; user++)
        for (int i = 0; i < SHARE; i++) {
            (void)snprintf(id, sizeof id, "u%d", i);
            put(r, user, id, NULL, "x");
        }
    CHECK(!find(r, 2, "other", NULL, "")); /* but in all there is an end */
    CHECK(find(r, 9, "u0", NULL, "x"));
    dd_recall_free(r);
}

TEST(bytes_are_bounded_too)
{
    dd_recall *r = dd_recall_new();
    char *big = malloc(DD_RECALL_TURN_BYTES + 2);
    memset(big, 'x', DD_RECALL_TURN_BYTES + 1);
    big[DD_RECALL_TURN_BYTES + 1] = '\0';
    put(r, 1, "too_long", NULL, big);
    CHECK(!find(r, 1, "too_long", NULL, ""));
    big[DD_RECALL_TURN_BYTES] = '\0';
    const int fit = DD_RECALL_BYTES / 4 / DD_RECALL_TURN_BYTES;
    char id[16];
    for (int i = 0; i <= fit; i++) {
        (void)snprintf(id, sizeof id, "b%d", i);
        put(r, 1, id, NULL, big);
    }
    CHECK(!find(r, 1, "b0", NULL, ""));
    CHECK(find(r, 1, id, NULL, big));
    free(big);
    dd_recall_free(r);
}
