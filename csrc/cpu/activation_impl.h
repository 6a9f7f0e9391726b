// An activation whose derivative is kept for the backward in fewer bits than the input would take:
//   ReLU  1 bit an element
//   GELU  20 bits: the derivative lies in [-0.1291, 1.1291] and is rounded to 1 / 819200, an error of 6e-7 at most, less
//         than fp32's own in the products around it. 0 and 1 are exact, NaN is kept.
#pragma once
#include "pack.h"

namespace FP_ISA {

// A row of K derivatives, K a multiple of 32: K upper halves of 16 bits, then K / 2 bytes of two lower halves of 4 bits,
// byte i of 16 for elements i and 16 + i of a group of 32. The layout does not depend on the instruction set.
struct GeluCode {
  static constexpr int GROUP = 32, NAN_CODE = (1 << 20) - 1;
  static constexpr float STEPS = 819200.f, ZERO = 106496.f;
  static int64_t row_bytes(int64_t k) { return k / 2 * 5; }
  static int whole(float g) { return g == g ? (int)(g * STEPS + (ZERO + .5f)) : NAN_CODE; }

  // elements j .. j + 32 of the row
  FP_INLINE void put(uint8_t* row, int64_t k, int64_t j, const float* g) {
    uint16_t* high = (uint16_t*)row + j;
    uint8_t* low = row + 2 * k + j / 2;
#if defined(__AVX512F__)
    __m512i c[2];
    for (int i = 0; i < 2; ++i) {
      const __m512 v = (__m512)load(g + 16 * i);
      c[i] = _mm512_cvttps_epi32((__m512)fma((vf)v, splat(STEPS), splat(ZERO + .5f)));
      c[i] = _mm512_mask_set1_epi32(c[i], _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), NAN_CODE);
      _mm256_storeu_si256((__m256i*)(high + 16 * i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(c[i], 4)));
    }
    const __m512i mask = _mm512_set1_epi32(15);
    c[0] = _mm512_or_si512(_mm512_and_si512(c[0], mask), _mm512_slli_epi32(_mm512_and_si512(c[1], mask), 4));
    _mm_storeu_si128((__m128i*)low, _mm512_cvtepi32_epi8(c[0]));
#else
    for (int i = 0; i < 16; ++i) {
      const int a = whole(g[i]), b = whole(g[16 + i]);
      high[i] = a >> 4, high[16 + i] = b >> 4;
      low[i] = (a & 15) | (b & 15) << 4;
    }
#endif
  }
  // Elements j .. j + VL, j a multiple of VL: in ascending order, since the first half of a group clears the second's bits
  FP_INLINE void put_vector(uint8_t* row, int64_t k, int64_t j, vf g) {
    uint16_t* high = (uint16_t*)row + j;
    uint8_t* low = row + 2 * k + j / GROUP * 16 + j % 16;
#if defined(__AVX512F__)
    __m512i c = _mm512_cvttps_epi32((__m512)fma(g, splat(STEPS), splat(ZERO + .5f)));
    c = _mm512_mask_set1_epi32(c, _mm512_cmp_ps_mask((__m512)g, (__m512)g, _CMP_UNORD_Q), NAN_CODE);
    _mm256_storeu_si256((__m256i*)high, _mm512_cvtepi32_epi16(_mm512_srli_epi32(c, 4)));
    __m128i l = _mm512_cvtepi32_epi8(_mm512_and_si512(c, _mm512_set1_epi32(15)));
    if (j % GROUP >= 16) l = _mm_or_si128(_mm_slli_epi16(l, 4), _mm_loadu_si128((const __m128i*)low));
    _mm_storeu_si128((__m128i*)low, l);
#else
    for (int i = 0; i < VL; ++i) {
      const int c = whole(g[i]);
      high[i] = c >> 4;
      low[i] = j % GROUP < 16 ? c & 15 : low[i] | (c & 15) << 4;
    }
#endif
  }
  // elements j .. j + VL, j a multiple of VL
  FP_INLINE vf get(const uint8_t* row, int64_t k, int64_t j) {
    const uint16_t* high = (const uint16_t*)row + j;
    const uint8_t* low = row + 2 * k + j / GROUP * 16 + j % 16;
    const int shift = j % GROUP < 16 ? 0 : 4;
    vi c;
#if defined(__AVX512F__)
    c = (vi)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)high)), 4);
    c |= ((vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)low)) >> shift) & 15;
