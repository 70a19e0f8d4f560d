/* resume.c -- answers that outlive their call: detach, Resume, idempotency keys.
 *
 * A Chat with `detach` or an `idempotency_key` keeps its events, each as it was sent. Its reader may
 * go (the connection broke, the call's deadline passed): the request runs on, for detach_limit at
 * most, and whoever may use it takes up its events from any number on, while it runs and for
 * resume_limit after its end. The events are the same bytes again, then the ones that follow. A
 * second reader takes over from the first.
 *
 * The same Chat with the same key is not run twice: it gets the events of the first from 1 on.
 *
 * Limits     DD_RESUME_BYTES of events for one request, the oldest go first; DD_RESUME_RESTING
 *            requests that have ended, the one that ended first goes. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/sha256.h"
#include "daemon/live.h"

struct dd_kept {
    dd_kept *next;
    uint64_t seq;
    size_t len;
    uint8_t bytes[];
};

void dd_resume_done(dd_live *l)
{
    for (dd_kept *k = l->kept_first, *next; k; k = next) {
        next = k->next;
        free(k);
    }
    l->kept_first = l->kept_last = l->replay = NULL;
    l->kept_bytes = 0;
}

int dd_resume_keep(dd_live *l, uint64_t seq, const uint8_t *msg, size_t len)
{
    dd_kept *k = malloc(sizeof *k + len);
    if (!k)
        return -1;
    k->next = NULL;
    k->seq = seq;
    k->len = len;
    if (len)
        memcpy(k->bytes, msg, len);
    if (l->kept_last)
        l->kept_last->next = k;
    else
        l->kept_first = k;
    l->kept_last = k;
    l->kept_bytes += len;
    /* What a reader has yet to get stays; it holds no more than it was behind. */
    while (l->kept_bytes > DD_RESUME_BYTES && l->kept_first != k && l->kept_first != l->replay) {
        dd_kept *first = l->kept_first;
        l->kept_first = first->next;
        l->kept_bytes -= first->len;
        free(first);
    }
    return 0;
}

uint8_t *dd_resume_next(dd_live *l, size_t *ret_len)
{
    const dd_kept *k = l->replay;
    uint8_t *msg = malloc(k->len ? k->len : 1);
    if (!msg)
        return NULL;
    memcpy(msg, k->bytes, k->len);
    *ret_len = k->len;
    l->replay = k->next;
    return msg;
}

/* Gives the request's events from number `from` on to r. */
static void attach(dd_live *l, dd_rpc *r, uint64_t from)
{
    dd_status st;
    const uint64_t last = l->kept_last ? l->kept_last->seq : 0;
    if (from > last + 1) {
        dd_status_set(&st, DD_INVALID_ARGUMENT, "FIELD_INVALID",
                      "event %llu has not been sent, the last was %llu", (unsigned long long)from,
                      (unsigned long long)last);
        (void)snprintf(st.field, sizeof st.field, "from_seq");
        dd_refuse(r, &st);
        return;
    }
    if (l->kept_first && from < l->kept_first->seq) {
        dd_status_set(&st, DD_OUT_OF_RANGE, "EVENTS_GONE",
                      "the events before %llu are not kept any more",
                      (unsigned long long)l->kept_first->seq);
        dd_refuse(r, &st);
        return;
    }
    if (l->rpc) {
        dd_status_set(&st, DD_ABORTED, "TAKEN_OVER", "another call reads this answer now");
        dd_rpc *old = l->rpc;
        l->rpc = NULL;
        dd_refuse(old, &st);
    }
    l->replay = l->kept_first;
    while (l->replay && l->replay->seq < from)
        l->replay = l->replay->next;
    dd_live_attach(l, r);
}

bool dd_resume_known(dd_live *l, const uint8_t *msg, size_t len, dd_status *st)
{
    const dd_request *q = &l->req;
    dd_live *o = l->s->live;
    st->code = DD_OK;
    l->is_kept = q->detach || q->idempotency_key[0];
    if (!q->idempotency_key[0])
        return false;
    de_sha256_hex(msg, len, l->sha);
    (void)snprintf(l->key, sizeof l->key, "%s", q->idempotency_key);
    while (o && (o == l || !o->is_kept || strcmp(o->key, l->key) != 0 ||
                 !dd_peer_is_same_user(&o->peer, &l->peer)))
        o = o->next;
    if (!o)
        return false;
    if (strcmp(o->sha, l->sha) != 0) {
        dd_status_set(st, DD_FAILED_PRECONDITION, "KEY_REUSED",
                      "another request had this key: a key is for one request");
        (void)snprintf(st->field, sizeof st->field, "idempotency_key");
        return true;
    }
    dd_rpc *r = l->rpc;
    l->rpc = NULL;
    attach(o, r, 1);
    return true;
}

void dd_resume_call(dd_service *s, dd_rpc *r, const uint8_t *msg, size_t len)
{
    dd_request q;
    dd_status st = { 0 };
    dd_live *l = NULL;
    if (dd_request_decode(DD_REQ_RESUME, msg, len, &q, &st) == 0) {
        for (l = s->live; l; l = l->next)
            if (l->is_kept && dd_peer_may_use(&r->peer, &l->peer) &&
                (dd_peer_is_same_client(&r->peer, &l->peer) || l->has_own_id) &&
                strcmp(l->request_id, q.request_id) == 0)
                break;
        if (!l) {
            dd_status_set(&st, DD_NOT_FOUND, "REQUEST_UNKNOWN",
                          "no answer of this id is kept; only those with detach or an "
                          "idempotency_key are");
            st.missing = "deltad.v1.Request";
            (void)snprintf(st.missing_name, sizeof st.missing_name, "%s", q.request_id);
        }
    }
    if (l)
        attach(l, r, q.from_seq ? q.from_seq : 1);
    else
        dd_refuse(r, &st);
    dd_request_done(&q);
    dd_live_timer(s);
}

void dd_resume_make_room(dd_service *s)
{
    uint32_t n = 0;
    dd_live *oldest = NULL;
    for (dd_live *l = s->live; l; l = l->next)
        if (l->kept_until_ns) {
            n++;
            if (!oldest || l->kept_until_ns < oldest->kept_until_ns)
                oldest = l;
        }
    s->n_resting = n;
    if (n > DD_RESUME_RESTING && oldest)
        oldest->kept_until_ns = 1; /* the timer frees it */
}

void dd_resume_drain(dd_service *s)
{
    for (dd_live *l = s->live; l; l = l->next)
        if (l->kept_until_ns)
            l->kept_until_ns = 1;
        else if (l->is_kept && !l->rpc)
            dd_live_cancel(l, DD_END_CANCEL);
    dd_live_timer(s);
}
