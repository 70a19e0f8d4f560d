/* ops.cuh -- the operations of the CUDA backend: what each takes, computes and leaves behind.
 *
 * All pointers are device memory unless said otherwise. Every function only launches kernels on `stream`: no allocation, no
 * synchronisation, no host memory touched later. Errors of a launch are left to cudaGetLastError(), which the caller asks once a
 * forward. Arguments were checked by the caller.
 *
 * Rows of a batch are rows of all matrices. Activations are BF16, the residual stream h and all states are float. Two families:
 *   decode   sequences with one row each, at most DE_CU_DECODE_ROWS of them: cost is the bytes read. Captured in graphs, so
 *            what differs from step to step is read from device memory.
 *   prefill  any rows: tensor-core tiles.
 * Which one serves a sequence is decided by de_batch_seq.decode, never by what else is in the batch, and in both the bits of a row
 * depend on that row and its sequence alone. */
#ifndef DE_KERNELS_CUDA_OPS_CUH
#define DE_KERNELS_CUDA_OPS_CUH

#include "kernels/cuda/common.cuh"

enum {
    DE_CU_DECODE_ROWS = 64,
    DE_CU_PAGE = 64,  /* tokens of a KV page */
    DE_CU_ATTN = 256, /* dims of an attention head */
    DE_CU_GDN = 128,  /* dims of a DeltaNet head */
};

/* One matrix [out, in] in fragment order (common.cuh). */
struct de_cu_linear {
    const uint8_t *w;
    const float *scale; /* INT8: [out padded to 16][in / group]; else NULL */
    uint32_t out, in;   /* in % 32 == 0 */
    uint32_t group;     /* columns of one scale: in, or a multiple of 32 that divides it */
};

/* A sequence of the batch. */
struct de_cu_seq {
    uint32_t row, n_rows; /* rows [row, row + n_rows) of the batch */
    uint32_t start;       /* position of the first row */
    uint32_t slot;        /* its state */
    uint32_t page0;       /* its page ids are pages[page0 ...], enough for start + n_rows tokens */
};

/* What a later kernel will read: fetched into L2 by blocks of their own while this kernel waits for latencies. n 0: nothing. */
struct de_cu_ahead {
    const uint8_t *p;
    size_t n; /* bytes */
};

/* ---- linear */

enum de_cu_store {
    DE_CU_BF16, /* y bf16 [rows][ldy] = x W' */
    DE_CU_F32,  /* y float [rows][ldy] = x W' */
    DE_CU_ADD,  /* y float [rows][ldy] += x W' */
};

/* prefill. x [rows][ldx] BF16, 16-byte aligned rows. `out` need not be a multiple of anything. */
void de_cu_linear_tile(cudaStream_t stream, const de_cu_linear &w, const bf16 *x, size_t ldx,
                       uint32_t rows, de_cu_store store, void *y, size_t ldy);

/* ---- pages of keys and values */

enum { DE_CU_PAGES = 64 };

struct de_cu_pages {
    uint32_t n;
    uint32_t page[DE_CU_PAGES];
    uint8_t *host[DE_CU_PAGES]; /* locked memory, as the device sees it; aligned to 16 */
};
/* Copies pages to the host or from there. On the device part l of page p is the part_bytes (a multiple of 16) at
 * kv + l * apart + p * part_bytes, on the host its n_parts parts lie one behind the other. */
void de_cu_copy_pages(cudaStream_t stream, uint8_t *kv, size_t apart, size_t part_bytes, uint32_t n_parts,
                      const de_cu_pages &list, bool to_host);

/* ---- experts */

struct de_cu_experts {
    uint32_t n_experts, top_k, hidden, width, shared_width;
    /* Of expert 0; expert e lies e * *_stride bytes behind, its scales e * *_scales floats. gate_up is [2 * width, hidden] with
     * gates and ups in turn by eights: row 16 i + j is gate 8 i + j for j < 8, else up 8 i + j - 8 (width % 8 == 0). */
    de_cu_linear gate_up, down; /* down [hidden, width] */
    size_t gate_up_stride, down_stride, gate_up_scales, down_scales;
    de_cu_linear shared_gate_up, shared_down; /* of shared_width; the same order of rows */
};

