/* deltac.c -- ttrpc 1.2 from the client's side, blocking.
 *
 * A frame is a 10-byte head (length u32, stream u32, both big-endian, type u8,
 * flags u8) and its payload. A request opens a stream with an odd, rising
 * number; data frames bring messages of a streaming answer, a response frame
 * brings the single message of a unary answer or the status of a failure. */
#include "deltac.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "google/rpc/error_details.pb-c.h"
#include "google/rpc/status.pb-c.h"
#include "ttrpc.pb-c.h"

enum { HEAD = 10, MAX_PAYLOAD = 4 << 20, MAX_WAITING = 16 << 20 };
enum { TYPE_REQUEST = 1, TYPE_RESPONSE = 2, TYPE_DATA = 3 };
enum { FLAG_REMOTE_CLOSED = 1, FLAG_NO_DATA = 4 };

/* A message that came for a call, not read yet. */
typedef struct waiting {
    struct waiting *next;
    size_t len;
    uint8_t bytes[];
} waiting;

struct dc_call {
    dc_client *client;
    dc_call *next; /* of the client */
    uint32_t stream;
    waiting *first, **last;
    bool ended;
    dc_status status; /* once ended */
};

struct dc_client {
    int fd;
    bool broken;
    uint32_t next_stream;
    dc_call *calls;
    size_t waiting_bytes;
    uint8_t *in; /* bytes read and not yet a whole frame */
    size_t in_len, in_cap;
};

/* ---- status */

const char *dc_code_name(int code)
{
    static const char *const names[] = {
        "OK",
        "CANCELLED",
        "UNKNOWN",
        "INVALID_ARGUMENT",
        "DEADLINE_EXCEEDED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "RESOURCE_EXHAUSTED",
        "FAILED_PRECONDITION",
        "ABORTED",
        "OUT_OF_RANGE",
        "UNIMPLEMENTED",
        "INTERNAL",
        "UNAVAILABLE",
        "DATA_LOSS",
        "UNAUTHENTICATED",
    };
    return code >= 0 && (size_t)code < sizeof names / sizeof *names ? names[code] : "UNKNOWN";
}

enum {
    CODE_UNKNOWN = 2,
    CODE_INVALID = 3,
    CODE_EXHAUSTED = 8,
    CODE_INTERNAL = 13,
    CODE_UNAVAILABLE = 14
};

__attribute__((format(printf, 4, 5))) static int fail(dc_status *st, int ret, int code,
                                                      const char *format, ...)
{
    *st = (dc_status){ .code = code };
    va_list ap;
    va_start(ap, format);
    (void)vsnprintf(st->message, sizeof st->message, format, ap);
    va_end(ap);
    return ret;
}

static int broken(dc_client *c, dc_status *st, int code, const char *what)
{
    c->broken = true;
    return fail(st, DC_ECLIENT, code, "%s", what);
}

/* google.rpc.Status to dc_status */
static void read_status(const Google__Rpc__Status *s, dc_status *st)
{
    *st = (dc_status){ .code = s->code };
    (void)snprintf(st->message, sizeof st->message, "%s", s->message);
    for (size_t i = 0; i < s->n_details; i++) {
        const Google__Protobuf__Any *any = s->details[i];
        const char *type = strrchr(any->type_url, '/');
        type = type ? type + 1 : any->type_url;
        if (strcmp(type, "google.rpc.ErrorInfo") == 0) {
            Google__Rpc__ErrorInfo *info =
                google__rpc__error_info__unpack(NULL, any->value.len, any->value.data);
            if (info)
                (void)snprintf(st->reason, sizeof st->reason, "%s", info->reason);
            google__rpc__error_info__free_unpacked(info, NULL);
        } else if (strcmp(type, "google.rpc.RetryInfo") == 0) {
            Google__Rpc__RetryInfo *retry =
                google__rpc__retry_info__unpack(NULL, any->value.len, any->value.data);
            if (retry && retry->retry_delay)
                st->retry_ms = (uint32_t)(retry->retry_delay->seconds * 1000 +
                                          retry->retry_delay->nanos / 1000000);
            google__rpc__retry_info__free_unpacked(retry, NULL);
        }
    }
}

/* ---- connection */

const char *dc_default_socket(void)
{
    static char path[sizeof((struct sockaddr_un *)0)->sun_path];
    static const struct {
        const char *variable, *folder;
    } places[] = { { "RUNTIME_DIRECTORY", "" }, { "XDG_RUNTIME_DIR", "/deltad" } };
    for (size_t i = 0; i < 2; i++) {
        const char *dir = getenv(places[i].variable);
        if (!dir || !*dir)
            continue;
        int n = snprintf(path, sizeof path, "%s%s/deltad-ttrpc.sock", dir, places[i].folder);
        if (n > 0 && (size_t)n < sizeof path && access(path, F_OK) == 0)
            return path;
    }
    (void)snprintf(path, sizeof path, "/run/deltad/deltad-ttrpc.sock");
    return path;
}

