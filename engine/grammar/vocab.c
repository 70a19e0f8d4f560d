/* vocab.c -- see vocab.h. */
#include "grammar/vocab.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "base/utf8.h"

/* ---- tries */

typedef struct entry {
    const uint8_t *p;
    uint32_t len, id;
} entry;

static int by_bytes(const void *x, const void *y)
{
    const entry *a = x, *b = y;
    const uint32_t n = a->len < b->len ? a->len : b->len;
    const int c = memcmp(a->p, b->p, n);
    if (c)
        return c;
    if (a->len != b->len)
        return a->len < b->len ? -1 : 1;
    return a->id < b->id ? -1 : a->id > b->id;
}

/* e: sorted. */
static bool trie_make(de_trie *t, const entry *e, uint32_t n)
{
    size_t nodes = 1;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t same = 0;
        if (i)
            while (same < e[i - 1].len && same < e[i].len && e[i - 1].p[same] == e[i].p[same])
                same++;
        nodes += e[i].len - same;
    }
    t->nodes = calloc(nodes + 1, sizeof *t->nodes);
    t->order = malloc((n ? n : 1) * sizeof *t->order);
    if (!t->nodes || !t->order)
        return false;
    uint32_t path[DELTA_GRAMMAR_TOKEN_BYTES + 1] = { 0 }; /* nodes that are still open */
    uint32_t depth = 0;
    t->n = 1;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t same = 0;
        if (i)
            while (same < e[i - 1].len && same < e[i].len && e[i - 1].p[same] == e[i].p[same])
                same++;
        for (; depth > same; depth--)
            t->nodes[path[depth]].skip = t->n;
        for (; depth < e[i].len; t->n++) {
            de_trie_node *node = &t->nodes[t->n];
            node->byte = e[i].p[depth++];
            node->depth = (uint16_t)depth;
            node->rank = i;
            path[depth] = t->n;
        }
        t->nodes[path[depth]].n_here++;
        t->order[i] = e[i].id;
    }
    for (;; depth--) {
        t->nodes[path[depth]].skip = t->n;
        if (depth == 0)
            break;
    }
    t->nodes[t->n] = (de_trie_node){ .skip = t->n, .rank = n };
    t->n_order = n;
    assert(t->n == nodes);
    return true;
}

static void trie_done(de_trie *t)
{
    free(t->nodes);
    free(t->order);
}

uint32_t de_trie_child(const de_trie *t, uint32_t i, uint8_t byte)
{
    const uint32_t end = t->nodes[i].skip;
    for (uint32_t c = i + 1; c < end && t->nodes[c].byte <= byte; c = t->nodes[c].skip)
        if (t->nodes[c].byte == byte)
            return c;
    return UINT32_MAX;
}

uint32_t de_trie_find(const de_trie *t, uint32_t i, const void *bytes, size_t len)
{
    for (size_t k = 0; k < len && i != UINT32_MAX; k++)
        i = de_trie_child(t, i, ((const uint8_t *)bytes)[k]);
    return i;
}

/* ---- slices */

/* Tags that a JSON string may not hold everywhere: such tokens are looked at one by one. */
static bool has_tag(const uint8_t *s, uint32_t len)
{
    return memmem(s, len, "</parameter>", 12) || memmem(s, len, "</function>", 11) ||
           memmem(s, len, "</tool_call>", 12);
}

/* How much of s is text of this sort; *ret_chars counts characters, a cut one at the end too. */
static uint32_t text_length(enum de_slice_kind kind, const uint8_t *s, uint32_t len,
                            uint32_t *ret_chars)
{
    uint32_t i = 0, chars = 0;
    while (i < len) {
        const int k = de_utf8_look(s + i, len - i);
        const bool other = kind == DE_SLICE_TEXT ? s[i] == 0 || s[i] == '<'
                                                 : s[i] < 0x20 || s[i] == '"' || s[i] == '\\';
        if (k < 0 || other)
            break;
        chars++;
        i = k ? i + (uint32_t)k : len;
    }
    *ret_chars = chars;
    return i;
}

/* May a token whose text ends at i go on? */
static bool goes_on(enum de_slice_kind kind, const uint8_t *s, uint32_t i)
{
    return kind == DE_SLICE_TEXT ? s[i] == '<' : s[i] == '"' || s[i] == '\\';
}

