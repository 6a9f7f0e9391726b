// The frozen linears in fp32 on FMA units: an operand without prologue is read where it lies, results leave from the
// registers, and blocks of rows go to whichever thread is free. A row's result does not depend on its block.
#pragma once
#include "activation_impl.h"
#include "shares.h"

namespace FP_ISA {

template <class E> struct DirectLinear {
  typedef typename E::Left Left;
  static constexpr int64_t DEEP = 1024;  // a depth from which the product is made in chunks, its sums kept in between

  // body(first row, rows), in blocks that leave A, C and a panel of B in a second-level cache of 1 MiB
  template <class Body> static void row_blocks(int64_t rows, int64_t depth, int64_t n, const Body& body) {
    const int64_t units = (rows + E::MR - 1) / E::MR, most = (depth > DEEP ? 128 : 256) / E::MR, fair = units / (2 * fp_threads()) + 1;
    portions(units, grain(2. * E::MR * depth * n), fair < most / 4 ? fair : most / 4, most, [] { return 0; }, [&](int, Portion p) {
      const int64_t r0 = p.begin * E::MR, r1 = p.end * E::MR < rows ? p.end * E::MR : rows;
      body(r0, r1 - r0);
    });
  }
  // C of a block: panel by panel [m, NP], or whole rows
  struct Sums { float* p; int64_t row, panel; };

  // What becomes of C: it stays in c; finish(i, j, lanes, sums) gets it from the registers, or panel by panel from c,
  // which is faster where finish reads other memory
  enum Mode { KEEP, FROM_REGISTERS, FROM_PANELS };
  // C[m, n] = A B. left(k0, kn): columns k0.. of A. fetching(ahead, j): what to fetch during the last product of panel j
  template <Mode MODE, class LeftOf, class Fetching, class Finish>
  static void block(int64_t m, int64_t depth, int64_t n, const float* b, const Sums& c, const LeftOf& left, const Fetching& fetching, const Finish& finish) {
    const int64_t chunks = (depth + DEEP - 1) / DEEP, kb = round_up((depth + chunks - 1) / chunks, 32);
    for (int64_t k0 = 0; k0 < depth; k0 += kb) {
      const int64_t kn = depth - k0 < kb ? depth - k0 : kb;
      const bool last = k0 + kn >= depth;
      const Left a = left(k0, kn);
      for (int64_t j = 0; j < n; j += E::NP) {
        float* cj = c.p + j / E::NP * c.panel;
        Ahead ahead;
        if (last) fetching(ahead, j);
        auto product = [&](const auto& end) {
          E::template strip<E::MR, E::NV>(a, m, E::panel(b, depth, j / E::NP, k0), E::NP, kn, cj, c.row, k0 > 0, &ahead, end);
        };
        auto whole = [&, j](int64_t i, int v, vf s) FP_INLINED { finish(i, j + v * VL, (int64_t)VL, s); };
        auto part = [&, j](int64_t i, int v, vf s) FP_INLINED { finish(i, j + v * VL, n - j - v * VL, s); };
        if (MODE != FROM_REGISTERS || !last) product(typename E::Stored{});
        else j + E::NP <= n ? product(whole) : product(part);
        if (MODE != FROM_PANELS || !last) continue;
        auto rows = [&](const auto& end) {
          for (int64_t i = 0; i < m; ++i)
            for (int v = 0; v < E::NV; ++v) end(i, v, load(cj + i * c.row + v * VL));
        };
        j + E::NP <= n ? rows(whole) : rows(part);
      }
    }
  }
  static Sums panels(int64_t m, int64_t depth, int64_t n) {
    const bool one = depth <= DEEP;
    return {scratch<float>(6, m * (one ? E::NP : round_up(n, E::NP))), E::NP, one ? 0 : m * E::NP};
  }
  // done(true type) where whole vectors of `out` may be streamed past the caches: for outputs too large for them
  template <class Done> static void by_store(const float* out, int64_t rows, int64_t n, size_t large, const Done& done) {
    const bool past = rows * n * 4 > (int64_t)large && n % VL == 0 && (uintptr_t)out % (VL * 4) == 0;
    if (past) done(std::true_type{}), fence();
    else done(std::false_type{});
  }
  // Of the panel after the one at j: its rows of the matrix t [m, n]
  static void next_panel(Ahead& ahead, const float* t, int64_t n, int64_t m, int64_t j) {
    const int64_t at = j + E::NP, left = n - at;
    if (left > 0) ahead.add_columns(t + at, n * 4, m, (left < E::NP ? left : E::NP) * 4);
  }
  template <class Past> FP_INLINE void put(Past, float* p, vf v, int64_t lanes) {
    if (!Past::value) store(p, v, lanes);
    else if (lanes > 0) stream_whole(p, v);
  }

  static void forward(const fp_linear& a, int64_t n, const float* b, const float* bias, const float* gamma, const float* beta, size_t large) {
    row_blocks(a.rows, a.k, n, [&](int64_t r0, int64_t m) {
      const float* x = (const float*)a.x + r0 * a.k;
      float *y = (float*)a.out + r0 * n, *stats = a.stats ? a.stats + 2 * r0 : scratch<float>(8, 2 * m);
      auto left = [&](int64_t k0, int64_t kn) {
        if (a.prologue == FP_NONE) return Left{x + k0, a.k, 1};
        const int64_t ld = round_up(kn, 16) + 16;  // rows in different sets of the caches
        float* room = scratch<float>(5, m * ld);
        for (int64_t i = 0; i < m; ++i) prologue(a, x + i * a.k, r0 + i, stats + 2 * i, k0, kn, gamma, beta, room + i * ld);
        return Left{room, ld, 1};
      };
      by_store((float*)a.out, a.rows, n, large, [&](auto past) {
        block<FROM_REGISTERS>(m, a.k, n, b, panels(m, a.k, n), left, [=](Ahead& ahead, int64_t j) { if (!past) next_panel(ahead, y, n, m, j); },
                     [=](int64_t i, int64_t j, int64_t lanes, vf s) FP_INLINED { put(past, y + i * n + j, s + load(bias + j), lanes); });
      });
    });
  }
  static void prologue(const fp_linear& a, const float* x, int64_t row, float* stats, int64_t k0, int64_t kn, const float* gamma,
                       const float* beta, float* out) {
    if (a.code) {
      memcpy(out, x + k0, kn * 4);
      return GeluCode::activate_row(out, kn, a.code + row * GeluCode::row_bytes(a.k), a.k, k0);
    }
    if (a.prologue == FP_PROLOGUE_GELU) return each_vector(kn, [=](int64_t j, int64_t left) { store(out + j, activate(GELU, load(x + k0 + j, left))); });
    if (k0 == 0) put_stats(stats, 0, row_stats(x, a.k, a.eps));
    const RowStats s = row_stats_at(stats, 0);
    row_normalize(x + k0, out, kn, s, gamma ? gamma + k0 : nullptr, beta ? beta + k0 : nullptr);
  }

  static void backward(const fp_linear& a, int64_t n, const float* b, const float* gamma, size_t large) {
    if (a.prologue == FP_LAYERNORM) return backward_norm(a, n, b, gamma);
    row_blocks(a.rows, n, a.k, [&](int64_t r0, int64_t m) {
      const float *g = (const float*)a.grad + r0 * n, *x = (const float*)a.x + r0 * a.k;
      float* dx = (float*)a.out + r0 * a.k;
      auto left = [&](int64_t k0, int64_t) { return Left{g + k0, n, 1}; };
      const int64_t k = a.k;
      by_store((float*)a.out, a.rows, k, large, [&](auto past) {
        if (a.prologue == FP_NONE)
          block<FROM_REGISTERS>(m, n, k, b, panels(m, n, k), left, [=](Ahead& ahead, int64_t j) { if (!past) next_panel(ahead, dx, k, m, j); },
                       [=](int64_t i, int64_t j, int64_t lanes, vf s) FP_INLINED { put(past, dx + i * k + j, s, lanes); });
        else if (a.code)
          block<FROM_PANELS>(m, n, k, b, panels(m, n, k), left, [=](Ahead& ahead, int64_t j) { if (!past) next_panel(ahead, dx, k, m, j - E::NP); },
                             [=, code = a.code + r0 * GeluCode::row_bytes(k)](int64_t i, int64_t j, int64_t lanes, vf s) FP_INLINED {
                               if (lanes > 0) put(past, dx + i * k + j, s * GeluCode::get(code + i * GeluCode::row_bytes(k), k, j), lanes);
                             });
        else
          block<FROM_PANELS>(m, n, k, b, panels(m, n, k), left,
                       [=](Ahead& ahead, int64_t j) {
                         next_panel(ahead, x, k, m, j - E::NP);
                         if (!past) next_panel(ahead, dx, k, m, j - E::NP);
                       },
                       [=](int64_t i, int64_t j, int64_t lanes, vf s) FP_INLINED {
                         put(past, dx + i * k + j, s * activate_grad(GELU, load(x + i * k + j, lanes)), lanes);
                       });
      });
    });
  }
  static void backward_norm(const fp_linear& a, int64_t n, const float* b, const float* gamma) {
    const int64_t width = round_up(a.k, E::NP) + 16;
    row_blocks(a.rows, n, a.k, [&](int64_t r0, int64_t m) {
      const float *g = (const float*)a.grad + r0 * n, *x = (const float*)a.x + r0 * a.k;
      float *dx = (float*)a.out + r0 * a.k, *c = scratch<float>(6, m * width);
      block<KEEP>(m, n, a.k, b, {c, width, E::NP}, [&](int64_t k0, int64_t) { return Left{g + k0, n, 1}; }, [](Ahead&, int64_t) {},
                  [](int64_t, int64_t, int64_t, vf) {});
      for (int64_t i = 0; i < m; ++i)
        row_norm_grad(c + i * width, x + i * a.k, a.k, row_stats_at(a.stats, r0 + i), gamma, LAYERNORM, c + i * width, nullptr, 0,
                      [out = dx + i * a.k](int64_t j, int64_t left, vf v) { store(out + j, v, left); });
    });
  }
};

}  // namespace FP_ISA
