/* test_bind.c -- names to the table of weights: the real model's shape, every form, every fault. */
#include "model/bind.h"

#include <time.h>

#include "base/file.h"
#include "checkpoint.h"
#include "support/tap.h"

typedef struct result {
    int r;
    delta_error err;
    de_weights *w;
    de_binding *b;
    char *report;
    double seconds; /* of opening and binding */
} result;

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void bind_dir(const char *dir, const char *config, result *x)
{
    de_shape shape;
    *x = (result){ 0 };
    const double start = now_s();
    x->r = de_shape_parse(config, strlen(config), &shape, &x->err);
    if (x->r == 0)
        x->r = de_weights_open(dir, &x->w, &x->err);
    if (x->r == 0)
        x->r = de_bind_report(x->w, &shape, &x->b, &x->report, &x->err);
    x->seconds = now_s() - start;
}

static void done(result *x)
{
    free(x->report);
    de_binding_free(x->b);
    de_weights_free(x->w);
}

/* Writes, binds and clears away the checkpoint's files; the shards stay open. */
static void bind_ck(ck *c, const ck_spec *s, result *x)
{
    char *config = ck_config(s);
    ck_write(c);
    bind_dir(c->dir, config, x);
    if (x->r < 0 && !x->err.text[0])
        TAP_FAIL("an error without a text");
    free(config);
}

static void check_ref(const result *x, const de_ref *r, const char *name, uint64_t at,
                      uint64_t bytes)
{
    const de_tensor *t = de_weights_find(x->w, name);
    if (!t) {
        TAP_FAIL("no tensor %s", name);
        return;
    }
    CHECK_EQ(r->shard, t->shard);
    CHECK_EQ(r->dtype, t->dtype);
    CHECK_EQ(r->offset, t->offset + at);
    CHECK_EQ(r->bytes, bytes);
}

/* ---- the real model's shape: 35 B parameters, spec'd counts and sizes */

static void check_35b(const ck_spec *s, size_t n_tensors, uint64_t bytes, const char *quantization)
{
    ck c = { 0 };
    result x;
    ck_model(&c, s);
    bind_ck(&c, s, &x);
    if (x.r < 0)
        TAP_FAIL("%s", x.err.text);
    if (x.r == 0) {
        printf("# %s: %zu tensors opened and bound in %.2f s\n", x.b->quantization,
               de_weights_count(x.w), x.seconds);
        CHECK_STR(x.b->quantization, quantization);
        CHECK_EQ(de_weights_count(x.w), n_tensors);
        CHECK_EQ(x.b->n_parameters, 34660610688);
        CHECK_EQ(x.b->n_vision_tensors, 333);
        CHECK_EQ(x.b->n_mtp_tensors, s->mtp ? 19 : 0);
        if (bytes)
            CHECK_EQ(c.bytes, bytes);
        /* quadratic look-ups would take minutes; sanitizers and a busy machine take a few seconds */
        CHECK(x.seconds < 20);
        const de_layer_ref *last = &x.b->layers[39];
        CHECK_EQ(last->kind, DE_LAYER_ATTN);
        CHECK_EQ(x.b->layers[38].kind, DE_LAYER_GDN);
        CHECK_EQ(last->experts[255].down.out, 2048);
        CHECK_EQ(last->experts[255].down.in, 512);
        CHECK_EQ(last->q.out, 8192);
        CHECK_EQ(x.b->layers[0].qkv.out, 8192);
    }
    done(&x);
    ck_done(&c);
}

TEST(binds_the_35b_checkpoint_in_bf16_with_fused_experts)
{
    ck_spec s = ck_35b;
    s.fused = 1;
    check_35b(&s, 1045, 71903645408, "bf16");
}

TEST(binds_the_35b_checkpoint_in_int8_with_a_scale_a_row)
{
    ck_spec s = ck_35b;
    s.form = CK_INT8;
    s.mtp = 0;
    /* 3 for each of 30,720 experts' linears and 40 of attention, 573 plain ones, vision */
    check_35b(&s, 3 * (30720 + 40) + 573 + 333, 0, "int8 channel");
}

