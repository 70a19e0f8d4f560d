/* The tokenizer of the demo model against golden ids, its splitter against PCRE2, and hostile text. */
#include "support/tap.h"

#include <time.h>
#include <utf8proc.h>

#include "base/file.h"
#include "base/json.h"
#include "delta/tokenizer.h"
#include "tokenizer/tokenizer.h"
#if HAVE_PCRE2
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#endif

static delta_tokenizer *demo(void)
{
    delta_tokenizer *t = NULL;
    delta_error err = { .text = "" };
    if (delta_tokenizer_open(DEMO_MODEL_DIR, &t, &err) < 0)
        TAP_FAIL("%s", err.text);
    return t;
}

TEST(tokenizer_gives_the_golden_ids_and_texts)
{
    char *text;
    size_t len, wrong = 0, n = 0;
    delta_error err;
    REQUIRE(de_file_read(TESTS_DIR "/model/golden/tokenizer_cases.json", 1 << 24, &text, &len,
                         &err) == 0);
    de_arena a;
    de_json *root;
    de_arena_init(&a, 1u << 28);
    REQUIRE(de_json_parse(&a, text, len, &root, &err) == 0);
    delta_tokenizer *t = demo();
    REQUIRE(t);
    for (const de_json *c = root->child; c; c = c->next, n++) {
        const de_json *s = de_json_get(c, "text"), *want = de_json_get(c, "ids");
        const de_json *back = de_json_get(c, "decoded");
        uint32_t *ids = NULL;
        size_t k = 0, i = 0, out_len = 0;
        char *out = NULL;
        bool same = delta_tokenize(t, s->text, s->n, false, &ids, &k, &err) == 0 && k == want->n;
        for (const de_json *v = want->child; same && v; v = v->next) {
            uint64_t id = 0;
            same = de_json_u64(v, &id) && id == ids[i++];
        }
        same = same && delta_detokenize(t, ids, k, false, &out, &out_len, &err) == 0 &&
               out_len == back->n && memcmp(out, back->text, out_len) == 0;
        wrong += !same;
        free(ids);
        free(out);
    }
    CHECK(n >= 100);
    CHECK_EQ(wrong, 0);
    delta_tokenizer_free(t);
    de_arena_done(&a);
    free(text);
}

TEST(tokenizer_knows_late_tokens_and_leaves_them_as_text_when_told)
{
    delta_tokenizer *t = demo();
    REQUIRE(t);
    delta_error err;
    uint32_t *ids;
    size_t n;
    CHECK_EQ(delta_tokenizer_size(t), 2045);
    CHECK_EQ(delta_tokenizer_added_id(t, "<think>"), 2036);
    CHECK(delta_tokenizer_added_id(t, "<|audio_start|>") >
          2037); /* only in tokenizer_config.json */
    CHECK_EQ(delta_token_kind(t, 2014), DELTA_TOKEN_SPECIAL);
    CHECK_EQ(delta_token_kind(t, 2036), DELTA_TOKEN_ADDED);
    CHECK_EQ(delta_token_kind(t, 2046), DELTA_TOKEN_NONE);
    REQUIRE(delta_tokenize(t, "<think>", 7, false, &ids, &n, &err) == 0);
    CHECK_EQ(n, 1);
    free(ids);
    REQUIRE(delta_tokenize(t, "<think>", 7, true, &ids, &n, &err) == 0);
    CHECK(n > 1);
    char *text;
    size_t len;
    REQUIRE(delta_detokenize(t, ids, n, false, &text, &len, &err) == 0);
    CHECK_STR(text, "<think>");
    free(text);
    free(ids);
    delta_tokenizer_free(t);
}

TEST(tokenizer_refuses_bad_utf8_with_the_offset)
{
    delta_tokenizer *t = demo();
    REQUIRE(t);
    static const struct {
        const char *text;
        size_t len;
        const char *at;
    } cases[] = { { "ab\xFF", 3, "byte 2" },
                  { "\xC0\x80", 2, "byte 0" },
                  { "x\xED\xA0\x80", 4, "byte 1" },
                  { "xyz\xE2\x82", 5, "byte 3" } };
    for (size_t i = 0; i < 4; i++) {
        delta_error err = { 0 };
        uint32_t *ids;
        size_t n;
        CHECK_EQ(delta_tokenize(t, cases[i].text, cases[i].len, false, &ids, &n, &err),
                 DELTA_EINVALID);
        CHECK(strstr(err.text, cases[i].at) != NULL);
    }
    delta_tokenizer_free(t);
}

