/* delta-grammar -- what a grammar lets through: checks texts, makes samples, times masks.
 *
 *   delta-grammar [--model DIR] < specs.jsonl
 *
 * One JSON object a line: a spec (thinking, calls_in_reasoning, calls_in_fences, calls "auto" or
 * "required", tools, allowed, parallel; or one of json, schema, regex, choices, grammar), and what to do with it:
 * "texts", a list of strings: is each one a whole turn? "samples": so many turns sampled from the
 * masks, with "seed"; each mask is compared with what the matcher takes where "check" is true.
 * Answers one JSON object a line: error, or key, accepted, samples, and figures of the masks. */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/json.h"
#include "delta/grammar.h"

enum { SAMPLE_TOKENS = 3000, STRINGS_MAX = 65536 };

typedef struct times {
    double *us;
    size_t n, cap;
} times;

typedef struct job {
    const delta_tokenizer *tok;
    const delta_grammar_vocab *vocab;
    delta_matcher *m;
    uint32_t *bits, *check;
    uint64_t random;
    times masks;
    uint64_t free_masks, forced;
    double slowest_us;
    de_text slowest;   /* the text behind which a mask took longest */
    const char *fault; /* where mask and matcher differ, or a dead end */
    uint32_t fault_id;
} job;

static uint32_t draw(job *j, uint32_t below)
{
    j->random = j->random * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (uint32_t)((j->random >> 33) * below >> 31);
}

