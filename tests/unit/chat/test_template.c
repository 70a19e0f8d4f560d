/* The chat template: the examples of the format's description, errors, and suffixes.
 * (Golden renderings: test_golden_chat.c. Random conversations against Jinja:
 * tests/model/test_template_jinja.py.) */
#include "support/tap.h"

#include "base/json.h"
#include "delta/chat.h"
#include "delta/openai.h"

static delta_openai *conversation(const char *messages, const char *tools)
{
    delta_openai *o = NULL;
    delta_error err = { 0 };
    int e =
        delta_openai_parse(messages, strlen(messages), tools, tools ? strlen(tools) : 0, &o, &err);
    if (e < 0)
        TAP_FAIL("%s", err.text);
    return o;
}

static char *render(delta_chat *c)
{
    delta_rendered r = { 0 };
    delta_error err = { 0 };
    if (delta_chat_render(c, &r, &err) < 0) {
        TAP_FAIL("%s", err.text);
        return strdup("");
    }
    char *text = r.text;
    CHECK_EQ(strlen(text), r.len);
    free(r.messages);
    return text;
}

/* ---- SHA-256, to check texts too long to be written down twice */

static uint32_t rotate(uint32_t x, int n)
{
    return x >> n | x << (32 - n);
}

static void sha256(const char *text, size_t len, char ret_hex[65])
{
    uint32_t k[64], h[8];
    unsigned n = 0;
    for (unsigned p = 2; n < 64; p++) { /* fractions of cube and square roots of the primes */
        bool prime = true;
        for (unsigned d = 2; d * d <= p; d++)
            prime &= p % d != 0;
        if (!prime)
            continue;
        const long double cube = cbrtl((long double)p), square = sqrtl((long double)p);
        k[n] = (uint32_t)((cube - floorl(cube)) * 4294967296.0L);
        if (n < 8)
            h[n] = (uint32_t)((square - floorl(square)) * 4294967296.0L);
        n++;
    }
    size_t total = (len + 9 + 63) / 64 * 64;
    uint8_t *m = calloc(total, 1);
    memcpy(m, text, len);
    m[len] = 0x80;
    for (int i = 0; i < 8; i++)
        m[total - 1 - (size_t)i] = (uint8_t)((uint64_t)len * 8 >> (8 * i));
    for (size_t at = 0; at < total; at += 64) {
        uint32_t w[64], v[8];
        for (int i = 0; i < 16; i++) {
            const uint8_t *b = m + at + 4 * i;
            w[i] = (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
        }
        for (int i = 16; i < 64; i++)
            w[i] = w[i - 16] + w[i - 7] +
                   (rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3) +
                   (rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10);
        memcpy(v, h, sizeof v);
        for (int i = 0; i < 64; i++) {
            uint32_t a = v[7] + (rotate(v[4], 6) ^ rotate(v[4], 11) ^ rotate(v[4], 25)) +
                         ((v[4] & v[5]) ^ (~v[4] & v[6])) + k[i] + w[i];
            uint32_t b = (rotate(v[0], 2) ^ rotate(v[0], 13) ^ rotate(v[0], 22)) +
                         ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
            memmove(v + 1, v, 7 * sizeof *v);
            v[4] += a;
            v[0] = a + b;
        }
        for (int i = 0; i < 8; i++)
            h[i] += v[i];
    }
    free(m);
    for (int i = 0; i < 8; i++)
        (void)snprintf(ret_hex + 8 * i, 9, "%08x", h[i]);
}

#define TOOL                                                                                       \
    "[{\"type\":\"function\",\"function\":{\"name\":\"get_weather\",\"description\":\"Get the "    \
    "weather\",\"parameters\":{\"type\":\"object\",\"properties\":{\"city\":{\"type\":\"string\"}" \
    ","                                                                                            \
    "\"days\":{\"type\":\"integer\"}},\"required\":[\"city\"]}}}]"
#define FOUR                                                                                       \
    "{\"role\":\"system\",\"content\":\"You are helpful.\"},"                                      \
    "{\"role\":\"user\",\"content\":\"Weather in Paris and Rome?\"},"                              \
    "{\"role\":\"assistant\",\"content\":\"\",\"reasoning_content\":\"I need "                     \
    "tools.\",\"tool_calls\":["                                                                    \
    "{\"function\":{\"name\":\"get_weather\",\"arguments\":{\"city\":\"Paris\",\"days\":2,"        \
    "\"opt\":{\"a\":[1,true,null]},\"f\":true}}},"                                                 \
    "{\"function\":{\"name\":\"get_weather\",\"arguments\":\"{\\\"city\\\":\\\"Rome\\\"}\"}}]},"   \
    "{\"role\":\"tool\",\"content\":\"18C\"},{\"role\":\"tool\",\"content\":\"22C\"}"

TEST(template_renders_the_examples)
{
    static const struct {
        const char *messages;
        bool prompt, no_think, preserve, ids;
        const char *expected;
    } rows[] = {
        { "[{\"role\":\"system\",\"content\":\"  Be "
          "brief.\\n\"},{\"role\":\"user\",\"content\":\"Hi\\n\"}]",
          true, false, false, false,
          "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
          "<|im_start|>assistant\n<think>\n" },
        { "[{\"role\":\"user\",\"content\":\"Hi\"}]", true, true, false, false,
          "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n" },
        { "[{\"role\":\"user\",\"content\":\"1+1?\"},{\"role\":\"assistant\",\"content\":\"2\","
          "\"reasoning\":\"easy\"},{\"role\":\"user\",\"content\":\"2+2?\"}]",
          true, false, false, false,
          "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
          "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n" },
        { "[{\"role\":\"user\",\"content\":\"1+1?\"},{\"role\":\"assistant\",\"content\":\"2\","
          "\"reasoning\":\"easy\"},{\"role\":\"user\",\"content\":\"2+2?\"}]",
          false, false, true, false,
          "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>\neasy\n</think>\n\n2"
          "<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n" },
        { "[{\"role\":\"user\",\"content\":[{\"type\":\"image\"},{\"text\":\"What? "
          "\"},{\"video\":\"v\"},"
          "{\"image_url\":{}}]}]",
          false, false, false, true,
          "<|im_start|>user\nPicture 1: <|vision_start|><|image_pad|><|vision_end|>What? Video 1: "
          "<|vision_start|><|video_pad|><|vision_end|>Picture 2: <|vision_start|><|image_pad|>"
          "<|vision_end|><|im_end|>\n" },
        { "[{\"role\":\"system\",\"content\":\"\"},{\"role\":\"user\",\"content\":\"x\"},"
          "{\"role\":\"assistant\",\"tool_calls\":[{\"name\":\"f\",\"arguments\":\"\"}]}]",
          false, false, false, false,
          "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n<"
          "think>"
          "\n\n</think>\n\n<tool_call>\n<function=f>\n</function>\n</tool_call><|im_end|>\n" },
        { "[{\"role\":\"tool\",\"content\":\"x\"},{\"role\":\"user\",\"content\":\"y\"}]", false,
          false, false, false,
          "\n<tool_response>\nx\n</tool_response><|im_end|>\n<|im_start|>user\ny<|im_end|>\n" },
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        delta_openai *o = conversation(rows[i].messages, NULL);
        REQUIRE(o);
        delta_chat *c = delta_openai_chat(o);
        c->add_generation_prompt = rows[i].prompt;
        c->enable_thinking = !rows[i].no_think;
        c->preserve_thinking = rows[i].preserve;
        c->add_vision_id = rows[i].ids;
        char *text = render(c);
        CHECK_STR(text, rows[i].expected);
        free(text);
        delta_openai_free(o);
    }
}

TEST(template_renders_the_tools_example_to_the_published_hash)
{
    char hex[65];
    sha256("abc", 3, hex);
    CHECK_STR(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    delta_openai *o = conversation("[" FOUR "]", TOOL);
    REQUIRE(o);
    delta_openai_chat(o)->add_generation_prompt = true;
    char *text = render(delta_openai_chat(o));
    CHECK_EQ(strlen(text), 1712);
    sha256(text, strlen(text), hex);
    CHECK_STR(hex, "4e93159cb8f4f091921881a88218c412e25a38cf9b94357a5a757e8a511c3d6a");
    const char *from = strstr(text, "\n</tools>"), *to = strstr(text, "</IMPORTANT>");
    REQUIRE(from && to);
    CHECK_EQ(to + 12 - from, 826);
    sha256(from, (size_t)(to + 12 - from), hex);
    CHECK_STR(hex, "f795e26d414b9674b70bb2a8ea4546fe423ad9238a0330a75fb148f4d4722029");
    free(text);
    delta_openai_free(o);
}

TEST(template_of_35_prints_scalars_as_python)
{
    delta_openai *o = conversation(
        "[{\"role\":\"user\",\"content\":\"x\"},{\"role\":\"assistant\",\"tool_calls\":["
        "{\"name\":\"f\",\"arguments\":{\"a\":true,\"b\":null,\"c\":[true],\"d\":1.50,"
        "\"e\":false,\"g\":\"true\"}}]}]",
        NULL);
    REQUIRE(o);
    delta_chat *c = delta_openai_chat(o);
    c->scalars_as_python = true;
    char *text = render(c);
    CHECK(strstr(text, "<parameter=a>\nTrue\n</parameter>\n<parameter=b>\nNone\n</parameter>\n"
                       "<parameter=c>\n[true]\n</parameter>\n<parameter=d>\n1.5\n</parameter>\n"
                       "<parameter=e>\nFalse\n</parameter>\n<parameter=g>\ntrue\n</parameter>\n"));
    free(text);
    delta_openai_free(o);
}

TEST(template_errors_name_the_message)
{
    static const struct {
        const char *messages, *tools, *error;
    } rows[] = {
        { "[]", NULL, "messages: No messages provided." },
        { "[{\"role\":\"system\",\"content\":\"x\"}]", NULL,
          "messages: No user query found in messages." },
        { "[{\"role\":\"user\",\"content\":\"<tool_response>x</tool_response>\"}]", NULL,
          "messages: No user query found in messages." },
        { "[{\"role\":\"user\",\"content\":\"x\"},{\"role\":\"system\",\"content\":\"x\"}]", NULL,
          "messages[1]: System message must be at the beginning." },
        { "[{\"role\":\"system\",\"content\":[{\"type\":\"image\"}]},{\"role\":\"user\"}]", NULL,
          "messages[0]: System message cannot contain images." },
        { "[{\"role\":\"system\",\"content\":[{\"type\":\"video\"}]},{\"role\":\"user\"}]", NULL,
          "messages[0]: System message cannot contain videos." },
        { "[{\"role\":\"user\",\"content\":5}]", NULL, "messages[0]: Unexpected content type." },
        { "[{\"role\":\"user\",\"content\":[5]}]", NULL,
          "messages[0]: Unexpected item type in content." },
        { "[{\"role\":\"developer\",\"content\":\"x\"}]", NULL,
          "messages[0]: Unexpected message role." },
        { "[5]", NULL, "messages[0]: not an object" },
        { "{}", NULL, "messages: not an array" },
        { "[", NULL, "messages: JSON line 1" },
        { "[{\"role\":\"user\"}]", "{}", "tools: not an array" },
        { "[{\"role\":\"user\"}]", "[5]", "tools[0]: not an object" },
        { "[{\"role\":\"user\"},{\"role\":\"assistant\",\"tool_calls\":{}}]", NULL,
          "messages[1]: tool_calls is not an array" },
        { "[{\"role\":\"user\"},{\"role\":\"assistant\",\"tool_calls\":[{}]}]", NULL,
          "messages[1]: tool_calls[0]: no name" },
        { "[{\"role\":\"user\"},{\"role\":\"assistant\",\"tool_calls\":[{\"name\":\"f\","
          "\"arguments\":5}]}]",
          NULL, "messages[1]: tool_calls[0]: arguments are neither" },
        { "[{\"role\":\"user\"},{\"role\":\"assistant\",\"tool_calls\":[{\"name\":\"f\","
          "\"arguments\":"
          "\"[1]\"}]}]",
          NULL, "messages[1]: arguments of call 0: not a JSON object" },
        { "[{\"role\":\"user\"},{\"role\":\"assistant\",\"tool_calls\":[{\"name\":\"f\","
          "\"arguments\":"
          "\"{\"}]}]",
          NULL, "messages[1]: arguments of call 0: JSON line 1" },
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        delta_error err = { 0 };
        delta_openai *o = NULL;
        delta_rendered r = { 0 };
        int e = delta_openai_parse(rows[i].messages, strlen(rows[i].messages), rows[i].tools,
                                   rows[i].tools ? strlen(rows[i].tools) : 0, &o, &err);
        if (e >= 0)
            e = delta_chat_render(delta_openai_chat(o), &r, &err);
        CHECK_EQ(e, DELTA_EINVALID);
        CHECK_EQ(err.code, DELTA_EINVALID);
        if (strncmp(err.text, rows[i].error, strlen(rows[i].error)) != 0)
            TAP_FAIL("\"%s\" does not start with \"%s\"", err.text, rows[i].error);
        delta_openai_free(o);
    }
    delta_openai *o = conversation("[{\"role\":\"user\",\"content\":\"x\"}]", NULL);
    delta_rendered r;
    delta_openai_chat(o)->first_message = 2;
    CHECK_EQ(delta_chat_render(delta_openai_chat(o), &r, NULL), DELTA_EINVALID);
    delta_openai_chat(o)->first_message = 0;
    delta_openai_chat(o)->leave_open = delta_openai_chat(o)->add_generation_prompt = true;
    CHECK_EQ(delta_chat_render(delta_openai_chat(o), &r, NULL), DELTA_EINVALID);
    delta_openai_free(o);
}

TEST(template_says_what_each_message_became)
{
    delta_openai *o = conversation("[" FOUR "]", TOOL);
    REQUIRE(o);
    delta_chat *c = delta_openai_chat(o);
    delta_rendered r;
    REQUIRE(delta_chat_render(c, &r, NULL) == 0);
    static const char *const starts[] = { "<|im_start|>system\n# Tools", "<|im_start|>user\nW",
                                          "<|im_start|>assistant\n",
                                          "<|im_start|>user\n<tool_response>\n18",
                                          "\n<tool_response>\n22" };
    for (size_t i = 0; i < c->n_messages; i++) {
        CHECK_EQ(r.messages[i].begin, i ? r.messages[i - 1].end : 0);
        CHECK(strncmp(r.text + r.messages[i].begin, starts[i], strlen(starts[i])) == 0);
    }
    CHECK_EQ(r.messages[c->n_messages - 1].end, r.len);
    delta_rendered_done(&r);
    c->first_message = 3;
    REQUIRE(delta_chat_render(c, &r, NULL) == 0);
    CHECK_EQ(r.messages[2].end, 0);
    CHECK_EQ(r.messages[3].begin, 1); /* behind the newline of the sampled answer */
    CHECK_EQ(r.messages[4].end, r.len);
    delta_rendered_done(&r);
    delta_openai_free(o);
}

/* ---- suffixes */

/* An answer as it was sampled goes before its parts, and loses its reasoning where they would. */
TEST(template_sampled_text_stands_for_its_parts)
{
    static const char said[] =
        "hm </think>\n\n text <tool_call>\n<function=f>\n<parameter=a>\n 1.0 "
        "\n</parameter>\n</function>\n</tool_call>";
    static const delta_part question = { .text = { "q", 1 } }, result = { .text = { "r", 1 } };
    static const delta_chat_call call = { .name = { "f", 1 },
                                          .arguments_json = { "{\"a\":1}", 7 } };
    delta_message m[4] = {
        { .role = DELTA_ROLE_USER, .parts = &question, .n_parts = 1 },
        { .role = DELTA_ROLE_ASSISTANT,
          .calls = &call,
          .n_calls = 1,
          .sampled = { said, sizeof said - 1 },
          .sampled_thought = true },
        { .role = DELTA_ROLE_TOOL, .parts = &result, .n_parts = 1 },
        { .role = DELTA_ROLE_USER, .parts = &question, .n_parts = 1 },
    };
    delta_chat c = { .messages = m, .n_messages = 3 };
    char *text = render(&c), *want = NULL;
    CHECK(asprintf(&want,
                   "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n%s<|im_end|>\n"
                   "<|im_start|>user\n<tool_response>\nr\n</tool_response><|im_end|>\n",
                   said) > 0);
    CHECK_STR(text, want);
    free(text);
    /* A later question: the reasoning goes. */
    c.n_messages = 4;
    text = render(&c);
    CHECK(strstr(text, "assistant\n text <tool_call>") != NULL);
    free(text);
    c.preserve_thinking = true;
    text = render(&c);
    CHECK(strstr(text, "assistant\n<think>\nhm </think>") != NULL);
    free(text);
    /* The prompt had closed the think block. */
    m[1].sampled_thought = false;
    text = render(&c);
    CHECK(strstr(text, "assistant\n<think>\n\n</think>\n\nhm </think>") != NULL);
    free(text);
    /* Reasoning that a call ended cannot be told from it: the parts are rendered. */
    m[1].sampled_thought = true;
    m[1].sampled = (delta_str){ said + 14, sizeof said - 15 };
    c.preserve_thinking = false;
    text = render(&c);
    CHECK(strstr(text, "<parameter=a>\n1\n</parameter>") != NULL);
    free(text);
    free(want);
}

static uint32_t seed = 99;
static uint32_t rnd(uint32_t n)
{
    seed ^= seed << 13;
    seed ^= seed >> 17;
    seed ^= seed << 5;
    return seed % n;
}

static const delta_part parts[] = {
    { .text = { "Hi", 2 } }, { .text = { " a\n", 3 } }, { .kind = DELTA_PART_IMAGE },
    { .text = { "", 0 } },   { .text = { "b c", 3 } },  { .kind = DELTA_PART_VIDEO },
};
static const delta_chat_call calls[] = {
    { .name = { "f", 1 }, .arguments_json = { "{\"a\":1}", 7 } }, { .name = { "g", 1 } }
};

static size_t random_messages(delta_message *m)
{
    const size_t n = 2 + rnd(8);
    for (size_t i = 0; i < n; i++) {
        const uint32_t role = i == 0 ? rnd(2) : 1 + rnd(3);
        m[i] = (delta_message){ .role = (enum delta_role)(i == 1 ? 1 : role),
                                .parts = parts + (i ? rnd(3) : 0),
                                .n_parts = i ? rnd(4) : 1 };
        if (m[i].role == DELTA_ROLE_ASSISTANT) {
            m[i].has_reasoning = true;
            m[i].reasoning = rnd(2) ? (delta_str){ "why", 3 } : (delta_str){ NULL, 0 };
            m[i].calls = calls;
            m[i].n_calls = rnd(3);
        }
    }
    return n;
}

/* A session's life: rendered prompts and suffixes, with answers "sampled" as the template spells
 * them, are byte for byte the whole conversation. Turns are split wherever they may be. */
TEST(template_suffixes_join_to_the_whole)
{
    unsigned splits = 0, sampled = 0, open = 0;
    for (int round = 0; round < 2000; round++) {
        delta_message m[10];
        delta_chat whole = { .messages = m, .preserve_thinking = true, .add_vision_id = rnd(2) };
        whole.n_messages = random_messages(m);
        delta_str tool = { "{\"name\":\"f\"}", 12 };
        whole.tools_json = &tool;
        whole.n_tools = rnd(2);
        char *expected = render(&whole);

        de_text joined = { 0 };
        size_t done = 0;
        enum delta_join join = DELTA_JOIN_AUTO;
        while (done < whole.n_messages) {
            /* up to and with message `upto`; then an answer may be sampled */
            size_t upto = done + 1 + rnd((uint32_t)(whole.n_messages - done));
            while (upto < whole.n_messages && upto < 2)
                upto++; /* a prompt needs a question */
            delta_chat part = whole;
            part.n_messages = upto;
            part.first_message = done;
            part.join = join;
            const bool answers =
                upto < whole.n_messages && m[upto].role == DELTA_ROLE_ASSISTANT && rnd(4);
            part.enable_thinking = !answers || m[upto].reasoning.len;
            part.add_generation_prompt = answers;
            part.leave_open =
                !answers && m[upto - 1].role == DELTA_ROLE_TOOL && upto < whole.n_messages;
            char *text = render(&part);
            de_text_puts(&joined, text);
            free(text);
            join = part.leave_open ? DELTA_JOIN_OPEN : DELTA_JOIN_CLOSED;
            open += part.leave_open;
            splits++;
            done = upto;
            if (!answers)
                continue;
            /* what the model says: the rest of the whole up to its <|im_end|> */
            sampled++;
            REQUIRE(strncmp(expected, joined.p, joined.len) == 0);
            const char *end = strstr(expected + joined.len, "<|im_end|>");
            REQUIRE(end);
            de_text_add(&joined, expected + joined.len, (size_t)(end + 10 - expected) - joined.len);
            join = rnd(2) ? DELTA_JOIN_SAMPLED : DELTA_JOIN_AUTO;
            done++;
            if (done == whole.n_messages)
                de_text_puts(&joined, "\n");
        }
        CHECK_STR(joined.p, expected);
        de_text_done(&joined);
        free(expected);
    }
    CHECK(splits > 2000 && sampled > 100 && open > 100);
}

TEST(template_suffix_starts_as_documented)
{
    delta_openai *o = conversation("[" FOUR "]", TOOL);
    REQUIRE(o);
    delta_chat *c = delta_openai_chat(o);
    static const struct {
        size_t first;
        enum delta_join join;
        const char *start;
    } rows[] = {
        { 3, DELTA_JOIN_AUTO, "\n<|im_start|>user\n<tool_response>\n18C" },
        { 3, DELTA_JOIN_CLOSED, "<|im_start|>user\n<tool_response>\n18C" },
        { 4, DELTA_JOIN_OPEN, "\n<tool_response>\n22C" },
        { 4, DELTA_JOIN_CLOSED, "<|im_start|>user\n<tool_response>\n22C" },
        { 5, DELTA_JOIN_OPEN, "<|im_end|>\n<|im_start|>assistant\n<think>\n" },
        { 5, DELTA_JOIN_AUTO, "<|im_start|>assistant\n<think>\n" },
    };
    c->add_generation_prompt = true;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        c->first_message = rows[i].first;
        c->join = rows[i].join;
        char *text = render(c);
        if (strncmp(text, rows[i].start, strlen(rows[i].start)) != 0)
            TAP_FAIL("\"%s\" does not start with \"%s\"", text, rows[i].start);
        free(text);
    }
    delta_openai_free(o);
}

TEST(template_trims_what_python_calls_white_space)
{
    static const uint32_t points[] = { 0x09, 0x0D, 0x1C, 0x1F, 0x20, 0x85, 0xA0, 0x1680, 0x2000,
                                       0x200A, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000,
                                       /* and these are none */
                                       0x08, 0x0E, 0x1B, 0x7F, 0x84, 0xA1, 0x180E, 0x200B, 0x2060,
                                       0xFEFF };
    for (size_t i = 0; i < sizeof points / sizeof *points; i++) {
        const uint32_t c = points[i];
        char u[8] = { 0 };
        if (c < 0x80) {
            u[0] = (char)c;
        } else if (c < 0x800) {
            u[0] = (char)(0xC0 | c >> 6);
            u[1] = (char)(0x80 | (c & 63));
        } else {
            u[0] = (char)(0xE0 | c >> 12);
            u[1] = (char)(0x80 | (c >> 6 & 63));
            u[2] = (char)(0x80 | (c & 63));
        }
        char content[32], expected[96];
        (void)snprintf(content, sizeof content, "%sx%s y%s%s", u, u, u, u);
        const delta_part part = { .text = { content, strlen(content) } };
        const delta_message m = { .role = DELTA_ROLE_USER, .parts = &part, .n_parts = 1 };
        delta_chat chat = { .messages = &m, .n_messages = 1 };
        char *text = render(&chat);
        if (i < 15)
            (void)snprintf(expected, sizeof expected, "<|im_start|>user\nx%s y<|im_end|>\n", u);
        else
            (void)snprintf(expected, sizeof expected, "<|im_start|>user\n%s<|im_end|>\n", content);
        CHECK_STR(text, expected);
        free(text);
    }
}

TEST(template_hashes_are_known)
{
    CHECK_EQ(
        delta_template_known("e84f32a23fdda27689f868aa4a1a5621f41133e51a48d7f3efcbea2839574259"),
        36);
    CHECK_EQ(
        delta_template_known("a4aee8afcf2e0711942cf848899be66016f8d14a889ff9ede07bca099c28f715"),
        35);
    CHECK_EQ(
        delta_template_known("a3d94780ec89027cb6e0f90bdfd3beb309870d124abb548cb19707c2105d55bd"),
        1);
    CHECK_EQ(delta_template_known("a3d94780"), 0);
    CHECK_EQ(delta_template_known(NULL), 0);
    /* the demo model's own file is the one that is known */
    FILE *f = fopen(DEMO_MODEL_DIR "/chat_template.jinja", "rb");
    if (!f)
        SKIP("no demo model");
    static char text[1 << 16];
    const size_t n = fread(text, 1, sizeof text, f);
    (void)fclose(f);
    char hex[65];
    sha256(text, n, hex);
    CHECK_EQ(delta_template_known(hex), 1);
}
