/* export.c -- a session's conversation as bytes that can be carried away.
 *
 * The SessionExport is encoded when the call comes, so that it is of one moment however slowly it is
 * read, and sent in pieces: a conversation may be longer than what a client takes as one message.
 *
 * Limits     DD_EXPORTS at once, each at most DD_SESSION_BYTES and what of it was sampled.
 * Threads    the loop. */
#include <stdlib.h>

#include "daemon/live.h"

struct dd_export {
    dd_export *next;
    dd_service *s;
    dd_rpc *rpc;
    uint8_t *bytes;
    size_t len, at;
};

void dd_export_end(dd_export *e, const dd_status *st)
{
    dd_service *s = e->s;
    for (dd_export **p = &s->exports; *p; p = &(*p)->next)
        if (*p == e) {
            *p = e->next;
            s->n_exports--;
            break;
        }
    dd_refuse(e->rpc, st);
    free(e->bytes);
    free(e);
}

/* The next piece, or the end. */
void dd_export_sent(dd_export *e)
{
    dd_status st = { .code = DD_OK };
    const size_t left = e->len - e->at, n = left < DD_EXPORT_PIECE ? left : DD_EXPORT_PIECE;
    size_t len = 0;
    uint8_t *msg = n ? dd_export_piece_encode(e->bytes + e->at, n, &len) : NULL;
    if (msg) {
        e->at += n;
        e->rpc->vt->send(e->rpc, msg, len);
        return;
    }
    if (n)
        dd_status_set(&st, DD_RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", "no memory for the export");
    dd_export_end(e, &st);
}

void dd_export_begin(dd_service *s, dd_rpc *r, const dd_session *x, bool with_sampled)
{
    dd_status st;
    if (s->n_exports == DD_EXPORTS) {
        dd_status_set(&st, DD_RESOURCE_EXHAUSTED, "QUEUE_FULL", "%d exports are being read",
                      DD_EXPORTS);
        st.retry_ms = DD_RETRY_MS;
        dd_refuse(r, &st);
        return;
    }
    const dd_saved saved = dd_session_saved(s, x);
    dd_export *e = calloc(1, sizeof *e);
    if (e)
        e->bytes = dd_export_encode(&saved, with_sampled, &e->len);
    if (!e || !e->bytes) {
        free(e);
        dd_status_set(&st, DD_RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", "no memory for the export");
        dd_refuse(r, &st);
        return;
    }
    e->s = s;
    e->rpc = r;
    e->next = s->exports;
    s->exports = e;
    s->n_exports++;
    r->handler = e;
    dd_export_sent(e);
}

void dd_exports_abort(dd_service *s, const dd_status *st)
{
    while (s->exports)
        dd_export_end(s->exports, st);
}
