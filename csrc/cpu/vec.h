// Vectors of the widest kind the translation unit is compiled for. Included inside one namespace per instruction set
// (FP_ISA), so that no inline function of one set can be merged with another's by the linker.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <type_traits>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace FP_ISA {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif
typedef float vf __attribute__((vector_size(VL * 4), may_alias));
typedef int32_t vi __attribute__((vector_size(VL * 4), may_alias));
typedef float vfu __attribute__((vector_size(VL * 4), aligned(4), may_alias));
struct bf16 { uint16_t bits; };
struct half { uint16_t bits; };  // IEEE binary16

#define FP_INLINED __attribute__((always_inline))
#define FP_APART __attribute__((noinline))
#define FP_INLINE static inline FP_INLINED

FP_INLINE vf splat(float x) { return x - (vf){}; }
FP_INLINE vf load(const float* p) { return *(const vfu*)p; }
FP_INLINE void store(float* p, vf v) { *(vfu*)p = v; }
FP_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
// a / b: the wide division unit is slow; a reciprocal with one Newton step and a corrected quotient is within 1 ulp
FP_INLINE vf quotient(vf a, vf b) {
#if defined(__AVX512F__)
  vf r = (vf)_mm512_rcp14_ps((__m512)b);
  r = fma(fma(-b, r, splat(1.f)), r, r);
  vf q = a * r;
  return fma(fma(-b, q, a), r, q);
#else
  return a / b;
#endif
}
FP_INLINE float sum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0;
  for (int i = 0; i < VL; ++i) s += v[i];
  return s;
#endif
}
FP_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }

// bf16 <-> float, round to nearest even, NaN kept
FP_INLINE float up(bf16 x) {
  uint32_t u = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
FP_INLINE float up(float x) { return x; }
FP_INLINE void down(float f, float* out) { *out = f; }
FP_INLINE void down(float f, bf16* out) {
  uint32_t u;
  memcpy(&u, &f, 4);
  out->bits = f != f ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
FP_INLINE vf load(const bf16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  vf v;
  for (int i = 0; i < VL; ++i) v[i] = up(p[i]);
  return v;
#endif
}
FP_INLINE void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#elif defined(__AVX512F__)
  __m512i u = (__m512i)v, odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  u = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff)), 16);
  u = _mm512_mask_set1_epi32(u, _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q), 0x7fc0);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(u));
#else
  for (int i = 0; i < VL; ++i) down(v[i], p + i);
