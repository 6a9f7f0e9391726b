// Rows through a norm, forward and backward: what the linears' and the adapter's LayerNorm, a site's trailing norm and
// residual_norm share. Nothing behind a row's last element is read or written.
#pragma once
#include "vec.h"

namespace FP_ISA {

enum { NO_NORM, LAYERNORM, RMSNORM };  // the values of `tail`
struct RowStats { float mean, rstd; };  // an RMSNorm has mean 0

FP_INLINE RowStats row_stats_at(const float* stats, int64_t row) { return {stats[2 * row], stats[2 * row + 1]}; }
FP_INLINE void put_stats(float* stats, int64_t row, RowStats s) {
  if (stats) stats[2 * row] = s.mean, stats[2 * row + 1] = s.rstd;
}

// body(j, n) for each vector of a row, n of whose lanes are the row's. n is a constant but for the last one: no masks.
template <class Body> FP_INLINE void each_vector(int64_t n, const Body& body) {
  int64_t j = 0;
  for (; j + VL <= n; j += VL) body(j, (int64_t)VL);
  if (j < n) body(j, n - j);
}
// The sum of a row's terms, four at a time: an FMA's result is there four cycles later. term(j, n, s) is s + vector j.
template <class Term> FP_INLINE float row_sum(int64_t n, const Term& term) {
  vf s[4] = {};
  int64_t j = 0;
  for (; j + 4 * VL <= n; j += 4 * VL)
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) s[q] = term(j + q * VL, (int64_t)VL, s[q]);
  for (; j < n; j += VL) s[0] = term(j, n - j, s[0]);
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

// What v is once stored as T: a norm sees what a reader of the sum would
template <class T> FP_INLINE vf rounded(vf v) {
  if constexpr (sizeof(T) == sizeof(float)) return v;
  T t[VL];
  store(t, v);
  return load(t);
}

// Statistics in two passes (as torch: no cancellation)
template <class X> FP_INLINE RowStats row_stats(const X* row, int64_t n, float eps, int norm = LAYERNORM) {
  float mean = 0.f;
  if (norm == LAYERNORM) mean = row_sum(n, [&](int64_t j, int64_t left, vf s) { return s + load(row + j, left); }) / n;
  const vf mu = splat(mean);
  const float squares = row_sum(n, [&](int64_t j, int64_t left, vf s) {
    const vf a = fill_behind(load(row + j, left) - mu, left, 0.f);
    return fma(a, a, s);
  });
  return {mean, 1.f / sqrtf(squares / n + eps)};
}
// The same, the centred row, x - mean, left in `out`
FP_INLINE RowStats center_row(const float* x, float* out, int64_t n, float eps) {
  const float mean = row_sum(n, [&](int64_t j, int64_t left, vf s) { return s + load(x + j, left); }) / n;
  const vf mu = splat(mean);
  const float squares = row_sum(n, [&](int64_t j, int64_t left, vf s) {
    const vf a = fill_behind(load(x + j, left) - mu, left, 0.f);
    store(out + j, a);
    return fma(a, a, s);
  });
  return {mean, 1.f / sqrtf(squares / n + eps)};
}
// y = (x - mean) rstd gamma + beta, which may be x; gamma and beta zero-padded, either may be null
template <class X, class Y>
FP_INLINE void row_normalize(const X* x, Y* y, int64_t n, RowStats s, const float* gamma, const float* beta) {
  const vf mean = splat(s.mean), rstd = splat(s.rstd);
  each_vector(n, [&](int64_t j, int64_t left) {
    vf v = (load(x + j, left) - mean) * rstd;
    if (gamma) v *= load(gamma + j);
    if (beta) v += load(beta + j);
    store(y + j, v, left);
  });
}
// The gradient of a norm's input: done(j, n, v) gets v = rstd (e - mean(e) - xhat mean(e xhat)), e = g gamma, without
// the first mean for an RMSNorm. hat(j, n): xhat. e: room for the row in whole vectors, may be g. sums, or null:
// [2][width], to which the gradients of weight and bias, g xhat and g, are added.
template <class G, class Hat, class Done>
FP_INLINE void row_norm_grad_of(const G* g, const Hat& hat, int64_t n, float scale, const float* gamma, int norm, float* e, float* sums,
                                int64_t width, const Done& done) {
  const vf rstd = splat(scale);
  vf s1[2] = {}, s2[2] = {};
  auto add = [&](int64_t j, int64_t left, int q) {
    const vf d = load(g + j, left), xhat = hat(j, left);
    if (sums) {
      store(sums + j, fma(d, xhat, load(sums + j)));
      store(sums + width + j, load(sums + width + j) + d);
    }
    const vf v = gamma ? d * load(gamma + j) : d;
    s1[q] += v;
    s2[q] = fma(v, xhat, s2[q]);
    store(e + j, v);
  };
  int64_t j = 0;
  for (; j + 2 * VL <= n; j += 2 * VL) add(j, VL, 0), add(j + VL, VL, 1);
  for (; j < n; j += VL) add(j, n - j, 0);
  const vf m1 = splat(norm == LAYERNORM ? sum(s1[0] + s1[1]) / n : 0.f), m2 = splat(sum(s2[0] + s2[1]) / n);
  each_vector(n, [&](int64_t j, int64_t left) { done(j, left, (load(e + j) - m1 - hat(j, left) * m2) * rstd); });
}
// xhat from the norm's input x
template <class G, class X, class Done>
FP_INLINE void row_norm_grad(const G* g, const X* x, int64_t n, RowStats s, const float* gamma, int norm, float* e, float* sums,
                             int64_t width, const Done& done) {
  const vf mean = splat(s.mean), rstd = splat(s.rstd);
  auto hat = [=](int64_t j, int64_t left) { return (load(x + j, left) - mean) * rstd; };
  row_norm_grad_of(g, hat, n, s.rstd, gamma, norm, e, sums, width, done);
}

}  // namespace FP_ISA
