/* checkpoint.h -- what a checkpoint's small files say about its use: which ids
 * end a turn, how it wants to be sampled, which chat template it has. */
#ifndef DE_CHECKPOINT_H
#define DE_CHECKPOINT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "delta/error.h"
#include "delta/sampling.h"

enum { DE_CHECKPOINT_EOS = 8 };

typedef struct de_checkpoint_use {
    uint32_t eos_ids[DE_CHECKPOINT_EOS]; /* of generation_config.json, then of config.json */
    uint32_t n_eos_ids;
    delta_sampling thinking, plain;
    char template_sha256[65]; /* "" if there is no template */
} de_checkpoint_use;

/* config: the text of DIR/config.json. generation_config.json, chat_template.jinja and
 * tokenizer_config.json may be absent; a present one that cannot be read is an error. */
int de_checkpoint_use_read(const char *dir, const char *config, size_t config_len, uint32_t n_vocab,
                           de_checkpoint_use *ret_use, delta_error *err);

#endif
