/* forward.cu -- the CUDA backend: open a model, and one forward over a batch: READ THIS for the order of the operations.
 *
 * The rows of a batch are served in two families (kernels/cuda/ops.cuh): sequences whose row is decode's, up to 64 at a time, by
 * one graph a number of rows; all others by prefill's kernels, after them. What differs from step to step (tokens, positions,
 * page tables) is copied to one place on the device first, so that a graph is the same each time. */
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <sys/mman.h>
#include <thread>
#include <vector>

#include "kernels/cuda/tile.cuh"
#include "model/cuda/model.cuh"

extern "C" {
#include "base/bits.h"
#include "model/rope.h"
}

namespace
{

enum { ROWS = DE_CU_DECODE_ROWS };

uint32_t larger(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

de_cu_model *of(de_model *m)
{
    return (de_cu_model *)m;
}

/* ---- sizes */

size_t kv_bytes_a_page(const de_shape *s, enum de_kv_type type)
{
    return (size_t)s->kv_heads * 2 * DE_CU_PAGE * DE_CU_ATTN * (type == DE_KV_FP8 ? 1 : 2);
}

size_t state_floats_a_layer(const de_shape *s)
{
    return (size_t)s->gdn_v_heads * DE_CU_GDN * DE_CU_GDN +
           (size_t)(DE_CONV_WIDTH - 1) * s->gdn_channels;
}

size_t gdn_width(const de_shape *s)
{
    return s->gdn_channels + (size_t)s->gdn_v_heads * (DE_CU_GDN + 2);
}
size_t attn_width(const de_shape *s)
{
    return ((size_t)s->q_heads * 2 + s->kv_heads * 2) * DE_CU_ATTN;
}

de_cu_gdn gdn_of(const de_cu_model *m, const de_cu_layer &l)
{
    de_cu_gdn g;
    g.k_heads = m->shape.gdn_k_heads;
    g.v_heads = m->shape.gdn_v_heads;
    g.channels = m->shape.gdn_channels;
    g.conv = l.conv;
    g.neg_exp_A = l.neg_exp_A;
    g.dt_bias = l.dt_bias;
    g.norm = l.gdn_norm;
    g.eps = m->shape.rms_eps;
    g.state = m->state + l.index * m->layer_floats;
    g.slot_floats = m->slot_floats;
    return g;
}

de_cu_attn attn_of(const de_cu_model *m, const de_cu_layer &l)
{
    de_cu_attn a;
    a.q_heads = m->shape.q_heads;
    a.kv_heads = m->shape.kv_heads;
    a.rotary = m->shape.rotary_dims;
    a.q_norm = l.q_norm;
    a.k_norm = l.k_norm;
    a.eps = m->shape.rms_eps;
    a.kv_type = m->options.kv_type == DE_KV_FP8 ? DE_CU_KV_FP8 : DE_CU_KV_BF16;
    a.kv = m->kv + l.index * ((size_t)m->options.n_pages + 1) * m->page_bytes;
    a.page_bytes = m->page_bytes;
    return a;
}

/* Lays out what describes a batch; ret: bytes before the pages. */
size_t meta_at(uint8_t *base, uint32_t rows, uint32_t seqs, uint32_t outs, de_cu_meta *m)
{
    size_t at = 0;
    m->tokens = (uint32_t *)(base + at);
    at += de_align_up(rows * sizeof(uint32_t), 16);
    m->pos = (uint32_t(*)[3])(base + at);
    at += de_align_up(rows * 3 * sizeof(uint32_t), 16);
    m->seqs = (de_cu_seq *)(base + at);
    at += de_align_up(seqs * sizeof(de_cu_seq), 16);
    m->out_rows = (uint32_t *)(base + at);
    at += de_align_up(outs * sizeof(uint32_t), 16);
    m->pages = (uint32_t *)(base + at);
    return at;
}

struct layout {
    uint8_t *base;
    size_t used;
    template <class T> T *take(uint64_t n)
    {
        T *p = (T *)(base + used);
        used += de_align_up(n * sizeof(T), 256);
        return p;
    }
};

/* Pieces between marks that T rows of so many sequences have at most. */
uint32_t pieces_max(uint32_t T, uint32_t seqs)
{
    return T / DE_CHUNK + 2 * seqs;
}

/* The workspace, and how much pinned memory goes with it. With m->work NULL: sizes only. */
size_t lay_out(de_cu_model *m, size_t *ret_host)
{
    const de_shape *s = &m->shape;
    const de_model_options *o = &m->options;
    const uint32_t T = larger(o->max_rows, ROWS), seqs = larger(o->max_seqs, ROWS),
                   described = seqs + pieces_max(T, seqs);
    const size_t table = de_ceil_div(o->ctx_max, DE_PAGE);
    layout k = { m->work, 0 };
    m->ldp = de_align_up(larger((uint32_t)gdn_width(s), (uint32_t)attn_width(s)), 8);
    m->ldr = de_align_up(s->n_experts + 1, 4);
    m->ldy = larger(s->q_heads * DE_CU_ATTN, s->gdn_v_heads * DE_CU_GDN);
    m->h = k.take<float>((size_t)T * s->hidden);
    m->x = k.take<bf16>((size_t)T * larger(s->hidden, (uint32_t)m->ldy));
    m->p = k.take<bf16>(T * m->ldp);
    m->y = k.take<bf16>(T * m->ldy);
    m->router = k.take<float>(T * m->ldr);
    m->rope = k.take<float>((size_t)T * s->rotary_dims);
    m->gathered = k.take<float>((size_t)ROWS * s->hidden);
    m->c = k.take<float>((size_t)ROWS * s->gdn_channels);
    m->o = k.take<float>((size_t)ROWS * s->gdn_v_heads * DE_CU_GDN);
    m->logits = k.take<float>((size_t)ROWS * s->vocab);
    m->inv_freq = k.take<float>(s->rotary_dims / 2);
    m->axis = k.take<uint8_t>(s->rotary_dims / 2);
    m->tops = k.take<de_top_logits>(ROWS);
    m->maxima = k.take<uint8_t>(de_cu_top_logits_bytes(ROWS));
    size_t op = 0;
    for (uint32_t i = 0; i < s->n_layers; i++) {
        const de_cu_layer &l = m->w.layers[i];
        size_t need[5] = { de_cu_moe_tile_bytes(l.experts, T),
                           de_cu_decode_moe_bytes(l.experts, ROWS), 0, 0, 0 };
        if (l.kind == DE_LAYER_GDN) {
            need[2] = de_cu_gdn_chunk_bytes(gdn_of(m, l), T, seqs);
        } else {
            need[3] = de_cu_attn_prefill_bytes(attn_of(m, l), T);
            need[4] = de_cu_attn_decode_bytes(attn_of(m, l), ROWS);
        }
        for (size_t n : need)
            op = n > op ? n : op;
    }
    m->op = k.take<uint8_t>(op);
    de_cu_meta meta;
    m->decode_head = meta_at(NULL, ROWS, ROWS, ROWS, &meta);
    const size_t decode = m->decode_head + ROWS * table * sizeof(uint32_t);
    m->prefill_bytes = meta_at(NULL, T, described, larger(o->max_out, ROWS), &meta) +
                       seqs * table * sizeof(uint32_t);
    uint8_t *d = k.take<uint8_t>(decode), *p = k.take<uint8_t>(m->prefill_bytes);
    (void)meta_at(d, ROWS, ROWS, ROWS, &m->decode);
    m->prefill.tokens = (uint32_t *)p; /* laid out anew for each batch */
    *ret_host = de_align_up(decode + m->prefill_bytes, 16) + ROWS * sizeof *m->tops_host;
    if (m->host) {
        m->tops_host = (de_top_logits *)(m->host + *ret_host) - ROWS;
        (void)meta_at(m->host, ROWS, ROWS, ROWS, &m->decode_host);
        m->prefill_host.tokens = (uint32_t *)(m->host + decode);
    }
    return k.used;
}

int check_shape(const de_shape *s, delta_error *err)
{
    if (s->q_heads % s->kv_heads || s->top_k > 16 || s->n_experts > 1024)
        return delta_fail(err, DELTA_EUNSUPPORTED,
                          "backend cuda: %u query on %u key heads, top %u of %u experts; whole "
                          "groups, top 16 of 1,024 are the most",
                          s->q_heads, s->kv_heads, s->top_k, s->n_experts);
    return 0;
}

/* Prefill's tiles of BF16 take most. What Hopper's own kernels take, every Hopper has. */
int check_device(delta_error *err)
{
    int device = 0, major = 0, minor = 0, shared = 0;
    const int need = tile_large::shared_bytes<false>();
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess)
        e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (e == cudaSuccess)
        e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (e == cudaSuccess)
        e = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (e != cudaSuccess)
        return de_cu_failed(err, e, "asking the device");
    if (shared < need)
        return delta_fail(err, DELTA_EUNSUPPORTED,
                          "backend cuda: this device (sm_%d%d) has %d KiB of shared memory for a "
                          "block, prefill needs %d: use backend cpu, or a device of sm_90",
                          major, minor, shared / 1024, need / 1024);
    return 0;
}

int sizes(de_cu_model *m, const de_binding *b, de_memory_plan *ret_plan, size_t *ret_host,
          delta_error *err)
{
    const de_shape *s = &m->shape;
    uint64_t weights = 0;
    int r = check_shape(s, err);
    if (r == 0)
        r = check_device(err);
    m->w.layers = (de_cu_layer *)calloc(s->n_layers, sizeof *m->w.layers);
    if (r == 0 && !m->w.layers)
        r = delta_fail(err, DELTA_ENOMEM, "table of layers");
    if (r == 0)
        r = de_cu_weights_plan(s, b, &m->w, &weights, err);
    if (r < 0)
        return r;
    m->page_bytes = kv_bytes_a_page(s, m->options.kv_type);
    m->layer_floats = state_floats_a_layer(s);
    m->slot_floats = m->layer_floats * s->n_gdn;
    ret_plan->weights_bytes = weights;
    ret_plan->kv_bytes = (uint64_t)s->n_attn * (m->options.n_pages + 1ull) * m->page_bytes;
    ret_plan->state_bytes = (uint64_t)m->options.n_slots * m->slot_floats * sizeof(float);
    ret_plan->workspace_bytes = lay_out(m, ret_host);
    return 0;
}

int plan(const de_shape *s, const de_binding *b, const de_model_options *o,
         de_memory_plan *ret_plan, delta_error *err)
{
    de_cu_model m = {};
    size_t host;
    m.shape = *s;
    m.options = *o;
    const int r = sizes(&m, b, ret_plan, &host, err);
    free(m.w.layers);
    return r;
}

uint64_t memory_bytes()
{
    int n = 0;
    size_t free_bytes = 0, total = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || n == 0 ||
        cudaMemGetInfo(&free_bytes, &total) != cudaSuccess)
        return 0;
    return free_bytes;
}

