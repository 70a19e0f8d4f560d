/* ctl.h -- what the files of deltactl share.
 *
 * deltactl speaks to the daemon through libdeltac alone. engine/base (libc
 * only) lends its JSON reader for files of messages and tools, engine/chat
 * (which knows nothing of the model) its output parser for parse --jsonl. */
#ifndef CTL_H
#define CTL_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "base/arena.h"
#include "base/json.h"
#include "deltac.h"
#include "deltad/v1/inference.pb-c.h"
#include "deltad/v1/model.pb-c.h"
#include "deltad/v1/session.pb-c.h"

/* Exit codes, as in deltactl(1). */
enum {
    CTL_OK = 0,
    CTL_FAILED = 1,       /* the daemon refused or ended the call */
    CTL_INCOMPLETE = 2,   /* the answer was cut inside a tool call */
    CTL_USAGE = 64,       /* bad arguments or input files */
    CTL_UNAVAILABLE = 69, /* no daemon there, or not ready */
    CTL_INTERRUPTED = 130,
};

typedef struct ctl {
    const char *socket; /* NULL: the default */
    bool json;          /* one JSON object a line on standard output */
    bool terminal;      /* standard output is one, and people read it (no --json) */
    bool color;         /* and it may be told to dim and embolden */
    dc_client *client;
    de_arena arena; /* everything built for requests; freed at exit */
} ctl;

/* Connects once. 0, or an exit code after saying why. */
int ctl_connect(ctl *c);
/* Says a status on standard error (or as JSON) and gives its exit code. */
int ctl_say_status(const ctl *c, int dc_result, const dc_status *st);
__attribute__((format(printf, 1, 2))) int ctl_usage(const char *format, ...);

/* One unary call; 0 and *ret_m, or an exit code. */
int ctl_unary(ctl *c, const char *method, const ProtobufCMessage *request,
              const ProtobufCMessageDescriptor *type, ProtobufCMessage **ret_m);

/* Any message as one line of JSON: set fields by their proto names, enums by
 * name, bytes in base64, 64-bit integers as numbers. */
void ctl_print_json(const ProtobufCMessage *m);

/* What a model wrote, to standard output. A terminal gets no control characters of it but line feeds
 * and tabs: a text must not move the cursor, set titles or fill the clipboard. */
void ctl_put_text(const ctl *c, const char *s);

/* A whole file, or standard input for "-"; at most 16 MiB. NULL after saying why. */
char *ctl_read_file(ctl *c, const char *path, size_t *ret_len);
/* OpenAI JSON to proto structs in the arena. 0, or CTL_USAGE after saying why. */
int ctl_read_messages(ctl *c, const char *path, Deltad__V1__Message ***ret_m, size_t *ret_n);
int ctl_read_tools(ctl *c, const char *path, Deltad__V1__Tool ***ret_t, size_t *ret_n);
Deltad__V1__Message *ctl_message(ctl *c, Deltad__V1__Role role, const char *text);
void *ctl_alloc(ctl *c, size_t size); /* zeroed; never NULL: exits */
char *ctl_strdup(ctl *c, const char *s);

bool ctl_parse_u64(const char *s, uint64_t max, uint64_t *ret);
bool ctl_parse_float(const char *s, float *ret);

/* Flags of chat and generate: sampling, stopping, the form of the answer; and of chat alone: tool
 * choice and budget. Looks at argv[*i]; true if it was one (and *i is at its last word), with
 * *ret_code set if its value is bad. */
typedef struct ctl_generation {
    ctl *c;
    bool is_chat;
    Deltad__V1__OutputFormat format; /* not set: NULL in the request */
    Deltad__V1__OutputFormat__Choices choices;
    char *choice[64];
    Deltad__V1__ToolChoice tool_choice;
    bool has_budget;
    uint32_t budget;
    Deltad__V1__Sampling sampling;
    Deltad__V1__Stopping stopping;
    char *stop[16];
} ctl_generation;
void ctl_generation_init(ctl_generation *g, ctl *c, bool is_chat);
bool ctl_generation_flag(ctl_generation *g, int argc, char **argv, int *i, int *ret_code);

/* SIGINT since the last call of this? */
bool ctl_interrupted(void);

/* Commands: argv[0] is the command. */
int ctl_chat(ctl *c, int argc, char **argv);
int ctl_generate(ctl *c, int argc, char **argv);
int ctl_render(ctl *c, int argc, char **argv);
int ctl_parse(ctl *c, int argc, char **argv);
int ctl_parse_lines(const char *path); /* parse --jsonl, of a file or "-" */
int ctl_tokenize(ctl *c, int argc, char **argv);
int ctl_detokenize(ctl *c, int argc, char **argv);
int ctl_sessions(ctl *c, int argc, char **argv);
int ctl_save(ctl *c, int argc, char **argv);
int ctl_restore(ctl *c, int argc, char **argv);
int ctl_saves(ctl *c, int argc, char **argv);
int ctl_status(ctl *c, int argc, char **argv);
int ctl_cancel(ctl *c, int argc, char **argv);

#endif
