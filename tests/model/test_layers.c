/* Every layer of a checkpoint against the formulas of the model in double precision.
 *
 * Random tokens run through the model; the hidden states it captured before a layer are the input of
 * the reference, so that errors do not add up, and its output is compared with what the model captured
 * behind the layer. The reference is the recurrence and the plain sums, from the stored weights. The
 * golden checkpoints bring other head ratios, groups of scales and widths, the random ones all else. */
#include "support/tap.h"

#include <time.h>

#include "base/bf16.h"
#include "model/forward.h"
#include "model/rope.h"
#include "unit/model/checkpoint_values.h"

enum { MAX_T = 131, D = 256, G = 128 };

static uint32_t T; /* rows of the prompt */
static double limit;
static const de_weights *weights;
static const de_shape *shape;

static double *load(const de_ref *r)
{
    const size_t n = r->bytes / de_dtype_bytes(r->dtype);
    uint8_t *raw = malloc(r->bytes + 1);
    double *out = malloc((n + 1) * sizeof *out);
    delta_error err;
    if (de_weights_read(weights, r->shard, r->offset, raw, r->bytes, &err) < 0)
        TAP_FAIL("%s", err.text);
    for (size_t i = 0; i < n; i++) {
        uint16_t h;
        float f;
        if (r->dtype == DE_F32) {
            memcpy(&f, raw + i * 4, 4);
        } else {
            memcpy(&h, raw + i * 2, 2);
            f = r->dtype == DE_BF16 ? de_bf16_to_float(h) : de_f16_to_float(h);
        }
        out[i] = f;
    }
    free(raw);
    return out;
}

/* y = W x, straight from the stored values */
static void linear(const de_linear_ref *l, const double *x, uint32_t rows, double *y)
{
    double *w;
    if (l->format == DE_LINEAR_FLOAT) {
        w = load(&l->weight);
    } else {
        uint8_t *raw = malloc(l->weight.bytes);
        double *scale = load(&l->scale);
        delta_error err;
        CHECK(de_weights_read(weights, l->weight.shard, l->weight.offset, raw, l->weight.bytes,
                              &err) == 0);
        w = malloc(sizeof *w * l->out * l->in);
        for (uint32_t o = 0; o < l->out; o++)
            for (uint32_t k = 0; k < l->in; k++)
                w[(size_t)o * l->in + k] =
                    ((int)raw[(size_t)o * l->row_bytes + k] - 128) *
                    scale[l->scale_whole ? 0 : o * (l->in / l->group) + k / l->group];
        free(raw);
        free(scale);
    }
    for (uint32_t r = 0; r < rows; r++)
        for (uint32_t o = 0; o < l->out; o++) {
            double s = 0;
            for (uint32_t k = 0; k < l->in; k++)
                s += w[(size_t)o * l->in + k] * x[(size_t)r * l->in + k];
            y[(size_t)r * l->out + o] = s;
        }
    free(w);
}

static double *rows_of(const de_linear_ref *l, const double *x)
{
    double *y = malloc(sizeof *y * T * l->out);
    linear(l, x, T, y);
    return y;
}

static void norm(double *y, const double *x, const double *w, double bias, uint32_t n, double eps)
{
    double s = 0;
    for (uint32_t i = 0; i < n; i++)
        s += x[i] * x[i];
    const double r = 1 / sqrt(s / n + eps);
    for (uint32_t i = 0; i < n; i++)
        y[i] = x[i] * r * (bias + w[i]);
}

static double sigmoid(double x)
{
    return 1 / (1 + exp(-x));
}

static double *normed(const double *h, const de_ref *w)
{
    double *x = malloc(sizeof *x * T * shape->hidden), *weight = load(w);
    for (uint32_t t = 0; t < T; t++)
        norm(x + (size_t)t * shape->hidden, h + (size_t)t * shape->hidden, weight, 1, shape->hidden,
             shape->rms_eps);
    free(weight);
    return x;
}

static void add(double *h, const double *y)
{
    for (size_t i = 0; i < (size_t)T * shape->hidden; i++)
        h[i] += y[i];
}

