// Memory that is needed after a product, asked for while it runs: one line every few steps of its depth. In bursts the
// requests would queue up and the FMA units wait with them.
#pragma once
#include "vec.h"

namespace FP_ISA {

struct Ahead {
  struct Part { const char* p; int64_t step, steps; };  // a request every `step` bytes
  static constexpr unsigned MOST = 64;
  Part parts[MOST];
  unsigned count = 0, at = 0;
  int every = 1, turn = 0;  // of the tile's calls one in so many makes requests
  void add(const void* p, int64_t bytes) {
    if (p && bytes > 0) parts[count++] = {(const char*)p, 0, bytes};
  }
  // spreads what was added over that many steps; a request every 64 bytes at most leaves no line out
  void spread(int64_t steps) {
    int64_t bytes = 0;
    for (unsigned i = 0; i < count; ++i) bytes += parts[i].steps;
    int64_t step = round_up(bytes / (steps + 1) + 1, 8);
    step = step < 16 ? 16 : step > 64 ? 64 : step;
    for (unsigned i = 0; i < count; ++i) parts[i].step = step, parts[i].steps = parts[i].steps / step + 1;
  }
  // `bytes` of each of `rows` rows
  void add_columns(const void* p, int64_t ld, int64_t rows, int64_t bytes) {
    for (int64_t j = 0; j < bytes && count < MOST; j += 64) parts[count++] = {(const char*)p + j, ld, rows};
  }
  // `bytes` of one, in that many steps
  void add_row(const void* p, int64_t bytes, int64_t steps) {
    if (count < MOST) parts[count++] = {(const char*)p, round_up(bytes / steps + 1, 4), steps};
  }
  // spreads columns and rows over that many calls of the tile, of `depth` steps each
  void spread(int64_t calls, int64_t depth) {
    int64_t need = 0;
    for (unsigned i = 0; i < count; ++i) need += (parts[i].steps + depth - 1) / depth;
    if (need && calls > 2 * need) every = calls / need;
  }
  bool more() const { return at < count; }
  bool now() { return every == 1 || turn++ % every == 0; }
  Part take(int64_t steps) {
    Part& now = parts[at];
    const Part taken = now;
    now.p += steps * now.step, now.steps -= steps;
    if (now.steps <= 0) ++at;
    return taken;
  }
};

}  // namespace FP_ISA