/* Whether two texts become the same ids. */
static bool same_ids(const delta_tokenizer *t, const char *a, size_t a_len, const char *b,
                     size_t b_len)
{
    uint32_t *x = NULL, *y = NULL;
    size_t n = 0, k = 0;
    delta_error err;
    const bool same = delta_tokenize(t, a, a_len, true, &x, &n, &err) == 0 &&
                      delta_tokenize(t, b, b_len, true, &y, &k, &err) == 0 && n == k &&
                      memcmp(x, y, n * sizeof *x) == 0;
    free(x);
    free(y);
    return same;
}

static size_t put(char *out, uint32_t c);

/* U+2329 stood in a block that was taken to be NFC already, and kept its own bytes. */
TEST(every_character_is_normalised_also_where_none_seems_to_need_it)
{
    delta_tokenizer *t = demo();
    REQUIRE(t);
    unsigned wrong = 0;
    for (uint32_t c = 1; c < 0x110000; c++) {
        if (c >= 0xD800 && c < 0xE000)
            continue;
        char text[8];
        utf8proc_uint8_t *want = NULL;
        const size_t n = put(text, c);
        const utf8proc_ssize_t k = utf8proc_map((const utf8proc_uint8_t *)text, (utf8proc_ssize_t)n,
                                                &want, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
        REQUIRE(k > 0);
        if (!same_ids(t, text, n, (char *)want, (size_t)k) && wrong++ == 0)
            TAP_FAIL("U+%04X is not normalised", c);
        free(want);
    }
    CHECK_EQ(wrong, 0);
    delta_tokenizer_free(t);
}

/* The reference tokenizer normalises by the tables of Unicode 9 and splits by those of Unicode 16;
 * utf8proc does both by others. Ids of the tokenizers library, 0.23. */
TEST(unicode_is_of_the_versions_that_the_reference_has)
{
    delta_tokenizer *t = demo();
    REQUIRE(t);
    static const struct {
        const char *text;
        uint32_t n, ids[10];
    } cases[] = {
        { "e\u0345\u09fe\u0334", 8, { 68, 137, 227, 156, 100, 122, 136, 112 } },
        { "\u0345\u1ac0\u0334\u0301", 9, { 137, 227, 157, 104, 222, 136, 112, 136, 223 } },
        { "\ud53c\u11a7", 6, { 169, 242, 120, 157, 228, 100 } },
        { "\U000105cd_p", 5, { 172, 238, 245, 235, 1059 } },
        { "\U000116d0_p", 5, { 172, 239, 249, 238, 1059 } },
        { "\U0001f000_p", 6, { 172, 253, 222, 222, 62, 79 } },
        { "\U00011935\U00011930", 8, { 172, 239, 97, 113, 172, 239, 97, 108 } },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint32_t *ids = NULL;
        size_t n = 0;
        delta_error err;
        CHECK_EQ(delta_tokenize(t, cases[i].text, strlen(cases[i].text), true, &ids, &n, &err), 0);
        CHECK(n == cases[i].n && memcmp(ids, cases[i].ids, n * sizeof *ids) == 0);
        free(ids);
    }
    CHECK(same_ids(t, "e\u0301", 3, "\u00e9", 2));
    delta_tokenizer_free(t);
}

static uint64_t seed = 1;
static uint32_t rnd(uint32_t n)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 33) % n;
}

