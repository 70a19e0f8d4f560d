/* load.cu -- weights from the checkpoint onto the device: one list of jobs, made once, run by several readers.
 *
 * A job is a part of a tensor (at most some MB) and where it goes. Readers take jobs off the list in order; each has two pinned
 * buffers and a stream of its own: while one buffer is copied and repacked by the device, the other is filled by pread. What is not
 * finite, or a scale of 0 over weights that are not 0, is noted by the packing kernels and told with the tensor's name at the end.
 *
 * A projection of several matrices (q, k, v) is one matrix here. It is INT8 if all its parts are, in the same groups, and the groups
 * are whole tiles; else BF16, INT8 parts being multiplied out and rounded to BF16, as the reference does. */
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "model/cuda/model.cuh"

extern "C" {
#include "base/bits.h"
}

namespace
{

/* Page-locked memory takes half a second a gigabyte to get: buffers are just large enough that their reads and copies are long. */
enum {
    READERS_MIN = 4,
    READERS_MAX = 16,
    PIECE = 4 << 20,
    BUFFER = PIECE + (256 << 10), /* a piece and its scales */
    MAX_WIDTH = 4096
};

struct job {
    enum { LINEAR, ROWS, VECTOR } kind;
    de_ref w, scale;
    de_cu_stored from; /* pointers are set by the reader */
    de_cu_linear to;
    bf16 *rows_to;
    float *vector_to;
    uint32_t row0;
    de_cu_order order;
    de_cu_vector how;
    float low, high; /* VECTOR: random values */
};

struct builder {
    const de_shape *s;
    const de_binding *b;
    uint8_t *base; /* NULL: sizes only */
    uint64_t used;
    std::vector<job> *jobs;           /* NULL: sizes only */
    std::vector<de_cu_linear> filled; /* matrices for random weights */
    delta_error *err;
    int code;

