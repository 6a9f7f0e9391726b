// The adapter's forward as one launch for small row counts: each block carries ROWS rows through norm, down, activation
// and up without leaving the SM; normalised rows and bottleneck stay in shared memory in fp32.
//
// Compiled, linked, checked for spills and run on the CPU by tests/build, but never yet timed or run on a GPU:
// backend="auto" therefore never chooses it. On large row counts the Triton kernels' tensor cores are the right tool.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/fastpetl_cuda.h"
#include "cuda/launch.cuh"

namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr size_t SMEM_LIMIT = 48 * 1024;  // what every GPU grants without asking

// Element i as float; 0 where the operand is left out.
template <typename T>
__device__ __forceinline__ float load(const T* p, int64_t i) {
  return p ? static_cast<float>(p[i]) : 0.f;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}

__device__ __forceinline__ float activate(float z, int activation) {
  switch (activation) {
    case 1: return z < 0.f ? 0.f : z;  // keeps NaN, as torch does
    case 2: return 0.5f * z * (1.f + erff(z * 0.70710678118654752f));
    case 3: return 0.5f * z * (1.f + tanhf(0.79788456080286536f * (z + 0.044715f * z * z * z)));
    case 4: return z / (1.f + expf(-z));
  }
  return z;
}

// One warp brings one row into shared memory, normalised if there is a norm.
template <typename T>
__device__ void stage_row(const fp_cuda_adapter_args& a, int64_t row, float* xn) {
  const T* x = static_cast<const T*>(a.x) + row * a.d;
  const int lane = threadIdx.x & 31;
  if (!a.norm_weight) {
    for (int i = lane; i < a.d; i += 32) xn[i] = load(x, i);
    return;
  }
  float sum = 0.f, squares = 0.f;
  for (int i = lane; i < a.d; i += 32) sum += xn[i] = load(x, i);
  const float mean = warp_sum(sum) / a.d;
  for (int i = lane; i < a.d; i += 32) squares += (xn[i] - mean) * (xn[i] - mean);
  const float rstd = rsqrtf(warp_sum(squares) / a.d + a.eps);
  const T *weight = static_cast<const T*>(a.norm_weight), *bias = static_cast<const T*>(a.norm_bias);
  for (int i = lane; i < a.d; i += 32) xn[i] = (xn[i] - mean) * rstd * load(weight, i) + load(bias, i);
  if (a.stats && lane == 0) a.stats[2 * row] = mean, a.stats[2 * row + 1] = rstd;
}

template <typename T, int ROWS>
__global__ void __launch_bounds__(THREADS) adapter_forward(fp_cuda_adapter_args a) {
  FP_DYN_SMEM(float, xn);  // [ROWS, d] normalised rows, then [ROWS, r] activated bottleneck
  float* h = xn + ROWS * a.d;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * ROWS;
  const int rows = a.rows - first < ROWS ? static_cast<int>(a.rows - first) : ROWS;

  for (int m = warp; m < ROWS; m += WARPS) {
    if (m < rows) {
      stage_row<T>(a, first + m, xn + m * a.d);
    } else {
      for (int i = lane; i < a.d; i += 32) xn[m * a.d + i] = 0.f;
    }
  }
  __syncthreads();

  const T *w_down = static_cast<const T*>(a.w_down), *b_down = static_cast<const T*>(a.b_down);
  for (int j = warp; j < a.r; j += WARPS) {  // one warp per bottleneck unit, its weights read once for all rows
    float acc[ROWS] = {};
    for (int i = lane; i < a.d; i += 32) {
      const float w = load(w_down, static_cast<int64_t>(j) * a.d + i);
#pragma unroll
      for (int m = 0; m < ROWS; ++m) acc[m] += xn[m * a.d + i] * w;
    }
    const float bias = load(b_down, j);
#pragma unroll
    for (int m = 0; m < ROWS; ++m) {
      const float z = warp_sum(acc[m]) + bias;
      if (lane == 0) h[m * a.r + j] = z;
    }
  }
  __syncthreads();
  for (int k = threadIdx.x; k < ROWS * a.r; k += THREADS) {  // rows past the end hold the bias: harmless, not stored
    if (a.z && k < rows * a.r) static_cast<T*>(a.z)[first * a.r + k] = static_cast<T>(h[k]);
    h[k] = activate(h[k], a.activation);
  }
  __syncthreads();

  const T *w_up = static_cast<const T*>(a.w_up), *x = static_cast<const T*>(a.x);
  const T *res1 = static_cast<const T*>(a.res1), *res2 = static_cast<const T*>(a.res2);
  for (int i = threadIdx.x; i < a.d; i += THREADS) {  // one thread per output column
    float acc[ROWS] = {};
    for (int j = 0; j < a.r; ++j) {
      const float w = load(w_up, static_cast<int64_t>(i) * a.r + j);
#pragma unroll
      for (int m = 0; m < ROWS; ++m) acc[m] += h[m * a.r + j] * w;
    }
    const float bias = load(static_cast<const T*>(a.b_up), i);
#pragma unroll
    for (int m = 0; m < ROWS; ++m) {
      if (m >= rows) continue;
      const int64_t at = (first + m) * a.d + i;
      const float y = a.scale * (acc[m] + bias) + (a.add_x ? load(x, at) : 0.f) + load(res1, at) + load(res2, at);
      static_cast<T*>(a.y)[at] = static_cast<T>(y);
    }
  }
}

template <typename T, int ROWS>
int launch(const fp_cuda_adapter_args& a, cudaStream_t stream) {
  const size_t smem = sizeof(float) * ROWS * (static_cast<size_t>(a.d) + a.r);
  if (smem > SMEM_LIMIT) return cudaErrorInvalidValue;
  const unsigned grid = static_cast<unsigned>((a.rows + ROWS - 1) / ROWS);
  FP_LAUNCH((adapter_forward<T, ROWS>), grid, THREADS, smem, stream, a);
  return cudaGetLastError();
}

template <typename T>
int pick(const fp_cuda_adapter_args& a, cudaStream_t stream) {
  // Few rows: one to a block, so that they spread over the SMs. More: four share what each block reads of the weights.
  const bool four = a.rows > 128 && 4 * sizeof(float) * (static_cast<size_t>(a.d) + a.r) <= SMEM_LIMIT;
  return four ? launch<T, 4>(a, stream) : launch<T, 1>(a, stream);
}

}  // namespace

extern "C" int fastpetl_cuda_adapter_forward(const fp_cuda_adapter_args* args, int dtype, void* stream) {
  if (args->rows == 0) return cudaSuccess;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case FP_CUDA_F32: return pick<float>(*args, s);
    case FP_CUDA_F16: return pick<__half>(*args, s);
    case FP_CUDA_BF16: return pick<__nv_bfloat16>(*args, s);
  }
  return cudaErrorInvalidValue;
}
