/* fuzz_output.c -- the output parser: the first byte chooses options, the second how the rest is
 * cut. The whole text and the cut one must give the same, and arguments must be JSON. */
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "delta/output.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char *const tools[] = {
    "{\"type\":\"function\",\"function\":{\"name\":\"f\",\"parameters\":{\"properties\":{"
    "\"s\":{\"type\":\"string\"},\"i\":{\"type\":\"integer\"},\"n\":{\"type\":[\"number\",\"null\"]"
    "},"
    "\"o\":{\"type\":\"object\"},\"sn\":{\"type\":[\"string\",\"null\"]}}}}}",
    "{\"name\":\"g\"}",
};

/* Kind after kind, each with the text of its run of events. */
static void add(de_text *t, const delta_out_event *e, size_t n, int *kind)
{
    for (size_t i = 0; i < n; i++) {
        if ((int)e[i].kind != *kind || e[i].kind == DELTA_OUT_CALL_START) {
            de_text_add(t, "\1", 1);
            de_text_add(t, &"0123456789"[e[i].kind], 1);
        }
        *kind = (int)e[i].kind;
        de_text_add(t, e[i].text.p, e[i].text.len);
        if (e[i].kind != DELTA_OUT_CALL_END)
            continue;
        de_text_puts(t, e[i].complete ? "+" : "-");
        de_arena a;
        de_arena_init(&a, 256u << 20);
        de_json *v = NULL;
        if (de_json_parse(&a, e[i].text.p, e[i].text.len, &v, NULL) < 0)
            abort();
        de_arena_done(&a);
    }
}

static de_text parse(const delta_output_options *o, const char *s, size_t n, size_t step,
                     enum delta_out_end end)
{
    delta_output *p = NULL;
    const delta_out_event *e;
    size_t count;
    enum delta_out_finish finish;
    de_text t = { 0 };
    int kind = -1;
    if (delta_output_new(o, &p, NULL) < 0)
        abort();
    for (size_t i = 0; i < n; i += step) {
        if (delta_output_push(p, s + i, n - i < step ? n - i : step, false, &e, &count, NULL) < 0)
            abort();
        add(&t, e, count, &kind);
    }
    if (delta_output_finish(p, end, &e, &count, &finish, NULL) < 0)
        abort();
    add(&t, e, count, &kind);
    de_text_add(&t, &"abc"[finish], 1);
    for (int i = 0; i < DELTA_REPAIR_N; i++) {
        char c = (char)('0' + delta_output_repairs(p, (enum delta_repair)i) % 64);
        de_text_add(&t, &c, 1);
    }
    delta_output_free(p);
    return t;
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
                                     .tools_json = list,
                                     .n_tools = 2 };
    const enum delta_out_end end = data[0] & 8 ? DELTA_OUT_END_LENGTH : DELTA_OUT_END_STOP;
    const char *s = (const char *)data + 2;
    de_text whole = parse(&o, s, size - 2, size, end);
    de_text cut = parse(&o, s, size - 2, 1u + data[1] % 16, end);
    if (whole.len != cut.len || memcmp(whole.p, cut.p, whole.len) != 0)
        abort();
    de_text_done(&whole);
    de_text_done(&cut);
    return 0;
}