/* spec 3.3 */
static void attention(const de_layer_ref *l, const double *x, double *h)
{
    const uint32_t Q = shape->q_heads, K = shape->kv_heads, half = shape->rotary_dims / 2;
    const double stretch = shape->yarn ? shape->yarn_attention_factor : 1;
    float inv[D / 2];
    de_rope_frequencies(shape, inv);
    double *qg = rows_of(&l->q, x), *k = rows_of(&l->k, x), *v = rows_of(&l->v, x);
    double *qn = load(&l->q_norm), *kn = load(&l->k_norm),
           *o = calloc((size_t)T * Q * D, sizeof *o);
    for (uint32_t t = 0; t < T; t++)
        for (uint32_t i = 0; i < Q + K; i++) {
            double *a = i < Q ? qg + ((size_t)t * Q + i) * 2 * D : k + ((size_t)t * K + i - Q) * D;
            norm(a, a, i < Q ? qn : kn, 1, D, shape->rms_eps);
            for (uint32_t d = 0; d < half; d++) {
                const double angle = (float)t * inv[d];
                const double x0 = a[d] * stretch, x1 = a[d + half] * stretch;
                a[d] = x0 * cos(angle) - x1 * sin(angle);
                a[d + half] = x1 * cos(angle) + x0 * sin(angle);
            }
        }
    for (uint32_t t = 0; t < T; t++)
        for (uint32_t i = 0; i < Q; i++) {
            const double *q = qg + ((size_t)t * Q + i) * 2 * D;
            const uint32_t g = i / (Q / K);
            double p[MAX_T], max = -INFINITY, sum = 0, *to = o + ((size_t)t * Q + i) * D;
            for (uint32_t s = 0; s <= t; s++) {
                p[s] = 0;
                for (uint32_t d = 0; d < D; d++)
                    p[s] += q[d] * k[((size_t)s * K + g) * D + d] / 16;
                max = fmax(max, p[s]);
            }
            for (uint32_t s = 0; s <= t; s++)
                sum += p[s] = exp(p[s] - max);
            for (uint32_t s = 0; s <= t; s++)
                for (uint32_t d = 0; d < D; d++)
                    to[d] += p[s] / sum * v[((size_t)s * K + g) * D + d];
            for (uint32_t d = 0; d < D; d++)
                to[d] *= sigmoid(q[D + d]);
        }
    double *y = rows_of(&l->o, o);
    add(h, y);
    free(qg);
    free(k);
    free(v);
    free(qn);
    free(kn);
    free(o);
    free(y);
}

/* spec 3.4: the recurrence itself */
static void deltanet(const de_layer_ref *l, const double *x, double *h)
{
    const uint32_t C = shape->gdn_channels, K = shape->gdn_k_heads, V = shape->gdn_v_heads;
    double *u = rows_of(&l->qkv, x), *z = rows_of(&l->z, x), *b = rows_of(&l->b, x);
    double *a = rows_of(&l->a, x), *conv = load(&l->conv), *A = load(&l->A_log);
    double *dt = load(&l->dt_bias), *w = load(&l->gdn_norm);
    double *S = calloc((size_t)V * G * G, sizeof *S), *o = malloc(sizeof *o * T * V * G);
    double *c = malloc(sizeof *c * C);
    for (uint32_t t = 0; t < T; t++) {
        for (uint32_t i = 0; i < C; i++) {
            double s = 0;
            for (uint32_t j = 0; j < 4; j++)
                if (t + j >= 3)
                    s += conv[i * 4 + j] * u[(size_t)(t + j - 3) * C + i];
            c[i] = s * sigmoid(s);
        }
        for (uint32_t i = 0; i < 2 * K; i++) {
            double s = 0;
            for (uint32_t d = 0; d < G; d++)
                s += c[i * G + d] * c[i * G + d];
            for (uint32_t d = 0; d < G; d++)
                c[i * G + d] *= (i < K ? 1 / sqrt(128.0) : 1) / sqrt(s + 1e-6);
        }
        for (uint32_t i = 0; i < V; i++) {
            const double *q = c + (i / (V / K)) * G, *k = q + K * G, *v = c + (2 * K + i) * G;
            const double alpha = exp(-exp(A[i]) * log1p(exp(a[t * V + i] + dt[i])));
            const double beta = sigmoid(b[t * V + i]);
            double *s = S + (size_t)i * G * G, *to = o + ((size_t)t * V + i) * G;
            for (uint32_t d = 0; d < G; d++) {
                double m = 0, out = 0;
                for (uint32_t e = 0; e < G; e++)
                    m += (s[e * G + d] *= alpha) * k[e];
                for (uint32_t e = 0; e < G; e++)
                    out += (s[e * G + d] += k[e] * beta * (v[d] - m)) * q[e];
                to[d] = out;
            }
            norm(to, to, w, 0, G, shape->rms_eps);
            for (uint32_t d = 0; d < G; d++) {
                const double g = z[((size_t)t * V + i) * G + d];
                to[d] *= g * sigmoid(g);
            }
        }
    }
    double *y = rows_of(&l->out, o);
    add(h, y);
    double *const all[] = { u, z, b, a, conv, A, dt, w, S, o, c, y };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
}

