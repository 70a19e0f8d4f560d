/* openai.h -- conversations in the JSON spelling of the OpenAI interface, to delta_chat.
 *
 * Tools, tests and the terminal client read and write conversations as JSON
 * arrays of messages {"role", "content", "tool_calls", "reasoning_content"}
 * and of tools {"type":"function","function":{...}}. What the chat template
 * would refuse is refused here or by delta_chat_render(), in its words; of
 * several faults the one of the first message is named.
 *
 * Read are   content: a string, an array of parts, null or nothing; parts by
 *            their key, as the template does (image, image_url, video, text);
 *            tool_calls with or without "function" around name and arguments;
 *            arguments: an object, or a string that holds one ("" is {});
 *            reasoning_content, else reasoning, where it is a string.
 * Not read   the role "developer" (the template has none), ids, names, the
 *            media behind image and video parts.
 *
 * Ownership  everything lives in the delta_openai; freed by delta_openai_free().
 * Limits     DELTA_OPENAI_MESSAGES_MAX messages, as many parts and calls in
 *            each, as many tools; memory is bounded by the length of the text. */
#ifndef DELTA_OPENAI_H
#define DELTA_OPENAI_H

#include "delta/chat.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { DELTA_OPENAI_MESSAGES_MAX = 1 << 20 };

typedef struct delta_openai delta_openai;

/* tools may be NULL or the text "null": none. enable_thinking is set to true, all else of the
 * delta_chat to false and 0.
 *   DELTA_EINVALID  the JSON is none, or not a conversation
 *   DELTA_ELIMIT    too much of something
 *   DELTA_ENOMEM */
int delta_openai_parse(const char *messages, size_t messages_len, const char *tools,
                       size_t tools_len, delta_openai **ret_o, delta_error *err);

/* To be completed with options by the caller and rendered; valid until the free. */
delta_chat *delta_openai_chat(delta_openai *o);
void delta_openai_free(delta_openai *o); /* NULL is a no-op */

#ifdef __cplusplus
}
#endif
#endif
