// Matrix engine on FMA units: fp32 operands whatever the storage type, register tile MR x NP.
// An engine packs A (by rows, or transposed) and B, and multiplies one NP-wide column panel of B at a time:
//   C[m, NP] (+)= A[m, k] B[k, NP].   All engines have the same members; kernels are templates over them.
#pragma once
#include "strips.h"
#include "transpose.h"

namespace FP_ISA {

struct EngineF32 : Strips<EngineF32, float> {
  using Elem = float;
  static constexpr int TOGETHER = 1;  // rows of A that are best packed together
  using InPlace = float;  // tensors of this type are read where they lie
#if defined(__AVX512F__)
  static constexpr int MR = 8, NV = 3;
#elif defined(__AVX2__)
  static constexpr int MR = 4, NV = 3;
#else
  static constexpr int MR = 4, NV = 2;
#endif
  static constexpr int NP = NV * VL, UNIT = 32, BLOCK_UNITS = 4, K_BLOCK = 1024, DEEP_K_BLOCK = 1024, UNITS = 8, DEEP_UNITS = 4;
  static_assert(UNIT % MR == 0, "a row unit must hold whole register tiles");

  struct Session {};  // what a thread must set up before gemm: nothing
  static int64_t pad_k(int64_t k) { return round_up(k, 2); }
  static size_t a_size(int64_t m, int64_t k) { return round_up(m, UNIT) * pad_k(k); }
  static size_t b_size(int64_t k, int64_t n) { return pad_k(k) * round_up(n, NP); }

  static void put_a_row(Elem* a, int64_t k, int64_t i, const float* row) { memcpy(a + i * pad_k(k), row, pad_k(k) * 4); }
  // A[i, kk] = src[kk * ld + i]
  static void put_a_transposed(Elem* a, int64_t k, int64_t m, const float* src, int64_t ld) {
    const int64_t kp = pad_k(k);
    for (int64_t k0 = 0; k0 < kp; k0 += 16)
      for (int64_t i = 0; i < m; ++i)
        for (int64_t kk = k0; kk < kp && kk < k0 + 16; ++kk) a[i * kp + kk] = kk < k ? src[kk * ld + i] : 0.f;
    zero_a_rows(a, k, m);
  }
  static void zero_a_rows(Elem* a, int64_t k, int64_t m) {
    memset(a + m * pad_k(k), 0, (round_up(m, MR) - m) * pad_k(k) * 4);
  }
  // rows kk, kk+1 of B (kk even), n columns, zero-padded to a multiple of 64
  static void put_b_rows(Elem* b, int64_t k, int64_t kk, const float* r0, const float* r1, int64_t n) {
    const int64_t kp = pad_k(k);
    for (int64_t j = 0; j < n; j += NP) {
      float* p = b + j * kp + kk * NP;
      for (int v = 0; v < NV; ++v) {
        store(p + v * VL, load(r0 + j + v * VL));
        store(p + NP + v * VL, load(r1 + j + v * VL));
      }
    }
  }
  // columns n0..n0+15 of B from 16 rows of its transpose, each zero-padded to pad_k
  static void put_b_columns(Elem* b, int64_t k, int64_t n0, const float* const* rows) {
    const int64_t kp = pad_k(k);
    int64_t k0 = 0;
#if defined(__AVX512F__)
    for (float* p = b + n0 / NP * NP * kp + n0 % NP; k0 + 16 <= kp; k0 += 16) {
      __m512i v[16], t[16];
      for (int j = 0; j < 16; ++j) v[j] = (__m512i)load(rows[j] + k0);
      transpose16(v, t);
      for (int j = 0; j < 16; ++j) store(p + (k0 + j) * NP, (vf)t[j]);
    }
#endif
    for (; k0 < kp; k0 += 16)
      for (int j = 0; j < 16; ++j) {
        float* p = b + (n0 + j) / NP * NP * kp + (n0 + j) % NP;
        for (int64_t kk = k0; kk < kp && kk < k0 + 16; ++kk) p[kk * NP] = rows[j][kk];
      }
  }
  // a panel of B, of depth k, from NP rows of its transpose
  static void put_panel_turned(Elem* p, int64_t k, const float* const* rows) {
    int64_t k0 = 0;
#if defined(__AVX512F__)
    for (; k0 + 16 <= k; k0 += 16)
      for (int g = 0; g < NP; g += 16) {
        __m512i v[16], t[16];
        for (int j = 0; j < 16; ++j) v[j] = (__m512i)load(rows[g + j] + k0);
        transpose16(v, t);
        for (int j = 0; j < 16; ++j) store(p + (k0 + j) * NP + g, (vf)t[j]);
      }
#endif
    for (; k0 < k; ++k0)
      for (int j = 0; j < NP; ++j) p[k0 * NP + j] = rows[j][k0];
  }
  // row k of a panel as it lies, of which `left` columns are B's
  static void put_panel_row(Elem* p, const float* const* row, int64_t left) {
    for (int v = 0; v < NV; ++v) store(p + v * VL, load(row[0] + v * VL, left - v * VL));
  }
  static const Elem* panel(const Elem* b, int64_t k, int64_t j, int64_t k0) { return b + j * NP * pad_k(k) + k0 * NP; }

  static constexpr int TERMS = 1;
  static constexpr int64_t SLICE = 256;
  // R rows, NVT vectors of columns of A B, with A[r, k] = a[r * row + k * col]: done(r, v, sums) gets each vector
  template <int R, int NVT, bool AHEAD = false, class Done>
  static FP_APART void tile(const float* __restrict a, int64_t row, int64_t col, const float* __restrict b, int64_t ldb, int64_t depth, const Done done,
                   const char* ahead = nullptr, int64_t step = 0) {
    vf acc[R][NVT] = {};
    for (int64_t kk = 0; kk < depth; ++kk, b += ldb, a += col) {
      if (AHEAD) __builtin_prefetch(ahead, 0, 2), ahead += step;
      vf bv[NVT];
#pragma GCC unroll 4
      for (int v = 0; v < NVT; ++v) bv[v] = load(b + v * VL);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vf av = splat(a[r * row]);
#pragma GCC unroll 4
        for (int v = 0; v < NVT; ++v) acc[r][v] = fma(av, bv[v], acc[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NVT; ++v) done(r, v, acc[r][v]);
  }
  // A matrix is read where it lies, wherever that pays: vectors are wide
  static constexpr bool DIRECT = VL == 16;
};

}  // namespace FP_ISA
