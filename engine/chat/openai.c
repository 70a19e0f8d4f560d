/* openai.c -- see openai.h. A tree of JSON to the flat arrays of a delta_chat. */
#include "delta/openai.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "base/arena.h"
#include "base/json.h"
#include "chat/text.h"

struct delta_openai {
    de_arena arena;
    delta_chat chat;
};

typedef struct reader {
    de_arena *arena;
    const char *source; /* what the JSON was read from; lives in the arena */
    delta_error *err;
} reader;

static int no_memory(const reader *r)
{
    return delta_fail(r->err, DELTA_ENOMEM, "conversation: %zu bytes used", r->arena->used);
}

static delta_str text_of(const de_json *v)
{
    return (delta_str){ v->text, v->n };
}

static delta_str source_of(const reader *r, const de_json *v)
{
    return (delta_str){ r->source + v->begin, v->end - v->begin };
}

static bool is_kind(const de_json *v, enum de_json_kind kind)
{
    return v && v->kind == kind;
}

/* Room for the children of an array. */
static int new_array(const reader *r, const de_json *v, size_t size, void **ret)
{
    if (v->n > DELTA_OPENAI_MESSAGES_MAX)
        return delta_fail(r->err, DELTA_ELIMIT, "%u items, at most %d", v->n,
                          DELTA_OPENAI_MESSAGES_MAX);
    void *p = de_arena_array(r->arena, v->n, size);
    if (!p)
        return no_memory(r);
    if (v->n)
        memset(p, 0, v->n * size);
    *ret = p;
    return 0;
}

static int read_part(const reader *r, const de_json *v, delta_part *ret)
{
    const de_json *type = de_json_get(v, "type"), *text = de_json_get(v, "text");
    if (de_json_is_string(type, "image") || de_json_get(v, "image") || de_json_get(v, "image_url"))
        ret->kind = DELTA_PART_IMAGE;
    else if (de_json_is_string(type, "video") || de_json_get(v, "video"))
        ret->kind = DELTA_PART_VIDEO;
    else if (is_kind(text, DE_JSON_STRING))
        *ret = (delta_part){ .kind = DELTA_PART_TEXT, .text = text_of(text) };
    else
        return delta_fail(r->err, DELTA_EINVALID, "Unexpected item type in content.");
    return 0;
}

static int read_content(const reader *r, const de_json *v, delta_message *m)
{
    if (!v || v->kind == DE_JSON_NULL)
        return 0;
    if (v->kind != DE_JSON_STRING && v->kind != DE_JSON_ARRAY)
        return delta_fail(r->err, DELTA_EINVALID, "Unexpected content type.");

    const de_json one = { .kind = DE_JSON_ARRAY, .n = 1 };
    void *room;
    int e = new_array(r, v->kind == DE_JSON_ARRAY ? v : &one, sizeof(delta_part), &room);
    if (e < 0)
        return e;
    delta_part *parts = room;
    m->parts = parts;
    if (v->kind == DE_JSON_STRING) {
        parts[m->n_parts++] = (delta_part){ .kind = DELTA_PART_TEXT, .text = text_of(v) };
        return 0;
    }
    for (const de_json *p = v->child; p && e >= 0; p = p->next)
        e = read_part(r, p, &parts[m->n_parts++]);
    return e;
}

static int read_call(const reader *r, const de_json *v, delta_chat_call *ret)
{
    const de_json *function = de_json_get(v, "function"), *id = de_json_get(v, "id");
    if (is_kind(id, DE_JSON_STRING))
        ret->id = text_of(id);
    if (function)
        v = function;
    const de_json *name = de_json_get(v, "name"), *arguments = de_json_get(v, "arguments");
    if (!is_kind(name, DE_JSON_STRING))
        return delta_fail(r->err, DELTA_EINVALID, "no name");
    ret->name = text_of(name);
    if (is_kind(arguments, DE_JSON_OBJECT))
        ret->arguments_json = source_of(r, arguments);
    else if (is_kind(arguments, DE_JSON_STRING))
        ret->arguments_json = text_of(arguments);
    else if (arguments)
        return delta_fail(r->err, DELTA_EINVALID, "arguments are neither an object nor a string");
    return 0;
}

static int read_calls(const reader *r, const de_json *v, delta_message *m)
{
    if (!v || v->kind == DE_JSON_NULL)
        return 0;
    if (v->kind != DE_JSON_ARRAY)
        return delta_fail(r->err, DELTA_EINVALID, "tool_calls is not an array");
    void *room;
    int e = new_array(r, v, sizeof(delta_chat_call), &room);
    if (e < 0)
        return e;
    delta_chat_call *calls = room;
    m->calls = calls;
    for (const de_json *c = v->child; c; c = c->next) {
        e = read_call(r, c, &calls[m->n_calls]);
        if (e < 0) {
            delta_error_prefix(r->err, "tool_calls[%zu]", m->n_calls);
            return e;
        }
        m->n_calls++;
    }
    return 0;
}

