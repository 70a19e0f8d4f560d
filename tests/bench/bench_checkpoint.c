/* bench_checkpoint.c -- a checkpoint of random weights, on disk: bench_checkpoint DIR [options].
 *
 *   --shape 35b|DIR      35b: Qwen3.6-35B-A3B (the default); DIR: that of DIR/config.json
 *   --tokenizer DIR      from where tokenizer, template and sampling are taken (default: the demo model)
 *   --ctx N              longest sequence (default: the shape's)
 *   --threads N          writers (default: one for each core)
 *
 * Names, formats and shapes are those of W8A16 in compressed-tensors: experts and attention in INT8 with a BF16 scale a row, the
 * rest in BF16; text only, no vision tower, no draft head. 35b takes 37 GB. Everything that reads a checkpoint reads this one, so that
 * loading and the daemon can be measured at full size where the real one is not at hand. Weights are drawn so that each product keeps
 * its input's scale: logits are finite and the experts are used evenly.
 *
 * The vocabulary of the tokenizer is filled up with words that no text becomes, so that as many ids can be sampled as in the real one
 * (all but the last 243 of its padded vocabulary).
 *
 * A shard for each layer, one for each of embedding and head: a file is written by one thread, as a file system wants it. The bytes are
 * a function of seed, tensor and place alone, however many threads write. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#include "base/bits.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/json.h"
#include "model/shape.h"
#include "model/synthetic.h"

enum { NAME_BYTES = 128, PIECE = 4 << 20, TOKENS_35B = 248077 };

typedef enum kind { PACKED, SCALE, SHAPE, NOISE } kind; /* NOISE: BF16 in [low, high] */

typedef struct tensor {
    char name[NAME_BYTES];
    kind kind;
    uint32_t rank;
    uint64_t dims[3], bytes;
    float low, high;
    uint64_t out, in; /* SHAPE */
} tensor;

typedef struct shard {
    char name[64];
    tensor *tensors;
    uint32_t n, cap;
    char *header;
    uint64_t header_bytes, bytes; /* bytes: of the data */
} shard;

typedef struct maker {
    const char *dir;
    shard *shards;
    uint32_t n_shards;
    uint64_t total, seed;
    atomic_uint next;
    atomic_ullong done;
    atomic_int failed; /* errno of the first that did */
    atomic_uint running;
} maker;

__attribute__((format(printf, 1, 2), noreturn)) static void fail(const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    (void)fputs("bench_checkpoint: ", stderr);
    (void)vfprintf(stderr, format, ap);
    (void)fputs("\n", stderr);
    va_end(ap);
    exit(1);
}

static void *must(void *p)
{
    if (!p)
        fail("no memory");
    return p;
}

/* ---- what there is */

static tensor *add(shard *s, kind k, const char *base, const char *name, const char *end)
{
    if (s->n == s->cap) {
        s->cap = s->cap ? s->cap * 2 : 64;
        s->tensors = must(realloc(s->tensors, s->cap * sizeof *s->tensors));
    }
    tensor *t = &s->tensors[s->n++];
    *t = (tensor){ .kind = k };
    (void)snprintf(t->name, sizeof t->name, "%s%s%s", base, name, end);
    return t;
}

static void finish(shard *s, tensor *t)
{
    static const uint32_t sizes[] = { [PACKED] = 4, [SCALE] = 2, [SHAPE] = 8, [NOISE] = 2 };
    t->bytes = sizes[t->kind];
    for (uint32_t i = 0; i < t->rank; i++)
        t->bytes *= t->dims[i];
    s->bytes += t->bytes;
}

static void noise(shard *s, const char *base, const char *name, uint32_t rank, const uint64_t *dims,
                  float low, float high)
{
    tensor *t = add(s, NOISE, base, name, "");
    t->rank = rank;
    memcpy(t->dims, dims, rank * sizeof *dims);
    t->low = low;
    t->high = high;
    finish(s, t);
}

static void vector(shard *s, const char *base, const char *name, uint64_t n, float low, float high)
{
    noise(s, base, name, 1, &n, low, high);
}

