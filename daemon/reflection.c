/* reflection.c -- see reflection.h.
 *
 * The set is protoc's output of our own .proto files, a FileDescriptorSet in which imports stand
 * before the files that import them. Names are looked up by walking it, each time: some
 * kilobytes, asked for by tools for people. */
#include "daemon/reflection.h"

#include <stdlib.h>
#include <string.h>

#include "daemon/codec_std.h"

extern const unsigned char dd_descriptor_set[];
extern const size_t dd_descriptor_set_len;

enum { FILES_MAX = 64, SERVICES_MAX = 64 };

/* Field numbers of descriptor.proto. */
enum { FILE_NAME = 1, FILE_PACKAGE = 2, FILE_IMPORT = 3, FILE_SERVICE = 6 };
enum { ANY_NAME = 1 };

static bool is_equal(dd_bytes a, dd_bytes b)
{
    return a.len == b.len && (a.len == 0 || memcmp(a.data, b.data, a.len) == 0);
}

static size_t get_files(dd_bytes *files)
{
    dd_bytes rest = { dd_descriptor_set, dd_descriptor_set_len };
    dd_wire_field f;
    size_t n = 0;
    while (n < FILES_MAX && dd_wire_next(&rest, &f) > 0)
        if (f.number == 1 && f.type == 2)
            files[n++] = f.bytes;
    return n;
}

static dd_bytes get_text(dd_bytes message, uint32_t number)
{
    dd_bytes text = { 0 };
    dd_wire_field f;
    while (dd_wire_next(&message, &f) > 0)
        if (f.number == number && f.type == 2)
            text = f.bytes;
    return text;
}

/* ---- symbols ---- */

/* What may stand by a name inside what: the scope of the child, by field number of the parent. */
enum scope { NOTHING, IN_FILE, IN_MESSAGE, IN_SERVICE, IN_ENUM, LEAF };
static enum scope child_scope(enum scope in, uint32_t number)
{
    static const uint8_t table[LEAF + 1][11] = {
        [IN_FILE] = { [4] = IN_MESSAGE, [5] = IN_ENUM, [6] = IN_SERVICE, [7] = LEAF },
        [IN_MESSAGE] = { [2] = LEAF, [3] = IN_MESSAGE, [4] = IN_ENUM, [6] = LEAF, [8] = LEAF },
        [IN_SERVICE] = { [2] = LEAF },
        [IN_ENUM] = { [2] = LEAF },
    };
    return number < 11 ? (enum scope)table[in][number] : NOTHING;
}

static bool has_symbol(dd_bytes file, dd_bytes name)
{
    dd_bytes package = get_text(file, FILE_PACKAGE), here = file;
    enum scope in = IN_FILE;
    if (package.len) {
        if (name.len <= package.len + 1 || memcmp(name.data, package.data, package.len) != 0 ||
            name.data[package.len] != '.')
            return false;
        name.data += package.len + 1;
        name.len -= package.len + 1;
    }
    for (;;) {
        const uint8_t *dot = name.len ? memchr(name.data, '.', name.len) : NULL;
        dd_bytes part = { name.data, dot ? (size_t)(dot - name.data) : name.len };
        dd_bytes rest = here;
        dd_wire_field f;
        enum scope found = NOTHING;
        while (found == NOTHING && dd_wire_next(&rest, &f) > 0) {
            enum scope child = f.type == 2 ? child_scope(in, f.number) : NOTHING;
            if (child != NOTHING && is_equal(get_text(f.bytes, ANY_NAME), part)) {
                found = child;
                here = f.bytes;
            }
        }
        if (found == NOTHING || !dot)
            return found != NOTHING;
        in = found;
        name.data += part.len + 1;
        name.len -= part.len + 1;
    }
}

/* ---- answers ---- */

static uint8_t *answer_file(const dd_reflection_request *q, size_t *ret_len)
{
    dd_bytes files[FILES_MAX], wanted[FILES_MAX];
    bool needed[FILES_MAX] = { false }, known = false;
    size_t n = get_files(files), n_wanted = 0;
    for (size_t i = 0; i < n; i++) {
        needed[i] = q->kind == DD_REFLECTION_FILE ? is_equal(get_text(files[i], FILE_NAME), q->name)
                                                  : has_symbol(files[i], q->name);
        known |= needed[i];
    }
    if (!known)
        return dd_reflection_error_encode(q, DD_NOT_FOUND,
                                          q->kind == DD_REFLECTION_FILE ? "there is no such file"
                                                                        : "there is no such symbol",
                                          ret_len);
    for (size_t i = n; i-- > 0;) {
        dd_bytes rest = files[i];
        dd_wire_field f;
        while (needed[i] && dd_wire_next(&rest, &f) > 0)
            for (size_t k = 0; f.number == FILE_IMPORT && f.type == 2 && k < i; k++)
                if (is_equal(get_text(files[k], FILE_NAME), f.bytes))
                    needed[k] = true;
    }
    for (size_t i = 0; i < n; i++)
        if (needed[i])
            wanted[n_wanted++] = files[i];
    return dd_reflection_files_encode(q, wanted, n_wanted, ret_len);
}