/* Time that this thread ran: others on the machine do not count. */
static double cpu_us(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static void time_add(times *t, double us)
{
    if (t->n == t->cap) {
        const size_t cap = t->cap ? 2 * t->cap : 4096;
        double *p = realloc(t->us, cap * sizeof *p);
        if (!p)
            return;
        t->us = p;
        t->cap = cap;
    }
    t->us[t->n++] = us;
}

static int by_size(const void *x, const void *y)
{
    const double a = *(const double *)x, b = *(const double *)y;
    return a < b ? -1 : a > b;
}

static delta_str str_of(const de_json *v)
{
    return v && v->kind == DE_JSON_STRING ? (delta_str){ v->text, v->n } : (delta_str){ NULL, 0 };
}

/* The text of a value as it stands in the line. */
static delta_str raw_of(const char *line, const de_json *v)
{
    return v ? (delta_str){ line + v->begin, v->end - v->begin } : (delta_str){ NULL, 0 };
}

static size_t list_of(const char *line, const de_json *v, bool raw, delta_str *out)
{
    size_t n = 0;
    for (const de_json *e = v ? v->child : NULL; e && n < STRINGS_MAX; e = e->next)
        out[n++] = raw ? raw_of(line, e) : str_of(e);
    return n;
}

static void read_spec(const char *line, const de_json *v, delta_grammar_spec *s, delta_str *lists)
{
    *s = (delta_grammar_spec){ .parallel = true };
    (void)de_json_bool(de_json_get(v, "thinking"), &s->thinking);
    (void)de_json_bool(de_json_get(v, "calls_in_reasoning"), &s->calls_in_reasoning);
    (void)de_json_bool(de_json_get(v, "calls_in_fences"), &s->calls_in_fences);
    (void)de_json_bool(de_json_get(v, "parallel"), &s->parallel);
    const de_json *calls = de_json_get(v, "calls");
    s->calls = de_json_is_string(calls, "auto")       ? DELTA_CALLS_AUTO
               : de_json_is_string(calls, "required") ? DELTA_CALLS_REQUIRED
                                                      : DELTA_CALLS_NONE;
    s->tools_json = lists;
    s->n_tools = list_of(line, de_json_get(v, "tools"), true, lists);
    s->allowed = lists + STRINGS_MAX;
    s->n_allowed = list_of(line, de_json_get(v, "allowed"), false, lists + STRINGS_MAX);
    s->choices = lists + 2 * STRINGS_MAX;
    s->n_choices = list_of(line, de_json_get(v, "choices"), false, lists + 2 * STRINGS_MAX);
    const de_json *schema = de_json_get(v, "schema"), *regex = de_json_get(v, "regex"),
                  *grammar = de_json_get(v, "grammar");
    if (s->n_choices) {
        s->content = DELTA_CONTENT_CHOICE;
    } else if (schema) {
        s->content = DELTA_CONTENT_SCHEMA;
        s->text = raw_of(line, schema);
    } else if (regex) {
        s->content = DELTA_CONTENT_REGEX;
        s->text = str_of(regex);
    } else if (grammar) {
        s->content = DELTA_CONTENT_GRAMMAR;
        s->text = str_of(grammar);
    } else if (de_json_get(v, "json")) {
        s->content = DELTA_CONTENT_JSON;
    }
}

/* ---- texts */

static bool is_turn(job *j, delta_str text)
{
    delta_matcher_reset(j->m);
    uint32_t *ids = NULL;
    size_t n = 0;
    if (delta_tokenize(j->tok, text.p ? text.p : "", text.len, false, &ids, &n, NULL) < 0)
        return false;
    const bool ok =
        delta_matcher_accept(j->m, ids, n, NULL, NULL) == 0 && delta_matcher_is_accepting(j->m);
    free(ids);
    return ok;
}

/* ---- samples */

static bool is_end(const job *j, uint32_t id)
{
    return delta_token_kind(j->tok, id) == DELTA_TOKEN_SPECIAL;
}

/* One bit after the other: does the matcher take what the mask says? */
static void check_mask(job *j, enum delta_mask_kind kind)
{
    const uint32_t n = delta_grammar_vocab_size(j->vocab);
    if (kind == DELTA_MASK_FREE)
        return;
    for (uint32_t id = 0; id < n && !j->fault; id++) {
        const bool takes = delta_matcher_accept(j->m, &id, 1, NULL, NULL) == 0;
        if (takes)
            (void)delta_matcher_rollback(j->m, 1, NULL);
        if (takes != (j->bits[id / 32] >> (id % 32) & 1))
            j->fault_id = id, j->fault = takes ? "a token that is taken is not in the mask"
                                               : "a token of the mask is not taken";
    }
    if (delta_matcher_mask(j->m, j->check) != kind ||
        memcmp(j->bits, j->check, delta_grammar_mask_words(j->vocab) * sizeof *j->bits) != 0)
        j->fault = "the second mask is another";
}

/* Texts that bring a turn to its end; random tokens alone would seldom find them. */
static bool hint(job *j, de_text *out)
{
    static const char *const hints[] = { "\"",
                                         "}",
                                         "]",
                                         "\n</parameter>\n",
                                         "</function>\n",
                                         "\n</tool_call>",
                                         "</think>\n\n",
                                         "0",
                                         "<tool_call>\n<function=",
                                         ":",
                                         ",",
                                         "</parameter>",
                                         "\n<parameter=",
                                         "\n" };
    const char *h = hints[draw(j, sizeof hints / sizeof *hints)];
    uint32_t *ids = NULL;
    size_t n = 0, taken = 0;
    if (delta_tokenize(j->tok, h, strlen(h), false, &ids, &n, NULL) < 0)
        return false;
    (void)delta_matcher_accept(j->m, ids, n, &taken, NULL);
    for (size_t i = 0; i < taken; i++) {
        size_t len;
        const uint8_t *p = delta_token_bytes(j->tok, ids[i], &len);
        de_text_add(out, (const char *)p, len);
    }
    free(ids);
    return taken > 0;
}

static uint32_t pick(job *j, bool any)
{
    const uint32_t n = delta_grammar_vocab_size(j->vocab);
    uint32_t count = 0;
    for (uint32_t i = 0; i < (n + 31) / 32; i++)
        count += (uint32_t)__builtin_popcount(j->bits[i]);
    if (any) /* FREE: any text */
        for (;;) {
            const uint32_t id = draw(j, delta_tokenizer_size(j->tok));
            if (delta_token_kind(j->tok, id) == DELTA_TOKEN_TEXT)
                return id;
        }
    uint32_t k = draw(j, count);
    for (uint32_t id = 0; id < n; id++)
        if (j->bits[id / 32] >> (id % 32) & 1 && k-- == 0)
            return id;
    return 0;
}

/* false: no end was found in time, or a fault. */
static bool sample(job *j, bool check, de_text *out)
{
    delta_matcher_reset(j->m);
    for (unsigned i = 0; i < SAMPLE_TOKENS && !j->fault; i++) {
        const double begin = cpu_us();
        const enum delta_mask_kind kind = delta_matcher_mask(j->m, j->bits);
        const double us = cpu_us() - begin;
        time_add(&j->masks, us);
        if (us > j->slowest_us) {
            j->slowest_us = us;
            j->slowest.len = 0;
            de_text_add(&j->slowest, out->p ? out->p : "", out->len);
        }
        j->free_masks += kind == DELTA_MASK_FREE;
        if (kind == DELTA_MASK_DEAD) {
            j->fault = "a dead end";
            break;
        }
        if (check)
            check_mask(j, kind);
        uint32_t forced[64];
        const size_t n_forced = draw(j, 2) ? delta_matcher_forced(j->m, forced, 64) : 0;
        j->forced += n_forced;
        if (n_forced) {
            if (delta_matcher_accept(j->m, forced, n_forced, NULL, NULL) < 0)
                j->fault = "a forced token is not taken";
            for (size_t k = 0; k < n_forced; k++) {
                size_t len;
                const uint8_t *p = delta_token_bytes(j->tok, forced[k], &len);
                de_text_add(out, (const char *)p, len);
            }
            continue;
        }
        if (delta_matcher_is_accepting(j->m) && draw(j, 100) < 20 + i / 4)
            return true;
        if (draw(j, 100) < 30 + i / 2 && hint(j, out))
            continue;
        const uint32_t id = pick(j, kind == DELTA_MASK_FREE);
        if (is_end(j, id))
            return true;
        if (delta_matcher_accept(j->m, &id, 1, NULL, NULL) < 0)
            j->fault = "a token of the mask is not taken";
        size_t len;
        const uint8_t *p = delta_token_bytes(j->tok, id, &len);
        de_text_add(out, (const char *)p, len);
    }
    return false;
}

/* ---- answers */

/* Bytes that are no UTF-8 (free text may hold them) become U+FFFD. */
static void write_text(de_text *out, const de_text *t)
{
    de_text valid = { 0 };
    delta_detok d = { .n_held = 0 };
    for (size_t i = 0; i < t->len; i++) {
        char c[DELTA_DETOK_ROOM + 4];
        const size_t n = delta_detok_push(&d, (const uint8_t *)t->p + i, 1, c, sizeof c);
        de_text_add(&valid, c, n);
    }
    char c[DELTA_DETOK_ROOM + 4];
    de_text_add(&valid, c, delta_detok_flush(&d, c, sizeof c));
    de_json_write_string(out, valid.p ? valid.p : "", valid.len);
    de_text_done(&valid);
}

static void write_figures(job *j, delta_grammar *g, de_text *out)
{
    delta_grammar_stats s;
    delta_grammar_stats_read(g, &s);
    times *t = &j->masks;
    if (t->n)
        qsort(t->us, t->n, sizeof *t->us, by_size);
    char text[512];
    (void)snprintf(
        text, sizeof text,
        ",\"compile_ms\":%.3f,\"nodes\":%u,\"bytes\":%llu,\"masks\":%zu,\"free\":%llu,\"asked\":%"
        "llu,"
        "\"cached\":%llu,\"forced\":%llu,\"median_us\":%.2f,\"p99_us\":%.2f,\"worst_us\":%.2f",
        (double)s.compile_ns / 1e6, s.nodes, (unsigned long long)s.bytes, t->n,
        (unsigned long long)j->free_masks, (unsigned long long)s.masks,
        (unsigned long long)s.cached, (unsigned long long)j->forced, t->n ? t->us[t->n / 2] : 0,
        t->n ? t->us[t->n - 1 - t->n / 100] : 0, t->n ? t->us[t->n - 1] : 0);
    de_text_puts(out, text);
    if (t->n) {
        de_text_puts(out, ",\"slowest_behind\":");
        write_text(out, &j->slowest);
    }
}

static void work(job *j, const de_json *v, delta_grammar *g, de_text *out)
{
    delta_error err = { 0 };
    if (delta_matcher_new(g, &j->m, &err) < 0)
        return;
    j->masks.n = 0;
    j->free_masks = j->forced = 0;
    j->fault = NULL;
    j->slowest_us = 0;
    const de_json *texts = de_json_get(v, "texts");
    if (texts) {
        de_text_puts(out, ",\"accepted\":[");
        for (const de_json *t = texts->child; t; t = t->next) {
            de_text_puts(out, is_turn(j, str_of(t)) ? "true" : "false");
            de_text_puts(out, t->next ? "," : "");
        }
        de_text_puts(out, "]");
    }
    uint64_t samples = 0, seed = 1;
    bool check = false;
    (void)de_json_u64(de_json_get(v, "samples"), &samples);
    (void)de_json_u64(de_json_get(v, "seed"), &seed);
    (void)de_json_bool(de_json_get(v, "check"), &check);
    j->random = seed;
    if (samples) {
        de_text_puts(out, ",\"samples\":[");
        bool any = false;
        for (uint64_t i = 0; i < samples && !j->fault; i++) {
            de_text t = { 0 };
            if (sample(j, check, &t)) {
                de_text_puts(out, any ? "," : "");
                write_text(out, &t);
                any = true;
            } else if (j->fault) {
                de_text_puts(out, any ? "],\"fault_at\":" : "],\"fault_at\":");
                write_text(out, &t);
                de_text_puts(out, ",\"rest\":[");
            }
            de_text_done(&t);
        }
        de_text_puts(out, "]");
    }
    if (j->fault) {
        de_text_puts(out, ",\"fault\":");
        de_json_write_string(out, j->fault, strlen(j->fault));
        de_text token = { 0 };
        size_t len;
        const uint8_t *p = delta_token_bytes(j->tok, j->fault_id, &len);
        de_text_add(&token, (const char *)p, len);
        de_text_puts(out, ",\"token\":");
        write_text(out, &token);
        de_text_done(&token);
    }
    write_figures(j, g, out);
    delta_matcher_free(j->m);
}

static bool answer(job *j, const char *line, size_t len)
{
    static delta_str lists[3 * STRINGS_MAX];
    de_arena a;
    de_arena_init(&a, (size_t)256 << 20);
    delta_error err = { 0 };
    de_json *v = NULL;
    de_text out = { 0 };
    delta_grammar *g = NULL;
    int e = de_json_parse(&a, line, len, &v, &err);
    if (e >= 0) {
        delta_grammar_spec spec;
        char key[65];
        read_spec(line, v, &spec, lists);
        e = delta_grammar_compile(j->vocab, &spec, &g, &err);
        if (e >= 0)
            e = delta_grammar_key(&spec, key, &err);
        if (e >= 0) {
            de_text_puts(&out, "{\"key\":\"");
            de_text_puts(&out, key);
            de_text_puts(&out, "\"");
            work(j, v, g, &out);
        }
    }
    if (e < 0) {
        out.len = 0;
        de_text_puts(&out, "{\"code\":\"");
        de_text_puts(&out, delta_code_name(e));
        de_text_puts(&out, "\",\"error\":");
        de_json_write_string(&out, err.text, strlen(err.text));
    }
    de_text_puts(&out, "}\n");
    const bool ok = !out.failed && fwrite(out.p, 1, out.len, stdout) == out.len;
    de_text_done(&out);
    delta_grammar_free(g);
    de_arena_done(&a);
    return ok;
}

int main(int argc, char **argv)
{
    static const struct option options[] = { { "model", required_argument, NULL, 'm' },
                                             { "help", no_argument, NULL, 'h' },
                                             { NULL, 0, NULL, 0 } };
    const char *model = DELTA_DEMO_MODEL;
    for (int c; (c = getopt_long(argc, argv, "m:h", options, NULL)) != -1;) {
        if (c == 'm') {
            model = optarg;
        } else {
            (void)fprintf(c == 'h' ? stdout : stderr,
                          "usage: delta-grammar [--model DIR] < specs.jsonl\n");
            return c == 'h' ? 0 : 2;
        }
    }
    delta_error err = { 0 };
    delta_tokenizer *tok = NULL;
    delta_grammar_vocab *vocab = NULL;
    if (delta_tokenizer_open(model, &tok, &err) < 0 && strcmp(model, DELTA_DEMO_MODEL) == 0)
        (void)delta_tokenizer_open(DELTA_DEMO_MODEL_SOURCE, &tok, &err);
    if (!tok) {
        (void)fprintf(stderr, "delta-grammar: %s\n", err.text);
        return 1;
    }
    const int64_t end = delta_tokenizer_added_id(tok, "<|im_end|>");
    const uint32_t end_id = (uint32_t)end, n = (delta_tokenizer_size(tok) + 255) / 256 * 256;
    int status = 1;
    if (delta_grammar_vocab_new(tok, n, &end_id, end >= 0, &vocab, &err) < 0) {
        (void)fprintf(stderr, "delta-grammar: %s\n", err.text);
    } else {
        job j = { .tok = tok, .vocab = vocab };
        j.bits = calloc(delta_grammar_mask_words(vocab), sizeof *j.bits);
        j.check = calloc(delta_grammar_mask_words(vocab), sizeof *j.check);
        char *line = NULL;
        size_t cap = 0;
        bool ok = j.bits && j.check;
        for (ssize_t len; ok && (len = getline(&line, &cap, stdin)) > 0;)
            ok = answer(&j, line, (size_t)len);
        free(line);
        free(j.bits);
        free(j.check);
        free(j.masks.us);
        de_text_done(&j.slowest);
        status = ok && fflush(stdout) == 0 ? 0 : 1;
    }
    delta_grammar_vocab_free(vocab);
    delta_tokenizer_free(tok);
    return status;
}
