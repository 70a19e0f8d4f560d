/* session.c -- life of a session: room, timeline, and what was asked of it.
 *
 * Nothing is computed here; api/step.c does that. What a session needs is
 * allocated when it is made, grown or set to generate, never by a step.
 *
 * A session that leaves the device (park, free, rewind) leaves its state to the prefix cache, slot
 * and all; one that comes to it (reserve) begins where the longest kept prefix of its tokens ends.
 * So fork, rewind and the next request of a client without a session are the same thing: a timeline
 * that looks for what is known of it. */
#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "api/internal.h"
#include "base/bits.h"

_Static_assert((int)DELTA_CACHE_CHUNK == (int)DE_CHUNK, "marks are borders of chunks");

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

/* Bytes of a set of n bits, and one more. */
static size_t bit_bytes(uint32_t n)
{
    return (size_t)n / 8 + 1;
}

/* Lets the timeline have n tokens on the host. */
static int grow_timeline(delta_session *s, uint32_t n, delta_error *err)
{
    if (n <= s->capacity && s->tokens)
        return 0;
    const size_t cuts = bit_bytes(n), marks = bit_bytes(n / DE_CHUNK),
                 old_cuts = s->cuts ? bit_bytes(s->capacity) : 0,
                 old_marks = s->marks ? bit_bytes(s->capacity / DE_CHUNK) : 0;
    if (!grow(&s->tokens, (n + 1) * sizeof *s->tokens) || !grow(&s->cuts, cuts))
        return delta_fail(err, DELTA_ENOMEM, "session of %u tokens", n);
    memset(s->cuts + old_cuts, 0, cuts - old_cuts);
    if (!grow(&s->marks, marks))
        return delta_fail(err, DELTA_ENOMEM, "session of %u tokens", n);
    memset(s->marks + old_marks, 0, marks - old_marks);
    s->capacity = n;
    return 0;
}

/* ---- room */

int de_engine_take_pages(delta_engine *e, uint32_t n, uint32_t *ret_pages, delta_error *err)
{
    int r;
    if (n > (uint64_t)e->kv.n_free + e->kv.n_idle)
        r = delta_fail(err, DELTA_EBUSY, "%u KV pages wanted, %u of %u can be had", n,
                       e->kv.n_free + e->kv.n_idle, e->kv.total);
    else {
        while (n > e->kv.n_free && de_prefix_evict(&e->prefix, true))
            ;
        r = de_kv_pages_take(&e->kv, n, ret_pages, err);
        if (r == 0)
            de_prefix_taken(&e->prefix, ret_pages, n);
    }
    e->refused_ns = r < 0 ? de_now_ns() : 0;
    return r;
}

/* Whole pages of the prefix that are on the host come to the device, into new ones. */
static int bring_in(delta_session *s, de_prefix_node *from, uint32_t whole, delta_error *err)
{
    delta_engine *e = s->engine;
    uint32_t *const fresh = e->row_tokens; /* free between steps: [step_tokens] */
    uint32_t n = 0, have = 0, used = 0;
    for (uint32_t i = 0; i < whole; i++)
        n += s->pages[i] >> 31;
    /* Room for many is made at once: what goes out then goes beside what comes in. It needs as much room on the host. */
    for (uint32_t i = 0, left = n; i < whole; i++) {
        uint32_t page = s->pages[i];
        if (!(page & DE_ON_HOST))
            continue;
        int r = 0;
        if (used == have) {
            used = 0;
            have = left < e->step_tokens ? left : e->step_tokens;
            have = have < e->host.kv.n_free + e->host.n_copies ? have : 1;
            r = de_engine_take_pages(e, have, fresh, err);
            if (r < 0)
                return r;
            left -= have;
        }
        s->pages[i] = fresh
            [have -
             ++used]; /* in the order in which they were given up: who went out first is there first */
        r = de_model_page_load(e->model, s->pages[i], de_host_page(e, page), &e->fault);
        if (r < 0) {
            s->pages[i] = page; /* given back by who called; the rest is lost with the device */
            return r;
        }
        de_prefix_loaded(&e->prefix, page, s->pages[i]);
        de_prefix_unuse(&e->prefix, &page, 1);
    }
    if (n)
        de_prefix_moved_in(&e->prefix, from, s->pages, whole);
    return 0;
}

