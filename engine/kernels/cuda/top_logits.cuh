/* top_logits.cuh -- the largest logits of a row, so that the host need not see a quarter of a million of them. */
#ifndef DE_KERNELS_CUDA_TOP_LOGITS_CUH
#define DE_KERNELS_CUDA_TOP_LOGITS_CUH

#include "kernels/cuda/common.cuh"

extern "C" {
#include "base/top_logits.h"
}

/* Bytes of workspace for so many rows. */
size_t de_cu_top_logits_bytes(uint32_t rows);
/* logits [rows][vocab] -> tops [rows]: of ids below n_ids the DE_TOP_LOGITS first in rank, in that order; a zero is +0, whatever its
 * sign was. vocab >= DE_TOP_LOGITS, n_ids <= vocab. Only launches kernels on `stream`. */
void de_cu_top_logits(cudaStream_t stream, const float *logits, uint32_t rows, uint32_t vocab,
                      uint32_t n_ids, de_top_logits *tops, void *workspace);

#endif
