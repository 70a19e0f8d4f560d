/* delta-golden.c -- the engine against golden outputs: delta-golden DIR [--model NAME=PATH]...
 *
 * DIR holds X.json and X.safetensors for each model X, and optionally
 * tokenizer_cases.json and chat_cases.json. The checkpoint of X is DIR/X, else
 * the PATH given for it, else for "demo" the installed demo model. For every
 * prompt and quantity a line tells the largest error and pass, FAIL or skip;
 * the last line sums up. Exit 0 only if something was compared and nothing
 * failed. Whole prompts run through prefill, continuations through decode; with --decode prompts do,
 * too, a token at a time. */
#include <dirent.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/file.h"
#include "base/json.h"
#include "delta/openai.h"
#include "delta/tokenizer.h"
#include "model/forward.h"

enum { STEP = 512, MAX_CTX = 32768, MAX_MODELS = 64 };

/* What the backend is held to, argued for in docs/NUMERICS.md. `relative`: norm of the difference over norm. In BF16 compute the
 * measure is what the reference's own BF16 run does on the same model. */
static const double exact = 2e-5, rounded = 2e-2, least_kl = 1e-4;
static const float exact_margin = 1e-3f, rounded_margin = 0.1f;
static bool bf16; /* the backend computes in BF16 */
static const de_backend *backend;
static bool by_decode; /* prompts go token by token through decode */

typedef struct tally {
    unsigned passed, failed, skipped;
} tally;

typedef struct document { /* a JSON file; values are also read as slices of its text */
    de_arena arena;
    char *text;
    de_json *root;
} document;

typedef struct golden {
    const char *name; /* of the model */
    de_shape shape;
    de_weights *weights;
    de_binding *binding;
    de_model *model;
    delta_tokenizer *tokenizer;
    /* X.safetensors */
    FILE *file;
    uint64_t data;
    de_arena names;
    de_tensor *tensors;
    size_t n_tensors;
    uint32_t *pages;
    /* The largest errors of the reference's BF16 run in last logits, relative and of one logit; 0 if
     * bf16 is false. */
    double noise, largest_noise;
    tally *tally;
} golden;

/* ---- reporting */

static void line(const char *model, const char *prompt, const char *what, const char *verdict)
{
    printf("%-8s %-18s %-20s %s  ", model, prompt, what, verdict);
}

static void report(tally *t, const char *model, const char *prompt, const char *what, double error,
                   double limit, const char *unit)
{
    const bool ok = error <= limit; /* false for NaN */
    line(model, prompt, what, ok ? "pass" : "FAIL");
    printf("%.3g, at most %.3g %s\n", error, limit, unit);
    t->passed += ok;
    t->failed += !ok;
}

static void skip(tally *t, const char *model, const char *prompt, const char *what, const char *why)
{
    line(model, prompt, what, "skip");
    puts(why);
    t->skipped++;
}

static void broken(tally *t, const char *model, const char *prompt, const char *what,
                   const char *why)
{
    line(model, prompt, what, "FAIL");
    puts(why);
    t->failed++;
}

static double relative(const float *a, const float *b, size_t n)
{
    double d = 0, s = 0;
    for (size_t i = 0; i < n; i++) {
        d += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        s += (double)b[i] * b[i];
    }
    return s > 0 ? sqrt(d / s) : sqrt(d);
}

/* ---- files */

static int document_open(const char *dir, const char *name, document *d, delta_error *err)
{
    char *path = de_path_join(dir, name);
    size_t len;
    d->text = NULL;
    d->root = NULL;
    de_arena_init(&d->arena, 1u << 30);
    int r = path ? de_file_read(path, 256 << 20, &d->text, &len, err) : DELTA_ENOMEM;
    if (r == 0)
        r = de_json_parse(&d->arena, d->text, len, &d->root, err);
    free(path);
    return r;
}

static void document_done(document *d)
{
    free(d->text);
    de_arena_done(&d->arena);
}

