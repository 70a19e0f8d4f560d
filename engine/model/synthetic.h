/* synthetic.h -- the shape and the formats of the model, without a checkpoint: for measuring with random weights of exactly the
 * sizes of the real ones. */
#ifndef DE_SYNTHETIC_H
#define DE_SYNTHETIC_H

#include "model/bind.h"

/* Qwen3.6-35B-A3B in W8A16: INT8 experts and attention with one scale a row, BF16 the rest. */
void de_synthetic_35b(de_shape *ret_shape);

/* The binding of a W8A16 checkpoint of that shape, whose references point nowhere: for de_model_open() without weights.
 * DELTA_ENOMEM. */
int de_synthetic_binding(const de_shape *s, de_binding **ret_b, delta_error *err);

#endif
