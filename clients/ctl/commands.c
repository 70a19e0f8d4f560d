/* commands.c -- everything of deltactl but chat. */
#include "ctl.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

static void print_text(const ctl *c, const char *s)
{
    const size_t n = strlen(s);
    ctl_put_text(c, s);
    if (n == 0 || s[n - 1] != '\n')
        (void)fputc('\n', stdout);
}

/* "42s", "3m05s", "2h07m", "9d04h": as much as a person wants to know. */
static struct duration {
    char text[32];
} duration(uint64_t ns)
{
    const uint64_t s = ns / 1000000000, m = s / 60, h = m / 60;
    struct duration d;
    if (m == 0)
        (void)snprintf(d.text, sizeof d.text, "%" PRIu64 "s", s);
    else if (h == 0)
        (void)snprintf(d.text, sizeof d.text, "%" PRIu64 "m%02" PRIu64 "s", m, s % 60);
    else if (h < 24)
        (void)snprintf(d.text, sizeof d.text, "%" PRIu64 "h%02" PRIu64 "m", h, m % 60);
    else
        (void)snprintf(d.text, sizeof d.text, "%" PRIu64 "d%02" PRIu64 "h", h / 24, h % 24);
    return d;
}

int ctl_generate(ctl *c, int argc, char **argv)
{
    ctl_generation g = { 0 };
    ctl_generation_init(&g, c, false);
    char *prompt = NULL;
    int code = 0;
    for (int i = 1; i < argc && code == 0; i++) {
        if ((strcmp(argv[i], "-p") == 0 || strcmp(argv[i], "--prompt") == 0) && i + 1 < argc)
            prompt = argv[++i];
        else if (!ctl_generation_flag(&g, argc, argv, &i, &code))
            code = ctl_usage("generate: unknown argument %s", argv[i]);
    }
    size_t n;
    if (code == 0 && !prompt && !(prompt = ctl_read_file(c, "-", &n)))
        code = CTL_USAGE;
    if (code == 0)
        code = ctl_connect(c);
    if (code)
        return code;
    Deltad__V1__GenerateRequest q = DELTAD__V1__GENERATE_REQUEST__INIT;
    q.prompt_case = DELTAD__V1__GENERATE_REQUEST__PROMPT_TEXT;
    q.text = prompt;
    q.sampling = &g.sampling;
    q.stopping = &g.stopping;
    q.format = g.format.format_case ? &g.format : NULL;
    dc_call *call;
    dc_status st;
    ProtobufCMessage *m;
    int r = dc_start(c->client, DC_GENERATE, &q.base, 0, &call, &st);
    if (r < 0)
        return ctl_say_status(c, r, &st);
    while ((r = dc_next(call, &deltad__v1__generate_event__descriptor, &m, &st)) > 0) {
        const Deltad__V1__GenerateEvent *e = (const Deltad__V1__GenerateEvent *)m;
        if (c->json)
            ctl_print_json(m);
        else if (e->event_case == DELTAD__V1__GENERATE_EVENT__EVENT_TEXT)
            ctl_put_text(c, e->text->text);
        (void)fflush(stdout);
        protobuf_c_message_free_unpacked(m, NULL);
        if (ctl_interrupted()) { /* while it was printed: no call saw it */
            r = DC_EINTR;
            break;
        }
    }
    if (!c->json)
        (void)fputc('\n', stdout);
    return r < 0 ? ctl_say_status(c, r, &st) : CTL_OK;
}

