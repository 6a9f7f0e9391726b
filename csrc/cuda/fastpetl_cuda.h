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
  int warps_m;  // 16-row tiles to a block: 1 or 4, 0: chosen by the row count
  float eps, tail_eps, scale;
};

extern "C" int fastpetl_cuda_site_forward(const fp_cuda_site_forward* args, int dtype, void* stream);