    template <class T> T *take(uint64_t n)
    {
        T *p = (T *)(base + used);
        used += (n * sizeof(T) + 255) / 256 * 256;
        return p;
    }
};

de_cu_type type_of(enum de_dtype d)
{
    return d == DE_BF16 ? DE_CU_T_BF16 : d == DE_F16 ? DE_CU_T_F16 : DE_CU_T_F32;
}

bool fits_int8(const de_linear_ref &l)
{
    return l.format == DE_LINEAR_INT8 && l.group % 32 == 0;
}

/* Room for a matrix. */
de_cu_linear matrix(builder &k, uint32_t out, uint32_t in, bool int8, uint32_t group,
                    uint32_t copies)
{
    de_cu_linear l;
    const uint64_t rows = (out + 15) / 16 * 16;
    l.out = out;
    l.in = in;
    l.group = int8 ? group : in;
    l.w = k.take<uint8_t>(rows * in * (int8 ? 1 : 2) * copies);
    l.scale = int8 ? k.take<float>(rows * (in / group) * copies) : NULL;
    if (in % 32 || in > MAX_WIDTH)
        k.code =
            delta_fail(k.err, DELTA_EUNSUPPORTED,
                       "backend cuda: a matrix has %u columns; multiples of 32 up to %d are read",
                       in, (int)MAX_WIDTH);
    return l;
}

/* The rows of `from` into `to`, cut into pieces. */
void fill(builder &k, const de_linear_ref &from, const de_cu_linear &to, uint32_t row0,
          de_cu_order order)
{
    if (!k.jobs)
        return;
    const uint32_t step = (uint32_t)(PIECE / from.row_bytes) / 16 * 16, rows = step < 16 ? 16
                                                                               : step > 32768
                                                                                   ? 32768
                                                                                   : step;
    const size_t one = from.scale_whole ? 0
                       : from.format == DE_LINEAR_INT8
                           ? from.in / from.group * de_dtype_bytes(from.scale.dtype)
                           : 0;
    for (uint32_t r = 0; r < from.out; r += rows) {
        job j = {};
        const uint32_t n = from.out - r < rows ? from.out - r : rows;
        j.kind = job::LINEAR;
        j.w = from.weight;
        j.w.offset += (uint64_t)r * from.row_bytes;
        j.w.bytes = (uint64_t)n * from.row_bytes;
        j.scale = from.scale;
        j.from.type = from.format == DE_LINEAR_INT8 ? DE_CU_T_INT8 : type_of(from.weight.dtype);
        if (from.format == DE_LINEAR_INT8 && !from.scale_whole) {
            j.scale.offset += r * one;
            j.scale.bytes = n * one;
        }
        j.from.row_bytes = from.row_bytes;
        j.from.rows = n;
        j.from.in = from.in;
        j.from.scale_type = type_of(from.scale.dtype);
        j.from.scale_whole = from.scale_whole;
        j.from.group = from.group;
        j.to = to;
        j.row0 = row0 + (order == DE_CU_ROWS ? r : r * 2);
        j.order = order;
        k.jobs->push_back(j);
    }
}

/* Several matrices of the same input, one below the other. */
de_cu_linear merged(builder &k, std::initializer_list<const de_linear_ref *> parts)
{
    uint32_t out = 0;
    bool int8 = true;
    const de_linear_ref &first = **parts.begin();
    for (const de_linear_ref *p : parts) {
        out += p->out;
        int8 = int8 && fits_int8(*p) && p->group == first.group;
    }
    const de_cu_linear l = matrix(k, out, first.in, int8, first.group, 1);
    uint32_t row = 0;
    for (const de_linear_ref *p : parts) {
        fill(k, *p, l, row, DE_CU_ROWS);
        row += p->out;
    }
    k.filled.push_back(l);
    return l;
}

float *vector(builder &k, const de_ref &from, uint32_t n, de_cu_vector how, float low, float high)
{
    float *to = k.take<float>(n);
    if (k.jobs) {
        job j = {};
        j.kind = job::VECTOR;
        j.w = from;
        j.from.type = type_of(from.dtype);
        j.from.rows = n;
        j.vector_to = to;
        j.how = how;
        j.low = low;
        j.high = high;
        k.jobs->push_back(j);
    }
    return to;
}

/* n experts of one form. */
void experts(builder &k, const de_expert_ref *from, uint32_t n, de_cu_linear &gate_up,
             de_cu_linear &down, size_t stride[2], size_t scales[2])
{
    bool int8[2] = { true, true };
    for (uint32_t e = 0; e < n; e++) {
        int8[0] = int8[0] && fits_int8(from[e].gate) && fits_int8(from[e].up) &&
                  from[e].gate.group == from[0].gate.group &&
                  from[e].up.group == from[0].gate.group;
        int8[1] = int8[1] && fits_int8(from[e].down) && from[e].down.group == from[0].down.group;
    }
    const uint32_t width = from[0].gate.out, hidden = from[0].gate.in;
    if (width % 8 || hidden % 16)
        k.code = delta_fail(k.err, DELTA_EUNSUPPORTED,
                            "backend cuda: experts of %u by %u; multiples of 8 and 16 are read",
                            width, hidden);
    gate_up = matrix(k, 2 * width, hidden, int8[0], from[0].gate.group, n);
    down = matrix(k, hidden, width, int8[1], from[0].down.group, n);
    const de_cu_linear *l[2] = { &gate_up, &down };
    for (int i = 0; i < 2; i++) {
        const size_t rows = (l[i]->out + 15) / 16 * 16;
        stride[i] = rows * l[i]->in * (int8[i] ? 1 : 2);
        scales[i] = int8[i] ? rows * (l[i]->in / l[i]->group) : 0;
        de_cu_linear all = *l[i];
        all.out = (uint32_t)(rows * n);
        k.filled.push_back(all);
    }
    for (uint32_t e = 0; k.jobs && e < n; e++) {
        de_cu_linear g = gate_up, d = down;
        g.w += e * stride[0];
        d.w += e * stride[1];
        g.scale = g.scale ? g.scale + e * scales[0] : NULL;
        d.scale = d.scale ? d.scale + e * scales[1] : NULL;
        fill(k, from[e].gate, g, 0, DE_CU_GATE);
        fill(k, from[e].up, g, 0, DE_CU_UP);
        fill(k, from[e].down, d, 0, DE_CU_ROWS);
    }
}

void layer(builder &k, const de_layer_ref &from, uint32_t index, de_cu_layer &to)
{
    const de_shape &s = *k.s;
    to.kind = from.kind;
    to.index = index;
    to.input_norm = vector(k, from.input_norm, s.hidden, DE_CU_V_PLAIN, -0.1f, 0.1f);
    to.post_norm = vector(k, from.post_norm, s.hidden, DE_CU_V_PLAIN, -0.1f, 0.1f);
    if (from.kind == DE_LAYER_ATTN) {
        to.in = merged(k, { &from.q, &from.k, &from.v });
        to.out = merged(k, { &from.o });
        to.q_norm = vector(k, from.q_norm, DE_CU_ATTN, DE_CU_V_PLAIN, -0.1f, 0.1f);
        to.k_norm = vector(k, from.k_norm, DE_CU_ATTN, DE_CU_V_PLAIN, -0.1f, 0.1f);
    } else {
        to.in = merged(k, { &from.qkv, &from.z, &from.b, &from.a });
        to.out = merged(k, { &from.out });
        to.conv = vector(k, from.conv, s.gdn_channels * DE_CONV_WIDTH, DE_CU_V_CONV, -0.5f, 0.5f);
        to.neg_exp_A = vector(k, from.A_log, s.gdn_v_heads, DE_CU_V_NEG_EXP, -8, -0.05f);
        to.dt_bias = vector(k, from.dt_bias, s.gdn_v_heads, DE_CU_V_PLAIN, -6, 0);
        to.gdn_norm = vector(k, from.gdn_norm, DE_CU_GDN, DE_CU_V_PLAIN, 0.9f, 1.1f);
    }
    to.router = merged(k, { &from.router, &from.shared_gate });
    de_cu_experts &e = to.experts;
    size_t stride[2], scales[2];
    e.n_experts = s.n_experts;
    e.top_k = s.top_k;
    e.hidden = s.hidden;
    e.width = s.moe_width;
    e.shared_width = s.shared_width;
    experts(k, &from.shared, 1, e.shared_gate_up, e.shared_down, stride, scales);
    experts(k, from.experts, s.n_experts, e.gate_up, e.down, stride, scales);
    e.gate_up_stride = stride[0];
    e.down_stride = stride[1];
    e.gate_up_scales = scales[0];
    e.down_scales = scales[1];
}

void everything(builder &k, de_cu_weights &w)
{
    const de_linear_ref &e = k.b->embed;
    w.embed = k.take<bf16>((uint64_t)k.s->vocab * k.s->hidden);
    if (k.jobs && e.format != DE_LINEAR_FLOAT)
        k.code = delta_fail(k.err, DELTA_EUNSUPPORTED, "backend cuda: the embedding is INT8");
    for (uint32_t r = 0, n; k.jobs && r < e.out; r += n) {
        job j = {};
        n = (uint32_t)(PIECE / e.row_bytes);
        n = n < 1 ? 1 : n > 32768 ? 32768 : n;
        n = n < e.out - r ? n : e.out - r;
        j.kind = job::ROWS;
        j.w = e.weight;
        j.w.offset += (uint64_t)r * e.row_bytes;
        j.w.bytes = (uint64_t)n * e.row_bytes;
        j.from.type = type_of(e.weight.dtype);
        j.from.row_bytes = e.row_bytes;
        j.from.rows = n;
        j.from.in = e.in;
        j.rows_to = w.embed + (uint64_t)r * e.in;
        k.jobs->push_back(j);
    }
    w.head = merged(k, { &k.b->head });
    w.norm = vector(k, k.b->norm, k.s->hidden, DE_CU_V_PLAIN, -0.1f, 0.1f);
    for (uint32_t i = 0; i < k.b->n_layers; i++) {
        de_cu_layer l = {};
        layer(k, k.b->layers[i], k.s->kind_index[i], l);
        if (w.layers)
            w.layers[i] = l;
    }
}

/* ---- readers */

struct load_state {
    de_cu_model *m;
    const de_weights *w;
    const std::vector<job> *jobs;
    uint32_t *bad; /* [jobs], device */
    std::atomic<size_t> next{ 0 };
    std::atomic<uint64_t> done{ 0 };
    unsigned running = 0;
    std::mutex lock; /* guards running and error */
    std::condition_variable ended;
    delta_error error = {};
};

struct buffers {
    uint8_t *host = NULL, *device = NULL;
    cudaEvent_t empty = NULL;
};

void tell(load_state &s, const delta_error &e)
{
    std::lock_guard<std::mutex> guard(s.lock);
    if (s.error.code == 0)
        s.error = e;
    s.next = s.jobs->size();
}

size_t room(const job &j)
{
    return de_align_up(j.w.bytes, 16) + de_align_up(j.scale.bytes, 16);
}

void launch(load_state &s, const job &j, const uint8_t *at, size_t index, cudaStream_t stream)
{
    de_cu_stored from = j.from;
    uint32_t *bad = s.bad + index;
    from.w = at;
    from.scale = at + de_align_up(j.w.bytes, 16);
    if (j.kind == job::LINEAR)
        de_cu_pack_linear(stream, from, j.to, j.row0, j.order, bad);
    else if (j.kind == job::ROWS)
        de_cu_pack_rows(stream, from, j.rows_to, bad);
    else
        de_cu_pack_vector(stream, from.type, at, from.rows, j.how, j.vector_to, bad);
}

/* Takes jobs until a buffer is full; returns how many bytes it holds. */
int reader_turn(load_state &s, buffers &b, cudaStream_t stream, bool *ret_more)
{
    const std::vector<job> &jobs = *s.jobs;
    delta_error err = {};
    size_t used = 0, first = 0, n = 0;
    {
        std::lock_guard<std::mutex> guard(s.lock); /* neighbours on disk stay neighbours */
        first = s.next;
        while (first + n < jobs.size() && used + room(jobs[first + n]) <= BUFFER)
            used += room(jobs[first + n++]);
        s.next = first + n;
    }
    *ret_more = n > 0;
    if (n == 0)
        return 0;
    cudaError_t e = cudaEventSynchronize(b.empty);
    size_t at = 0;
    for (size_t i = first; i < first + n; i++) {
        const job &j = jobs[i];
        if (de_weights_read(s.w, j.w.shard, j.w.offset, b.host + at, j.w.bytes, &err) < 0 ||
            (j.scale.bytes &&
             de_weights_read(s.w, j.scale.shard, j.scale.offset,
                             b.host + at + de_align_up(j.w.bytes, 16), j.scale.bytes, &err) < 0)) {
            tell(s, err);
            return -1;
        }
        at += room(j);
        s.done += j.w.bytes + j.scale.bytes;
    }
    if (e == cudaSuccess)
        e = cudaMemcpyAsync(b.device, b.host, used, cudaMemcpyHostToDevice, stream);
    at = 0;
    for (size_t i = first; i < first + n; i++) {
        launch(s, jobs[i], b.device + at, i, stream);
        at += room(jobs[i]);
    }
    if (e == cudaSuccess)
        e = cudaGetLastError();
    if (e == cudaSuccess)
        e = cudaEventRecord(b.empty, stream);
    if (e != cudaSuccess) {
        (void)de_cu_failed(&err, e, "loading weights");
        tell(s, err);
        return -1;
    }
    return 0;
}

void reader(load_state *s)
{
    buffers b[2];
    cudaStream_t stream = NULL;
    delta_error err = {};
    cudaError_t e = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    for (int i = 0; i < 2 && e == cudaSuccess; i++) {
        e = cudaMallocHost(&b[i].host, BUFFER);
        if (e == cudaSuccess)
            e = cudaMalloc(&b[i].device, BUFFER);
        if (e == cudaSuccess)
            e = cudaEventCreateWithFlags(&b[i].empty, cudaEventDisableTiming);
    }
    if (e != cudaSuccess) {
        (void)de_cu_failed(&err, e, "buffers for loading weights");
        tell(*s, err);
    }
    bool more = e == cudaSuccess;
    for (int i = 0; more; i ^= 1)
        if (reader_turn(*s, b[i], stream, &more) < 0)
            break;
    if (stream && cudaStreamSynchronize(stream) != cudaSuccess) {
        (void)de_cu_failed(&err, cudaGetLastError(), "loading weights");
        tell(*s, err);
    }
    for (buffers &x : b) {
        (void)cudaFreeHost(x.host);
        (void)cudaFree(x.device);
        if (x.empty)
            (void)cudaEventDestroy(x.empty);
    }
    if (stream)
        (void)cudaStreamDestroy(stream);
    std::lock_guard<std::mutex> guard(s->lock);
    s->running--;
    s->ended.notify_one();
}

const char *name_of(const de_weights *w, const de_ref &r)
{
    for (size_t i = 0; i < de_weights_count(w); i++) {
        const de_tensor *t = de_weights_at(w, i);
        if (t->shard == r.shard && t->offset <= r.offset && r.offset < t->offset + t->bytes)
            return t->name;
    }
    return "a tensor";
}

int read_all(de_cu_model *m, const de_weights *w, const std::vector<job> &jobs, delta_error *err)
{
    load_state s;
    uint64_t total = 0;
    s.m = m;
    s.w = w;
    s.jobs = &jobs;
    for (const job &j : jobs)
        total += j.w.bytes + j.scale.bytes;
    cudaError_t e = cudaMalloc(&s.bad, jobs.size() * sizeof *s.bad);
    if (e == cudaSuccess)
        e = cudaMemset(s.bad, 0, jobs.size() * sizeof *s.bad);
    if (e == cudaSuccess)
        e = cudaDeviceSynchronize();
    if (e != cudaSuccess)
        return de_cu_failed(err, e, "table of jobs");
    std::vector<std::thread> threads;
    if (m->options.on_progress)
        m->options.on_progress(m->options.arg, "weights", 0, total);
    const unsigned cores = std::thread::hardware_concurrency();
    s.running = cores < READERS_MIN ? READERS_MIN : cores > READERS_MAX ? READERS_MAX : cores;
    for (unsigned i = s.running; i > 0; i--)
        threads.emplace_back(reader, &s);
    for (std::unique_lock<std::mutex> guard(s.lock); s.running;) {
        (void)s.ended.wait_for(guard, std::chrono::milliseconds(100));
        guard.unlock();
        if (m->options.on_progress)
            m->options.on_progress(m->options.arg, "weights", s.done, total);
        guard.lock();
    }
    for (std::thread &t : threads)
        t.join();
    std::vector<uint32_t> bad(jobs.size());
    e = cudaMemcpy(bad.data(), s.bad, jobs.size() * sizeof(uint32_t), cudaMemcpyDeviceToHost);
    (void)cudaFree(s.bad);
    if (s.error.code)
        return delta_fail(err, (enum delta_code)s.error.code, "%s", s.error.text);
    if (e != cudaSuccess)
        return de_cu_failed(err, e, "loading weights");
    for (size_t i = 0; i < jobs.size(); i++)
        if (bad[i])
            return delta_fail(err, DELTA_EFORMAT, "%s: %s",
                              name_of(w, bad[i] & 1 ? jobs[i].w : jobs[i].scale),
                              bad[i] & 1 ? "a value, or one of its scales, is not finite"
                                         : "a scale of 0, its weights are not 0");
    return 0;
}

int make_up(const builder &k, const de_cu_weights &w, const std::vector<job> &jobs,
            delta_error *err)
{
    uint64_t seed = 0x5EED0000000000u;
    for (const de_cu_linear &l : k.filled)
        de_cu_fill_linear(NULL, l, seed += (uint64_t)1 << 36);
    de_cu_fill_rows(NULL, w.embed, (size_t)k.s->vocab * k.s->hidden, 1, seed += (uint64_t)1 << 36);
    for (const job &j : jobs)
        if (j.kind == job::VECTOR)
            de_cu_fill_vector(NULL, j.vector_to, j.from.rows, j.low, j.high,
                              seed += (uint64_t)1 << 36);
    const cudaError_t e = cudaDeviceSynchronize();
    return e == cudaSuccess ? 0 : de_cu_failed(err, e, "making up weights");
}

} // namespace

