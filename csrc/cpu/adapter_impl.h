// The adapter site, forward. Per block of rows: LN -> down -> act -> up -> scale, biases, residuals -> the trailing norm;
// only x, the residuals, y and n touch memory.
#pragma once
#include "adapter_direct_impl.h"

namespace FP_ISA {

template <class T, class E> struct AdapterBase {
  using Elem = typename E::Elem;

  // Nothing to convert: rows go as they are (adapter_direct_impl.h)
  static constexpr bool PLAIN = std::is_same<T, float>::value && std::is_same<Elem, float>::value;

  template <class Body> static void row_blocks(const PackedWeights<T, E>& w, int64_t rows, int64_t d, int64_t r, const Body& body) {
    parallel((rows + E::UNIT - 1) / E::UNIT, grain(4. * E::UNIT * d * (r + 16)), [&](int64_t begin, int64_t end) {
      typename E::Session session;
      (void)session;
      const auto view = w.view();
      for (int64_t u = begin; u < end; u += E::BLOCK_UNITS) {
        const int64_t r0 = u * E::UNIT, r1 = (u + E::BLOCK_UNITS < end ? u + E::BLOCK_UNITS : end) * E::UNIT;
        body(view, r0, (r1 < rows ? r1 : rows) - r0);
      }
    });
  }
};

template <class T, class E> struct AdapterForward : AdapterBase<T, E> {
  using Elem = typename E::Elem;

  static void run(const fp_adapter_forward& p) {
    const int64_t d = p.d, r = p.r;
    const AdapterVectors v = {load_vector<T>(Slot::GAMMA, p.norm_weight, d), load_vector<T>(Slot::BETA, p.norm_bias, d),
                              load_or_zeros(Slot::B_DOWN, p.b_down, r, 1.f), load_or_zeros(Slot::B_UP, p.b_up, d, p.scale),
                              load_vector<T>(Slot::TAIL_GAMMA, p.tail_weight, d), load_vector<T>(Slot::TAIL_BETA, p.tail_bias, d)};
    constexpr bool plain = AdapterForward::PLAIN;
    const PackedWeights<T, E> w({Slot::W_DOWN, p.w_down, r, d, true}, {Slot::W_UP, p.w_up, d, r, true},
                                {plain ? v.gamma : nullptr, v.beta, plain ? v.b_down : nullptr}, p.rows);
    if constexpr (plain)
      DirectAdapter<E>::forward(p, w, [&](int64_t row, float* u) { finish_row(p, v, row, u, E::NP, u); });
    else
      AdapterForward::row_blocks(w, p.rows, d, r, [&](const auto& view, int64_t r0, int64_t m) { block(p, v, view.down, view.up, r0, m); });
  }

  // A vector of parameters times scale, zeros where there is none
  static float* load_or_zeros(int slot, const void* p, int64_t n, float scale) {
    float* b = p ? load_vector<T>(slot, p, n) : scratch<float>(slot, round_up(n, 64) + 64);
    for (int64_t j = 0; j < round_up(n, 64); j += VL) store(b + j, p ? load(b + j) * splat(scale) : vf{});
    return b;
  }

  static void block(const fp_adapter_forward& p, const AdapterVectors& v, const Elem* wd, const Elem* wu, int64_t r0, int64_t m) {
    const int64_t d = p.d, r = p.r, width = round_up(d > r ? d : r, 64) + 64;
    float* row = scratch<float>(4, width);
    Elem *a = scratch<Elem>(5, E::a_size(m, d)), *h = scratch<Elem>(6, E::a_size(m, r));
    float* c = scratch<float>(7, product_size<E>(m, d > r ? d : r));
    for (int64_t i = 0; i < m; ++i) {
      const int64_t at = row_of(p, r0 + i);
      load_row((const T*)p.x + at * d, row, d, width);
      if (p.norm_weight) {
        const RowStats s = row_stats(row, d, p.eps);
        put_stats(p.stats, at, s);
        row_normalize(row, row, d, s, v.gamma, v.beta);
      }
      E::put_a_row(a, d, i, row);
    }
    E::zero_a_rows(a, d, m);
    multiply<E>(a, d, m, wd, r, c);
    for (int64_t i = 0; i < m; ++i) {
      gather_row<E>(c, m, i, row, r);
      for (int64_t j = 0; j < r; j += VL) store(row + j, load(row + j) + load(v.b_down + j));
      if (p.z) store_row((T*)p.z + row_of(p, r0 + i) * r, row, r);
      for (int64_t j = 0; j < r; j += VL) store(row + j, activate(p.activation, load(row + j)), r - j);
      E::put_a_row(h, r, i, row);
    }
    E::zero_a_rows(h, r, m);
    multiply<E>(h, r, m, wu, d, c);
    for (int64_t i = 0; i < m; ++i) finish_row(p, v, row_of(p, r0 + i), c + i * E::NP, panel_size<E>(m), row);
  }

  // y's row from the up product c, then n's while it is at hand. `room` is for the row, and may be c where that is
  // contiguous.
  static void finish_row(const fp_adapter_forward& p, const AdapterVectors& v, int64_t row, const float* c, int64_t panel, float* room) {
    const int64_t d = p.d, at = row * d;
    const void* terms[3];
    int count = 0;
    const void* given[3] = {p.add_x ? p.x : nullptr, p.res1, p.res2};
    for (const void* t : given)
      if (t) terms[count++] = (const T*)t + at;
    T* y = p.y ? (T*)p.y + at : nullptr;
    float* sum = p.tail == NO_NORM ? nullptr : room;
    switch (count) {
      case 0: add_up<0>(p, v.b_up, terms, c, panel, sum, y); break;
      case 1: add_up<1>(p, v.b_up, terms, c, panel, sum, y); break;
      case 2: add_up<2>(p, v.b_up, terms, c, panel, sum, y); break;
      default: add_up<3>(p, v.b_up, terms, c, panel, sum, y);
    }
    if (!sum) return;
    const RowStats s = row_stats(sum, d, p.tail_eps, p.tail);
    put_stats(p.tail_stats, row, s);
    row_normalize(sum, (T*)p.n + at, d, s, v.tail_gamma, v.tail_beta);
  }
  // scale c + bias + the terms, as stored, into sum and y, either of which may be null
  template <int COUNT>
  static void add_up(const fp_adapter_forward& p, const float* bias, const void* const* terms, const float* c, int64_t panel, float* sum, T* y) {
    const T *t0 = COUNT > 0 ? (const T*)terms[0] : nullptr, *t1 = COUNT > 1 ? (const T*)terms[1] : nullptr, *t2 = COUNT > 2 ? (const T*)terms[2] : nullptr;
    const vf scale = splat(p.scale);
    const int64_t d = p.d;
    auto put = [=](const float* u, int64_t j, int64_t left) {
      vf v = fma(load(u), scale, load(bias + j));
      if (COUNT > 0) v += load(t0 + j, left);
      if (COUNT > 1) v += load(t1 + j, left);
      if (COUNT > 2) v += load(t2 + j, left);
      if (sum) store(sum + j, rounded<T>(v));
      if (y) store(y + j, v, left);
    };
    if constexpr (AdapterForward::PLAIN) each_vector(d, [=](int64_t j, int64_t left) { put(c + j, j, left); });
    else
      for (int64_t j0 = 0; j0 < d; j0 += E::NP, c += panel)
        each_vector(d - j0 < E::NP ? d - j0 : E::NP, [=](int64_t q, int64_t left) { put(c + q, j0 + q, left); });
  }
};

}  // namespace FP_ISA