static size_t put(char *out, uint32_t c)
{
    if (c < 0x80)
        return out[0] = (char)c, 1;
    if (c < 0x800)
        return out[0] = (char)(0xC0 | c >> 6), out[1] = (char)(0x80 | (c & 63)), 2;
    if (c < 0x10000)
        return out[0] = (char)(0xE0 | c >> 12), out[1] = (char)(0x80 | (c >> 6 & 63)),
               out[2] = (char)(0x80 | (c & 63)), 3;
    return out[0] = (char)(0xF0 | c >> 18), out[1] = (char)(0x80 | (c >> 12 & 63)),
           out[2] = (char)(0x80 | (c >> 6 & 63)), out[3] = (char)(0x80 | (c & 63)), 4;
}

/* Characters that random text leaves out; see classes_differ(). */
static uint8_t *left_out;

/* Text that meets the borders of the pattern often. */
static size_t random_text(char *out, size_t max_chars)
{
    static const char *const bits[] = { "'s",
                                        "'LL",
                                        "'\xC5\xBF",
                                        "\r\n",
                                        "\n",
                                        "  ",
                                        " ",
                                        "\t",
                                        "12",
                                        "don't",
                                        "\xCC\x81",
                                        "e\xCC\x81",
                                        "...",
                                        "\xE3\x80\x80",
                                        "\xE4\xB8\xAD",
                                        "\xE0\xA4\x95\xE0\xA5\x8D",
                                        "!\n\n",
                                        "_x" };
    size_t n = 0;
    for (size_t i = rnd((uint32_t)max_chars) + 1; i > 0; i--) {
        if (rnd(3)) {
            const char *b = bits[rnd(sizeof bits / sizeof *bits)];
            memcpy(out + n, b, strlen(b));
            n += strlen(b);
        } else {
            uint32_t c = rnd(4) ? rnd(0x3000) : rnd(0x20000);
            if ((c >= 0xD800 && c < 0xE000) || (left_out && left_out[c]))
                c = 'a';
            n += put(out + n, c);
        }
    }
    return n;
}

#if HAVE_PCRE2
/* The two libraries know different versions of Unicode: characters that the older one does not have,
 * and U+180E, which PCRE2 counts as a space, are left out of the comparison. Returns how many. */
static size_t classes_differ(const delta_tokenizer *t)
{
    int code;
    PCRE2_SIZE at;
    size_t n = 0;
    pcre2_code *re = pcre2_compile((PCRE2_SPTR) "(\\p{L})|(\\p{M})|(\\p{N})|(\\s)",
                                   PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP, &code, &at, NULL);
    pcre2_match_data *m = pcre2_match_data_create_from_pattern(re, NULL);
    left_out = calloc(DE_CODEPOINTS, 1);
    for (uint32_t c = 1; c < DE_CODEPOINTS; c++) {
        char s[4];
        if (c >= 0xD800 && c < 0xE000)
            continue;
        int k = pcre2_match(re, (PCRE2_SPTR)s, put(s, c), 0, 0, m, NULL) - 1;
        left_out[c] = (k < 0 ? 0 : k) != t->classes[c];
        n += left_out[c];
    }
    pcre2_match_data_free(m);
    pcre2_code_free(re);
    return n;
}
#endif

TEST(splitter_agrees_with_pcre2_on_random_text)
{
#if HAVE_PCRE2
    delta_tokenizer *t = demo();
    REQUIRE(t);
    static const char pattern[] =
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}| "
        "?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
    int code;
    PCRE2_SIZE at;
    pcre2_code *re = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED,
                                   PCRE2_UTF | PCRE2_UCP, &code, &at, NULL);
    REQUIRE(re);
    pcre2_match_data *m = pcre2_match_data_create_from_pattern(re, NULL);
    char text[2048];
    const size_t unknown = classes_differ(t);
    printf("# %zu characters left out\n", unknown);
    CHECK(unknown < 20000); /* of 150,000 assigned */
    for (int round = 0; round < 20000; round++) {
        const size_t n = random_text(text, 40);
        const uint8_t *p = (const uint8_t *)text, *end = p + n;
        while (p < end) {
            const size_t from = (size_t)(p - (const uint8_t *)text);
            REQUIRE(pcre2_match(re, (PCRE2_SPTR)text, n, from, 0, m, NULL) > 0);
            const PCRE2_SIZE *v = pcre2_get_ovector_pointer(m);
            const uint8_t *next = de_piece_end(t, p, end);
            if (v[0] != from || v[1] != (size_t)(next - (const uint8_t *)text)) {
                const uint8_t *q = p;
                uint32_t cp = de_utf8_next(&q);
                TAP_FAIL("round %d offset %zu: U+%04X.. ends at %zu, PCRE2 says %zu", round, from,
                         cp, (size_t)(next - (const uint8_t *)text), v[1]);
                break;
            }
            p = next;
        }
    }
    pcre2_match_data_free(m);
    pcre2_code_free(re);
    delta_tokenizer_free(t);
