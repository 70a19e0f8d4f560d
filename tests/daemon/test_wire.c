/* test_wire.c -- what peers may send: depth, lengths, text, memory, ranges, features of later. */
#include "daemon/codec.h"
#include "daemon/wire.h"
#include "support/tap.h"

static dd_request r;
static dd_status st;

static int decode(enum dd_request_kind kind, const void *msg, size_t len)
{
    memset(&st, 0, sizeof st);
    return dd_request_decode(kind, msg, len, &r, &st);
}

static void put_message(dd_wire_out *o, uint32_t field, dd_wire_out *inner)
{
    dd_wire_put_bytes(o, field, inner->data, inner->len);
    free(inner->data);
    memset(inner, 0, sizeof *inner);
}

/* ChatRequest with one message of the user. */
static dd_wire_out chat(const char *text, size_t len)
{
    dd_wire_out o = { 0 }, part = { 0 }, message = { 0 };
    dd_wire_put_bytes(&part, 1, text, len);
    dd_wire_put_varint(&message, 1, 2);
    put_message(&message, 2, &part);
    put_message(&o, 5, &message);
    return o;
}

static void expect(enum dd_request_kind kind, dd_wire_out *o, enum dd_grpc_code code,
                   const char *reason, const char *field)
{
    int result = decode(kind, o->data, o->len);
    CHECK_EQ(result, -1);
    CHECK_EQ((int)st.code, (int)code);
    CHECK(st.reason && strcmp(st.reason, reason) == 0);
    if (strcmp(st.field, field) != 0)
        TAP_FAIL("field \"%s\", not \"%s\"", st.field, field);
    dd_request_done(&r);
    free(o->data);
}

TEST(chat_with_one_message_is_taken)
{
    dd_wire_out o = chat("hello", 5);
    CHECK_EQ(decode(DD_REQ_CHAT, o.data, o.len), 0);
    REQUIRE(r.n_messages == 1);
    CHECK(r.messages[0].role == DELTA_ROLE_USER && r.messages[0].n_parts == 1);
    CHECK(r.messages[0].parts[0].text.len == 5 &&
          memcmp(r.messages[0].parts[0].text.p, "hello", 5) == 0);
    CHECK(r.thinking && !r.has_thinking && r.tool_mode == DELTA_TOOLS_AUTO);
    dd_request_done(&r);
    free(o.data);
}

TEST(every_truncation_of_a_chat_is_refused_or_still_a_chat)
{
    dd_wire_out o = chat("hello", 5);
    for (size_t n = 1; n < o.len; n++) {
        uint8_t *cut = malloc(n); /* its own, so that a sanitizer sees a read past the end */
        REQUIRE(cut);
        memcpy(cut, o.data, n);
        CHECK_EQ(decode(DD_REQ_CHAT, cut, n), -1);
        CHECK_EQ((int)st.code, (int)DD_INVALID_ARGUMENT);
        dd_request_done(&r);
        free(cut);
    }
    free(o.data);
}

TEST(text_that_is_no_utf8_or_has_a_nul_is_refused_with_its_path)
{
    dd_wire_out o = chat("a\xff", 2);
    expect(DD_REQ_CHAT, &o, DD_INVALID_ARGUMENT, "MALFORMED", "messages.parts.text");
    o = chat("a\0b", 3);
    expect(DD_REQ_CHAT, &o, DD_INVALID_ARGUMENT, "MALFORMED", "messages.parts.text");
}

TEST(field_of_the_wrong_type_is_refused)
{
    dd_wire_out o = { 0 };
    dd_wire_put_varint(&o, 5, 1);
    expect(DD_REQ_CHAT, &o, DD_INVALID_ARGUMENT, "MALFORMED", "messages");
}

TEST(unpacking_stops_at_its_memory_limit)
{
    /* Two bytes of the wire each, a struct each. */
    size_t n = 8 << 20;
    uint8_t *bytes = malloc(n);
    REQUIRE(bytes);
    for (size_t i = 0; i < n; i += 2) {
        bytes[i] = 5 << 3 | 2;
        bytes[i + 1] = 0;
    }
    CHECK_EQ(decode(DD_REQ_CHAT, bytes, n), -1);
    CHECK_EQ((int)st.code, (int)DD_INVALID_ARGUMENT);
    CHECK_STR(st.reason, "REQUEST_TOO_LARGE");
    CHECK(r.arena.used <= r.arena.limit);
    dd_request_done(&r);
    free(bytes);
}