/* spec 3.6; every expert on all rows, weighted by 0 where it was not chosen */
static void experts(const de_layer_ref *l, const double *x, double *h)
{
    const uint32_t E = shape->n_experts, H = shape->hidden;
    double *r = rows_of(&l->router, x), *sg = rows_of(&l->shared_gate, x);
    double *w = calloc((size_t)T * (E + 1), sizeof *w);
    for (uint32_t t = 0; t < T; t++) {
        double sum = 0, *p = r + (size_t)t * E, *to = w + (size_t)t * (E + 1);
        for (uint32_t j = 0; j < shape->top_k; j++) {
            uint32_t best = E;
            for (uint32_t e = 0; e < E; e++)
                if (to[e] == 0 && (best == E || p[e] > p[best]))
                    best = e;
            sum += to[best] = exp(p[best]);
        }
        for (uint32_t e = 0; e < E; e++)
            to[e] /= sum;
        to[E] = sigmoid(sg[t]);
    }
    for (uint32_t e = 0; e <= E; e++) {
        const de_expert_ref *x_ = e < E ? &l->experts[e] : &l->shared;
        double *gate = rows_of(&x_->gate, x), *up = rows_of(&x_->up, x);
        for (size_t i = 0; i < (size_t)T * x_->gate.out; i++)
            gate[i] = gate[i] * sigmoid(gate[i]) * up[i];
        double *y = rows_of(&x_->down, gate);
        for (uint32_t t = 0; t < T; t++)
            for (uint32_t i = 0; i < H; i++)
                h[(size_t)t * H + i] += w[(size_t)t * (E + 1) + e] * y[(size_t)t * H + i];
        free(gate);
        free(up);
        free(y);
    }
    free(r);
    free(sg);
    free(w);
}

/* The relative distance of two rows. */
static double distance(const float *a, const double *b, uint32_t n)
{
    double d = 0, sum = 0;
    for (uint32_t k = 0; k < n; k++) {
        d += (a[k] - b[k]) * (a[k] - b[k]);
        sum += b[k] * b[k];
    }
    return sqrt(d / sum);
}

/* Whether logits of the last row are those of its hidden state (spec 3.1). */
static void check_logits(const de_binding *b, const double *h, const float *logits)
{
    double *w = load(&b->norm), *x = malloc(sizeof *x * shape->hidden);
    double *y = malloc(sizeof *y * shape->vocab);
    norm(x, h, w, 1, shape->hidden, shape->rms_eps);
    linear(&b->head, x, 1, y);
    const double e = distance(logits, y, shape->vocab);
    CHECK(e < limit);
    printf("# logits: %.2g\n", e);
    free(w);
    free(x);
    free(y);
}

