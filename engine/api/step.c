/* step.c -- one turn of the engine: plan -> batch -> forward -> sample -> events.
 *
 * READ THIS FIRST. A session is a timeline of n tokens, `computed` of which are
 * in the model's state. Appending and sampling make n grow; a step makes
 * computed grow. The row of a last token gives logits; if the session is
 * generating a token is sampled from them at once, else they are saved with
 * the session, so that a later generate need not wait for a forward. The token
 * sampled last is not computed until there is more to do.
 *
 * A step allocates nothing for the tokens it makes: that was done by open, append, reserve and
 * generate. Only what the prefix cache learns gets memory here, and goes without if there is none.
 * What one session's logits do (NaN) ends that session; what a forward reports
 * ends the engine. */
#include <assert.h>
#include <math.h>
#include <string.h>

#include "api/internal.h"

/* ---- events ---- */

static delta_event *push_event(delta_session *s, enum delta_event_kind kind)
{
    delta_engine *e = s->engine;
    assert(e->n_events < (size_t)e->info.max_sessions * DE_EVENTS_PER_SESSION);
    delta_event *v = &e->events[e->n_events++];
    *v = (delta_event){ .kind = kind, .session = s, .user = s->user };
    return v;
}

static void push_text(delta_session *s, const char *bytes, size_t len, int64_t added_id)
{
    if (len == 0)
        return;
    delta_event *v = push_event(s, DELTA_EVENT_TEXT);
    v->text.bytes = bytes;
    v->text.len = len;
    v->text.added_id = added_id;
}

/* Where the session's text of this step goes, one piece behind the other. */
static char *text_at(const delta_session *s)
{
    return s->engine->text + (size_t)s->seat * s->engine->text_bytes + s->text_used;
}

/* Where a piece is made before it is released to text_at(). */
static char *piece_at(const delta_session *s, size_t *ret_room)
{
    *ret_room = s->engine->text_bytes - s->text_used - DELTA_MAX_STOP_BYTES;
    return text_at(s) + DELTA_MAX_STOP_BYTES;
}

/* Through the stop strings and out; the index of the one it completed, or -1. added_id: the piece
 * is that added token's text. */
static int release(delta_session *s, const char *piece, size_t len, int64_t added_id)
{
    const size_t held = s->stop.n_held;
    char *to = text_at(s);
    int match = -1;
    const size_t n = de_stop_push(&s->stop, piece, len, to, &match);
    if (added_id >= 0 && match < 0 && n == held + len) {
        push_text(s, to, held, -1);
        push_text(s, to + held, len, added_id);
    } else {
        push_text(s, to, n, -1);
    }
    s->text_used += n;
    return match;
}

/* An incomplete character that nothing will complete. */
static int release_rest_of_character(delta_session *s)
{
    size_t room;
    char *piece = piece_at(s, &room);
    return release(s, piece, delta_detok_flush(&s->detok, piece, room), -1);
}

/* The text of a sampled token; the stop string it completed, or -1. */
static int release_token(delta_session *s, uint32_t id)
{
    const delta_tokenizer *t = s->engine->tokenizer;
    const enum delta_token_kind kind = delta_token_kind(t, id);
    const bool added = kind == DELTA_TOKEN_ADDED || kind == DELTA_TOKEN_SPECIAL;
    if (added) {
        const int match = release_rest_of_character(s);
        if (match >= 0)
            return match;
    }
    size_t len, room, n = 0;
    const uint8_t *bytes = delta_token_bytes(t, id, &len);
    char *piece = piece_at(s, &room);
    if (len)
        n = delta_detok_push(&s->detok, bytes, len, piece, room);
    return release(s, piece, n, added && n == len ? (int64_t)id : -1);
}

