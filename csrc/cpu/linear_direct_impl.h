// The frozen linears on vector units: an operand without prologue is read where it lies, results leave from the
// registers, and blocks go to whichever thread is free. A row's result does not depend on its block.
#pragma once
#include "activation_impl.h"
#include "linear_weights.h"

namespace FP_ISA {

template <class T, class E> struct DirectLinear {
  typedef typename E::Elem Elem;  // T as the engine reads it
  typedef typename E::Left Left;
  typedef LinearWeights<E> Weights;
  struct Block { int64_t row, m, first, last; };  // rows row.. of A, panels first .. last of B

  // body(block), in blocks that leave A, C and a panel of B in a second-level cache of 1 MiB: of few rows by columns
  template <class Body> static void blocks(int64_t rows, const Weights& b, bool by_columns, const Body& body) {
    auto start = [] { return 0; };
    if (by_columns) {
      const int64_t some = Weights::TOGETHER, all = (b.panels() + some - 1) / some, fair = (all + fp_threads() - 1) / fp_threads();
      return portions(all, grain(2. * some * E::NP * rows * b.depth), b.depth > b.chunk ? fair : 1, fair, start, [&](int, Portion p) {
        body(Block{0, rows, p.begin * some, p.end * some < b.panels() ? p.end * some : b.panels()});
      });
    }
    const int64_t units = (rows + E::MR - 1) / E::MR, most = (b.depth > b.chunk ? 128 : 256) / E::MR, fair = units / (2 * fp_threads()) + 1;
    portions(units, grain(2. * E::MR * b.depth * b.n), fair < most / 4 ? fair : most / 4, most, start, [&](int, Portion p) {
      const int64_t r0 = p.begin * E::MR, r1 = p.end * E::MR < rows ? p.end * E::MR : rows;
      body(Block{r0, r1 - r0, 0, b.panels()});
    });
  }
  // C of a block: panel by panel [m, NP], or whole rows
  struct Sums { float* p; int64_t row, panel; };

  // What becomes of C: it stays in c; finish(i, j, lanes, sums) gets it from the registers, or panel by panel from c,
  // which is faster where finish reads other memory or computes
  enum Mode { KEEP, FROM_REGISTERS, FROM_PANELS };
  // C = A B of a block. left(k0, kn): columns k0.. of A. fetching(ahead, j): what to fetch during the last product of the
  // panel at column j
  template <Mode MODE, class LeftOf, class Fetching, class Finish>
  static void block(const Block& at, const Weights& b, const Sums& c, const LeftOf& left, const Fetching& fetching, const Finish& finish) {
    const int64_t n = b.n, panels = at.last - at.first, start = b.start(panels);
    for (int64_t k0 = 0; k0 < b.depth; k0 += b.chunk) {
      const int64_t kn = b.depth - k0 < b.chunk ? b.depth - k0 : b.chunk;
      const bool last = k0 + kn >= b.depth;
      const Left a = left(k0, kn);
      for (int64_t q = 0; q < panels; ++q) {
        const int64_t p = (q + start) % panels, j = (at.first + p) * E::NP;
        float* cj = c.p + p * c.panel;
        const Elem* bj = b.panel(k0, kn, at.first + p);
        Ahead ahead;
        if (q + 1 < panels) b.next(ahead, k0, kn, at.first + (p + 1) % panels);
        if (last) fetching(ahead, j);
        ahead.spread(at.m / E::MR * ((kn + E::SLICE - 1) / E::SLICE), Weights::STEPS);
        auto product = [&](const auto& end) {
          E::template strip<E::MR, E::NV>(a, at.m, bj, E::NP, kn, cj, c.row, k0 > 0, &ahead, end);
        };
        auto whole = [&, j](int64_t i, int v, vf s) FP_INLINED { finish(i, j + v * VL, (int64_t)VL, s); };
        auto part = [&, j](int64_t i, int v, vf s) FP_INLINED { finish(i, j + v * VL, n - j - v * VL, s); };
        if (MODE != FROM_REGISTERS || !last) product(typename E::Stored{});
        else j + E::NP <= n ? product(whole) : product(part);
        if (MODE != FROM_PANELS || !last) continue;
        auto rows = [&](const auto& end) {
          for (int64_t i = 0; i < at.m; ++i)
            for (int v = 0; v < E::NV; ++v) end(i, v, load(cj + i * c.row + v * VL));
        };
        j + E::NP <= n ? rows(whole) : rows(part);
      }
    }
  }
  static Sums panels(const Block& at, const Weights& b) {
    const bool one = b.depth <= b.chunk;
    return {scratch<float>(6, at.m * E::NP * (one ? 1 : at.last - at.first)), E::NP, one ? 0 : at.m * E::NP};
  }
  // done(true type) where whole vectors of `out` may be streamed past the caches: for outputs too large for them
  template <class Done> static void by_store(const T* out, int64_t rows, int64_t n, size_t large, const Done& done) {
    const bool past = rows * n * sizeof(T) > large && n % VL == 0 && (uintptr_t)out % (VL * sizeof(T)) == 0;
    if (past) done(std::true_type{}), fence();
    else done(std::false_type{});
  }
  // Of the panel after the one at j: its rows of the matrix t [m, n]
  static void next_panel(Ahead& ahead, const T* t, int64_t n, int64_t m, int64_t j) {
    const int64_t at = j + E::NP, left = n - at;
    if (left > 0) ahead.add_columns(t + at, n * sizeof(T), m, (left < E::NP ? left : E::NP) * sizeof(T));
  }
  template <class Past> FP_INLINE void put(Past, T* p, vf v, int64_t lanes) {
    if (!Past::value) store(p, v, lanes);
    else if (lanes > 0) stream_whole(p, v);
  }

  static void forward(const fp_linear& a, int64_t n, const Weights& b, const float* bias, const float* gamma, const float* beta, size_t large) {
    const bool coded = a.code && !a.then;  // a row's code is written by one thread
    blocks(a.rows, b, b.by_columns && !coded, [&](const Block& at) {
      const int64_t m = at.m;
      const T* x = (const T*)a.x + at.row * a.k;
      T* y = (T*)a.out + at.row * n;
      float* stats = a.stats && at.first == 0 ? a.stats + 2 * at.row : scratch<float>(8, 2 * m);
      auto left = [&](int64_t k0, int64_t kn) {
        if (a.prologue == FP_NONE && in_place(a.k)) return Left{(const Elem*)(x + k0), a.k, 1};
        const int64_t ld = room_width(kn);
        Elem* room = scratch<Elem>(5, m * ld);
        for (int64_t i = 0; i < m; ++i) prologue(a, x + i * a.k, at.row + i, stats + 2 * i, k0, kn, gamma, beta, room + i * ld);
        return Left{room, ld, 1};
      };
      by_store((T*)a.out, a.rows, n, large, [&](auto past) {
        auto ask = [=](Ahead& ahead, int64_t j) { if (!past) next_panel(ahead, y, n, m, j); };
        auto plain = [=](int64_t i, int64_t j, int64_t lanes, vf s) FP_INLINED { put(past, y + i * n + j, s + load(bias + j), lanes); };
        auto relu = [=](int64_t i, int64_t j, int64_t lanes, vf s) FP_INLINED { put(past, y + i * n + j, activate(RELU, s + load(bias + j)), lanes); };
        if (a.then == FP_GELU) return forward_gelu(a, at, b, bias, y, past, left);
        if (a.then == FP_RELU) return block<FROM_REGISTERS>(at, b, panels(at, b), left, ask, relu);
        block<FROM_REGISTERS>(at, b, panels(at, b), left, ask, plain);
      });
    });
  }
  template <class Past, class LeftOf>
  static void forward_gelu(const fp_linear& a, const Block& at, const Weights& b, const float* bias, T* y, Past past, const LeftOf& left) {
    const int64_t n = b.n, m = at.m;
    uint8_t* code = a.code ? a.code + at.row * GeluCode::row_bytes(n) : nullptr;
    auto ask = [=](Ahead& ahead, int64_t j) { if (!past) next_panel(ahead, y, n, m, j - E::NP); };
    auto plain = [=](int64_t i, int64_t j, int64_t lanes, vf s) FP_INLINED { put(past, y + i * n + j, activate(GELU, s + load(bias + j)), lanes); };
    auto kept = [=](int64_t i, int64_t j, int64_t lanes, vf s) FP_INLINED {
      if (lanes <= 0) return;
      const vf z = s + load(bias + j);
      put(past, y + i * n + j, activate(GELU, z), lanes);
      GeluCode::put_vector(code + i * GeluCode::row_bytes(n), n, j, activate_grad(GELU, z));
    };
    if (code) block<FROM_PANELS>(at, b, panels(at, b), left, ask, kept);
    else block<FROM_PANELS>(at, b, panels(at, b), left, ask, plain);
  }
  // Whether rows of that many elements can be read where they lie: a step of the tile may not reach into the next
  static bool in_place(int64_t k) { return k % E::TERMS == 0; }
  static int64_t room_width(int64_t k) { return round_up(k, 32) + 16; }  // rows in different sets of the caches
  static void put_row(const T* x, int64_t kn, Elem* out) {
    memcpy(out, x, kn * sizeof(T));
    if (!in_place(kn)) out[kn] = Elem{};
  }
  // Elements k0.. of a row of A; out is as wide as room_width
  static void prologue(const fp_linear& a, const T* x, int64_t row, float* stats, int64_t k0, int64_t kn, const float* gamma,
                       const float* beta, Elem* out) {
    if (a.prologue == FP_NONE) return put_row(x + k0, kn, out);
    constexpr bool APART = !std::is_same<Elem, float>::value;
    float* to = APART ? scratch<float>(7, round_up(kn, 32)) : (float*)out;
    if (a.code && !a.then) {
      load_row(x + k0, to, kn, kn);
      GeluCode::activate_row(to, kn, a.code + row * GeluCode::row_bytes(a.k), a.k, k0);
    } else if (a.prologue == FP_PROLOGUE_GELU) {
      each_vector(kn, [=](int64_t j, int64_t left) { store(to + j, activate(GELU, load(x + k0 + j, left))); });
    } else {
      if (k0 == 0) put_stats(stats, 0, row_stats(x, a.k, a.eps));
      const RowStats s = row_stats_at(stats, 0);
      row_normalize(x + k0, to, kn, s, gamma ? gamma + k0 : nullptr, beta ? beta + k0 : nullptr);
    }
    if constexpr (APART) {
      for (int64_t j = kn; j < round_up(kn, 32); ++j) to[j] = 0.f;
      E::put_a_row(out, kn, 0, to);
    }
  }

  static void backward(const fp_linear& a, int64_t n, const Weights& b, const float* gamma, size_t large) {
    if (a.prologue == FP_LAYERNORM) return b.by_columns ? backward_norm_few(a, n, b, gamma) : backward_norm(a, n, b, gamma);
    blocks(a.rows, b, b.by_columns, [&](const Block& at) {
      const int64_t k = a.k, m = at.m;
      const T* x = (const T*)a.x + at.row * k;
      T* dx = (T*)a.out + at.row * k;
      auto left = [&](int64_t k0, int64_t kn) { return gradient(a, n, at, k0, kn); };
      by_store((T*)a.out, a.rows, k, large, [&](auto past) {
        if (a.prologue == FP_NONE)
          block<FROM_REGISTERS>(at, b, panels(at, b), left, [=](Ahead& ahead, int64_t j) { if (!past) next_panel(ahead, dx, k, m, j); },
                       [=](int64_t i, int64_t j, int64_t lanes, vf s) FP_INLINED { put(past, dx + i * k + j, s, lanes); });
        else if (a.code)
          block<FROM_PANELS>(at, b, panels(at, b), left, [=](Ahead& ahead, int64_t j) { if (!past) next_panel(ahead, dx, k, m, j - E::NP); },
                             [=, code = a.code + at.row * GeluCode::row_bytes(k)](int64_t i, int64_t j, int64_t lanes, vf s) FP_INLINED {
                               if (lanes > 0) put(past, dx + i * k + j, s * GeluCode::get(code + i * GeluCode::row_bytes(k), k, j), lanes);
                             });
        else
          block<FROM_PANELS>(at, b, panels(at, b), left,
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
  static Left gradient(const fp_linear& a, int64_t n, const Block& at, int64_t k0, int64_t kn) {
    const T* g = (const T*)a.grad + at.row * n + k0;
    if (in_place(n)) return {(const Elem*)g, n, 1};
    const int64_t ld = room_width(kn);
    Elem* room = scratch<Elem>(5, at.m * ld);
    for (int64_t i = 0; i < at.m; ++i) put_row(g + i * n, kn, room + i * ld);
    return {room, ld, 1};
  }
  // dx from the gradient of the norm's output in c, row by row
  static void norm_grad(const fp_linear& a, int64_t row, float* c, const float* gamma) {
    row_norm_grad(c, (const T*)a.x + row * a.k, a.k, row_stats_at(a.stats, row), gamma, LAYERNORM, c, nullptr, 0,
                  [out = (T*)a.out + row * a.k](int64_t j, int64_t left, vf v) { store(out + j, v, left); });
  }
  static void sums(const fp_linear& a, int64_t n, const Weights& b, const Block& at, float* c, int64_t width) {
    block<KEEP>(at, b, {c, width, E::NP}, [&](int64_t k0, int64_t kn) { return gradient(a, n, at, k0, kn); }, [](Ahead&, int64_t) {},
                [](int64_t, int64_t, int64_t, vf) {});
  }
  static void backward_norm(const fp_linear& a, int64_t n, const Weights& b, const float* gamma) {
    const int64_t width = round_up(a.k, E::NP) + 16;
    blocks(a.rows, b, false, [&](const Block& at) {
      float* c = scratch<float>(6, at.m * width);
      sums(a, n, b, at, c, width);
      for (int64_t i = 0; i < at.m; ++i) norm_grad(a, at.row + i, c + i * width, gamma);
    });
  }
  static void backward_norm_few(const fp_linear& a, int64_t n, const Weights& b, const float* gamma) {
    const int64_t width = round_up(a.k, E::NP) + 16;
    float* c = scratch<float>(10, a.rows * width);
    blocks(a.rows, b, true, [&](const Block& at) { sums(a, n, b, at, c + at.first * E::NP, width); });
    parallel(a.rows, grain(20. * a.k), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) norm_grad(a, i, c + i * width, gamma);
    });
  }
};

}  // namespace FP_ISA
