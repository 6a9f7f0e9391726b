// Compaction: rows gathered, put back and added up, with a count that may be data on the device. No float atomics.
// Taken only by name (backend="cuda"); not timed.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "cuda/fastpetl_cuda.h"
#include "cuda/launch.cuh"

namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;

__device__ __forceinline__ int64_t limit(const int64_t* count, int64_t m) {
  if (!count) return m;
  return *count < 0 ? 0 : *count < m ? *count : m;
}

// An entry outside [0, n) ends the kernel with an error, as torch's own indexing does.
__device__ __forceinline__ int64_t checked(int64_t i, int64_t n) {
  if (i < 0 || i >= n) __trap();
  return i;
}

// One row per warp and turn, in units of U.
template <typename U>
__global__ void __launch_bounds__(THREADS) gather(const U* x, const int64_t* index, const int64_t* count, U* y,
                                                  int64_t n, int64_t m, int64_t units) {
  const int64_t kept = limit(count, m);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32; i < m; i += int64_t{gridDim.x} * WARPS) {
    const U* from = i < kept ? x + checked(index[i], n) * units : nullptr;
    for (int64_t c = threadIdx.x & 31; c < units; c += 32) y[i * units + c] = from ? from[c] : U{};
  }
}

template <typename U>
__global__ void __launch_bounds__(THREADS) scatter(const U* rows, const int64_t* index, const int64_t* count, U* y,
                                                   int64_t n, int64_t m, int64_t units) {
  const int64_t kept = limit(count, m);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32; i < kept; i += int64_t{gridDim.x} * WARPS) {
    U* to = y + checked(index[i], n) * units;
    for (int64_t c = threadIdx.x & 31; c < units; c += 32) to[c] = rows ? rows[i * units + c] : U{};
  }
}

// A block owns BINS rows of y. It reads the index from front to back, lists the entries that fall into its rows, and
// adds those in their order: each column has one thread, so the sum has one order. In fp32: in bf16 a sum of ones would
// stop at 256.
constexpr int BINS = 32;
template <typename T>
__global__ void __launch_bounds__(THREADS) add(const T* rows, const int64_t* index, const int64_t* count, float* y,
                                               int64_t n, int64_t m, int64_t d) {
  FP_DYN_SMEM(int, list);  // [THREADS] places in this chunk of the index, in order; behind it each warp's share
  int* shares = list + THREADS;
  const int64_t kept = limit(count, m), first = static_cast<int64_t>(blockIdx.x) * BINS;
  const int64_t last = first + BINS < n ? first + BINS : n;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  for (int64_t i = first * d + threadIdx.x; i < last * d; i += THREADS) y[i] = 0.f;
  __syncthreads();  // a thread clears other columns than it adds to
  for (int64_t chunk = 0; chunk < kept; chunk += THREADS) {
    const int64_t i = chunk + threadIdx.x, row = i < kept ? checked(index[i], n) : -1;
    const bool mine = row >= first && row < last;
    const unsigned found = __ballot_sync(0xffffffffu, mine);
    if (lane == 0) shares[warp] = __popc(found);
    FP_SYNC(FP_LIST);
    int before = __popc(found & ((1u << lane) - 1)), total = 0;
    for (int w = 0; w < WARPS; ++w) before += w < warp ? shares[w] : 0, total += shares[w];
    if (mine) list[before] = threadIdx.x;  // everybody has read the list before: the barrier above
    FP_SYNC(FP_CHUNK);
    for (int k = 0; k < total; ++k) {
      const int64_t from = chunk + list[k], to = index[from];
      for (int64_t c = threadIdx.x; c < d; c += THREADS)
        y[to * d + c] += static_cast<float>(rows[from * d + c]);
    }
  }
}

unsigned blocks(int64_t rows) {
  const int64_t wanted = (rows + WARPS - 1) / WARPS;
  return static_cast<unsigned>(wanted < 4096 ? wanted : 4096);
}
bool fits(const void* a, const void* b, int64_t bytes, int unit) {
  return (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | static_cast<uintptr_t>(bytes)) % unit == 0;
}

}  // namespace

extern "C" int fastpetl_cuda_gather_rows(const void* x, const int64_t* index, const int64_t* count, void* y, int64_t n,
                                         int64_t m, int64_t bytes, int device, void* stream) {
  if (m == 0 || bytes == 0) return cudaSuccess;
  if (const int error = cudaSetDevice(device)) return error;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (fits(x, y, bytes, 16)) {
    FP_LAUNCH((gather<uint4>), blocks(m), THREADS, 0, s, static_cast<const uint4*>(x), index, count,
              static_cast<uint4*>(y), n, m, bytes / 16);
  } else {
    FP_LAUNCH((gather<uint16_t>), blocks(m), THREADS, 0, s, static_cast<const uint16_t*>(x), index, count,
              static_cast<uint16_t*>(y), n, m, bytes / 2);
  }
  return cudaGetLastError();
}

extern "C" int fastpetl_cuda_scatter_rows(const void* rows, const int64_t* index, const int64_t* count, void* y,
                                          int64_t n, int64_t m, int64_t bytes, int device, void* stream) {
  if (m == 0 || bytes == 0) return cudaSuccess;
  if (const int error = cudaSetDevice(device)) return error;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (fits(rows, y, bytes, 16)) {
    FP_LAUNCH((scatter<uint4>), blocks(m), THREADS, 0, s, static_cast<const uint4*>(rows), index, count,
              static_cast<uint4*>(y), n, m, bytes / 16);
  } else {
    FP_LAUNCH((scatter<uint16_t>), blocks(m), THREADS, 0, s, static_cast<const uint16_t*>(rows), index, count,
              static_cast<uint16_t*>(y), n, m, bytes / 2);
  }
  return cudaGetLastError();
}

extern "C" int fastpetl_cuda_add_rows(const void* rows, const int64_t* index, const int64_t* count, float* y, int64_t n,
                                      int64_t m, int64_t d, int dtype, int device, void* stream) {
  if (n == 0 || d == 0) return cudaSuccess;
  if (const int error = cudaSetDevice(device)) return error;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  const unsigned grid = static_cast<unsigned>((n + BINS - 1) / BINS);
  const size_t smem = sizeof(int) * (THREADS + WARPS);
  switch (dtype) {
    case FP_CUDA_F32:
      FP_LAUNCH((add<float>), grid, THREADS, smem, s, static_cast<const float*>(rows), index, count, y, n, m, d);
      return cudaGetLastError();
    case FP_CUDA_F16:
      FP_LAUNCH((add<__half>), grid, THREADS, smem, s, static_cast<const __half*>(rows), index, count, y, n, m, d);
      return cudaGetLastError();
    case FP_CUDA_BF16:
      FP_LAUNCH((add<__nv_bfloat16>), grid, THREADS, smem, s, static_cast<const __nv_bfloat16*>(rows), index, count,
                y, n, m, d);
      return cudaGetLastError();
  }
  return cudaErrorInvalidValue;
}
