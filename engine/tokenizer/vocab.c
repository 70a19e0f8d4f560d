/* vocab.c -- tokenizer.json and tokenizer_config.json to tables, and the two
 * directions of the public interface over them.
 *
 * Character classes come from utf8proc (Unicode 15), tabled once at opening. */
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "base/file.h"
#include "base/json.h"
#include "tokenizer/tokenizer.h"

enum { FILE_MAX = 128 << 20, TOKEN_BYTES_MAX = 4096 };

static const char pattern_marks[] =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}| "
    "?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
static const char pattern_plain[] =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| "
    "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

/* ---- hash tables */

static uint64_t mix(uint64_t h)
{
    h *= 0x9E3779B97F4A7C15u;
    return h ^ h >> 32;
}

static uint64_t hash_bytes(const uint8_t *p, size_t n)
{
    uint64_t h = n;
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t w;
        memcpy(&w, p, 8);
        h = mix(h ^ w);
    }
    uint64_t w = 0;
    for (size_t i = 0; i < n; i++)
        w = w << 8 | p[i];
    return mix(h ^ w);
}

static bool same_bytes(const delta_tokenizer *t, uint32_t id, const uint8_t *p, size_t n)
{
    return t->begin[id + 1] - t->begin[id] == n && memcmp(t->bytes + t->begin[id], p, n) == 0;
}

int64_t de_token_find(const delta_tokenizer *t, const uint8_t *p, size_t n)
{
    size_t i = hash_bytes(p, n) & (t->by_text_size - 1);
    for (; t->by_text[i]; i = (i + 1) & (t->by_text_size - 1))
        if (same_bytes(t, t->by_text[i] - 1, p, n))
            return t->by_text[i] - 1;
    return -1;
}

static de_merge *merge_slot(const delta_tokenizer *t, uint64_t pair)
{
    size_t i = mix(pair) & (t->merges_size - 1);
    while (t->merges[i].pair != pair && t->merges[i].pair != UINT64_MAX)
        i = (i + 1) & (t->merges_size - 1);
    return &t->merges[i];
}

const de_merge *de_merge_find(const delta_tokenizer *t, uint32_t left, uint32_t right)
{
    const de_merge *m = merge_slot(t, (uint64_t)left << 32 | right);
    return m->pair == UINT64_MAX ? NULL : m;
}

static size_t table_size(size_t n)
{
    size_t size = 16;
    while (size < n * 2)
        size *= 2;
    return size;
}

/* ---- reading */

typedef struct reader {
    delta_tokenizer *t;
    int16_t byte_of[0x144]; /* character of the byte-level alphabet to byte, -1: none */
    delta_error *err;
} reader;

/* 33-126, 161-172, 174-255 stand for themselves, the others for U+0100 + n in rising order. */
static void fill_alphabet(reader *r)
{
    memset(r->byte_of, -1, sizeof r->byte_of);
    int16_t extra = 0x100;
    for (int16_t b = 0; b < 256; b++) {
        const bool self = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        r->byte_of[self ? b : extra++] = b;
    }
}

/* A token's spelling in the alphabet to its bytes; -1 if it has a foreign character. */
static int64_t spell(const reader *r, const char *s, size_t n, uint8_t *out)
{
    const uint8_t *p = (const uint8_t *)s, *end = p + n;
    size_t k = 0;
    while (p < end) {
        uint32_t cp = de_utf8_next(&p);
        if (cp >= 0x144 || r->byte_of[cp] < 0)
            return -1;
        out[k++] = (uint8_t)r->byte_of[cp];
    }
    return (int64_t)k;
}

typedef struct entry {
    const char *text;
    uint32_t len;
    uint8_t kind;
} entry;

