/* pool.c -- see pool.h.
 *
 * A job is announced by raising `job`; workers spin a little for it, since the
 * next loop of a forward comes within microseconds, then sleep. Tasks are
 * taken by an atomic counter. */
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
    atomic_uint job, next_task, working; /* working: workers that have not finished this job */
    atomic_bool stop;
    uint32_t n_tasks;
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

static void take_tasks(de_pool *p, uint32_t thread)
{
    for (;;) {
        uint32_t t = atomic_fetch_add_explicit(&p->next_task, 1, memory_order_relaxed);
        if (t >= p->n_tasks)
            return;
        p->run(p->arg, t, thread);
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
            while (atomic_load(&p->job) == seen && !atomic_load(&p->stop))
                pthread_cond_wait(&p->wake, &p->lock);
            pthread_mutex_unlock(&p->lock);
        }
        if (atomic_load(&p->stop))
            return NULL;
        seen = atomic_load(&p->job);
        take_tasks(p, s.thread);
        atomic_fetch_sub(&p->working, 1);
    }
}

de_pool *de_pool_new(uint32_t n)
{
    if (n == 0) {
        cpu_set_t set;
        n = sched_getaffinity(0, sizeof set, &set) == 0 ? (uint32_t)CPU_COUNT(&set) : 1;
    }
    if (n < 1)
        n = 1;
    if (n > MAX_THREADS)
        n = MAX_THREADS;
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

void de_pool_run(de_pool *p, uint32_t n_tasks, void (*run)(void *, uint32_t, uint32_t), void *arg)
{
    if (n_tasks == 0)
        return;
    if (n_tasks == 1 || p->n_workers == 0) {
        for (uint32_t t = 0; t < n_tasks; t++)
            run(arg, t, 0);
        return;
    }
    p->n_tasks = n_tasks;
    p->run = run;
    p->arg = arg;
    atomic_store(&p->next_task, 0);
    atomic_store(&p->working, p->n_workers);
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->job, 1);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    take_tasks(p, 0);
    for (int i = 0; atomic_load(&p->working); i++)
        if (i < SPINS)
            relax();
        else
            sched_yield();
}
