// Rows of several tasks in one call: which are whose, and the tasks among the threads.
#pragma once
#include <algorithm>

#include "bind/check.h"

extern thread_local bool fp_alone;  // this thread works by itself: what it calls does not divide its work again

namespace {

struct Alone {
  Alone() { fp_alone = true; }
  ~Alone() { fp_alone = false; }  // also where what it calls throws
};

// The rows of each task, ascending, and the parameters' stacks [tasks or 1, ...]
struct Tasks {
  int64_t rows, d, r, tasks, itemsize;
  std::vector<int64_t> order, first;
  const char* op;
  Tasks(const Tensor& x, int64_t bottleneck, const Tensor& ids, int64_t count, const char* name)
      : rows(x.size(0)), d(x.size(1)), r(bottleneck), tasks(count), itemsize(code(x, name) == FP_F32 ? 4 : 2), op(name) {
    STD_TORCH_CHECK(tasks > 0, op, ": tasks is ", tasks, ", expected at least 1");
    STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long && ids.is_contiguous() && (ids.numel() ? rows % ids.numel() == 0 : rows == 0), op,
                    ": task_ids must be contiguous int64 with a divisor of the rows as its size");
    sort(static_cast<const int64_t*>(ids.const_data_ptr()), ids.numel());
  }
  void sort(const int64_t* id, int64_t n) {
    const int64_t each = n ? rows / n : 0;
    first.assign(tasks + 1, 0), order.resize(rows);
    for (int64_t i = 0; i < n; ++i) {
      STD_TORCH_CHECK(id[i] >= 0 && id[i] < tasks, op, ": task_ids holds ", id[i], ", expected 0 to ", tasks - 1);
      first[id[i] + 1] += each;
    }
    for (int64_t t = 0; t < tasks; ++t) first[t + 1] += first[t];
    std::vector<int64_t> at(first.begin(), first.end() - 1);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t e = 0; e < each; ++e) order[at[id[i]]++] = i * each + e;
  }
  int64_t count(int64_t t) const { return first[t + 1] - first[t]; }
  // one stack: its pointer for task t is at(stack, t)
  struct Stack { const char* p; int64_t step; };
  Stack stack(const MaybeTensor& s, const Tensor& x, int64_t numel, const char* name) const {
    if (!s) return {nullptr, 0};
    const bool shared = s->numel() == numel;
    return {static_cast<const char*>(in(*s, x, shared ? numel : tasks * numel, op, name)), shared ? 0 : numel * itemsize};
  }
  static const void* at(Stack s, int64_t t) { return s.p ? s.p + t * s.step : nullptr; }
  // run(task) for every task that has rows. Each by all threads, one after the other, or, where that is as even, each by
  // one thread: then weights are packed once for every task, not by every thread, and nobody waits between tasks.
  template <class Run> void each(const Run& run) const {
    const auto shares = apart();
    if (shares.empty()) {
      for (int64_t t = 0; t < tasks; ++t)
        if (count(t)) run(t);
      return;
    }
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        for (int64_t t : shares[i]) run(t);
    };
    fp_parallel_for(shares.size(), 1, [](void* ctx, int64_t begin, int64_t end) {
      const Alone alone;
      (*static_cast<decltype(body)*>(ctx))(begin, end);
    }, &body);
  }
  // The tasks of each thread, the largest first to who has least; empty where one would work an eighth more than its part
  std::vector<std::vector<int64_t>> apart() const {
    const int64_t threads = fp_threads();
    std::vector<int64_t> sorted, load(threads, 0);
    for (int64_t t = 0; t < tasks; ++t)
      if (count(t)) sorted.push_back(t);
    if (threads < 2 || (int64_t)sorted.size() < threads) return {};
    std::stable_sort(sorted.begin(), sorted.end(), [&](int64_t a, int64_t b) { return count(a) > count(b); });
    std::vector<std::vector<int64_t>> shares(threads);
    for (int64_t t : sorted) {
      const int64_t least = std::min_element(load.begin(), load.end()) - load.begin();
      shares[least].push_back(t), load[least] += count(t);
    }
    if (*std::max_element(load.begin(), load.end()) * threads * 8 > rows * 9) return {};
    return shares;
  }
};

}  // namespace
