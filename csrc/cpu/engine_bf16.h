// Matrix engine on AVX512_BF16's dot product: bf16 operands, two terms of the depth in each 32-bit lane, fp32 sums.
// For bf16 tensors on CPUs without tiles (where tiles are, they are several times faster).
#pragma once
#include "strips.h"
#include "transpose.h"

namespace FP_ISA {

struct EngineBf16 : Strips<EngineBf16, uint16_t> {
  using Elem = uint16_t;
  static constexpr int TOGETHER = 1;  // rows of A that are best packed together
  using InPlace = bf16;  // tensors of this type are read where they lie
  static constexpr int MR = 8, NV = 3, NP = NV * VL, UNIT = 32, BLOCK_UNITS = 4, K_BLOCK = 1024, DEEP_K_BLOCK = 1024, UNITS = 8, DEEP_UNITS = 4;

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
  static void put_b_rows(Elem* b, int64_t k, int64_t kk, const float* r0, const float* r1, int64_t n) {
    const int64_t kp = pad_k(k);
    const __m512i index = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i order = _mm512_or_si512(index, _mm512_slli_epi32(_mm512_add_epi32(index, _mm512_set1_epi32(16)), 16));
    for (int64_t j = 0; j < n; j += NP)
      for (int v = 0; v < NP; v += VL)
        _mm512_storeu_si512(b + j * kp + kk * NP + 2 * v, _mm512_permutexvar_epi16(order, pack2(load(r0 + j + v), load(r1 + j + v))));
  }
  // columns n0..n0+15 of B from 16 rows of its transpose
  static void put_b_columns(Elem* b, int64_t k, int64_t n0, const float* const* rows) {
    const int64_t kp = pad_k(k);
    Elem* p = b + n0 / NP * NP * kp + n0 % NP * 2;
    for (int64_t k0 = 0; k0 < kp; k0 += 32) {
      __m512i v[16], t[16];
      for (int j = 0; j < 16; ++j) v[j] = pack2(load(rows[j] + k0), load(rows[j] + k0 + 16));
      transpose16(v, t);
      for (int j = 0; j < 16; ++j) _mm512_storeu_si512(p + (k0 + 2 * j) * NP, t[j]);
    }
  }
  // a panel of B, of depth k, from NP rows of its transpose
  static void put_panel_turned(Elem* p, int64_t k, const Elem* const* rows) {
    for (int64_t k0 = 0; k0 < k; k0 += 32) {
      const __mmask32 some = k - k0 >= 32 ? ~0u : (1u << (k - k0)) - 1;
      for (int g = 0; g < NP; g += 16) {
        __m512i v[16], t[16];
        for (int j = 0; j < 16; ++j) v[j] = _mm512_maskz_loadu_epi16(some, rows[g + j] + k0);
        transpose16(v, t);
        for (int j = 0; j < 16 && k0 + 2 * j < k; ++j) _mm512_storeu_si512(p + (k0 + 2 * j) * NP + 2 * g, t[j]);
      }
    }
  }
  // two rows of a panel as they lie, the second null behind the last; `left` columns are B's
  static void put_panel_row(Elem* p, const Elem* const* rows, int64_t left) {
    for (int v = 0; v < NP; v += VL) {
      const __mmask16 some = first(left - v);
      __m512i pairs = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, rows[0] + v));
      if (rows[1]) pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, rows[1] + v)), 16));
      _mm512_storeu_si512(p + 2 * v, pairs);
    }
  }
  static const Elem* panel(const Elem* b, int64_t k, int64_t j, int64_t k0) { return b + j * NP * pad_k(k) + k0 * NP; }

  static constexpr int TERMS = 2;
  static constexpr int64_t SLICE = 512;
  // R rows, NVT vectors of columns of A B, with A[r, k] = a[r * row + k]: done(r, v, sums) gets each vector. b: pairs of
  // rows of B, ldb pairs each
  template <int R, int NVT, bool AHEAD = false, class Done>
  static FP_APART void tile(const Elem* __restrict a, int64_t row, int64_t, const Elem* __restrict b, int64_t ldb, int64_t depth, const Done done,
                            const char* ahead = nullptr, int64_t step = 0) {
    __m512 acc[R][NVT] = {};
    for (int64_t kk = 0; kk < depth; kk += 2, b += 2 * ldb, a += 2) {
      if (AHEAD) __builtin_prefetch(ahead, 0, 2), ahead += step;
      __m512bh bv[NVT];
#pragma GCC unroll 4
      for (int v = 0; v < NVT; ++v) bv[v] = (__m512bh)_mm512_loadu_si512(b + v * 2 * VL);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        memcpy(&pair, a + r * row, 4);
        const __m512bh av = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int v = 0; v < NVT; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], av, bv[v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NVT; ++v) done(r, v, (vf)acc[r][v]);
  }
};

}  // namespace FP_ISA