static const de_tensor *tensor(const golden *g, const char *prompt, const char *name)
{
    char full[256];
    (void)snprintf(full, sizeof full, "%s/%s", prompt, name);
    for (size_t i = 0; i < g->n_tensors; i++)
        if (strcmp(g->tensors[i].name, full) == 0)
            return &g->tensors[i];
    return NULL;
}

/* Its data (f32 or i32), malloc'ed, and its count; NULL if absent or of another type. */
static void *values(const golden *g, const char *prompt, const char *name, enum de_dtype dtype,
                    size_t *ret_n)
{
    const de_tensor *t = tensor(g, prompt, name);
    if (!t || t->dtype != dtype)
        return NULL;
    void *p = malloc(t->bytes + 1);
    if (p && (fseeko(g->file, (off_t)(g->data + t->offset), SEEK_SET) != 0 ||
              fread(p, 1, t->bytes, g->file) != t->bytes)) {
        free(p);
        p = NULL;
    }
    *ret_n = t->bytes / 4;
    return p;
}

static int open_tensors(golden *g, const char *path, delta_error *err)
{
    uint8_t head[8];
    uint64_t len = 0;
    struct stat st;
    g->file = fopen(path, "rb");
    if (!g->file || fstat(fileno(g->file), &st) < 0 || fread(head, 1, 8, g->file) != 8)
        return delta_fail(err, DELTA_EIO, "%s: cannot be read", path);
    for (int i = 7; i >= 0; i--)
        len = len << 8 | head[i];
    if (len > 16 << 20 || len + 8 > (uint64_t)st.st_size)
        return delta_fail(err, DELTA_EFORMAT, "%s: header of %llu bytes", path,
                          (unsigned long long)len);
    char *text = malloc(len + 1);
    if (!text || fread(text, 1, len, g->file) != len) {
        free(text);
        return delta_fail(err, DELTA_EIO, "%s: cannot be read", path);
    }
    g->data = 8 + len;
    int r = de_weights_parse_header(&g->names, text, len, (uint64_t)st.st_size - g->data,
                                    &g->tensors, &g->n_tensors, err);
    free(text);
    return r;
}

/* ---- one prompt */

typedef struct run {
    float *logits; /* [n, vocab] of the prompt */
    float *hidden; /* [layers + 2][n, hidden]: embed, layers, norm; NULL: not wanted */
} run;

static bool forward_prompt(golden *g, const int32_t *ids, const int32_t *pos, uint32_t n, run *r,
                           delta_error *err)
{
    const uint32_t V = g->shape.vocab, H = g->shape.hidden, L = g->shape.n_layers;
    static uint32_t tokens[STEP], at[STEP][3];
    float *layers[DE_MAX_LAYERS];
    de_model_slot_clear(g->model, 0);
    const uint32_t step = by_decode ? 1 : STEP;
    for (uint32_t t = 0; t < n; t += step) {
        const uint32_t k = n - t < step ? n - t : step;
        for (uint32_t i = 0; i < k; i++) {
            tokens[i] = (uint32_t)ids[t + i];
            for (uint32_t a = 0; a < 3; a++)
                at[i][a] = pos ? (uint32_t)pos[(size_t)a * n + t + i] : t + i;
        }
        const de_batch_seq seq = {
            .n_rows = k, .start = t, .pages = g->pages, .decode = by_decode, .n_out = k
        };
        const de_batch b = { .n_rows = k,
                             .n_seqs = 1,
                             .n_out = k,
                             .tokens = tokens,
                             .pos = (const uint32_t(*)[3])at,
                             .seqs = &seq };
        de_capture c = { 0 };
        if (r->hidden) {
            const size_t one = (size_t)n * H;
            for (uint32_t l = 0; l < L; l++)
                layers[l] = r->hidden + (l + 1) * one + (size_t)t * H;
            c = (de_capture){ .embed = r->hidden + (size_t)t * H,
                              .layers = layers,
                              .norm = r->hidden + (L + 1) * one + (size_t)t * H };
        }
        if (de_forward(g->model, &b, r->logits + (size_t)t * V, &c, err) < 0)
            return false;
    }
    return true;
}