static int put_entry(const reader *r, entry *e, uint64_t id, const char *text, uint32_t len,
                     uint8_t kind)
{
    if (id >= DE_TOKENS_MAX)
        return delta_fail(r->err, DELTA_ELIMIT, "token id %llu, at most %d", (unsigned long long)id,
                          DE_TOKENS_MAX - 1);
    if (len == 0 || len > TOKEN_BYTES_MAX)
        return delta_fail(r->err, DELTA_EFORMAT, "token %llu has %u bytes, expected 1..%d",
                          (unsigned long long)id, len, TOKEN_BYTES_MAX);
    if (e[id].kind != DELTA_TOKEN_NONE && (e[id].len != len || memcmp(e[id].text, text, len) != 0))
        return delta_fail(r->err, DELTA_EFORMAT, "two tokens have the id %llu",
                          (unsigned long long)id);
    e[id] = (entry){ text, len, kind };
    if (id >= r->t->n)
        r->t->n = (uint32_t)id + 1;
    return 0;
}

static int read_added(const reader *r, entry *e, const de_json *v, uint64_t id)
{
    const de_json *text = de_json_get(v, "content");
    static const char *const flags[] = { "lstrip", "rstrip", "single_word", "normalized" };
    bool special = false, b;
    if (!text || text->kind != DE_JSON_STRING)
        return delta_fail(r->err, DELTA_EFORMAT, "added token %llu has no content",
                          (unsigned long long)id);
    for (size_t i = 0; i < 4; i++)
        if (de_json_bool(de_json_get(v, flags[i]), &b) && b)
            return delta_fail(r->err, DELTA_EUNSUPPORTED, "added token %s: %s must be false",
                              text->text, flags[i]);
    (void)de_json_bool(de_json_get(v, "special"), &special);
    return put_entry(r, e, id, text->text, text->n,
                     special ? DELTA_TOKEN_SPECIAL : DELTA_TOKEN_ADDED);
}

static int read_entries(const reader *r, entry *e, const de_json *root, const de_json *config)
{
    const de_json *vocab = de_json_get(de_json_get(root, "model"), "vocab");
    int code = 0;
    uint64_t id;
    if (!vocab || vocab->kind != DE_JSON_OBJECT)
        return delta_fail(r->err, DELTA_EFORMAT, "model.vocab is missing");
    for (const de_json *v = vocab->child; v && code == 0; v = v->next) {
        if (!de_json_u64(v, &id))
            return delta_fail(r->err, DELTA_EFORMAT, "vocab: an id is no number");
        code = put_entry(r, e, id, v->key, v->key_len, DELTA_TOKEN_TEXT);
    }
    const de_json *added = de_json_get(root, "added_tokens");
    for (const de_json *v = added ? added->child : NULL; v && code == 0; v = v->next) {
        if (!de_json_u64(de_json_get(v, "id"), &id))
            return delta_fail(r->err, DELTA_EFORMAT, "added_tokens: an entry has no id");
        code = read_added(r, e, v, id);
    }
    const de_json *more = de_json_get(config, "added_tokens_decoder");
    for (const de_json *v = more ? more->child : NULL; v && code == 0; v = v->next) {
        char *stop;
        id = strtoull(v->key, &stop, 10);
        if (*stop || stop == v->key)
            return delta_fail(r->err, DELTA_EFORMAT, "added_tokens_decoder: %s is no id", v->key);
        code = read_added(r, e, v, id);
    }
    return code;
}

