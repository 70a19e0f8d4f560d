/* chat.h -- a conversation to the prompt text that the model was trained on.
 *
 * Renders what the Qwen3.5/3.6 chat template renders, byte for byte, without
 * a template engine. All strings are UTF-8 spans, not NUL-terminated, borrowed
 * from the caller for the time of the call. JSON values are given as text.
 *
 * Threads    pure functions: any thread. */
#ifndef DELTA_CHAT_H
#define DELTA_CHAT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "delta/error.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct delta_str {
    const char *p; /* may be NULL if len is 0 */
    size_t len;
} delta_str;

enum delta_role { DELTA_ROLE_SYSTEM, DELTA_ROLE_USER, DELTA_ROLE_ASSISTANT, DELTA_ROLE_TOOL };

enum delta_part_kind { DELTA_PART_TEXT, DELTA_PART_IMAGE, DELTA_PART_VIDEO };
typedef struct delta_part {
    enum delta_part_kind kind;
    delta_str text; /* of a text part */
} delta_part;

typedef struct delta_chat_call {
    delta_str name;
    delta_str arguments_json; /* one JSON object; order of keys is kept. "" is {} */
    delta_str id;             /* not rendered; may be empty */
} delta_chat_call;

typedef struct delta_message {
    enum delta_role role;
    const delta_part *parts;
    size_t n_parts;
    bool has_reasoning; /* reasoning was given apart from the content (may be empty) */
    delta_str reasoning;
    const delta_chat_call *calls; /* of an assistant */
    size_t n_calls;
    /* Of an assistant, if known: what the model wrote behind the generation prompt, byte for byte,
     * to the end of its turn. It is rendered in the place of reasoning, content and calls, which
     * may be spelled otherwise by now; where the template leaves earlier reasoning out, from behind
     * the first </think>. thought: that prompt left the think block open. */
    delta_str sampled;
    bool sampled_thought;
} delta_message;

/* What the timeline holds of messages[first_message - 1] when a suffix is rendered. */
enum delta_join {
    DELTA_JOIN_AUTO,    /* an assistant: SAMPLED, any other: CLOSED */
    DELTA_JOIN_CLOSED,  /* it was rendered; its "<|im_end|>\n" is there */
    DELTA_JOIN_SAMPLED, /* it was sampled and ends at its <|im_end|>: the suffix starts with "\n" */
    DELTA_JOIN_OPEN,    /* it was rendered with leave_open */
};

typedef struct delta_chat {
    const delta_message *messages;
    size_t n_messages;
    const delta_str *tools_json; /* each a JSON object {"type":"function","function":{...}} */
    size_t n_tools;
    bool add_generation_prompt;
    bool enable_thinking; /* the template's default is true */
    bool preserve_thinking;
    bool add_vision_id;
    /* Qwen3.5 prints scalar arguments as Python text (True, None), 3.6 as JSON. */
    bool scalars_as_python;
    /* Render messages[first_message ..] only, as the continuation of a timeline that ended with
     * messages[first_message - 1]. The whole list is still needed to judge it (which turn is the
     * last query, the numbers of pictures). 0: everything, tools and system included. Equal to
     * n_messages, it renders the generation prompt alone.
     *
     * The suffix begins with, in this order:
     *   "\n"            if join is SAMPLED (the template puts it after every <|im_end|>). An answer
     *                   that was cut has no <|im_end|>: the caller appends that token first.
     *   "<|im_end|>\n"  if join is OPEN, messages[first_message - 1] is a tool's and no tool's
     *                   message follows
     *   "<|im_start|>"  of the first message or of the generation prompt, or, if join is OPEN and
     *                   a tool's message follows a tool's, "\n<tool_response>".
     * Prompt and suffixes joined are the whole rendering with preserve_thinking, if sampled text
     * is spelled as the template spells it. One exception: between two tool messages CLOSED gives a
     * second user turn, where the whole rendering has one; leave the run open to avoid that. */
    size_t first_message;
    enum delta_join join; /* ignored if first_message is 0 */
    /* Leave off the "<|im_end|>\n" of a tool's message that is the last one: more results may
     * follow. Without effect on other roles. Not with add_generation_prompt (DELTA_EINVALID). */
    bool leave_open;
} delta_chat;

typedef struct delta_span { /* bytes [begin, end) of the rendered text */
    size_t begin, end;
} delta_span;

typedef struct delta_rendered {
    char *text; /* malloc'ed, NUL-terminated */
    size_t len;
    delta_span *messages; /* malloc'ed, n_messages: what each message became (empty if unrendered);
                             a system message shares the tools block's turn */
} delta_rendered;

/* DELTA_EINVALID with the template's reason and the message's index, e.g.
 * "messages[2]: System message must be at the beginning." */
int delta_chat_render(const delta_chat *c, delta_rendered *ret_r, delta_error *err);
void delta_rendered_done(delta_rendered *r);

/* The template of a checkpoint, judged by its hash: 36 (Qwen3.6), 35 (Qwen3.5),
 * 1 (the demo model's own text of 3.6), 0 unknown. sha256 is 64 hex digits. */
int delta_template_known(const char *sha256);

#ifdef __cplusplus
}
#endif
#endif
