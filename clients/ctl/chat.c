/* chat.c -- deltactl chat: one answer, or a conversation at the terminal.
 *
 * The conversation is a session of the daemon, so every turn sends only what
 * is new. Ctrl-C while an answer comes cancels the answer; at the prompt it
 * clears the line. Lines that come at once (a paste) are one message. Where a
 * tool is called, its result is asked for. Standard output has the answer
 * alone where it is no terminal; notes go to standard error then. */
#include "ctl.h"

#include <editline/readline.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

enum { CALLS_MAX = 64 };

typedef struct answer { /* what an answer left to do */
    char *call_id[CALLS_MAX], *call_name[CALLS_MAX];
    size_t n_calls;
    bool cut_call;
} answer;

typedef struct chat {
    ctl *c;
    ctl_generation generation;
    Deltad__V1__Reasoning reasoning;
    Deltad__V1__Tool **tools;
    size_t n_tools;
    const char *system;
    char *session_id;     /* "" before the first turn of a conversation */
    bool session_is_ours; /* made here: closed at the end */
    bool show_thinking;
    const char *dim, *bold, *plain;
} chat;

/* ---- one answer */

static void put(const char *s)
{
    (void)fputs(s, stdout);
}

static void note(const chat *ch, const char *s)
{
    (void)fflush(stdout);
    (void)fprintf(ch->c->terminal ? stdout : stderr, "%s[%s]%s\n", ch->dim, s, ch->plain);
}

typedef struct printer {
    const chat *ch;
    bool thinking, any;
} printer;

static void end_thinking(printer *p)
{
    if (!p->thinking)
        return;
    p->thinking = false;
    put(p->ch->plain);
    put("\n\n");
}

static void print_event(printer *p, const Deltad__V1__ChatEvent *e)
{
    const chat *ch = p->ch;
    switch (e->event_case) {
    case DELTAD__V1__CHAT_EVENT__EVENT_REASONING:
        if (!ch->show_thinking)
            break;
        if (!p->thinking)
            put(ch->dim);
        p->thinking = true;
        ctl_put_text(ch->c, e->reasoning->text);
        break;
    case DELTAD__V1__CHAT_EVENT__EVENT_TEXT:
        end_thinking(p);
        ctl_put_text(ch->c, e->text->text);
        p->any = true;
        break;
    case DELTAD__V1__CHAT_EVENT__EVENT_CALL_START:
        end_thinking(p);
        printf("%s%s-> %s%s(", p->any ? "\n" : "", ch->bold, e->call_start->name, ch->plain);
        break;
    case DELTAD__V1__CHAT_EVENT__EVENT_CALL_ARGS:
        ctl_put_text(ch->c, e->call_args->json);
        break;
    case DELTAD__V1__CHAT_EVENT__EVENT_CALL_END: {
        const bool whole = e->call_end->state == DELTAD__V1__TOOL_CALL_END__STATE__STATE_COMPLETE;
        put(whole ? ")" : " ... cut)");
        p->any = true;
        break;
    }
    case DELTAD__V1__CHAT_EVENT__EVENT_FINISHED:
        end_thinking(p);
        put("\n");
        if (e->finished->reason == DELTAD__V1__FINISH_REASON__FINISH_REASON_LENGTH)
            note(ch, "cut: the answer reached its token limit");
        if (e->finished->reason == DELTAD__V1__FINISH_REASON__FINISH_REASON_TIME)
            note(ch, "cut: the answer reached its time limit");
        if (e->finished->reason == DELTAD__V1__FINISH_REASON__FINISH_REASON_CANCELLED)
            note(ch, "cancelled");
        break;
    default:
        break;
    }
    (void)fflush(stdout);
}

static void note_call(const chat *ch, const Deltad__V1__ChatEvent *e, answer *a)
{
    if (e->event_case != DELTAD__V1__CHAT_EVENT__EVENT_CALL_END)
        return;
    if (e->call_end->state != DELTAD__V1__TOOL_CALL_END__STATE__STATE_COMPLETE) {
        a->cut_call = true;
    } else if (a->n_calls < CALLS_MAX) {
        a->call_id[a->n_calls] = ctl_strdup(ch->c, e->call_end->id);
        a->call_name[a->n_calls++] = ctl_strdup(ch->c, e->call_end->name);
    }
}

static void random_id(char *s, size_t n)
{
    uint8_t bytes[16] = { 0 };
    if (getrandom(bytes, sizeof bytes, 0) < 0)
        memcpy(bytes, &(pid_t){ getpid() }, sizeof(pid_t));
    size_t at = (size_t)snprintf(s, n, "ctl-");
    for (size_t i = 0; i < sizeof bytes && at + 3 < n; i++)
        at += (size_t)snprintf(s + at, n - at, "%02x", bytes[i]);
}

