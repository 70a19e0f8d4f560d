/* codec.c -- see codec.h. */
#include "daemon/codec.h"

#include <assert.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "base/json.h"
#include "daemon/limits.h"
#include "daemon/wire.h"
#include "deltad/v1/inference.pb-c.h"
#include "deltad/v1/model.pb-c.h"
#include "deltad/v1/saved.pb-c.h"
#include "deltad/v1/session.pb-c.h"
#include "deltad/v1/types.pb-c.h"

typedef Deltad__V1__ChatRequest pb_chat;
typedef Deltad__V1__Sampling pb_sampling;
typedef Deltad__V1__Stopping pb_stopping;
typedef Deltad__V1__Message pb_message;
typedef Deltad__V1__Tool pb_tool;

/* ---- the validator table: every number a request may carry */

typedef struct range {
    const char *path;
    double min, max;
    bool open_min; /* min itself is not allowed */
} range;
enum range_id {
    R_TEMPERATURE,
    R_TOP_P,
    R_MIN_P,
    R_PRESENCE,
    R_FREQUENCY,
    R_REPETITION,
    R_BIAS,
    R_N_BIAS,
    R_MAX_TOKENS,
    R_N_STOP,
    R_STOP_BYTES,
    R_N_STOP_IDS,
    R_TOP_LOGPROBS,
    R_REQUEST_ID,
    R_NAME,
    R_CTX_TOKENS,
    R_N_MESSAGES,
    R_N_TOOLS,
};
/* Defaults: sampling, the checkpoint's (dd_request_sampling); max_tokens, the configuration's. */
static const range ranges[] = {
    [R_TEMPERATURE] = { "sampling.temperature", 0, 100, false },
    [R_TOP_P] = { "sampling.top_p", 0, 1, true },
    [R_MIN_P] = { "sampling.min_p", 0, 1, false },
    [R_PRESENCE] = { "sampling.presence_penalty", -2, 2, false },
    [R_FREQUENCY] = { "sampling.frequency_penalty", -2, 2, false },
    [R_REPETITION] = { "sampling.repetition_penalty", 0, 10, true },
    [R_BIAS] = { "sampling.logit_bias.bias", -100, 100, false },
    [R_N_BIAS] = { "sampling.logit_bias", 0, DELTA_MAX_LOGIT_BIAS, false },
    [R_MAX_TOKENS] = { "stopping.max_tokens", 1, UINT32_MAX, false },
    [R_N_STOP] = { "stopping.stop", 0, DELTA_MAX_STOP_STRINGS, false },
    [R_STOP_BYTES] = { "stopping.stop", 1, DELTA_MAX_STOP_BYTES, false },
    [R_N_STOP_IDS] = { "stopping.stop_token_ids", 0, DELTA_MAX_STOP_IDS, false },
    [R_TOP_LOGPROBS] = { "logprobs.top", 0, DELTA_MAX_TOP_LOGPROBS, false },
    [R_REQUEST_ID] = { "request_id", 0, DD_ID_BYTES - 1, false },
    [R_NAME] = { "name", 0, 256, false },
    [R_CTX_TOKENS] = { "ctx_tokens", 1, UINT32_MAX, false },
    [R_N_MESSAGES] = { "messages", 0, DD_SESSION_MESSAGES, false },
    [R_N_TOOLS] = { "tools", 0, 4096, false },
};

__attribute__((format(printf, 3, 4))) static int invalid(dd_status *st, const char *field,
                                                         const char *format, ...)
{
    char text[sizeof st->message];
    va_list ap;
    va_start(ap, format);
    (void)vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    dd_status_set(st, DD_INVALID_ARGUMENT, "FIELD_INVALID", "%s: %s", field, text);
    (void)snprintf(st->field, sizeof st->field, "%s", field);
    return -1;
}

static int in_range(enum range_id id, double v, dd_status *st)
{
    const range *r = &ranges[id];
    if (isfinite(v) && v <= r->max && (r->open_min ? v > r->min : v >= r->min))
        return 0;
    return invalid(st, r->path, "%g is not in %s%g, %g]", v, r->open_min ? "(" : "[", r->min,
                   r->max);
}

static int no_memory(dd_status *st)
{
    dd_status_set(st, DD_INVALID_ARGUMENT, "REQUEST_TOO_LARGE",
                  "the request needs more memory than a request may have");
    return -1;
}

static int later(dd_status *st, const char *field)
{
    dd_status_set(st, DD_UNIMPLEMENTED, "NOT_IMPLEMENTED", "%s is not implemented in this version",
                  field);
    (void)snprintf(st->field, sizeof st->field, "%s", field);
    st->meta[0].key = "field";
    (void)snprintf(st->meta[0].value, sizeof st->meta[0].value, "%s", field);
    st->n_meta = 1;
    return -1;
}

static delta_str str(const char *s)
{
    return (delta_str){ s, strlen(s) };
}

static dd_bytes pack_into(de_arena *a, const ProtobufCMessage *m)
{
    size_t len = protobuf_c_message_get_packed_size(m);
    uint8_t *p = de_arena_alloc(a, len);
    if (p)
        (void)protobuf_c_message_pack(m, p);
    return (dd_bytes){ p, len };
}

/* ---- parts of requests */

static int take_message(de_arena *a, const pb_message *m, const char *at, delta_message *to,
                        dd_status *st)
{
    char path[96];
    memset(to, 0, sizeof *to);
    switch (m->role) {
    case DELTAD__V1__ROLE__ROLE_SYSTEM:
    case DELTAD__V1__ROLE__ROLE_DEVELOPER:
        to->role = DELTA_ROLE_SYSTEM;
        break;
    case DELTAD__V1__ROLE__ROLE_USER:
        to->role = DELTA_ROLE_USER;
        break;
    case DELTAD__V1__ROLE__ROLE_ASSISTANT:
        to->role = DELTA_ROLE_ASSISTANT;
        break;
    case DELTAD__V1__ROLE__ROLE_TOOL:
        to->role = DELTA_ROLE_TOOL;
        break;
    default:
        (void)snprintf(path, sizeof path, "%s.role", at);
        return invalid(st, path, "%d is not a role", (int)m->role);
    }
    delta_part *parts = de_arena_array(a, m->n_parts, sizeof *parts);
    delta_chat_call *calls = de_arena_array(a, m->n_tool_calls, sizeof *calls);
    if (!parts || !calls)
        return no_memory(st);
    for (size_t i = 0; i < m->n_parts; i++) {
        if (m->parts[i]->part_case == DELTAD__V1__PART__PART_MEDIA) {
            (void)snprintf(path, sizeof path, "%s.parts[%zu].media", at, i);
            return later(st, path);
        }
        parts[i] = (delta_part){ .kind = DELTA_PART_TEXT,
                                 .text = m->parts[i]->part_case == DELTAD__V1__PART__PART_TEXT
                                             ? str(m->parts[i]->text)
                                             : (delta_str){ 0 } };
    }
    if (m->n_tool_calls && to->role != DELTA_ROLE_ASSISTANT) {
        (void)snprintf(path, sizeof path, "%s.tool_calls", at);
        return invalid(st, path, "only an assistant calls tools");
    }
    for (size_t i = 0; i < m->n_tool_calls; i++)
        calls[i] = (delta_chat_call){ .name = str(m->tool_calls[i]->name),
                                      .arguments_json = str(m->tool_calls[i]->arguments_json),
                                      .id = str(m->tool_calls[i]->id) };
    to->parts = parts;
    to->n_parts = m->n_parts;
    to->calls = calls;
    to->n_calls = m->n_tool_calls;
    if (m->reasoning_opt_case == DELTAD__V1__MESSAGE__REASONING_OPT_REASONING) {
        to->has_reasoning = true;
        to->reasoning = str(m->reasoning);
    }
    return 0;
}

static int take_messages(dd_request *r, pb_message **m, size_t n, bool is_new_session,
                         dd_status *st)
{
    if (in_range(R_N_MESSAGES, (double)n, st) < 0)
        return -1;
    r->messages = de_arena_array(&r->arena, n, sizeof *r->messages);
    r->packed = de_arena_array(&r->arena, n, sizeof *r->packed);
    if (!r->messages || !r->packed)
        return no_memory(st);
    r->n_messages = n;
    for (size_t i = 0; i < n; i++) {
        char at[32];
        (void)snprintf(at, sizeof at, "messages[%zu]", i);
        if (take_message(&r->arena, m[i], at, &r->messages[i], st) < 0)
            return -1;
        r->packed[i] = (dd_bytes){ 0 };
        if (r->session_id[0] || is_new_session) {
            r->packed[i] = pack_into(&r->arena, &m[i]->base);
            if (!r->packed[i].data)
                return no_memory(st);
        }
    }
    return 0;
}

