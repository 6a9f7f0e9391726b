// fp32 attention on FMA units, heads of 64, 128, ... channels: operands are read where they lie and results written
// where they belong; only what is used across (keys' and values' rows, 9 KB apart in qkv) is packed. Same mathematics as
// attention_impl.h; a block of rows' scores stays in the caches nearest to the core.
#pragma once
#include "pack.h"

namespace FP_ISA {

template <class E> struct DirectAttention {
  static constexpr int64_t BLOCK = 48, WIDE = 64;  // rows: whole tiles of 8 and of 6; columns of those of 6
  struct Head {
    float* base;
    int64_t stride;
    float* row(int64_t t) const { return base + t * stride; }
    typename E::Left left(int64_t t) const { return {row(t), stride, 1}; }
  };
  static bool serves(int64_t dim) { return E::DIRECT && dim % WIDE == 0; }
  static Head head(const void* p, const fp_attention& a, int64_t bh, int which, int parts) {
    const int64_t hd = (int64_t)a.heads * a.head_dim, b = bh / a.heads, h = bh % a.heads;
    return {(float*)p + b * a.tokens * parts * hd + which * hd + h * a.head_dim, parts * hd};
  }
  // C[m, dim] (+)= A[m, k] B[k, dim], B dense
  static void wide(typename E::Left a, int64_t m, int64_t k, const float* b, int64_t dim, float* c, int64_t ldc, bool accumulate = false) {
    for (int64_t j = 0; j < dim; j += WIDE) E::template strip<6, 4>(a, m, b + j, dim, k, c + j, ldc, accumulate);
  }
  static void copy_rows(float* out, const Head& x, int64_t r0, int64_t m, int64_t dim) {
    for (int64_t i = 0; i < m; ++i) memcpy(out + i * dim, x.row(r0 + i), dim * 4);
  }
  static void pack_transposed(float* out, const Head& x, int64_t n, int64_t dim) {
    pack_columns<E>(out, dim, n, 0, column_groups<E>(n), [&](int64_t i) {
      fetch(x.row(i + 12), dim * 4);
      return x.row(i);
    });
  }
  struct Arena {
    float* p;
    float* carve(int64_t n) {
      float* out = p;
      p += round_up(n, 16);
      return out;
    }
  };
  template <class Body> static void heads(const fp_attention& a, size_t floats, const Body& body) {
    parallel(a.batch * a.heads, grain(4. * a.tokens * (a.tokens + 16) * (a.head_dim + 16)), [&](int64_t begin, int64_t end) {
      for (int64_t bh = begin; bh < end; ++bh) body(bh, Arena{scratch<float>(4, floats)});
    });
  }

  template <class Softmax> static void forward(const fp_attention& a, const Softmax& softmax_row) {
    const int64_t n = a.tokens, dim = a.head_dim, ld = round_up(n, E::NP);
    heads(a, columns_size<E>(dim, n) + n * dim + BLOCK * (ld + 16) + 1024, [&](int64_t bh, Arena arena) {
      const Head q = head(a.qkv, a, bh, 0, 3), k = head(a.qkv, a, bh, 1, 3), v = head(a.qkv, a, bh, 2, 3), o = head(a.out, a, bh, 0, 1);
      float *kt = arena.carve(columns_size<E>(dim, n)), *vr = arena.carve(n * dim), *s = arena.carve(BLOCK * ld);
      const float* mask = a.key_mask ? a.key_mask + bh / a.heads * n : nullptr;
      pack_transposed(kt, k, n, dim);
      copy_rows(vr, v, 0, n, dim);
      for (int64_t r0 = 0; r0 < n; r0 += BLOCK) {
        const int64_t m = n - r0 < BLOCK ? n - r0 : BLOCK;
        float inv[BLOCK];
        E::product(q.left(r0), m, dim, kt, n, s, ld, E::NP);
        for (int64_t i = 0; i < m; ++i) {
          const float lse = softmax_row(s + i * ld, n, a.scale, mask, inv + i);
          if (a.lse) a.lse[bh * n + r0 + i] = lse;
        }
        wide({s, ld, 1}, m, n, vr, dim, o.row(r0), o.stride);
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = 0; j < dim; j += VL) store(o.row(r0 + i) + j, load(o.row(r0 + i) + j) * splat(inv[i]));
      }
    });
  }

