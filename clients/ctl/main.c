/* main.c -- deltactl: a person's tool for a running deltad. Arguments to a
 * command, and what commands share: the connection, statuses, exit codes. */
#include "ctl.h"

#include <errno.h>
#include <langinfo.h>
#include <locale.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char help[] =
    "usage: deltactl [--socket PATH] [--json] COMMAND [OPTION]...\n"
    "\n"
    "  chat [-p TEXT]        talk to the model; with -p one question, answered on standard output\n"
    "  generate [-p TEXT]    continue a text (standard input without -p), no chat template\n"
    "  render -p TEXT        the prompt that a chat would send to the model\n"
    "  parse [FILE]          model output to reasoning, content and tool calls\n"
    "  tokenize [TEXT]       text (standard input without TEXT) to token ids\n"
    "  detokenize ID...      token ids to text\n"
    "  sessions              the sessions of this user; also:\n"
    "    close ID, fork ID [COUNT], rewind ID MESSAGES, pin ID, unpin ID,\n"
    "    export ID FILE (with --json: JSON on standard output, and no FILE)\n"
    "  save ID NAME          a session, its state included, to a file of this user's\n"
    "  restore NAME          a new session that goes on from there\n"
    "  saves [delete NAME]   what is saved\n"
    "  status                model, memory, queue and counters\n"
    "  cancel REQUEST_ID     end a running request\n"
    "\n"
    "for chat (generate: -p, and from --temperature on; render: -p to --no-think):\n"
    "  -p, --prompt TEXT     what to say\n"
    "  -s, --system TEXT     system message\n"
    "      --messages FILE   conversation so far, a JSON array in OpenAI's form (\"-\": stdin)\n"
    "      --tools FILE      tools, a JSON array in OpenAI's form\n"
    "      --no-think        answer without thinking\n"
    "      --show-thinking   with -p: print the reasoning too\n"
    "      --session ID      chat: go on with a session, and leave it open\n"
    "      --temperature F  --top-k N  --top-p F  --min-p F  --seed N\n"
    "      --presence-penalty F  --frequency-penalty F  --repetition-penalty F\n"
    "      --max-tokens N  --stop TEXT (up to 16 times)  --ignore-eos\n"
    "      --json-schema FILE, --json-object, --regex TEXT, --grammar FILE,\n"
    "      --choice TEXT (up to 64 times)   what the answer must be\n"
    "      --tool-choice auto|none|required|NAME, --budget N (tokens of thinking)   for chat\n"
    "for parse: --tools FILE, --no-think (the output began outside of thinking), --cut;\n"
    "           or --jsonl: many outputs, one JSON object a line, without a daemon\n"
    "for detokenize: --skip-special; for tokenize: --plain (no special tokens)\n"
    "\n"
    "Every command takes --json: one JSON object a line, events as they come.\n"
    "Exit status: 0 done, 1 the daemon refused or the call failed, 2 the answer was cut inside\n"
    "a tool call, 64 wrong usage, 69 no daemon or not ready, 130 interrupted.\n";

static volatile sig_atomic_t interrupted;

static void on_interrupt(int sig)
{
    (void)sig;
    interrupted = 1;
}

bool ctl_interrupted(void)
{
    const bool was = interrupted;
    interrupted = 0;
    return was;
}

int ctl_usage(const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    (void)fprintf(stderr, "deltactl: ");
    (void)vfprintf(stderr, format, ap);
    (void)fprintf(stderr, "\n");
    va_end(ap);
    return CTL_USAGE;
}

int ctl_say_status(const ctl *c, int dc_result, const dc_status *st)
{
    enum { UNAVAILABLE = 14 };
    if (dc_result == DC_EINTR)
        return CTL_INTERRUPTED; /* the person did it and knows */
    if (c->json) {
        de_text t = { 0 };
        de_text_puts(&t, "{\"error\": {\"code\": ");
        de_json_write_string(&t, dc_code_name(st->code), strlen(dc_code_name(st->code)));
        de_text_puts(&t, ", \"reason\": ");
        de_json_write_string(&t, st->reason, strlen(st->reason));
        de_text_puts(&t, ", \"message\": ");
        de_json_write_string(&t, st->message, strlen(st->message));
        de_text_puts(&t, "}}");
        puts(t.p ? t.p : "{\"error\": {}}");
        (void)fflush(stdout);
        de_text_done(&t);
    } else {
        (void)fprintf(stderr, "deltactl: %s%s%s: %s\n", dc_code_name(st->code),
                      st->reason[0] ? " " : "", st->reason, st->message);
        if (st->retry_ms)
            (void)fprintf(stderr, "deltactl: try again in %u ms\n", st->retry_ms);
    }
    return st->code == UNAVAILABLE ? CTL_UNAVAILABLE : CTL_FAILED;
}

