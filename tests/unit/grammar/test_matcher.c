/* Forms, calls, masks and steps back, by example; random cases are in tests/model/test_grammar.py. */
#include "support/tap.h"

#include "base/json.h"
#include "delta/grammar.h"
#include "delta/output.h"

static delta_tokenizer *tok;
static delta_grammar_vocab *vocab;
static delta_grammar *grammar;
static delta_matcher *matcher;
static delta_error err;
static uint32_t end_id;

#define STR(s) ((delta_str){ (s), strlen(s) })

static bool open_spec(delta_grammar_spec spec)
{
    err = (delta_error){ 0 };
    if (delta_tokenizer_open(DEMO_MODEL_DIR, &tok, &err) < 0)
        return false;
    end_id = (uint32_t)delta_tokenizer_added_id(tok, "<|im_end|>");
    if (delta_grammar_vocab_new(tok, delta_tokenizer_size(tok), &end_id, 1, &vocab, &err) < 0 ||
        delta_grammar_compile(vocab, &spec, &grammar, &err) < 0 ||
        delta_matcher_new(grammar, &matcher, &err) < 0)
        return false;
    return true;
}

static void close_all(void)
{
    /* any order will do: each keeps what it needs */
    delta_grammar_vocab_free(vocab);
    delta_grammar_free(grammar);
    delta_matcher_free(matcher);
    delta_tokenizer_free(tok);
    vocab = NULL;
    grammar = NULL;
    matcher = NULL;
    tok = NULL;
}

/* Takes the text from here on; false: not all of it is allowed. */
static bool take(const char *text)
{
    uint32_t *ids = NULL;
    size_t n = 0;
    if (delta_tokenize(tok, text, strlen(text), false, &ids, &n, &err) < 0)
        return false;
    const bool ok = delta_matcher_accept(matcher, ids, n, NULL, &err) == 0;
    free(ids);
    return ok;
}

static bool is_turn(const char *text)
{
    delta_matcher_reset(matcher);
    return take(text) && delta_matcher_is_accepting(matcher);
}

static const char *refusal(delta_grammar_spec spec)
{
    const bool ok = open_spec(spec);
    close_all();
    return ok ? "(compiled)" : err.text;
}

static const char *schema_refusal(const char *schema)
{
    return refusal((delta_grammar_spec){ .content = DELTA_CONTENT_SCHEMA, .text = STR(schema) });
}

static const char weather[] =
    "{\"type\":\"function\",\"function\":{\"name\":\"weather\",\"parameters\":{\"type\":\"object\","
    "\"properties\":{\"city\":{\"type\":\"string\"},\"days\":{\"type\":\"integer\",\"minimum\":1,"
    "\"maximum\":7},\"note\":{\"type\":\"string\"}},\"required\":[\"city\"]}}}";
static const char ping[] = "{\"name\":\"ping\"}";

static delta_grammar_spec calls(enum delta_call_form form, bool thinking, bool parallel)
{
    static delta_str tools[2];
    tools[0] = STR(weather);
    tools[1] = STR(ping);
    return (delta_grammar_spec){ .thinking = thinking,
                                 .calls_in_reasoning = true,
                                 .calls = form,
                                 .tools_json = tools,
                                 .n_tools = 2,
                                 .parallel = parallel };
}

#define CALL(args) "<tool_call>\n<function=weather>\n" args "</function>\n</tool_call>"
#define ARG(name, value) "<parameter=" name ">\n" value "\n</parameter>\n"

/* ---- content */

TEST(schema_admits_declared_order_and_space_and_nothing_behind)
{
    REQUIRE(open_spec((delta_grammar_spec){
        .content = DELTA_CONTENT_SCHEMA,
        .text =
            STR("{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\"},\"b\":{\"type\":"
                "[\"string\",\"null\"]}},\"required\":[\"b\"]}") }));
    CHECK(is_turn("{\"a\":1,\"b\":\"x\"}"));
    CHECK(is_turn("{\n  \"a\": -12,\n  \"b\": null\n}"));
    CHECK(is_turn("{\"b\": \"\\u00e9\\n\"}"));
    CHECK(!is_turn("{\"b\":\"x\",\"a\":1}"));
    CHECK(!is_turn("{\"a\":1}"));
    CHECK(!is_turn("{\"a\":01,\"b\":null}"));
    CHECK(!is_turn("{\"b\":null,\"c\":1}"));
    CHECK(!is_turn("{\"b\":null} "));
    CHECK(!is_turn("{\"b\":\"</think>\"}")); /* the parser would drop it */
    CHECK(is_turn("{\"b\":\"<\\/think></tool_call>\"}"));
    close_all();
}

