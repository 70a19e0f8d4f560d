/* sample.c -- see sample.h. */
#include "sample/sample.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "sample/philox.h"

/* An entry of de_sampler.seen: how often it was drawn, and whether the prompt had it. */
enum { SEEN_COUNT = 0x7fffffff };
static const uint32_t SEEN_PROMPT = 0x80000000u;

uint64_t de_sample_scratch_bytes(uint32_t n_vocab)
{
    return (uint64_t)n_vocab * (sizeof(de_candidate) + sizeof(double) + sizeof(float));
}

int de_sample_scratch_init(de_sample_scratch *x, uint32_t n_vocab, delta_error *err)
{
    *x = (de_sample_scratch){ .n_vocab = n_vocab };
    x->candidates = calloc(n_vocab, sizeof *x->candidates);
    x->weights = calloc(n_vocab, sizeof *x->weights);
    x->raw = calloc(n_vocab, sizeof *x->raw);
    if (x->candidates && x->weights && x->raw)
        return 0;
    de_sample_scratch_done(x);
    return delta_fail(err, DELTA_ENOMEM, "scratch of sampling: %llu bytes",
                      (unsigned long long)de_sample_scratch_bytes(n_vocab));
}

void de_sample_scratch_done(de_sample_scratch *x)
{
    free(x->candidates);
    free(x->weights);
    free(x->raw);
    *x = (de_sample_scratch){ 0 };
}

/* ---- penalties ---- */

static void note(de_sampler *s, uint32_t id, bool drawn)
{
    if (!s->seen)
        return;
    if (!s->seen[id])
        s->distinct[s->n_distinct++] = id;
    if (!drawn)
        s->seen[id] |= SEEN_PROMPT;
    else if ((s->seen[id] & SEEN_COUNT) < SEEN_COUNT)
        s->seen[id]++;
}

int de_sampler_start(de_sampler *s, const delta_sampling *p, uint32_t n_vocab,
                     const uint32_t *prompt, size_t n_prompt, uint32_t max_tokens, delta_error *err)
{
    *s = (de_sampler){ .p = *p };
    s->p.bias = NULL;
    s->p.n_bias = 0;
    if (p->n_bias) {
        s->bias = malloc(p->n_bias * sizeof *s->bias);
        if (!s->bias)
            goto no_memory;
        memcpy(s->bias, p->bias, p->n_bias * sizeof *s->bias);
        s->p.bias = s->bias;
        s->p.n_bias = p->n_bias;
    }
    const bool repetition = p->repetition_penalty != 1.0f;
    if (repetition || p->presence_penalty != 0.0f || p->frequency_penalty != 0.0f) {
        const uint64_t most = (repetition ? n_prompt : 0) + (uint64_t)max_tokens;
        s->cap_distinct = most < n_vocab ? (uint32_t)most : n_vocab;
        s->seen = calloc(n_vocab, sizeof *s->seen);
        s->distinct = malloc((size_t)s->cap_distinct * sizeof *s->distinct);
        if (!s->seen || !s->distinct)
            goto no_memory;
        for (size_t i = 0; repetition && i < n_prompt; i++)
            note(s, prompt[i], false);
    }
    return 0;
no_memory:
    de_sampler_done(s);
    return delta_fail(err, DELTA_ENOMEM, "tables of sampling over %u ids", n_vocab);
}

void de_sampler_done(de_sampler *s)
{
    free(s->bias);
    free(s->seen);
    free(s->distinct);
    *s = (de_sampler){ 0 };
}

/* Each adjustment in double, rounded once. */
static void adjust(const de_sampler *s, float *logits)
{
    for (uint32_t i = 0; i < s->p.n_bias; i++)
        logits[s->bias[i].token] =
            (float)((double)logits[s->bias[i].token] + (double)s->bias[i].bias);
    for (uint32_t i = 0; i < s->n_distinct; i++) {
        const uint32_t id = s->distinct[i], count = s->seen[id] & SEEN_COUNT;
        if (logits[id] == -INFINITY)
            continue;
        double l = (double)logits[id];
        l = l > 0 ? l / (double)s->p.repetition_penalty : l * (double)s->p.repetition_penalty;
        if (count)
            l -= (double)s->p.frequency_penalty * count + (double)s->p.presence_penalty;
        logits[id] = (float)fmin(fmax(l, -(double)FLT_MAX), (double)FLT_MAX);
    }
}

