/* test_shape.c -- config.json to de_shape: every value checked, every fault named. */
#include "model/shape.h"

#include "base/file.h"
#include "support/tap.h"

/* The published configuration of the 35 B model, the parts that are read. */
static const char config_35b[] =
    "{\"architectures\":[\"Qwen3_5MoeForConditionalGeneration\"],\"model_type\":\"qwen3_5_moe\","
    "\"image_token_id\":248056,\"video_token_id\":248057,\"vision_start_token_id\":248053,"
    "\"vision_end_token_id\":248054,\"tie_word_embeddings\":false,\"language_model_only\":false,"
    "\"text_config\":{\"model_type\":\"qwen3_5_moe_text\",\"vocab_size\":248320,"
    "\"hidden_size\":2048,\"num_hidden_layers\":40,\"full_attention_interval\":4,"
    "\"hidden_act\":\"silu\",\"rms_norm_eps\":1e-06,\"num_attention_heads\":16,"
    "\"num_key_value_heads\":2,\"head_dim\":256,\"attention_bias\":false,"
    "\"attn_output_gate\":true,\"linear_num_key_heads\":16,\"linear_num_value_heads\":32,"
    "\"linear_key_head_dim\":128,\"linear_value_head_dim\":128,\"linear_conv_kernel_dim\":4,"
    "\"num_experts\":256,\"num_experts_per_tok\":8,\"moe_intermediate_size\":512,"
    "\"shared_expert_intermediate_size\":512,\"mlp_only_layers\":[],"
    "\"max_position_embeddings\":262144,\"rope_parameters\":{\"rope_type\":\"default\","
    "\"rope_theta\":10000000,\"partial_rotary_factor\":0.25,\"mrope_interleaved\":true,"
    "\"mrope_section\":[11,11,10]},\"mtp_num_hidden_layers\":1},"
    "\"vision_config\":{\"depth\":27,\"hidden_size\":1152,\"num_heads\":16,"
    "\"intermediate_size\":4304,\"in_channels\":3,\"patch_size\":16,\"temporal_patch_size\":2,"
    "\"spatial_merge_size\":2,\"num_position_embeddings\":2304,\"out_hidden_size\":2048}}";

/* config_35b with `from` replaced by `to`; free() it. */
static char *with(const char *from, const char *to)
{
    const char *at = strstr(config_35b, from);
    if (!at) {
        TAP_FAIL("%s is not in the test's config", from);
        return strdup(config_35b);
    }
    char *text;
    if (asprintf(&text, "%.*s%s%s", (int)(at - config_35b), config_35b, to, at + strlen(from)) < 0)
        exit(2);
    return text;
}

static int parse(const char *text, de_shape *s, delta_error *err)
{
    *err = (delta_error){ 0 };
    return de_shape_parse(text, strlen(text), s, err);
}

/* Parses the changed config; the shape must come out. */
static de_shape sound(const char *from, const char *to)
{
    de_shape s = { 0 };
    delta_error err;
    char *text = with(from, to);
    if (parse(text, &s, &err) < 0)
        TAP_FAIL("\"%s\" -> \"%s\": %s", from, to, err.text);
    free(text);
    return s;
}

