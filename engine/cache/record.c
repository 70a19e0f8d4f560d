/* record.c -- see record.h. */
#include "cache/record.h"

#include <string.h>

#include "base/bits.h"
#include "base/hash64.h"

static const char magic[16] = "deltad state 1\n";
enum { SEED = 0x5eed };

static uint64_t tokens_end(const de_record *r)
{
    const uint64_t n = sizeof r->head + (uint64_t)(r->head.end - r->head.from) * sizeof *r->tokens;
    return de_align_up(n, sizeof *r->sums);
}

bool de_record_layout(de_record *r)
{
    const de_record_head *h = &r->head;
    const de_record_kind *k = &h->kind;
    if (h->from >= h->end || h->end > DE_RECORD_TOKENS || (h->from == 0) != (h->parent == 0) ||
        k->page_tokens == 0 || k->page_tokens > DE_RECORD_TOKENS || k->page_bytes > UINT32_MAX ||
        k->slot_bytes > UINT32_MAX)
        return false;
    r->first_page = (uint32_t)(h->from / k->page_tokens);
    r->n_pages = (uint32_t)de_ceil_div(h->end, k->page_tokens) - r->first_page;
    r->pages_at = de_align_up(de_record_meta_bytes(r), DE_RECORD_ALIGN);
    r->state_at = r->pages_at + r->n_pages * k->page_bytes;
    r->whole_bytes = r->state_at + k->slot_bytes;
    return true;
}

size_t de_record_meta_bytes(const de_record *r)
{
    return (size_t)(tokens_end(r) + ((uint64_t)r->n_pages + 1) * sizeof *r->sums);
}

/* Of the meta but the head's sum itself. */
static uint64_t meta_sum(const uint8_t *meta, size_t n)
{
    const size_t at = offsetof(de_record_head, sum), behind = at + sizeof(uint64_t);
    return de_hash64(de_hash64(SEED, meta, at), meta + behind, n - behind);
}

void de_record_write(const de_record *r, uint8_t *to)
{
    const size_t n = de_record_meta_bytes(r),
                 tokens = (r->head.end - r->head.from) * sizeof *r->tokens;
    de_record_head h = r->head;
    memset(to, 0, n);
    memcpy(h.magic, magic, sizeof magic);
    h.sum = 0;
    memcpy(to, &h, sizeof h);
    memcpy(to + sizeof h, r->tokens, tokens);
    memcpy(to + tokens_end(r), r->sums, (r->n_pages + 1) * sizeof *r->sums);
    h.sum = meta_sum(to, n);
    memcpy(to, &h, sizeof h);
}

int64_t de_record_parse(const uint8_t *bytes, size_t n, de_record *ret_r, delta_error *err)
{
    de_record r = { 0 };
    if (n < sizeof r.head)
        return (int64_t)sizeof r.head;
    memcpy(&r.head, bytes, sizeof r.head);
    if (memcmp(r.head.magic, magic, sizeof magic) != 0)
        return delta_fail(err, DELTA_EFORMAT, "not a kept state");
    if (!de_record_layout(&r) || !memchr(r.head.kind.name, 0, sizeof r.head.kind.name))
        return delta_fail(err, DELTA_EFORMAT, "damaged at offset 0");
    const size_t meta = de_record_meta_bytes(&r);
    if (n < meta)
        return (int64_t)meta;
    bool is_whole = meta_sum(bytes, meta) == r.head.sum;
    for (uint64_t i = sizeof r.head + (r.head.end - r.head.from) * sizeof *r.tokens;
         i < tokens_end(&r); i++)
        is_whole = is_whole && bytes[i] == 0;
    if (!is_whole)
        return delta_fail(err, DELTA_EFORMAT, "damaged before offset %zu", meta);
    r.tokens = (const uint32_t *)(const void *)(bytes + sizeof r.head);
    r.sums = (const uint64_t *)(const void *)(bytes + tokens_end(&r));
    *ret_r = r;
    return 0;
}

uint64_t de_record_sum(const de_record_head *h, uint32_t i, const void *bytes, size_t n)
{
    /* A piece of another record, or of another place, is damage, too. */
    const uint64_t seed = de_hash64(h->id + SEED, &i, sizeof i);
    /* Four at a time: each step of one waits for the step before. */
    enum { LANES = 4 };
    uint64_t lane[LANES], word[LANES];
    const uint8_t *p = bytes;
    for (uint64_t k = 0; k < LANES; k++)
        lane[k] = seed + k;
    for (; n >= sizeof word; n -= sizeof word, p += sizeof word) {
        memcpy(word, p, sizeof word);
        for (int k = 0; k < LANES; k++)
            lane[k] = de_hash64_word(lane[k], word[k]);
    }
    return de_hash64(de_hash64(seed, lane, sizeof lane), p, n);
}
