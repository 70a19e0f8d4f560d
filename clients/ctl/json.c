/* json.c -- protobuf messages to JSON lines, and OpenAI JSON files to messages. */
#include "ctl.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- out */

static void put_base64(de_text *t, const uint8_t *p, size_t n)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    de_text_puts(t, "\"");
    for (size_t i = 0; i < n; i += 3) {
        uint32_t v = (uint32_t)p[i] << 16 | (i + 1 < n ? (uint32_t)p[i + 1] << 8 : 0) |
                     (i + 2 < n ? p[i + 2] : 0);
        char four[4] = { digits[v >> 18], digits[v >> 12 & 63],
                         i + 1 < n ? digits[v >> 6 & 63] : '=', i + 2 < n ? digits[v & 63] : '=' };
        de_text_add(t, four, 4);
    }
    de_text_puts(t, "\"");
}

static void put_message(de_text *t, const ProtobufCMessage *m);

/* A float with the fewest digits that read back as itself. */
static void put_float(de_text *t, double d, bool single)
{
    char s[40];
    if (!isfinite(d)) {
        de_text_puts(t, "null");
        return;
    }
    for (int precision = 1; precision <= 17; precision++) {
        (void)snprintf(s, sizeof s, "%.*g", precision, d);
        if (single ? strtof(s, NULL) == (float)d : strtod(s, NULL) == d)
            break;
    }
    de_text_puts(t, s);
}

static size_t element_size(ProtobufCType type)
{
    switch (type) {
    case PROTOBUF_C_TYPE_INT64:
    case PROTOBUF_C_TYPE_SINT64:
    case PROTOBUF_C_TYPE_SFIXED64:
    case PROTOBUF_C_TYPE_UINT64:
    case PROTOBUF_C_TYPE_FIXED64:
    case PROTOBUF_C_TYPE_DOUBLE:
        return 8;
    case PROTOBUF_C_TYPE_BOOL:
        return sizeof(protobuf_c_boolean);
    case PROTOBUF_C_TYPE_STRING:
    case PROTOBUF_C_TYPE_MESSAGE:
        return sizeof(void *);
    case PROTOBUF_C_TYPE_BYTES:
        return sizeof(ProtobufCBinaryData);
    default:
        return 4;
    }
}

static void put_value(de_text *t, const ProtobufCFieldDescriptor *f, const void *v)
{
    char s[32];
    switch (f->type) {
    case PROTOBUF_C_TYPE_INT32:
    case PROTOBUF_C_TYPE_SINT32:
    case PROTOBUF_C_TYPE_SFIXED32:
        (void)snprintf(s, sizeof s, "%" PRId32, *(const int32_t *)v);
        de_text_puts(t, s);
        break;
    case PROTOBUF_C_TYPE_UINT32:
    case PROTOBUF_C_TYPE_FIXED32:
        (void)snprintf(s, sizeof s, "%" PRIu32, *(const uint32_t *)v);
        de_text_puts(t, s);
        break;
    case PROTOBUF_C_TYPE_INT64:
    case PROTOBUF_C_TYPE_SINT64:
    case PROTOBUF_C_TYPE_SFIXED64:
        (void)snprintf(s, sizeof s, "%" PRId64, *(const int64_t *)v);
        de_text_puts(t, s);
        break;
    case PROTOBUF_C_TYPE_UINT64:
    case PROTOBUF_C_TYPE_FIXED64:
        (void)snprintf(s, sizeof s, "%" PRIu64, *(const uint64_t *)v);
        de_text_puts(t, s);
        break;
    case PROTOBUF_C_TYPE_FLOAT:
        put_float(t, *(const float *)v, true);
        break;
    case PROTOBUF_C_TYPE_DOUBLE:
        put_float(t, *(const double *)v, false);
        break;
    case PROTOBUF_C_TYPE_BOOL:
        de_text_puts(t, *(const protobuf_c_boolean *)v ? "true" : "false");
        break;
    case PROTOBUF_C_TYPE_ENUM: {
        const ProtobufCEnumValue *e =
            protobuf_c_enum_descriptor_get_value(f->descriptor, *(const int *)v);
        (void)snprintf(s, sizeof s, "%d", *(const int *)v);
        de_text_puts(t, "\"");
        de_text_puts(t, e ? e->name : s);
        de_text_puts(t, "\"");
        break;
    }
    case PROTOBUF_C_TYPE_STRING: {
        const char *text = *(char *const *)v;
        de_json_write_string(t, text ? text : "", text ? strlen(text) : 0);
        break;
    }
    case PROTOBUF_C_TYPE_BYTES:
        put_base64(t, ((const ProtobufCBinaryData *)v)->data,
                   ((const ProtobufCBinaryData *)v)->len);
        break;
    case PROTOBUF_C_TYPE_MESSAGE:
        put_message(t, *(ProtobufCMessage *const *)v);
        break;
    }
}