static void check(const char *dir, uint32_t rows, uint64_t seed)
{
    de_shape s;
    de_weights *w;
    de_binding *b;
    de_model *m;
    delta_error err = { .text = "" };
    T = rows;
    const de_model_options o = { .threads = 2,
                                 .n_slots = 1,
                                 .n_pages = 4,
                                 .max_rows = T,
                                 .max_seqs = 1,
                                 .max_out = 1,
                                 .ctx_max = 256 };
    if (de_shape_read(dir, &s, &err) < 0 || de_weights_open(dir, &w, &err) < 0 ||
        de_bind(w, &s, &b, &err) < 0 || de_model_open(w, &s, b, &o, &m, &err) < 0) {
        TAP_FAIL("%s", err.text);
        return;
    }
    weights = w;
    shape = &s;
    static uint32_t tokens[MAX_T], pos[MAX_T][3];
    static const uint32_t pages[] = { 2, 0, 3, 1 };
    ckv_random r = { seed };
    for (uint32_t i = 0; i < T; i++) {
        tokens[i] = ckv_below(&r, s.vocab);
        pos[i][0] = pos[i][1] = pos[i][2] = i;
    }
    const size_t n = (size_t)T * s.hidden;
    float *captured = malloc((s.n_layers + 1) * n * sizeof *captured), *layers[DE_MAX_LAYERS];
    float *logits = malloc(s.vocab * sizeof *logits);
    for (uint32_t i = 0; i < s.n_layers; i++)
        layers[i] = captured + (i + 1) * n;
    const de_capture c = { .embed = captured, .layers = layers };
    const de_batch_seq seq = { .n_rows = T, .pages = pages, .n_out = 1 };
    const de_batch batch = { .n_rows = T,
                             .n_seqs = 1,
                             .n_out = 1,
                             .tokens = tokens,
                             .pos = (const uint32_t(*)[3])pos,
                             .seqs = &seq };
    CHECK_EQ(de_forward(m, &batch, logits, &c, &err), 0);
    double *h = malloc(n * sizeof *h);
    for (uint32_t i = 0; i < s.n_layers; i++) {
        for (size_t k = 0; k < n; k++)
            h[k] = captured[i * n + k];
        double *x = normed(h, &b->layers[i].input_norm);
        if (b->layers[i].kind == DE_LAYER_ATTN)
            attention(&b->layers[i], x, h);
        else
            deltanet(&b->layers[i], x, h);
        free(x);
        x = normed(h, &b->layers[i].post_norm);
        experts(&b->layers[i], x, h);
        free(x);
        /* row by row: one row may have a router that is tied within rounding */
        uint32_t far = 0;
        double worst = 0;
        for (uint32_t t = 0; t < T; t++) {
            const double e =
                distance(layers[i] + (size_t)t * s.hidden, h + (size_t)t * s.hidden, s.hidden);
            far += !(e < limit);
            worst = e < limit && e > worst ? e : worst;
        }
        if (far > 1)
            TAP_FAIL("layer %u: %u of %u rows are off", i, far, T);
        printf("# layer %u (%s): %.2g\n", i,
               s.layer_kind[i] == DE_LAYER_ATTN ? "attention" : "DeltaNet", worst);
    }
    for (uint32_t k = 0; k < s.hidden; k++)
        h[k] = captured[s.n_layers * n + (size_t)(T - 1) * s.hidden + k];
    check_logits(b, h, logits);
    free(h);
    free(captured);
    free(logits);
    de_model_free(m);
    de_binding_free(b);
    de_weights_free(w);
}

static uint64_t new_seed(const char *what)
{
    const char *fixed = getenv("TEST_SEED");
    const uint64_t seed = fixed ? strtoull(fixed, NULL, 10) : (uint64_t)time(NULL);
    printf("# %s TEST_SEED=%llu\n", what, (unsigned long long)seed);
    return seed;
}

TEST(layers_of_the_demo_model_match_double)
{
    limit = 5e-6;
    check(DEMO_MODEL_DIR, MAX_T, new_seed("demo")); /* over two page and chunk borders */
}

TEST(layers_of_the_golden_models_match_double)
{
    const uint64_t seed = new_seed("golden");
    limit = 5e-6;
    check(TESTS_DIR "/model/golden/tiny-a", MAX_T, seed); /* groups of 32, 64 experts */
    check(TESTS_DIR "/model/golden/tiny-b", MAX_T, seed); /* groups of 128 */
    check(TESTS_DIR "/model/golden/tiny-c", MAX_T, seed); /* one scale a row, 24 experts, top 6 */
}

