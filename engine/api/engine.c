/* engine.c -- opens a model and owns its parts: checkpoint, tokenizer, model,
 * pools, and the workspace of a step.
 *
 * The order of opening is from cheap to dear: options and small files, the directory
 * of tensors and their binding, the device, all three at once; then the plan of memory,
 * which is checked before anything large is allocated, then the weights. */
#include <assert.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "api/checkpoint.h"
#include "api/internal.h"
#include "base/bits.h"
#include "base/file.h"

enum {
    CONFIG_MAX = 16 << 20,
    SESSIONS_MAX = 1024,
    SESSIONS_DEFAULT = 16,
    STEP_TOKENS_MIN = 64,
    STEP_TOKENS_MAX = 16384,
    CHECKPOINTS_MAX = 1 << 16,
    CHECKPOINTS_A_SESSION =
        4,                 /* where nothing says how many, as long as they are an eighth of ...*/
    CHECKPOINTS_SHARE = 8, /* ... the memory at most */
    DEFAULT_CTX = 8192,    /* tokens of a session, where nothing says how many pages */
};

__attribute__((format(printf, 3, 4))) static void
note(const delta_engine_options *o, enum delta_note_level level, const char *format, ...)
{
    if (!o->on_note)
        return;
    char text[512];
    va_list ap;
    va_start(ap, format);
    (void)vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    o->on_note(o->arg, level, text);
}

/* What is done next, to whom watches. */
static void phase(const delta_engine_options *o, const char *name)
{
    if (o->on_progress)
        o->on_progress(o->arg, name, 0, 0);
}

static int check_options(const delta_engine_options *o, delta_error *err)
{
    if (!o->model_dir || !*o->model_dir)
        return delta_fail(err, DELTA_EINVALID, "no model_dir is given");
    if (o->max_sessions > SESSIONS_MAX)
        return delta_fail(err, DELTA_EINVALID, "max_sessions %u is not in 1..%d", o->max_sessions,
                          SESSIONS_MAX);
    if (o->checkpoints > CHECKPOINTS_MAX)
        return delta_fail(err, DELTA_EINVALID, "checkpoints %u is not in 0..%d", o->checkpoints,
                          CHECKPOINTS_MAX);
    if (o->step_tokens && (o->step_tokens < STEP_TOKENS_MIN || o->step_tokens > STEP_TOKENS_MAX))
        return delta_fail(err, DELTA_EINVALID, "step_tokens %u is not in %d..%d", o->step_tokens,
                          STEP_TOKENS_MIN, STEP_TOKENS_MAX);
    return 0;
}

/* The last part of a path, malloc'ed. */
static char *last_part(const char *path)
{
    size_t end = strlen(path);
    while (end > 1 && path[end - 1] == '/')
        end--;
    size_t begin = end;
    while (begin > 0 && path[begin - 1] != '/')
        begin--;
    return strndup(path + begin, end - begin);
}

/* Three things that take a while and need nothing of each other: the directory of the checkpoint, on the caller's thread; the
 * tokenizer; and the device, whose driver takes a quarter of a second to wake. */
typedef struct errand {
    delta_engine *e;
    const delta_engine_options *o;
    int (*run)(delta_engine *e, const delta_engine_options *o, delta_error *err);
    pthread_t thread;
    bool has_thread;
    int code;
    delta_error err;
} errand;

static void *run_errand(void *arg)
{
    errand *x = arg;
    x->code = x->run(x->e, x->o, &x->err);
    return NULL;
}

static void start_errand(errand *x)
{
    x->has_thread = pthread_create(&x->thread, NULL, run_errand, x) == 0;
    if (!x->has_thread)
        (void)run_errand(x);
}

/* r: what went wrong before, whose error stays. */
static int finish_errand(errand *x, int r, delta_error *err)
{
    if (x->has_thread)
        (void)pthread_join(x->thread, NULL);
    if (r == 0 && x->code < 0 && err)
        *err = x->err;
    return r < 0 ? r : x->code;
}