void ctl_put_text(const ctl *c, const char *s)
{
    for (; c->terminal && *s; s++) {
        const unsigned char u = (unsigned char)*s;
        const bool is_c1 = u == 0xc2 && (unsigned char)s[1] >= 0x80 && (unsigned char)s[1] < 0xa0;
        if (is_c1)
            s++;
        if (is_c1 || (u < 32 && u != '\n' && u != '\t') || u == 127)
            (void)fputs("\xef\xbf\xbd", stdout); /* U+FFFD */
        else
            (void)fputc(u, stdout);
    }
    (void)fputs(s, stdout);
}

int ctl_connect(ctl *c)
{
    dc_status st;
    if (c->client)
        return 0;
    int r = dc_open(c->socket, &c->client, &st);
    if (r == 0)
        return 0;
    int code = ctl_say_status(c, r, &st);
    const char *path = c->socket ? c->socket : dc_default_socket();
    if (code == CTL_UNAVAILABLE && access(path, W_OK) < 0 && errno == EACCES)
        (void)fprintf(stderr,
                      "deltactl: you may not use this socket; its owner and group may "
                      "(ls -l %s)\n",
                      path);
    else if (code == CTL_UNAVAILABLE)
        (void)fprintf(stderr, "deltactl: no deltad listens there. Start one (systemctl start "
                              "deltad, or ./demo in the source), or name its socket with "
                              "--socket PATH\n");
    return code;
}

int ctl_unary(ctl *c, const char *method, const ProtobufCMessage *request,
              const ProtobufCMessageDescriptor *type, ProtobufCMessage **ret_m)
{
    dc_status st = { 0 };
    int r = ctl_connect(c);
    if (r)
        return r;
    r = dc_unary(c->client, method, request, type, 0, ret_m, &st);
    if (r == DC_ECLIENT) {
        dc_free(c->client);
        c->client = NULL;
    }
    return r < 0 ? ctl_say_status(c, r, &st) : 0;
}

void *ctl_alloc(ctl *c, size_t size)
{
    void *p = de_arena_zalloc(&c->arena, size);
    if (!p) {
        (void)fprintf(stderr, "deltactl: out of memory\n");
        exit(CTL_FAILED);
    }
    return p;
}

char *ctl_strdup(ctl *c, const char *s)
{
    const size_t n = strlen(s);
    return memcpy(ctl_alloc(c, n + 1), s, n + 1);
}

bool ctl_parse_u64(const char *s, uint64_t max, uint64_t *ret)
{
    char *end;
    errno = 0;
    unsigned long long v = strtoull(s, &end, 10);
    if (*s < '0' || *s > '9' || *end || errno || v > max)
        return false;
    *ret = v;
    return true;
}

bool ctl_parse_float(const char *s, float *ret)
{
    char *end;
    float v = strtof(s, &end);
    if (end == s || *end || !isfinite(v))
        return false;
    *ret = v;
    return true;
}

void ctl_generation_init(ctl_generation *g, ctl *c, bool is_chat)
{
    g->c = c;
    g->is_chat = is_chat;
    deltad__v1__output_format__init(&g->format);
    deltad__v1__output_format__choices__init(&g->choices);
    deltad__v1__tool_choice__init(&g->tool_choice);
    g->choices.choices = g->choice;
    deltad__v1__sampling__init(&g->sampling);
    deltad__v1__stopping__init(&g->stopping);
    g->stopping.stop = g->stop;
}