int ctl_render(ctl *c, int argc, char **argv)
{
    Deltad__V1__RenderPromptRequest q = DELTAD__V1__RENDER_PROMPT_REQUEST__INIT;
    Deltad__V1__ChatRequest chat = DELTAD__V1__CHAT_REQUEST__INIT;
    Deltad__V1__Reasoning reasoning = DELTAD__V1__REASONING__INIT;
    Deltad__V1__Message *own[2], **messages = NULL;
    const char *prompt = NULL, *system = NULL;
    size_t n = 0, n_own = 0;
    int code = 0;
    for (int i = 1; i < argc && code == 0; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(argv[i], "--no-think") == 0) {
            reasoning.mode = DELTAD__V1__REASONING__MODE__MODE_OFF;
            continue;
        }
        if (!value)
            code = ctl_usage("render: %s needs a value, or is unknown", argv[i]);
        else if (strcmp(argv[i], "-p") == 0 || strcmp(argv[i], "--prompt") == 0)
            prompt = value;
        else if (strcmp(argv[i], "-s") == 0 || strcmp(argv[i], "--system") == 0)
            system = value;
        else if (strcmp(argv[i], "--messages") == 0)
            code = ctl_read_messages(c, value, &messages, &n);
        else if (strcmp(argv[i], "--tools") == 0)
            code = ctl_read_tools(c, value, &chat.tools, &chat.n_tools);
        else
            code = ctl_usage("render: unknown argument %s", argv[i]);
        i++;
    }
    if (code == 0 && !prompt && !n)
        code = ctl_usage("render: give -p TEXT or --messages FILE");
    if (code)
        return code;
    if (system)
        own[n_own++] = ctl_message(c, DELTAD__V1__ROLE__ROLE_SYSTEM, system);
    chat.messages = ctl_alloc(c, (n + 2) * sizeof *chat.messages);
    for (size_t i = 0; i < n_own; i++)
        chat.messages[chat.n_messages++] = own[i];
    for (size_t i = 0; i < n; i++)
        chat.messages[chat.n_messages++] = messages[i];
    if (prompt)
        chat.messages[chat.n_messages++] = ctl_message(c, DELTAD__V1__ROLE__ROLE_USER, prompt);
    chat.reasoning = &reasoning;
    q.chat = &chat;
    ProtobufCMessage *m;
    code = ctl_unary(c, DC_RENDER_PROMPT, &q.base, &deltad__v1__render_prompt_response__descriptor,
                     &m);
    if (code)
        return code;
    if (c->json)
        ctl_print_json(m);
    else
        ctl_put_text(c, ((Deltad__V1__RenderPromptResponse *)m)->text);
    protobuf_c_message_free_unpacked(m, NULL);
    return CTL_OK;
}

int ctl_parse(ctl *c, int argc, char **argv)
{
    Deltad__V1__ParseOutputRequest q = DELTAD__V1__PARSE_OUTPUT_REQUEST__INIT;
    const char *file = "-";
    int code = 0;
    q.thinking = true;
    bool lines = false;
    for (int i = 1; i < argc && code == 0; i++) {
        if (strcmp(argv[i], "--jsonl") == 0)
            lines = true;
        else if (strcmp(argv[i], "--no-think") == 0)
            q.thinking = false;
        else if (strcmp(argv[i], "--cut") == 0)
            q.cut = true;
        else if (strcmp(argv[i], "--tools") == 0 && i + 1 < argc)
            code = ctl_read_tools(c, argv[++i], &q.tools, &q.n_tools);
        else if (argv[i][0] == '-' && argv[i][1])
            code = ctl_usage("parse: unknown argument %s", argv[i]);
        else
            file = argv[i];
    }
    if (code == 0 && lines)
        return q.n_tools || q.cut || !q.thinking
                   ? ctl_usage("parse: with --jsonl each line has its own tools, thinking and end")
                   : ctl_parse_lines(file);
    ProtobufCBinaryData chunk;
    if (code == 0 && !(chunk.data = (uint8_t *)ctl_read_file(c, file, &chunk.len)))
        code = CTL_USAGE;
    if (code)
        return code;
    q.chunks = &chunk;
    q.n_chunks = 1;
    ProtobufCMessage *m;
    code =
        ctl_unary(c, DC_PARSE_OUTPUT, &q.base, &deltad__v1__parse_output_response__descriptor, &m);
    if (code)
        return code;
    const Deltad__V1__ParseOutputResponse *a = (const Deltad__V1__ParseOutputResponse *)m;
    if (c->json) {
        ctl_print_json(m);
    } else {
        if (a->reasoning[0]) {
            (void)fputs("reasoning: ", stdout);
            print_text(c, a->reasoning);
        }
        if (a->content[0]) {
            (void)fputs("content: ", stdout);
            print_text(c, a->content);
        }
        for (size_t i = 0; i < a->n_calls; i++)
            printf("call%s: %s(%s)\n",
                   a->calls[i]->state == DELTAD__V1__TOOL_CALL_END__STATE__STATE_COMPLETE
                       ? ""
                       : " (cut)",
                   a->calls[i]->name, a->calls[i]->arguments_json);
    }
    protobuf_c_message_free_unpacked(m, NULL);
    return CTL_OK;
}

