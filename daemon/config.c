/* config.c -- one table of settings, and everything that follows from it.
 *
 * The table says for each key its type, range, default and meaning. The file parser, the flags,
 * --print-config, --help and the table of docs/CONFIG.md are all made from it (a test compares the
 * last), so that a key cannot exist in one of them and not in another.
 *
 * inih splits lines; it is lenient where we are strict, so the reader that feeds it (next_line)
 * refuses what it would let pass: long lines, "key: value", text behind a section, NUL bytes,
 * and takes the indentation away that it would read as a continued value.
 *
 * Limits     a file has at most 256 KiB, a line 1024 bytes, a folder of fragments 64 files.
 * Never      reads the environment but for the defaults of socket paths. */
#include "daemon/config.h"

#include <assert.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <ini.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum {
    FILE_MAX_BYTES = 256 * 1024,
    LINE_MAX_BYTES = 1024, /* with its end; a bound of inih's as well */
    FRAGMENTS_MAX = 64,
};

enum kind { TEXT, CHOICE, BOOL, U32, U64, BYTES, MODE, DURATION };

struct key {
    const char *section, *name;
    enum kind kind;
    size_t at;            /* offset in dd_config */
    uint64_t min, max;    /* numbers; durations in ns; TEXT: of its length */
    bool zero_too;        /* 0 is allowed beside min .. max */
    const char *default_; /* as in the file; NULL: found out at start (default_text) */
    const char *told;     /* the default for people where default_ is NULL */
    const char *choices;  /* CHOICE: words, one space between */
    const char *help;
};

#define SECOND_NS UINT64_C(1000000000)
#define DAY_NS (24 * 3600 * SECOND_NS)
#define AT(field) offsetof(dd_config, field)

