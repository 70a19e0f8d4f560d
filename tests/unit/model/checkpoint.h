/* checkpoint.h -- checkpoints made of metadata: for tests of the directory and the binder.
 *
 * Tensors are listed, changed at will, and written as sparse shards: a model of
 * 70 GB takes some MB of disk. Only X.weight_shape has data; these tensors stand
 * first in each shard, side by side. */
#ifndef CHECKPOINT_H
#define CHECKPOINT_H

#include <dirent.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct ck_tensor {
    char name[160];
    char dtype[16];
    uint32_t rank, shard;
    uint64_t dims[5];
    int64_t data[3]; /* I64 only */
} ck_tensor;

typedef struct ck {
    ck_tensor *t;
    size_t n, cap;
    uint32_t shard, n_shards; /* where the next tensor goes; how many there are */
    uint64_t bytes;           /* of all tensors, after ck_write() */
    char dir[96];
} ck;

static inline void ck_die(const char *what)
{
    perror(what);
    exit(2);
}

static inline size_t ck_dtype_bytes(const char *d)
{
    return strchr(d, '6') && strcmp(d, "I64") != 0 ? 2
           : strstr(d, "64")                       ? 8
           : strstr(d, "32")                       ? 4
                                                   : 1;
}

__attribute__((format(printf, 7, 8))) static inline ck_tensor *ck_add(ck *c, const char *dtype,
                                                                      uint32_t rank, uint64_t d0,
                                                                      uint64_t d1, uint64_t d2,
                                                                      const char *format, ...)
{
    if (c->n == c->cap) {
        c->cap = c->cap ? 2 * c->cap : 256;
        c->t = realloc(c->t, c->cap * sizeof *c->t);
        if (!c->t)
            ck_die("realloc");
    }
    ck_tensor *t = &c->t[c->n++];
    *t = (ck_tensor){ .rank = rank, .dims = { d0, d1, d2 }, .shard = c->shard };
    (void)snprintf(t->dtype, sizeof t->dtype, "%s", dtype);
    va_list ap;
    va_start(ap, format);
    (void)vsnprintf(t->name, sizeof t->name, format, ap);
    va_end(ap);
    if (c->shard >= c->n_shards)
        c->n_shards = c->shard + 1;
    return t;
}

static inline ck_tensor *ck_find(ck *c, const char *name)
{
    for (size_t i = 0; i < c->n; i++)
        if (strcmp(c->t[i].name, name) == 0)
            return &c->t[i];
    fprintf(stderr, "no tensor %s in the test's checkpoint\n", name);
    exit(2);
}

static inline void ck_remove(ck *c, const char *name)
{
    ck_tensor *t = ck_find(c, name);
    memmove(t, t + 1, (size_t)(c->t + c->n - (t + 1)) * sizeof *t);
    c->n--;
}

static inline uint64_t ck_tensor_bytes(const ck_tensor *t)
{
    uint64_t b = ck_dtype_bytes(t->dtype);
    for (uint32_t i = 0; i < t->rank; i++)
        b *= t->dims[i];
    return b;
}

static inline void ck_shard_name(char name[64], uint32_t shard, uint32_t n)
{
    if (n == 1)
        (void)snprintf(name, 64, "model.safetensors");
    else
        (void)snprintf(name, 64, "model-%05u-of-%05u.safetensors", shard + 1, n);
}

static inline void ck_file(const ck *c, char path[192], const char *name)
{
    (void)snprintf(path, 192, "%s/%s", c->dir, name);
}

static inline void ck_make_dir(ck *c)
{
    const char *tmp = getenv("TMPDIR");
    (void)snprintf(c->dir, sizeof c->dir, "%.60s/delta-test-XXXXXX", tmp ? tmp : "/tmp");
    if (!mkdtemp(c->dir))
        ck_die(c->dir);
}

