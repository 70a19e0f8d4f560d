/* store.h -- the third tier of the prefix cache: a folder of records (record.h), one file each.
 *
 * A file is written as write.new, synced and renamed, and never changed but to be cut before its
 * state or removed: whoever is killed, and whenever, leaves whole records and at most one torn
 * write.new, which the next start takes away. A record of the full model is 67 MB at the least, so a
 * file for each costs nothing, what is given up gives its room back at once, and nothing is ever
 * copied from one place of the disk to another.
 *
 * Records form chains: a record has the pages behind its parent. The tokens of all are in memory (4
 * bytes each), so that finding a prefix needs no disk. When max_bytes is reached, what was used longest
 * ago goes: a record that others hang on loses its state, any other goes whole; records of another
 * kind (another model) go before those of this one.
 *
 * One record is written and one is read at a time, in pieces that pass through buffers; whose turn it
 * is the phase says. Sums are made and checked, and files touched, by threads of the store's own, one
 * that writes and DE_STORE_READERS that read ahead, so that the caller never waits for a disk. What was read
 * or written stays in the system's page cache: who comes back soon is read from there.
 *
 * The same writer makes saves: a file of the caller's choice with a text of the caller's, zeros to 4096
 * and a whole record without a parent. A save is checked by de_store_check(), and adopted: it is found
 * like a record then, but never given up, cut or removed.
 *
 * Ownership  the store owns its threads and tables; the buffers are the caller's and outlive it.
 * Threads    one thread makes all calls. Units: tokens, bytes. */
#ifndef DE_STORE_H
#define DE_STORE_H

#include "cache/record.h"

enum {
    DE_STORE_PIECE = 8 << 20, /* pages of one piece, about */
    DE_STORE_TOUCH_S = 60,    /* use is noted on the disk no more often */
    DE_STORE_ADOPTED = 64,
    DE_STORE_READERS = 4,
};

typedef struct de_store de_store;

typedef struct de_store_options {
    const char *folder; /* is made if there is none */
    uint64_t max_bytes;
    de_record_kind kind;
    uint8_t *write_buffer; /* [de_store_buffer_bytes(&kind)] */
    uint8_t *read_buffers; /* [DE_STORE_READERS] such */
} de_store_options;

typedef struct de_store_stats {
    uint32_t records;       /* of this kind */
    uint32_t foreign;       /* of others */
    uint64_t bytes;         /* of all */
    uint64_t writes, reads; /* records */
    uint64_t evictions;     /* states and records given up for room */
} de_store_stats;

/* What opening found that is not there any more. */
typedef struct de_store_found {
    uint32_t damaged; /* records that were none, or whose parent is gone; they were removed */
    uint32_t torn;    /* of a write that was cut off */
    char text[256];   /* of the last damaged one */
} de_store_found;

size_t de_store_buffer_bytes(const de_record_kind *k);

/* DELTA_EIO, DELTA_ENOMEM, DELTA_ELIMIT. */
int de_store_open(const de_store_options *o, de_store **ret_st, de_store_found *ret_found,
                  delta_error *err);
/* Waits for the piece at work; what was not ended is as if never begun. NULL is a no-op. */
void de_store_close(de_store *st);
void de_store_stats_get(const de_store *st, de_store_stats *ret_stats);

/* The end, at most `most`, of the longest prefix of ids [n] that has a state here; 0: none. *ret_id: of
 * the record. */
uint32_t de_store_find(const de_store *st, uint64_t owner, const uint32_t *ids, uint32_t n,
                       uint32_t most, uint64_t *ret_id);
/* The store's own record with the state behind exactly ids [n]; 0: there is none. */
uint64_t de_store_record(const de_store *st, uint64_t owner, const uint32_t *ids, uint32_t n);
/* Whether the record is there with its state; then it counts as used now. */
bool de_store_touch(de_store *st, uint64_t id);
/* Removes records of prefixes of ids [n] longer than `from`, and what hangs on them. */
void de_store_forget(de_store *st, uint64_t owner, const uint32_t *ids, uint32_t n, uint32_t from);

enum de_store_phase {
    DE_STORE_NONE,
    DE_STORE_YOURS, /* the buffer is the caller's */
    DE_STORE_BUSY,  /* it is the store's */
    DE_STORE_DONE,
    DE_STORE_FAILED,
};

/* ---- writing: begin; for each YOURS: put; until DONE or FAILED; end */

/* A file that is no record of the store's own. */
typedef struct de_store_save {
    const char *path;
    const void *text; /* [text_bytes], until the write is ended */
    size_t text_bytes;
    uint64_t max_bytes; /* of the file */
} de_store_save;

/* A record of the state behind ids [n]; its pages are those from *ret_first on. Makes room for it, but not
 * for a save (NULL: it is none). *ret_bytes: of the file.
 * DELTA_ELIMIT: there is not so much. DELTA_ENOMEM. */
int de_store_write_begin(de_store *st, uint64_t owner, const uint32_t *ids, uint32_t n,
                         const de_store_save *save, uint32_t *ret_first, uint64_t *ret_bytes,
                         delta_error *err);
enum de_store_phase de_store_write_phase(de_store *st);
/* What the buffer is to hold: pages [*ret_page, + *ret_n), absolute; *ret_n == 0: the state. */
void de_store_write_wants(const de_store *st, uint32_t *ret_page, uint32_t *ret_n);
void de_store_write_put(de_store *st);
/* DONE: *ret_id is the record, 0 of a save. FAILED: the error, DELTA_ELIMIT where the disk is full. In any other
 * phase it is given up; a BUSY one is waited for. */
int de_store_write_end(de_store *st, uint64_t *ret_id, delta_error *err);

/* ---- reading: begin; for each YOURS: take what is in the buffer, next; until DONE or FAILED; end */

/* The state of a record and the pages of its prefix from first_page on. */
int de_store_read_begin(de_store *st, uint64_t id, uint32_t first_page, delta_error *err);
enum de_store_phase de_store_read_phase(de_store *st);
/* The buffer, which is the caller's until the next call, and the pages in it: 0, it is the state. */
const uint8_t *de_store_read_has(const de_store *st, uint32_t *ret_page, uint32_t *ret_n);
void de_store_read_next(de_store *st);
/* FAILED: the error; a damaged record was removed with what hangs on it. */
int de_store_read_end(de_store *st, delta_error *err);

/* ---- saves */

/* Reads the record at `at` of a file, all of it. Any thread.
 *   DELTA_ENOTFOUND, DELTA_EIO, DELTA_ENOMEM
 *   DELTA_ESTATE   it is of another kind; both are named
 *   DELTA_EFORMAT  damaged; file and offset are named */
int de_store_check(const de_record_kind *kind, const char *path, uint64_t at, uint32_t *ret_tokens,
                   delta_error *err);
/* Lets it be found, as the owner's, until it cannot be read any more; the one adopted first goes
 * when there are DE_STORE_ADOPTED. Checks the head alone. Errors as above. */
int de_store_adopt(de_store *st, const char *path, uint64_t at, uint64_t owner, delta_error *err);

#endif