/* Inner values see less averaging than logits: four times the noise of the last ones. */
static double inner_bound(const golden *g)
{
    return bf16 ? fmax(rounded, 4 * g->noise) : exact;
}
static double logit_bound(const golden *g)
{
    return bf16 ? fmax(rounded, 1.5 * g->noise) : exact;
}

static void check_hidden(golden *g, const char *prompt, const run *r, uint32_t n)
{
    const uint32_t L = g->shape.n_layers, H = g->shape.hidden;
    double worst = 0;
    unsigned compared = 0;
    for (uint32_t l = 0; l < L + 2; l++) {
        char name[64];
        if (l == 0 || l == L + 1)
            (void)snprintf(name, sizeof name, "hidden.%s", l ? "norm" : "embed");
        else
            (void)snprintf(name, sizeof name, "hidden.L%u", l - 1);
        size_t k;
        float *want = values(g, prompt, name, DE_F32, &k);
        if (!want)
            continue;
        if (k != (size_t)n * H) {
            broken(g->tally, g->name, prompt, name, "shape differs");
        } else {
            const double e = relative(r->hidden + (size_t)l * n * H, want, k);
            if (!(e <= inner_bound(g)))
                report(g->tally, g->name, prompt, name, e, inner_bound(g), "relative");
            worst = !(e <= worst) ? e : worst;
            compared++;
        }
        free(want);
    }
    if (compared)
        report(g->tally, g->name, prompt, "hidden states", worst, inner_bound(g), "relative");
}

static void check_states(golden *g, const char *prompt)
{
    const de_shape *s = &g->shape;
    const size_t n_rec = (size_t)s->gdn_v_heads * 128 * 128, n_conv = (size_t)s->gdn_channels * 3;
    float *rec = malloc(n_rec * sizeof *rec), *conv = malloc(n_conv * sizeof *conv);
    double worst[2] = { 0, 0 };
    unsigned compared[2] = { 0, 0 };
    delta_error err;
    for (uint32_t i = 0; rec && conv && i < s->n_layers; i++) {
        if (s->layer_kind[i] != DE_LAYER_GDN)
            continue;
        char name[64];
        size_t n;
        if (de_model_slot_peek(g->model, 0, s->kind_index[i], rec, conv, &err) < 0) {
            broken(g->tally, g->name, prompt, "states", err.text);
            break;
        }
        (void)snprintf(name, sizeof name, "state.recurrent.L%u", i);
        float *want = values(g, prompt, name, DE_F32, &n);
        if (want && n == n_rec) {
            const double e = relative(rec, want, n);
            worst[0] = !(e <= worst[0]) ? e : worst[0];
            compared[0]++;
        }
        free(want);
        (void)snprintf(name, sizeof name, "state.conv.L%u", i);
        want = values(g, prompt, name, DE_F32, &n);
        if (want && n == (size_t)s->gdn_channels * 4) {
            for (uint32_t c = 0; c < s->gdn_channels; c++) /* the oldest of four is unused */
                memmove(want + c * 3, want + c * 4 + 1, 3 * sizeof *want);
            const double e = relative(conv, want, n_conv);
            worst[1] = !(e <= worst[1]) ? e : worst[1];
            compared[1]++;
        }
        free(want);
    }
    free(rec);
    free(conv);
    if (compared[0])
        report(g->tally, g->name, prompt, "DeltaNet states", worst[0], inner_bound(g), "relative");
    if (compared[1])
        report(g->tally, g->name, prompt, "conv states", worst[1], inner_bound(g), "relative");
}

static double log_sum_exp(const float *l, uint32_t n)
{
    double max = l[0], sum = 0;
    for (uint32_t i = 1; i < n; i++)
        max = fmax(max, l[i]);
    for (uint32_t i = 0; i < n; i++)
        sum += exp(l[i] - max);
    return max + log(sum);
}

static double kl(const float *want, const float *got, uint32_t n)
{
    const double a = log_sum_exp(want, n), b = log_sum_exp(got, n);
    double sum = 0;
    for (uint32_t i = 0; i < n; i++)
        sum += exp(want[i] - a) * ((want[i] - a) - (got[i] - b));
    return sum;
}

