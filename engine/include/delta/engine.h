/* engine.h -- open a model, ask what it is, take steps with it, free it.
 *
 * The engine knows tokens and tensors, not clients. It never prints, exits or
 * reads the environment; what it has to say it returns or passes to on_note.
 *
 * Ownership  the caller frees the engine, after all its sessions.
 * Threads    one thread (the engine thread) makes all calls on an engine and
 *            its sessions, but delta_session_cancel() and the functions that
 *            only read delta_engine_info(), the tokenizer or the template. */
#ifndef DELTA_ENGINE_H
#define DELTA_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "delta/chat.h"
#include "delta/error.h"
#include "delta/sampling.h"
#include "delta/tokenizer.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct delta_engine delta_engine;

enum delta_backend { DELTA_BACKEND_AUTO, DELTA_BACKEND_CPU, DELTA_BACKEND_CUDA };
/* How keys and values are kept. AUTO: BF16 on a GPU, F32 on the CPU, which knows nothing else. FP8 is e4m3 without a scale: half the
 * bytes. */
enum delta_kv_type { DELTA_KV_AUTO, DELTA_KV_BF16, DELTA_KV_FP8 };
enum delta_note_level { DELTA_NOTE_INFO, DELTA_NOTE_WARNING };

typedef struct delta_engine_options {
    const char *model_dir; /* folder with config.json, tokenizer.json, *.safetensors */
    enum delta_backend backend;
    enum delta_kv_type kv_type;
    uint32_t threads;      /* CPU backend; 0: all cores of this process */
    uint32_t max_sessions; /* at work at one time, 1 .. 1024; 0: 16 */
    /* States kept for prompts to come (the prefix cache), at most 65536; 0: four a session, but no
     * more than an eighth of the memory. */
    uint32_t checkpoints;
    uint64_t cache_host_bytes; /* host memory that the cache goes on in; 0: none */
    bool no_cache;             /* no state is kept: every prompt is computed from its beginning */
    uint64_t kv_tokens;   /* size of the page pool in tokens; 0: ctx_max, or max_sessions * 8192
                              if that is more, within half of the memory that the rest leaves */
    uint32_t ctx_max;     /* longest session; 0: the checkpoint's max_position_embeddings */
    uint32_t step_tokens; /* most rows of one step, 64 .. 16384; 0: 512 on the CPU, 8192 on a GPU */
    uint64_t gap_ns; /* while sessions generate a step takes about so much prefill; 0: no bound */
    /* Called from delta_engine_open() with bytes read so far; may be NULL. */
    void (*on_progress)(void *arg, const char *phase, uint64_t done, uint64_t total);
    /* Called from delta_engine_open() with things worth a log line; may be NULL. */
    void (*on_note)(void *arg, enum delta_note_level level, const char *text);
    void *arg;
} delta_engine_options;

typedef struct delta_engine_info {
    const char *model_name;   /* last part of model_dir */
    const char *backend;      /* "cpu" or "cuda" */
    const char *quantization; /* "int8 channel", "int8 group 128", "bf16", ... */
    uint32_t n_layers, n_gdn_layers, n_attn_layers;
    uint32_t hidden, n_experts, n_experts_per_token;
    uint32_t n_vocab;  /* width of the logits */
    uint32_t n_tokens; /* ids below this are tokens */
    uint32_t ctx_max;  /* longest session, tokens */
    uint32_t max_sessions, page_tokens;
    uint32_t checkpoints; /* states that the cache can hold; 0: there is none */
    uint64_t n_parameters;
    uint64_t weights_bytes, kv_bytes, state_bytes, workspace_bytes; /* the memory plan */
    uint64_t load_ns;
    uint32_t eos_ids[8]; /* end-of-turn ids of generation_config.json */
    uint32_t n_eos_ids;
    bool has_vision, has_mtp; /* tensors present in the checkpoint (not: in use) */
    bool template_known;
    char template_sha256[65];
    /* The checkpoint's own sampling, else delta_sampling_default(). */
    delta_sampling sampling_thinking, sampling_plain;
} delta_engine_info;

typedef struct delta_engine_stats {
    uint64_t steps, prefill_tokens, decode_tokens;
    uint64_t step_ns; /* time spent in forward + sampling */
    uint32_t sessions_used, sessions_max, rows_running;
    uint64_t pages_used, pages_total; /* used: by sessions */
    uint64_t pages_cached;            /* held by the cache alone: given up when they are needed */
    uint32_t checkpoints, checkpoints_max;
    uint64_t cache_finds, cache_hits; /* sessions that asked for a prefix; that found one */
    uint64_t cache_tokens;            /* tokens found */
    uint64_t cache_evictions;
    uint64_t cache_moves; /* checkpoints that went to host memory */
    uint64_t host_pages, host_pages_total;
    uint32_t host_checkpoints, host_checkpoints_max;
    uint32_t disk_checkpoints;           /* of this model, on disk */
    uint64_t disk_bytes, disk_bytes_max; /* of all */
    uint64_t disk_writes, disk_reads;    /* checkpoints written; fetched for sessions */
    uint64_t disk_evictions;
    bool disk_is_writing, disk_is_reading;
    uint32_t disk_waiting; /* for its caller to fill: runs that wait for a fetch ... */
    uint64_t preemptions;  /* ... and runs that were parked for another, so far */
} delta_engine_stats;

/* Opens the model and allocates everything the engine will ever need.
 *   DELTA_ENOTFOUND, DELTA_EFORMAT, DELTA_EIO  the checkpoint, err names file and tensor
 *   DELTA_EUNSUPPORTED                         a format or backend this build lacks
 *   DELTA_ENOMEM                               the plan does not fit; err has the figures */
int delta_engine_open(const delta_engine_options *o, delta_engine **ret_e, delta_error *err);
void delta_engine_free(delta_engine *e); /* NULL is a no-op */

const delta_engine_info *delta_engine_info_get(const delta_engine *e); /* any thread */
const delta_tokenizer *delta_engine_tokenizer(const delta_engine *e);  /* any thread */
void delta_engine_stats_get(const delta_engine *e, delta_engine_stats *ret_stats);

#ifdef __cplusplus
}
#endif
#endif
