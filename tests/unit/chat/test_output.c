/* The output parser: tables of texts and what they become. Every text is fed whole, byte by byte,
 * in every two pieces and in random pieces, and must give the same events each time.
 *
 * Expected results are written as text: R{reasoning} C{content} name(arguments), with "?" behind
 * the ")" of a call that is not complete, then "=stop", "=calls" or "=length". Pieces of one text
 * are joined in the order they came. */
#include "support/tap.h"

#include "base/json.h"
#include "delta/output.h"

static const char *const tools[] = {
    "{\"type\":\"function\",\"function\":{\"name\":\"get_weather\",\"parameters\":{\"type\":"
    "\"object\","
    "\"properties\":{\"city\":{\"type\":\"string\"},\"days\":{\"type\":\"integer\"},"
    "\"note\":{\"anyOf\":[{\"type\":\"string\"},{\"type\":\"null\"}]}}}}}",
    "{\"type\":\"function\",\"function\":{\"name\":\"write\",\"parameters\":{\"type\":\"object\","
    "\"properties\":{\"path\":{\"type\":\"string\"},\"content\":{\"type\":\"string\"}}}}}",
    "{\"type\":\"function\",\"function\":{\"name\":\"t\",\"parameters\":{\"type\":\"object\","
    "\"$defs\":{\"I\":{\"type\":\"integer\"}},\"properties\":{"
    "\"i\":{\"$ref\":\"#/$defs/I\"},\"n\":{\"type\":\"number\"},\"b\":{\"type\":\"bool\"},"
    "\"o\":{\"type\":\"object\"},\"a\":{\"type\":\"array\"},\"s\":{\"type\":\"string\"},"
    "\"is\":{\"type\":[\"integer\",\"string\"]},\"z\":{\"type\":[\"integer\",\"null\"]},"
    "\"e\":{\"enum\":[1,2]},\"free\":{}}}}}",
    "{\"name\":\"get_time\"}",
};
enum { N_TOOLS = sizeof tools / sizeof *tools };

typedef struct set {
    delta_output_options o;
    delta_str tools[N_TOOLS];
} set;

static void options(set *s)
{
    for (int i = 0; i < N_TOOLS; i++)
        s->tools[i] = (delta_str){ tools[i], strlen(tools[i]) };
    s->o = (delta_output_options){ .tools = DELTA_TOOLS_AUTO,
                                   .tools_json = s->tools,
                                   .n_tools = N_TOOLS,
                                   .calls_in_reasoning = true };
}

/* Joins events into one text; checks that the pieces of arguments are the whole of the end. */
typedef struct joiner {
    de_text out, args;
    int open; /* the kind of text that is open, or -1 */
    uint32_t calls;
} joiner;

static void join_close(joiner *j)
{
    if (j->open >= 0)
        de_text_puts(&j->out, "} ");
    j->open = -1;
}

static void join(joiner *j, const delta_out_event *e, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        switch (e[i].kind) {
        case DELTA_OUT_REASONING:
        case DELTA_OUT_CONTENT:
            CHECK(e[i].text.len > 0);
            if (j->open != (int)e[i].kind) {
                join_close(j);
                de_text_puts(&j->out, e[i].kind == DELTA_OUT_REASONING ? "R{" : "C{");
                j->open = (int)e[i].kind;
            }
            de_text_add(&j->out, e[i].text.p, e[i].text.len);
            break;
        case DELTA_OUT_CALL_START:
            join_close(j);
            CHECK_EQ(e[i].call, j->calls);
            j->calls++;
            j->args.len = 0;
            de_text_add(&j->out, e[i].text.p, e[i].text.len);
            de_text_puts(&j->out, "(");
            break;
        case DELTA_OUT_CALL_ARGS:
            CHECK(e[i].text.len > 0);
            CHECK_EQ(e[i].call + 1, j->calls);
            de_text_add(&j->args, e[i].text.p, e[i].text.len);
            break;
        case DELTA_OUT_CALL_END:
            CHECK_EQ(e[i].call + 1, j->calls);
            CHECK_MEM(e[i].text.p, e[i].text.len, j->args.p, j->args.len);
            de_text_add(&j->out, e[i].text.p, e[i].text.len);
            de_text_puts(&j->out, e[i].complete ? ") " : ")? ");
            de_arena a;
            de_arena_init(&a, 64u << 20);
            de_json *v = NULL;
            delta_error err = { 0 };
            if (de_json_parse(&a, e[i].text.p, e[i].text.len, &v, &err) < 0)
                TAP_FAIL("arguments are no JSON: %s", err.text);
            de_arena_done(&a);
            break;
        }
    }
}

