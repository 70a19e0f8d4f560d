/* The output parser on what the model should write: every text is fed whole, byte by byte, in every
 * two pieces and in random pieces, and must give the same events each time. */
#include "unit/chat/output_check.h"

TEST(output_splits_reasoning_and_content)
{
    set s;
    options(&s);
    static const row plain[] = {
        { "", "=stop" },
        { "Hello.", "C{Hello.} =stop" },
        { "  \n Hello,  you.\n\n", "C{Hello,  you.} =stop" },
        { "a < b <think", "C{a < b <think} =stop" },
        { "<think>\n\n</think>\n\nHi", "C{Hi} =stop" },
        { "caf\xC3\xA9 \xE2\x80\x83 \xF0\x9F\x98\x80",
          "C{caf\xC3\xA9 \xE2\x80\x83 \xF0\x9F\x98\x80} =stop" },
        { "x\xC3", "C{x\xEF\xBF\xBD} =stop" },
        { "x\xE2\x80y\xFF", "C{x\xEF\xBF\xBDy\xEF\xBF\xBD} =stop" },
    };
    ROWS(plain, &s.o, DELTA_OUT_END_STOP);
    static const row thinking[] = {
        { "", "=stop" },
        { "Let me see.\n</think>\n\nHi.", "R{Let me see.} C{Hi.} =stop" },
        { "\nLet me see. ", "R{Let me see.} =stop" },
        { "<think>\nso\n</think>\n\nHi", "R{so} C{Hi} =stop" },
        { "so\n</think>\n\nHi\n</think>\nyou", "R{so} C{Hiyou} =stop" },
        { "</think>Hi", "C{Hi} =stop" },
        { "a</thinkx", "R{a</thinkx} =stop" },
    };
    s.o.thinking = true;
    ROWS(thinking, &s.o, DELTA_OUT_END_STOP);
}

TEST(output_reads_well_formed_calls)
{
    set s;
    options(&s);
    static const row rows[] = {
        { CALL("get_time", ""), "get_time({}) =calls" },
        { CALL("get_weather", PARAM("city", "Paris") PARAM("days", "2")),
          "get_weather({\"city\":\"Paris\",\"days\":2}) =calls" },
        { "Let me check.\n\n" CALL("get_weather", PARAM("city", "Paris")),
          "C{Let me check.} get_weather({\"city\":\"Paris\"}) =calls" },
        { CALL("get_weather", PARAM("city", "Paris")) "\n" CALL("get_weather",
                                                                PARAM("city", "Rome")),
          "get_weather({\"city\":\"Paris\"}) get_weather({\"city\":\"Rome\"}) =calls" },
        { CALL("write",
               PARAM("path", "a") PARAM("content", "one\n\n\"two\"\\\ttab && <b>&amp;</b>\n")),
          "write({\"path\":\"a\",\"content\":\"one\\n\\n\\\"two\\\"\\\\\\ttab && "
          "<b>&amp;</b>\\n\"}) =calls" },
        { CALL("write", PARAM("content", "")), "write({\"content\":\"\"}) =calls" },
        { CALL("write", "<parameter=content>\n</parameter>\n"),
          "write({\"content\":\"\"}) =calls" },
        { CALL("write", "<parameter=content>x</parameter>\n"),
          "write({\"content\":\"x\"}) =calls" },
        { CALL("write", PARAM("content", "\n x \n")), "write({\"content\":\"\\n x \\n\"}) =calls" },
        { CALL("unknown", PARAM("any", "5")), "unknown({\"any\":\"5\"}) =calls" },
        { CALL("unknown", PARAM("any", "5") PARAM("other", "6")),
          "unknown({\"any\":\"5\",\"other\":\"6\"}) =calls" },
        { CALL("get_time", "") "\nDone.", "get_time({}) C{Done.} =calls" },
    };
    ROWS(rows, &s.o, DELTA_OUT_END_STOP);
    static const row thinking[] = {
        { "I need it.\n</think>\n\n" CALL("get_time", ""), "R{I need it.} get_time({}) =calls" },
        { "I need it.\n</think>" CALL("get_time", ""), "R{I need it.} get_time({}) =calls" },
        { "I.\n</think>\n\nOK:\n" CALL("get_time", ""), "R{I.} C{OK:} get_time({}) =calls" },
    };
    s.o.thinking = true;
    ROWS(thinking, &s.o, DELTA_OUT_END_STOP);
}