int dc_open(const char *path, dc_client **ret_c, dc_status *st)
{
    *st = (dc_status){ 0 };
    if (!path)
        path = dc_default_socket();
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    if (strlen(path) >= sizeof a.sun_path)
        return fail(st, DC_ECLIENT, CODE_INVALID, "socket path is longer than %zu bytes: %s",
                    sizeof a.sun_path - 1, path);
    memcpy(a.sun_path, path, strlen(path) + 1);
    dc_client *c = calloc(1, sizeof *c);
    if (!c)
        return fail(st, DC_ECLIENT, CODE_EXHAUSTED, "out of memory");
    c->next_stream = 1;
    c->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int r = 0;
    if (c->fd >= 0)
        do
            r = connect(c->fd, (const struct sockaddr *)&a, sizeof a);
        while (r < 0 && errno == EINTR);
    if (c->fd < 0 || r < 0) {
        fail(st, 0, CODE_UNAVAILABLE, "%s: %s", path, strerror(errno));
        dc_free(c);
        return DC_ECLIENT;
    }
    *ret_c = c;
    return 0;
}

void dc_free(dc_client *c)
{
    if (!c)
        return;
    while (c->calls)
        dc_call_free(c->calls);
    if (c->fd >= 0)
        (void)close(c->fd);
    free(c->in);
    free(c);
}

static int write_all(dc_client *c, const uint8_t *p, size_t n, dc_status *st)
{
    while (n) {
        ssize_t w = send(c->fd, p, n, MSG_NOSIGNAL);
        if (w < 0 && errno == EINTR)
            continue; /* half a frame must not stay behind */
        if (w < 0)
            return broken(c, st, CODE_UNAVAILABLE, "deltad closed the connection");
        p += w;
        n -= (size_t)w;
    }
    return 0;
}

