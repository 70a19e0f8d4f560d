/* live.h -- what service.c, inference.c and sessions.c share: the service, its live requests and
 * its named sessions.
 *
 * A live request (dd_live) is a Chat, Generate, CreateSession or AppendMessages from admission to
 * its end. It is freed when its call is finished and its run at the engine has ended, whichever
 * comes last: a client that is gone leaves a request that waits for the engine's last word.
 *
 * Threads    loop thread only, but for what says otherwise. */
#ifndef DD_LIVE_H
#define DD_LIVE_H

#include "base/clock.h"
#include "base/json.h"
#include "daemon/codec.h"
#include "daemon/engine_thread.h"
#include "daemon/grammars.h"
#include "daemon/limits.h"
#include "daemon/peer.h"
#include "daemon/recall.h"
#include "daemon/service.h"

enum dd_method_id {
    DD_M_CHAT,
    DD_M_GENERATE,
    DD_M_CANCEL,
    DD_M_RESUME,
    DD_M_RENDER,
    DD_M_PARSE,
    DD_M_TOKENIZE,
    DD_M_DETOKENIZE,
    DD_M_CREATE,
    DD_M_GET,
    DD_M_LIST,
    DD_M_CLOSE,
    DD_M_APPEND,
    DD_M_FORK,
    DD_M_REWIND,
    DD_M_PIN,
    DD_M_EXPORT,
    DD_M_SAVE,
    DD_M_RESTORE,
    DD_M_SAVES,
    DD_M_DELETE_SAVE,
    DD_M_INFO,
    DD_M_STATS,
    DD_M_HEALTH_CHECK,
    DD_M_HEALTH_WATCH,
    DD_M_REFLECTION,
};

typedef struct dd_live dd_live;
typedef struct dd_session dd_session;
typedef struct dd_watcher dd_watcher;
typedef struct dd_job dd_job;
typedef struct dd_ahead dd_ahead;
typedef struct dd_kept dd_kept;
typedef struct dd_export dd_export;
typedef struct dd_save dd_save;

struct dd_service {
    dd_service_options o;
    enum dd_phase phase;
    bool is_ready, is_faulty, is_freed;
    dd_engine *engine;
    dd_recall *recall;
    dd_grammars *grammars;
    uv_timer_t timer;       /* the earliest of all time limits */
    uv_timer_t drain_timer; /* tells of the drain from a clean stack */
    uint32_t n_closing;
    dd_live *live;
    uint32_t n_live, n_waiting;
    dd_job *jobs; /* of texts.c */
    uint32_t n_jobs;
    dd_ahead *ahead; /* of ahead.c */
    uint32_t n_ahead;
    uint32_t n_resting; /* live requests that have ended, kept for Resume */
    uint32_t n_keeping; /* files that keep.c writes */
    uint64_t next_run;
    dd_session *sessions;
    uint32_t n_sessions, n_pinned;
    dd_export *exports; /* of export.c */
    uint32_t n_exports;
    dd_save *saves; /* of saves.c */
    uint32_t n_saves;
    dd_watcher *watchers;
    uint32_t n_watchers;
    uint64_t started_ns;
    dd_stats stats; /* the totals */
    void (*on_drained)(void *arg);
    void *drained_arg;
};

/* What a session was when a turn had ended. */
typedef struct dd_border {
    uint32_t n_messages, n_tokens;
    bool needs_end, is_open;
} dd_border;

struct dd_session {
    dd_session *next;
    char id[DD_ID_BYTES];
    char *name;
    dd_peer owner;
    uint64_t generation, created_ns, used_ns, idle_timeout_ns;
    dd_bytes *messages;  /* packed; each malloc'ed */
    dd_sampled *sampled; /* one a message: an answer as it was sampled (malloc'ed), or nothing */
    size_t n_messages, cap_messages, bytes;
    dd_bytes *tools;
    size_t n_tools;
    bool thinking, omit_reasoning, preserve;
    dd_border *borders; /* of the turns that the timeline holds, the oldest first */
    size_t n_borders, cap_borders;
    dd_timeline *timeline; /* NULL: to be rendered from the transcript */
    char *save_path;       /* of the save that it goes on from, until it does; or NULL */
    uint64_t save_at;
    size_t n_rendered;           /* messages that the timeline holds */
    bool is_whole;               /* it holds the reasoning of all of them */
    bool is_keeping, is_changed; /* of keep.c: it is being written; it changed since that began */
    bool is_pinned;
    bool needs_end; /* the last turn was cut before its <|im_end|> */
    bool is_open;   /* the last tool message was left open */
    uint32_t n_tokens, ctx_tokens, ctx_wanted;
    dd_live *busy;
};