TEST(shape_of_the_35b_model)
{
    de_shape s;
    delta_error err;
    REQUIRE(parse(config_35b, &s, &err) == 0);
    CHECK_EQ(s.n_layers, 40);
    CHECK_EQ(s.hidden, 2048);
    CHECK_EQ(s.vocab, 248320);
    CHECK_EQ(s.n_attn, 10);
    CHECK_EQ(s.n_gdn, 30);
    for (uint32_t i = 0; i < 40; i++) {
        CHECK_EQ(s.layer_kind[i], i % 4 == 3 ? DE_LAYER_ATTN : DE_LAYER_GDN);
        CHECK_EQ(s.kind_index[i], i % 4 == 3 ? i / 4 : i - i / 4);
    }
    CHECK_NEAR(s.rms_eps, 1e-6, 1e-12);
    CHECK_EQ(s.q_heads, 16);
    CHECK_EQ(s.kv_heads, 2);
    CHECK_EQ(s.rotary_dims, 64);
    CHECK_NEAR(s.rope_theta, 1e7, 0);
    CHECK(s.mrope_section[0] == 11 && s.mrope_section[1] == 11 && s.mrope_section[2] == 10);
    CHECK(!s.yarn);
    CHECK_EQ(s.gdn_k_heads, 16);
    CHECK_EQ(s.gdn_v_heads, 32);
    CHECK_EQ(s.gdn_channels, 8192);
    CHECK_EQ(s.n_experts, 256);
    CHECK_EQ(s.top_k, 8);
    CHECK_EQ(s.moe_width, 512);
    CHECK_EQ(s.shared_width, 512);
    CHECK_EQ(s.ctx_max, 262144);
    CHECK(!s.tied_embeddings);
    CHECK_EQ(s.mtp_layers, 1);
    CHECK(s.has_vision);
    CHECK_EQ(s.vision.depth, 27);
    CHECK_EQ(s.vision.hidden, 1152);
    CHECK_EQ(s.vision.out_hidden, 2048);
    CHECK_EQ(s.image_token, 248056);
    CHECK_EQ(s.vision_end_token, 248054);
}

TEST(shape_of_the_demo_model)
{
    char *text;
    size_t len;
    de_shape s;
    delta_error err = { 0 };
    REQUIRE(de_file_read(DEMO_MODEL_DIR "/config.json", 1 << 20, &text, &len, &err) == 0);
    CHECK_EQ(de_shape_parse(text, len, &s, &err), 0);
    CHECK_STR(err.text, "");
    CHECK_EQ(s.n_layers, 8);
    CHECK_EQ(s.n_attn, 2);
    CHECK_EQ(s.gdn_channels, 1024);
    free(text);
}

TEST(shape_takes_layer_types_over_the_interval)
{
    de_shape s = sound("\"num_hidden_layers\":40,",
                       "\"num_hidden_layers\":3,\"layer_types\":[\"full_attention\","
                       "\"linear_attention\",\"full_attention\"],");
    CHECK_EQ(s.n_layers, 3);
    CHECK_EQ(s.n_attn, 2);
    CHECK(s.layer_kind[0] == DE_LAYER_ATTN && s.layer_kind[1] == DE_LAYER_GDN);
    CHECK_EQ(s.kind_index[2], 1);
    s = sound("\"full_attention_interval\":4",
              "\"layer_types\":null,\"full_attention_interval\":2");
    CHECK_EQ(s.n_attn, 20);
}

TEST(shape_reads_optional_parts)
{
    de_shape s = sound("\"vision_config\"", "\"no_vision_config\"");
    CHECK(!s.has_vision);
    s = sound("\"mtp_num_hidden_layers\":1", "\"unknown\":[{}]");
    CHECK_EQ(s.mtp_layers, 0);
    s = sound("\"image_token_id\":248056,", "");
    CHECK_EQ(s.image_token, UINT32_MAX);
    s = sound("\"tie_word_embeddings\":false", "\"tie_word_embeddings\":true");
    CHECK(s.tied_embeddings);
    s = sound("\"rope_type\":\"default\",", "");
    CHECK(!s.yarn);
    s = sound(",\"mrope_section\":[11,11,10]", "");
    CHECK(s.mrope_section[0] == 11 && s.mrope_section[1] == 11 && s.mrope_section[2] == 10);
}

