/* pool.c -- see pool.h.
 *
 * A job is announced by raising `job`; workers spin a little for it, since the
 * next loop of a forward comes within microseconds, then sleep. Tasks are
 * taken by an atomic counter. A job ends when its tasks have ended, not when
 * every worker has seen it: where the processor is shared, a worker that does
 * not run must not hold up a hundred jobs a token. */
#include "kernels/cpu/pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

enum { SPINS = 4000, MAX_THREADS = 256 };

struct de_pool {
    uint32_t n_threads, n_workers;
    pthread_t *workers;
    pthread_mutex_t lock; /* guards sleeping and waking */
    pthread_cond_t wake;
    atomic_uint job;                   /* raised with every job */
    atomic_uint unclaimed, unfinished; /* tasks of the job */
    atomic_uint sleepers;              /* workers that wait on wake */
    atomic_bool stop;
    uint32_t n_tasks; /* this and below: written only while unfinished is 0 */
    void (*run)(void *, uint32_t, uint32_t);
    void *arg;
};

typedef struct worker_start {
    de_pool *pool;
    uint32_t thread;
} worker_start;

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Claims tasks until none is left. A worker that comes late, even from an earlier job, does no
 * harm: a claim succeeds only while the job has an unclaimed task, so the job cannot end, nor its
 * fields change, before that task is done. The fields are read after the claim. */
static void take_tasks(de_pool *p, uint32_t thread)
{
    unsigned left = atomic_load_explicit(&p->unclaimed, memory_order_relaxed);
    while (left > 0) {
        if (!atomic_compare_exchange_weak_explicit(&p->unclaimed, &left, left - 1,
                                                   memory_order_acquire, memory_order_relaxed))
            continue; /* left was loaded anew */
        p->run(p->arg, p->n_tasks - left, thread);
        atomic_fetch_sub_explicit(&p->unfinished, 1, memory_order_release);
        left = atomic_load_explicit(&p->unclaimed, memory_order_relaxed);
    }
}

static void *work(void *start)
{
    worker_start s = *(worker_start *)start;
    free(start);
    de_pool *p = s.pool;
    unsigned seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load(&p->job) == seen && !atomic_load(&p->stop); i++)
            relax();
        if (atomic_load(&p->job) == seen) {
            pthread_mutex_lock(&p->lock);
            atomic_fetch_add(&p->sleepers, 1); /* before the last look at job */
            while (atomic_load(&p->job) == seen && !atomic_load(&p->stop))
                pthread_cond_wait(&p->wake, &p->lock);
            atomic_fetch_sub(&p->sleepers, 1);
            pthread_mutex_unlock(&p->lock);
        }
        if (atomic_load(&p->stop))
            return NULL;
        seen = atomic_load(&p->job);
        take_tasks(p, s.thread);
    }
}

uint32_t de_pool_count(uint32_t n)
{
    if (n == 0) {
        cpu_set_t set;
        n = sched_getaffinity(0, sizeof set, &set) == 0 ? (uint32_t)CPU_COUNT(&set) : 1;
    }
    return n < 1 ? 1 : n > MAX_THREADS ? MAX_THREADS : n;
}

de_pool *de_pool_new(uint32_t n)
{
    n = de_pool_count(n);
    de_pool *p = calloc(1, sizeof *p);
    if (!p)
        return NULL;
    p->n_threads = n;
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    p->workers = calloc(n, sizeof *p->workers);
    for (uint32_t i = 1; p->workers && i < n; i++) {
        worker_start *s = malloc(sizeof *s);
        if (!s)
            break;
        *s = (worker_start){ p, i };
        if (pthread_create(&p->workers[p->n_workers], NULL, work, s) != 0) {
            free(s);
            break;
        }
        p->n_workers++;
    }
    if (!p->workers || p->n_workers + 1 != n) {
        de_pool_free(p);
        return NULL;
    }
    return p;
}

void de_pool_free(de_pool *p)
{
    if (!p)
        return;
    pthread_mutex_lock(&p->lock);
    atomic_store(&p->stop, true);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    for (uint32_t i = 0; i < p->n_workers; i++)
        pthread_join(p->workers[i], NULL);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->lock);
    free(p->workers);
    free(p);
}

uint32_t de_pool_threads(const de_pool *p)
{
    return p->n_threads;
}

void de_pool_run(de_pool *p, uint32_t n_tasks, uint64_t work,
                 void (*run)(void *, uint32_t, uint32_t), void *arg)
{
    if (n_tasks == 0)
        return;
    if (n_tasks == 1 || work < DE_POOL_MIN_WORK || p->n_workers == 0) {
        for (uint32_t t = 0; t < n_tasks; t++)
            run(arg, t, 0);
        return;
    }
    p->n_tasks = n_tasks;
    p->run = run;
    p->arg = arg;
    atomic_store_explicit(&p->unfinished, n_tasks, memory_order_relaxed);
    atomic_store_explicit(&p->unclaimed, n_tasks, memory_order_release);
    atomic_fetch_add(&p->job, 1);
    /* a worker counts itself before it looks at job for the last time: one of the two sees the other */
    if (atomic_load(&p->sleepers) > 0) {
        pthread_mutex_lock(&p->lock);
        pthread_cond_broadcast(&p->wake);
        pthread_mutex_unlock(&p->lock);
    }
    take_tasks(p, 0);
    for (int i = 0; atomic_load_explicit(&p->unfinished, memory_order_acquire) > 0; i++)
        if (i < SPINS)
            relax();
        else
            sched_yield();
}