static void finish(delta_session *s, enum delta_finish reason, uint32_t stop,
                   const delta_error *error)
{
    if (s->generating && reason != DELTA_FINISH_STOP_STRING && release_rest_of_character(s) < 0) {
        const size_t held = de_stop_flush(&s->stop, text_at(s));
        push_text(s, text_at(s), held, -1);
        s->text_used += held;
    }
    if (s->work_ns)
        s->prefill_ns += de_now_ns() - s->work_ns;
    delta_event *v = push_event(s, DELTA_EVENT_FINISHED);
    v->finished.reason = reason;
    v->finished.stop = stop;
    v->finished.n_prompt = s->generating ? s->n_prompt : s->n;
    v->finished.n_generated = s->generating ? s->n_generated : 0;
    v->finished.n_cached = s->turn_cached;
    v->finished.prefill_ns = s->prefill_ns;
    v->finished.decode_ns = s->generating ? s->last_ns - s->first_ns : 0;
    if (error)
        v->finished.error = *error;
    if (s->generating)
        de_guide_done(&s->guide);
    s->generating = false;
    s->in_turn = s->goes_on = false;
    s->work_ns = 0;
    s->waited = 0;
}

/* Drops what was appended and never computed; a sampled token stays. */
static void drop_pending(delta_session *s)
{
    const uint32_t n = s->computed > s->settled ? s->computed : s->settled;
    de_session_truncate(s, n);
    s->piece_from = s->computed;
    s->appended_from = s->appended_end = 0; /* also where settled tokens were computed again */
}

static void finish_cancelled(delta_session *s)
{
    const uint32_t before = s->n;
    drop_pending(s);
    if (s->generating && s->n_prompt > s->n)
        s->n_prompt = s->n;
    if (s->n != before)
        s->has_logits = false;
    finish(s, DELTA_FINISH_CANCELLED, 0, NULL);
}

void delta_session_abort(delta_session *s, const delta_event **ret_events, size_t *ret_n)
{
    delta_engine *e = s->engine;
    e->n_events = 0;
    if (!de_session_is_resident(s) && de_session_has_work(s)) {
        s->seat = e->info.max_sessions; /* nobody's: for the text that was held back */
        s->text_used = 0;
        atomic_store(&s->cancel, false);
        finish_cancelled(s);
        s->seat = UINT32_MAX;
    }
    *ret_events = e->events;
    *ret_n = e->n_events;
}

/* ---- plan and batch ---- */

/* Rows of s up to where a cut must be: the end of an append. */
static uint32_t segment(const delta_session *s)
{
    uint32_t end = s->computed + 1;
    while (end < s->n && !(s->cuts[end / 8] >> (end % 8) & 1))
        end++;
    return end - s->computed;
}

static bool wants_rows(const delta_session *s)
{
    return s && !s->paused && de_session_has_work(s) && s->computed < s->n &&
           de_session_needs(s) <= s->room;
}

static uint32_t plan(delta_engine *e)
{
    uint32_t n = 0, n_decode = 0;
    bool is_idle = true; /* but for the background */
    for (uint32_t i = 0; i < e->info.max_sessions; i++)
        is_idle &= !wants_rows(e->by_seat[i]) || e->by_seat[i]->is_background;
    for (uint32_t i = 0; i < e->info.max_sessions; i++) {
        delta_session *s = e->by_seat[i];
        if (!wants_rows(s) || (s->is_background && !is_idle))
            continue;
        const bool decodes =
            s->generating && s->n_generated > 0 && s->n - s->computed <= DE_TOKENS_PER_STEP;
        n_decode += decodes ? s->n - s->computed : 0;
        e->of_item[n] = s;
        e->items[n++] = (de_plan_item){ .start = s->computed,
                                        .segment = segment(s),
                                        .remaining = s->n - s->computed,
                                        .waited = s->waited,
                                        .user_rows = de_shares_of(&e->shares, s->owner),
                                        .decodes = decodes };
    }
    const uint32_t rows = de_pace_budget(&e->pace, n_decode, e->step_tokens, DE_CHUNK);
    const uint32_t chosen = de_plan(e->items, n, rows, DE_CHUNK, e->order);
    de_shares_decay(&e->shares);
    for (uint32_t i = 0; i < n; i++) {
        delta_session *s = e->of_item[i];
        const de_plan_item *item = &e->items[i];
        s->waited = item->ret_rows ? 0 : s->waited + 1;
        if (item->ret_rows && item->remaining > 1 && !item->decodes && !s->is_background)
            de_shares_add(&e->shares, s->owner, item->ret_rows);
    }
    return chosen;
}

