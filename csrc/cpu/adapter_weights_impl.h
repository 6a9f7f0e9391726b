// The adapter's weight gradients, parallel over column groups of d with a slice's rows as the reduction.
// With xhat = (x - mean) rstd:  dW' = dz^T xhat,  dc = sum dz;  dW_down = dW' gamma + dc beta^T,
// dgamma = sum_r dW' W_down,  dbeta = W_down^T dc: the norm's gradients need no pass over the rows of their own.
#pragma once
#include "adapter_impl.h"

namespace FP_ISA {

template <class T, class E> struct AdapterWeights : AdapterBase<T, E> {
  using Elem = typename E::Elem;
  static constexpr bool PLAIN = AdapterBase<T, E>::PLAIN;
  static constexpr int64_t CHUNK = 512;                  // rows of one packed operand, at most
  static constexpr int64_t GROUP = 128 / E::NP * E::NP;  // columns of one task: enough for whole cache lines of x's rows

  // Two tasks per column group, so that neighbouring ones differ in kind: even ones dz^T xhat, odd ones h^T g
  struct Columns { const T* src; int64_t n; };  // what a task reads of each row
  const fp_adapter_backward& p;
  const bool down, up;  // products wanted
  const float *dc, *gamma, *beta;
  const int64_t tasks;
  float *products, *up_sums;

  AdapterWeights(const fp_adapter_backward& a, const float* sums, const float* norm_weight)
      : p(a), down(a.dw_down || a.dnorm_weight), up(a.dw_up), dc(sums), gamma(norm_weight),
        beta(load_vector<T>(Slot::BETA, a.norm_bias, a.d)), tasks((a.d + GROUP - 1) / GROUP * 2),
        products(down || up ? scratch<float>(Slot::PRODUCTS, tasks * product_size<E>(a.r, GROUP)) : nullptr),
        up_sums(scratch<float>(Slot::UP_SUMS, tasks / 2 * GROUP)) {}

  bool wanted(int64_t t) const { return t % 2 ? up || p.db_up : down; }
  bool multiplied(int64_t t) const { return t % 2 ? up : down; }
  float* product(int64_t t) const { return products + t * product_size<E>(p.r, GROUP); }
  Columns columns(const fp_adapter_backward& q, int64_t t) const {
    const int64_t j0 = t / 2 * GROUP;
    return {(const T*)(t % 2 ? q.grad : q.x) + j0, p.d - j0 < GROUP ? p.d - j0 : GROUP};
  }
  static int64_t chunk_rows(int64_t rows) {
    const int64_t chunks = (rows + CHUNK - 1) / CHUNK;
    return chunks ? round_up((rows + chunks - 1) / chunks, 32) : CHUNK;
  }

  // The slice q's part; h is null where the engine wants operands packed
  void add(const fp_adapter_backward& q, const float* dz, const float* h, bool first, bool last) const {
    const Elem* lefts[2] = {};
    if constexpr (PLAIN) lefts[0] = dz, lefts[1] = h;
    else pack_lefts(q, down ? dz : nullptr, lefts);
    parallel(tasks, grain(2. * q.rows * GROUP * (p.r + 16)), [&](int64_t begin, int64_t end) {
      typename E::Session session;
      (void)session;
      bool asked = false;  // whether the task before fetched this one's first rows
      for (int64_t t = begin; t < end; ++t) {
        if (wanted(t)) {
          int64_t next = t + 1;
          while (next < end && !multiplied(next)) ++next;
          asked = add_columns(q, lefts[t % 2], t, next < end ? next : -1, first, asked && multiplied(t));
        }
        if (last) t % 2 ? finish_up(t) : finish_down(t);
      }
    });
  }
  // C [r, n] (+)= A [r, rows] B [rows, n]. Returns whether the first rows of task `next` have been fetched.
  bool add_columns(const fp_adapter_backward& q, const Elem* a, int64_t t, int64_t next, bool first, bool asked) const {
    float* total = t % 2 ? up_sums + t / 2 * GROUP : nullptr;
    if (first && total) memset(total, 0, GROUP * 4);
    if (q.rows == 0) {
      if (multiplied(t)) memset(product(t), 0, product_size<E>(p.r, GROUP) * 4);
      return false;
    }
    const int64_t r = p.r, d = p.d, chunk = chunk_rows(q.rows), n = columns(q, t).n;
    Elem* b = scratch<Elem>(5, E::b_size(CHUNK, GROUP));
    for (int64_t k0 = 0, i = 0; k0 < q.rows; k0 += chunk, ++i) {
      const int64_t k = q.rows - k0 < chunk ? q.rows - k0 : chunk, rest = q.rows - k0 - k;
      pack_right(q, t, k0, k, b, total, asked);
      if (!multiplied(t)) continue;
      if constexpr (PLAIN) {
        Ahead ahead;
        const bool here = rest > 0;
        const int64_t row = here ? k0 + k : 0, left = here ? rest : q.rows, rows = left < chunk ? left : chunk;
        if ((here || next >= 0) && together(q, row, rows)) {
          const Columns s = columns(q, here ? t : next);
          ahead.add_columns(s.src + row_of(q, row) * d, d * sizeof(T), rows, s.n * sizeof(T));
        }
        asked = ahead.more() && r >= E::MR;
        E::product({a + k0 * r, 1, r}, r, k, b, n, product(t), E::NP, panel_size<E>(r), k0 > 0 || !first, &ahead);
      } else {
        multiply<E>(a + i * E::a_size(round_up(r, E::UNIT), chunk), k, r, b, n, product(t), k0 > 0 || !first);
      }
    }
    return asked;
  }
  // B from rows k0.. of x, normalised, or of g, whose column sums are added to total
  void pack_right(const fp_adapter_backward& q, int64_t t, int64_t k0, int64_t k, Elem* b, float* total, bool asked) const {
    const Columns s = columns(q, t);
    const bool xhat = t % 2 == 0 && q.stats;
    alignas(64) float pair[2][GROUP + 64] = {}, sums[GROUP + 64] = {};
    for (int64_t i = 0; i < E::pad_k(k); i += 2) {
      for (int64_t e = 0; e < 2; ++e) {
        float* out = pair[e];
        if (i + e >= k) {
          memset(out, 0, GROUP * 4);
          continue;
        }
        const int64_t at = row_of(q, k0 + i + e);
        const T* row = s.src + at * p.d;
        const RowStats stats = xhat ? row_stats_at(q.stats, at) : RowStats{0.f, 1.f};
        const vf mean = splat(stats.mean), rstd = splat(stats.rstd);
        if (!asked) fetch(row + 16 * p.d, s.n * sizeof(T));
        each_vector(s.n, [&](int64_t j, int64_t left) {
          const vf v = fill_behind((load(row + j, left) - mean) * rstd, left, 0.f);
          store(out + j, v);
          if (total) store(sums + j, load(sums + j) + v);
        });
      }
      E::put_b_rows(b, k, i, pair[0], pair[1], s.n);
    }
    for (int64_t j = 0; total && j < GROUP; ++j) total[j] += sums[j];
  }
  // dz^T and h^T, one after the other chunk of rows
  void pack_lefts(const fp_adapter_backward& q, const float* dz, const Elem** out) const {
    const int64_t r = p.r, rows = q.rows, chunk = chunk_rows(rows), chunks = (rows + chunk - 1) / chunk, ar = round_up(r, E::UNIT), groups = (r + 15) / 16;
    Elem* az = dz ? scratch<Elem>(Slot::LEFT_DZ, chunks * E::a_size(ar, chunk)) : nullptr;
    Elem* ah = up ? scratch<Elem>(Slot::LEFT_H, chunks * E::a_size(ar, chunk)) : nullptr;
    out[0] = az, out[1] = ah;
    parallel(chunks * groups, grain(400. * (rows < chunk ? rows : chunk)), [&](int64_t begin, int64_t end) {
      float* h = scratch<float>(7, chunk * 16);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t c = t / groups, i0 = t % groups * 16, n = r - i0 < 16 ? r - i0 : 16;
        const int64_t k0 = c * chunk, k = rows - k0 < chunk ? rows - k0 : chunk;
        const int64_t at = c * E::a_size(ar, chunk) + i0 * E::a_size(E::UNIT, k) / E::UNIT;
        if (dz) E::put_a_transposed(az + at, k, n, dz + k0 * r + i0, r);
        if (!up) continue;
        for (int64_t i = 0; i < k; ++i)
          for (int j = 0; j < 16; j += VL) store(h + i * 16 + j, activate(p.activation, load((const T*)q.z + row_of(q, k0 + i) * r + i0 + j, n - j)));
        E::put_a_transposed(ah + at, k, n, h, 16);
      }
    });
  }

