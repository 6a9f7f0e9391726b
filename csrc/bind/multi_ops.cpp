// Adapters of several tasks in one call, on the LibTorch stable ABI: each row goes through its task's weights.
#include <cstring>

#include "bind/tasks.h"

namespace {

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& w_down, const MaybeTensor& b_down, const Tensor& w_up, const MaybeTensor& b_up,
                                           const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, const MaybeTensor& res1, const MaybeTensor& res2,
                                           const Tensor& task_ids, int64_t tasks, bool add_x, double eps, int64_t activation, double scale, bool save) {
  const char* op = "cpu_multi_adapter_forward";
  const int dtype = code(x, op);
  STD_TORCH_CHECK(x.dim() == 2 && w_down.dim() == 3 && w_up.dim() == 3, op, ": expected x [rows, d], w_down [tasks or 1, r, d], w_up [tasks or 1, d, r]");
  const Tasks m(x, w_down.size(1), task_ids, tasks, op);
  const int64_t rows = m.rows, d = m.d, r = m.r;
  Tensor y = make(x, {rows, d});
  Tensor z = make(x, save ? std::vector<int64_t>{rows, r} : std::vector<int64_t>{0});
  Tensor stats = make(x, save && norm_weight ? std::vector<int64_t>{rows, 2} : std::vector<int64_t>{0}, ScalarType::Float);
  const auto wd = m.stack(w_down, x, r * d, "w_down"), bd = m.stack(b_down, x, r, "b_down"), wu = m.stack(w_up, x, d * r, "w_up"), bu = m.stack(b_up, x, d, "b_up");
  const auto nw = m.stack(norm_weight, x, d, "norm_weight"), nb = m.stack(norm_bias, x, d, "norm_bias");
  fp_adapter_forward all{};
  all.x = in(x, x, rows * d, op, "x"), all.res1 = in(res1, x, rows * d, op, "res1"), all.res2 = in(res2, x, rows * d, op, "res2");
  all.y = out(y), all.z = out(z), all.stats = static_cast<float*>(out(stats));
  all.d = d, all.r = r, all.activation = activation, all.add_x = add_x, all.eps = eps, all.scale = scale;
  m.each([&](int64_t t) {
    fp_adapter_forward a = all;
    a.order = m.order.data() + m.first[t], a.rows = m.count(t);
    a.w_down = m.at(wd, t), a.b_down = m.at(bd, t), a.w_up = m.at(wu, t), a.b_up = m.at(bu, t), a.norm_weight = m.at(nw, t), a.norm_bias = m.at(nb, t);
    fp_active()->adapter_forward(a, dtype);
  });
  return {y, z, stats};
}

// The parameters' gradients come per task, [tasks, ...], also where the tasks share a parameter: zeros for one without rows
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& x, const Tensor& z, const Tensor& stats, const Tensor& w_down, const Tensor& w_up, const MaybeTensor& norm_weight,
    const MaybeTensor& norm_bias, const Tensor& task_ids, int64_t tasks, bool add_x, int64_t activation, double scale, int64_t needs) {
  const char* op = "cpu_multi_adapter_backward";
  const int dtype = code(x, op);
  STD_TORCH_CHECK(x.dim() == 2 && w_down.dim() == 3 && w_up.dim() == 3, op, ": expected x [rows, d], w_down [tasks or 1, r, d], w_up [tasks or 1, d, r]");
  const Tasks m(x, w_down.size(1), task_ids, tasks, op);
  const int64_t rows = m.rows, d = m.d, r = m.r;
  const auto wd = m.stack(w_down, x, r * d, "w_down"), wu = m.stack(w_up, x, d * r, "w_up");
  const auto nw = m.stack(norm_weight, x, d, "norm_weight"), nb = m.stack(norm_bias, x, d, "norm_bias");
  fp_adapter_backward all{};
  all.grad = in(grad, x, rows * d, op, "grad"), all.x = in(x, x, rows * d, op, "x"), all.z = in(z, x, rows * r, op, "z");
  all.stats = norm_weight ? in_float(stats, rows * 2, op, "stats") : nullptr;
  all.d = d, all.r = r, all.activation = activation, all.add_x = add_x, all.scale = scale;
  auto dx = wanted(needs & 1, x, {rows, d});
  all.dx = dx.second;
  std::pair<Tensor, void*> grads[6] = {
      wanted(needs & 2, x, {tasks, r, d}),  wanted(needs & 4, x, {tasks, r}),
      wanted(needs & 8, x, {tasks, d, r}),  wanted(needs & 16, x, {tasks, d}),
      wanted((needs & 32) && norm_weight, x, {tasks, d}), wanted((needs & 64) && norm_weight, x, {tasks, d})};
  const int64_t sizes[6] = {r * d, r, d * r, d, d, d};
  auto place = [&](int i, int64_t t) { return grads[i].second ? static_cast<char*>(grads[i].second) + t * sizes[i] * m.itemsize : nullptr; };
  for (int64_t t = 0; t < tasks; ++t)
    for (int i = 0; i < 6 && !m.count(t); ++i)
      if (grads[i].second) memset(place(i, t), 0, sizes[i] * m.itemsize);
  m.each([&](int64_t t) {
    fp_adapter_backward a = all;
    void** places[6] = {&a.dw_down, &a.db_down, &a.dw_up, &a.db_up, &a.dnorm_weight, &a.dnorm_bias};
    for (int i = 0; i < 6; ++i) *places[i] = place(i, t);
    a.order = m.order.data() + m.first[t], a.rows = m.count(t);
    a.w_down = m.at(wd, t), a.w_up = m.at(wu, t), a.norm_weight = m.at(nw, t), a.norm_bias = m.at(nb, t);
    fp_active()->adapter_backward(a, dtype);
  });
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