/* Slots for the states that are to be kept of rows [s->computed, end), as long as there are some. */
static uint32_t take_marks(delta_session *s, uint32_t end, de_batch_mark *marks)
{
    delta_engine *e = s->engine;
    uint32_t n = 0;
    if (!de_session_uses_cache(s))
        return 0;
    for (uint32_t c = s->computed / DE_CHUNK + 1; c * DE_CHUNK <= end; c++)
        if (s->marks[c / 8] >> (c % 8) & 1 &&
            c * DE_CHUNK - de_prefix_reach(&e->prefix, s->owner, s->tokens, c * DE_CHUNK) >=
                DE_CHUNK &&
            de_engine_take_slot(e, &marks[n].slot))
            marks[n++].end = c * DE_CHUNK;
    return n;
}

/* Whether the first in rank are all that the next token of s can depend on. */
static bool wants_top(const delta_session *s)
{
    const uint32_t ranks = de_sampler_ranks(&s->sampler);
    return s->generating && !s->paused && ranks && de_guide_is_free(&s->guide) &&
           (uint64_t)ranks + s->n_stop_ids + s->engine->mask.n_holes <= DE_TOP_LOGITS;
}

static void fill_batch(delta_engine *e, uint32_t n_seqs, uint64_t now, de_batch *ret_batch)
{
    uint32_t row = 0, out = 0, marks = 0;
    for (uint32_t i = 0; i < n_seqs; i++) {
        const de_plan_item *item = &e->items[e->order[i]];
        const uint32_t rows = item->ret_rows;
        delta_session *s = e->of_item[e->order[i]];
        const bool ends = s->computed + rows == s->n;
        /* A row is decode's if it stands alone between two cuts, not because little fitted in. */
        const bool decode = s->computed == s->piece_from && item->segment == 1;
        e->seqs[i] =
            (de_batch_seq){ .row = row,
                            .n_rows = rows,
                            .start = s->computed,
                            .pages = s->pages,
                            .slot = s->slot,
                            .decode = decode,
                            .first_out = out,
                            .n_out = ends ? 1 : 0,
                            .wants_top = ends && wants_top(s),
                            .marks = e->marks + marks,
                            .n_marks = take_marks(s, s->computed + rows, e->marks + marks) };
        marks += e->seqs[i].n_marks;
        memcpy(e->row_tokens + row, s->tokens + s->computed, rows * sizeof *e->row_tokens);
        for (uint32_t k = 0; k < rows; k++)
            for (int axis = 0; axis < 3; axis++)
                e->row_pos[row + k][axis] = s->computed + k;
        if (rows == item->segment)
            s->piece_from = s->computed + rows;
        e->tops[out].n = 0;
        row += rows;
        out += ends ? 1 : 0;
        if (s->work_ns == 0 && s->n_generated == 0)
            s->work_ns = now;
    }
    *ret_batch = (de_batch){ .n_rows = row,
                             .n_seqs = n_seqs,
                             .n_out = out,
                             .tokens = e->row_tokens,
                             .pos = (const uint32_t(*)[3])e->row_pos,
                             .seqs = e->seqs,
                             .tops = e->tops,
                             .n_ids = e->mask.n_tokens };
}

/* ---- after the forward ---- */

static bool is_stop_id(const delta_session *s, uint32_t id)
{
    for (uint32_t i = 0; i < s->n_stop_ids; i++)
        if (s->stop_ids[i] == id)
            return true;
    return false;
}

/* The token d came, at `now`: into the timeline, and out. */
static void take(delta_session *s, const de_drawn *d, const delta_top_logprob *top, uint64_t now)
{
    delta_engine *e = s->engine;
    size_t len;
    const uint8_t *bytes = delta_token_bytes(e->tokenizer, d->id, &len);
    s->last_ns = now;
    s->tokens[s->n++] = d->id;
    s->settled = s->n;
    s->n_generated++;
    e->stats.decode_tokens++;
    delta_event *v = push_event(s, DELTA_EVENT_TOKEN);
    v->token.id = d->id;
    v->token.logprob = d->logprob;
    v->token.top = top;
    v->token.n_top = d->n_top;

    if (is_stop_id(s, d->id)) {
        finish(s, DELTA_FINISH_STOP_ID, d->id, NULL);
        return;
    }
    const int match = release_token(s, d->id);
    de_guide_took(&s->guide, d->id, bytes, len, s->detok.n_held > 0);
    if (match >= 0)
        finish(s, DELTA_FINISH_STOP_STRING, (uint32_t)match, NULL);
    else if (s->n_generated == s->max_tokens)
        finish(s, DELTA_FINISH_LENGTH, 0, NULL);
}

