/* parse_lines.c -- "deltactl parse --jsonl": many model outputs through the output parser, one JSON
 * object a line in, one a line out. No daemon: this links the parser that the daemon uses, so that
 * an output can be looked into where no model runs, and thousands of recorded cases in a second.
 *
 * A line that cannot be read is answered by one with "error", and the next one is read. */
#include "ctl.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/arena.h"
#include "base/json.h"
#include "delta/output.h"

enum { LINE_MAX_BYTES = 64 << 20 };

typedef struct call {
    de_text name, deltas; /* deltas: JSON strings, ", " between them */
    de_text arguments;
    bool complete;
} call;

typedef struct answer {
    de_text reasoning, content;
    call *calls;
    size_t n_calls, cap_calls;
    bool failed;
} answer;

static void answer_done(answer *a)
{
    for (size_t i = 0; i < a->n_calls; i++) {
        de_text_done(&a->calls[i].name);
        de_text_done(&a->calls[i].deltas);
        de_text_done(&a->calls[i].arguments);
    }
    free(a->calls);
    de_text_done(&a->reasoning);
    de_text_done(&a->content);
}

static call *new_call(answer *a)
{
    if (a->n_calls == a->cap_calls) {
        const size_t cap = a->cap_calls ? 2 * a->cap_calls : 4;
        call *more = realloc(a->calls, cap * sizeof *more);
        if (!more)
            return NULL;
        a->calls = more;
        a->cap_calls = cap;
    }
    a->calls[a->n_calls] = (call){ 0 };
    return &a->calls[a->n_calls++];
}

static void take(answer *a, const delta_out_event *events, size_t n)
{
    for (size_t i = 0; i < n && !a->failed; i++) {
        const delta_out_event *e = &events[i];
        call *c = e->kind == DELTA_OUT_CALL_START ? new_call(a)
                  : a->n_calls                    ? &a->calls[a->n_calls - 1]
                                                  : NULL;
        switch (e->kind) {
        case DELTA_OUT_REASONING:
            de_text_add(&a->reasoning, e->text.p, e->text.len);
            break;
        case DELTA_OUT_CONTENT:
            de_text_add(&a->content, e->text.p, e->text.len);
            break;
        case DELTA_OUT_CALL_START:
            if (c)
                de_text_add(&c->name, e->text.p, e->text.len);
            a->failed |= !c;
            break;
        case DELTA_OUT_CALL_ARGS:
            if (c->deltas.len)
                de_text_puts(&c->deltas, ", ");
            de_json_write_string(&c->deltas, e->text.p, e->text.len);
            break;
        case DELTA_OUT_CALL_END:
            de_text_add(&c->arguments, e->text.p, e->text.len);
            c->complete = e->complete;
            a->failed |= c->name.failed || c->deltas.failed || c->arguments.failed;
            break;
        }
        a->failed |= a->reasoning.failed || a->content.failed;
    }
}

/* ---- one line */

/* RFC 4648, padded, nothing else. The length, or -1. */
static ssize_t base64(const char *s, size_t n, char *out)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    size_t len = 0;
    if (n % 4)
        return -1;
    for (size_t i = 0; i < n; i += 4) {
        uint32_t bits = 0;
        size_t pad = 0;
        for (size_t k = 0; k < 4; k++) {
            const char *d = s[i + k] ? strchr(digits, s[i + k]) : NULL;
            if (s[i + k] == '=' && k >= 2 && i + 4 == n)
                pad++;
            else if (!d || pad)
                return -1;
            bits = bits << 6 | (d ? (uint32_t)(d - digits) : 0);
        }
        out[len++] = (char)(bits >> 16);
        if (pad < 2)
            out[len++] = (char)(bits >> 8);
        if (pad < 1)
            out[len++] = (char)bits;
    }
    return (ssize_t)len;
}

static int run(const de_json *chunks, delta_output *p, bool cut, de_arena *a, answer *to,
               enum delta_out_finish *ret_finish, delta_error *err)
{
    const delta_out_event *events = NULL;
    size_t n = 0, i = 0;
    int r = 0;
    for (const de_json *c = chunks->child; c; c = c->next, i++) {
        char *bytes = c->kind == DE_JSON_STRING ? de_arena_alloc(a, c->n) : NULL;
        const ssize_t len = bytes ? base64(c->text, c->n, bytes) : -1;
        if (len < 0)
            return delta_fail(err, DELTA_EINVALID, "chunks[%zu] is not base64", i);
        r = delta_output_push(p, bytes, (size_t)len, false, &events, &n, err);
        if (r < 0)
            return r;
        take(to, events, n);
    }
    r = delta_output_finish(p, cut ? DELTA_OUT_END_LENGTH : DELTA_OUT_END_STOP, &events, &n,
                            ret_finish, err);
    if (r == 0)
        take(to, events, n);
    return to->failed ? delta_fail(err, DELTA_ENOMEM, "no memory for the answer") : r;
}

