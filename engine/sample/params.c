/* params.c -- defaults and ranges of delta/sampling.h. */
#include <math.h>

#include "delta/sampling.h"

#include "base/utf8.h"

delta_sampling delta_sampling_default(bool thinking)
{
    return (delta_sampling){ .temperature = thinking ? 0.6f : 0.7f,
                             .top_k = 20,
                             .top_p = thinking ? 0.95f : 0.8f,
                             .repetition_penalty = 1 };
}

/* Also false for NaN. */
static bool within(float v, float least, float most)
{
    return v >= least && v <= most;
}

int delta_sampling_check(const delta_sampling *s, uint32_t n_vocab, delta_error *err)
{
    const struct {
        const char *name;
        float value, least, most;
    } ranges[] = {
        { "temperature", s->temperature, 0, 100 },
        { "min_p", s->min_p, 0, 1 },
        { "presence_penalty", s->presence_penalty, -2, 2 },
        { "frequency_penalty", s->frequency_penalty, -2, 2 },
    };
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++)
        if (!within(ranges[i].value, ranges[i].least, ranges[i].most))
            return delta_fail(err, DELTA_EINVALID, "%s %g is not in %g..%g", ranges[i].name,
                              (double)ranges[i].value, (double)ranges[i].least,
                              (double)ranges[i].most);
    if (!(s->top_p > 0 && s->top_p <= 1))
        return delta_fail(err, DELTA_EINVALID, "top_p %g is not in (0, 1]", (double)s->top_p);
    if (!(s->repetition_penalty > 0 && s->repetition_penalty <= 10))
        return delta_fail(err, DELTA_EINVALID, "repetition_penalty %g is not in (0, 10]",
                          (double)s->repetition_penalty);
    if (s->top_logprobs > DELTA_MAX_TOP_LOGPROBS)
        return delta_fail(err, DELTA_EINVALID, "top_logprobs %u is not in 0..%d", s->top_logprobs,
                          DELTA_MAX_TOP_LOGPROBS);
    if (s->n_bias > DELTA_MAX_LOGIT_BIAS)
        return delta_fail(err, DELTA_EINVALID, "logit_bias has %u entries, at most %d are allowed",
                          s->n_bias, DELTA_MAX_LOGIT_BIAS);
    for (uint32_t i = 0; i < s->n_bias; i++) {
        if (s->bias[i].token >= n_vocab)
            return delta_fail(err, DELTA_EINVALID, "logit_bias[%u]: token %u is not in 0..%u", i,
                              s->bias[i].token, n_vocab - 1);
        if (!within(s->bias[i].bias, -100, 100))
            return delta_fail(err, DELTA_EINVALID, "logit_bias[%u]: %g is not in -100..100", i,
                              (double)s->bias[i].bias);
    }
    return 0;
}

static bool is_utf8(const char *bytes, size_t len)
{
    for (size_t i = 0, n; i < len; i += n)
        if ((n = de_utf8_len(bytes + i, len - i)) == 0)
            return false;
    return true;
}

int delta_stopping_check(const delta_stopping *s, uint32_t n_vocab, delta_error *err)
{
    if (s->max_tokens == 0)
        return delta_fail(err, DELTA_EINVALID, "max_tokens 0 is not at least 1");
    if (s->min_tokens > s->max_tokens)
        return delta_fail(err, DELTA_EINVALID, "min_tokens %u is above max_tokens %u",
                          s->min_tokens, s->max_tokens);
    if (s->n_strings > DELTA_MAX_STOP_STRINGS)
        return delta_fail(err, DELTA_EINVALID, "%u stop strings, at most %d are allowed",
                          s->n_strings, DELTA_MAX_STOP_STRINGS);
    for (uint32_t i = 0; i < s->n_strings; i++) {
        if (s->strings[i].len == 0 || s->strings[i].len > DELTA_MAX_STOP_BYTES)
            return delta_fail(err, DELTA_EINVALID, "stop string %u has %zu bytes, not 1..%d", i,
                              s->strings[i].len, DELTA_MAX_STOP_BYTES);
        if (!is_utf8(s->strings[i].bytes, s->strings[i].len))
            return delta_fail(err, DELTA_EINVALID, "stop string %u is not UTF-8", i);
    }
    if (s->n_ids > DELTA_MAX_STOP_IDS)
        return delta_fail(err, DELTA_EINVALID, "%u stop ids, at most %d are allowed", s->n_ids,
                          DELTA_MAX_STOP_IDS);
    for (uint32_t i = 0; i < s->n_ids; i++)
        if (s->ids[i] >= n_vocab)
            return delta_fail(err, DELTA_EINVALID, "stop id %u is not in 0..%u", s->ids[i],
                              n_vocab - 1);
    return 0;
}