/* Is anything allowed besides the ids that stop? */
static bool leaves_more_than_stops(const delta_session *s, const uint32_t *allowed)
{
    uint32_t all = 0, stops = 0;
    for (uint32_t i = 0; i < s->engine->info.n_vocab / 32 + 1; i++)
        all += (uint32_t)__builtin_popcount(allowed[i]);
    for (uint32_t i = 0; i < s->n_stop_ids; i++) {
        bool again = false; /* a requested id may be the model's own, too */
        for (uint32_t k = 0; k < i; k++)
            again |= s->stop_ids[k] == s->stop_ids[i];
        stops += !again && allowed[s->stop_ids[i] / 32] >> (s->stop_ids[i] % 32) & 1;
    }
    return all > stops;
}

/* One token from the logits of the last one, which are changed, or the first in rank of them, and those that must follow it. */
static void sample(delta_session *s, float *logits, const de_top_logits *first)
{
    delta_engine *e = s->engine;
    delta_top_logprob *top = e->top + (size_t)s->seat * DELTA_MAX_TOP_LOGPROBS;
    de_top found[DELTA_MAX_TOP_LOGPROBS];
    de_drawn d;
    delta_error error = { 0 };
    bool barred = s->n_generated < s->min_tokens;
    uint32_t id = 0;
    s->has_logits = false;
    const bool forced = de_guide_forced(&s->guide, &id);
    const enum delta_mask_kind kind =
        forced ? DELTA_MASK_FREE : de_guide_mask(&s->guide, e->allowed);
    if (kind == DELTA_MASK_DEAD) {
        (void)delta_fail(&error, DELTA_EINTERNAL, "the grammar leaves no token to go on with");
        finish(s, DELTA_FINISH_ERROR, 0, &error);
        return;
    }
    if (kind == DELTA_MASK_SET && barred)
        barred = leaves_more_than_stops(s, e->allowed);
    const de_choice choice = { .mask = &e->mask,
                               .allowed = kind == DELTA_MASK_SET ? e->allowed : NULL,
                               .barred = s->stop_ids,
                               .n_barred = barred ? s->n_stop_ids : 0,
                               .forced = forced ? &id : NULL };
    int r = first && first->n
                ? de_sample_ranked(&s->sampler, &choice, first->of, first->n, first->is_sound, s->n,
                                   &e->scratch, &d, &error)
                : de_sample(&s->sampler, &choice, logits, s->n, &e->scratch, &d, found, &error);
    if (r < 0) {
        s->is_bad = true;
        de_disk_forget(e, s->owner, s->tokens, s->computed, s->turn_cached);
        de_prefix_forget(&e->prefix, s->owner, s->tokens, s->computed, s->turn_cached);
        finish(s, DELTA_FINISH_ERROR, 0, &error);
        return;
    }
    const uint64_t now = de_now_ns();
    if (s->n_generated == 0) {
        s->prefill_ns += s->work_ns ? now - s->work_ns : 0;
        s->work_ns = 0;
        s->first_ns = now;
    }
    for (uint32_t i = 0; i < d.n_top; i++)
        top[i] = (delta_top_logprob){ found[i].id, found[i].logprob };
    take(s, &d, top, now);
    /* No forward is needed to know these; their log probabilities would need one. */
    for (uint32_t n = 1; s->generating && n < DE_TOKENS_PER_STEP &&
                         !de_sampler_wants_logprobs(&s->sampler) && de_guide_forced(&s->guide, &id);
         n++) {
        de_sampler_note(&s->sampler, id);
        take(s, &(de_drawn){ .id = id, .logprob = NAN }, NULL, now);
    }
}

