/* The tries and slices of the vocabulary against the tokens one by one. */
#include "support/tap.h"

#include "base/utf8.h"
#include "engine/grammar/vocab.h"

static delta_tokenizer *tok;
static delta_grammar_vocab *vocab;

static bool open_vocab(uint32_t n_vocab)
{
    delta_error err = { 0 };
    const uint32_t end = 2;
    if (delta_tokenizer_open(DEMO_MODEL_DIR, &tok, &err) < 0 ||
        delta_grammar_vocab_new(tok, n_vocab ? n_vocab : delta_tokenizer_size(tok), &end, 1, &vocab,
                                &err) < 0) {
        TAP_FAIL("%s", err.text);
        return false;
    }
    return true;
}

static void close_vocab(void)
{
    delta_grammar_vocab_free(vocab);
    delta_tokenizer_free(tok);
}

static bool is_matchable(uint32_t id)
{
    const enum delta_token_kind k = delta_token_kind(tok, id);
    size_t len = 0;
    (void)delta_token_bytes(tok, id, &len);
    return (k == DELTA_TOKEN_TEXT || k == DELTA_TOKEN_ADDED) && len && id != 2;
}

TEST(trie_leads_to_every_token_and_to_nothing_else)
{
    REQUIRE(open_vocab(0));
    uint32_t n = 0;
    for (uint32_t id = 0; id < delta_tokenizer_size(tok); id++) {
        size_t len;
        const uint8_t *p = delta_token_bytes(tok, id, &len);
        CHECK_EQ(de_bit(vocab->text, id), is_matchable(id));
        if (!is_matchable(id))
            continue;
        n++;
        const uint32_t at = de_trie_find(&vocab->trie, 0, p, len);
        REQUIRE(at != UINT32_MAX);
        const de_trie_node *node = &vocab->trie.nodes[at];
        CHECK_EQ(node->depth, len);
        bool here = false;
        for (uint32_t i = 0; i < node->n_here; i++)
            here |= vocab->trie.order[node->rank + i] == id;
        CHECK(here);
    }
    CHECK_EQ(vocab->trie.n_order, n);
    uint32_t sum = 0;
    for (uint32_t i = 0; i < vocab->trie.n; i++)
        sum += vocab->trie.nodes[i].n_here;
    CHECK_EQ(sum, n);
    CHECK_EQ(de_trie_find(&vocab->trie, 0, "\xFF\xFF\xFF", 3), UINT32_MAX);
    close_vocab();
}

TEST(subtrees_are_ranges_of_ranks)
{
    REQUIRE(open_vocab(0));
    const de_trie *t = &vocab->trie;
    for (uint32_t i = 0; i < t->n; i++) {
        uint32_t sum = 0;
        for (uint32_t k = i; k < t->nodes[i].skip; k++) {
            sum += t->nodes[k].n_here;
            CHECK(k == i || t->nodes[k].depth > t->nodes[i].depth);
        }
        CHECK_EQ(t->nodes[t->nodes[i].skip].rank - t->nodes[i].rank, sum);
    }
    close_vocab();
}

TEST(slices_hold_the_tokens_that_are_text_of_their_sort)
{
    REQUIRE(open_vocab(4000));
    CHECK_EQ(delta_grammar_vocab_size(vocab), 4000);
    CHECK_EQ(delta_grammar_mask_words(vocab), 125);
    for (uint32_t id = 0; id < delta_tokenizer_size(tok); id++) {
        size_t len;
        const uint8_t *p = delta_token_bytes(tok, id, &len);
        bool text = is_matchable(id), json = text;
        uint32_t chars = 0;
        for (size_t i = 0; text && i < len; chars++) {
            const int k = de_utf8_look(p + i, len - i);
            text = k >= 0;
            json &= text && p[i] >= 0x20 && p[i] != '"' && p[i] != '\\';
            i += k > 0 ? (size_t)k : len;
        }
        const bool plain = text && !memchr(p, '<', len) && !memchr(p, 0, len);
        CHECK_EQ(de_bit(vocab->slice[DE_SLICE_TEXT].all, id), plain);
        const bool tag = memmem(p, len, "</tool_call>", 12) != NULL;
        CHECK_EQ(de_bit(vocab->slice[DE_SLICE_JSON].all, id), json && text && !tag);
        if (tag)
            CHECK(de_trie_find(&vocab->slice[DE_SLICE_JSON].rest, 0, p, len) != UINT32_MAX);
        for (uint32_t k = 1; k <= DE_SLICE_SHORT; k++)
            CHECK_EQ(de_bit(vocab->slice[DE_SLICE_TEXT].upto[k], id), plain && chars <= k);
        const bool rest = text && memchr(p, '<', len) && !memchr(p, 0, len);
        if (rest)
            CHECK(de_trie_find(&vocab->slice[DE_SLICE_TEXT].rest, 0, p, len) != UINT32_MAX);
    }
    CHECK(vocab->n_think_ids > 0);
    close_vocab();
}

TEST(vocabulary_refuses_what_does_not_fit_the_tokenizer)
{
    delta_error err = { 0 };
    REQUIRE(delta_tokenizer_open(DEMO_MODEL_DIR, &tok, &err) == 0);
    const uint32_t n = delta_tokenizer_size(tok), end = n;
    CHECK_EQ(delta_grammar_vocab_new(tok, n - 1, NULL, 0, &vocab, &err), DELTA_EINVALID);
    CHECK_EQ(delta_grammar_vocab_new(tok, n, &end, 1, &vocab, &err), DELTA_EINVALID);
    CHECK_EQ(delta_grammar_vocab_new(tok, n + 1, &end, 1, &vocab, &err), 0);
    delta_grammar_vocab_free(vocab);
    delta_grammar_vocab_free(NULL);
    delta_tokenizer_free(tok);
}
