// What the site kernels share: the block's shape and shared memory, loads with tails, row norms, activations.
#pragma once
#include <cuda_runtime.h>

#include "cuda/launch.cuh"
#include "cuda/mma.cuh"

namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int R_TILE = 192;  // bottleneck columns held in accumulators at once

// A block of 16 * WM rows: its 8 warps are WM along the rows and 8 / WM along the columns.
template <typename T, int WM>
struct Shape {
  static constexpr int BM = 16 * WM, WN = WARPS / WM;
  static constexpr int V = 16 / sizeof(T);               // elements of one 16-byte access
  static constexpr int BK = 128 / sizeof(T);             // chunk of d in the products that sum over d
  static constexpr int LDX = BK + V;                     // row lengths in shared memory: off by 16 bytes, so that eight
                                                         // rows start in different banks and stay 16-byte aligned
  static constexpr int KU = 3 * BK;                      // chunk of r in the products that sum over r
  static constexpr int R_PAIRS = (R_TILE / 16 + WN - 1) / WN;  // 16-column pairs of a warp: of the bottleneck tile,
  static constexpr int U_PAIRS = WM == 1 ? 1 : 2;              // of a panel of d-wide output
  static constexpr int BN = 16 * WN * U_PAIRS;
  static constexpr int LDP = 16 * U_PAIRS + 4;           // a warp's patch of that panel, fp32
};

__host__ __device__ inline int fp_up16(int n) { return (n + 15) / 16 * 16; }
__host__ __device__ inline int fp_min(int a, int b) { return a < b ? a : b; }

// Offsets in bytes of the block's shared memory: two weight tiles, two row tiles (later the patches), the bottleneck.
template <typename T, int WM, bool BACKWARD>
struct Layout {
  using S = Shape<T, WM>;
  int weights, rows, bottleneck, stats, total, ldh;
  __host__ __device__ explicit Layout(int r) {
    const int tile = fp_min(fp_up16(r), R_TILE), chunk = fp_min(fp_up16(r), S::KU);
    const int down = BACKWARD ? S::BK * (tile + S::V) : tile * S::LDX;
    const int up = BACKWARD ? chunk * (S::BN + S::V) : S::BN * (chunk + S::V);
    weights = (down > up ? down : up) * static_cast<int>(sizeof(T));
    const int x = S::BM * S::LDX * static_cast<int>(sizeof(T)), patches = WARPS * 16 * S::LDP * 4;
    ldh = fp_up16(r) + S::V;
    rows = 2 * weights;
    bottleneck = rows + (2 * x > patches ? 2 * x : patches);
    stats = bottleneck + S::BM * ldh * static_cast<int>(sizeof(T));
    total = stats + 2 * S::BM * 4;
  }
};

template <typename T>
struct alignas(16) Vec {
  static constexpr int N = 16 / sizeof(T);
  T v[N];
};

// Element i as float; 0 where the operand is left out.
template <typename T>
__device__ __forceinline__ float load(const T* p, int64_t i) {
  return p ? static_cast<float>(p[i]) : 0.f;
}

// The elements of p from `i` on, zeros behind `valid`; one access if `vector`.
template <typename T>
__device__ __forceinline__ Vec<T> load_vec(const T* p, int64_t i, int valid, bool vector) {
  Vec<T> out;
  if (vector && valid >= Vec<T>::N) return *reinterpret_cast<const Vec<T>*>(p + i);
#pragma unroll
  for (int e = 0; e < Vec<T>::N; ++e) out.v[e] = e < valid ? p[i + e] : static_cast<T>(0.f);
  return out;
}
template <typename T>
__device__ __forceinline__ void store_vec(T* p, int64_t i, const Vec<T>& from, int valid, bool vector) {
  if (vector && valid >= Vec<T>::N) {
    *reinterpret_cast<Vec<T>*>(p + i) = from;
    return;
  }
#pragma unroll
  for (int e = 0; e < Vec<T>::N; ++e)
    if (e < valid) p[i + e] = from.v[e];
}

// A tile [rows, columns] of a matrix with row length `ld` on its way into shared memory, zeros up to [to_rows,
// to_columns] (to_columns a multiple of 16). Whole-block; asynchronous where `vector` lets it be.
template <typename T>
__device__ __forceinline__ void stage(T* to, int ldt, const T* from, int64_t ld, int rows, int columns, int to_rows,
                                      int to_columns, bool vector) {
  constexpr int V = Vec<T>::N;
  const int per_row = to_columns / V;
  for (int i = threadIdx.x; i < to_rows * per_row; i += THREADS) {
    const int row = i / per_row, column = (i % per_row) * V;
    T* target = to + row * ldt + column;
    const int valid = row < rows ? columns - column : 0;
    if (vector && valid >= V) {
      fp_cp_async16(target, from + row * ld + column);
    } else {
      *reinterpret_cast<Vec<T>*>(target) = load_vec(from, row * ld + column, valid, false);
    }
  }
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}