/* entries -> bytes, begin, kind, by_text, byte_id */
static int fill_tokens(const reader *r, const entry *e)
{
    delta_tokenizer *t = r->t;
    size_t total = 0, n_text = 0;
    for (uint32_t i = 0; i < t->n; i++) {
        total += e[i].len;
        n_text += e[i].kind == DELTA_TOKEN_TEXT;
    }
    t->bytes = malloc(total + 1);
    t->begin = malloc(((size_t)t->n + 1) * sizeof *t->begin);
    t->kind = malloc((size_t)t->n + 1);
    t->whole = calloc((size_t)t->n + 1, sizeof *t->whole);
    t->by_text_size = table_size(n_text);
    t->by_text = calloc(t->by_text_size, sizeof *t->by_text);
    if (!t->bytes || !t->begin || !t->kind || !t->whole || !t->by_text)
        return delta_fail(r->err, DELTA_ENOMEM, "tables of %u tokens", t->n);
    uint32_t at = 0;
    for (uint32_t i = 0; i < t->n; i++) {
        t->begin[i] = at;
        t->kind[i] = e[i].kind;
        if (e[i].kind == DELTA_TOKEN_TEXT) {
            int64_t k = spell(r, e[i].text, e[i].len, t->bytes + at);
            if (k < 0)
                return delta_fail(r->err, DELTA_EFORMAT,
                                  "token %u is not written in the byte-level alphabet", i);
            at += (uint32_t)k;
        } else if (e[i].len) {
            memcpy(t->bytes + at, e[i].text, e[i].len);
            at += e[i].len;
        }
    }
    t->begin[t->n] = at;
    memset(t->byte_id, 0xFF, sizeof t->byte_id);
    for (uint32_t i = 0; i < t->n; i++) {
        if (t->kind[i] != DELTA_TOKEN_TEXT)
            continue;
        const uint8_t *p = t->bytes + t->begin[i];
        const size_t n = t->begin[i + 1] - t->begin[i];
        size_t slot = hash_bytes(p, n) & (t->by_text_size - 1);
        while (t->by_text[slot])
            slot = (slot + 1) & (t->by_text_size - 1);
        t->by_text[slot] = i + 1;
        if (n == 1)
            t->byte_id[*p] = i;
    }
    for (int b = 0; b < 256; b++)
        if (t->byte_id[b] == UINT32_MAX)
            return delta_fail(r->err, DELTA_EFORMAT, "no token for the byte 0x%02x", b);
    return 0;
}

static int read_merge(const reader *r, const de_json *v, uint32_t rank)
{
    delta_tokenizer *t = r->t;
    uint8_t both[2 * TOKEN_BYTES_MAX];
    const char *left = NULL, *right = NULL;
    size_t n_left = 0, n_right = 0;
    if (v->kind == DE_JSON_STRING) { /* "left right" */
        const char *space = memchr(v->text, ' ', v->n);
        if (space) {
            left = v->text;
            n_left = (size_t)(space - left);
            right = space + 1;
            n_right = v->n - n_left - 1;
        }
    } else if (v->kind == DE_JSON_ARRAY && v->n == 2 && v->child->kind == DE_JSON_STRING &&
               v->child->next->kind == DE_JSON_STRING) {
        left = v->child->text;
        n_left = v->child->n;
        right = v->child->next->text;
        n_right = v->child->next->n;
    }
    if (!left || n_left > TOKEN_BYTES_MAX || n_right > TOKEN_BYTES_MAX)
        return delta_fail(r->err, DELTA_EFORMAT, "merge %u is no pair of tokens", rank);
    const int64_t a = spell(r, left, n_left, both);
    const int64_t b = a < 0 ? -1 : spell(r, right, n_right, both + a);
    int64_t ia = -1, ib = -1, ic = -1;
    if (a > 0 && b > 0) {
        ia = de_token_find(t, both, (size_t)a);
        ib = de_token_find(t, both + a, (size_t)b);
        ic = de_token_find(t, both, (size_t)(a + b));
    }
    if (ia < 0 || ib < 0 || ic < 0)
        return delta_fail(r->err, DELTA_EFORMAT, "merge %u: one of its tokens is not in the vocab",
                          rank);
    de_merge *m = merge_slot(t, (uint64_t)ia << 32 | (uint64_t)ib);
    if (m->pair == UINT64_MAX)
        *m = (de_merge){ (uint64_t)ia << 32 | (uint64_t)ib, rank, (uint32_t)ic };
    return 0;
}

