/* output.h -- the model's output text to reasoning, content and tool calls.
 *
 * One incremental parser for all three. Input is bytes in pieces of any size
 * and, where known, "this piece is the special token N"; output is events. The
 * events joined are the same at every chunking, but for where deltas are cut.
 * Arguments are written as JSON text, forward only: what was sent is never
 * taken back. The rules stand in docs/TOOLS.md.
 *
 * Limits     text is held back only where what follows decides what it is: a
 *            tag's beginning, a run of white space, the end of a value and what
 *            comes behind it, at most DELTA_OUTPUT_HOLD_MAX bytes; and a value
 *            that is no string, until its end. Memory is linear in the length
 *            of the longest call. Event text is whole UTF-8 characters; bytes
 *            that are no UTF-8, and NUL, become U+FFFD. Arguments are JSON that
 *            base/json.h reads, so that they can be rendered again.
 * Ownership  the parser is freed by its maker. Event bytes are borrowed and
 *            valid until the next call on the parser.
 * Threads    one thread at a time. */
#ifndef DELTA_OUTPUT_H
#define DELTA_OUTPUT_H

#include "delta/chat.h"

#ifdef __cplusplus
extern "C" {
#endif

enum delta_out_kind {
    DELTA_OUT_REASONING,  /* text */
    DELTA_OUT_CONTENT,    /* text */
    DELTA_OUT_CALL_START, /* text: the tool's name */
    DELTA_OUT_CALL_ARGS,  /* text: the next piece of the arguments' JSON */
    DELTA_OUT_CALL_END,   /* text: the whole arguments' JSON; complete says if it may be run */
};

typedef struct delta_out_event {
    enum delta_out_kind kind;
    uint32_t call; /* index of the call in this answer, from 0 */
    bool complete; /* CALL_END only: false if the output was cut inside the call */
    delta_str text;
} delta_out_event;

enum delta_tool_mode { DELTA_TOOLS_AUTO, DELTA_TOOLS_NONE, DELTA_TOOLS_REQUIRED };

typedef struct delta_output_options {
    bool thinking; /* the prompt left an open think block: output starts as reasoning */
    enum delta_tool_mode tools;
    const delta_str *tools_json; /* as in delta_chat; copied */
    size_t n_tools;
    /* What engines disagree on; docs/TOOLS.md has the reasons for the daemon's defaults. */
    bool calls_in_reasoning; /* a call inside reasoning ends it and counts */
    bool calls_in_fences;    /* so does one inside a fenced block */
    bool unknown_is_text;    /* a call of a tool that is not declared is text; else it is a call */
} delta_output_options;

enum delta_out_end { DELTA_OUT_END_STOP, DELTA_OUT_END_LENGTH };
enum delta_out_finish { DELTA_OUT_STOP, DELTA_OUT_TOOL_CALLS, DELTA_OUT_LENGTH };

enum { DELTA_OUTPUT_HOLD_MAX = 64 * 1024, DELTA_OUTPUT_NAME_MAX = 256 };

/* What the parser had to mend, ignore or give back; for statistics. X(NAME, text) */
#define DELTA_REPAIR_MAP(X)                                                                        \
    X(THINK_TAG, "think_tag") /* <think> or a second </think> dropped */                           \
    X(CALL_IN_REASONING, "call_in_reasoning")                                                      \
    X(CALL_BARE, "call_bare")             /* no <tool_call> before <function= */                   \
    X(CALL_NOT_ONE, "call_not_one")       /* <tool_call> was text after all */                     \
    X(TOOL_UNKNOWN, "tool_unknown")       /* a call of a tool that is not declared */              \
    X(CLOSER_MISSING, "closer_missing")   /* a closing tag was filled in */                        \
    X(CLOSER_REPEATED, "closer_repeated") /* a closing tag too many was dropped */                 \
    X(CLOSER_BROKEN, "closer_broken")     /* such as </parameter1> */                              \
    X(CALL_TEXT, "call_text")             /* text between parameters dropped */                    \
    X(PARAM_MALFORMED, "param_malformed") /* a parameter without a name dropped */                 \
    X(PARAM_REPEATED, "param_repeated")   /* the second of a name dropped */                       \
    X(TAG_IN_VALUE, "tag_in_value")       /* a </parameter> that was data */                       \
    X(VALUE_TYPE, "value_type")           /* not of the declared type: sent as a string */         \
    X(CALL_CUT, "call_cut")               /* the output ended inside a call */                     \
    X(HOLD_FULL, "hold_full")             /* decided without seeing enough */                      \
    X(BYTES, "bytes")                     /* not UTF-8, or NUL */

enum delta_repair {
#define X(name, text) DELTA_REPAIR_##name,
    DELTA_REPAIR_MAP(X)
#undef X
        DELTA_REPAIR_N
};

typedef struct delta_output delta_output;

int delta_output_new(const delta_output_options *o, delta_output **ret_p, delta_error *err);
void delta_output_free(delta_output *p);

/* Feeds a piece. added: the piece is exactly the text of an added (special)
 * token, as the tokenizer knows it; false when unknown. It is a hint: the rules
 * go by the text alone, so that a replayed text gives the same events.
 * *ret_events is borrowed until the next call. 0, or DELTA_ENOMEM, or
 * DELTA_ESTATE after the finish. */
int delta_output_push(delta_output *p, const char *bytes, size_t len, bool added,
                      const delta_out_event **ret_events, size_t *ret_n, delta_error *err);
/* The turn is over: STOP, the model ended it (or a stop string did); LENGTH, it was cut. What was
 * held back is given out, an open call is ended. TOOL_CALLS is said if a call is complete and the
 * model ended its turn. */
int delta_output_finish(delta_output *p, enum delta_out_end end, const delta_out_event **ret_events,
                        size_t *ret_n, enum delta_out_finish *ret_finish, delta_error *err);

/* How often something was mended so far, and the stable name of it. */
uint32_t delta_output_repairs(const delta_output *p, enum delta_repair which);
const char *delta_repair_name(enum delta_repair which);

#ifdef __cplusplus
}
#endif
#endif
