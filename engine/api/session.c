/* session.c -- life of a session: room, timeline, and what was asked of it.
 *
 * Nothing is computed here; api/step.c does that. What a session needs is
 * allocated when it is made, grown or set to generate, never by a step. */
#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "api/internal.h"
#include "base/bits.h"

static uint32_t pages_for(uint32_t tokens)
{
    return (uint32_t)de_ceil_div(tokens, DE_PAGE);
}

/* Lets *array have `size` bytes; false: as before. */
static bool grow(void *array, size_t size)
{
    void *old;
    memcpy(&old, array, sizeof old);
    void *p = realloc(old, size);
    if (p)
        memcpy(array, &p, sizeof p);
    return p != NULL;
}

int delta_session_reserve(delta_session *s, uint32_t ctx_tokens, delta_error *err)
{
    delta_engine *e = s->engine;
    if (ctx_tokens == 0 || ctx_tokens > e->info.ctx_max)
        return delta_fail(err, DELTA_EINVALID, "ctx_tokens %u is not in 1..%u", ctx_tokens,
                          e->info.ctx_max);
    if (ctx_tokens <= s->room)
        return 0;
    const uint32_t n_pages = pages_for(ctx_tokens);
    const size_t cut_bytes = (size_t)ctx_tokens / 8 + 1,
                 old_cut_bytes = s->cuts ? (size_t)s->room / 8 + 1 : 0;
    if (!grow(&s->tokens, ctx_tokens * sizeof *s->tokens) || !grow(&s->cuts, cut_bytes) ||
        !grow(&s->pages, n_pages * sizeof *s->pages))
        return delta_fail(err, DELTA_ENOMEM, "session of %u tokens", ctx_tokens);
    memset(s->cuts + old_cut_bytes, 0, cut_bytes - old_cut_bytes);
    int r = de_kv_pages_take(&e->kv, n_pages - s->n_pages, s->pages + s->n_pages, err);
    if (r < 0)
        return r;
    s->n_pages = n_pages;
    s->room = ctx_tokens;
    return 0;
}

int delta_session_new(delta_engine *e, uint32_t ctx_tokens, void *user, delta_session **ret_s,
                      delta_error *err)
{
    assert(e && ret_s);
    delta_session *s = calloc(1, sizeof *s);
    if (!s)
        return delta_fail(err, DELTA_ENOMEM, "session: %zu bytes", sizeof *s);
    s->engine = e;
    s->user = user;
    s->slot = UINT32_MAX;
    atomic_init(&s->cancel, false);
    int r = delta_session_reserve(s, ctx_tokens, err);
    if (r < 0)
        goto fail;
    s->saved_logits = malloc((size_t)e->info.n_vocab * sizeof *s->saved_logits);
    if (!s->saved_logits) {
        r = delta_fail(err, DELTA_ENOMEM, "logits of a session");
        goto fail;
    }
    r = de_gdn_slots_take(&e->slots, &s->slot, err);
    if (r < 0)
        goto fail;
    de_model_slot_clear(e->model, s->slot);
    e->by_slot[s->slot] = s;
    *ret_s = s;
    return 0;
fail:
    delta_session_free(s);
    return r;
}

void delta_session_free(delta_session *s)
{
    if (!s)
        return;
    delta_engine *e = s->engine;
    if (s->slot != UINT32_MAX) {
        e->by_slot[s->slot] = NULL;
        de_gdn_slots_give(&e->slots, s->slot);
    }
    de_kv_pages_give(&e->kv, s->pages, s->n_pages);
    de_sampler_done(&s->sampler);
    de_guide_done(&s->guide);
    free(s->pages);
    free(s->tokens);
    free(s->cuts);
    free(s->saved_logits);
    free(s);
}

/* From idle to busy: a cancel that came before is not meant for what begins now. */
static void begin(delta_session *s)
{
    if (!de_session_has_work(s))
        atomic_store(&s->cancel, false);
    if (s->in_turn)
        return;
    s->in_turn = true;
    s->turn_cached = s->computed;
    s->work_ns = s->prefill_ns = 0;
    s->n_generated = 0;
}