#endif
}
// half <-> float, round to nearest even, NaN kept
FP_INLINE float up(half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, e = x.bits >> 10 & 31, m = x.bits & 0x3ff;
  float f = m * 0x1p-24f;  // subnormal
  uint32_t u;
  memcpy(&u, &f, 4);
  u = sign | (e == 0 ? u : (e == 31 ? 0x7f800000 : (e + 112) << 23) | m << 13);
  memcpy(&f, &u, 4);
  return f;
}
FP_INLINE void down(float f, half* out) {
  uint32_t u;
  memcpy(&u, &f, 4);
  const uint32_t sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  uint32_t h;
  if (a > 0x7f800000) h = 0x7e00;
  else if (a >= 0x477ff000) h = 0x7c00;  // from 65520 on
  else if (a >= 0x38800000) h = (a - (112u << 23) + 0xfff + (a >> 13 & 1)) >> 13;
  else {  // below 2^-14: a unit of 0.5f's last place is half's subnormal step
    float t;
    memcpy(&t, &a, 4);
    t += .5f;
    memcpy(&h, &t, 4);
    h -= 0x3f000000;
  }
  out->bits = sign | h;
}
FP_INLINE vf load(const half* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf v;
  for (int i = 0; i < VL; ++i) v[i] = up(p[i]);
  return v;
#endif
}
FP_INLINE void store(half* p, vf v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < VL; ++i) down(v[i], p + i);
#endif
}
// first n lanes (n > VL counts as VL, n < 0 as 0), zeros behind
#if defined(__AVX512F__)
FP_INLINE __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1 << n) - 1); }
FP_INLINE vf load(const float* p, int64_t n) { return (vf)_mm512_maskz_loadu_ps(first(n), p); }
FP_INLINE vf load(const bf16* p, int64_t n) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p)), 16);
}
FP_INLINE vf load(const half* p, int64_t n) { return (vf)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
FP_INLINE void store(float* p, vf v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), (__m512)v); }
template <class T> FP_INLINE void store(T* p, vf v, int64_t n) {  // the two 16-bit types
  T t[VL];
  if (n >= VL) return store(p, v);
  store(t, v);
  _mm256_mask_storeu_epi16(p, first(n), _mm256_loadu_si256((const __m256i*)t));
}
FP_INLINE vf fill_behind(vf v, int64_t n, float with) { return (vf)_mm512_mask_mov_ps(_mm512_set1_ps(with), first(n), (__m512)v); }
FP_INLINE float top(vf v) { return _mm512_reduce_max_ps((__m512)v); }
#else
template <class T> FP_INLINE vf load(const T* p, int64_t n) {
  if (n >= VL) return load(p);
  float t[VL] = {};
  for (int i = 0; i < n; ++i) t[i] = up(p[i]);
  return load(t);
}
template <class T> FP_INLINE void store(T* p, vf v, int64_t n) {
  if (n >= VL) return store(p, v);
  for (int i = 0; i < n; ++i) down(v[i], p + i);
}
FP_INLINE vf fill_behind(vf v, int64_t n, float with) {
  for (int i = n < 0 ? 0 : n; i < VL; ++i) v[i] = with;
  return v;
}
FP_INLINE float top(vf v) {
  float m = v[0];
  for (int i = 1; i < VL; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
#endif

// Store past the caches: for outputs too large to be found there by their reader (fence() before others read them)
template <class T> FP_INLINE void stream(T* p, vf v, int64_t n) {
#if defined(__AVX512F__)
  if (n >= VL && (uintptr_t)p % (VL * sizeof(T)) == 0) {
    if constexpr (sizeof(T) == 4) return _mm512_stream_ps((float*)p, (__m512)v);
    T t[VL];
    store(t, v);
    return _mm256_stream_si256((__m256i*)p, _mm256_loadu_si256((const __m256i*)t));
  }
#endif
  store(p, v, n);
}
FP_INLINE void stream_whole(float* p, vf v) {  // p aligned
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#else
  store(p, v);
#endif
}
template <class T> FP_INLINE void stream_whole(T* p, vf v) { stream(p, v, VL); }
// Asks for memory that is needed soon, in a pattern that the hardware does not see
FP_INLINE void fetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + i, 0, 2);
}
FP_INLINE void fence() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// exp to about 1 ulp (Cephes' reduction and polynomial); 0 where that underflows, NaN kept
FP_INLINE vf exp_polynomial(vf r) {
  vf p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  return fma(p * r, r, r) + splat(1.f);
}
FP_INLINE vf vexp(vf x) {
  vf c = x < splat(-87.3f) ? splat(-87.3f) : x;
  c = c > splat(88.7f) ? splat(88.7f) : c;
  vf t = fma(c, splat(1.44269504088896341f), splat(12582912.f));  // 1.5 * 2^23: rounds to an integer
  vf n = t - splat(12582912.f);
  vf r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), c));
  vi e = ((vi)t - ((vi){} + 0x4B400000) + 127) << 23;
  return x < splat(-87.3f) ? splat(0.f) : exp_polynomial(r) * (vf)e;
}
FP_INLINE vf sigmoid(vf x) { return splat(1.f) / (splat(1.f) + vexp(-x)); }

// erf as x P(x^2) / Q(x^2) on [-4, 4]; within 3e-7 (tests/ops/test_cpu_kernels.py)
FP_INLINE vf verf(vf x) {
  x = x > splat(4.f) ? splat(4.f) : x;
  x = x < splat(-4.f) ? splat(-4.f) : x;
  vf s = x * x;
  vf p = splat(-2.72614225801306e-10f);
  p = fma(p, s, splat(2.77068142495902e-08f));
  p = fma(p, s, splat(-2.10102402082508e-06f));
  p = fma(p, s, splat(-5.69250639462346e-05f));
  p = fma(p, s, splat(-7.34990630326855e-04f));
  p = fma(p, s, splat(-2.95459980854025e-03f));
  p = fma(p, s, splat(-1.60960333262415e-02f));
  vf q = splat(-1.45660718464996e-05f);
  q = fma(q, s, splat(-2.13374055278905e-04f));
  q = fma(q, s, splat(-1.68282697438203e-03f));
  q = fma(q, s, splat(-7.37332916720468e-03f));
  q = fma(q, s, splat(-1.42647390514189e-02f));
  return quotient(x * p, q);
}

