/* fuzz_output.c -- the output parser: the first byte chooses options, the second how the rest is
 * cut. The text whole, byte by byte and cut in three other ways must give the same: events, counts of
 * what was mended, reason. The pieces of a call's arguments must be the whole that its end tells, that
 * must be JSON that our reader takes, and text must be UTF-8 without white space at its ends. */
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "base/utf8.h"
#include "chat/text.h"
#include "delta/output.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char *const tools[] = {
    "{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":{\"properties\":{"
    "\"s\":{\"type\":\"string\"},\"i\":{\"type\":\"integer\"},\"n\":{\"type\":[\"number\",\"null\"]"
    "},"
    "\"o\":{\"type\":\"object\"},\"sn\":{\"type\":[\"string\",\"null\"]}}}}}",
    "{\"name\":\"g\"}",
};

typedef struct joined {
    de_text all;
    de_text args;                 /* of the open call, as streamed */
    de_text text[2];              /* reasoning, content */
    int kind;                     /* of the last event */
    bool is_open;                 /* a call is */
    uint32_t n_calls, n_complete; /* calls that began, that may be run */
} joined;

static void must(bool ok)
{
    if (!ok)
        abort();
}

static void must_be_utf8(delta_str s)
{
    for (size_t i = 0, k; i < s.len; i += k)
        must((k = de_utf8_len(s.p + i, s.len - i)) > 0);
}

static void add_call(joined *j, const delta_out_event *e)
{
    if (e->kind == DELTA_OUT_CALL_START) {
        must(!j->is_open && e->call == j->n_calls++ && e->text.len);
        j->is_open = true;
        j->args.len = 0;
    } else {
        must(j->is_open && e->call + 1 == j->n_calls);
        if (e->kind == DELTA_OUT_CALL_ARGS)
            de_text_add(&j->args, e->text.p, e->text.len);
    }
}

/* Kind after kind, each with the text of its run of events. */
static void add(joined *j, const delta_out_event *e, size_t n)
{
    de_text *t = &j->all;
    for (size_t i = 0; i < n; i++) {
        must_be_utf8(e[i].text);
        if ((int)e[i].kind != j->kind || e[i].kind == DELTA_OUT_CALL_START) {
            de_text_add(t, "\1", 1);
            de_text_add(t, &"0123456789"[e[i].kind], 1);
        }
        j->kind = (int)e[i].kind;
        de_text_add(t, e[i].text.p, e[i].text.len);
        if (e[i].kind == DELTA_OUT_REASONING || e[i].kind == DELTA_OUT_CONTENT) {
            must(!j->is_open && e[i].text.len);
            de_text_add(&j->text[e[i].kind == DELTA_OUT_CONTENT], e[i].text.p, e[i].text.len);
            continue;
        }
        add_call(j, &e[i]);
        if (e[i].kind != DELTA_OUT_CALL_END)
            continue;
        must(j->args.len == e[i].text.len && memcmp(j->args.p, e[i].text.p, j->args.len) == 0);
        j->is_open = false;
        j->n_complete += e[i].complete;
        de_text_puts(t, e[i].complete ? "+" : "-");
        de_arena a;
        de_arena_init(&a, 256u << 20);
        de_json *v = NULL;
        must(de_json_parse(&a, e[i].text.p, e[i].text.len, &v, NULL) == 0);
        must(v->kind == DE_JSON_OBJECT);
        de_arena_done(&a);
    }
}

static de_text parse(const delta_output_options *o, const char *s, size_t n, unsigned step,
                     enum delta_out_end end)
{
    delta_output *p = NULL;
    const delta_out_event *e;
    size_t count, left = n;
    uint32_t dice = step;
    enum delta_out_finish finish;
    joined j = { .kind = -1 };
    must(delta_output_new(o, &p, NULL) == 0);
    while (left) {
        size_t k = step ? step : left;
        if (step > 16) { /* pieces of different sizes */
            dice = dice * 1664525 + 1013904223;
            k = (dice >> 24) % (step - 16);
        }
        k = k < left ? k : left;
        char *copy = malloc(k ? k : 1); /* so that reading past the piece is seen */
        must(copy);
        memcpy(copy, s + n - left, k);
        must(delta_output_push(p, copy, k, false, &e, &count, NULL) == 0);
        free(copy);
        add(&j, e, count);
        left -= k;
    }
    must(delta_output_finish(p, end, &e, &count, &finish, NULL) == 0);
    add(&j, e, count);
    must(!j.is_open && (finish == DELTA_OUT_LENGTH) == (end == DELTA_OUT_END_LENGTH) &&
         (finish != DELTA_OUT_TOOL_CALLS || j.n_complete));
    for (int i = 0; i < 2; i++) {
        const delta_str text = { j.text[i].p, j.text[i].len };
        must(text.len == 0 || de_strip(text).len == text.len);
        de_text_done(&j.text[i]);
    }
    de_text_add(&j.all, &"abc"[finish], 1);
    for (int i = 0; i < DELTA_REPAIR_N; i++) {
        char c = (char)('0' + delta_output_repairs(p, (enum delta_repair)i) % 64);
        de_text_add(&j.all, &c, 1);
    }
    delta_output_free(p);
    de_text_done(&j.args);
    return j.all;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2)
        return 0;
    delta_str list[2];
    for (int i = 0; i < 2; i++)
        list[i] = (delta_str){ tools[i], strlen(tools[i]) };
    const delta_output_options o = { .thinking = data[0] & 1,
                                     .tools = data[0] & 2 ? DELTA_TOOLS_NONE : DELTA_TOOLS_AUTO,
                                     .calls_in_reasoning = !(data[0] & 4),
                                     .calls_in_fences = data[0] & 16,
                                     .unknown_is_text = data[0] & 32,
                                     .tools_json = list,
                                     .n_tools = 2 };
    const enum delta_out_end end = data[0] & 8 ? DELTA_OUT_END_LENGTH : DELTA_OUT_END_STOP;
    const char *s = (const char *)data + 2;
    const unsigned steps[] = { 1, 2u + data[1] % 15, 18u + data[1] % 31, 18u + data[1] };
    de_text whole = parse(&o, s, size - 2, 0, end);
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        de_text cut = parse(&o, s, size - 2, steps[i], end);
        must(whole.len == cut.len && memcmp(whole.p, cut.p, whole.len) == 0);
        de_text_done(&cut);
    }
    de_text_done(&whole);
    return 0;
}
