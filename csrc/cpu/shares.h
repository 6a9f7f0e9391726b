// Items among threads that are not equally fast (other work on their cores, interrupts): each takes some, large portions
// first, until there are none. Nothing may depend on who takes what.
#pragma once
#include "vec.h"

namespace FP_ISA {

struct Portion {
  int64_t begin = 0, end = 0;
  bool some() const { return begin < end; }
};
struct Shares {
  const int64_t count, least, most;  // items; in a portion
  const int threads;
  int64_t next = 0;
  Portion take() {
    Portion p;
    p.begin = __atomic_load_n(&next, __ATOMIC_RELAXED);
    do {
      if (p.begin >= count) return {};
      const int64_t share = (count - p.begin) / (3 * threads), size = share < least ? least : share > most ? most : share;
      p.end = p.begin + size < count ? p.begin + size : count;
    } while (!__atomic_compare_exchange_n(&next, &p.begin, p.end, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return p;
  }
};
// body(context, portion) on threads worth `grain` items each; start() makes a thread's context. Or body(context, portion,
// take), which takes the portion after it when it likes and returns it.
template <class Start, class Body>
static void portions(int64_t count, int64_t grain, int64_t least, int64_t most, const Start& start, const Body& body) {
  const int64_t worth = (count + grain - 1) / grain, threads = worth < fp_threads() ? worth : fp_threads();
  Shares shares{count, least, most, (int)(threads > 0 ? threads : 1)};
  parallel(threads, 1, [&](int64_t, int64_t) {
    Portion now = shares.take();
    if (!now.some()) return;
    auto context = start();
    while (now.some()) {
      if constexpr (std::is_invocable<Body, decltype(context)&, Portion>::value) {
        body(context, now);
        now = shares.take();
      } else {
        now = body(context, now, [&] { return shares.take(); });
      }
    }
  });
}
// task(context, item, the item the same thread does next or -1) for count items
template <class Start, class Task> static void items(int64_t count, int64_t grain, int64_t least, const Start& start, const Task& task) {
  portions(count, grain, least, count, start, [&](auto& context, Portion now, const auto& take) {
    Portion then;
    for (int64_t i = now.begin; i < now.end; ++i) {
      if (i + 1 == now.end) then = take();
      task(context, i, i + 1 < now.end ? i + 1 : then.some() ? then.begin : -1);
    }
    return then;
  });
}

}  // namespace FP_ISA
