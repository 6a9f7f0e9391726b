// Frozen linears side by side, y = p(x) [W_0; W_1; ...]^T + b, with the layer norm or GELU in front applied while A is
// packed, and the matching input gradient. Row blocks run in parallel; a row's result does not depend on the split.
#pragma once
#include "linear_direct_impl.h"

namespace FP_ISA {

template <class T, class E> struct Linear {
  using Elem = typename E::Elem;
  static constexpr bool DIRECT = std::is_same<T, typename E::InPlace>::value;
  // scratch slots: 0-3 of the calling thread (shared by its workers), 4-9 of each worker
  static constexpr int64_t AHEAD = 128;      // elements of a row that are asked for before they are read
  static constexpr size_t LARGE = 12 << 20;  // bytes of output from which no cache keeps it for the next op
  static const T* weight_row(const fp_linear& a, int64_t row) {
    int i = 0;
    for (; row >= a.n[i]; ++i) row -= a.n[i];
    return (const T*)a.w[i] + row * a.k;
  }
  static int64_t total(const fp_linear& a) {
    int64_t n = 0;
    for (int i = 0; i < a.count; ++i) n += a.n[i];
    return n;
  }

  static size_t pack_bytes(int k, int n, int transposed) {
    return (transposed ? E::b_size(n, k) : columns_size<E>(k, n)) * sizeof(Elem);
  }
  static void pack(const fp_linear& a, void* out, int transposed) {
    const int64_t n = total(a);
    if (transposed)  // B[k = n, n = K] = W
      parallel(E::pad_k(n) / 2, grain(40. * a.k), [&](int64_t begin, int64_t end) {
        pack_rows<E>((Elem*)out, n, a.k, begin, end, [&](int64_t i) { return weight_row(a, i); });
      });
    else  // B[k, n] = W[n, k]
      parallel(column_groups<E>(n), grain(400. * a.k), [&](int64_t begin, int64_t end) {
        pack_columns<E>((Elem*)out, a.k, n, begin, end, [&](int64_t i) { return weight_row(a, i); });
      });
  }
  static const Elem* packed_operand(const fp_linear& a, int64_t n, int transposed) {
    if (a.packed) return (const Elem*)a.packed;
    Elem* b = (Elem*)scratch(0, pack_bytes(a.k, n, transposed));
    pack(a, b, transposed);
    return b;
  }

  // C[m, N] = A[m, K] B for one row block; fill(k0, kb, a) packs columns k0.. of A; done(panel, C) gets each finished
  // panel of NP columns, [m, NP]; with keep_all C keeps all panels, one behind the other.
  template <class Fill, class Done>
  static void block(int64_t m, int64_t depth, int64_t n, const Elem* b, bool keep_all, float** all, Fill fill, Done done) {
    const int64_t most = depth > E::K_BLOCK ? E::DEEP_K_BLOCK : E::K_BLOCK;
    const int64_t chunks = (depth + most - 1) / most, kb = round_up((depth + chunks - 1) / chunks, 32);
    const int64_t panels = (n + E::NP - 1) / E::NP, size = panel_size<E>(m);
    const bool whole = keep_all || chunks > 1;
    Elem* ap = scratch<Elem>(5, E::a_size(m, kb));
    float* c = scratch<float>(6, whole ? size * panels : size);
    if (all) *all = c;
    for (int64_t k0 = 0; k0 < depth; k0 += kb) {
      const int64_t kn = depth - k0 < kb ? depth - k0 : kb;
      fill(k0, kn, ap);
      E::zero_a_rows(ap, kn, m);
      for (int64_t j = 0; j < panels; ++j) {
        float* cj = whole ? c + j * size : c;
        E::gemm(ap, kn, m, E::panel(b, depth, j, k0), depth, cj, k0 > 0);
        if (k0 + kn >= depth) done(j, cj);
      }
    }
  }
  // A is x [m, k], its rows ld apart
  static void fill_plain(const T* x, int64_t ld, int64_t m, int64_t k, Elem* ap) {
    if constexpr (E::TOGETHER > 1) {
      for (int64_t i0 = 0; i0 < m; i0 += E::TOGETHER) {
        const T* p = x + i0 * ld;
        E::put_a_rows(ap, k, i0, m - i0 < E::TOGETHER ? m - i0 : E::TOGETHER, [=](int64_t i, int64_t j, int64_t left) FP_INLINED {
          fetch(p + i * ld + j + AHEAD, VL * sizeof(T));  // so many rows at a time are more than the hardware follows
          return load(p + i * ld + j, left);
        });
      }
    } else {
      const RowsOfA<E> to(ap, k, m, E::pad_k(k) + 64, 9);
      for (int64_t i = 0; i < m; ++i) load_row(x + i * ld, to.at(i), k, E::pad_k(k)), to.put(i);
    }
  }
  // runs body(r0, m) over blocks of rows that fit the cache
  template <class Body> static void row_blocks(int64_t rows, int64_t depth, int64_t n, const Body& body) {
    const int64_t most = depth > E::K_BLOCK ? E::DEEP_UNITS : E::UNITS;
    parallel((rows + E::UNIT - 1) / E::UNIT, grain(2. * E::UNIT * depth * n), [&](int64_t begin, int64_t end) {
      typename E::Session session;
      (void)session;
      const int64_t units = end - begin, blocks = (units + most - 1) / most;
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t r0 = (begin + units * i / blocks) * E::UNIT, r1 = (begin + units * (i + 1) / blocks) * E::UNIT;
        body(r0, (r1 < rows ? r1 : rows) - r0);
      }
    });
  }

