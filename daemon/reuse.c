/* reuse.c -- what of a prompt can be found again: whose it is, where other prompts may part from
 * it, and what to tell a client whose prompt was not all found.
 *
 * The engine goes on from states that it kept, and it keeps one where it was asked to (a mark), every
 * few thousand tokens, and where a sequence ended. A prompt that comes again parts from the one
 * before at the border of a message: behind the system text and the tools, for another conversation;
 * behind the last real user message, because the template strips the reasoning of what follows when
 * the next one arrives; near the end and at the end, for
 * another try. Those borders are marked. In tokens a border
 * is where <|im_start|> stands; no text of a user's becomes that token. */
#include <stdio.h>
#include <string.h>

#include "base/sha256.h"
#include "daemon/live.h"

enum { LAST_BORDERS = 3 };

uint64_t dd_reuse_owner(const dd_live *l)
{
    const dd_request *q = &l->req;
    uint64_t key = l->s->o.config->cache.shared ? 0 : dd_peer_key(&l->peer);
    if (q->bypass_cache)
        return DELTA_OWNER_NONE;
    if (q->cache_salt) {
        char text[DD_SALT_BYTES + 32], hex[65];
        const int n =
            snprintf(text, sizeof text, "%llu %s", (unsigned long long)key, q->cache_salt);
        de_sha256_hex(text, (size_t)n, hex);
        key = 0;
        for (int i = 0; i < 16; i++)
            key = key << 4 | (uint64_t)(hex[i] <= '9' ? hex[i] - '0' : hex[i] - 'a' + 10);
    }
    return key;
}

/* How many blocks of the prompt the first n messages are: tool results that follow one another share
 * one, and tools without a system message make one. */
static uint32_t blocks_of(const dd_request *q, size_t n)
{
    uint32_t blocks =
        q->n_tools && (q->n_messages == 0 || q->messages[0].role != DELTA_ROLE_SYSTEM);
    for (size_t i = 0; i < n; i++)
        blocks += q->messages[i].role != DELTA_ROLE_TOOL || i == 0 ||
                  q->messages[i - 1].role != DELTA_ROLE_TOOL;
    return blocks;
}

static void mark(dd_live *l, size_t at)
{
    if (l->n_marks == DD_MARKS || at == 0)
        return;
    for (size_t i = 0; i < l->n_marks; i++)
        if (l->marks[i] == at)
            return;
    l->marks[l->n_marks++] = (uint32_t)at;
}

void dd_reuse_marks(dd_live *l)
{
    const dd_request *q = &l->req;
    const int64_t start =
        delta_tokenizer_added_id(dd_engine_tokenizer(l->s->engine), "<|im_start|>");
    const uint32_t before = blocks_of(q, l->turn.first);
    size_t user = 0;
    for (size_t i = 0; i < q->n_messages; i++)
        if (q->messages[i].role == DELTA_ROLE_USER)
            user = i + 1;
    const bool has_system =
        l->turn.first == 0 &&
        (q->n_tools || (q->n_messages && q->messages[0].role == DELTA_ROLE_SYSTEM));
    const uint32_t behind_user = user > l->turn.first ? blocks_of(q, user) - before : 0;
    uint32_t n = 0, total = 0;
    for (size_t i = 0; start >= 0 && i < l->n_ids; i++)
        total += l->ids[i] == (uint32_t)start;
    /* The block before number n ends where its <|im_start|> stands. */
    for (size_t i = 0; start >= 0 && i < l->n_ids; i++) {
        if (l->ids[i] != (uint32_t)start)
            continue;
        bool is_wanted =
            (n == 1 && has_system) || (n && n == behind_user) || n + LAST_BORDERS >= total;
        for (size_t k = 0; k < q->n_checkpoint_messages; k++) {
            const size_t m = q->checkpoint_messages[k];
            is_wanted |=
                m >= l->turn.first && m < q->n_messages && n && blocks_of(q, m + 1) - before == n;
        }
        if (is_wanted)
            mark(l, i);
        n++;
    }
    mark(l, l->n_ids ? l->n_ids - 1 : 0); /* the last token is computed anyway */
}

/* The message that token `at` of the prompt belongs to, or -1. */
static int64_t message_at(const dd_live *l, uint32_t at)
{
    const dd_request *q = &l->req;
    const int64_t start =
        delta_tokenizer_added_id(dd_engine_tokenizer(l->s->engine), "<|im_start|>");
    uint32_t block = 0;
    for (size_t i = 0; start >= 0 && i < l->n_ids && i <= at; i++)
        block += l->ids[i] == (uint32_t)start;
    for (size_t m = 0; m < q->n_messages; m++)
        if (blocks_of(q, m + 1) == block)
            return (int64_t)m;
    return -1;
}

void dd_reuse_note(const dd_live *l, uint32_t cached, uint32_t shared, char *to, size_t size)
{
    const uint32_t prompt = l->usage.prompt, held = (uint32_t)(prompt - l->n_ids);
    /* A session whose timeline was lost: after a restart, or for its reasoning. */
    const bool is_again = l->session && held == 0 && l->session->n_messages;
    to[0] = '\0';
    if (!dd_engine_info(l->s->engine)->checkpoints) {
        (void)snprintf(to, size, "the cache is off");
    } else if (l->req.bypass_cache) {
        (void)snprintf(to, size, "the request bypasses the cache");
    } else if (l->session && held > cached + 1) {
        (void)snprintf(to, size,
                       "the session had left the device; of its %u tokens the state behind %u was "
                       "still kept",
                       (uint32_t)(prompt - l->n_ids), cached);
    } else if (held || shared + 1 >= prompt) {
        if (cached + DELTA_CACHE_CHUNK < shared)
            (void)snprintf(to, size, "all of the prompt is known; the last state kept is at %u",
                           cached);
    } else if (shared == 0) {
        (void)snprintf(to, size, "%s",
                       is_again ? "the session is computed again: nothing of it was still kept"
                                : "nothing is kept that begins like this prompt");
    } else {
        const int64_t m = l->method == DD_M_CHAT ? message_at(l, shared) : -1;
        char where[40] = "";
        if (m >= 0)
            (void)snprintf(where, sizeof where, ", in messages[%lld]", (long long)m);
        (void)snprintf(
            to, size,
            "the prompt is new from token %u on%s; the last state kept before that is at "
            "%u",
            shared, where, cached);
    }
}