static bool is_set(const ProtobufCMessage *m, const ProtobufCFieldDescriptor *f)
{
    const char *base = (const char *)m, *v = base + f->offset;
    if (f->label == PROTOBUF_C_LABEL_REPEATED)
        return *(const size_t *)(base + f->quantifier_offset) > 0;
    if (f->flags & PROTOBUF_C_FIELD_FLAG_ONEOF)
        return *(const uint32_t *)(base + f->quantifier_offset) == f->id;
    switch (f->type) {
    case PROTOBUF_C_TYPE_STRING:
        return *(char *const *)v && **(char *const *)v;
    case PROTOBUF_C_TYPE_MESSAGE:
        return *(void *const *)v != NULL;
    case PROTOBUF_C_TYPE_BYTES:
        return ((const ProtobufCBinaryData *)v)->len > 0;
    default: {
        static const char zero[8];
        return memcmp(v, zero, element_size(f->type)) != 0;
    }
    }
}

static void put_message(de_text *t, const ProtobufCMessage *m)
{
    bool first = true;
    de_text_puts(t, "{");
    for (unsigned i = 0; i < m->descriptor->n_fields; i++) {
        const ProtobufCFieldDescriptor *f = &m->descriptor->fields[i];
        if (!is_set(m, f))
            continue;
        de_text_puts(t, first ? "\"" : ", \"");
        first = false;
        de_text_puts(t, f->name);
        de_text_puts(t, "\": ");
        const char *v = (const char *)m + f->offset;
        if (f->label != PROTOBUF_C_LABEL_REPEATED) {
            put_value(t, f, v);
            continue;
        }
        const size_t n = *(const size_t *)((const char *)m + f->quantifier_offset);
        const char *array = *(char *const *)v;
        de_text_puts(t, "[");
        for (size_t k = 0; k < n; k++) {
            if (k)
                de_text_puts(t, ", ");
            put_value(t, f, array + k * element_size(f->type));
        }
        de_text_puts(t, "]");
    }
    de_text_puts(t, "}");
}

void ctl_print_json(const ProtobufCMessage *m)
{
    de_text t = { 0 };
    put_message(&t, m);
    if (t.failed)
        (void)fprintf(stderr, "deltactl: out of memory\n");
    else
        puts(t.p);
    (void)fflush(stdout);
    de_text_done(&t);
}

/* ---- in */

char *ctl_read_file(ctl *c, const char *path, size_t *ret_len)
{
    enum { MAX = 16 << 20 };
    FILE *f = strcmp(path, "-") == 0 ? stdin : fopen(path, "rb");
    if (!f) {
        ctl_usage("%s: cannot be read", path);
        return NULL;
    }
    char *p = malloc(MAX + 1);
    size_t n = p ? fread(p, 1, MAX + 1, f) : 0;
    const bool bad = !p || ferror(f) || n > MAX;
    if (f != stdin)
        (void)fclose(f);
    char *copy = bad ? NULL : de_arena_strndup(&c->arena, p, n);
    free(p);
    if (!copy) {
        ctl_usage("%s: %s", path, n > MAX ? "more than 16 MiB" : "cannot be read");
        return NULL;
    }
    *ret_len = n;
    return copy;
}

static int read_array(ctl *c, const char *path, de_json **ret_v)
{
    size_t n;
    char *text = ctl_read_file(c, path, &n);
    if (!text)
        return CTL_USAGE;
    delta_error err;
    if (de_json_parse(&c->arena, text, n, ret_v, &err) < 0)
        return ctl_usage("%s: %s", path, err.text);
    if ((*ret_v)->kind != DE_JSON_ARRAY)
        return ctl_usage("%s: a JSON array is needed", path);
    return 0;
}

static char *json_text(ctl *c, const de_json *v)
{
    de_text t = { 0 };
    de_json_write(&t, v, true);
    char *s = ctl_strdup(c, t.p ? t.p : "");
    de_text_done(&t);
    return s;
}

static char *string_of(const de_json *v)
{
    return v && v->kind == DE_JSON_STRING ? (char *)(uintptr_t)v->text : NULL;
}

Deltad__V1__Message *ctl_message(ctl *c, Deltad__V1__Role role, const char *text)
{
    Deltad__V1__Message *m = ctl_alloc(c, sizeof *m);
    deltad__v1__message__init(m);
    m->role = role;
    Deltad__V1__Part *part = ctl_alloc(c, sizeof *part);
    deltad__v1__part__init(part);
    part->part_case = DELTAD__V1__PART__PART_TEXT;
    part->text = ctl_strdup(c, text);
    m->parts = ctl_alloc(c, sizeof *m->parts);
    m->parts[0] = part;
    m->n_parts = 1;
    return m;
}