/* The state behind `from` into the session's slot, and what it has of a page that goes on into the
 * session's own. */
static int take_over(delta_session *s, const de_prefix_node *from, uint32_t half)
{
    delta_engine *e = s->engine;
    int r = 0;
    if (from->end % DE_PAGE) {
        const uint32_t to = s->pages[from->end / DE_PAGE];
        r = half & DE_ON_HOST ? de_model_page_load(e->model, to, de_host_page(e, half), &e->fault)
                              : de_model_page_copy(e->model, half, to, &e->fault);
    }
    if (r == 0 && from->slot & DE_ON_HOST)
        r = de_model_slot_load(e->model, s->slot, de_host_slot(e, from->slot), &e->fault);
    else if (r == 0)
        r = de_model_slot_copy(e->model, from->slot, s->slot, &e->fault);
    return r;
}

/* The state, and pages for ctx_tokens, from what is kept of the timeline, or with `from` NULL from
 * nothing; a seat is free. DELTA_EBUSY: with this prefix there is no room. */
static int settle(delta_session *s, uint32_t ctx_tokens, de_prefix_node *from, delta_error *err)
{
    delta_engine *e = s->engine;
    const uint32_t at = from ? from->end : 0, whole = at / DE_PAGE, total = pages_for(ctx_tokens);
    uint32_t half = 0; /* the page that `at` is in the middle of */
    if (from) {
        /* Used and pinned, they stay what and where they are while room is made. */
        de_prefix_pages(&e->prefix, from, s->pages);
        de_prefix_use(&e->prefix, s->pages, pages_for(at));
        half = at % DE_PAGE ? s->pages[whole] : 0;
        from->pins++;
    }
    int r = de_engine_take_slot(e, &s->slot)
                ? 0
                : delta_fail(err, DELTA_EBUSY, "all %u state slots are taken", e->slots.total);
    const bool has_slot = r == 0;
    if (r == 0)
        r = de_engine_take_pages(e, total - whole, s->pages + whole, err);
    const bool has_pages = r == 0;
    if (r == 0 && from)
        r = bring_in(s, from, whole, err);
    if (r == 0 && from)
        r = take_over(s, from, half);
    else if (r == 0)
        de_model_slot_clear(e->model, s->slot);
    if (from) {
        if (at % DE_PAGE)
            de_prefix_unuse(&e->prefix, &half, 1);
        de_prefix_unpin(&e->prefix, from);
    }
    if (r == 0) {
        s->n_pages = total;
        s->computed = s->piece_from = at;
        return 0;
    }
    if (e->fault.code) /* pages and slots do not matter any more */
        return delta_fail(err, e->fault.code, "%s", e->fault.text);
    if (has_pages)
        de_kv_pages_give(&e->kv, s->pages + whole, total - whole);
    if (has_slot)
        de_gdn_slots_give(&e->slots, s->slot);
    de_prefix_unuse(&e->prefix, s->pages, whole);
    return r;
}

/* From idle to busy: a cancel that came before is not meant for what begins now. */
static void begin(delta_session *s)
{
    if (!de_session_has_work(s))
        atomic_store(&s->cancel, false);
    else if (s->in_turn)
        return;
    s->in_turn = true;
    s->goes_on = false;
    s->turn_cached = s->turn_shared = s->computed;
    s->work_ns = s->prefill_ns = 0;
    s->n_generated = 0;
}

/* What was left to the cache by a pinned session, or one in the middle of its work, goes last. */
static void guard(delta_session *s)
{
    if ((s->is_pinned || s->goes_on) && !de_session_is_resident(s) && de_session_uses_cache(s) &&
        s->n)
        de_prefix_guard(&s->engine->prefix, s->owner, s->tokens, s->n, &s->guard_end,
                        &s->guard_serial);
}

static void unguard(delta_session *s)
{
    if (s->guard_end)
        de_prefix_unguard(&s->engine->prefix, s->owner, s->tokens, s->guard_end, s->guard_serial);
    s->guard_end = 0;
}

void delta_session_set_pinned(delta_session *s, bool pinned)
{
    unguard(s);
    s->is_pinned = pinned;
    guard(s);
}

