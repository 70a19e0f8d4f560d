/* calls.c -- declared tools to rules: the call syntax of the template, see compile.h.
 *
 *   <tool_call>            the first two lines belong to whoever opens the call:
 *   <function=NAME>        the rule of the turn, or scan.h in free content
 *   <parameter=P>          any order, each once, the required ones all
 *   VALUE
 *   </parameter>
 *   </function>
 *   </tool_call>           a newline and the next call, or the end
 *
 * Parameters that are not declared are not allowed, whatever additionalProperties says. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "grammar/compile.h"

enum { NAME_MAX_BYTES = 128 };

static bool is_allowed(const delta_grammar_spec *s, delta_str name)
{
    for (size_t i = 0; i < s->n_allowed; i++)
        if (s->allowed[i].len == name.len && memcmp(s->allowed[i].p, name.p, name.len) == 0)
            return true;
    return s->n_allowed == 0;
}

/* What would not be read back as a name. */
static bool is_name(delta_str name)
{
    for (size_t i = 0; i < name.len; i++)
        if ((unsigned char)name.p[i] < 0x20 || name.p[i] == '<' || name.p[i] == '>')
            return false;
    return name.len > 0 && name.len <= NAME_MAX_BYTES;
}

static int param_rule(de_json_rules *j, const de_json *parameters, const de_json *property,
                      const char *where, de_param_rule *ret, delta_error *err)
{
    de_auto *a = j->a;
    const delta_str name = { property->key, property->key_len };
    if (!is_name(name))
        return delta_fail(err, DELTA_EUNSUPPORTED, "%s: a name with <, > or of %u bytes", where,
                          property->key_len);
    char path[320];
    (void)snprintf(path, sizeof path, "%s.properties.%s", where, property->key);
    uint32_t value = 0;
    const int e = de_schema_param_rule(j, parameters, property, path, &value, err);
    if (e < 0)
        return e;
    de_expr *seq = de_expr_list(a, DE_EXPR_SEQ);
    seq = de_expr_add(seq, de_expr_literal(a, "<parameter="));
    seq = de_expr_add(seq, de_expr_bytes(a, name.p, name.len));
    seq = de_expr_add(seq, de_expr_literal(a, ">\n"));
    seq = de_expr_add(seq, de_expr_call(a, value));
    const uint32_t rule = de_rule_new(a);
    if (!a->code)
        de_rule_make(a, rule, seq, DE_SPELL_PLAIN);
    *ret = (de_param_rule){ .name = name, .rule = rule };
    return 0;
}

static int mark_required(const de_json *parameters, const char *where, de_call_tool *t,
                         delta_error *err)
{
    const de_json *required = de_json_get(parameters, "required");
    if (required && required->kind != DE_JSON_ARRAY)
        return delta_fail(err, DELTA_EINVALID, "%s.required: not an array", where);
    for (const de_json *q = required ? required->child : NULL; q; q = q->next) {
        bool found = false;
        for (uint32_t i = 0; i < t->n_params; i++)
            if (q->kind == DE_JSON_STRING && q->n == t->params[i].name.len &&
                memcmp(q->text, t->params[i].name.p, q->n) == 0)
                found = t->params[i].required = true;
        if (!found)
            return delta_fail(err, DELTA_EUNSUPPORTED, "%s.required: %s is not declared", where,
                              q->kind == DE_JSON_STRING ? q->text : "a value");
    }
    return 0;
}

static int check_parameters(const de_json *parameters, const char *where, delta_error *err)
{
    static const char *const known[] = {
        "type",    "properties", "required", "additionalProperties", "title",    "description",
        "$schema", "$id",        "$defs",    "definitions",          "$comment", "strict",
        "default", "examples"
    };
    for (const de_json *m = parameters->child; m; m = m->next) {
        bool is = strncmp(m->key, "x-", 2) == 0;
        for (size_t i = 0; i < sizeof known / sizeof *known; i++)
            is |= strcmp(m->key, known[i]) == 0;
        if (!is)
            return delta_fail(err, DELTA_EUNSUPPORTED, "%s.%s: not supported", where, m->key);
    }
    const de_json *type = de_json_get(parameters, "type");
    if (type && !de_json_is_string(type, "object"))
        return delta_fail(err, DELTA_EUNSUPPORTED, "%s.type: not \"object\"", where);
    const de_json *p = de_json_get(parameters, "properties");
    if (p && p->kind != DE_JSON_OBJECT)
        return delta_fail(err, DELTA_EINVALID, "%s.properties: not an object", where);
    if (p && p->n > DELTA_GRAMMAR_PARAMS)
        return delta_fail(err, DELTA_ELIMIT, "%s.properties: %u, at most %d", where, p->n,
                          DELTA_GRAMMAR_PARAMS);
    return 0;
}