static void matrix(shard *s, const char *base, const char *name, uint64_t out, uint64_t in)
{
    const float r = 1.7320508f / __builtin_sqrtf((float)in); /* variance 1 / in */
    noise(s, base, name, 2, (uint64_t[]){ out, in }, -r, r);
}

static void int8(shard *s, const char *base, const char *name, uint64_t out, uint64_t in)
{
    const float r = 1 / (74.0f * __builtin_sqrtf((float)in));
    tensor *t = add(s, PACKED, base, name, ".weight_packed");
    t->rank = 2;
    t->dims[0] = out;
    t->dims[1] = in / 4;
    finish(s, t);
    t = add(s, SCALE, base, name, ".weight_scale");
    t->rank = 2;
    t->dims[0] = out;
    t->dims[1] = 1;
    t->low = 0.9f * r;
    t->high = 1.1f * r;
    finish(s, t);
    t = add(s, SHAPE, base, name, ".weight_shape");
    t->rank = 1;
    t->dims[0] = 2;
    t->out = out;
    t->in = in;
    finish(s, t);
}

static void layer(shard *s, const de_shape *m, uint32_t n)
{
    char base[NAME_BYTES / 2], expert[NAME_BYTES / 2];
    (void)snprintf(base, sizeof base, "model.language_model.layers.%u.", n);
    vector(s, base, "input_layernorm.weight", m->hidden, -0.1f, 0.1f);
    vector(s, base, "post_attention_layernorm.weight", m->hidden, -0.1f, 0.1f);
    if (m->layer_kind[n] == DE_LAYER_ATTN) {
        int8(s, base, "self_attn.q_proj", 2ull * m->q_heads * DE_ATTN_DIM, m->hidden);
        int8(s, base, "self_attn.k_proj", (uint64_t)m->kv_heads * DE_ATTN_DIM, m->hidden);
        int8(s, base, "self_attn.v_proj", (uint64_t)m->kv_heads * DE_ATTN_DIM, m->hidden);
        int8(s, base, "self_attn.o_proj", m->hidden, (uint64_t)m->q_heads * DE_ATTN_DIM);
        vector(s, base, "self_attn.q_norm.weight", DE_ATTN_DIM, -0.1f, 0.1f);
        vector(s, base, "self_attn.k_norm.weight", DE_ATTN_DIM, -0.1f, 0.1f);
    } else {
        const uint64_t conv[] = { m->gdn_channels, 1, DE_CONV_WIDTH };
        matrix(s, base, "linear_attn.in_proj_qkv.weight", m->gdn_channels, m->hidden);
        matrix(s, base, "linear_attn.in_proj_z.weight", (uint64_t)m->gdn_v_heads * DE_GDN_DIM,
               m->hidden);
        matrix(s, base, "linear_attn.in_proj_b.weight", m->gdn_v_heads, m->hidden);
        matrix(s, base, "linear_attn.in_proj_a.weight", m->gdn_v_heads, m->hidden);
        noise(s, base, "linear_attn.conv1d.weight", 3, conv, -0.5f, 0.5f);
        vector(s, base, "linear_attn.A_log", m->gdn_v_heads, -3, 2);
        vector(s, base, "linear_attn.dt_bias", m->gdn_v_heads, -6, 0);
        vector(s, base, "linear_attn.norm.weight", DE_GDN_DIM, 0.9f, 1.1f);
        matrix(s, base, "linear_attn.out_proj.weight", m->hidden,
               (uint64_t)m->gdn_v_heads * DE_GDN_DIM);
    }
    matrix(s, base, "mlp.gate.weight", m->n_experts, m->hidden);
    matrix(s, base, "mlp.shared_expert_gate.weight", 1, m->hidden);
    matrix(s, base, "mlp.shared_expert.gate_proj.weight", m->shared_width, m->hidden);
    matrix(s, base, "mlp.shared_expert.up_proj.weight", m->shared_width, m->hidden);
    matrix(s, base, "mlp.shared_expert.down_proj.weight", m->hidden, m->shared_width);
    for (uint32_t e = 0; e < m->n_experts; e++) {
        (void)snprintf(expert, sizeof expert, "%smlp.experts.%u.", base, e);
        int8(s, expert, "gate_proj", m->moe_width, m->hidden);
        int8(s, expert, "up_proj", m->moe_width, m->hidden);
        int8(s, expert, "down_proj", m->hidden, m->moe_width);
    }
}

