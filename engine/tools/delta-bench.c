/* delta-bench.c -- how fast the model runs, without a server: delta-bench (--model DIR | --synthetic 35b) [options].
 *
 *   --backend auto|cpu|cuda   what computes
 *   --kv auto|bf16|fp8        how keys and values are kept (cuda)
 *   --mode LIST               decode, prefill, append, all (default: all)
 *   --batch LIST              decode: sequences a step, at most 64 (default 1)
 *   --ctx LIST                decode, append: tokens in the cache at the start (default 512)
 *   --len LIST                prefill: tokens of the prompt (default 512)
 *   --new LIST                append: new tokens (default 64)
 *   --rows N                  rows of one forward of prefill (default 512; 8192 on cuda)
 *   --tokens N                decode: timed steps of one repeat (default 64)
 *   --repeats N               timed repeats after one that warms up (default 5)
 *   --threads N               of the CPU backend; 0: as many as the process may use
 *   --limit N                 read bandwidth in GB/s for the ratio; 0: measure it (cuda)
 *   --json                    one JSON object a line instead of the table
 *
 * A forward is timed whole: the description of the batch goes to the device, the logits that a server would want (decode: all
 * rows; else the last) come back to the host. Nothing is sampled. Caches hold what a real prefill of random tokens left there.
 * --synthetic makes random weights of exactly the real shapes and formats on the device: 35b is Qwen3.6-35B-A3B in W8A16.
 *
 * Beside each decode and append row: the bytes that such a step must read and write (weights once; of the experts the number
 * that uniform routing is expected to touch; states; keys and values of the context) and the ratio of the time these take at the
 * limit to the time seen. */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/bits.h"
#include "base/clock.h"
#include "model/forward.h"
#include "model/synthetic.h"

enum { MAX_SEQS = 64, MAX_LIST = 16, MAX_REPEATS = 101 };

typedef struct list {
    uint32_t n, v[MAX_LIST];
} list;

typedef struct arguments {
    const char *model, *synthetic, *mode, *backend, *kv;
    list batch, ctx, len, fresh;
    uint32_t rows, tokens, threads, repeats, limit;
    bool json;
} arguments;

typedef struct bench {
    const arguments *a;
    const de_backend *backend;
    de_shape shape;
    de_weights *weights;
    de_binding *binding;
    de_model *model;
    de_memory_plan plan;
    uint32_t n_slots, seq_pages, max_rows;
    uint32_t filled[MAX_SEQS]; /* tokens that a sequence has in the cache */
    uint32_t *tokens, (*pos)[3], *pages;
    de_batch_seq seqs[MAX_SEQS];
    float *logits;
    uint64_t random, load_ns;
    double limit; /* bytes a second, 0: unknown */
} bench;

static uint32_t token(bench *b)
{
    b->random = b->random * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(b->random >> 33) % b->shape.vocab;
}

static uint32_t largest(const list *l)
{
    uint32_t max = 0;
    for (uint32_t i = 0; i < l->n; i++)
        max = l->v[i] > max ? l->v[i] : max;
    return max;
}

static bool has_mode(const arguments *a, const char *mode)
{
    const char *at = strstr(a->mode, mode);
    return at || strcmp(a->mode, "all") == 0;
}

/* ---- the model */

static void progress(void *arg, const char *phase, uint64_t done, uint64_t total)
{
    static uint64_t next;
    (void)arg;
    const uint64_t now = de_now_ns();
    if (now < next && done < total)
        return;
    next = now + 500000000;
    (void)fprintf(stderr, "%s: %.1f of %.1f GB\n", phase, (double)done * 1e-9,
                  (double)total * 1e-9);
}

static int open_weights(bench *b, delta_error *err)
{
    if (b->a->synthetic) {
        de_synthetic_35b(&b->shape);
        return de_synthetic_binding(&b->shape, &b->binding, err);
    }
    int r = de_shape_read(b->a->model, &b->shape, err);
    if (r == 0)
        r = de_weights_open(b->a->model, &b->weights, err);
    return r == 0 ? de_bind(b->weights, &b->shape, &b->binding, err) : r;
}

