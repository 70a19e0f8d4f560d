/* output_check.h -- feeds a text to the output parser in many cuts and joins what comes out.
 *
 * Results are written as text: R{reasoning} C{content} name(arguments), with "?" behind the ")" of
 * a call that is not complete, then "=stop", "=calls" or "=length". Neighbouring pieces of one kind
 * are joined, in the order they came. */
#ifndef OUTPUT_CHECK_H
#define OUTPUT_CHECK_H

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
        for (unsigned k = 0; k < DELTA_REPAIR_N; k++)
            if (repairs[k] != again[k])
                TAP_FAIL("way %zu of \"%.*s\": %s %u, but whole %u", way, (int)len, text,
                         delta_repair_name((enum delta_repair)k), again[k], repairs[k]);
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

#endif
