// The weights of a frozen linear on vector units. Those that are not packed yet are, panel by panel, when a thread first
// needs one: while the product before it runs its lines are asked for, and nobody waits until all are packed.
#pragma once
#include "pack.h"
#include "shares.h"

namespace FP_ISA {

template <class E> struct LinearWeights {
  using Elem = typename E::Elem;  // of the weights too
  enum State : uint8_t { NONE, BUSY, READY };
  static constexpr int64_t DEEP = 1024;        // a depth from which the product is made in chunks, its sums kept in between
  static constexpr int64_t FEW = 400;          // rows up to which threads share out the columns: all of A is in each one's cache
  static constexpr int64_t STEPS = E::SLICE / E::TERMS;  // of one call of the tile
  // Panels that are whole groups of GeluCode: what one thread makes begins and ends with such
  static constexpr int together() { int p = 1; while (p * E::NP % 32) ++p; return p; }
  static constexpr int64_t TOGETHER = together();
  const fp_linear& a;
  const int64_t depth, n, chunk;               // B [depth, n], packed by chunks of the depth
  const bool turned;                           // B[k, j] = W[j, k]; else W[k, j]
  const bool by_columns;
  Elem* b = nullptr;                           // all of B; null: each thread packs the panel that it is about to use
  State* states = nullptr;                     // of [chunk][panel]; null: all are packed
  mutable int64_t starts = 0;

  // packed: all of B, or null
  LinearWeights(const fp_linear& a, int64_t depth, int64_t n, bool turned, const void* packed)
      : a(a), depth(depth), n(n), chunk(chunk_of(depth)), turned(turned), by_columns(a.rows <= FEW && panels() >= 2 * fp_threads()), b((Elem*)packed) {
    if (packed || by_columns) return;
    b = scratch<Elem>(0, E::b_size(depth, n));
    states = scratch<State>(4, count());
    memset(states, NONE, count());
  }
  static int64_t chunk_of(int64_t depth) {
    const int64_t chunks = (depth + DEEP - 1) / DEEP;
    return chunks ? round_up((depth + chunks - 1) / chunks, 32) : 32;
  }
  int64_t panels() const { return (n + E::NP - 1) / E::NP; }
  size_t count() const { return (depth + chunk - 1) / chunk * panels(); }

  // Where a block of that many panels begins: the first of the threads each at another one, so that each packs a part.
  int64_t start(int64_t count) const {
    const int64_t threads = fp_threads(), i = states ? __atomic_fetch_add(&starts, 1, __ATOMIC_RELAXED) : 0;
    return i < threads ? count * i / threads / TOGETHER * TOGETHER : 0;
  }
  const Elem* panel(int64_t k0, int64_t kn, int64_t j) const {
    if (!b) {
      Elem* own = scratch<Elem>(9, E::b_size(kn, E::NP));
      pack(own, k0, kn, j);
      return own;
    }
    Elem* p = b + j * E::NP * E::pad_k(depth) + k0 * E::NP;
    if (!states) return p;
    State *now = state(k0, j), seen = NONE;
    if (__atomic_compare_exchange_n(now, &seen, BUSY, false, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE)) {
      pack(p, k0, kn, j);
      __atomic_store_n(now, READY, __ATOMIC_RELEASE);
    }
    while (__atomic_load_n(now, __ATOMIC_ACQUIRE) != READY) pause();
    return p;
  }
  // asks for what packing that panel will read
  void next(Ahead& ahead, int64_t k0, int64_t kn, int64_t j) const {
    if (b && (!states || __atomic_load_n(state(k0, j), __ATOMIC_RELAXED) != NONE)) return;
    const int64_t j0 = j * E::NP, end = j0 + E::NP < n ? j0 + E::NP : n;
    if (turned)
      for (int64_t i = j0; i < end; ++i) ahead.add_row(row(i) + k0, kn * sizeof(Elem), STEPS);
    else
      ahead.add_columns(row(k0) + j0, a.k * sizeof(Elem), kn, (end - j0) * sizeof(Elem));
  }

 private:
  State* state(int64_t k0, int64_t j) const { return states + k0 / chunk * panels() + j; }
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  const Elem* row(int64_t i) const {
    int w = 0;
    for (; i >= a.n[w]; ++w) i -= a.n[w];
    return (const Elem*)a.w[w] + i * a.k;
  }
  void pack(Elem* p, int64_t k0, int64_t kn, int64_t j) const {
    const int64_t j0 = j * E::NP, left = n - j0;
    if (turned) {
      const Elem *rows[E::NP], *none = nullptr;
      if (left < E::NP) none = (const Elem*)memset(scratch<Elem>(15, kn + 64), 0, (kn + 64) * sizeof(Elem));
      for (int64_t i = 0; i < E::NP; ++i) rows[i] = i < left ? row(j0 + i) + k0 : none;
      E::put_panel_turned(p, kn, rows);
    } else {
      for (int64_t i = 0; i < kn; i += E::TERMS) {
        const Elem* rows[E::TERMS];
        for (int t = 0; t < E::TERMS; ++t) rows[t] = i + t < kn ? row(k0 + i + t) + j0 : nullptr;
        E::put_panel_row(p + i * E::NP, rows, left);
      }
    }
  }
};

}  // namespace FP_ISA