static const struct key keys[] = {
    { "model", "path", TEXT, AT(model.path), 1, 1000, .told = "the demo model",
      .help = "Folder of the checkpoint." },
    { "model", "backend", CHOICE, AT(model.backend), .default_ = "auto", .choices = "auto cpu cuda",
      .help = "What computes; auto takes a GPU if there is one." },
    { "model", "kv_type", CHOICE, AT(model.kv_type), .default_ = "auto", .choices = "auto bf16 fp8",
      .help =
          "How a GPU keeps keys and values; auto: bf16; fp8 (e4m3: 3 bits of fraction) takes half "
          "the memory; the CPU keeps them as F32 and knows auto alone." },
    { "model", "threads", U32, AT(model.threads), 0, 1024, .default_ = "0",
      .help = "Threads of the CPU backend; 0: one for each core." },
    { "model", "max_sessions", U32, AT(model.max_sessions), 1, 1024, .default_ = "16",
      .help = "Sequences in memory at once, each with a state slot." },
    { "model", "kv_tokens", U64, AT(model.kv_tokens), 64, UINT64_C(1) << 32, true, .default_ = "0",
      .help =
          "Size of the pool of key-value pages in tokens; 0: ctx_max, or 8192 for each session if "
          "that is more, within half of the memory that is left." },
    { "model", "ctx_max", U32, AT(model.ctx_max), 64, 1U << 20, true, .default_ = "0",
      .help = "Longest sequence in tokens; 0: the checkpoint's." },
    { "model", "answer_tokens", U32, AT(model.answer_tokens), 64, 1U << 20, .default_ = "4096",
      .help =
          "Tokens that an answer gets room for when it begins, and again when they are used up; "
          "if there is none then, a request that is behind it in line or of lower priority "
          "waits, its state kept." },
    { "model", "step_tokens", U32, AT(model.step_tokens), 64, 16384, true, .default_ = "0",
      .help = "Most tokens of one step of the engine; 0: the backend's own choice." },
    { "model", "max_gap", DURATION, AT(model.max_gap_ns), 1000000, SECOND_NS, true,
      .default_ = "50ms",
      .help =
          "While answers are written, a step reads about as much of new prompts as fits in that "
          "time; 0: as much as step_tokens allow." },

    { "cache", "enabled", BOOL, AT(cache.enabled), .default_ = "yes",
      .help = "Keep what was computed of a prompt for prompts that begin alike." },
    { "cache", "checkpoints", U32, AT(cache.checkpoints), 1, 65536, true, .default_ = "0",
      .help = "States of the DeltaNet layers that are kept at once; 0: four for each session, "
              "within an eighth of the memory." },
    { "cache", "host_bytes", BYTES, AT(cache.host_bytes), 1U << 20, UINT64_C(1) << 42, true,
      .default_ = "0",
      .help =
          "Host memory for states and pages that the device has no room for; a quarter of it for "
          "states." },
    { "cache", "disk_bytes", BYTES, AT(cache.disk_bytes), 1U << 20, UINT64_C(1) << 42, true,
      .default_ = "4G",
      .help = "States that nobody used for disk_idle go to state.directory, up to so much, and are "
              "read "
              "again when they are asked for, also by the next start of the daemon; 0: none." },
    { "cache", "disk_idle", DURATION, AT(cache.disk_idle_ns), 1000000, DAY_NS, .default_ = "10s",
      .help =
          "How long a state is not used before it goes to the disk; what a killed daemon had not "
          "written is computed again." },
    { "cache", "ahead", BOOL, AT(cache.ahead), .default_ = "yes",
      .help =
          "When nothing else is to be done, compute what the next prompt of a conversation will "
          "begin with, its earlier reasoning left out." },
    { "cache", "shared", BOOL, AT(cache.shared), .default_ = "no",
      .help = "Let users find each other's prompts: the time of an answer then tells whether "
              "somebody asked the same before." },

    { "state", "directory", TEXT, AT(state.directory), 0, 1000,
      .told = "systemd's state folder, or none",
      .help = "Folder where named sessions are kept, so that they survive a restart; empty: they "
              "are not." },

    { "server", "socket", TEXT, AT(server.socket), 0, 107,
      .told = "deltad.sock in the runtime folder", .help = "Unix socket of gRPC; empty: none." },
    { "server", "ttrpc_socket", TEXT, AT(server.ttrpc_socket), 0, 107,
      .told = "deltad-ttrpc.sock in the runtime folder",
      .help = "Unix socket of ttrpc; empty: none." },
    { "server", "listen", TEXT, AT(server.listen), 0, 255, .default_ = "",
      .help = "HOST:PORT of gRPC on TCP, without encryption; empty: none." },
    { "server", "allow_remote", BOOL, AT(server.allow_remote), .default_ = "no",
      .help = "Let listen name an address that is not loopback." },
    { "server", "socket_mode", MODE, AT(server.socket_mode), 0, 0777, .default_ = "0660",
      .help = "Mode of sockets that deltad makes." },
    { "server", "socket_group", TEXT, AT(server.socket_group), 0, 64, .default_ = "",
      .help = "Group of sockets that deltad makes; empty: as it is." },
    { "server", "max_connections", U32, AT(server.max_connections), 1, 65536, .default_ = "1024",
      .help = "Connections at once, both transports together." },
    { "server", "max_connections_per_uid", U32, AT(server.max_connections_per_uid), 1, 65536,
      .default_ = "512",
      .help = "Connections of one user at once; on TCP of one address (all of loopback is one)." },
    { "server", "max_message_bytes", BYTES, AT(server.max_message_bytes), 65536, 64U << 20,
      .default_ = "16M", .help = "Longest request message; ttrpc ends at 4M by its own rule." },
    { "server", "tcp_reflection", BOOL, AT(server.tcp_reflection), .default_ = "no",
      .help = "Answer gRPC reflection on TCP too." },

    { "limits", "max_queue", U32, AT(limits.max_queue), 0, 65536, .default_ = "64",
      .help = "Requests that wait for a slot; more are refused." },
    { "limits", "max_requests_per_uid", U32, AT(limits.max_requests_per_uid), 1, 65536,
      .default_ = "64",
      .help = "Requests of one user at once, running and waiting; on TCP of one address (all of "
              "loopback is one)." },
    { "limits", "max_requests_per_connection", U32, AT(limits.max_requests_per_connection), 1,
      65536, .default_ = "32", .help = "Requests of one TCP connection at once." },
    { "limits", "default_max_tokens", U32, AT(limits.default_max_tokens), 1, 1U << 20,
      .default_ = "4096", .help = "Length of an answer where the request sets none." },
    { "limits", "stall_limit", DURATION, AT(limits.stall_limit_ns), SECOND_NS, DAY_NS,
      .default_ = "30s", .help = "A reader that takes nothing for so long is dropped." },
    { "limits", "drain_limit", DURATION, AT(limits.drain_limit_ns), SECOND_NS, 3600 * SECOND_NS,
      true, .default_ = "30s", .help = "Answers may run on for so long after SIGTERM." },
    { "limits", "detach_limit", DURATION, AT(limits.detach_limit_ns), SECOND_NS, DAY_NS,
      .default_ = "10min",
      .help = "A detached answer, or one with an idempotency key, runs on without a reader for so "
              "long." },
    { "limits", "resume_limit", DURATION, AT(limits.resume_limit_ns), SECOND_NS, DAY_NS,
      .default_ = "1min", .help = "And its events are kept for so long after its end." },
    { "limits", "session_idle", DURATION, AT(limits.session_idle_ns), SECOND_NS, 30 * DAY_NS, true,
      .default_ = "30min", .help = "A named session that rests for so long is closed; 0: never." },
    { "limits", "max_named_sessions", U32, AT(limits.max_named_sessions), 0, 65536,
      .default_ = "64", .help = "Named sessions at once." },
    { "limits", "saved_bytes", BYTES, AT(limits.saved_bytes), 1U << 20, UINT64_C(1) << 44, true,
      .default_ = "16G",
      .help = "Room on the disk of state.directory for the saves of one user; 0: there are none." },
    { "limits", "max_pinned_sessions", U32, AT(limits.max_pinned_sessions), 0, 65536,
      .default_ = "8", .help = "Of them, sessions that are pinned." },

    { "policy", "admin_group", TEXT, AT(policy.admin_group), 0, 64, .default_ = "",
      .help = "Members see and close everybody's sessions, and cancel everybody's requests; empty: "
              "root and deltad's user alone." },
    { "policy", "calls_in_reasoning", BOOL, AT(policy.calls_in_reasoning), .default_ = "yes",
      .help = "Take tool calls that the model writes while it is still thinking." },
    { "policy", "calls_in_fences", BOOL, AT(policy.calls_in_fences), .default_ = "no",
      .help = "Take tool calls inside fenced blocks of code." },
    { "policy", "unknown_tools", CHOICE, AT(policy.unknown_tools), .default_ = "call",
      .choices = "call text",
      .help = "Pass a call of a tool that is not declared on as a call, or as text." },

    { "log", "level", CHOICE, AT(log.level), .default_ = "info",
      .choices = "error warning notice info debug", .help = "The least urgent lines to write." },
};
enum { N_KEYS = sizeof keys / sizeof keys[0] };

