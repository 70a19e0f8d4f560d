/* plan.h -- who gets how many rows of the next step: a pure function.
 *
 * Sessions with one row left (all that decode) come first, so that running
 * streams keep their rate; chunks of prefill fill the rest, the shortest first.
 * A session that got nothing counts as one budget shorter for each step it
 * waited, so that nobody starves: a prefill of n tokens is overtaken for at
 * most about n / budget steps, then it goes first.
 *
 * Results must not depend on load, so a prefill is cut only where it always
 * may be: before an absolute position that is a multiple of `cut`, or at the
 * end of what was appended, where it always is. */
#ifndef DE_PLAN_H
#define DE_PLAN_H

#include <stdint.h>

/* How much prefill a step may take while others wait for their next token: as many rows as the last
 * steps did in gap_ns. Time is no part of any result: it decides only where a prefill is cut. */
typedef struct de_pace {
    uint64_t gap_ns; /* 0: no bound */
    double row_ns;   /* of prefill, as measured; 0: not yet */
} de_pace;

/* A step with `rows` rows of prefill took ns. */
void de_pace_note(de_pace *p, uint32_t rows, uint64_t ns);
/* Rows of the next step in which n_decode sessions are at one row each: at most step_tokens, and if
 * somebody waits at least n_decode and one cut, which always goes on. */
uint32_t de_pace_budget(const de_pace *p, uint32_t n_decode, uint32_t step_tokens, uint32_t cut);

enum { DE_PLAN_PATIENCE = 16 };

typedef struct de_plan_item {
    uint32_t start;     /* position of the first row */
    uint32_t segment;   /* rows up to the next place where a cut must be, >= 1 */
    uint32_t remaining; /* rows in all, >= segment */
    uint32_t waited;    /* steps without a row so far */
    uint32_t ret_rows;  /* out: rows of this step */
} de_plan_item;

/* Fills ret_rows; order [n] gets the indexes of the items that have rows, in the order in which
 * they go into the batch. Returns how many. budget >= cut: then at least one item gets rows. */
uint32_t de_plan(de_plan_item *items, uint32_t n, uint32_t budget, uint32_t cut, uint32_t *order);

#endif