/* In BF16 a prompt's last logits and their KL are held to what the reference's BF16 run has. */
static void check_last(golden *g, const char *prompt, const float *got, const float *want)
{
    const uint32_t V = g->shape.vocab;
    size_t k = 0;
    float *theirs = bf16 ? values(g, prompt, "bf16.last_logits", DE_F32, &k) : NULL;
    double bound = bf16 ? rounded : exact, kl_bound = least_kl;
    if (theirs && k == V) {
        bound = fmax(bound, 1.25 * relative(theirs, want, V));
        kl_bound = fmax(kl_bound, kl(want, theirs, V));
    }
    report(g->tally, g->name, prompt, "last logits", relative(got, want, V), bound, "relative");
    if (bf16)
        report(g->tally, g->name, prompt, "KL of last logits", kl(want, got, V), kl_bound, "nats");
    free(theirs);
}

static void check_logits(golden *g, const char *prompt, const float *logits, uint32_t n)
{
    const uint32_t V = g->shape.vocab;
    size_t k = 0, k_id = 0, k_lse = 0, k_last = 0;
    float *last = values(g, prompt, "last_logits", DE_F32, &k_last);
    int32_t *id = values(g, prompt, "top20_id", DE_I32, &k_id);
    float *value = values(g, prompt, "top20_value", DE_F32, &k);
    float *lse = values(g, prompt, "lse", DE_F32, &k_lse);
    float *mine = malloc(((size_t)n * 20 + 1) * sizeof *mine);
    if (last && k_last == V)
        check_last(g, prompt, logits + (size_t)(n - 1) * V, last);
    if (mine && id && value && k == (size_t)n * 20 && k_id == k) {
        for (size_t i = 0; i < k; i++)
            mine[i] = (uint32_t)id[i] < V ? logits[i / 20 * V + (uint32_t)id[i]] : NAN;
        report(g->tally, g->name, prompt, "top 20 logits", relative(mine, value, k), logit_bound(g),
               "relative");
    }
    if (mine && lse && k_lse == n) {
        for (uint32_t i = 0; i < n; i++)
            mine[i] = (float)log_sum_exp(logits + (size_t)i * V, V);
        report(g->tally, g->name, prompt, "log-sum-exp", relative(mine, lse, n), logit_bound(g),
               "relative");
    }
    free(mine);
    free(last);
    free(id);
    free(value);
    free(lse);
}

static uint32_t largest(const float *row, uint32_t n)
{
    uint32_t best = 0;
    for (uint32_t v = 1; v < n; v++)
        if (row[v] > row[best])
            best = v;
    return best;
}

/* Decodes on from the prompt's state; equal up to the first step with a small margin. row holds
 * the logits after the prompt, and then those of each step. */
static void check_greedy(golden *g, const char *prompt, float *row, uint32_t n, uint32_t position)
{
    size_t k, km, i = 0;
    int32_t *want = values(g, prompt, "greedy", DE_I32, &k);
    float *margin = values(g, prompt, "greedy_margin", DE_F32, &km);
    delta_error err = { 0 };
    const double floor = bf16 ? fmax(rounded_margin, g->largest_noise) : exact_margin;
    bool same = want && margin && k == km;
    for (; same && i < k && margin[i] >= floor; i++) {
        const uint32_t best = largest(row, g->shape.vocab), at = position + (uint32_t)i;
        const uint32_t pos[1][3] = { { at, at, at } };
        const de_batch_seq seq = {
            .n_rows = 1, .start = n + (uint32_t)i, .pages = g->pages, .decode = true, .n_out = 1
        };
        const de_batch b = {
            .n_rows = 1, .n_seqs = 1, .n_out = 1, .tokens = &best, .pos = pos, .seqs = &seq
        };
        same = best == (uint32_t)want[i];
        if (same && i + 1 < k)
            same = de_forward(g->model, &b, row, NULL, &err) == 0;
        if (!same)
            break;
    }
    if (want && margin && k == km) {
        line(g->name, prompt, "greedy continuation", same ? "pass" : "FAIL");
        if (err.code)
            puts(err.text);
        else
            printf("%zu of %zu tokens equal%s\n", i, k,
                   i < k && same ? ", then a small margin" : "");
        g->tally->passed += same;
        g->tally->failed += !same;
    }
    free(want);
    free(margin);
}