typedef struct dd_item { /* an event that waits for the reader */
    struct dd_item *next;
    enum dd_event_kind kind;
    uint32_t index;
    uint64_t seq;
    uint8_t *encoded; /* or NULL: text */
    size_t len;
    de_text text;
} dd_item;

typedef struct dd_call {
    char id[32];
    char *name, *arguments;
    size_t arguments_len;
    bool complete;
} dd_call;

/* How a request's prompt goes on with its session; all zero without one. */
typedef struct dd_turn {
    size_t first;         /* messages that the timeline holds already */
    enum delta_join join; /* of the first that it does not */
    bool leaves_open;     /* the suffix ends in an open tool message */
    bool ends_last;       /* it begins with the <|im_end|> that the last turn lacks */
} dd_turn;

enum dd_end { DD_END_NONE, DD_END_CANCEL, DD_END_TIME };

struct dd_live {
    dd_live *prev, *next;
    dd_service *s;
    dd_rpc *rpc; /* NULL: finished */
    enum dd_method_id method;
    uint64_t run;
    dd_peer peer;
    char request_id[DD_ID_BYTES];
    bool has_own_id; /* made here, so who knows it was told it */
    dd_request req;
    uint32_t *ids;
    size_t n_ids;
    uint32_t marks[DD_MARKS]; /* where in ids other prompts may part from this one */
    size_t n_marks;
    dd_timeline *timeline;
    dd_session *session;
    dd_turn turn;
    uv_work_t work;     /* dd_prepare() on a worker */
    dd_status prepared; /* of it */
    int prepare_result;
    delta_grammar *grammar; /* what the answer is held to, or NULL */
    delta_guide guide;
    delta_output *parser;
    dd_call *calls;
    size_t n_calls, cap_calls;
    de_text reasoning, content; /* of the answer, for the transcript */
    de_text sampled;            /* all of its text, while it is short enough to be kept */
    uint32_t *sampled_ids;      /* its tokens */
    size_t n_sampled, cap_sampled;
    bool is_long;      /* it is not */
    int64_t think_end; /* id of </think>, or -1 */
    bool in_reasoning;
    bool was_told_queued;
    uint32_t queue_position; /* as told last */
    bool is_preparing, is_running, is_started, is_waiting, is_paused, is_sending;
    bool is_ending;    /* by dd_live_end() */
    bool is_ended;     /* the last event is in the queue */
    bool was_answered; /* a chat whose answer ended by itself */
    enum dd_end end;
    dd_status outcome; /* what follows the last event */
    dd_item *first, *last;
    uint32_t n_items;
    size_t item_bytes;
    uint64_t seq;
    /* of resume.c */
    bool is_kept; /* its events are, and its reader may go */
    char key[DD_ID_BYTES], sha[65];
    dd_kept *kept_first, *kept_last, *replay; /* replay: what the reader gets first, then first */
    size_t kept_bytes;
    uint64_t detached_until_ns; /* without a reader */
    uint64_t kept_until_ns;     /* after its end, without a reader */
    uint64_t arrived_ns, started_ns, first_token_ns, queue_until_ns, wall_until_ns;
    dd_usage usage;
};

/* t + ns, or the end of time: peers choose ns. */
uint64_t dd_after_ns(uint64_t t, uint64_t ns);
/* n random characters of [A-Za-z0-9_-] and a NUL. 0 or -1. */
int dd_random_text(char *to, size_t n);

/* One answer, or none; both end the call. */
void dd_answer(dd_rpc *r, uint8_t *msg, size_t len); /* msg NULL: out of memory */
void dd_refuse(dd_rpc *r, const dd_status *st);

