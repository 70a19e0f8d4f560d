/* test_error.c -- codes, names, and the promise of one line of UTF-8. */
#include "delta/error.h"
#include "support/tap.h"

TEST(error_codes_have_names_and_texts)
{
    CHECK_STR(delta_code_name(0), "OK");
    CHECK_STR(delta_code_name(DELTA_EINVALID), "EINVALID");
    CHECK_STR(delta_code_text(DELTA_EINVALID), "invalid argument");
    CHECK_STR(delta_code_name(-99), "E?");
    CHECK_STR(delta_code_name(1), "E?");
    /* numbers are in logs: they do not change */
    CHECK_EQ(DELTA_EINVALID, -1);
    CHECK_EQ(DELTA_EFORMAT, -5);
    CHECK_EQ(DELTA_EINTERNAL, -12);
}

TEST(error_fail_fills_and_returns)
{
    delta_error e;
    CHECK_EQ(delta_fail(&e, DELTA_EIO, "%s: %d", "file", 7), DELTA_EIO);
    CHECK_EQ(e.code, DELTA_EIO);
    CHECK_STR(e.text, "file: 7");
    CHECK_EQ(delta_fail(NULL, DELTA_ENOMEM, "x"), DELTA_ENOMEM);
    delta_error_prefix(&e, "while %s", "reading");
    CHECK_STR(e.text, "while reading: file: 7");
    CHECK_EQ(e.code, DELTA_EIO);
    delta_error_prefix(NULL, "nothing");
}

TEST(error_text_is_one_line)
{
    delta_error e;
    (void)delta_fail(&e, DELTA_EIO,
                     "a\nb\tc\x7f"
                     "d\r");
    CHECK_STR(e.text, "a b c d ");
    delta_error_prefix(&e, "p\nq");
    CHECK_STR(e.text, "p q: a b c d ");
}

/* Characters of 1 to 4 bytes, moved byte by byte over the end of the buffer. */
TEST(error_text_that_is_cut_ends_with_a_whole_character)
{
    static const char *const letters[] = { "x", "\xc3\xb6", "\xe6\xbc\xa2", "\xf0\x9f\x98\x80" };
    for (size_t k = 0; k < 4; k++) {
        const size_t n = strlen(letters[k]);
        for (size_t shift = 0; shift < 5; shift++) {
            char text[700] = "";
            memset(text, '-', shift);
            for (size_t at = shift; at + n < sizeof text; at += n)
                memcpy(text + at, letters[k], n + 1);
            delta_error e;
            (void)delta_fail(&e, DELTA_EIO, "%s", text);
            const size_t room = sizeof e.text - 1;
            CHECK_EQ(strlen(e.text), shift + (room - shift) / n * n);
            delta_error_prefix(&e, "%s", "ab");
            CHECK_EQ((strlen(e.text) - 4 - shift) % n, 0);
            CHECK(strlen(e.text) > room - n - 1);
        }
    }
}
