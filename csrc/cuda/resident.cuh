// What the kernels with resident rows share. A warp owns 16 rows: thread 4 i + t of it owns the columns 32 c + 8 t ...
// + 7 of its rows i and i + 8, in shared memory and in every access to memory, 16 bytes at a time. No other thread
// reads them, so that rows need no barrier at all; only the weights are shared by the block.
//
// mma.m16n8k16 wants a thread to hold the pairs 2 t, 2 t + 1 of each eight columns. A sum over k does not care about k's
// order, so pair j of a thread's eight columns is taken for its pair in k-tile j, of the rows and the weights alike: what
// ldmatrix would gather is then one 16-byte load. Rows of the weights (columns of the result) are put into shared memory
// in the order that gives a thread eight neighbouring results (`shuffled`), which is again the order above: a product's
// result is the next one's operand without leaving registers.
#pragma once
#include "cuda/tile.cuh"

namespace {

#ifdef __CUDACC__
// 16 bytes on their way into shared memory; zeros where `valid` is not set (nothing is read then).
__device__ __forceinline__ void fp_cp_async16_or_zero(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(fp_shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
// The line of 128 bytes on its way into the second-level cache.
__device__ __forceinline__ void fp_prefetch(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}
#endif

struct alignas(16) Eight {  // eight numbers of two bytes, as pairs
  uint32_t pair[4];
};

template <typename T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {  // bf16 is the upper half of an fp32: one instruction a number
  __device__ static float2 wide(uint32_t both) { return {bits(both << 16), bits(both & 0xffff0000u)}; }
  __device__ static uint32_t narrow(float a, float b) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  __device__ static float bits(uint32_t v) { return *reinterpret_cast<const float*>(&v); }
};
template <>
struct Pair<__half> {
  __device__ static float2 wide(uint32_t both) { return __half22float2(*reinterpret_cast<const __half2*>(&both)); }
  __device__ static uint32_t narrow(float a, float b) {
    const __half2 v = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
};

template <typename T>
__device__ __forceinline__ void widen(const Eight& from, float (&to)[8]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 both = Pair<T>::wide(from.pair[j]);
    to[2 * j] = both.x, to[2 * j + 1] = both.y;
  }
}
template <typename T>
__device__ __forceinline__ Eight narrow(const float (&from)[8]) {
  Eight to;
#pragma unroll
  for (int j = 0; j < 4; ++j) to.pair[j] = Pair<T>::narrow(from[2 * j], from[2 * j + 1]);
  return to;
}
// As a vector of CUDA's: of a struct the compiler makes four accesses.
__device__ __forceinline__ Eight eight(const void* p, int64_t element = 0) {
  const uint4 v = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p) + element);
  return {v.x, v.y, v.z, v.w};
}
// Of an operand that no thread writes: the compiler may ask for it ahead of stores.
__device__ __forceinline__ Eight operand(const void* p, int64_t element) {
#ifdef __CUDACC__
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p) + element));
  return {v.x, v.y, v.z, v.w};
#else
  return eight(p, element);
#endif
}
__device__ __forceinline__ void put(void* p, int64_t element, const Eight& v) {
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p) + element) = make_uint4(v.pair[0], v.pair[1], v.pair[2], v.pair[3]);
}

// Where row n of 32 rows of weights lies: 8 a + 2 j + e at 8 j + 2 a + e.
__device__ __forceinline__ int shuffled(int n) { return 8 * (n % 8 / 2) + 2 * (n / 8) + n % 2; }

// The sum over the four threads of a row.
__device__ __forceinline__ float row_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// Two k-steps of 16 for 32 columns: acc[n] += a b[n], with a the eights of rows i and i + 8, b those of the weights' rows,
// `stride` elements apart. Four sums take turns: the next step of one would wait for its last.
template <typename T>
__device__ __forceinline__ void mma32(float (*acc)[4], const Eight& low, const Eight& high, const uint16_t* w, int stride) {
  const uint32_t first[4] = {low.pair[0], high.pair[0], low.pair[1], high.pair[1]};
  const uint32_t second[4] = {low.pair[2], high.pair[2], low.pair[3], high.pair[3]};
  Eight b[4];
#pragma unroll
  for (int n = 0; n < 4; ++n) b[n] = eight(w, n * stride);
#pragma unroll
  for (int n = 0; n < 4; ++n) mma(T{}, acc[n], first, b[n].pair[0], b[n].pair[1]);
#pragma unroll
  for (int n = 0; n < 4; ++n) mma(T{}, acc[n], second, b[n].pair[2], b[n].pair[3]);
}