/* The header, padded so that the data begin at a multiple of 64. */
static void make_header(shard *s)
{
    static const char *const types[] = {
        [PACKED] = "I32", [SCALE] = "BF16", [SHAPE] = "I64", [NOISE] = "BF16"
    };
    const size_t room = 64 + (size_t)s->n * (NAME_BYTES + 160);
    char *h = s->header = must(malloc(room));
    uint64_t offset = 0;
    size_t at = 8;
    h[at++] = '{';
    for (uint32_t i = 0; i < s->n; i++) {
        const tensor *t = &s->tensors[i];
        at += (size_t)snprintf(h + at, room - at, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[",
                               i ? "," : "", t->name, types[t->kind]);
        for (uint32_t d = 0; d < t->rank; d++)
            at += (size_t)snprintf(h + at, room - at, "%s%" PRIu64, d ? "," : "", t->dims[d]);
        at += (size_t)snprintf(h + at, room - at, "],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}",
                               offset, offset + t->bytes);
        offset += t->bytes;
    }
    h[at++] = '}';
    while (at % 64)
        h[at++] = ' ';
    for (uint32_t i = 0; i < 8; i++)
        h[i] = (char)((at - 8) >> (8 * i));
    s->header_bytes = at;
}

static void list_shards(maker *m, const de_shape *shape)
{
    m->n_shards = shape->n_layers + 2;
    m->shards = must(calloc(m->n_shards, sizeof *m->shards));
    shard *head = &m->shards[0], *embed = &m->shards[1]; /* the largest first */
    matrix(head, "", "lm_head.weight", shape->vocab, shape->hidden);
    noise(embed, "model.language_model.", "embed_tokens.weight", 2,
          (uint64_t[]){ shape->vocab, shape->hidden }, -1, 1);
    vector(embed, "model.language_model.", "norm.weight", shape->hidden, -0.1f, 0.1f);
    for (uint32_t i = 0; i < shape->n_layers; i++)
        layer(&m->shards[i + 2], shape, i);
    for (uint32_t i = 0; i < m->n_shards; i++) {
        shard *s = &m->shards[i];
        (void)snprintf(s->name, sizeof s->name, "model-%05u-of-%05u.safetensors", i + 1,
                       m->n_shards);
        make_header(s);
        m->total += s->header_bytes + s->bytes;
    }
}

/* ---- the data */

/* splitmix64 of a counter. */
static inline uint64_t bits(uint64_t seed, uint64_t n)
{
    uint64_t z = seed + (n + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* n bytes, a multiple of 8 but for the end of a tensor; `word`: of 8 bytes, from which on. */
static void make_bytes(const tensor *t, uint64_t seed, uint64_t word, uint8_t *to, size_t n)
{
    uint64_t w;
    for (size_t i = 0; i < n; i += 8, word++) {
        w = bits(seed, word);
        if (t->kind == SHAPE)
            w = word ? t->in : t->out;
        if (t->kind == SCALE || t->kind == NOISE) {
            const float step = (t->high - t->low) / 65535;
            uint64_t packed = 0;
            for (int k = 0; k < 4; k++) {
                const float f = t->low + (float)(uint16_t)(w >> (16 * k)) * step;
                uint32_t u;
                memcpy(&u, &f, sizeof u);
                packed |= (uint64_t)(uint16_t)((u + 0x8000) >> 16) << (16 * k);
            }
            w = packed;
        }
        memcpy(to + i, &w, n - i < 8 ? n - i : 8);
    }
}

static int write_all(int fd, const void *data, size_t n, uint64_t at)
{
    const char *p = data;
    while (n) {
        const ssize_t k = pwrite(fd, p, n, (off_t)at);
        if (k < 0 && errno == EINTR)
            continue;
        if (k <= 0)
            return k < 0 ? errno : ENOSPC;
        p += k;
        at += (uint64_t)k;
        n -= (size_t)k;
    }
    return 0;
}

static int write_shard(maker *m, uint32_t index, uint8_t *piece)
{
    const shard *s = &m->shards[index];
    char *path = must(de_path_join(m->dir, s->name));
    const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    int r = fd < 0 ? errno : write_all(fd, s->header, s->header_bytes, 0);
    uint64_t at = s->header_bytes;
    size_t have = 0;
    for (uint32_t i = 0; r == 0 && i < s->n && m->failed == 0; i++) {
        const tensor *t = &s->tensors[i];
        const uint64_t seed = bits(m->seed, (uint64_t)index << 32 | i);
        for (uint64_t done = 0, n; r == 0 && done < t->bytes; done += n) {
            n = t->bytes - done < PIECE - have ? t->bytes - done : (PIECE - have) / 8 * 8;
            make_bytes(t, seed, done / 8, piece + have, n);
            have += n;
            if (PIECE - have < 8 || (i + 1 == s->n && done + n == t->bytes)) {
                r = write_all(fd, piece, have, at);
                at += have;
                m->done += have;
                have = 0;
            }
        }
    }
    if (fd >= 0 && close(fd) < 0 && r == 0)
        r = errno;
    free(path);
    return r;
}

static void *writer(void *arg)
{
    maker *m = arg;
    uint8_t *piece = must(aligned_alloc(4096, PIECE));
    for (uint32_t i; (i = m->next++) < m->n_shards && m->failed == 0;) {
        const int r = write_shard(m, i, piece);
        int none = 0;
        if (r)
            (void)atomic_compare_exchange_strong(&m->failed, &none, r);
    }
    free(piece);
    m->running--;
    return NULL;
}

static void write_shards(maker *m, uint32_t n_threads)
{
    const uint64_t start = de_now_ns();
    pthread_t *threads = must(calloc(n_threads, sizeof *threads));
    n_threads = n_threads < m->n_shards ? n_threads : m->n_shards;
    m->running = n_threads;
    for (uint32_t i = 0; i < n_threads; i++)
        if (pthread_create(&threads[i], NULL, writer, m))
            fail("no thread");
    for (uint32_t ticks = 0; m->running; ticks++) {
        (void)nanosleep(&(struct timespec){ .tv_nsec = 20 * 1000 * 1000 }, NULL);
        if (ticks % 50 == 49)
            (void)fprintf(stderr, "written: %.1f of %.1f GB\n", (double)m->done * 1e-9,
                          (double)m->total * 1e-9);
    }
    for (uint32_t i = 0; i < n_threads; i++)
        (void)pthread_join(threads[i], NULL);
    free(threads);
    if (m->failed)
        fail("%s: %s", m->dir, strerror(m->failed));
    const double s = (double)(de_now_ns() - start) * 1e-9;
    (void)fprintf(stderr, "%.2f GB in %u files, %.1f s, %u threads\n", (double)m->total * 1e-9,
                  m->n_shards, s, n_threads);
}

/* ---- the small files */

static FILE *create(const char *dir, const char *name)
{
    char *path = must(de_path_join(dir, name));
    FILE *f = fopen(path, "w");
    if (!f)
        fail("%s: %s", path, strerror(errno));
    free(path);
    return f;
}

static void finish_file(FILE *f, const char *name)
{
    if (ferror(f) || fclose(f))
        fail("%s: %s", name, strerror(errno));
}

static void write_index(const maker *m)
{
    FILE *f = create(m->dir, "model.safetensors.index.json");
    bool first = true;
    (void)fprintf(f, "{\"metadata\":{\"total_size\":%" PRIu64 "},\"weight_map\":{", m->total);
    for (uint32_t i = 0; i < m->n_shards; i++)
        for (uint32_t k = 0; k < m->shards[i].n; k++, first = false)
            (void)fprintf(f, "%s\n\"%s\":\"%s\"", first ? "" : ",", m->shards[i].tensors[k].name,
                          m->shards[i].name);
    (void)fputs("}}\n", f);
    finish_file(f, "model.safetensors.index.json");
}

static void write_config(const char *dir, const de_shape *s)
{
    FILE *f = create(dir, "config.json");
    (void)fprintf(
        f,
        "{\"architectures\":[\"Qwen3_5MoeForConditionalGeneration\"],\"model_type\":\"qwen3_5_"
        "moe\","
        "\"tie_word_embeddings\":false,\"quantization_config\":{\"quant_method\":\"compressed-"
        "tensors\","
        "\"format\":\"pack-quantized\",\"config_groups\":{\"group_0\":{\"targets\":[\"Linear\"],"
        "\"weights\":{\"num_bits\":8,\"type\":\"int\",\"symmetric\":true,\"strategy\":\"channel\"}}"
        "}},"
        "\n\"text_config\":{\"model_type\":\"qwen3_5_moe_text\",\"attn_output_gate\":true,"
        "\"attention_bias\":false,\"hidden_act\":\"silu\",\"head_dim\":%d,\"hidden_size\":%u,"
        "\"linear_conv_kernel_dim\":%d,\"linear_key_head_dim\":%d,\"linear_value_head_dim\":%d,"
        "\"linear_num_key_heads\":%u,\"linear_num_value_heads\":%u,\"max_position_embeddings\":%u,"
        "\"moe_intermediate_size\":%u,\"shared_expert_intermediate_size\":%u,\"num_experts\":%u,"
        "\"num_experts_per_tok\":%u,\"num_attention_heads\":%u,\"num_key_value_heads\":%u,"
        "\"num_hidden_layers\":%u,\"rms_norm_eps\":1e-6,\"vocab_size\":%u,"
        "\"tie_word_embeddings\":false,\"mamba_ssm_dtype\":\"float32\",\n\"layer_types\":[",
        DE_ATTN_DIM, s->hidden, DE_CONV_WIDTH, DE_GDN_DIM, DE_GDN_DIM, s->gdn_k_heads,
        s->gdn_v_heads, s->ctx_max, s->moe_width, s->shared_width, s->n_experts, s->top_k,
        s->q_heads, s->kv_heads, s->n_layers, s->vocab);
    for (uint32_t i = 0; i < s->n_layers; i++)
        (void)fprintf(f, "%s\"%s_attention\"", i ? "," : "",
                      s->layer_kind[i] == DE_LAYER_ATTN ? "full" : "linear");
    (void)fprintf(f,
                  "],\n\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":%.0f,"
                  "\"partial_rotary_factor\":%g,\"mrope_interleaved\":true,"
                  "\"mrope_section\":[%u,%u,%u]}}}\n",
                  s->rope_theta, s->rotary_dims / (double)DE_ATTN_DIM, s->mrope_section[0],
                  s->mrope_section[1], s->mrope_section[2]);
    finish_file(f, "config.json");
}

static void above(uint32_t *next, const char *number)
{
    const unsigned long id = strtoul(number, NULL, 10);
    *next = id >= *next ? (uint32_t)id + 1 : *next;
}

/* Above every id that tokenizer.json (text) or tokenizer_config.json gives a token: added ones have the highest. */
static uint32_t first_free_id(const char *dir, const char *text)
{
    uint32_t next = 0;
    char *path = must(de_path_join(dir, "tokenizer_config.json")), *config;
    size_t len;
    delta_error err;
    de_arena tree;
    de_json *root;
    for (const char *p = text; (p = strstr(p, "\"id\":")); p++)
        above(&next, p + 5);
    de_arena_init(&tree, 1u << 28);
    if (de_file_read(path, 16 << 20, &config, &len, &err) < 0 ||
        de_json_parse(&tree, config, len, &root, &err) < 0)
        fail("%s: %s", path, err.text);
    const de_json *added = de_json_get(root, "added_tokens_decoder");
    for (const de_json *v = added ? added->child : NULL; v; v = v->next)
        above(&next, v->key);
    if (next == 0)
        fail("%s: no added tokens", dir);
    de_arena_done(&tree);
    free(config);
    free(path);
    return next;
}

/* tokenizer.json of `from` with words for the ids [its own, n_ids). */
static void write_tokenizer(const char *dir, const char *from, uint32_t n_ids)
{
    static const char digits[] = "0123456789abcdefghijklmnopqrstuvwxyz";
    char *path = must(de_path_join(from, "tokenizer.json")), *text;
    size_t len;
    delta_error err;
    if (de_file_read(path, 128 << 20, &text, &len, &err) < 0)
        fail("%s", err.text);
    const uint32_t next = first_free_id(from, text);
    char *vocab = strstr(text, "\"vocab\"");
    vocab = vocab ? strchr(vocab, '{') : NULL;
    if (!vocab)
        fail("%s: no vocabulary with added tokens behind it", path);
    FILE *f = create(dir, "tokenizer.json");
    (void)fwrite(text, 1, (size_t)(vocab + 1 - text), f);
    for (uint32_t id = next; id < n_ids; id++) {
        char word[8] = "Z9";
        for (uint32_t i = 0, v = id; i < 4; i++, v /= 36)
            word[2 + i] = digits[v % 36];
        (void)fprintf(f, "\"%s\":%u,\n", word, id);
    }
    (void)fputs(vocab + 1, f);
    finish_file(f, "tokenizer.json");
    free(text);
    free(path);
}

static void copy_file(const char *dir, const char *from, const char *name)
{
    char *path = must(de_path_join(from, name)), *text;
    size_t len;
    delta_error err;
    if (de_file_read(path, 128 << 20, &text, &len, &err) < 0)
        fail("%s", err.text);
    FILE *f = create(dir, name);
    (void)fwrite(text, 1, len, f);
    finish_file(f, name);
    free(text);
    free(path);
}

/* ---- */

static void check_room(const char *dir, uint64_t need)
{
    struct statvfs v;
    if (statvfs(dir, &v) < 0)
        fail("%s: %s", dir, strerror(errno));
    const uint64_t room = (uint64_t)v.f_bavail * v.f_frsize;
    if (room < need)
        fail("%s has %.1f GB free, %.1f GB are needed: %.1f GB are missing", dir,
             (double)room * 1e-9, (double)need * 1e-9, (double)(need - room) * 1e-9);
}

int main(int argc, char **argv)
{
    const char *shape_of = "35b", *tokenizer = DEMO_MODEL_DIR;
    const long cores = sysconf(_SC_NPROCESSORS_ONLN);
    uint32_t n_threads = cores > 0 ? (uint32_t)cores : 1, ctx = 0;
    maker m = { .seed = 0x35B };
    de_shape shape;
    delta_error err;
    for (int i = 1; i < argc; i++) {
        const char *a = argv[i], *v = i + 1 < argc ? argv[i + 1] : NULL;
        if (a[0] != '-' && !m.dir) {
            m.dir = a;
            continue;
        }
        i++;
        if (v && strcmp(a, "--shape") == 0)
            shape_of = v;
        else if (v && strcmp(a, "--tokenizer") == 0)
            tokenizer = v;
        else if (v && strcmp(a, "--ctx") == 0)
            ctx = (uint32_t)strtoul(v, NULL, 10);
        else if (v && strcmp(a, "--threads") == 0)
            n_threads = (uint32_t)strtoul(v, NULL, 10);
        else
            m.dir = NULL, i = argc;
    }
    if (!m.dir || n_threads == 0 || n_threads > 1024) {
        (void)fprintf(stderr, "usage: bench_checkpoint DIR [--shape 35b|DIR] [--tokenizer DIR] "
                              "[--ctx N] [--threads N]\n");
        return 64;
    }
    const bool full = strcmp(shape_of, "35b") == 0;
    if (full)
        de_synthetic_35b(&shape);
    else if (de_shape_read(shape_of, &shape, &err) < 0)
        fail("%s", err.text);
    shape.ctx_max = ctx ? ctx : shape.ctx_max;
    if (mkdir(m.dir, 0755) < 0 && errno != EEXIST)
        fail("%s: %s", m.dir, strerror(errno));
    list_shards(&m, &shape);
    check_room(m.dir, m.total + (64 << 20));
    write_index(&m);
    write_config(m.dir, &shape);
    write_tokenizer(m.dir, tokenizer, full ? TOKENS_35B : shape.vocab);
    static const char *const copied[] = { "tokenizer_config.json", "generation_config.json",
                                          "chat_template.jinja" };
    for (uint32_t i = 0; i < sizeof copied / sizeof *copied; i++)
        copy_file(m.dir, tokenizer, copied[i]);
    write_shards(&m, n_threads);
    for (uint32_t i = 0; i < m.n_shards; i++) {
        free(m.shards[i].tensors);
        free(m.shards[i].header);
    }
    free(m.shards);
    return 0;
}