static void check_ids(golden *g, const de_json *p, const char *prompt, const int32_t *want,
                      size_t n)
{
    const de_json *text = de_json_get(p, "prompt");
    delta_error err;
    size_t n_ids;
    uint32_t *ids = NULL;
    if (!text || text->kind != DE_JSON_STRING || !want)
        return;
    if (delta_tokenize(g->tokenizer, text->text, text->n, false, &ids, &n_ids, &err) < 0)
        broken(g->tally, g->name, prompt, "prompt ids", err.text);
    else
        report(g->tally, g->name, prompt, "prompt ids", n_ids != n || memcmp(ids, want, n * 4) != 0,
               0, "wrong");
    free(ids);
}

/* An OpenAI conversation that stands in a document, as a delta_chat to be rendered. */
static int open_chat(const document *d, const de_json *messages, const de_json *tools,
                     delta_openai **ret_o, delta_error *err)
{
    return delta_openai_parse(d->text + messages->begin, messages->end - messages->begin,
                              tools ? d->text + tools->begin : NULL,
                              tools ? tools->end - tools->begin : 0, ret_o, err);
}

/* The conversation without its last turn renders to the prompt. */
static void check_render(golden *g, const document *d, const de_json *p, const char *prompt)
{
    const de_json *messages = de_json_get(p, "messages"), *text = de_json_get(p, "prompt");
    bool think = true;
    (void)de_json_bool(de_json_get(p, "think"), &think);
    if (!messages || !text || text->kind != DE_JSON_STRING)
        return;
    delta_error err;
    delta_openai *o = NULL;
    delta_rendered r = { 0 };
    int code = open_chat(d, messages, de_json_get(p, "tools"), &o, &err);
    delta_chat *c = code == 0 ? delta_openai_chat(o) : NULL;
    if (c && c->n_messages) {
        delta_message *m = (delta_message *)(uintptr_t)c->messages; /* ours: freed with o */
        c->n_messages--;                                            /* the expected answer */
        for (size_t i = 0; !think && i < c->n_messages; i++)
            m[i].has_reasoning = false;
        c->add_generation_prompt = true;
        c->enable_thinking = think;
        code = delta_chat_render(c, &r, &err);
    }
    if (code < 0)
        broken(g->tally, g->name, prompt, "prompt rendering", err.text);
    else
        report(g->tally, g->name, prompt, "prompt rendering",
               r.len != text->n || memcmp(r.text, text->text, r.len) != 0, 0, "wrong");
    delta_rendered_done(&r);
    delta_openai_free(o);
}

static void check_forward(golden *g, const de_json *p, const char *prompt, const int32_t *ids,
                          size_t n, const int32_t *pos)
{
    const uint32_t N = (uint32_t)n, V = g->shape.vocab;
    uint64_t next = n;
    (void)de_json_u64(de_json_get(p, "next_position"), &next);
    run r = { .logits = malloc(n * V * sizeof(float)) };
    if (tensor(g, prompt, "hidden.embed"))
        r.hidden = malloc((size_t)(g->shape.n_layers + 2) * n * g->shape.hidden * sizeof(float));
    delta_error err = { .text = "out of memory" };
    if (!r.logits || !forward_prompt(g, ids, pos, N, &r, &err)) {
        broken(g->tally, g->name, prompt, "forward", err.text);
    } else {
        if (r.hidden)
            check_hidden(g, prompt, &r, N);
        check_states(g, prompt);
        check_logits(g, prompt, r.logits, N);
        check_greedy(g, prompt, r.logits + (n - 1) * V, N, (uint32_t)next);
    }
    free(r.logits);
    free(r.hidden);
}

