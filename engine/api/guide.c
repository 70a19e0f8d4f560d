/* guide.c -- see guide.h. */
#include "api/guide.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

/* What opens a call: the tag, white space, the function. Reasoning may speak of the tag alone. */
static const char CALL_OPENS[] = "<tool_call>";
static const char FUNCTION_OPENS[] = "<function=";
static const char CALL_ENDS[] = "</tool_call>";

static int find(const delta_tokenizer *t, const char *text, uint32_t *ids, uint32_t *ret_n,
                delta_error *err)
{
    uint32_t *found = NULL;
    size_t n = 0;
    int r = delta_tokenize(t, text, strlen(text), false, &found, &n, err);
    if (r < 0)
        return r;
    if (n > DE_FORCED_MAX / 2) {
        free(found);
        return delta_fail(err, DELTA_EFORMAT, "the end of reasoning takes %zu tokens, at most %d",
                          n, DE_FORCED_MAX / 2);
    }
    memcpy(ids, found, n * sizeof *ids);
    *ret_n = (uint32_t)n;
    free(found);
    return 0;
}

int de_think_tags_find(const delta_tokenizer *t, de_think_tags *ret_tags, delta_error *err)
{
    de_think_tags tags = { .close_id = delta_tokenizer_added_id(t, "</think>") };
    int r = 0;
    if (tags.close_id >= 0)
        r = find(t, "\n</think>\n\n", tags.after_text, &tags.n_after_text, err);
    if (tags.close_id >= 0 && r == 0)
        r = find(t, "</think>\n\n", tags.after_newline, &tags.n_after_newline, err);
    if (r == 0)
        *ret_tags = tags;
    return r;
}

/* ---- the budget ---- */

/* How far into CALL_OPENS, white space, FUNCTION_OPENS: the state after one byte more. */
static uint8_t follow_call(uint8_t at, char c)
{
    enum { TAG = sizeof CALL_OPENS - 1, FULL = TAG + sizeof FUNCTION_OPENS - 1 };
    if (at < TAG)
        return c == CALL_OPENS[at] ? (uint8_t)(at + 1) : c == CALL_OPENS[0];
    if (at == TAG && strchr(" \t\r\n", c) && c)
        return at;
    if (at == TAG + 1 && c == CALL_OPENS[1])
        return 2; /* the tag once more */
    if (at < FULL)
        return c == FUNCTION_OPENS[at - TAG] ? (uint8_t)(at + 1) : c == CALL_OPENS[0];
    /* Inside: a closing tag ends it. Its first bytes are told by values from FULL on. */
    const uint8_t end = (uint8_t)(at - FULL);
    if (c != CALL_ENDS[end])
        return (uint8_t)(FULL + (c == CALL_ENDS[0]));
    return end + 1 == sizeof CALL_ENDS - 1 ? 0 : (uint8_t)(at + 1);
}

static bool inside_call(const de_guide *g)
{
    return g->call >= sizeof CALL_OPENS - 1 + sizeof FUNCTION_OPENS - 1;
}

static void force(de_guide *g, const uint32_t *ids, uint32_t n)
{
    assert(g->at == g->n_queue && n <= DE_FORCED_MAX);
    memcpy(g->queue, ids, n * sizeof *ids);
    g->n_queue = n;
    g->at = 0;
}

static void close_reasoning(de_guide *g)
{
    if (g->after_newline)
        force(g, g->tags->after_newline, g->tags->n_after_newline);
    else
        force(g, g->tags->after_text, g->tags->n_after_text);
}

/* What the grammar leaves no choice about. */
static void force_text(de_guide *g)
{
    if (g->matcher && g->at == g->n_queue) {
        g->n_queue = (uint32_t)delta_matcher_forced(g->matcher, g->queue, DE_FORCED_MAX);
        g->at = 0;
    }
}

/* ---- a generation ---- */

int de_guide_start(de_guide *guide, const de_think_tags *tags, const delta_guide *g,
                   delta_error *err)
{
    de_guide x = { .tags = tags };
    if (g && g->has_budget && g->thinking) {
        if (tags->close_id < 0)
            return delta_fail(err, DELTA_EUNSUPPORTED,
                              "the tokenizer has no </think>: reasoning cannot be closed");
        x.in_reasoning = true;
        x.budget = g->budget_tokens;
    }
    if (g && g->grammar) {
        int r = delta_matcher_new(g->grammar, &x.matcher, err);
        if (r < 0)
            return r;
    }
    *guide = x;
    if (x.in_reasoning && x.budget == 0)
        close_reasoning(guide);
    else
        force_text(guide);
    return 0;
}

void de_guide_done(de_guide *guide)
{
    delta_matcher_free(guide->matcher);
    *guide = (de_guide){ 0 };
}

bool de_guide_forced(const de_guide *guide, uint32_t *ret_id)
{
    if (guide->at == guide->n_queue)
        return false;
    *ret_id = guide->queue[guide->at];
    return true;
}

enum delta_mask_kind de_guide_mask(de_guide *g, uint32_t *allowed)
{
    if (!g->matcher)
        return DELTA_MASK_FREE;
    return g->is_lost ? DELTA_MASK_DEAD : delta_matcher_mask(g->matcher, allowed);
}

static void count_reasoning(de_guide *g, uint32_t id, const uint8_t *bytes, size_t len,
                            bool in_character)
{
    if ((int64_t)id == g->tags->close_id && !inside_call(g)) {
        g->in_reasoning = false;
        return;
    }
    for (size_t i = 0; i < len; i++)
        g->call = follow_call(g->call, (char)bytes[i]);
    if (len)
        g->after_newline = bytes[len - 1] == '\n';
    g->n_reasoning++;
    if (g->n_reasoning >= g->budget && g->at == g->n_queue && !in_character && g->call == 0)
        close_reasoning(g);
}

void de_guide_took(de_guide *g, uint32_t id, const uint8_t *bytes, size_t len, bool in_character)
{
    if (g->at < g->n_queue) {
        assert(g->queue[g->at] == id);
        g->at++;
    }
    if (g->matcher && delta_matcher_accept(g->matcher, &id, 1, NULL, NULL) < 0)
        g->is_lost = true;
    if (g->in_reasoning)
        count_reasoning(g, id, bytes, len, in_character);
    force_text(g);
}
