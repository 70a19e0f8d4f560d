/* prepare.c -- from a decoded request to what the engine runs: the prompt's tokens.
 *
 * A stage of its own because it may take long: a prompt of megabytes is rendered and tokenised for
 * tens of milliseconds, in which the loop would serve nobody.
 *
 *   begin (loop) -> prepare (loop if short, else worker) -> launch (loop, inference.c)
 *
 * dd_prepare() touches nothing but its own request and what never changes after loading (the
 * tokenizer, the engine's info, [policy]); dd_prepare_begin() copies what it must know of a
 * session. Meanwhile the loop may finish the call, for whatever reason, but leaves the request
 * alone until the worker is done with it: then it is launched, or freed if nobody waits any more.
 *
 * A further step that may take long: call it in dd_prepare(), read from l->req, put the result in
 * a field of dd_live that the loop reads after is_preparing only, free it in dd_live_done(), say
 * in *st what is wrong, and let dd_request_text_bytes() count what it costs. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/sha256.h"
#include "daemon/live.h"

void dd_status_of_error(dd_status *st, const delta_error *err, const char *field)
{
    if (err->code == DELTA_ENOMEM) {
        dd_status_set(st, DD_RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", "%s", err->text);
        return;
    }
    dd_status_set(st, DD_INVALID_ARGUMENT, "FIELD_INVALID", "%s", err->text);
    (void)snprintf(st->field, sizeof st->field, "%s", field);
}

/* Whether the message's part of the text is the turn, as it was sampled behind its prompt. */
static bool is_sampled(const delta_rendered *r, size_t i, const dd_sampled *x, size_t *ret_begin)
{
    const char *opener = x->thought ? "<|im_start|>assistant\n<think>\n"
                                    : "<|im_start|>assistant\n<think>\n\n</think>\n\n";
    const char *closer = "<|im_end|>\n", *at = r->text + r->messages[i].begin;
    const size_t n = strlen(opener), len = r->messages[i].end - r->messages[i].begin;
    *ret_begin = r->messages[i].begin + n;
    return x->n_ids && len == n + x->text.len + strlen(closer) && memcmp(at, opener, n) == 0 &&
           memcmp(at + n, x->text.p, x->text.len) == 0 &&
           memcmp(at + n + x->text.len, closer, strlen(closer)) == 0;
}

/* The text's tokens; of answers that were sampled here those that were. */
static int tokenize(const dd_service *s, const dd_request *q, const delta_rendered *r,
                    uint32_t **ret_ids, size_t *ret_n, delta_error *err)
{
    const delta_tokenizer *t = dd_engine_tokenizer(s->engine);
    const char *text = r->len ? r->text : "";
    uint32_t *ids = NULL, *piece = NULL;
    size_t n = 0, n_piece, at = 0, begin;
    for (size_t i = 0; i <= q->n_messages; i++) {
        const dd_sampled *x = i < q->n_messages && q->sampled ? &q->sampled[i] : NULL;
        if (i < q->n_messages && (!x || !is_sampled(r, i, x, &begin)))
            continue;
        int e =
            delta_tokenize(t, text + at, (x ? begin : r->len) - at, false, &piece, &n_piece, err);
        const size_t more = n_piece + (x ? x->n_ids : 0);
        uint32_t *all = e < 0 ? NULL : realloc(ids, (n + more + 1) * sizeof *all);
        if (!all) {
            e = e < 0 ? e : delta_fail(err, DELTA_ENOMEM, "%zu tokens", n + more);
            free(piece);
            free(ids);
            return e;
        }
        ids = all;
        if (n_piece)
            memcpy(ids + n, piece, n_piece * sizeof *ids);
        free(piece);
        piece = NULL;
        n += n_piece;
        if (x) {
            memcpy(ids + n, x->ids, x->n_ids * sizeof *ids);
            n += x->n_ids;
            at = begin + x->text.len;
        }
    }
    *ret_ids = ids;
    *ret_n = n;
    return 0;
}

