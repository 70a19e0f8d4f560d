/* test_json.c -- RFC 8259 and nothing else; bounded; written as Python writes it. */
#include "base/json.h"
#include "support/tap.h"

static de_arena arena;

static const de_json *parse(const char *text, size_t len, delta_error *err)
{
    de_json *v = NULL;
    de_arena_init(&arena, 4 << 20);
    *err = (delta_error){ 0 };
    char *copy = malloc(len ? len : 1); /* the tree must not point into the text */
    if (!copy)
        exit(2);
    if (len)
        memcpy(copy, text, len);
    int r = de_json_parse(&arena, copy, len, &v, err);
    free(copy);
    if ((r == 0) != (v != NULL))
        TAP_FAIL("%d and a tree at %p", r, (void *)v);
    return v;
}

static const de_json *parse_text(const char *text)
{
    delta_error err;
    const de_json *v = parse(text, strlen(text), &err);
    if (!v)
        TAP_FAIL("%s: %s", text, err.text);
    return v;
}

TEST(json_accepts_what_the_rfc_has)
{
    static const char *const texts[] = {
        "null",
        " true ",
        "\t\r\nfalse",
        "0",
        "-0",
        "-0.0e-0",
        "1E+2",
        "123456789012345678901234567890",
        "\"\"",
        "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\\uD83D\\uDE00\"",
        "[]",
        "[ ]",
        "{ }",
        "[[],{}]",
        "{\"\":{\"\":[]}}",
        "{\"a\":1,\"A\":2}",
        "\"\x7f\"",
        "\"\xf4\x8f\xbf\xbf\"",
        "\"\xef\xbb\xbf\"",
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        (void)parse_text(texts[i]);
        de_arena_done(&arena);
    }
}

TEST(json_refuses_the_rest)
{
#define BYTES(s) s, sizeof s - 1
    static const struct {
        const char *text;
        size_t len;
    } cases[] = {
        { BYTES("") },
        { BYTES(" ") },
        { BYTES("nul") },
        { BYTES("nulll") },
        { BYTES("True") },
        { BYTES("NaN") },
        { BYTES("Infinity") },
        { BYTES("-") },
        { BYTES("+1") },
        { BYTES("01") },
        { BYTES("-01") },
        { BYTES("1.") },
        { BYTES(".5") },
        { BYTES("1e") },
        { BYTES("1e+") },
        { BYTES("0x10") },
        { BYTES("1 2") },
        { BYTES("[1,]") },
        { BYTES("[,1]") },
        { BYTES("[1") },
        { BYTES("[1}") },
        { BYTES("]") },
        { BYTES("{\"a\":1,}") },
        { BYTES("{\"a\"}") },
        { BYTES("{\"a\" 1}") },
        { BYTES("{a:1}") },
        { BYTES("{'a':1}") },
        { BYTES("{1:1}") },
        { BYTES("{\"a\":}") },
        { BYTES("{\"a\":1") },
        { BYTES("{,}") },
        { BYTES("[1] // x") },
        { BYTES("/**/1") },
        { BYTES("\"") },
        { BYTES("\"\\") },
        { BYTES("\"\\\"") },
        { BYTES("\"\\x41\"") },
        { BYTES("\"\\u12\"") },
        { BYTES("\"\\u12g4\"") },
        { BYTES("{\"a\\u0000\":1}") },
        { BYTES("\"\\ud83d\"") },
        { BYTES("\"\\ud83dx\"") },
        { BYTES("\"\\ud83d\\u0041\"") },
        { BYTES("\"\\ude00\"") },
        { BYTES("\"\\ud83d\\ud83d\"") },
        { BYTES("\"a\nb\"") },
        { BYTES("\"a\0b\"") },
        { BYTES("\"\x1f\"") },
        { BYTES("null\0") },
        { BYTES("\"\x80\"") },
        { BYTES("\"\xc3\"") },
        { BYTES("\"\xc0\xaf\"") },
        { BYTES("\"\xe0\x80\x80\"") },
        { BYTES("\"\xed\xa0\x80\"") },
        { BYTES("\"\xf0\x80\x80\x80\"") },
        { BYTES("\"\xf4\x90\x80\x80\"") },
        { BYTES("\"\xff\"") },
        { BYTES("\"\xe6\xbc\"") },
        { BYTES("\xef\xbb\xbf{}") },
        { BYTES("{\"a\":1,\"a\":2}") },
        { BYTES("{\"a\":1,\"\\u0061\":2}") },
        { BYTES("[{\"b\":{\"x\":1,\"y\":2,\"x\":3}}]") },
        { BYTES(
            "{\"a\":1,\"b\":1,\"c\":1,\"d\":1,\"e\":1,\"f\":1,\"g\":1,\"h\":1,\"i\":1,\"a\":1}") },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        delta_error err;
        if (parse(cases[i].text, cases[i].len, &err))
            TAP_FAIL("case %zu is taken: %s", i, cases[i].text);
        CHECK_EQ(err.code, DELTA_EFORMAT);
        CHECK(strstr(err.text, "JSON line ") != NULL);
        de_arena_done(&arena);
    }
}