enum { HOST_HEAD = 4096, HOST_THREADS = 16 };

/* The pages are made by several threads at once before the driver locks them: it takes twice as long to do both. The size stands in
 * front. */
void *host_alloc(size_t bytes)
{
    const size_t all = de_align_up(bytes, HOST_HEAD) + HOST_HEAD, part = (size_t)256 << 20;
    uint8_t *const base =
        (uint8_t *)mmap(NULL, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED)
        return NULL;
    (void)madvise(base, all, MADV_HUGEPAGE);
    std::atomic<size_t> next{ 0 };
    auto touch = [&] {
        for (size_t i; (i = next++ * part) < all;)
            for (size_t at = i; at < all && at < i + part; at += HOST_HEAD)
                *(volatile uint8_t *)(base + at) = 0;
    };
    std::vector<std::thread> threads;
    const size_t helpers = all / part < HOST_THREADS ? all / part : HOST_THREADS;
    for (size_t i = 0; i < helpers; i++)
        threads.emplace_back(touch);
    touch();
    for (std::thread &t : threads)
        t.join();
    if (cudaHostRegister(base, all, cudaHostRegisterDefault) != cudaSuccess) {
        (void)munmap(base, all);
        return NULL;
    }
    memcpy(base, &all, sizeof all);
    return base + HOST_HEAD;
}

void host_free(void *p)
{
    uint8_t *const base = (uint8_t *)p - HOST_HEAD;
    size_t all;
    memcpy(&all, base, sizeof all);
    (void)cudaHostUnregister(base);
    (void)munmap(base, all);
}