// Calls f(i, value...) for this lane's share of a row of d numbers.
template <typename T, typename F>
__device__ __forceinline__ void for_row(const T* row, int d, bool vector, F f) {
  constexpr int V = Vec<T>::N;
  for (int c = (threadIdx.x & 31) * V; c < d; c += 32 * V) {
    const Vec<T> x = load_vec(row, c, d - c, vector);
#pragma unroll
    for (int e = 0; e < V; ++e)
      if (c + e < d) f(c + e, static_cast<float>(x.v[e]));
  }
}

struct Moments {
  float mean, rstd;
};

// Of one row, by one warp, in two passes: a large mean must not eat the variance's digits.
template <typename T>
__device__ __forceinline__ Moments row_moments(const T* row, int d, bool rms, float eps, bool vector) {
  float sum = 0.f, squares = 0.f;
  if (!rms) for_row(row, d, vector, [&](int, float x) { sum += x; });
  const float mean = rms ? 0.f : warp_sum(sum) / d;
  for_row(row, d, vector, [&](int, float x) { squares += (x - mean) * (x - mean); });
  return {mean, rsqrtf(warp_sum(squares) / d + eps)};
}

// out = addend + the gradient through a row norm of the row `x`, by one warp; grad may be out.
template <typename T>
__device__ __forceinline__ void norm_backward_row(T* out, const T* grad, const T* x, Moments m, const T* weight,
                                                  const T* addend, int d, bool rms, bool vector) {
  constexpr int V = Vec<T>::N;
  float sum = 0.f, dot = 0.f;
  for (int c = (threadIdx.x & 31) * V; c < d; c += 32 * V) {
    const Vec<T> g = load_vec(grad, c, d - c, vector), v = load_vec(x, c, d - c, vector), w = load_vec(weight, c, d - c, vector);
#pragma unroll
    for (int e = 0; e < V; ++e) {  // behind d the gradient is zero
      const float ge = static_cast<float>(g.v[e]) * static_cast<float>(w.v[e]);
      sum += ge, dot += ge * ((static_cast<float>(v.v[e]) - m.mean) * m.rstd);
    }
  }
  sum = rms ? 0.f : warp_sum(sum) / d, dot = warp_sum(dot) / d;
  for (int c = (threadIdx.x & 31) * V; c < d; c += 32 * V) {
    const Vec<T> g = load_vec(grad, c, d - c, vector), v = load_vec(x, c, d - c, vector), w = load_vec(weight, c, d - c, vector);
    Vec<T> a{}, y;
    if (addend) a = load_vec(addend, c, d - c, vector);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const float hat = (static_cast<float>(v.v[e]) - m.mean) * m.rstd;
      const float ge = static_cast<float>(g.v[e]) * static_cast<float>(w.v[e]);
      y.v[e] = static_cast<T>(m.rstd * (ge - sum - hat * dot) + (addend ? static_cast<float>(a.v[e]) : 0.f));
    }
    store_vec(out, c, y, d - c, vector);
  }
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

__device__ __forceinline__ float activate_backward(float z, int activation) {
  switch (activation) {
    case 1: return z > 0.f ? 1.f : 0.f;
    case 2: return 0.5f * (1.f + erff(z * 0.70710678118654752f)) + z * 0.39894228040143268f * expf(-0.5f * z * z);
    case 3: {
      const float t = tanhf(0.79788456080286536f * (z + 0.044715f * z * z * z));
      return 0.5f * (1.f + t) + 0.5f * z * (1.f - t * t) * 0.79788456080286536f * (1.f + 3.f * 0.044715f * z * z);
    }
    case 4: {
      const float s = 1.f / (1.f + expf(-z));
      return s * (1.f + z * (1.f - s));
    }
  }
  return 1.f;
}

// A warp's accumulators of a panel as a patch of rows, so that global memory sees whole 16-byte accesses.
template <int PAIRS, int LD>
__device__ __forceinline__ void to_patch(float* patch, const float (&acc)[PAIRS][2][4]) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int p = 0; p < PAIRS; ++p)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 16 * p + 8 * half + 2 * (lane % 4) + i % 2;
        patch[row * LD + column] = acc[p][half][i];
      }
}

// --- launching ---------------------------------------------------------------------------------------------------------

inline bool aligned(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 0;
  for (const void* p : pointers) bits |= reinterpret_cast<uintptr_t>(p);
  return bits % 16 == 0;
}

inline int shared_limit(int device) {
  int limit = 0;
  return cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ? 0 : limit;
}

// 16-row tiles to a block. Blocks of 64 rows share what they read of the weights; few rows are better spread over the
// SMs, and with a wide bottleneck 64 rows do not fit this device.
template <typename T, bool BACKWARD>
int rows_warps(int64_t rows, int r, int device, int wanted) {
  if (wanted) return wanted;
  return rows > 4096 && Layout<T, 4, BACKWARD>(r).total <= shared_limit(device) ? 4 : 1;
}

// Lets KERNEL have `smem` bytes; an error where this device has less.
template <typename K>
int allow_shared(K* kernel, int smem, int device) {
  if (const int error = cudaSetDevice(device)) return error;  // this library's own runtime: torch's guard may not reach it
  if (smem > shared_limit(device)) return cudaErrorInvalidConfiguration;
  return smem <= 48 * 1024 ? 0 : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
}

}  // namespace