static int choose_backend(delta_engine *e, const delta_engine_options *o, delta_error *err)
{
    static const char *const names[] = { "auto", "cpu", "cuda" };
    e->backend = de_backend_find(names[o->backend]);
    if (!e->backend)
        return delta_fail(err, DELTA_EUNSUPPORTED,
                          "this build has no CUDA backend: use backend cpu or auto");
    if (de_backend_memory(e->backend) == 0)
        return delta_fail(err, DELTA_EUNSUPPORTED,
                          "no CUDA device is found (nvidia-smi lists them): use backend cpu or "
                          "auto, or see that the driver is loaded and /dev/nvidia* are accessible");
    return 0;
}

/* ---- the checkpoint ---- */

static int open_checkpoint(delta_engine *e, const delta_engine_options *o, delta_error *err)
{
    char *config = NULL;
    size_t len = 0;
    phase(o, "directory");
    char *path = de_path_join(o->model_dir, "config.json");
    if (!path)
        return delta_fail(err, DELTA_ENOMEM, "path of config.json");
    int r = de_file_read(path, CONFIG_MAX, &config, &len, err);
    free(path);
    if (r < 0)
        return r;
    de_checkpoint_use use;
    r = de_shape_parse(config, len, &e->shape, err);
    if (r == 0)
        r = de_checkpoint_use_read(o->model_dir, config, len, e->shape.vocab, &use, err);
    free(config);
    if (r == 0)
        r = de_weights_open(o->model_dir, &e->weights, err);
    if (r == 0)
        r = de_bind(e->weights, &e->shape, &e->binding, err);
    if (r < 0)
        return r;

    delta_engine_info *info = &e->info;
    memcpy(info->eos_ids, use.eos_ids, sizeof info->eos_ids);
    info->n_eos_ids = use.n_eos_ids;
    info->sampling_thinking = use.thinking;
    info->sampling_plain = use.plain;
    memcpy(info->template_sha256, use.template_sha256, sizeof info->template_sha256);
    info->template_known = delta_template_known(use.template_sha256) != 0;
    info->n_layers = e->shape.n_layers;
    info->n_gdn_layers = e->shape.n_gdn;
    info->n_attn_layers = e->shape.n_attn;
    info->hidden = e->shape.hidden;
    info->n_experts = e->shape.n_experts;
    info->n_experts_per_token = e->shape.top_k;
    info->n_vocab = e->shape.vocab;
    info->n_parameters = e->binding->n_parameters;
    info->has_vision = e->binding->n_vision_tensors > 0;
    info->has_mtp = e->binding->n_mtp_tensors > 0;
    info->page_tokens = DE_PAGE;
    (void)snprintf(e->quantization, sizeof e->quantization, "%s", e->binding->quantization);
    if (!*info->template_sha256)
        note(o, DELTA_NOTE_WARNING, "the checkpoint has no chat template: that of Qwen3.6 is used");
    else if (!info->template_known)
        note(o, DELTA_NOTE_WARNING,
             "unknown chat template (sha256 %s): that of Qwen3.6 is used, its prompts may differ",
             info->template_sha256);
    if (info->n_eos_ids == 0)
        note(o, DELTA_NOTE_WARNING, "the checkpoint names no end-of-turn token");
    if (info->has_vision)
        note(o, DELTA_NOTE_INFO, "skipped %u tensors of the vision tower: text only",
             e->binding->n_vision_tensors);
    if (info->has_mtp)
        note(o, DELTA_NOTE_INFO, "skipped %u tensors of the draft head (MTP)",
             e->binding->n_mtp_tensors);
    return 0;
}

static int read_tokenizer(delta_engine *e, const delta_engine_options *o, delta_error *err)
{
    return delta_tokenizer_open(o->model_dir, &e->tokenizer, err);
}

