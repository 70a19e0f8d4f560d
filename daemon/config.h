/* config.h -- configuration file and flags to one const dd_config.
 *
 * INI sections as in docs/CONFIG.md; strict: an unknown section or key, a bad value or a repeated
 * key is an error with file and line. Flags win over the file, the file over the defaults. All
 * keys stand in one table (config.c) that also prints --print-config.
 *
 * Ownership  dd_config owns its strings; dd_config_done() frees them. */
#ifndef DD_CONFIG_H
#define DD_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "delta/error.h"

typedef struct dd_config {
    struct {
        char *path;       /* folder of the checkpoint; the installed demo model by default */
        char *backend;    /* auto, cpu, cuda */
        char *kv_type;    /* auto, bf16, fp8 */
        uint32_t threads; /* 0: all cores */
        uint32_t max_sessions;
        uint64_t kv_tokens; /* 0: delta_engine_options says how many */
        uint32_t ctx_max;   /* 0: the checkpoint's */
        uint32_t step_tokens;
        uint32_t answer_tokens;
        uint64_t max_gap_ns; /* 0: no bound */
    } model;
    struct {
        bool enabled;
        uint32_t checkpoints; /* 0: delta_engine_options says how many */
        uint64_t host_bytes;  /* of memory of the host; 0: none */
        uint64_t disk_bytes;  /* in state.directory; 0: none */
        uint64_t disk_idle_ns;
        bool shared; /* users find each other's prefixes */
        bool ahead;  /* compute what the next prompt will begin with */
    } cache;
    struct {
        char *directory; /* where named sessions are kept over a restart; "": nowhere */
    } state;
    struct {
        char *socket;         /* gRPC, Unix; "" : off */
        char *ttrpc_socket;   /* "" : off */
        char *listen;         /* HOST:PORT of gRPC on TCP; "" : off */
        bool allow_remote;    /* listen on other than loopback */
        uint32_t socket_mode; /* octal in the file: 0660 */
        char *socket_group;   /* "" : leave */
        uint32_t max_connections;
        uint32_t max_connections_per_uid;
        uint64_t max_message_bytes;
        bool tcp_reflection;
    } server;
    struct {
        uint32_t max_queue; /* requests waiting for a slot */
        uint32_t max_requests_per_uid;
        uint32_t max_requests_per_connection; /* of TCP */
        uint32_t default_max_tokens;          /* where a request says nothing */
        uint64_t stall_limit_ns;  /* a reader that takes nothing for so long is dropped */
        uint64_t drain_limit_ns;  /* SIGTERM: streams may run on for so long */
        uint64_t detach_limit_ns; /* an answer without a reader runs on for so long */
        uint64_t resume_limit_ns; /* and is kept for so long after its end */
        uint64_t session_idle_ns; /* named sessions; 0: never */
        uint32_t max_named_sessions;
        uint32_t max_pinned_sessions;
        uint64_t saved_bytes; /* of one user's saves */
    } limits;
    struct {
        char *admin_group; /* members see and end everybody's; "" : root and owner only */
        bool calls_in_reasoning, calls_in_fences;
        char *unknown_tools; /* call, text */
    } policy;
    struct {
        char *level; /* error, warning, notice, info, debug */
    } log;
} dd_config;

enum dd_action { DD_RUN, DD_CHECK_CONFIG, DD_PRINT_CONFIG, DD_PRINT_VERSION, DD_PRINT_HELP };

/* argv of deltad. On failure err->text holds one line for people: what, where, which values, and
 * the code is DELTA_EINVALID if an argument is wrong (usage), another one if the file is. With
 * DD_PRINT_VERSION and DD_PRINT_HELP no file was read. */
int dd_config_load(int argc, char **argv, dd_config *ret_c, enum dd_action *ret_action,
                   delta_error *err);
/* The file alone (reload, tests, fuzzing); `name` is for messages. */
int dd_config_parse(const char *text, size_t len, const char *name, dd_config *c, delta_error *err);
void dd_config_defaults(dd_config *c);
int dd_config_check(const dd_config *c, delta_error *err); /* what single keys cannot tell */
char *dd_config_print(const dd_config *c);                 /* malloc'ed INI text with comments */
char *dd_config_help(void);                                /* malloc'ed text of --help */
void dd_config_done(dd_config *c);

#endif