/* One of the words, or -1; absent is the first. */
static int word(const de_json *v, const char *const *words, int n)
{
    for (int i = 0; i < n; i++)
        if (!v ? i == 0 : de_json_is_string(v, words[i]))
            return i;
    return -1;
}

static int parse(const de_json *v, const char *line, de_arena *a, answer *to,
                 enum delta_out_finish *ret_finish, delta_error *err)
{
    static const char *const modes[] = { "auto", "none", "required" };
    static const char *const ends[] = { "stop", "length" };
    static const enum delta_tool_mode mode_of[] = { DELTA_TOOLS_AUTO, DELTA_TOOLS_NONE,
                                                    DELTA_TOOLS_REQUIRED };
    const de_json *thinking = de_json_get(v, "thinking"), *tools = de_json_get(v, "tools"),
                  *chunks = de_json_get(v, "chunks");
    const int mode = word(de_json_get(v, "tool_choice"), modes, 3),
              end = word(de_json_get(v, "finish"), ends, 2);
    if (v->kind != DE_JSON_OBJECT)
        return delta_fail(err, DELTA_EINVALID, "this is not a JSON object");
    if (mode < 0)
        return delta_fail(err, DELTA_EINVALID, "tool_choice is not auto, none or required");
    if (end < 0)
        return delta_fail(err, DELTA_EINVALID, "finish is not stop or length");
    if (!chunks || chunks->kind != DE_JSON_ARRAY)
        return delta_fail(err, DELTA_EINVALID, "chunks is not an array");
    if (tools && tools->kind != DE_JSON_ARRAY && tools->kind != DE_JSON_NULL)
        return delta_fail(err, DELTA_EINVALID, "tools is not an array");
    delta_output_options o = { .tools = mode_of[mode], .calls_in_reasoning = true };
    if (thinking && !de_json_bool(thinking, &o.thinking))
        return delta_fail(err, DELTA_EINVALID, "thinking is not true or false");
    const de_json *reasoning = de_json_get(v, "calls_in_reasoning"),
                  *fences = de_json_get(v, "calls_in_fences");
    if ((reasoning && !de_json_bool(reasoning, &o.calls_in_reasoning)) ||
        (fences && !de_json_bool(fences, &o.calls_in_fences)))
        return delta_fail(err, DELTA_EINVALID,
                          "calls_in_reasoning or calls_in_fences is not true or false");
    static const char *const unknown[] = { "call", "text" };
    const int what = word(de_json_get(v, "unknown_tools"), unknown, 2);
    if (what < 0)
        return delta_fail(err, DELTA_EINVALID, "unknown_tools is not call or text");
    o.unknown_is_text = what == 1;
    if (tools && tools->kind == DE_JSON_ARRAY && tools->n) {
        delta_str *list = de_arena_array(a, tools->n, sizeof *list);
        if (!list)
            return delta_fail(err, DELTA_ENOMEM, "no memory for the tools");
        for (const de_json *t = tools->child; t; t = t->next)
            list[o.n_tools++] = (delta_str){ line + t->begin, t->end - t->begin };
        o.tools_json = list;
    }
    delta_output *p = NULL;
    int r = delta_output_new(&o, &p, err);
    if (r == 0)
        r = run(chunks, p, end == 1, a, to, ret_finish, err);
    delta_output_free(p);
    return r;
}

static void put_member(de_text *t, const char *name, const de_text *s)
{
    de_text_puts(t, name);
    de_json_write_string(t, s->p ? s->p : "", s->len);
}

