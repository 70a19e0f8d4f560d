/* mailbox.c -- see mailbox.h. */
#include "daemon/mailbox.h"

#include <string.h>
#include <time.h>

#include "daemon/limits.h"

int dd_mailbox_init(dd_mailbox *m, uv_async_t *async)
{
    pthread_condattr_t a;
    memset(m, 0, sizeof *m);
    m->async = async;
    if (pthread_condattr_init(&a) != 0)
        return -1;
    int r = pthread_condattr_setclock(&a, CLOCK_MONOTONIC);
    r = r ? r : pthread_mutex_init(&m->lock, NULL);
    r = r ? r : pthread_cond_init(&m->to_engine, &a);
    r = r ? r : pthread_cond_init(&m->room, &a);
    (void)pthread_condattr_destroy(&a);
    return r ? -1 : 0;
}

void dd_mailbox_done(dd_mailbox *m)
{
    (void)pthread_cond_destroy(&m->room);
    (void)pthread_cond_destroy(&m->to_engine);
    (void)pthread_mutex_destroy(&m->lock);
}

void dd_mailbox_post(dd_mailbox *m, dd_mail *mail, uint32_t wishes, uint32_t without)
{
    (void)pthread_mutex_lock(&m->lock);
    mail->wishes = (mail->wishes & ~without) | wishes;
    if (!mail->is_posted) {
        mail->is_posted = true;
        mail->next = NULL;
        if (m->last)
            m->last->next = mail;
        else
            m->first = mail;
        m->last = mail;
        (void)pthread_cond_signal(&m->to_engine);
    }
    (void)pthread_mutex_unlock(&m->lock);
}

void dd_mailbox_close(dd_mailbox *m)
{
    (void)pthread_mutex_lock(&m->lock);
    m->is_closed = true;
    (void)pthread_cond_broadcast(&m->to_engine);
    (void)pthread_cond_broadcast(&m->room);
    (void)pthread_mutex_unlock(&m->lock);
}

bool dd_mailbox_is_closed(dd_mailbox *m)
{
    (void)pthread_mutex_lock(&m->lock);
    bool is = m->is_closed;
    (void)pthread_mutex_unlock(&m->lock);
    return is;
}

dd_mail *dd_mailbox_take(dd_mailbox *m, uint32_t timeout_ms, uint32_t *ret_wishes)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_sec += timeout_ms / 1000;
    t.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    if (t.tv_nsec >= 1000000000) {
        t.tv_nsec -= 1000000000;
        t.tv_sec++;
    }
    (void)pthread_mutex_lock(&m->lock);
    while (!m->first && !m->is_closed && timeout_ms)
        if (pthread_cond_timedwait(&m->to_engine, &m->lock, &t) != 0)
            break;
    dd_mail *mail = m->first;
    if (mail) {
        m->first = mail->next;
        if (!m->first)
            m->last = NULL;
        *ret_wishes = mail->wishes;
        mail->wishes = 0;
        mail->is_posted = false;
    }
    (void)pthread_mutex_unlock(&m->lock);
    return mail;
}

void dd_mailbox_send(dd_mailbox *m, dd_batch *b)
{
    (void)pthread_mutex_lock(&m->lock);
    while (m->n_batches >= DD_BATCHES_HELD && !m->is_closed)
        (void)pthread_cond_wait(&m->room, &m->lock);
    b->next = NULL;
    if (m->last_batch)
        m->last_batch->next = b;
    else
        m->first_batch = b;
    m->last_batch = b;
    m->n_batches++;
    (void)pthread_mutex_unlock(&m->lock);
    if (m->async)
        (void)uv_async_send(m->async);
}

dd_batch *dd_mailbox_receive(dd_mailbox *m)
{
    (void)pthread_mutex_lock(&m->lock);
    dd_batch *b = m->first_batch;
    if (b) {
        m->first_batch = b->next;
        if (!m->first_batch)
            m->last_batch = NULL;
        m->n_batches--;
        (void)pthread_cond_signal(&m->room);
    }
    (void)pthread_mutex_unlock(&m->lock);
    return b;
}