static uint32_t get_u32(const uint8_t *p)
{
    return (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
}

static void put_u32(uint8_t *p, uint32_t v)
{
    p[0] = (uint8_t)(v >> 24);
    p[1] = (uint8_t)(v >> 16);
    p[2] = (uint8_t)(v >> 8);
    p[3] = (uint8_t)v;
}

/* ---- frames in */

static int keep(dc_call *call, const uint8_t *p, size_t n, dc_status *st)
{
    dc_client *c = call->client;
    if (c->waiting_bytes + n > MAX_WAITING)
        return broken(c, st, CODE_EXHAUSTED, "too many unread messages of other calls");
    waiting *w = malloc(sizeof *w + n);
    if (!w)
        return broken(c, st, CODE_EXHAUSTED, "out of memory");
    w->next = NULL;
    w->len = n;
    if (n)
        memcpy(w->bytes, p, n);
    *call->last = w;
    call->last = &w->next;
    c->waiting_bytes += n;
    return 0;
}

static int take_frame(dc_client *c, uint32_t stream, unsigned type, unsigned flags,
                      const uint8_t *p, size_t n, dc_status *st)
{
    dc_call *call = c->calls;
    while (call && call->stream != stream)
        call = call->next;
    if (!call || call->ended)
        return 0; /* of a call that was forgotten */
    if (type == TYPE_DATA) {
        int r = flags & FLAG_NO_DATA ? 0 : keep(call, p, n, st);
        call->ended = flags & FLAG_REMOTE_CLOSED;
        return r;
    }
    if (type != TYPE_RESPONSE)
        return broken(c, st, CODE_INTERNAL, "deltad sent a frame of an unknown type");
    Ttrpc__Response *answer = ttrpc__response__unpack(NULL, n, p);
    if (!answer)
        return broken(c, st, CODE_INTERNAL, "deltad sent a malformed response");
    int r = 0;
    if (answer->status && answer->status->code)
        read_status(answer->status, &call->status);
    else
        r = keep(call, answer->payload.data, answer->payload.len, st);
    call->ended = true;
    ttrpc__response__free_unpacked(answer, NULL);
    return r;
}

/* Waits for bytes and handles the whole frames among them. */
static int read_frames(dc_client *c, dc_status *st)
{
    if (c->in_cap - c->in_len < 64 << 10) {
        size_t cap = c->in_cap ? c->in_cap * 2 : 128 << 10;
        uint8_t *p = realloc(c->in, cap);
        if (!p)
            return broken(c, st, CODE_EXHAUSTED, "out of memory");
        c->in = p;
        c->in_cap = cap;
    }
    struct pollfd wait = { .fd = c->fd, .events = POLLIN };
    if (poll(&wait, 1, -1) < 0)
        return errno == EINTR ? DC_EINTR : broken(c, st, CODE_INTERNAL, "poll failed");
    ssize_t n = recv(c->fd, c->in + c->in_len, c->in_cap - c->in_len, 0);
    if (n < 0 && errno == EINTR)
        return DC_EINTR;
    if (n <= 0)
        return broken(c, st, CODE_UNAVAILABLE, "deltad closed the connection");
    c->in_len += (size_t)n;

    size_t at = 0;
    while (c->in_len - at >= HEAD) {
        const uint8_t *head = c->in + at;
        const uint32_t len = get_u32(head);
        if (len > MAX_PAYLOAD)
            return broken(c, st, CODE_INTERNAL, "deltad sent a frame beyond 4 MiB");
        if (c->in_len - at - HEAD < len)
            break;
        int r = take_frame(c, get_u32(head + 4), head[8], head[9], head + HEAD, len, st);
        if (r < 0)
            return r;
        at += HEAD + len;
    }
    memmove(c->in, c->in + at, c->in_len - at);
    c->in_len -= at;
    return 0;
}

/* ---- calls */

int dc_start(dc_client *c, const char *method, const ProtobufCMessage *request, uint64_t timeout_ns,
             dc_call **ret_call, dc_status *st)
{
    *st = (dc_status){ 0 };
    if (c->broken)
        return fail(st, DC_ECLIENT, CODE_UNAVAILABLE, "the connection is broken");
    const char *slash = strchr(method, '/');
    char service[128];
    if (!slash || (size_t)(slash - method) >= sizeof service)
        return fail(st, DC_ECLIENT, CODE_INVALID, "method is not service/method: %s", method);
    (void)snprintf(service, sizeof service, "%.*s", (int)(slash - method), method);
    char name[128];
    (void)snprintf(name, sizeof name, "%s", slash + 1);

    const size_t payload = protobuf_c_message_get_packed_size(request);
    Ttrpc__Request envelope = TTRPC__REQUEST__INIT;
    envelope.service = service;
    envelope.method = name;
    envelope.timeout_nano = timeout_ns > INT64_MAX ? INT64_MAX : (int64_t)timeout_ns;
    envelope.payload.len = payload;
    envelope.payload.data = malloc(payload ? payload : 1);
    dc_call *call = calloc(1, sizeof *call);
    uint8_t *frame = NULL;
    int r;
    if (!envelope.payload.data || !call) {
        r = fail(st, DC_ECLIENT, CODE_EXHAUSTED, "out of memory");
        goto out;
    }
    protobuf_c_message_pack(request, envelope.payload.data);
    const size_t n = ttrpc__request__get_packed_size(&envelope);
    if (n > MAX_PAYLOAD) {
        r = fail(st, DC_ECALL, CODE_EXHAUSTED, "the request has %zu bytes, more than 4 MiB", n);
        goto out;
    }
    frame = malloc(HEAD + n);
    if (!frame) {
        r = fail(st, DC_ECLIENT, CODE_EXHAUSTED, "out of memory");
        goto out;
    }
    put_u32(frame, (uint32_t)n);
    put_u32(frame + 4, c->next_stream);
    frame[8] = TYPE_REQUEST;
    frame[9] = FLAG_REMOTE_CLOSED; /* we send nothing more on this stream */
    ttrpc__request__pack(&envelope, frame + HEAD);
    r = write_all(c, frame, HEAD + n, st);
    if (r < 0)
        goto out;
    *call = (dc_call){ .client = c, .next = c->calls, .stream = c->next_stream };
    call->last = &call->first;
    c->next_stream += 2;
    c->calls = call;
    *ret_call = call;
    call = NULL;
out:
    free(envelope.payload.data);
    free(frame);
    free(call);
    return r;
}

int dc_next(dc_call *call, const ProtobufCMessageDescriptor *type, ProtobufCMessage **ret_m,
            dc_status *st)
{
    dc_client *c = call->client;
    *st = (dc_status){ 0 };
    while (!call->first && !call->ended) {
        if (c->broken)
            return fail(st, DC_ECLIENT, CODE_UNAVAILABLE, "the connection is broken");
        int r = read_frames(c, st);
        if (r < 0)
            return r;
    }
    waiting *w = call->first;
    if (!w) {
        *st = call->status;
        return st->code ? DC_ECALL : 0;
    }
    call->first = w->next;
    if (!call->first)
        call->last = &call->first;
    c->waiting_bytes -= w->len;
    ProtobufCMessage *m = protobuf_c_message_unpack(type, NULL, w->len, w->bytes);
    free(w);
    if (!m)
        return broken(c, st, CODE_INTERNAL, "deltad sent a malformed message");
    *ret_m = m;
    return 1;
}

void dc_call_free(dc_call *call)
{
    if (!call)
        return;
    dc_call **at = &call->client->calls;
    while (*at != call)
        at = &(*at)->next;
    *at = call->next;
    while (call->first) {
        waiting *w = call->first;
        call->first = w->next;
        call->client->waiting_bytes -= w->len;
        free(w);
    }
    free(call);
}

int dc_unary(dc_client *c, const char *method, const ProtobufCMessage *request,
             const ProtobufCMessageDescriptor *type, uint64_t timeout_ns, ProtobufCMessage **ret_m,
             dc_status *st)
{
    dc_call *call;
    int r = dc_start(c, method, request, timeout_ns, &call, st);
    if (r < 0)
        return r;
    r = dc_next(call, type, ret_m, st);
    if (r == 0)
        r = fail(st, DC_ECALL, CODE_INTERNAL, "deltad answered without a message");
    dc_call_free(call);
    return r < 0 ? r : 0;
}