int ctl_tokenize(ctl *c, int argc, char **argv)
{
    Deltad__V1__TokenizeRequest q = DELTAD__V1__TOKENIZE_REQUEST__INIT;
    char *text = NULL;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--plain") == 0)
            q.plain_text = true;
        else if (strncmp(argv[i], "--", 2) == 0)
            return ctl_usage("tokenize: unknown argument %s; a text that begins so is read from "
                             "standard input",
                             argv[i]);
        else if (!text)
            text = argv[i];
        else
            return ctl_usage("tokenize: one text only; quote it");
    }
    size_t n;
    if (!text && !(text = ctl_read_file(c, "-", &n)))
        return CTL_USAGE;
    q.text = text;
    ProtobufCMessage *m;
    int code = ctl_unary(c, DC_TOKENIZE, &q.base, &deltad__v1__tokenize_response__descriptor, &m);
    if (code)
        return code;
    const Deltad__V1__TokenizeResponse *a = (const Deltad__V1__TokenizeResponse *)m;
    if (c->json) {
        ctl_print_json(m);
    } else {
        for (size_t i = 0; i < a->n_ids; i++)
            printf("%s%" PRIu32, i ? " " : "", a->ids[i]);
        puts("");
    }
    protobuf_c_message_free_unpacked(m, NULL);
    return CTL_OK;
}

int ctl_detokenize(ctl *c, int argc, char **argv)
{
    Deltad__V1__DetokenizeRequest q = DELTAD__V1__DETOKENIZE_REQUEST__INIT;
    q.ids = ctl_alloc(c, (size_t)argc * sizeof *q.ids);
    for (int i = 1; i < argc; i++) {
        uint64_t id;
        if (strcmp(argv[i], "--skip-special") == 0)
            q.skip_special = true;
        else if (ctl_parse_u64(argv[i], UINT32_MAX, &id))
            q.ids[q.n_ids++] = (uint32_t)id;
        else
            return ctl_usage("detokenize: %s is no token id", argv[i]);
    }
    if (q.n_ids == 0)
        return ctl_usage("detokenize: give one id or more");
    ProtobufCMessage *m;
    int code =
        ctl_unary(c, DC_DETOKENIZE, &q.base, &deltad__v1__detokenize_response__descriptor, &m);
    if (code)
        return code;
    if (c->json)
        ctl_print_json(m);
    else
        print_text(c, ((Deltad__V1__DetokenizeResponse *)m)->text);
    protobuf_c_message_free_unpacked(m, NULL);
    return CTL_OK;
}

static void print_sessions(const ctl *c, Deltad__V1__Session *const *list, size_t n)
{
    if (!c->json && n == 0)
        puts("no sessions");
    else if (!c->json)
        printf("%-26s %-16s %8s %8s %8s %6s %s\n", "ID", "NAME", "TURN", "TOKENS", "IDLE", "UID",
               "STATE");
    for (size_t i = 0; i < n; i++) {
        const Deltad__V1__Session *s = list[i];
        if (c->json)
            ctl_print_json(&s->base);
        else
            printf("%-26s %-16s %8" PRIu64 " %8" PRIu32 " %8s %6" PRIu32 " %s\n", s->id, s->name,
                   s->generation, s->n_tokens, duration(s->idle_ns).text, s->owner_uid,
                   s->busy     ? "busy"
                   : s->parked ? s->pinned ? "parked, pinned" : "parked"
                   : s->pinned ? "pinned"
                               : "idle");
    }
}

