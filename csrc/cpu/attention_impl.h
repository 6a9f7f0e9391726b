// Attention of one (sample, head) per task: scores and probabilities never reach memory beyond the cache.
// The forward saves the log-sum-exp; the backward recomputes the probabilities from it, keys as rows, so that dV and dK
// come out directly and only dS is transposed (for dQ).
#pragma once
#include "attention_direct_impl.h"

namespace FP_ISA {

template <class T, class E> struct Attention {
  using Elem = typename E::Elem;
  static constexpr int64_t BLOCK = 96;

  struct Head {  // rows of one head of one of q, k, v
    const T* base;
    int64_t stride;
    const T* row(int64_t t) const { return base + t * stride; }
    // a few hundred bytes each, far apart: the hardware does not see the pattern. Call it while packing rows in order.
    const T* next_row(int64_t t, int64_t dim) const {
      fetch(row(t + 12), dim * sizeof(T));
      return row(t);
    }
  };
  static Head head(const void* p, const fp_attention& a, int64_t bh, int which, int parts) {
    const int64_t hd = (int64_t)a.heads * a.head_dim, b = bh / a.heads, h = bh % a.heads;
    return {(const T*)p + b * a.tokens * parts * hd + which * hd + h * a.head_dim, parts * hd};
  }
  // rows [r0, r0 + m) as left operand
  static void pack_a(Elem* out, const Head& x, int64_t r0, int64_t m, int64_t dim, float* tmp) {
    for (int64_t i = 0; i < m; ++i) {
      load_row(x.next_row(r0 + i, dim), tmp, dim, E::pad_k(dim));
      E::put_a_row(out, dim, i, tmp);
    }
    E::zero_a_rows(out, dim, m);
  }
  // B[k = dim, n = tokens]: the transpose
  static void pack_transposed(Elem* out, const Head& x, int64_t n, int64_t dim) {
    pack_columns<E>(out, dim, n, 0, column_groups<E>(n), [&](int64_t i) { return x.next_row(i, dim); });
  }
  // B[k = tokens r0.., n = dim]
  static void pack_b(Elem* out, const Head& x, int64_t r0, int64_t k, int64_t dim) {
    pack_rows<E>(out, k, dim, 0, E::pad_k(k) / 2, [&](int64_t i) { return x.next_row(r0 + i, dim); });
  }
  // scratch of one task: tmp rows, then what carve() hands out
  struct Arena {
    char* p;
    template <class U> U* carve(int64_t n) {
      U* out = (U*)p;
      p += round_up(n * sizeof(U), 64);
      return out;
    }
  };
  template <class Body> static void heads(const fp_attention& a, size_t bytes, const Body& body) {
    parallel(a.batch * a.heads, grain(4. * a.tokens * (a.tokens + 16) * (a.head_dim + 16)), [&](int64_t begin, int64_t end) {
      typename E::Session session;
      (void)session;
      for (int64_t bh = begin; bh < end; ++bh) body(bh, Arena{(char*)scratch(4, bytes)});
    });
  }

  static constexpr bool PLAIN = std::is_same<T, float>::value && std::is_same<Elem, float>::value;  // nothing to convert
  static void forward(const fp_attention& a) {
    if constexpr (PLAIN)
      if (DirectAttention<E>::serves(a.head_dim)) return DirectAttention<E>::forward(a, softmax_row);
    const int64_t n = a.tokens, dim = a.head_dim, width = round_up(n > dim ? n : dim, 64) + 128;
    const size_t bytes = 4096 + width * 4 + sizeof(Elem) * (columns_size<E>(dim, n) + E::b_size(n, dim) + E::a_size(BLOCK, dim) + E::a_size(BLOCK, n)) +
                         4 * (product_size<E>(BLOCK, n) + product_size<E>(BLOCK, dim) + BLOCK);
    heads(a, bytes, [&](int64_t bh, Arena arena) {
      const Head q = head(a.qkv, a, bh, 0, 3), k = head(a.qkv, a, bh, 1, 3), v = head(a.qkv, a, bh, 2, 3), o = head(a.out, a, bh, 0, 1);
      float* tmp = arena.template carve<float>(width);
      Elem *kt = arena.template carve<Elem>(columns_size<E>(dim, n)), *vb = arena.template carve<Elem>(E::b_size(n, dim));
      Elem *qa = arena.template carve<Elem>(E::a_size(BLOCK, dim)), *pa = arena.template carve<Elem>(E::a_size(BLOCK, n));
      float *s = arena.template carve<float>(product_size<E>(BLOCK, n)), *c = arena.template carve<float>(product_size<E>(BLOCK, dim)), *inv = arena.template carve<float>(BLOCK);
      const float* mask = a.key_mask ? a.key_mask + bh / a.heads * n : nullptr;
      pack_transposed(kt, k, n, dim);
      pack_b(vb, v, 0, n, dim);
      for (int64_t r0 = 0; r0 < n; r0 += BLOCK) {
        const int64_t m = n - r0 < BLOCK ? n - r0 : BLOCK;
        pack_a(qa, q, r0, m, dim, tmp);
        multiply<E>(qa, dim, m, kt, n, s);
        for (int64_t i = 0; i < m; ++i) {
          gather_row<E>(s, m, i, tmp, n);
          const float lse = softmax_row(tmp, n, a.scale, mask, inv + i);
          if (a.lse) a.lse[bh * n + r0 + i] = lse;
          E::put_a_row(pa, n, i, tmp);
        }
        E::zero_a_rows(pa, n, m);
        multiply<E>(pa, n, m, vb, dim, c);
        for (int64_t i = 0; i < m; ++i) {
          gather_row<E>(c, m, i, tmp, dim);
          for (int64_t j = 0; j < dim; j += VL) store((T*)o.row(r0 + i) + j, load(tmp + j) * splat(inv[i]), dim - j);
        }
      }
    });
  }
  // row <- exp(scale row + mask - max), zero behind n; *inv = 1 / sum; returns the log-sum-exp
  static float softmax_row(float* row, int64_t n, float scale, const float* mask, float* inv) {
    const int64_t np = round_up(n, VL);
    vf high = splat(-INFINITY);
    for (int64_t j = 0; j < np; j += VL) {
      vf v = load(row + j) * splat(scale);
      if (mask) v += load(mask + j, n - j);
      if (j + VL > n) v = fill_behind(v, n - j, -INFINITY);
      high = vmax(high, v);
      store(row + j, v);
    }
    const float mx = top(high);
    vf total = {};
    for (int64_t j = 0; j < np; j += VL) {
      vf e = vexp(load(row + j) - splat(mx));
      total += e;
      store(row + j, e);
    }
    const float z = sum(total);
    *inv = 1.f / z;
    return mx + logf(z);
  }

  static void backward(const fp_attention& a) {
    if constexpr (PLAIN)
      if (DirectAttention<E>::serves(a.head_dim)) return DirectAttention<E>::backward(a);
    const int64_t n = a.tokens, dim = a.head_dim, width = round_up(n > dim ? n : dim, 64) + 128;
    const int64_t kept = a.out_in ? BLOCK : n;  // without out, delta is known after all keys
    const size_t bytes = 8192 + 4 * (width + 2 * round_up(n, 64)) +
                         sizeof(Elem) * (2 * columns_size<E>(dim, n) + 2 * E::b_size(n, dim) + E::b_size(BLOCK, dim) + 2 * E::a_size(BLOCK, dim) + 2 * E::a_size(BLOCK, n) + E::a_size(n, BLOCK)) +
                         4 * (2 * product_size<E>(BLOCK, n) + 2 * kept * width + product_size<E>(BLOCK, dim) + product_size<E>(n, dim));
    heads(a, bytes, [&](int64_t bh, Arena arena) { backward_head(a, bh, arena, width, kept); });
  }
  static void backward_head(const fp_attention& a, int64_t bh, Arena arena, int64_t width, int64_t kept) {
    const int64_t n = a.tokens, dim = a.head_dim;
    const Head q = head(a.qkv, a, bh, 0, 3), k = head(a.qkv, a, bh, 1, 3), v = head(a.qkv, a, bh, 2, 3);
    const Head o = head(a.out_in, a, bh, 0, 1), g = head(a.grad, a, bh, 0, 1);
    const Head dq = head(a.dqkv, a, bh, 0, 3), dk = head(a.dqkv, a, bh, 1, 3), dv = head(a.dqkv, a, bh, 2, 3);
    float *tmp = arena.template carve<float>(width), *delta = arena.template carve<float>(round_up(n, 64)), *lse = arena.template carve<float>(round_up(n, 64));
    Elem *qt = arena.template carve<Elem>(columns_size<E>(dim, n)), *gt = arena.template carve<Elem>(columns_size<E>(dim, n));
    Elem *qb = arena.template carve<Elem>(E::b_size(n, dim)), *gb = arena.template carve<Elem>(E::b_size(n, dim)), *kb = arena.template carve<Elem>(E::b_size(BLOCK, dim));
    Elem *ka = arena.template carve<Elem>(E::a_size(BLOCK, dim)), *va = arena.template carve<Elem>(E::a_size(BLOCK, dim));
    Elem *pa = arena.template carve<Elem>(E::a_size(BLOCK, n)), *sa = arena.template carve<Elem>(E::a_size(BLOCK, n)), *st = arena.template carve<Elem>(E::a_size(n, BLOCK));
    float *s = arena.template carve<float>(product_size<E>(BLOCK, n)), *dp = arena.template carve<float>(product_size<E>(BLOCK, n));
    float *probs = arena.template carve<float>(kept * width), *dprobs = arena.template carve<float>(kept * width);
    float *c = arena.template carve<float>(product_size<E>(BLOCK, dim)), *cq = arena.template carve<float>(product_size<E>(n, dim));
    const float* mask = a.key_mask ? a.key_mask + bh / a.heads * n : nullptr;

    for (int64_t i = 0; i < n; ++i) {
      vf acc = {};
      if (a.out_in) for (int64_t j = 0; j < dim; j += VL) acc = fma(load(g.row(i) + j, dim - j), load(o.row(i) + j, dim - j), acc);
      delta[i] = sum(acc);
      lse[i] = a.lse[bh * n + i];
    }
    for (int64_t i = n; i < round_up(n, 64); ++i) delta[i] = 0.f, lse[i] = INFINITY;  // p = 0 behind the last query
    pack_transposed(qt, q, n, dim);
    pack_transposed(gt, g, n, dim);
    pack_b(qb, q, 0, n, dim);
    pack_b(gb, g, 0, n, dim);
    // keys [r0, r0 + m): p and dp to rows at `to`; delta, which is sum p dp, grows where out is not there to tell it
    auto probabilities = [&](int64_t r0, int64_t m, int64_t to) {
      pack_a(ka, k, r0, m, dim, tmp);
      pack_a(va, v, r0, m, dim, tmp);
      multiply<E>(ka, dim, m, qt, n, s);
      multiply<E>(va, dim, m, gt, n, dp);
      const vf scale = splat(a.scale);
      for (int64_t i = 0; i < m; ++i) {
        float *pi = probs + (to + i) * width, *di = dprobs + (to + i) * width;
        gather_row<E>(s, m, i, pi, n);
        gather_row<E>(dp, m, i, di, n);
        const vf km = splat(mask ? mask[r0 + i] : 0.f);
        for (int64_t j = 0; j < n; j += VL) {
          const vf e = vexp(load(pi + j) * scale + km - load(lse + j));
          store(pi + j, e);
          if (!a.out_in) store(delta + j, load(delta + j) + e * load(di + j));
        }
      }
    };
    if (!a.out_in)
      for (int64_t r0 = 0; r0 < n; r0 += BLOCK) probabilities(r0, n - r0 < BLOCK ? n - r0 : BLOCK, r0);
    for (int64_t r0 = 0; r0 < n; r0 += BLOCK) {
      const int64_t m = n - r0 < BLOCK ? n - r0 : BLOCK, at = a.out_in ? 0 : r0;
      if (a.out_in) probabilities(r0, m, 0);
      const vf scale = splat(a.scale);
      for (int64_t i = 0; i < m; ++i) {
        const float* pi = probs + (at + i) * width;
        float* si = dprobs + (at + i) * width;
        for (int64_t j = 0; j < n; j += VL) store(si + j, load(pi + j) * (load(si + j) - load(delta + j)) * scale);
        E::put_a_row(pa, n, i, pi);
        E::put_a_row(sa, n, i, si);
      }
      E::zero_a_rows(pa, n, m);
      E::zero_a_rows(sa, n, m);
      multiply<E>(pa, n, m, gb, dim, c);
      write_rows(dv, r0, m, c, dim, tmp);
      multiply<E>(sa, n, m, qb, dim, c);
      write_rows(dk, r0, m, c, dim, tmp);
      E::put_a_transposed(st, m, n, dprobs + at * width, width);
      pack_b(kb, k, r0, m, dim);
      multiply<E>(st, m, n, kb, dim, cq, r0 > 0);
    }
    write_rows(dq, 0, n, cq, dim, tmp);
  }
  static void write_rows(const Head& to, int64_t r0, int64_t m, const float* c, int64_t dim, float* tmp) {
    for (int64_t i = 0; i < m; ++i) {
      gather_row<E>(c, m, i, tmp, dim);
      store_row((T*)to.row(r0 + i), tmp, dim);
    }
  }
};

}  // namespace FP_ISA
