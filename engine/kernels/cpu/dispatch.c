/* dispatch.c -- which of the compiled inner loops this processor runs. */
#include "kernels/cpu/hot.h"

extern const de_hot de_hot_portable;
#if defined(__x86_64__)
extern const de_hot de_hot_avx2, de_hot_avx512;
#endif

const de_hot *const *de_hot_all(void)
{
    static const de_hot *list[4];
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        list[n++] = &de_hot_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        list[n++] = &de_hot_avx2;
#endif
    list[n++] = &de_hot_portable;
    list[n] = 0;
    return list;
}

const de_hot *de_hot_best(void)
{
    return de_hot_all()[0];
}
