// The fused site of several tasks on the LibTorch stable ABI: each row through its task's adapter, then one norm for all.
#include <cstring>

#include "bind/tasks.h"

namespace {

// One tensor per task, each of `numel` elements; empty: there is none
std::vector<const void*> each(const std::vector<Tensor>& of, const Tensor& x, size_t tasks, int64_t numel, const char* op, const char* name) {
  STD_TORCH_CHECK(of.empty() || of.size() == tasks, op, ": ", name, " has ", of.size(), " tensors, expected one per task");
  std::vector<const void*> found(tasks, nullptr);
  for (size_t t = 0; t < of.size(); ++t) found[t] = in(of[t], x, numel, op, name);
  return found;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, std::vector<Tensor> w_down, std::vector<Tensor> b_down, std::vector<Tensor> w_up, std::vector<Tensor> b_up,
    const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, const Tensor& residual, const Tensor& tail_weight, const MaybeTensor& tail_bias,
    const Tensor& task_ids, double eps, int64_t activation, double scale, int64_t tail, double tail_eps, bool sum, bool save) {
  const char* op = "cpu_multi_site_forward";
  const int dtype = code(x, op);
  STD_TORCH_CHECK(x.dim() == 2 && !w_down.empty() && w_down[0].dim() == 2, op, ": expected x [rows, d] and w_down [r, d] of each task");
  STD_TORCH_CHECK(tail == 1 || tail == 2, op, ": tail is ", tail, ", expected 1 (LayerNorm) or 2 (RMSNorm)");
  const Tasks m(x, w_down[0].size(0), task_ids, w_down.size(), op);
  const int64_t rows = m.rows, d = m.d, r = m.r;
  auto size = [&](bool want, int64_t columns) { return want ? std::vector<int64_t>{rows, columns} : std::vector<int64_t>{0}; };
  Tensor s = make(x, size(sum, d)), n = make(x, {rows, d}), z = make(x, size(save, r));
  Tensor stats = make(x, size(save && norm_weight, 2), ScalarType::Float), tail_stats = make(x, size(save, 2), ScalarType::Float);
  const auto wd = each(w_down, x, m.tasks, r * d, op, "w_down"), bd = each(b_down, x, m.tasks, r, op, "b_down");
  const auto wu = each(w_up, x, m.tasks, d * r, op, "w_up"), bu = each(b_up, x, m.tasks, d, op, "b_up");
  fp_adapter_forward all{};
  all.x = in(x, x, rows * d, op, "x"), all.res1 = in(residual, x, rows * d, op, "residual");
  all.norm_weight = in(norm_weight, x, d, op, "norm_weight"), all.norm_bias = in(norm_bias, x, d, op, "norm_bias");
  all.tail_weight = in(tail_weight, x, d, op, "tail_weight"), all.tail_bias = in(tail_bias, x, d, op, "tail_bias");
  all.y = out(s), all.n = out(n), all.z = out(z);
  all.stats = static_cast<float*>(out(stats)), all.tail_stats = static_cast<float*>(out(tail_stats));
  all.d = d, all.r = r, all.activation = activation, all.add_x = true, all.tail = tail;
  all.eps = eps, all.scale = scale, all.tail_eps = tail_eps;
  m.each([&](int64_t t) {
    fp_adapter_forward a = all;
    a.order = m.order.data() + m.first[t], a.rows = m.count(t);
    a.w_down = wd[t], a.b_down = bd[t], a.w_up = wu[t], a.b_up = bu[t];
    fp_active()->adapter_forward(a, dtype);
  });
  return {s, n, z, stats, tail_stats};
}

// The parameters' gradients come per task, [tasks, ...], those of the norms too: zeros for a task without rows
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& g_n, const Tensor& s, const Tensor& tail_stats, const Tensor& tail_weight, const Tensor& x, const Tensor& z, const Tensor& stats,
    std::vector<Tensor> w_down, std::vector<Tensor> w_up, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, const Tensor& task_ids,
    int64_t activation, double scale, int64_t tail, int64_t needs, const MaybeTensor& tail_bias, bool s_is_n) {
  const char* op = "cpu_multi_site_backward";
  const int dtype = code(x, op);
  STD_TORCH_CHECK(x.dim() == 2 && !w_down.empty() && w_down[0].dim() == 2, op, ": expected x [rows, d] and w_down [r, d] of each task");
  STD_TORCH_CHECK(tail == 1 || tail == 2, op, ": tail is ", tail, ", expected 1 (LayerNorm) or 2 (RMSNorm)");
  const Tasks m(x, w_down[0].size(0), task_ids, w_down.size(), op);
  const int64_t rows = m.rows, d = m.d, r = m.r, tasks = m.tasks;
  const auto wd = each(w_down, x, tasks, r * d, op, "w_down"), wu = each(w_up, x, tasks, d * r, op, "w_up");
  fp_adapter_backward all{};
  all.g_n = in(g_n, x, rows * d, op, "g_n"), all.y = in(s, x, rows * d, op, "s");
  all.tail_stats = in_float(tail_stats, rows * 2, op, "tail_stats"), all.tail_weight = in(tail_weight, x, d, op, "tail_weight");
  all.tail_bias = in(tail_bias, x, d, op, "tail_bias"), all.y_is_n = s_is_n;
  all.x = in(x, x, rows * d, op, "x"), all.z = in(z, x, rows * r, op, "z");
  all.stats = norm_weight ? in_float(stats, rows * 2, op, "stats") : nullptr;
  all.norm_weight = in(norm_weight, x, d, op, "norm_weight"), all.norm_bias = in(norm_bias, x, d, op, "norm_bias");
  all.d = d, all.r = r, all.activation = activation, all.add_x = true, all.tail = tail, all.scale = scale;
  auto g = wanted(true, x, {rows, d}), dx = wanted(needs & 1, x, {rows, d});
  all.g = g.second, all.dx = dx.second;
  std::pair<Tensor, void*> grads[8] = {
      wanted(needs & 2, x, {tasks, r, d}), wanted(needs & 4, x, {tasks, r}), wanted(needs & 8, x, {tasks, d, r}), wanted(needs & 16, x, {tasks, d}),
      wanted((needs & 32) && norm_weight, x, {tasks, d}), wanted((needs & 64) && norm_weight, x, {tasks, d}),
      wanted(needs & 128, x, {tasks, d}), wanted(needs & 256, x, {tasks, d})};
  const int64_t sizes[8] = {r * d, r, d * r, d, d, d, d, d};
  auto place = [&](int i, int64_t t) { return grads[i].second ? static_cast<char*>(grads[i].second) + t * sizes[i] * m.itemsize : nullptr; };
  for (int64_t t = 0; t < tasks; ++t)
    for (int i = 0; i < 8 && !m.count(t); ++i)
      if (grads[i].second) memset(place(i, t), 0, sizes[i] * m.itemsize);
  m.each([&](int64_t t) {
    fp_adapter_backward a = all;
    void** places[8] = {&a.dw_down, &a.db_down, &a.dw_up, &a.db_up, &a.dnorm_weight, &a.dnorm_bias, &a.dtail_weight, &a.dtail_bias};
    for (int i = 0; i < 8; ++i) *places[i] = place(i, t);
    a.order = m.order.data() + m.first[t], a.rows = m.count(t);
    a.w_down = wd[t], a.w_up = wu[t];
    fp_active()->adapter_backward(a, dtype);
  });
  return {g.first, dx.first, grads[0].first, grads[1].first, grads[2].first, grads[3].first, grads[4].first, grads[5].first, grads[6].first, grads[7].first};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastpetl, m) {
  m.def("cpu_multi_site_forward(Tensor x, Tensor[] w_down, Tensor[] b_down, Tensor[] w_up, Tensor[] b_up, Tensor? norm_weight, Tensor? norm_bias, "
        "Tensor residual, Tensor tail_weight, Tensor? tail_bias, Tensor task_ids, float eps, int activation, float scale, int tail, float tail_eps, "
        "bool sum, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_multi_site_backward(Tensor g_n, Tensor s, Tensor tail_stats, Tensor tail_weight, Tensor x, Tensor z, Tensor stats, Tensor[] w_down, "
        "Tensor[] w_up, Tensor? norm_weight, Tensor? norm_bias, Tensor task_ids, int activation, float scale, int tail, int needs, Tensor? tail_bias, "
        "bool s_is_n) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastpetl, CPU, m) {
  m.impl("cpu_multi_site_forward", TORCH_BOX(&forward));
  m.impl("cpu_multi_site_backward", TORCH_BOX(&backward));
}