/* 1: taken; 0: another flag; -1: taken, and its value is bad. */
static int sampling_value(ctl_generation *g, const char *flag, char *value)
{
    Deltad__V1__Sampling *s = &g->sampling;
    Deltad__V1__Stopping *p = &g->stopping;
    uint64_t u;
#define FLOAT_FLAG(name, member, NAME)                                                             \
    if (strcmp(flag, name) == 0) {                                                                 \
        s->member##_opt_case = DELTAD__V1__SAMPLING__##NAME##_OPT_##NAME;                          \
        return ctl_parse_float(value, &s->member) ? 1 : -1;                                        \
    }
    FLOAT_FLAG("--temperature", temperature, TEMPERATURE)
    FLOAT_FLAG("--top-p", top_p, TOP_P)
    FLOAT_FLAG("--min-p", min_p, MIN_P)
    FLOAT_FLAG("--presence-penalty", presence_penalty, PRESENCE_PENALTY)
    FLOAT_FLAG("--frequency-penalty", frequency_penalty, FREQUENCY_PENALTY)
    FLOAT_FLAG("--repetition-penalty", repetition_penalty, REPETITION_PENALTY)
#undef FLOAT_FLAG
    if (strcmp(flag, "--top-k") == 0) {
        if (!ctl_parse_u64(value, UINT32_MAX, &u))
            return -1;
        s->top_k_opt_case = DELTAD__V1__SAMPLING__TOP_K_OPT_TOP_K;
        s->top_k = (uint32_t)u;
        return 1;
    }
    if (strcmp(flag, "--seed") == 0) {
        if (!ctl_parse_u64(value, UINT64_MAX, &u))
            return -1;
        s->seed_opt_case = DELTAD__V1__SAMPLING__SEED_OPT_SEED;
        s->seed = u;
        return 1;
    }
    if (strcmp(flag, "--max-tokens") == 0) {
        if (!ctl_parse_u64(value, UINT32_MAX, &u))
            return -1;
        p->max_tokens_opt_case = DELTAD__V1__STOPPING__MAX_TOKENS_OPT_MAX_TOKENS;
        p->max_tokens = (uint32_t)u;
        return 1;
    }
    if (strcmp(flag, "--stop") == 0) {
        if (p->n_stop == sizeof g->stop / sizeof *g->stop)
            return -1;
        p->stop[p->n_stop++] = value;
        return 1;
    }
    return 0;
}

/* A whole file as text, or NULL after saying why. */
static char *file_text(ctl *c, const char *path)
{
    size_t n;
    return ctl_read_file(c, path, &n);
}

/* What the answer is held to. As sampling_value(). */
static int form_value(ctl_generation *g, const char *flag, char *value)
{
    Deltad__V1__OutputFormat *f = &g->format;
    if (strcmp(flag, "--json-schema") == 0) {
        f->format_case = DELTAD__V1__OUTPUT_FORMAT__FORMAT_JSON_SCHEMA;
        f->json_schema = file_text(g->c, value);
        return f->json_schema ? 1 : -1;
    }
    if (strcmp(flag, "--grammar") == 0) {
        f->format_case = DELTAD__V1__OUTPUT_FORMAT__FORMAT_GRAMMAR;
        f->grammar = file_text(g->c, value);
        return f->grammar ? 1 : -1;
    }
    if (strcmp(flag, "--regex") == 0) {
        f->format_case = DELTAD__V1__OUTPUT_FORMAT__FORMAT_REGEX;
        f->regex = value;
        return 1;
    }
    if (strcmp(flag, "--choice") == 0) {
        f->format_case = DELTAD__V1__OUTPUT_FORMAT__FORMAT_CHOICE;
        f->choice = &g->choices;
        if (g->choices.n_choices == sizeof g->choice / sizeof *g->choice)
            return -1;
        g->choices.choices[g->choices.n_choices++] = value;
        return 1;
    }
    return 0;
}

/* Of a conversation. As sampling_value(). */
static int chat_value(ctl_generation *g, const char *flag, char *value)
{
    static const char *const modes[] = { "auto", "none", "required" };
    uint64_t u;
    if (strcmp(flag, "--budget") == 0) {
        if (!ctl_parse_u64(value, UINT32_MAX, &u))
            return -1;
        g->has_budget = true;
        g->budget = (uint32_t)u;
        return 1;
    }
    if (strcmp(flag, "--tool-choice") != 0)
        return 0;
    g->tool_choice.choice_case = DELTAD__V1__TOOL_CHOICE__CHOICE_NAME;
    g->tool_choice.name = value;
    for (int i = 0; i < 3; i++)
        if (strcmp(value, modes[i]) == 0) {
            g->tool_choice.choice_case = DELTAD__V1__TOOL_CHOICE__CHOICE_MODE;
            g->tool_choice.mode =
                (Deltad__V1__ToolChoice__Mode)(DELTAD__V1__TOOL_CHOICE__MODE__MODE_AUTO + i);
        }
    return value[0] ? 1 : -1;
}

