/* fuzz_grammar.c -- compile what comes, then take tokens at random: the first byte chooses the form,
 * up to a NUL is its text, the bytes behind it choose tokens of each mask, steps back and forced
 * stretches. What a mask lets through must be taken; steps back must lead where they came from; text
 * that is not in the mask must not be taken. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "delta/grammar.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static delta_tokenizer *tok;
static delta_grammar_vocab *vocab;
static uint32_t words, n_vocab;

static void open_vocab(void)
{
    delta_error err = { 0 };
    if (delta_tokenizer_open(FUZZ_MODEL_DIR, &tok, &err) < 0)
        abort();
    const uint32_t end = (uint32_t)delta_tokenizer_added_id(tok, "<|im_end|>");
    n_vocab = delta_tokenizer_size(tok);
    if (delta_grammar_vocab_new(tok, n_vocab, &end, 1, &vocab, &err) < 0)
        abort();
    words = delta_grammar_mask_words(vocab);
}

static uint32_t pick(const uint32_t *bits, uint32_t k)
{
    uint32_t n = 0, last = 0;
    for (uint32_t i = 0; i < words; i++)
        n += (uint32_t)__builtin_popcount(bits[i]);
    k = n ? k % n : 0;
    for (uint32_t id = 0; id < n_vocab; id++)
        if (bits[id / 32] >> (id % 32) & 1) {
            last = id;
            if (k-- == 0)
                break;
        }
    return last;
}

static void play(delta_matcher *m, const uint8_t *p, size_t n)
{
    uint32_t *bits = calloc(words, sizeof *bits), *again = calloc(words, sizeof *again);
    if (!bits || !again)
        abort();
    for (size_t i = 0; i + 1 < n && i < 400; i += 2) {
        const enum delta_mask_kind kind = delta_matcher_mask(m, bits);
        if (kind == DELTA_MASK_DEAD)
            break;
        const uint32_t k = p[i] | (uint32_t)p[i + 1] << 8, any = k % n_vocab;
        uint32_t forced[16];
        const size_t n_forced = k % 7 == 0 ? delta_matcher_forced(m, forced, 16) : 0;
        if (n_forced && delta_matcher_accept(m, forced, n_forced, NULL, NULL) < 0)
            abort();
        if (n_forced && delta_matcher_rollback(m, n_forced, NULL) < 0)
            abort();
        if (kind == DELTA_MASK_SET) {
            const bool takes = delta_matcher_accept(m, &any, 1, NULL, NULL) == 0;
            if (takes != (bits[any / 32] >> (any % 32) & 1))
                abort();
            if (takes && delta_matcher_rollback(m, 1, NULL) < 0)
                abort();
        }
        const uint32_t id = kind == DELTA_MASK_FREE ? any : pick(bits, k);
        if (delta_matcher_accept(m, &id, 1, NULL, NULL) < 0)
            abort();
        if (k % 11 == 0) {
            if (delta_matcher_rollback(m, 1, NULL) < 0 || delta_matcher_mask(m, again) != kind ||
                (kind == DELTA_MASK_SET && memcmp(bits, again, words * sizeof *bits) != 0) ||
                delta_matcher_accept(m, &id, 1, NULL, NULL) < 0)
                abort();
        }
    }
    free(bits);
    free(again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!vocab)
        open_vocab();
    if (size < 2 || size > 4096)
        return 0;
    const char *text = (const char *)data + 1;
    const void *nul = memchr(text, 0, size - 1);
    const size_t len = nul ? (size_t)((const char *)nul - text) : size - 1;
    const delta_str s = { text, len };
    char tool[4608];
    const int n =
        snprintf(tool, sizeof tool,
                 "{\"name\":\"f\",\"parameters\":{\"properties\":{\"s\":{\"type\":\"string\"},"
                 "\"x\":%.*s}}}",
                 (int)len, text);
    const delta_str tools = { tool, n < 0 ? 0 : (size_t)n };
    delta_grammar_spec spec = { .thinking = data[0] & 64, .parallel = true, .text = s };
    static const enum delta_content_form forms[] = { DELTA_CONTENT_SCHEMA, DELTA_CONTENT_REGEX,
                                                     DELTA_CONTENT_GRAMMAR, DELTA_CONTENT_CHOICE };
    if ((data[0] & 7) < 4) {
        spec.content = forms[data[0] & 7];
        spec.choices = &s;
        spec.n_choices = 1;
    } else {
        spec.calls = data[0] & 1 ? DELTA_CALLS_AUTO : DELTA_CALLS_REQUIRED;
        spec.calls_in_reasoning = data[0] & 2;
        spec.tools_json = &tools;
        spec.n_tools = 1;
    }
    delta_grammar *g = NULL;
    delta_matcher *m = NULL;
    delta_error err = { 0 };
    const int e = delta_grammar_compile(vocab, &spec, &g, &err);
    if (e < 0 && (err.code != e || !err.text[0]))
        abort();
    if (e == 0 && delta_matcher_new(g, &m, NULL) == 0 && nul)
        play(m, (const uint8_t *)nul + 1, size - 2 - len);
    delta_matcher_free(m);
    delta_grammar_free(g);
    return 0;
}