TEST(output_converts_values_by_their_schema)
{
    set s;
    options(&s);
    static const struct {
        const char *name, *value, *json;
    } rows[] = {
        { "i", "5", "5" },
        { "i", " -12 ", "-12" },
        { "i", "123456789012345678901234567890", "123456789012345678901234567890" },
        { "i", "007", "7" },
        { "i", "five", "\"five\"" },
        { "i", "null", "\"null\"" },
        { "n", "1.50", "1.50" },
        { "n", ".5", "0.5" },
        { "n", "+3.", "3" },
        { "n", "-1e-3", "-1e-3" },
        { "n", "1e999", "\"1e999\"" },
        { "n", "NaN", "\"NaN\"" },
        { "n", "Infinity", "\"Infinity\"" },
        { "b", "true", "true" },
        { "b", "False", "false" },
        { "b", "yes", "\"yes\"" },
        { "o", "{\"a\": [1, true, null], \"b\": 1.50}", "{\"a\":[1,true,null],\"b\":1.50}" },
        { "o", "{'a': True, 'b': None, 'c': ('x', \"it's\",),}",
          "{\"a\":true,\"b\":null,\"c\":[\"x\",\"it's\"]}" },
        { "o", "\"{\\\"a\\\": 1}\"", "{\"a\":1}" },
        { "o", "{a: 1}", "\"{a: 1}\"" },
        { "o", "{\"a\": NaN}", "\"{\\\"a\\\": NaN}\"" },
        { "a", "[true, \"}\", {}]", "[true,\"}\",{}]" },
        { "a", "['\\u00e9\\n', -1.5]", "[\"\xC3\xA9\\n\",-1.5]" },
        { "s", "5", "\"5\"" },
        { "s", "null", "\"null\"" },
        { "s", "{\"a\": 1}", "\"{\\\"a\\\": 1}\"" },
        { "is", "5", "5" },
        { "is", "5x", "\"5x\"" },
        { "z", "None", "null" },
        { "z", "3", "3" },
        { "e", "2", "2" },
        { "free", "null", "\"null\"" },
        { "undeclared", "[1]", "\"[1]\"" },
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        char text[512], expected[512];
        (void)snprintf(text, sizeof text, CALL("t", PARAM("%s", "%s")), rows[i].name,
                       rows[i].value);
        (void)snprintf(expected, sizeof expected, "t({\"%s\":%s}) =calls", rows[i].name,
                       rows[i].json);
        char *got = parse_all_ways(&s.o, text, strlen(text), DELTA_OUT_END_STOP);
        CHECK_STR(got, expected);
        free(got);
    }
    static const row nullable[] = {
        { CALL("get_weather", PARAM("note", "null")), "get_weather({\"note\":null}) =calls" },
        { CALL("get_weather", PARAM("note", "nullable")),
          "get_weather({\"note\":\"nullable\"}) =calls" },
        { CALL("get_weather", PARAM("note", "nul")), "get_weather({\"note\":\"nul\"}) =calls" },
        { CALL("get_weather", PARAM("note", "")), "get_weather({\"note\":\"\"}) =calls" },
    };
    ROWS(nullable, &s.o, DELTA_OUT_END_STOP);
}

TEST(output_streams_a_string_value_as_it_comes)
{
    set s;
    options(&s);
    delta_output *p = NULL;
    REQUIRE(delta_output_new(&s.o, &p, NULL) == 0);
    const delta_out_event *e;
    size_t n;
    static const char head[] = "<tool_call>\n<function=write>\n<parameter=content>\n";
    REQUIRE(delta_output_push(p, head, sizeof head - 1, false, &e, &n, NULL) == 0);
    CHECK_EQ(n, 1);
    CHECK(e[0].kind == DELTA_OUT_CALL_START);
    for (int i = 0; i < 3; i++) {
        REQUIRE(delta_output_push(p, "line\n", 5, false, &e, &n, NULL) == 0);
        REQUIRE(n == 1);
        CHECK(e[0].kind == DELTA_OUT_CALL_ARGS);
        if (i == 0)
            CHECK_MEM(e[0].text.p, e[0].text.len, "{\"content\":\"line", 16);
        else
            CHECK_MEM(e[0].text.p, e[0].text.len, "\\nline", 6);
    }
    enum delta_out_finish finish;
    REQUIRE(delta_output_finish(p, DELTA_OUT_END_LENGTH, &e, &n, &finish, NULL) == 0);
    CHECK(finish == DELTA_OUT_LENGTH);
    CHECK(n == 2 && e[1].kind == DELTA_OUT_CALL_END && !e[1].complete);
    CHECK_EQ(delta_output_push(p, "x", 1, false, &e, &n, NULL), DELTA_ESTATE);
    CHECK_EQ(delta_output_finish(p, DELTA_OUT_END_STOP, &e, &n, &finish, NULL), DELTA_ESTATE);
    delta_output_free(p);
}