static int read_merges(const reader *r, const de_json *root)
{
    delta_tokenizer *t = r->t;
    const de_json *merges = de_json_get(de_json_get(root, "model"), "merges");
    if (!merges || merges->kind != DE_JSON_ARRAY)
        return delta_fail(r->err, DELTA_EFORMAT, "model.merges is missing");
    t->merges_size = table_size(merges->n);
    t->merges = malloc(t->merges_size * sizeof *t->merges);
    if (!t->merges)
        return delta_fail(r->err, DELTA_ENOMEM, "table of %u merges", merges->n);
    for (size_t i = 0; i < t->merges_size; i++)
        t->merges[i].pair = UINT64_MAX;
    uint32_t rank = 0;
    int code = 0;
    for (const de_json *v = merges->child; v && code == 0; v = v->next)
        code = read_merge(r, v, rank++);
    return code;
}

static int by_first_then_longest(const void *a, const void *b)
{
    const de_added *x = a, *y = b;
    if (x->text[0] != y->text[0])
        return (uint8_t)x->text[0] < (uint8_t)y->text[0] ? -1 : 1;
    return x->len == y->len ? 0 : x->len > y->len ? -1 : 1;
}

static int fill_added(const reader *r)
{
    delta_tokenizer *t = r->t;
    for (uint32_t i = 0; i < t->n; i++)
        t->n_added += t->kind[i] == DELTA_TOKEN_ADDED || t->kind[i] == DELTA_TOKEN_SPECIAL;
    t->added = calloc(t->n_added + 1, sizeof *t->added);
    if (!t->added)
        return delta_fail(r->err, DELTA_ENOMEM, "table of %u added tokens", t->n_added);
    uint32_t k = 0;
    for (uint32_t i = 0; i < t->n; i++)
        if (t->kind[i] == DELTA_TOKEN_ADDED || t->kind[i] == DELTA_TOKEN_SPECIAL)
            t->added[k++] = (de_added){ (const char *)t->bytes + t->begin[i],
                                        t->begin[i + 1] - t->begin[i], i };
    qsort(t->added, k, sizeof *t->added, by_first_then_longest);
    for (uint32_t b = 0, i = 0; b <= 256; b++) {
        while (i < k && (uint8_t)t->added[i].text[0] < b)
            i++;
        t->added_first[b] = i;
    }
    t->added_first[256] = k;
    return 0;
}

/* The reference tokenizer splits by the tables of Unicode 16 and normalises by those of Unicode 9,
 * utf8proc does both by those of its own version (here Unicode 15 or 16). What differs stands
 * here, so that a text has the ids that the model knows it by. Pairs of first and last, rising. */
typedef uint32_t range[2];

static const range later_letters[] = {
    { 0x897, 0x897 },     { 0x1C89, 0x1C8A },   { 0xA7CB, 0xA7CD },   { 0xA7DA, 0xA7DC },
    { 0x105C0, 0x105F3 }, { 0x10D4A, 0x10D65 }, { 0x10D69, 0x10D6D }, { 0x10D6F, 0x10D85 },
    { 0x10EC2, 0x10EC4 }, { 0x10EFC, 0x10EFC }, { 0x11380, 0x11389 }, { 0x1138B, 0x1138B },
    { 0x1138E, 0x1138E }, { 0x11390, 0x113B5 }, { 0x113B7, 0x113C0 }, { 0x113C2, 0x113C2 },
    { 0x113C5, 0x113C5 }, { 0x113C7, 0x113CA }, { 0x113CC, 0x113D3 }, { 0x113E1, 0x113E2 },
    { 0x11BC0, 0x11BE0 }, { 0x11F5A, 0x11F5A }, { 0x13460, 0x143FA }, { 0x16100, 0x1612F },
    { 0x16D40, 0x16D6C }, { 0x18CFF, 0x18CFF }, { 0x1E5D0, 0x1E5F0 }, { 0x2EBF0, 0x2EE5D }
};
static const range later_numbers[] = { { 0x10D40, 0x10D49 }, { 0x116D0, 0x116E3 },
                                       { 0x11BF0, 0x11BF9 }, { 0x16130, 0x16139 },
                                       { 0x16D70, 0x16D79 }, { 0x1CCF0, 0x1CCF9 },
                                       { 0x1E5F1, 0x1E5FA } };