TEST(keys_of_free_objects_do_not_repeat_and_are_not_declared_ones)
{
    REQUIRE(open_spec((delta_grammar_spec){
        .content = DELTA_CONTENT_SCHEMA,
        .text = STR("{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\"}},"
                    "\"additionalProperties\":{\"type\":\"boolean\"}}") }));
    CHECK(is_turn("{\"x\":true,\"y\":false}"));
    CHECK(is_turn("{\"a\":1,\"x\":true}"));
    CHECK(!is_turn("{\"x\":true,\"x\":false}"));
    CHECK(!is_turn("{\"a\":true}"));
    CHECK(!is_turn("{\"x\":true,\"a\":true}"));
    CHECK(!is_turn("{\"x\":1}"));
    close_all();
}

TEST(white_space_that_means_nothing_is_bounded)
{
    REQUIRE(open_spec((delta_grammar_spec){ .content = DELTA_CONTENT_JSON }));
    CHECK(take("{"));
    unsigned n = 0;
    while (n < 100 && take("\n"))
        n++;
    while (n < 100 && take(" "))
        n++;
    CHECK(n > 10 && n <= DELTA_GRAMMAR_SPACE);
    CHECK(take("}"));
    close_all();
}

TEST(thinking_is_free_and_content_is_bound_behind_it)
{
    const delta_str choices[] = { STR("yes"), STR("no") };
    REQUIRE(open_spec((delta_grammar_spec){
        .thinking = true, .content = DELTA_CONTENT_CHOICE, .choices = choices, .n_choices = 2 }));
    CHECK(is_turn("any { text <tool_call>\n</think>\n\nyes"));
    CHECK(is_turn("</think>no"));
    CHECK(!is_turn("yes"));
    CHECK(!is_turn("x</think>\n\n\nyes"));
    CHECK(!is_turn("x</think>maybe"));
    delta_matcher_reset(matcher);
    CHECK(!delta_matcher_is_accepting(matcher)); /* the promise would be broken */
    close_all();
}

TEST(refusals_name_the_path_and_the_keyword)
{
    CHECK_STR(schema_refusal("{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"array\","
                             "\"uniqueItems\":true}}}"),
              "schema.properties.a.uniqueItems: not supported");
    CHECK_STR(schema_refusal("{\"properties\":{\"a\":{\"if\":{}}}}"),
              "schema.properties.a.if: not supported");
    CHECK_STR(schema_refusal("{\"$ref\":\"#/$defs/x\"}"), "schema.$ref: refers to nothing");
    CHECK(strstr(schema_refusal("{\"type\":\"string\",\"pattern\":\"(?=a)b\"}"),
                 "schema.pattern: lookaround") != NULL);
    CHECK(strstr(schema_refusal("{\"type\":\"string\",\"format\":\"iri\"}"), "schema.format") !=
          NULL);
    CHECK(strstr(schema_refusal("{\"type\":\"object\""), "schema: ") != NULL);
    CHECK_STR(schema_refusal("{\"type\":\"integer\",\"minimum\":3,\"maximum\":2}"),
              "grammar: nothing matches it");
    CHECK_STR(refusal((delta_grammar_spec){ .content = DELTA_CONTENT_GRAMMAR,
                                            .text = STR("root ::= a\n\na ::= b \"x\"") }),
              "grammar: line 3: a rule of this name is missing");
    delta_grammar_spec spec = calls(DELTA_CALLS_REQUIRED, false, true);
    const delta_str odd = STR("{\"name\":\"f\",\"parameters\":{\"properties\":{\"x\":{\"type\":"
                              "\"object\",\"propertyNames\":{}}}}}");
    spec.tools_json = &odd;
    spec.n_tools = 1;
    CHECK_STR(refusal(spec), "tools[0].parameters.properties.x.propertyNames: not supported");
}

TEST(budgets_end_a_compilation)
{
    CHECK(strstr(refusal((delta_grammar_spec){ .content = DELTA_CONTENT_REGEX,
                                               .text = STR("((a{1000}){1000}){1000}") }),
                 "more than 1048576 states") != NULL);
    CHECK(strstr(refusal((delta_grammar_spec){ .content = DELTA_CONTENT_REGEX,
                                               .text = STR("(a|b)*a(a|b){30}") }),
                 "more than 1048576 states") != NULL);
}

