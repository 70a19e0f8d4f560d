/* template.c -- see chat.h: what the model's chat template renders, as straight code.
 *
 * The template is a small program in Jinja, but the model was trained on what
 * it prints, not on the program. So the layout is written down here once, and
 * tests hold it against renderings of the template itself. The checkpoint's
 * template file is never run: delta_template_known() says whether its hash is
 * one that this code was checked with.
 *
 * Two passes over the messages, as the template does it: the first finds the
 * last question of the user (reasoning before it is dropped), the second
 * prints. Nothing is printed that the caller did not give or the layout does
 * not name; text of messages is never escaped, so special tokens written by a
 * user reach the tokenizer as they are. */
#include "delta/chat.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "chat/text.h"

static const char tools_head[] =
    "<|im_start|>system\n# Tools\n\nYou have access to the following functions:\n\n<tools>";
static const char tools_tail[] =
    "\n</tools>\n\n"
    "If you choose to call a function ONLY reply in the following format with NO suffix:\n\n"
    "<tool_call>\n<function=example_function_name>\n"
    "<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
    "<parameter=example_parameter_2>\nThis is the value for the second parameter\n"
    "that can span\nmultiple lines\n</parameter>\n</function>\n</tool_call>\n\n"
    "<IMPORTANT>\nReminder:\n"
    "- Function calls MUST follow the specified format: an inner <function=...></function> block "
    "must be nested within <tool_call></tool_call> XML tags\n"
    "- Required parameters MUST be specified\n"
    "- You may provide optional reasoning for your function call in natural language BEFORE the "
    "function call, but NOT after\n"
    "- If there is no function call available, answer the question like normal with your current "
    "knowledge and do not tell the user about function calls\n"
    "</IMPORTANT>";

typedef struct renderer {
    const delta_chat *c;
    de_text out;
    delta_error *err;
    size_t last_query;       /* index of the last message that asks something */
    uint64_t images, videos; /* seen so far, for add_vision_id */
} renderer;

/* A message's text after trimming. It borrows from the message where that is one piece of text
 * and owns a copy otherwise. */
typedef struct body {
    delta_str text;
    char *owned;
} body;

static int no_memory(const renderer *r)
{
    return delta_fail(r->err, DELTA_ENOMEM, "rendering %zu messages", r->c->n_messages);
}

static void add(renderer *r, delta_str s)
{
    if (s.len)
        de_text_add(&r->out, s.p, s.len);
}

/* ---- content */

static void add_vision(const renderer *r, de_text *t, const char *what, uint64_t number,
                       const char *pad)
{
    if (r->c->add_vision_id) {
        char digits[24], *d = digits + sizeof digits;
        *--d = 0;
        do
            *--d = (char)('0' + number % 10);
        while (number /= 10);
        de_text_puts(t, what);
        de_text_puts(t, d);
        de_text_puts(t, ": ");
    }
    de_text_puts(t, "<|vision_start|>");
    de_text_puts(t, pad);
    de_text_puts(t, "<|vision_end|>");
}

/* Joins the parts and trims the whole. Pictures are numbered where they are met. */
static int body_init(renderer *r, const delta_message *m, body *ret)
{
    if (m->n_parts == 0 || (m->n_parts == 1 && m->parts[0].kind == DELTA_PART_TEXT)) {
        *ret = (body){ .text = m->n_parts ? de_strip(m->parts[0].text) : (delta_str){ NULL, 0 } };
        return 0;
    }
    de_text t = { 0 };
    for (size_t i = 0; i < m->n_parts; i++) {
        switch (m->parts[i].kind) {
        case DELTA_PART_TEXT:
            if (m->parts[i].text.len)
                de_text_add(&t, m->parts[i].text.p, m->parts[i].text.len);
            break;
        case DELTA_PART_IMAGE:
            add_vision(r, &t, "Picture ", ++r->images, "<|image_pad|>");
            break;
        case DELTA_PART_VIDEO:
            add_vision(r, &t, "Video ", ++r->videos, "<|video_pad|>");
            break;
        }
    }
    if (t.failed) {
        de_text_done(&t);
        return no_memory(r);
    }
    *ret = (body){ .text = de_strip((delta_str){ t.p, t.len }), .owned = t.p };
    return 0;
}

static void body_done(body *b)
{
    free(b->owned);
}

/* ---- judging the conversation */

static int check_system(const renderer *r)
{
    const delta_message *m = &r->c->messages[0];
    if (m->role != DELTA_ROLE_SYSTEM)
        return 0;
    for (size_t i = 0; i < m->n_parts; i++)
        if (m->parts[i].kind != DELTA_PART_TEXT)
            return delta_fail(r->err, DELTA_EINVALID,
                              "messages[0]: System message cannot contain %s.",
                              m->parts[i].kind == DELTA_PART_IMAGE ? "images" : "videos");
    return 0;
}