/* Marks, and what composes, that came after Unicode 9: to the reference starters, past which
 * nothing moves. And U+11A7, which utf8proc 2.8 takes for a final consonant and loses. */
static const range fixed_in_place[] = {
    { 0x7FD, 0x7FD },     { 0x897, 0x89F },     { 0x8CA, 0x8D3 },     { 0x9FE, 0x9FE },
    { 0xC3C, 0xC3C },     { 0xD3B, 0xD3C },     { 0xEBA, 0xEBA },     { 0x11A7, 0x11A7 },
    { 0x1715, 0x1715 },   { 0x1ABF, 0x1ACE },   { 0x1DF6, 0x1DFA },   { 0xA82C, 0xA82C },
    { 0x105C0, 0x105F3 }, { 0x10D24, 0x10D27 }, { 0x10D69, 0x10D6D }, { 0x10EAB, 0x10EAC },
    { 0x10EFC, 0x10EFF }, { 0x10F46, 0x10F50 }, { 0x10F82, 0x10F85 }, { 0x11070, 0x11070 },
    { 0x1133B, 0x1133B }, { 0x11380, 0x113E2 }, { 0x1145E, 0x1145E }, { 0x11839, 0x1183A },
    { 0x11930, 0x11930 }, { 0x1193D, 0x1193E }, { 0x11943, 0x11943 }, { 0x119E0, 0x119E0 },
    { 0x11A34, 0x11A34 }, { 0x11A47, 0x11A47 }, { 0x11A99, 0x11A99 }, { 0x11D42, 0x11D42 },
    { 0x11D44, 0x11D45 }, { 0x11D97, 0x11D97 }, { 0x11F41, 0x11F42 }, { 0x16100, 0x1612F },
    { 0x16D40, 0x16D6C }, { 0x16FF0, 0x16FF1 }, { 0x1E08F, 0x1E08F }, { 0x1E130, 0x1E136 },
    { 0x1E2AE, 0x1E2AE }, { 0x1E2EC, 0x1E2EF }, { 0x1E4EC, 0x1E4EF }, { 0x1E5EE, 0x1E5EF }
};

