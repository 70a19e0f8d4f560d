/* prefix.h -- what was computed before and is still there: a radix tree from token prefixes to KV
 * pages and states.
 *
 * KV is a log: any prefix of it can be used again. The recurrent state is a summary: it can be used
 * only where it was copied. So each node is a checkpoint, the state behind its last token, and holds
 * the tokens and pages of its edge, the part of the prefix behind its parent. No edge begins with
 * the whole of a sibling's; edges may share a beginning, since there is no state to go on from there.
 *
 * A page is written by nobody but the session it was taken for, and only behind what a node claims
 * of it. Who goes on from a node in the middle of a page copies that page first.
 *
 * Prefixes of different owners never meet, so that the time of an answer tells nobody what others
 * asked.
 *
 * When there is too little of slots or pages, the node goes that is worth least: tokens to compute
 * again, times how often it was of use, over age and size; an eighth of that if it is on disk. With a second tier (de_prefix_host) its
 * slot and those of its pages that nobody else has move there, and the least of that tier goes;
 * without one, or where that has no room, the node goes for good and its edge to its children. Nodes
 * that are guarded go after all others.
 *
 * Ownership  the tree owns nodes and tables, one slot a node, one owner's count of each page of an
 *            edge. kv and slots must outlive it.
 * Threads    one thread. Units: tokens. */
#ifndef DE_PREFIX_H
#define DE_PREFIX_H

#include <stdbool.h>
#include <stddef.h>

#include "cache/gdn_slots.h"
#include "cache/kv_pages.h"

#define DE_NO_RECORD UINT64_MAX
#define DE_ON_HOST (UINT32_C(1) << 31) /* of a node's slot or page: its number in the second tier */

typedef struct de_prefix_node de_prefix_node;
struct de_prefix_node {
    de_prefix_node *parent, *children, *next;
    uint32_t from, end; /* the edge: tokens [from, end); from is the parent's end */
    uint32_t *tokens;   /* [end - from] */
    uint32_t *pages;    /* [ceil(end / page) - from / page]: those that the edge touches */
    uint32_t slot;
    uint32_t hits, pins, guards;
    uint64_t serial;  /* no other node had it or will */
    uint64_t used;    /* the tree's clock when it was made or found */
    uint64_t used_ns; /* the tree's now_ns then */
    uint64_t record;  /* its number in the third tier; 0: none yet */
    bool is_bad;      /* forgotten while it was pinned: goes with its last pin */
};

/* The second tier: book-keeping of its pools, which others allocate, and the copies to it. They
 * return < 0 if the device failed. */
typedef struct de_prefix_host {
    de_kv_pages kv;
    de_gdn_slots slots;
    int (*page_out)(void *arg, uint32_t page, uint32_t host_page);
    int (*slot_out)(void *arg, uint32_t slot, uint32_t host_slot);
    void *arg;
    /* What came to the device is still here, as long as there is room: it need not be copied again when it goes out.
     * [pages of the device] the page here that holds the same, kept once for this, or DE_NO_COPY; NULL: none is. */
    uint32_t *copy_of;
    uint32_t n_copies, next_copy;
} de_prefix_host;
enum { DE_NO_COPY = -1 };

typedef struct de_prefix_stats {
    uint32_t nodes;
    uint64_t tokens;    /* of all edges */
    uint64_t finds;     /* de_prefix_find() calls */
    uint64_t hits;      /* of them, with a node */
    uint64_t moves;     /* nodes moved to the second tier */
    uint64_t evictions; /* nodes given up for want of room */
} de_prefix_stats;

typedef struct de_prefix {
    de_kv_pages *kv;
    de_gdn_slots *slots;
    de_prefix_host *host; /* NULL: there is no second tier */
    uint32_t page_tokens;
    uint64_t slot_bytes, page_bytes; /* what they weigh against each other */
    struct de_prefix_root *roots;
    uint64_t clock, last_serial;
    uint64_t now_ns; /* set by who looks for idle nodes; 0: nobody does */
    de_prefix_stats stats;
} de_prefix;