bool ctl_generation_flag(ctl_generation *g, int argc, char **argv, int *i, int *ret_code)
{
    if (strcmp(argv[*i], "--ignore-eos") == 0) {
        g->stopping.ignore_eos = true;
        return true;
    }
    if (strcmp(argv[*i], "--json-object") == 0) {
        g->format.format_case = DELTAD__V1__OUTPUT_FORMAT__FORMAT_JSON_OBJECT;
        g->format.json_object = true;
        return true;
    }
    static char none[] = "";
    char *value = *i + 1 < argc ? argv[*i + 1] : none;
    int r = sampling_value(g, argv[*i], value);
    if (r == 0)
        r = form_value(g, argv[*i], value);
    if (r == 0 && g->is_chat)
        r = chat_value(g, argv[*i], value);
    if (r == 0)
        return false;
    if (r < 0 || *i + 1 >= argc)
        *ret_code = ctl_usage("%s: bad value \"%s\"", argv[*i], value);
    (*i)++;
    return true;
}

static bool is_help(const char *arg)
{
    return strcmp(arg, "--help") == 0 || strcmp(arg, "-h") == 0;
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        int (*run)(ctl *c, int argc, char **argv);
    } commands[] = { { "chat", ctl_chat },         { "generate", ctl_generate },
                     { "render", ctl_render },     { "parse", ctl_parse },
                     { "tokenize", ctl_tokenize }, { "detokenize", ctl_detokenize },
                     { "sessions", ctl_sessions }, { "save", ctl_save },
                     { "restore", ctl_restore },   { "saves", ctl_saves },
                     { "status", ctl_status },     { "cancel", ctl_cancel } };
    ctl c = { 0 };
    /* Texts are UTF-8, whatever the locale; the line editor asks the locale how wide they are. */
    if (!setlocale(LC_CTYPE, "") || strcmp(nl_langinfo(CODESET), "UTF-8") != 0)
        (void)setlocale(LC_CTYPE, "C.UTF-8");
    de_arena_init(&c.arena, 256u << 20);
    const struct sigaction interrupt = { .sa_handler = on_interrupt }; /* no SA_RESTART */
    (void)sigaction(SIGINT, &interrupt, NULL);
    (void)signal(SIGPIPE, SIG_DFL);

    /* --socket and --json may stand anywhere: taken out before the command sees the rest */
    int n = 1, code = -1;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--json") == 0)
            c.json = true;
        else if (strcmp(argv[i], "--socket") == 0 && i + 1 < argc)
            c.socket = argv[++i];
        else if (strcmp(argv[i], "--socket") == 0)
            code = ctl_usage("--socket needs a path");
        else if (strncmp(argv[i], "--socket=", 9) == 0)
            c.socket = argv[i] + 9;
        else
            argv[n++] = argv[i];
    }
    argv[n] = NULL;
    const char *term = getenv("TERM"), *no_color = getenv("NO_COLOR");
    c.terminal = isatty(STDOUT_FILENO) && !c.json;
    c.color = c.terminal && !(no_color && *no_color) && term && strcmp(term, "dumb") != 0;
    if (code < 0 && n > 1 && is_help(argv[n > 2 ? 2 : 1])) {
        (void)fputs(help, stdout);
        code = CTL_OK;
    } else if (code < 0 && n > 1 && strcmp(argv[1], "--version") == 0) {
        puts("deltactl " CTL_VERSION);
        code = CTL_OK;
    }
    for (size_t i = 0; code < 0 && n > 1 && i < sizeof commands / sizeof *commands; i++)
        if (strcmp(argv[1], commands[i].name) == 0)
            code = commands[i].run(&c, n - 1, argv + 1);
    if (code < 0) {
        if (n > 1)
            (void)ctl_usage("unknown command %s; try deltactl --help", argv[1]);
        else
            (void)fputs(help, stderr);
        code = CTL_USAGE;
    }
    dc_free(c.client);
    de_arena_done(&c.arena);
    return code;
}