static bool among(uint32_t c, const range *table, size_t n)
{
    size_t lo = 0, hi = n;
    while (lo < hi) {
        const size_t mid = (lo + hi) / 2;
        if (c > table[mid][1])
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo < n && c >= table[lo][0];
}
#define AMONG(c, table) among(c, table, sizeof(table) / sizeof *(table))

static enum de_class class_of(int32_t cp, bool marks)
{
    if ((cp >= 9 && cp <= 13) || cp == 0x20 || cp == 0x85 || cp == 0xA0 || cp == 0x1680 ||
        (cp >= 0x2000 && cp <= 0x200A) || cp == 0x2028 || cp == 0x2029 || cp == 0x202F ||
        cp == 0x205F || cp == 0x3000)
        return DE_SPACE; /* White_Space */
    switch (utf8proc_category(cp)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
        return DE_LETTER;
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
        return marks ? DE_MARK : DE_OTHER;
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_NO:
        return DE_NUMBER;
    case UTF8PROC_CATEGORY_CN: /* not assigned, says utf8proc */
        return AMONG((uint32_t)cp, later_letters)   ? DE_LETTER
               : AMONG((uint32_t)cp, later_numbers) ? DE_NUMBER
                                                    : DE_OTHER;
    default:
        return DE_OTHER;
    }
}

/* The pipeline this code implements, and no other. */
static int check_pipeline(const reader *r, const de_json *root, bool *ret_marks)
{
    const de_json *model = de_json_get(root, "model"), *norm = de_json_get(root, "normalizer");
    const de_json *pre = de_json_get(root, "pre_tokenizer"), *split = NULL;
    bool b;
    if (!de_json_is_string(de_json_get(model, "type"), "BPE"))
        return delta_fail(r->err, DELTA_EUNSUPPORTED, "model.type must be BPE");
    if (!de_json_is_string(de_json_get(norm, "type"), "NFC"))
        return delta_fail(r->err, DELTA_EUNSUPPORTED, "normalizer must be NFC");
    if ((de_json_bool(de_json_get(model, "byte_fallback"), &b) && b) ||
        (de_json_bool(de_json_get(model, "ignore_merges"), &b) && b))
        return delta_fail(r->err, DELTA_EUNSUPPORTED,
                          "byte_fallback and ignore_merges must be off");
    const de_json *steps = de_json_get(pre, "pretokenizers");
    for (const de_json *s = steps ? steps->child : NULL; s; s = s->next)
        if (de_json_is_string(de_json_get(s, "type"), "Split"))
            split = s;
    const de_json *regex = de_json_get(de_json_get(split, "pattern"), "Regex");
    if (de_json_is_string(regex, pattern_marks))
        *ret_marks = true;
    else if (de_json_is_string(regex, pattern_plain))
        *ret_marks = false;
    else
        return delta_fail(r->err, DELTA_EUNSUPPORTED, "unknown split pattern: %s",
                          regex && regex->kind == DE_JSON_STRING ? regex->text : "(none)");
    return 0;
}

static int read_json(const char *dir, const char *name, bool needed, de_arena *a, de_json **ret_v,
                     delta_error *err)
{
    char *path = de_path_join(dir, name), *text = NULL;
    size_t len;
    int code = path ? de_file_read(path, FILE_MAX, &text, &len, err)
                    : delta_fail(err, DELTA_ENOMEM, "path of %s", name);
    if (code == 0) {
        code = de_json_parse(a, text, len, ret_v, err);
        if (code < 0)
            delta_error_prefix(err, "%s", path);
    } else if (code == DELTA_ENOTFOUND && !needed) {
        code = 0;
    }
    free(text);
    free(path);
    return code;
}

static int fill(reader *r, const char *dir)
{
    delta_tokenizer *t = r->t;
    de_arena a;
    de_arena_init(&a, 1u << 30);
    de_json *root = NULL, *config = NULL;
    bool marks = true;
    entry *e = NULL;
    int code = read_json(dir, "tokenizer.json", true, &a, &root, r->err);
    if (code == 0)
        code = read_json(dir, "tokenizer_config.json", false, &a, &config, r->err);
    if (code == 0)
        code = check_pipeline(r, root, &marks);
    if (code == 0) {
        e = calloc(DE_TOKENS_MAX, sizeof *e);
        t->classes = malloc(DE_CODEPOINTS);
        if (!e || !t->classes)
            code = delta_fail(r->err, DELTA_ENOMEM, "tokenizer tables");
    }
    if (code == 0)
        code = read_entries(r, e, root, config);
    if (code == 0)
        code = fill_tokens(r, e);
    if (code == 0)
        code = read_merges(r, root);
    if (code == 0)
        code = fill_added(r);
    for (int32_t cp = 0; code == 0 && cp < DE_CODEPOINTS; cp++)
        t->classes[cp] = (uint8_t)class_of(cp, marks);
    free(e);
    de_arena_done(&a);
    if (code < 0)
        delta_error_prefix(r->err, "%s/tokenizer.json", dir);
    return code;
}

int delta_tokenizer_open(const char *dir, delta_tokenizer **ret_tok, delta_error *err)
{
    reader r = { .t = calloc(1, sizeof *r.t), .err = err };
    if (!r.t)
        return delta_fail(err, DELTA_ENOMEM, "tokenizer");
    fill_alphabet(&r);
    int code = fill(&r, dir);
    if (code < 0) {
        delta_tokenizer_free(r.t);
        return code;
    }
    *ret_tok = r.t;
    return 0;
}

void delta_tokenizer_free(delta_tokenizer *t)
{
    if (!t)
        return;
    free(t->bytes);
    free(t->begin);
    free(t->kind);
    free(t->whole);
    free(t->by_text);
    free(t->merges);
    free(t->added);
    free(t->classes);
    free(t);
}

/* ---- text to ids */

/* Offset of the first byte that is no UTF-8, or len. */
static size_t valid_utf8(const uint8_t *p, size_t len)
{
    for (size_t i = 0; i < len;) {
        if (p[i] < 0x80) {
            i++;
            continue;
        }
        int k = de_utf8_look(p + i, len - i);
        if (k <= 0)
            return i;
        i += (size_t)k;
    }
    return len;
}

/* Characters that NFC never touches, whatever stands beside them: everything below U+0300, and
 * the large blocks without combining or composable characters. */
static bool is_nfc(const uint8_t *p, const uint8_t *end)
{
    while (p < end) {
        if (*p < 0xCC) { /* below U+0300: ASCII or two bytes */
            p += *p < 0x80 ? 1 : 2;
            continue;
        }
        uint32_t c = de_utf8_next(&p);
        if (!((c >= 0x400 && c < 0x483) || (c >= 0x2010 && c < 0x2028) ||
              (c >= 0x2190 && c < 0x2329) || (c >= 0x232B && c < 0x2ADC) ||
              (c >= 0x3001 && c < 0x302A) || (c >= 0x3041 && c < 0x3097) ||
              (c >= 0x30A1 && c < 0x30FB) || (c >= 0x4E00 && c < 0xA000) ||
              (c >= 0xAC00 && c < 0xD7A4) || (c >= 0xFF01 && c < 0xFF66) ||
              (c >= 0x1F300 && c < 0x1FB00)))
            return false;
    }
    return true;
}

static void encode_pieces(const delta_tokenizer *t, const uint8_t *p, const uint8_t *end,
                          de_ids *ids)
{
    while (p < end && !ids->failed) {
        const uint8_t *next = de_piece_end(t, p, end);
        de_bpe(t, p, (size_t)(next - p), ids);
        p = next;
    }
}

/* NFC of [p, end) as the reference makes it: *ret_text is malloc'ed; false without memory. */
static bool nfc(const uint8_t *p, const uint8_t *end, uint8_t **ret_text, size_t *ret_n)
{
    uint8_t *text = NULL;
    size_t n = 0;
    while (p < end) {
        const uint8_t *stop = p, *next = p; /* [p, stop) to be normalised, [stop, next) as it is */
        while (next < end && !AMONG(de_utf8_next(&next), fixed_in_place))
            stop = next;
        utf8proc_uint8_t *part = NULL;
        const utf8proc_ssize_t k =
            utf8proc_map(p, stop - p, &part, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
        uint8_t *more = k < 0 ? NULL : realloc(text, n + (size_t)k + (size_t)(next - stop) + 1);
        if (!more) {
            free(part);
            free(text);
            return false;
        }
        text = more;
        memcpy(text + n, part, (size_t)k);
        memcpy(text + n + k, stop, (size_t)(next - stop));
        n += (size_t)k + (size_t)(next - stop);
        free(part);
        p = next;
    }
    *ret_text = text;
    *ret_n = n;
    return true;
}

/* A stretch without added tokens. */
static void encode_segment(const delta_tokenizer *t, const uint8_t *p, const uint8_t *end,
                           de_ids *ids)
{
    if (p == end)
        return;
    if (is_nfc(p, end)) {
        encode_pieces(t, p, end, ids);
        return;
    }
    uint8_t *text;
    size_t n;
    if (!nfc(p, end, &text, &n)) {
        ids->failed = true;
        return;
    }
    encode_pieces(t, text, text + n, ids);
    free(text);
}

/* The longest added token at p, or NULL. */
static const de_added *added_at(const delta_tokenizer *t, const uint8_t *p, const uint8_t *end)
{
    for (uint32_t i = t->added_first[*p]; i < t->added_first[*p + 1]; i++)
        if (t->added[i].len <= (size_t)(end - p) &&
            memcmp(t->added[i].text, p, t->added[i].len) == 0)
            return &t->added[i];
    return NULL;
}

int delta_tokenize(const delta_tokenizer *t, const char *text, size_t len, bool plain,
                   uint32_t **ret_ids, size_t *ret_n, delta_error *err)
{
    const uint8_t *p = (const uint8_t *)text, *end = p + len, *from = p;
    const size_t bad = valid_utf8(p, len);
    if (bad < len)
        return delta_fail(err, DELTA_EINVALID, "text: byte %zu is no UTF-8", bad);
    de_ids ids = { .cap = len / 3 + 16 };
    ids.p = malloc(ids.cap * sizeof *ids.p);
    if (!ids.p)
        return delta_fail(err, DELTA_ENOMEM, "tokens of %zu bytes of text", len);
    while (!plain && p < end) {
        const de_added *a =
            t->added_first[*p] < t->added_first[*p + 1] ? added_at(t, p, end) : NULL;
        if (!a) {
            p++;
            continue;
        }
        encode_segment(t, from, p, &ids);
        de_ids_add(&ids, a->id);
        p += a->len;
        from = p;
    }
    encode_segment(t, from, end, &ids);
    if (ids.failed) {
        free(ids.p);
        return delta_fail(err, DELTA_ENOMEM, "tokens of %zu bytes of text", len);
    }
    *ret_ids = ids.p;
    *ret_n = ids.n;
    return 0;
}

/* ---- ids to text */

int delta_detokenize(const delta_tokenizer *t, const uint32_t *ids, size_t n, bool skip_special,
                     char **ret_text, size_t *ret_len, delta_error *err)
{
    size_t cap = DELTA_DETOK_ROOM + 1, at = 0, len;
    for (size_t i = 0; i < n; i++) {
        (void)delta_token_bytes(t, ids[i], &len);
        cap += len * 3;
    }
    char *out = malloc(cap);
    if (!out)
        return delta_fail(err, DELTA_ENOMEM, "text of %zu tokens", n);
    delta_detok d = { 0 };
    for (size_t i = 0; i < n; i++) {
        const uint8_t *p = delta_token_bytes(t, ids[i], &len);
        if (skip_special && delta_token_kind(t, ids[i]) == DELTA_TOKEN_SPECIAL)
            continue;
        at += delta_detok_push(&d, p, len, out + at, cap - at);
    }
    at += delta_detok_flush(&d, out + at, cap - at);
    out[at] = 0;
    *ret_text = out;
    *ret_len = at;
    return 0;
}

/* ---- single tokens */

uint32_t delta_tokenizer_size(const delta_tokenizer *t)
{
    return t->n;
}

int64_t delta_tokenizer_added_id(const delta_tokenizer *t, const char *text)
{
    const size_t n = strlen(text);
    for (uint32_t i = 0; i < t->n_added; i++)
        if (t->added[i].len == n && memcmp(t->added[i].text, text, n) == 0)
            return t->added[i].id;
    return -1;
}

const uint8_t *delta_token_bytes(const delta_tokenizer *t, uint32_t id, size_t *ret_len)
{
    if (delta_token_kind(t, id) == DELTA_TOKEN_NONE) {
        *ret_len = 0;
        return NULL;
    }
    *ret_len = t->begin[id + 1] - t->begin[id];
    return t->bytes + t->begin[id];
}

enum delta_token_kind delta_token_kind(const delta_tokenizer *t, uint32_t id)
{
    return id < t->n ? (enum delta_token_kind)t->kind[id] : DELTA_TOKEN_NONE;
}
