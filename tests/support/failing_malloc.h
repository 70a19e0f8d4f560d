/* failing_malloc.h -- every allocation of the tested code in turn fails; nothing may leak or crash.
 *
 * A program named test_nomem* is linked with --wrap for the functions below, so what the project's
 * own objects allocate passes here, and what libraries allocate for themselves does not. Of what was
 * allocated here, all must be freed by the end of a run. */
#ifndef FAILING_MALLOC_H
#define FAILING_MALLOC_H

#include <pthread.h>
#include <stddef.h>

#include "delta/error.h"

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *p, size_t n);
void *__real_aligned_alloc(size_t alignment, size_t n);
char *__real_strdup(const char *s);
char *__real_strndup(const char *s, size_t n);
void __real_free(void *p);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *p, size_t n);
void *__wrap_aligned_alloc(size_t alignment, size_t n);
char *__wrap_strdup(const char *s);
char *__wrap_strndup(const char *s, size_t n);
void __wrap_free(void *p);

static struct {
    pthread_mutex_t lock; /* guards the rest */
    bool is_on, sticky;   /* sticky: all that follow fail too */
    unsigned long count, fail_at, failed;
    void **live; /* a hash set of pointers; NULL: empty, fm_gone: was taken out */
    size_t cap, n_used, n_live;
} fm = { .lock = PTHREAD_MUTEX_INITIALIZER };
static char fm_gone;

static size_t fm_slot(const void *p)
{
    size_t i = (size_t)((uintptr_t)p >> 4) * 0x9E3779B97F4A7C15u >> 16 & (fm.cap - 1);
    while (fm.live[i] && fm.live[i] != p)
        i = (i + 1) & (fm.cap - 1);
    return i;
}

static void fm_grow(void)
{
    void **old = fm.live;
    const size_t n = fm.cap;
    fm.cap = n && fm.n_live * 4 < n ? n : n ? 2 * n : 1 << 12;
    fm.live = __real_calloc(fm.cap, sizeof *fm.live);
    if (!fm.live)
        abort();
    fm.n_used = fm.n_live;
    for (size_t i = 0; i < n; i++)
        if (old[i] && old[i] != &fm_gone)
            fm.live[fm_slot(old[i])] = old[i];
    __real_free(old);
}

static void fm_note(void *p)
{
    if (!p)
        return;
    if (fm.n_used * 2 >= fm.cap)
        fm_grow();
    fm.live[fm_slot(p)] = p;
    fm.n_used++;
    fm.n_live++;
}

/* Whether it was allocated here, while on. */
static bool fm_forget(const void *p)
{
    if (!p || !fm.cap)
        return false;
    const size_t i = fm_slot(p);
    if (!fm.live[i])
        return false;
    fm.live[i] = &fm_gone;
    fm.n_live--;
    return true;
}

static bool fm_refuses(void)
{
    if (!fm.is_on)
        return false;
    const unsigned long n = fm.count++;
    const bool yes = fm.sticky ? n >= fm.fail_at : n == fm.fail_at;
    fm.failed += yes;
    return yes;
}

#define FM_ALLOC(call)                                                                             \
    do {                                                                                           \
        (void)pthread_mutex_lock(&fm.lock);                                                        \
        void *fm_p = fm_refuses() ? NULL : (call);                                                 \
        if (fm.is_on)                                                                              \
            fm_note(fm_p);                                                                         \
        (void)pthread_mutex_unlock(&fm.lock);                                                      \
        return fm_p;                                                                               \
    } while (0)

void *__wrap_malloc(size_t n)
{
    FM_ALLOC(__real_malloc(n));
}

void *__wrap_calloc(size_t n, size_t size)
{
    FM_ALLOC(__real_calloc(n, size));
}

void *__wrap_aligned_alloc(size_t alignment, size_t n)
{
    FM_ALLOC(__real_aligned_alloc(alignment, n));
}

char *__wrap_strdup(const char *s)
{
    FM_ALLOC(__real_strdup(s));
}

char *__wrap_strndup(const char *s, size_t n)
{
    FM_ALLOC(__real_strndup(s, n));
}

void *__wrap_realloc(void *p, size_t n)
{
    void *q = NULL;
    (void)pthread_mutex_lock(&fm.lock);
    if (!fm_refuses()) {
        const bool ours = fm_forget(p);
        q = __real_realloc(p, n);
        if (q && (ours || (fm.is_on && !p)))
            fm_note(q);
        else if (!q && ours)
            fm_note(p);
    }
    (void)pthread_mutex_unlock(&fm.lock);
    return q;
}

void __wrap_free(void *p)
{
    (void)pthread_mutex_lock(&fm.lock);
    (void)fm_forget(p);
    (void)pthread_mutex_unlock(&fm.lock);
    __real_free(p);
}

/* Runs it with the n-th allocation failing, for each n (after `all` only each stride-th), until a run
 * has fewer. run() returns 0 or a DELTA_E code with err filled, and frees what it made. */
static void fm_torture(const char *what, int (*run)(delta_error *err), unsigned all,
                       unsigned stride, bool sticky)
{
    unsigned long n = 0, n_survived = 0, n_runs = 0;
    for (;; n += n < all ? 1 : stride, n_runs++) {
        delta_error err = { 0 };
        (void)pthread_mutex_lock(&fm.lock);
        fm.is_on = true, fm.sticky = sticky, fm.count = 0, fm.fail_at = n, fm.failed = 0;
        (void)pthread_mutex_unlock(&fm.lock);
        const int r = run(&err);
        (void)pthread_mutex_lock(&fm.lock);
        fm.is_on = false;
        const size_t n_live = fm.n_live;
        if (fm.cap)
            memset(fm.live, 0, fm.cap * sizeof *fm.live);
        fm.n_live = fm.n_used = 0;
        (void)pthread_mutex_unlock(&fm.lock);
        if (n_live)
            TAP_FAIL("%s: %zu allocations are left when number %lu failed", what, n_live, n);
        if (!fm.failed) {
            if (r != 0)
                TAP_FAIL("%s: %s, and nothing failed", what, err.text);
            break;
        }
        n_survived += r == 0;
        if (r != 0 && (r != DELTA_ENOMEM || err.code != DELTA_ENOMEM || !err.text[0]))
            TAP_FAIL("%s: %d (%d, \"%s\") when number %lu failed", what, r, err.code, err.text, n);
    }
    printf("# %s: %lu allocations, %lu runs, %lu went on without\n", what, fm.count, n_runs,
           n_survived);
    CHECK(n > 0);
    __real_free(fm.live);
    fm.live = NULL;
    fm.cap = 0;
}

#endif
