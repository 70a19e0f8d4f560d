/* mailbox.h -- the two ways between the loop and the engine thread.
 *
 * Towards the engine: envelopes. Each belongs to the thing it is about and holds a set of wishes;
 * posting one that is on its way already adds a wish. So posting never waits and never fails, and
 * there are as many envelopes as things. Towards the loop: batches, at most DD_BATCHES_HELD; the
 * engine thread waits for room, the loop never waits for the engine.
 *
 * Threads    as each function says. */
#ifndef DD_MAILBOX_H
#define DD_MAILBOX_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <uv.h>

typedef struct dd_mail dd_mail;
struct dd_mail { /* fields are guarded by the mailbox's lock */
    dd_mail *next;
    uint32_t wishes;
    bool is_posted;
};

typedef struct dd_batch dd_batch;
struct dd_batch {
    dd_batch *next;
};

typedef struct dd_mailbox {
    pthread_mutex_t lock; /* guards all below */
    pthread_cond_t to_engine, room;
    dd_mail *first, *last;
    dd_batch *first_batch, *last_batch;
    uint32_t n_batches;
    bool is_closed;
    uv_async_t *async; /* told of a batch; may be NULL (tests) */
} dd_mailbox;

int dd_mailbox_init(dd_mailbox *m, uv_async_t *async); /* 0 or -1 */
void dd_mailbox_done(dd_mailbox *m);

/* loop: adds wishes (bits), takes back others that were not seen yet */
void dd_mailbox_post(dd_mailbox *m, dd_mail *mail, uint32_t wishes, uint32_t without);
void dd_mailbox_close(dd_mailbox *m); /* loop: the engine thread is to end */
/* engine: the next envelope and its wishes; waits up to timeout_ms if there is none. NULL: none */
dd_mail *dd_mailbox_take(dd_mailbox *m, uint32_t timeout_ms, uint32_t *ret_wishes);
bool dd_mailbox_is_closed(dd_mailbox *m); /* any thread */

void dd_mailbox_send(dd_mailbox *m, dd_batch *b); /* engine: waits for room unless closed */
dd_batch *dd_mailbox_receive(dd_mailbox *m);      /* loop: the oldest batch, or NULL */

#endif
