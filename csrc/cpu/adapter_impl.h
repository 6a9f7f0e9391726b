// The adapter site, forward and backward.
// Forward, per block of rows: LN -> down -> act -> up -> scale, biases, residuals; only x, the residuals and y touch memory.
// Backward in two phases: rows (dz, then dx through the LN), then weight gradients, parallel over column panels of d with
// all rows as the reduction. So no partial sums, no atomics: the same bits for any number of threads.
#pragma once
#include "adapter_direct_impl.h"

namespace FP_ISA {

template <class T, class E> struct Adapter {
  using Elem = typename E::Elem;

  // Nothing to convert: rows go as they are (adapter_direct_impl.h)
  static constexpr bool PLAIN = std::is_same<T, float>::value && std::is_same<Elem, float>::value;

  // y = x W^T wants B[k = columns of W, n = rows of W]
  static Elem* pack_weight_columns(int slot, const void* w, int64_t rows, int64_t cols) {
    Elem* out = scratch<Elem>(slot, columns_size<E>(cols, rows));
    parallel(column_groups<E>(rows), grain(400. * cols), [&](int64_t begin, int64_t end) {
      pack_columns<E>(out, cols, rows, begin, end, [&](int64_t i) { return (const T*)w + i * cols; });
    });
    return out;
  }
  static Elem* pack_weight_rows(int slot, const void* w, int64_t rows, int64_t cols) {
    Elem* out = scratch<Elem>(slot, E::b_size(rows, cols));
    parallel(E::pad_k(rows) / 2, grain(40. * cols), [&](int64_t begin, int64_t end) {
      pack_rows<E>(out, rows, cols, begin, end, [&](int64_t i) { return (const T*)w + i * cols; });
    });
    return out;
  }

  template <class Body> static void row_blocks(int64_t rows, int64_t d, int64_t r, const Body& body) {
    parallel((rows + E::UNIT - 1) / E::UNIT, grain(4. * E::UNIT * d * (r + 16)), [&](int64_t begin, int64_t end) {
      typename E::Session session;
      (void)session;
      for (int64_t u = begin; u < end; u += E::BLOCK_UNITS) {
        const int64_t r0 = u * E::UNIT, r1 = (u + E::BLOCK_UNITS < end ? u + E::BLOCK_UNITS : end) * E::UNIT;
        body(r0, (r1 < rows ? r1 : rows) - r0);
      }
    });
  }

  static void forward(const fp_adapter_forward& p) {
    const int64_t d = p.d, r = p.r, width = round_up(d > r ? d : r, 64) + 64;
    const Elem* wd = pack_weight_columns(0, p.w_down, r, d);
    const Elem* wu = pack_weight_columns(1, p.w_up, d, r);
    const float *gamma = load_vector<T>(2, p.norm_weight, d), *beta = load_vector<T>(3, p.norm_bias, d);
    const float *bd = load_vector<T>(10, p.b_down, r), *bu = load_vector<T>(11, p.b_up, d);
    if constexpr (PLAIN)
      return DirectAdapter<E>::forward(p, wd, wu, gamma, beta, bd, [&](int64_t row, const float* u) { finish_row(p, row, u, E::NP, bu); });
    row_blocks(p.rows, d, r, [&](int64_t r0, int64_t m) {
      const T* x = (const T*)p.x + r0 * d;
      float* row = scratch<float>(4, width);
      Elem *a = scratch<Elem>(5, E::a_size(m, d)), *h = scratch<Elem>(6, E::a_size(m, r));
      float* c = scratch<float>(7, product_size<E>(m, d > r ? d : r));
      for (int64_t i = 0; i < m; ++i) {
        load_row(x + i * d, row, d, width);
        if (p.norm_weight) {
          float mean, rstd;
          row_stats(row, d, p.eps, &mean, &rstd);
          if (p.stats) p.stats[2 * (r0 + i)] = mean, p.stats[2 * (r0 + i) + 1] = rstd;
          row_normalize(row, d, mean, rstd, gamma, beta);
        }
        E::put_a_row(a, d, i, row);
      }
      E::zero_a_rows(a, d, m);
      multiply<E>(a, d, m, wd, r, c);
      for (int64_t i = 0; i < m; ++i) {
        gather_row<E>(c, m, i, row, r);
        if (bd) for (int64_t j = 0; j < r; j += VL) store(row + j, load(row + j) + load(bd + j));
        if (p.z) store_row((T*)p.z + (r0 + i) * r, row, r);
        for (int64_t j = 0; j < r; j += VL) store(row + j, activate(p.activation, load(row + j)), r - j);
        E::put_a_row(h, r, i, row);
      }
      E::zero_a_rows(h, r, m);
      multiply<E>(h, r, m, wu, d, c);
      for (int64_t i = 0; i < m; ++i) finish_row(p, r0 + i, c + i * E::NP, panel_size<E>(m), bu);
    });
  }
  static void finish_row(const fp_adapter_forward& p, int64_t row, const float* c, int64_t panel, const float* bu) {
    const int64_t d = p.d;
    for (int64_t j0 = 0; j0 < d; j0 += E::NP, c += panel)
      for (int64_t v = 0; v < E::NP; v += VL) {
        const int64_t j = j0 + v, at = row * d + j;
        if (j >= d) break;
        vf u = load(c + v);
        if (bu) u += load(bu + j);
        u *= splat(p.scale);
        if (p.add_x) u += load((const T*)p.x + at, d - j);
        if (p.res1) u += load((const T*)p.res1 + at, d - j);
        if (p.res2) u += load((const T*)p.res2 + at, d - j);
        store((T*)p.y + at, u, d - j);
      }
  }

  static void backward(const fp_adapter_backward& p) {
    const bool weights = p.dw_down || p.dw_up || p.db_down || p.db_up || p.dnorm_weight || p.dnorm_bias;
    float* dz = weights ? scratch<float>(12, p.rows * p.r + 64) : nullptr;
    if (p.dx || p.dw_down || p.db_down || p.dnorm_weight || p.dnorm_bias) backward_rows(p, dz);
    if (weights) backward_weights(p, dz);
  }

  static void backward_rows(const fp_adapter_backward& p, float* dz) {
    const int64_t d = p.d, r = p.r, width = round_up(d > r ? d : r, 64) + 64;
    const Elem* wu = pack_weight_rows(0, p.w_up, d, r);
    const Elem* wd = p.dx ? pack_weight_rows(1, p.w_down, r, d) : nullptr;
    const float* gamma = load_vector<T>(2, p.norm_weight, d);
    if constexpr (PLAIN) return DirectAdapter<E>::backward_rows(p, wu, wd, gamma, dz);
    row_blocks(p.rows, d, r, [&](int64_t r0, int64_t m) {
      const T *g = (const T*)p.grad + r0 * d, *x = (const T*)p.x + r0 * d, *z = (const T*)p.z + r0 * r;
      float *row = scratch<float>(4, width), *xrow = scratch<float>(9, width);
      Elem *a = scratch<Elem>(5, E::a_size(m, d)), *da = scratch<Elem>(6, E::a_size(m, r));
      float* c = scratch<float>(7, product_size<E>(m, d > r ? d : r));
      for (int64_t i = 0; i < m; ++i) {
        load_row(g + i * d, row, d, width);
        E::put_a_row(a, d, i, row);
      }
      E::zero_a_rows(a, d, m);
      multiply<E>(a, d, m, wu, r, c);
      for (int64_t i = 0; i < m; ++i) {
        gather_row<E>(c, m, i, row, r);
        for (int64_t j = 0; j < r; j += VL)
          store(row + j, load(row + j) * splat(p.scale) * activate_grad(p.activation, load(z + i * r + j, r - j)), r - j);
        if (dz) store_row(dz + (r0 + i) * r, row, r);
        E::put_a_row(da, r, i, row);
      }
      if (!p.dx) return;
      E::zero_a_rows(da, r, m);
      multiply<E>(da, r, m, wd, d, c);
      for (int64_t i = 0; i < m; ++i) {
        gather_row<E>(c, m, i, row, d);
        if (p.stats) {
          load_row(x + i * d, xrow, d, width);
          row_norm_grad(row, xrow, d, p.stats[2 * (r0 + i)], p.stats[2 * (r0 + i) + 1], gamma);
        }
        T* dx = (T*)p.dx + (r0 + i) * d;
        if (p.add_x) for (int64_t j = 0; j < d; j += VL) store(row + j, load(row + j) + load(g + i * d + j, d - j));
        store_row(dx, row, d);
      }
    });
  }

  // With xhat = (x - mean) rstd:  dW' = dz^T xhat,  dc = sum dz;  dW_down = dW' gamma + dc beta^T,
  // dgamma = sum_r dW' W_down,  dbeta = W_down^T dc: the norm's gradients need no pass over the rows of their own.
  static void backward_weights(const fp_adapter_backward& p, const float* dz) {
    const int64_t d = p.d, r = p.r, rows = p.rows;
    const bool down = p.dw_down || p.dnorm_weight, up_ = p.dw_up != nullptr;
    const Elem *az = nullptr, *ah = nullptr;  // left operands of the two products
    if constexpr (PLAIN) {
      if (down) az = dz;
      if (up_) ah = DirectAdapter<E>::activated(1, p);
    } else {
      pack_lefts(p, down ? dz : nullptr, up_, &az, &ah);
    }
    float* dc = scratch<float>(13, round_up(r, 64));
    memset(dc, 0, round_up(r, 64) * 4);
    if (p.db_down || p.dnorm_bias || down) column_sums(dz, rows, r, dc);
    if (p.db_down) store_row((T*)p.db_down, dc, r);
    if (!(down || up_ || p.db_up || p.dnorm_bias)) return;
    const float *gamma = load_vector<T>(2, p.norm_weight, d), *beta = load_vector<T>(3, p.norm_bias, d);
    const int64_t groups_d = (d + GROUP - 1) / GROUP;
    parallel(groups_d * 2, grain(2. * rows * GROUP * (r + 16)), [&](int64_t begin, int64_t end) {
      typename E::Session session;
      (void)session;
      for (int64_t t = begin; t < end; ++t) {
        const int64_t j0 = t / 2 * GROUP, n = d - j0 < GROUP ? d - j0 : GROUP;
        float* c = scratch<float>(6, product_size<E>(r, GROUP));
        if (t % 2 == 0) {
          if (down) column_product(p, az, j0, n, c, true, nullptr);
          if (down || p.dnorm_bias) finish_down(p, c, dc, gamma, beta, j0, n);
        } else if (up_ || p.db_up) {
          float total[GROUP] = {};
          column_product(p, ah, j0, n, c, false, total);
          if (p.dw_up)
            for (int64_t j = 0; j < n; ++j)
              for (int64_t i = 0; i < r; ++i) down_to((T*)p.dw_up + (j0 + j) * r + i, p.scale * product(c, r, i, j));
          if (p.db_up) for (int64_t j = 0; j < n; ++j) down_to((T*)p.db_up + j0 + j, p.scale * total[j]);
        }
      }
    });
  }
  // dz^T and h^T, one after the other chunk of rows
  static void pack_lefts(const fp_adapter_backward& p, const float* dz, bool up_, const Elem** dz_out, const Elem** h_out) {
    const int64_t r = p.r, rows = p.rows, chunk = CHUNK, chunks = (rows + chunk - 1) / chunk, ar = round_up(r, E::UNIT), groups = (r + 15) / 16;
    Elem* az = dz ? scratch<Elem>(0, chunks * E::a_size(ar, chunk)) : nullptr;
    Elem* ah = up_ ? scratch<Elem>(1, chunks * E::a_size(ar, chunk)) : nullptr;
    *dz_out = az, *h_out = ah;
    parallel(chunks * groups, grain(400. * (rows < chunk ? rows : chunk)), [&](int64_t begin, int64_t end) {
      float* h = scratch<float>(7, chunk * 16);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t q = t / groups, i0 = t % groups * 16, n = r - i0 < 16 ? r - i0 : 16;
        const int64_t k0 = q * chunk, k = rows - k0 < chunk ? rows - k0 : chunk;
        const int64_t at = q * E::a_size(ar, chunk) + i0 * E::a_size(E::UNIT, k) / E::UNIT;
        if (dz) E::put_a_transposed(az + at, k, n, dz + k0 * r + i0, r);
        if (!up_) continue;
        for (int64_t i = 0; i < k; ++i)
          for (int j = 0; j < 16; j += VL) store(h + i * 16 + j, activate(p.activation, load((const T*)p.z + (k0 + i) * r + i0 + j, n - j)));
        E::put_a_transposed(ah + at, k, n, h, 16);
      }
    });
  }
  static constexpr int64_t CHUNK = 512;            // rows of one slice of the reduction
  static constexpr int64_t GROUP = 128 / E::NP * E::NP;  // columns of one task: enough for whole cache lines of x's rows
  static void down_to(T* p, float v) { down(v, p); }
  static float product(const float* c, int64_t m, int64_t i, int64_t j) { return c[j / E::NP * panel_size<E>(m) + i * E::NP + j % E::NP]; }

