/* delta-bench.c -- how fast the model runs: delta-bench --model DIR [options].
 *
 *   --mode decode|prefill|all  decode: steps of one row a sequence; prefill: one
 *                              sequence in forwards of --rows (default: all)
 *   --ctx N                    tokens in the cache when decode starts; length of
 *                              the prompt in prefill (default 512)
 *   --rows N                   decode: sequences a step, at most 64 (default 1);
 *                              prefill: rows a forward (default 512)
 *   --tokens N                 decode: timed steps of one repeat (default 64)
 *   --threads N                0: as many as the process may use (default 0)
 *   --repeats N                timed repeats after one that warms up (default 5)
 *   --backend cpu              what computes
 *
 * Each mode prints one line of key=value pairs: tokens a second of the median,
 * the slowest and the fastest repeat. Tokens are drawn from a fixed seed and
 * nothing is sampled: the forward alone is timed, with the logits of the rows
 * that a server would want (decode: all; prefill: the last one). What it prints
 * belongs into a table only with commit, machine and command beside it. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bits.h"
#include "base/clock.h"
#include "kernels/cpu/hot.h"
#include "kernels/cpu/pool.h"
#include "model/forward.h"

enum { MAX_CTX = 1 << 20, MAX_SEQS = 64, MAX_ROWS = 4096, MAX_STEPS = 65536, MAX_REPEATS = 101 };

typedef struct arguments {
    const char *model, *mode;
    uint32_t ctx, rows, tokens, threads, repeats; /* rows 0: the mode's default */
} arguments;

typedef struct bench {
    de_shape shape;
    de_weights *weights;
    de_binding *binding;
    de_model *model;
    uint32_t n_seqs, rows, seq_pages;
    uint32_t *tokens, (*pos)[3], *pages;
    de_batch_seq seqs[MAX_SEQS];
    float *logits;
    uint64_t random;
} bench;

static uint32_t token(bench *b)
{
    b->random = b->random * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(b->random >> 33) % b->shape.vocab;
}

static int open_bench(const arguments *a, uint32_t n_seqs, uint32_t rows, uint32_t ctx, bench *b,
                      delta_error *err)
{
    int r = de_shape_read(a->model, &b->shape, err);
    if (r == 0 && ctx > b->shape.ctx_max)
        r = delta_fail(err, DELTA_EINVALID, "%u tokens; the model takes %u", ctx, b->shape.ctx_max);
    if (r == 0)
        r = de_weights_open(a->model, &b->weights, err);
    if (r == 0)
        r = de_bind(b->weights, &b->shape, &b->binding, err);
    if (r < 0)
        return r;
    b->random = 1;
    b->n_seqs = n_seqs;
    b->rows = rows;
    b->seq_pages = (uint32_t)de_ceil_div(ctx, DE_PAGE);
    const de_model_options o = { .threads = a->threads,
                                 .n_slots = n_seqs,
                                 .n_pages = n_seqs * b->seq_pages,
                                 .max_rows = rows,
                                 .max_seqs = n_seqs,
                                 .max_out = n_seqs,
                                 .ctx_max = ctx };
    r = de_model_open(b->weights, &b->shape, b->binding, &o, &b->model, err);
    if (r < 0)
        return r;
    b->tokens = calloc(rows, sizeof *b->tokens);
    b->pos = calloc(rows, sizeof *b->pos);
    b->pages = calloc(o.n_pages, sizeof *b->pages);
    b->logits = calloc((size_t)n_seqs * b->shape.vocab, sizeof *b->logits);
    if (!b->tokens || !b->pos || !b->pages || !b->logits)
        return delta_fail(err, DELTA_ENOMEM, "a batch of %u rows", rows);
    for (uint32_t i = 0; i < o.n_pages; i++)
        b->pages[i] = i;
    return 0;
}

static void close_bench(bench *b)
{
    de_model_free(b->model);
    de_binding_free(b->binding);
    de_weights_free(b->weights);
    free(b->tokens);
    free(b->pos);
    free(b->pages);
    free(b->logits);
}

/* Rows [start, start + n) of sequences [first, first + n_seqs). */
static int forward(bench *b, uint32_t first, uint32_t n_seqs, uint32_t start, uint32_t n,
                   delta_error *err)
{
    for (uint32_t s = 0; s < n_seqs; s++) {
        b->seqs[s] = (de_batch_seq){ .row = s * n,
                                     .n_rows = n,
                                     .start = start,
                                     .pages = b->pages + (first + s) * b->seq_pages,
                                     .slot = first + s,
                                     .first_out = s,
                                     .n_out = 1 };
        for (uint32_t i = 0; i < n; i++) {
            b->tokens[s * n + i] = token(b);
            for (uint32_t axis = 0; axis < 3; axis++)
                b->pos[s * n + i][axis] = start + i;
        }
    }
    const de_batch batch = { .n_rows = n_seqs * n,
                             .n_seqs = n_seqs,
                             .n_out = n_seqs,
                             .tokens = b->tokens,
                             .pos = (const uint32_t(*)[3])b->pos,
                             .seqs = b->seqs };
    return de_forward(b->model, &batch, b->logits, NULL, err);
}