/* A model of which everything is drawn: heads, widths, vocabulary, forms and types of the tensors,
 * scales, layout of the experts, tied head, rotary dims, YaRN, and how long the prompt is. */
static void check_random(uint64_t seed)
{
    ckv_random r = { seed };
    static const char *const types[] = { "BF16", "F16", "F32" };
    static const uint32_t groups[] = { 0, 4, 8, 16, UINT32_MAX },
                          lengths[] = { 1, 2, 3, 5, 63, 64, 65, 127, 129 };
    static const uint32_t heads[][2] = {
        { 1, 1 }, { 3, 1 }, { 3, 3 }, { 6, 2 }, { 5, 5 }, { 7, 1 }
    };
    static const uint32_t rotary[][4] = { { 8, 2, 1, 1 }, { 64, 11, 11, 10 }, { 256, 44, 42, 42 } };
    const uint32_t *q = heads[ckv_below(&r, 6)], *v = heads[ckv_below(&r, 6)];
    const uint32_t *rot = rotary[ckv_below(&r, 3)];
    const uint32_t T_ = lengths[ckv_below(&r, sizeof lengths / sizeof *lengths)];
    ck_spec s = ck_small;
    s.hidden = 16 * (1 + ckv_below(&r, 6));
    s.vocab = 2 + ckv_below(&r, 200);
    s.q_heads = q[0], s.kv_heads = q[1], s.v_heads = v[0], s.k_heads = v[1];
    s.experts = 1 + ckv_below(&r, 12);
    s.width = 16 * (1 + ckv_below(&r, 4)), s.shared = 16 * (1 + ckv_below(&r, 4));
    s.form = ckv_below(&r, 3) ? CK_INT8 : CK_FLOAT;
    s.group = groups[ckv_below(&r, 5)];
    s.fused = ckv_below(&r, 2) && s.group != UINT32_MAX;
    s.int8_shared = (int)ckv_below(&r, 2);
    s.tied = (int)ckv_below(&r, 2);
    s.dtype = types[ckv_below(&r, 3)], s.small_dtype = types[ckv_below(&r, 3)];
    const uint32_t all = s.experts < 8 ? s.experts : 8, top_k = 1 + ckv_below(&r, all);
    const uint32_t yarn = ckv_below(&r, 2);
    printf("# rows %u, hidden %u, vocab %u, heads %u/%u %u/%u, %u of %u experts of %u and %u, "
           "%s %u %s %s, fused %d, tied %d, rotary %u, yarn %u\n",
           T_, s.hidden, s.vocab, s.q_heads, s.kv_heads, s.v_heads, s.k_heads, top_k, s.experts,
           s.width, s.shared, s.form == CK_INT8 ? "int8" : "float", s.group, s.dtype, s.small_dtype,
           s.fused, s.tied, rot[0], yarn);

    ck c = { 0 };
    char from[80], to[160], *config = ck_config(&s);
    (void)snprintf(from, sizeof from, "_per_tok\":%u", all);
    (void)snprintf(to, sizeof to, "_per_tok\":%u", top_k);
    config = ckv_replace(config, from, to);
    (void)snprintf(to, sizeof to, "factor\":%g,\"mrope_section\":[%u,%u,%u]", rot[0] / 256.0,
                   rot[1], rot[2], rot[3]);
    config = ckv_replace(config, "factor\":0.25,\"mrope_section\":[11,11,10]", to);
    if (yarn)
        config = ckv_replace(config, "\"rope_type\":\"default\"",
                             "\"rope_type\":\"yarn\",\"factor\":4.0,"
                             "\"original_max_position_embeddings\":128");
    ck_model(&c, &s);
    if (s.tied)
        ck_remove(&c, "lm_head.weight");
    ck_write(&c);
    ckv_write(&c, config, seed);
    check(c.dir, T_, seed);
    free(config);
    ck_done(&c);
}

TEST(layers_of_random_models_match_double)
{
    const uint64_t seed = new_seed("random");
    limit = 2e-5; /* a row of 16 may be a small difference of large numbers */
    for (uint64_t i = 0; i < 12; i++)
        check_random(seed * 1000 + i);
}