static int read_role(const reader *r, const de_json *v, delta_message *m)
{
    static const char *const names[] = { [DELTA_ROLE_SYSTEM] = "system",
                                         [DELTA_ROLE_USER] = "user",
                                         [DELTA_ROLE_ASSISTANT] = "assistant",
                                         [DELTA_ROLE_TOOL] = "tool" };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (de_json_is_string(v, names[i])) {
            m->role = (enum delta_role)i;
            return 0;
        }
    return delta_fail(r->err, DELTA_EINVALID, "Unexpected message role.");
}

static int read_message(const reader *r, const de_json *v, delta_message *m)
{
    if (v->kind != DE_JSON_OBJECT)
        return delta_fail(r->err, DELTA_EINVALID, "not an object");
    int e = read_content(r, de_json_get(v, "content"), m);
    if (e >= 0)
        e = read_role(r, de_json_get(v, "role"), m);
    if (e < 0)
        return e;
    const de_json *reasoning = de_json_get(v, "reasoning_content");
    if (!is_kind(reasoning, DE_JSON_STRING))
        reasoning = de_json_get(v, "reasoning");
    if (is_kind(reasoning, DE_JSON_STRING)) {
        m->has_reasoning = true;
        m->reasoning = text_of(reasoning);
    }
    return m->role == DELTA_ROLE_ASSISTANT ? read_calls(r, de_json_get(v, "tool_calls"), m) : 0;
}

static int read_messages(const reader *r, const de_json *v, delta_chat *c)
{
    if (v->kind != DE_JSON_ARRAY)
        return delta_fail(r->err, DELTA_EINVALID, "messages: not an array");
    void *room;
    int e = new_array(r, v, sizeof(delta_message), &room);
    if (e < 0)
        return e;
    delta_message *messages = room;
    c->messages = messages;
    for (const de_json *m = v->child; m; m = m->next) {
        e = read_message(r, m, &messages[c->n_messages]);
        if (e < 0) {
            delta_error_prefix(r->err, "messages[%zu]", c->n_messages);
            return e;
        }
        c->n_messages++;
    }
    return 0;
}

static int read_tools(const reader *r, const de_json *v, delta_chat *c)
{
    if (v->kind == DE_JSON_NULL)
        return 0;
    if (v->kind != DE_JSON_ARRAY)
        return delta_fail(r->err, DELTA_EINVALID, "tools: not an array");
    void *room;
    int e = new_array(r, v, sizeof(delta_str), &room);
    if (e < 0)
        return e;
    delta_str *tools = room;
    c->tools_json = tools;
    for (const de_json *t = v->child; t; t = t->next) {
        if (t->kind != DE_JSON_OBJECT)
            return delta_fail(r->err, DELTA_EINVALID, "tools[%zu]: not an object", c->n_tools);
        tools[c->n_tools++] = source_of(r, t);
    }
    return 0;
}

/* Copies the text into the arena, so that spans of it may stay, and parses it. */
static int parse(reader *r, const char *what, const char *text, size_t len, de_json **ret_v)
{
    r->source = de_arena_strndup(r->arena, text, len);
    if (!r->source)
        return no_memory(r);
    int e = de_json_parse(r->arena, r->source, len, ret_v, r->err);
    if (e < 0) {
        delta_error_prefix(r->err, "%s", what);
        e = e == DELTA_EFORMAT ? DELTA_EINVALID : e;
        if (r->err)
            r->err->code = e;
    }
    return e;
}

int delta_openai_parse(const char *messages, size_t messages_len, const char *tools,
                       size_t tools_len, delta_openai **ret_o, delta_error *err)
{
    assert(ret_o && (messages || !messages_len));
    if (!tools)
        tools_len = 0;
    const size_t most = SIZE_MAX / 1024;
    if (messages_len > most || tools_len > most)
        return delta_fail(err, DELTA_ELIMIT, "%zu bytes of messages", messages_len);
    delta_openai *o = calloc(1, sizeof *o);
    if (!o)
        return delta_fail(err, DELTA_ENOMEM, "conversation: %zu bytes", sizeof *o);
    /* A value of one byte takes a node, and as a message the largest of our records. */
    de_arena_init(&o->arena, 512 * (messages_len + tools_len) + 4096);
    o->chat.enable_thinking = true;

    reader r = { .arena = &o->arena, .err = err };
    de_json *v = NULL;
    int e = parse(&r, "messages", messages, messages_len, &v);
    if (e >= 0)
        e = read_messages(&r, v, &o->chat);
    if (e >= 0 && tools_len)
        e = parse(&r, "tools", tools, tools_len, &v);
    if (e >= 0 && tools_len)
        e = read_tools(&r, v, &o->chat);
    if (e < 0) {
        delta_openai_free(o);
        return e;
    }
    *ret_o = o;
    return 0;
}

delta_chat *delta_openai_chat(delta_openai *o)
{
    return &o->chat;
}

void delta_openai_free(delta_openai *o)
{
    if (!o)
        return;
    de_arena_done(&o->arena);
    free(o);
}
