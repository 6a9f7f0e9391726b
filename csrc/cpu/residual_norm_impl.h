// s = x + drop(f), n = norm(s): one pass over the rows forward, one backward; the same bits for any number of threads.
#pragma once
#include "pack.h"

namespace FP_ISA {

// Philox-4x32-10 of the element's position: keep flags as factors, 4 elements a draw, the same on every backend
struct Dropout {
  uint32_t key0, key1, threshold;
  float scale;
  Dropout(int64_t seed, double p) : key0((uint32_t)seed), key1((uint32_t)((uint64_t)seed >> 32)), threshold((uint32_t)(p * 4294967296.)), scale((float)(1 / (1 - p))) {}
  void quad(uint64_t q, uint32_t out[4]) const {
    uint32_t c0 = (uint32_t)q, c1 = (uint32_t)(q >> 32), c2 = 0, c3 = 0, k0 = key0, k1 = key1;
    for (int i = 0; i < 10; ++i) {
      const uint64_t m0 = (uint64_t)0xD2511F53 * c0, m1 = (uint64_t)0xCD9E8D57 * c2;
      c0 = (uint32_t)(m1 >> 32) ^ c1 ^ k0, c1 = (uint32_t)m1;
      c2 = (uint32_t)(m0 >> 32) ^ c3 ^ k1, c3 = (uint32_t)m0;
      k0 += 0x9E3779B9, k1 += 0xBB67AE85;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
  }
  // factors of elements at .. at + n
  void fill(uint64_t at, int64_t n, float* factor) const {
    uint32_t w[4];
    for (int64_t j = 0; j < n; ++j) {
      if (j == 0 || ((at + j) & 3) == 0) quad((at + j) >> 2, w);
      factor[j] = w[(at + j) & 3] >= threshold ? scale : 0.f;
    }
  }
};

template <class T> struct ResidualNorm {
  static bool skipped(const fp_residual_norm& p, int64_t row) { return p.mask && p.mask[row / p.sample]; }
  static void forward(const fp_residual_norm& p) {
    const int64_t d = p.d, width = round_up(d, 64) + 64;
    const float *gamma = load_vector<T>(2, p.weight, d), *beta = load_vector<T>(3, p.bias, d);
    const Dropout drop(p.seed, p.dropout);
    parallel(p.rows, grain(16. * d), [&](int64_t begin, int64_t end) {
      float *row = scratch<float>(4, width), *factor = scratch<float>(5, width);
      for (int64_t i = begin; i < end; ++i) {
        load_row((const T*)p.x + i * d, row, d, width);
        if (p.f && !skipped(p, i)) {
          const T* f = (const T*)p.f + i * d;
          if (p.dropout > 0) drop.fill(i * d, d, factor);
          for (int64_t j = 0; j < d; j += VL) {
            vf v = load(f + j, d - j);
            if (p.dropout > 0) {
              float t[VL];
              store(t, v * load(factor + j));
              v = fill_behind(rounded<T>(load(t)), d - j, 0.f);  // where torch's dropout rounds
            }
            store(row + j, load(row + j) + v);
          }
        }
        for (int64_t j = 0; j < d; j += VL) store(row + j, rounded<T>(load(row + j)));
        if (p.s) store_row((T*)p.s + i * d, row, d);
        if (p.tail == NO_NORM) continue;
        const RowStats stats = row_stats(row, d, p.eps, p.tail);
        put_stats(p.stats, i, stats);
        if (p.n) row_normalize(row, (T*)p.n + i * d, d, stats, gamma, beta);
      }
    });
  }

  // One pass: the sums for the norm's parameters are taken while a row is at hand, per CHUNK of rows, whatever the
  // number of threads, and then added up in order.
  static void backward(const fp_residual_norm& p) {
    constexpr int64_t CHUNK = 32;
    const int64_t d = p.d, width = round_up(d, 64) + 64, chunks = (p.rows + CHUNK - 1) / CHUNK;
    const float* gamma = load_vector<T>(2, p.weight, d);
    const Dropout drop(p.seed, p.dropout);
    float* part = p.dweight || p.dbias ? scratch<float>(0, chunks * 2 * width) : nullptr;
    parallel(chunks, grain(24. * d * CHUNK), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        float* sums = part ? part + t * 2 * width : nullptr;
        if (sums) memset(sums, 0, 2 * width * 4);
        for (int64_t i = t * CHUNK; i < p.rows && i < (t + 1) * CHUNK; ++i) backward_row(p, i, drop, gamma, sums, width);
      }
    });
    if (!part) return;
    for (int64_t t = 1; t < chunks; ++t)
      for (int64_t j = 0; j < 2 * width; j += VL) store(part + j, load(part + j) + load(part + t * 2 * width + j));
    if (p.dweight) store_row((T*)p.dweight, part, d);
    if (p.dbias) store_row((T*)p.dbias, part + width, d);
  }
  static void backward_row(const fp_residual_norm& p, int64_t i, const Dropout& drop, const float* gamma, float* sums, int64_t width) {
    const int64_t d = p.d;
    float* g = scratch<float>(4, width);
    const T* g_s = p.g_s ? (const T*)p.g_s + i * d : nullptr;
    if (p.g_n)
      row_norm_grad((const T*)p.g_n + i * d, (const T*)p.s_in + i * d, d, row_stats_at(p.stats, i), gamma, p.tail, g, sums, width,
                    [=](int64_t j, int64_t left, vf v) { store(g + j, g_s ? v + load(g_s + j, left) : v); });
    else load_row(g_s, g, d, width);
    if (p.dx) store_row((T*)p.dx + i * d, g, d);
    if (!p.df) return;
    if (skipped(p, i)) memset(g, 0, d * 4);
    else if (p.dropout > 0) {
      float* factor = scratch<float>(6, width);
      drop.fill(i * d, d, factor);
      for (int64_t j = 0; j < d; j += VL) store(g + j, load(g + j) * load(factor + j));
    }
    store_row((T*)p.df + i * d, g, d);
  }
};

}  // namespace FP_ISA
