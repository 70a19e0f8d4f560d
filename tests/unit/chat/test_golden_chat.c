/* Conversations whose renderings were made by the template itself. The folder is TESTS_DIR
 * "/model/golden", or the one in DELTA_GOLDEN. */
#include "support/tap.h"

#include <dirent.h>

#include "base/json.h"
#include "delta/chat.h"
#include "delta/openai.h"

static const char *golden_dir(void)
{
    const char *dir = getenv("DELTA_GOLDEN");
    return dir && *dir ? dir : TESTS_DIR "/model/golden";
}

static char *read_file(const char *name, size_t *ret_len)
{
    char path[4096];
    (void)snprintf(path, sizeof path, "%s/%s", golden_dir(), name);
    FILE *f = fopen(path, "rb");
    if (!f)
        return NULL;
    size_t cap = 8 << 20;
    char *text = malloc(cap);
    *ret_len = text ? fread(text, 1, cap, f) : 0;
    (void)fclose(f);
    return text;
}

static delta_openai *conversation(const char *text, const de_json *messages, const de_json *tools,
                                  delta_error *err)
{
    delta_openai *o = NULL;
    int e = delta_openai_parse(text + messages->begin, messages->end - messages->begin,
                               tools ? text + tools->begin : NULL,
                               tools ? tools->end - tools->begin : 0, &o, err);
    return e < 0 ? NULL : o;
}

TEST(golden_chat_cases_render_byte_equal_or_fail_for_the_same_reason)
{
    size_t len;
    char *text = read_file("chat_cases.json", &len);
    if (!text)
        SKIP("no chat_cases.json");
    de_arena a;
    de_arena_init(&a, 256u << 20);
    de_json *cases = NULL;
    delta_error err = { 0 };
    REQUIRE(de_json_parse(&a, text, len, &cases, &err) == 0);
    CHECK(cases->n > 0);
    for (const de_json *c = cases->child; c; c = c->next) {
        const de_json *options = de_json_get(c, "options"), *error = de_json_get(c, "error");
        const de_json *rendered = de_json_get(c, "rendered");
        err.text[0] = 0;
        delta_openai *o =
            conversation(text, de_json_get(c, "messages"), de_json_get(options, "tools"), &err);
        delta_rendered r = { 0 };
        int e = -1;
        if (o) {
            delta_chat *chat = delta_openai_chat(o);
            (void)de_json_bool(de_json_get(options, "add_generation_prompt"),
                               &chat->add_generation_prompt);
            (void)de_json_bool(de_json_get(options, "enable_thinking"), &chat->enable_thinking);
            (void)de_json_bool(de_json_get(options, "preserve_thinking"), &chat->preserve_thinking);
            (void)de_json_bool(de_json_get(options, "add_vision_id"), &chat->add_vision_id);
            e = delta_chat_render(chat, &r, &err);
        }
        if (rendered) {
            CHECK_MEM(r.text, r.len, rendered->text, rendered->n);
        } else {
            CHECK(e < 0);
            CHECK(error && strstr(err.text, error->text));
            if (error && !strstr(err.text, error->text))
                printf("# %s: \"%s\" lacks \"%s\"\n", de_json_get(c, "name")->text, err.text,
                       error->text);
        }
        delta_rendered_done(&r);
        delta_openai_free(o);
    }
    de_arena_done(&a);
    free(text);
}

/* The prompts of the models' own files: the last turn is what the model is to say, so the prompt
 * is the conversation without it. Prompts with pictures have widened pads: left to others. */
static void check_prompts(const char *name)
{
    size_t len;
    char *text = read_file(name, &len);
    REQUIRE(text);
    /* A model with random weights says anything, NUL too, which our JSON reader refuses. */
    for (char *at = text; (at = memmem(at, (size_t)(text + len - at), "\\u0000", 6)) != NULL;)
        memcpy(at, "\\u0020", 6);
    de_arena a;
    de_arena_init(&a, 256u << 20);
    de_json *root = NULL;
    delta_error err = { 0 };
    if (de_json_parse(&a, text, len, &root, &err) < 0)
        TAP_FAIL("%s: %s", name, err.text);
    REQUIRE(root);
    unsigned checked = 0;
    for (const de_json *p = de_json_get(root, "prompts")->child; p; p = p->next) {
        const de_json *media = de_json_get(p, "media"), *prompt = de_json_get(p, "prompt");
        const de_json *expected = de_json_get(p, "expected");
        if (media && media->n)
            continue;
        delta_openai *o =
            conversation(text, de_json_get(p, "messages"), de_json_get(p, "tools"), &err);
        REQUIRE(o);
        delta_chat *chat = delta_openai_chat(o);
        delta_message *messages = malloc(chat->n_messages * sizeof *messages);
        REQUIRE(messages);
        memcpy(messages, chat->messages, chat->n_messages * sizeof *messages);
        chat->messages = messages;
        bool think = true;
        (void)de_json_bool(de_json_get(p, "think"), &think);
        for (size_t i = 0; i < chat->n_messages && !think; i++)
            messages[i].has_reasoning = false;
        chat->enable_thinking = think;
        chat->n_messages--;
        chat->add_generation_prompt = true;
        delta_rendered r = { 0 };
        CHECK_EQ(delta_chat_render(chat, &r, &err), 0);
        CHECK_MEM(r.text, r.len, prompt->text, prompt->n);
        /* and with the last turn it goes on as the model was trained to */
        chat->n_messages++;
        chat->add_generation_prompt = false;
        delta_rendered whole = { 0 };
        CHECK_EQ(delta_chat_render(chat, &whole, &err), 0);
        if (whole.text && whole.len > r.len + expected->n)
            CHECK_MEM(whole.text + r.len, whole.len - r.len - 1, expected->text, expected->n);
        delta_rendered_done(&whole);
        delta_rendered_done(&r);
        free(messages);
        delta_openai_free(o);
        checked++;
    }
    CHECK(checked > 0);
    de_arena_done(&a);
    free(text);
}

TEST(golden_prompts_of_the_models_render_byte_equal)
{
    DIR *d = opendir(golden_dir());
    if (!d)
        SKIP("no golden folder");
    unsigned files = 0;
    for (const struct dirent *f; (f = readdir(d));) {
        const char *end = strrchr(f->d_name, '.');
        if (!end || strcmp(end, ".json") != 0 || strstr(f->d_name, "_cases"))
            continue;
        check_prompts(f->d_name);
        files++;
    }
    (void)closedir(d);
    if (!files)
        SKIP("no golden files of models");
}