TEST(json_values_may_hold_a_nul)
{
    const de_json *v = parse_text("[\"a\\u0000b\"]");
    de_text t = { 0 };
    REQUIRE(v != NULL);
    CHECK_MEM(v->child->text, v->child->n, "a\0b", 3);
    CHECK_EQ(v->child->text[3], 0);
    CHECK(!de_json_is_string(v->child, "a"));
    de_json_write(&t, v, false);
    CHECK_STR(t.p, "[\"a\\u0000b\"]");
    de_text_done(&t);
    de_arena_done(&arena);
}

TEST(json_errors_say_where)
{
    delta_error err;
    static const char text[] = "{\n  \"a\": [1,\n    tru]\n}";
    CHECK(!parse(text, sizeof text - 1, &err));
    CHECK(strstr(err.text, "line 3 column 5") != NULL);
    de_arena_done(&arena);
    CHECK(!parse("{\"tensor\":1,\"tensor\":2}", 23, &err));
    CHECK(strstr(err.text, "tensor: ") != NULL && strstr(err.text, "duplicate") != NULL);
    de_arena_done(&arena);
}

TEST(json_tree_has_order_names_and_places)
{
    const char *text = " {\"z\": [1, \"\\u00e4\"], \"a\": {\"k\": null}, \"n\": -1.50}";
    const de_json *v = parse_text(text), *z = de_json_get(v, "z");
    REQUIRE(v && z);
    CHECK_EQ(v->n, 3);
    CHECK_STR(v->child->key, "z");
    CHECK_STR(v->child->next->key, "a");
    CHECK_STR(v->child->next->next->key, "n");
    CHECK_STR(v->child->next->next->text, "-1.50");
    CHECK_EQ(z->n, 2);
    CHECK_STR(z->child->next->text, "\xc3\xa4");
    CHECK_EQ(z->child->next->n, 2);
    CHECK(strncmp(text + z->begin, "[1, \"\\u00e4\"]", z->end - z->begin) == 0);
    CHECK_EQ(z->end - z->begin, 13);
    CHECK_EQ(v->begin, 1);
    CHECK_EQ(v->end, strlen(text));
    CHECK_EQ(de_json_get(de_json_get(v, "a"), "k")->kind, DE_JSON_NULL);
    CHECK(de_json_get(v, "k") == NULL && de_json_get(z, "z") == NULL);
    CHECK(de_json_get(NULL, "z") == NULL && !de_json_is_string(NULL, ""));
    CHECK(de_json_is_string(z->child->next, "\xc3\xa4") && !de_json_is_string(z->child, "1"));
    de_arena_done(&arena);
}

TEST(json_depth_is_bounded)
{
    char text[2 * DE_JSON_DEPTH + 8];
    delta_error err;
    for (size_t depth = DE_JSON_DEPTH; depth <= DE_JSON_DEPTH + 1; depth++) {
        memset(text, '[', depth);
        memset(text + depth, ']', depth);
        CHECK_EQ(parse(text, 2 * depth, &err) != NULL, depth == DE_JSON_DEPTH);
        de_arena_done(&arena);
    }
}

TEST(json_ends_with_its_arena)
{
    de_json *v;
    delta_error err;
    for (size_t limit = 0; limit < 600; limit += 7) {
        de_arena_init(&arena, limit);
        int r = de_json_parse(&arena, "[1,\"abc\",{\"k\":[]}]", 18, &v, &err);
        CHECK(r == 0 || r == DELTA_ENOMEM);
        CHECK_EQ(limit < 100 ? DELTA_ENOMEM : limit > 590 ? 0 : r, r);
        de_arena_done(&arena);
    }
}