TEST(binds_the_35b_checkpoint_in_int8_with_groups_of_128)
{
    ck_spec s = ck_35b;
    s.form = CK_INT8;
    s.group = 128;
    s.int8_shared = 1;
    s.shards = 26;
    check_35b(&s, 3 * (30720 + 40 + 120) + 573 - 120 + 333 + 19, 0, "int8 group 128");
}

/* ---- forms */

TEST(bind_int8_rows_that_are_no_multiple_of_4_are_padded)
{
    ck c = { 0 };
    result x;
    ck_model(&c, &ck_small);
    bind_ck(&c, &ck_small, &x);
    CHECK_STR(x.err.text, "");
    REQUIRE(x.r == 0);
    const de_linear_ref *gate = &x.b->layers[2].experts[1].gate, *k = &x.b->layers[3].k;
    CHECK_EQ(gate->format, DE_LINEAR_INT8);
    CHECK_EQ(gate->out, 10);
    CHECK_EQ(gate->in, 66);
    CHECK_EQ(gate->row_bytes, 68);
    CHECK_EQ(gate->group, 66);
    CHECK(!gate->scale_whole);
    check_ref(&x, &gate->weight,
              "model.language_model.layers.2.mlp.experts.1.gate_proj.weight_packed", 0, 680);
    check_ref(&x, &gate->scale,
              "model.language_model.layers.2.mlp.experts.1.gate_proj.weight_scale", 0, 20);
    check_ref(&x, &k->weight, "model.language_model.layers.3.self_attn.k_proj.weight_packed", 0,
              256 * 68);
    const de_linear_ref *z = &x.b->layers[0].z;
    CHECK_EQ(z->format, DE_LINEAR_FLOAT);
    CHECK_EQ(z->row_bytes, 132);
    check_ref(&x, &z->weight, "model.language_model.layers.0.linear_attn.in_proj_z.weight", 0,
              256 * 132);
    check_ref(&x, &x.b->layers[0].A_log, "model.language_model.layers.0.linear_attn.A_log", 0, 8);
    CHECK_EQ(x.b->layers[0].A_log.dtype, DE_F32);
    check_ref(&x, &x.b->head.weight, "lm_head.weight", 0, 50 * 132);
    check_ref(&x, &x.b->embed.weight, "model.language_model.embed_tokens.weight", 0, 50 * 132);
    done(&x);
    ck_done(&c);
}

TEST(bind_takes_groups_that_divide_the_row)
{
    ck c = { 0 };
    result x;
    ck_spec s = ck_small;
    s.hidden = 64, s.width = 32, s.group = 32;
    ck_model(&c, &s);
    bind_ck(&c, &s, &x);
    CHECK_STR(x.err.text, "");
    REQUIRE(x.r == 0);
    CHECK_STR(x.b->quantization, "int8 group 32");
    CHECK_EQ(x.b->layers[3].o.group, 32);
    CHECK_EQ(x.b->layers[3].o.scale.bytes, 64 * (512 / 32) * 2);
    done(&x);
    ck_done(&c);
}

TEST(bind_takes_one_scale_for_a_tensor)
{
    ck c = { 0 };
    result x;
    ck_spec s = ck_small;
    s.group = UINT32_MAX;
    ck_model(&c, &s);
    bind_ck(&c, &s, &x);
    CHECK_STR(x.err.text, "");
    REQUIRE(x.r == 0);
    CHECK_STR(x.b->quantization, "int8 tensor");
    CHECK(x.b->layers[3].o.scale_whole);
    CHECK_EQ(x.b->layers[3].o.scale.bytes, 2);
    done(&x);
    ck_done(&c);
}

TEST(bind_takes_scales_of_every_float_dtype_and_as_a_vector)
{
    static const struct {
        const char *name, *dtype;
        uint32_t rank;
        enum de_dtype want;
    } cases[] = { { "q_proj", "F32", 2, DE_F32 },
                  { "k_proj", "F16", 2, DE_F16 },
                  { "v_proj", "BF16", 1, DE_BF16 } };
    ck c = { 0 };
    result x;
    ck_model(&c, &ck_small);
    for (int i = 0; i < 3; i++) {
        char name[160];
        (void)snprintf(name, sizeof name, "model.language_model.layers.3.self_attn.%s.weight_scale",
                       cases[i].name);
        ck_tensor *t = ck_find(&c, name);
        (void)snprintf(t->dtype, sizeof t->dtype, "%s", cases[i].dtype);
        t->rank = cases[i].rank;
    }
    bind_ck(&c, &ck_small, &x);
    CHECK_STR(x.err.text, "");
    REQUIRE(x.r == 0);
    const de_layer_ref *l = &x.b->layers[3];
    CHECK_EQ(l->q.scale.dtype, DE_F32);
    CHECK_EQ(l->k.scale.dtype, DE_F16);
    CHECK_EQ(l->v.scale.dtype, DE_BF16);
    CHECK_EQ(l->v.group, 66);
    done(&x);
    ck_done(&c);
}