static int close_session(ctl *c, char *id)
{
    ProtobufCMessage *m;
    Deltad__V1__CloseSessionRequest q = DELTAD__V1__CLOSE_SESSION_REQUEST__INIT;
    q.session_id = id;
    int code = ctl_unary(c, DC_CLOSE_SESSION, &q.base,
                         &deltad__v1__close_session_response__descriptor, &m);
    if (code == 0 && c->json)
        ctl_print_json(m);
    if (code == 0)
        protobuf_c_message_free_unpacked(m, NULL);
    return code;
}

static int fork_session(ctl *c, char *id, const char *count)
{
    ProtobufCMessage *m;
    uint64_t n = 1;
    Deltad__V1__ForkSessionRequest q = DELTAD__V1__FORK_SESSION_REQUEST__INIT;
    if (count && !ctl_parse_u64(count, UINT32_MAX, &n))
        return ctl_usage("sessions fork: %s is no number", count);
    q.session_id = id;
    q.count = (uint32_t)n;
    int code =
        ctl_unary(c, DC_FORK_SESSION, &q.base, &deltad__v1__fork_session_response__descriptor, &m);
    if (code)
        return code;
    const Deltad__V1__ForkSessionResponse *a = (const Deltad__V1__ForkSessionResponse *)m;
    print_sessions(c, a->sessions, a->n_sessions);
    protobuf_c_message_free_unpacked(m, NULL);
    return CTL_OK;
}

static int rewind_session(ctl *c, char *id, const char *messages)
{
    ProtobufCMessage *m;
    uint64_t n;
    Deltad__V1__RewindSessionRequest q = DELTAD__V1__REWIND_SESSION_REQUEST__INIT;
    if (!ctl_parse_u64(messages, UINT32_MAX, &n))
        return ctl_usage("sessions rewind: %s is no number of messages", messages);
    q.session_id = id;
    q.n_messages = (uint32_t)n;
    int code = ctl_unary(c, DC_REWIND_SESSION, &q.base,
                         &deltad__v1__rewind_session_response__descriptor, &m);
    if (code)
        return code;
    print_sessions(c, &((Deltad__V1__RewindSessionResponse *)m)->session, 1);
    protobuf_c_message_free_unpacked(m, NULL);
    return CTL_OK;
}

static int pin_session(ctl *c, char *id, bool unpin)
{
    ProtobufCMessage *m;
    Deltad__V1__PinSessionRequest q = DELTAD__V1__PIN_SESSION_REQUEST__INIT;
    q.session_id = id;
    q.unpin = unpin;
    int code =
        ctl_unary(c, DC_PIN_SESSION, &q.base, &deltad__v1__pin_session_response__descriptor, &m);
    if (code)
        return code;
    print_sessions(c, &((Deltad__V1__PinSessionResponse *)m)->session, 1);
    protobuf_c_message_free_unpacked(m, NULL);
    return CTL_OK;
}

/* All pieces, one behind the other, malloc'ed. 0, or an exit code. */
static int read_export(ctl *c, char *id, uint8_t **ret_bytes, size_t *ret_len)
{
    Deltad__V1__ExportSessionRequest q = DELTAD__V1__EXPORT_SESSION_REQUEST__INIT;
    ProtobufCMessage *m;
    dc_call *call;
    dc_status st;
    uint8_t *bytes = NULL;
    size_t n = 0;
    q.session_id = id;
    q.with_sampled = true;
    int code = ctl_connect(c);
    if (code)
        return code;
    int r = dc_start(c->client, DC_EXPORT_SESSION, &q.base, 0, &call, &st);
    if (r < 0)
        return ctl_say_status(c, r, &st);
    while ((r = dc_next(call, &deltad__v1__export_session_response__descriptor, &m, &st)) > 0) {
        const ProtobufCBinaryData *piece = &((Deltad__V1__ExportSessionResponse *)m)->piece;
        uint8_t *more = realloc(bytes, n + piece->len + 1);
        if (more && piece->len)
            memcpy(more + n, piece->data, piece->len);
        n += more ? piece->len : 0;
        bytes = more ? more : bytes;
        protobuf_c_message_free_unpacked(m, NULL);
        if (!more) {
            (void)fprintf(stderr, "deltactl: no memory for the export\n");
            free(bytes);
            return CTL_FAILED;
        }
        if (ctl_interrupted()) { /* while it was copied: no call saw it */
            r = DC_EINTR;
            break;
        }
    }
    if (r < 0) {
        free(bytes);
        return ctl_say_status(c, r, &st);
    }
    *ret_bytes = bytes;
    *ret_len = n;
    return 0;
}

