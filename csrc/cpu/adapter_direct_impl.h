// The fp32 adapter's rows on FMA units, STRIP rows at a time: operands are read where they lie, what is between them stays
// in the first-level cache, and the next strip's rows are fetched from memory while this one's products run.
#pragma once
#include "pack.h"

namespace FP_ISA {

template <class E> struct DirectAdapter {
  static constexpr int64_t STRIP = 16;
  typedef typename E::Left Left;

  template <class Body> static void strips(int64_t rows, int64_t d, int64_t r, const Body& body) {
    parallel((rows + STRIP - 1) / STRIP, grain(4. * STRIP * d * (r + 16)), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) body(t * STRIP, rows - t * STRIP < STRIP ? rows - t * STRIP : STRIP);
    });
  }
  static void fetch_rows(const void* p, int64_t row, int64_t rows, int64_t d) {
    if (p && row < rows) fetch((const float*)p + row * d, (rows - row < STRIP ? rows - row : STRIP) * d * 4);
  }

  // finish(row, u): y's row from the up product u
  template <class Finish>
  static void forward(const fp_adapter_forward& p, const float* wd, const float* wu, const float* gamma, const float* beta, const float* bd, const Finish& finish) {
    const int64_t d = p.d, r = p.r, width = round_up(d, E::NP) + 64, ldh = round_up(r, E::NP);
    strips(p.rows, d, r, [&](int64_t r0, int64_t m) {
      const float* x = (const float*)p.x + r0 * d;
      float *n = scratch<float>(4, STRIP * width), *h = scratch<float>(5, STRIP * ldh), *u = scratch<float>(6, STRIP * width);
      if (p.norm_weight)
        for (int64_t i = 0; i < m; ++i) {
          float mean, rstd, *row = n + i * width;
          load_row(x + i * d, row, d, width);
          row_stats(row, d, p.eps, &mean, &rstd);
          if (p.stats) p.stats[2 * (r0 + i)] = mean, p.stats[2 * (r0 + i) + 1] = rstd;
          row_normalize(row, d, mean, rstd, gamma, beta);
        }
      fetch_rows(p.x, r0 + STRIP, p.rows, d);
      fetch_rows(p.res1, r0, p.rows, d);
      fetch_rows(p.res2, r0, p.rows, d);
      E::product(p.norm_weight ? Left{n, width, 1} : Left{x, d, 1}, m, d, wd, r, h, ldh, E::NP);
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < r; j += VL) {
          float* hj = h + i * ldh + j;
          const vf z = bd ? load(hj) + load(bd + j) : load(hj);
          if (p.z) store((float*)p.z + (r0 + i) * r + j, z, r - j);
          store(hj, activate(p.activation, z));
        }
      E::product({h, ldh, 1}, m, r, wu, d, u, width, E::NP);
      for (int64_t i = 0; i < m; ++i) finish(r0 + i, u + i * width);
    });
  }

  static void backward_rows(const fp_adapter_backward& p, const float* wu, const float* wd, const float* gamma, float* dz) {
    const int64_t d = p.d, r = p.r, width = round_up(d, E::NP) + 64, ldh = round_up(r, E::NP);
    strips(p.rows, d, r, [&](int64_t r0, int64_t m) {
      const float *g = (const float*)p.grad + r0 * d, *x = (const float*)p.x + r0 * d, *z = (const float*)p.z + r0 * r;
      float *xrow = scratch<float>(4, width), *h = scratch<float>(5, STRIP * ldh), *u = scratch<float>(6, STRIP * width);
      fetch_rows(p.grad, r0 + STRIP, p.rows, d);
      if (p.stats) fetch_rows(p.x, r0, p.rows, d);
      E::product({g, d, 1}, m, d, wu, r, h, ldh, E::NP);
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < r; j += VL) {
          float* hj = h + i * ldh + j;
          const vf v = load(hj) * splat(p.scale) * activate_grad(p.activation, load(z + i * r + j, r - j));
          store(hj, v);
          if (dz) store(dz + (r0 + i) * r + j, v, r - j);
        }
      if (!p.dx) return;
      E::product({h, ldh, 1}, m, r, wd, d, u, width, E::NP);
      for (int64_t i = 0; i < m; ++i) {
        float *row = u + i * width, *dx = (float*)p.dx + (r0 + i) * d;
        if (p.stats) {
          load_row(x + i * d, xrow, d, width);
          row_norm_grad(row, xrow, d, p.stats[2 * (r0 + i)], p.stats[2 * (r0 + i) + 1], gamma);
        }
        for (int64_t j = 0; j < d; j += VL) {
          vf v = load(row + j);
          if (p.add_x) v += load(g + i * d + j, d - j);
          store(dx + j, v, d - j);
        }
      }
    });
  }

  // h = act(z), [rows, r]
  static float* activated(int slot, const fp_adapter_backward& p) {
    float* h = scratch<float>(slot, p.rows * p.r + 64);
    parallel(p.rows, grain(40. * p.r), [&](int64_t begin, int64_t end) {
      const float* z = (const float*)p.z;
      for (int64_t j = begin * p.r; j < end * p.r; j += VL) store(h + j, activate(p.activation, load(z + j, end * p.r - j)), end * p.r - j);
    });
    return h;
  }
};

}  // namespace FP_ISA