static void mask_out(const de_sampler *s, const de_choice *c, float *logits)
{
    const de_vocab_mask *m = c->mask;
    if (!s->p.any_id) {
        for (uint32_t i = m->n_tokens; i < m->n_vocab; i++)
            logits[i] = -INFINITY;
        for (uint32_t i = 0; i < m->n_holes; i++)
            logits[m->holes[i]] = -INFINITY;
    }
    for (uint32_t i = 0; i < c->n_barred; i++)
        logits[c->barred[i]] = -INFINITY;
    for (uint32_t word = 0; c->allowed && word * 32 < m->n_vocab;
         word++) { /* most are 0 or whole */
        const uint32_t end = m->n_vocab - word * 32 < 32 ? m->n_vocab - word * 32 : 32;
        for (uint32_t k = 0; c->allowed[word] != UINT32_MAX && k < end; k++)
            if (!(c->allowed[word] >> k & 1))
                logits[word * 32 + k] = -INFINITY;
    }
}

/* ---- selection ---- */

static bool ranks_before(de_candidate a, de_candidate b)
{
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

/* A binary heap whose root is the first in rank (best) or the last (!best). */
static void sift_down(de_candidate *h, uint32_t n, uint32_t at, bool best)
{
    const de_candidate v = h[at];
    for (;;) {
        uint32_t c = 2 * at + 1;
        if (c >= n)
            break;
        if (c + 1 < n && ranks_before(h[c + 1], h[c]) == best)
            c++;
        if (ranks_before(h[c], v) != best)
            break;
        h[at] = h[c];
        at = c;
    }
    h[at] = v;
}

static void heapify(de_candidate *h, uint32_t n, bool best)
{
    for (uint32_t i = n / 2; i-- > 0;)
        sift_down(h, n, i, best);
}

/* The k first in rank of logits above -inf, to h; in no order, the last in rank at h[0]. */
static uint32_t select_top(const float *logits, uint32_t n, uint32_t k, de_candidate *h)
{
    uint32_t have = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (logits[i] == -INFINITY)
            continue;
        const de_candidate c = { logits[i], i };
        if (have < k) {
            h[have++] = c;
            if (have == k)
                heapify(h, k, false);
        } else if (c.logit > h[0].logit) { /* an equal one has the larger id: it ranks behind */
            h[0] = c;
            sift_down(h, k, 0, false);
        }
    }
    if (have < k)
        heapify(h, have, false);
    return have;
}

/* From a heap with its last in rank at the root to descending order. */
static void sort_heap(de_candidate *h, uint32_t n)
{
    while (n > 1) {
        const de_candidate last = h[--n];
        h[n] = h[0];
        h[0] = last;
        sift_down(h, n, 0, false);
    }
}

static void log_probabilities(const de_sampler *s, const float *logits, uint32_t n, float largest,
                              de_sample_scratch *x, de_drawn *d, de_top *top, double *ret_lse)
{
    double sum = 0;
    for (uint32_t i = 0; i < n; i++)
        sum += exp((double)logits[i] - (double)largest);
    *ret_lse = (double)largest + log(sum);
    if (!s->p.top_logprobs)
        return;
    d->n_top = select_top(logits, n, s->p.top_logprobs < n ? s->p.top_logprobs : n, x->candidates);
    sort_heap(x->candidates, d->n_top);
    for (uint32_t i = 0; i < d->n_top; i++)
        top[i] =
            (de_top){ x->candidates[i].id, (float)((double)x->candidates[i].logit - *ret_lse) };
}

static double weight(const de_sampler *s, float logit, float largest)
{
    return exp(((double)logit - (double)largest) / (double)s->p.temperature);
}

/* How many of the first m in rank, which c holds in that order, min_p and top_p leave; top_k is not looked at. Sums go by rank. */
static uint32_t cut_ranked(const de_sampler *s, const de_candidate *c, uint32_t m, float largest)
{
    uint32_t left = 0;
    double total = 0, sum = 0;
    while (left < m && (left == 0 || s->p.min_p <= 0 ||
                        weight(s, c[left].logit, largest) >= (double)s->p.min_p))
        total += weight(s, c[left++].logit, largest);
    if (s->p.top_p >= 1.0f)
        return left;
    for (uint32_t i = 0; i < left; i++) {
        sum += weight(s, c[i].logit, largest);
        if (sum >= (double)s->p.top_p * total)
            return i + 1;
    }
    return left;
}

