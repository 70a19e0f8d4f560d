/* ahead.c -- what comes next is computed while nobody waits.
 *
 * While an answer is written its prompt ends in an open think block, and in a tool loop the reasoning
 * of all answers stays. When the next real user message arrives the template leaves all of that out:
 * the prompt parts from what was computed behind the last user message. What it will be up to the new
 * message is known as soon as the answer is there; and in a tool loop, while the tools run, what it
 * will be up to where the loop is. So that is rendered then and computed in the background
 * (delta_session_set_background()), for the cache alone: on rows that nobody else wants, on a place
 * that anybody who waits gets.
 *
 *   live_free() -> begin (loop) -> render (worker) -> run -> FINISHED
 *
 * Threads    the loop, but render(). */
#include <stdlib.h>
#include <string.h>

#include "daemon/live.h"

struct dd_ahead {
    dd_ahead *next;
    dd_service *s;
    uv_work_t work;
    dd_request req; /* of the chat that was answered; messages with the answer and a next one */
    char *content;  /* of the answer */
    uint64_t owner, run;
    uint32_t *ids;
    size_t n_ids;
    dd_timeline *timeline;
    delta_part parts[2];
};

static void ahead_free(dd_ahead *a)
{
    for (dd_ahead **p = &a->s->ahead; *p; p = &(*p)->next)
        if (*p == a) {
            *p = a->next;
            a->s->n_ahead--;
            break;
        }
    dd_timeline_free(a->timeline);
    dd_request_done(&a->req);
    free(a->content);
    free(a->ids);
    free(a);
}

static void render(uv_work_t *w)
{
    dd_ahead *a = w->data;
    const dd_turn whole = { .join = DELTA_JOIN_AUTO };
    dd_status st;
    delta_rendered text = { 0 };
    if (dd_render(a->s, &a->req, &whole, false, &text, &a->ids, &a->n_ids, &st) < 0)
        return;
    /* Up to the message that is yet to come: the last block. */
    const int64_t start =
        delta_tokenizer_added_id(dd_engine_tokenizer(a->s->engine), "<|im_start|>");
    while (a->n_ids && a->ids[a->n_ids - 1] != (uint32_t)start)
        a->n_ids--;
    a->n_ids -= a->n_ids > 0;
    delta_rendered_done(&text);
}

static void on_rendered(uv_work_t *w, int status)
{
    dd_ahead *a = w->data;
    dd_service *s = a->s;
    if (status < 0 || !a->n_ids || s->phase == DD_DRAINING ||
        a->n_ids > dd_engine_info(s->engine)->ctx_max ||
        !(a->timeline = dd_timeline_new(s->engine, a->owner, false))) {
        ahead_free(a);
        return;
    }
    a->run = ++s->next_run;
    const dd_run run = { .id = a->run,
                         .ids = a->ids,
                         .n_ids = a->n_ids,
                         .ctx_tokens = (uint32_t)a->n_ids,
                         .is_background = true };
    dd_timeline_run(a->timeline, &run);
}

void dd_ahead_begin(dd_live *l)
{
    dd_service *s = l->s;
    dd_request *q = &l->req;
    const bool closes = l->sampled.p && memmem(l->sampled.p, l->sampled.len, "</think>", 8);
    if (!l->was_answered || (l->n_calls && q->thinking && !closes) || l->session || q->preserve ||
        q->bypass_cache || l->is_long || !s->o.config->cache.ahead ||
        !dd_engine_info(s->engine)->checkpoints || s->phase == DD_DRAINING ||
        s->n_ahead >= DD_AHEAD || !s->is_ready || s->is_faulty)
        return;
    const size_t n = q->n_messages + 2;
    dd_ahead *a = calloc(1, sizeof *a);
    q->arena.limit += n * (sizeof *q->messages + sizeof *q->sampled) + 128;
    delta_message *messages = de_arena_array(&q->arena, n, sizeof *messages);
    dd_sampled *sampled = de_arena_array(&q->arena, n, sizeof *sampled);
    /* With calls, what was sampled: the client will name it by their ids. */
    const de_text *answer = l->n_calls ? &l->sampled : &l->content;
    char *content = strndup(answer->p ? answer->p : "", answer->len);
    if (!a || !messages || !sampled || !content) {
        free(a);
        free(content);
        return;
    }
    a->s = s;
    a->work.data = a;
    a->content = content;
    a->owner = dd_reuse_owner(l);
    a->parts[0] = (delta_part){ .text = { content, strlen(content) } };
    a->parts[1] = (delta_part){ .text = { "?", 1 } };
    memcpy(messages, q->messages, q->n_messages * sizeof *messages);
    memset(sampled, 0, n * sizeof *sampled);
    if (q->sampled)
        memcpy(sampled, q->sampled, q->n_messages * sizeof *sampled);
    messages[n - 2] =
        (delta_message){ .role = DELTA_ROLE_ASSISTANT, .parts = &a->parts[0], .n_parts = 1 };
    if (l->n_calls) {
        messages[n - 2].sampled = a->parts[0].text;
        messages[n - 2].sampled_thought = q->thinking;
    }
    messages[n - 1] =
        (delta_message){ .role = DELTA_ROLE_USER, .parts = &a->parts[1], .n_parts = 1 };
    q->messages = messages;
    q->sampled = sampled;
    q->n_messages = n;
    a->req = *q;
    memset(q, 0, sizeof *q);
    a->next = s->ahead;
    s->ahead = a;
    s->n_ahead++;
    if (uv_queue_work(s->o.loop, &a->work, render, on_rendered) < 0)
        ahead_free(a);
}

bool dd_ahead_note(dd_service *s, const dd_note *n)
{
    dd_ahead *a = s->ahead;
    while (a && a->run != n->run)
        a = a->next;
    if (!a || !n->run)
        return false;
    if (n->kind == DD_NOTE_QUEUED)
        dd_timeline_cancel(a->timeline); /* others have all the room */
    if (n->kind == DD_NOTE_FINISHED)
        ahead_free(a);
    return true;
}

void dd_ahead_cancel(dd_service *s)
{
    for (dd_ahead *a = s->ahead; a; a = a->next)
        if (a->timeline)
            dd_timeline_cancel(a->timeline);
}