/* inference.c */
void dd_live_start(dd_service *s, dd_rpc *r, enum dd_method_id m, const uint8_t *msg, size_t len);
void dd_live_sent(dd_live *l);
void dd_live_closed(dd_live *l);
void dd_live_note(dd_service *s, const dd_note *n);
/* Ends the call now; may free l. */
void dd_live_fail(dd_live *l, const dd_status *st);
/* Ends a stream with Finished (the usage so far) and then *st, as soon as the engine has let go
 * and the reader takes it; a call without events, and one that was told before, now. */
void dd_live_end(dd_live *l, const dd_status *st);
void dd_live_cancel(dd_live *l, enum dd_end why);
/* 0, or -1 and *st if this user, or connection of TCP, has as many requests as one may have. */
int dd_user_limit(dd_service *s, const dd_rpc *r, dd_status *st);
/* May free any request and any idle session: never call it while holding one. */
void dd_live_timer(dd_service *s);
void dd_live_cancel_call(dd_service *s, dd_rpc *r, const uint8_t *msg, size_t len); /* Cancel */
/* Events of the parser to the request's queue. 0, or -1: no memory. May run on a worker for an l
 * of the worker's own. */
int dd_live_outputs(dd_live *l, const delta_out_event *o, size_t n);
size_t dd_live_n_sampled(const dd_live *l, const dd_note *finished);
void dd_live_done(dd_live *l); /* frees what is in it */

/* prepare.c: begin on the loop, the others on any thread */
int dd_prepare_begin(dd_live *l, dd_status *st);
/* l->ids, l->grammar, and for a Chat l->parser. 0, or -1 and *st. */
int dd_prepare(dd_live *l, dd_status *st);
/* Renders messages and tools of r as the turn has it, and tokenises. */
int dd_render(const dd_service *s, const dd_request *r, const dd_turn *turn, bool prompt,
              delta_rendered *ret_text, uint32_t **ret_ids, size_t *ret_n, dd_status *st);
int dd_parser_new(const dd_service *s, const dd_request *q, delta_output **ret_p, dd_status *st);
size_t dd_request_text_bytes(const dd_request *q); /* about what there is to do */
/* Answers that came from here, told by their calls' ids or their content, get the text or at least
 * the tokens that they were sampled as. x: the session whose transcript q begins with, or NULL. The
 * loop. */
int dd_request_recall(dd_service *s, uint32_t uid, const dd_session *x, dd_request *q,
                      dd_status *st);
/* The name of an answer without calls, for the recall: of its content. */
enum { DD_CONTENT_NAME = 72 };
void dd_content_name(delta_str content, char to[DD_CONTENT_NAME]);
bool dd_request_is_constrained(const dd_request *q);
void dd_status_of_error(dd_status *st, const delta_error *err, const char *field);

/* reuse.c */
uint64_t dd_reuse_owner(const dd_live *l); /* whose prefixes its prompt may find */
void dd_reuse_marks(dd_live *l);           /* l->marks, of l->ids; any thread */
/* Why not more was found; "" if all was that can be. */
void dd_reuse_note(const dd_live *l, uint32_t cached, uint32_t shared, char *to, size_t size);

/* resume.c */
/* Whether l, which begins, is a request that is known by its key: r was given to that or, with
 * st->code set, is to be refused. Says whether l's events are to be kept. */
bool dd_resume_known(dd_live *l, const uint8_t *msg, size_t len, dd_status *st);
int dd_resume_keep(dd_live *l, uint64_t seq, const uint8_t *msg, size_t len); /* 0, -1: no memory */
uint8_t *dd_resume_next(dd_live *l, size_t *ret_len); /* of l->replay; NULL: no memory */
void dd_resume_done(dd_live *l);
void dd_resume_call(dd_service *s, dd_rpc *r, const uint8_t *msg, size_t len); /* Resume */
void dd_resume_make_room(dd_service *s);
void dd_resume_drain(dd_service *s);
void dd_live_attach(dd_live *l, dd_rpc *r); /* in inference.c: r reads from l->replay on */

/* ahead.c */
/* l was answered and goes: takes its request, if the next prompt can be told from it. */
void dd_ahead_begin(dd_live *l);
bool dd_ahead_note(dd_service *s, const dd_note *n); /* false: it is of no such run */
void dd_ahead_cancel(dd_service *s);

