// What all kernels share: parameters as floats, operands packed for an engine, rows of a panelled product.
#pragma once
#include "norm_rows.h"

namespace FP_ISA {

// A vector of parameters as floats, zero-padded; null stays null
template <class T> static float* load_vector(int slot, const void* p, int64_t n) {
  if (!p) return nullptr;
  float* out = scratch<float>(slot, round_up(n, 64) + 64);
  load_row((const T*)p, out, n, round_up(n, 64));
  return out;
}

// B[k, n] from rows of its transpose: at(j), j < n, points at row j. Groups of 16 columns [begin, end). factor: null, or
// what row k of B is multiplied by, zero-padded.
template <class E> static int64_t column_groups(int64_t n) { return round_up(n, E::NP) / 16 + (E::NP % 16 != 0); }
template <class E> static int64_t columns_size(int64_t k, int64_t n) { return E::b_size(k, column_groups<E>(n) * 16); }
template <class E, class At>
static void pack_columns(typename E::Elem* out, int64_t k, int64_t n, int64_t begin, int64_t end, const At& at, const float* factor = nullptr) {
  const int64_t width = E::pad_k(k) + 64;
  float* tmp = scratch<float>(15, 16 * width);
  for (int64_t g = begin; g < end; ++g) {
    const float* rows[16];
    for (int j = 0; j < 16; ++j) {
      float* row = tmp + j * width;
      if (g * 16 + j < n) load_row(at(g * 16 + j), row, k, E::pad_k(k));
      else memset(row, 0, width * 4);
      for (int64_t i = 0; factor && i < k; i += VL) store(row + i, load(row + i) * load(factor + i));
      rows[j] = row;
    }
    E::put_b_columns(out, k, g * 16, rows);
  }
}
// B[k, n] from its rows: at(i), i < k, points at row i. Pairs of rows [begin, end) of pad_k(k) / 2.
template <class E, class At>
static void pack_rows(typename E::Elem* out, int64_t k, int64_t n, int64_t begin, int64_t end, const At& at) {
  const int64_t width = round_up(n, E::NP) + 64;
  float* tmp = scratch<float>(15, 2 * width);
  for (int64_t p = begin; p < end; ++p) {
    for (int j = 0; j < 2; ++j) {
      if (2 * p + j < k) load_row(at(2 * p + j), tmp + j * width, n, width);
      else memset(tmp + j * width, 0, width * 4);
    }
    E::put_b_rows(out, k, 2 * p, tmp, tmp + width, n);
  }
}

// Rows of A that are made one at a time, in at(i), with zeros up to pad_k(k), and go to the engine as many together as it
// takes: i = 0, 1, ... m - 1.
template <class E> struct RowsOfA {
  static constexpr int TOGETHER = E::TOGETHER;
  typename E::Elem* a;
  int64_t k, m, width;
  float* rows;
  RowsOfA(typename E::Elem* a, int64_t k, int64_t m, int64_t width, int slot) : a(a), k(k), m(m), width(width), rows(scratch<float>(slot, TOGETHER * width)) {}
  FP_INLINED float* at(int64_t i) const { return rows + i % TOGETHER * width; }
  // row i is there, from element `skip` on
  FP_INLINED void put(int64_t i, int64_t skip = 0) const {
    if constexpr (TOGETHER == 1) return E::put_a_row(a, k, i, rows + skip);
    else if (i % TOGETHER == TOGETHER - 1 || i + 1 == m) whole(i - i % TOGETHER, i % TOGETHER + 1, rows + skip);
  }
  void whole(int64_t first, int64_t count, const float* from) const {
    if constexpr (TOGETHER > 1)
      E::put_a_rows(a, k, first, count, [=](int64_t i, int64_t j, int64_t) FP_INLINED { return load(from + i * width + j); });
  }
};

// Items per parallel task: waking threads for less than about 20 us of work costs more than it gives
static int64_t grain(double flops_per_item) { return 1 + (int64_t)(4e6 / (flops_per_item + 1)); }

// A product [m, n] is kept as column panels [panel][rows][E::NP], panel_size floats each.
template <class E> static int64_t panel_size(int64_t m) { return round_up(m, E::UNIT) * E::NP; }
template <class E> static int64_t product_size(int64_t m, int64_t n) { return round_up(m, E::UNIT) * round_up(n, E::NP); }
template <class E>
static void multiply(const typename E::Elem* a, int64_t k, int64_t m, const typename E::Elem* b, int64_t n, float* c, bool accumulate = false) {
  for (int64_t j = 0; j * E::NP < n; ++j) E::gemm(a, k, m, E::panel(b, k, j, 0), k, c + j * panel_size<E>(m), accumulate);
}
// its row i up to the panel's end or, if that is farther, to where put_a_row reads a row of n; behind n there are zeros
template <class E> FP_INLINE void gather_row(const float* c, int64_t m, int64_t i, float* row, int64_t n) {
  for (int64_t j = round_up(n, E::NP); j < E::pad_k(n); j += VL) store(row + j, vf{});
  for (int64_t j = 0; j < n; j += E::NP) {
    const float* p = c + j / E::NP * panel_size<E>(m) + i * E::NP;
    for (int v = 0; v < E::NP; v += VL) store(row + j + v, load(p + v));
  }
}

}  // namespace FP_ISA