/* The state of s now holds the rows of q more. */
static void advance(delta_session *s, const de_batch_seq *q, uint64_t now)
{
    delta_engine *e = s->engine;
    float *logits = e->logits + (size_t)q->first_out * e->info.n_vocab;
    const de_top_logits *first = &e->tops[q->first_out];
    const uint32_t rows = q->n_rows;
    const bool prefill = s->computed < s->appended_end;
    s->computed += rows;
    s->active_ns = e->prefix.now_ns;
    s->settled = s->computed > s->settled ? s->computed : s->settled;
    for (uint32_t i = 0; i < q->n_marks; i++)
        if (!de_prefix_add(&e->prefix, s->owner, s->tokens, q->marks[i].end, s->pages,
                           q->marks[i].slot))
            de_gdn_slots_give(&e->slots, q->marks[i].slot);
    if (prefill)
        e->stats.prefill_tokens += rows;
    if (prefill &&
        !(s->generating && s->n_generated)) { /* or it was parked in the middle of an answer */
        delta_event *v = push_event(s, DELTA_EVENT_PREFILL);
        const uint32_t done = s->computed > s->appended_from ? s->computed - s->appended_from : 0;
        v->prefill.done = done;
        v->prefill.total = s->appended_end - s->appended_from;
        v->prefill.cached =
            s->turn_cached > s->appended_from ? s->turn_cached - s->appended_from : 0;
    }
    if (s->computed < s->n)
        return;
    /* Where all logits are not at hand the token is drawn, cancelled or not: the session goes on from it. */
    if (s->generating && !s->paused && (first->n || !atomic_load(&s->cancel))) {
        sample(s, logits, first);
        return;
    }
    memcpy(s->saved_logits, logits, (size_t)e->info.n_vocab * sizeof *logits);
    s->has_logits = true;
    if (!s->generating && s->work_ns) { /* the turn's prefill is done; what follows is not its */
        s->prefill_ns += now - s->work_ns;
        s->work_ns = 0;
    }
}

static void finish_cancelled_sessions(delta_engine *e)
{
    for (uint32_t i = 0; i < e->info.max_sessions; i++) {
        delta_session *s = e->by_seat[i];
        if (s && de_session_has_work(s) && atomic_exchange(&s->cancel, false))
            finish_cancelled(s);
    }
}

int delta_step(delta_engine *e, const delta_event **ret_events, size_t *ret_n, delta_error *err)
{
    if (e->fault.code)
        return delta_fail(err, e->fault.code, "%s", e->fault.text);
    const uint64_t start = de_now_ns();
    e->n_events = 0;
    for (uint32_t i = 0; i < e->info.max_sessions; i++)
        if (e->by_seat[i])
            e->by_seat[i]->text_used = 0;
    finish_cancelled_sessions(e);

    /* Logits that were saved need no forward. */
    bool worked = false;
    for (uint32_t i = 0; i < e->info.max_sessions; i++) {
        delta_session *s = e->by_seat[i];
        if (s && s->generating && s->has_logits && !s->paused && de_session_needs(s) <= s->room) {
            sample(s, s->saved_logits, NULL);
            worked = true;
        }
    }
    /* Those have had their token of this step: their rows are of the next one. */
    const uint32_t n_seqs = worked ? 0 : plan(e);
    de_batch batch = { 0 };
    if (n_seqs) {
        fill_batch(e, n_seqs, start, &batch);
        int r = de_forward(e->model, &batch, e->logits, NULL, &e->fault);
        if (r < 0) {
            e->fault.code = r;
            return delta_fail(err, r, "%s", e->fault.text);
        }
        const uint64_t now = de_now_ns();
        uint32_t prefill = 0;
        for (uint32_t i = 0; i < n_seqs; i++)
            prefill += e->seqs[i].decode ? 0 : e->seqs[i].n_rows;
        de_pace_note(&e->pace, prefill, now - start);
        for (uint32_t i = 0; i < n_seqs; i++)
            advance(e->of_item[e->order[i]], &e->seqs[i], now);
        finish_cancelled_sessions(e);
        worked = true;
    }
    if (worked) {
        e->stats.steps++;
        e->stats.step_ns += de_now_ns() - start;
        e->stats.rows_running = batch.n_rows;
    }
    *ret_events = e->events;
    *ret_n = e->n_events;
    return 0;
}