/* A file of its own making: header text behind its length, then data_bytes of nothing. */
static inline void ck_write_raw(const ck *c, const char *name, const char *header, size_t len,
                                uint64_t data_bytes)
{
    char path[192];
    ck_file(c, path, name);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    uint8_t head[8];
    for (int i = 0; i < 8; i++)
        head[i] = (uint8_t)((uint64_t)len >> (8 * i));
    if (fd < 0 || write(fd, head, 8) != 8 || write(fd, header, len) != (ssize_t)len ||
        ftruncate(fd, (off_t)(8 + len + data_bytes)) < 0)
        ck_die(path);
    close(fd);
}

static inline void ck_write_shard(ck *c, uint32_t shard)
{
    char *text = NULL, name[64], path[192];
    size_t len = 0;
    uint64_t at = 0, shapes = 0;
    int64_t *data = calloc(c->n * 3 + 1, sizeof *data);
    FILE *f = open_memstream(&text, &len);
    if (!f || !data)
        ck_die("memory");
    fputc('{', f);
    for (int first = 1; first >= 0; first--) /* I64 first */
        for (size_t i = 0; i < c->n; i++) {
            ck_tensor *t = &c->t[i];
            const uint64_t bytes = ck_tensor_bytes(t);
            const int small = strcmp(t->dtype, "I64") == 0 && bytes <= sizeof t->data;
            if (t->shard != shard || small != first)
                continue;
            fprintf(f, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[", at ? "," : "", t->name, t->dtype);
            for (uint32_t k = 0; k < t->rank; k++)
                fprintf(f, "%s%llu", k ? "," : "", (unsigned long long)t->dims[k]);
            fprintf(f, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)at,
                    (unsigned long long)(at + bytes));
            if (small) {
                memcpy((char *)data + at, t->data, bytes);
                shapes = at + bytes;
            }
            at += bytes;
        }
    fputc('}', f);
    fclose(f);
    ck_shard_name(name, shard, c->n_shards);
    ck_write_raw(c, name, text, len, at);
    ck_file(c, path, name);
    int fd = open(path, O_WRONLY);
    if (fd < 0 || pwrite(fd, data, shapes, (off_t)(8 + len)) != (ssize_t)shapes)
        ck_die(path);
    close(fd);
    c->bytes += at;
    free(text);
    free(data);
}

/* Shards, and the index where there is more than one. */
static inline void ck_write(ck *c)
{
    if (!c->dir[0])
        ck_make_dir(c);
    c->bytes = 0;
    for (uint32_t s = 0; s < c->n_shards; s++)
        ck_write_shard(c, s);
    if (c->n_shards == 1)
        return;
    char path[192], name[64];
    ck_file(c, path, "model.safetensors.index.json");
    FILE *f = fopen(path, "w");
    if (!f)
        ck_die(path);
    fprintf(f, "{\"metadata\":{\"total_size\":%llu},\"weight_map\":{",
            (unsigned long long)c->bytes);
    for (size_t i = 0; i < c->n; i++) {
        ck_shard_name(name, c->t[i].shard, c->n_shards);
        fprintf(f, "%s\"%s\":\"%s\"", i ? "," : "", c->t[i].name, name);
    }
    fputs("}}", f);
    fclose(f);
}

static inline void ck_done(ck *c)
{
    DIR *d = c->dir[0] ? opendir(c->dir) : NULL;
    for (const struct dirent *e; d && (e = readdir(d)) != NULL;)
        if (e->d_name[0] != '.')
            (void)unlinkat(dirfd(d), e->d_name, 0);
    if (d) {
        closedir(d);
        (void)rmdir(c->dir);
    }
    free(c->t);
    *c = (ck){ 0 };
}

/* ---- a whole model */

enum ck_form { CK_FLOAT, CK_INT8 };

typedef struct ck_spec {
    uint32_t layers, hidden, vocab, q_heads, kv_heads, k_heads, v_heads, experts, width, shared;
    uint32_t vision_depth, vision_hidden, vision_width, vision_positions, shards;
    enum ck_form form; /* of attention and routed experts */
    uint32_t group;    /* INT8: columns of one scale; 0 one scale a row; UINT32_MAX one in all */
    int int8_shared;   /* the shared expert too */
    int fused;         /* experts as two 3-D tensors */
    int mtp, tied;
    const char *prefix, *dtype, *small_dtype; /* small: A_log and norm of DeltaNet */
} ck_spec;

static const ck_spec ck_35b = {
    .layers = 40,
    .hidden = 2048,
    .vocab = 248320,
    .q_heads = 16,
    .kv_heads = 2,
    .k_heads = 16,
    .v_heads = 32,
    .experts = 256,
    .width = 512,
    .shared = 512,
    .vision_depth = 27,
    .vision_hidden = 1152,
    .vision_width = 4304,
    .vision_positions = 2304,
    .shards = 8,
    .form = CK_FLOAT,
    .mtp = 1,
    .prefix = "model.language_model.",
    .dtype = "BF16",
    .small_dtype = "BF16",
};

/* Four layers, widths that are no multiples of 4 (rows of packed weights are padded). */
static const ck_spec ck_small = {
    .layers = 4,
    .hidden = 66,
    .vocab = 50,
    .q_heads = 2,
    .kv_heads = 1,
    .k_heads = 1,
    .v_heads = 2,
    .experts = 3,
    .width = 10,
    .shared = 6,
    .vision_depth = 0,
    .shards = 2,
    .form = CK_INT8,
    .mtp = 0,
    .prefix = "model.language_model.",
    .dtype = "BF16",
    .small_dtype = "F32",
};

static inline void ck_int8(ck *c, const ck_spec *s, const char *module, uint64_t stacked,
                           uint64_t out, uint64_t in)
{
    const uint64_t n = s->group && s->group != UINT32_MAX ? in / s->group : 1;
    if (stacked) {
        ck_add(c, "I32", 3, stacked, out, (in + 3) / 4, "%s.weight_packed", module);
        ck_add(c, s->dtype, 3, stacked, out, n, "%s.weight_scale", module);
    } else {
        ck_add(c, "I32", 2, out, (in + 3) / 4, 0, "%s.weight_packed", module);
        if (s->group == UINT32_MAX)
            ck_add(c, s->dtype, 1, 1, 0, 0, "%s.weight_scale", module);
        else
            ck_add(c, s->dtype, 2, out, n, 0, "%s.weight_scale", module);
    }
    ck_tensor *t = ck_add(c, "I64", 1, stacked ? 3 : 2, 0, 0, "%s.weight_shape", module);
    int64_t *v = t->data;
    if (stacked)
        *v++ = (int64_t)stacked;
    v[0] = (int64_t)out;
    v[1] = (int64_t)in;
}

static inline void ck_linear(ck *c, const ck_spec *s, int int8, const char *base, const char *name,
                             uint64_t out, uint64_t in)
{
    char module[160];
    (void)snprintf(module, sizeof module, "%.100s%.50s", base, name);
    if (int8)
        ck_int8(c, s, module, 0, out, in);
    else
        ck_add(c, s->dtype, 2, out, in, 0, "%s.weight", module);
}

/* One layer; form and fused as the caller says (MTP stays plain in quantized checkpoints). */
static inline void ck_layer(ck *c, const ck_spec *s, const char *base, int attention, int int8,
                            int fused)
{
    const uint64_t H = s->hidden, A = 256ull * s->q_heads, V = 128ull * s->v_heads;
    const uint64_t channels = 256ull * s->k_heads + V, I = s->width, E = s->experts;
    char sub[128], module[160];
    ck_add(c, s->dtype, 1, H, 0, 0, "%sinput_layernorm.weight", base);
    ck_add(c, s->dtype, 1, H, 0, 0, "%spost_attention_layernorm.weight", base);
    if (attention) {
        (void)snprintf(sub, sizeof sub, "%.100sself_attn.", base);
        ck_linear(c, s, int8, sub, "q_proj", 2 * A, H);
        ck_linear(c, s, int8, sub, "k_proj", 256ull * s->kv_heads, H);
        ck_linear(c, s, int8, sub, "v_proj", 256ull * s->kv_heads, H);
        ck_linear(c, s, int8, sub, "o_proj", H, A);
        ck_add(c, s->dtype, 1, 256, 0, 0, "%sq_norm.weight", sub);
        ck_add(c, s->dtype, 1, 256, 0, 0, "%sk_norm.weight", sub);
    } else {
        (void)snprintf(sub, sizeof sub, "%.100slinear_attn.", base);
        ck_linear(c, s, 0, sub, "in_proj_qkv", channels, H);
        ck_linear(c, s, 0, sub, "in_proj_z", V, H);
        ck_linear(c, s, 0, sub, "in_proj_b", s->v_heads, H);
        ck_linear(c, s, 0, sub, "in_proj_a", s->v_heads, H);
        ck_linear(c, s, 0, sub, "out_proj", H, V);
        ck_add(c, s->dtype, 3, channels, 1, 4, "%sconv1d.weight", sub);
        ck_add(c, s->small_dtype, 1, s->v_heads, 0, 0, "%sA_log", sub);
        ck_add(c, s->dtype, 1, s->v_heads, 0, 0, "%sdt_bias", sub);
        ck_add(c, s->small_dtype, 1, 128, 0, 0, "%snorm.weight", sub);
    }
    ck_linear(c, s, 0, base, "mlp.gate", E, H);
    (void)snprintf(module, sizeof module, "%.100smlp.experts.", base);
    if (fused && !int8) {
        ck_add(c, s->dtype, 3, E, 2 * I, H, "%sgate_up_proj", module);
        ck_add(c, s->dtype, 3, E, H, I, "%sdown_proj", module);
    } else if (fused) {
        (void)snprintf(module, sizeof module, "%.100smlp.experts.gate_up_proj", base);
        ck_int8(c, s, module, E, 2 * I, H);
        (void)snprintf(module, sizeof module, "%.100smlp.experts.down_proj", base);
        ck_int8(c, s, module, E, H, I);
    }
    for (uint32_t e = 0; e < E && !fused; e++) {
        (void)snprintf(sub, sizeof sub, "%.90smlp.experts.%u.", base, e);
        ck_linear(c, s, int8, sub, "gate_proj", I, H);
        ck_linear(c, s, int8, sub, "up_proj", I, H);
        ck_linear(c, s, int8, sub, "down_proj", H, I);
    }
    (void)snprintf(sub, sizeof sub, "%.100smlp.shared_expert.", base);
    ck_linear(c, s, int8 && s->int8_shared, sub, "gate_proj", s->shared, H);
    ck_linear(c, s, int8 && s->int8_shared, sub, "up_proj", s->shared, H);
    ck_linear(c, s, int8 && s->int8_shared, sub, "down_proj", H, s->shared);
    ck_linear(c, s, 0, base, "mlp.shared_expert_gate", 1, H);
}

static inline void ck_with_bias(ck *c, uint64_t out, uint64_t in, const char *name)
{
    if (in)
        ck_add(c, "BF16", 2, out, in, 0, "model.visual.%s.weight", name);
    else
        ck_add(c, "BF16", 1, out, 0, 0, "model.visual.%s.weight", name);
    ck_add(c, "BF16", 1, out, 0, 0, "model.visual.%s.bias", name);
}

static inline void ck_vision(ck *c, const ck_spec *s)
{
    const uint64_t h = s->vision_hidden, w = s->vision_width;
    char name[64];
    ck_tensor *t = ck_add(c, "BF16", 5, h, 3, 2, "model.visual.patch_embed.proj.weight");
    t->dims[3] = t->dims[4] = 16;
    ck_add(c, "BF16", 1, h, 0, 0, "model.visual.patch_embed.proj.bias");
    ck_add(c, "BF16", 2, s->vision_positions, h, 0, "model.visual.pos_embed.weight");
    for (uint32_t i = 0; i < s->vision_depth; i++) {
        static const char *const parts[] = { "norm1",     "norm2",          "attn.qkv",
                                             "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2" };
        const uint64_t out[] = { h, h, 3 * h, h, w, h }, in[] = { 0, 0, h, h, h, w };
        for (int k = 0; k < 6; k++) {
            (void)snprintf(name, sizeof name, "blocks.%u.%s", i, parts[k]);
            ck_with_bias(c, out[k], in[k], name);
        }
    }
    ck_with_bias(c, h, 0, "merger.norm");
    ck_with_bias(c, 4 * h, 4 * h, "merger.linear_fc1");
    ck_with_bias(c, s->hidden, 4 * h, "merger.linear_fc2");
}

static inline void ck_model(ck *c, const ck_spec *s)
{
    char base[96];
    ck_add(c, s->dtype, 2, s->vocab, s->hidden, 0, "%sembed_tokens.weight", s->prefix);
    for (uint32_t i = 0; i < s->layers; i++) {
        c->shard = i * s->shards / s->layers;
        (void)snprintf(base, sizeof base, "%slayers.%u.", s->prefix, i);
        ck_layer(c, s, base, (i + 1) % 4 == 0, s->form == CK_INT8, s->fused);
    }
    ck_add(c, s->dtype, 1, s->hidden, 0, 0, "%snorm.weight", s->prefix);
    ck_add(c, s->dtype, 2, s->vocab, s->hidden, 0, "lm_head.weight");
    if (s->vision_depth)
        ck_vision(c, s);
    if (s->mtp) {
        ck_add(c, s->dtype, 2, s->hidden, 2ull * s->hidden, 0, "mtp.fc.weight");
        ck_add(c, s->dtype, 1, s->hidden, 0, 0, "mtp.norm.weight");
        ck_add(c, s->dtype, 1, s->hidden, 0, 0, "mtp.pre_fc_norm_embedding.weight");
        ck_add(c, s->dtype, 1, s->hidden, 0, 0, "mtp.pre_fc_norm_hidden.weight");
        ck_layer(c, s, "mtp.layers.0.", 1, 0, 1);
    }
}

/* config.json of that model; free() it. */
static inline char *ck_config(const ck_spec *s)
{
    char *text;
    if (asprintf(&text,
                 "{\"model_type\":\"qwen3_5_moe\",\"tie_word_embeddings\":%s,\"text_config\":{"
                 "\"num_hidden_layers\":%u,\"hidden_size\":%u,\"vocab_size\":%u,"
                 "\"full_attention_interval\":4,\"rms_norm_eps\":1e-06,\"hidden_act\":\"silu\","
                 "\"num_attention_heads\":%u,\"num_key_value_heads\":%u,\"head_dim\":256,"
                 "\"linear_num_key_heads\":%u,\"linear_num_value_heads\":%u,"
                 "\"linear_key_head_dim\":128,\"linear_value_head_dim\":128,"
                 "\"linear_conv_kernel_dim\":4,\"num_experts\":%u,\"num_experts_per_tok\":%u,"
                 "\"moe_intermediate_size\":%u,\"shared_expert_intermediate_size\":%u,"
                 "\"max_position_embeddings\":262144,\"mtp_num_hidden_layers\":%d,"
                 "\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":10000000,"
                 "\"partial_rotary_factor\":0.25,\"mrope_section\":[11,11,10]}}}",
                 s->tied ? "true" : "false", s->layers, s->hidden, s->vocab, s->q_heads,
                 s->kv_heads, s->k_heads, s->v_heads, s->experts, s->experts < 8 ? s->experts : 8,
                 s->width, s->shared, s->mtp) < 0)
        ck_die("memory");
    return text;
}

#endif