static int export_session(ctl *c, char *id, const char *path)
{
    uint8_t *bytes = NULL;
    size_t n = 0;
    int code = read_export(c, id, &bytes, &n);
    if (code)
        return code;
    if (path) {
        FILE *f = fopen(path, "wb");
        const bool ok = f && (n == 0 || fwrite(bytes, n, 1, f) == 1);
        if (!f || fclose(f) != 0 || !ok) {
            (void)fprintf(stderr, "deltactl: %s cannot be written\n", path);
            code = CTL_FAILED;
        }
    } else {
        ProtobufCMessage *m =
            protobuf_c_message_unpack(&deltad__v1__session_export__descriptor, NULL, n, bytes);
        if (m)
            ctl_print_json(m);
        else
            code = CTL_FAILED;
        protobuf_c_message_free_unpacked(m, NULL);
    }
    free(bytes);
    return code;
}

static void print_save(const ctl *c, const Deltad__V1__Save *s)
{
    if (c->json)
        ctl_print_json(&s->base);
    else
        printf("%-32s %10.1f MB %8s\n", s->name, (double)s->bytes * 1e-6, duration(s->age_ns).text);
}

int ctl_save(ctl *c, int argc, char **argv)
{
    if (argc != 3)
        return ctl_usage("save: ID NAME");
    ProtobufCMessage *m;
    Deltad__V1__SaveSessionRequest q = DELTAD__V1__SAVE_SESSION_REQUEST__INIT;
    q.session_id = argv[1];
    q.name = argv[2];
    int code =
        ctl_unary(c, DC_SAVE_SESSION, &q.base, &deltad__v1__save_session_response__descriptor, &m);
    if (code)
        return code;
    const Deltad__V1__SaveSessionResponse *a = (const void *)m;
    if (c->json)
        ctl_print_json(m);
    else
        printf("%s: %" PRIu32 " tokens, %.1f MB\n", a->save->name, a->n_tokens,
               (double)a->save->bytes * 1e-6);
    protobuf_c_message_free_unpacked(m, NULL);
    return CTL_OK;
}

int ctl_restore(ctl *c, int argc, char **argv)
{
    if (argc != 2)
        return ctl_usage("restore: NAME");
    ProtobufCMessage *m;
    Deltad__V1__RestoreSessionRequest q = DELTAD__V1__RESTORE_SESSION_REQUEST__INIT;
    q.name = argv[1];
    int code = ctl_unary(c, DC_RESTORE_SESSION, &q.base,
                         &deltad__v1__restore_session_response__descriptor, &m);
    if (code)
        return code;
    print_sessions(c, &((Deltad__V1__RestoreSessionResponse *)m)->session, 1);
    protobuf_c_message_free_unpacked(m, NULL);
    return CTL_OK;
}

int ctl_saves(ctl *c, int argc, char **argv)
{
    ProtobufCMessage *m;
    if (argc == 3 && strcmp(argv[1], "delete") == 0) {
        Deltad__V1__DeleteSaveRequest q = DELTAD__V1__DELETE_SAVE_REQUEST__INIT;
        q.name = argv[2];
        int code = ctl_unary(c, DC_DELETE_SAVE, &q.base,
                             &deltad__v1__delete_save_response__descriptor, &m);
        if (code == 0)
            protobuf_c_message_free_unpacked(m, NULL);
        return code;
    }
    if (argc != 1)
        return ctl_usage("saves: nothing, or: delete NAME");
    Deltad__V1__ListSavesRequest q = DELTAD__V1__LIST_SAVES_REQUEST__INIT;
    int code =
        ctl_unary(c, DC_LIST_SAVES, &q.base, &deltad__v1__list_saves_response__descriptor, &m);
    if (code)
        return code;
    const Deltad__V1__ListSavesResponse *a = (const void *)m;
    for (size_t i = 0; i < a->n_saves; i++)
        print_save(c, a->saves[i]);
    if (!c->json && a->n_saves == 0)
        puts("no saves");
    protobuf_c_message_free_unpacked(m, NULL);
    return CTL_OK;
}