#else
    SKIP("built without PCRE2");
#endif
}

TEST(short_and_long_merges_agree)
{
    /* a piece longer than the scanned ones goes by the heap: its ids must be those that the same
     * text has when it is cut where merges cannot cross, and decode to the text */
    delta_tokenizer *t = demo();
    REQUIRE(t);
    char text[4000];
    delta_error err;
    for (int round = 0; round < 300; round++) {
        size_t n = 0;
        const size_t want = 20 + rnd(3000);
        while (n < want)
            text[n++] = (char)('a' + rnd(4));
        uint32_t *ids, *slow = malloc(n * sizeof *slow);
        size_t k, m = n;
        REQUIRE(delta_tokenize(t, text, n, false, &ids, &k, &err) == 0);
        for (size_t i = 0; i < n; i++)
            slow[i] = t->byte_id[(uint8_t)text[i]];
        for (;;) { /* the definition: lowest rank, leftmost */
            const de_merge *best = NULL;
            size_t at = 0;
            for (size_t i = 0; i + 1 < m; i++) {
                const de_merge *g = de_merge_find(t, slow[i], slow[i + 1]);
                if (g && (!best || g->rank < best->rank)) {
                    best = g;
                    at = i;
                }
            }
            if (!best)
                break;
            slow[at] = best->id;
            memmove(slow + at + 1, slow + at + 2, (m - at - 2) * sizeof *slow);
            m--;
        }
        CHECK_EQ(k, m);
        CHECK(k == m && memcmp(ids, slow, k * sizeof *ids) == 0);
        free(ids);
        free(slow);
    }
    delta_tokenizer_free(t);
}

TEST(hostile_text_takes_linear_time)
{
    delta_tokenizer *t = demo();
    REQUIRE(t);
    const size_t n = 1 << 20;
    char *text = malloc(n);
    static const char fill[] = { ' ', 'a', '\n', '<', '1' };
    delta_error err;
    for (size_t f = 0; f < sizeof fill; f++) {
        memset(text, fill[f], n);
        uint32_t *ids;
        size_t k;
        const clock_t begin = clock();
        REQUIRE(delta_tokenize(t, text, n, false, &ids, &k, &err) == 0);
        CHECK((double)(clock() - begin) / CLOCKS_PER_SEC < 10); /* quadratic would take minutes */
        free(ids);
    }
    free(text);
    delta_tokenizer_free(t);
}

TEST(detok_byte_by_byte_equals_whole_and_never_halves_a_character)
{
    char text[4096], whole[16384], bytes[16384];
    for (int round = 0; round < 2000; round++) {
        size_t n = random_text(text, 30);
        for (size_t i = rnd(4); i > 0; i--) /* some damage */
            text[rnd((uint32_t)n)] = (char)rnd(256);
        delta_detok d = { .n_held = 0 };
        size_t a = delta_detok_push(&d, (const uint8_t *)text, n, whole, sizeof whole);
        a += delta_detok_flush(&d, whole + a, sizeof whole - a);
        size_t b = 0;
        for (size_t i = 0; i < n; i++) {
            const size_t got =
                delta_detok_push(&d, (const uint8_t *)text + i, 1, bytes + b, sizeof bytes - b);
            for (size_t k = 0; k < got;) {
                int w = de_utf8_look((const uint8_t *)bytes + b + k, got - k);
                CHECK(w > 0);
                k += w > 0 ? (size_t)w : got;
            }
            b += got;
        }
        b += delta_detok_flush(&d, bytes + b, sizeof bytes - b);
        CHECK_MEM(whole, a, bytes, b);
    }
}