static int open_bench(bench *b, const arguments *a, delta_error *err)
{
    b->a = a;
    b->random = 1;
    b->backend = de_backend_find(a->backend);
    if (!b->backend || de_backend_memory(b->backend) == 0)
        return delta_fail(err, DELTA_EUNSUPPORTED, "backend %s: not in this build, or no device",
                          a->backend);
    int r = open_weights(b, err);
    if (r < 0)
        return r;
    const bool cpu = strcmp(de_backend_name(b->backend), "cpu") == 0;
    const uint32_t batch = has_mode(a, "decode") ? largest(&a->batch) : 1;
    uint32_t ctx = has_mode(a, "prefill") ? largest(&a->len) : 1;
    uint64_t all = 0; /* tokens of all sequences together: the longest context fits once */
    const uint32_t more = a->tokens > largest(&a->fresh) ? a->tokens : largest(&a->fresh);
    if (has_mode(a, "decode") || has_mode(a, "append"))
        ctx = largest(&a->ctx) + more > ctx ? largest(&a->ctx) + more : ctx;
    b->max_rows = a->rows ? a->rows : cpu ? 512 : 8192;
    b->n_slots = batch;
    b->seq_pages = (uint32_t)de_ceil_div(ctx, DE_PAGE);
    if (ctx > b->shape.ctx_max)
        return delta_fail(err, DELTA_EINVALID, "%u tokens; the model takes %u", ctx,
                          b->shape.ctx_max);
    all = (uint64_t)batch * b->seq_pages;
    const de_model_options o = { .backend = b->backend,
                                 .kv_type = strcmp(a->kv, "fp8") == 0    ? DE_KV_FP8
                                            : strcmp(a->kv, "bf16") == 0 ? DE_KV_BF16
                                                                         : DE_KV_AUTO,
                                 .threads = a->threads,
                                 .n_slots = batch,
                                 .n_pages = (uint32_t)all,
                                 .max_rows = b->max_rows,
                                 .max_seqs = batch,
                                 .max_out = batch,
                                 .ctx_max = ctx,
                                 .on_progress = cpu ? NULL : progress };
    r = de_model_plan(&b->shape, b->binding, &o, &b->plan, err);
    const uint64_t t0 = de_now_ns();
    if (r == 0)
        r = de_model_open(b->weights, &b->shape, b->binding, &o, &b->model, err);
    if (r < 0)
        return r;
    b->load_ns = de_now_ns() - t0;
    b->tokens = calloc(b->max_rows, sizeof *b->tokens);
    b->pos = calloc(b->max_rows, sizeof *b->pos);
    b->pages = calloc(all, sizeof *b->pages);
    b->logits =
        de_backend_host_alloc(b->backend, (size_t)batch * b->shape.vocab * sizeof *b->logits);
    if (!b->tokens || !b->pos || !b->pages || !b->logits)
        return delta_fail(err, DELTA_ENOMEM, "a batch of %u rows", b->max_rows);
    for (uint32_t i = 0; i < all;
         i++) /* pages as a server deals them out: not one behind the other */
        b->pages[i] = (uint32_t)((uint64_t)i * 7919 % all);
    for (uint64_t i = 0; all % 7919 == 0 && i < all; i++)
        b->pages[i] = (uint32_t)i;
    if (a->limit)
        b->limit = a->limit * 1e9;
    else if (de_backend_read_rate(b->backend, &b->limit) < 0)
        b->limit = 0;
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
    if (b->logits)
        de_backend_host_free(b->backend, b->logits);
}