/* Which ids the tokenizer lacks, and its longest token. */
static int use_tokenizer(delta_engine *e, delta_error *err)
{
    const uint32_t n = delta_tokenizer_size(e->tokenizer);
    if (n == 0 || n > e->shape.vocab)
        return delta_fail(err, DELTA_EFORMAT, "tokenizer.json has ids up to %u, the model %u", n,
                          e->shape.vocab);
    uint32_t n_holes = 0;
    size_t longest = 0, len;
    for (uint32_t id = 0; id < n; id++) {
        n_holes += delta_token_kind(e->tokenizer, id) == DELTA_TOKEN_NONE;
        (void)delta_token_bytes(e->tokenizer, id, &len);
        longest = len > longest ? len : longest;
    }
    e->holes = malloc((n_holes + 1) * sizeof *e->holes);
    if (!e->holes)
        return delta_fail(err, DELTA_ENOMEM, "table of %u ids", n_holes);
    n_holes = 0;
    for (uint32_t id = 0; id < n; id++)
        if (delta_token_kind(e->tokenizer, id) == DELTA_TOKEN_NONE)
            e->holes[n_holes++] = id;
    e->mask = (de_vocab_mask){
        .n_vocab = e->shape.vocab, .n_tokens = n, .holes = e->holes, .n_holes = n_holes
    };
    e->info.n_tokens = n;
    /* Every byte may become U+FFFD; what stop strings hold may be given out five times. */
    e->text_bytes =
        (longest * 3 + DELTA_DETOK_ROOM * 4) * DE_TOKENS_PER_STEP + DELTA_MAX_STOP_BYTES * 8;
    return de_think_tags_find(e->tokenizer, &e->think, err);
}

/* ---- memory ---- */

static double gib(uint64_t bytes)
{
    return (double)bytes / 0x1p30;
}

/* Bytes of the step's workspace on the host, the logits above all. */
static uint64_t host_bytes(const delta_engine *e)
{
    const uint64_t n = e->info.max_sessions;
    return (uint64_t)e->max_seqs * e->info.n_vocab * sizeof *e->logits +
           de_sample_scratch_bytes(e->info.n_vocab) + (n + 1) * e->text_bytes +
           (uint64_t)e->max_seqs * sizeof *e->tops + n * DE_EVENTS_PER_SESSION * sizeof *e->events +
           n * ((uint64_t)e->info.n_vocab * sizeof(float) + sizeof(delta_session)) +
           (uint64_t)e->step_tokens * (sizeof *e->row_tokens + sizeof *e->row_pos);
}

/* Room for one session as long as can be, or for all of them at DEFAULT_CTX, whichever is more; but
 * no more than half of what weights, states and workspace leave of the memory. */
static uint64_t default_kv_tokens(const delta_engine *e, const de_memory_plan *one, uint64_t memory)
{
    const uint64_t n = e->info.max_sessions, ctx = de_align_up(e->info.ctx_max, DE_PAGE);
    const uint64_t each = ctx < DEFAULT_CTX ? ctx : DEFAULT_CTX;
    uint64_t tokens = n * each > ctx ? n * each : ctx;
    uint64_t rest = 0; /* an overflow fails in make_plan() */
    if (!de_add_u64(one->weights_bytes, one->state_bytes, &rest) ||
        !de_add_u64(rest, one->workspace_bytes + host_bytes(e), &rest) || rest > memory)
        rest = memory;
    const uint64_t most =
        one->kv_bytes ? (memory - rest) / 2 / one->kv_bytes * DE_PAGE : UINT64_MAX;
    tokens = tokens < most ? tokens : most;
    return tokens ? tokens : DE_PAGE;
}