static bool is_tool_name(const char *s)
{
    size_t n = strspn(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-");
    return n > 0 && n <= 64 && !s[n];
}

static int take_tool(de_arena *a, const pb_tool *t, const char *at, delta_str *to, bool *ret_strict,
                     dd_status *st)
{
    char path[96];
    delta_error err;
    de_json *v;
    *ret_strict = t->strict;
    if (t->openai_json[0]) {
        (void)snprintf(path, sizeof path, "%s.openai_json", at);
        if (de_json_parse(a, t->openai_json, strlen(t->openai_json), &v, &err) < 0)
            return invalid(st, path, "%s", err.text);
        const de_json *f = de_json_get(v, "function");
        const de_json *name = de_json_get(f ? f : v, "name");
        if (!name || name->kind != DE_JSON_STRING || !is_tool_name(name->text))
            return invalid(st, path, "there is no name of [A-Za-z0-9_.-], at most 64 bytes");
        if (t->name[0] || t->description[0] || t->parameters_json_schema[0])
            return invalid(st, path, "name, description and parameters stay empty beside it");
        const de_json *strict = de_json_get(f ? f : v, "strict");
        *ret_strict = t->strict || (strict && strict->kind == DE_JSON_TRUE);
        *to = str(t->openai_json);
        return 0;
    }
    (void)snprintf(path, sizeof path, "%s.name", at);
    if (!is_tool_name(t->name))
        return invalid(st, path, "a name has 1 to 64 bytes of [A-Za-z0-9_.-]");
    const char *parameters = t->parameters_json_schema;
    if (parameters[0]) {
        (void)snprintf(path, sizeof path, "%s.parameters_json_schema", at);
        if (de_json_parse(a, parameters, strlen(parameters), &v, &err) < 0)
            return invalid(st, path, "%s", err.text);
        if (v->kind != DE_JSON_OBJECT)
            return invalid(st, path, "this is not a JSON object");
    }
    de_text x = { 0 };
    de_text_puts(&x, "{\"type\": \"function\", \"function\": {\"name\": ");
    de_json_write_string(&x, t->name, strlen(t->name));
    de_text_puts(&x, ", \"description\": ");
    de_json_write_string(&x, t->description, strlen(t->description));
    if (parameters[0]) {
        de_text_puts(&x, ", \"parameters\": ");
        de_text_puts(&x, parameters);
    }
    de_text_puts(&x, "}}");
    char *copy = x.failed ? NULL : de_arena_strndup(a, x.p, x.len);
    *to = (delta_str){ copy, x.len };
    de_text_done(&x);
    return copy ? 0 : no_memory(st);
}

static int take_tools(dd_request *r, pb_tool **t, size_t n, dd_status *st)
{
    if (in_range(R_N_TOOLS, (double)n, st) < 0)
        return -1;
    r->tools = de_arena_array(&r->arena, n, sizeof *r->tools);
    r->packed_tools = de_arena_array(&r->arena, n, sizeof *r->packed_tools);
    r->tool_strict = de_arena_array(&r->arena, n, sizeof *r->tool_strict);
    if (!r->tools || !r->packed_tools || !r->tool_strict)
        return no_memory(st);
    r->n_tools = n;
    for (size_t i = 0; i < n; i++) {
        char at[32];
        (void)snprintf(at, sizeof at, "tools[%zu]", i);
        if (take_tool(&r->arena, t[i], at, &r->tools[i], &r->tool_strict[i], st) < 0)
            return -1;
        r->packed_tools[i] = pack_into(&r->arena, &t[i]->base);
        if (!r->packed_tools[i].data && r->packed_tools[i].len)
            return no_memory(st);
    }
    return 0;
}

delta_str dd_request_tool_name(dd_request *r, size_t tool)
{
    de_json *v;
    const delta_str text = r->tools[tool];
    if (de_json_parse(&r->arena, text.p, text.len, &v, NULL) < 0)
        return (delta_str){ 0 };
    const de_json *f = de_json_get(v, "function");
    const de_json *name = de_json_get(f ? f : v, "name");
    return name && name->kind == DE_JSON_STRING ? (delta_str){ name->text, name->n }
                                                : (delta_str){ 0 };
}

static bool is_declared(dd_request *r, const char *name)
{
    for (size_t i = 0; i < r->n_tools; i++) {
        const delta_str s = dd_request_tool_name(r, i);
        if (s.len == strlen(name) && memcmp(s.p, name, s.len) == 0)
            return true;
    }
    return false;
}

static int take_tool_names(dd_request *r, const char *path, char **names, size_t n, dd_status *st)
{
    if (in_range(R_N_TOOLS, (double)n, st) < 0)
        return -1;
    r->tool_names = de_arena_array(&r->arena, n, sizeof *r->tool_names);
    if (!r->tool_names)
        return no_memory(st);
    for (size_t i = 0; i < n; i++)
        r->tool_names[i] = str(names[i]);
    r->n_tool_names = n;
    return n ? 0 : invalid(st, path, "no tool is named");
}

static int take_tool_mode(dd_request *r, const char *path, int mode, dd_status *st)
{
    switch (mode) {
    case DELTAD__V1__TOOL_CHOICE__MODE__MODE_UNSPECIFIED:
    case DELTAD__V1__TOOL_CHOICE__MODE__MODE_AUTO:
        r->tool_mode = DELTA_TOOLS_AUTO;
        return 0;
    case DELTAD__V1__TOOL_CHOICE__MODE__MODE_NONE:
        r->tool_mode = DELTA_TOOLS_NONE;
        return 0;
    case DELTAD__V1__TOOL_CHOICE__MODE__MODE_REQUIRED:
        r->tool_mode = DELTA_TOOLS_REQUIRED;
        return 0;
    default:
        return invalid(st, path, "%d is not a mode", mode);
    }
}

static int take_tool_choice(dd_request *r, const Deltad__V1__ToolChoice *c, dd_status *st)
{
    r->tool_mode = DELTA_TOOLS_AUTO;
    if (!c)
        return 0;
    switch (c->choice_case) {
    case DELTAD__V1__TOOL_CHOICE__CHOICE__NOT_SET:
    case _DELTAD__V1__TOOL_CHOICE__CHOICE__CASE_IS_INT_SIZE:
        return 0;
    case DELTAD__V1__TOOL_CHOICE__CHOICE_NAME:
        r->tool_mode = DELTA_TOOLS_REQUIRED;
        r->tool_is_named = true;
        return take_tool_names(r, "tool_choice.name", (char *[]){ c->name }, 1, st);
    case DELTAD__V1__TOOL_CHOICE__CHOICE_ALLOWED:
        if (take_tool_mode(r, "tool_choice.allowed.mode", (int)c->allowed->mode, st) < 0)
            return -1;
        return take_tool_names(r, "tool_choice.allowed.names", c->allowed->names,
                               c->allowed->n_names, st);
    case DELTAD__V1__TOOL_CHOICE__CHOICE_MODE:
        break;
    }
    return take_tool_mode(r, "tool_choice.mode", (int)c->mode, st);
}

int dd_request_tools_check(dd_request *r, dd_status *st)
{
    for (size_t i = 0; i < r->n_tool_names; i++) {
        char path[48] = "tool_choice.name";
        if (!r->tool_is_named)
            (void)snprintf(path, sizeof path, "tool_choice.allowed.names[%zu]", i);
        if (!is_declared(r, r->tool_names[i].p))
            return invalid(st, path, "there is no tool \"%.64s\"", r->tool_names[i].p);
    }
    if (r->tool_mode == DELTA_TOOLS_REQUIRED && r->n_tools == 0)
        return invalid(st, "tool_choice", "a call is required and there are no tools");
    return 0;
}

static int take_format(dd_request *r, const Deltad__V1__OutputFormat *f, dd_status *st)
{
    switch (f->format_case) {
    case DELTAD__V1__OUTPUT_FORMAT__FORMAT__NOT_SET:
    case _DELTAD__V1__OUTPUT_FORMAT__FORMAT__CASE_IS_INT_SIZE:
        return 0;
    case DELTAD__V1__OUTPUT_FORMAT__FORMAT_JSON_SCHEMA:
        r->format = DD_FORMAT_JSON_SCHEMA;
        r->format_text = str(f->json_schema);
        return 0;
    case DELTAD__V1__OUTPUT_FORMAT__FORMAT_JSON_OBJECT:
        r->format = f->json_object ? DD_FORMAT_JSON_OBJECT : DD_FORMAT_NONE;
        return 0;
    case DELTAD__V1__OUTPUT_FORMAT__FORMAT_REGEX:
        r->format = DD_FORMAT_REGEX;
        r->format_text = str(f->regex);
        return 0;
    case DELTAD__V1__OUTPUT_FORMAT__FORMAT_GRAMMAR:
        r->format = DD_FORMAT_GRAMMAR;
        r->format_text = str(f->grammar);
        return 0;
    case DELTAD__V1__OUTPUT_FORMAT__FORMAT_CHOICE:
        break;
    }
    r->format = DD_FORMAT_CHOICE;
    r->n_format_choices = f->choice->n_choices;
    r->format_choices = de_arena_array(&r->arena, r->n_format_choices, sizeof *r->format_choices);
    if (!r->format_choices)
        return no_memory(st);
    for (size_t i = 0; i < r->n_format_choices; i++)
        r->format_choices[i] = str(f->choice->choices[i]);
    return r->n_format_choices ? 0 : invalid(st, "format.choice.choices", "there are none");
}

static int take_reasoning(dd_request *r, const Deltad__V1__Reasoning *g, dd_status *st)
{
    r->thinking = true;
    if (!g)
        return 0;
    if (g->mode > DELTAD__V1__REASONING__MODE__MODE_OFF || (int)g->mode < 0)
        return invalid(st, "reasoning.mode", "%d is not a mode", (int)g->mode);
    r->has_budget = g->budget_tokens_opt_case != 0;
    r->budget_tokens = g->budget_tokens;
    if (g->mode != DELTAD__V1__REASONING__MODE__MODE_UNSPECIFIED) {
        r->has_thinking = true;
        r->thinking = g->mode == DELTAD__V1__REASONING__MODE__MODE_ON;
    }
    if (g->preserve_opt_case) {
        r->has_preserve = true;
        r->preserve = g->preserve;
    }
    r->omit_reasoning = g->omit_from_output;
    return 0;
}

static int take_kwargs(dd_request *r, const char *text, dd_status *st)
{
    static const char path[] = "template_kwargs_json";
    delta_error err;
    de_json *v;
    if (!text[0])
        return 0;
    if (de_json_parse(&r->arena, text, strlen(text), &v, &err) < 0)
        return invalid(st, path, "%s", err.text);
    if (v->kind != DE_JSON_OBJECT)
        return invalid(st, path, "this is not a JSON object");
    for (const de_json *c = v->child; c; c = c->next) {
        bool b;
        bool is_thinking = strcmp(c->key, "enable_thinking") == 0;
        bool is_preserve = strcmp(c->key, "preserve_thinking") == 0;
        if (!is_thinking && !is_preserve && strcmp(c->key, "add_vision_id") != 0)
            return invalid(st, path, "the template has no \"%.64s\"", c->key);
        if (!de_json_bool(c, &b))
            return invalid(st, path, "%s is true or false", c->key);
        if (is_thinking && r->has_thinking && r->thinking != b)
            return invalid(st, path, "enable_thinking contradicts reasoning.mode");
        if (is_thinking) {
            r->has_thinking = true;
            r->thinking = b;
        } else if (is_preserve) {
            r->has_preserve = true;
            r->preserve = b;
        } else {
            r->add_vision_id = b;
        }
    }
    return 0;
}

static int take_sampling(dd_request *r, const pb_sampling *s, const Deltad__V1__Logprobs *l,
                         dd_status *st)
{
    r->sampling_in = s;
    if (l) {
        if (in_range(R_TOP_LOGPROBS, l->top, st) < 0)
            return -1;
        r->sampling.logprobs = l->enabled;
        r->sampling.top_logprobs = l->enabled ? l->top : 0;
        if (l->top && !l->enabled)
            return invalid(st, "logprobs.top", "logprobs.enabled is not set");
    }
    if (!s)
        return 0;
    if ((s->temperature_opt_case && in_range(R_TEMPERATURE, s->temperature, st) < 0) ||
        (s->top_p_opt_case && in_range(R_TOP_P, s->top_p, st) < 0) ||
        (s->min_p_opt_case && in_range(R_MIN_P, s->min_p, st) < 0) ||
        (s->presence_penalty_opt_case && in_range(R_PRESENCE, s->presence_penalty, st) < 0) ||
        (s->frequency_penalty_opt_case && in_range(R_FREQUENCY, s->frequency_penalty, st) < 0) ||
        (s->repetition_penalty_opt_case && in_range(R_REPETITION, s->repetition_penalty, st) < 0) ||
        in_range(R_N_BIAS, (double)s->n_logit_bias, st) < 0)
        return -1;
    delta_logit_bias *bias = de_arena_array(&r->arena, s->n_logit_bias, sizeof *bias);
    if (!bias)
        return no_memory(st);
    for (size_t i = 0; i < s->n_logit_bias; i++) {
        if (in_range(R_BIAS, s->logit_bias[i]->bias, st) < 0)
            return -1;
        bias[i] = (delta_logit_bias){ s->logit_bias[i]->token_id, s->logit_bias[i]->bias };
    }
    r->sampling.bias = bias;
    r->sampling.n_bias = (uint32_t)s->n_logit_bias;
    return 0;
}

static int take_stopping(dd_request *r, const pb_stopping *s, dd_status *st)
{
    if (!s)
        return 0;
    if ((s->max_tokens_opt_case && in_range(R_MAX_TOKENS, s->max_tokens, st) < 0) ||
        in_range(R_N_STOP, (double)s->n_stop, st) < 0 ||
        in_range(R_N_STOP_IDS, (double)s->n_stop_token_ids, st) < 0)
        return -1;
    delta_stop_string *strings = de_arena_array(&r->arena, s->n_stop, sizeof *strings);
    if (!strings)
        return no_memory(st);
    for (size_t i = 0; i < s->n_stop; i++) {
        strings[i] = (delta_stop_string){ s->stop[i], strlen(s->stop[i]) };
        if (in_range(R_STOP_BYTES, (double)strings[i].len, st) < 0)
            return -1;
    }
    r->stopping = (delta_stopping){
        .max_tokens = s->max_tokens_opt_case ? s->max_tokens : 0,
        .min_tokens = s->min_tokens_opt_case ? s->min_tokens : 0,
        .strings = strings,
        .n_strings = (uint32_t)s->n_stop,
        .ids = s->stop_token_ids,
        .n_ids = (uint32_t)s->n_stop_token_ids,
        .ignore_eos = s->ignore_eos,
    };
    if (r->stopping.max_tokens && r->stopping.min_tokens > r->stopping.max_tokens)
        return invalid(st, "stopping.min_tokens", "%u is more than max_tokens %u",
                       r->stopping.min_tokens, r->stopping.max_tokens);
    return 0;
}

static int take_cache(dd_request *r, const Deltad__V1__CacheControl *c, dd_status *st)
{
    if (strlen(c->salt) >= DD_SALT_BYTES)
        return invalid(st, "cache.salt", "longer than %d bytes", DD_SALT_BYTES - 1);
    if (c->n_checkpoint_messages > DD_CHECKPOINT_MESSAGES)
        return invalid(st, "cache.checkpoint_messages", "more than %d", DD_CHECKPOINT_MESSAGES);
    r->cache_salt = c->salt[0] ? c->salt : NULL;
    r->bypass_cache = c->bypass;
    r->checkpoint_messages = c->checkpoint_messages;
    r->n_checkpoint_messages = c->n_checkpoint_messages;
    return 0;
}

static int take_common(dd_request *r, const Deltad__V1__OutputFormat *format, bool has_n,
                       uint32_t n, const Deltad__V1__CacheControl *cache,
                       const Deltad__V1__Scheduling *g, const Deltad__V1__Include *include,
                       size_t n_include, dd_status *st)
{
    if (format && take_format(r, format, st) < 0)
        return -1;
    if (has_n && n == 0)
        return invalid(st, "n", "0 is not in [1, 1]");
    if (has_n && n > 1)
        return later(st, "n");
    if (cache && take_cache(r, cache, st) < 0)
        return -1;
    for (size_t i = 0; i < n_include; i++)
        switch (include[i]) {
        case DELTAD__V1__INCLUDE__INCLUDE_TOKENS:
            r->include_tokens = true;
            break;
        case DELTAD__V1__INCLUDE__INCLUDE_PREFILL:
            r->include_prefill = true;
            break;
        case DELTAD__V1__INCLUDE__INCLUDE_QUEUED:
            r->include_queued = true;
            break;
        default:
            return invalid(st, "include", "%d is not one of them", (int)include[i]);
        }
    if (r->sampling.logprobs)
        r->include_tokens = true;
    if (!g)
        return 0;
    switch (g->priority) {
    case DELTAD__V1__SCHEDULING__PRIORITY__PRIORITY_UNSPECIFIED:
    case DELTAD__V1__SCHEDULING__PRIORITY__PRIORITY_NORMAL:
        break;
    case DELTAD__V1__SCHEDULING__PRIORITY__PRIORITY_LOW:
        r->priority = -1;
        break;
    case DELTAD__V1__SCHEDULING__PRIORITY__PRIORITY_HIGH:
        r->priority = 1;
        break;
    default:
        return invalid(st, "scheduling.priority", "%d is not a priority", (int)g->priority);
    }
    if (g->max_queue_opt_case)
        r->max_queue_ns = g->max_queue_ns ? g->max_queue_ns : 1;
    if (g->max_wall_time_opt_case)
        r->max_wall_ns = g->max_wall_time_ns ? g->max_wall_time_ns : 1;
    return 0;
}

static int take_chat(dd_request *r, const pb_chat *c, dd_status *st)
{
    r->request_id = c->request_id;
    r->session_id = c->session_id;
    if (in_range(R_REQUEST_ID, (double)strlen(c->request_id), st) < 0)
        return -1;
    r->idempotency_key = c->idempotency_key;
    if (strlen(c->idempotency_key) >= DD_ID_BYTES)
        return invalid(st, "idempotency_key", "longer than %d bytes", DD_ID_BYTES - 1);
    r->detach = c->detach;
    r->one_call = c->parallel_tool_calls_opt_case && !c->parallel_tool_calls;
    if (c->expect_generation_opt_case) {
        if (!c->session_id[0])
            return invalid(st, "expect_generation", "there is no session_id");
        r->has_expect = true;
        r->expect_generation = c->expect_generation;
    }
    if (take_messages(r, c->messages, c->n_messages, false, st) < 0 ||
        take_tools(r, c->tools, c->n_tools, st) < 0 ||
        take_tool_choice(r, c->tool_choice, st) < 0 || take_reasoning(r, c->reasoning, st) < 0 ||
        take_kwargs(r, c->template_kwargs_json, st) < 0 ||
        take_sampling(r, c->sampling, c->logprobs, st) < 0 ||
        take_stopping(r, c->stopping, st) < 0 ||
        take_common(r, c->format, c->n_opt_case != 0, c->n, c->cache, c->scheduling, c->include,
                    c->n_include, st) < 0)
        return -1;
    if (!c->session_id[0] && c->n_messages == 0)
        return invalid(st, "messages", "there are none");
    return 0;
}

static int take_generate(dd_request *r, const Deltad__V1__GenerateRequest *g, dd_status *st)
{
    r->request_id = g->request_id;
    r->plain_text = g->plain_text;
    if (in_range(R_REQUEST_ID, (double)strlen(g->request_id), st) < 0 ||
        take_sampling(r, g->sampling, g->logprobs, st) < 0 ||
        take_stopping(r, g->stopping, st) < 0 ||
        take_common(r, g->format, g->n_opt_case != 0, g->n, g->cache, g->scheduling, g->include,
                    g->n_include, st) < 0)
        return -1;
    if (g->prompt_case == DELTAD__V1__GENERATE_REQUEST__PROMPT_TEXT) {
        r->has_text = true;
        r->text = str(g->text);
    } else if (g->prompt_case == DELTAD__V1__GENERATE_REQUEST__PROMPT_IDS) {
        r->ids = g->ids->ids;
        r->n_ids = g->ids->n_ids;
    }
    if (r->has_text ? r->text.len == 0 : r->n_ids == 0)
        return invalid(st, "prompt", "it is empty");
    return 0;
}

static int take_parse(dd_request *r, const Deltad__V1__ParseOutputRequest *p, dd_status *st)
{
    r->chunks = de_arena_array(&r->arena, p->n_chunks, sizeof *r->chunks);
    if (!r->chunks)
        return no_memory(st);
    r->n_chunks = p->n_chunks;
    for (size_t i = 0; i < p->n_chunks; i++)
        r->chunks[i] = (dd_bytes){ p->chunks[i].data, p->chunks[i].len };
    if (take_tools(r, p->tools, p->n_tools, st) < 0 || take_tool_choice(r, p->tool_choice, st) < 0)
        return -1;
    r->thinking = p->thinking;
    r->cut = p->cut;
    return 0;
}

static int take_create(dd_request *r, const Deltad__V1__CreateSessionRequest *c, dd_status *st)
{
    r->name = c->name;
    if (in_range(R_NAME, (double)strlen(c->name), st) < 0)
        return -1;
    if (c->ctx_tokens_opt_case) {
        if (in_range(R_CTX_TOKENS, c->ctx_tokens, st) < 0)
            return -1;
        r->ctx_tokens = c->ctx_tokens;
    }
    if (c->idle_timeout_opt_case) {
        r->has_idle_timeout = true;
        r->idle_timeout_ns = c->idle_timeout_ns;
    }
    if (take_reasoning(r, c->reasoning, st) < 0 || take_tools(r, c->tools, c->n_tools, st) < 0 ||
        take_messages(r, c->messages, c->n_messages, true, st) < 0)
        return -1;
    return 0;
}

static const ProtobufCMessageDescriptor *descriptor(enum dd_request_kind kind)
{
    switch (kind) {
    case DD_REQ_CHAT:
        return &deltad__v1__chat_request__descriptor;
    case DD_REQ_GENERATE:
        return &deltad__v1__generate_request__descriptor;
    case DD_REQ_CANCEL:
        return &deltad__v1__cancel_request__descriptor;
    case DD_REQ_RENDER:
        return &deltad__v1__render_prompt_request__descriptor;
    case DD_REQ_PARSE:
        return &deltad__v1__parse_output_request__descriptor;
    case DD_REQ_TOKENIZE:
        return &deltad__v1__tokenize_request__descriptor;
    case DD_REQ_DETOKENIZE:
        return &deltad__v1__detokenize_request__descriptor;
    case DD_REQ_CREATE:
        return &deltad__v1__create_session_request__descriptor;
    case DD_REQ_GET:
        return &deltad__v1__get_session_request__descriptor;
    case DD_REQ_LIST:
        return &deltad__v1__list_sessions_request__descriptor;
    case DD_REQ_CLOSE:
        return &deltad__v1__close_session_request__descriptor;
    case DD_REQ_APPEND:
        return &deltad__v1__append_messages_request__descriptor;
    case DD_REQ_FORK:
        return &deltad__v1__fork_session_request__descriptor;
    case DD_REQ_RESUME:
        return &deltad__v1__resume_request__descriptor;
    case DD_REQ_REWIND:
        return &deltad__v1__rewind_session_request__descriptor;
    case DD_REQ_PIN:
        return &deltad__v1__pin_session_request__descriptor;
    case DD_REQ_EXPORT:
        return &deltad__v1__export_session_request__descriptor;
    case DD_REQ_SAVE:
        return &deltad__v1__save_session_request__descriptor;
    case DD_REQ_RESTORE:
        return &deltad__v1__restore_session_request__descriptor;
    case DD_REQ_SAVES:
        return &deltad__v1__list_saves_request__descriptor;
    case DD_REQ_DELETE_SAVE:
        return &deltad__v1__delete_save_request__descriptor;
    case DD_REQ_INFO:
        return &deltad__v1__get_model_info_request__descriptor;
    case DD_REQ_STATS:
        return &deltad__v1__get_stats_request__descriptor;
    }
    return NULL;
}

/* It becomes a file's: letters that mean nothing to a file system. */
static int take_save_name(dd_request *r, const char *name, dd_status *st)
{
    const size_t n = strlen(name);
    r->name = name;
    if (n == 0 || n > DD_SAVE_NAME || name[0] == '.' ||
        strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") != n)
        return invalid(st, "name", "it is not 1 to %d of [A-Za-z0-9._-], or begins with a dot",
                       DD_SAVE_NAME);
    return 0;
}

static int take(enum dd_request_kind kind, dd_request *r, const ProtobufCMessage *m, dd_status *st)
{
    switch (kind) {
    case DD_REQ_CHAT:
        return take_chat(r, (const pb_chat *)m, st);
    case DD_REQ_GENERATE:
        return take_generate(r, (const void *)m, st);
    case DD_REQ_CANCEL:
        r->request_id = ((const Deltad__V1__CancelRequest *)m)->request_id;
        return r->request_id[0] ? 0 : invalid(st, "request_id", "it is empty");
    case DD_REQ_RENDER: {
        const Deltad__V1__RenderPromptRequest *q = (const void *)m;
        r->omit_ids = q->omit_ids;
        return q->chat ? take_chat(r, q->chat, st) : invalid(st, "chat", "it is missing");
    }
    case DD_REQ_PARSE:
        return take_parse(r, (const void *)m, st);
    case DD_REQ_TOKENIZE: {
        const Deltad__V1__TokenizeRequest *q = (const void *)m;
        r->text = str(q->text);
        r->plain_text = q->plain_text;
        r->with_bytes = q->with_bytes;
        return 0;
    }
    case DD_REQ_DETOKENIZE: {
        const Deltad__V1__DetokenizeRequest *q = (const void *)m;
        r->ids = q->ids;
        r->n_ids = q->n_ids;
        r->skip_special = q->skip_special;
        return 0;
    }
    case DD_REQ_CREATE:
        return take_create(r, (const void *)m, st);
    case DD_REQ_GET: {
        const Deltad__V1__GetSessionRequest *q = (const void *)m;
        r->session_id = q->session_id;
        r->with_messages = q->with_messages;
        return 0;
    }
    case DD_REQ_LIST:
        r->all_users = ((const Deltad__V1__ListSessionsRequest *)m)->all_users;
        return 0;
    case DD_REQ_CLOSE:
        r->session_id = ((const Deltad__V1__CloseSessionRequest *)m)->session_id;
        return 0;
    case DD_REQ_APPEND: {
        const Deltad__V1__AppendMessagesRequest *q = (const void *)m;
        r->session_id = q->session_id;
        r->has_expect = q->expect_generation_opt_case != 0;
        r->expect_generation = r->has_expect ? q->expect_generation : 0;
        if (q->n_messages == 0)
            return invalid(st, "messages", "there are none");
        if (!q->session_id[0])
            return invalid(st, "session_id", "it is empty");
        return take_messages(r, q->messages, q->n_messages, false, st);
    }
    case DD_REQ_FORK: {
        const Deltad__V1__ForkSessionRequest *q = (const void *)m;
        r->session_id = q->session_id;
        r->name = q->name;
        r->count = q->count ? q->count : 1;
        r->keep_messages = q->n_messages_opt_case ? q->n_messages : UINT32_MAX;
        r->has_expect = q->expect_generation_opt_case != 0;
        r->expect_generation = r->has_expect ? q->expect_generation : 0;
        if (r->count > DD_FORKS)
            return invalid(st, "count", "%u is not in [0, %d]", r->count, DD_FORKS);
        return 0;
    }
    case DD_REQ_RESUME: {
        const Deltad__V1__ResumeRequest *q = (const void *)m;
        r->request_id = q->request_id;
        r->from_seq = q->from_seq;
        return r->request_id[0] ? 0 : invalid(st, "request_id", "it is empty");
    }
    case DD_REQ_REWIND: {
        const Deltad__V1__RewindSessionRequest *q = (const void *)m;
        r->session_id = q->session_id;
        r->keep_messages = q->n_messages;
        r->has_expect = q->expect_generation_opt_case != 0;
        r->expect_generation = r->has_expect ? q->expect_generation : 0;
        return 0;
    }
    case DD_REQ_PIN: {
        const Deltad__V1__PinSessionRequest *q = (const void *)m;
        r->session_id = q->session_id;
        r->unpin = q->unpin;
        return 0;
    }
    case DD_REQ_EXPORT: {
        const Deltad__V1__ExportSessionRequest *q = (const void *)m;
        r->session_id = q->session_id;
        r->with_sampled = q->with_sampled;
        return 0;
    }
    case DD_REQ_SAVE: {
        const Deltad__V1__SaveSessionRequest *q = (const void *)m;
        r->session_id = q->session_id;
        return take_save_name(r, q->name, st);
    }
    case DD_REQ_RESTORE:
        return take_save_name(r, ((const Deltad__V1__RestoreSessionRequest *)m)->name, st);
    case DD_REQ_DELETE_SAVE:
        return take_save_name(r, ((const Deltad__V1__DeleteSaveRequest *)m)->name, st);
    case DD_REQ_SAVES:
    case DD_REQ_INFO:
    case DD_REQ_STATS:
        return 0;
    }
    return -1;
}

int dd_request_decode(enum dd_request_kind kind, const uint8_t *msg, size_t len, dd_request *ret_r,
                      dd_status *st)
{
    memset(ret_r, 0, sizeof *ret_r);
    ret_r->request_id = ret_r->session_id = ret_r->name = ret_r->idempotency_key = "";
    const ProtobufCMessage *m = dd_wire_unpack(descriptor(kind), &ret_r->arena, msg, len, st);
    return m ? take(kind, ret_r, m, st) : -1;
}

int dd_request_sampling(dd_request *r, const delta_engine_info *info, dd_status *st)
{
    const pb_sampling *s = r->sampling_in;
    delta_sampling d = r->thinking ? info->sampling_thinking : info->sampling_plain;
    d.bias = r->sampling.bias;
    d.n_bias = r->sampling.n_bias;
    d.logprobs = r->sampling.logprobs;
    d.top_logprobs = r->sampling.top_logprobs;
    if (s) {
        d.temperature = s->temperature_opt_case ? s->temperature : d.temperature;
        d.top_k = s->top_k_opt_case ? s->top_k : d.top_k;
        d.top_p = s->top_p_opt_case ? s->top_p : d.top_p;
        d.min_p = s->min_p_opt_case ? s->min_p : d.min_p;
        d.presence_penalty =
            s->presence_penalty_opt_case ? s->presence_penalty : d.presence_penalty;
        d.frequency_penalty =
            s->frequency_penalty_opt_case ? s->frequency_penalty : d.frequency_penalty;
        d.repetition_penalty =
            s->repetition_penalty_opt_case ? s->repetition_penalty : d.repetition_penalty;
    }
    if (s && s->seed_opt_case)
        d.seed = s->seed;
    else if (getrandom(&d.seed, sizeof d.seed, 0) != (ssize_t)sizeof d.seed) {
        dd_status_set(st, DD_INTERNAL, "INTERNAL", "no random numbers: %s", strerror(errno));
        return -1;
    }
    r->sampling = d;
    for (uint32_t i = 0; i < d.n_bias; i++)
        if (d.bias[i].token >= info->n_vocab)
            return invalid(st, "sampling.logit_bias.token_id", "%u is not below %u",
                           d.bias[i].token, info->n_vocab);
    for (uint32_t i = 0; i < r->stopping.n_ids; i++)
        if (r->stopping.ids[i] >= info->n_vocab)
            return invalid(st, "stopping.stop_token_ids", "%u is not below %u", r->stopping.ids[i],
                           info->n_vocab);
    for (size_t i = 0; i < r->n_ids; i++)
        if (r->ids[i] >= info->n_vocab)
            return invalid(st, "ids.ids", "%u is not below %u", r->ids[i], info->n_vocab);
    return 0;
}

void dd_request_done(dd_request *r)
{
    de_arena_done(&r->arena);
}

int dd_codec_message(dd_request *r, dd_bytes packed, delta_message *ret_m, dd_status *st)
{
    const pb_message *m = (const void *)dd_wire_unpack_own(&deltad__v1__message__descriptor,
                                                           &r->arena, packed.data, packed.len);
    return m ? take_message(&r->arena, m, "messages", ret_m, st) : no_memory(st);
}

int dd_codec_tool(dd_request *r, dd_bytes packed, delta_str *ret_json, bool *ret_strict,
                  dd_status *st)
{
    const pb_tool *t = (const void *)dd_wire_unpack_own(&deltad__v1__tool__descriptor, &r->arena,
                                                        packed.data, packed.len);
    return t ? take_tool(&r->arena, t, "tools", ret_json, ret_strict, st) : no_memory(st);
}

/* ---- to the wire */

static uint8_t *pack(const ProtobufCMessage *m, size_t *ret_len)
{
    size_t len = protobuf_c_message_get_packed_size(m);
    uint8_t *p = malloc(len ? len : 1);
    if (!p)
        return NULL;
    (void)protobuf_c_message_pack(m, p);
    *ret_len = len;
    return p;
}

static void put_sub(dd_wire_out *o, uint32_t field, const ProtobufCMessage *m)
{
    size_t len = 0;
    uint8_t *p = pack(m, &len);
    if (p)
        dd_wire_put_bytes(o, field, p, len);
    else
        o->failed = true;
    free(p);
}

/* Text that need not end in NUL goes by the writer; protobuf-c wants C strings. */
static void put_text(dd_wire_out *o, uint32_t field, uint32_t text_field, uint32_t index,
                     delta_str text)
{
    dd_wire_out inner = { 0 };
    if (index)
        dd_wire_put_varint(&inner, 1, index);
    dd_wire_put_bytes(&inner, text_field, text.p, text.len);
    dd_wire_put_bytes(o, field, inner.data, inner.len);
    o->failed = o->failed || inner.failed;
    free(inner.data);
}

uint8_t *dd_call_end_encode(const dd_event *e, size_t *ret_len)
{
    dd_wire_out o = { 0 };
    if (e->index)
        dd_wire_put_varint(&o, 1, e->index);
    dd_wire_put_varint(&o, 2,
                       e->complete ? DELTAD__V1__TOOL_CALL_END__STATE__STATE_COMPLETE
                                   : DELTAD__V1__TOOL_CALL_END__STATE__STATE_INCOMPLETE);
    dd_wire_put_bytes(&o, 3, e->id, strlen(e->id));
    dd_wire_put_bytes(&o, 4, e->name, strlen(e->name));
    dd_wire_put_bytes(&o, 5, e->text.p, e->text.len);
    return dd_wire_take(&o, ret_len);
}

static Deltad__V1__EffectiveSampling effective(const delta_sampling *s, uint32_t max_tokens,
                                               bool thinking)
{
    Deltad__V1__EffectiveSampling x = DELTAD__V1__EFFECTIVE_SAMPLING__INIT;
    x.temperature = s->temperature;
    x.top_k = s->top_k;
    x.top_p = s->top_p;
    x.min_p = s->min_p;
    x.presence_penalty = s->presence_penalty;
    x.frequency_penalty = s->frequency_penalty;
    x.repetition_penalty = s->repetition_penalty;
    x.seed = s->seed;
    x.max_tokens = max_tokens;
    x.thinking = thinking;
    return x;
}

static void put_accepted(dd_wire_out *o, const dd_event *e)
{
    Deltad__V1__Accepted a = DELTAD__V1__ACCEPTED__INIT;
    Deltad__V1__EffectiveSampling x = effective(e->sampling, e->max_tokens, e->thinking);
    a.request_id = (char *)e->request_id;
    a.session_id = (char *)e->session_id;
    a.generation = e->generation;
    a.sampling = &x;
    a.prompt_tokens = e->usage.prompt;
    put_sub(o, DELTAD__V1__CHAT_EVENT__EVENT_ACCEPTED, &a.base);
}

static Deltad__V1__Usage usage_of(const dd_usage *u)
{
    Deltad__V1__Usage x = DELTAD__V1__USAGE__INIT;
    x.prompt_tokens = u->prompt;
    x.cached_tokens = u->cached;
    x.completion_tokens = u->completion;
    x.reasoning_tokens = u->reasoning;
    x.cache_note = (char *)u->note;
    return x;
}

static void put_finished(dd_wire_out *o, uint32_t field, const dd_event *e)
{
    Deltad__V1__Finished f = DELTAD__V1__FINISHED__INIT;
    Deltad__V1__Usage u = usage_of(&e->usage);
    Deltad__V1__Timings t = DELTAD__V1__TIMINGS__INIT;
    t.queue_ns = e->queue_ns;
    t.prefill_ns = e->prefill_ns;
    t.decode_ns = e->decode_ns;
    t.first_token_ns = e->first_token_ns;
    t.total_ns = e->total_ns;
    f.reason = (Deltad__V1__FinishReason)e->reason;
    if (e->matched_stop)
        f.matched_stop = (char *)e->matched_stop;
    if (e->has_stop_token) {
        f.matched_stop_token_opt_case =
            DELTAD__V1__FINISHED__MATCHED_STOP_TOKEN_OPT_MATCHED_STOP_TOKEN;
        f.matched_stop_token = e->stop_token;
    }
    f.usage = &u;
    f.timings = &t;
    f.seed = e->sampling->seed;
    f.generation = e->generation;
    put_sub(o, field, &f.base);
}

static ProtobufCBinaryData bytes_of(const delta_tokenizer *t, uint32_t id)
{
    size_t len = 0;
    const uint8_t *p = delta_token_bytes(t, id, &len);
    return (ProtobufCBinaryData){ p ? len : 0, (uint8_t *)p };
}

static void put_token(dd_wire_out *o, uint32_t field, const dd_event *e)
{
    Deltad__V1__TokenDelta d = DELTAD__V1__TOKEN_DELTA__INIT;
    Deltad__V1__TokenInfo i = DELTAD__V1__TOKEN_INFO__INIT, *infos[] = { &i };
    Deltad__V1__TopLogprob tops[DELTA_MAX_TOP_LOGPROBS], *list[DELTA_MAX_TOP_LOGPROBS];
    uint32_t n = e->n_top < DELTA_MAX_TOP_LOGPROBS ? e->n_top : DELTA_MAX_TOP_LOGPROBS;
    for (uint32_t k = 0; k < n; k++) {
        tops[k] = (Deltad__V1__TopLogprob)DELTAD__V1__TOP_LOGPROB__INIT;
        tops[k].token_id = e->top[k].id;
        tops[k].logprob = e->top[k].logprob;
        tops[k].token = bytes_of(e->tokenizer, e->top[k].id);
        list[k] = &tops[k];
    }
    i.token_id = e->token;
    i.token = bytes_of(e->tokenizer, e->token);
    i.logprob = isnan(e->logprob) ? 0 : e->logprob;
    i.top = list;
    i.n_top = n;
    d.tokens = infos;
    d.n_tokens = 1;
    put_sub(o, field, &d.base);
}

uint8_t *dd_event_encode(bool chat, uint64_t seq, const dd_event *e, size_t *ret_len)
{
    dd_wire_out o = { 0 };
    dd_wire_put_varint(&o, 1, seq);
    switch (e->kind) {
    case DD_EVENT_ACCEPTED:
        put_accepted(&o, e);
        break;
    case DD_EVENT_QUEUED: {
        Deltad__V1__Queued q = DELTAD__V1__QUEUED__INIT;
        q.position = e->done;
        put_sub(&o, DELTAD__V1__CHAT_EVENT__EVENT_QUEUED, &q.base);
        break;
    }
    case DD_EVENT_PREFILL: {
        Deltad__V1__Prefill p = DELTAD__V1__PREFILL__INIT;
        p.done = e->done;
        p.total = e->total;
        p.cached = e->cached;
        put_sub(&o, DELTAD__V1__CHAT_EVENT__EVENT_PREFILL, &p.base);
        break;
    }
    case DD_EVENT_REASONING:
        put_text(&o, DELTAD__V1__CHAT_EVENT__EVENT_REASONING, 1, 0, e->text);
        break;
    case DD_EVENT_TEXT:
        put_text(&o,
                 chat ? (uint32_t)DELTAD__V1__CHAT_EVENT__EVENT_TEXT
                      : (uint32_t)DELTAD__V1__GENERATE_EVENT__EVENT_TEXT,
                 1, 0, e->text);
        break;
    case DD_EVENT_CALL_START: {
        Deltad__V1__ToolCallStart c = DELTAD__V1__TOOL_CALL_START__INIT;
        c.index = e->index;
        c.id = (char *)e->id;
        c.name = (char *)e->name;
        put_sub(&o, DELTAD__V1__CHAT_EVENT__EVENT_CALL_START, &c.base);
        break;
    }
    case DD_EVENT_CALL_ARGS:
        put_text(&o, DELTAD__V1__CHAT_EVENT__EVENT_CALL_ARGS, 2, e->index, e->text);
        break;
    case DD_EVENT_CALL_END: {
        size_t len = 0;
        uint8_t *p = dd_call_end_encode(e, &len);
        if (p)
            dd_wire_put_bytes(&o, DELTAD__V1__CHAT_EVENT__EVENT_CALL_END, p, len);
        else
            o.failed = true;
        free(p);
        break;
    }
    case DD_EVENT_TOKEN:
        put_token(&o,
                  chat ? (uint32_t)DELTAD__V1__CHAT_EVENT__EVENT_TOKENS
                       : (uint32_t)DELTAD__V1__GENERATE_EVENT__EVENT_TOKENS,
                  e);
        break;
    case DD_EVENT_FINISHED:
        put_finished(&o,
                     chat ? (uint32_t)DELTAD__V1__CHAT_EVENT__EVENT_FINISHED
                          : (uint32_t)DELTAD__V1__GENERATE_EVENT__EVENT_FINISHED,
                     e);
        break;
    }
    return dd_wire_take(&o, ret_len);
}

uint8_t *dd_session_encode(const dd_session_view *v, size_t *ret_len)
{
    Deltad__V1__Session s = DELTAD__V1__SESSION__INIT;
    s.id = (char *)v->id;
    s.name = (char *)v->name;
    s.generation = v->generation;
    s.n_messages = v->n_messages;
    s.n_tokens = v->n_tokens;
    s.ctx_tokens = v->ctx_tokens;
    s.busy = v->busy;
    s.parked = v->parked;
    s.pinned = v->pinned;
    s.owner_uid = v->owner_uid;
    s.age_ns = v->age_ns;
    s.idle_ns = v->idle_ns;
    s.idle_timeout_ns = v->idle_timeout_ns;
    return pack(&s.base, ret_len);
}

uint8_t *dd_save_encode(const char *name, uint64_t bytes, uint64_t age_ns, size_t *ret_len)
{
    Deltad__V1__Save s = DELTAD__V1__SAVE__INIT;
    s.name = (char *)name;
    s.bytes = bytes;
    s.age_ns = age_ns;
    return pack(&s.base, ret_len);
}

/* A packed message, which is taken over, and behind it x's tools and messages, packed already, and its answers as they were sampled:
 * fields `first` and the two that follow. */
static uint8_t *with_conversation(uint8_t *head, size_t len, const dd_saved *x, uint32_t first,
                                  bool with_sampled, size_t *ret_len)
{
    dd_wire_out o = { .data = head, .len = len, .size = len };
    for (size_t i = 0; i < x->n_tools; i++)
        dd_wire_put_bytes(&o, first, x->tools[i].data, x->tools[i].len);
    for (size_t i = 0; i < x->n_messages; i++)
        dd_wire_put_bytes(&o, first + 1, x->messages[i].data, x->messages[i].len);
    for (size_t i = 0; with_sampled && i < x->n_messages; i++) {
        const dd_sampled *from = &x->sampled[i];
        Deltad__V1__SampledAnswer y = DELTAD__V1__SAMPLED_ANSWER__INIT;
        if (!from->text.len)
            continue;
        y.message = (uint32_t)i;
        y.text = (ProtobufCBinaryData){ from->text.len, (uint8_t *)from->text.p };
        y.token_ids = (uint32_t *)from->ids;
        y.n_token_ids = from->n_ids;
        y.thinking = from->thought;
        uint8_t *p = pack(&y.base, &len);
        if (p)
            dd_wire_put_bytes(&o, first + 2, p, len);
        o.failed = o.failed || !p;
        free(p);
    }
    return dd_wire_take(&o, ret_len);
}

uint8_t *dd_saved_encode(const dd_saved *x, size_t *ret_len)
{
    Deltad__V1__SavedSession s = DELTAD__V1__SAVED_SESSION__INIT;
    s.model = (char *)x->model;
    s.id = (char *)x->id;
    s.name = (char *)x->name;
    s.generation = x->generation;
    s.owner_is_unix = x->owner_is_unix;
    s.owner_uid = x->owner_uid;
    s.owner_address =
        (ProtobufCBinaryData){ x->owner_address.len, (uint8_t *)x->owner_address.data };
    s.idle_timeout_ns = x->idle_timeout_ns;
    s.thinking = x->thinking;
    s.omit_reasoning = x->omit_reasoning;
    s.preserve_reasoning = x->preserve;
    s.ctx_tokens = x->ctx_tokens;
    s.pinned = x->pinned;
    size_t len = 0;
    uint8_t *head = pack(&s.base, &len);
    if (!head)
        return NULL;
    return with_conversation(head, len, x, 13, true, ret_len);
}

uint8_t *dd_export_encode(const dd_saved *x, bool with_sampled, size_t *ret_len)
{
    Deltad__V1__SessionExport s = DELTAD__V1__SESSION_EXPORT__INIT;
    Deltad__V1__Reasoning reasoning = DELTAD__V1__REASONING__INIT;
    s.model = (char *)x->model;
    s.name = (char *)x->name;
    s.generation = x->generation;
    s.reasoning = &reasoning;
    reasoning.mode =
        x->thinking ? DELTAD__V1__REASONING__MODE__MODE_ON : DELTAD__V1__REASONING__MODE__MODE_OFF;
    reasoning.preserve_opt_case = DELTAD__V1__REASONING__PRESERVE_OPT_PRESERVE;
    reasoning.preserve = x->preserve;
    reasoning.omit_from_output = x->omit_reasoning;
    size_t len = 0;
    uint8_t *head = pack(&s.base, &len);
    if (!head)
        return NULL;
    return with_conversation(head, len, x, 5, with_sampled, ret_len);
}

uint8_t *dd_export_piece_encode(const uint8_t *bytes, size_t len, size_t *ret_len)
{
    dd_wire_out o = { 0 };
    dd_wire_put_bytes(&o, 1, bytes, len);
    return dd_wire_take(&o, ret_len);
}

/* The packed bytes of n messages, in the arena. */
static dd_bytes *packed_again(de_arena *a, ProtobufCMessage *const *m, size_t n)
{
    dd_bytes *list = de_arena_array(a, n + 1, sizeof *list);
    for (size_t i = 0; list && i < n; i++) {
        const size_t len = protobuf_c_message_get_packed_size(m[i]);
        a->limit += len + 64;
        uint8_t *p = de_arena_array(a, len + 1, 1);
        if (!p)
            return NULL;
        (void)protobuf_c_message_pack(m[i], p);
        list[i] = (dd_bytes){ p, len };
    }
    return list;
}

int dd_saved_decode(const uint8_t *bytes, size_t len, de_arena *a, dd_saved *ret_x, dd_status *st)
{
    const Deltad__V1__SavedSession *s =
        (const void *)dd_wire_unpack(&deltad__v1__saved_session__descriptor, a, bytes, len, st);
    if (!s)
        return -1;
    a->limit += (s->n_messages + s->n_tools + 2) * (sizeof(dd_bytes) + sizeof(dd_sampled)) + 256;
    dd_sampled *sampled = de_arena_array(a, s->n_messages + 1, sizeof *sampled);
    *ret_x = (dd_saved){
        .model = s->model,
        .id = s->id,
        .name = s->name,
        .generation = s->generation,
        .idle_timeout_ns = s->idle_timeout_ns,
        .owner_is_unix = s->owner_is_unix,
        .owner_uid = s->owner_uid,
        .owner_address = { s->owner_address.data, s->owner_address.len },
        .thinking = s->thinking,
        .omit_reasoning = s->omit_reasoning,
        .preserve = s->preserve_reasoning,
        .ctx_tokens = s->ctx_tokens,
        .pinned = s->pinned,
        .tools = packed_again(a, (ProtobufCMessage *const *)s->tools, s->n_tools),
        .messages = packed_again(a, (ProtobufCMessage *const *)s->messages, s->n_messages),
        .n_tools = s->n_tools,
        .n_messages = s->n_messages,
        .sampled = sampled,
    };
    if (!sampled || !ret_x->tools || !ret_x->messages)
        return no_memory(st);
    memset(sampled, 0, (s->n_messages + 1) * sizeof *sampled);
    for (size_t i = 0; i < s->n_sampled; i++) {
        const Deltad__V1__SampledAnswer *y = s->sampled[i];
        if (y->message >= s->n_messages)
            return invalid(st, "sampled.message", "%u of %zu", y->message, s->n_messages);
        if (!y->text.len)
            return invalid(st, "sampled.text", "it is empty");
        sampled[y->message] = (dd_sampled){ .text = { (char *)y->text.data, y->text.len },
                                            .ids = y->token_ids,
                                            .n_ids = y->n_token_ids,
                                            .thought = y->thinking };
    }
    return 0;
}

uint8_t *dd_usage_encode(const dd_usage *u, size_t *ret_len)
{
    Deltad__V1__Usage x = usage_of(u);
    return pack(&x.base, ret_len);
}

uint8_t *dd_info_encode(const delta_engine_info *i, size_t *ret_len)
{
    Deltad__V1__GetModelInfoResponse r = DELTAD__V1__GET_MODEL_INFO_RESPONSE__INIT;
    Deltad__V1__EffectiveSampling thinking = effective(&i->sampling_thinking, 0, true);
    Deltad__V1__EffectiveSampling plain = effective(&i->sampling_plain, 0, false);
    r.name = (char *)i->model_name;
    r.backend = (char *)i->backend;
    r.quantization = (char *)i->quantization;
    r.version = (char *)DELTA_VERSION;
    r.n_parameters = i->n_parameters;
    r.n_layers = i->n_layers;
    r.n_gdn_layers = i->n_gdn_layers;
    r.n_attention_layers = i->n_attn_layers;
    r.hidden = i->hidden;
    r.n_experts = i->n_experts;
    r.n_experts_per_token = i->n_experts_per_token;
    r.n_vocab = i->n_vocab;
    r.n_tokens = i->n_tokens;
    r.ctx_max = i->ctx_max;
    r.max_sessions = i->max_sessions;
    r.checkpoints = i->checkpoints;
    r.eos_token_ids = (uint32_t *)i->eos_ids;
    r.n_eos_token_ids = i->n_eos_ids;
    r.template_sha256 = (char *)i->template_sha256;
    r.template_known = i->template_known;
    r.has_vision = i->has_vision;
    r.has_mtp = i->has_mtp;
    r.weights_bytes = i->weights_bytes;
    r.kv_bytes = i->kv_bytes;
    r.state_bytes = i->state_bytes;
    r.workspace_bytes = i->workspace_bytes;
    r.load_ns = i->load_ns;
    r.sampling_thinking = &thinking;
    r.sampling_plain = &plain;
    return pack(&r.base, ret_len);
}

uint8_t *dd_stats_encode(const dd_stats *s, size_t *ret_len)
{
    Deltad__V1__GetStatsResponse r = DELTAD__V1__GET_STATS_RESPONSE__INIT;
    Deltad__V1__Counter counters[DELTA_REPAIR_N], *list[DELTA_REPAIR_N];
    for (int i = 0; i < DELTA_REPAIR_N; i++) {
        counters[i] = (Deltad__V1__Counter)DELTAD__V1__COUNTER__INIT;
        counters[i].name = (char *)delta_repair_name((enum delta_repair)i);
        counters[i].value = s->repairs[i];
        list[i] = &counters[i];
    }
    r.uptime_ns = s->uptime_ns;
    r.requests_total = s->requests_total;
    r.requests_running = s->running;
    r.requests_queued = s->queued;
    r.requests_cancelled = s->cancelled;
    r.requests_failed = s->failed;
    r.prompt_tokens_total = s->prompt_tokens;
    r.completion_tokens_total = s->completion_tokens;
    r.steps_total = s->engine.steps;
    r.step_ns_total = s->engine.step_ns;
    r.preemptions_total = s->engine.preemptions;
    r.sessions_open = s->sessions;
    r.slots_used = s->engine.sessions_used;
    r.slots_total = s->engine.sessions_max;
    r.pages_used = s->engine.pages_used;
    r.pages_total = s->engine.pages_total;
    r.connections = s->connections;
    r.connections_total = s->connections_total;
    r.repairs = list;
    r.n_repairs = DELTA_REPAIR_N;
    r.phase = (Deltad__V1__GetStatsResponse__Phase)s->phase;
    Deltad__V1__GrammarStats g = DELTAD__V1__GRAMMAR_STATS__INIT;
    g.compiled = s->grammars.compiled;
    g.found = s->grammars.found;
    g.refused = s->grammars.refused;
    g.compile_ns = s->grammars.compile_ns;
    g.kept = s->grammars.kept;
    g.kept_bytes = s->grammars.kept_bytes;
    g.masks = s->grammars.masks;
    g.masks_found = s->grammars.masks_cached;
    r.grammars = &g;
    Deltad__V1__CacheStats c = DELTAD__V1__CACHE_STATS__INIT;
    c.checkpoints = s->engine.checkpoints;
    c.checkpoints_max = s->engine.checkpoints_max;
    c.pages = s->engine.pages_cached;
    c.lookups = s->engine.cache_finds;
    c.hits = s->engine.cache_hits;
    c.tokens_found = s->engine.cache_tokens;
    c.tokens_computed = s->engine.prefill_tokens;
    c.evictions = s->engine.cache_evictions;
    c.moves = s->engine.cache_moves;
    c.host_pages = s->engine.host_pages;
    c.host_pages_total = s->engine.host_pages_total;
    c.host_checkpoints = s->engine.host_checkpoints;
    c.host_checkpoints_max = s->engine.host_checkpoints_max;
    c.disk_checkpoints = s->engine.disk_checkpoints;
    c.disk_bytes = s->engine.disk_bytes;
    c.disk_bytes_max = s->engine.disk_bytes_max;
    c.disk_writes = s->engine.disk_writes;
    c.disk_reads = s->engine.disk_reads;
    c.disk_evictions = s->engine.disk_evictions;
    c.disk_waiting = s->engine.disk_waiting;
    c.disk_is_writing = s->engine.disk_is_writing;
    r.cache = &c;
    return pack(&r.base, ret_len);
}

uint8_t *dd_answer_encode(bool has_reasoning, delta_str reasoning, delta_str content,
                          const dd_event *calls, size_t n_calls, size_t *ret_len)
{
    dd_wire_out o = { 0 };
    dd_wire_put_varint(&o, 1, DELTAD__V1__ROLE__ROLE_ASSISTANT);
    if (content.len)
        put_text(&o, 2, 1, 0, content);
    for (size_t i = 0; i < n_calls; i++) {
        dd_wire_out c = { 0 };
        dd_wire_put_bytes(&c, 1, calls[i].id, strlen(calls[i].id));
        dd_wire_put_bytes(&c, 2, calls[i].name, strlen(calls[i].name));
        dd_wire_put_bytes(&c, 3, calls[i].text.p, calls[i].text.len);
        dd_wire_put_bytes(&o, 3, c.data, c.len);
        o.failed = o.failed || c.failed;
        free(c.data);
    }
    if (has_reasoning)
        dd_wire_put_bytes(&o, 6, reasoning.p, reasoning.len);
    return dd_wire_take(&o, ret_len);
}

uint8_t *dd_render_encode(const delta_rendered *r, size_t n_spans, const uint32_t *ids,
                          size_t n_ids, bool omit_ids, size_t *ret_len)
{
    dd_wire_out o = { 0 };
    Deltad__V1__RenderPromptResponse m = DELTAD__V1__RENDER_PROMPT_RESPONSE__INIT;
    size_t len = 0;
    dd_wire_put_bytes(&o, 1, r->text, r->len); /* a NUL would end it in m */
    m.ids = (uint32_t *)ids;
    m.n_ids = omit_ids ? 0 : n_ids;
    m.n_tokens = (uint32_t)n_ids;
    uint8_t *p = pack(&m.base, &len);
    if (!p)
        return NULL;
    for (size_t i = 0; i < n_spans; i++) {
        Deltad__V1__MessageSpan s = DELTAD__V1__MESSAGE_SPAN__INIT;
        s.begin = r->messages[i].begin;
        s.end = r->messages[i].end;
        put_sub(&o, 3, &s.base);
    }
    /* Encoded messages put one behind the other are merged. */
    uint8_t *both = o.failed ? NULL : malloc(len + o.len + 1);
    if (both) {
        memcpy(both, p, len);
        if (o.len)
            memcpy(both + len, o.data, o.len);
        *ret_len = len + o.len;
    }
    free(p);
    free(o.data);
    return both;
}

uint8_t *dd_tokens_encode(const delta_tokenizer *t, const uint32_t *ids, size_t n, bool with_bytes,
                          size_t *ret_len)
{
    Deltad__V1__TokenizeResponse m = DELTAD__V1__TOKENIZE_RESPONSE__INIT;
    ProtobufCBinaryData *bytes = with_bytes ? calloc(n ? n : 1, sizeof *bytes) : NULL;
    if (with_bytes && !bytes)
        return NULL;
    for (size_t i = 0; with_bytes && i < n; i++)
        bytes[i] = bytes_of(t, ids[i]);
    m.ids = (uint32_t *)ids;
    m.n_ids = n;
    m.tokens = bytes;
    m.n_tokens = with_bytes ? n : 0;
    uint8_t *p = pack(&m.base, ret_len);
    free(bytes);
    return p;
}
