/* test_pool.c -- the CPU backend's threads: every task once, and nothing of it is still running
 * when de_pool_run() returns. The pool once waited for workers rather than for tasks: on a busy
 * processor a worker that was not running held up every loop of a forward. */
#include <stdatomic.h>

#include "kernels/cpu/pool.h"
#include "support/tap.h"

enum { MOST = 300 };

typedef struct job {
    atomic_uint runs[MOST];
    atomic_uint inside; /* tasks that run now */
    uint32_t threads;
    unsigned value; /* plain on purpose: a race on it is a bug of the pool */
    atomic_uint wrong;
} job;

static void task(void *arg, uint32_t t, uint32_t thread)
{
    job *j = arg;
    atomic_fetch_add(&j->inside, 1);
    if (t >= MOST || thread >= j->threads || j->value != 7)
        atomic_fetch_add(&j->wrong, 1);
    else
        atomic_fetch_add(&j->runs[t], 1);
    atomic_fetch_sub(&j->inside, 1);
}

/* Many short jobs of changing size, each in a frame of its own: late workers meet the next one. */
static void one(de_pool *p, uint32_t n, uint64_t work)
{
    job j = { .threads = de_pool_threads(p), .value = 7 };
    de_pool_run(p, n, work, task, &j);
    CHECK_EQ(atomic_load(&j.inside), 0);
    CHECK_EQ(atomic_load(&j.wrong), 0);
    for (uint32_t t = 0; t < MOST; t++)
        if (atomic_load(&j.runs[t]) != (t < n))
            TAP_FAIL("task %u of %u ran %u times", t, n, atomic_load(&j.runs[t]));
    j.value = 0;
}

TEST(every_task_runs_once_on_more_threads_than_processors)
{
    for (uint32_t threads = 1; threads <= 9; threads += 4) {
        de_pool *p = de_pool_new(threads);
        REQUIRE(p);
        CHECK_EQ(de_pool_threads(p), threads);
        for (uint32_t i = 0; i < 1500; i++)
            one(p, i * 37 % (MOST + 1), DE_POOL_MIN_WORK);
        de_pool_free(p);
    }
}

TEST(workers_that_sleep_are_woken)
{
    de_pool *p = de_pool_new(3);
    REQUIRE(p);
    for (int i = 0; i < 40; i++) {
        usleep(3000); /* long enough for them to fall asleep */
        one(p, 50, DE_POOL_MIN_WORK);
    }
    de_pool_free(p);
}

static void note_thread(void *arg, uint32_t t, uint32_t thread)
{
    (void)t;
    if (thread != 0)
        atomic_fetch_add((atomic_uint *)arg, 1);
}

TEST(small_work_stays_on_the_caller)
{
    atomic_uint elsewhere = 0;
    de_pool *p = de_pool_new(4);
    REQUIRE(p);
    for (int i = 0; i < 500; i++)
        de_pool_run(p, MOST, DE_POOL_MIN_WORK - 1, note_thread, &elsewhere);
    CHECK_EQ(atomic_load(&elsewhere), 0);
    de_pool_free(p);
}
