// The CUDA kernels' C interface: pointers and sizes, no framework header. All matrices are dense and row-major.
#pragma once
#include <stdint.h>

enum fp_cuda_dtype { FP_CUDA_F32 = 0, FP_CUDA_F16 = 1, FP_CUDA_BF16 = 2 };

// y = scale * (act(n(x) Wd^T + bd) Wu^T + bu) + [x] + res1 + res2; null pointers leave a term out; n is the identity
// without norm_weight. activation: 0 identity, 1 ReLU, 2 GELU, 3 tanh-GELU, 4 SiLU.
struct fp_cuda_adapter_args {
  const void *x, *w_down, *b_down, *w_up, *b_up, *norm_weight, *norm_bias, *res1, *res2;
  void *y, *z;   // z: pre-activation [rows, r], or null
  float* stats;  // (mean, rstd) per row, or null
  int64_t rows;
  int d, r, activation, add_x;
  float eps, scale;
};

// Enqueues on `stream` (a cudaStream_t); the result is a cudaError_t, 0 when all is well.
extern "C" int fastpetl_cuda_adapter_forward(const fp_cuda_adapter_args* args, int dtype, void* stream);
