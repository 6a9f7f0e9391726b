// Matrix engine on FMA units: fp32 operands whatever the storage type, register tile MR x NP.
// An engine packs A (by rows, or transposed) and B, and multiplies one NP-wide column panel of B at a time:
//   C[m, NP] (+)= A[m, k] B[k, NP].   All engines have the same members; kernels are templates over them.
#pragma once
#include "ahead.h"
#include "transpose.h"

namespace FP_ISA {

struct EngineF32 {
  using Elem = float;
#if defined(__AVX512F__)
  static constexpr int MR = 8, NV = 3;
#elif defined(__AVX2__)
  static constexpr int MR = 4, NV = 3;
#else
  static constexpr int MR = 4, NV = 2;
#endif
  static constexpr int NP = NV * VL, UNIT = 32, BLOCK_UNITS = 4, K_BLOCK = 1024, DEEP_K_BLOCK = 1024, DEEP_UNITS = 4;
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
  template <bool STREAM = false> static void put_b_rows(Elem* b, int64_t k, int64_t kk, const float* r0, const float* r1, int64_t n) {
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
  template <bool STREAM = false> static void put_b_columns(Elem* b, int64_t k, int64_t n0, const float* const* rows) {
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
  static const Elem* panel(const Elem* b, int64_t k, int64_t j, int64_t k0) { return b + j * NP * pad_k(k) + k0 * NP; }

  struct Left { const float* p; int64_t row, col; };  // A[r, k] = p[r * row + k * col]
  // C has leading dimension NP and round_up(m, MR) rows; b comes from panel(); kb is the packed depth of A.
  // The depth is cut into slices whose sums are added to C: rounding errors grow with the slice, not with the depth.
  static constexpr int64_t SLICE = 256;
  static void gemm(const Elem* a, int64_t kb, int64_t m, const Elem* b, int64_t, float* c, bool accumulate) {
    const int64_t kp = pad_k(kb);
    for (int64_t k0 = 0; k0 < kp; k0 += SLICE) {
      const int64_t depth = kp - k0 < SLICE ? kp - k0 : SLICE;
      const Left at = {a + k0, kp, 1};
      if (accumulate || k0 > 0) slice<MR, NV>(at, round_up(m, MR), b + k0 * NP, NP, depth, nullptr, Into<true>{c, NP});
      else slice<MR, NV>(at, round_up(m, MR), b + k0 * NP, NP, depth, nullptr, Into<false>{c, NP});
    }
    if (kp == 0 && !accumulate) memset(c, 0, round_up(m, MR) * NP * 4);
  }
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
  // C = those sums or, where ADD, += them
  template <bool ADD> struct Into {
    static constexpr bool ADDS = ADD;
    float* c;
    int64_t ldc;
    FP_INLINED vf sum(int r, int v, vf s) const { return ADD ? load(c + r * ldc + v * VL) + s : s; }
    FP_INLINED void operator()(int r, int v, vf s) const { store(c + r * ldc + v * VL, sum(r, v, s)); }
    Into at(int64_t i) const { return {c + i * ldc, ldc}; }
  };
  // Those sums, of C's row `row` and the rows behind it, go to finish(row, vector, sums)
  template <bool ADD, class Finish> struct Finished {
    Into<ADD> into;
    int64_t row;
    const Finish& finish;
    FP_INLINED void operator()(int r, int v, vf s) const { finish(row + r, v, into.sum(r, v, s)); }
    Finished at(int64_t i) const { return {into.at(i), row + i, finish}; }
  };

  // The same on plain matrices: A is read where it lies, nothing is packed, nothing behind row m is touched.
  static constexpr bool DIRECT = VL == 16;
  struct Stored {};  // no finish: sums go to C
  // C[m, NVT vectors] (+)= A[m, k] B[k, ...]. Or finish(row, vector, sums) gets the whole sums while they are in
  // registers; C then holds only those of the slices before the last.
  template <int R, int NVT, class Finish = Stored>
  static void strip(Left a, int64_t m, const float* b, int64_t ldb, int64_t k, float* c, int64_t ldc, bool accumulate, Ahead* ahead = nullptr,
                    const Finish& finish = {}) {
    for (int64_t k0 = 0; k0 < k || k0 == 0; k0 += SLICE) {
      const int64_t depth = k - k0 < SLICE ? k - k0 : SLICE;
      const Left at = {a.p + k0 * a.col, a.row, a.col};
      auto run = [&](auto into) {
        if constexpr (std::is_same<Finish, Stored>::value) slice<R, NVT>(at, m, b + k0 * ldb, ldb, depth, ahead, into);
        else if (k0 + depth < k) slice<R, NVT>(at, m, b + k0 * ldb, ldb, depth, ahead, into);
        else slice<R, NVT>(at, m, b + k0 * ldb, ldb, depth, ahead, Finished<decltype(into)::ADDS, Finish>{into, 0, finish});
      };
      if (accumulate || k0 > 0) run(Into<true>{c, ldc});
      else run(Into<false>{c, ldc});
    }
  }
  template <int R, int NVT, class Done>
  static void slice(Left a, int64_t m, const float* b, int64_t ldb, int64_t depth, Ahead* ahead, const Done& done) {
    int64_t i = 0;
    for (; ahead && ahead->more() && i + R <= m; i += R) {
      if (!ahead->now()) {
        tile<R, NVT>(a.p + i * a.row, a.row, a.col, b, ldb, depth, done.at(i));
        continue;
      }
      const Ahead::Part part = ahead->take(depth);
      tile<R, NVT, true>(a.p + i * a.row, a.row, a.col, b, ldb, depth, done.at(i), part.p, part.step);
    }
    for (; i + R <= m; i += R) tile<R, NVT>(a.p + i * a.row, a.row, a.col, b, ldb, depth, done.at(i));
    for (; i + 4 <= m; i += 4) tile<4, NVT>(a.p + i * a.row, a.row, a.col, b, ldb, depth, done.at(i));
    for (; i < m; ++i) tile<1, NVT>(a.p + i * a.row, a.row, a.col, b, ldb, depth, done.at(i));
  }
  // C[m, n] (+)= A[m, k] B with B packed in panels. C's panels lie `panel` floats apart, rows ldc: row-major is (ld, NP).
  static void product(Left a, int64_t m, int64_t k, const Elem* b, int64_t n, float* c, int64_t ldc, int64_t panel, bool accumulate = false,
                      Ahead* ahead = nullptr) {
    for (int64_t j = 0; j * NP < n; ++j) strip<MR, NV>(a, m, b + j * NP * pad_k(k), NP, k, c + j * panel, ldc, accumulate, ahead);
  }
  static int64_t steps(int64_t m, int64_t k, int64_t n) { return m / MR * k * ((n + NP - 1) / NP); }  // of one product
};

}  // namespace FP_ISA