/* Both layouts of experts lead to the same rows: gate is the upper half of gate_up. */
TEST(bind_cuts_fused_experts_into_linears)
{
    static const char base[] = "model.language_model.layers.1.mlp.experts.";
    for (int int8 = 0; int8 < 2; int8++) {
        ck c = { 0 };
        result x;
        ck_spec s = ck_small;
        s.fused = 1;
        s.form = int8 ? CK_INT8 : CK_FLOAT;
        ck_model(&c, &s);
        bind_ck(&c, &s, &x);
        CHECK_STR(x.err.text, "");
        REQUIRE(x.r == 0);
        char both[160], down[160], scale[160];
        (void)snprintf(both, sizeof both, "%sgate_up_proj%s", base, int8 ? ".weight_packed" : "");
        (void)snprintf(down, sizeof down, "%sdown_proj%s", base, int8 ? ".weight_packed" : "");
        (void)snprintf(scale, sizeof scale, "%sgate_up_proj.weight_scale", base);
        const uint64_t row = int8 ? 68 : 132, row_down = int8 ? 12 : 20;
        for (uint32_t e = 0; e < 3; e++) {
            const de_expert_ref *r = &x.b->layers[1].experts[e];
            CHECK_EQ(r->gate.out, 10);
            CHECK_EQ(r->gate.in, 66);
            CHECK_EQ(r->down.out, 66);
            CHECK_EQ(r->down.in, 10);
            CHECK_EQ(r->up.row_bytes, row);
            CHECK_EQ(r->down.row_bytes, row_down);
            check_ref(&x, &r->gate.weight, both, (e * 20) * row, 10 * row);
            check_ref(&x, &r->up.weight, both, (e * 20 + 10) * row, 10 * row);
            check_ref(&x, &r->down.weight, down, e * 66 * row_down, 66 * row_down);
            if (int8)
                check_ref(&x, &r->up.scale, scale, (e * 20 + 10) * 2, 20);
        }
        done(&x);
        ck_done(&c);
    }
}

TEST(bind_accepts_the_three_prefixes)
{
    static const char *const prefixes[] = { "model.language_model.", "language_model.model.",
                                            "model." };
    for (int i = 0; i < 3; i++) {
        ck c = { 0 };
        result x;
        ck_spec s = ck_small;
        s.prefix = prefixes[i];
        ck_model(&c, &s);
        if (i == 1)
            (void)strcpy(ck_find(&c, "lm_head.weight")->name, "language_model.lm_head.weight");
        bind_ck(&c, &s, &x);
        CHECK_EQ(x.r, 0);
        CHECK_STR(x.err.text, "");
        done(&x);
        ck_done(&c);
    }
}

TEST(bind_takes_the_embedding_as_head_only_if_tied)
{
    for (int tied = 0; tied < 2; tied++) {
        ck c = { 0 };
        result x;
        ck_model(&c, &ck_small);
        ck_remove(&c, "lm_head.weight");
        ck_spec s = ck_small;
        s.tied = tied;
        bind_ck(&c, &s, &x);
        CHECK_EQ(x.r, tied ? 0 : DELTA_EFORMAT);
        if (tied && x.r == 0)
            CHECK(memcmp(&x.b->head.weight, &x.b->embed.weight, sizeof(de_ref)) == 0);
        if (!tied)
            CHECK(strstr(x.err.text, "lm_head.weight is missing") != NULL);
        done(&x);
        ck_done(&c);
    }
}