enum { IDENTITY, RELU, GELU, GELU_TANH, SILU };  // the values of fp_activation

FP_INLINE vf activate(int kind, vf z) {
  switch (kind) {
    case RELU: return z > splat(0.f) ? z : (z != z ? z : splat(0.f));
    case GELU: return splat(.5f) * z * (splat(1.f) + verf(z * splat(0.70710678118654752f)));
    case GELU_TANH: {  // (1 + tanh u) / 2 = sigmoid(2u)
      vf u = splat(0.7978845608028654f) * fma(z * z * z, splat(0.044715f), z);
      return z * sigmoid(u + u);
    }
    case SILU: return z * sigmoid(z);
    default: return z;
  }
}
FP_INLINE vf activate_grad(int kind, vf z) {
  switch (kind) {
    case RELU: return z > splat(0.f) ? splat(1.f) : splat(0.f);
    case GELU: {
      vf cdf = splat(.5f) * (splat(1.f) + verf(z * splat(0.70710678118654752f)));
      return fma(z, splat(0.3989422804014327f) * vexp(splat(-.5f) * z * z), cdf);
    }
    case GELU_TANH: {
      vf u = splat(0.7978845608028654f) * fma(z * z * z, splat(0.044715f), z);
      vf s = sigmoid(u + u);
      vf du = splat(0.7978845608028654f) * fma(z * z, splat(0.134145f), splat(1.f));
      return fma(z * s * (splat(1.f) - s), du + du, s);
    }
    case SILU: {
      vf s = sigmoid(z);
      return fma(z * s, splat(1.f) - s, s);
    }
    default: return splat(1.f);
  }
}

// dst is written in whole vectors: up to VL - 1 floats behind `padded`
template <class T> FP_INLINE void load_row(const T* src, float* dst, int n, int padded) {
  for (int j = 0; j < n; j += VL) store(dst + j, load(src + j, n - j));
  for (int j = (n + VL - 1) / VL * VL; j < padded; j += VL) store(dst + j, vf{});
}
template <class T> FP_INLINE void store_row(T* dst, const float* src, int n) {
  for (int j = 0; j < n; j += VL) store(dst + j, load(src + j), n - j);
}

FP_INLINE int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

// Scratch of the calling thread, kept between calls; slots are independent, contents undefined.
static void* scratch(int slot, size_t bytes) {
  struct Buf { void* p = nullptr; size_t n = 0; ~Buf() { free(p); } };
  static thread_local Buf bufs[32];
  Buf& b = bufs[slot];
#if defined(__SANITIZE_ADDRESS__)  // exact and new each time: reading behind it, or what an earlier call left, shows
  free(b.p);
  if (posix_memalign(&b.p, 64, bytes)) abort();
  memset(b.p, 0xff, b.n = bytes);
  return b.p;
#endif
  if (b.n < bytes) {
    free(b.p);
    b.n = 0;
    const size_t page = bytes > (1 << 20) ? 2 << 20 : 4096, whole = round_up(bytes, page);
    if (posix_memalign(&b.p, page, whole)) abort();
#if defined(__linux__)
    if (page > 4096) madvise(b.p, whole, MADV_HUGEPAGE);  // packed operands are read panel by panel: a page table entry each
#endif
    b.n = bytes;
  }
  return b.p;
}
template <class T> static T* scratch(int slot, size_t count) { return (T*)scratch(slot, count * sizeof(T)); }

template <class F> static void parallel(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  fp_parallel_for(n, grain, [](void* ctx, int64_t b, int64_t e) { (*(const F*)ctx)(b, e); }, (void*)&f);
}

}  // namespace FP_ISA