/* A user message that is wholly a tool's answer asks nothing. */
static int find_last_query(renderer *r)
{
    bool found = false;
    for (size_t i = 0; i < r->c->n_messages; i++) {
        const delta_message *m = &r->c->messages[i];
        if (m->role != DELTA_ROLE_USER)
            continue;
        body b;
        int e = body_init(r, m, &b);
        if (e < 0)
            return e;
        if (!de_starts_with(b.text, DE_STR("<tool_response>")) ||
            !de_ends_with(b.text, DE_STR("</tool_response>"))) {
            r->last_query = i;
            found = true;
        }
        body_done(&b);
    }
    r->images = r->videos = 0;
    return found ? 0
                 : delta_fail(r->err, DELTA_EINVALID, "messages: No user query found in messages.");
}

/* ---- tools and system */

/* Parses text into an arena made for it. Every node has at least a byte of source, so the limit
 * is never what a well-formed text fails at. */
static int parse_json(delta_str text, de_arena *a, de_json **ret_v, delta_error *err)
{
    if (text.len > SIZE_MAX / 512)
        return delta_fail(err, DELTA_ELIMIT, "%zu bytes of JSON", text.len);
    de_arena_init(a, 256 * text.len + 4096);
    return de_json_parse(a, text.p, text.len, ret_v, err);
}

static int add_tools(renderer *r)
{
    de_text_puts(&r->out, tools_head);
    for (size_t i = 0; i < r->c->n_tools; i++) {
        de_arena a = { 0 };
        de_json *v = NULL;
        int e = parse_json(r->c->tools_json[i], &a, &v, r->err);
        if (e >= 0 && v->kind != DE_JSON_OBJECT)
            e = delta_fail(r->err, DELTA_EINVALID, "not a JSON object");
        if (e >= 0) {
            de_text_puts(&r->out, "\n");
            de_json_write(&r->out, v, false);
        } else {
            delta_error_prefix(r->err, "tools[%zu]", i);
            e = e == DELTA_EFORMAT ? DELTA_EINVALID : e;
            if (r->err)
                r->err->code = e;
        }
        de_arena_done(&a);
        if (e < 0)
            return e;
    }
    de_text_puts(&r->out, tools_tail);
    return 0;
}

/* The first turn: tools, the system message, both or nothing. */
static int add_system_turn(renderer *r)
{
    const bool has_system = r->c->messages[0].role == DELTA_ROLE_SYSTEM;
    body b = { 0 };
    int e = has_system ? body_init(r, &r->c->messages[0], &b) : 0;
    if (e < 0)
        return e;
    if (r->c->n_tools) {
        e = add_tools(r);
        if (b.text.len)
            de_text_puts(&r->out, "\n\n");
    } else if (has_system) {
        de_text_puts(&r->out, "<|im_start|>system\n");
    }
    add(r, b.text);
    if (r->c->n_tools || has_system)
        de_text_puts(&r->out, "<|im_end|>\n");
    body_done(&b);
    return e;
}

/* ---- an assistant's turn */

static const char *find(delta_str in, delta_str what)
{
    return in.len ? memmem(in.p, in.len, what.p, what.len) : NULL;
}

static delta_str strip_newlines_left(delta_str s)
{
    while (s.len && s.p[0] == '\n') {
        s.p++;
        s.len--;
    }
    return s;
}

/* Behind the last `what` of s; all of s if there is none. */
static delta_str after_last(delta_str s, delta_str what)
{
    const char *at;
    while ((at = find(s, what)) != NULL) {
        s.len -= (size_t)(at - s.p) + what.len;
        s.p = at + what.len;
    }
    return s;
}

/* Reasoning that stands in the content, where none was given apart from it. */
static void split_reasoning(delta_str *content, delta_str *reasoning)
{
    const char *end = find(*content, DE_STR("</think>"));
    if (!end)
        return;
    delta_str before = { content->p, (size_t)(end - content->p) };
    while (before.len && before.p[before.len - 1] == '\n')
        before.len--;
    *reasoning = strip_newlines_left(after_last(before, DE_STR("<think>")));
    *content = strip_newlines_left(after_last(*content, DE_STR("</think>")));
}

static void add_value(renderer *r, const de_json *v)
{
    static const char *const python[] = {
        [DE_JSON_NULL] = "None", [DE_JSON_FALSE] = "False", [DE_JSON_TRUE] = "True"
    };
    if (v->kind == DE_JSON_STRING)
        de_text_add(&r->out, v->text, v->n);
    else if (r->c->scalars_as_python && v->kind <= DE_JSON_TRUE)
        de_text_puts(&r->out, python[v->kind]);
    else
        de_json_write(&r->out, v, false);
}

