// Matrix engine on AVX512_BF16's dot product: bf16 operands, two terms of the depth in each 32-bit lane, fp32 sums.
// For bf16 tensors on CPUs without tiles (where tiles are, they are several times faster).
#pragma once
#include "vec.h"

namespace FP_ISA {

struct EngineBf16 {
  using Elem = uint16_t;
  static constexpr int MR = 8, NV = 3, NP = NV * VL, UNIT = 32, BLOCK_UNITS = 4, K_BLOCK = 1024, DEEP_K_BLOCK = 1024, DEEP_UNITS = 4;

  struct Session {};
  static int64_t pad_k(int64_t k) { return round_up(k, 32); }
  static size_t a_size(int64_t m, int64_t k) { return round_up(m, UNIT) * pad_k(k); }
  static size_t b_size(int64_t k, int64_t n) { return pad_k(k) * round_up(n, NP); }
  static __m512i pack2(vf lo, vf hi) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)hi, (__m512)lo); }

  static void put_a_row(Elem* a, int64_t k, int64_t i, const float* row) {
    for (int64_t j = 0; j < pad_k(k); j += 32) _mm512_storeu_si512(a + i * pad_k(k) + j, pack2(load(row + j), load(row + j + 16)));
  }
  // A[i, kk] = src[kk * ld + i]
  static void put_a_transposed(Elem* a, int64_t k, int64_t m, const float* src, int64_t ld) {
    const int64_t kp = pad_k(k);
    for (int64_t k0 = 0; k0 < kp; k0 += 16)
      for (int64_t i = 0; i < m; ++i)
        for (int64_t kk = k0; kk < k0 + 16; ++kk) {
          bf16 v{};
          if (kk < k) down(src[kk * ld + i], &v);
          a[i * kp + kk] = v.bits;
        }
    zero_a_rows(a, k, m);
  }
  static void zero_a_rows(Elem* a, int64_t k, int64_t m) { memset(a + m * pad_k(k), 0, (round_up(m, MR) - m) * pad_k(k) * 2); }
  // rows kk, kk+1 of B (kk even): one row of pairs
  template <bool STREAM = false> static void put_b_rows(Elem* b, int64_t k, int64_t kk, const float* r0, const float* r1, int64_t n) {
    const int64_t kp = pad_k(k);
    const __m512i index = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i order = _mm512_or_si512(index, _mm512_slli_epi32(_mm512_add_epi32(index, _mm512_set1_epi32(16)), 16));
    for (int64_t j = 0; j < n; j += NP)
      for (int v = 0; v < NP; v += VL)
        _mm512_storeu_si512(b + j * kp + kk * NP + 2 * v, _mm512_permutexvar_epi16(order, pack2(load(r0 + j + v), load(r1 + j + v))));
  }
  // columns n0..n0+15 of B from 16 rows of its transpose
  template <bool STREAM = false> static void put_b_columns(Elem* b, int64_t k, int64_t n0, const float* const* rows) {
    const int64_t kp = pad_k(k);
    for (int64_t k0 = 0; k0 < kp; k0 += 32)
      for (int j = 0; j < 16; ++j) {
        Elem* p = b + (n0 + j) / NP * NP * kp + (n0 + j) % NP * 2;
        uint32_t pairs[16];
        _mm512_storeu_si512(pairs, pack2(load(rows[j] + k0), load(rows[j] + k0 + 16)));
        for (int q = 0; q < 16; ++q) memcpy(p + (k0 / 2 + q) * NP * 2, pairs + q, 4);
      }
  }
  static const Elem* panel(const Elem* b, int64_t k, int64_t j, int64_t k0) { return b + j * NP * pad_k(k) + k0 * NP; }

  static void gemm(const Elem* a, int64_t kb, int64_t m, const Elem* b, int64_t, float* c, bool accumulate) {
    const int64_t kp = pad_k(kb);
    for (int64_t k0 = 0; k0 < kp; k0 += 512) {
      const int64_t depth = kp - k0 < 512 ? kp - k0 : 512;
      for (int64_t i = 0; i < m; i += MR) tile(a + i * kp + k0, kp, b + k0 * NP, depth, c + i * NP, accumulate || k0 > 0);
    }
    if (kp == 0 && !accumulate) memset(c, 0, round_up(m, MR) * NP * 4);
  }
  static void tile(const Elem* __restrict a, int64_t lda, const Elem* __restrict b, int64_t depth, float* __restrict c, bool accumulate) {
    __m512 acc[MR][NV] = {};
    for (int64_t kk = 0; kk < depth; kk += 2, b += 2 * NP, a += 2) {
      __m512bh bv[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) bv[v] = (__m512bh)_mm512_loadu_si512(b + v * 2 * VL);
#pragma GCC unroll 8
      for (int r = 0; r < MR; ++r) {
        int32_t pair;
        memcpy(&pair, a + r * lda, 4);
        const __m512bh av = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], av, bv[v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const vf s = (vf)acc[r][v];
        store(c + r * NP + v * VL, accumulate ? load(c + r * NP + v * VL) + s : s);
      }
  }
};

}  // namespace FP_ISA
