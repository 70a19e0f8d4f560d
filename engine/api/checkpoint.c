/* checkpoint.c -- see checkpoint.h. */
#include "api/checkpoint.h"

#include <stdlib.h>
#include <string.h>

#include "base/arena.h"
#include "base/file.h"
#include "base/json.h"
#include "base/sha256.h"

enum {
    SMALL_FILE_MAX = 16 << 20,
    ARENA_MAX = 256 << 20,
};

/* DIR/name; *ret_text stays NULL where there is none. */
static int read_optional(const char *dir, const char *name, char **ret_text, size_t *ret_len,
                         delta_error *err)
{
    char *path = de_path_join(dir, name);
    if (!path)
        return delta_fail(err, DELTA_ENOMEM, "path of %s", name);
    int r = de_file_read(path, SMALL_FILE_MAX, ret_text, ret_len, err);
    free(path);
    return r == DELTA_ENOTFOUND ? 0 : r;
}

static void add_eos(de_checkpoint_use *u, const de_json *v, uint32_t n_vocab)
{
    const de_json *list = v && v->kind == DE_JSON_ARRAY ? v->child : v;
    for (; list; list = list->next) {
        uint64_t id;
        bool known = false;
        if (de_json_u64(list, &id) && id < n_vocab) {
            for (uint32_t i = 0; i < u->n_eos_ids; i++)
                known |= u->eos_ids[i] == id;
            if (!known && u->n_eos_ids < DE_CHECKPOINT_EOS)
                u->eos_ids[u->n_eos_ids++] = (uint32_t)id;
        }
        if (list == v)
            break; /* a single id: its siblings are other members */
    }
}

static void override_float(const de_json *v, const char *key, float *value)
{
    double d;
    if (de_json_double(de_json_get(v, key), &d))
        *value = (float)d;
}

static void override_sampling(const de_json *v, delta_sampling *s)
{
    uint64_t k;
    bool sample;
    override_float(v, "temperature", &s->temperature);
    override_float(v, "top_p", &s->top_p);
    override_float(v, "min_p", &s->min_p);
    override_float(v, "presence_penalty", &s->presence_penalty);
    override_float(v, "frequency_penalty", &s->frequency_penalty);
    override_float(v, "repetition_penalty", &s->repetition_penalty);
    if (de_json_u64(de_json_get(v, "top_k"), &k) && k <= UINT32_MAX)
        s->top_k = (uint32_t)k;
    if (de_json_bool(de_json_get(v, "do_sample"), &sample) && !sample)
        s->temperature = 0;
}

static int read_generation(const char *dir, uint32_t n_vocab, de_arena *a, de_checkpoint_use *u,
                           delta_error *err)
{
    char *text = NULL;
    size_t len = 0;
    de_json *v = NULL;
    int r = read_optional(dir, "generation_config.json", &text, &len, err);
    if (r == 0 && text)
        r = de_json_parse(a, text, len, &v, err);
    if (r == 0 && v) {
        add_eos(u, de_json_get(v, "eos_token_id"), n_vocab);
        override_sampling(v, &u->thinking);
        override_sampling(v, &u->plain);
        r = delta_sampling_check(&u->thinking, n_vocab, err);
    }
    if (r < 0) {
        delta_error_prefix(err, "generation_config.json");
        r = r == DELTA_EINVALID ? DELTA_EFORMAT : r;
    }
    free(text);
    return r;
}

static int read_config_eos(const char *config, size_t len, uint32_t n_vocab, de_arena *a,
                           de_checkpoint_use *u, delta_error *err)
{
    de_json *v;
    int r = de_json_parse(a, config, len, &v, err);
    if (r < 0) {
        delta_error_prefix(err, "config.json");
        return r;
    }
    add_eos(u, de_json_get(v, "eos_token_id"), n_vocab);
    add_eos(u, de_json_get(de_json_get(v, "text_config"), "eos_token_id"), n_vocab);
    return 0;
}

static int read_template(const char *dir, de_arena *a, de_checkpoint_use *u, delta_error *err)
{
    char *text = NULL;
    size_t len = 0;
    int r = read_optional(dir, "chat_template.jinja", &text, &len, err);
    if (r < 0)
        return r;
    if (text) {
        de_sha256_hex(text, len, u->template_sha256);
        free(text);
        return 0;
    }
    de_json *v = NULL;
    r = read_optional(dir, "tokenizer_config.json", &text, &len, err);
    if (r == 0 && text) {
        r = de_json_parse(a, text, len, &v, err);
        if (r < 0)
            delta_error_prefix(err, "tokenizer_config.json");
    }
    const de_json *t = de_json_get(v, "chat_template");
    if (r == 0 && t && t->kind == DE_JSON_STRING)
        de_sha256_hex(t->text, t->n, u->template_sha256);
    free(text);
    return r;
}

int de_checkpoint_use_read(const char *dir, const char *config, size_t config_len, uint32_t n_vocab,
                           de_checkpoint_use *ret_use, delta_error *err)
{
    de_checkpoint_use u = { .thinking = delta_sampling_default(true),
                            .plain = delta_sampling_default(false) };
    de_arena a;
    de_arena_init(&a, ARENA_MAX);
    int r = read_generation(dir, n_vocab, &a, &u, err);
    if (r == 0)
        r = read_config_eos(config, config_len, n_vocab, &a, &u, err);
    if (r == 0)
        r = read_template(dir, &a, &u, err);
    de_arena_done(&a);
    if (r == 0)
        *ret_use = u;
    return r;
}