static int make_resident(delta_session *s, uint32_t ctx_tokens, delta_error *err)
{
    delta_engine *e = s->engine;
    uint32_t seat = 0, shared = 0;
    while (seat < e->info.max_sessions && e->by_seat[seat])
        seat++;
    if (seat == e->info.max_sessions)
        return delta_fail(err, DELTA_EBUSY, "all %u sessions are at work", seat);
    if (!grow(&s->pages, (pages_for(ctx_tokens) + 1) * sizeof *s->pages))
        return delta_fail(err, DELTA_ENOMEM, "session of %u tokens", ctx_tokens);
    /* The last token is computed again where its logits are not at hand. */
    uint32_t most = s->has_logits || s->n == 0 ? s->n : s->n - 1;
    const bool had_logits = s->has_logits;
    int r;
    for (;;) {
        de_prefix_node *from = e->has_cache && most ? de_prefix_find(&e->prefix, s->owner,
                                                                     s->tokens, s->n, most, &shared)
                                                    : NULL;
        de_disk_touch(e, from);
        r = settle(s, ctx_tokens, from, err);
        if (r != DELTA_EBUSY || !from)
            break;
        /* Its last page, which must be copied, may be the one too many; else its slot may be. */
        most = from->end % DE_PAGE ? from->end - 1 : 0;
    }
    if (r < 0)
        return r;
    unguard(s); /* it has a copy */
    if (!s->goes_on)
        e->stats.cache_tokens += s->computed;
    s->active_ns = e->prefix.now_ns;
    s->seat = seat;
    e->by_seat[seat] = s;
    s->has_logits = had_logits && s->computed == s->n;
    if (s->computed <
        s->n) { /* what the cache lacks is to be computed, again or for the first time */
        const bool is_behind = s->appended_end <= s->computed || s->computed < s->appended_from;
        begin(s);
        if (is_behind)
            s->appended_from = s->computed;
        s->appended_end = s->n;
    }
    if (!s->goes_on) {
        s->turn_cached = s->computed;
        s->turn_shared = shared > s->computed ? shared : s->computed;
    }
    s->goes_on = false;
    return 0;
}

int delta_session_reserve(delta_session *s, uint32_t ctx_tokens, delta_error *err)
{
    delta_engine *e = s->engine;
    if (ctx_tokens == 0 || ctx_tokens > e->info.ctx_max)
        return delta_fail(err, DELTA_EINVALID, "ctx_tokens %u is not in 1..%u", ctx_tokens,
                          e->info.ctx_max);
    if (ctx_tokens < s->n)
        return delta_fail(err, DELTA_EINVALID, "ctx_tokens %u: the session has %u already",
                          ctx_tokens, s->n);
    int r = grow_timeline(s, ctx_tokens, err);
    if (r < 0)
        return r;
    if (!de_session_is_resident(s)) {
        r = make_resident(s, ctx_tokens, err);
    } else if (ctx_tokens > s->room) {
        const uint32_t n = pages_for(ctx_tokens);
        if (!grow(&s->pages, (n + 1) * sizeof *s->pages))
            return delta_fail(err, DELTA_ENOMEM, "session of %u tokens", ctx_tokens);
        r = de_engine_take_pages(e, n - s->n_pages, s->pages + s->n_pages, err);
        s->n_pages = r < 0 ? s->n_pages : n;
    }
    if (r == 0 && ctx_tokens > s->room)
        s->room = ctx_tokens;
    return r;
}

bool de_session_keep(delta_session *s, bool copy)
{
    delta_engine *e = s->engine;
    uint32_t slot = s->slot;
    if (!de_session_uses_cache(s) || s->computed == 0 || s->is_bad || e->fault.code ||
        de_prefix_has(&e->prefix, s->owner, s->tokens, s->computed))
        return false;
    if (copy) {
        if (!de_engine_take_slot(e, &slot))
            return false;
        if (de_model_slot_copy(e->model, s->slot, slot, &e->fault) < 0)
            return false;
    } else {
        if (!s->generating &&
            s->computed - de_prefix_reach(&e->prefix, s->owner, s->tokens, s->computed) <
                DE_MARK_GAIN)
            return false;
    }
    const bool is_kept =
        de_prefix_add(&e->prefix, s->owner, s->tokens, s->computed, s->pages, slot);
    if (!is_kept && copy)
        de_gdn_slots_give(&e->slots, slot);
    return is_kept;
}

