/* pool.h -- the threads of the CPU backend: one loop over tasks at a time.
 *
 * Threads    de_pool_run() from one thread; it works along and returns when all tasks are done.
 * Which thread takes which task is open; a task's result must not depend on it. */
#ifndef DE_POOL_H
#define DE_POOL_H

#include <stdint.h>

typedef struct de_pool de_pool;

/* How many threads de_pool_new(n) makes. */
uint32_t de_pool_count(uint32_t n);
/* n threads in all, the caller's included; 0: as many as the process may use. NULL: no memory. */
de_pool *de_pool_new(uint32_t n);
void de_pool_free(de_pool *p);
uint32_t de_pool_threads(const de_pool *p);

/* Calls run(arg, task, thread) for every task in 0 .. n_tasks - 1; thread < de_pool_threads().
 * work: multiply-adds of all tasks, roughly. Under DE_POOL_MIN_WORK the caller does them alone:
 * tens of microseconds, less than it may take to wake a thread. */
enum { DE_POOL_MIN_WORK = 1 << 20 };
void de_pool_run(de_pool *p, uint32_t n_tasks, uint64_t work,
                 void (*run)(void *arg, uint32_t task, uint32_t thread), void *arg);

#endif