/* Sections that SIGHUP re-reads (loop.c); for the comments. */
static bool reloads(const struct key *k)
{
    return strcmp(k->section, "limits") == 0 || strcmp(k->section, "log") == 0;
}

/* ---- values ---- */

static void *field(const dd_config *c, const struct key *k)
{
    return (char *)(uintptr_t)c + k->at;
}

static const struct unit {
    const char *name;
    uint64_t factor;
} byte_units[] = { { "G", 1U << 30 }, { "M", 1U << 20 }, { "K", 1U << 10 }, { "", 1 } },
  time_units[] = { { "h", 3600 * SECOND_NS },
                   { "min", 60 * SECOND_NS },
                   { "s", SECOND_NS },
                   { "ms", 1000000 },
                   { "", SECOND_NS } };
enum {
    N_BYTE_UNITS = sizeof byte_units / sizeof byte_units[0],
    N_TIME_UNITS = sizeof time_units / sizeof time_units[0],
};

/* Digits, then a unit of the list. No sign, no blank, no overflow. */
static bool parse_number(const char *s, const struct unit *units, size_t n_units, uint64_t *ret)
{
    uint64_t n = 0;
    if (!isdigit((unsigned char)*s))
        return false;
    for (; isdigit((unsigned char)*s); s++)
        if (__builtin_mul_overflow(n, 10U, &n) ||
            __builtin_add_overflow(n, (uint64_t)(*s - '0'), &n))
            return false;
    for (size_t i = 0; i < n_units; i++)
        if (strcmp(s, units[i].name) == 0)
            return !__builtin_mul_overflow(n, units[i].factor, ret);
    return false;
}

static bool parse_octal(const char *s, uint64_t *ret)
{
    uint64_t n = 0;
    size_t len = strlen(s);
    if (len < 1 || len > 5)
        return false;
    for (; *s; s++) {
        if (*s < '0' || *s > '7')
            return false;
        n = n * 8 + (uint64_t)(*s - '0');
    }
    *ret = n;
    return true;
}

/* Writes the number with the largest unit that divides it. */
static void print_number(char *to, size_t size, uint64_t n, const struct unit *units,
                         size_t n_units)
{
    for (size_t i = 0; i < n_units; i++)
        if (n && n % units[i].factor == 0) {
            (void)snprintf(to, size, "%llu%s", (unsigned long long)(n / units[i].factor),
                           units[i].name);
            return;
        }
    (void)snprintf(to, size, "0");
}

static void print_value(char *to, size_t size, const struct key *k, uint64_t n)
{
    if (k->kind == BYTES)
        print_number(to, size, n, byte_units, N_BYTE_UNITS);
    else if (k->kind == DURATION)
        print_number(to, size, n, time_units, N_TIME_UNITS);
    else if (k->kind == MODE)
        (void)snprintf(to, size, "%04llo", (unsigned long long)n);
    else
        (void)snprintf(to, size, "%llu", (unsigned long long)n);
}

/* What a key takes, for people. */
static void print_range(char *to, size_t size, const struct key *k)
{
    char min[32], max[32];
    print_value(min, sizeof min, k, k->min);
    print_value(max, sizeof max, k, k->max);
    switch (k->kind) {
    case TEXT:
        (void)snprintf(to, size, "text");
        return;
    case BOOL:
        (void)snprintf(to, size, "yes or no");
        return;
    case CHOICE: {
        int n = snprintf(to, size, "one of ");
        for (const char *s = k->choices; *s && n >= 0 && (size_t)n + 3 < size; s++) {
            if (*s == ' ')
                to[n++] = ',';
            to[n++] = *s;
        }
        to[n] = 0;
        return;
    }
    case U32:
    case U64:
    case BYTES:
    case MODE:
    case DURATION:
        (void)snprintf(to, size, "%s%s to %s", k->zero_too ? "0 or " : "", min, max);
        return;
    }
}