int ctl_sessions(ctl *c, int argc, char **argv)
{
    ProtobufCMessage *m;
    if (argc == 3 && strcmp(argv[1], "close") == 0)
        return close_session(c, argv[2]);
    if ((argc == 3 || argc == 4) && strcmp(argv[1], "fork") == 0)
        return fork_session(c, argv[2], argc == 4 ? argv[3] : NULL);
    if (argc == 4 && strcmp(argv[1], "rewind") == 0)
        return rewind_session(c, argv[2], argv[3]);
    if (argc == 3 && strcmp(argv[1], "pin") == 0)
        return pin_session(c, argv[2], false);
    if (argc == 3 && strcmp(argv[1], "unpin") == 0)
        return pin_session(c, argv[2], true);
    if (argc == (c->json ? 3 : 4) && strcmp(argv[1], "export") == 0)
        return export_session(c, argv[2], c->json ? NULL : argv[3]);
    if (argc != 1)
        return ctl_usage("sessions: nothing, or: close ID, fork ID [COUNT], rewind ID MESSAGES, "
                         "pin ID, unpin ID, export ID FILE");
    Deltad__V1__ListSessionsRequest q = DELTAD__V1__LIST_SESSIONS_REQUEST__INIT;
    int code = ctl_unary(c, DC_LIST_SESSIONS, &q.base,
                         &deltad__v1__list_sessions_response__descriptor, &m);
    if (code)
        return code;
    const Deltad__V1__ListSessionsResponse *a = (const Deltad__V1__ListSessionsResponse *)m;
    print_sessions(c, a->sessions, a->n_sessions);
    protobuf_c_message_free_unpacked(m, NULL);
    return CTL_OK;
}