  static void backward(const fp_attention& a) {
    const int64_t n = a.tokens, dim = a.head_dim, ld = round_up(n, E::NP);
    const int64_t kept = a.out_in ? BLOCK : n;  // without out, delta is known after all keys
    const size_t floats = 2 * columns_size<E>(dim, n) + 3 * n * dim + 2 * ld + 2 * kept * ld + BLOCK * dim + 1024;
    heads(a, floats, [&](int64_t bh, Arena arena) { backward_head(a, bh, arena, ld, kept); });
  }
  // Rows are keys: dV and dK are whole sums over the queries, dQ is added to block by block.
  static void backward_head(const fp_attention& a, int64_t bh, Arena arena, int64_t ld, int64_t kept) {
    const int64_t n = a.tokens, dim = a.head_dim;
    const Head q = head(a.qkv, a, bh, 0, 3), k = head(a.qkv, a, bh, 1, 3), v = head(a.qkv, a, bh, 2, 3);
    const Head o = head(a.out_in, a, bh, 0, 1), g = head(a.grad, a, bh, 0, 1);
    const Head dq = head(a.dqkv, a, bh, 0, 3), dk = head(a.dqkv, a, bh, 1, 3), dv = head(a.dqkv, a, bh, 2, 3);
    float *qt = arena.carve(columns_size<E>(dim, n)), *gt = arena.carve(columns_size<E>(dim, n));
    float *qr = arena.carve(n * dim), *gr = arena.carve(n * dim), *kr = arena.carve(BLOCK * dim), *sums = arena.carve(n * dim);
    float *delta = arena.carve(ld), *lse = arena.carve(ld), *probs = arena.carve(kept * ld), *dprobs = arena.carve(kept * ld);
    const float* mask = a.key_mask ? a.key_mask + bh / a.heads * n : nullptr;
    pack_transposed(qt, q, n, dim);
    pack_transposed(gt, g, n, dim);
    copy_rows(qr, q, 0, n, dim);
    copy_rows(gr, g, 0, n, dim);
    for (int64_t i = 0; i < n; ++i) {
      vf acc = {};
      if (a.out_in) for (int64_t j = 0; j < dim; j += VL) acc = fma(load(gr + i * dim + j), load(o.row(i) + j), acc);
      delta[i] = sum(acc);
      lse[i] = a.lse[bh * n + i];
    }
    for (int64_t i = n; i < ld; ++i) delta[i] = 0.f, lse[i] = INFINITY;  // p = 0 behind the last query
    // keys [r0, r0 + m): p and dp to rows at `to`; delta, which is sum p dp, grows where out is not there to tell it
    auto probabilities = [&](int64_t r0, int64_t m, int64_t to) {
      E::product(k.left(r0), m, dim, qt, n, probs + to * ld, ld, E::NP);
      E::product(v.left(r0), m, dim, gt, n, dprobs + to * ld, ld, E::NP);
      const vf scale = splat(a.scale);
      for (int64_t i = 0; i < m; ++i) {
        const vf km = splat(mask ? mask[r0 + i] : 0.f);
        float *pi = probs + (to + i) * ld, *di = dprobs + (to + i) * ld;
        for (int64_t j = 0; j < n; j += VL) {
          const vf e = vexp(load(pi + j) * scale + km - load(lse + j));
          store(pi + j, e);
          if (a.out_in) store(di + j, e * (load(di + j) - load(delta + j)) * scale);
          else store(delta + j, load(delta + j) + e * load(di + j));
        }
      }
    };
    if (!a.out_in)
      for (int64_t r0 = 0; r0 < n; r0 += BLOCK) probabilities(r0, n - r0 < BLOCK ? n - r0 : BLOCK, r0);
    for (int64_t r0 = 0; r0 < n; r0 += BLOCK) {
      const int64_t m = n - r0 < BLOCK ? n - r0 : BLOCK, at = a.out_in ? 0 : r0;
      float *p = probs + at * ld, *ds = dprobs + at * ld;
      if (a.out_in) {
        probabilities(r0, m, 0);
      } else {
        const vf scale = splat(a.scale);
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = i * ld; j < i * ld + n; j += VL) store(ds + j, load(p + j) * (load(ds + j) - load(delta + j - i * ld)) * scale);
      }
      wide({p, ld, 1}, m, n, gr, dim, dv.row(r0), dv.stride);
      wide({ds, ld, 1}, m, n, qr, dim, dk.row(r0), dk.stride);
      copy_rows(kr, k, r0, m, dim);
      wide({ds, 1, ld}, n, m, kr, dim, sums, dim, r0 > 0);
    }
    for (int64_t i = 0; i < n; ++i) memcpy(dq.row(i), sums + i * dim, dim * 4);
  }
};

}  // namespace FP_ISA