TEST(bind_counts_vision_and_mtp_but_does_not_bind_them)
{
    ck c = { 0 };
    result x;
    ck_spec s = ck_small;
    s.vision_depth = 1, s.vision_hidden = 16, s.vision_width = 20, s.vision_positions = 16;
    s.mtp = 1;
    ck_model(&c, &s);
    ck_add(&c, "I32", 2, 4, 4, 0, "mtp.fc.qweight"); /* foreign, but none of our business yet */
    bind_ck(&c, &s, &x);
    CHECK_STR(x.err.text, "");
    REQUIRE(x.r == 0);
    CHECK_EQ(x.b->n_vision_tensors, 12 + 3 + 6);
    CHECK_EQ(x.b->n_mtp_tensors, 20);
    done(&x);
    ck_done(&c);
}

/* ---- faults */

#define L3 "model.language_model.layers.3.self_attn."
#define E1 "model.language_model.layers.1.mlp.experts.2."
#define G0 "model.language_model.layers.0.linear_attn."

static void break_missing(ck *c)
{
    ck_remove(c, L3 "k_norm.weight");
}
static void break_shape(ck *c)
{
    ck_find(c, G0 "conv1d.weight")->dims[2] = 3;
}
static void break_rank(ck *c)
{
    ck_find(c, G0 "A_log")->rank = 2;
    ck_find(c, G0 "A_log")->dims[1] = 1;
}
static void break_dtype(ck *c)
{
    (void)strcpy(ck_find(c, G0 "dt_bias")->dtype, "I32");
}
static void break_packed_dtype(ck *c)
{
    (void)strcpy(ck_find(c, L3 "q_proj.weight_packed")->dtype, "F32");
}
static void break_packed_shape(ck *c)
{
    ck_find(c, L3 "q_proj.weight_packed")->dims[1]++;
}
static void break_bits(ck *c)
{
    ck_find(c, L3 "q_proj.weight_packed")->dims[1] = 9;
}
static void break_scale_rows(ck *c)
{
    ck_find(c, E1 "up_proj.weight_scale")->dims[0] = 11;
}
static void break_scale_groups(ck *c)
{
    ck_find(c, E1 "up_proj.weight_scale")->dims[1] = 7;
}
static void break_scale_none(ck *c)
{
    ck_find(c, E1 "up_proj.weight_scale")->dims[1] = 0;
}
static void break_scale_dtype(ck *c)
{
    (void)strcpy(ck_find(c, E1 "up_proj.weight_scale")->dtype, "I32");
}
static void break_scale_missing(ck *c)
{
    ck_remove(c, E1 "up_proj.weight_scale");
}
static void break_packed_missing(ck *c)
{
    ck_remove(c, E1 "up_proj.weight_packed");
}
static void break_weight_shape(ck *c)
{
    ck_find(c, E1 "down_proj.weight_shape")->data[1] = 12;
}
static void break_weight_shape_negative(ck *c)
{
    ck_find(c, E1 "down_proj.weight_shape")->data[0] = INT64_MIN;
}
static void break_weight_shape_dtype(ck *c)
{
    (void)strcpy(ck_find(c, E1 "down_proj.weight_shape")->dtype, "I32");
}
static void break_weight_shape_count(ck *c)
{
    ck_find(c, E1 "down_proj.weight_shape")->dims[0] = 1;
}
static void break_both_forms(ck *c)
{
    ck_add(c, "BF16", 2, 1024, 66, 0, L3 "q_proj.weight");
}
static void break_unknown(ck *c)
{
    ck_add(c, "BF16", 1, 3, 0, 0, "model.language_model.layers.9.surprise");
}
static void break_zero_point(ck *c)
{
    ck_add(c, "I32", 2, 3, 1, 0, E1 "up_proj.weight_zero_point");
}
static void break_g_idx(ck *c)
{
    ck_add(c, "I32", 1, 66, 0, 0, E1 "up_proj.weight_g_idx");
}
static void break_gptq(ck *c)
{
    ck_add(c, "I32", 2, 9, 10, 0, E1 "up_proj.qweight");
}
static void break_fp8(ck *c)
{
    ck_add(c, "F32", 2, 1, 1, 0, E1 "up_proj.weight_scale_inv");
}
static void break_kv(ck *c)
{
    ck_add(c, "BF16", 1, 1, 0, 0, L3 "k_scale");
}
static void break_bias(ck *c)
{
    ck_add(c, "BF16", 1, 1024, 0, 0, L3 "q_proj.bias");
}