TEST(keys_tell_specs_apart)
{
    char a[65], b[65], c[65];
    delta_grammar_spec x = { .content = DELTA_CONTENT_REGEX, .text = STR("a") }, y = x, z = x;
    y.text = STR("b");
    z.n_tools = 1; /* not looked at */
    CHECK_EQ(delta_grammar_key(&x, a, NULL), 0);
    CHECK_EQ(delta_grammar_key(&y, b, NULL), 0);
    CHECK_EQ(delta_grammar_key(&z, c, NULL), 0);
    CHECK(strcmp(a, b) != 0);
    CHECK_STR(a, c);
}

/* ---- calls */

TEST(calls_take_parameters_in_any_order_each_once_and_all_required)
{
    REQUIRE(open_spec(calls(DELTA_CALLS_REQUIRED, false, true)));
    CHECK(is_turn(CALL(ARG("city", "Roma"))));
    CHECK(is_turn(CALL(ARG("days", "3") ARG("city", "Roma"))));
    CHECK(is_turn(CALL(ARG("city", "Roma") ARG("days", "3") ARG("note", "two\nlines"))));
    CHECK(
        is_turn(CALL(ARG("city", "")) "\n<tool_call>\n<function=ping>\n</function>\n</tool_call>"));
    CHECK(!is_turn(CALL(ARG("days", "3"))));
    CHECK(!is_turn(CALL(ARG("days", "8") ARG("city", "x"))));
    CHECK(!is_turn(CALL(ARG("days", "3") ARG("days", "4") ARG("city", "x"))));
    CHECK(!is_turn("text"));
    CHECK(!is_turn("<tool_call>\n<function=other>\n</function>\n</tool_call>"));
    CHECK(!is_turn(CALL(ARG("city", "Roma")) "\n"));
    close_all();
}

TEST(values_hold_tags_that_do_not_end_them)
{
    REQUIRE(open_spec(calls(DELTA_CALLS_REQUIRED, false, false)));
    CHECK(is_turn(CALL(ARG("city", "a </parameter> b"))));
    CHECK(is_turn(CALL(ARG("city", "</parameter>\n</function>\nx"))));
    CHECK(is_turn(CALL(ARG("city", "x\n<parameter=other>\ny"))));
    CHECK(
        is_turn(CALL(ARG("city", "<tool_call>\n<function=f>\n</function>\n</tool_call> quoted"))));
    CHECK(is_turn(CALL(ARG("city", "</think>"))));
    CHECK(is_turn("<tool_call>\n<function=weather>\n<parameter=city>\nx</parameter>\n</function>\n"
                  "</tool_call>")); /* no newline before the closer: the parser takes it so too */
    /* here the parser would see an end that is none of ours */
    CHECK(!is_turn(CALL(ARG("city", "a\n</parameter>\n</parameter>"))));
    CHECK(!is_turn(CALL(ARG("city", "x</function></tool_call>y"))));
    CHECK(!is_turn(CALL(ARG("city", "x\n<parameter=days>\n3"))));
    close_all();
}

TEST(required_parameters_are_asked_for_before_the_end)
{
    REQUIRE(open_spec(calls(DELTA_CALLS_REQUIRED, false, false)));
    CHECK(take("<tool_call>\n<function=weather>\n" ARG("note", "x")));
    CHECK(!take("</function>")); /* the city is missing: neither an end, nor text */
    close_all();
}

TEST(auto_is_free_until_a_call_opens)
{
    uint32_t bits[4096];
    REQUIRE(open_spec(calls(DELTA_CALLS_AUTO, false, false)));
    CHECK_EQ(delta_matcher_mask(matcher, bits), DELTA_MASK_FREE);
    CHECK(is_turn("Just text with <tags> and\n```\n<tool_call>\n<function=unknown>\n```\n"));
    CHECK(is_turn("I look: " CALL(ARG("city", "Roma"))));
    CHECK(is_turn("<function=ping>\n</function>")); /* the parser takes a bare call */
    CHECK(!is_turn("<tool_call>\n<function=unknown>"));
    CHECK(!is_turn(CALL(ARG("days", "3"))));
    CHECK(!is_turn(CALL(ARG("city", "Roma")) "more"));
    delta_matcher_reset(matcher);
    CHECK(take("x\n<tool_call>\n<function="));
    CHECK_EQ(delta_matcher_mask(matcher, bits), DELTA_MASK_SET);
    CHECK(!(bits[end_id / 32] >> (end_id % 32) & 1));
    close_all();
}