int ctl_status(ctl *c, int argc, char **argv)
{
    if (argc != 1)
        return ctl_usage("status: unknown argument %s", argv[1]);
    Deltad__V1__GetModelInfoRequest qi = DELTAD__V1__GET_MODEL_INFO_REQUEST__INIT;
    Deltad__V1__GetStatsRequest qs = DELTAD__V1__GET_STATS_REQUEST__INIT;
    ProtobufCMessage *mi, *ms;
    int code =
        ctl_unary(c, DC_GET_STATS, &qs.base, &deltad__v1__get_stats_response__descriptor, &ms);
    if (code)
        return code;
    code = ctl_unary(c, DC_GET_MODEL_INFO, &qi.base,
                     &deltad__v1__get_model_info_response__descriptor, &mi);
    if (code) {
        protobuf_c_message_free_unpacked(ms, NULL);
        return code;
    }
    const Deltad__V1__GetModelInfoResponse *i = (const Deltad__V1__GetModelInfoResponse *)mi;
    const Deltad__V1__GetStatsResponse *s = (const Deltad__V1__GetStatsResponse *)ms;
    if (c->json) {
        ctl_print_json(mi);
        ctl_print_json(ms);
    } else {
        printf("deltad %s, up %s\n", i->version, duration(s->uptime_ns).text);
        printf("model     %s on %s, %s, %.1f M parameters, context %" PRIu32 "\n", i->name,
               i->backend, i->quantization, (double)i->n_parameters * 1e-6, i->ctx_max);
        printf("layers    %" PRIu32 " DeltaNet + %" PRIu32 " attention, %" PRIu32
               " experts, %" PRIu32 " a token\n",
               i->n_gdn_layers, i->n_attention_layers, i->n_experts, i->n_experts_per_token);
        printf("memory    weights %.1f MB, KV %.1f MB, state %.1f MB, workspace %.1f MB\n",
               (double)i->weights_bytes * 1e-6, (double)i->kv_bytes * 1e-6,
               (double)i->state_bytes * 1e-6, (double)i->workspace_bytes * 1e-6);
        printf("requests  %" PRIu32 " running, %" PRIu32 " queued, %" PRIu64 " so far (%" PRIu64
               " cancelled, %" PRIu64 " failed, %" PRIu64 " times one made room)\n",
               s->requests_running, s->requests_queued, s->requests_total, s->requests_cancelled,
               s->requests_failed, s->preemptions_total);
        printf("slots     %" PRIu32 " of %" PRIu32 " used, pages %" PRIu64 " of %" PRIu64
               ", named sessions %" PRIu32 "\n",
               s->slots_used, s->slots_total, s->pages_used, s->pages_total, s->sessions_open);
        printf("tokens    %" PRIu64 " prompt, %" PRIu64 " completion, %" PRIu64 " steps\n",
               s->prompt_tokens_total, s->completion_tokens_total, s->steps_total);
        const Deltad__V1__CacheStats *cache = s->cache;
        if (cache && cache->checkpoints_max) {
            const uint64_t all = cache->tokens_found + cache->tokens_computed;
            printf("cache     %" PRIu32 " of %" PRIu32 " checkpoints, %" PRIu64 " pages; %" PRIu64
                   " of %" PRIu64 " lookups hit, %.0f%% of %" PRIu64
                   " prompt tokens found, %" PRIu64 " given up\n",
                   cache->checkpoints, cache->checkpoints_max, cache->pages, cache->hits,
                   cache->lookups, all ? 100.0 * (double)cache->tokens_found / (double)all : 0, all,
                   cache->evictions);
        }
        if (cache && cache->host_checkpoints_max)
            printf("host      %" PRIu32 " of %" PRIu32 " checkpoints, %" PRIu64 " of %" PRIu64
                   " pages; %" PRIu64 " checkpoints came from the device\n",
                   cache->host_checkpoints, cache->host_checkpoints_max, cache->host_pages,
                   cache->host_pages_total, cache->moves);
        if (cache && cache->disk_bytes_max)
            printf("disk      %" PRIu32 " checkpoints, %.1f of %.0f MB%s; %" PRIu64
                   " written, %" PRIu64 " read, %" PRIu64 " given up; %" PRIu32 " wait for one\n",
                   cache->disk_checkpoints, (double)cache->disk_bytes * 1e-6,
                   (double)cache->disk_bytes_max * 1e-6,
                   cache->disk_is_writing ? ", one is written" : "", cache->disk_writes,
                   cache->disk_reads, cache->disk_evictions, cache->disk_waiting);
        const Deltad__V1__GrammarStats *g = s->grammars;
        if (g && g->compiled + g->found + g->refused)
            printf("grammars  %" PRIu64 " compiled, %" PRIu64 " used again, %" PRIu64
                   " refused; %" PRIu64 " masks, %.0f%% of them known\n",
                   g->compiled, g->found, g->refused, g->masks,
                   g->masks ? 100.0 * (double)g->masks_found / (double)g->masks : 0);
        bool mended = false;
        for (size_t k = 0; k < s->n_repairs; k++) {
            if (s->repairs[k]->value)
                printf("%s%s %" PRIu64, mended ? ", " : "mended    ", s->repairs[k]->name,
                       s->repairs[k]->value);
            mended |= s->repairs[k]->value > 0;
        }
        if (mended)
            puts("");
    }
    protobuf_c_message_free_unpacked(mi, NULL);
    protobuf_c_message_free_unpacked(ms, NULL);
    return CTL_OK;
}

int ctl_cancel(ctl *c, int argc, char **argv)
{
    if (argc != 2)
        return ctl_usage("cancel: give one request id");
    Deltad__V1__CancelRequest q = DELTAD__V1__CANCEL_REQUEST__INIT;
    q.request_id = argv[1];
    ProtobufCMessage *m;
    int code = ctl_unary(c, DC_CANCEL, &q.base, &deltad__v1__cancel_response__descriptor, &m);
    if (code)
        return code;
    if (c->json)
        ctl_print_json(m);
    protobuf_c_message_free_unpacked(m, NULL);
    return CTL_OK;
}