/* What the device reads and writes of the host as it is, or NULL: p is not locked. */
uint8_t *locked_at(const void *p)
{
    cudaPointerAttributes a;
    const bool is_locked = cudaPointerGetAttributes(&a, p) == cudaSuccess && a.type == cudaMemoryTypeHost;
    return is_locked ? (uint8_t *)a.devicePointer : NULL;
}

/* The fastest of a few shapes of grid over a gigabyte, which no cache holds. */
int read_rate(double *ret_rate)
{
    const size_t bytes = (size_t)1 << 30;
    uint8_t *p = NULL;
    cudaEvent_t a = NULL, b = NULL;
    float best = 0;
    cudaError_t e = cudaMalloc(&p, bytes);
    if (e == cudaSuccess)
        e = cudaMemset(p, 1, bytes);
    if (e == cudaSuccess)
        e = cudaEventCreate(&a);
    if (e == cudaSuccess)
        e = cudaEventCreate(&b);
    for (int i = 0; i < 12 && e == cudaSuccess; i++) {
        float ms = 0;
        (void)cudaEventRecord(a, NULL);
        de_cu_read(NULL, p, bytes, 1u << i % 4);
        (void)cudaEventRecord(b, NULL);
        e = cudaEventSynchronize(b);
        (void)cudaEventElapsedTime(&ms, a, b);
        best = i < 4 || (best > 0 && best < ms) ? best : ms;
    }
    if (a)
        (void)cudaEventDestroy(a);
    if (b)
        (void)cudaEventDestroy(b);
    (void)cudaFree(p);
    *ret_rate = best > 0 ? (double)bytes / best * 1e3 : 0;
    return e == cudaSuccess ? 0 : DELTA_EIO;
}

/* ---- open */

void close_model(de_model *base)
{
    de_cu_model *m = of(base);
    if (m->stream)
        (void)cudaStreamSynchronize(m->stream);
    if (m->out)
        (void)cudaStreamSynchronize(m->out);
    for (cudaGraphExec_t g : m->graphs)
        if (g)
            (void)cudaGraphExecDestroy(g);
    if (m->stream)
        (void)cudaStreamDestroy(m->stream);
    (void)cudaFree(m->weights);
    (void)cudaFree(m->kv);
    (void)cudaFree(m->state);
    (void)cudaFree(m->work);
    (void)cudaFreeHost(m->host);
    if (m->out)
        (void)cudaStreamDestroy(m->out);
    for (cudaEvent_t x : m->saved)
        if (x)
            (void)cudaEventDestroy(x);
    if (m->ready)
        (void)cudaEventDestroy(m->ready);
    free(m->saved_as);
    free(m->written_in);
    free(m->row_of);
    free(m->pieces);
    free(m->w.layers);
    free(m);
}

int allocate(de_cu_model *m, const de_memory_plan &p, size_t host, delta_error *err)
{
    int device = 0, major = 0;
    if (m->options.on_progress)
        m->options.on_progress(m->options.arg, "memory", 0, 0);
    cudaError_t e = cudaStreamCreateWithFlags(&m->stream, cudaStreamNonBlocking);
    if (e == cudaSuccess)
        e = cudaStreamCreateWithFlags(&m->out, cudaStreamNonBlocking);
    if (e == cudaSuccess)
        e = cudaEventCreateWithFlags(&m->ready, cudaEventDisableTiming);
    for (cudaEvent_t &x : m->saved)
        if (e == cudaSuccess)
            e = cudaEventCreateWithFlags(&x, cudaEventDisableTiming);
    if (e == cudaSuccess)
        e = cudaMalloc(&m->weights, p.weights_bytes);
    if (e == cudaSuccess)
        e = cudaMalloc(&m->kv, p.kv_bytes);
    if (e == cudaSuccess)
        e = cudaMalloc(&m->state, p.state_bytes);
    if (e == cudaSuccess)
        e = cudaMalloc(&m->work, p.workspace_bytes);
    if (e == cudaSuccess)
        e = cudaMallocHost(&m->host, host);
    if (e == cudaSuccess)
        e = cudaMemsetAsync(m->kv, 0, p.kv_bytes, m->stream);
    if (e == cudaSuccess)
        e = cudaMemsetAsync(m->state, 0, p.state_bytes, m->stream);
    if (e == cudaSuccess)
        e = cudaMemsetAsync(m->work, 0, p.workspace_bytes, m->stream);
    if (e == cudaSuccess)
        e = cudaGetDevice(&device);
    if (e == cudaSuccess)
        e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (e == cudaSuccess)
        e = cudaStreamSynchronize(m->stream); /* copies of tables and weights do not wait for it */
    m->dependent = major >= 9;
    return e == cudaSuccess ? 0 : de_cu_failed(err, e, "memory of the model");
}

int tables(de_cu_model *m, delta_error *err)
{
    const uint32_t half = m->shape.rotary_dims / 2;
    float inv[DE_ATTN_DIM / 2];
    uint8_t axis[DE_ATTN_DIM / 2];
    de_rope_frequencies(&m->shape, inv);
    for (uint32_t i = 0; i < half; i++)
        axis[i] = (uint8_t)de_rope_axis(&m->shape, i);
    cudaError_t e = cudaMemcpy(m->inv_freq, inv, half * sizeof *inv, cudaMemcpyHostToDevice);
    if (e == cudaSuccess)
        e = cudaMemcpy(m->axis, axis, half, cudaMemcpyHostToDevice);
    return e == cudaSuccess ? 0 : de_cu_failed(err, e, "tables");
}

