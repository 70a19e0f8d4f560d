/* cuda_ok.cuh -- a call of CUDA in a test must succeed; the test ends with file and line if not. */
#ifndef CUDA_OK_CUH
#define CUDA_OK_CUH

#include <cstdio>
#include <cstdlib>

#include <cuda_runtime.h>

#define OK(x)                                                                                      \
    do {                                                                                           \
        const cudaError_t e_ = (x);                                                                \
        if (e_ != cudaSuccess) {                                                                   \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(e_));            \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

#endif