/* Sizes everything: sessions, pages, rows. */
static int make_plan(delta_engine *e, const delta_engine_options *o, de_model_options *ret_mo,
                     delta_error *err)
{
    delta_engine_info *info = &e->info;
    info->max_sessions = o->max_sessions ? o->max_sessions : SESSIONS_DEFAULT;
    info->ctx_max = o->ctx_max ? o->ctx_max : e->shape.ctx_max;
    if (info->ctx_max > e->shape.ctx_max)
        return delta_fail(err, DELTA_EINVALID, "ctx_max %u is above the model's %u", info->ctx_max,
                          e->shape.ctx_max);
    e->step_tokens = o->step_tokens ? o->step_tokens : de_backend_rows(e->backend);
    e->pace.gap_ns = o->gap_ns;
    e->max_seqs = info->max_sessions < e->step_tokens ? info->max_sessions : e->step_tokens;
    static const enum de_kv_type kv_types[] = { DE_KV_AUTO, DE_KV_BF16, DE_KV_FP8 };
    de_model_options mo = { .backend = e->backend,
                            .kv_type = kv_types[o->kv_type],
                            .threads = o->threads,
                            .n_slots = info->max_sessions,
                            .n_pages = 1,
                            .max_rows = e->step_tokens,
                            .max_seqs = e->max_seqs,
                            .max_out = e->max_seqs,
                            .ctx_max = info->ctx_max,
                            .on_progress = o->on_progress,
                            .arg = o->arg };
    de_memory_plan one, plan;
    int r = de_model_plan(&e->shape, e->binding, &mo, &one, err);
    if (r < 0)
        return r;
    const uint64_t memory = de_backend_memory(e->backend);
    if (!o->no_cache) {
        const uint64_t slot = one.state_bytes / info->max_sessions;
        uint64_t n = o->checkpoints ? o->checkpoints : info->max_sessions * CHECKPOINTS_A_SESSION;
        if (!o->checkpoints && slot && n > memory / CHECKPOINTS_SHARE / slot)
            n = memory / CHECKPOINTS_SHARE / slot;
        e->has_cache = n > 0;
        info->checkpoints = (uint32_t)n;
        mo.n_slots += (uint32_t)n;
        r = de_model_plan(&e->shape, e->binding, &mo, &one, err);
        if (r < 0)
            return r;
    }
    uint64_t tokens = o->kv_tokens;
    if (tokens == 0)
        tokens = default_kv_tokens(e, &one, memory);
    const uint64_t pages = de_ceil_div(tokens, DE_PAGE);
    if (pages == 0 || pages > UINT32_MAX)
        return delta_fail(err, DELTA_EINVALID, "kv_tokens %llu makes %llu pages",
                          (unsigned long long)tokens, (unsigned long long)pages);
    mo.n_pages = (uint32_t)pages;
    /* No session can be longer than all the pages there are. */
    if (info->ctx_max > pages * DE_PAGE) {
        info->ctx_max = (uint32_t)(pages * DE_PAGE);
        note(o, DELTA_NOTE_WARNING, "kv_tokens allow sessions of %u tokens, not of %u",
             info->ctx_max, mo.ctx_max);
        mo.ctx_max = info->ctx_max;
    }
    r = de_model_plan(&e->shape, e->binding, &mo, &plan, err);
    if (r < 0)
        return r;
    info->weights_bytes = plan.weights_bytes;
    info->kv_bytes = plan.kv_bytes;
    info->state_bytes = plan.state_bytes;
    info->workspace_bytes = plan.workspace_bytes + host_bytes(e);
    uint64_t sum = 0;
    const bool adds_up = de_add_u64(plan.weights_bytes, plan.kv_bytes, &sum) &&
                         de_add_u64(sum, plan.state_bytes, &sum) &&
                         de_add_u64(sum, info->workspace_bytes, &sum);
    if (!adds_up || sum > memory)
        return delta_fail(
            err, DELTA_ENOMEM,
            "the plan needs %.2f GiB of %.2f GiB: weights %.2f, KV %.2f (%llu tokens), "
            "state %.2f (%u sessions, %u checkpoints), workspace %.2f",
            gib(sum), gib(memory), gib(plan.weights_bytes), gib(plan.kv_bytes),
            (unsigned long long)pages * DE_PAGE, gib(plan.state_bytes), info->max_sessions,
            info->checkpoints, gib(info->workspace_bytes));
    note(o, DELTA_NOTE_INFO,
         "memory: weights %.3f GiB, KV %.3f GiB (%llu tokens%s), state %.3f GiB (%u sessions, "
         "%u checkpoints), workspace %.3f GiB",
         gib(plan.weights_bytes), gib(plan.kv_bytes), (unsigned long long)pages * DE_PAGE,
         o->kv_type == DELTA_KV_FP8 ? ", fp8" : "", gib(plan.state_bytes), info->max_sessions,
         info->checkpoints, gib(info->workspace_bytes));
    *ret_mo = mo;
    return 0;
}