int open_model(const de_weights *w, const de_shape *s, const de_binding *b,
               const de_model_options *o, de_model **ret_m, delta_error *err)
{
    de_cu_model *m = (de_cu_model *)calloc(1, sizeof *m);
    de_memory_plan p;
    size_t host = 0;
    if (!m)
        return delta_fail(err, DELTA_ENOMEM, "model");
    m->shape = *s;
    m->options = *o;
    m->row_of = (uint32_t *)calloc(o->max_rows, sizeof *m->row_of);
    m->pieces = (de_cu_piece *)calloc(
        pieces_max(larger(o->max_rows, ROWS), larger(o->max_seqs, ROWS)), sizeof *m->pieces);
    m->saved_as = (uint64_t *)calloc(o->n_pages + 1ull, sizeof *m->saved_as);
    m->written_in = (uint64_t *)calloc(o->n_pages + 1ull, sizeof *m->written_in);
    m->epoch = 1;
    int r = m->row_of && m->pieces && m->saved_as && m->written_in
                ? sizes(m, b, &p, &host, err)
                : delta_fail(err, DELTA_ENOMEM, "model");
    if (r == 0)
        r = allocate(m, p, host, err);
    if (r == 0) {
        (void)lay_out(m, &host);
        r = tables(m, err);
    }
    if (r == 0)
        r = de_cu_load(m, w, b, err);
    if (r == 0 && cudaStreamSynchronize(m->stream) != cudaSuccess)
        r = de_cu_failed(err, cudaGetLastError(), "opening the model");
    if (r < 0) {
        close_model(&m->base);
        return r;
    }
    *ret_m = &m->base;
    return 0;
}

/* ---- forward */

struct capture {
    const de_capture *to;
    const uint32_t *row_of; /* row of the batch by row of h */
    uint32_t n;
};

float rope_factor(const de_shape *s)
{
    return s->yarn ? (float)s->yarn_attention_factor : 1.0f;
}

/* Rows of h to where they belong. */
cudaError_t capture_rows(de_cu_model *m, const capture *c, float *to)
{
    cudaError_t e = cudaSuccess;
    const size_t H = m->shape.hidden;
    for (uint32_t i = 0; to && i < c->n && e == cudaSuccess; i++)
        e = cudaMemcpyAsync(to + c->row_of[i] * H, m->h + i * H, H * sizeof *to,
                            cudaMemcpyDeviceToHost, m->stream);
    return e;
}
cudaError_t capture_norm(de_cu_model *m, const capture *c)
{
    const size_t H = m->shape.hidden;
    float *to = c->to->norm, *w = (float *)malloc(H * sizeof *w);
    if (!w)
        return cudaErrorMemoryAllocation;
    cudaError_t e = cudaMemcpyAsync(w, m->w.norm, H * sizeof *w, cudaMemcpyDeviceToHost, m->stream);
    if (e == cudaSuccess)
        e = capture_rows(m, c, to);
    if (e == cudaSuccess)
        e = cudaStreamSynchronize(m->stream);
    for (uint32_t i = 0; e == cudaSuccess && i < c->n; i++) {
        float *row = to + c->row_of[i] * H;
        double sum = 0;
        for (size_t k = 0; k < H; k++)
            sum += (double)row[k] * row[k];
        const double f = 1 / sqrt(sum / (double)H + m->shape.rms_eps);
        for (size_t k = 0; k < H; k++)
            row[k] = (float)(row[k] * f * (1 + (double)w[k]));
    }
    free(w);
    return e;
}

size_t bytes_of(const de_cu_linear &l)
{
    return (size_t)(l.out + 15) / 16 * 16 * l.in * (l.scale ? 1 : 2);
}
/* The shared expert: its matrices lie behind one another (load.cu). */
de_cu_ahead shared_of(const de_cu_experts &e)
{
    const uint8_t *end = e.shared_down.w + bytes_of(e.shared_down);
    return { e.shared_gate_up.w, (size_t)(end - e.shared_gate_up.w) };
}

/* Logits of the n rows at h [n][hidden]. */
void head(de_cu_model *m, const float *h, uint32_t n, bool dependent)
{
    de_cu_x x = { DE_CU_X_NORM, h, NULL, 0, m->w.norm, m->shape.rms_eps, NULL };
    if (n > DE_CU_FUSED_ROWS) {
        de_cu_decode_prepare(m->stream, x, n, m->shape.hidden, m->x, dependent);
        x.ready = m->x;
    }
    de_cu_decode_linear(m->stream, m->w.head, x, n, DE_CU_F32, m->logits, m->shape.vocab,
                        { NULL, 0 }, dependent);
}

/* All layers for n rows of decode, and their logits. */
cudaError_t decode_rows(de_cu_model *m, uint32_t n, const capture *c, bool dependent)
{
    const de_shape *s = &m->shape;
    const de_cu_meta &d = m->decode;
    cudaStream_t st = m->stream;
    cudaError_t e = cudaSuccess;
    const bool many = n > DE_CU_FUSED_ROWS;
    auto ready = [&](de_cu_x x, uint32_t k) {
        if (many) {
            de_cu_decode_prepare(st, x, n, k, m->x, dependent);
            x.ready = m->x;
        }
        return x;
    };
    const de_cu_ahead nothing = { NULL, 0 };
    de_cu_embed(st, m->w.embed, d.tokens, n, s->hidden, m->h);
    de_cu_rope(st, &d.pos[0][0], m->inv_freq, m->axis, n, s->rotary_dims / 2, rope_factor(s),
               m->rope);
    if (c)
        e = capture_rows(m, c, c->to->embed);
    for (uint32_t i = 0; i < s->n_layers && e == cudaSuccess; i++) {
        const de_cu_layer &l = m->w.layers[i];
        de_cu_x x =
            ready({ DE_CU_X_NORM, m->h, NULL, 0, l.input_norm, s->rms_eps, NULL }, s->hidden);
        if (l.kind == DE_LAYER_GDN) {
            const de_cu_gdn g = gdn_of(m, l);
            de_cu_decode_gdn_in(st, l.in, x, n, g, d.seqs, m->c, m->p, m->ldp, dependent);
            de_cu_decode_gdn_step(st, g, m->c, m->p, m->ldp, d.seqs, n, m->o, dependent);
            x = ready({ DE_CU_X_GATED_NORM, m->o, m->p + s->gdn_channels, m->ldp, l.gdn_norm,
                        s->rms_eps, NULL },
                      l.out.in);
        } else {
            const de_cu_attn a = attn_of(m, l);
            de_cu_decode_linear(st, l.in, x, n, DE_CU_BF16, m->p, m->ldp, nothing, dependent);
            de_cu_attn_decode(st, a, m->p, m->ldp, m->rope, d.seqs, d.pages, n, m->options.ctx_max,
                              m->y, m->op, dependent);
            x = ready({ DE_CU_X_PLAIN, NULL, m->y, l.out.in, NULL, 0, NULL }, l.out.in);
        }
        de_cu_decode_linear(st, l.out, x, n, DE_CU_ADD, m->h, s->hidden, nothing, dependent);
        x = ready({ DE_CU_X_NORM, m->h, NULL, 0, l.post_norm, s->rms_eps, NULL }, s->hidden);
        de_cu_decode_linear(st, l.router, x, n, DE_CU_F32, m->router, m->ldr, shared_of(l.experts),
                            dependent);
        de_cu_decode_moe(st, l.experts, x, m->router, m->ldr, n, m->h, m->op, dependent);
        if (c && c->to->layers)
            e = capture_rows(m, c, c->to->layers[i]);
    }
    if (e == cudaSuccess && c && c->to->norm)
        e = capture_norm(m, c);
    head(m, m->h, n, dependent);
    return e == cudaSuccess ? cudaGetLastError() : e;
}