int delta_session_append(delta_session *s, const uint32_t *ids, size_t n, delta_error *err)
{
    if (s->generating)
        return delta_fail(err, DELTA_ESTATE, "append while generating");
    if (n > s->room - s->n)
        return delta_fail(err, DELTA_ELIMIT,
                          "%zu tokens do not fit: %u of the %u reserved are used", n, s->n,
                          s->room);
    for (size_t i = 0; i < n; i++)
        if (ids[i] >= s->engine->info.n_vocab)
            return delta_fail(err, DELTA_EINVALID, "token %u at %zu is not in 0..%u", ids[i], i,
                              s->engine->info.n_vocab - 1);
    if (n == 0)
        return 0;
    begin(s);
    if (s->computed >= s->appended_end)
        s->appended_from = s->n;
    memcpy(s->tokens + s->n, ids, n * sizeof *ids);
    s->n += (uint32_t)n;
    s->appended_end = s->n;
    s->cuts[s->n / 8] |= (uint8_t)(1u << (s->n % 8));
    s->has_logits = false;
    return 0;
}

int delta_session_guide(delta_session *s, const delta_guide *g, delta_error *err)
{
    if (s->generating)
        return delta_fail(err, DELTA_ESTATE, "a generation is running");
    de_guide_done(&s->guide);
    return de_guide_start(&s->guide, &s->engine->think, g, err);
}

int delta_session_generate(delta_session *s, const delta_sampling *sampling,
                           const delta_stopping *stopping, delta_error *err)
{
    const delta_engine *e = s->engine;
    if (s->generating)
        return delta_fail(err, DELTA_ESTATE, "a generation is running");
    if (s->n == 0)
        return delta_fail(err, DELTA_ESTATE, "the session has no token to go on from");
    if (s->computed == s->n && !s->has_logits)
        return delta_fail(err, DELTA_ESTATE,
                          "the last prefill was cut short: append before generating");
    if (s->n == s->room)
        return delta_fail(err, DELTA_ELIMIT, "all %u tokens reserved are used", s->room);
    int r = delta_sampling_check(sampling, e->info.n_vocab, err);
    if (r == 0)
        r = delta_stopping_check(stopping, e->info.n_vocab, err);
    if (r < 0)
        return r;
    const uint32_t room = s->room - s->n;
    const uint32_t max = stopping->max_tokens < room ? stopping->max_tokens : room;
    de_sampler sampler;
    r = de_sampler_start(&sampler, sampling, e->info.n_vocab, s->tokens, s->n, max, err);
    if (r < 0)
        return r;
    begin(s);
    de_sampler_done(&s->sampler);
    s->sampler = sampler;
    s->max_tokens = max;
    s->min_tokens = stopping->min_tokens;
    s->n_stop_ids = 0;
    for (uint32_t i = 0; i < stopping->n_ids; i++)
        s->stop_ids[s->n_stop_ids++] = stopping->ids[i];
    for (uint32_t i = 0; i < e->info.n_eos_ids && !stopping->ignore_eos; i++)
        s->stop_ids[s->n_stop_ids++] = e->info.eos_ids[i];
    de_stop_init(&s->stop, stopping->strings, stopping->n_strings);
    s->detok = (delta_detok){ 0 };
    s->n_prompt = s->n;
    s->n_generated = 0;
    s->first_ns = s->last_ns = 0;
    s->generating = true;
    return 0;
}

void delta_session_cancel(delta_session *s)
{
    atomic_store(&s->cancel, true);
}

void delta_session_pause(delta_session *s, bool paused)
{
    s->paused = paused;
}

const uint32_t *delta_session_tokens(const delta_session *s, size_t *ret_n)
{
    *ret_n = s->n;
    return s->tokens;
}

size_t delta_session_computed(const delta_session *s)
{
    return s->computed;
}

bool delta_session_busy(const delta_session *s)
{
    return de_session_has_work(s);
}
