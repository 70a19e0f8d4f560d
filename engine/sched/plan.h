/* plan.h -- who gets how many rows of the next step: a pure function.
 *
 * Sessions that decode, or have one row left, come first, so that running
 * streams keep their rate: if they have d rows (one each, or the few that a
 * grammar forced) and d + cut <= budget, all have theirs in every step. If it
 * is more, a prefill that has waited DE_PLAN_PATIENCE steps gets one cut kept
 * for it, unless a stream has waited that long as well.
 *
 * Prefill fills the rest: first of the user who had the fewest rows of it
 * lately (de_shares), and within a user the shortest, where each step without
 * a row counts as one budget less. Nobody starves. A user who gets nothing is
 * back at 0 rows in about DE_SHARE_STEPS * (ln rows + 1) steps, and at 0 age
 * decides as it does within a user: a prefill of n tokens is overtaken there
 * by those alone that came less than about n / budget steps later.
 *
 * Results must not depend on load, so a prefill is cut only where it always
 * may be: before an absolute position that is a multiple of `cut`, or at the
 * end of what was appended, where it always is. */
#ifndef DE_PLAN_H
#define DE_PLAN_H

#include <stdbool.h>
#include <stdint.h>

/* How much prefill a step may take while others wait for their next token: as many rows as fit in gap_ns by what the last steps took.
 * On a GPU a step of few rows takes nearly as long as one of some hundred, as all weights are read for it, so steps of few rows and
 * others are remembered apart: the line through both tells what a row adds. Time is no part of any result: it decides only where a
 * prefill is cut. */
typedef struct de_pace_point {
    double rows, ns; /* means of the last steps; 0: there was none */
} de_pace_point;

typedef struct de_pace {
    uint64_t gap_ns;         /* 0: no bound */
    de_pace_point few, many; /* steps of up to DE_PACE_FEW rows of prefill, and of more */
} de_pace;

enum { DE_PACE_FEW = 128 };

/* A step with `rows` rows of prefill took ns. */
void de_pace_note(de_pace *p, uint32_t rows, uint64_t ns);
/* Rows of the next step in which those that decode have n_decode: at most step_tokens, and if
 * somebody waits at least n_decode and one cut, which always goes on. */
uint32_t de_pace_budget(const de_pace *p, uint32_t n_decode, uint32_t step_tokens, uint32_t cut);

/* Rows of prefill that users had lately, forgotten at one DE_SHARE_STEPS-th a step; zeroed at first.
 * At one user's B rows a step that is at most DE_SHARE_STEPS * B. Decode is not counted: who decodes
 * all the time would never be back at 0. Of more than DE_SHARE_USERS those with least are forgotten. */
enum { DE_SHARE_STEPS = 8, DE_SHARE_USERS = 64 };

typedef struct de_shares {
    struct {
        uint64_t user;
        uint32_t rows; /* 0: free */
    } of[DE_SHARE_USERS];
} de_shares;

uint32_t de_shares_of(const de_shares *s, uint64_t user);
void de_shares_add(de_shares *s, uint64_t user, uint32_t rows);
void de_shares_decay(de_shares *s); /* once a step, before it is added to */

enum { DE_PLAN_PATIENCE = 16 };

typedef struct de_plan_item {
    uint32_t start;     /* position of the first row */
    uint32_t segment;   /* rows up to the next place where a cut must be, >= 1 */
    uint32_t remaining; /* rows in all, >= segment */
    uint32_t waited;    /* steps without a row so far */
    uint32_t user_rows; /* de_shares_of() its user */
    bool decodes;       /* somebody waits for its next token, not its first */
    uint32_t ret_rows;  /* out: rows of this step */
} de_plan_item;

/* Fills ret_rows; order [n] gets the indexes of the items that have rows, in the order in which
 * they go into the batch. Returns how many. budget >= cut: then at least one item gets rows. */
uint32_t de_plan(de_plan_item *items, uint32_t n, uint32_t budget, uint32_t cut, uint32_t *order);

#endif