TEST(json_numbers_convert_only_if_they_fit)
{
    static const struct {
        const char *text;
        bool is_u, is_d;
        uint64_t u;
        double d;
    } cases[] = {
        { "0", true, true, 0, 0 },
        { "18446744073709551615", true, true, UINT64_MAX, 18446744073709551615.0 },
        { "18446744073709551616", false, true, 0, 18446744073709551616.0 },
        { "9223372036854775807", true, true, INT64_MAX, 9223372036854775807.0 },
        { "9223372036854775808", true, true, 9223372036854775808u, 9223372036854775808.0 },
        { "-9223372036854775808", false, true, 0, -9223372036854775808.0 },
        { "-9223372036854775809", false, true, 0, -9223372036854775808.0 },
        { "1.0", false, true, 0, 1 },
        { "1e2", false, true, 0, 100 },
        { "1e999", false, false, 0, 0 },
        { "\"1\"", false, false, 0, 0 },
        { "true", false, false, 0, 0 },
    };
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        const de_json *v = parse_text(cases[k].text);
        uint64_t u = 0;
        double d = 0;
        CHECK_EQ(de_json_u64(v, &u), cases[k].is_u);
        CHECK_EQ(de_json_double(v, &d), cases[k].is_d);
        CHECK(u == cases[k].u && d == cases[k].d);
        de_arena_done(&arena);
    }
    bool b = false;
    CHECK(de_json_bool(parse_text("true"), &b) && b);
    de_arena_done(&arena);
    CHECK(!de_json_bool(parse_text("1"), &b));
    de_arena_done(&arena);
    CHECK(!de_json_u64(NULL, NULL) && !de_json_double(NULL, NULL));
}

/* What json.dumps(json.loads(x), ensure_ascii=False) gives, taken from Python 3. */
TEST(json_writes_as_python_does)
{
    static const struct {
        const char *text, *python, *compact;
    } cases[] = {
        { "null", "null", "null" },
        { "[]", "[]", "[]" },
        { "{}", "{}", "{}" },
        { "[1,2]", "[1, 2]", "[1,2]" },
        { "{\"a\":1,\"b\":[true,false,null]}", "{\"a\": 1, \"b\": [true, false, null]}",
          "{\"a\":1,\"b\":[true,false,null]}" },
        { "[1.0,1.50,100.0,1e2,1E-7,1e16,1e15,123456789.123,0.1,1e-4,1e-5,5e-324,1."
          "7976931348623157e308,-0.0,1e22,1e999,-1e999]",
          "[1.0, 1.5, 100.0, 100.0, 1e-07, 1e+16, 1000000000000000.0, 123456789.123, 0.1, 0.0001, "
          "1e-05, 5e-324, 1.7976931348623157e+308, -0.0, 1e+22, Infinity, -Infinity]",
          "[1.0,1.50,100.0,1e2,1E-7,1e16,1e15,123456789.123,0.1,1e-4,1e-5,5e-324,1."
          "7976931348623157e308,-0.0,1e22,1e999,-1e999]" },
        { "[-0,12345678901234567890123,-5]", "[0, 12345678901234567890123, -5]",
          "[-0,12345678901234567890123,-5]" },
        { "\"a\\\"b\\\\c\\/\\b\\f\\n\\r\\t\\u001f\\u007f\\u00e9\\u6f22\\ud83d\\ude00\"",
          "\"a\\\"b\\\\c/\\b\\f\\n\\r\\t\\u001f\x7f"
          "\xc3"
          "\xa9"
          "\xe6"
          "\xbc"
          "\xa2"
          "\xf0"
          "\x9f"
          "\x98"
          "\x80"
          "\"",
          "\"a\\\"b\\\\c/\\b\\f\\n\\r\\t\\u001f\x7f"
          "\xc3"
          "\xa9"
          "\xe6"
          "\xbc"
          "\xa2"
          "\xf0"
          "\x9f"
          "\x98"
          "\x80"
          "\"" },
        { " { \"k\" : [ ] , \"\\u00fc\" : \"x\" } ",
          "{\"k\": [], \"\xc3"
          "\xbc"
          "\": \"x\"}",
          "{\"k\":[],\"\xc3"
          "\xbc"
          "\":\"x\"}" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const de_json *v = parse_text(cases[i].text);
        de_text t = { 0 };
        REQUIRE(v != NULL);
        de_json_write(&t, v, false);
        CHECK_STR(t.p, cases[i].python);
        de_text_done(&t);
        de_json_write(&t, v, true);
        CHECK_STR(t.p, cases[i].compact);
        de_text_done(&t);
        de_arena_done(&arena);
    }
}

TEST(json_of_many_names_is_linear)
{
    de_text t = { 0 };
    de_json *v;
    delta_error err;
    char name[32];
    de_text_puts(&t, "{");
    for (int i = 0; i < 200000; i++) {
        (void)snprintf(name, sizeof name, "%s\"name.%d\":%d", i ? "," : "", i, i);
        de_text_puts(&t, name);
    }
    de_text_puts(&t, "}");
    REQUIRE(!t.failed);
    de_arena_init(&arena, 256 << 20);
    CHECK_EQ(de_json_parse(&arena, t.p, t.len, &v, &err), 0); /* quadratic: not within 60 s */
    CHECK_EQ(v->n, 200000);
    de_arena_done(&arena);
    de_text_done(&t);
}