/* rope_theta and rope_scaling outside are what older exporters write. */
TEST(shape_reads_the_older_spelling_of_rope)
{
    static const char from[] =
        "\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":10000000,"
        "\"partial_rotary_factor\":0.25,\"mrope_interleaved\":true,\"mrope_section\":[11,11,10]}";
    de_shape s = sound(from, "\"rope_theta\":5000000,\"partial_rotary_factor\":0.5,"
                             "\"rope_scaling\":{\"type\":\"mrope\",\"mrope_section\":[24,20,20]}");
    CHECK_NEAR(s.rope_theta, 5e6, 0);
    CHECK_EQ(s.rotary_dims, 128);
    CHECK_EQ(s.mrope_section[0], 24);
    s = sound(from, "\"rope_theta\":5000000,\"partial_rotary_factor\":0.25,\"rope_scaling\":null");
    CHECK_EQ(s.rotary_dims, 64);
    s = sound(from, "\"rope_theta\":1e7,\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2.0,"
                    "\"original_max_position_embeddings\":262144}");
    CHECK(s.yarn);
    CHECK_NEAR(s.yarn_factor, 2, 0);
    CHECK_EQ(s.ctx_max, 524288);
}

TEST(shape_reads_yarn)
{
    static const char from[] = "\"rope_type\":\"default\",";
    de_shape s = sound(from, "\"rope_type\":\"yarn\",\"factor\":4.0,"
                             "\"original_max_position_embeddings\":262144,");
    CHECK(s.yarn);
    CHECK_NEAR(s.yarn_factor, 4, 0);
    CHECK_NEAR(s.yarn_beta_fast, 32, 0);
    CHECK_NEAR(s.yarn_beta_slow, 1, 0);
    CHECK_EQ(s.yarn_original_ctx, 262144);
    CHECK_NEAR(s.yarn_attention_factor, 1.138629436, 5e-10);
    CHECK_EQ(s.ctx_max, 1048576);
    s = sound(from, "\"rope_type\":\"yarn\",\"factor\":4.0,\"attention_factor\":1.5,"
                    "\"beta_fast\":16,\"beta_slow\":2,");
    CHECK_NEAR(s.yarn_attention_factor, 1.5, 0);
    CHECK_NEAR(s.yarn_beta_fast, 16, 0);
    CHECK_EQ(s.yarn_original_ctx, 262144); /* max_position_embeddings, for want of its own */
    s = sound(from, "\"rope_type\":\"yarn\",\"factor\":1,");
    CHECK_NEAR(s.yarn_attention_factor, 1, 0);
    s = sound(from, "\"rope_type\":\"yarn\",\"factor\":4,\"mscale\":1,\"mscale_all_dim\":0.5,");
    CHECK_NEAR(s.yarn_attention_factor, (0.1 * log(4) + 1) / (0.05 * log(4) + 1), 1e-15);
    s = sound(from, "\"rope_type\":\"yarn\",\"factor\":1024,");
    CHECK_EQ(s.ctx_max, 1 << 24); /* positions beyond are not exact in f32 */
}