static bool slice_make(de_slice *s, enum de_slice_kind kind, const entry *e, uint32_t n,
                       uint32_t words)
{
    uint16_t *chars = malloc((n ? n : 1) * sizeof *chars);
    entry *rest = malloc((n ? n : 1) * sizeof *rest);
    uint32_t n_rest = 0, n_in = 0;
    bool ok = chars && rest;
    for (uint32_t i = 0; ok && i < n; i++) {
        uint32_t k = 0;
        const uint32_t end = text_length(kind, e[i].p, e[i].len, &k);
        const bool tag = kind == DE_SLICE_JSON && has_tag(e[i].p, end);
        chars[i] = end == e[i].len && !tag ? (uint16_t)k : 0;
        if (chars[i]) {
            n_in++;
            s->max_chars = k > s->max_chars ? k : s->max_chars;
        } else if (tag || goes_on(kind, e[i].p, end)) {
            rest[n_rest++] = e[i];
        }
    }
    ok = ok && (s->all = calloc(words, sizeof *s->all)) &&
         (s->ids = malloc((n_in ? n_in : 1) * sizeof *s->ids)) &&
         (s->last = malloc((n_in ? n_in : 1) * sizeof *s->last)) &&
         (s->lines = malloc((n_in ? n_in : 1) * sizeof *s->lines)) &&
         (s->line_chars = malloc((n_in ? n_in : 1) * sizeof *s->line_chars)) &&
         (s->begin = calloc(s->max_chars + 2, sizeof *s->begin));
    for (uint32_t k = 1; ok && k <= DE_SLICE_SHORT; k++)
        ok = (s->upto[k] = calloc(words, sizeof **s->upto)) != NULL;
    if (ok) {
        for (uint32_t i = 0; i < n; i++)
            if (chars[i])
                s->begin[chars[i] + 1]++;
        for (uint32_t k = 1; k <= s->max_chars + 1; k++)
            s->begin[k] += s->begin[k - 1];
        uint32_t *at = calloc(s->max_chars + 1, sizeof *at);
        ok = at != NULL;
        for (uint32_t i = 0; ok && i < n; i++)
            if (chars[i]) {
                const uint32_t k = s->begin[chars[i]] + at[chars[i]]++;
                uint32_t last = e[i].len - 1;
                while (last && (e[i].p[last] & 0xC0) == 0x80)
                    last--;
                s->ids[k] = e[i].id;
                s->last[k] = (uint16_t)last;
                if (e[i].p[last] == '\n') {
                    s->lines[s->n_lines] = e[i].id;
                    s->line_chars[s->n_lines++] = chars[i];
                }
                de_bit_set(s->all, e[i].id);
                for (uint32_t c = chars[i]; c <= DE_SLICE_SHORT; c++)
                    de_bit_set(s->upto[c], e[i].id);
            }
        free(at);
    }
    ok = ok && trie_make(&s->rest, rest, n_rest);
    free(chars);
    free(rest);
    return ok;
}

static void slice_done(de_slice *s)
{
    free(s->all);
    for (uint32_t k = 0; k <= DE_SLICE_SHORT; k++)
        free(s->upto[k]);
    free(s->ids);
    free(s->last);
    free(s->lines);
    free(s->line_chars);
    free(s->begin);
    trie_done(&s->rest);
}

/* ---- the vocabulary */