/* The last in rank that min_p, top_k and top_p leave. */
static de_candidate cut_off(const de_sampler *s, const float *logits, uint32_t n, float largest,
                            de_sample_scratch *x)
{
    de_candidate *c = x->candidates;
    de_candidate cut = { -INFINITY, UINT32_MAX };
    if (s->p.top_k && s->p.top_k < n) {
        const uint32_t m = select_top(logits, n, s->p.top_k, c);
        sort_heap(c, m);
        return c[cut_ranked(s, c, m, largest) - 1];
    }
    if (s->p.min_p > 0) {
        /* exp() only near the border */
        const double near = log((double)s->p.min_p) * (double)s->p.temperature - 1e-3;
        cut.logit = largest;
        for (uint32_t i = 0; i < n; i++)
            if (logits[i] < cut.logit && (double)logits[i] - (double)largest >= near &&
                weight(s, logits[i], largest) >= (double)s->p.min_p)
                cut.logit = logits[i];
    }
    if (s->p.top_p >= 1.0f)
        return cut;
    /* What is left so far, as a heap with the first in rank at the root. */
    double total = 0;
    uint32_t left = 0;
    for (uint32_t i = 0; i < n; i++) {
        const de_candidate v = { logits[i], i };
        if (v.logit == -INFINITY || ranks_before(cut, v))
            continue;
        c[left++] = v;
    }
    for (uint32_t i = 0; i < left; i++)
        total += weight(s, c[i].logit, largest);
    heapify(c, left, true);
    double sum = 0;
    while (left) {
        cut = c[0];
        sum += weight(s, cut.logit, largest);
        if (sum >= (double)s->p.top_p * total)
            break;
        c[0] = c[--left];
        sift_down(c, left, 0, true);
    }
    return cut;
}

/* Of x->candidates, which stand in the order of ids. */
static uint32_t draw_kept(const de_sampler *s, uint32_t kept, float largest, uint64_t position,
                          de_sample_scratch *x)
{
    double total = 0, sum = 0;
    for (uint32_t i = 0; i < kept; i++) {
        x->weights[i] = weight(s, x->candidates[i].logit, largest);
        total += x->weights[i];
    }
    const double target = de_philox_uniform(s->p.seed, position) * total;
    uint32_t last = 0;
    for (uint32_t i = 0; i < kept; i++) {
        sum += x->weights[i];
        if (x->weights[i] > 0)
            last = i;
        if (sum > target)
            break;
    }
    return x->candidates[last].id;
}

static uint32_t draw(const de_sampler *s, const float *logits, uint32_t n, float largest,
                     uint64_t position, de_sample_scratch *x)
{
    const de_candidate cut = cut_off(s, logits, n, largest, x);
    uint32_t kept = 0;
    for (uint32_t i = 0; i < n; i++) {
        const de_candidate v = { logits[i], i };
        if (logits[i] < cut.logit || logits[i] == -INFINITY || ranks_before(cut, v))
            continue;
        x->candidates[kept++] = v;
    }
    return draw_kept(s, kept, largest, position, x);
}

/* The largest, the lowest id on a tie; false if one is NaN or +inf. Several at a time: of a quarter of a million logits this is most
 * of a draw. */
static bool find_largest(const float *logits, uint32_t n, uint32_t *ret_id)
{
    typedef float many __attribute__((vector_size(16)));
    typedef int32_t masks __attribute__((vector_size(16)));
    enum { LANES = 4 };
    many most = { -INFINITY, -INFINITY, -INFINITY, -INFINITY };
    masks sound = ~(masks){ 0 };
    uint32_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        many x;
        memcpy(&x, logits + i, sizeof x);
        const masks larger = x > most;
        sound &= x < INFINITY; /* false for NaN, too */
        most = (many)((larger & (masks)x) | (~larger & (masks)most));
    }
    float best = -INFINITY;
    bool all_sound = true;
    for (uint32_t k = 0; k < LANES; k++) {
        best = most[k] > best ? most[k] : best;
        all_sound &= sound[k] != 0;
    }
    for (; i < n; i++) {
        best = logits[i] > best ? logits[i] : best;
        all_sound &= logits[i] < INFINITY;
    }
    for (i = 0; i + 1 < n && logits[i] != best; i++)
        ;
    *ret_id = logits[i] == best ? i : 0;
    return all_sound;
}