static bool is_choice(const char *choices, const char *word)
{
    size_t len = strlen(word);
    for (const char *s = choices; s;) {
        const char *end = strchr(s, ' ');
        size_t n = end ? (size_t)(end - s) : strlen(s);
        if (n == len && memcmp(s, word, n) == 0)
            return len > 0;
        s = end ? end + 1 : NULL;
    }
    return false;
}

/* A text that the file can hold and a log line can show: what is printed reads back the same. */
static bool is_plain_text(const char *s)
{
    for (size_t i = 0; s[i]; i++) {
        bool edge = i == 0 || s[i + 1] == 0;
        if ((unsigned char)s[i] < 0x20 || s[i] == 0x7f || (s[i] == ' ' && edge))
            return false;
        if (s[i] == ';' && (i == 0 || s[i - 1] == ' ')) /* begins a comment */
            return false;
    }
    return true;
}

static int set_text(dd_config *c, const struct key *k, const char *value, delta_error *err)
{
    char *copy = strdup(value);
    if (!copy)
        return delta_fail(err, DELTA_ENOMEM, "out of memory");
    char **at = field(c, k);
    free(*at);
    *at = copy;
    return 0;
}

static int bad_value(const struct key *k, const char *value, delta_error *err)
{
    char range[160];
    print_range(range, sizeof range, k);
    return delta_fail(err, DELTA_EFORMAT, "%s.%s: \"%.80s\" is not allowed: %s", k->section,
                      k->name, value, range);
}

/* The only writer of settings. */
static int set(dd_config *c, const struct key *k, const char *value, delta_error *err)
{
    uint64_t n = 0;
    bool good = false;
    switch (k->kind) {
    case TEXT:
        if (strlen(value) < k->min || strlen(value) > k->max)
            return delta_fail(err, DELTA_EFORMAT, "%s.%s has %zu bytes, allowed are %llu to %llu",
                              k->section, k->name, strlen(value), (unsigned long long)k->min,
                              (unsigned long long)k->max);
        if (!is_plain_text(value))
            return delta_fail(err, DELTA_EFORMAT,
                              "%s.%s: no control characters, no blanks at the ends, no \" ;\"",
                              k->section, k->name);
        return set_text(c, k, value, err);
    case CHOICE:
        return is_choice(k->choices, value) ? set_text(c, k, value, err) : bad_value(k, value, err);
    case BOOL:
        good = is_choice("yes no true false", value);
        if (good)
            *(bool *)field(c, k) = value[0] == 'y' || value[0] == 't';
        return good ? 0 : bad_value(k, value, err);
    case BYTES:
        good = parse_number(value, byte_units, N_BYTE_UNITS, &n);
        break;
    case DURATION:
        good = parse_number(value, time_units, N_TIME_UNITS, &n);
        break;
    case MODE:
        good = parse_octal(value, &n);
        break;
    case U32:
    case U64:
        good = parse_number(value, &byte_units[N_BYTE_UNITS - 1], 1, &n);
        break;
    }
    if (!good || ((n < k->min || n > k->max) && !(n == 0 && k->zero_too)))
        return bad_value(k, value, err);
    if (k->kind == U64 || k->kind == BYTES || k->kind == DURATION)
        *(uint64_t *)field(c, k) = n;
    else
        *(uint32_t *)field(c, k) = (uint32_t)n;
    return 0;
}

/* A setting as the file would write it. buf holds numbers. */
static const char *get(const dd_config *c, const struct key *k, char *buf, size_t size)
{
    switch (k->kind) {
    case TEXT:
    case CHOICE:
        return *(char **)field(c, k);
    case BOOL:
        return *(bool *)field(c, k) ? "yes" : "no";
    case U64:
    case BYTES:
    case DURATION:
        print_value(buf, size, k, *(uint64_t *)field(c, k));
        return buf;
    case U32:
    case MODE:
        print_value(buf, size, k, *(uint32_t *)field(c, k));
        return buf;
    }
    return "";
}

static const struct key *find_key(const char *section, const char *name)
{
    for (size_t i = 0; i < N_KEYS; i++)
        if (strcmp(keys[i].section, section) == 0 && strcmp(keys[i].name, name) == 0)
            return &keys[i];
    return NULL;
}

static bool is_section(const char *section)
{
    for (size_t i = 0; i < N_KEYS; i++)
        if (strcmp(keys[i].section, section) == 0)
            return true;
    return false;
}

/* ---- defaults ---- */

/* The demo model: the source's own where the program runs from its build tree, else the installed
 * one. A build tree is known by CMake's cache one folder above the program. */
static void default_model(char *to, size_t size)
{
    char exe[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 32);
    if (n > 0) {
        exe[n] = 0;
        char *slash = strrchr(exe, '/');
        if (slash) {
            (void)snprintf(slash, 32, "/../CMakeCache.txt");
            if (access(exe, F_OK) == 0) {
                (void)snprintf(to, size, "%s", DD_SOURCE_DEMO_MODEL);
                return;
            }
        }
    }
    (void)snprintf(to, size, "%s", DD_DEMO_MODEL);
}

