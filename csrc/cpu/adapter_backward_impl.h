// The adapter site, backward, slice of rows by slice: first its rows (the trailing norm's gradient, dz, then dx through
// the LN), then its part of the weight gradients, for which x and g are read again while they are in the caches.
// Nothing is summed atomically or per thread: the same bits for any number of threads.
#pragma once
#include "adapter_weights_impl.h"

namespace FP_ISA {

template <class T, class E> struct AdapterBackward : AdapterBase<T, E> {
  using Elem = typename E::Elem;
  static constexpr bool PLAIN = AdapterBase<T, E>::PLAIN;

  static void run(const fp_adapter_backward& p) {
    const bool dz = p.dw_down || p.db_down || p.dnorm_weight || p.dnorm_bias, up = p.dw_up || p.db_up;
    const bool norm = p.dtail_weight || p.dtail_bias, weights = dz || up;
    const int64_t step = slice_rows(p, weights);
    const BackwardRows b = prepare(p, dz, norm, step);
    const PackedWeights<T, E> packed({Slot::W_DOWN, p.dx ? p.w_down : nullptr, p.r, p.d, false},
                                     {Slot::W_UP, p.dx || dz ? p.w_up : nullptr, p.d, p.r, false}, {}, p.rows < step ? p.rows : step);
    AdapterWeights<T, E> w(p, b.sums.total + b.sums.tail, b.gamma);
    for (int64_t r0 = 0; r0 == 0 || r0 < p.rows; r0 += step) {
      const fp_adapter_backward q = slice(p, r0, p.rows - r0 < step ? p.rows - r0 : step);
      if constexpr (PLAIN) {
        if (p.tail || p.dx || dz || b.h) DirectAdapter<E>::backward_rows(q, b, packed);
      } else if (p.tail || p.dx || dz) {
        AdapterBackward::row_blocks(packed, q.rows, p.d, p.r, [&](const auto& view, int64_t first, int64_t m) { block(q, b, view.down, view.up, first, m); });
      }
      if (dz || norm) b.sums.add_up(q.rows);
      if (weights) w.add(q, b.dz, b.h, r0 == 0, r0 + step >= p.rows);
    }
    if (p.db_down) store_row((T*)p.db_down, b.sums.total + b.sums.tail, p.r);
    if (p.dtail_weight) store_row((T*)p.dtail_weight, b.sums.total, p.d);
    if (p.dtail_bias) store_row((T*)p.dtail_bias, b.sums.total + b.sums.width, p.d);
  }

  // As many rows as leave what both passes touch in a third-level cache: 5 arrays in 12 MiB
  static int64_t slice_rows(const fp_adapter_backward& p, bool weights) {
    const int64_t slices = weights ? 1 + p.rows * p.d * 5 * (int64_t)sizeof(T) / (12 << 20) : 1;
    return round_up((p.rows + slices - 1) / slices, 64) + (p.rows == 0);
  }
  static BackwardRows prepare(const fp_adapter_backward& p, bool dz, bool norm, int64_t rows) {
    const int64_t d = p.d, r = p.r;
    BackwardRows b{};
    b.gamma = load_vector<T>(Slot::GAMMA, p.norm_weight, d), b.tail_gamma = load_vector<T>(Slot::TAIL_GAMMA, p.tail_weight, d);
    if (p.tail && p.y_is_n) tail_inverse(b, load_vector<T>(Slot::BETA, p.tail_bias, d), d);
    if (dz) b.dz = scratch<float>(Slot::DZ, rows * r + 64);
    if (PLAIN && p.dw_up) b.h = scratch<float>(Slot::H, rows * r + 64);
    RowSums& s = b.sums;
    s.unit = PLAIN ? STRIP : E::UNIT;
    s.width = round_up(d, 64), s.tail = norm ? 2 * s.width : 0, s.stride = s.tail + round_up(r, 64);
    s.total = scratch<float>(Slot::TOTAL, s.stride);
    memset(s.total, 0, s.stride * 4);
    if (dz || norm) s.parts = scratch<float>(Slot::PARTS, (rows + s.unit - 1) / s.unit * s.stride);
    return b;
  }
  // xhat = n inverse + shift
  static void tail_inverse(BackwardRows& b, const float* beta, int64_t d) {
    float *inverse = scratch<float>(Slot::TAIL_INVERSE, round_up(d, 64) + 64), *shift = scratch<float>(Slot::TAIL_SHIFT, round_up(d, 64) + 64);
    for (int64_t j = 0; j < round_up(d, 64); ++j) {
      inverse[j] = j < d ? 1.f / b.tail_gamma[j] : 0.f;
      shift[j] = j < d && beta ? -beta[j] * inverse[j] : 0.f;
    }
    b.tail_inverse = inverse, b.tail_shift = shift;
  }
  static fp_adapter_backward slice(const fp_adapter_backward& p, int64_t row, int64_t rows) {
    fp_adapter_backward q = p;
    auto move = [&](auto*& t, int64_t elements) {
      if (t) t = (std::remove_reference_t<decltype(t)>)((T*)t + row * elements);
    };
    q.rows = rows;
    q.grad = p.tail ? p.g : p.grad;
    if (p.order) {
      q.order += row;
      return q;
    }
    move(q.grad, p.d), move(q.x, p.d), move(q.g_s, p.d), move(q.g_n, p.d), move(q.y, p.d), move(q.dx, p.d), move(q.g, p.d);
    move(q.z, p.r);
    if (q.stats) q.stats += 2 * row;
    if (q.tail_stats) q.tail_stats += 2 * row;
    return q;
  }

  static void block(const fp_adapter_backward& p, const BackwardRows& b, const Elem* wd, const Elem* wu, int64_t r0, int64_t m) {
    const int64_t d = p.d, r = p.r, width = round_up(d > r ? d : r, 64) + 64;
    float* row = scratch<float>(4, width);
    Elem *a = scratch<Elem>(5, E::a_size(m, d)), *da = scratch<Elem>(6, E::a_size(m, r));
    float* c = scratch<float>(7, product_size<E>(m, d > r ? d : r));
    const bool product = b.dz || p.dx;
    for (int64_t i = 0; i < m; ++i) {
      if (b.sums.parts) b.sums.start(r0 + i);
      for (int64_t j = round_up(d, VL); j < width; j += VL) store(row + j, vf{});
      if (p.tail) adapter_tail_row<T, true>(p, b, r0 + i, row);
      else load_row((const T*)p.grad + row_of(p, r0 + i) * d, row, d, d);
      if (product) E::put_a_row(a, d, i, row);
    }
    if (!product) return;
    E::zero_a_rows(a, d, m);
    multiply<E>(a, d, m, wu, r, c);
    for (int64_t i = 0; i < m; ++i) {
      gather_row<E>(c, m, i, row, r);
      const T* z = (const T*)p.z + row_of(p, r0 + i) * r;
      for (int64_t j = 0; j < r; j += VL)
        store(row + j, load(row + j) * splat(p.scale) * activate_grad(p.activation, load(z + j, r - j)), r - j);
      if (b.dz) {
        store_row(b.dz + (r0 + i) * r, row, r);
        float* sum = b.sums.down(r0 + i);
        for (int64_t j = 0; j < r; j += VL) store(sum + j, load(sum + j) + load(row + j));
      }
      E::put_a_row(da, r, i, row);
    }
    if (!p.dx) return;
    E::zero_a_rows(da, r, m);
    multiply<E>(da, r, m, wd, d, c);
    for (int64_t i = 0; i < m; ++i) {
      gather_row<E>(c, m, i, row, d);
      adapter_dx_row<T>(p, b.gamma, r0 + i, row);
    }
  }
};

}  // namespace FP_ISA