  static void forward(const fp_linear& a) {
    const int64_t n = total(a), width = round_up(a.k, 64) + 64;
    float* bias = scratch<float>(1, n + 128);
    memset(bias, 0, (n + 128) * 4);
    if (a.b)
      for (int64_t i = 0, at = 0; i < a.count; at += a.n[i++])
        if (a.b[i]) for (int j = 0; j < a.n[i]; ++j) bias[at + j] = up(((const T*)a.b[i])[j]);
    const float *gamma = load_vector<T>(2, a.norm_weight, a.k), *beta = load_vector<T>(3, a.norm_bias, a.k);
    if constexpr (DIRECT) return DirectLinear<T, E>::forward(a, n, LinearWeights<E>(a, a.k, n, true, a.packed), bias, gamma, beta, LARGE);
    const Elem* b = packed_operand(a, n, 0);
    const bool large = a.rows * n * sizeof(T) > LARGE;
    row_blocks(a.rows, a.k, n, [&](int64_t r0, int64_t m) {
      const T* x = (const T*)a.x + r0 * a.k;
      float* stats = scratch<float>(8, 2 * m);
      auto fill = [&](int64_t k0, int64_t kn, Elem* ap) {
        if (a.prologue == FP_NONE) return fill_plain(x + k0, a.k, m, kn, ap);
        const RowsOfA<E> to(ap, kn, m, width, 9);
        for (int64_t i = 0; i < m; ++i) {
          float* row = to.at(i);
          if (a.prologue == FP_LAYERNORM) {
            load_row(x + i * a.k, row, a.k, width);
            if (k0 == 0) put_stats(stats, i, row_stats(row, a.k, a.eps));
            row_normalize(row, row, a.k, row_stats_at(stats, i), gamma, beta);
            to.put(i, k0);
          } else {
            load_row(x + i * a.k + k0, row, kn, E::pad_k(kn));
            if (a.code && !a.then)
              GeluCode::activate_row(row, kn, a.code + (r0 + i) * GeluCode::row_bytes(a.k), a.k, k0);
            else
              for (int64_t j = 0; j < kn; j += VL) store(row + j, activate(GELU, load(row + j)));
            to.put(i);
          }
        }
      };
      block(m, a.k, n, b, false, nullptr, fill, [&](int64_t p, const float* c) {
        const int64_t j0 = p * E::NP, nc = n - j0 < E::NP ? n - j0 : E::NP;
        for (int64_t i = 0; i < m; ++i) {
          T* y = (T*)a.out + (r0 + i) * n + j0;
          for (int64_t j = 0; j < nc; j += VL) {
            vf v = load(c + i * E::NP + j) + load(bias + j0 + j);
            if (a.then && a.code) GeluCode::put_vector(a.code + (r0 + i) * GeluCode::row_bytes(n), n, j0 + j, activate_grad(GELU, v));
            if (a.then) v = activate(a.then == FP_RELU ? RELU : GELU, v);
            large ? stream(y + j, v, nc - j) : store(y + j, v, nc - j);
          }
        }
      });
      if (large) fence();
      if (a.stats && a.prologue == FP_LAYERNORM) memcpy(a.stats + 2 * r0, stats, 8 * m);
    });
  }

  static void backward(const fp_linear& a) {
    const int64_t n = total(a), width = round_up(a.k > n ? a.k : n, 64) + 64;
    const float* gamma = load_vector<T>(2, a.norm_weight, a.k);
    if constexpr (DIRECT) return DirectLinear<T, E>::backward(a, n, LinearWeights<E>(a, n, a.k, false, a.packed), gamma, LARGE);
    const Elem* b = packed_operand(a, n, 1);
    const bool norm = a.prologue == FP_LAYERNORM, large = a.rows * a.k * sizeof(T) > LARGE;
    row_blocks(a.rows, n, a.k, [&](int64_t r0, int64_t m) {
      const T *g = (const T*)a.grad + r0 * n, *x = (const T*)a.x + r0 * a.k;
      T* dx = (T*)a.out + r0 * a.k;
      float *row = scratch<float>(7, width), *c = nullptr;
      auto fill = [&](int64_t k0, int64_t kn, Elem* ap) {
        fill_plain(g + k0, n, m, kn, ap);
      };
      block(m, n, a.k, b, norm, &c, fill, [&](int64_t p, const float* cp) {
        if (norm) return;
        const int64_t j0 = p * E::NP, nc = a.k - j0 < E::NP ? a.k - j0 : E::NP;
        const bool gelu = a.prologue == FP_PROLOGUE_GELU && !a.code;
        for (int64_t i = 0; i < m; ++i) {
          const int64_t at = i * a.k + j0;
          const uint8_t* code = a.code ? a.code + (r0 + i) * GeluCode::row_bytes(a.k) : nullptr;
          if (gelu) fetch(x + at + E::NP, E::NP * sizeof(T));  // the next panel's, needed after its product
          for (int64_t j = 0; j < nc; j += VL) {
            vf v = load(cp + i * E::NP + j);
            if (code) v *= GeluCode::get(code, a.k, j0 + j);
            if (gelu) v *= activate_grad(GELU, load(x + at + j, nc - j));
            large ? stream(dx + at + j, v, nc - j) : store(dx + at + j, v, nc - j);
          }
        }
      });
      if (large) fence();
      if (norm) {
        for (int64_t i = 0; i < m; ++i) {
          gather_row<E>(c, m, i, row, a.k);
          row_norm_grad(row, x + i * a.k, a.k, row_stats_at(a.stats, r0 + i), gamma, LAYERNORM, row, nullptr, 0,
                        [out = dx + i * a.k](int64_t j, int64_t left, vf v) { store(out + j, v, left); });
        }
      }
    });
  }
};

}  // namespace FP_ISA