/* Where sockets are: systemd's folder, root's, the user's own. */
static void default_socket(char *to, size_t size, const char *name)
{
    const char *runtime = getenv("RUNTIME_DIRECTORY"), *xdg = getenv("XDG_RUNTIME_DIR");
    if (runtime && runtime[0] == '/') /* may list several, ':' between */
        (void)snprintf(to, size, "%.*s/%s", (int)strcspn(runtime, ":"), runtime, name);
    else if (geteuid() == 0)
        (void)snprintf(to, size, "/run/deltad/%s", name);
    else if (xdg && xdg[0] == '/')
        (void)snprintf(to, size, "%s/deltad/%s", xdg, name);
    else
        (void)snprintf(to, size, "/run/user/%u/deltad/%s", (unsigned)geteuid(), name);
}

static void default_state(char *to, size_t size)
{
    const char *state = getenv("STATE_DIRECTORY");
    to[0] = 0;
    if (state && state[0] == '/')
        (void)snprintf(to, size, "%.*s", (int)strcspn(state, ":"), state);
}

static void default_text(char *to, size_t size, const struct key *k)
{
    if (k->default_)
        (void)snprintf(to, size, "%s", k->default_);
    else if (strcmp(k->name, "path") == 0)
        default_model(to, size);
    else if (strcmp(k->name, "directory") == 0)
        default_state(to, size);
    else
        default_socket(to, size,
                       strcmp(k->name, "socket") == 0 ? "deltad.sock" : "deltad-ttrpc.sock");
}

void dd_config_defaults(dd_config *c)
{
    *c = (dd_config){ 0 };
    for (size_t i = 0; i < N_KEYS; i++) {
        char value[PATH_MAX];
        delta_error err;
        default_text(value, sizeof value, &keys[i]);
        if (set(c, &keys[i], value, &err) < 0 && set_text(c, &keys[i], "", &err) < 0)
            abort(); /* out of memory before anything began */
    }
}

void dd_config_done(dd_config *c)
{
    for (size_t i = 0; i < N_KEYS; i++)
        if (keys[i].kind == TEXT || keys[i].kind == CHOICE)
            free(*(char **)field(c, &keys[i]));
    *c = (dd_config){ 0 };
}

/* ---- the file ---- */

struct parse {
    const char *text;
    size_t len, at;
    const char *name;
    unsigned line; /* of what inih sees now */
    uint64_t seen; /* bit i: keys[i] was set in this file */
    dd_config *c;
    delta_error *err;
    int r; /* the first error ends it */
};
_Static_assert(N_KEYS <= 64, "struct parse has one bit for each key");

__attribute__((format(printf, 2, 3))) static void parse_fail(struct parse *p, const char *format,
                                                             ...)
{
    char text[400];
    va_list ap;
    va_start(ap, format);
    (void)vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    p->r = delta_fail(p->err, DELTA_EFORMAT, "%s:%u: %s", p->name, p->line, text);
}

/* "[name]" and nothing behind it but a comment, or an error. */
static void check_section(struct parse *p, const char *s, size_t len)
{
    char name[LINE_MAX_BYTES];
    const char *end = memchr(s, ']', len);
    if (!end) {
        parse_fail(p, "\"]\" is missing");
        return;
    }
    (void)snprintf(name, sizeof name, "%.*s", (int)(end - s - 1), s + 1);
    if (!is_section(name)) {
        parse_fail(p, "unknown section [%.80s]", name);
        return;
    }
    for (end++; end < s + len && (*end == ' ' || *end == '\t'); end++)
        ;
    if (end < s + len && *end != ';' && *end != '#')
        parse_fail(p, "text behind the section [%.80s]", name);
}

/* inih's reader: the next line without indentation, or NULL at the end or at an error. */
static char *next_line(char *to, int size, void *arg)
{
    struct parse *p = arg;
    if (p->r < 0 || p->at >= p->len)
        return NULL;
    const char *s = p->text + p->at;
    const char *nl = memchr(s, '\n', p->len - p->at);
    size_t len = nl ? (size_t)(nl - s) : p->len - p->at;
    p->at += len + (nl != NULL);
    p->line++;
    if (len && s[len - 1] == '\r')
        len--;
    for (; len && (*s == ' ' || *s == '\t'); s++)
        len--;
    if (len == 0 || *s == '#' || *s == ';')
        len = 0; /* comments of any length */
    else if (len + 3 > (size_t)size || len + 3 > LINE_MAX_BYTES)
        parse_fail(p, "the line is longer than %d bytes",
                   (size < LINE_MAX_BYTES ? size : LINE_MAX_BYTES) - 3);
    else if (memchr(s, 0, len))
        parse_fail(p, "a NUL byte");
    else if (*s == '[')
        check_section(p, s, len);
    else {
        size_t i = 0;
        while (i < len && s[i] != '=' && s[i] != ':')
            i++;
        if (i == len || s[i] == ':')
            parse_fail(p, "neither \"[section]\" nor \"key = value\"");
    }
    if (p->r < 0)
        return NULL;
    memcpy(to, s, len);
    to[len] = '\n';
    to[len + 1] = 0;
    return to;
}

