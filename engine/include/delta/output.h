/* output.h -- the model's output text to reasoning, content and tool calls.
 *
 * One incremental parser for all three. Input is bytes in pieces of any size
 * and, where known, "this piece is the special token N"; output is events. The
 * events joined are the same at every chunking, but for where deltas are cut.
 * Arguments are written as JSON text, forward only: what was sent is never
 * taken back. The hold-back is bounded.
 *
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
    bool calls_in_reasoning; /* promote a call inside reasoning (the default of the daemon) */
} delta_output_options;

enum delta_out_end { DELTA_OUT_END_STOP, DELTA_OUT_END_LENGTH };
enum delta_out_finish { DELTA_OUT_STOP, DELTA_OUT_TOOL_CALLS, DELTA_OUT_LENGTH };

typedef struct delta_output delta_output;

int delta_output_new(const delta_output_options *o, delta_output **ret_p, delta_error *err);
void delta_output_free(delta_output *p);

/* Feeds a piece. added: the piece is exactly the text of an added (special)
 * token, as the tokenizer knows it; false when unknown. Appends events;
 * *ret_events is borrowed until the next call. 0, or DELTA_ENOMEM. */
int delta_output_push(delta_output *p, const char *bytes, size_t len, bool added,
                      const delta_out_event **ret_events, size_t *ret_n, delta_error *err);
/* The turn is over. */
int delta_output_finish(delta_output *p, enum delta_out_end end, const delta_out_event **ret_events,
                        size_t *ret_n, enum delta_out_finish *ret_finish, delta_error *err);

#ifdef __cplusplus
}
#endif
#endif