static void write_answer(de_text *t, const answer *a, enum delta_out_finish finish)
{
    static const char *const reasons[] = { [DELTA_OUT_STOP] = "stop",
                                           [DELTA_OUT_TOOL_CALLS] = "tool_calls",
                                           [DELTA_OUT_LENGTH] = "length" };
    put_member(t, "\"content\": ", &a->content);
    put_member(t, ", \"reasoning\": ", &a->reasoning);
    de_text_puts(t, ", \"tool_calls\": [");
    for (size_t i = 0; i < a->n_calls && a->calls[i].complete; i++) {
        put_member(t, i ? ", {\"name\": " : "{\"name\": ", &a->calls[i].name);
        put_member(t, ", \"arguments\": ", &a->calls[i].arguments);
        de_text_puts(t, "}");
    }
    de_text_puts(t, "], \"finish_reason\": \"");
    de_text_puts(t, reasons[finish]);
    de_text_puts(t, "\", \"args_deltas\": [");
    /* Only the last call can be a cut one. */
    for (size_t i = 0; i < a->n_calls && a->calls[i].complete; i++) {
        de_text_puts(t, i ? ", [" : "[");
        de_text_add(t, a->calls[i].deltas.p ? a->calls[i].deltas.p : "", a->calls[i].deltas.len);
        de_text_puts(t, "]");
    }
    de_text_puts(t, "]");
}

/* The line as ASCII: readers that split text at U+2028 and the like see one line, too. */
static void put_ascii(const de_text *t, FILE *f)
{
    const uint8_t *p = (const uint8_t *)t->p, *end = p + t->len;
    while (p < end) {
        const uint8_t *from = p;
        while (p < end && *p < 0x80)
            p++;
        (void)fwrite(from, 1, (size_t)(p - from), f);
        if (p == end)
            break;
        const int n = *p < 0xE0 ? 2 : *p < 0xF0 ? 3 : 4;
        uint32_t c = *p & (0xFFu >> (n + 1));
        for (int i = 1; i < n; i++)
            c = c << 6 | (p[i] & 63u);
        p += n;
        if (c < 0x10000)
            (void)fprintf(f, "\\u%04x", c);
        else
            (void)fprintf(f, "\\u%04x\\u%04x", 0xD800 + ((c - 0x10000) >> 10),
                          0xDC00 + (c & 0x3FF));
    }
}

/* 0, or CTL_FAILED after answering with an error. */
static int one_line(const char *line, size_t len, size_t number)
{
    de_arena arena;
    de_json *v = NULL;
    delta_error err = { 0 };
    answer a = { 0 };
    de_text t = { 0 };
    enum delta_out_finish finish = DELTA_OUT_STOP;
    de_arena_init(&arena, 64 * len + 65536);
    int r = de_json_parse(&arena, line, len, &v, &err);
    const de_json *id = r < 0 ? NULL : de_json_get(v, "id");
    if (r == 0)
        r = parse(v, line, &arena, &a, &finish, &err);
    de_text_puts(&t, "{");
    if (id) {
        de_text_puts(&t, "\"id\": ");
        de_json_write(&t, id, false);
        de_text_puts(&t, ", ");
    }
    if (r < 0) {
        char at[32];
        (void)snprintf(at, sizeof at, "line %zu: ", number);
        de_text e = { 0 };
        de_text_puts(&e, at);
        de_text_puts(&e, err.text);
        put_member(&t, "\"error\": ", &e);
        de_text_done(&e);
    } else {
        write_answer(&t, &a, finish);
    }
    de_text_puts(&t, "}\n");
    if (t.failed) {
        (void)fprintf(stderr, "deltactl: parse: line %zu: out of memory\n", number);
        r = -1;
    } else {
        put_ascii(&t, stdout);
    }
    de_text_done(&t);
    answer_done(&a);
    de_arena_done(&arena);
    return r < 0 ? CTL_FAILED : CTL_OK;
}

int ctl_parse_lines(const char *path)
{
    FILE *f = strcmp(path, "-") == 0 ? stdin : fopen(path, "r");
    if (!f)
        return ctl_usage("parse: %s: %s", path, strerror(errno));
    char *line = NULL;
    size_t cap = 0;
    int code = CTL_OK;
    ssize_t len;
    for (size_t number = 1; (len = getline(&line, &cap, f)) >= 0 && !ctl_interrupted(); number++) {
        if (strspn(line, " \t\r\n") == (size_t)len)
            continue;
        if (len > LINE_MAX_BYTES) {
            code = ctl_usage("parse: line %zu is longer than %d bytes", number, LINE_MAX_BYTES);
            break;
        }
        if (one_line(line, (size_t)len, number) != CTL_OK)
            code = CTL_FAILED;
    }
    if (ferror(f))
        code = ctl_usage("parse: %s: %s", path, strerror(errno));
    free(line);
    if (f != stdin)
        (void)fclose(f);
    return fflush(stdout) == 0 ? code : CTL_FAILED;
}
