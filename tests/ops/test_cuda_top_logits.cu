/* test_cuda_top_logits.cu -- the first in rank against a sort on the host.
 *
 *   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -I engine tests/ops/test_cuda_top_logits.cu \
 *        engine/kernels/cuda/top_logits.cu -o test_cuda_top_logits
 *   ./test_cuda_top_logits [--bench] [SEED]
 *
 * Rows as models write them, rows of few different values, rows that rise with the id, rows of one value, rows with -inf and with
 * zeros of both signs, and rows that are not sound: equal to the bit. Exit 1 if one is not. */
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/cuda/top_logits.cuh"
#include "support/cuda_ok.cuh"

static uint64_t state = 1;
static double uniform() /* [0, 1) */
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (double)(state >> 11) * 0x1p-53;
}

enum kind { NORMAL, COARSE, RISING, EQUAL, HOLES, ZEROS, NOT_A_NUMBER, INFINITE, KINDS };
static const char *const names[KINDS] = { "normal", "coarse", "rising", "equal",
                                          "-inf",   "zeros",  "NaN",    "inf" };

static void fill(float *row, uint32_t n, kind k)
{
    for (uint32_t i = 0; i < n; i++) {
        const float v = (float)(uniform() + uniform() + uniform() + uniform() - 2) * 5;
        row[i] = k == COARSE   ? floorf(v)
                 : k == RISING ? (float)i * 0.01f - 7
                 : k == EQUAL  ? -1.5f
                 : k == HOLES  ? (uniform() < 0.9997 ? -INFINITY : v)
                 : k == ZEROS  ? (uniform() < 0.5 ? 0.0f : -0.0f)
                               : v;
    }
    if (k == NOT_A_NUMBER || k == INFINITE)
        row[(uint32_t)(uniform() * n)] = k == INFINITE ? INFINITY : NAN;
}

/* Of -inf the device may give some, or none: nobody draws them. */
static bool check(const float *row, uint32_t n_ids, kind k, const de_top_logits &got)
{
    if (k == NOT_A_NUMBER || k == INFINITE)
        return got.n > 0 && !got.is_sound;
    std::vector<uint32_t> ids;
    for (uint32_t i = 0; i < n_ids; i++)
        if (row[i] > -INFINITY)
            ids.push_back(i);
    const size_t n = std::min<size_t>(ids.size(), DE_TOP_LOGITS);
    std::partial_sort(ids.begin(), ids.begin() + n, ids.end(), [&](uint32_t a, uint32_t b) {
        return row[a] > row[b] || (row[a] == row[b] && a < b);
    });
    bool good = got.is_sound && got.n >= n && got.n <= DE_TOP_LOGITS;
    for (size_t i = 0; i < got.n && good; i++)
        good = i < n ? got.of[i].id == ids[i] && got.of[i].logit == row[ids[i]]
                     : got.of[i].logit == -INFINITY;
    return good;
}

int main(int argc, char **argv)
{
    const bool bench = argc > 1 && strcmp(argv[1], "--bench") == 0;
    if (argc > 1 && !bench)
        state = strtoull(argv[1], NULL, 10);
    int failures = 0;
    static const uint32_t shapes[][2] = {
        { 248320, 248077 }, { 248320, 2045 }, { 2048, 2045 }, { 64, 64 }, { 1000, 999 }
    };
    for (const auto &s : shapes) {
        const uint32_t V = s[0], rows = KINDS * 2;
        std::vector<float> logits((size_t)rows * V);
        std::vector<de_top_logits> tops(rows);
        for (uint32_t r = 0; r < rows; r++)
            fill(&logits[(size_t)r * V], V, (kind)(r % KINDS));
        float *d;
        de_top_logits *t;
        void *w;
        OK(cudaMalloc(&d, logits.size() * sizeof *d));
        OK(cudaMalloc(&t, rows * sizeof *t));
        OK(cudaMalloc(&w, de_cu_top_logits_bytes(rows)));
        OK(cudaMemcpy(d, logits.data(), logits.size() * sizeof *d, cudaMemcpyHostToDevice));
        OK(cudaMemset(t, 0xFF, rows * sizeof *t));
        de_cu_top_logits(NULL, d, rows, V, s[1], t, w);
        OK(cudaGetLastError());
        OK(cudaMemcpy(tops.data(), t, rows * sizeof *t, cudaMemcpyDeviceToHost));
        for (uint32_t r = 0; r < rows; r++) {
            const bool good = check(&logits[(size_t)r * V], s[1], (kind)(r % KINDS), tops[r]);
            if (!good)
                printf("%u logits, ids below %u, %s: FAIL\n", V, s[1], names[r % KINDS]);
            failures += !good;
        }
        for (uint32_t n = 1; bench && V > 2048 && s[1] > 2048 && n <= rows; n *= 4) {
            cudaEvent_t a, b;
            float ms;
            OK(cudaEventCreate(&a));
            OK(cudaEventCreate(&b));
            for (int i = 0; i < 2; i++) {
                OK(cudaEventRecord(a));
                for (int k = 0; k < 100; k++)
                    de_cu_top_logits(NULL, d, n, V, s[1], t, w);
                OK(cudaEventRecord(b));
                OK(cudaEventSynchronize(b));
            }
            OK(cudaEventElapsedTime(&ms, a, b));
            printf("%u rows of %u logits, one in eight of each kind: %.1f us\n", n, V, ms * 10);
        }
        OK(cudaFree(d));
        OK(cudaFree(t));
        OK(cudaFree(w));
    }
    printf("%s\n", failures ? "FAIL" : "pass");
    return failures != 0;
}