static void check_prompt(golden *g, const document *d, const de_json *p)
{
    const de_json *name = de_json_get(p, "name"), *media = de_json_get(p, "media");
    const char *prompt = name && name->kind == DE_JSON_STRING ? name->text : "?";
    size_t n = 0, n_pos = 0;
    int32_t *ids = values(g, prompt, "ids", DE_I32, &n);
    int32_t *pos = values(g, prompt, "pos", DE_I32, &n_pos);
    check_ids(g, p, prompt, ids, n);
    if (!ids || n == 0 || n + 64 > MAX_CTX) {
        broken(g->tally, g->name, prompt, "ids", "missing, empty or too long");
    } else if (media && media->n) {
        skip(g->tally, g->name, prompt, "vision and model", "pictures and films are not built yet");
    } else {
        check_render(g, d, p, prompt);
        check_forward(g, p, prompt, ids, n, n_pos == 3 * n ? pos : NULL);
    }
    if (tensor(g, prompt, "mtp.top20_id"))
        skip(g->tally, g->name, prompt, "draft head (MTP)", "not built yet");
    free(ids);
    free(pos);
}

/* ---- one model */

static int open_model(golden *g, const char *checkpoint, delta_error *err)
{
    int r = de_shape_read(checkpoint, &g->shape, err);
    if (r == 0)
        r = de_weights_open(checkpoint, &g->weights, err);
    if (r == 0)
        r = de_bind(g->weights, &g->shape, &g->binding, err);
    const de_model_options o = { .backend = backend,
                                 .n_slots = 1,
                                 .n_pages = MAX_CTX / DE_PAGE,
                                 .max_rows = STEP,
                                 .max_seqs = 1,
                                 .max_out = STEP,
                                 .ctx_max = MAX_CTX };
    if (r == 0)
        r = de_model_open(g->weights, &g->shape, g->binding, &o, &g->model, err);
    if (r == 0)
        r = delta_tokenizer_open(checkpoint, &g->tokenizer, err);
    return r;
}

static void add_noise(golden *g, const de_json *p)
{
    const de_json *name = de_json_get(p, "name");
    const char *prompt = name && name->kind == DE_JSON_STRING ? name->text : "?";
    size_t n = 0, k = 0;
    float *want = values(g, prompt, "last_logits", DE_F32, &n),
          *theirs = values(g, prompt, "bf16.last_logits", DE_F32, &k);
    if (want && theirs && n == k) {
        g->noise = fmax(g->noise, relative(theirs, want, n));
        for (size_t i = 0; i < n; i++)
            g->largest_noise = fmax(g->largest_noise, fabs((double)theirs[i] - want[i]));
    }
    free(want);
    free(theirs);
}

static void check_model(const char *dir, const char *name, const char *checkpoint, tally *t)
{
    golden g = { .name = name, .tally = t };
    char json[300], tensors[300];
    (void)snprintf(json, sizeof json, "%s.json", name);
    (void)snprintf(tensors, sizeof tensors, "%s.safetensors", name);
    char *path = de_path_join(dir, tensors);
    document d;
    delta_error err = { .text = "out of memory" };
    de_arena_init(&g.names, 64u << 20);
    g.pages = malloc(MAX_CTX / DE_PAGE * sizeof *g.pages);
    for (uint32_t i = 0; g.pages && i < MAX_CTX / DE_PAGE; i++)
        g.pages[i] = i;
    int r = document_open(dir, json, &d, &err);
    if (r == 0)
        r = path && g.pages ? open_model(&g, checkpoint, &err) : DELTA_ENOMEM;
    if (r == 0)
        r = open_tensors(&g, path, &err);
    if (r < 0)
        broken(t, name, "-", "opening", err.text);
    const de_json *prompts = r == 0 ? de_json_get(d.root, "prompts") : NULL;
    for (const de_json *p = bf16 && prompts ? prompts->child : NULL; p; p = p->next)
        add_noise(&g, p);
    for (const de_json *p = prompts ? prompts->child : NULL; p; p = p->next) {
        check_prompt(&g, &d, p);
        (void)fflush(stdout);
    }
    if (g.file)
        (void)fclose(g.file);
    delta_tokenizer_free(g.tokenizer);
    de_model_free(g.model);
    de_binding_free(g.binding);
    de_weights_free(g.weights);
    free(g.tensors);
    free(g.pages);
    free(path);
    document_done(&d);
    de_arena_done(&g.names);
}