static int on_pair(void *arg, const char *section, const char *name, const char *value)
{
    struct parse *p = arg;
    if (p->r < 0)
        return 0;
    const struct key *k = find_key(section, name);
    if (!k) {
        if (!section[0])
            parse_fail(p, "\"%.80s\" stands before the first [section]", name);
        else
            parse_fail(p, "unknown key \"%.80s\" in [%.80s]", name, section);
        return 0;
    }
    uint64_t bit = UINT64_C(1) << (k - keys);
    if (p->seen & bit) {
        parse_fail(p, "%s.%s is set a second time", section, name);
        return 0;
    }
    p->seen |= bit;
    p->r = set(p->c, k, value, p->err);
    if (p->r < 0)
        delta_error_prefix(p->err, "%s:%u", p->name, p->line);
    return p->r == 0;
}

int dd_config_parse(const char *text, size_t len, const char *name, dd_config *c, delta_error *err)
{
    struct parse p = { .text = text, .len = len, .name = name, .c = c, .err = err };
    if (len > FILE_MAX_BYTES)
        return delta_fail(err, DELTA_ELIMIT, "%s: longer than %d bytes", name, FILE_MAX_BYTES);
#ifdef HAVE_INI_MAX_LINE
    ini_max_line = LINE_MAX_BYTES; /* its own default is 200 */
#endif
    int r = ini_parse_stream(next_line, &p, on_pair, &p);
    if (p.r == 0 && r != 0) { /* what only inih sees */
        p.line = r > 0 ? (unsigned)r : p.line;
        parse_fail(&p, "neither \"[section]\" nor \"key = value\"");
    }
    return p.r;
}

static int read_text(const char *path, char **ret_text, size_t *ret_len, delta_error *err)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
    if (fd < 0)
        return delta_fail(err, errno == ENOENT ? DELTA_ENOTFOUND : DELTA_EIO, "%s: %s", path,
                          strerror(errno));
    char *text = malloc(FILE_MAX_BYTES + 1);
    int r = text ? 0 : delta_fail(err, DELTA_ENOMEM, "%s: out of memory", path);
    size_t len = 0;
    while (r == 0 && len <= FILE_MAX_BYTES) {
        ssize_t n = read(fd, text + len, FILE_MAX_BYTES + 1 - len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            r = delta_fail(err, DELTA_EIO, "%s: %s", path, strerror(errno));
        if (n <= 0)
            break;
        len += (size_t)n;
    }
    (void)close(fd);
    if (r < 0) {
        free(text);
        return r;
    }
    *ret_text = text;
    *ret_len = len;
    return 0;
}

static int parse_file(const char *path, dd_config *c, delta_error *err)
{
    char *text;
    size_t len;
    int r = read_text(path, &text, &len, err);
    if (r < 0)
        return r;
    r = dd_config_parse(text, len, path, c, err);
    free(text);
    return r;
}

static int is_fragment(const struct dirent *d)
{
    const char *dot = strrchr(d->d_name, '.');
    return d->d_name[0] != '.' && dot && strcmp(dot, ".conf") == 0;
}

/* The installed file and its fragments in the order of their names; none of them need exist. */
static int parse_installed(dd_config *c, delta_error *err)
{
    int r = parse_file(DD_SYSCONFDIR "/deltad/deltad.conf", c, err);
    if (r < 0 && r != DELTA_ENOTFOUND)
        return r;
    r = 0;
    const char *folder = DD_SYSCONFDIR "/deltad/deltad.conf.d";
    struct dirent **list = NULL;
    int n = scandir(folder, &list, is_fragment, alphasort);
    if (n > FRAGMENTS_MAX)
        r = delta_fail(err, DELTA_ELIMIT, "%s: more than %d files", folder, FRAGMENTS_MAX);
    for (int i = 0; i < n; i++) {
        char path[PATH_MAX];
        (void)snprintf(path, sizeof path, "%s/%s", folder, list[i]->d_name);
        if (r == 0)
            r = parse_file(path, c, err);
        free(list[i]);
    }
    free(list);
    return r;
}

/* ---- what single keys cannot tell ---- */

/* "HOST:PORT", "[V6]:PORT". */
static bool split_listen(const char *s, char *host, size_t size)
{
    const char *colon = strrchr(s, ':');
    uint64_t port;
    if (!colon || colon == s || (size_t)(colon - s) >= size ||
        !parse_number(colon + 1, &byte_units[N_BYTE_UNITS - 1], 1, &port) || port > 65535)
        return false;
    size_t n = (size_t)(colon - s);
    bool bracketed = s[0] == '[' && s[n - 1] == ']' && n > 2;
    if (!bracketed && memchr(s, ':', n)) /* a bare IPv6 address is ambiguous */
        return false;
    (void)snprintf(host, size, "%.*s", (int)(bracketed ? n - 2 : n), bracketed ? s + 1 : s);
    return true;
}

static bool is_loopback_name(const char *host)
{
    return strcmp(host, "localhost") == 0 || strcmp(host, "::1") == 0 ||
           (strncmp(host, "127.", 4) == 0 && strspn(host, "0123456789.") == strlen(host));
}