/* Bytes of workspace of de_cu_moe_tile for that many rows. */
size_t de_cu_moe_tile_bytes(const de_cu_experts &e, uint32_t rows);
/* prefill. For each row: h += sum over its experts of weight * down(silu(gate x) * up x) + sigmoid(shared_logit) * shared(x). The
 * inner activation is rounded to BF16. The sum goes over the row's experts in rising number, the shared one last, in float.
 *   x [rows][hidden] BF16; h [rows][hidden] float; router [rows][ldr] float: logits of the experts in 0 .. n_experts - 1, the
 *   shared expert's gate logit at n_experts. Top k and softmax over the chosen are done here (ties: the lower number). */
void de_cu_moe_tile(cudaStream_t stream, const de_cu_experts &e, const bf16 *x, const float *router,
                    size_t ldr, uint32_t rows, float *h, void *workspace);

/* ---- Gated DeltaNet */

struct de_cu_gdn {
    uint32_t k_heads, v_heads, channels; /* channels = (2 k_heads + v_heads) * 128 */
    const float *conv;                   /* [4][channels], oldest input first */
    const float *neg_exp_A, *dt_bias;    /* [v_heads] */
    const float *norm;                   /* [128], plain weight of the gated norm */
    float eps;                           /* of the gated norm; that of the l2 norms is 1e-6 */
    /* The layer's state of slot 0; slot s lies s * slot_floats behind: S [v_heads][128 k][128 v], then conv tail [3][channels],
     * the last three inputs of the conv, oldest first. All float. */
    float *state;
    size_t slot_floats;
};
/* One row of the projections: u [channels] (q, k, v before the conv), then z [v_heads * 128], then b [v_heads], a [v_heads], all
 * BF16 in one row of ldp elements: p [rows][ldp]. */
size_t de_cu_gdn_chunk_bytes(const de_cu_gdn &g, uint32_t rows, uint32_t n_seqs);
/* prefill. Conv + SiLU, l2 norms, gates, the chunked delta rule (chunks end where the position is a multiple of 64, the states
 * are updated), gated norm: y [rows][v_heads * 128] BF16. Formulas: engine/model/cpu/layer_gdn.c. rows: of all n_seqs together;
 * the rows of sequence i are those of seqs[i]. max_rows: no sequence has more (host knows). */
void de_cu_gdn_chunk(cudaStream_t stream, const de_cu_gdn &g, const bf16 *p, size_t ldp,
                     const de_cu_seq *seqs, uint32_t n_seqs, uint32_t rows, uint32_t max_rows,
                     bf16 *y, void *workspace);

/* ---- attention */

enum de_cu_kv { DE_CU_KV_BF16, DE_CU_KV_FP8 /* e4m3, scale 1 */ };

struct de_cu_attn {
    uint32_t q_heads, kv_heads, rotary;
    const float *q_norm, *k_norm; /* [256] delta around 0 */
    float eps;
    de_cu_kv kv_type;
    uint8_t *kv;       /* this layer's page 0; page p lies p * page_bytes behind */
    size_t page_bytes; /* kv_heads * 2 * 64 * 256 elements */
};
/* One row of the projections: q_heads times (query [256], gate [256]), k [kv_heads][256], v [kv_heads][256]; BF16, ldp elements.
 * cos and sin: rope [rows][rotary] float, rotary / 2 cosines, then sines. */
size_t de_cu_attn_prefill_bytes(const de_cu_attn &a, uint32_t rows);
/* prefill. Norms and rotary of q and k, k and v into their pages, causal attention over the pages at 1/16, times
 * sigmoid(gate): y [rows][q_heads * 256] BF16. Formulas: engine/model/cpu/layer_attn.c. max_rows: no sequence has more
 * rows; ctx_max: none reaches further (start + n_rows). Neither changes a bit: a row's depend on its position and what precedes it,
 * not on the forwards its prompt was cut into. */
