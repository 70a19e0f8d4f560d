/* test_codec_std.c -- the standard messages, against protobuf-c's own reading of them. */
#include "daemon/codec_std.h"
#include "google/rpc/error_details.pb-c.h"
#include "google/rpc/status.pb-c.h"
#include "grpc/health/v1/health.pb-c.h"
#include "grpc/reflection/v1/reflection.pb-c.h"
#include "support/tap.h"
#include "ttrpc.pb-c.h"

static dd_bytes text(const char *s)
{
    return (dd_bytes){ (const uint8_t *)s, strlen(s) };
}

TEST(status_is_what_protobuf_reads)
{
    dd_status st;
    size_t len;
    dd_status_set(&st, DD_RESOURCE_EXHAUSTED, "QUEUE_FULL", "%s", "cut \xe2\x82");
    st.retry_ms = 2345;
    st.meta[0].key = "queue";
    (void)snprintf(st.meta[0].value, sizeof st.meta[0].value, "16");
    st.n_meta = 1;
    uint8_t *bytes = dd_status_encode(&st, &len);
    REQUIRE(bytes);
    Google__Rpc__Status *s = google__rpc__status__unpack(NULL, len, bytes);
    REQUIRE(s && s->n_details == 2);
    CHECK_EQ(s->code, 8);
    CHECK_STR(s->message, "cut ??");
    CHECK_STR(s->details[0]->type_url, "type.googleapis.com/google.rpc.ErrorInfo");
    Google__Rpc__ErrorInfo *info =
        google__rpc__error_info__unpack(NULL, s->details[0]->value.len, s->details[0]->value.data);
    REQUIRE(info && info->n_metadata == 1);
    CHECK_STR(info->reason, "QUEUE_FULL");
    CHECK_STR(info->domain, "deltad");
    CHECK_STR(info->metadata[0]->key, "queue");
    CHECK_STR(info->metadata[0]->value, "16");
    Google__Rpc__RetryInfo *retry =
        google__rpc__retry_info__unpack(NULL, s->details[1]->value.len, s->details[1]->value.data);
    REQUIRE(retry && retry->retry_delay);
    CHECK_EQ(retry->retry_delay->seconds, 2);
    CHECK_EQ(retry->retry_delay->nanos, 345000000);
    google__rpc__retry_info__free_unpacked(retry, NULL);
    google__rpc__error_info__free_unpacked(info, NULL);
    google__rpc__status__free_unpacked(s, NULL);
    free(bytes);
}

TEST(status_names_what_is_missing)
{
    dd_status st;
    size_t len;
    dd_status_set(&st, DD_NOT_FOUND, "SESSION_UNKNOWN", "none");
    st.missing = "deltad.v1.Session";
    (void)snprintf(st.missing_name, sizeof st.missing_name, "abc");
    uint8_t *bytes = dd_status_encode(&st, &len);
    REQUIRE(bytes);
    Google__Rpc__Status *s = google__rpc__status__unpack(NULL, len, bytes);
    REQUIRE(s && s->n_details == 2);
    CHECK_STR(s->details[1]->type_url, "type.googleapis.com/google.rpc.ResourceInfo");
    Google__Rpc__ResourceInfo *r = google__rpc__resource_info__unpack(
        NULL, s->details[1]->value.len, s->details[1]->value.data);
    REQUIRE(r);
    CHECK_STR(r->resource_type, "deltad.v1.Session");
    CHECK_STR(r->resource_name, "abc");
    google__rpc__resource_info__free_unpacked(r, NULL);
    google__rpc__status__free_unpacked(s, NULL);
    free(bytes);
}

TEST(ttrpc_envelope_both_ways)
{
    Ttrpc__KeyValue other = TTRPC__KEY_VALUE__INIT, id = TTRPC__KEY_VALUE__INIT;
    Ttrpc__KeyValue *pairs[] = { &other, &id };
    Ttrpc__Request q = TTRPC__REQUEST__INIT;
    uint8_t bytes[256], payload[] = { 0, 1, 0xff };
    dd_ttrpc_request got;
    other.key = "a";
    other.value = "b";
    id.key = "x-request-id";
    id.value = "r1";
    q.service = "s.S";
    q.method = "M";
    q.payload = (ProtobufCBinaryData){ sizeof payload, payload };
    q.timeout_nano = -5;
    q.n_metadata = 2;
    q.metadata = pairs;
    size_t len = ttrpc__request__pack(&q, bytes);
    REQUIRE(dd_ttrpc_request_decode(bytes, len, &got) == 0);
    CHECK_MEM(got.service.data, got.service.len, "s.S", 3);
    CHECK_MEM(got.method.data, got.method.len, "M", 1);
    CHECK_MEM(got.payload.data, got.payload.len, payload, sizeof payload);
    CHECK_MEM(got.request_id.data, got.request_id.len, "r1", 2);
    CHECK_EQ(got.timeout_ns, -5);
    /* Cut anywhere, it is either refused or a message with fewer fields, never read beyond. */
    for (size_t n = 0; n < len; n++) {
        uint8_t *copy = malloc(n ? n : 1);
        REQUIRE(copy);
        memcpy(copy, bytes, n);
        (void)dd_ttrpc_request_decode(copy, n, &got);
        free(copy);
    }
    dd_status st;
    dd_status_set(&st, DD_NOT_FOUND, "NO_SESSION", "none");
    for (int i = 0; i < 2; i++) {
        uint8_t *out = dd_ttrpc_response_encode(i ? &st : NULL, text("pay"), &len);
        Ttrpc__Response *r = ttrpc__response__unpack(NULL, len, out);
        REQUIRE(r);
        CHECK_EQ(r->status ? r->status->code : 0, i ? DD_NOT_FOUND : DD_OK);
        CHECK_MEM(r->payload.data, r->payload.len, "pay", i ? 0U : 3U);
        ttrpc__response__free_unpacked(r, NULL);
        free(out);
    }
}