cudaError_t decode_graph(de_cu_model *m, uint32_t n)
{
    if (m->graphs[n])
        return cudaSuccess;
    cudaGraph_t g = NULL;
    cudaError_t e = cudaStreamBeginCapture(m->stream, cudaStreamCaptureModeThreadLocal);
    if (e != cudaSuccess)
        return e;
    e = decode_rows(m, n, NULL, m->dependent);
    const cudaError_t end = cudaStreamEndCapture(m->stream, &g);
    e = e == cudaSuccess ? end : e;
    if (e == cudaSuccess)
        e = cudaGraphInstantiate(&m->graphs[n], g, 0);
    if (g)
        (void)cudaGraphDestroy(g);
    return e;
}

/* The page ids of a sequence behind one another; returns how many. */
uint32_t put_pages(const de_batch_seq &q, uint32_t *to)
{
    const uint32_t n = (uint32_t)de_ceil_div((uint64_t)q.start + q.n_rows, DE_PAGE);
    memcpy(to, q.pages, n * sizeof *to);
    return n;
}

float *slot_at(de_model *base, uint32_t slot)
{
    return of(base)->state + slot * of(base)->slot_floats;
}

cudaError_t copy_slot(de_cu_model *m, uint32_t from, uint32_t to)
{
    return cudaMemcpyAsync(slot_at(&m->base, to), slot_at(&m->base, from),
                           m->slot_floats * sizeof(float), cudaMemcpyDeviceToDevice, m->stream);
}

struct output {     /* of a row of m->logits */
    uint32_t index; /* of the batch's outputs; UINT32_MAX: nobody wants it */
    bool wants_top;
};

/* Rows [0, n) of m->logits to where the outputs belong, and waits for all that is under way. */
cudaError_t put_outputs(de_cu_model *m, const de_batch *b, const output *outs, uint32_t n,
                        float *logits)
{
    const uint32_t V = m->shape.vocab;
    bool has_top = false;
    cudaError_t e = cudaSuccess;
    for (uint32_t i = 0; i < n && e == cudaSuccess; i++) {
        has_top |= outs[i].wants_top;
        if (outs[i].index != UINT32_MAX && !outs[i].wants_top)
            e = cudaMemcpyAsync(logits + (size_t)outs[i].index * V, m->logits + (size_t)i * V,
                                V * sizeof *logits, cudaMemcpyDeviceToHost, m->stream);
    }
    if (has_top && e == cudaSuccess) {
        de_cu_top_logits(m->stream, m->logits, n, V, b->n_ids, m->tops, m->maxima);
        e = cudaMemcpyAsync(m->tops_host, m->tops, n * sizeof *m->tops, cudaMemcpyDeviceToHost,
                            m->stream);
    }
    if (e == cudaSuccess)
        e = cudaStreamSynchronize(m->stream);
    for (uint32_t i = 0; i < n && e == cudaSuccess; i++)
        if (outs[i].wants_top)
            b->tops[outs[i].index] = m->tops_host[i];
    return e;
}

output output_of(const de_cu_model *m, const de_batch *b, const de_batch_seq &q, uint32_t i)
{
    return { q.first_out + i, b->tops && q.wants_top && m->shape.vocab >= DE_TOP_LOGITS };
}

/* Sequences ids[0 .. n) of the batch, one row each. */
cudaError_t decode(de_cu_model *m, const de_batch *b, const uint32_t *ids, uint32_t n,
                   float *logits, const de_capture *to)
{
    const de_cu_meta &d = m->decode_host;
    uint32_t rows[ROWS], pages = 0;
    for (uint32_t i = 0; i < n; i++) {
        const de_batch_seq &q = b->seqs[ids[i]];
        rows[i] = q.row;
        d.tokens[i] = b->tokens[q.row];
        memcpy(d.pos[i], b->pos[q.row], sizeof *d.pos);
        d.seqs[i] = { i, 1, q.start, q.slot, pages };
        pages += put_pages(q, d.pages + pages);
    }
    cudaError_t e =
        cudaMemcpyAsync(m->decode.tokens, d.tokens, m->decode_head + pages * sizeof(uint32_t),
                        cudaMemcpyHostToDevice, m->stream);
    const capture c = { to, rows, n };
    if (e == cudaSuccess && to)
        e = decode_rows(m, n, &c, false);
    else if (e == cudaSuccess && (e = decode_graph(m, n)) == cudaSuccess)
        e = cudaGraphLaunch(m->graphs[n], m->stream);
    output outs[ROWS];
    for (uint32_t i = 0; i < n; i++) {
        const de_batch_seq &q = b->seqs[ids[i]];
        outs[i] = q.n_out ? output_of(m, b, q, 0) : output{ UINT32_MAX, false };
        if (q.n_marks && e == cudaSuccess) /* behind its only row */
            e = copy_slot(m, q.slot, q.marks[0].slot);
    }
    return e == cudaSuccess ? put_outputs(m, b, outs, n, logits) : e;
}