TEST(a_call_in_reasoning_ends_it_and_is_held_too)
{
    REQUIRE(open_spec(calls(DELTA_CALLS_REQUIRED, true, false)));
    CHECK(is_turn("thoughts</think>\n\n" CALL(ARG("city", "x"))));
    CHECK(is_turn("thoughts " CALL(ARG("city", "x"))));
    CHECK(!is_turn("thoughts " CALL(ARG("days", "9"))));
    CHECK(!is_turn("thoughts `<tool_call>\n<function=weather>\n"));
    CHECK(!is_turn("only thoughts"));
    close_all();
}

TEST(a_named_tool_is_called_once)
{
    delta_grammar_spec spec = calls(DELTA_CALLS_REQUIRED, false, false);
    const delta_str name = STR("ping");
    spec.allowed = &name;
    spec.n_allowed = 1;
    REQUIRE(open_spec(spec));
    const char *one = "<tool_call>\n<function=ping>\n</function>\n</tool_call>";
    CHECK(is_turn(one));
    CHECK(!take("\n"));
    CHECK(!is_turn(CALL(ARG("city", "x"))));
    /* all of it is forced */
    uint32_t ids[64];
    delta_matcher_reset(matcher);
    const size_t n = delta_matcher_forced(matcher, ids, 64);
    CHECK(n > 5);
    CHECK_EQ(delta_matcher_accept(matcher, ids, n, NULL, NULL), 0);
    char *text = NULL;
    size_t len = 0;
    REQUIRE(delta_detokenize(tok, ids, n, false, &text, &len, NULL) == 0);
    CHECK(strncmp(text, one, len) == 0 && len + 20 > strlen(one));
    free(text);
    close_all();
}

/* ---- tokens */

TEST(rollback_leads_back_to_the_same_masks)
{
    REQUIRE(open_spec(calls(DELTA_CALLS_REQUIRED, true, true)));
    const uint32_t words = delta_grammar_mask_words(vocab);
    uint32_t *ids = NULL, *masks = malloc((size_t)words * 512 * sizeof *masks), *now;
    enum delta_mask_kind kinds[512];
    size_t n = 0;
    const char *text = "hm</think>\n\n" CALL(ARG("city", "Ro\n</parameter> ma") ARG("days", "3"));
    REQUIRE(masks && delta_tokenize(tok, text, strlen(text), false, &ids, &n, &err) == 0 &&
            n < 512);
    for (size_t i = 0; i < n; i++) {
        kinds[i] = delta_matcher_mask(matcher, masks + i * words);
        REQUIRE(delta_matcher_accept(matcher, &ids[i], 1, NULL, &err) == 0);
        /* back as far as may be, and forward again: all at once */
        const size_t back = i + 1 < DELTA_MATCHER_ROLLBACK ? i + 1 : DELTA_MATCHER_ROLLBACK;
        REQUIRE(delta_matcher_rollback(matcher, back, &err) == 0);
        now = calloc(words, sizeof *now);
        REQUIRE(now != NULL);
        CHECK_EQ(delta_matcher_mask(matcher, now), kinds[i + 1 - back]);
        if (kinds[i + 1 - back] == DELTA_MASK_SET)
            CHECK(memcmp(now, masks + (i + 1 - back) * words, words * sizeof *now) == 0);
        free(now);
        REQUIRE(delta_matcher_accept(matcher, &ids[i + 1 - back], back, NULL, &err) == 0);
    }
    CHECK(delta_matcher_is_accepting(matcher));
    CHECK_EQ(delta_matcher_rollback(matcher, DELTA_MATCHER_ROLLBACK + 1, &err), DELTA_EINVALID);
    CHECK_EQ(delta_matcher_accept(matcher, &end_id, 1, NULL, &err), 0);
    CHECK(delta_matcher_is_ended(matcher));
    free(masks);
    free(ids);
    close_all();
}

TEST(a_refused_token_changes_nothing)
{
    uint32_t before[4096] = { 0 }, after[4096] = { 0 };
    REQUIRE(open_spec((delta_grammar_spec){ .content = DELTA_CONTENT_REGEX, .text = STR("ab+c") }));
    CHECK(take("ab"));
    CHECK_EQ(delta_matcher_mask(matcher, before), DELTA_MASK_SET);
    size_t taken = 9;
    uint32_t *ids = NULL;
    size_t n = 0;
    REQUIRE(delta_tokenize(tok, "x", 1, true, &ids, &n, NULL) == 0);
    CHECK_EQ(delta_matcher_accept(matcher, ids, n, &taken, &err), DELTA_EINVALID);
    CHECK_EQ(taken, 0);
    CHECK_EQ(delta_matcher_accept(matcher, &end_id, 1, NULL, &err), DELTA_EINVALID);
    CHECK_EQ(delta_matcher_mask(matcher, after), DELTA_MASK_SET);
    CHECK(memcmp(before, after, sizeof before) == 0);
    free(ids);
    close_all();
}

