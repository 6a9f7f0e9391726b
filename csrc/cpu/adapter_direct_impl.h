// The fp32 adapter's rows on FMA units, STRIP rows at a time: operands are read where they lie, what is between them stays
// in the first-level cache, and what this strip's end and the next strip need is fetched while the products run.
#pragma once
#include "ahead.h"
#include "packed_weights.h"
#include "shares.h"

namespace FP_ISA {

// What an adapter's rows need besides themselves: vectors of parameters as floats, null where there are none
// (b_down and scale b_up: zeros)
struct AdapterVectors { const float *gamma, *beta, *b_down, *b_up, *tail_gamma, *tail_beta; };

// The row of the matrices that is the pass's row i, and whether rows i.. i + m lie one behind the other
template <class P> FP_INLINE int64_t row_of(const P& p, int64_t i) { return p.order ? p.order[i] : i; }
template <class P> FP_INLINE bool together(const P& p, int64_t i, int64_t m) { return !p.order || p.order[i + m - 1] - p.order[i] == m - 1; }

// Sums over rows, taken while a row is at hand: per `unit` rows, whatever the number of threads, then added up in order.
// Of the trailing norm the gradients of weight and bias, `tail` floats together or 0, then dz's sums.
struct RowSums {
  float *parts = nullptr, *total = nullptr;
  int64_t unit, width, tail, stride;
  float* of(int64_t row) const { return parts + row / unit * stride; }
  void start(int64_t row) const {
    if (row % unit == 0) memset(of(row), 0, stride * 4);
  }
  float* norm(int64_t row) const { return tail ? of(row) : nullptr; }
  float* down(int64_t row) const { return of(row) + tail; }
  void add_up(int64_t rows) const {
    for (int64_t r0 = 0; r0 < rows; r0 += unit)
      for (int64_t j = 0; j < stride; j += VL) store(total + j, load(total + j) + load(of(r0) + j));
  }
};
// What the backward's pass over the rows is given besides the weights and makes (dz, h, the sums); null: not wanted
struct BackwardRows {
  const float *gamma, *tail_gamma, *tail_inverse, *tail_shift;  // the latter two where y is n: xhat = n inverse + shift
  float *dz, *h;
  RowSums sums;
};

// g = g_s + the gradient of y through the trailing norm. e: room for the row; KEEP leaves g as stored there.
template <class T, bool KEEP>
static void adapter_tail_row(const fp_adapter_backward& p, const BackwardRows& b, int64_t i, float* e) {
  const int64_t row = row_of(p, i), at = row * p.d;
  const T *g_n = (const T*)p.g_n + at, *y = (const T*)p.y + at;
  const RowStats stats = row_stats_at(p.tail_stats, row);
  auto done = [e, g = (T*)p.g + at, g_s = p.g_s ? (const T*)p.g_s + at : nullptr](int64_t j, int64_t left, vf v) {
    if (g_s) v += load(g_s + j, left);
    store(g + j, v, left);
    if (KEEP) store(e + j, rounded<T>(v), left);
  };
  if (!p.y_is_n) return row_norm_grad(g_n, y, p.d, stats, b.tail_gamma, p.tail, e, b.sums.norm(i), b.sums.width, done);
  auto hat = [&](int64_t j, int64_t left) { return fma(load(y + j, left), load(b.tail_inverse + j), load(b.tail_shift + j)); };
  row_norm_grad_of(g_n, hat, p.d, stats.rstd, b.tail_gamma, p.tail, e, b.sums.norm(i), b.sums.width, done);
}
// dx's row from the down product u, which is overwritten
template <class T> static void adapter_dx_row(const fp_adapter_backward& p, const float* gamma, int64_t i, float* u) {
  const int64_t d = p.d, row = row_of(p, i), at = row * d;
  auto put = [dx = (T*)p.dx + at, g = p.add_x ? (const T*)p.grad + at : nullptr](int64_t j, int64_t left, vf v) {
    store(dx + j, g ? v + load(g + j, left) : v, left);
  };
  if (p.stats) row_norm_grad(u, (const T*)p.x + at, d, row_stats_at(p.stats, row), gamma, LAYERNORM, u, nullptr, 0, put);
  else each_vector(d, [&](int64_t j, int64_t left) { put(j, left, load(u + j)); });
}

constexpr int64_t STRIP = 16;

template <class E> struct DirectAdapter {
  typedef typename E::Left Left;
  typedef PackedWeights<float, E> Weights;

  struct Strip { int64_t row, rows; };
  // body(weights, strip, the strip that this thread does next, which may have no rows)
  template <class Body> static void strips(const Weights& w, int64_t rows, int64_t d, int64_t r, const Body& body) {
    auto strip = [=](int64_t t) { return t < 0 ? Strip{0, 0} : Strip{t * STRIP, rows - t * STRIP < STRIP ? rows - t * STRIP : STRIP}; };
    items((rows + STRIP - 1) / STRIP, grain(4. * STRIP * d * (r + 16)), 2, [&] { return w.view(); },
               [&](const auto& packed, int64_t t, int64_t next) { body(packed, strip(t), strip(next)); });
  }
  // Rows i.. of the matrix t, where they lie together
  template <class P> static void ask(Ahead& ahead, const P& p, const void* t, int64_t i, int64_t rows) {
    if (t && rows > 0 && together(p, i, rows)) ahead.add((const float*)t + row_of(p, i) * p.d, rows * p.d * 4);
  }
  // Rows i.. of the matrix t as a left operand: in place, or copied to `room`
  template <class P> static Left left(const P& p, const void* t, int64_t i, int64_t m, float* room, int64_t width) {
    if (together(p, i, m)) return {(const float*)t + row_of(p, i) * p.d, p.d, 1};
    for (int64_t e = 0; e < m; ++e) memcpy(room + e * width, (const float*)t + row_of(p, i + e) * p.d, p.d * 4);
    return {room, width, 1};
  }

  // The norm's weight and bias are folded into the weights: a row is only centred here, and its product scaled by rstd.
  // finish(row, u): the rows of y and n from the up product u, which it may overwrite
  template <class Finish> static void forward(const fp_adapter_forward& p, const Weights& w, const Finish& finish) {
    const int64_t d = p.d, r = p.r, width = round_up(d, E::NP) + 64, ldh = round_up(r, E::NP);
    strips(w, p.rows, d, r, [&](const auto& packed, Strip now, Strip next) {
      const int64_t r0 = now.row, m = now.rows;
      float *n = scratch<float>(4, STRIP * width), *h = scratch<float>(5, STRIP * ldh), *u = scratch<float>(6, STRIP * width);
      float rstd[STRIP];
      for (int64_t i = 0; p.norm_weight && i < m; ++i) {
        const int64_t row = row_of(p, r0 + i);
        const RowStats s = center_row((const float*)p.x + row * d, n + i * width, d, p.eps);
        put_stats(p.stats, row, s);
        rstd[i] = s.rstd;
      }
      Ahead ahead;
      ask(ahead, p, p.res1, r0, m), ask(ahead, p, p.res2, r0, m), ask(ahead, p, p.y, r0, m), ask(ahead, p, p.n, r0, m);
      ask(ahead, p, p.x, next.row, next.rows);
      ahead.spread(E::steps(m, d, r) + E::steps(m, r, d));
      E::product(p.norm_weight ? Left{n, width, 1} : left(p, p.x, r0, m, n, width), m, d, packed.down, r, h, ldh, E::NP, false, &ahead);
      for (int64_t i = 0; i < m; ++i) {
        float *hi = h + i * ldh, *zi = p.z ? (float*)p.z + row_of(p, r0 + i) * r : nullptr;
        const vf factor = splat(p.norm_weight ? rstd[i] : 1.f);
        for (int64_t j = 0; j < r; j += VL) {
          const vf z = fma(load(hi + j), factor, load(packed.bias + j));
          if (zi) store(zi + j, z, r - j);
          store(hi + j, activate(p.activation, z));
        }
      }
      E::product({h, ldh, 1}, m, r, packed.up, d, u, width, E::NP, false, &ahead);
      for (int64_t i = 0; i < m; ++i) finish(row_of(p, r0 + i), u + i * width);
    });
  }

  static void backward_rows(const fp_adapter_backward& p, const BackwardRows& b, const Weights& w) {
    const int64_t d = p.d, r = p.r, width = round_up(d, E::NP) + 64, ldh = round_up(r, E::NP);
    const bool product = b.dz || p.dx;
    strips(w, p.rows, d, r, [&](const auto& packed, Strip now, Strip next) {
      const int64_t r0 = now.row, m = now.rows;
      float *h = scratch<float>(5, STRIP * ldh), *u = scratch<float>(6, STRIP * width);
      if (b.sums.parts) b.sums.start(r0);
      for (int64_t i = r0; p.tail && i < r0 + m; ++i) adapter_tail_row<float, false>(p, b, i, u);
      Ahead ahead;
      if (p.stats) ask(ahead, p, p.x, r0, m);
      ask(ahead, p, p.dx, r0, m);
      ask(ahead, p, p.grad, next.row, next.rows);  // with a tail this is g, to be written
      ask(ahead, p, p.g_n, next.row, next.rows), ask(ahead, p, p.y, next.row, next.rows), ask(ahead, p, p.g_s, next.row, next.rows);
      ahead.spread(E::steps(m, d, r) + (p.dx ? E::steps(m, r, d) : 0));
      if (product) E::product(left(p, p.grad, r0, m, u, width), m, d, packed.up, r, h, ldh, E::NP, false, &ahead);
      bottleneck(p, b, r0, m, product, h, ldh);
      if (!p.dx) return;
      E::product({h, ldh, 1}, m, r, packed.down, d, u, width, E::NP, false, &ahead);
      for (int64_t i = 0; i < m; ++i) adapter_dx_row<float>(p, b.gamma, r0 + i, u + i * width);
    });
  }
  // dz from the gradient h of the activation, in its place, and the activation itself
  static void bottleneck(const fp_adapter_backward& p, const BackwardRows& b, int64_t r0, int64_t m, bool product, float* h, int64_t ldh) {
    const int64_t r = p.r;
    for (int64_t i = 0; i < m; ++i) {
      const float* zi = (const float*)p.z + row_of(p, r0 + i) * r;
      float *hi = h + i * ldh, *out = b.h ? b.h + (r0 + i) * r : nullptr, *dz = b.dz ? b.dz + (r0 + i) * r : nullptr;
      float* sums = dz ? b.sums.down(r0) : nullptr;
      for (int64_t j = 0; j < r; j += VL) {
        const vf z = load(zi + j, r - j);
        if (out) store(out + j, activate(p.activation, z), r - j);
        if (!product) continue;
        const vf v = load(hi + j) * splat(p.scale) * activate_grad(p.activation, z);
        store(hi + j, v);
        if (!dz) continue;
        store(dz + j, v, r - j);
        store(sums + j, load(sums + j) + v);
      }
    }
  }
};

}  // namespace FP_ISA