/* The delta rule, piece by piece: the kernels leave a sequence's state where its rows end, and a mark is where a piece ends. */
cudaError_t gdn_pieces(de_cu_model *m, const de_cu_layer &l, uint32_t n_pieces)
{
    const de_cu_gdn g = gdn_of(m, l);
    cudaError_t e = cudaSuccess;
    for (uint32_t i = 0; i < n_pieces && e == cudaSuccess; i++) {
        const de_cu_piece &c = m->pieces[i];
        de_cu_gdn_chunk(m->stream, g, m->p + c.row * m->ldp, m->ldp, m->prefill.seqs + c.seq,
                        c.n_seqs, c.rows, c.max_rows, m->y + (size_t)c.row * l.out.in, m->op);
        if (c.mark != UINT32_MAX)
            e = cudaMemcpyAsync(g.state + c.mark * g.slot_floats, g.state + c.slot * g.slot_floats,
                                m->layer_floats * sizeof(float), cudaMemcpyDeviceToDevice,
                                m->stream);
    }
    return e;
}

/* All layers for T rows of n_seqs sequences. */
cudaError_t prefill_rows(de_cu_model *m, uint32_t T, uint32_t n_seqs, uint32_t n_pieces,
                         uint32_t max_rows, uint32_t ctx_max, const capture *c)
{
    const de_shape *s = &m->shape;
    const de_cu_meta &d = m->prefill;
    cudaStream_t st = m->stream;
    cudaError_t e = cudaSuccess;
    de_cu_embed(st, m->w.embed, d.tokens, T, s->hidden, m->h);
    de_cu_rope(st, &d.pos[0][0], m->inv_freq, m->axis, T, s->rotary_dims / 2, rope_factor(s),
               m->rope);
    if (c->to)
        e = capture_rows(m, c, c->to->embed);
    for (uint32_t i = 0; i < s->n_layers && e == cudaSuccess; i++) {
        const de_cu_layer &l = m->w.layers[i];
        de_cu_norm(st, m->h, l.input_norm, T, s->hidden, s->rms_eps, m->x);
        de_cu_linear_tile(st, l.in, m->x, s->hidden, T, DE_CU_BF16, m->p, m->ldp);
        if (l.kind == DE_LAYER_GDN)
            e = gdn_pieces(m, l, n_pieces);
        else
            de_cu_attn_prefill(st, attn_of(m, l), m->p, m->ldp, m->rope, d.seqs, d.pages, n_seqs, T,
                               max_rows, ctx_max, m->y, m->op);
        de_cu_linear_tile(st, l.out, m->y, l.out.in, T, DE_CU_ADD, m->h, s->hidden);
        de_cu_norm(st, m->h, l.post_norm, T, s->hidden, s->rms_eps, m->x);
        de_cu_linear_tile(st, l.router, m->x, s->hidden, T, DE_CU_F32, m->router, m->ldr);
        de_cu_moe_tile(st, l.experts, m->x, m->router, m->ldr, T, m->h, m->op);
        if (c->to && c->to->layers)
            e = capture_rows(m, c, c->to->layers[i]);
    }
    if (e == cudaSuccess && c->to && c->to->norm)
        e = capture_norm(m, c);
    return e == cudaSuccess ? cudaGetLastError() : e;
}

/* Cuts a sequence whose first row is `row` at its marks, into pieces from number n on; seqs: their descriptions. Sequences without
 * marks that follow one another are one piece. Returns how many pieces there are then. */
uint32_t cut(de_cu_model *m, const de_batch_seq &q, uint32_t row, uint32_t n, uint32_t n_seqs,
             de_cu_seq *seqs, uint32_t *ret_n_seqs)
{
    uint32_t done = 0;
    if (n && q.n_marks == 0 && m->pieces[n - 1].slot == UINT32_MAX) {
        de_cu_piece &c = m->pieces[n - 1];
        seqs[n_seqs] = { row - c.row, q.n_rows, q.start, q.slot, 0 };
        c.n_seqs++;
        c.rows += q.n_rows;
        c.max_rows = larger(c.max_rows, q.n_rows);
        *ret_n_seqs = n_seqs + 1;
        return n;
    }
    for (uint32_t i = 0; done < q.n_rows; i++) {
        const bool marked = i < q.n_marks;
        const uint32_t rows = (marked ? q.marks[i].end - q.start : q.n_rows) - done;
        m->pieces[n++] = { row + done,
                           rows,
                           rows,
                           n_seqs,
                           1,
                           q.n_marks ? q.slot : UINT32_MAX,
                           marked ? q.marks[i].slot : UINT32_MAX };
        seqs[n_seqs++] = { 0, rows, q.start + done, q.slot, 0 };
        done += rows;
    }
    *ret_n_seqs = n_seqs;
    return n;
}

/* Every sequence of the batch that is not decode's. row_of: room for the batch's rows. */
cudaError_t prefill(de_cu_model *m, const de_batch *b, float *logits, const de_capture *to,
                    uint32_t *row_of)
{
    uint32_t T = 0, n_seqs = 0, n_out = 0, max_rows = 0, ctx_max = 0, pages = 0;
    for (uint32_t i = 0; i < b->n_seqs; i++)
        if (!b->seqs[i].decode) {
            T += b->seqs[i].n_rows;
            n_out += b->seqs[i].n_out;
            n_seqs++;
        }
    if (T == 0)
        return cudaSuccess;
    uint8_t *const host = (uint8_t *)m->prefill_host.tokens, *const device =
                                                                 (uint8_t *)m->prefill.tokens;
    de_cu_meta d;
    const uint32_t described = n_seqs + pieces_max(T, n_seqs);
    const size_t head_bytes = meta_at(host, T, described, n_out, &d);
    (void)meta_at(device, T, described, n_out, &m->prefill);
    uint32_t row = 0, seq = 0, out = 0, n_pieces = 0, n_described = n_seqs;
    for (uint32_t i = 0; i < b->n_seqs; i++) {
        const de_batch_seq &q = b->seqs[i];
        if (q.decode)
            continue;
        for (uint32_t k = 0; k < q.n_rows; k++) {
            row_of[row + k] = q.row + k;
            d.tokens[row + k] = b->tokens[q.row + k];
            memcpy(d.pos[row + k], b->pos[q.row + k], sizeof *d.pos);
        }
        for (uint32_t k = q.n_rows - q.n_out; k < q.n_rows; k++)
            d.out_rows[out++] = row + k;
        d.seqs[seq++] = { row, q.n_rows, q.start, q.slot, pages };
        n_pieces = cut(m, q, row, n_pieces, n_described, d.seqs, &n_described);
        pages += put_pages(q, d.pages + pages);
        row += q.n_rows;
        max_rows = larger(max_rows, q.n_rows);
        ctx_max = larger(ctx_max, q.start + q.n_rows);
    }
    cudaError_t e = cudaMemcpyAsync(device, host, head_bytes + pages * sizeof(uint32_t),
                                    cudaMemcpyHostToDevice, m->stream);
    const capture c = { to, row_of, T };
    if (e == cudaSuccess)
        e = prefill_rows(m, T, n_seqs, n_pieces, max_rows, ctx_max, &c);
    output outs[ROWS];
    uint32_t have = 0, done = 0;
    for (uint32_t i = 0; i < b->n_seqs && e == cudaSuccess; i++) {
        const de_batch_seq &q = b->seqs[i];
        for (uint32_t k = 0; !q.decode && k < q.n_out && e == cudaSuccess; k++) {
            outs[have++] = output_of(m, b, q, k);
            if (have < ROWS && done + have < n_out)
                continue;
            de_cu_gather(m->stream, m->h, m->prefill.out_rows + done, have, m->shape.hidden,
                         m->gathered);
            head(m, m->gathered, have, false);
            e = put_outputs(m, b, outs, have, logits);
            done += have;
            have = 0;
        }
    }
    m->prefill.tokens = (uint32_t *)device;
    if (e == cudaSuccess)
        e = cudaStreamSynchronize(m->stream);
    return e;
}