// act(z) of eight numbers. One way for all of them: a choice for each is code enough to miss the instruction cache.
__device__ __forceinline__ void activate(float (&z)[8], int activation) {
  switch (activation) {
#define FP_EIGHT(CODE)                                      \
  case CODE:                                                \
    for (int e = 0; e < 8; ++e) z[e] = activate(z[e], CODE); \
    break
    FP_EIGHT(1);
    FP_EIGHT(2);
    FP_EIGHT(3);
    FP_EIGHT(4);
#undef FP_EIGHT
  }
}

// A row's mean and 1/std in one pass, of numbers moved by about their mean: `shift` is the mean of a part of the row, so
// at most std * sqrt(row / part) off, and the squares lose no more digits than that.
struct Moving {
  float shift = 0.f, sum = 0.f, squares = 0.f;
  __device__ void add(float x) {
    const float v = x - shift;
    sum += v, squares += v * v;
  }
  __device__ Moments finish(int d, bool rms, float eps) const {
    const float mean = row_sum(sum) / d, square = row_sum(squares) / d;
    const float variance = rms ? square : square - mean * mean;
    return {rms ? 0.f : shift + mean, rsqrtf((variance < 0.f ? 0.f : variance) + eps)};  // NaN stays
  }
};

// Bottlenecks in groups of 32 columns, G of them, W warps, d a multiple of 64: the block's rows, then STAGES of weights.
template <int G, int W>
struct Room {
  static constexpr int R = 32 * G, BM = 16 * W, THREADS = 32 * W;
  static constexpr int STAGES = G <= 3 ? 5 : G == 4 ? 4 : 2;
  static constexpr int STAGE = 32 * R;  // elements of a chunk: [R, 32] or [32, R]
  static int bytes(int d) { return 2 * (BM * d + STAGES * STAGE); }
};

// What this thread copies of every chunk of the weights, 16 bytes at a time: where from, and where to in a stage.
// Columns: w [r, d] as [R, 32], rows shuffled; 64 bytes a row, so that two rows fill the banks.
// Rows: w [d, r] as [32, R], rows shuffled; with an even G the odd rows' halves change places, for the banks' sake.
template <int G, int W>
struct Copies {
  using M = Room<G, W>;
  static constexpr int N = (4 * M::R + M::THREADS - 1) / M::THREADS;
  const uint16_t* from[N];
  int to[N], step;  // step: elements from one chunk to the next
  unsigned valid = 0;

  __device__ void columns(const void* w, int r, int d) {
    step = 32;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const int i = threadIdx.x + k * M::THREADS, n = i / 4, q = i % 4;
      const bool there = n < r;
      from[k] = static_cast<const uint16_t*>(w) + (there ? static_cast<int64_t>(n) * d + 8 * q : 0);
      to[k] = (n / 32 * 32 + shuffled(n % 32)) * 32 + 8 * q;
      valid |= there << k;
    }
  }
  __device__ void rows(const void* w, int r) {
    step = 32 * r;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const int i = threadIdx.x + k * M::THREADS, n = i / (4 * G), q = i % (4 * G);
      const bool there = 8 * q < r;
      from[k] = static_cast<const uint16_t*>(w) + (there ? n * r + 8 * q : 0);
      to[k] = shuffled(n) * M::R + 8 * (G % 2 ? q : q ^ (n & 1) << 2);
      valid |= there << k;
    }
  }
  // The next chunk into `stage`.
  __device__ void copy(uint16_t* stage) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (N * M::THREADS == 4 * M::R || threadIdx.x + k * M::THREADS < 4 * M::R)
        fp_cp_async16_or_zero(stage + to[k], from[k], valid >> k & 1);
      from[k] += step;
    }
  }
};

}  // namespace