/* Sends the request and shows the answer. 0, or an exit code. */
static int ask(chat *ch, Deltad__V1__ChatRequest *q, answer *a)
{
    ctl *c = ch->c;
    char id[64];
    random_id(id, sizeof id);
    q->request_id = id;
    q->sampling = &ch->generation.sampling;
    q->stopping = &ch->generation.stopping;
    q->reasoning = &ch->reasoning;
    q->format = ch->generation.format.format_case ? &ch->generation.format : NULL;
    q->tool_choice = ch->generation.tool_choice.choice_case ? &ch->generation.tool_choice : NULL;
    if (ch->generation.has_budget) {
        ch->reasoning.budget_tokens_opt_case =
            DELTAD__V1__REASONING__BUDGET_TOKENS_OPT_BUDGET_TOKENS;
        ch->reasoning.budget_tokens = ch->generation.budget;
    }
    int code = ctl_connect(c);
    if (code)
        return code;
    *a = (answer){ 0 };
    printer p = { .ch = ch };
    dc_call *call = NULL;
    dc_status st;
    ProtobufCMessage *m;
    bool cancelled = false;
    (void)ctl_interrupted(); /* one from before is not meant for this answer */
    int r = dc_start(c->client, DC_CHAT, &q->base, 0, &call, &st);
    while (r >= 0) {
        r = dc_next(call, &deltad__v1__chat_event__descriptor, &m, &st);
        if (r > 0) {
            note_call(ch, (const Deltad__V1__ChatEvent *)m, a);
            if (c->json)
                ctl_print_json(m);
            else
                print_event(&p, (const Deltad__V1__ChatEvent *)m);
            protobuf_c_message_free_unpacked(m, NULL);
        } else if (r != DC_EINTR) {
            break;
        }
        if (ctl_interrupted()) { /* in the call, or while its event was printed */
            if (cancelled) {
                r = DC_EINTR; /* a second Ctrl-C does not wait */
                break;
            }
            cancelled = true;
            Deltad__V1__CancelRequest stop = DELTAD__V1__CANCEL_REQUEST__INIT;
            stop.request_id = id;
            ProtobufCMessage *none;
            dc_status ignored;
            if (dc_unary(c->client, DC_CANCEL, &stop.base, &deltad__v1__cancel_response__descriptor,
                         0, &none, &ignored) == 0)
                protobuf_c_message_free_unpacked(none, NULL);
        }
        r = 1;
    }
    end_thinking(&p);
    if (r < 0) {
        if (!c->json && p.any)
            put("\n");
        (void)fflush(stdout);
        code = ctl_say_status(c, r, &st);
    }
    if (r == DC_ECLIENT || r == DC_EINTR) { /* to close it ends the answer too */
        dc_free(c->client);
        c->client = NULL;
    } else {
        dc_call_free(call);
    }
    return cancelled ? CTL_INTERRUPTED : code;
}

/* ---- the terminal */

static char *history_path(ctl *c)
{
    const char *state = getenv("XDG_STATE_HOME"), *home = getenv("HOME");
    char dir[512], path[600];
    if (state && *state)
        (void)snprintf(dir, sizeof dir, "%s/deltactl", state);
    else if (home && *home)
        (void)snprintf(dir, sizeof dir, "%s/.local/state/deltactl", home);
    else
        return NULL;
    for (char *s = dir + 1; *s; s++)
        if (*s == '/') {
            *s = 0;
            (void)mkdir(dir, 0700);
            *s = '/';
        }
    (void)mkdir(dir, 0700);
    (void)snprintf(path, sizeof path, "%s/history", dir);
    return ctl_strdup(c, path);
}

static void remember(ctl *c, const char *line)
{
    static bool ready;
    static char *path;
    if (!ready) {
        ready = true;
        using_history();
        stifle_history(1000);
        path = history_path(c);
        if (path)
            (void)read_history(path);
    }
    if (!line || !*line)
        return;
    (void)add_history(line);
    if (path) {
        const mode_t mask = umask(077); /* nobody else's from its first byte */
        (void)write_history(path);
        (void)umask(mask);
    }
}

static bool is_interactive(const ctl *c)
{
    return c->terminal && isatty(STDIN_FILENO);
}

/* More to read at once: a person types no two lines within 20 ms, a paste does. */
static bool is_paste(void)
{
    struct pollfd in = { .fd = STDIN_FILENO, .events = POLLIN };
    return poll(&in, 1, 20) > 0 && in.revents & POLLIN;
}