TEST(numbers_out_of_range_are_refused_by_name)
{
    static const struct {
        uint32_t field;
        float value;
        const char *path;
    } cases[] = {
        { 1, -0.5f, "sampling.temperature" },
        { 1, 101, "sampling.temperature" },
        { 1, NAN, "sampling.temperature" },
        { 3, 0, "sampling.top_p" },
        { 3, 1.5f, "sampling.top_p" },
        { 4, -1, "sampling.min_p" },
        { 5, 2.5f, "sampling.presence_penalty" },
        { 6, -2.5f, "sampling.frequency_penalty" },
        { 7, 0, "sampling.repetition_penalty" },
        { 7, INFINITY, "sampling.repetition_penalty" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        dd_wire_out o = chat("x", 1);
        uint8_t sampling[5] = { (uint8_t)(cases[i].field << 3 | 5) };
        memcpy(sampling + 1, &cases[i].value, 4);
        dd_wire_put_bytes(&o, 10, sampling, sizeof sampling);
        expect(DD_REQ_CHAT, &o, DD_INVALID_ARGUMENT, "FIELD_INVALID", cases[i].path);
    }
}

TEST(what_this_version_lacks_is_refused_by_name)
{
    dd_wire_out o = chat("x", 1);
    dd_wire_put_varint(&o, 14, 2);
    expect(DD_REQ_CHAT, &o, DD_UNIMPLEMENTED, "NOT_IMPLEMENTED", "n");
}

TEST(cache_control_has_its_limits)
{
    char salt[200];
    memset(salt, 's', sizeof salt);
    dd_wire_out inner = { 0 }, o = chat("x", 1);
    dd_wire_put_bytes(&inner, 1, salt, 127);
    dd_wire_put_varint(&inner, 2, 1);
    put_message(&o, 15, &inner);
    CHECK_EQ(decode(DD_REQ_CHAT, o.data, o.len), 0);
    CHECK(r.bypass_cache && strlen(r.cache_salt) == 127);
    dd_request_done(&r);
    free(o.data);
    o = chat("x", 1);
    dd_wire_put_bytes(&inner, 1, salt, 128);
    put_message(&o, 15, &inner);
    expect(DD_REQ_CHAT, &o, DD_INVALID_ARGUMENT, "FIELD_INVALID", "cache.salt");
    o = chat("x", 1);
    for (int i = 0; i < 9; i++)
        dd_wire_put_varint(&inner, 3, (uint64_t)i);
    put_message(&o, 15, &inner);
    expect(DD_REQ_CHAT, &o, DD_INVALID_ARGUMENT, "FIELD_INVALID", "cache.checkpoint_messages");
}

TEST(what_the_answer_is_held_to)
{
    dd_wire_out inner = { 0 }, allowed = { 0 }, choices = { 0 }, o = chat("x", 1);
    dd_wire_put_bytes(&inner, 3, "a+", 2);
    put_message(&o, 12, &inner);
    CHECK_EQ(decode(DD_REQ_CHAT, o.data, o.len), 0);
    CHECK_EQ(r.format, DD_FORMAT_REGEX);
    CHECK(r.format_text.len == 2 && memcmp(r.format_text.p, "a+", 2) == 0);
    dd_request_done(&r);
    free(o.data);
    o = chat("x", 1);
    dd_wire_put_bytes(&choices, 1, "yes", 3);
    dd_wire_put_bytes(&choices, 1, "no", 2);
    put_message(&inner, 5, &choices);
    put_message(&o, 12, &inner);
    CHECK_EQ(decode(DD_REQ_CHAT, o.data, o.len), 0);
    CHECK_EQ(r.format, DD_FORMAT_CHOICE);
    CHECK_EQ(r.n_format_choices, 2);
    dd_request_done(&r);
    free(o.data);
    o = chat("x", 1);
    put_message(&inner, 5, &choices);
    put_message(&o, 12, &inner);
    expect(DD_REQ_CHAT, &o, DD_INVALID_ARGUMENT, "FIELD_INVALID", "format.choice.choices");
    o = chat("x", 1);
    dd_wire_put_varint(&inner, 1, 9);
    put_message(&o, 7, &inner);
    expect(DD_REQ_CHAT, &o, DD_INVALID_ARGUMENT, "FIELD_INVALID", "tool_choice.mode");
    o = chat("x", 1);
    dd_wire_put_varint(&allowed, 1, 3);
    dd_wire_put_bytes(&allowed, 2, "f", 1);
    put_message(&inner, 3, &allowed);
    put_message(&o, 7, &inner);
    CHECK_EQ(decode(DD_REQ_CHAT, o.data, o.len), 0);
    CHECK(r.tool_mode == DELTA_TOOLS_REQUIRED && !r.tool_is_named && r.n_tool_names == 1);
    CHECK_EQ(dd_request_tools_check(&r, &st), -1);
    CHECK_STR(st.field, "tool_choice.allowed.names[0]");
    dd_request_done(&r);
    free(o.data);
    o = chat("x", 1);
    put_message(&inner, 3, &allowed);
    put_message(&o, 7, &inner);
    expect(DD_REQ_CHAT, &o, DD_INVALID_ARGUMENT, "FIELD_INVALID", "tool_choice.allowed.names");
}

TEST(template_kwargs_are_three_and_no_more)
{
    static const char good[] = "{\"enable_thinking\": false, \"preserve_thinking\": true}";
    static const char bad[] = "{\"thinking\": false}";
    dd_wire_out o = chat("x", 1);
    dd_wire_put_bytes(&o, 17, good, sizeof good - 1);
    CHECK_EQ(decode(DD_REQ_CHAT, o.data, o.len), 0);
    CHECK(!r.thinking && r.preserve);
    dd_request_done(&r);
    free(o.data);
    o = chat("x", 1);
    dd_wire_put_bytes(&o, 17, bad, sizeof bad - 1);
    expect(DD_REQ_CHAT, &o, DD_INVALID_ARGUMENT, "FIELD_INVALID", "template_kwargs_json");
}

TEST(tool_of_name_description_and_schema_becomes_the_json_of_the_template)
{
    dd_wire_out o = chat("x", 1), tool = { 0 };
    dd_wire_put_bytes(&tool, 1, "f", 1);
    dd_wire_put_bytes(&tool, 2, "a \"b\"", 5);
    dd_wire_put_bytes(&tool, 3, "{\"type\":\"object\"}", 17);
    put_message(&o, 6, &tool);
    CHECK_EQ(decode(DD_REQ_CHAT, o.data, o.len), 0);
    REQUIRE(r.n_tools == 1);
    static const char want[] = "{\"type\": \"function\", \"function\": {\"name\": \"f\", "
                               "\"description\": \"a \\\"b\\\"\", \"parameters\": "
                               "{\"type\":\"object\"}}}";
    CHECK(r.tools[0].len == sizeof want - 1 && memcmp(r.tools[0].p, want, sizeof want - 1) == 0);
    dd_request_done(&r);
    free(o.data);
}

/* An answer that comes back by its calls' ids is rendered as it was sampled, NUL and all; it was cut
 * there on its way out. */
TEST(rendered_prompt_with_a_nul_is_whole)
{
    static char text[] = "a\0b";
    static delta_span span = { 0, 3 };
    static const uint32_t ids[] = { 7, 300 };
    const delta_rendered rendered = { text, 3, &span };
    bool has_text = false;
    uint64_t n_tokens = 0;
    size_t n_ids = 0, n_spans = 0, len = 0;
    uint8_t *msg = dd_render_encode(&rendered, 1, ids, 2, false, &len);
    REQUIRE(msg);
    dd_bytes rest = { msg, len };
    for (dd_wire_field f; dd_wire_next(&rest, &f) > 0;) {
        has_text |= f.number == 1 && f.bytes.len == 3 && memcmp(f.bytes.data, text, 3) == 0;
        n_ids += f.number == 2 ? f.bytes.len : 0;
        n_spans += f.number == 3;
        n_tokens = f.number == 4 ? f.value : n_tokens;
    }
    CHECK(has_text);
    CHECK_EQ(n_ids, 3); /* packed varints */
    CHECK_EQ(n_spans, 1);
    CHECK_EQ(n_tokens, 2);
    free(msg);
}