/* Rows [start, start + n) of sequences [first, first + n_seqs). */
static int forward(bench *b, uint32_t first, uint32_t n_seqs, uint32_t start, uint32_t n,
                   bool decode, delta_error *err)
{
    for (uint32_t s = 0; s < n_seqs; s++) {
        b->seqs[s] = (de_batch_seq){ .row = s * n,
                                     .n_rows = n,
                                     .start = start,
                                     .pages = b->pages + (size_t)(first + s) * b->seq_pages,
                                     .slot = first + s,
                                     .decode = decode,
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

/* Rows [start, end) of one sequence, as many a forward as may be. */
static int extend(bench *b, uint32_t seq, uint32_t start, uint32_t end, delta_error *err)
{
    int r = 0;
    for (uint32_t t = start; r == 0 && t < end; t += b->max_rows)
        r = forward(b, seq, 1, t, b->max_rows < end - t ? b->max_rows : end - t, false, err);
    return r;
}

/* Sequences [0, n) have ctx tokens or more in the cache. */
static int fill(bench *b, uint32_t n, uint32_t ctx, delta_error *err)
{
    int r = 0;
    for (uint32_t s = 0; r == 0 && s < n; s++) {
        if (b->filled[s] >= ctx)
            continue;
        r = extend(b, s, b->filled[s], ctx, err);
        b->filled[s] = ctx;
    }
    return r;
}

/* ---- what a step must move */

static double linear_bytes(const de_linear_ref *l)
{
    return (double)l->out * l->in *
               (l->format == DE_LINEAR_INT8 ? 1 : (double)de_dtype_bytes(l->weight.dtype)) +
           (l->format == DE_LINEAR_INT8 ? (double)l->out * (l->in / l->group) * 4 : 0);
}
static double expert_bytes(const de_expert_ref *e)
{
    return linear_bytes(&e->gate) + linear_bytes(&e->up) + linear_bytes(&e->down);
}

/* Bytes of a forward of n_seqs sequences with `rows` new tokens each on a context of ctx. */
static double step_bytes(const bench *b, uint32_t n_seqs, uint32_t rows, uint32_t ctx)
{
    const de_shape *s = &b->shape;
    const double miss = pow(1 - (double)s->top_k / s->n_experts, (double)n_seqs * rows);
    const double kv_size = strcmp(de_backend_name(b->backend), "cpu") == 0 ? 4
                           : strcmp(b->a->kv, "fp8") == 0                  ? 1
                                                                           : 2;
    double sum = linear_bytes(&b->binding->head);
    for (uint32_t i = 0; i < s->n_layers; i++) {
        const de_layer_ref *l = &b->binding->layers[i];
        sum += linear_bytes(&l->router) + linear_bytes(&l->shared_gate) + expert_bytes(&l->shared);
        sum += expert_bytes(&l->experts[0]) * s->n_experts * (1 - miss);
        if (l->kind == DE_LAYER_ATTN)
            sum += linear_bytes(&l->q) + linear_bytes(&l->k) + linear_bytes(&l->v) +
                   linear_bytes(&l->o) +
                   (double)n_seqs * ctx * s->kv_heads * 2 * DE_ATTN_DIM * kv_size;
        else
            sum += linear_bytes(&l->qkv) + linear_bytes(&l->z) + linear_bytes(&l->b) +
                   linear_bytes(&l->a) + linear_bytes(&l->out) +
                   2.0 * n_seqs * s->gdn_v_heads * DE_GDN_DIM * DE_GDN_DIM * 4;
    }
    return sum;
}

/* ---- measuring */

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* One row of the table: seconds of each repeat, `per` forwards in one. bytes 0: not counted. */
static void print(const bench *b, const char *mode, uint32_t batch, uint32_t ctx, uint32_t rows,
                  double tokens, double bytes, double *seconds, uint32_t per)
{
    static bool headed;
    const uint32_t n = b->a->repeats;
    qsort(seconds, n, sizeof *seconds, ascending);
    const double p50 = seconds[n / 2], ratio = b->limit > 0 ? bytes * per / b->limit / p50 : 0;
    const double vram = (double)(b->plan.weights_bytes + b->plan.kv_bytes + b->plan.state_bytes +
                                 b->plan.workspace_bytes);
    if (b->a->json) {
        printf("{\"engine\": \"deltad\", \"backend\": \"%s\", \"format\": \"%s\", \"kv\": \"%s\", "
               "\"mode\": \"%s\", \"batch\": %u, \"ctx\": %u, \"rows\": %u, \"repeats\": %u, "
               "\"tokens_per_s\": %.2f, \"p50_ms\": %.4f, \"min_ms\": %.4f, \"max_ms\": %.4f, "
               "\"bytes\": %.0f, \"limit_bytes_per_s\": %.0f, \"ratio\": %.4f, "
               "\"memory_bytes\": %.0f, \"workspace_bytes\": %" PRIu64 ", \"load_s\": %.3f}\n",
               de_backend_name(b->backend), b->binding->quantization, b->a->kv, mode, batch, ctx,
               rows, n, tokens / p50, p50 / per * 1e3, seconds[0] / per * 1e3,
               seconds[n - 1] / per * 1e3, bytes, b->limit, ratio, vram, b->plan.workspace_bytes,
               (double)b->load_ns * 1e-9);
        return;
    }
    if (!headed)
        printf("| engine | format | mode | batch | context | rows | tok/s | p50 ms | min ms | "
               "max ms | GB | of the limit | memory GB |\n"
               "|---|---|---|---|---|---|---|---|---|---|---|---|---|\n");
    headed = true;
    printf("| deltad %s | %s, kv %s | %s | %u | %u | %u | %.1f | %.3f | %.3f | %.3f | %.2f | ",
           de_backend_name(b->backend), b->binding->quantization, b->a->kv, mode, batch, ctx, rows,
           tokens / p50, p50 / per * 1e3, seconds[0] / per * 1e3, seconds[n - 1] / per * 1e3,
           bytes * 1e-9);
    if (ratio > 0)
        printf("%.0f %% | %.1f |\n", 100 * ratio, vram * 1e-9);
    else
        printf("- | %.1f |\n", vram * 1e-9);
    (void)fflush(stdout);
}

static int run_decode(bench *b, uint32_t batch, uint32_t ctx, delta_error *err)
{
    double seconds[MAX_REPEATS];
    const uint32_t steps = b->a->tokens;
    int r = fill(b, batch, ctx, err);
    /* every repeat decodes the same positions: the states go on, the keys are written over */
    for (uint32_t i = 0; r == 0 && i <= b->a->repeats; i++) {
        const uint64_t t0 = de_now_ns();
        for (uint32_t t = 0; r == 0 && t < steps; t++)
            r = forward(b, 0, batch, ctx + t, 1, true, err);
        if (i > 0)
            seconds[i - 1] = (double)(de_now_ns() - t0) * 1e-9;
    }
    if (r == 0)
        print(b, "decode", batch, ctx, batch, (double)batch * steps,
              step_bytes(b, batch, 1, ctx + steps / 2), seconds, steps);
    return r;
}

/* `fresh` tokens behind ctx of them in one sequence, to the last one's logits. */
static int run_append(bench *b, const char *mode, uint32_t ctx, uint32_t fresh, delta_error *err)
{
    double seconds[MAX_REPEATS];
    int r = ctx ? fill(b, 1, ctx, err) : 0;
    for (uint32_t i = 0; r == 0 && i <= b->a->repeats; i++) {
        const uint64_t t0 = de_now_ns();
        if (ctx == 0)
            de_model_slot_clear(b->model, 0);
        r = extend(b, 0, ctx, ctx + fresh, err);
        if (i > 0)
            seconds[i - 1] = (double)(de_now_ns() - t0) * 1e-9;
    }
    if (ctx == 0)
        b->filled[0] = b->filled[0] > fresh ? b->filled[0] : fresh;
    if (r == 0)
        print(b, mode, 1, ctx, fresh, fresh, ctx ? step_bytes(b, 1, fresh, ctx) : 0, seconds, 1);
    return r;
}

static int run(bench *b, delta_error *err)
{
    const arguments *a = b->a;
    int r = 0;
    if (b->limit > 0 && !a->json)
        printf("read bandwidth of this run: %.0f GB/s\n", b->limit * 1e-9);
    if (!a->json)
        printf("loaded in %.2f s: weights %.2f GB, KV %.2f GB, state %.2f GB, workspace %.2f GB\n",
               (double)b->load_ns * 1e-9, (double)b->plan.weights_bytes * 1e-9,
               (double)b->plan.kv_bytes * 1e-9, (double)b->plan.state_bytes * 1e-9,
               (double)b->plan.workspace_bytes * 1e-9);
    for (uint32_t i = 0; r == 0 && has_mode(a, "prefill") && i < a->len.n; i++)
        r = run_append(b, "prefill", 0, a->len.v[i], err);
    for (uint32_t c = 0; has_mode(a, "append") && c < a->ctx.n; c++)
        for (uint32_t i = 0; r == 0 && i < a->fresh.n; i++)
            r = run_append(b, "append", a->ctx.v[c], a->fresh.v[i], err);
    for (uint32_t c = 0; has_mode(a, "decode") && c < a->ctx.n; c++)
        for (uint32_t i = 0; r == 0 && i < a->batch.n; i++)
            r = run_decode(b, a->batch.v[i], a->ctx.v[c], err);
    return r;
}

/* ---- arguments */

static int usage(void)
{
    (void)fputs("usage: delta-bench (--model DIR | --synthetic 35b) [--backend auto|cpu|cuda]\n"
                "                   [--kv auto|bf16|fp8] [--mode decode,prefill,append|all]\n"
                "                   [--batch N,...] [--ctx N,...] [--len N,...] [--new N,...]\n"
                "                   [--rows N] [--tokens N] [--repeats N] [--threads N]\n"
                "                   [--limit GB/s] [--json]\n",
                stderr);
    return 2;
}

/* Numbers in min..max, separated by commas. */
static int numbers(const char *text, uint32_t min, uint32_t max, uint32_t room, list *ret)
{
    ret->n = 0;
    for (;;) {
        char *end;
        errno = 0;
        const unsigned long v = strtoul(text, &end, 10);
        if (*text < '0' || *text > '9' || errno || v < min || v > max || ret->n == room)
            return -1;
        ret->v[ret->n++] = (uint32_t)v;
        if (!*end)
            return 0;
        if (*end != ',')
            return -1;
        text = end + 1;
    }
}

static bool one_of(const char *text, const char *choices)
{
    const size_t n = strlen(text);
    for (const char *at = choices; (at = strstr(at, text)); at++)
        if ((at == choices || at[-1] == ' ') && (at[n] == ' ' || !at[n]))
            return n > 0;
    return false;
}

static bool modes(const char *text)
{
    char part[16];
    for (;;) {
        const size_t n = strcspn(text, ",");
        if (n == 0 || n >= sizeof part)
            return false;
        memcpy(part, text, n);
        part[n] = 0;
        if (!one_of(part, "decode prefill append all"))
            return false;
        if (!text[n])
            return true;
        text += n + 1;
    }
}

static int parse(int argc, char **argv, arguments *a)
{
    list rows = { 1, { 0 } }, tokens = { 1, { 64 } }, repeats = { 1, { 5 } },
         threads = { 1, { 0 } }, limit = { 1, { 0 } };
    const struct {
        const char *name;
        uint32_t min, max, room;
        list *to;
    } lists[] = {
        { "--batch", 1, MAX_SEQS, MAX_LIST, &a->batch },
        { "--ctx", 1, 1 << 20, MAX_LIST, &a->ctx },
        { "--len", 1, 1 << 20, MAX_LIST, &a->len },
        { "--new", 1, 1 << 20, MAX_LIST, &a->fresh },
        { "--rows", 1, 16384, 1, &rows },
        { "--tokens", 1, 65536, 1, &tokens },
        { "--repeats", 1, MAX_REPEATS, 1, &repeats },
        { "--threads", 0, 1024, 1, &threads },
        { "--limit", 0, 100000, 1, &limit },
    };
    const struct {
        const char *name, *choices;
        const char **to;
    } words[] = { { "--model", NULL, &a->model },
                  { "--synthetic", "35b", &a->synthetic },
                  { "--backend", "auto cpu cuda", &a->backend },
                  { "--kv", "auto bf16 fp8", &a->kv },
                  { "--mode", NULL, &a->mode } };
    for (int i = 1; i < argc; i++) {
        bool known = strcmp(argv[i], "--json") == 0;
        if (known) {
            a->json = true;
            continue;
        }
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        for (size_t k = 0; k < sizeof lists / sizeof *lists; k++)
            if (strcmp(argv[i], lists[k].name) == 0) {
                known = true;
                if (numbers(value, lists[k].min, lists[k].max, lists[k].room, lists[k].to) < 0)
                    return -1;
            }
        for (size_t k = 0; k < sizeof words / sizeof *words; k++)
            if (strcmp(argv[i], words[k].name) == 0) {
                known = *value;
                *words[k].to = value;
                if (words[k].choices && !one_of(value, words[k].choices))
                    return -1;
            }
        if (!known)
            return -1;
        i++;
    }
    a->rows = rows.v[0];
    a->tokens = tokens.v[0];
    a->repeats = repeats.v[0];
    a->threads = threads.v[0];
    a->limit = limit.v[0];
    return !a->model != !a->synthetic && modes(a->mode) ? 0 : -1;
}

int main(int argc, char **argv)
{
    arguments a = { .mode = "all",
                    .backend = "auto",
                    .kv = "auto",
                    .batch = { 1, { 1 } },
                    .ctx = { 1, { 512 } },
                    .len = { 1, { 512 } },
                    .fresh = { 1, { 64 } } };
    bench b = { 0 };
    delta_error err;
    if (parse(argc, argv, &a) < 0)
        return usage();
    int r = open_bench(&b, &a, &err);
    if (r == 0)
        r = run(&b, &err);
    close_bench(&b);
    if (r < 0) {
        (void)fprintf(stderr, "delta-bench: %s\n", err.text);
        return 1;
    }
    return 0;
}