/* Parameters, and the rule from behind "<function=NAME>" to "</function>". */
static int tool_body(delta_grammar *g, uint32_t index, const de_json *parameters, delta_error *err)
{
    de_auto *a = &g->a;
    de_call_tool *t = &a->tools[index];
    char where[64];
    (void)snprintf(where, sizeof where, "tools[%u].parameters", index);
    de_json_rules j;
    de_json_rules_init(&j, a, true);
    int e = parameters ? check_parameters(parameters, where, err) : 0;
    const de_json *properties = de_json_get(parameters, "properties");
    t->params = de_arena_array(a->arena, properties ? properties->n + 1 : 1, sizeof *t->params);
    delta_str *names = de_arena_array(a->arena, properties ? properties->n + 1 : 1, sizeof *names);
    if (e == 0 && (!t->params || !names))
        a->code = DELTA_ELIMIT;
    if (e < 0 || a->code)
        return e;
    for (const de_json *p = properties ? properties->child : NULL; p && e == 0 && !a->code;
         p = p->next) {
        e = param_rule(&j, parameters, p, where, &t->params[t->n_params], err);
        names[t->n_params] = t->params[t->n_params].name;
        t->n_params += e == 0;
    }
    if (e == 0)
        e = parameters ? mark_required(parameters, where, t, err) : 0;
    if (e < 0 || a->code)
        return e;
    t->names = de_names_make(a->arena, names, t->n_params);
    if (!t->names)
        a->code = DELTA_ELIMIT;
    const uint32_t hub = de_rule_of_node(a, DE_NODE_PARAMS, 0, index);
    de_expr *seq = de_expr_list(a, DE_EXPR_SEQ);
    seq = de_expr_add(seq, de_expr_literal(a, "\n"));
    seq = de_expr_add(seq, de_expr_call(a, hub));
    seq = de_expr_add(seq, de_expr_literal(a, "</function>"));
    t->body = t->bare = de_rule_new(a);
    if (!a->code)
        de_rule_make(a, t->body, seq, DE_SPELL_PLAIN);
    return 0;
}

/* {"type":"function","function":{"name", "parameters"}}, or the inner object alone. */
static int read_tool(delta_grammar *g, const delta_grammar_spec *spec, uint32_t index,
                     delta_error *err)
{
    de_json *v = NULL;
    char where[32];
    (void)snprintf(where, sizeof where, "tools[%u]", index);
    const int e = de_spec_json(g, spec->tools_json[index], where, &v, err);
    if (e < 0)
        return e;
    const de_json *function = de_json_get(v, "function");
    if (!function)
        function = v;
    const de_json *name = de_json_get(function, "name");
    if (!name || name->kind != DE_JSON_STRING || !is_name((delta_str){ name->text, name->n }))
        return delta_fail(err, DELTA_EINVALID, "tools[%u].name: missing, or not a name", index);
    de_call_tool *t = &g->a.tools[index];
    *t = (de_call_tool){ .name = { name->text, name->n } };
    for (uint32_t i = 0; i < index; i++)
        if (g->a.tools[i].name.len == t->name.len &&
            memcmp(g->a.tools[i].name.p, t->name.p, t->name.len) == 0)
            return delta_fail(err, DELTA_EINVALID, "tools[%u].name: %s is declared twice", index,
                              name->text);
    t->allowed = is_allowed(spec, t->name);
    g->a.n_tools = index + 1;
    const de_json *parameters = de_json_get(function, "parameters");
    if (parameters && parameters->kind == DE_JSON_NULL)
        parameters = NULL;
    if (parameters && parameters->kind != DE_JSON_OBJECT)
        return delta_fail(err, DELTA_EINVALID, "tools[%u].parameters: not an object", index);
    return t->allowed ? tool_body(g, index, parameters, err) : 0;
}

