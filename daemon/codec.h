/* codec.h -- deltad.v1 messages to plain structs and back.
 *
 * codec.c is the only file that sees generated protobuf code. Decoders unpack within bounds
 * (wire.h), check every field against the validator table and fill in defaults, so that handlers
 * meet nothing but valid values. What a request asks for and this version lacks is refused with
 * UNIMPLEMENTED and the field's name, never ignored.
 *
 * Ownership  a decoded request lives in its arena; dd_request_done() ends it, also after failure.
 *            Encoders return malloc'ed bytes, NULL when memory ran out.
 * Errors     decoders return 0, or -1 with *st filled. */
#ifndef DD_CODEC_H
#define DD_CODEC_H

#include "base/arena.h"
#include "daemon/codec_std.h"
#include "daemon/grammars.h"
#include "daemon/recall.h"
#include "daemon/rpc.h"
#include "delta/delta.h"

enum dd_format {
    DD_FORMAT_NONE,
    DD_FORMAT_JSON_SCHEMA,
    DD_FORMAT_JSON_OBJECT,
    DD_FORMAT_REGEX,
    DD_FORMAT_GRAMMAR,
    DD_FORMAT_CHOICE,
};

typedef struct dd_request {
    de_arena arena;
    const char *request_id, *session_id, *name, *idempotency_key; /* "" if absent */
    bool detach;
    uint64_t from_seq; /* of Resume */
    bool has_expect;
    uint64_t expect_generation;
    delta_message *messages;
    dd_bytes *packed; /* n_messages: each as protobuf bytes, for a session's transcript */
    size_t n_messages;
    dd_sampled *sampled; /* [n_messages] as answers were sampled, if known; NULL: of none */
    delta_str *tools;    /* JSON objects as the template wants them */
    dd_bytes *packed_tools;
    size_t n_tools;
    enum delta_tool_mode tool_mode;
    bool tool_is_named;    /* tool_choice.name: tool_names[0], once */
    delta_str *tool_names; /* tool_choice.allowed or name: the tools that may be called; n 0: all */
    size_t n_tool_names;
    bool *tool_strict; /* [n_tools] held to its schema also when the choice is the model's */
    bool one_call;     /* parallel_tool_calls is false */
    enum dd_format format;
    delta_str format_text;     /* schema, regex or grammar */
    delta_str *format_choices; /* DD_FORMAT_CHOICE */
    size_t n_format_choices;
    bool has_thinking, thinking; /* thinking: true if absent */
    bool has_budget;             /* of reasoning */
    uint32_t budget_tokens;
    bool has_preserve, preserve;
    bool omit_reasoning, add_vision_id;
    bool has_text; /* Generate: text, else ids */
    delta_str text;
    const uint32_t *ids;
    size_t n_ids;
    bool plain_text, with_bytes, skip_special, omit_ids, all_users, with_messages, cut;
    bool unpin, with_sampled;
    delta_sampling sampling; /* after dd_request_sampling() */
    delta_stopping stopping; /* max_tokens 0: absent */
    bool include_tokens, include_prefill, include_queued;
    uint64_t max_queue_ns, max_wall_ns; /* 0: none */
    const char *cache_salt;             /* NULL if absent */
    bool bypass_cache;
    const uint32_t *checkpoint_messages;
    size_t n_checkpoint_messages;
    int priority;
    uint32_t ctx_tokens;           /* 0: absent */
    uint32_t count, keep_messages; /* keep_messages UINT32_MAX: all */
    bool has_idle_timeout;
    uint64_t idle_timeout_ns;
    dd_bytes *chunks;
    size_t n_chunks;
    const void *sampling_in; /* the codec's own */
} dd_request;

enum dd_request_kind {
    DD_REQ_CHAT,
    DD_REQ_GENERATE,
    DD_REQ_CANCEL, /* request_id */
    DD_REQ_RENDER,
    DD_REQ_PARSE,
    DD_REQ_TOKENIZE,
    DD_REQ_DETOKENIZE,
    DD_REQ_CREATE,
    DD_REQ_GET, /* session_id, with_messages */
    DD_REQ_LIST,
    DD_REQ_CLOSE,
    DD_REQ_APPEND,
    DD_REQ_FORK,    /* session_id, count, keep_messages */
    DD_REQ_RESUME,  /* request_id, from_seq */
    DD_REQ_REWIND,  /* session_id, keep_messages */
    DD_REQ_PIN,     /* session_id, unpin */
    DD_REQ_EXPORT,  /* session_id, with_sampled */
    DD_REQ_SAVE,    /* session_id, name */
    DD_REQ_RESTORE, /* name */
    DD_REQ_SAVES,
    DD_REQ_DELETE_SAVE, /* name */
    DD_REQ_INFO,
    DD_REQ_STATS,
};

int dd_request_decode(enum dd_request_kind kind, const uint8_t *msg, size_t len, dd_request *ret_r,
                      dd_status *st);
/* Completes r->sampling with the defaults that go with r->thinking, draws a seed if there is none,
 * and checks all ids against the vocabulary. */
int dd_request_sampling(dd_request *r, const delta_engine_info *info, dd_status *st);
void dd_request_done(dd_request *r);
/* A message of a transcript, into the arena of r. */
int dd_codec_message(dd_request *r, dd_bytes packed, delta_message *ret_m, dd_status *st);
int dd_codec_tool(dd_request *r, dd_bytes packed, delta_str *ret_json, bool *ret_strict,
                  dd_status *st);