static uint8_t *answer_services(const dd_reflection_request *q, size_t *ret_len)
{
    dd_bytes files[FILES_MAX], names[SERVICES_MAX];
    char text[SERVICES_MAX][128];
    size_t n = get_files(files), n_names = 0;
    for (size_t i = 0; i < n; i++) {
        dd_bytes package = get_text(files[i], FILE_PACKAGE), rest = files[i];
        dd_wire_field f;
        while (n_names < SERVICES_MAX && dd_wire_next(&rest, &f) > 0) {
            if (f.number != FILE_SERVICE || f.type != 2)
                continue;
            dd_bytes name = get_text(f.bytes, ANY_NAME);
            size_t at = package.len ? package.len + 1 : 0;
            if (at + name.len > sizeof text[0])
                continue;
            char *to = text[n_names];
            if (package.len) {
                memcpy(to, package.data, package.len);
                to[package.len] = '.';
            }
            memcpy(to + at, name.data, name.len);
            names[n_names++] = (dd_bytes){ (const uint8_t *)to, at + name.len };
        }
    }
    return dd_reflection_services_encode(q, names, n_names, ret_len);
}

uint8_t *dd_reflection_answer(const uint8_t *msg, size_t len, size_t *ret_len, bool *ret_malformed)
{
    dd_reflection_request q;
    *ret_malformed = dd_reflection_request_decode(msg, len, &q) < 0;
    if (*ret_malformed)
        return NULL;
    switch (q.kind) {
    case DD_REFLECTION_FILE:
    case DD_REFLECTION_SYMBOL:
        return answer_file(&q, ret_len);
    case DD_REFLECTION_SERVICES:
        return answer_services(&q, ret_len);
    case DD_REFLECTION_EXTENSION:
    case DD_REFLECTION_EXTENSION_NUMBERS:
        return dd_reflection_error_encode(&q, DD_NOT_FOUND, "there are no extensions", ret_len);
    case DD_REFLECTION_NONE:
        break;
    }
    return dd_reflection_error_encode(&q, DD_INVALID_ARGUMENT, "the request asks nothing", ret_len);
}

/* ---- the calls ---- */

/* rpc->handler says how far a call is; what it points to is never read. */
static char answering, last_answer, ended;

static void finish(dd_rpc *r, const dd_status *st)
{
    r->handler = &ended;
    r->vt->finish(r, st);
}

void dd_reflection_message(dd_rpc *r, const uint8_t *msg, size_t len)
{
    bool malformed;
    size_t n;
    dd_status st;
    if (r->handler == &ended)
        return;
    uint8_t *answer = dd_reflection_answer(msg, len, &n, &malformed);
    if (answer) {
        r->handler = &answering;
        r->vt->send(r, answer, n);
        return;
    }
    if (malformed)
        dd_status_set(&st, DD_INVALID_ARGUMENT, "MALFORMED_MESSAGE",
                      "the bytes are no ServerReflectionRequest");
    else
        dd_status_set(&st, DD_RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", "out of memory");
    finish(r, &st);
}

void dd_reflection_half_closed(dd_rpc *r)
{
    static const dd_status ok = { .code = DD_OK };
    if (r->handler == &answering)
        r->handler = &last_answer;
    else if (r->handler == NULL)
        finish(r, &ok);
}

void dd_reflection_sent(dd_rpc *r)
{
    static const dd_status ok = { .code = DD_OK };
    if (r->handler == &last_answer)
        finish(r, &ok);
    else if (r->handler == &answering)
        r->handler = NULL;
}

void dd_reflection_closed(dd_rpc *r)
{
    dd_status st;
    if (r->handler == &ended)
        return;
    dd_status_set(&st, DD_CANCELLED, "CANCELLED", "the call was cancelled");
    finish(r, &st);
}
