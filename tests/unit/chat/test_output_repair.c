/* The output parser on what models write in fact. Each case of the first test is a defect that a
 * server or gateway for this format has had in public; the others go through the rules. */
#include "unit/chat/output_check.h"

#define NO_CLOSER(name, value) "<parameter=" name ">\n" value "\n"

TEST(output_does_not_have_the_known_bugs)
{
    set s;
    options(&s);
    s.o.thinking = true;
    static const row thinking[] = {
        /* a call inside reasoning was lost, or its tags came out as content */
        { "I will call.\n" CALL("get_time", ""), "R{I will call.} get_time({}) =calls" },
        { "I will call.\n" CALL("get_time", "") "\n</think>\n\nOK",
          "R{I will call.} get_time({}) C{OK} =calls" },
        /* text before a call after thinking was a parse error */
        { "a</think>text" CALL("get_time", ""), "R{a} C{text} get_time({}) =calls" },
        { "a</think>" CALL("get_time", "") CALL("get_time", ""),
          "R{a} get_time({}) get_time({}) =calls" },
    };
    ROWS(thinking, &s.o, DELTA_OUT_END_STOP);
    s.o.thinking = false;
    static const row rows[] = {
        /* prose that names the tag: swallowed, or silence until the end */
        { "Use <tool_call> to call.", "C{Use <tool_call> to call.} =stop" },
        { "Use <tool_call>\n<function> or <function=",
          "C{Use <tool_call>\n<function> or <function=} =stop" },
        { "<tool_call>", "C{<tool_call>} =stop" },
        /* two functions in one wrapper were merged, their objects run together */
        { "<tool_call>\n<function=get_time>\n</function>\n<function=get_weather>\n" PARAM(
              "city", "a") "</function>\n</tool_call>",
          "get_time({}) get_weather({\"city\":\"a\"}) =calls" },
        /* a malformed parameter leaked its tag and left the JSON open */
        { CALL("get_weather", "<parameter=city\nParis\n</parameter>\n" PARAM("days", "2")),
          "get_weather({\"days\":2}) =calls" },
        { CALL("get_weather", "<parameter=>\nx\n</parameter>\n" PARAM("city", "a")),
          "get_weather({\"city\":\"a\"}) =calls" },
        { CALL("get_weather", PARAM("city", "a") "<parameter=days\n3\n</parameter>\n"),
          "get_weather({\"city\":\"a\"}) =calls" },
        /* braces in strings were counted */
        { CALL("write", PARAM("content", "}}{{\"}")), "write({\"content\":\"}}{{\\\"}\"}) =calls" },
        /* "<function=" without '>' crashed */
        { "<tool_call>\n<function=get_time", "C{<tool_call>\n<function=get_time} =stop" },
        { "<tool_call>\n<function=\n</function>\n</tool_call>",
          "C{<tool_call>\n<function=\n</function>\n</tool_call>} =stop" },
        /* string null became null; an array with true stayed a string; anyOf was encoded twice */
        { CALL("write", PARAM("content", "null")), "write({\"content\":\"null\"}) =calls" },
        { CALL("t", PARAM("a", "[true]")), "t({\"a\":[true]}) =calls" },
        { CALL("get_weather", PARAM("note", "a \"b\"")),
          "get_weather({\"note\":\"a \\\"b\\\"\"}) =calls" },
        /* literal tags in a file cut the value */
        { CALL("write", PARAM("content", "</parameter>. </function>. </tool_call>.")),
          "write({\"content\":\"</parameter>. </function>. </tool_call>.\"}) =calls" },
        { CALL("write", PARAM("content", "a\n</parameter>\nb") PARAM("path", "p")),
          "write({\"content\":\"a\\n</parameter>\\nb\",\"path\":\"p\"}) =calls" },
        { CALL("write", PARAM("content", "s = '</function>'\n<parameter=x> y") PARAM("path", "p")),
          "write({\"content\":\"s = '</function>'\\n<parameter=x> y\",\"path\":\"p\"}) =calls" },
        { CALL("write", PARAM("content", "see:\n" CALL("get_time", "") "\nend") PARAM("path", "p")),
          "write({\"content\":\"see:\\n<tool_call>\\n<function=get_time>\\n</function>\\n</"
          "tool_call>"
          "\\nend\",\"path\":\"p\"}) =calls" },
        { CALL("write", PARAM("content", CALL("get_weather", PARAM("city", "a")))),
          "write({\"content\":\"<tool_call>\\n<function=get_weather>\\n<parameter=city>\\na\\n"
          "</parameter>\\n</function>\\n</tool_call>\"}) =calls" },
        { CALL("write", PARAM("content", "</think>")), "write({\"content\":\"</think>\"}) =calls" },
        /* a doubled closer aborted the stream */
        { CALL("write", "<parameter=path>\nx\n</parameter>\n</parameter>\n"),
          "write({\"path\":\"x\"}) =calls" },
        /* entities were decoded, '&&' broke the reader */
        { CALL("write", PARAM("content", "a && b &lt; &#65;")),
          "write({\"content\":\"a && b &lt; &#65;\"}) =calls" },
        /* infinity and NaN made invalid JSON */
        { CALL("t", PARAM("n", "-inf") PARAM("o", "{\"x\": Infinity}")),
          "t({\"n\":\"-inf\",\"o\":\"{\\\"x\\\": Infinity}\"}) =calls" },
        /* drifted closers leaked into the value */
        { CALL("write",
               "<parameter=path>\nx\n</parameter1>\n<parameter=content>\ny\n</parameter_2>\n"),
          "write({\"path\":\"x\",\"content\":\"y\"}) =calls" },
    };
    ROWS(rows, &s.o, DELTA_OUT_END_STOP);
    /* a cut call was reported as finished */
    static const row cut[] = {
        { "<tool_call>\n<function=write>\n<parameter=content>\n{\"a\": 1",
          "write({\"content\":\"{\\\"a\\\": 1\"})? =length" },
        { "<tool_call>\n<function=write>\n" PARAM("content", "x"),
          "write({\"content\":\"x\"})? =length" },
        { "<tool_call>\n<function=t>\n<parameter=i>\n12", "t({})? =length" },
        { "<tool_call>\n<function=get_time>\n</function>", "get_time({}) =length" },
        { "<tool_call>\n<func", "C{<tool_call>\n<func} =length" },
    };
    ROWS(cut, &s.o, DELTA_OUT_END_LENGTH);
}