cudaError_t rows(de_cu_model *m, const de_batch *b, float *logits, const de_capture *to)
{
    uint32_t ids[ROWS], n = 0;
    uint32_t *row_of = m->row_of;
    cudaError_t e = cudaSuccess;
    for (uint32_t i = 0; i < b->n_seqs && e == cudaSuccess; i++) {
        if (!b->seqs[i].decode)
            continue;
        ids[n++] = i;
        if (n == ROWS) {
            e = decode(m, b, ids, n, logits, to);
            n = 0;
        }
    }
    if (n && e == cudaSuccess)
        e = decode(m, b, ids, n, logits, to);
    if (e == cudaSuccess)
        e = prefill(m, b, logits, to, row_of);
    return e;
}

/* ---- what goes to the host, beside what comes from it */

/* What follows on the stream comes behind save number n and all before it. */
cudaError_t await_saves(de_cu_model *m, uint64_t n)
{
    if (n <= m->n_awaited)
        return cudaSuccess;
    m->n_awaited = n; /* at least: an event that was used again stands for a later one */
    return cudaStreamWaitEvent(m->stream, m->saved[n % DE_CU_SAVES], 0);
}

size_t layer_bytes(const de_cu_model *m)
{
    return (m->options.n_pages + 1ull) * m->page_bytes;
}

/* Begins the saves that were asked for, on `out`. */
cudaError_t flush_saves(de_cu_model *m)
{
    if (m->to_save.n == 0)
        return cudaSuccess;
    cudaError_t e = cudaSuccess;
    if (m->saves_wait) {
        e = cudaEventRecord(m->ready, m->stream);
        if (e == cudaSuccess)
            e = cudaStreamWaitEvent(m->out, m->ready, 0);
    }
    de_cu_copy_pages(m->out, m->kv, layer_bytes(m), m->page_bytes, m->shape.n_attn, m->to_save, true);
    if (e == cudaSuccess)
        e = cudaGetLastError();
    m->n_saved++;
    if (e == cudaSuccess)
        e = cudaEventRecord(m->saved[m->n_saved % DE_CU_SAVES], m->out);
    m->to_save.n = 0;
    m->saves_wait = false;
    return e;
}

/* Begins the loads that were asked for, on `stream`. */
cudaError_t flush_loads(de_cu_model *m)
{
    if (m->to_load.n == 0)
        return cudaSuccess;
    cudaError_t e = await_saves(m, m->loads_wait);
    de_cu_copy_pages(m->stream, m->kv, layer_bytes(m), m->page_bytes, m->shape.n_attn, m->to_load, false);
    if (e == cudaSuccess)
        e = cudaGetLastError();
    m->to_load.n = 0;
    m->loads_wait = 0;
    return e;
}

cudaError_t flush_pages(de_cu_model *m)
{
    cudaError_t e = flush_saves(m); /* loads may wait for them */
    return e == cudaSuccess ? flush_loads(m) : e;
}

/* Asks for one more; true: the list is full. */
bool add_page(de_cu_pages &list, uint32_t page, uint8_t *host)
{
    list.page[list.n] = page;
    list.host[list.n++] = host;
    return list.n == DE_CU_PAGES;
}

const void **place_in(de_cu_addresses &s, const void *p)
{
    size_t i = ((uintptr_t)p >> 12) * 0x9E3779B97F4A7C15u >> 40;
    while (s.of[i % DE_CU_ADDRESSES] && s.of[i % DE_CU_ADDRESSES] != p)
        i++;
    return &s.of[i % DE_CU_ADDRESSES];
}
bool is_full(const de_cu_addresses &s)
{
    return s.n >= DE_CU_ADDRESSES / 2;
}
void note_address(de_cu_addresses &s, const void *p)
{
    if (is_full(s))
        return; /* it may be any then */
    const void **at = place_in(s, p);
    s.n += *at == NULL;
    *at = p;
}
bool may_hold(de_cu_addresses &s, const void *p)
{
    return is_full(s) || (s.n && *place_in(s, p) == p);
}
void forget(de_cu_addresses &s)
{
    if (s.n)
        memset(&s, 0, sizeof s);
}

/* Both streams are idle, or the device has failed. */
void end_epoch(de_cu_model *m)
{
    m->epoch++;
    forget(m->loaded);
    forget(m->saved_to);
}

int forward(de_model *base, const de_batch *b, float *logits, const de_capture *to,
            delta_error *err)
{
    de_cu_model *m = of(base);
    cudaError_t e = flush_pages(m);
    if (e == cudaSuccess)
        e = await_saves(m, m->n_saved);
    if (e == cudaSuccess)
        e = rows(m, b, logits, to);
    end_epoch(m);
    return e == cudaSuccess ? 0 : de_cu_failed(err, e, "forward");
}

/* ---- slots and pages */