TEST(shape_faults_are_named)
{
    static const struct {
        const char *from, *to;
        int code;
        const char *want;
    } cases[] = {
        { "\"model_type\":\"qwen3_5_moe\"", "\"model_type\":\"llama\"", DELTA_EUNSUPPORTED,
          "model_type is \"llama\"" },
        { "\"model_type\":\"qwen3_5_moe\",", "", DELTA_EUNSUPPORTED, "model_type is \"\"" },
        { "\"text_config\":{", "\"other\":{", DELTA_EFORMAT, "text_config is missing" },
        { "\"num_hidden_layers\":40", "\"num_hidden_layers\":0", DELTA_EFORMAT,
          "num_hidden_layers must be a number in 1..128" },
        { "\"num_hidden_layers\":40", "\"num_hidden_layers\":129", DELTA_EFORMAT,
          "num_hidden_layers" },
        { "\"num_hidden_layers\":40", "\"num_hidden_layers\":40.5", DELTA_EFORMAT,
          "num_hidden_layers" },
        { "\"hidden_size\":2048", "\"hidden_size\":\"2048\"", DELTA_EFORMAT, "hidden_size" },
        { "\"hidden_size\":2048", "\"hidden_size\":-1", DELTA_EFORMAT, "hidden_size" },
        { "\"hidden_size\":2048", "\"hidden_size\":18446744073709551617", DELTA_EFORMAT,
          "hidden_size" },
        { "\"vocab_size\":248320,", "", DELTA_EFORMAT, "vocab_size" },
        { "\"num_hidden_layers\":40,",
          "\"num_hidden_layers\":40,\"layer_types\":[\"full_attention\"],", DELTA_EFORMAT,
          "layer_types must list 40 layers" },
        { "\"num_hidden_layers\":40,", "\"num_hidden_layers\":1,\"layer_types\":[\"mamba\"],",
          DELTA_EUNSUPPORTED, "layer_types[0]" },
        { "\"num_hidden_layers\":40,", "\"num_hidden_layers\":1,\"layer_types\":[3],",
          DELTA_EUNSUPPORTED, "layer_types[0]" },
        { "\"full_attention_interval\":4", "\"full_attention_interval\":0", DELTA_EFORMAT,
          "full_attention_interval" },
        { "\"rms_norm_eps\":1e-06", "\"rms_norm_eps\":0", DELTA_EFORMAT, "rms_norm_eps" },
        { "\"rms_norm_eps\":1e-06", "\"rms_norm_eps\":\"1e-6\"", DELTA_EFORMAT, "rms_norm_eps" },
        { "\"rms_norm_eps\":1e-06", "\"rms_norm_eps\":NaN", DELTA_EFORMAT, "JSON line 1" },
        { "\"rms_norm_eps\":1e-06", "\"rms_norm_eps\":1e999", DELTA_EFORMAT, "rms_norm_eps" },
        { "\"head_dim\":256", "\"head_dim\":128", DELTA_EUNSUPPORTED,
          "head_dim is 128, only 256 is served" },
        { "\"head_dim\":256,", "", DELTA_EFORMAT, "head_dim must be a number" },
        { "\"linear_key_head_dim\":128", "\"linear_key_head_dim\":64", DELTA_EUNSUPPORTED,
          "linear_key_head_dim" },
        { "\"linear_value_head_dim\":128", "\"linear_value_head_dim\":256", DELTA_EUNSUPPORTED,
          "linear_value_head_dim" },
        { "\"linear_conv_kernel_dim\":4", "\"linear_conv_kernel_dim\":3", DELTA_EUNSUPPORTED,
          "linear_conv_kernel_dim" },
        { "\"num_key_value_heads\":2", "\"num_key_value_heads\":3", DELTA_EFORMAT,
          "num_attention_heads is no multiple" },
        { "\"linear_num_value_heads\":32", "\"linear_num_value_heads\":24", DELTA_EFORMAT,
          "linear_num_value_heads is no multiple" },
        { "\"num_experts_per_tok\":8", "\"num_experts_per_tok\":65", DELTA_EFORMAT,
          "num_experts_per_tok" },
        { "\"num_experts\":256", "\"num_experts\":7", DELTA_EFORMAT,
          "num_experts_per_tok is more than num_experts" },
        { "\"num_experts\":256", "\"num_experts\":1025", DELTA_EFORMAT,
          "num_experts must be a number in 1..1024" },
        { "\"attention_bias\":false", "\"attention_bias\":true", DELTA_EUNSUPPORTED,
          "attention_bias" },
        { "\"attention_bias\":false", "\"attention_bias\":0", DELTA_EFORMAT, "attention_bias" },
        { "\"attn_output_gate\":true", "\"attn_output_gate\":false", DELTA_EUNSUPPORTED,
          "attn_output_gate" },
        { "\"hidden_act\":\"silu\"", "\"hidden_act\":\"gelu\"", DELTA_EUNSUPPORTED, "hidden_act" },
        { "\"mlp_only_layers\":[]", "\"mlp_only_layers\":[0]", DELTA_EUNSUPPORTED,
          "mlp_only_layers" },
        { "\"rope_theta\":10000000,", "", DELTA_EFORMAT, "rope_theta is missing" },
        { "\"rope_theta\":10000000", "\"rope_theta\":1", DELTA_EFORMAT, "rope_theta must be" },
        { "\"rope_theta\":10000000", "\"rope_theta\":[]", DELTA_EFORMAT, "rope_theta must be" },
        { "\"partial_rotary_factor\":0.25", "\"partial_rotary_factor\":0", DELTA_EFORMAT,
          "partial_rotary_factor" },
        { "\"partial_rotary_factor\":0.25", "\"partial_rotary_factor\":1.5", DELTA_EFORMAT,
          "partial_rotary_factor" },
        { "\"partial_rotary_factor\":0.25", "\"partial_rotary_factor\":0.01953125", DELTA_EFORMAT,
          "partial_rotary_factor" }, /* 5 dimensions */
        { "[11,11,10]", "[11,11,11]", DELTA_EFORMAT, "mrope_section must be three" },
        { "[11,11,10]", "[11,11,10,0]", DELTA_EFORMAT, "mrope_section must be three" },
        { "[11,11,10]", "[32]", DELTA_EFORMAT, "mrope_section must be three" },
        { "[11,11,10]", "[42,-11,1]", DELTA_EFORMAT, "mrope_section must be three" },
        { "[11,11,10]", "32", DELTA_EFORMAT, "mrope_section must be three" },
        { "\"mrope_interleaved\":true", "\"mrope_interleaved\":false", DELTA_EUNSUPPORTED,
          "mrope_interleaved" },
        { "\"rope_type\":\"default\"", "\"rope_type\":\"llama3\"", DELTA_EUNSUPPORTED,
          "rope_type is llama3" },
        { "\"rope_type\":\"default\"", "\"rope_type\":\"yarn\\u0000\"", DELTA_EUNSUPPORTED,
          "rope_type is no text" },
        { "\"rope_type\":\"default\"", "\"rope_type\":\"yarn\"", DELTA_EFORMAT,
          "yarn: factor is missing" },
        { "\"rope_type\":\"default\"", "\"rope_type\":\"yarn\",\"factor\":0.5", DELTA_EFORMAT,
          "yarn: factor" },
        { "\"rope_type\":\"default\"", "\"rope_type\":\"yarn\",\"factor\":4,\"beta_fast\":1",
          DELTA_EFORMAT, "yarn: factor, beta_fast" },
        { "\"rope_type\":\"default\"", "\"rope_type\":\"yarn\",\"factor\":4,\"truncate\":false",
          DELTA_EUNSUPPORTED, "truncate" },
        { "\"rope_type\":\"default\"",
          "\"rope_type\":\"yarn\",\"factor\":4,\"attention_factor\":-1", DELTA_EFORMAT,
          "attention_factor" },
        { "\"rope_parameters\":", "\"rope_scaling\":{\"type\":\"yarn\"},\"rope_parameters\":",
          DELTA_EFORMAT, "contradict" },
        { "\"depth\":27,", "", DELTA_EFORMAT, "depth" },
        { "\"num_heads\":16", "\"num_heads\":7", DELTA_EFORMAT, "vision_config" },
        { "\"image_token_id\":248056", "\"image_token_id\":248320", DELTA_EFORMAT,
          "image_token_id must be a number in 0..248319" },
        { "{\"architectures\"", "{\"model_type\":\"x\",\"architectures\"", DELTA_EFORMAT,
          "duplicate" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        de_shape s = { .hidden = 77 };
        delta_error err;
        char *text = with(cases[i].from, cases[i].to);
        int r = parse(text, &s, &err);
        if (r != cases[i].code || !strstr(err.text, cases[i].want))
            TAP_FAIL("%s: %d \"%s\", expected %d and \"%s\"", cases[i].to, r, err.text,
                     cases[i].code, cases[i].want);
        CHECK_EQ(s.hidden, 77); /* untouched */
        CHECK(strncmp(err.text, "config.json: ", 13) == 0);
        free(text);
    }
}

TEST(shape_gathers_all_faults_in_one_error)
{
    delta_error err;
    de_shape s;
    CHECK_EQ(parse("{\"model_type\":\"qwen3_5_moe\",\"text_config\":{\"head_dim\":64}}", &s, &err),
             DELTA_EUNSUPPORTED);
    CHECK(strstr(err.text, "num_hidden_layers") && strstr(err.text, "vocab_size") &&
          strstr(err.text, "head_dim is 64"));
    CHECK_EQ(parse("[]", &s, &err), DELTA_EUNSUPPORTED);
    CHECK_EQ(parse("", &s, &err), DELTA_EFORMAT);
}

/* Other forms are refused by their name, before thousands of tensors are found missing. */
TEST(shape_refuses_other_quantizations)
{
    static const struct {
        const char *quantization, *want; /* want NULL: taken */
    } cases[] = {
        { "{\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\"}", NULL },
        { "{\"quant_method\":\"compressed-tensors\",\"format\":\"mixed-precision\","
          "\"config_groups\":{\"a\":{\"format\":\"pack-quantized\",\"input_activations\":null}}}",
          NULL },
        { "{\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\","
          "\"transform_config\":{},\"sparsity_config\":{}}",
          NULL },
        { "null", NULL },
        { "{\"quant_method\":\"gptq\",\"bits\":8}", "quant_method is gptq" },
        { "{\"quant_method\":\"awq\"}", "quant_method is awq" },
        { "{\"quant_method\":\"auto-round\"}", "quant_method is auto-round" },
        { "{\"quant_method\":\"fp8\"}", "quant_method is fp8" },
        { "{\"quant_method\":\"modelopt\"}", "quant_method is modelopt" },
        { "{}", "quant_method is not given" },
        { "{\"quant_method\":\"compressed-tensors\",\"format\":\"float-quantized\"}",
          "format is float-quantized" },
        { "{\"quant_method\":\"compressed-tensors\",\"format\":\"int-quantized\"}",
          "format is int-quantized" },
        { "{\"quant_method\":\"compressed-tensors\",\"format\":\"mixed-precision\","
          "\"config_groups\":{\"a\":{\"format\":\"nvfp4-pack-quantized\"}}}",
          "of a group is nvfp4-pack-quantized" },
        { "{\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\","
          "\"config_groups\":{\"a\":{\"input_activations\":{\"num_bits\":8}}}}",
          "input_activations" },
        { "{\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\","
          "\"transform_config\":{\"config_groups\":{\"u\":{\"type\":\"hadamard\"}}}}",
          "transform_config" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *to, *text;
        de_shape s;
        delta_error err;
        if (asprintf(&to, "\"quantization_config\":%s,\"text_config\":{", cases[i].quantization) <
            0)
            exit(2);
        text = with("\"text_config\":{", to);
        int r = parse(text, &s, &err);
        if (r != (cases[i].want ? DELTA_EUNSUPPORTED : 0) ||
            (cases[i].want && !strstr(err.text, cases[i].want)))
            TAP_FAIL("%s: %d \"%s\"", cases[i].quantization, r, err.text);
        free(text);
        free(to);
    }
}

/* A config cut anywhere is refused, and nothing is read beyond its end. */
TEST(shape_refuses_a_config_cut_anywhere)
{
    for (size_t len = 0; len < sizeof config_35b - 1; len++) {
        de_shape s;
        char *copy = malloc(len ? len : 1);
        REQUIRE(copy != NULL);
        memcpy(copy, config_35b, len);
        if (de_shape_parse(copy, len, &s, NULL) != DELTA_EFORMAT)
            TAP_FAIL("cut at %zu is not refused", len);
        free(copy);
    }
}