#else
    for (int i = 0; i < VL; ++i) c[i] = high[i] << 4 | (low[i] >> shift & 15);
#endif
    const vf g = (__builtin_convertvector(c, vf) - splat(ZERO)) * splat(1.f / STEPS);
    return c == NAN_CODE ? splat(NAN) : g;
  }
  // row[j] <- gelu(row[j]) for j < n, the derivatives kept as elements j0 .. of the code
  FP_INLINE void activate_row(float* row, int64_t n, uint8_t* code, int64_t k, int64_t j0) {
    for (int64_t j = 0; j < n; j += GROUP) {
      float g[GROUP];
      for (int i = 0; i < GROUP; i += VL) {
        const vf z = load(row + j + i);
        store(g + i, activate_grad(GELU, z));
        store(row + j + i, activate(GELU, z));
      }
      put(code, k, j0 + j, g);
    }
  }
};

template <class T> struct Activation {
  static constexpr int64_t CHUNK = 2048;  // elements of ReLU's bits a task takes at least

  static void forward(const fp_activation_code& a) {
    if (a.activation == FP_RELU) return relu(a);
    parallel(a.rows, grain(40. * a.k), [&](int64_t begin, int64_t end) {
      float* row = scratch<float>(4, round_up(a.k, 64) + 64);
      for (int64_t i = begin; i < end; ++i) {
        load_row((const T*)a.x + i * a.k, row, a.k, a.k);
        GeluCode::activate_row(row, a.k, a.code + i * GeluCode::row_bytes(a.k), a.k, 0);
        store_row((T*)a.out + i * a.k, row, a.k);
      }
    });
  }
  static void backward(const fp_activation_code& a) {
    if (a.activation == FP_RELU) return relu_backward(a);
    parallel(a.rows, grain(10. * a.k), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const uint8_t* code = a.code + i * GeluCode::row_bytes(a.k);
        const T* g = (const T*)a.x + i * a.k;
        T* dx = (T*)a.out + i * a.k;
        for (int64_t j = 0; j < a.k; j += VL) store(dx + j, load(g + j) * GeluCode::get(code, a.k, j));
      }
    });
  }

  // Elements [begin, end) of all, eight to a byte; body(at, n)
  template <class Body> static void bytes(const fp_activation_code& a, const Body& body) {
    const int64_t n = a.rows * a.k;
    parallel((n + CHUNK - 1) / CHUNK, grain(4. * CHUNK), [&](int64_t begin, int64_t end) {
      end = end * CHUNK < n ? end * CHUNK : n;
      for (int64_t at = begin * CHUNK; at < end; at += 16) body(at, end - at);
    });
  }
  static void relu(const fp_activation_code& a) {
    bytes(a, [&](int64_t at, int64_t n) {
      unsigned bits = 0;
      for (int i = 0; i < 16 && i < n; i += VL) {
        vf z = load((const T*)a.x + at + i, n - i);
        if (a.out) store((T*)a.out + at + i, activate(RELU, z), n - i);
        bits |= positive(z) << i;
      }
      a.code[at / 8] = bits;
      if (n > 8) a.code[at / 8 + 1] = bits >> 8;
    });
  }
  static void relu_backward(const fp_activation_code& a) {
    bytes(a, [&](int64_t at, int64_t n) {
      const unsigned bits = a.code[at / 8] | (n > 8 ? a.code[at / 8 + 1] << 8 : 0);
      for (int i = 0; i < 16 && i < n; i += VL) {
        vf g = load((const T*)a.x + at + i, n - i) * splat(a.scale);
        store((T*)a.out + at + i, chosen(g, bits >> i), n - i);
      }
    });
  }
  FP_INLINE unsigned positive(vf z) {  // NaN counts, as in torch's backward
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)z, _mm512_setzero_ps(), _CMP_NLE_UQ);
#else
    unsigned bits = 0;
    for (int i = 0; i < VL; ++i) bits |= (unsigned)!(z[i] <= 0) << i;
    return bits;
#endif
  }
  FP_INLINE vf chosen(vf g, unsigned bits) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_mov_ps((__mmask16)bits, (__m512)g);
#else
    for (int i = 0; i < VL; ++i) g[i] = bits >> i & 1 ? g[i] : 0.f;
    return g;
#endif
  }
};

}  // namespace FP_ISA