static int check_group(const char *key, const char *group, delta_error *err)
{
    if (!group[0] || getgrnam(group))
        return 0;
    return delta_fail(err, DELTA_EFORMAT, "%s: there is no group \"%s\"", key, group);
}

int dd_config_check(const dd_config *c, delta_error *err)
{
    char host[256];
    const char *s = c->server.socket, *t = c->server.ttrpc_socket;
    if (!s[0] && !t[0] && !c->server.listen[0])
        return delta_fail(err, DELTA_EFORMAT,
                          "server: socket, ttrpc_socket and listen are all "
                          "empty: nobody could connect");
    if ((s[0] && s[0] != '/') || (t[0] && t[0] != '/'))
        return delta_fail(err, DELTA_EFORMAT, "server: \"%s\" is not an absolute path",
                          s[0] && s[0] != '/' ? s : t);
    if (s[0] && strcmp(s, t) == 0)
        return delta_fail(err, DELTA_EFORMAT, "server: socket and ttrpc_socket are both \"%s\"", s);
    if (c->server.listen[0] && !split_listen(c->server.listen, host, sizeof host))
        return delta_fail(err, DELTA_EFORMAT,
                          "server.listen: \"%s\" is not HOST:PORT, [IPV6]:PORT with a port of 0 to "
                          "65535",
                          c->server.listen);
    if (c->server.listen[0] && !c->server.allow_remote && !is_loopback_name(host))
        return delta_fail(err, DELTA_EFORMAT,
                          "server.listen: \"%s\" is not loopback; there is no encryption and no "
                          "login on TCP; set server.allow_remote = yes if that is meant",
                          c->server.listen);
    if (c->model.ctx_max && c->model.kv_tokens && c->model.kv_tokens < c->model.ctx_max)
        return delta_fail(err, DELTA_EFORMAT,
                          "model.kv_tokens (%llu) holds no sequence of model.ctx_max (%u) tokens",
                          (unsigned long long)c->model.kv_tokens, c->model.ctx_max);
    int r = check_group("server.socket_group", c->server.socket_group, err);
    return r < 0 ? r : check_group("policy.admin_group", c->policy.admin_group, err);
}

/* ---- flags ---- */

static const struct flag {
    const char *name, *value; /* value NULL: takes none */
    const char *section, *key;
    enum dd_action action; /* where it sets no key */
    char letter;
    const char *help;
} flags[] = {
    { "config", "FILE", NULL, NULL, DD_RUN, 0,
      "read FILE alone instead of " DD_SYSCONFDIR "/deltad/" },
    { "model", "DIR", "model", "path", DD_RUN, 0, NULL },
    { "socket", "PATH", "server", "socket", DD_RUN, 0, NULL },
    { "ttrpc-socket", "PATH", "server", "ttrpc_socket", DD_RUN, 0, NULL },
    { "listen", "HOST:PORT", "server", "listen", DD_RUN, 0, NULL },
    { "backend", "auto|cpu|cuda", "model", "backend", DD_RUN, 0, NULL },
    { "check-config", NULL, NULL, NULL, DD_CHECK_CONFIG, 0, "say whether all settings are right" },
    { "print-config", NULL, NULL, NULL, DD_PRINT_CONFIG, 0, "print all settings as a file" },
    { "version", NULL, NULL, NULL, DD_PRINT_VERSION, 'V', "print the version" },
    { "help", NULL, NULL, NULL, DD_PRINT_HELP, 'h', "print this text" },
};
enum { N_FLAGS = sizeof flags / sizeof flags[0] };

/* argv[*i] to a flag and its value; advances *i over "--x V". */
static int next_flag(int argc, char **argv, int *i, const struct flag **ret_f,
                     const char **ret_value, delta_error *err)
{
    const char *arg = argv[*i];
    size_t len = strcspn(arg, "=");
    const char *equals = arg[len] ? arg + len + 1 : NULL;
    const struct flag *f = NULL;
    for (size_t j = 0; j < N_FLAGS && !f; j++) {
        bool is_long = strncmp(arg, "--", 2) == 0 && len == strlen(flags[j].name) + 2 &&
                       memcmp(arg + 2, flags[j].name, len - 2) == 0;
        bool is_short = flags[j].letter && arg[0] == '-' && arg[1] == flags[j].letter && !arg[2];
        if (is_long || is_short)
            f = &flags[j];
    }
    if (!f)
        return delta_fail(err, DELTA_EINVALID, "unknown argument \"%.200s\"; see deltad --help",
                          arg);
    if (!f->value && equals)
        return delta_fail(err, DELTA_EINVALID, "--%s takes no value", f->name);
    if (f->value && !equals) {
        if (*i + 1 >= argc)
            return delta_fail(err, DELTA_EINVALID, "--%s needs a value: %s", f->name, f->value);
        equals = argv[++*i];
    }
    *ret_f = f;
    *ret_value = equals;
    return 0;
}