static const char not_finite[] = "the model gave a logit that is no finite number",
                  none_left[] = "no token is left to draw from";

uint32_t de_sampler_ranks(const de_sampler *s)
{
    if (de_sampler_wants_logprobs(s) || s->p.n_bias || s->seen || s->p.any_id)
        return 0;
    return s->p.temperature > 0 ? s->p.top_k : 1;
}

int de_sample_ranked(de_sampler *s, const de_choice *c, const de_candidate *first, uint32_t n,
                     bool is_sound, uint64_t position, de_sample_scratch *x, de_drawn *ret_drawn,
                     delta_error *err)
{
    const uint32_t most = de_sampler_ranks(s);
    de_candidate *kept = x->candidates;
    uint32_t m = 0;
    if (!is_sound)
        return delta_fail(err, DELTA_EINTERNAL, "%s", not_finite);
    for (uint32_t i = 0; i < n && m < most; i++) {
        bool may = first[i].logit > -INFINITY;
        for (uint32_t k = 0; may && k < c->n_barred; k++)
            may = first[i].id != c->barred[k];
        for (uint32_t k = 0; may && k < c->mask->n_holes; k++)
            may = first[i].id != c->mask->holes[k];
        if (may)
            kept[m++] = first[i];
    }
    *ret_drawn = (de_drawn){ .logprob = NAN };
    if (c->forced) {
        ret_drawn->id = *c->forced;
        return 0;
    }
    if (m == 0)
        return delta_fail(err, DELTA_EINTERNAL, "%s", none_left);
    const float largest = kept[0].logit;
    ret_drawn->id = kept[0].id;
    if (s->p.temperature <= 0)
        return 0;
    m = cut_ranked(s, kept, m, largest);
    for (uint32_t i = 1; i < m; i++) { /* by id */
        const de_candidate v = kept[i];
        uint32_t at = i;
        for (; at > 0 && kept[at - 1].id > v.id; at--)
            kept[at] = kept[at - 1];
        kept[at] = v;
    }
    ret_drawn->id = draw_kept(s, m, largest, position, x);
    return 0;
}

bool de_sampler_wants_logprobs(const de_sampler *s)
{
    return s->p.logprobs || s->p.top_logprobs;
}

void de_sampler_note(de_sampler *s, uint32_t id)
{
    note(s, id, true);
}

int de_sample(de_sampler *s, const de_choice *c, float *logits, uint64_t position,
              de_sample_scratch *x, de_drawn *ret_drawn, de_top *top, delta_error *err)
{
    const uint32_t n = c->mask->n_vocab;
    de_drawn d = { .logprob = NAN };
    double lse = 0;
    uint32_t best;
    if (!find_largest(logits, n, &best))
        return delta_fail(err, DELTA_EINTERNAL, "%s", not_finite);
    const bool log_wanted = de_sampler_wants_logprobs(s);
    const float largest = logits[best];
    if (log_wanted && largest > -INFINITY)
        log_probabilities(s, logits, n, largest, x, &d, top, &lse);
    if (log_wanted)
        memcpy(x->raw, logits, n * sizeof *x->raw); /* the drawn one's is needed below */
    if (c->forced) {
        d.id = *c->forced;
    } else {
        adjust(s, logits);
        mask_out(s, c, logits);
        (void)find_largest(logits, n, &best);
        if (!(logits[best] > -INFINITY))
            return delta_fail(err, DELTA_EINTERNAL, "%s", none_left);
        d.id = s->p.temperature > 0 ? draw(s, logits, n, logits[best], position, x) : best;
    }
    if (log_wanted)
        d.logprob = (float)((double)x->raw[d.id] - lse);
    note(s, d.id, true);
    *ret_drawn = d;
    return 0;
}