TEST(output_opens_calls_only_where_they_count)
{
    set s;
    options(&s);
    static const row content[] = {
        { "Say:\n<function=get_time>\n</function>\n", "C{Say:} get_time({}) =calls" },
        { "Say: <function=get_time>\n</function>",
          "C{Say: <function=get_time>\n</function>} =stop" },
        { "<function=nobody>\n</function>", "C{<function=nobody>\n</function>} =stop" },
        { "<function=get_time> is a tag", "C{<function=get_time> is a tag} =stop" },
        { "<function=get_weather>\n" PARAM("city", "a") "</function>\n</tool_call>",
          "get_weather({\"city\":\"a\"}) =calls" },
        { "<tool_call>\n<function=bad name>\n</function>",
          "C{<tool_call>\n<function=bad name>\n</function>} =stop" },
        { "```\n" CALL("get_time", "") "\n```\n" CALL("get_time", ""),
          "C{```\n" CALL("get_time", "") "\n```} get_time({}) =calls" },
        { "~~~~ xml\n```\n" CALL("get_time", "") "\n~~~\n~~~~~",
          "C{~~~~ xml\n```\n" CALL("get_time", "") "\n~~~\n~~~~~} =stop" },
        { "```code``` and\n" CALL("get_time", ""), "C{```code``` and} get_time({}) =calls" },
        { "    ```\n" CALL("get_time", ""), "C{```} get_time({}) =calls" },
    };
    ROWS(content, &s.o, DELTA_OUT_END_STOP);
    s.o.thinking = true;
    static const row reasoning[] = {
        { CALL("nobody", ""), "R{" CALL("nobody", "") "} =stop" },
        { "write `" CALL("get_time", "") "`", "R{write `" CALL("get_time", "") "`} =stop" },
        { "```\n" CALL("get_time", "") "\n```\n</think>" CALL("get_time", ""),
          "R{```\n" CALL("get_time", "") "\n```} get_time({}) =calls" },
        { "a\n<function=get_time>\n</function>", "R{a\n<function=get_time>\n</function>} =stop" },
    };
    ROWS(reasoning, &s.o, DELTA_OUT_END_STOP);
    s.o.calls_in_reasoning = false;
    static const row never[] = {
        { CALL("get_time", "") "</think>Hi", "R{" CALL("get_time", "") "} C{Hi} =stop" },
    };
    ROWS(never, &s.o, DELTA_OUT_END_STOP);
    options(&s);
    s.o.calls_in_fences = true;
    static const row fences[] = {
        { "```\n" CALL("get_time", "") "\n```", "C{```} get_time({}) C{\n\n```} =calls" },
    };
    ROWS(fences, &s.o, DELTA_OUT_END_STOP);
    options(&s);
    s.o.unknown_is_text = true;
    static const row unknown[] = {
        { CALL("nobody", PARAM("a", "1")), "C{" CALL("nobody", PARAM("a", "1")) "} =stop" },
        { CALL("nobody", "") CALL("get_time", ""),
          "C{" CALL("nobody", "") "} get_time({}) =calls" },
    };
    ROWS(unknown, &s.o, DELTA_OUT_END_STOP);
}

