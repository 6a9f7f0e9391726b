// Matrix engine on AMX tiles. PLANES = 1: bf16 operands. PLANES = 3: fp32 operands, each split exactly into three bf16
// terms a0 + a1 + a2 (8 + 8 + 8 significant bits); six of the nine tile products are summed in fp32, smallest first,
// and the three left out are below 2^-24 of the product: fp32 accuracy at 1/6 of the bf16 rate, still above the FMA
// units' fp32 peak. What differs from FMA: subnormals count as zero. An infinite operand has NaN in its lower terms: rows
// that come out as NaN are computed once more by FMA, so that infinities spread as they do there.
// Layouts: A [row tile][k tile][plane][16 rows x 32], B [column tile][k tile][plane][16 k-pairs x 16 columns x 2].
#pragma once
#include "transpose.h"

namespace FP_ISA {

struct TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

template <int PLANES> struct EngineAmx {
  using Elem = uint16_t;
  static constexpr int TOGETHER = 16;  // rows of A that are best packed together
  using InPlace = void;  // no tensor is read where it lies
  static constexpr int MR = 16, NP = 32, UNIT = 32, BLOCK_UNITS = PLANES == 1 ? 8 : 4, TILE = 512;
  // Blocks that fit a 2 MiB second-level cache: A's [rows, K_BLOCK]; beyond K_BLOCK all of C's panels stay there too.
  static constexpr int K_BLOCK = 1024, DEEP_K_BLOCK = PLANES == 1 ? 1024 : 768, UNITS = PLANES == 1 ? 16 : 6, DEEP_UNITS = PLANES == 1 ? 8 : 6;

  struct Session {  // tiles are per-thread state and must be released, or every context switch carries them
    Session() {
      TileConfig c;
      asm volatile("ldtilecfg %0" ::"m"(c));  // gcc 12's intrinsic drops the stores that fill c
    }
    ~Session() { _tile_release(); }
  };
  static int64_t pad_k(int64_t k) { return round_up(k, 32); }
  static size_t a_size(int64_t m, int64_t k) { return round_up(m, UNIT) * pad_k(k) * PLANES; }
  static size_t b_size(int64_t k, int64_t n) { return pad_k(k) * round_up(n, NP) * PLANES; }

  // 32 floats -> PLANES vectors of 32 bf16 whose sum is exact
  static inline __attribute__((always_inline)) void split(__m512 lo, __m512 hi, __m512i* out) {
    for (int p = 0; p < PLANES; ++p) {
      out[p] = (__m512i)_mm512_cvtne2ps_pbh(hi, lo);
      if (p + 1 < PLANES) {
        lo = _mm512_sub_ps(lo, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(out[p])), 16));
        hi = _mm512_sub_ps(hi, (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(out[p], 1)), 16));
      }
    }
  }
  static inline __attribute__((always_inline)) void split(const float* p, __m512i* out) {
    split(_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16), out);
  }

  static void put_a_row(Elem* a, int64_t k, int64_t i, const float* row) {
    const int64_t kt = pad_k(k) / 32;
    Elem* p = a + i / 16 * kt * PLANES * TILE + i % 16 * 32;
    for (int64_t t = 0; t < kt; ++t, p += PLANES * TILE) {
      __m512i s[PLANES];
      split(row + t * 32, s);
      for (int q = 0; q < PLANES; ++q) _mm512_storeu_si512(p + q * TILE, s[q]);
    }
  }
  // 16 rows from row i0 on, a multiple of 16: tile by tile, so that what is written lies together. get(i, j, n): floats j..
  // of row i0 + i, n of which are the row's
  template <class Get> static void put_a_rows(Elem* a, int64_t k, int64_t i0, int64_t rows, const Get& get) {
    const int64_t kt = pad_k(k) / 32;
    Elem* p = a + i0 / 16 * kt * PLANES * TILE;
    for (int64_t t = 0; t < kt; ++t, p += PLANES * TILE) {
      const int64_t j = t * 32;
      auto put_row = [=](int64_t i, vf lo, vf hi) FP_INLINED {
        __m512i s[PLANES];
        split((__m512)lo, (__m512)hi, s);
        for (int q = 0; q < PLANES; ++q) _mm512_storeu_si512(p + q * TILE + i * 32, s[q]);
      };
      int64_t i = 0;
      if (j + 32 <= k)
        for (; i < rows; ++i) put_row(i, get(i, j, (int64_t)VL), get(i, j + VL, (int64_t)VL));
      else
        for (; i < rows; ++i) put_row(i, get(i, j, k - j), get(i, j + VL, k - j - VL));
      for (; i < 16; ++i) put_row(i, vf{}, vf{});
    }
  }
  static void zero_a_rows(Elem* a, int64_t k, int64_t m) {
    const int64_t kt = pad_k(k) / 32;
    for (int64_t i = m; i % 16; ++i)
      for (int64_t t = 0; t < kt * PLANES; ++t) _mm512_storeu_si512(a + (i / 16 * kt * PLANES + t) * TILE + i % 16 * 32, _mm512_setzero_si512());
  }
  static inline void transpose_rows(const float* src, int64_t ld, int64_t rows, __mmask16 columns, __m512* out) {
    __m512 v[16], t[16];
    for (int i = 0; i < 16; ++i) v[i] = i < rows ? _mm512_maskz_loadu_ps(columns, src + i * ld) : _mm512_setzero_ps();
    transpose16((__m512i*)v, (__m512i*)t);
    for (int i = 0; i < 16; ++i) out[i] = t[i];
  }
  // A[i, kk] = src[kk * ld + i]
  static void put_a_transposed(Elem* a, int64_t k, int64_t m, const float* src, int64_t ld) {
    const int64_t kt = pad_k(k) / 32;
    for (int64_t i0 = 0; i0 < m; i0 += 16) {
      const __mmask16 cols = m - i0 >= 16 ? 0xffff : (__mmask16)((1 << (m - i0)) - 1);
      for (int64_t t = 0; t < kt; ++t) {
        __m512 lo[16], hi[16];
        transpose_rows(src + t * 32 * ld + i0, ld, k - t * 32, cols, lo);
        transpose_rows(src + (t * 32 + 16) * ld + i0, ld, k - t * 32 - 16, cols, hi);
        Elem* p = a + (i0 / 16 * kt + t) * PLANES * TILE;
        for (int i = 0; i < 16; ++i) {
          __m512i s[PLANES];
          split(lo[i], hi[i], s);
          for (int q = 0; q < PLANES; ++q) _mm512_storeu_si512(p + q * TILE + i * 32, s[q]);
        }
      }
    }
  }
  static void put_b_rows(Elem* b, int64_t k, int64_t kk, const float* r0, const float* r1, int64_t n) {
    const int64_t kt = pad_k(k) / 32;
    const __m512i order = interleave_order();
    for (int64_t j = 0; j < round_up(n, 32); j += 16) {
      Elem* p = b + (j / 16 * kt + kk / 32) * PLANES * TILE + kk % 32 / 2 * 32;
      __m512i s[PLANES];
      split(_mm512_loadu_ps(r0 + j), _mm512_loadu_ps(r1 + j), s);  // row kk in the low half, kk+1 in the high half
      for (int q = 0; q < PLANES; ++q) _mm512_storeu_si512(p + q * TILE, _mm512_permutexvar_epi16(order, s[q]));
    }
  }
  static inline __m512i interleave_order() {  // 0, 16, 1, 17, ...
    __m512i i = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_or_si512(i, _mm512_slli_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(16)), 16));
  }
  static void put_b_columns(Elem* b, int64_t k, int64_t n0, const float* const* rows) {
    const int64_t kt = pad_k(k) / 32;
    Elem* p = b + n0 / 16 * kt * PLANES * TILE;
    for (int64_t t = 0; t < kt; ++t, p += PLANES * TILE) {
      __m512i v[PLANES][16], o[16];
      for (int j = 0; j < 16; ++j) {
        __m512i s[PLANES];
        split(rows[j] + t * 32, s);
        for (int q = 0; q < PLANES; ++q) v[q][j] = s[q];
      }
      for (int q = 0; q < PLANES; ++q) {
        transpose16(v[q], o);
        for (int j = 0; j < 16; ++j) _mm512_storeu_si512(p + q * TILE + j * 32, o[j]);
      }
    }
  }
  static const Elem* panel(const Elem* b, int64_t k, int64_t j, int64_t k0) {
    return b + (j * 2 * pad_k(k) / 32 + k0 / 32) * PLANES * TILE;
  }

  // bk: the depth B was packed with (its second column tile lies that far behind the first). The next panel of B is
  // fetched into the second-level cache on the way, a few lines a step. With one plane the depth is cut into slices of
  // 256, so that B's slice stays in the first-level cache; with three the extra loads and stores of C cost more.
  static void gemm(const Elem* a, int64_t kb, int64_t m, const Elem* b, int64_t bk, float* c, bool accumulate) {
    constexpr int64_t step = PLANES * TILE;
    const int64_t kt = pad_k(kb) / 32, slice = PLANES == 1 ? 8 : kt, pairs = (m + 31) / 32;
    const Elem *b1 = b + pad_k(bk) / 32 * step, *next = b1 + pad_k(bk) / 32 * step;
    int64_t fetch = (2 * kt * step / 32 + pairs * kt - 1) / (pairs * kt);  // cache lines a step
    if (PLANES == 3) fetch = fetch > 24 ? 0 : fetch / 6 * 6;               // in sixths; too few rows: not worth it
    for (int64_t t0 = 0; t0 < kt; t0 += slice) {
      const int64_t n = kt - t0 < slice ? kt - t0 : slice;
      const Elem* ai = a + t0 * step;
      for (int64_t i = 0; i < m; i += 32, ai += 2 * kt * step, next += fetch * n * 32) {
        if (i + 16 < m) tile<2>(ai, ai + kt * step, b + t0 * step, b1 + t0 * step, n, c + i * NP, accumulate || t0 > 0, next, fetch);
        else tile<1>(ai, ai, b + t0 * step, b1 + t0 * step, n, c + i * NP, accumulate || t0 > 0, next, fetch);
      }
    }
  }
  template <int MT> static void tile(const Elem* a0, const Elem* a1, const Elem* b0, const Elem* b1, int64_t kt, float* c, bool accumulate,
                                         const Elem* next, int64_t fetch) {
#define FP_TILE_A(q)                                 \
  {                                                  \
    _tile_loadd(4, a0 + (q) * TILE, 64);             \
    if (MT == 2) _tile_loadd(5, a1 + (q) * TILE, 64); \
  }
#define FP_TILE_B(q)                     \
  {                                      \
    _tile_loadd(6, b0 + (q) * TILE, 64); \
    _tile_loadd(7, b1 + (q) * TILE, 64); \
  }
#define FP_TILE_DOT                                     \
  {                                                     \
    _tile_dpbf16ps(0, 4, 6);                            \
    _tile_dpbf16ps(1, 4, 7);                            \
    if (MT == 2) {                                      \
      _tile_dpbf16ps(2, 5, 6);                          \
      _tile_dpbf16ps(3, 5, 7);                          \
    }                                                   \
  }
#define FP_TILE_FETCH(sixth) /* the next step's operands, and some of the next panel, while the tile unit is busy */ \
  {                                                                                           \
    for (int64_t q = (sixth) * step / 6; q < ((sixth) + 1) * step / 6; q += 32) {              \
      _mm_prefetch((const char*)(b0 + step + q), _MM_HINT_T0);                                \
      _mm_prefetch((const char*)(b1 + step + q), _MM_HINT_T0);                                \
      _mm_prefetch((const char*)(a0 + step + q), _MM_HINT_T0);                                \
      if (MT == 2) _mm_prefetch((const char*)(a1 + step + q), _MM_HINT_T0);                   \
    }                                                                                         \
    for (int64_t q = 0; q < fetch / 6; ++q, next += 32) _mm_prefetch((const char*)next, _MM_HINT_T1); \
  }
    constexpr int64_t step = PLANES * TILE;
    const int64_t depth = kt;
    alignas(64) float before[PLANES == 3 ? MT * 16 * NP : 1];
    if (PLANES == 3 && accumulate) memcpy(before, c, sizeof before);
    asm volatile("" ::: "memory");  // the tile loads below carry no memory clobber of their own
    if (accumulate) {
      _tile_loadd(0, c, NP * 4);
      _tile_loadd(1, c + 16, NP * 4);
      if (MT == 2) {
        _tile_loadd(2, c + 16 * NP, NP * 4);
        _tile_loadd(3, c + 16 * NP + 16, NP * 4);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t t = 0; t < kt; ++t, a0 += step, a1 += step, b0 += step, b1 += step) {
      if (PLANES == 1)
        for (int64_t i = 0; i < fetch; ++i, next += 32) _mm_prefetch((const char*)next, _MM_HINT_T1);
      if (PLANES == 3) {  // small terms first; each step changes one operand pair
        FP_TILE_A(0) FP_TILE_B(2) FP_TILE_DOT FP_TILE_FETCH(0)
        FP_TILE_B(1) FP_TILE_DOT FP_TILE_FETCH(1)
        FP_TILE_A(1) FP_TILE_DOT FP_TILE_FETCH(2)
        FP_TILE_B(0) FP_TILE_DOT FP_TILE_FETCH(3)
        FP_TILE_A(2) FP_TILE_DOT FP_TILE_FETCH(4)
        FP_TILE_A(0) FP_TILE_DOT FP_TILE_FETCH(5)
      } else {
        FP_TILE_A(0) FP_TILE_B(0) FP_TILE_DOT
      }
    }
    _tile_stored(0, c, NP * 4);
    _tile_stored(1, c + 16, NP * 4);
    if (MT == 2) {
      _tile_stored(2, c + 16 * NP, NP * 4);
      _tile_stored(3, c + 16 * NP + 16, NP * 4);
    }
    if (PLANES == 3) {
      asm volatile("" ::: "memory");
      const int64_t back = depth * step;
      for (int i = 0; i < MT * 16; i += 4) {
        const Elem* rows = (i < 16 ? a0 : a1) - back + i % 16 * 32;
        if (has_nan(c + i * NP)) again(rows, b0 - back, b1 - back, depth, c + i * NP, accumulate ? before + i * NP : nullptr);
      }
    }
#undef FP_TILE_A
#undef FP_TILE_B
#undef FP_TILE_DOT
#undef FP_TILE_FETCH
  }

  // four rows of C; infinities of both signs count as well, which costs nothing but time
  static inline bool has_nan(const float* c) {
    __m512 s = _mm512_setzero_ps();
    for (int i = 0; i < 4 * NP; i += 16) s = _mm512_add_ps(s, _mm512_loadu_ps(c + i));
    return _mm512_cmp_ps_mask(s, s, _CMP_UNORD_Q);
  }
  static float whole(const Elem* p) {  // an operand put together again, exactly; where the first term is not finite it is all
    float t[3];
    for (int q = 0; q < 3; ++q) {
      const uint32_t bits = (uint32_t)p[q * TILE] << 16;
      memcpy(t + q, &bits, 4);
    }
    return t[0] - t[0] == 0 ? t[0] + t[1] + t[2] : t[0];
  }
  static __m512 whole(const Elem* p, bool odd) {  // 16 of them, of every other element
    __m512 t[3];
    for (int q = 0; q < 3; ++q) {
      const __m512i v = _mm512_loadu_si512(p + q * TILE);
      t[q] = (__m512)(odd ? _mm512_and_si512(v, _mm512_set1_epi32(0xffff0000)) : _mm512_slli_epi32(v, 16));
    }
    const __m512 rest = _mm512_sub_ps(t[0], t[0]);
    return _mm512_mask_add_ps(t[0], _mm512_cmp_ps_mask(rest, rest, _CMP_ORD_Q), _mm512_add_ps(t[0], t[1]), t[2]);
  }
  // rows a .. a + 3 of the product with 32 columns, by FMA; those without a NaN stay: theirs are not their neighbours' business
  static __attribute__((noinline)) void again(const Elem* a, const Elem* b0, const Elem* b1, int64_t kt, float* c, const float* before) {
    __m512 sum[4][2];
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 2; ++j) sum[i][j] = before ? _mm512_loadu_ps(before + i * NP + j * 16) : _mm512_setzero_ps();
    for (int64_t t = 0; t < kt; ++t, a += 3 * TILE, b0 += 3 * TILE, b1 += 3 * TILE)
      for (int k = 0; k < 32; ++k) {
        const __m512 w0 = whole(b0 + k / 2 * 32, k % 2), w1 = whole(b1 + k / 2 * 32, k % 2);
        for (int i = 0; i < 4; ++i) {
          const __m512 x = _mm512_set1_ps(whole(a + i * 32 + k));
          sum[i][0] = _mm512_fmadd_ps(x, w0, sum[i][0]);
          sum[i][1] = _mm512_fmadd_ps(x, w1, sum[i][1]);
        }
      }
    for (int i = 0; i < 4; ++i) {
      const __m512 row = _mm512_add_ps(_mm512_loadu_ps(c + i * NP), _mm512_loadu_ps(c + i * NP + 16));
      if (!_mm512_cmp_ps_mask(row, row, _CMP_UNORD_Q)) continue;
      for (int j = 0; j < 2; ++j) _mm512_storeu_ps(c + i * NP + j * 16, sum[i][j]);
    }
  }
};

}  // namespace FP_ISA
