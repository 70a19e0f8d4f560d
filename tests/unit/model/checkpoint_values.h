/* checkpoint_values.h -- random weights into a checkpoint of checkpoint.h, so that it can run.
 *
 * Sizes are those of a model at the start of its training: projections keep the length of what they
 * take, norms are away from their neutral value, scales have either sign, gates and decays spread. */
#ifndef CHECKPOINT_VALUES_H
#define CHECKPOINT_VALUES_H

#include <math.h>

#include "unit/model/checkpoint.h"

#include "base/file.h"
#include "model/bind.h"

typedef struct ckv_random {
    uint64_t state;
} ckv_random;

static inline uint32_t ckv_bits(ckv_random *r)
{
    uint64_t z = r->state += 0x9E3779B97F4A7C15; /* SplitMix64: neighbouring seeds are unlike */
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return (uint32_t)((z ^ z >> 31) >> 32);
}

static inline uint32_t ckv_below(ckv_random *r, uint32_t n)
{
    return (uint32_t)((uint64_t)ckv_bits(r) * n >> 32);
}

static inline double ckv_within(ckv_random *r, double low, double high)
{
    return low + (high - low) * (ckv_bits(r) / 4294967296.0);
}

static inline void ckv_put(uint8_t *to, enum de_dtype dtype, size_t i, double value)
{
    const float f = (float)value;
    uint32_t u;
    memcpy(&u, &f, 4);
    uint16_t h = (uint16_t)(u >> 16); /* BF16, towards zero */
    if (dtype == DE_F32) {
        memcpy(to + i * 4, &u, 4);
        return;
    }
    if (dtype == DE_F16) { /* towards zero; below the normal numbers: zero */
        const int32_t e = (int32_t)(u >> 23 & 255) - 112;
        h = (uint16_t)((u >> 16 & 0x8000) | (e <= 0 ? 0 : (uint32_t)e << 10 | (u >> 13 & 0x3FF)));
    }
    memcpy(to + i * 2, &h, 2);
}

static inline int ckv_ends(const char *name, const char *end)
{
    const size_t n = strlen(name), k = strlen(end);
    return n >= k && strcmp(name + n - k, end) == 0;
}

/* The values of one tensor, by its name; in: columns of the linear. */
static inline void ckv_fill(const de_tensor *t, ckv_random *r, uint8_t *to, uint64_t in)
{
    if (ckv_ends(t->name, ".weight_packed")) {
        for (size_t i = 0; i < t->bytes; i++)
            to[i] = (uint8_t)ckv_bits(r);
        return;
    }
    double low, high;
    const size_t n = t->bytes / de_dtype_bytes(t->dtype);
    const double wide = sqrt(3.0 / (double)in);
    if (ckv_ends(t->name, ".weight_scale"))
        low = 0.5 * wide / 128, high = 1.5 * wide / 128;
    else if (ckv_ends(t->name, "A_log"))
        low = -3, high = 2.7;
    else if (ckv_ends(t->name, "dt_bias"))
        low = -4, high = 0;
    else if (ckv_ends(t->name, "linear_attn.norm.weight"))
        low = 0.5, high = 1.5;
    else if (strstr(t->name, "norm"))
        low = -0.5, high = 0.5;
    else if (ckv_ends(t->name, "conv1d.weight"))
        low = -0.8, high = 0.8;
    else if (ckv_ends(t->name, "embed_tokens.weight"))
        low = -1, high = 1;
    else if (ckv_ends(t->name, "mlp.gate.weight"))
        low = -3 * wide, high = 3 * wide;
    else
        low = -wide, high = wide;
    for (size_t i = 0; i < n; i++) {
        const double v = ckv_within(r, low, high);
        ckv_put(to, t->dtype, i, ckv_ends(t->name, ".weight_scale") && ckv_bits(r) >> 31 ? -v : v);
    }
}

static inline void ckv_write_at(const char *path, const void *p, size_t len, uint64_t offset)
{
    const int fd = open(path, O_WRONLY);
    if (fd < 0 || pwrite(fd, p, len, (off_t)offset) != (ssize_t)len)
        ck_die(path);
    close(fd);
}

/* Values for all tensors of the written checkpoint c, and config.json. */
static inline void ckv_write(const ck *c, const char *config, uint64_t seed)
{
    char path[192];
    ck_file(c, path, "config.json");
    FILE *f = fopen(path, "w");
    if (!f || fputs(config, f) < 0 || fclose(f) != 0)
        ck_die(path);
    de_weights *w;
    delta_error err;
    if (de_weights_open(c->dir, &w, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        exit(2);
    }
    ckv_random r = { seed };
    for (size_t i = 0; i < de_weights_count(w); i++) {
        const de_tensor *t = de_weights_at(w, i);
        if (t->dtype == DE_I64)
            continue;
        /* a scale's linear has its columns in the shape beside it */
        uint64_t in = t->dims[t->rank - 1];
        if (ckv_ends(t->name, ".weight_scale")) {
            char packed[200];
            (void)snprintf(packed, sizeof packed, "%.*spacked", (int)strlen(t->name) - 5, t->name);
            const de_tensor *p = de_weights_find(w, packed);
            in = p ? p->dims[p->rank - 1] * 4 : in;
        }
        uint8_t *values = malloc(t->bytes + 1);
        if (!values)
            ck_die("memory");
        ckv_fill(t, &r, values, in);
        ckv_write_at(de_weights_shard_path(w, t->shard), values, t->bytes, t->offset);
        free(values);
    }
    de_weights_free(w);
}

/* text with the first `from` replaced; frees text. (Inlined, gcc 12 sees a pointer dangle that does
 * not.) */
__attribute__((noinline, unused)) static char *ckv_replace(char *text, const char *from,
                                                           const char *to)
{
    const char *at = strstr(text, from);
    const size_t len = strlen(text), k = strlen(from), m = strlen(to);
    char *out = calloc(len + m + 1, 1);
    if (!at || !out)
        ck_die(from);
    const size_t before = (size_t)(at - text);
    memcpy(out, text, before);
    memcpy(out + before, to, m);
    memcpy(out + before + m, text + before + k, len - before - k);
    free(text);
    return out;
}

#endif