void de_cu_attn_prefill(cudaStream_t stream, const de_cu_attn &a, const bf16 *p, size_t ldp,
                        const float *rope, const de_cu_seq *seqs, const uint32_t *pages,
                        uint32_t n_seqs, uint32_t rows, uint32_t max_rows, uint32_t ctx_max,
                        bf16 *y, void *workspace);
size_t de_cu_attn_decode_bytes(const de_cu_attn &a, uint32_t n_seqs);
/* decode: one row a sequence (n_rows == 1, row i is sequence i). How a context is split among blocks depends on its own length
 * only; seqs and pages are read on the device and the launch is the same for every length up to ctx_max. `dependent`: launch
 * with programmatic dependent launch. */
void de_cu_attn_decode(cudaStream_t stream, const de_cu_attn &a, const bf16 *p, size_t ldp,
                       const float *rope, const de_cu_seq *seqs, const uint32_t *pages,
                       uint32_t n_seqs, uint32_t ctx_max, bf16 *y, void *workspace, bool dependent);
/* ---- decode: at most DE_CU_DECODE_ROWS rows, one a sequence; row i is sequence i
 *
 * Up to DE_CU_FUSED_ROWS rows each kernel prepares its x itself, in shared memory (de_cu_x); with more rows the caller has
 * de_cu_decode_prepare() do that once, into a workspace that is then given as `ready`. Both give the same bits. The sum of an
 * output is cut in 16 parts: part w takes the tiles of 32 columns w, w + 16, ...; parts are added in rising w. */

enum { DE_CU_FUSED_ROWS = 2 };

enum de_cu_x_kind {
    DE_CU_X_PLAIN, /* x bf16 [n][ldx] as it is */
    DE_CU_X_NORM,  /* RMSNorm of h float [n][k] with 1 + norm[k] */
    DE_CU_X_GATED_NORM, /* per head of 128: RMSNorm of o float [n][k] with norm[128], times silu(z), z bf16 [n][ldx] */
};
struct de_cu_x {
    de_cu_x_kind kind;
    const float *f; /* h or o */
    const bf16 *x;  /* x or z */
    size_t ldx;
    const float *norm;
    float eps;
    const bf16 *ready; /* [n][k] as de_cu_decode_prepare() left it, or NULL */
};
/* Writes x [n][k] in the order of fragments. k <= 4096, a multiple of 32. */
void de_cu_decode_prepare(cudaStream_t stream, const de_cu_x &x, uint32_t n, uint32_t k, bf16 *to,
                          bool dependent);

/* y of `store` kind [n][ldy] = x W' */
void de_cu_decode_linear(cudaStream_t stream, const de_cu_linear &w, const de_cu_x &x, uint32_t n,
                         de_cu_store store, void *y, size_t ldy, de_cu_ahead ahead, bool dependent);
/* The projections of a DeltaNet layer: rows below g.channels go through conv and SiLU to c float [n][channels], and their inputs,
 * rounded to BF16, into the conv tails of seqs' slots; the others (z, b, a) go to p bf16 [n][ldp] at their place. */
void de_cu_decode_gdn_in(cudaStream_t stream, const de_cu_linear &w, const de_cu_x &x, uint32_t n,
                         const de_cu_gdn &g, const de_cu_seq *seqs, float *c, bf16 *p, size_t ldp,
                         bool dependent);
/* The delta rule: o float [n][v_heads * 128], states updated. */
void de_cu_decode_gdn_step(cudaStream_t stream, const de_cu_gdn &g, const float *c, const bf16 *p,
                           size_t ldp, const de_cu_seq *seqs, uint32_t n, float *o, bool dependent);
/* Experts of n rows: as de_cu_moe_tile, x being prepared with kind NORM. n_experts <= 1024, top_k <= 16, width and shared_width at
 * most 4096. h is what x.f is, too: all of it is read before any of it is written (two kernels). With `dependent`, the kernel before
 * this one must not write x, and must have let go only after it waited for the one that did: de_cu_decode_linear() with something
 * ahead does so. */
