/* forced.c -- stretches of text with only one continuation, as tokens; see delta/grammar.h.
 *
 * The bytes are found by trying all 256 at each step. What the tokenizer makes
 * of them must not depend on what is not there yet: the text is tokenised with
 * several things behind it, and only tokens that are the same each time count.
 * And what stands before must be cut from it where the tokens were cut. */
#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "grammar/match.h"

enum {
    FORCED_BYTES = 512,
    /* What a search may cost: a step compares places with places. Usual grammars are far below. */
    FORCED_WORK = 4 << 20,
};

/* The bytes that must come, at most FORCED_BYTES, and not more than are found with FORCED_WORK. */
static size_t forced_bytes(delta_matcher *m, char *out)
{
    de_state s = *de_now(m);
    de_place *now = m->pool, *next = m->pool + DELTA_MATCHER_PLACES,
             *spare = m->pool + 2 * (size_t)DELTA_MATCHER_PLACES;
    if (s.phase != DE_PHASE_RULES)
        return 0;
    memcpy(now, de_places(m), s.n * sizeof *now);
    size_t n = 0;
    uint64_t work = 0;
    while (n < FORCED_BYTES && !s.accepting && m->n_cells < DELTA_MATCHER_CELLS / 2) {
        de_state after = s;
        int only = -1;
        for (int b = 0; b < 256; b++) {
            de_state t = s;
            const uint32_t cells = m->n_cells;
            memcpy(next, now, s.n * sizeof *now);
            const bool ok = de_state_step(m, &t, next, spare, (uint8_t)b);
            de_cells_drop(m, cells);
            work += 64 + (uint64_t)s.n * s.n + (ok ? (uint64_t)t.n * t.n : 0);
            if ((ok && only >= 0) || work > FORCED_WORK)
                return n;
            if (ok) {
                only = b;
                after = t;
            }
        }
        if (only < 0)
            return n;
        out[n++] = (char)only;
        de_state t = s;
        (void)de_state_step(m, &t, now, spare, (uint8_t)only);
        s = after;
    }
    return n;
}

/* Where a token ends at byte `cut`: its index, else SIZE_MAX. */
static size_t token_at(const delta_grammar_vocab *v, const uint32_t *ids, size_t n, size_t cut)
{
    size_t at = 0;
    for (size_t i = 0; i <= n; i++) {
        if (at == cut)
            return i;
        if (i == n || at > cut)
            break;
        size_t len;
        (void)delta_token_bytes(v->tok, ids[i], &len);
        at += len;
    }
    return SIZE_MAX;
}

size_t delta_matcher_forced(delta_matcher *m, uint32_t *ids, size_t max)
{
    assert(m && (ids || max == 0));
    static const char *const behind[] = {
        "", "a", " ", "\n", "1", "\"", "<", ".", ">", "\n\n", " a"
    };
    const delta_grammar_vocab *v = m->g->vocab;
    const uint32_t cells = m->n_cells;
    char text[DE_TAIL_BYTES + FORCED_BYTES + 4];
    size_t before = m->n_tail[m->at];
    memcpy(text, m->tails[m->at], before);
    /* from the start of a character on */
    size_t from = 0;
    while (from < before && ((uint8_t)text[from] & 0xC0) == 0x80)
        from++;
    before -= from;
    memmove(text, text + from, before);
    const size_t n = forced_bytes(m, text + before);
    de_cells_drop(m, cells);
    size_t n_same = 0;
    bool have = false;
    for (size_t k = 0; n && k < sizeof behind / sizeof *behind; k++) {
        const size_t more = strlen(behind[k]);
        memcpy(text + before + n, behind[k], more);
        uint32_t *got = NULL;
        size_t n_got = 0;
        if (delta_tokenize(v->tok, text, before + n + more, false, &got, &n_got, NULL) < 0)
            return 0; /* half a character, most likely */
        const size_t first = token_at(v, got, n_got, before);
        size_t i = 0;
        if (first != SIZE_MAX) {
            size_t bytes = 0, len;
            for (; first + i < n_got && i < (have ? n_same : max); i++) {
                const uint8_t *p = delta_token_bytes(v->tok, got[first + i], &len);
                /* what stands before may be normalised, and the cut fall elsewhere */
                if (bytes + len > n || len > DELTA_GRAMMAR_TOKEN_BYTES ||
                    delta_token_kind(v->tok, got[first + i]) == DELTA_TOKEN_SPECIAL ||
                    memcmp(p, text + before + bytes, len) != 0 ||
                    (have && got[first + i] != ids[i]))
                    break;
                bytes += len;
                ids[i] = got[first + i];
            }
        }
        n_same = i;
        have = true;
        free(got);
    }
    return n_same;
}