static int allocate_workspace(delta_engine *e, const de_model_options *mo, delta_error *err)
{
    const size_t n = e->info.max_sessions;
    int r = de_kv_pages_init(&e->kv, mo->n_pages, err);
    if (r == 0)
        r = de_gdn_slots_init(&e->slots, mo->n_slots, err);
    if (r == 0)
        r = de_sample_scratch_init(&e->scratch, e->info.n_vocab, err);
    if (r < 0)
        return r;
    e->by_seat = calloc(n, sizeof *e->by_seat);
    e->row_tokens = calloc(e->step_tokens, sizeof *e->row_tokens);
    e->row_pos = calloc(e->step_tokens, sizeof *e->row_pos);
    e->items = calloc(n, sizeof *e->items);
    e->of_item = calloc(n, sizeof *e->of_item);
    e->order = calloc(n, sizeof *e->order);
    e->seqs = calloc(e->max_seqs, sizeof *e->seqs);
    e->marks = calloc(e->step_tokens / DE_CHUNK + e->max_seqs, sizeof *e->marks);
    e->logits = de_backend_host_alloc(e->backend,
                                      (size_t)e->max_seqs * e->info.n_vocab * sizeof *e->logits);
    e->tops = calloc(e->max_seqs, sizeof *e->tops);
    e->events = calloc(n * DE_EVENTS_PER_SESSION, sizeof *e->events);
    e->text = calloc(n + 1, e->text_bytes);
    e->top = calloc(n * DELTA_MAX_TOP_LOGPROBS, sizeof *e->top);
    e->allowed = calloc(e->info.n_vocab / 32 + 1, sizeof *e->allowed);
    if (!e->by_seat || !e->row_tokens || !e->row_pos || !e->items || !e->of_item || !e->order ||
        !e->seqs || !e->marks || !e->logits || !e->tops || !e->events || !e->text || !e->top ||
        !e->allowed)
        return delta_fail(err, DELTA_ENOMEM, "workspace of a step: %llu bytes",
                          (unsigned long long)host_bytes(e));
    return 0;
}

/* ---- the second tier of the cache */

static int page_out(void *arg, uint32_t page, uint32_t host_page)
{
    delta_engine *e = arg;
    return de_model_page_save(e->model, page, de_host_page(e, host_page), &e->fault);
}

static int slot_out(void *arg, uint32_t slot, uint32_t host_slot)
{
    delta_engine *e = arg;
    return de_model_slot_save(e->model, slot, de_host_slot(e, host_slot), &e->fault);
}

/* A quarter of the bytes is for states, the rest for pages. */
static int open_cache(delta_engine *e, uint64_t host_bytes, delta_error *err)
{
    const uint64_t slot = de_model_slot_bytes(e->model), page = de_model_page_bytes(e->model);
    const uint64_t n_slots = slot ? host_bytes / 4 / slot : 0,
                   n_pages = page ? (host_bytes - n_slots * slot) / page : 0;
    const bool has_host = e->has_cache && host_bytes > 0;
    de_prefix_init(&e->prefix, &e->kv, &e->slots, has_host ? &e->host : NULL, DE_PAGE, slot, page);
    if (!has_host)
        return 0;
    if (n_slots == 0 || n_pages == 0 || n_slots > DE_ON_HOST / 2 || n_pages > DE_ON_HOST / 2)
        return delta_fail(err, DELTA_EINVALID,
                          "cache_host_bytes %llu holds %llu states of %llu bytes and %llu pages of "
                          "%llu",
                          (unsigned long long)host_bytes, (unsigned long long)n_slots,
                          (unsigned long long)slot, (unsigned long long)n_pages,
                          (unsigned long long)page);
    e->host.page_out = page_out;
    e->host.slot_out = slot_out;
    e->host.arg = e;
    e->host_memory = de_backend_host_alloc(e->backend, n_slots * slot + n_pages * page);
    if (!e->host_memory)
        return delta_fail(err, DELTA_ENOMEM, "second tier of the cache: %llu bytes",
                          (unsigned long long)host_bytes);
    e->host.copy_of = malloc((e->kv.total + 1ull) * sizeof *e->host.copy_of);
    if (!e->host.copy_of)
        return delta_fail(err, DELTA_ENOMEM, "table of %u pages", e->kv.total);
    memset(e->host.copy_of, 0xff, e->kv.total * sizeof *e->host.copy_of);
    int r = de_kv_pages_init(&e->host.kv, (uint32_t)n_pages, err);
    if (r == 0)
        r = de_gdn_slots_init(&e->host.slots, (uint32_t)n_slots, err);
    return r;
}

