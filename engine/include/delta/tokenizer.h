/* tokenizer.h -- text <-> tokens.
 *
 * Ownership  a tokenizer opened from a directory is freed by its opener; the
 *            one of an engine belongs to the engine.
 * Threads    a delta_tokenizer is immutable after opening: any thread, any
 *            number at once. A delta_detok belongs to one thread at a time.
 * Units      lengths are bytes (len) or tokens (n). Text is UTF-8. */
#ifndef DELTA_TOKENIZER_H
#define DELTA_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "delta/error.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct delta_tokenizer delta_tokenizer;

/* Reads DIR/tokenizer.json and, for added tokens that only it has,
 * DIR/tokenizer_config.json. Free with delta_tokenizer_free(). */
int delta_tokenizer_open(const char *dir, delta_tokenizer **ret_tok, delta_error *err);
void delta_tokenizer_free(delta_tokenizer *t); /* NULL is a no-op */

/* One more than the largest id (248077 for Qwen3.6, 2045 for the demo model). */
uint32_t delta_tokenizer_size(const delta_tokenizer *t);

/* Text to ids, as tokenizer.json says: added tokens split first, NFC, split,
 * byte-level BPE. *ret_ids is malloc'ed, freed by the caller with free().
 * Bad UTF-8 is DELTA_EINVALID with the byte offset. With `plain`, strings that
 * look like added tokens are encoded as ordinary text (for untrusted text). */
int delta_tokenize(const delta_tokenizer *t, const char *text, size_t len, bool plain,
                   uint32_t **ret_ids, size_t *ret_n, delta_error *err);

/* Ids to text. Bytes that are no UTF-8 become U+FFFD. *ret_text is malloc'ed
 * and NUL-terminated. Ids without a token give nothing. skip_special leaves
 * out added tokens whose special flag is set. */
int delta_detokenize(const delta_tokenizer *t, const uint32_t *ids, size_t n, bool skip_special,
                     char **ret_text, size_t *ret_len, delta_error *err);

/* The id of an added token by its text ("<think>"), or -1. */
int64_t delta_tokenizer_added_id(const delta_tokenizer *t, const char *text);

/* Raw bytes of one token (added tokens: their text); NULL and 0 for an id
 * without a token. Borrowed from the tokenizer. */
const uint8_t *delta_token_bytes(const delta_tokenizer *t, uint32_t id, size_t *ret_len);

enum delta_token_kind {
    DELTA_TOKEN_NONE,    /* no such id */
    DELTA_TOKEN_TEXT,    /* ordinary vocabulary */
    DELTA_TOKEN_ADDED,   /* added, special:false (<think>, <tool_call>, ...) */
    DELTA_TOKEN_SPECIAL, /* added, special:true (<|im_end|>, ...) */
};
enum delta_token_kind delta_token_kind(const delta_tokenizer *t, uint32_t id);

/* Streaming detokenizer: never emits half a character. Push ids one by one;
 * each push appends 0 or more bytes of complete UTF-8 to out (cap >=
 * DELTA_DETOK_ROOM + the token's bytes * 3). Fits in place, no heap. */
enum { DELTA_DETOK_ROOM = 16 };
typedef struct delta_detok {
    uint8_t held[4]; /* the incomplete character so far */
    uint8_t n_held;
} delta_detok;
size_t delta_detok_push(delta_detok *d, const uint8_t *bytes, size_t len, char *out, size_t cap);
/* What is still held becomes U+FFFD. */
size_t delta_detok_flush(delta_detok *d, char *out, size_t cap);

#ifdef __cplusplus
}
#endif
#endif
