/* delta-inspect.c -- what is in a checkpoint, and does it fit.
 *
 * Reads config.json, the directory of the shards and the table of weights with
 * the functions the engine loads with, and prints what they found. It reads no
 * weights, so it is as quick on 35 GB as on 3 MB.
 *
 * Exit: 0 the checkpoint can be served, 1 it cannot, 2 wrong arguments. */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/sha256.h"
#include "model/bind.h"
#include "model/shape.h"
#include "model/weights.h"

enum { SMALL_FILE = 16 << 20 };

static void print_shape(const de_shape *s)
{
    printf("layers        %u: %u Gated DeltaNet, %u attention\n", s->n_layers, s->n_gdn, s->n_attn);
    printf("hidden        %u, vocabulary %u, context %u, %s head\n", s->hidden, s->vocab,
           s->ctx_max, s->tied_embeddings ? "tied" : "own");
    printf("attention     %u query heads, %u key/value heads of %d, %u rotary dimensions\n",
           s->q_heads, s->kv_heads, DE_ATTN_DIM, s->rotary_dims);
    printf("rope          theta %.10g, sections %u+%u+%u", s->rope_theta, s->mrope_section[0],
           s->mrope_section[1], s->mrope_section[2]);
    if (s->yarn)
        printf(", YaRN factor %g over %u, beta %g..%g, attention factor %.9g", s->yarn_factor,
               s->yarn_original_ctx, s->yarn_beta_slow, s->yarn_beta_fast,
               s->yarn_attention_factor);
    printf("\nDeltaNet      %u key heads, %u value heads of %d, %u channels\n", s->gdn_k_heads,
           s->gdn_v_heads, DE_GDN_DIM, s->gdn_channels);
    printf("experts       %u of %u, width %u, shared %u\n", s->top_k, s->n_experts, s->moe_width,
           s->shared_width);
    if (s->has_vision)
        printf("vision        depth %u, hidden %u, patch %u\n", s->vision.depth, s->vision.hidden,
               s->vision.patch);
}

static void print_weights(const de_weights *w)
{
    enum { DTYPES = DE_I8 + 1 };
    uint64_t n[DTYPES] = { 0 }, bytes[DTYPES] = { 0 }, all = 0;
    uint32_t shards = 0;
    for (size_t i = 0; i < de_weights_count(w); i++) {
        const de_tensor *t = de_weights_at(w, i);
        n[t->dtype]++;
        bytes[t->dtype] += t->bytes;
        all += t->bytes;
        if (t->shard >= shards)
            shards = t->shard + 1;
    }
    printf("tensors       %zu in %u shard%s, %.3f GB\n", de_weights_count(w), shards,
           shards == 1 ? "" : "s", (double)all / 1e9);
    for (int d = 0; d < DTYPES; d++)
        if (n[d])
            printf("  %-5s       %llu tensors, %.3f GB\n", de_dtype_name((enum de_dtype)d),
                   (unsigned long long)n[d], (double)bytes[d] / 1e9);
}

static void print_directory(const de_weights *w)
{
    for (size_t i = 0; i < de_weights_count(w); i++) {
        const de_tensor *t = de_weights_at(w, i);
        const char *path = de_weights_shard_path(w, t->shard), *slash = strrchr(path, '/');
        printf("%s\t%s\t[", t->name, de_dtype_name(t->dtype));
        for (uint32_t k = 0; k < t->rank; k++)
            printf("%s%llu", k ? "," : "", (unsigned long long)t->dims[k]);
        printf("]\t%s\t%llu\t%llu\n", slash ? slash + 1 : path, (unsigned long long)t->offset,
               (unsigned long long)t->bytes);
    }
}

static void print_template(const char *dir)
{
    char *path = de_path_join(dir, "chat_template.jinja"), *text = NULL, hex[65];
    size_t len;
    if (path && de_file_read(path, SMALL_FILE, &text, &len, NULL) == 0) {
        de_sha256_hex(text, len, hex);
        printf("template      sha256 %s\n", hex);
    }
    free(text);
    free(path);
}

static int inspect(const char *dir, bool list)
{
    delta_error err = { 0 };
    de_shape shape;
    de_weights *w = NULL;
    de_binding *b = NULL;
    char *report = NULL;
    int shape_r = de_shape_read(dir, &shape, &err);
    if (shape_r < 0)
        fprintf(stderr, "%s: %s\n", dir, err.text);
    else if (!list)
        print_shape(&shape);
    /* the shards are looked at even if config.json is bad: their faults are worth knowing too */
    int r = de_weights_open(dir, &w, &err);
    if (r < 0)
        fprintf(stderr, "%s: %s\n", dir, err.text);
    else if (list)
        print_directory(w);
    else
        print_weights(w);
    if (r == 0 && shape_r == 0) {
        r = de_bind_report(w, &shape, &b, &report, &err);
        if (r < 0)
            fprintf(stderr, "%s: %s\n%s", dir, err.text, report ? report : "");
    }
    if (b && !list) {
        printf("weights       %s, %llu parameters of text\n", b->quantization,
               (unsigned long long)b->n_parameters);
        printf("not bound     %u vision tensors, %u MTP tensors\n", b->n_vision_tensors,
               b->n_mtp_tensors);
        print_template(dir);
    }
    free(report);
    de_binding_free(b);
    de_weights_free(w);
    return r < 0 || shape_r < 0 ? 1 : 0;
}

static const char usage[] =
    "usage: delta-inspect [--list] DIR\n"
    "Prints what the checkpoint in DIR holds and whether it can be served.\n"
    "  --list  every tensor: name, dtype, shape, shard, offset, bytes (tabs between)\n"
    "Exit status: 0 it can be served, 1 it cannot (all mismatches on standard error), 2 usage.\n";

int main(int argc, char **argv)
{
    static const struct option options[] = { { "list", no_argument, NULL, 'l' },
                                             { "help", no_argument, NULL, 'h' },
                                             { 0 } };
    bool list = false;
    for (int c; (c = getopt_long(argc, argv, "lh", options, NULL)) != -1;) {
        if (c == 'h') {
            (void)fputs(usage, stdout);
            return 0;
        }
        if (c != 'l') {
            (void)fputs(usage, stderr);
            return 2;
        }
        list = true;
    }
    if (optind + 1 != argc) {
        (void)fputs(usage, stderr);
        return 2;
    }
    int r = inspect(argv[optind], list);
    if (fflush(stdout) != 0) {
        perror("delta-inspect: standard output");
        return 1;
    }
    return r;
}