  // C [r, n] = A [r, rows] B[rows, j0..j0+n), B = xhat or grad; total: column sums of B
  static void column_product(const fp_adapter_backward& p, const Elem* a, int64_t j0, int64_t n, float* c, bool xhat, float* total) {
    const int64_t d = p.d, ar = round_up(p.r, E::UNIT);
    const T* src = (const T*)(xhat ? p.x : p.grad);
    Elem* b = scratch<Elem>(5, E::b_size(CHUNK, GROUP));
    alignas(64) float pair[2][GROUP + 64] = {}, sums[GROUP] = {};
    for (int64_t k0 = 0, q = 0; k0 < p.rows; k0 += CHUNK, ++q) {
      const int64_t k = p.rows - k0 < CHUNK ? p.rows - k0 : CHUNK;
      for (int64_t i = 0; i < E::pad_k(k); i += 2) {
        for (int s = 0; s < 2; ++s) {
          const int64_t row = k0 + i + s;
          const bool there = i + s < k;
          fetch(src + (row + 16) * d + j0, n * sizeof(T));
          const vf mean = splat(xhat && p.stats && there ? p.stats[2 * row] : 0.f), rstd = splat(xhat && p.stats && there ? p.stats[2 * row + 1] : 1.f);
          for (int64_t j = 0; j < n; j += VL) {
            vf v = there ? (load(src + row * d + j0 + j, n - j) - mean) * rstd : vf{};
            store(pair[s] + j, fill_behind(v, n - j, 0.f));
            if (total) store(sums + j, load(sums + j) + v);
          }
        }
        E::put_b_rows(b, k, i, pair[0], pair[1], n);
      }
      for (int64_t j = 0; total && j < GROUP; ++j) total[j] += sums[j], sums[j] = 0.f;
      if (!a) continue;
      if constexpr (PLAIN) E::product({a + k0 * p.r, 1, p.r}, p.r, k, b, n, c, E::NP, panel_size<E>(p.r), k0 > 0);
      else multiply<E>(a + q * E::a_size(ar, CHUNK), k, p.r, b, n, c, k0 > 0);
    }
    if (p.rows == 0) memset(c, 0, product_size<E>(p.r, GROUP) * 4);
  }
  static void finish_down(const fp_adapter_backward& p, const float* c, const float* dc, const float* gamma, const float* beta, int64_t j0, int64_t n) {
    for (int64_t j = 0; j < n; j += VL) {
      const float* cj = c + j / E::NP * panel_size<E>(p.r) + j % E::NP;
      const vf g = gamma ? load(gamma + j0 + j) : splat(1.f), b = beta ? load(beta + j0 + j) : vf{};
      vf dgamma = {}, dbeta = {};
      for (int64_t i = 0; i < p.r; ++i) {
        const int64_t at = i * p.d + j0 + j;
        const vf w = load((const T*)p.w_down + at, n - j), dw = p.dw_down || p.dnorm_weight ? load(cj + i * E::NP) : vf{};
        if (p.dw_down) store((T*)p.dw_down + at, fma(dw, g, b * splat(dc[i])), n - j);
        dgamma = fma(dw, w, dgamma);
        dbeta = fma(splat(dc[i]), w, dbeta);
      }
      if (p.dnorm_weight) store((T*)p.dnorm_weight + j0 + j, dgamma, n - j);
      if (p.dnorm_bias) store((T*)p.dnorm_bias + j0 + j, dbeta, n - j);
    }
  }
  // sums over rows in blocks of 256, then over the blocks: rounding grows with the block, not with the rows
  static void column_sums(const float* a, int64_t rows, int64_t n, float* out) {
    float* part = scratch<float>(14, round_up(n, 64));
    for (int64_t r0 = 0; r0 < rows; r0 += 256) {
      memset(part, 0, round_up(n, 64) * 4);
      for (int64_t i = r0; i < rows && i < r0 + 256; ++i)
        for (int64_t j = 0; j < n; ++j) part[j] += a[i * n + j];
      for (int64_t j = 0; j < n; ++j) out[j] += part[j];
    }
  }
};

}  // namespace FP_ISA
