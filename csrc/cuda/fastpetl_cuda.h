// The CUDA kernels' C interface: pointers and sizes, no framework header. All matrices are dense and row-major.
// Every function enqueues on `stream` (a cudaStream_t) and returns a cudaError_t, 0 when all is well.
#pragma once
#include <stdint.h>

enum fp_cuda_dtype { FP_CUDA_F32 = 0, FP_CUDA_F16 = 1, FP_CUDA_BF16 = 2 };
enum fp_cuda_tail { FP_CUDA_NO_TAIL = 0, FP_CUDA_LAYERNORM = 1, FP_CUDA_RMSNORM = 2 };

// One adapter site:  s = scale * (act(own(x) Wd^T + bd) Wu^T + bu) + [x] + res1 + res2,  n = tail(s);
// own is LayerNorm or, without norm_weight, nothing. activation: 0 identity, 1 ReLU, 2 GELU, 3 tanh-GELU, 4 SiLU.
// Null pointers leave a term or a result out; at least one of s and n is there, n if and only if there is a tail or none.
struct fp_cuda_site_forward {
  const void *x, *w_down, *b_down, *w_up, *b_up, *norm_weight, *norm_bias, *res1, *res2, *tail_weight, *tail_bias;
  void *s, *n, *z;            // [rows, d], [rows, d], pre-activation [rows, r]
  float *stats, *tail_stats;  // (mean, rstd) per row: of x, of s
  int64_t rows;
  int d, r, activation, add_x, tail, device;
  int warps_m;  // 16-row tiles to a block: 1 or 4, -4 or -8 with resident rows (if they fit), 0: chosen by the row count
  float eps, tail_eps, scale;
};

// Its backward over the rows. g = g_s + (gradient of s through the tail), dz = scale * (g Wu) * act'(z),
// dx = (gradient of x through own and Wd) + [g]. The parameters' gradients are products over the rows of what comes
// back: dWd = dz^T own(x), dWu = scale * g^T h.
struct fp_cuda_site_backward {
  const void *g_s, *g_n, *s, *tail_weight;             // g_s may be null with g_n; s, tail_weight, tail_stats: with g_n
  const void *x, *z, *w_down, *w_up, *norm_weight;     // x and stats: with norm_weight
  const float *stats, *tail_stats;
  void *g;              // [rows, d]; with g_n only, else g is g_s
  void *dx, *dz, *h;    // [rows, d] or null; [rows, r]; act(z) [rows, r] or null
  float* tail_partial;  // [blocks, 2, d] or null: each block's share of (sum g_n * normalised s, sum g_n)
  int64_t rows;
  int d, r, activation, add_x, tail, device, warps_m;
  float scale;
};

extern "C" {
int fastpetl_cuda_site_forward(const fp_cuda_site_forward* args, int dtype, void* stream);
int fastpetl_cuda_site_backward(const fp_cuda_site_backward* args, int dtype, void* stream);
// Whether a bottleneck of r fits this device's shared memory, forward or backward.
int fastpetl_cuda_site_fits(int r, int dtype, int backward, int device);
// Rows of a block of that launch: tail_partial has rows / this, rounded up, blocks.
int fastpetl_cuda_site_block_rows(const fp_cuda_site_backward* args, int dtype);

// y[i] = x[index[i]] for i < count, zeros behind; count null: for all m. Rows of `bytes` bytes.
int fastpetl_cuda_gather_rows(const void* x, const int64_t* index, const int64_t* count, void* y, int64_t n, int64_t m,
                              int64_t bytes, int device, void* stream);
// y[index[i]] = rows[i], or zeros where rows is null, for i < count; the rest of y is left as it is.
int fastpetl_cuda_scatter_rows(const void* rows, const int64_t* index, const int64_t* count, void* y, int64_t n,
                               int64_t m, int64_t bytes, int device, void* stream);
// y[j] = sum of rows[i] over i < count with index[i] == j, added in fp32 in the order of i. Rows of d numbers.
int fastpetl_cuda_add_rows(const void* rows, const int64_t* index, const int64_t* count, float* y, int64_t n, int64_t m,
                           int64_t d, int dtype, int device, void* stream);
}