static int prefill(bench *b, uint32_t seq, uint32_t ctx, uint32_t rows, delta_error *err)
{
    int r = 0;
    de_model_slot_clear(b->model, seq);
    for (uint32_t t = 0; r == 0 && t < ctx; t += rows)
        r = forward(b, seq, 1, t, rows < ctx - t ? rows : ctx - t, err);
    return r;
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print(const arguments *a, const char *mode, uint32_t ctx, uint32_t rows,
                  uint32_t tokens, double *rate)
{
    de_pool *pool = de_pool_new(a->threads); /* what 0 threads means here */
    const uint32_t threads = pool ? de_pool_threads(pool) : a->threads;
    de_pool_free(pool);
    qsort(rate, a->repeats, sizeof *rate, ascending);
    printf("mode=%s backend=cpu isa=%s threads=%u ctx=%u rows=%u tokens=%u repeats=%u "
           "tokens_per_s=%.1f min=%.1f max=%.1f\n",
           mode, de_hot_best()->name, threads, ctx, rows, tokens, a->repeats, rate[a->repeats / 2],
           rate[0], rate[a->repeats - 1]);
}

static int run_decode(const arguments *a, delta_error *err)
{
    const uint32_t n_seqs = a->rows ? a->rows : 1, step = 512;
    double rate[MAX_REPEATS];
    bench b = { 0 };
    if (n_seqs > MAX_SEQS)
        return delta_fail(err, DELTA_EINVALID, "decode: at most %d rows", MAX_SEQS);
    int r = open_bench(a, n_seqs, step, a->ctx + a->tokens, &b, err);
    /* every repeat decodes the same positions: the states go on, the keys are written over */
    for (uint32_t s = 0; r == 0 && s < n_seqs; s++)
        r = prefill(&b, s, a->ctx, step, err);
    for (uint32_t i = 0; r == 0 && i <= a->repeats; i++) {
        const uint64_t t0 = de_now_ns();
        for (uint32_t t = 0; r == 0 && t < a->tokens; t++)
            r = forward(&b, 0, n_seqs, a->ctx + t, 1, err);
        if (i > 0)
            rate[i - 1] = (double)a->tokens * n_seqs * 1e9 / (double)(de_now_ns() - t0);
    }
    if (r == 0)
        print(a, "decode", a->ctx, n_seqs, a->tokens, rate);
    close_bench(&b);
    return r;
}

static int run_prefill(const arguments *a, delta_error *err)
{
    const uint32_t rows = a->rows ? a->rows : 512;
    double rate[MAX_REPEATS];
    bench b = { 0 };
    int r = open_bench(a, 1, rows, a->ctx, &b, err);
    for (uint32_t i = 0; r == 0 && i <= a->repeats; i++) {
        const uint64_t t0 = de_now_ns();
        r = prefill(&b, 0, a->ctx, rows, err);
        if (i > 0)
            rate[i - 1] = (double)a->ctx * 1e9 / (double)(de_now_ns() - t0);
    }
    if (r == 0)
        print(a, "prefill", a->ctx, rows, a->ctx, rate);
    close_bench(&b);
    return r;
}

/* ---- arguments */

static int usage(void)
{
    (void)fputs("usage: delta-bench --model DIR [--mode decode|prefill|all] [--ctx N] [--rows N]\n"
                "                   [--tokens N] [--threads N] [--repeats N] [--backend cpu]\n",
                stderr);
    return 2;
}

static int number(const char *text, uint32_t min, uint32_t max, uint32_t *ret)
{
    char *end;
    errno = 0;
    const unsigned long v = strtoul(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || errno || v < min || v > max)
        return -1;
    *ret = (uint32_t)v;
    return 0;
}

static int parse(int argc, char **argv, arguments *a)
{
    const struct {
        const char *name;
        uint32_t min, max, *to;
    } numbers[] = {
        { "--ctx", 1, MAX_CTX, &a->ctx },
        { "--rows", 1, MAX_ROWS, &a->rows },
        { "--tokens", 1, MAX_STEPS, &a->tokens },
        { "--threads", 0, 1024, &a->threads },
        { "--repeats", 1, MAX_REPEATS, &a->repeats },
    };
    for (int i = 1; i < argc; i += 2) {
        int known = 0;
        if (i + 1 == argc)
            return -1;
        if (strcmp(argv[i], "--model") == 0) {
            a->model = argv[i + 1];
            continue;
        }
        if (strcmp(argv[i], "--mode") == 0) {
            a->mode = argv[i + 1];
            continue;
        }
        if (strcmp(argv[i], "--backend") == 0) {
            if (strcmp(argv[i + 1], "cpu") != 0)
                return -1;
            continue;
        }
        for (size_t k = 0; k < sizeof numbers / sizeof *numbers; k++)
            if (strcmp(argv[i], numbers[k].name) == 0) {
                known = 1;
                if (number(argv[i + 1], numbers[k].min, numbers[k].max, numbers[k].to) < 0)
                    return -1;
            }
        if (!known)
            return -1;
    }
    return a->model && (strcmp(a->mode, "all") == 0 || strcmp(a->mode, "decode") == 0 ||
                        strcmp(a->mode, "prefill") == 0)
               ? 0
               : -1;
}

int main(int argc, char **argv)
{
    arguments a = { .mode = "all", .ctx = 512, .tokens = 64, .repeats = 5 };
    delta_error err;
    int r = 0;
    if (parse(argc, argv, &a) < 0)
        return usage();
    if (strcmp(a.mode, "prefill") != 0)
        r = run_decode(&a, &err);
    if (r == 0 && strcmp(a.mode, "decode") != 0)
        r = run_prefill(&a, &err);
    if (r < 0) {
        (void)fprintf(stderr, "delta-bench: %s\n", err.text);
        return 1;
    }
    return 0;
}
