// What engines with a register tile on plain vectors share. An operand A is read where it lies; B is a packed panel, or
// any matrix where the tile takes one term at a time; nothing behind row m is touched.
// E has: Elem, MR, NV, NP, TERMS (of the depth in one step of the tile), SLICE, pad_k, tile.
#pragma once
#include "ahead.h"

namespace FP_ISA {

template <class E, class Elem> struct Strips {
  struct Left { const Elem* p; int64_t row, col; };  // A[r, k] = p[r * row + k * col]; col is 1 where TERMS is not
  // C = a tile's sums or, where ADD, += them
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
  struct Stored {};  // no finish: sums go to C

  // C[m, NP] (+)= A B; C has round_up(m, MR) rows, b comes from panel(), kb is the packed depth of A.
  // The depth is cut into slices whose sums are added to C: rounding errors grow with the slice, not with the depth.
  static void gemm(const Elem* a, int64_t kb, int64_t m, const Elem* b, int64_t, float* c, bool accumulate) {
    const int64_t kp = E::pad_k(kb);
    strip<E::MR, E::NV>({a, kp, 1}, round_up(m, E::MR), b, E::NP, kp, c, E::NP, accumulate);
  }
  // C[m, NVT vectors] (+)= A[m, k] B[k, ...]. Or finish(row, vector, sums) gets the whole sums while they are in
  // registers; C then holds only those of the slices before the last.
  template <int R, int NVT, class Finish = Stored>
  static void strip(Left a, int64_t m, const Elem* b, int64_t ldb, int64_t k, float* c, int64_t ldc, bool accumulate, Ahead* ahead = nullptr,
                    const Finish& finish = {}) {
    for (int64_t k0 = 0; k0 < k || k0 == 0; k0 += E::SLICE) {
      const int64_t depth = k - k0 < E::SLICE ? k - k0 : E::SLICE;
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
  static void slice(Left a, int64_t m, const Elem* b, int64_t ldb, int64_t depth, Ahead* ahead, const Done& done) {
    int64_t i = 0;
    for (; ahead && ahead->more() && i + R <= m; i += R) {
      if (!ahead->now()) {
        E::template tile<R, NVT>(a.p + i * a.row, a.row, a.col, b, ldb, depth, done.at(i));
        continue;
      }
      const Ahead::Part part = ahead->take(depth / E::TERMS);
      E::template tile<R, NVT, true>(a.p + i * a.row, a.row, a.col, b, ldb, depth, done.at(i), part.p, part.step);
    }
    for (; i + R <= m; i += R) E::template tile<R, NVT>(a.p + i * a.row, a.row, a.col, b, ldb, depth, done.at(i));
    for (; i + 4 <= m; i += 4) E::template tile<4, NVT>(a.p + i * a.row, a.row, a.col, b, ldb, depth, done.at(i));
    for (; i < m; ++i) E::template tile<1, NVT>(a.p + i * a.row, a.row, a.col, b, ldb, depth, done.at(i));
  }
  // C[m, n] (+)= A[m, k] B with B packed in panels. C's panels lie `panel` floats apart, rows ldc: row-major is (ld, NP).
  static void product(Left a, int64_t m, int64_t k, const Elem* b, int64_t n, float* c, int64_t ldc, int64_t panel, bool accumulate = false,
                      Ahead* ahead = nullptr) {
    for (int64_t j = 0; j * E::NP < n; ++j)
      strip<E::MR, E::NV>(a, m, b + j * E::NP * E::pad_k(k), E::NP, k, c + j * panel, ldc, accumulate, ahead);
  }
  static int64_t steps(int64_t m, int64_t k, int64_t n) { return m / E::MR * k / E::TERMS * ((n + E::NP - 1) / E::NP); }  // of one product
};

}  // namespace FP_ISA