void delta_session_park(delta_session *s)
{
    delta_engine *e = s->engine;
    if (!de_session_is_resident(s))
        return;
    if (!de_session_has_work(s))
        s->appended_from = s->appended_end = 0;
    s->goes_on = s->in_turn && de_session_has_work(s);
    if (!de_session_keep(s, false))
        de_gdn_slots_give(&e->slots, s->slot);
    de_kv_pages_give(&e->kv, s->pages, s->n_pages);
    e->by_seat[s->seat] = NULL;
    s->seat = s->slot = UINT32_MAX;
    s->n_pages = s->room = 0;
    s->has_logits = s->has_logits && s->computed == s->n;
    s->computed = s->piece_from = 0;
    guard(s);
}

int delta_session_new(delta_engine *e, uint64_t owner, void *user, delta_session **ret_s,
                      delta_error *err)
{
    assert(e && ret_s);
    delta_session *s = calloc(1, sizeof *s);
    if (!s)
        return delta_fail(err, DELTA_ENOMEM, "session: %zu bytes", sizeof *s);
    s->engine = e;
    s->owner = owner;
    s->user = user;
    s->seat = s->slot = UINT32_MAX;
    atomic_init(&s->cancel, false);
    s->saved_logits = malloc((size_t)e->info.n_vocab * sizeof *s->saved_logits);
    if (!s->saved_logits) {
        free(s);
        return delta_fail(err, DELTA_ENOMEM, "logits of a session");
    }
    *ret_s = s;
    return 0;
}

void delta_session_free(delta_session *s)
{
    if (!s)
        return;
    delta_session_park(s);
    unguard(s);
    de_disk_left(s->engine, s);
    de_sampler_done(&s->sampler);
    de_guide_done(&s->guide);
    free(s->pages);
    free(s->tokens);
    free(s->cuts);
    free(s->marks);
    free(s->saved_logits);
    free(s);
}

/* ---- the timeline */

int delta_session_append(delta_session *s, const uint32_t *ids, size_t n, delta_error *err)
{
    const uint32_t max = s->engine->info.ctx_max;
    if (s->generating)
        return delta_fail(err, DELTA_ESTATE, "append while generating");
    if (n > max - s->n)
        return delta_fail(err, DELTA_ELIMIT,
                          "%zu tokens do not fit: the session has %u, the most is %u", n, s->n,
                          max);
    for (size_t i = 0; i < n; i++)
        if (ids[i] >= s->engine->info.n_vocab)
            return delta_fail(err, DELTA_EINVALID, "token %u at %zu is not in 0..%u", ids[i], i,
                              s->engine->info.n_vocab - 1);
    if (n == 0)
        return 0;
    int r = grow_timeline(s, s->n + (uint32_t)n, err);
    if (r < 0)
        return r;
    begin(s);
    if (s->computed >= s->appended_end)
        s->appended_from = s->n;
    memcpy(s->tokens + s->n, ids, n * sizeof *ids);
    const uint32_t before = s->n;
    s->n += (uint32_t)n;
    s->appended_end = s->n;
    s->cuts[s->n / 8] |= (uint8_t)(1u << (s->n % 8));
    for (uint32_t at = (before / DE_MARK_EVERY + 1) * DE_MARK_EVERY; at <= s->n;
         at += DE_MARK_EVERY)
        delta_session_mark(s, at);
    s->has_logits = false;
    return 0;
}

void delta_session_mark(delta_session *s, uint32_t n_tokens)
{
    const uint32_t chunks = (n_tokens < s->n ? n_tokens : s->n) / DE_CHUNK;
    if (s->marks)
        s->marks[chunks / 8] |= (uint8_t)(1u << (chunks % 8));
}

void de_session_truncate(delta_session *s, uint32_t n)
{
    assert(n <= s->n);
    for (uint32_t i = n + 1; i <= s->n; i++)
        s->cuts[i / 8] &= (uint8_t) ~(1u << (i % 8));
    for (uint32_t i = n / DE_CHUNK + 1; i <= s->n / DE_CHUNK; i++)
        s->marks[i / 8] &= (uint8_t) ~(1u << (i % 8));
    s->settled = s->settled < n ? s->settled : n;
    s->n = n;
}