size_t de_cu_decode_moe_bytes(const de_cu_experts &e, uint32_t n);
void de_cu_decode_moe(cudaStream_t stream, const de_cu_experts &e, const de_cu_x &x,
                      const float *router, size_t ldr, uint32_t n, float *h, void *workspace,
                      bool dependent);

/* ---- rows */

/* Reads n bytes (a multiple of 16), for measuring; blocks: this many for each multiprocessor. */
void de_cu_read(cudaStream_t stream, const uint8_t *p, size_t n, uint32_t blocks);

/* h float [n][hidden] = embed bf16 [vocab][hidden] at the tokens. */
void de_cu_embed(cudaStream_t stream, const bf16 *embed, const uint32_t *tokens, uint32_t n,
                 uint32_t hidden, float *h);
/* to float [n][hidden] = the rows `rows` of h. */
void de_cu_gather(cudaStream_t stream, const float *h, const uint32_t *rows, uint32_t n,
                  uint32_t hidden, float *to);
/* y bf16 [n][k] = RMSNorm(h float [n][k]) with 1 + norm. */
void de_cu_norm(cudaStream_t stream, const float *h, const float *norm, uint32_t n, uint32_t k,
                float eps, bf16 *y);
/* rope float [n][2 * half]: cosines and sines of pos[i][axis[j]] * inv_freq[j], times factor. */
void de_cu_rope(cudaStream_t stream, const uint32_t *pos, const float *inv_freq,
                const uint8_t *axis, uint32_t n, uint32_t half, float factor, float *rope);

/* ---- weights into place */

enum de_cu_type { DE_CU_T_INT8, DE_CU_T_BF16, DE_CU_T_F16, DE_CU_T_F32 }; /* of stored values */
enum de_cu_order {
    DE_CU_ROWS, /* row r goes to row0 + r */
    DE_CU_GATE, /* row r goes to 16 (r / 8) + r % 8, counted from row0 on: gates of a gate_up matrix */
    DE_CU_UP, /* the same, eight behind */
};
/* Rows [0, rows) of a matrix as a checkpoint stores them, on the device; rows < 65,536. */
struct de_cu_stored {
    de_cu_type type;
    const uint8_t *w; /* rows row_bytes apart; INT8: value + 128 */
    size_t row_bytes;
    uint32_t rows, in;
    de_cu_type scale_type;
    const uint8_t *scale; /* INT8: [rows][in / group], or one value */
    bool scale_whole;
    uint32_t group;
};
/* Into fragments. to.scale NULL: BF16, INT8 sources are multiplied out and rounded. *bad |= 1 if a value is not finite, 2 if a
 * scale of 0 stands over weights that are not. */
void de_cu_pack_linear(cudaStream_t stream, const de_cu_stored &from, const de_cu_linear &to,
                       uint32_t row0, de_cu_order order, uint32_t *bad);
/* to bf16 [rows][in], row-major. */
void de_cu_pack_rows(cudaStream_t stream, const de_cu_stored &from, bf16 *to, uint32_t *bad);
enum de_cu_vector {
    DE_CU_V_PLAIN,
    DE_CU_V_NEG_EXP, /* -exp(v) */
    DE_CU_V_CONV,    /* [n / 4][4] -> [4][n / 4] */
};
void de_cu_pack_vector(cudaStream_t stream, de_cu_type type, const uint8_t *from, uint32_t n,
                       de_cu_vector how, float *to, uint32_t *bad);
/* Random weights: INT8 in the whole range or normal-like BF16, such that outputs are as large as inputs. */
void de_cu_fill_linear(cudaStream_t stream, const de_cu_linear &to, uint64_t seed);
void de_cu_fill_rows(cudaStream_t stream, bf16 *to, size_t n, float amplitude, uint64_t seed);
/* Uniform in [low, high). */
void de_cu_fill_vector(cudaStream_t stream, float *to, uint32_t n, float low, float high,
                       uint64_t seed);

#endif