/* Feeds text with cuts behind each position whose bit is set; the result is malloc'ed. */
static char *parse(const delta_output_options *o, const char *text, size_t len,
                   enum delta_out_end end, const uint8_t *cut, uint32_t *ret_repairs)
{
    delta_output *p = NULL;
    delta_error err = { 0 };
    joiner j = { .open = -1 };
    if (delta_output_new(o, &p, &err) < 0) {
        TAP_FAIL("%s", err.text);
        return NULL;
    }
    const delta_out_event *e;
    size_t n, from = 0;
    for (size_t i = 1; i <= len; i++)
        if (i == len || (cut && cut[i])) {
            char *copy = malloc(i - from); /* so that reading past the piece is seen */
            memcpy(copy, text + from, i - from);
            CHECK_EQ(delta_output_push(p, copy, i - from, false, &e, &n, &err), 0);
            free(copy);
            join(&j, e, n);
            from = i;
        }
    enum delta_out_finish finish = DELTA_OUT_STOP;
    CHECK_EQ(delta_output_finish(p, end, &e, &n, &finish, &err), 0);
    join(&j, e, n);
    join_close(&j);
    de_text_puts(&j.out, finish == DELTA_OUT_STOP         ? "=stop"
                         : finish == DELTA_OUT_TOOL_CALLS ? "=calls"
                                                          : "=length");
    for (unsigned k = 0; ret_repairs && k < DELTA_REPAIR_N; k++)
        ret_repairs[k] = delta_output_repairs(p, (enum delta_repair)k);
    delta_output_free(p);
    de_text_done(&j.args);
    return j.out.p;
}

static uint32_t seed = 12345;
static uint32_t rnd(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 17;
    return seed ^= seed << 5;
}

/* All cuts agree; returns the result. */
static char *parse_all_ways(const delta_output_options *o, const char *text, size_t len,
                            enum delta_out_end end)
{
    uint32_t repairs[DELTA_REPAIR_N], again[DELTA_REPAIR_N];
    char *whole = parse(o, text, len, end, NULL, repairs);
    uint8_t *cut = calloc(len + 1, 1);
    for (size_t way = 0; way < len + 12; way++) {
        memset(cut, 0, len + 1);
        if (way == 0)
            memset(cut, 1, len + 1);
        else if (way < len)
            cut[way] = 1;
        else
            for (size_t i = 0; i <= len; i++)
                cut[i] = rnd() % (2 + way - len) == 0;
        char *s = parse(o, text, len, end, cut, again);
        if (strcmp(s, whole) != 0)
            TAP_FAIL("way %zu of \"%.*s\": \"%s\", but whole \"%s\"", way, (int)len, text, s,
                     whole);
        CHECK(memcmp(repairs, again, sizeof repairs) == 0);
        free(s);
    }
    free(cut);
    return whole;
}

typedef struct row {
    const char *text, *expected;
} row;

#define ROWS(table, o, end)                                                                        \
    for (size_t row_i = 0; row_i < sizeof(table) / sizeof *(table); row_i++) {                     \
        char *got = parse_all_ways(o, (table)[row_i].text, strlen((table)[row_i].text), end);      \
        CHECK_STR(got, (table)[row_i].expected);                                                   \
        free(got);                                                                                 \
    }

#define CALL(name, params) "<tool_call>\n<function=" name ">\n" params "</function>\n</tool_call>"
#define PARAM(name, value) "<parameter=" name ">\n" value "\n</parameter>\n"

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