/* A setting by its flag. The path of a socket may be relative here, where it is clear to what; what
 * is kept is absolute, and so it stays where somebody else reads it. */
static int set_by_flag(dd_config *c, const struct flag *f, const char *value, delta_error *err)
{
    char path[4096 + 128];
    const struct key *k = find_key(f->section, f->key);
    bool is_socket = strcmp(f->section, "server") == 0 && strcmp(f->key, "listen") != 0;
    if (is_socket && value[0] && value[0] != '/') {
        if (!getcwd(path, 4096))
            return delta_fail(err, DELTA_EIO, "\"%.100s\": %s", value, strerror(errno));
        size_t n = strlen(path);
        value += strncmp(value, "./", 2) == 0 ? 2 : 0;
        (void)snprintf(path + n, sizeof path - n, "%s%.120s", path[n - 1] == '/' ? "" : "/", value);
        value = path;
    }
    return set(c, k, value, err);
}

/* Two passes: the file first (its name is a flag), then the flags that win over it. */
static int load(int argc, char **argv, dd_config *c, enum dd_action *action, delta_error *err)
{
    const char *values[N_FLAGS] = { 0 };
    bool given[N_FLAGS] = { 0 };
    int r;
    for (int i = 1; i < argc; i++) {
        const struct flag *f;
        const char *value;
        r = next_flag(argc, argv, &i, &f, &value, err);
        if (r < 0)
            return r;
        if (given[f - flags] && f->value)
            return delta_fail(err, DELTA_EINVALID, "--%s is given twice", f->name);
        given[f - flags] = true;
        values[f - flags] = value;
        if (f->action > *action) /* --help wins over all */
            *action = f->action;
    }
    if (*action >= DD_PRINT_VERSION)
        return 0;
    r = given[0] ? parse_file(values[0], c, err) : parse_installed(c, err);
    if (r < 0)
        return r;
    for (size_t j = 1; j < N_FLAGS; j++) {
        if (!given[j] || !flags[j].key)
            continue;
        if (set_by_flag(c, &flags[j], values[j], err) < 0) {
            delta_error_prefix(err, "--%s", flags[j].name);
            if (err)
                err->code = DELTA_EINVALID;
            return DELTA_EINVALID;
        }
    }
    return dd_config_check(c, err);
}

int dd_config_load(int argc, char **argv, dd_config *ret_c, enum dd_action *ret_action,
                   delta_error *err)
{
    dd_config c;
    enum dd_action action = DD_RUN;
    dd_config_defaults(&c);
    int r = load(argc, argv, &c, &action, err);
    if (r < 0) {
        dd_config_done(&c);
        return r;
    }
    *ret_c = c;
    *ret_action = action;
    return 0;
}

/* ---- printing ---- */

char *dd_config_print(const dd_config *c)
{
    char *text = NULL;
    size_t size;
    FILE *f = open_memstream(&text, &size);
    if (!f)
        return NULL;
    for (size_t i = 0; i < N_KEYS; i++) {
        const struct key *k = &keys[i];
        char range[160], value[64];
        if (i == 0 || strcmp(k->section, keys[i - 1].section) != 0)
            (void)fprintf(f, "%s[%s]\n", i ? "\n" : "", k->section);
        print_range(range, sizeof range, k);
        (void)fprintf(f, "# %s (%s; default: %s%s)\n%s =", k->help, range,
                      k->default_ ? (k->default_[0] ? k->default_ : "empty") : k->told,
                      reloads(k) ? "; SIGHUP re-reads it" : "", k->name);
        const char *v = get(c, k, value, sizeof value);
        (void)fprintf(f, "%s%s\n", v[0] ? " " : "", v);
    }
    if (fclose(f) != 0) {
        free(text);
        return NULL;
    }
    return text;
}

char *dd_config_help(void)
{
    char *text = NULL;
    size_t size;
    FILE *f = open_memstream(&text, &size);
    if (!f)
        return NULL;
    (void)fprintf(f, "deltad - serves one language model to local programs\n\n"
                     "usage: deltad [OPTION]...\n\n");
    for (size_t i = 0; i < N_FLAGS; i++) {
        const struct flag *p = &flags[i];
        char left[48], letter[8] = "    ";
        if (p->letter)
            (void)snprintf(letter, sizeof letter, "-%c, ", p->letter);
        (void)snprintf(left, sizeof left, "%s--%s%s%s", letter, p->name, p->value ? " " : "",
                       p->value ? p->value : "");
        (void)fprintf(f, "  %-30s %s\n", left,
                      p->help ? p->help : find_key(p->section, p->key)->help);
    }
    (void)fprintf(f,
                  "\nAll settings stand in the file; deltad --print-config shows them with their "
                  "meaning.\nFlags win over the file. Exit status: 0 stopped by a signal, 64 "
                  "wrong usage, 70 internal\nor device fault, 78 wrong configuration or "
                  "unusable model. See deltad(8), deltad.conf(5).\n");
    if (fclose(f) != 0) {
        free(text);
        return NULL;
    }
    return text;
}