static bool fill(delta_grammar_vocab *v, const delta_tokenizer *t, entry *e)
{
    uint32_t n = 0;
    const uint32_t n_ids = delta_tokenizer_size(t);
    for (uint32_t id = 0; id < n_ids; id++) {
        const enum delta_token_kind kind = delta_token_kind(t, id);
        size_t len = 0;
        const uint8_t *p = delta_token_bytes(t, id, &len);
        if ((kind != DELTA_TOKEN_TEXT && kind != DELTA_TOKEN_ADDED) || !p || len == 0 ||
            len > DELTA_GRAMMAR_TOKEN_BYTES || de_vocab_is_end(v, id))
            continue;
        e[n++] = (entry){ p, (uint32_t)len, id };
        v->longest = len > v->longest ? (uint32_t)len : v->longest;
        v->n_think_ids += memmem(p, len, "</think>", 8) != NULL;
        const uint8_t *tag = memmem(p, len, "<function=", 10);
        v->has_long_tags |= tag && (memchr(p, '<', (size_t)(tag - p)) ||
                                    memchr(tag + 1, '<', (size_t)(p + len - tag - 1)));
    }
    qsort(e, n, sizeof *e, by_bytes);
    v->text = calloc(v->words, sizeof *v->text);
    v->think_ids = malloc((v->n_think_ids + 1) * sizeof *v->think_ids);
    if (!v->text || !v->think_ids || !trie_make(&v->trie, e, n))
        return false;
    v->n_think_ids = 0;
    for (uint32_t i = 0; i < n; i++) {
        de_bit_set(v->text, e[i].id);
        if (memmem(e[i].p, e[i].len, "</think>", 8))
            v->think_ids[v->n_think_ids++] = e[i].id;
    }
    for (enum de_slice_kind k = 0; k < DE_SLICE_N; k++)
        if (!slice_make(&v->slice[k], k, e, n, v->words))
            return false;
    return true;
}

int delta_grammar_vocab_new(const delta_tokenizer *t, uint32_t n_vocab, const uint32_t *end_ids,
                            size_t n_end_ids, delta_grammar_vocab **ret_v, delta_error *err)
{
    assert(t && ret_v && (end_ids || n_end_ids == 0));
    const uint32_t n_ids = delta_tokenizer_size(t);
    if (n_vocab < n_ids)
        return delta_fail(err, DELTA_EINVALID, "n_vocab %u is less than the tokenizer's %u",
                          n_vocab, n_ids);
    if (n_end_ids > DELTA_GRAMMAR_END_IDS)
        return delta_fail(err, DELTA_EINVALID, "%zu end ids, at most %d", n_end_ids,
                          DELTA_GRAMMAR_END_IDS);
    for (size_t i = 0; i < n_end_ids; i++)
        if (end_ids[i] >= n_vocab)
            return delta_fail(err, DELTA_EINVALID, "end id %u is not below %u", end_ids[i],
                              n_vocab);
    delta_grammar_vocab *v = calloc(1, sizeof *v);
    entry *e = malloc(((size_t)n_ids + 1) * sizeof *e);
    bool ok = v && e;
    if (v)
        atomic_init(&v->refs, 1); /* it may be freed below */
    if (ok) {
        v->tok = t;
        v->n_vocab = n_vocab;
        v->words = n_vocab / 32 + (n_vocab % 32 != 0);
        v->n_end_ids = (uint32_t)n_end_ids;
        for (size_t i = 0; i < n_end_ids; i++)
            v->end_ids[i] = end_ids[i];
        ok = fill(v, t, e);
    }
    free(e);
    if (ok) {
        const int code = de_text_auto_make(&v->text_auto, err);
        if (code < 0) {
            delta_grammar_vocab_free(v);
            return code;
        }
    }
    if (!ok) {
        delta_grammar_vocab_free(v);
        return delta_fail(err, DELTA_ENOMEM, "grammar vocabulary: %u tokens", n_ids);
    }
    *ret_v = v;
    return 0;
}

delta_grammar_vocab *de_vocab_ref(const delta_grammar_vocab *v)
{
    delta_grammar_vocab *own = (delta_grammar_vocab *)v; /* only the count changes */
    atomic_fetch_add_explicit(&own->refs, 1, memory_order_relaxed);
    return own;
}

void delta_grammar_vocab_free(delta_grammar_vocab *v)
{
    if (!v || atomic_fetch_sub_explicit(&v->refs, 1, memory_order_acq_rel) != 1)
        return;
    trie_done(&v->trie);
    de_text_auto_done(&v->text_auto);
    free(v->text);
    free(v->think_ids);
    for (enum de_slice_kind k = 0; k < DE_SLICE_N; k++)
        slice_done(&v->slice[k]);
    free(v);
}

uint32_t delta_grammar_vocab_size(const delta_grammar_vocab *v)
{
    return v->n_vocab;
}

uint32_t delta_grammar_mask_words(const delta_grammar_vocab *v)
{
    return v->words;
}

bool de_vocab_is_end(const delta_grammar_vocab *v, uint32_t id)
{
    for (uint32_t i = 0; i < v->n_end_ids; i++)
        if (v->end_ids[i] == id)
            return true;
    return false;
}