/* What a person enters in the arena, of one line or a paste of several; NULL at the end of input. */
static char *read_line(ctl *c, const char *prompt)
{
    if (is_interactive(c)) {
        remember(c, NULL);
        de_text all = { 0 };
        bool more;
        do {
            char *s = readline(all.len ? "" : prompt);
            if (!s) {
                const bool stop = ctl_interrupted();
                if (stop)
                    put("\n");
                if (stop || all.len == 0) {
                    de_text_done(&all);
                    return stop ? ctl_strdup(c, "") : NULL;
                }
                break;
            }
            remember(c, s);
            more = is_paste();
            de_text_puts(&all, s);
            if (more)
                de_text_puts(&all, "\n");
            free(s);
        } while (more);
        char *copy = ctl_strdup(c, all.p ? all.p : "");
        de_text_done(&all);
        return copy;
    }
    char *line = NULL;
    size_t cap = 0;
    ssize_t n = getline(&line, &cap, stdin);
    if (n > 0 && line[n - 1] == '\n')
        line[n - 1] = 0;
    char *copy = n < 0 ? NULL : ctl_strdup(c, line);
    free(line);
    return copy;
}

static int new_session(chat *ch)
{
    Deltad__V1__CreateSessionRequest q = DELTAD__V1__CREATE_SESSION_REQUEST__INIT;
    static char name[] = "deltactl";
    q.name = name;
    q.tools = ch->tools;
    q.n_tools = ch->n_tools;
    ProtobufCMessage *m;
    int code = ctl_unary(ch->c, DC_CREATE_SESSION, &q.base,
                         &deltad__v1__create_session_response__descriptor, &m);
    if (code)
        return code;
    ch->session_id = ctl_strdup(ch->c, ((Deltad__V1__CreateSessionResponse *)m)->session->id);
    ch->session_is_ours = true;
    protobuf_c_message_free_unpacked(m, NULL);
    return 0;
}

static void close_session(chat *ch)
{
    if (!ch->session_id[0] || !ch->c->client || !ch->session_is_ours) {
        ch->session_id = ctl_strdup(ch->c, "");
        return;
    }
    Deltad__V1__CloseSessionRequest q = DELTAD__V1__CLOSE_SESSION_REQUEST__INIT;
    q.session_id = ch->session_id;
    ProtobufCMessage *m = NULL;
    dc_status st;
    if (dc_unary(ch->c->client, DC_CLOSE_SESSION, &q.base,
                 &deltad__v1__close_session_response__descriptor, 0, &m, &st) == 0)
        protobuf_c_message_free_unpacked(m, NULL);
    ch->session_id = ctl_strdup(ch->c, "");
}

/* After a failure: a daemon that was started anew has other sessions, an idle one may have gone. */
static bool session_is_there(chat *ch)
{
    if (!ch->session_id[0])
        return false;
    Deltad__V1__GetSessionRequest q = DELTAD__V1__GET_SESSION_REQUEST__INIT;
    q.session_id = ch->session_id;
    ProtobufCMessage *m;
    dc_status st;
    if (dc_unary(ch->c->client, DC_GET_SESSION, &q.base,
                 &deltad__v1__get_session_response__descriptor, 0, &m, &st) == 0) {
        protobuf_c_message_free_unpacked(m, NULL);
        return true;
    }
    ch->session_id = ctl_strdup(ch->c, "");
    return false;
}

static const char commands[] = "  /new          begin another conversation\n"
                               "  /think on|off think before answering, or not\n"
                               "  /help         this\n"
                               "  /quit         leave (or Ctrl-D)\n"
                               "  Ctrl-C cancels an answer.\n";

/* true: the line was a command; *quit if it was the last. */
static bool command(chat *ch, const char *line, bool *quit)
{
    if (line[0] != '/' || strchr(line, '\n'))
        return false;
    if (strcmp(line, "/quit") == 0 || strcmp(line, "/exit") == 0) {
        *quit = true;
    } else if (strcmp(line, "/new") == 0) {
        close_session(ch);
    } else if (strcmp(line, "/think on") == 0 || strcmp(line, "/think off") == 0) {
        ch->reasoning.mode = line[7] == 'o' && line[8] == 'n'
                                 ? DELTAD__V1__REASONING__MODE__MODE_ON
                                 : DELTAD__V1__REASONING__MODE__MODE_OFF;
    } else {
        if (strcmp(line, "/help") != 0)
            printf("unknown command %s\n", line);
        put(commands);
    }
    return true;
}

/* Asks the person for the results of the calls; the messages of the next turn. The end of input
 * leaves the calls unanswered: none. */
static size_t tool_results(chat *ch, const answer *a, Deltad__V1__Message **messages)
{
    size_t n = 0;
    for (size_t i = 0; i < a->n_calls; i++) {
        char prompt[160];
        (void)snprintf(prompt, sizeof prompt, "result of %.80s> ", a->call_name[i]);
        const char *line = read_line(ch->c, prompt);
        if (!line)
            return 0;
        Deltad__V1__Message *m = ctl_message(ch->c, DELTAD__V1__ROLE__ROLE_TOOL, line);
        m->tool_call_id = a->call_id[i];
        messages[n++] = m;
    }
    return n;
}