/* ---- tokenizer and template cases */

static bool same_text(const delta_tokenizer *tok, const uint32_t *ids, size_t n, bool skip_special,
                      const de_json *want)
{
    char *text;
    size_t len;
    delta_error err;
    if (!want)
        return true;
    if (delta_detokenize(tok, ids, n, skip_special, &text, &len, &err) < 0)
        return false;
    const bool same = want->n == len && memcmp(text, want->text, len) == 0;
    free(text);
    return same;
}

static bool tokenizer_case(const delta_tokenizer *tok, const de_json *c)
{
    const de_json *text = de_json_get(c, "text"), *want = de_json_get(c, "ids");
    uint32_t *ids = NULL;
    size_t k = 0, i = 0;
    delta_error err;
    if (!text || !want || delta_tokenize(tok, text->text, text->n, false, &ids, &k, &err) < 0)
        return false;
    bool same = k == want->n;
    for (const de_json *v = same ? want->child : NULL; v; v = v->next, i++) {
        uint64_t u;
        same = same && de_json_u64(v, &u) && u == ids[i];
    }
    same = same && same_text(tok, ids, k, false, de_json_get(c, "decoded")) &&
           same_text(tok, ids, k, true, de_json_get(c, "decoded_skip_special"));
    free(ids);
    return same;
}

static void check_tokenizer(const char *dir, const char *checkpoint, tally *t)
{
    document d;
    delta_error err;
    delta_tokenizer *tok = NULL;
    unsigned wrong = 0, n = 0;
    if (document_open(dir, "tokenizer_cases.json", &d, &err) == 0) {
        if (delta_tokenizer_open(checkpoint, &tok, &err) < 0)
            broken(t, "-", "tokenizer", "opening", err.text);
        for (const de_json *c = tok ? d.root->child : NULL; c; c = c->next, n++) {
            const bool same = tokenizer_case(tok, c);
            wrong += !same;
            if (!same)
                printf("#        tokenizer case %u differs\n", n);
        }
        if (n)
            report(t, "-", "tokenizer", "cases", wrong, 0, "wrong");
    }
    delta_tokenizer_free(tok);
    document_done(&d);
}

static bool option(const de_json *o, const char *key, bool dflt)
{
    (void)de_json_bool(de_json_get(o, key), &dflt);
    return dflt;
}

static bool chat_case(const document *d, const de_json *v)
{
    const de_json *o = de_json_get(v, "options"), *want = de_json_get(v, "rendered");
    const de_json *messages = de_json_get(v, "messages");
    const bool fails = !want || want->kind != DE_JSON_STRING;
    delta_openai *chat = NULL;
    delta_rendered r = { 0 };
    delta_error err;
    int code =
        messages ? open_chat(d, messages, de_json_get(o, "tools"), &chat, &err) : DELTA_EFORMAT;
    if (code == 0) {
        delta_chat *c = delta_openai_chat(chat);
        c->add_generation_prompt = option(o, "add_generation_prompt", false);
        c->enable_thinking = option(o, "enable_thinking", true);
        c->preserve_thinking = option(o, "preserve_thinking", false);
        c->add_vision_id = option(o, "add_vision_id", false);
        code = delta_chat_render(c, &r, &err);
    }
    const bool same =
        fails ? code < 0 : code == 0 && r.len == want->n && memcmp(r.text, want->text, r.len) == 0;
    delta_rendered_done(&r);
    delta_openai_free(chat);
    return same;
}

static void check_chat(const char *dir, tally *t)
{
    document d;
    delta_error err;
    unsigned wrong = 0, n = 0;
    if (document_open(dir, "chat_cases.json", &d, &err) == 0) {
        for (const de_json *v = d.root->child; v; v = v->next, n++) {
            const bool same = chat_case(&d, v);
            wrong += !same;
            if (!same)
                printf("#        chat case %u differs\n", n);
        }
        if (n)
            report(t, "-", "chat template", "cases", wrong, 0, "wrong");
    }
    document_done(&d);
}