static int add_arguments(renderer *r, delta_str json)
{
    if (json.len == 0)
        return 0;
    de_arena a = { 0 };
    de_json *v = NULL;
    int e = parse_json(json, &a, &v, r->err);
    if (e >= 0 && v->kind != DE_JSON_OBJECT)
        e = delta_fail(r->err, DELTA_EINVALID, "not a JSON object");
    for (const de_json *p = e < 0 ? NULL : v->child; p; p = p->next) {
        de_text_puts(&r->out, "<parameter=");
        de_text_add(&r->out, p->key, p->key_len);
        de_text_puts(&r->out, ">\n");
        add_value(r, p);
        de_text_puts(&r->out, "\n</parameter>\n");
    }
    de_arena_done(&a);
    return e;
}

/* The turn as it was sampled; false: it must be made of its parts. */
static bool add_sampled(renderer *r, const delta_message *m, bool with_reasoning)
{
    delta_str s = m->sampled;
    if (s.len == 0)
        return false;
    if (!with_reasoning && m->sampled_thought) {
        const char *end = find(s, DE_STR("</think>"));
        if (!end) /* a call ended the reasoning */
            return false;
        s.len -= (size_t)(end - s.p) + 8;
        s.p = end + 8;
    }
    de_text_puts(&r->out, "<|im_start|>assistant\n");
    if (with_reasoning)
        de_text_puts(&r->out, m->sampled_thought ? "<think>\n" : "<think>\n\n</think>\n\n");
    else
        s = strip_newlines_left(s);
    add(r, s);
    de_text_puts(&r->out, "<|im_end|>\n");
    return true;
}

static int add_assistant(renderer *r, size_t i, delta_str content)
{
    const delta_message *m = &r->c->messages[i];
    if (add_sampled(r, m, r->c->preserve_thinking || i > r->last_query))
        return 0;
    delta_str reasoning = { NULL, 0 };
    if (m->has_reasoning)
        reasoning = m->reasoning;
    else
        split_reasoning(&content, &reasoning);

    de_text_puts(&r->out, "<|im_start|>assistant\n");
    if (r->c->preserve_thinking || i > r->last_query) {
        de_text_puts(&r->out, "<think>\n");
        add(r, de_strip(reasoning));
        de_text_puts(&r->out, "\n</think>\n\n");
    }
    add(r, content);
    const bool has_content = de_strip(content).len > 0;
    for (size_t k = 0; k < m->n_calls; k++) {
        if (k > 0)
            de_text_puts(&r->out, "\n");
        else if (has_content)
            de_text_puts(&r->out, "\n\n");
        de_text_puts(&r->out, "<tool_call>\n<function=");
        add(r, m->calls[k].name);
        de_text_puts(&r->out, ">\n");
        int e = add_arguments(r, m->calls[k].arguments_json);
        if (e < 0) {
            delta_error_prefix(r->err, "messages[%zu]: arguments of call %zu", i, k);
            e = e == DELTA_EFORMAT ? DELTA_EINVALID : e;
            if (r->err)
                r->err->code = e;
            return e;
        }
        de_text_puts(&r->out, "</function>\n</tool_call>");
    }
    de_text_puts(&r->out, "<|im_end|>\n");
    return 0;
}

/* ---- tool results, and where a suffix meets what is there */

static enum delta_join join_of(const delta_chat *c)
{
    if (c->first_message == 0 || c->join != DELTA_JOIN_AUTO)
        return c->first_message == 0 ? DELTA_JOIN_CLOSED : c->join;
    return c->messages[c->first_message - 1].role == DELTA_ROLE_ASSISTANT ? DELTA_JOIN_SAMPLED
                                                                          : DELTA_JOIN_CLOSED;
}

static bool is_tool(const delta_chat *c, size_t i)
{
    return i < c->n_messages && c->messages[i].role == DELTA_ROLE_TOOL;
}

static void add_join(renderer *r)
{
    const delta_chat *c = r->c;
    switch (join_of(c)) {
    case DELTA_JOIN_SAMPLED:
        de_text_puts(&r->out, "\n");
        break;
    case DELTA_JOIN_OPEN:
        if (is_tool(c, c->first_message - 1) && !is_tool(c, c->first_message))
            de_text_puts(&r->out, "<|im_end|>\n");
        break;
    case DELTA_JOIN_AUTO:
    case DELTA_JOIN_CLOSED:
        break;
    }
}