TEST(malformed_messages_are_refused)
{
    static const struct {
        const char *bytes;
        size_t len;
    } cases[] = {
        { "\x0a", 1 }, /* no length */
        { "\x0a\x05"
          "ab",
          4 },                         /* shorter than it says */
        { "\x0a\x02\xc0\x80", 4 },     /* long form of NUL */
        { "\x0a\x01\x00", 3 },         /* NUL */
        { "\x0a\x03\xed\xa0\x80", 5 }, /* a surrogate */
        { "\x0a\x04\xf4\x90\x80\x80", 6 },
        { "\x08\x01", 2 }, /* a number where text belongs */
        { "\x0b", 1 },     /* a group */
        { "\x02\x00", 2 }, /* field 0 */
        { "\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 11 },
        { "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 11 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const uint8_t *p = (const uint8_t *)cases[i].bytes;
        dd_ttrpc_request q;
        dd_bytes service;
        CHECK_EQ(dd_ttrpc_request_decode(p, cases[i].len, &q), -1);
        CHECK_EQ(dd_health_request_decode(p, cases[i].len, &service), -1);
    }
}

TEST(health_both_ways)
{
    Grpc__Health__V1__HealthCheckRequest q = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    uint8_t bytes[64];
    dd_bytes service;
    size_t len;
    q.service = "a.B";
    len = grpc__health__v1__health_check_request__pack(&q, bytes);
    REQUIRE(dd_health_request_decode(bytes, len, &service) == 0);
    CHECK_MEM(service.data, service.len, "a.B", 3);
    CHECK_EQ(dd_health_request_decode(NULL, 0, &service), 0);
    CHECK_EQ(service.len, 0);
    uint8_t *out = dd_health_response_encode(DD_HEALTH_NOT_SERVING, &len);
    Grpc__Health__V1__HealthCheckResponse *r =
        grpc__health__v1__health_check_response__unpack(NULL, len, out);
    REQUIRE(r);
    CHECK_EQ(r->status, 2);
    grpc__health__v1__health_check_response__free_unpacked(r, NULL);
    free(out);
}

TEST(reflection_answers)
{
    Grpc__Reflection__V1__ServerReflectionRequest q =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    uint8_t bytes[64];
    dd_reflection_request got;
    size_t len;
    q.host = "h";
    q.message_request_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_BY_FILENAME;
    q.file_by_filename = "f.proto";
    len = grpc__reflection__v1__server_reflection_request__pack(&q, bytes);
    REQUIRE(dd_reflection_request_decode(bytes, len, &got) == 0);
    CHECK_EQ(got.kind, DD_REFLECTION_FILE);
    CHECK_MEM(got.name.data, got.name.len, "f.proto", 7);
    const dd_bytes files[] = { text("one"), text("two") };
    uint8_t *out = dd_reflection_files_encode(&got, files, 2, &len);
    Grpc__Reflection__V1__ServerReflectionResponse *r =
        grpc__reflection__v1__server_reflection_response__unpack(NULL, len, out);
    REQUIRE(r && r->original_request && r->file_descriptor_response);
    CHECK_STR(r->valid_host, "h");
    CHECK_STR(r->original_request->file_by_filename, "f.proto");
    CHECK_EQ(r->file_descriptor_response->n_file_descriptor_proto, 2);
    grpc__reflection__v1__server_reflection_response__free_unpacked(r, NULL);
    free(out);
    out = dd_reflection_error_encode(&got, DD_NOT_FOUND, "no", &len);
    r = grpc__reflection__v1__server_reflection_response__unpack(NULL, len, out);
    REQUIRE(r && r->error_response);
    CHECK_EQ(r->error_response->error_code, 5);
    CHECK_STR(r->error_response->error_message, "no");
    grpc__reflection__v1__server_reflection_response__free_unpacked(r, NULL);
    free(out);
}

TEST(text_is_utf8_without_nul_wherever_the_fault_stands)
{
    static const struct {
        const char *bytes;
        size_t len;
        bool is_text;
    } parts[] = { { "", 1, false },
                  { "\x01\x7f", 2, true },
                  { "\xc3\xa4", 2, true },
                  { "\xc3", 1, false },
                  { "\x80", 1, false },
                  { "\xf0\x9f\x98\x80", 4, true },
                  { "\xed\xa0\x80", 3, false } };
    uint8_t text[40];
    for (size_t p = 0; p < sizeof parts / sizeof parts[0]; p++)
        for (size_t at = 0; at < 30; at++)
            for (size_t len = at + parts[p].len; len <= sizeof text; len++) {
                memset(text, 'a', sizeof text);
                memcpy(text + at, parts[p].bytes, parts[p].len);
                CHECK_EQ(dd_wire_is_text((dd_bytes){ text, len }), parts[p].is_text);
            }
    CHECK(dd_wire_is_text((dd_bytes){ NULL, 0 }));
}
