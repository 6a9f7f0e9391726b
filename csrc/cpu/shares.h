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
  const int64_t count, least;  // items; in a portion, at least
  const int threads;
  int64_t next = 0;
  Portion take() {
    Portion p;
    p.begin = __atomic_load_n(&next, __ATOMIC_RELAXED);
    do {
      if (p.begin >= count) return {};
      const int64_t share = (count - p.begin) / (3 * threads), size = share > least ? share : least;
      p.end = p.begin + size < count ? p.begin + size : count;
    } while (!__atomic_compare_exchange_n(&next, &p.begin, p.end, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return p;
  }
};
// task(item, the item the same thread does next, -1: none or not known yet), for count items; start() once per thread.
// grain: items worth a thread
template <class Start, class Task> static void shared_out(int64_t count, int64_t grain, int64_t least, const Start& start, const Task& task) {
  const int64_t most = (count + grain - 1) / grain, threads = most < fp_threads() ? most : fp_threads();
  Shares shares{count, least, (int)(threads > 0 ? threads : 1)};
  parallel(threads, 1, [&](int64_t, int64_t) {
    Portion now = shares.take();
    if (!now.some()) return;
    auto context = start();
    while (now.some()) {
      Portion then;
      for (int64_t i = now.begin; i < now.end; ++i) {
        if (i + 1 == now.end) then = shares.take();
        task(context, i, i + 1 < now.end ? i + 1 : then.some() ? then.begin : -1);
      }
      now = then;
    }
  });
}

}  // namespace FP_ISA