/* A call from its first byte to its last, of any tool that is allowed. */
static de_expr *call_expr(de_auto *a)
{
    de_expr *alt = de_expr_list(a, DE_EXPR_ALT);
    for (uint32_t i = 0; i < a->n_tools; i++) {
        if (!a->tools[i].allowed)
            continue;
        de_expr *seq = de_expr_list(a, DE_EXPR_SEQ);
        seq = de_expr_add(seq, de_expr_bytes(a, a->tools[i].name.p, a->tools[i].name.len));
        seq = de_expr_add(seq, de_expr_literal(a, ">"));
        seq = de_expr_add(seq, de_expr_call(a, a->tools[i].body));
        alt = de_expr_add(alt, seq);
    }
    de_expr *seq = de_expr_list(a, DE_EXPR_SEQ);
    seq = de_expr_add(seq, de_expr_literal(a, "<tool_call>\n<function="));
    seq = de_expr_add(seq, alt);
    return de_expr_add(seq, de_expr_literal(a, "\n</tool_call>"));
}

static uint32_t make(de_auto *a, const de_expr *e)
{
    const uint32_t rule = de_rule_new(a);
    if (!a->code)
        de_rule_make(a, rule, e, DE_SPELL_PLAIN);
    return rule;
}

int de_calls_compile(delta_grammar *g, const delta_grammar_spec *spec, delta_error *err)
{
    de_auto *a = &g->a;
    a->tools = de_arena_array(a->arena, spec->n_tools + 1, sizeof *a->tools);
    delta_str *names = de_arena_array(a->arena, spec->n_tools + 1, sizeof *names);
    if (!a->tools || !names)
        return delta_fail(err, DELTA_ELIMIT, "%zu tools", spec->n_tools);
    bool any = false;
    for (uint32_t i = 0; i < spec->n_tools && !a->code; i++) {
        const int e = read_tool(g, spec, i, err);
        if (e < 0)
            return e;
        names[i] = a->tools[i].name;
        any |= a->tools[i].allowed;
    }
    for (size_t k = 0; k < spec->n_allowed && !a->code; k++) {
        bool found = false;
        for (uint32_t i = 0; i < a->n_tools; i++)
            found |= a->tools[i].name.len == spec->allowed[k].len &&
                     memcmp(a->tools[i].name.p, spec->allowed[k].p, spec->allowed[k].len) == 0;
        if (!found)
            return delta_fail(err, DELTA_EINVALID, "allowed[%zu]: %.*s is no declared tool", k,
                              (int)(spec->allowed[k].len & 0xFF), spec->allowed[k].p);
    }
    if (spec->calls == DELTA_CALLS_REQUIRED && !any)
        return delta_fail(err, DELTA_EINVALID, "a call is required, and there is no tool");
    const de_names *all = de_names_make(a->arena, names, a->n_tools);
    for (uint32_t i = 0; i < a->n_tools; i++)
        names[i].len = a->tools[i].allowed ? names[i].len : 0;
    const de_names *allowed = de_names_make(a->arena, names, a->n_tools);
    if (!all || !allowed)
        a->code = DELTA_ELIMIT;
    g->scan = (de_scan_rules){ .calls = a->n_tools > 0,
                               .calls_in_reasoning = spec->calls_in_reasoning,
                               .calls_in_fences = spec->calls_in_fences,
                               .names = all,
                               .allowed = allowed };
    if (a->code || !any)
        return 0;
    de_expr *more = de_expr_seq2(a, de_expr_literal(a, "\n"), call_expr(a));
    const uint32_t rest = make(a, de_expr_repeat(a, more, 0, spec->parallel ? DE_MANY : 0));
    for (uint32_t i = 0; i < a->n_tools && !a->code; i++) {
        if (!a->tools[i].allowed)
            continue;
        de_expr *seq = de_expr_list(a, DE_EXPR_SEQ);
        seq = de_expr_add(seq, de_expr_call(a, a->tools[i].body));
        seq = de_expr_add(seq, de_expr_literal(a, "\n</tool_call>"));
        seq = de_expr_add(seq, de_expr_call(a, rest));
        a->tools[i].wrapped = make(a, seq);
    }
    if (spec->calls == DELTA_CALLS_REQUIRED) {
        de_expr *seq = de_expr_list(a, DE_EXPR_SEQ);
        seq = de_expr_add(seq,
                          de_expr_repeat(a, de_expr_literal(a, "\n"), 0, spec->thinking ? 2 : 0));
        seq = de_expr_add(seq, call_expr(a));
        seq = de_expr_add(seq, de_expr_call(a, rest));
        g->turn = make(a, seq);
    }
    return 0;
}