int dd_render(const dd_service *s, const dd_request *r, const dd_turn *turn, bool prompt,
              delta_rendered *ret_text, uint32_t **ret_ids, size_t *ret_n, dd_status *st)
{
    delta_error err = { 0 };
    const delta_chat c = {
        .messages = r->messages,
        .n_messages = r->n_messages,
        .tools_json = r->tools,
        /* A session's tools stay in its prompt: its beginning was computed with them. */
        .n_tools = r->tool_mode == DELTA_TOOLS_NONE && !r->session_id[0] ? 0 : r->n_tools,
        .add_generation_prompt = prompt,
        .enable_thinking = r->thinking,
        .preserve_thinking = r->preserve,
        .add_vision_id = r->add_vision_id,
        .scalars_as_python = delta_template_known(dd_engine_info(s->engine)->template_sha256) == 35,
        .first_message = turn->first,
        .join = turn->join,
        .leave_open = turn->leaves_open,
    };
    int e = delta_chat_render(&c, ret_text, &err);
    if (e < 0) {
        err.code = e;
        dd_status_of_error(st, &err, "messages");
        return -1;
    }
    e = tokenize(s, r, ret_text, ret_ids, ret_n, &err);
    if (e < 0) {
        delta_rendered_done(ret_text);
        err.code = e;
        dd_status_of_error(st, &err, "messages");
        return -1;
    }
    return 0;
}

void dd_content_name(delta_str content, char to[DD_CONTENT_NAME])
{
    memcpy(to, "text ", 5);
    de_sha256_hex(content.p, content.len, to + 5);
}