TEST(bind_names_each_fault)
{
    static const struct {
        void (*how)(ck *);
        int code;
        const char *want;
    } cases[] = {
        { break_missing, DELTA_EFORMAT, L3 "k_norm.weight is missing" },
        { break_shape, DELTA_EFORMAT, G0 "conv1d.weight has shape [512,1,3], expected [512,1,4]" },
        { break_rank, DELTA_EFORMAT, G0 "A_log has shape [2,1], expected [2]" },
        { break_dtype, DELTA_EFORMAT, G0 "dt_bias is I32, expected BF16, F16 or F32" },
        { break_packed_dtype, DELTA_EFORMAT, L3 "q_proj.weight_packed is F32, expected I32" },
        { break_packed_shape, DELTA_EFORMAT,
          L3 "q_proj.weight_packed has shape [1024,18], expected [1024,17]" },
        { break_bits, DELTA_EUNSUPPORTED, L3 "q_proj.weight_packed is 4-bit, only 8-bit is read" },
        { break_scale_rows, DELTA_EFORMAT, E1 "up_proj.weight_scale is BF16 [11,1]" },
        { break_scale_groups, DELTA_EFORMAT, E1 "up_proj.weight_scale is BF16 [10,7]" },
        { break_scale_none, DELTA_EFORMAT, E1 "up_proj.weight_scale is BF16 [10,0]" },
        { break_scale_dtype, DELTA_EFORMAT, E1 "up_proj.weight_scale is I32 [10,1]" },
        { break_scale_missing, DELTA_EFORMAT, E1 "up_proj.weight_scale is missing" },
        { break_packed_missing, DELTA_EFORMAT, E1 "up_proj.weight_packed is missing" },
        { break_weight_shape, DELTA_EFORMAT,
          E1 "down_proj.weight_shape says {66,12}, expected {66,10}" },
        { break_weight_shape_negative, DELTA_EFORMAT,
          E1 "down_proj.weight_shape says {-9223372036854775808,10}" },
        { break_weight_shape_dtype, DELTA_EFORMAT, E1 "down_proj.weight_shape must be two I64" },
        { break_weight_shape_count, DELTA_EFORMAT, E1 "down_proj.weight_shape must be two I64" },
        { break_both_forms, DELTA_EFORMAT, L3 "q_proj.weight is not part of this architecture" },
        { break_unknown, DELTA_EFORMAT, "layers.9.surprise is not part of this architecture" },
        { break_zero_point, DELTA_EUNSUPPORTED, E1 "up_proj.weight_zero_point (asymmetric" },
        { break_g_idx, DELTA_EUNSUPPORTED, E1 "up_proj.weight_g_idx" },
        { break_gptq, DELTA_EUNSUPPORTED, E1 "up_proj.qweight (GPTQ or AWQ)" },
        { break_fp8, DELTA_EUNSUPPORTED, E1 "up_proj.weight_scale_inv (FP8" },
        { break_kv, DELTA_EUNSUPPORTED, L3 "k_scale (calibrated scales of the KV cache)" },
        { break_bias, DELTA_EFORMAT, L3 "q_proj.bias is not part of this architecture" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        ck c = { 0 };
        result x;
        ck_model(&c, &ck_small);
        cases[i].how(&c);
        bind_ck(&c, &ck_small, &x);
        CHECK_EQ(x.r, cases[i].code);
        CHECK(x.b == NULL);
        if (!strstr(x.err.text, cases[i].want) || !strstr(x.err.text, ", 1 mismatch: "))
            TAP_FAIL("case %zu: \"%s\" is not in \"%s\", or not alone", i, cases[i].want,
                     x.err.text);
        done(&x);
        ck_done(&c);
    }
}

TEST(bind_refuses_a_quantized_embedding_and_takes_a_quantized_head)
{
    ck c = { 0 };
    result x;
    ck_model(&c, &ck_small);
    ck_remove(&c, "lm_head.weight");
    ck_int8(&c, &ck_small, "lm_head", 0, 50, 66);
    bind_ck(&c, &ck_small, &x);
    CHECK_STR(x.err.text, "");
    CHECK(x.b && x.b->head.format == DE_LINEAR_INT8);
    done(&x);
    ck_remove(&c, "model.language_model.embed_tokens.weight");
    ck_int8(&c, &ck_small, "model.language_model.embed_tokens", 0, 50, 66);
    bind_ck(&c, &ck_small, &x);
    CHECK_EQ(x.r, DELTA_EUNSUPPORTED);
    CHECK(strstr(x.err.text, "embed_tokens is quantized") != NULL);
    done(&x);
    ck_done(&c);
}

TEST(bind_tells_all_mismatches_in_one_error_and_a_report)
{
    ck c = { 0 };
    result x;
    ck_model(&c, &ck_small);
    break_missing(&c);
    break_shape(&c);
    break_dtype(&c);
    break_packed_shape(&c);
    break_scale_groups(&c);
    break_weight_shape(&c);
    break_unknown(&c);
    bind_ck(&c, &ck_small, &x);
    CHECK_EQ(x.r, DELTA_EFORMAT);
    CHECK(strstr(x.err.text, "7 mismatches") != NULL);
    CHECK(strstr(x.err.text, " more") != NULL); /* the text is too short for all of them */
    REQUIRE(x.report != NULL);
    static const char *const names[] = { "k_norm",       "conv1d",  "dt_bias",
                                         "q_proj",       "up_proj", "down_proj.weight_shape",
                                         "9.surprise is" };
    int lines = 0;
    for (const char *p = x.report; (p = strchr(p, '\n')) != NULL; p++)
        lines++;
    CHECK_EQ(lines, 7);
    for (size_t i = 0; i < 7; i++)
        CHECK(strstr(x.report, names[i]) != NULL);
    done(&x);
    ck_done(&c);
}

/* A config of another size: faults by the hundred thousand end early and stay readable. */
TEST(bind_of_a_quite_different_config_stays_bounded)
{
    ck c = { 0 };
    result x;
    ck_spec other = ck_35b;
    other.layers = 128, other.experts = 1024;
    ck_model(&c, &ck_small);
    bind_ck(&c, &other, &x);
    CHECK_EQ(x.r, DELTA_EFORMAT);
    CHECK(x.seconds < 20);
    CHECK(strstr(x.err.text, "mismatches") != NULL);
    done(&x);
    ck_done(&c);
}

TEST(bind_takes_the_demo_model)
{
    char *config;
    size_t len;
    delta_error err;
    result x;
    REQUIRE(de_file_read(DEMO_MODEL_DIR "/config.json", 1 << 20, &config, &len, &err) == 0);
    bind_dir(DEMO_MODEL_DIR, config, &x);
    CHECK_STR(x.err.text, "");
    REQUIRE(x.r == 0);
    CHECK_STR(x.b->quantization, "int8 channel");
    CHECK_EQ(x.b->n_layers, 8);
    CHECK(x.b->n_vision_tensors > 0 && x.b->n_mtp_tensors > 0);
    /* the data are where the table says: a norm's weights are finite and small */
    uint16_t bf16[256];
    CHECK_EQ(x.b->norm.bytes, sizeof bf16);
    CHECK_EQ(de_weights_read(x.w, x.b->norm.shard, x.b->norm.offset, bf16, sizeof bf16, &err), 0);
    for (int i = 0; i < 256; i++) {
        uint32_t bits = (uint32_t)bf16[i] << 16;
        float v;
        memcpy(&v, &bits, 4);
        CHECK(fabsf(v) < 100);
    }
    free(config);
    done(&x);
}

/* Every golden checkpoint that is there. */
TEST(bind_takes_the_checkpoints_of_the_golden_folder)
{
    static const char root[] = TESTS_DIR "/model/golden";
    DIR *d = opendir(root);
    int n = 0;
    for (const struct dirent *e; d && (e = readdir(d)) != NULL;) {
        char dir[512], path[600], *config;
        size_t len;
        result x;
        (void)snprintf(dir, sizeof dir, "%s/%.200s", root, e->d_name);
        (void)snprintf(path, sizeof path, "%s/config.json", dir);
        if (e->d_name[0] == '.' || de_file_read(path, 1 << 20, &config, &len, NULL) < 0)
            continue;
        bind_dir(dir, config, &x);
        if (x.r < 0)
            TAP_FAIL("%s: %s", dir, x.err.text);
        free(config);
        done(&x);
        n++;
    }
    if (d)
        closedir(d);
    if (n == 0)
        SKIP("no checkpoint in tests/model/golden");
}