/* Keys are remembered for as long as their object is open; what is closed is forgotten. */
TEST(long_outputs_do_not_use_up_the_memory_of_a_matcher)
{
    REQUIRE(open_spec((delta_grammar_spec){
        .content = DELTA_CONTENT_SCHEMA,
        .text = STR("{\"type\":\"array\",\"items\":{\"type\":\"object\"}}") }));
    CHECK(take("[{}"));
    char text[96];
    bool ok = true;
    for (unsigned i = 0; ok && i < 20000; i++) {
        (void)snprintf(text, sizeof text, ",{\"key number %u\":{\"b%u\":[1]}}", i, i * 7919);
        ok = take(text);
    }
    CHECK(ok);
    CHECK(take("]") && delta_matcher_is_accepting(matcher));
    close_all();
}

/* ---- the parser */

static uint64_t random_state = 1;

static uint32_t draw(uint32_t below)
{
    random_state = random_state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)((random_state >> 33) * below >> 31);
}

static void append(de_text *out, const uint32_t *ids, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        size_t len;
        const uint8_t *p = delta_token_bytes(tok, ids[i], &len);
        de_text_add(out, (const char *)p, len);
    }
}

/* A turn of random tokens of the masks, and of texts that lead on. false: it did not end. */
static bool sample(de_text *out)
{
    static const char *const hints[] = {
        "\n</parameter>\n",        "</function>", "\n</tool_call>", "<parameter=", "\n",
        "<tool_call>\n<function=", "</parameter>"
    };
    uint32_t bits[512];
    delta_matcher_reset(matcher);
    for (unsigned i = 0; i < 2000; i++) {
        if (delta_matcher_is_accepting(matcher) && draw(2))
            return true;
        const char *h = hints[draw(7)];
        uint32_t *ids = NULL, id = 0;
        size_t n = 0, taken = 0;
        if (draw(100) < 40 + i / 4 && delta_tokenize(tok, h, strlen(h), false, &ids, &n, NULL) == 0)
            (void)delta_matcher_accept(matcher, ids, n, &taken, NULL);
        append(out, ids, taken);
        free(ids);
        if (taken)
            continue;
        if (delta_matcher_mask(matcher, bits) != DELTA_MASK_SET)
            return false;
        do
            id = draw(delta_tokenizer_size(tok));
        while (!(bits[id / 32] >> (id % 32) & 1) && draw(100000));
        for (uint32_t k = 0; !(bits[id / 32] >> (id % 32) & 1); k++)
            id = k;
        if (id == end_id)
            return true;
        if (delta_matcher_accept(matcher, &id, 1, NULL, &err) < 0)
            return false;
        append(out, &id, 1);
    }
    return false;
}

/* Whatever the grammar lets through, the parser reads, and mends nothing: tags in values are data to
 * both. */
TEST(sampled_calls_are_parsed_without_a_repair)
{
    const delta_grammar_spec spec = calls(DELTA_CALLS_REQUIRED, false, true);
    REQUIRE(open_spec(spec));
    unsigned ended = 0;
    for (unsigned i = 0; i < 200; i++) {
        de_text t = { 0 };
        if (sample(&t)) {
            ended++;
            const delta_output_options o = { .tools = DELTA_TOOLS_REQUIRED,
                                             .tools_json = spec.tools_json,
                                             .n_tools = spec.n_tools };
            delta_output *p = NULL;
            const delta_out_event *events;
            size_t n;
            enum delta_out_finish finish;
            REQUIRE(delta_output_new(&o, &p, &err) == 0);
            CHECK_EQ(delta_output_push(p, t.p, t.len, false, &events, &n, &err), 0);
            CHECK_EQ(delta_output_finish(p, DELTA_OUT_END_STOP, &events, &n, &finish, &err), 0);
            CHECK_EQ(finish, DELTA_OUT_TOOL_CALLS);
            for (unsigned r = 0; r < DELTA_REPAIR_N; r++)
                if (r != DELTA_REPAIR_TAG_IN_VALUE && delta_output_repairs(p, r))
                    TAP_FAIL("%s in %s", delta_repair_name(r), t.p);
            delta_output_free(p);
        }
        de_text_done(&t);
    }
    CHECK(ended > 100);
    close_all();
}
