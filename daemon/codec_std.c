/* codec_std.c -- see codec_std.h. */
#include "daemon/codec_std.h"

#include "base/utf8.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

/* ---- protobuf on the wire ---- */

/* The number of bytes of a varint, 0 if it is cut or longer than ten bytes. */
static size_t get_varint(dd_bytes b, uint64_t *ret_v)
{
    uint64_t v = 0;
    for (size_t i = 0; i < b.len && i < 10; i++) {
        v |= (uint64_t)(b.data[i] & 0x7f) << (7 * i);
        if (!(b.data[i] & 0x80)) {
            *ret_v = v;
            return i + 1;
        }
    }
    return 0;
}

static void skip(dd_bytes *b, size_t n)
{
    b->data += n;
    b->len -= n;
}

static uint64_t get_fixed(const uint8_t *p, size_t n)
{
    uint64_t v = 0;
    for (size_t i = 0; i < n; i++)
        v |= (uint64_t)p[i] << (8 * i);
    return v;
}

int dd_wire_next(dd_bytes *rest, dd_wire_field *ret_f)
{
    uint64_t key, len;
    size_t n;
    if (rest->len == 0)
        return 0;
    n = get_varint(*rest, &key);
    if (n == 0 || key >> 3 == 0 || key >> 32)
        return -1;
    skip(rest, n);
    dd_wire_field f = { .number = (uint32_t)(key >> 3), .type = (uint32_t)(key & 7) };
    switch (f.type) {
    case 0:
        n = get_varint(*rest, &f.value);
        if (n == 0)
            return -1;
        break;
    case 1:
    case 5:
        n = f.type == 1 ? 8 : 4;
        if (rest->len < n)
            return -1;
        f.value = get_fixed(rest->data, n);
        break;
    case 2:
        n = get_varint(*rest, &len);
        if (n == 0 || len > rest->len - n)
            return -1;
        skip(rest, n);
        n = (size_t)len;
        f.bytes = (dd_bytes){ rest->data, n };
        break;
    default:
        return -1;
    }
    skip(rest, n);
    *ret_f = f;
    return 1;
}

/* Eight bytes of ASCII, none of them NUL: nearly all of what peers send, at memory's pace. */
static bool is_plain8(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return ((v | (v - 0x0101010101010101u)) & 0x8080808080808080u) == 0;
}

bool dd_wire_is_text(dd_bytes b)
{
    for (size_t i = 0; i < b.len;) {
        if (b.len - i >= 8 && is_plain8(b.data + i)) {
            i += 8;
            continue;
        }
        size_t n = b.data[i] ? de_utf8_len(b.data + i, b.len - i) : 0;
        if (n == 0)
            return false;
        i += n;
    }
    return true;
}

static void put(dd_wire_out *o, const void *data, size_t len)
{
    if (o->failed)
        return;
    if (len > o->size - o->len) {
        size_t size = o->size ? o->size : 64;
        while (size - o->len < len) {
            if (size > SIZE_MAX / 2) {
                o->failed = true;
                return;
            }
            size *= 2;
        }
        uint8_t *p = realloc(o->data, size);
        if (!p) {
            o->failed = true;
            return;
        }
        o->data = p;
        o->size = size;
    }
    if (len)
        memcpy(o->data + o->len, data, len);
    o->len += len;
}

static void put_raw_varint(dd_wire_out *o, uint64_t v)
{
    uint8_t b[10];
    size_t n = 0;
    do {
        b[n] = (uint8_t)(v & 0x7f);
        v >>= 7;
        if (v)
            b[n] |= 0x80;
        n++;
    } while (v);
    put(o, b, n);
}

void dd_wire_put_varint(dd_wire_out *o, uint32_t field, uint64_t v)
{
    put_raw_varint(o, (uint64_t)field << 3);
    put_raw_varint(o, v);
}

void dd_wire_put_bytes(dd_wire_out *o, uint32_t field, const void *data, size_t len)
{
    put_raw_varint(o, (uint64_t)field << 3 | 2);
    put_raw_varint(o, len);
    put(o, data, len);
}

uint8_t *dd_wire_take(dd_wire_out *o, size_t *ret_len)
{
    if (!o->failed && !o->data) { /* the empty message is a message */
        o->data = malloc(1);
        o->failed = !o->data;
    }
    uint8_t *data = o->data;
    size_t len = o->len;
    bool failed = o->failed;
    *o = (dd_wire_out){ 0 };
    if (failed) {
        free(data);
        return NULL;
    }
    *ret_len = len;
    return data;
}

/* Appends a message as a field and frees it; a failed message fails the outer one. */
static void put_message(dd_wire_out *o, uint32_t field, dd_wire_out *inner)
{
    if (inner->failed)
        o->failed = true;
    else
        dd_wire_put_bytes(o, field, inner->data, inner->len);
    free(inner->data);
    *inner = (dd_wire_out){ 0 };
}

