/* UTF-8 against the table of RFC 3629, over every start of one to four bytes that can matter. */
#include "support/tap.h"

#include "base/utf8.h"

TEST(every_character_is_put_and_recognised)
{
    for (uint32_t c = 0; c < 0x110000; c++) {
        char s[4];
        if (c >= 0xD800 && c < 0xE000)
            continue;
        const size_t n = de_utf8_put(s, c);
        REQUIRE(n == (c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4));
        REQUIRE(de_utf8_look(s, n) == (int)n);
        REQUIRE(de_utf8_len(s, n) == n);
        for (size_t k = 1; k < n; k++) { /* a start may go on, and is no character */
            REQUIRE(de_utf8_look(s, k) == 0);
            REQUIRE(de_utf8_len(s, k) == 0);
        }
    }
}

TEST(invalid_starts_are_measured)
{
    static const struct {
        const char *s;
        size_t n;
        int look;
    } cases[] = { { "\x80", 1, -1 },
                  { "\xC0\x80", 2, -1 },
                  { "\xC1\xBF", 2, -1 },
                  { "\xE0\x9F\x80", 3, -1 },
                  { "\xED\xA0\x80", 3, -1 },
                  { "\xF0\x8F\x80\x80", 4, -1 },
                  { "\xF4\x90\x80\x80", 4, -1 },
                  { "\xF5\x80", 2, -1 },
                  { "\xFF", 1, -1 },
                  { "\xC3(", 2, -1 },
                  { "\xE2\x82(", 3, -2 },
                  { "\xF0\x9F\x98(", 4, -3 },
                  { "\xE2(", 2, -1 },
                  { "\xF4\x8F\xBF\xBF", 4, 4 } };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        CHECK_EQ(de_utf8_look(cases[i].s, cases[i].n), cases[i].look);
}