static int check_idle(const delta_session *s, delta_error *err)
{
    return s->generating || (de_session_is_resident(s) && de_session_has_work(s))
               ? delta_fail(err, DELTA_ESTATE, "the session is at work")
               : 0;
}

int delta_session_rewind(delta_session *s, uint32_t n_tokens, delta_error *err)
{
    int r = check_idle(s, err);
    if (r < 0)
        return r;
    if (n_tokens > s->n)
        return delta_fail(err, DELTA_EINVALID, "rewind to %u: the session has %u tokens", n_tokens,
                          s->n);
    if (n_tokens == s->n)
        return 0;
    if (s->computed > n_tokens)
        delta_session_park(s); /* what it was can be found again */
    unguard(s);
    de_session_truncate(s, n_tokens);
    guard(s);
    s->has_logits = false;
    s->appended_from = s->appended_end = 0;
    s->in_turn = s->goes_on = false;
    return 0;
}

int delta_session_fork(delta_session *s, void *user, delta_session **ret_s, delta_error *err)
{
    int r = check_idle(s, err);
    delta_session *x = NULL;
    if (r == 0)
        r = delta_session_new(s->engine, s->owner, user, &x, err);
    if (r == 0)
        r = grow_timeline(x, s->n, err);
    if (r < 0) {
        delta_session_free(x);
        return r;
    }
    if (de_session_is_resident(s))
        (void)de_session_keep(s, true);
    if (s->n) {
        memcpy(x->tokens, s->tokens, s->n * sizeof *x->tokens);
        memcpy(x->cuts, s->cuts, bit_bytes(s->n));
        memcpy(x->marks, s->marks, bit_bytes(s->n / DE_CHUNK));
    }
    x->n = s->n;
    x->settled = s->settled;
    x->has_logits = s->has_logits;
    if (s->has_logits)
        memcpy(x->saved_logits, s->saved_logits, s->engine->info.n_vocab * sizeof(float));
    *ret_s = x;
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
    if (!de_session_is_resident(s))
        return delta_fail(err, DELTA_ESTATE, "the session has no room: reserve some first");
    if (s->computed == s->n && !s->has_logits)
        return delta_fail(err, DELTA_ESTATE,
                          "the last prefill was cut short: append before generating");
    if (s->n >= s->room && s->n >= s->limit)
        return delta_fail(err, DELTA_ELIMIT, "all %u tokens reserved are used", s->room);
    int r = delta_sampling_check(sampling, e->info.n_vocab, err);
    if (r == 0)
        r = delta_stopping_check(stopping, e->info.n_vocab, err);
    if (r < 0)
        return r;
    const uint32_t room = (s->limit > s->room ? s->limit : s->room) - s->n;
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

void delta_session_set_limit(delta_session *s, uint32_t ctx_tokens)
{
    s->limit = ctx_tokens < s->engine->info.ctx_max ? ctx_tokens : s->engine->info.ctx_max;
}

uint32_t delta_session_short(const delta_session *s)
{
    const uint32_t needs = de_session_needs(s);
    return needs > s->room ? needs : 0;
}

void delta_session_cancel(delta_session *s)
{
    atomic_store(&s->cancel, true);
}

void delta_session_set_background(delta_session *s, bool background)
{
    s->is_background = background;
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

void delta_session_reuse(const delta_session *s, uint32_t *ret_cached, uint32_t *ret_shared)
{
    *ret_cached = s->turn_cached;
    *ret_shared = s->turn_shared;
}

bool delta_session_resident(const delta_session *s)
{
    return de_session_is_resident(s);
}

int delta_session_fetch(delta_session *s)
{
    const uint32_t most = s->has_logits || s->n == 0 ? s->n : s->n - 1;
    if (de_session_is_resident(s) || !de_session_uses_cache(s) || most == 0 || s->fetched == s->n)
        return 0;
    const int r = de_disk_fetch(s->engine, s, most);
    if (r == 0)
        s->fetched = s->n;
    return r;
}

size_t delta_session_computed(const delta_session *s)
{
    return s->computed;
}

bool delta_session_busy(const delta_session *s)
{
    return de_session_has_work(s);
}