/* host (or NULL) must outlive the tree, as kv and slots. */
void de_prefix_init(de_prefix *t, de_kv_pages *kv, de_gdn_slots *slots, de_prefix_host *host,
                    uint32_t page_tokens, uint64_t slot_bytes, uint64_t page_bytes);
void de_prefix_done(de_prefix *t); /* gives all slots and pages back */

/* The longest prefix of ids [n] that has a node of at most `most` tokens, or NULL. *ret_shared: how
 * many of ids some node of this owner begins with, whether one can go on from there or not. */
de_prefix_node *de_prefix_find(de_prefix *t, uint64_t owner, const uint32_t *ids, uint32_t n,
                               uint32_t most, uint32_t *ret_shared);
/* The end of that node, or 0, without counting as use. */
uint32_t de_prefix_reach(const de_prefix *t, uint64_t owner, const uint32_t *ids, uint32_t n);
/* Is there a node behind exactly ids [n]? */
bool de_prefix_has(const de_prefix *t, uint64_t owner, const uint32_t *ids, uint32_t n);
/* The pages of the whole prefix: [ceil(node->end / page)], some of them DE_ON_HOST. */
void de_prefix_pages(const de_prefix *t, const de_prefix_node *node, uint32_t *ret_pages);
/* One user more, or less, of each, in its tier. */
void de_prefix_use(de_prefix *t, const uint32_t *pages, uint32_t n);
void de_prefix_unuse(de_prefix *t, const uint32_t *pages, uint32_t n);
/* A whole page of a prefix came from the host's page `from`, which is a copy of it from now on. */
void de_prefix_loaded(de_prefix *t, uint32_t from, uint32_t page);
/* pages [n] of the device were taken and will be written: what the host has of them is no copy any more. */
void de_prefix_taken(de_prefix *t, const uint32_t *pages, uint32_t n);
/* pages [n], of the device, hold what the prefix's first n do: those that were on the host are these
 * from now on. */
void de_prefix_moved_in(de_prefix *t, de_prefix_node *node, const uint32_t *pages, uint32_t n);

/* The longest prefix of ids [n] that has a node is given up after those that nobody guards. Says its
 * end and serial; end 0: there is none. */
void de_prefix_guard(de_prefix *t, uint64_t owner, const uint32_t *ids, uint32_t n,
                     uint32_t *ret_end, uint64_t *ret_serial);
/* Takes that back; a no-op if the node has gone. */
void de_prefix_unguard(de_prefix *t, uint64_t owner, const uint32_t *ids, uint32_t end,
                       uint64_t serial);

/* The deepest node that ids [n] begin with, pinned: it stays until de_prefix_unpin(). NULL: none. */
de_prefix_node *de_prefix_pin(de_prefix *t, uint64_t owner, const uint32_t *ids, uint32_t n);
void de_prefix_unpin(de_prefix *t, de_prefix_node *node);

/* Of the nodes without children or with several, that have no record and were last used before
 * before_ns, the shortest; NULL: none. */
de_prefix_node *de_prefix_idle(const de_prefix *t, uint64_t before_ns, uint64_t *ret_owner);
/* The tokens of the whole prefix: [node->end]. */
void de_prefix_ids(const de_prefix_node *node, uint32_t *ret_ids);

/* A node behind ids [n], with the pages [ceil(n / page)], of which those that no node before it has are
 * read and shared, and the slot, which is taken over. false: it was there already, or there is no memory; the slot stays the caller's. */
bool de_prefix_add(de_prefix *t, uint64_t owner, const uint32_t *ids, uint32_t n,
                   const uint32_t *pages, uint32_t slot);

/* Gives up the nodes of prefixes of ids [n] that are longer than `from`, pinned ones when they are not. */
void de_prefix_forget(de_prefix *t, uint64_t owner, const uint32_t *ids, uint32_t n, uint32_t from);

/* Moves the node worth least to the second tier or gives it up, to free a slot or (for_pages) pages of
 * the device; pinned ones stay. false: there is none. It may free no page, where its pages are of
 * others, too: look and call again. */
bool de_prefix_evict(de_prefix *t, bool for_pages);
/* Gives up one that is not pinned. false: no memory for the longer edges of its children. */
bool de_prefix_remove(de_prefix *t, de_prefix_node *node);

#endif