/* texts.c */
void dd_texts_call(dd_service *s, dd_rpc *r, const uint8_t *msg, size_t len);
void dd_texts_fail(dd_job *j, const dd_status *st); /* also after its call has ended */
void dd_texts_abort(dd_service *s, const dd_status *st);
/* How many are of this user, or of this client. */
uint32_t dd_texts_of(const dd_service *s, const dd_peer *p,
                     bool (*is_same)(const dd_peer *a, const dd_peer *b));

/* sessions.c */
/* Binds a Chat or AppendMessages to its session, or makes the session of CreateSession; completes
 * l->req with the transcript and sets l->turn.first and join. */
int dd_session_begin(dd_live *l, dd_status *st);
/* Whether a turn that ended so is part of the conversation. */
bool dd_session_turn_counts(const dd_note *finished);
/* The turn is over: n is the FINISHED note, or NULL if it never ran. */
void dd_session_end(dd_live *l, const dd_note *n);
uint8_t *dd_session_answer(dd_live *l, size_t *ret_len); /* of Create and Append */
void dd_session_call(dd_service *s, dd_rpc *r, const uint8_t *msg, size_t len);
void dd_sessions_timer(dd_service *s, uint64_t now, uint64_t *next);
void dd_sessions_free(dd_service *s);
/* A session as it was kept, without its messages; NULL: no memory. */
dd_session *dd_session_restore(dd_service *s, const dd_saved *x, const dd_peer *owner);
/* Copies a message to its end. 0, or -1: no memory. */
int dd_session_add(dd_session *x, dd_bytes message, const dd_sampled *sampled);
void dd_session_drop(dd_service *s, dd_session *x); /* NULL is a no-op */

dd_session *dd_session_find(dd_service *s, const char *id, const dd_peer *p,
                            bool (*may)(const dd_peer *p, const dd_peer *owner), dd_status *st);
/* 0, or -1 and *st if it is at work. */
int dd_session_check_idle(const dd_session *x, const dd_request *q, dd_status *st);
/* 0, or -1 and *st: there are too many to make `count` more. */
int dd_session_check_count(const dd_service *s, uint32_t count, dd_status *st);
void dd_session_put(dd_wire_out *o, const dd_session *x); /* field 1 */
/* It as the codec writes it, of a model; borrows all that is in it. */
dd_saved dd_session_saved(const dd_service *s, const dd_session *x);

/* export.c */
/* Streams it; takes the call over. */
void dd_export_begin(dd_service *s, dd_rpc *r, const dd_session *x, bool with_sampled);
void dd_export_sent(dd_export *e);
void dd_export_end(dd_export *e, const dd_status *st);
void dd_exports_abort(dd_service *s, const dd_status *st);

/* keep.c: all are no-ops without [state] directory */
void dd_keep_changed(dd_service *s, dd_session *x); /* writes it, soon */
void dd_keep_forget(dd_service *s, const dd_session *x);
void dd_keep_load(dd_service *s); /* once, when the model is there */
/* What a file of it says, malloc'ed; NULL: no memory. */
uint8_t *dd_keep_encode(const dd_service *s, const dd_session *x, size_t *ret_len);
/* Reads the line at the beginning [len]: how long it is, how long what follows and its hash. false: it is
 * none. Any thread, as dd_keep_body(). */
enum { DD_KEEP_HEAD = 128 };
bool dd_keep_head(const char *text, size_t len, size_t *ret_head, size_t *ret_body,
                  char ret_sha[65]);
/* What follows, if the text is whole and as it was written, or NULL. */
const uint8_t *dd_keep_body(const char *text, size_t len, size_t *ret_len);
/* The session in such a body; it has the id of there, or with `owner` a new one, is the owner's and not
 * pinned. NULL and err. */
dd_session *dd_keep_decode(dd_service *s, const char *path, const uint8_t *body, size_t n,
                           const dd_peer *owner, delta_error *err);

/* saves.c */
void dd_saves_call(dd_service *s, dd_rpc *r, const dd_request *q);
void dd_saves_note(dd_service *s, const dd_note *n);
void dd_saves_closed(dd_save *v); /* the call has ended; the file is written or read all the same */
void dd_saves_abort(dd_service *s, const dd_status *st);

#endif