TEST(output_fills_in_missing_closers)
{
    set s;
    options(&s);
    static const row rows[] = {
        { CALL("get_weather", NO_CLOSER("city", "a") PARAM("days", "2")),
          "get_weather({\"city\":\"a\",\"days\":2}) =calls" },
        { CALL("get_weather", NO_CLOSER("city", "a")), "get_weather({\"city\":\"a\"}) =calls" },
        { "<tool_call>\n<function=get_weather>\n" PARAM("city", "a") "</tool_call>",
          "get_weather({\"city\":\"a\"}) =calls" },
        { "<tool_call>\n<function=get_weather>\n" NO_CLOSER("city", "a") "</tool_call>",
          "get_weather({\"city\":\"a\"}) =calls" },
        { "<tool_call>\n<function=get_weather>\n" PARAM("city", "a"),
          "get_weather({\"city\":\"a\"}) =calls" },
        { "<tool_call>\n<function=get_weather>\n" NO_CLOSER("city", "a"),
          "get_weather({\"city\":\"a\\n\"})? =stop" },
        { "<tool_call>\n<function=get_time>\n", "get_time({}) =calls" },
        { "<tool_call>\n<function=get_time>\n</function>\n" CALL("get_weather", PARAM("city", "a")),
          "get_time({}) get_weather({\"city\":\"a\"}) =calls" },
        { "<tool_call>\n<function=get_weather>\n" PARAM("city", "a") CALL("get_time", ""),
          "get_weather({\"city\":\"a\"}) get_time({}) =calls" },
        { CALL("get_time", "") "</tool_call>\n</function>", "get_time({}) =calls" },
        { CALL("get_weather", PARAM("city", "a") PARAM("city", "b")),
          "get_weather({\"city\":\"a\"}) =calls" },
        { CALL("get_weather", PARAM("city", "a") "well\n" PARAM("days", "1")),
          "get_weather({\"city\":\"a\\n</parameter>\\nwell\",\"days\":1}) =calls" },
        { CALL("get_weather", "well\n" PARAM("days", "1")), "get_weather({\"days\":1}) =calls" },
        { CALL("get_weather", PARAM("odd", "1") PARAM("city", "a") PARAM("odder", "2")),
          "get_weather({\"odd\":\"1\",\"city\":\"a\",\"odder\":\"2\"}) =calls" },
    };
    ROWS(rows, &s.o, DELTA_OUT_END_STOP);
}

TEST(output_counts_what_it_mends)
{
    set s;
    options(&s);
    static const struct {
        const char *text;
        enum delta_repair which;
    } rows[] = {
        { "a</think>b", DELTA_REPAIR_THINK_TAG },
        { "<function=get_time>\n</function>", DELTA_REPAIR_CALL_BARE },
        { "<tool_call> x", DELTA_REPAIR_CALL_NOT_ONE },
        { CALL("nobody", ""), DELTA_REPAIR_TOOL_UNKNOWN },
        { "<tool_call>\n<function=get_time>\n</tool_call>", DELTA_REPAIR_CLOSER_MISSING },
        { CALL("get_time", "") "</tool_call>", DELTA_REPAIR_CLOSER_REPEATED },
        { CALL("write", "<parameter=path>\nx\n</parameter1>\n"), DELTA_REPAIR_CLOSER_BROKEN },
        { CALL("get_time", "x\n"), DELTA_REPAIR_CALL_TEXT },
        { CALL("get_time", "<parameter=\n"), DELTA_REPAIR_PARAM_MALFORMED },
        { CALL("write", PARAM("path", "a") PARAM("path", "b")), DELTA_REPAIR_PARAM_REPEATED },
        { CALL("write", PARAM("path", "a</parameter>b")), DELTA_REPAIR_TAG_IN_VALUE },
        { CALL("t", PARAM("i", "x")), DELTA_REPAIR_VALUE_TYPE },
        { "<tool_call>\n<function=write>\n<parameter=path>\nx", DELTA_REPAIR_CALL_CUT },
        { "\xFF", DELTA_REPAIR_BYTES },
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        uint32_t repairs[DELTA_REPAIR_N];
        free(parse(&s.o, rows[i].text, strlen(rows[i].text), DELTA_OUT_END_STOP, NULL, repairs));
        if (repairs[rows[i].which] != 1)
            TAP_FAIL("%s: %u times", delta_repair_name(rows[i].which), repairs[rows[i].which]);
    }
    uint32_t repairs[DELTA_REPAIR_N], sum = 0;
    static const char good[] =
        CALL("write", PARAM("path", "a") PARAM("content", "b")) "\n" CALL("get_time", "");
    free(parse(&s.o, good, sizeof good - 1, DELTA_OUT_END_STOP, NULL, repairs));
    for (int i = 0; i < DELTA_REPAIR_N; i++)
        sum += repairs[i];
    CHECK_EQ(sum, 0);
    CHECK_STR(delta_repair_name(DELTA_REPAIR_N), "unknown");
}