static int converse(chat *ch)
{
    Deltad__V1__Message *messages[CALLS_MAX + 2];
    bool quit = false;
    int code = ctl_connect(ch->c);
    if (code)
        return code;
    if (is_interactive(ch->c))
        put("Type a message; /help lists commands, Ctrl-D leaves.\n");
    /* A person sees what failed and goes on; what is piped in ends at the first failure. */
    while (!quit && (code == 0 || is_interactive(ch->c))) {
        const char *line = read_line(ch->c, "> ");
        if (!line)
            break;
        if (!*line || command(ch, line, &quit))
            continue;
        size_t n = 0;
        if (!ch->session_id[0]) {
            code = new_session(ch);
            if (code)
                continue;
            if (ch->system)
                messages[n++] = ctl_message(ch->c, DELTAD__V1__ROLE__ROLE_SYSTEM, ch->system);
        }
        messages[n++] = ctl_message(ch->c, DELTAD__V1__ROLE__ROLE_USER, line);
        answer a;
        do {
            Deltad__V1__ChatRequest q = DELTAD__V1__CHAT_REQUEST__INIT;
            q.session_id = ch->session_id;
            q.messages = messages;
            q.n_messages = n;
            code = ask(ch, &q, &a);
            n = code == 0 ? tool_results(ch, &a, messages) : 0;
        } while (code == 0 && n > 0);
        if (code == 0)
            continue;
        if (!ch->c->client && ctl_connect(ch->c) != 0)
            return CTL_UNAVAILABLE;
        if (!session_is_there(ch) && ch->c->terminal)
            note(ch, "this conversation is gone; the next message begins another");
    }
    close_session(ch);
    if (is_interactive(ch->c)) {
        put("\n");
        return CTL_OK;
    }
    return code;
}

int ctl_chat(ctl *c, int argc, char **argv)
{
    chat ch = { .c = c, .session_id = ctl_strdup(c, ""), .dim = "", .bold = "", .plain = "" };
    Deltad__V1__Message **messages = NULL;
    size_t n = 0;
    const char *prompt = NULL, *session = NULL;
    int code = 0;
    ctl_generation_init(&ch.generation, c, true);
    deltad__v1__reasoning__init(&ch.reasoning);
    ch.show_thinking = c->terminal;
    for (int i = 1; i < argc && code == 0; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(argv[i], "--no-think") == 0) {
            ch.reasoning.mode = DELTAD__V1__REASONING__MODE__MODE_OFF;
        } else if (strcmp(argv[i], "--show-thinking") == 0) {
            ch.show_thinking = true;
        } else if (ctl_generation_flag(&ch.generation, argc, argv, &i, &code)) {
            continue;
        } else if (!value) {
            code = argv[i][0] == '-'
                       ? ctl_usage("chat: %s needs a value, or is unknown", argv[i])
                       : ctl_usage("chat: what to say comes after -p: chat -p \"%s\"", argv[i]);
        } else {
            if (strcmp(argv[i], "-p") == 0 || strcmp(argv[i], "--prompt") == 0)
                prompt = value;
            else if (strcmp(argv[i], "-s") == 0 || strcmp(argv[i], "--system") == 0)
                ch.system = value;
            else if (strcmp(argv[i], "--session") == 0)
                session = value;
            else if (strcmp(argv[i], "--messages") == 0)
                code = ctl_read_messages(c, value, &messages, &n);
            else if (strcmp(argv[i], "--tools") == 0)
                code = ctl_read_tools(c, value, &ch.tools, &ch.n_tools);
            else
                code = ctl_usage("chat: unknown argument %s", argv[i]);
            i++;
        }
    }
    if (code)
        return code;
    if (c->color) {
        ch.dim = "\033[2m";
        ch.bold = "\033[1m";
        ch.plain = "\033[0m";
    }
    if (session)
        ch.session_id = ctl_strdup(c, session);
    if (!prompt && !n)
        return converse(&ch);
    Deltad__V1__ChatRequest q = DELTAD__V1__CHAT_REQUEST__INIT;
    q.messages = ctl_alloc(c, (n + 2) * sizeof *q.messages);
    if (ch.system)
        q.messages[q.n_messages++] = ctl_message(c, DELTAD__V1__ROLE__ROLE_SYSTEM, ch.system);
    for (size_t i = 0; i < n; i++)
        q.messages[q.n_messages++] = messages[i];
    if (prompt)
        q.messages[q.n_messages++] = ctl_message(c, DELTAD__V1__ROLE__ROLE_USER, prompt);
    q.session_id = ch.session_id;
    q.tools = ch.tools;
    q.n_tools = ch.n_tools;
    answer a;
    code = ask(&ch, &q, &a);
    return code ? code : a.cut_call ? CTL_INCOMPLETE : CTL_OK;
}
