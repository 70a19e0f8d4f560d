/* fuzz_chat.c -- conversations as JSON to prompts: the first two bytes choose options, the rest is
 * messages, then perhaps a NUL and tools. What renders must render as prompt and suffix, too. */
#include <stdlib.h>
#include <string.h>

#include "delta/chat.h"
#include "delta/openai.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2)
        return 0;
    const char *text = (const char *)data + 2, *nul = memchr(text, 0, size - 2);
    const size_t len = nul ? (size_t)(nul - text) : size - 2;
    delta_openai *o = NULL;
    delta_error err = { 0 };
    int e = delta_openai_parse(text, len, nul ? nul + 1 : NULL, nul ? size - 3 - len : 0, &o, &err);
    if (e < 0) {
        if (!err.text[0] || err.code != e)
            abort();
        return 0;
    }
    delta_chat *c = delta_openai_chat(o);
    c->enable_thinking = data[0] & 1;
    c->preserve_thinking = data[0] & 2;
    c->add_vision_id = data[0] & 4;
    c->scalars_as_python = data[0] & 8;
    c->add_generation_prompt = data[0] & 16;
    delta_rendered whole, a, b;
    if (delta_chat_render(c, &whole, &err) < 0) {
        if (!err.text[0])
            abort();
        delta_openai_free(o);
        return 0;
    }
    /* The last span ends where the generation prompt begins. */
    for (size_t i = 0; i < c->n_messages; i++)
        if (whole.messages[i].end < whole.messages[i].begin || whole.messages[i].end > whole.len)
            abort();
    const size_t cut = 1 + data[1] % c->n_messages, n = c->n_messages;
    const bool prompt = c->add_generation_prompt;
    c->n_messages = cut;
    c->leave_open = true;
    c->add_generation_prompt = false;
    /* Which question is the last decides on reasoning before it: only with preserve_thinking are
     * both halves the whole. The first half may lack a question; the second then has it. */
    if (c->preserve_thinking && delta_chat_render(c, &a, NULL) >= 0) {
        c->n_messages = n;
        c->leave_open = false;
        c->first_message = cut;
        c->join = DELTA_JOIN_OPEN;
        c->add_generation_prompt = prompt;
        if (delta_chat_render(c, &b, NULL) < 0 || a.len + b.len != whole.len ||
            memcmp(whole.text, a.text, a.len) != 0 ||
            memcmp(whole.text + a.len, b.text, b.len) != 0)
            abort();
        delta_rendered_done(&a);
        delta_rendered_done(&b);
    }
    delta_rendered_done(&whole);
    delta_openai_free(o);
    return 0;
}