int delta_engine_open(const delta_engine_options *o, delta_engine **ret_e, delta_error *err)
{
    assert(o && ret_e);
    const uint64_t start = de_now_ns();
    int r = check_options(o, err);
    if (r < 0)
        return r;
    delta_engine *e = calloc(1, sizeof *e);
    if (!e)
        return delta_fail(err, DELTA_ENOMEM, "engine: %zu bytes", sizeof *e);
    de_model_options mo;
    e->model_name = last_part(o->model_dir);
    if (!e->model_name) {
        r = delta_fail(err, DELTA_ENOMEM, "name of the model");
        goto fail;
    }
    errand device = { .e = e, .o = o, .run = choose_backend };
    errand tokenizer = { .e = e, .o = o, .run = read_tokenizer };
    start_errand(&device);
    start_errand(&tokenizer);
    r = open_checkpoint(e, o, err);
    r = finish_errand(&device, r, err);
    r = finish_errand(&tokenizer, r, err);
    if (r < 0 || (r = use_tokenizer(e, err)) < 0 || (r = make_plan(e, o, &mo, err)) < 0 ||
        (r = allocate_workspace(e, &mo, err)) < 0)
        goto fail;
    r = de_model_open(e->weights, &e->shape, e->binding, &mo, &e->model, err);
    if (r < 0)
        goto fail;
    if (o->cache_host_bytes)
        phase(o, "host memory");
    r = open_cache(e, o->cache_host_bytes, err);
    if (r < 0)
        goto fail;
    e->info.model_name = e->model_name;
    e->info.backend = de_backend_name(e->backend);
    e->info.quantization = e->quantization;
    e->info.load_ns = de_now_ns() - start;
    *ret_e = e;
    return 0;
fail:
    delta_engine_free(e);
    return r;
}

void delta_engine_free(delta_engine *e)
{
    if (!e)
        return;
    de_disk_free(e);
    de_model_free(e->model);
    de_binding_free(e->binding);
    de_weights_free(e->weights);
    delta_tokenizer_free(e->tokenizer);
    de_prefix_done(&e->prefix);
    free(e->host.copy_of);
    de_kv_pages_done(&e->host.kv);
    de_gdn_slots_done(&e->host.slots);
    if (e->host_memory)
        de_backend_host_free(e->backend, e->host_memory);
    de_kv_pages_done(&e->kv);
    de_gdn_slots_done(&e->slots);
    de_sample_scratch_done(&e->scratch);
    free(e->model_name);
    free(e->holes);
    free(e->by_seat);
    free(e->row_tokens);
    free(e->row_pos);
    free(e->items);
    free(e->of_item);
    free(e->order);
    free(e->seqs);
    free(e->marks);
    if (e->logits)
        de_backend_host_free(e->backend, e->logits);
    free(e->tops);
    free(e->events);
    free(e->text);
    free(e->top);
    free(e->allowed);
    free(e);
}

const delta_engine_info *delta_engine_info_get(const delta_engine *e)
{
    return &e->info;
}

const delta_tokenizer *delta_engine_tokenizer(const delta_engine *e)
{
    return e->tokenizer;
}

void delta_engine_stats_get(const delta_engine *e, delta_engine_stats *ret_stats)
{
    delta_engine_stats s = e->stats;
    s.sessions_max = e->info.max_sessions;
    s.sessions_used = 0;
    for (uint32_t i = 0; i < e->info.max_sessions; i++)
        s.sessions_used += e->by_seat[i] != NULL;
    s.pages_total = e->kv.total;
    s.pages_used = e->kv.total - e->kv.n_free - e->kv.n_idle;
    s.pages_cached = e->kv.n_idle;
    s.checkpoints = e->prefix.stats.nodes;
    s.checkpoints_max = e->info.checkpoints;
    s.cache_finds = e->prefix.stats.finds;
    s.cache_hits = e->prefix.stats.hits;
    s.cache_evictions = e->prefix.stats.evictions;
    s.cache_moves = e->prefix.stats.moves;
    s.host_pages = e->host.kv.total - e->host.kv.n_free - e->host.n_copies;
    s.host_pages_total = e->host.kv.total;
    s.host_checkpoints = e->host.slots.total - e->host.slots.n_free;
    s.host_checkpoints_max = e->host.slots.total;
    de_disk_stats(e, &s);
    *ret_stats = s;
}

bool de_engine_take_slot(delta_engine *e, uint32_t *ret_slot)
{
    while (de_gdn_slots_take(&e->slots, ret_slot, NULL) < 0)
        if (!de_prefix_evict(&e->prefix, false))
            return false;
    return true;
}