/* Text of our own that may quote a peer or have been cut inside a character. */
static void put_text(dd_wire_out *o, uint32_t field, const char *text, size_t size)
{
    uint8_t clean[512];
    size_t n = strnlen(text, size), at = 0;
    assert(size <= sizeof clean);
    if (n == 0)
        return;
    for (size_t i = 0; i < n;) {
        size_t k = de_utf8_len(text + i, n - i);
        if (k == 0) {
            clean[at++] = '?';
            i++;
        } else {
            memcpy(clean + at, text + i, k);
            at += k;
            i += k;
        }
    }
    dd_wire_put_bytes(o, field, clean, at);
}

/* ---- google.rpc.Status ---- */

static void put_detail(dd_wire_out *status, const char *type, dd_wire_out *detail)
{
    dd_wire_out any = { 0 };
    dd_wire_put_bytes(&any, 1, type, strlen(type));
    put_message(&any, 2, detail);
    put_message(status, 3, &any);
}

static void put_error_info(dd_wire_out *o, const dd_status *st)
{
    dd_wire_out info = { 0 };
    const char *reason = st->reason ? st->reason : "UNSPECIFIED";
    dd_wire_put_bytes(&info, 1, reason, strlen(reason));
    dd_wire_put_bytes(&info, 2, "deltad", 6);
    for (uint32_t i = 0; i < st->n_meta && i < sizeof st->meta / sizeof st->meta[0]; i++) {
        dd_wire_out entry = { 0 };
        dd_wire_put_bytes(&entry, 1, st->meta[i].key, strlen(st->meta[i].key));
        put_text(&entry, 2, st->meta[i].value, sizeof st->meta[i].value);
        put_message(&info, 3, &entry);
    }
    put_detail(o, "type.googleapis.com/google.rpc.ErrorInfo", &info);
}

static void put_bad_request(dd_wire_out *o, const dd_status *st)
{
    dd_wire_out violation = { 0 }, bad = { 0 };
    put_text(&violation, 1, st->field, sizeof st->field);
    put_text(&violation, 2, st->message, sizeof st->message);
    put_message(&bad, 1, &violation);
    put_detail(o, "type.googleapis.com/google.rpc.BadRequest", &bad);
}

static void put_retry_info(dd_wire_out *o, const dd_status *st)
{
    dd_wire_out delay = { 0 }, retry = { 0 };
    dd_wire_put_varint(&delay, 1, st->retry_ms / 1000);
    dd_wire_put_varint(&delay, 2, (uint64_t)(st->retry_ms % 1000) * 1000000);
    put_message(&retry, 1, &delay);
    put_detail(o, "type.googleapis.com/google.rpc.RetryInfo", &retry);
}

static void put_resource_info(dd_wire_out *o, const dd_status *st)
{
    dd_wire_out resource = { 0 };
    dd_wire_put_bytes(&resource, 1, st->missing, strlen(st->missing));
    put_text(&resource, 2, st->missing_name, sizeof st->missing_name);
    put_detail(o, "type.googleapis.com/google.rpc.ResourceInfo", &resource);
}

static void put_status(dd_wire_out *o, const dd_status *st)
{
    if (st->code != DD_OK)
        dd_wire_put_varint(o, 1, (uint64_t)st->code);
    put_text(o, 2, st->message, sizeof st->message);
    if (st->code == DD_OK)
        return;
    put_error_info(o, st);
    if (st->field[0])
        put_bad_request(o, st);
    if (st->missing)
        put_resource_info(o, st);
    if (st->retry_ms)
        put_retry_info(o, st);
}

uint8_t *dd_status_encode(const dd_status *st, size_t *ret_len)
{
    dd_wire_out o = { 0 };
    put_status(&o, st);
    return dd_wire_take(&o, ret_len);
}

/* ---- ttrpc ---- */

static bool is_text_field(const dd_wire_field *f)
{
    return f->type == 2 && dd_wire_is_text(f->bytes);
}

static int decode_metadata(dd_bytes pair, dd_ttrpc_request *r)
{
    static const char wanted[] = "x-request-id";
    dd_bytes key = { 0 }, value = { 0 };
    dd_wire_field f;
    int more;
    while ((more = dd_wire_next(&pair, &f)) > 0) {
        if (f.number != 1 && f.number != 2)
            continue;
        if (!is_text_field(&f))
            return -1;
        *(f.number == 1 ? &key : &value) = f.bytes;
    }
    if (more == 0 && r->request_id.len == 0 && key.len == sizeof wanted - 1 &&
        memcmp(key.data, wanted, key.len) == 0)
        r->request_id = value;
    return more;
}

