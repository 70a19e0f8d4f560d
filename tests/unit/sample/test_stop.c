/* Stop strings: against a search in the whole text, at every way of cutting it. */
#include "support/tap.h"

#include "sample/stop.h"

static de_stop stop;

static void start(const char *const *strings, uint32_t n)
{
    delta_stop_string s[DELTA_MAX_STOP_STRINGS];
    for (uint32_t i = 0; i < n; i++)
        s[i] = (delta_stop_string){ strings[i], strlen(strings[i]) };
    de_stop_init(&stop, s, n);
}

TEST(stop_releases_text_as_soon_as_it_cannot_be_the_beginning)
{
    char out[64];
    int match = -1;
    start((const char *[]){ "STOP" }, 1);
    CHECK_MEM(out, de_stop_push(&stop, "aST", 3, out, &match), "a", 1);
    CHECK_MEM(out, de_stop_push(&stop, "x", 1, out, &match), "STx", 3);
    CHECK_MEM(out, de_stop_push(&stop, "SSTO", 4, out, &match), "S", 1);
    CHECK_EQ(match, -1);
    CHECK_MEM(out, de_stop_push(&stop, "Prest", 5, out, &match), "", 0);
    CHECK_EQ(match, 0);
}

TEST(stop_gives_out_what_it_held_when_the_text_ends)
{
    char out[64];
    int match = -1;
    start((const char *[]){ "abab" }, 1);
    CHECK_EQ(de_stop_push(&stop, "aba", 3, out, &match), 0);
    CHECK_MEM(out, de_stop_flush(&stop, out), "aba", 3);
    CHECK_EQ(de_stop_flush(&stop, out), 0);
}

TEST(stop_takes_the_longest_of_those_that_end_together)
{
    char out[64];
    int match = -1;
    start((const char *[]){ "end", "the end" }, 2);
    CHECK_MEM(out, de_stop_push(&stop, "so the end.", 11, out, &match), "so ", 3);
    CHECK_EQ(match, 1);
}

TEST(stop_works_in_place_at_the_place_the_engine_uses)
{
    char out[DELTA_MAX_STOP_BYTES + 600];
    int match = -1;
    char text[600];
    memset(text, 'a', sizeof text);
    text[599] = 'b';
    start((const char *[]){ "aaaaaaaaaaaaaaaaaaac" }, 1);
    CHECK_EQ(de_stop_push(&stop, "aaa", 3, out, &match), 0);
    memcpy(out + DELTA_MAX_STOP_BYTES, text, 600);
    CHECK_EQ(de_stop_push(&stop, out + DELTA_MAX_STOP_BYTES, 600, out, &match), 603);
    CHECK(memcmp(out, "aaa", 3) == 0 && memcmp(out + 3, text, 600) == 0);
}

/* Where the first match ends, and the longest that ends there. */
static bool find_naively(const char *text, size_t len, const char *const *strings, uint32_t n,
                         size_t *ret_begin, int *ret_which)
{
    for (size_t end = 1; end <= len; end++) {
        size_t longest = 0;
        for (uint32_t k = 0; k < n; k++) {
            const size_t l = strlen(strings[k]);
            if (l <= end && l > longest && memcmp(text + end - l, strings[k], l) == 0) {
                longest = l;
                *ret_which = (int)k;
            }
        }
        if (longest) {
            *ret_begin = end - longest;
            return true;
        }
    }
    return false;
}

TEST(stop_finds_what_a_search_finds_in_random_texts_and_chunks)
{
    uint64_t x = 7;
    for (int round = 0; round < 20000; round++) {
        char text[64], strings[4][8], got[128];
        const char *p[4];
#define RANDOM(n) (x = x * 6364136223846793005u + 1442695040888963407u, (uint32_t)(x >> 33) % (n))
        const uint32_t len = RANDOM(60), n = 1 + RANDOM(4);
        for (uint32_t i = 0; i < len; i++)
            text[i] = (char)('a' + RANDOM(2));
        for (uint32_t k = 0; k < n; k++) {
            const uint32_t l = 1 + RANDOM(7);
            for (uint32_t i = 0; i < l; i++)
                strings[k][i] = (char)('a' + RANDOM(2 + (k == 0)));
            strings[k][l] = 0;
            p[k] = strings[k];
        }
        start(p, n);
        size_t begin = len, used = 0, at = 0;
        int want = -1, match = -1;
        (void)find_naively(text, len, p, n, &begin, &want);
        while (at < len && match < 0) {
            uint32_t piece = 1 + RANDOM(9);
            piece = piece < len - at ? piece : (uint32_t)(len - at);
            used += de_stop_push(&stop, text + at, piece, got + used, &match);
            at += piece;
        }
        if (match < 0)
            used += de_stop_flush(&stop, got + used);
        CHECK_MEM(got, used, text, begin);
        if (want >= 0 && match >= 0)
            CHECK_EQ(strlen(p[match]), strlen(p[want]));
        else
            CHECK_EQ(match, want);
    }
}