static int read_calls(ctl *c, const char *path, const de_json *calls, Deltad__V1__Message *m)
{
    if (!calls || calls->kind == DE_JSON_NULL)
        return 0;
    if (calls->kind != DE_JSON_ARRAY)
        return ctl_usage("%s: tool_calls is no array", path);
    m->tool_calls = ctl_alloc(c, calls->n * sizeof *m->tool_calls);
    for (const de_json *v = calls->child; v; v = v->next) {
        const de_json *f = de_json_get(v, "function");
        const de_json *arguments = de_json_get(f ? f : v, "arguments");
        Deltad__V1__ToolCall *call = ctl_alloc(c, sizeof *call);
        deltad__v1__tool_call__init(call);
        call->name = string_of(de_json_get(f ? f : v, "name"));
        if (!call->name)
            return ctl_usage("%s: a tool call without a name", path);
        char *id = string_of(de_json_get(v, "id"));
        if (id)
            call->id = id;
        char *text = string_of(arguments);
        call->arguments_json = text        ? text
                               : arguments ? json_text(c, arguments)
                                           : ctl_strdup(c, "{}");
        m->tool_calls[m->n_tool_calls++] = call;
    }
    return 0;
}

static int read_message(ctl *c, const char *path, const de_json *v, Deltad__V1__Message **ret_m)
{
    static const struct {
        const char *name;
        Deltad__V1__Role role;
    } roles[] = { { "system", DELTAD__V1__ROLE__ROLE_SYSTEM },
                  { "developer", DELTAD__V1__ROLE__ROLE_DEVELOPER },
                  { "user", DELTAD__V1__ROLE__ROLE_USER },
                  { "assistant", DELTAD__V1__ROLE__ROLE_ASSISTANT },
                  { "tool", DELTAD__V1__ROLE__ROLE_TOOL } };
    Deltad__V1__Role role = DELTAD__V1__ROLE__ROLE_UNSPECIFIED;
    for (size_t i = 0; i < sizeof roles / sizeof *roles; i++)
        if (de_json_is_string(de_json_get(v, "role"), roles[i].name))
            role = roles[i].role;
    if (role == DELTAD__V1__ROLE__ROLE_UNSPECIFIED)
        return ctl_usage("%s: a message needs a role: system, user, assistant or tool", path);
    const de_json *content = de_json_get(v, "content");
    Deltad__V1__Message *m = ctl_message(c, role, "");
    if (content && content->kind == DE_JSON_STRING) {
        m->parts[0]->text = string_of(content);
    } else if (content && content->kind == DE_JSON_ARRAY) {
        m->parts = ctl_alloc(c, (content->n + 1) * sizeof *m->parts);
        m->n_parts = 0;
        for (const de_json *p = content->child; p; p = p->next) {
            char *text = string_of(de_json_get(p, "text"));
            if (!text)
                return ctl_usage("%s: only text parts can be sent", path);
            m->parts[m->n_parts++] = ctl_message(c, role, text)->parts[0];
        }
    } else if (content && content->kind != DE_JSON_NULL) {
        return ctl_usage("%s: content is neither text nor a list of parts", path);
    }
    char *reasoning = string_of(de_json_get(v, "reasoning_content"));
    if (!reasoning)
        reasoning = string_of(de_json_get(v, "reasoning"));
    if (reasoning) {
        m->reasoning_opt_case = DELTAD__V1__MESSAGE__REASONING_OPT_REASONING;
        m->reasoning = reasoning;
    }
    char *id = string_of(de_json_get(v, "tool_call_id"));
    if (id)
        m->tool_call_id = id;
    *ret_m = m;
    return read_calls(c, path, de_json_get(v, "tool_calls"), m);
}

int ctl_read_messages(ctl *c, const char *path, Deltad__V1__Message ***ret_m, size_t *ret_n)
{
    de_json *v;
    int r = read_array(c, path, &v);
    if (r)
        return r;
    Deltad__V1__Message **m = ctl_alloc(c, (v->n + 1) * sizeof *m);
    size_t n = 0;
    for (const de_json *e = v->child; e; e = e->next) {
        r = read_message(c, path, e, &m[n++]);
        if (r)
            return r;
    }
    *ret_m = m;
    *ret_n = n;
    return 0;
}

int ctl_read_tools(ctl *c, const char *path, Deltad__V1__Tool ***ret_t, size_t *ret_n)
{
    de_json *v;
    int r = read_array(c, path, &v);
    if (r)
        return r;
    Deltad__V1__Tool **tools = ctl_alloc(c, (v->n + 1) * sizeof *tools);
    size_t n = 0;
    for (const de_json *e = v->child; e; e = e->next) {
        Deltad__V1__Tool *t = ctl_alloc(c, sizeof *t);
        deltad__v1__tool__init(t);
        t->openai_json = json_text(c, e);
        tools[n++] = t;
    }
    *ret_t = tools;
    *ret_n = n;
    return 0;
}