/* Consecutive results share one turn of the user. */
static void add_tool(renderer *r, size_t i, delta_str content)
{
    const delta_chat *c = r->c;
    const bool cut_before = i == c->first_message && join_of(c) != DELTA_JOIN_OPEN;
    if (i > 0 && (!is_tool(c, i - 1) || cut_before))
        de_text_puts(&r->out, "<|im_start|>user");
    de_text_puts(&r->out, "\n<tool_response>\n");
    add(r, content);
    de_text_puts(&r->out, "\n</tool_response>");
    if (!is_tool(c, i + 1) && !(c->leave_open && i + 1 == c->n_messages))
        de_text_puts(&r->out, "<|im_end|>\n");
}

/* ---- the whole */

static int add_message(renderer *r, size_t i)
{
    const delta_message *m = &r->c->messages[i];
    body b;
    int e = body_init(r, m, &b); /* also of what is not printed: pictures are counted */
    if (e < 0)
        return e;
    if (m->role == DELTA_ROLE_SYSTEM && i > 0)
        e = delta_fail(r->err, DELTA_EINVALID,
                       "messages[%zu]: System message must be at the beginning.", i);
    else if (i >= r->c->first_message) {
        switch (m->role) {
        case DELTA_ROLE_SYSTEM: /* printed with the tools */
            break;
        case DELTA_ROLE_USER:
            de_text_puts(&r->out, "<|im_start|>user\n");
            add(r, b.text);
            de_text_puts(&r->out, "<|im_end|>\n");
            break;
        case DELTA_ROLE_ASSISTANT:
            e = add_assistant(r, i, b.text);
            break;
        case DELTA_ROLE_TOOL:
            add_tool(r, i, b.text);
            break;
        }
    }
    body_done(&b);
    return e;
}

static int render(renderer *r, delta_span *spans)
{
    const delta_chat *c = r->c;
    int e = check_system(r);
    if (e >= 0)
        e = find_last_query(r);
    if (e >= 0 && c->first_message == 0)
        e = add_system_turn(r);
    else if (e >= 0)
        add_join(r);
    for (size_t i = 0; e >= 0 && i < c->n_messages; i++) {
        const bool with_tools = i == 0 && c->messages[0].role == DELTA_ROLE_SYSTEM;
        spans[i].begin = with_tools ? 0 : r->out.len;
        e = add_message(r, i);
        spans[i].end = r->out.len;
        if (c->first_message && i < c->first_message)
            spans[i] = (delta_span){ 0, 0 };
    }
    if (e >= 0 && c->add_generation_prompt)
        de_text_puts(&r->out, c->enable_thinking
                                  ? "<|im_start|>assistant\n<think>\n"
                                  : "<|im_start|>assistant\n<think>\n\n</think>\n\n");
    return e;
}

int delta_chat_render(const delta_chat *c, delta_rendered *ret_r, delta_error *err)
{
    assert(c && ret_r);
    if (c->n_messages == 0)
        return delta_fail(err, DELTA_EINVALID, "messages: No messages provided.");
    if (c->first_message > c->n_messages)
        return delta_fail(err, DELTA_EINVALID, "first_message %zu of %zu messages",
                          c->first_message, c->n_messages);
    if (c->leave_open && c->add_generation_prompt)
        return delta_fail(err, DELTA_EINVALID, "leave_open together with add_generation_prompt");

    renderer r = { .c = c, .err = err };
    delta_span *spans = calloc(c->n_messages, sizeof *spans);
    int e = spans ? render(&r, spans) : no_memory(&r);
    if (e >= 0)
        de_text_add(&r.out, "", 0); /* a NUL at least */
    if (e >= 0 && (r.out.failed || !r.out.p))
        e = no_memory(&r);
    if (e < 0) {
        de_text_done(&r.out);
        free(spans);
        return e;
    }
    *ret_r = (delta_rendered){ .text = r.out.p, .len = r.out.len, .messages = spans };
    return 0;
}

void delta_rendered_done(delta_rendered *r)
{
    if (!r)
        return;
    free(r->text);
    free(r->messages);
    *r = (delta_rendered){ 0 };
}

int delta_template_known(const char *sha256)
{
    static const struct {
        const char *sha256;
        int version;
    } known[] = {
        { "e84f32a23fdda27689f868aa4a1a5621f41133e51a48d7f3efcbea2839574259", 36 },
        { "a4aee8afcf2e0711942cf848899be66016f8d14a889ff9ede07bca099c28f715", 35 },
        { "a3d94780ec89027cb6e0f90bdfd3beb309870d124abb548cb19707c2105d55bd", 1 },
    };
    for (size_t i = 0; sha256 && i < sizeof known / sizeof *known; i++)
        if (strcmp(sha256, known[i].sha256) == 0)
            return known[i].version;
    return 0;
}