/* ---- main */

static bool is_dir(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

/* The installed demo model, or the one of the source tree that this was built from. */
static char *demo_model(void)
{
    return strdup(is_dir(DELTA_DEMO_MODEL) ? DELTA_DEMO_MODEL : DELTA_DEMO_MODEL_SOURCE);
}

/* The checkpoint of a model, malloc'ed, or NULL. */
static char *checkpoint_of(const char *dir, const char *name, int argc, char **argv)
{
    char *path = de_path_join(dir, name);
    if (path && is_dir(path))
        return path;
    free(path);
    const size_t len = strlen(name);
    for (int i = 2; i + 1 < argc; i++)
        if (strcmp(argv[i], "--model") == 0 && strncmp(argv[i + 1], name, len) == 0 &&
            argv[i + 1][len] == '=')
            return strdup(argv[i + 1] + len + 1);
    return strcmp(name, "demo") == 0 ? demo_model() : NULL;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Names X with X.json and X.safetensors, sorted. */
static size_t find_models(DIR *d, const char *dir, char **names)
{
    size_t n = 0;
    for (struct dirent *e; n < MAX_MODELS && (e = readdir(d));) {
        const size_t len = strlen(e->d_name);
        if (len < 6 || strcmp(e->d_name + len - 5, ".json") != 0)
            continue;
        char name[300];
        (void)snprintf(name, sizeof name, "%.*s.safetensors", (int)(len - 5), e->d_name);
        char *path = de_path_join(dir, name);
        struct stat st;
        if (path && stat(path, &st) == 0)
            names[n++] = strndup(e->d_name, len - 5);
        free(path);
    }
    qsort(names, n, sizeof *names, by_name);
    return n;
}

int main(int argc, char **argv)
{
    const char *name = "cpu";
    bool usage = argc < 2 || argv[1][0] == '-';
    for (int i = 2; i < argc; i++) {
        by_decode |= strcmp(argv[i], "--decode") == 0;
        if (strcmp(argv[i], "--decode") == 0)
            continue;
        if (i + 1 < argc && strcmp(argv[i], "--backend") == 0)
            name = argv[i + 1];
        else
            usage |= i + 1 >= argc || strcmp(argv[i], "--model") != 0 || !strchr(argv[i + 1], '=');
        i++;
    }
    backend = de_backend_find(name);
    if (usage || !backend) {
        (void)fprintf(stderr, "usage: delta-golden DIR [--model NAME=PATH]... [--backend cpu|cuda]"
                              " [--decode]\n");
        return 64;
    }
    bf16 = strcmp(de_backend_name(backend), "cpu") != 0;
    const char *dir = argv[1];
    DIR *d = opendir(dir);
    if (!d) {
        (void)fprintf(stderr, "delta-golden: %s: no such folder\n", dir);
        return 64;
    }
    char *names[MAX_MODELS], *of_cases = NULL;
    const size_t n = find_models(d, dir, names);
    (void)closedir(d);
    tally t = { 0 };
    for (size_t i = 0; i < n; i++) {
        char *checkpoint = checkpoint_of(dir, names[i], argc, argv);
        if (!checkpoint)
            broken(&t, names[i], "-", "opening", "no checkpoint; give one with --model NAME=PATH");
        else
            check_model(dir, names[i], checkpoint, &t);
        if (checkpoint && (!of_cases || strcmp(names[i], "demo") == 0)) {
            free(of_cases);
            of_cases = strdup(checkpoint);
        }
        free(checkpoint);
        free(names[i]);
    }
    if (!of_cases)
        of_cases = checkpoint_of(dir, "demo", argc, argv);
    check_tokenizer(dir, of_cases, &t);
    check_chat(dir, &t);
    free(of_cases);
    printf("delta-golden: %u passed, %u failed, %u skipped\n", t.passed, t.failed, t.skipped);
    return t.failed || t.passed == 0 ? 1 : 0;
}