int wait(de_model *base, delta_error *err)
{
    cudaError_t e = flush_pages(of(base));
    if (e == cudaSuccess)
        e = cudaStreamSynchronize(of(base)->stream);
    if (e == cudaSuccess)
        e = cudaStreamSynchronize(of(base)->out);
    end_epoch(of(base));
    return e == cudaSuccess ? 0 : de_cu_failed(err, e, "copies");
}

void slot_clear(de_model *base, uint32_t slot)
{
    (void)cudaMemsetAsync(slot_at(base, slot), 0, of(base)->slot_floats * sizeof(float),
                          of(base)->stream); /* an error is sticky: the next forward tells it */
}

size_t slot_bytes(const de_model *base)
{
    return ((const de_cu_model *)base)->slot_floats * sizeof(float);
}

int slot_copy(de_model *base, void *to, const void *from, enum cudaMemcpyKind kind,
              delta_error *err)
{
    cudaError_t e = cudaMemcpyAsync(to, from, slot_bytes(base), kind, of(base)->stream);
    if (e == cudaSuccess && !locked_at(kind == cudaMemcpyHostToDevice ? from : to))
        e = cudaStreamSynchronize(of(base)->stream);
    return e == cudaSuccess ? 0 : de_cu_failed(err, e, "copy of a state");
}
int slot_save(de_model *base, uint32_t slot, void *dst, delta_error *err)
{
    return slot_copy(base, dst, slot_at(base, slot), cudaMemcpyDeviceToHost, err);
}
int slot_load(de_model *base, uint32_t slot, const void *src, delta_error *err)
{
    return slot_copy(base, slot_at(base, slot), src, cudaMemcpyHostToDevice, err);
}

int slot_copy_to(de_model *base, uint32_t from, uint32_t to, delta_error *err)
{
    cudaError_t e = copy_slot(of(base), from, to); /* in the order of the stream: nobody waits */
    return e == cudaSuccess ? 0 : de_cu_failed(err, e, "copy of a state");
}

uint8_t *page_at(const de_cu_model *m, uint32_t layer, uint32_t page)
{
    return m->kv + ((size_t)layer * (m->options.n_pages + 1) + page) * m->page_bytes;
}

size_t page_bytes(const de_model *base)
{
    const de_cu_model *m = (const de_cu_model *)base;
    return m->shape.n_attn * m->page_bytes;
}

/* The parts of a page lie a layer apart on the device, one behind the other on the host. */
cudaError_t copy_now(de_cu_model *m, uint32_t page, void *host, enum cudaMemcpyKind kind)
{
    const size_t n = m->page_bytes;
    const bool out = kind == cudaMemcpyDeviceToHost;
    cudaError_t e = flush_pages(m);
    if (e == cudaSuccess)
        e = await_saves(m, m->n_saved);
    if (e == cudaSuccess)
        e = cudaMemcpy2DAsync(out ? host : page_at(m, 0, page), out ? n : layer_bytes(m),
                              out ? page_at(m, 0, page) : host, out ? layer_bytes(m) : n, n,
                              m->shape.n_attn, kind, m->stream);
    return e == cudaSuccess ? cudaStreamSynchronize(m->stream) : e;
}

int page_save(de_model *base, uint32_t page, void *dst, delta_error *err)
{
    de_cu_model *m = of(base);
    uint8_t *const host = locked_at(dst);
    cudaError_t e = cudaSuccess;
    if (m->shape.n_attn == 0)
        return 0;
    if (!host) {
        e = copy_now(m, page, dst, cudaMemcpyDeviceToHost);
        return e == cudaSuccess ? 0 : de_cu_failed(err, e, "copy of a KV page");
    }
    if (m->written_in[page] == m->epoch || may_hold(m->loaded, dst)) {
        e = flush_loads(m);
        m->saves_wait = true;
    }
    note_address(m->saved_to, dst);
    m->saved_as[page] = m->n_saved + 1;
    if (add_page(m->to_save, page, host)) {
        const cudaError_t f = flush_saves(m);
        e = e == cudaSuccess ? f : e;
    }
    return e == cudaSuccess ? 0 : de_cu_failed(err, e, "copy of a KV page");
}

int page_load(de_model *base, uint32_t page, const void *src, delta_error *err)
{
    de_cu_model *m = of(base);
    uint8_t *const host = locked_at(src);
    cudaError_t e = cudaSuccess;
    if (m->shape.n_attn == 0)
        return 0;
    m->written_in[page] = m->epoch;
    if (!host) {
        e = copy_now(m, page, (void *)(uintptr_t)src, cudaMemcpyHostToDevice);
        return e == cudaSuccess ? 0 : de_cu_failed(err, e, "copy of a KV page");
    }
    note_address(m->loaded, src);
    if (may_hold(m->saved_to, src)) { /* what is read may be on its way there */
        e = flush_saves(m);
        m->loads_wait = m->n_saved;
    }
    if (m->saved_as[page] > m->n_saved && e == cudaSuccess)
        e = flush_saves(m);
    if (m->saved_as[page] > m->loads_wait)
        m->loads_wait = m->saved_as[page];
    if (add_page(m->to_load, page, host)) {
        const cudaError_t f = flush_loads(m);
        e = e == cudaSuccess ? f : e;
    }
    return e == cudaSuccess ? 0 : de_cu_failed(err, e, "copy of a KV page");
}

int page_copy(de_model *base, uint32_t from, uint32_t to, delta_error *err)
{
    de_cu_model *m = of(base);
    const size_t n = m->page_bytes;
    if (m->shape.n_attn == 0)
        return 0;
    m->written_in[to] = m->epoch;
    cudaError_t e = flush_pages(m);
    if (e == cudaSuccess)
        e = await_saves(m, m->saved_as[to]);
    if (e == cudaSuccess)
        e = cudaMemcpy2DAsync(page_at(m, 0, to), layer_bytes(m), page_at(m, 0, from), layer_bytes(m), n,
                              m->shape.n_attn, cudaMemcpyDeviceToDevice, m->stream);
    return e == cudaSuccess ? 0 : de_cu_failed(err, e, "copy of a KV page");
}

} // namespace

extern "C" const de_backend de_backend_cuda = {
    "cuda",     8192,         host_alloc, host_free, read_rate,  memory_bytes, plan,
    open_model, close_model,  forward,    wait,      slot_clear, slot_bytes,   slot_save,
    slot_load,  slot_copy_to, page_bytes, page_save, page_load,  page_copy,
};
