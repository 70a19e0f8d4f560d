/* deltac.h -- libdeltac: a small blocking client of deltad over its Unix socket.
 *
 * Requests and answers are the protobuf-c structs made from deltad/v1 (their
 * headers are installed beside this one). A call is started, its messages are
 * read one by one, and it ends with a status. Several calls may be open on one
 * client; messages of the others wait in memory while one is read.
 *
 *   dc_client *c; dc_call *call; dc_status st;
 *   if (dc_open(NULL, &c, &st) < 0) die(st.message);
 *   if (dc_start(c, DC_CHAT, &request.base, 0, &call, &st) < 0) die(st.message);
 *   ProtobufCMessage *m;
 *   while (dc_next(call, &deltad__v1__chat_event__descriptor, &m, &st) > 0) {
 *       ... ((Deltad__V1__ChatEvent *)m)->event_case ...
 *       protobuf_c_message_free_unpacked(m, NULL);
 *   }
 *   if (st.code) die(st.message);
 *   dc_call_free(call); dc_free(c);
 *
 * Ownership  the caller frees clients, calls and messages.
 * Threads    a client and its calls belong to one thread at a time.
 * Signals    a signal handled without SA_RESTART ends a wait with DC_EINTR; the
 *            call stays as it was and can be read on.
 * Limits     a message is at most 4 MiB; 16 MiB may wait for other calls. */
#ifndef DELTAC_H
#define DELTAC_H

#include <stddef.h>
#include <stdint.h>

#include <protobuf-c/protobuf-c.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DC_API __attribute__((visibility("default")))

typedef struct dc_client dc_client;
typedef struct dc_call dc_call;

/* Methods, as "service/method". */
#define DC_CHAT "deltad.v1.InferenceService/Chat"
#define DC_GENERATE "deltad.v1.InferenceService/Generate"
#define DC_RESUME "deltad.v1.InferenceService/Resume"
#define DC_CANCEL "deltad.v1.InferenceService/Cancel"
#define DC_RENDER_PROMPT "deltad.v1.InferenceService/RenderPrompt"
#define DC_PARSE_OUTPUT "deltad.v1.InferenceService/ParseOutput"
#define DC_TOKENIZE "deltad.v1.InferenceService/Tokenize"
#define DC_DETOKENIZE "deltad.v1.InferenceService/Detokenize"
#define DC_CREATE_SESSION "deltad.v1.SessionService/CreateSession"
#define DC_GET_SESSION "deltad.v1.SessionService/GetSession"
#define DC_LIST_SESSIONS "deltad.v1.SessionService/ListSessions"
#define DC_CLOSE_SESSION "deltad.v1.SessionService/CloseSession"
#define DC_APPEND_MESSAGES "deltad.v1.SessionService/AppendMessages"
#define DC_FORK_SESSION "deltad.v1.SessionService/ForkSession"
#define DC_REWIND_SESSION "deltad.v1.SessionService/RewindSession"
#define DC_PIN_SESSION "deltad.v1.SessionService/PinSession"
#define DC_EXPORT_SESSION "deltad.v1.SessionService/ExportSession"
#define DC_SAVE_SESSION "deltad.v1.SessionService/SaveSession"
#define DC_RESTORE_SESSION "deltad.v1.SessionService/RestoreSession"
#define DC_LIST_SAVES "deltad.v1.SessionService/ListSaves"
#define DC_DELETE_SAVE "deltad.v1.SessionService/DeleteSave"
#define DC_GET_MODEL_INFO "deltad.v1.ModelService/GetModelInfo"
#define DC_GET_STATS "deltad.v1.ModelService/GetStats"

enum {
    DC_EINTR = -1,   /* a signal came; try again or free the call */
    DC_ECALL = -2,   /* the daemon ended this call with st->code; the client is fine */
    DC_ECLIENT = -3, /* the connection is unusable: free the client */
};

typedef struct dc_status {
    int code;          /* gRPC's numbers: 0 OK, 3 INVALID_ARGUMENT, 14 UNAVAILABLE, ... */
    char reason[64];   /* ErrorInfo.reason, e.g. "CONTEXT_LENGTH"; may be empty */
    char message[512]; /* for people */
    uint32_t retry_ms; /* try again after that long; 0: no such advice */
} dc_status;

/* The path deltad listens on for this user when nothing is configured:
 * $RUNTIME_DIRECTORY, $XDG_RUNTIME_DIR, /run/deltad, the first that has one. Static storage. */
DC_API const char *dc_default_socket(void);

/* Connects; path NULL: dc_default_socket(). 0 or DC_ECLIENT (st->code UNAVAILABLE). */
DC_API int dc_open(const char *path, dc_client **ret_c, dc_status *st);
DC_API void dc_free(dc_client *c); /* with all its calls; NULL is a no-op */

/* Starts a call. timeout_ns 0: none. 0 or DC_ECLIENT. */
DC_API int dc_start(dc_client *c, const char *method, const ProtobufCMessage *request,
                    uint64_t timeout_ns, dc_call **ret_call, dc_status *st);
/* 1: *ret_m is the next message, unpacked as `type`, freed by the caller with
 * protobuf_c_message_free_unpacked(). 0: the call ended well. <0: as above. */
DC_API int dc_next(dc_call *call, const ProtobufCMessageDescriptor *type, ProtobufCMessage **ret_m,
                   dc_status *st);
/* Forgets a call. One that has not ended is not cancelled by this (ttrpc knows no cancel): use
 * DC_CANCEL with its request id, or free the client. */
DC_API void dc_call_free(dc_call *call);

/* Start, one message, end. 0 and *ret_m, or <0. */
DC_API int dc_unary(dc_client *c, const char *method, const ProtobufCMessage *request,
                    const ProtobufCMessageDescriptor *type, uint64_t timeout_ns,
                    ProtobufCMessage **ret_m, dc_status *st);

/* "INVALID_ARGUMENT"; "CODE_99" style for unknown numbers is not made: "UNKNOWN". */
DC_API const char *dc_code_name(int code);

#ifdef __cplusplus
}
#endif
#endif