int de_cu_failed(delta_error *err, cudaError_t e, const char *what)
{
    return delta_fail(err, e == cudaErrorMemoryAllocation ? DELTA_ENOMEM : DELTA_EIO,
                      "CUDA, %s: %s", what, cudaGetErrorString(e));
}

int de_cu_weights_plan(const de_shape *s, const de_binding *b, de_cu_weights *w,
                       uint64_t *ret_bytes, delta_error *err)
{
    builder k = { s, b, NULL, 0, NULL, {}, err, 0 };
    de_cu_weights none = {};
    everything(k, w ? *w : none);
    *ret_bytes = k.used;
    return k.code;
}

int de_cu_load(de_cu_model *m, const de_weights *w, const de_binding *b, delta_error *err)
{
    std::vector<job> jobs;
    builder k = { &m->shape, b, m->weights, 0, &jobs, {}, err, 0 };
    everything(k, m->w);
    if (k.code < 0)
        return k.code;
    cudaError_t e = cudaMemset(m->weights, 0, k.used); /* rows of padding */
    if (e == cudaSuccess)
        e = cudaDeviceSynchronize(); /* the readers' streams do not wait for it */
    if (e != cudaSuccess)
        return de_cu_failed(err, e, "clearing weights");
    return w ? read_all(m, w, jobs, err) : make_up(k, m->w, jobs, err);
}
