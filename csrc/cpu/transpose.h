// A 16 x 16 block of 32-bit elements, turned in registers.
#pragma once
#include "vec.h"

namespace FP_ISA {
#if defined(__AVX512F__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 warns of its own intrinsics
  FP_INLINE void transpose16(const __m512i* v, __m512i* o) {
    __m512i a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      a[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
      a[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
      b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
      b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
      b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // b[4q + i]: columns i, 4+i, 8+i, 12+i (one per lane) of rows 4q..4q+3
      __m512i x = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88), y = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
      __m512i z = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd), w = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
      o[i] = _mm512_shuffle_i32x4(x, y, 0x88);
      o[8 + i] = _mm512_shuffle_i32x4(x, y, 0xdd);
      o[4 + i] = _mm512_shuffle_i32x4(z, w, 0x88);
      o[12 + i] = _mm512_shuffle_i32x4(z, w, 0xdd);
    }
  }
#endif
}  // namespace FP_ISA