static int decode_request_field(const dd_wire_field *f, dd_ttrpc_request *r)
{
    switch (f->number) {
    case 1:
    case 2:
        if (!is_text_field(f))
            return -1;
        *(f->number == 1 ? &r->service : &r->method) = f->bytes;
        return 0;
    case 3:
        r->payload = f->bytes;
        return f->type == 2 ? 0 : -1;
    case 4:
        r->timeout_ns = (int64_t)f->value;
        return f->type == 0 ? 0 : -1;
    case 5:
        return f->type == 2 ? decode_metadata(f->bytes, r) : -1;
    default:
        return 0;
    }
}

int dd_ttrpc_request_decode(const uint8_t *msg, size_t len, dd_ttrpc_request *ret)
{
    dd_ttrpc_request r = { 0 };
    dd_bytes rest = { msg, len };
    dd_wire_field f;
    int more;
    while ((more = dd_wire_next(&rest, &f)) > 0)
        if (decode_request_field(&f, &r) < 0)
            return -1;
    if (more == 0)
        *ret = r;
    return more;
}

uint8_t *dd_ttrpc_response_encode(const dd_status *st, dd_bytes payload, size_t *ret_len)
{
    dd_wire_out o = { 0 };
    if (st && st->code != DD_OK) {
        dd_wire_out status = { 0 };
        put_status(&status, st);
        put_message(&o, 1, &status);
    } else if (payload.len) {
        dd_wire_put_bytes(&o, 2, payload.data, payload.len);
    }
    return dd_wire_take(&o, ret_len);
}

/* ---- grpc.health.v1 ---- */

int dd_health_request_decode(const uint8_t *msg, size_t len, dd_bytes *ret_service)
{
    dd_bytes rest = { msg, len }, service = { 0 };
    dd_wire_field f;
    int more;
    while ((more = dd_wire_next(&rest, &f)) > 0) {
        if (f.number != 1)
            continue;
        if (!is_text_field(&f))
            return -1;
        service = f.bytes;
    }
    if (more == 0)
        *ret_service = service;
    return more;
}

uint8_t *dd_health_response_encode(enum dd_health h, size_t *ret_len)
{
    dd_wire_out o = { 0 };
    dd_wire_put_varint(&o, 1, (uint64_t)h);
    return dd_wire_take(&o, ret_len);
}

/* ---- grpc.reflection.v1 ---- */

int dd_reflection_request_decode(const uint8_t *msg, size_t len, dd_reflection_request *ret)
{
    dd_reflection_request r = { .whole = { msg, len } };
    dd_bytes rest = r.whole;
    dd_wire_field f;
    int more;
    while ((more = dd_wire_next(&rest, &f)) > 0) {
        if (f.number != 1 && (f.number < DD_REFLECTION_FILE || f.number > DD_REFLECTION_SERVICES))
            continue;
        if (f.number == DD_REFLECTION_EXTENSION ? f.type != 2 : !is_text_field(&f))
            return -1;
        if (f.number == 1) {
            r.host = f.bytes;
        } else {
            r.kind = (enum dd_reflection_kind)f.number;
            r.name = f.bytes;
        }
    }
    if (more == 0)
        *ret = r;
    return more;
}

static dd_wire_out begin_answer(const dd_reflection_request *q)
{
    dd_wire_out o = { 0 };
    if (q->host.len)
        dd_wire_put_bytes(&o, 1, q->host.data, q->host.len);
    dd_wire_put_bytes(&o, 2, q->whole.data, q->whole.len);
    return o;
}

uint8_t *dd_reflection_files_encode(const dd_reflection_request *q, const dd_bytes *files, size_t n,
                                    size_t *ret_len)
{
    dd_wire_out o = begin_answer(q), list = { 0 };
    for (size_t i = 0; i < n; i++)
        dd_wire_put_bytes(&list, 1, files[i].data, files[i].len);
    put_message(&o, 4, &list);
    return dd_wire_take(&o, ret_len);
}

uint8_t *dd_reflection_services_encode(const dd_reflection_request *q, const dd_bytes *names,
                                       size_t n, size_t *ret_len)
{
    dd_wire_out o = begin_answer(q), list = { 0 };
    for (size_t i = 0; i < n; i++) {
        dd_wire_out service = { 0 };
        dd_wire_put_bytes(&service, 1, names[i].data, names[i].len);
        put_message(&list, 1, &service);
    }
    put_message(&o, 6, &list);
    return dd_wire_take(&o, ret_len);
}

uint8_t *dd_reflection_error_encode(const dd_reflection_request *q, enum dd_grpc_code code,
                                    const char *text, size_t *ret_len)
{
    dd_wire_out o = begin_answer(q), error = { 0 };
    dd_wire_put_varint(&error, 1, (uint64_t)code);
    dd_wire_put_bytes(&error, 2, text, strlen(text));
    put_message(&o, 7, &error);
    return dd_wire_take(&o, ret_len);
}