static int no_memory(dd_status *st)
{
    dd_status_set(st, DD_RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", "no memory for the prompt");
    return -1;
}

/* The turn that m was, if it is known. */
static bool recall(dd_service *s, uint32_t uid, const delta_message *m, dd_sampled *ret_turn)
{
    char content[DD_CONTENT_NAME];
    delta_str names[DD_RECALL_CALLS];
    size_t n = 0;
    if (m->role != DELTA_ROLE_ASSISTANT || m->n_calls > DD_RECALL_CALLS)
        return false;
    for (; n < m->n_calls; n++)
        names[n] = m->calls[n].id;
    if (n == 0 && m->n_parts == 1) {
        dd_content_name(m->parts[0].text, content);
        names[n++] = (delta_str){ content, strlen(content) };
    }
    return dd_recall_find(s->recall, uid, names, n, ret_turn);
}

int dd_request_recall(dd_service *s, uint32_t uid, const dd_session *x, dd_request *q,
                      dd_status *st)
{
    q->arena.limit += q->n_messages * sizeof *q->sampled + 64; /* ours, not the peer's */
    q->sampled = de_arena_array(&q->arena, q->n_messages, sizeof *q->sampled);
    if (!q->sampled)
        return no_memory(st);
    memset(q->sampled, 0, q->n_messages * sizeof *q->sampled);
    for (size_t i = 0; i < q->n_messages; i++) {
        delta_message *m = &q->messages[i];
        dd_sampled *turn = &q->sampled[i];
        if (x && i < x->n_messages && x->sampled[i].text.p) {
            *turn = x->sampled[i]; /* it stays as long as the session is busy */
        } else if (recall(s, uid, m, turn)) {
            const size_t bytes = turn->n_ids * sizeof *turn->ids;
            q->arena.limit += turn->text.len + bytes + 128;
            char *text = de_arena_strndup(&q->arena, turn->text.p, turn->text.len);
            uint32_t *ids = de_arena_array(&q->arena, turn->n_ids, sizeof *ids);
            if (!text || !ids)
                return no_memory(st);
            if (bytes)
                memcpy(ids, turn->ids, bytes);
            turn->text.p = text;
            turn->ids = ids;
        } else {
            continue;
        }
        /* Calls' ids say that it is this turn, whatever its words; a content only that it may be. */
        if (m->n_calls || (x && i < x->n_messages)) {
            m->sampled = turn->text;
            m->sampled_thought = turn->thought;
        }
    }
    return 0;
}

size_t dd_request_text_bytes(const dd_request *q)
{
    size_t n = q->text.len + q->n_ids;
    for (size_t i = 0; i < q->n_messages; i++) {
        const delta_message *m = &q->messages[i];
        for (size_t k = 0; k < m->n_parts; k++)
            n += m->parts[k].text.len;
        for (size_t k = 0; k < m->n_calls; k++)
            n += m->calls[k].arguments_json.len;
        n += m->reasoning.len + m->sampled.len + 64;
    }
    for (size_t i = 0; i < q->n_tools; i++)
        n += q->tools[i].len;
    for (size_t i = 0; i < q->n_chunks; i++)
        n += q->chunks[i].len;
    return n;
}

/* <|im_end|> in front: the session's last turn was cut before it. */
static int end_last_turn(dd_live *l, dd_status *st)
{
    const int64_t end = delta_tokenizer_added_id(dd_engine_tokenizer(l->s->engine), "<|im_end|>");
    uint32_t *more = end < 0 ? NULL : realloc(l->ids, (l->n_ids + 1) * sizeof *more);
    if (!more) {
        dd_status_set(st, DD_INTERNAL, "INTERNAL", "no <|im_end|> token, or no memory");
        return -1;
    }
    memmove(more + 1, more, l->n_ids * sizeof *more);
    more[0] = (uint32_t)end;
    l->ids = more;
    l->n_ids++;
    return 0;
}

/* ---- what the answer is held to */

static bool has_calls(const dd_request *q)
{
    return q->tool_mode != DELTA_TOOLS_NONE && q->n_tools > 0;
}

bool dd_request_is_constrained(const dd_request *q)
{
    bool is_strict = false;
    for (size_t i = 0; i < q->n_tools; i++)
        is_strict |= q->tool_strict[i];
    return q->format != DD_FORMAT_NONE ||
           (has_calls(q) &&
            (q->tool_mode == DELTA_TOOLS_REQUIRED || q->n_tool_names || q->one_call || is_strict));
}

/* Adds the declared parameters of a tool, each any text. A name that the call's syntax cannot hold
 * is left out. */
static void add_free_parameters(dd_request *q, size_t tool, de_text *t)
{
    de_json *v;
    bool any = false;
    de_text_puts(t, ",\"parameters\":{\"type\":\"object\",\"properties\":{");
    if (de_json_parse(&q->arena, q->tools[tool].p, q->tools[tool].len, &v, NULL) == 0) {
        const de_json *f = de_json_get(v, "function");
        const de_json *p = de_json_get(de_json_get(f ? f : v, "parameters"), "properties");
        for (p = p && p->kind == DE_JSON_OBJECT ? p->child : NULL; p; p = p->next) {
            if (p->key_len == 0 || p->key_len > 128 || strpbrk(p->key, "<>\n\r\t"))
                continue;
            de_text_puts(t, any ? "," : "");
            de_json_write_string(t, p->key, p->key_len);
            de_text_puts(t, ":{\"type\":\"string\"}");
            any = true;
        }
    }
    de_text_puts(t, "}}");
}

/* The tools as the grammar shall see them: the arguments of one that need not be held to its schema
 * are texts. NULL: no memory. */
static delta_str *held_tools(dd_request *q)
{
    delta_str *list = de_arena_array(&q->arena, q->n_tools, sizeof *list);
    for (size_t i = 0; list && i < q->n_tools; i++) {
        list[i] = q->tools[i];
        if (q->tool_mode == DELTA_TOOLS_REQUIRED || q->tool_strict[i])
            continue;
        q->arena.limit += 64 * q->tools[i].len + 4096; /* for reading it: ours, not the peer's */
        const delta_str name = dd_request_tool_name(q, i);
        de_text t = { 0 };
        de_text_puts(&t, "{\"type\":\"function\",\"function\":{\"name\":");
        de_json_write_string(&t, name.p ? name.p : "", name.len);
        add_free_parameters(q, i, &t);
        de_text_puts(&t, "}}");
        char *copy = t.failed ? NULL : de_arena_strndup(&q->arena, t.p, t.len);
        list[i] = (delta_str){ copy, t.len };
        de_text_done(&t);
        if (!copy)
            return NULL;
    }
    return list;
}

static int constrain(dd_live *l, dd_status *st)
{
    static const enum delta_content_form forms[] = {
        [DD_FORMAT_NONE] = DELTA_CONTENT_FREE,
        [DD_FORMAT_JSON_SCHEMA] = DELTA_CONTENT_SCHEMA,
        [DD_FORMAT_JSON_OBJECT] = DELTA_CONTENT_JSON,
        [DD_FORMAT_REGEX] = DELTA_CONTENT_REGEX,
        [DD_FORMAT_GRAMMAR] = DELTA_CONTENT_GRAMMAR,
        [DD_FORMAT_CHOICE] = DELTA_CONTENT_CHOICE,
    };
    dd_request *q = &l->req;
    delta_error err = { 0 };
    delta_grammar_spec spec = { .thinking = l->method == DD_M_CHAT && q->thinking,
                                .calls_in_reasoning = l->s->o.config->policy.calls_in_reasoning,
                                .calls_in_fences = l->s->o.config->policy.calls_in_fences,
                                .content = forms[q->format],
                                .text = q->format_text,
                                .choices = q->format_choices,
                                .n_choices = q->n_format_choices };
    if (q->stopping.ignore_eos) {
        dd_status_set(st, DD_INVALID_ARGUMENT, "FIELD_INVALID",
                      "stopping.ignore_eos: a constrained answer ends where its grammar does");
        (void)snprintf(st->field, sizeof st->field, "stopping.ignore_eos");
        return -1;
    }
    if (has_calls(q) && q->format != DD_FORMAT_NONE) {
        dd_status_set(st, DD_UNIMPLEMENTED, "NOT_IMPLEMENTED",
                      "format together with tools that may be called (tool_choice is not NONE) is "
                      "not implemented in this version");
        (void)snprintf(st->field, sizeof st->field, "format");
        return -1;
    }
    if (has_calls(q)) {
        spec.calls = q->tool_mode == DELTA_TOOLS_REQUIRED ? DELTA_CALLS_REQUIRED : DELTA_CALLS_AUTO;
        spec.tools_json = held_tools(q);
        spec.n_tools = q->n_tools;
        spec.allowed = q->tool_names;
        spec.n_allowed = q->n_tool_names;
        spec.parallel = !q->one_call && !q->tool_is_named;
        if (!spec.tools_json) {
            dd_status_set(st, DD_RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", "no memory for the tools");
            return -1;
        }
    }
    int e = dd_grammars_get(l->s->grammars, l->s->engine, &spec, &l->grammar, &err);
    if (e == DELTA_EUNSUPPORTED) {
        dd_status_set(st, DD_INVALID_ARGUMENT, "SCHEMA_UNSUPPORTED", "%s", err.text);
        (void)snprintf(st->field, sizeof st->field, "%s", spec.n_tools ? "tools" : "format");
    } else if (e < 0) {
        err.code = e;
        dd_status_of_error(st, &err, spec.n_tools ? "tools" : "format");
    }
    return e;
}

static int ids_of_generate(dd_live *l, dd_status *st)
{
    const dd_request *q = &l->req;
    delta_error err = { 0 };
    if (q->has_text) {
        int e = delta_tokenize(dd_engine_tokenizer(l->s->engine), q->text.p, q->text.len,
                               q->plain_text, &l->ids, &l->n_ids, &err);
        if (e < 0) {
            err.code = e;
            dd_status_of_error(st, &err, "text");
        }
        return e;
    }
    l->ids = malloc(q->n_ids * sizeof *l->ids);
    if (!l->ids) {
        dd_status_set(st, DD_RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", "no memory for the prompt");
        return -1;
    }
    memcpy(l->ids, q->ids, q->n_ids * sizeof *l->ids);
    l->n_ids = q->n_ids;
    return 0;
}

int dd_parser_new(const dd_service *s, const dd_request *q, delta_output **ret_p, dd_status *st)
{
    delta_error err = { 0 };
    const delta_output_options o = {
        .thinking = q->thinking,
        .tools = q->tool_mode,
        .tools_json = q->tools,
        .n_tools = q->tool_mode == DELTA_TOOLS_NONE ? 0 : q->n_tools,
        .calls_in_reasoning = s->o.config->policy.calls_in_reasoning,
        .calls_in_fences = s->o.config->policy.calls_in_fences,
        .unknown_is_text = strcmp(s->o.config->policy.unknown_tools, "text") == 0,
    };
    int e = delta_output_new(&o, ret_p, &err);
    if (e < 0) {
        err.code = e;
        dd_status_of_error(st, &err, "tools");
    }
    return e;
}

int dd_prepare_begin(dd_live *l, dd_status *st)
{
    const dd_request *q = &l->req;
    if (l->method == DD_M_GENERATE)
        return 0;
    if ((q->session_id[0] || l->method != DD_M_CHAT) && dd_session_begin(l, st) < 0)
        return -1;
    if (dd_request_tools_check(&l->req, st) < 0 ||
        dd_request_recall(l->s, l->peer.uid, l->session, &l->req, st) < 0)
        return -1;
    l->turn.leaves_open = l->method != DD_M_CHAT && q->n_messages &&
                          q->messages[q->n_messages - 1].role == DELTA_ROLE_TOOL;
    l->turn.ends_last = l->session && l->session->needs_end;
    return 0;
}

int dd_prepare(dd_live *l, dd_status *st)
{
    const bool chat = l->method == DD_M_CHAT;
    delta_rendered text = { 0 };
    if ((chat || l->method == DD_M_GENERATE) && dd_request_is_constrained(&l->req) &&
        constrain(l, st) < 0)
        return -1;
    if (l->method == DD_M_GENERATE) {
        if (ids_of_generate(l, st) < 0)
            return -1;
        dd_reuse_marks(l);
        return 0;
    }
    if (chat && dd_parser_new(l->s, &l->req, &l->parser, st) < 0)
        return -1;
    if (!chat && l->req.n_messages == l->turn.first)
        return 0; /* an empty session */
    if (dd_render(l->s, &l->req, &l->turn, chat, &text, &l->ids, &l->n_ids, st) < 0)
        return -1;
    delta_rendered_done(&text);
    if (l->turn.ends_last && end_last_turn(l, st) < 0)
        return -1;
    dd_reuse_marks(l);
    return 0;
}
