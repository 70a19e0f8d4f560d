/* decode_gdn.cu -- one step of the gated delta rule for each sequence: the state is read and written once.
 *
 *   S = exp(g) S;  d = beta (v - S'k);  S += k d';  o = S'q     (per value head; q, k l2-normed, q * 128^-0.5)
 *
 * A block owns 32 of the 128 value columns of a head: 16 KB of state, held in registers, eight rows of four columns a thread. Both
 * products are sums over the old state, S'q being exp(g) S'q + (k.q) d, so that one pass over it serves both. */
#include "kernels/cuda/decode.cuh"

namespace
{

enum { D = DE_CU_GDN, COLUMNS = 32, THREADS = 128, ROWS = D / 16 };

__global__ void __launch_bounds__(THREADS)
    step_kernel(const de_cu_gdn a, const float *c, const bf16 *p, size_t ldp, const de_cu_seq *seqs,
                float *o)
{
    __shared__ float q[D], k[D], part[4][2][COLUMNS], norms[4][3];
    const uint32_t head = blockIdx.x / (D / COLUMNS), column = blockIdx.x % (D / COLUMNS) * COLUMNS,
                   seq = blockIdx.y, kh = head / (a.v_heads / a.k_heads);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    /* thread: rows r0 + 16 i, columns column + c4 .. + 3 */
    const int r0 = threadIdx.x / 8, c4 = threadIdx.x % 8 * 4;
    float *S = a.state + seqs[seq].slot * a.slot_floats + (size_t)head * D * D + column + c4;
    float4 s[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++)
        s[i] = *(const float4 *)(S + (size_t)(r0 + 16 * i) * D);
    cu_release();
    cu_wait();
    c += (size_t)seq * a.channels;
    p += seq * ldp + a.channels + a.v_heads * D; /* b, then a */
    const float qv = c[kh * D + threadIdx.x], kv = c[(a.k_heads + kh) * D + threadIdx.x];
    const float4 v = *(const float4 *)(c + (2 * a.k_heads + head) * D + column + c4);
    const float beta = 1.0f / (1.0f + expf(-__bfloat162float(p[head])));
    const float g =
        a.neg_exp_A[head] * cu_softplus(__bfloat162float(p[a.v_heads + head]) + a.dt_bias[head]);
    const float decay = expf(g);
    const float qq = cu_sum(qv * qv), kk = cu_sum(kv * kv), qk = cu_sum(qv * kv);
    q[threadIdx.x] = qv;
    k[threadIdx.x] = kv;
    if (lane == 0) {
        norms[warp][0] = qq;
        norms[warp][1] = kk;
        norms[warp][2] = qk;
    }
    __syncthreads();
    const float qs = rsqrtf(norms[0][0] + norms[1][0] + norms[2][0] + norms[3][0] + 1e-6f) *
                     0.08838834764831845f,
                ks = rsqrtf(norms[0][1] + norms[1][1] + norms[2][1] + norms[3][1] + 1e-6f),
                dot = (norms[0][2] + norms[1][2] + norms[2][2] + norms[3][2]) * qs * ks;
    float sk[4] = { 0, 0, 0, 0 }, sq[4] = { 0, 0, 0, 0 };
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const float kr = k[r0 + 16 * i] * ks, qr = q[r0 + 16 * i] * qs;
        s[i].x *= decay, s[i].y *= decay, s[i].z *= decay, s[i].w *= decay;
        sk[0] = fmaf(s[i].x, kr, sk[0]), sq[0] = fmaf(s[i].x, qr, sq[0]);
        sk[1] = fmaf(s[i].y, kr, sk[1]), sq[1] = fmaf(s[i].y, qr, sq[1]);
        sk[2] = fmaf(s[i].z, kr, sk[2]), sq[2] = fmaf(s[i].z, qr, sq[2]);
        sk[3] = fmaf(s[i].w, kr, sk[3]), sq[3] = fmaf(s[i].w, qr, sq[3]);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int m = 8; m < 32; m <<= 1) {
            sk[j] += __shfl_xor_sync(~0u, sk[j], m);
            sq[j] += __shfl_xor_sync(~0u, sq[j], m);
        }
        if (lane < 8) {
            part[warp][0][c4 + j] = sk[j];
            part[warp][1][c4 + j] = sq[j];
        }
    }
    __syncthreads();
    const float vs[4] = { v.x, v.y, v.z, v.w };
    float d[4], out[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const int at = c4 + j;
        const float k_sum = part[0][0][at] + part[1][0][at] + part[2][0][at] + part[3][0][at],
                    q_sum = part[0][1][at] + part[1][1][at] + part[2][1][at] + part[3][1][at];
        d[j] = beta * (vs[j] - k_sum);
        out[j] = fmaf(dot, d[j], q_sum);
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const float kr = k[r0 + 16 * i] * ks;
        s[i].x = fmaf(kr, d[0], s[i].x);
        s[i].y = fmaf(kr, d[1], s[i].y);
        s[i].z = fmaf(kr, d[2], s[i].z);
        s[i].w = fmaf(kr, d[3], s[i].w);
        *(float4 *)(S + (size_t)(r0 + 16 * i) * D) = s[i];
    }
    if (r0 == 0)
        *(float4 *)(o + ((size_t)seq * a.v_heads + head) * D + column + c4) =
            make_float4(out[0], out[1], out[2], out[3]);
}

} // namespace

void de_cu_decode_gdn_step(cudaStream_t stream, const de_cu_gdn &g, const float *c, const bf16 *p,
                           size_t ldp, const de_cu_seq *seqs, uint32_t n, float *o, bool dependent)
{
    cu_launch_threads(step_kernel, dim3(g.v_heads * (D / COLUMNS), n), THREADS, 0, stream,
                      dependent, g, c, p, ldp, seqs, o);
}
