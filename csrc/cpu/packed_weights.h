// The adapter's weights packed for a pass over rows. Many threads share that work and read each other's part. A few pack
// all of it, each for itself: what another core has packed would have to come from its caches, and a barrier is saved.
#pragma once
#include "pack.h"

namespace FP_ISA {

// Scratch slots of the calling thread that its workers read; theirs are 4 to 9 and 15 and, where each packs for itself,
// those of the weights
struct Slot {
  enum { W_DOWN = 0, W_UP = 1, GAMMA = 2, BETA = 3, B_DOWN = 10, B_UP = 11, DZ = 12, H = 13, TAIL_GAMMA = 14, TAIL_BETA = 16,
         PARTS = 17, TOTAL = 18, PRODUCTS = 19, UP_SUMS = 20, LEFT_DZ = 21, LEFT_H = 22, TAIL_INVERSE = 23, TAIL_SHIFT = 24,
         FOLDED = 25 };
};

template <class T, class E> struct PackedWeights {
  using Elem = typename E::Elem;
  struct Matrix {
    int slot;
    const void* w;  // [rows, cols]; null: not wanted
    int64_t rows, cols;
    bool turned;  // y = x W^T wants B[k = columns of W, n = rows of W], y = x W its rows as they are
  };
  // What a norm leaves to the weights (fp32 on FMA units): W_down gamma, and b_down + W_down beta in FOLDED
  struct Norm { const float *gamma, *beta, *b_down; };  // null: none; gamma zero-padded, b_down null: nothing is folded

  const Matrix down, up;
  const Norm norm;
  const bool own;
  const uint64_t call;
  const Elem *shared_down = nullptr, *shared_up = nullptr;
  const float* shared_bias = nullptr;

  PackedWeights(const Matrix& d, const Matrix& u, const Norm& n, int64_t rows)
      : down(d), up(u), norm(n), own(fp_threads() <= 4 && rows >= 128 * fp_threads()), call(next_call()) {
    if (!own) pack(&shared_down, &shared_up, &shared_bias, [](int64_t n, int64_t g, const auto& task) { parallel(n, g, task); });
  }
  struct View { const Elem *down, *up; const float* bias; };
  // For the calling thread, to be asked for once per task
  View view() const {
    if (!own) return {shared_down, shared_up, shared_bias};
    thread_local uint64_t packed = 0;
    thread_local View mine;
    if (packed != call) {
      pack(&mine.down, &mine.up, &mine.bias, [](int64_t n, int64_t, const auto& task) { task(0, n); });
      packed = call;
    }
    return mine;
  }

 private:
  static uint64_t next_call() {
    static uint64_t calls = 0;
    return __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
  }
  template <class Run> void pack(const Elem** d, const Elem** u, const float** bias, const Run& run) const {
    *d = down.w ? matrix(down, norm.gamma, run) : nullptr;
    *u = up.w ? matrix(up, nullptr, run) : nullptr;
    *bias = norm.b_down ? fold(run) : nullptr;
  }
  template <class Run> static const Elem* matrix(const Matrix& m, const float* gamma, const Run& run) {
    auto row = [&](int64_t i) { return (const T*)m.w + i * m.cols; };
    Elem* out = scratch<Elem>(m.slot, m.turned ? columns_size<E>(m.cols, m.rows) : E::b_size(m.rows, m.cols));
    if (m.turned)
      run(column_groups<E>(m.rows), grain(400. * m.cols), [&](int64_t begin, int64_t end) { pack_columns<E>(out, m.cols, m.rows, begin, end, row, gamma); });
    else
      run(E::pad_k(m.rows) / 2, grain(40. * m.cols), [&](int64_t begin, int64_t end) { pack_rows<E>(out, m.rows, m.cols, begin, end, row); });
    return out;
  }
  template <class Run> const float* fold(const Run& run) const {
    const int64_t r = down.rows, d = down.cols;
    float* out = scratch<float>(Slot::FOLDED, round_up(r, 64) + 64);
    memcpy(out, norm.b_down, round_up(r, 64) * 4);
    if (!norm.beta) return out;
    run(r, grain(4. * d), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* w = (const T*)down.w + i * d;
        out[i] += row_sum(d, [&](int64_t j, int64_t left, vf s) { return fma(load(w + j, left), load(norm.beta + j), s); });
      }
    });
    return out;
  }
};

}  // namespace FP_ISA
