// Adapters of several tasks in one call, on the LibTorch stable ABI: each row goes through its task's weights.
#include <cstring>

#include "bind/check.h"

namespace {

// The rows of each task, ascending, and the parameters' stacks [tasks or 1, ...]
struct Tasks {
  int64_t rows, d, r, tasks, itemsize;
  std::vector<int64_t> order, first;
  const char* op;
  Tasks(const Tensor& x, const Tensor& w_down, const Tensor& w_up, const Tensor& ids, int64_t count, const char* name)
      : rows(x.size(0)), tasks(count), op(name) {
    STD_TORCH_CHECK(x.dim() == 2 && w_down.dim() == 3 && w_up.dim() == 3, op, ": expected x [rows, d], w_down [tasks or 1, r, d], w_up [tasks or 1, d, r]");
    STD_TORCH_CHECK(tasks > 0, op, ": tasks is ", tasks, ", expected at least 1");
    STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long && ids.is_contiguous() && (ids.numel() ? rows % ids.numel() == 0 : rows == 0), op,
                    ": task_ids must be contiguous int64 with a divisor of the rows as its size");
    d = x.size(1), r = w_down.size(1), itemsize = code(x, op) == FP_F32 ? 4 : 2;
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
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& w_down, const MaybeTensor& b_down, const Tensor& w_up, const MaybeTensor& b_up,
                                           const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, const MaybeTensor& res1, const MaybeTensor& res2,
                                           const Tensor& task_ids, int64_t tasks, bool add_x, double eps, int64_t activation, double scale, bool save) {
  const char* op = "cpu_multi_adapter_forward";
  const int dtype = code(x, op);
  const Tasks m(x, w_down, w_up, task_ids, tasks, op);
  const int64_t rows = m.rows, d = m.d, r = m.r;
  Tensor y = make(x, {rows, d});
  Tensor z = make(x, save ? std::vector<int64_t>{rows, r} : std::vector<int64_t>{0});
  Tensor stats = make(x, save && norm_weight ? std::vector<int64_t>{rows, 2} : std::vector<int64_t>{0}, ScalarType::Float);
  const auto wd = m.stack(w_down, x, r * d, "w_down"), bd = m.stack(b_down, x, r, "b_down"), wu = m.stack(w_up, x, d * r, "w_up"), bu = m.stack(b_up, x, d, "b_up");
  const auto nw = m.stack(norm_weight, x, d, "norm_weight"), nb = m.stack(norm_bias, x, d, "norm_bias");
  fp_adapter_forward a{};
  a.x = in(x, x, rows * d, op, "x"), a.res1 = in(res1, x, rows * d, op, "res1"), a.res2 = in(res2, x, rows * d, op, "res2");
  a.y = out(y), a.z = out(z), a.stats = static_cast<float*>(out(stats));
  a.d = d, a.r = r, a.activation = activation, a.add_x = add_x, a.eps = eps, a.scale = scale;
  for (int64_t t = 0; t < tasks; ++t) {
    if (!m.count(t)) continue;
    a.order = m.order.data() + m.first[t], a.rows = m.count(t);
    a.w_down = m.at(wd, t), a.b_down = m.at(bd, t), a.w_up = m.at(wu, t), a.b_up = m.at(bu, t), a.norm_weight = m.at(nw, t), a.norm_bias = m.at(nb, t);
    fp_active()->adapter_forward(a, dtype);
  }
  return {y, z, stats};
}

// The parameters' gradients come per task, [tasks, ...], also where the tasks share a parameter: zeros for one without rows
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& x, const Tensor& z, const Tensor& stats, const Tensor& w_down, const Tensor& w_up, const MaybeTensor& norm_weight,
    const MaybeTensor& norm_bias, const Tensor& task_ids, int64_t tasks, bool add_x, int64_t activation, double scale, int64_t needs) {
  const char* op = "cpu_multi_adapter_backward";
  const int dtype = code(x, op);
  const Tasks m(x, w_down, w_up, task_ids, tasks, op);
  const int64_t rows = m.rows, d = m.d, r = m.r;
  const auto wd = m.stack(w_down, x, r * d, "w_down"), wu = m.stack(w_up, x, d * r, "w_up");
  const auto nw = m.stack(norm_weight, x, d, "norm_weight"), nb = m.stack(norm_bias, x, d, "norm_bias");
  fp_adapter_backward a{};
  a.grad = in(grad, x, rows * d, op, "grad"), a.x = in(x, x, rows * d, op, "x"), a.z = in(z, x, rows * r, op, "z");
  a.stats = norm_weight ? in_float(stats, rows * 2, op, "stats") : nullptr;
  a.d = d, a.r = r, a.activation = activation, a.add_x = add_x, a.scale = scale;
  auto dx = wanted(needs & 1, x, {rows, d});
  a.dx = dx.second;
  std::pair<Tensor, void*> grads[6] = {
      wanted(needs & 2, x, {tasks, r, d}),  wanted(needs & 4, x, {tasks, r}),
      wanted(needs & 8, x, {tasks, d, r}),  wanted(needs & 16, x, {tasks, d}),
      wanted((needs & 32) && norm_weight, x, {tasks, d}), wanted((needs & 64) && norm_weight, x, {tasks, d})};
  const int64_t sizes[6] = {r * d, r, d * r, d, d, d};
  void** places[6] = {&a.dw_down, &a.db_down, &a.dw_up, &a.db_up, &a.dnorm_weight, &a.dnorm_bias};
  for (int64_t t = 0; t < tasks; ++t) {
    for (int i = 0; i < 6; ++i) {
      char* base = static_cast<char*>(grads[i].second);
      *places[i] = base ? base + t * sizes[i] * m.itemsize : nullptr;
      if (base && !m.count(t)) memset(*places[i], 0, sizes[i] * m.itemsize);
    }
    if (!m.count(t)) continue;
    a.order = m.order.data() + m.first[t], a.rows = m.count(t);
    a.w_down = m.at(wd, t), a.w_up = m.at(wu, t), a.norm_weight = m.at(nw, t), a.norm_bias = m.at(nb, t);
    fp_active()->adapter_backward(a, dtype);
  }
  return {dx.first, grads[0].first, grads[1].first, grads[2].first, grads[3].first, grads[4].first, grads[5].first};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastpetl, m) {
  m.def("cpu_multi_adapter_forward(Tensor x, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, Tensor? norm_weight, Tensor? norm_bias, "
        "Tensor? res1, Tensor? res2, Tensor task_ids, int tasks, bool add_x, float eps, int activation, float scale, bool save) -> "
        "(Tensor, Tensor, Tensor)");
  m.def("cpu_multi_adapter_backward(Tensor grad, Tensor x, Tensor z, Tensor stats, Tensor w_down, Tensor w_up, Tensor? norm_weight, "
        "Tensor? norm_bias, Tensor task_ids, int tasks, bool add_x, int activation, float scale, int needs) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastpetl, CPU, m) {
  m.impl("cpu_multi_adapter_forward", TORCH_BOX(&forward));
  m.impl("cpu_multi_adapter_backward", TORCH_BOX(&backward));
}