/* Bytes that a piece of JSON string stands for. */
static size_t unescaped(const char *s, size_t n)
{
    size_t count = 0;
    for (size_t i = 0; i < n; i++, count++)
        if (s[i] == '\\')
            i += s[i + 1] == 'u' ? 5 : 1;
    return count;
}

/* Reasoning, content and string values come out as they go in: all but the last few bytes. */
TEST(output_holds_back_a_few_bytes_of_a_text)
{
    enum { HELD = 40, PIECES = 4000 }; /* HELD: the longest beginning of a tag, and white space */
    static const char *const pieces[] = { "word ",       "a < b, ",  "<b>",         "</p",
                                          "\n",          "</param",  "if (x << 3)", "</function",
                                          "<tool_call",  "\"q\"",    "\\n",         "</thin",
                                          "<parameter=", "\xC3\xA9", "<<<<",        "\t",
                                          "</>",         "```" };
    static const char *const heads[] = { "", "x</think>",
                                         "<tool_call>\n<function=write>\n<parameter=path>\n" };
    static const enum delta_out_kind kinds[] = { DELTA_OUT_REASONING, DELTA_OUT_CONTENT,
                                                 DELTA_OUT_CALL_ARGS };
    for (int k = 0; k < 3; k++) {
        set s;
        options(&s);
        s.o.thinking = k < 2;
        delta_output *p = NULL;
        const delta_out_event *e;
        size_t n, in = 0, out = 0;
        REQUIRE(delta_output_new(&s.o, &p, NULL) == 0);
        REQUIRE(delta_output_push(p, heads[k], strlen(heads[k]), false, &e, &n, NULL) == 0);
        for (int i = 0; i < PIECES; i++) {
            const char *piece = pieces[rnd() % (sizeof pieces / sizeof *pieces)];
            REQUIRE(delta_output_push(p, piece, strlen(piece), false, &e, &n, NULL) == 0);
            in += strlen(piece);
            for (size_t j = 0; j < n; j++) {
                CHECK(e[j].kind == kinds[k]);
                out += k < 2 ? e[j].text.len : unescaped(e[j].text.p, e[j].text.len);
            }
            if (out + HELD < in)
                TAP_FAIL("of %zu bytes only %zu are out", in, out);
        }
        delta_output_free(p);
    }
}

TEST(output_takes_no_calls_where_there_are_none_to_take)
{
    set s;
    options(&s);
    static const char call[] = CALL("get_time", "");
    static const row rows[] = { { call, "C{" CALL("get_time", "") "} =stop" } };
    s.o.tools = DELTA_TOOLS_NONE;
    ROWS(rows, &s.o, DELTA_OUT_END_STOP);
    s.o.tools = DELTA_TOOLS_AUTO;
    s.o.n_tools = 0;
    ROWS(rows, &s.o, DELTA_OUT_END_STOP);
}

TEST(output_new_names_the_tool_that_is_wrong)
{
    set s;
    options(&s);
    delta_error err = { 0 };
    delta_output *p = NULL;
    s.tools[1] = (delta_str){ "{\"type\":1}", 10 };
    CHECK_EQ(delta_output_new(&s.o, &p, &err), DELTA_EINVALID);
    CHECK(strstr(err.text, "tools[1]") != NULL);
    s.tools[1] = (delta_str){ "{", 1 };
    CHECK_EQ(delta_output_new(&s.o, &p, &err), DELTA_EINVALID);
    CHECK(p == NULL);
}

/* What is sent as arguments must be taken back by the template in the next turn. */
TEST(output_arguments_are_json_that_our_reader_takes)
{
    set s;
    options(&s);
    static const char with_nul[] = CALL("write", "<parameter=path>\na\0b\n</parameter>\n");
    char *got = parse_all_ways(&s.o, with_nul, sizeof with_nul - 1, DELTA_OUT_END_STOP);
    CHECK_STR(got, "write({\"path\":\"a\xEF\xBF\xBD"
                   "b\"}) =calls");
    free(got);
    for (int depth = DE_JSON_DEPTH - 2; depth <= DE_JSON_DEPTH + 1; depth++) {
        char text[512], value[256] = { 0 };
        memset(value, '[', (size_t)depth);
        memset(value + depth, ']', (size_t)depth);
        (void)snprintf(text, sizeof text, CALL("t", PARAM("a", "%s")), value);
        got = parse(&s.o, text, strlen(text), DELTA_OUT_END_STOP, NULL, NULL);
        CHECK((strchr(got, '"') && strstr(got, ":[")) == (depth < DE_JSON_DEPTH));
        free(got);
    }
}