  void finish_up(int64_t t) const {
    const int64_t j0 = t / 2 * GROUP, n = p.d - j0 < GROUP ? p.d - j0 : GROUP, r = p.r, panel = panel_size<E>(r);
    if (p.db_up)
      for (int64_t j = 0; j < n; ++j) down_to((T*)p.db_up + j0 + j, p.scale * up_sums[j0 + j]);
    if (!p.dw_up) return;
    const float* c = product(t);
    T* dw = (T*)p.dw_up + j0 * r;
    for (int64_t j = 0; j < n; j += 16)
      for (int64_t i = 0; i < r; i += 16) {  // a block of 16 x 16 is turned; panels hold whole rows of blocks
        const int64_t rows = r - i < 16 ? r - i : 16, columns = n - j < 16 ? n - j : 16;
        float block[16 * 16];
        turn(c, panel, i, rows, j, block);
        for (int64_t q = 0; q < columns; ++q)
          for (int64_t v = 0; v < rows; v += VL) store(dw + (j + q) * r + i + v, load(block + q * 16 + v) * splat(p.scale), rows - v);
      }
  }
  // block[q][e] = C[i + e, j + q], e < rows
  static void turn(const float* c, int64_t panel, int64_t i, int64_t rows, int64_t j, float* block) {
#if defined(__AVX512F__)
    if (E::NP % 16 == 0 && rows == 16) {
      const float* at = c + j / E::NP * panel + i * E::NP + j % E::NP;
      __m512i v[16], t[16];
      for (int e = 0; e < 16; ++e) v[e] = (__m512i)load(at + e * E::NP);
      transpose16(v, t);
      for (int q = 0; q < 16; ++q) store(block + q * 16, (vf)t[q]);
      return;
    }
#endif
    memset(block, 0, 16 * 16 * 4);
    for (int64_t q = 0; q < 16 && j + q < GROUP; ++q) {
      const float* at = c + (j + q) / E::NP * panel + i * E::NP + (j + q) % E::NP;
      for (int64_t e = 0; e < rows; ++e) block[q * 16 + e] = at[e * E::NP];
    }
  }
  static void down_to(T* out, float v) { FP_ISA::down(v, out); }
  void finish_down(int64_t t) const {
    const int64_t j0 = t / 2 * GROUP, n = p.d - j0 < GROUP ? p.d - j0 : GROUP, r = p.r, d = p.d;
    if (!down && !p.dnorm_bias) return;
    for (int64_t j = 0; j < n; j += VL) {
      const float* c = down ? product(t) + j / E::NP * panel_size<E>(r) + j % E::NP : nullptr;
      const vf g = gamma ? load(gamma + j0 + j) : splat(1.f), b = beta ? load(beta + j0 + j) : vf{};
      vf dgamma = {}, dbeta = {};
      for (int64_t i = 0; i < r; ++i) {
        const int64_t at = i * d + j0 + j;
        const vf w = load((const T*)p.w_down + at, n - j), dw = c ? load(c + i * E::NP) : vf{};
        if (p.dw_down) store((T*)p.dw_down + at, fma(dw, g, b * splat(dc[i])), n - j);
        dgamma = fma(dw, w, dgamma);
        dbeta = fma(splat(dc[i]), w, dbeta);
      }
      if (p.dnorm_weight) store((T*)p.dnorm_weight + j0 + j, dgamma, n - j);
      if (p.dnorm_bias) store((T*)p.dnorm_bias + j0 + j, dbeta, n - j);
    }
  }
};

}  // namespace FP_ISA