/* The name of a tool as it was declared, "" if there is none. */
delta_str dd_request_tool_name(dd_request *r, size_t tool);
/* After the tools are known, a session's too: what tool_choice names is declared. */
int dd_request_tools_check(dd_request *r, dd_status *st);

/* ---- events */

enum dd_event_kind {
    DD_EVENT_ACCEPTED,
    DD_EVENT_QUEUED,
    DD_EVENT_PREFILL,
    DD_EVENT_REASONING,
    DD_EVENT_TEXT,
    DD_EVENT_CALL_START,
    DD_EVENT_CALL_ARGS,
    DD_EVENT_CALL_END,
    DD_EVENT_TOKEN,
    DD_EVENT_FINISHED,
};
enum dd_finish { /* as FinishReason */
                 DD_FINISH_STOP = 1,
                 DD_FINISH_TOOL_CALLS,
                 DD_FINISH_LENGTH,
                 DD_FINISH_TIME,
                 DD_FINISH_CANCELLED,
                 DD_FINISH_ERROR,
};
typedef struct dd_usage {
    uint32_t prompt, cached, completion, reasoning;
    char note[160]; /* why not more was cached */
} dd_usage;
typedef struct dd_event {
    enum dd_event_kind kind;
    delta_str text; /* REASONING, TEXT, CALL_ARGS; CALL_END: the whole arguments */
    /* calls */
    uint32_t index;
    const char *id, *name;
    bool complete;
    /* ACCEPTED, FINISHED */
    const char *request_id, *session_id;
    uint64_t generation;
    const delta_sampling *sampling;
    uint32_t max_tokens;
    bool thinking;
    /* QUEUED: position; PREFILL */
    uint32_t done, total, cached;
    /* TOKEN */
    uint32_t token;
    const delta_tokenizer *tokenizer;
    float logprob;
    const delta_top_logprob *top;
    uint32_t n_top;
    /* FINISHED */
    enum dd_finish reason;
    const char *matched_stop; /* or NULL */
    bool has_stop_token;
    uint32_t stop_token;
    dd_usage usage;
    uint64_t queue_ns, prefill_ns, decode_ns, first_token_ns, total_ns;
} dd_event;

/* A ChatEvent, or a GenerateEvent if !chat. seq is put in front. */
uint8_t *dd_event_encode(bool chat, uint64_t seq, const dd_event *e, size_t *ret_len);
uint8_t *dd_call_end_encode(const dd_event *e, size_t *ret_len); /* a ToolCallEnd alone */

/* ---- answers */

typedef struct dd_session_view {
    const char *id, *name;
    uint64_t generation;
    uint32_t n_messages, n_tokens, ctx_tokens, owner_uid;
    bool busy, parked, pinned;
    uint64_t age_ns, idle_ns, idle_timeout_ns;
} dd_session_view;
uint8_t *dd_session_encode(const dd_session_view *v, size_t *ret_len); /* a Session */
uint8_t *dd_save_encode(const char *name, uint64_t bytes, uint64_t age_ns, size_t *ret_len);
uint8_t *dd_usage_encode(const dd_usage *u, size_t *ret_len);
uint8_t *dd_info_encode(const delta_engine_info *i, size_t *ret_len);

/* A session as it is kept on disk; see saved.proto. */
typedef struct dd_saved {
    const char *model, *id, *name;
    uint64_t generation, idle_timeout_ns;
    bool owner_is_unix;
    uint32_t owner_uid;
    dd_bytes owner_address;
    bool thinking, omit_reasoning, preserve, pinned;
    uint32_t ctx_tokens;
    const dd_bytes *tools, *messages; /* packed */
    size_t n_tools, n_messages;
    const dd_sampled *sampled; /* [n_messages] */
} dd_saved;
uint8_t *dd_saved_encode(const dd_saved *x, size_t *ret_len);
/* What *ret_x points to is in the arena, which begins here; the caller ends it, also on failure. */
int dd_saved_decode(const uint8_t *bytes, size_t len, de_arena *a, dd_saved *ret_x, dd_status *st);

/* The SessionExport of it, and what is one ExportSessionResponse of that. */
uint8_t *dd_export_encode(const dd_saved *x, bool with_sampled, size_t *ret_len);
uint8_t *dd_export_piece_encode(const uint8_t *bytes, size_t len, size_t *ret_len);

typedef struct dd_stats {
    uint64_t uptime_ns, requests_total, cancelled, failed, prompt_tokens, completion_tokens;
    uint32_t running, queued, sessions, connections;
    uint64_t connections_total;
    int phase; /* 1 loading, 2 serving, 3 draining */
    delta_engine_stats engine;
    uint64_t repairs[DELTA_REPAIR_N];
    dd_grammar_stats grammars;
} dd_stats;
uint8_t *dd_stats_encode(const dd_stats *s, size_t *ret_len);

/* The assistant's Message of a transcript. Calls: name, id, arguments in text. */
uint8_t *dd_answer_encode(bool has_reasoning, delta_str reasoning, delta_str content,
                          const dd_event *calls, size_t n_calls, size_t *ret_len);
/* A RenderPromptResponse. */
uint8_t *dd_render_encode(const delta_rendered *r, size_t n_spans, const uint32_t *ids,
                          size_t n_ids, bool omit_ids, size_t *ret_len);
uint8_t *dd_tokens_encode(const delta_tokenizer *t, const uint32_t *ids, size_t n, bool with_bytes,
                          size_t *ret_len);

#endif