/* Texts made of the format's own pieces in any order: nothing crashes, JSON is always whole, and
 * cuts make no difference. */
TEST(output_of_random_pieces_is_the_same_at_every_cut)
{
    static const char *const pieces[] = {
        "<tool_call>",
        "</tool_call>",
        "<function=get_time>",
        "<function=write>",
        "<function=t>",
        "<function=",
        "</function>",
        "<parameter=path>",
        "<parameter=content>",
        "<parameter=i>",
        "<parameter=x>",
        "<parameter=",
        "</parameter>",
        "</parameter1>",
        "<think>",
        "</think>",
        "\n",
        "\n",
        "\n",
        " ",
        "x",
        "5",
        "null",
        "{\"a\": 1}",
        "```",
        "`",
        "~~~",
        "<",
        ">",
        "\xC3\xA9",
        "\xE2",
        "\xE2\x80\x83",
        "<tool_call>\n<function=",
        "</parameter>\n</function>\n</tool_call>",
    };
    set s;
    options(&s);
    for (int round = 0; round < 1000; round++) {
        char text[2048];
        size_t len = 0;
        const unsigned n = 1 + rnd() % 24;
        if (rnd() % 2)
            len = (size_t)snprintf(text, sizeof text, "<tool_call>\n<function=write>\n");
        for (unsigned i = 0; i < n; i++) {
            const char *piece = pieces[rnd() % (sizeof pieces / sizeof *pieces)];
            memcpy(text + len, piece, strlen(piece));
            len += strlen(piece);
        }
        s.o.thinking = rnd() % 2;
        char *got =
            parse_all_ways(&s.o, text, len, rnd() % 2 ? DELTA_OUT_END_STOP : DELTA_OUT_END_LENGTH);
        free(got);
    }
}

/* Long undeclared parameters, long white space and tags that never end: decided at the bound. */
TEST(output_holds_back_no_more_than_its_bound)
{
    set s;
    options(&s);
    const size_t big = 3 * DELTA_OUTPUT_HOLD_MAX;
    char *text = malloc(big + 4096);
    for (int kind = 0; kind < 4; kind++) {
        static const char *const heads[] = {
            "<tool_call>\n<function=nobody>\n" PARAM("a", "1") "<parameter=b>\n",
            "a",
            "<tool_call>",
            "<tool_call>\n<function=write>\n" PARAM("path", "1"),
        };
        static const char fill[] = { 'x', ' ', ' ', '\n' };
        size_t len = strlen(heads[kind]);
        memcpy(text, heads[kind], len);
        memset(text + len, fill[kind], big);
        len += big;
        const char tail[] = "z\n</parameter>\n</function>\n</tool_call>";
        memcpy(text + len, tail, sizeof tail - 1);
        len += sizeof tail - 1;
        uint8_t *cut = calloc(len + 1, 1);
        for (size_t i = 0; i <= len; i++)
            cut[i] = i % 37 == 0;
        char *whole = parse(&s.o, text, len, DELTA_OUT_END_STOP, NULL, NULL);
        char *pieces = parse(&s.o, text, len, DELTA_OUT_END_STOP, cut, NULL);
        CHECK(strcmp(whole, pieces) == 0);
        free(whole);
        free(pieces);
        free(cut);
    }
    free(text);
}

/* A call may bring many parameters; past 1024 they are dropped, so that names are cheap to compare. */
TEST(output_takes_many_undeclared_parameters_up_to_its_bound)
{
    set s;
    options(&s);
    de_text text = { 0 };
    de_text_puts(&text, "<tool_call>\n<function=nobody>\n");
    for (int i = 0; i < 1100; i++) {
        char param[64];
        (void)snprintf(param, sizeof param, PARAM("p%d", "%d"), i, i);
        de_text_puts(&text, param);
    }
    de_text_puts(&text, "</function>\n</tool_call>");
    uint32_t repairs[DELTA_REPAIR_N];
    uint8_t *cut = calloc(text.len + 1, 1);
    memset(cut, 1, text.len + 1);
    char *whole = parse(&s.o, text.p, text.len, DELTA_OUT_END_STOP, NULL, repairs);
    char *bytes = parse(&s.o, text.p, text.len, DELTA_OUT_END_STOP, cut, NULL);
    CHECK(strcmp(whole, bytes) == 0);
    CHECK_EQ(repairs[DELTA_REPAIR_PARAM_REPEATED], 1100 - 1024);
    CHECK(strstr(whole, "\"p0\":\"0\",\"p1\":\"1\",") &&
          strstr(whole, "\"p1023\":\"1023\"}) =calls"));
    free(whole);
    free(bytes);
    free(cut);
    de_text_done(&text);
}
