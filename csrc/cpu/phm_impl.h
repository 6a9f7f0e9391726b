// PHM weights: H[c out' + q, a in' + k] = sum_i rule[i, a, c] W[i, k, q] for many layers at once, and the gradients of rule
// and W. Bound by memory: tasks are strips of 16 columns q of one layer's W, which own n rows-of-16 of H.
#pragma once
#include "pack.h"

namespace FP_ISA {

template <class T, class E> struct Phm {  // E: the engine every kernel is told; there is no product here
  static constexpr int64_t STRIP = 16;

  // body(layer, first column q, how many, index of the task) over the strips of all layers
  template <class Body> static void strips(const fp_phm& p, const Body& body) {
    int64_t total = 0, flops = 0;
    for (int l = 0; l < p.count; ++l) {
      const fp_phm_layer& y = p.layers[l];
      total += (y.out + STRIP - 1) / STRIP;
      flops += 2 * int64_t(y.n) * y.n * y.n * y.in * y.out;
    }
    parallel(total, grain(double(flops) / total + 20. * STRIP), [&](int64_t begin, int64_t end) {
      int l = 0;
      int64_t first = 0;
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t n; t - first >= (n = (p.layers[l].out + STRIP - 1) / STRIP); ++l) first += n;
        const int64_t q0 = (t - first) * STRIP, left = p.layers[l].out - q0;
        body(p.layers[l], q0, left < STRIP ? left : STRIP, t);
      }
    });
  }

  static void forward(const fp_phm& p) {
    strips(p, [&](const fp_phm_layer& y, int64_t q0, int64_t m, int64_t) {
      const int64_t n = y.n, in = y.in, out = y.out;
      const T *rule = (const T*)y.rule, *w = (const T*)y.w;
      // W's strip with k running fastest: [i][q][k]
      const int64_t ld = round_up(in, 16) + 16;
      float* s = scratch<float>(4, n * STRIP * ld);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t k = 0; k < in; ++k)
          for (int64_t q = 0; q < m; ++q) s[(i * STRIP + q) * ld + k] = up(w[(i * in + k) * out + q0 + q]);
      for (int64_t c = 0; c < n; ++c)
        for (int64_t q = 0; q < m; ++q)
          for (int64_t a = 0; a < n; ++a) {
            T* h = (T*)y.h + ((c * out + q0 + q) * n + a) * in;
            for (int64_t k = 0; k < in; k += VL) {
              vf v = {};
              for (int64_t i = 0; i < n; ++i) v = fma(splat(up(rule[(i * n + a) * n + c])), load(s + (i * STRIP + q) * ld + k), v);
              store(h + k, v, in - k);
            }
          }
    });
  }

  // part: [task][n, n, n] sums of the rule's gradient over the task's strip, added up in their order afterwards
  static void backward(const fp_phm& p) {
    int64_t widest = 0, tasks = 0;
    for (int l = 0; l < p.count; ++l) {
      const int64_t cube = int64_t(p.layers[l].n) * p.layers[l].n * p.layers[l].n;
      widest = cube > widest ? cube : widest;
      tasks += (p.layers[l].out + STRIP - 1) / STRIP;
    }
    float* part = p.layers[0].drule ? scratch<float>(0, widest * tasks) : nullptr;
    strips(p, [&](const fp_phm_layer& y, int64_t q0, int64_t m, int64_t task) {
      const int64_t n = y.n, in = y.in, out = y.out, ld = round_up(in, 16) + 16;
      const T *rule = (const T*)y.rule, *w = (const T*)y.w;
      float *s = scratch<float>(4, ld), *g = scratch<float>(5, ld), *d = scratch<float>(6, n * STRIP * ld);
      if (y.dw) memset(d, 0, n * STRIP * ld * sizeof(float));
      float* sums = part ? part + task * widest : nullptr;
      if (sums) memset(sums, 0, n * n * n * sizeof(float));
      for (int64_t q = 0; q < m; ++q)
        for (int64_t i = 0; i < n; ++i) {
          if (sums) {
            for (int64_t k = 0; k < in; ++k) s[k] = up(w[(i * in + k) * out + q0 + q]);
            for (int64_t k = in; k < ld; ++k) s[k] = 0.f;
          }
          for (int64_t c = 0; c < n; ++c)
            for (int64_t a = 0; a < n; ++a) {
              load_row((const T*)y.h + ((c * out + q0 + q) * n + a) * in, g, in, in);
              const vf r = splat(up(rule[(i * n + a) * n + c]));
              float* dk = d + (i * STRIP + q) * ld;
              vf total = {};
              for (int64_t k = 0; k < in; k += VL) {
                const vf v = load(g + k);
                if (y.dw) store(dk + k, fma(r, v, load(dk + k)));
                if (sums) total = fma(v, load(s + k), total);
              }
              if (sums) sums[(i * n + a) * n + c] += sum(total);
            }
        }
      if (!y.dw) return;
      for (int64_t i = 0; i < n; ++i)
        for (int64_t k = 0; k < in; ++k)
          for (int64_t q = 0; q < m; ++q) down(d[(i * STRIP + q) * ld + k], (T*)y.dw + (i * in + k) * out + q0 + q);
    });
    if (!part) return;
    float* total = scratch<float>(1, widest);
    memset(total, 0, widest * sizeof(float));
    for (int64_t l = 0, task = 0; l < p.count; ++l) {
      const fp_phm_layer& y = p.layers[l];
      const int64_t cube = int64_t(y.n) * y.n * y.n;
      for (int64_t q = 0; q < y.out; q += STRIP, ++task)
        for (int64_t i = 0; i < cube; ++i) total[i] += part[task * widest + i];
      if (p.shared && l + 1 < p.count) continue;
      for (int64_t i = 0; i < cube; ++i) down(total[i], (T*)y.drule + i), total[i] = 0.f;
    }
  }
};

}  // namespace FP_ISA
