/* A checkpoint of the right shapes whose values cannot be meant: the loader names the tensor. */
#include "support/tap.h"

#include "model/forward.h"
#include "unit/model/checkpoint_values.h"

static const ck_spec small = {
    .layers = 4,
    .hidden = 32,
    .vocab = 20,
    .q_heads = 2,
    .kv_heads = 1,
    .k_heads = 1,
    .v_heads = 2,
    .experts = 3,
    .width = 16,
    .shared = 16,
    .shards = 2,
    .form = CK_INT8,
    .group = 8,
    .fused = 1,
    .prefix = "model.language_model.",
    .dtype = "BF16",
    .small_dtype = "F32",
};

static int try_open(const char *dir, delta_error *err)
{
    de_shape s;
    de_weights *w = NULL;
    de_binding *b = NULL;
    de_model *m = NULL;
    const de_model_options o = { .threads = 1,
                                 .n_slots = 1,
                                 .n_pages = 1,
                                 .max_rows = 1,
                                 .max_seqs = 1,
                                 .max_out = 1,
                                 .ctx_max = 64 };
    int r = de_shape_read(dir, &s, err);
    if (r == 0)
        r = de_weights_open(dir, &w, err);
    if (r == 0)
        r = de_bind(w, &s, &b, err);
    if (r == 0)
        r = de_model_open(w, &s, b, &o, &m, err);
    de_model_free(m);
    de_binding_free(b);
    de_weights_free(w);
    return r;
}

/* Opens the model once whole and once with the bytes at value i of the tensor replaced. */
static void check_named(const ck_spec *spec, const char *tensor, uint64_t i, const void *bytes,
                        size_t len, const char *text)
{
    ck c = { 0 };
    de_weights *w;
    delta_error err = { .text = "" };
    char *config = ck_config(spec), want[300];
    ck_model(&c, spec);
    ck_write(&c);
    ckv_write(&c, config, 7);
    CHECK_EQ(try_open(c.dir, &err), 0);
    REQUIRE(de_weights_open(c.dir, &w, &err) == 0);
    const de_tensor *t = de_weights_find(w, tensor);
    REQUIRE(t && (i + 1) * de_dtype_bytes(t->dtype) <= t->bytes);
    ckv_write_at(de_weights_shard_path(w, t->shard), bytes, len,
                 t->offset + i * de_dtype_bytes(t->dtype));
    de_weights_free(w);
    const int r = try_open(c.dir, &err);
    if (text) {
        CHECK_EQ(r, DELTA_EFORMAT);
        (void)snprintf(want, sizeof want, "%s: value %llu is %s", tensor, (unsigned long long)i,
                       text);
        CHECK_STR(err.text, want);
    } else {
        CHECK_EQ(r, 0);
    }
    free(config);
    ck_done(&c);
}

#define L0 "model.language_model.layers.0."
#define L3 "model.language_model.layers.3."
static const uint16_t nan16 = 0x7FC0, infinite16 = 0xFF80, half_infinite = 0x7C00, zero16 = 0x8000;
static const float nan32 = NAN, large32 = 89;

TEST(values_that_are_not_finite_are_named)
{
    check_named(&small, "model.language_model.embed_tokens.weight", 639, &nan16, 2, "not a number");
    check_named(&small, "model.language_model.norm.weight", 0, &infinite16, 2, "infinite");
    check_named(&small, L0 "linear_attn.norm.weight", 127, &nan32, 4, "not a number");
    check_named(&small, L0 "linear_attn.A_log", 1, &nan32, 4, "not a number");
    check_named(&small, L0 "linear_attn.conv1d.weight", 5, &nan16, 2, "not a number");
    check_named(&small, L3 "mlp.gate.weight", 33, &infinite16, 2, "infinite");
    check_named(&small, L3 "self_attn.k_proj.weight_scale", 40, &infinite16, 2, "infinite");
    /* in the part of the second expert: the number counts from the tensor's begin */
    check_named(&small, L0 "mlp.experts.down_proj.weight_scale", 32 * 2 + 3, &nan16, 2,
                "not a number");
    ck_spec half = small;
    half.form = CK_FLOAT;
    half.dtype = half.small_dtype = "F16";
    check_named(&half, "lm_head.weight", 17, &half_infinite, 2, "infinite");
    check_named(&half, L0 "mlp.experts.gate_up_proj", 1500, &half_infinite, 2, "infinite");
}

TEST(a_decay_that_overflows_is_named)
{
    check_named(&small, L0 "linear_attn.A_log", 0, &large32, 4, "too large");
}

TEST(a_scale_of_zero_is_named_where_it_hides_weights)
{
    check_named(&small, L3 "self_attn.q_proj.weight_scale", 1000, &zero16, 2,
                "a scale of 0, its weights are not 0");
    ck_spec one = small;
    one.group = UINT32_MAX;
    one.fused = 0;
    check_named(&one, L3 "self_attn.q_proj.weight_scale", 0, &zero16, 2,
                "a scale of 0, its weights are not 0");
}

/* Exporters write that for a row of zeros. */
TEST(a_scale_of_zero_over_zeros_is_read)
{
    ck c = { 0 };
    de_weights *w;
    delta_error err = { .text = "" };
    char *config = ck_config(&small);
    ck_model(&c, &small);
    ck_write(&c);
    ckv_write(&c, config, 7);
    REQUIRE(de_weights_open(c.dir, &w, &err) == 0);
    const de_tensor *s = de_weights_find(w, L3 "self_attn.q_proj.weight_scale");
    const de_tensor *q = de_weights_find(w, L3 "self_attn.q_proj.weight_packed");
    REQUIRE(s && q);
    static const uint8_t zeros[8] = { 128, 128, 128, 128, 128, 128, 128, 128 };
    ckv_write_at(de_weights_shard_path(w, s->shard), &zero16, 2, s->offset + (5 * 4 + 2) * 2);
    ckv_write_at(de_weights_shard_path(w, q->shard), zeros, 8, q->offset + 5 * 32 + 2 * 8);
    de_weights_free(w);
    CHECK_EQ(try_open(c.dir, &err), 0);
    free(config);
    ck_done(&c);
}
