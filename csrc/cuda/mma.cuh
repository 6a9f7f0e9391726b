// Warp-level products of tiles in shared memory: tensor cores for fp16 and bf16, FMA for fp32, all with the fragment
// layout of mma.m16n8k16's accumulator, so that the kernels above are written once. The wrappers around PTX are
// emulated lane by lane by tests/build/cuda_host.h where there is no GPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#ifdef __CUDACC__
__device__ __forceinline__ uint32_t fp_shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void fp_ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(fp_shared_address(row)));
}
__device__ __forceinline__ void fp_ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(fp_shared_address(row)));
}
#define FP_MMA(NAME, TYPE)                                                                                            \
  __device__ __forceinline__ void NAME(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {             \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                               \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                         \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                     \
  }
FP_MMA(fp_mma_bf16_16816, "bf16")
FP_MMA(fp_mma_f16_16816, "f16")
#undef FP_MMA
__device__ __forceinline__ void fp_cp_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(fp_shared_address(shared)), "l"(global) : "memory");
}
__device__ __forceinline__ void fp_cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void fp_cp_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#endif

namespace {

__device__ __forceinline__ void mma(__nv_bfloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  fp_mma_bf16_16816(d, a, b0, b1);
}
__device__ __forceinline__ void mma(__half, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  fp_mma_f16_16816(d, a, b0, b1);
}

// acc += a b^T for one warp: a [16, k] and b [16 * pairs, k], or with KN b [k, 16 * pairs], in shared memory; k is a
// multiple of 16. The warp owns the column pairs first, first + step, ... below `pairs`: acc[p][half][i] is row
// lane/4 + 8*(i/2), column 16*pair + 8*half + 2*(lane%4) + i%2.
template <bool KN, typename T, int PAIRS>
__device__ __forceinline__ void multiply(float (&acc)[PAIRS][2][4], const T* a, int lda, const T* b, int ldb, int k,
                                         int first, int step, int pairs) {
  const int lane = threadIdx.x & 31, eight = lane >> 3;  // of the four 8x8 matrices, the one whose row this lane names
  const T* a_row = a + (lane & 15) * lda + (lane >> 4) * 8;
  const T* b_row = KN ? b + ((eight & 1) * 8 + (lane & 7)) * ldb + (eight >> 1) * 8
                      : b + ((eight >> 1) * 8 + (lane & 7)) * ldb + (eight & 1) * 8;
  for (int kk = 0; kk < k; kk += 16) {
    uint32_t fa[4], fb[4];
    fp_ldmatrix_x4(fa, a_row + kk);
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
      const int pair = first + p * step;
      if (pair >= pairs) break;
      if (KN) {
        fp_ldmatrix_x4_trans(fb, b_row + kk * ldb + pair * 16);
      } else {
        fp_ldmatrix_x4(fb, b_row + pair * 16 * ldb + kk);
      }
      mma(T{}, acc[p][0], fa, fb[0], fb[1]);
      mma(T{}, acc[p][1], fa, fb[2], fb[3]);
    }
  }
}

// fp32, by FMA. At most 32 products are summed in one go, and these sums are added up: a single sum over all of k has
// three times the error, more than twice that of torch's product of a row, which is summed as a tree. One pair after the
// other, with a read again for each: the sums of all of them would spill.
template <bool KN, int PAIRS>
__device__ __forceinline__ void multiply(float (&acc)[PAIRS][2][4], const float* a, int lda, const float* b, int ldb,
                                         int k, int first, int step, int pairs) {
  const int lane = threadIdx.x & 31, row = lane >> 2, column = (lane & 3) * 2;
  for (int k0 = 0; k0 < k; k0 += 32) {
    const int end = k0 + 32 < k ? k0 + 32 : k;
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
      const int pair = first + p * step;
      if (pair >= pairs) break;
      float sum[2][4] = {};
#pragma unroll 1
      for (int kk = k0; kk < end; kk += 4) {
        const float4 low = *reinterpret_cast<const float4*>(a + row * lda + kk);
        const float4 high = *reinterpret_cast<const float4*>(a + (row + 8) * lda + kk);
        const float al[4] = {low.x, low.y, low.z, low.w}, ah[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int n = pair * 16 + half * 8 + column;
          float b0[4], b1[4];
          if (KN) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float2 both = *reinterpret_cast<const float2*>(b + (kk + i) * ldb + n);
              b0[i] = both.x, b1[i] = both.y;
            }
          } else {
            const float4 left = *reinterpret_cast<const float4*>(b + n * ldb + kk);
            const float4 right = *reinterpret_cast<const float4*>(b + (n + 1) * ldb + kk);
            b0[0] = left.x, b0[1] = left.y, b0[2] = left.z, b0[3] = left.w;
            b1[0] = right.x, b1[1] = right.y, b1[2] = right.z, b1[3] = right.w;
          }
          float(&d)[4] = sum[half];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            d[0] += al[i] * b0[i], d[1] += al[i] * b1[i], d[2] += ah[i] * b0[i], d[3] += ah[i] * b1[i];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) acc[p][i / 4][i % 4] += sum[i / 4][i % 4];
    }
  }
}

}  // namespace
