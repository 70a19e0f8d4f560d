/* grammars.c -- see grammars.h. */
#include "daemon/grammars.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "daemon/limits.h"

typedef struct entry {
    char key[65];
    delta_grammar *grammar;
    uint64_t used; /* when, in calls */
} entry;

struct dd_grammars {
    pthread_mutex_t vocab_lock; /* guards the making of vocab */
    delta_grammar_vocab *vocab;
    pthread_mutex_t lock; /* guards what follows */
    entry entries[DD_GRAMMARS];
    uint32_t n;
    uint64_t clock;
    dd_grammar_stats stats;
};

dd_grammars *dd_grammars_new(void)
{
    dd_grammars *g = calloc(1, sizeof *g);
    if (!g)
        return NULL;
    (void)pthread_mutex_init(&g->vocab_lock, NULL);
    (void)pthread_mutex_init(&g->lock, NULL);
    return g;
}

void dd_grammars_free(dd_grammars *g)
{
    if (!g)
        return;
    for (uint32_t i = 0; i < g->n; i++)
        delta_grammar_free(g->entries[i].grammar);
    delta_grammar_vocab_free(g->vocab);
    (void)pthread_mutex_destroy(&g->vocab_lock);
    (void)pthread_mutex_destroy(&g->lock);
    free(g);
}

static int vocabulary(dd_grammars *g, const dd_engine *e, const delta_grammar_vocab **ret_v,
                      delta_error *err)
{
    const delta_engine_info *info = dd_engine_info(e);
    int r = 0;
    (void)pthread_mutex_lock(&g->vocab_lock);
    if (!g->vocab)
        r = delta_grammar_vocab_new(dd_engine_tokenizer(e), info->n_vocab, info->eos_ids,
                                    info->n_eos_ids, &g->vocab, err);
    *ret_v = g->vocab;
    (void)pthread_mutex_unlock(&g->vocab_lock);
    return r;
}

/* With a reference, or NULL. */
static delta_grammar *find(dd_grammars *g, const char *key)
{
    delta_grammar *found = NULL;
    (void)pthread_mutex_lock(&g->lock);
    for (uint32_t i = 0; i < g->n && !found; i++)
        if (strcmp(g->entries[i].key, key) == 0) {
            g->entries[i].used = ++g->clock;
            found = delta_grammar_ref(g->entries[i].grammar);
            g->stats.found++;
        }
    (void)pthread_mutex_unlock(&g->lock);
    return found;
}

static uint64_t bytes_of(const delta_grammar *grammar)
{
    delta_grammar_stats s;
    delta_grammar_stats_read(grammar, &s);
    return s.bytes;
}

/* Makes room, and puts it in. */
static void keep(dd_grammars *g, const char *key, delta_grammar *grammar)
{
    uint64_t bytes = bytes_of(grammar);
    (void)pthread_mutex_lock(&g->lock);
    for (uint32_t i = 0; i < g->n; i++)
        bytes += bytes_of(g->entries[i].grammar); /* its cache of masks grows */
    while (g->n && (g->n == DD_GRAMMARS || bytes > DD_GRAMMAR_BYTES)) {
        uint32_t oldest = 0;
        for (uint32_t i = 1; i < g->n; i++)
            if (g->entries[i].used < g->entries[oldest].used)
                oldest = i;
        bytes -= bytes_of(g->entries[oldest].grammar);
        delta_grammar_free(g->entries[oldest].grammar);
        g->entries[oldest] = g->entries[--g->n];
    }
    entry *e = &g->entries[g->n++];
    memcpy(e->key, key, sizeof e->key);
    e->grammar = delta_grammar_ref(grammar);
    e->used = ++g->clock;
    (void)pthread_mutex_unlock(&g->lock);
}

int dd_grammars_get(dd_grammars *g, const dd_engine *e, const delta_grammar_spec *spec,
                    delta_grammar **ret_g, delta_error *err)
{
    char key[65];
    const delta_grammar_vocab *vocab = NULL;
    delta_grammar *grammar;
    int r = delta_grammar_key(spec, key, err);
    if (r < 0)
        return r;
    if ((grammar = find(g, key))) {
        *ret_g = grammar;
        return 0;
    }
    r = vocabulary(g, e, &vocab, err);
    if (r == 0)
        r = delta_grammar_compile(vocab, spec, &grammar, err);
    delta_grammar_stats s = { 0 };
    if (r == 0) {
        delta_grammar_stats_read(grammar, &s);
        keep(g, key, grammar);
        *ret_g = grammar;
    }
    (void)pthread_mutex_lock(&g->lock);
    g->stats.compiled += r == 0;
    g->stats.refused += r < 0;
    g->stats.compile_ns += s.compile_ns;
    (void)pthread_mutex_unlock(&g->lock);
    return r;
}

void dd_grammars_stats(dd_grammars *g, dd_grammar_stats *ret_stats)
{
    (void)pthread_mutex_lock(&g->lock);
    dd_grammar_stats s = g->stats;
    s.kept = g->n;
    for (uint32_t i = 0; i < g->n; i++) {
        delta_grammar_stats x;
        delta_grammar_stats_read(g->entries[i].grammar, &x);
        s.masks += x.masks;
        s.masks_cached += x.cached;
        s.kept_bytes += x.bytes;
    }
    (void)pthread_mutex_unlock(&g->lock);
    *ret_stats = s;
}
