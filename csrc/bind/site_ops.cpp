// The fused site on the LibTorch stable ABI: the adapter with the norm behind it, in one pass over the rows each way.
#include "bind/check.h"

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& w_down, const MaybeTensor& b_down, const Tensor& w_up, const MaybeTensor& b_up, const MaybeTensor& norm_weight,
    const MaybeTensor& norm_bias, const MaybeTensor& res1, const MaybeTensor& res2, const Tensor& tail_weight, const MaybeTensor& tail_bias,
    bool add_x, double eps, int64_t activation, double scale, int64_t tail, double tail_eps, bool emit_s, bool save) {
  const char* op = "cpu_site_forward";
  const int dtype = code(x, op);
  STD_TORCH_CHECK(x.dim() == 2 && w_down.dim() == 2, op, ": x and w_down must be 2-D");
  STD_TORCH_CHECK(tail == 1 || tail == 2, op, ": tail is ", tail, ", expected 1 (LayerNorm) or 2 (RMSNorm)");
  const int64_t rows = x.size(0), d = x.size(1), r = w_down.size(0);
  auto size = [&](bool want, int64_t columns) { return want ? std::vector<int64_t>{rows, columns} : std::vector<int64_t>{0}; };
  Tensor s = make(x, size(emit_s || save, d)), n = make(x, {rows, d}), z = make(x, size(save, r));
  Tensor stats = make(x, size(save && norm_weight, 2), ScalarType::Float), tail_stats = make(x, size(save, 2), ScalarType::Float);
  fp_adapter_forward a{};
  a.x = in(x, x, rows * d, op, "x");
  a.w_down = in(w_down, x, r * d, op, "w_down"), a.b_down = in(b_down, x, r, op, "b_down");
  a.w_up = in(w_up, x, d * r, op, "w_up"), a.b_up = in(b_up, x, d, op, "b_up");
  a.norm_weight = in(norm_weight, x, d, op, "norm_weight"), a.norm_bias = in(norm_bias, x, d, op, "norm_bias");
  a.res1 = in(res1, x, rows * d, op, "res1"), a.res2 = in(res2, x, rows * d, op, "res2");
  a.tail_weight = in(tail_weight, x, d, op, "tail_weight"), a.tail_bias = in(tail_bias, x, d, op, "tail_bias");
  a.y = out(s), a.n = out(n), a.z = out(z);
  a.stats = static_cast<float*>(out(stats)), a.tail_stats = static_cast<float*>(out(tail_stats));
  a.rows = rows, a.d = d, a.r = r, a.activation = activation, a.add_x = add_x, a.tail = tail;
  a.eps = eps, a.scale = scale, a.tail_eps = tail_eps;
  if (rows) fp_active()->adapter_forward(a, dtype);
  return {s, n, z, stats, tail_stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const MaybeTensor& g_s, const Tensor& g_n, const Tensor& s, const Tensor& tail_stats, const Tensor& tail_weight, const Tensor& x, const Tensor& z,
    const Tensor& stats, const Tensor& w_down, const Tensor& w_up, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, bool add_x,
    int64_t activation, double scale, int64_t tail, int64_t needs, const MaybeTensor& tail_bias, bool s_is_n) {
  const char* op = "cpu_site_backward";
  const int dtype = code(x, op);
  STD_TORCH_CHECK(x.dim() == 2 && w_down.dim() == 2, op, ": x and w_down must be 2-D");
  STD_TORCH_CHECK(tail == 1 || tail == 2, op, ": tail is ", tail, ", expected 1 (LayerNorm) or 2 (RMSNorm)");
  const int64_t rows = x.size(0), d = x.size(1), r = w_down.size(0);
  fp_adapter_backward a{};
  a.g_s = in(g_s, x, rows * d, op, "g_s"), a.g_n = in(g_n, x, rows * d, op, "g_n"), a.y = in(s, x, rows * d, op, "s");
  a.tail_stats = in_float(tail_stats, rows * 2, op, "tail_stats"), a.tail_weight = in(tail_weight, x, d, op, "tail_weight");
  a.tail_bias = in(tail_bias, x, d, op, "tail_bias"), a.y_is_n = s_is_n;
  a.x = in(x, x, rows * d, op, "x"), a.z = in(z, x, rows * r, op, "z");
  a.stats = norm_weight ? in_float(stats, rows * 2, op, "stats") : nullptr;
  a.w_down = in(w_down, x, r * d, op, "w_down"), a.w_up = in(w_up, x, d * r, op, "w_up");
  a.norm_weight = in(norm_weight, x, d, op, "norm_weight"), a.norm_bias = in(norm_bias, x, d, op, "norm_bias");
  a.rows = rows, a.d = d, a.r = r, a.activation = activation, a.add_x = add_x, a.tail = tail, a.scale = scale;
  auto g = wanted(true, x, {rows, d}), dx = wanted(needs & 1, x, {rows, d}), dwd = wanted(needs & 2, x, {r, d}), dbd = wanted(needs & 4, x, {r});
  auto dwu = wanted(needs & 8, x, {d, r}), dbu = wanted(needs & 16, x, {d});
  auto dnw = wanted((needs & 32) && norm_weight, x, {d}), dnb = wanted((needs & 64) && norm_weight, x, {d});
  auto dtw = wanted(needs & 128, x, {d}), dtb = wanted(needs & 256, x, {d});
  a.g = g.second, a.dx = dx.second, a.dw_down = dwd.second, a.db_down = dbd.second, a.dw_up = dwu.second, a.db_up = dbu.second;
  a.dnorm_weight = dnw.second, a.dnorm_bias = dnb.second, a.dtail_weight = dtw.second, a.dtail_bias = dtb.second;
  fp_active()->adapter_backward(a, dtype);
  return {g.first, dx.first, dwd.first, dbd.first, dwu.first, dbu.first, dnw.first, dnb.first, dtw.first, dtb.first};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastpetl, m) {
  m.def("cpu_site_forward(Tensor x, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, Tensor? norm_weight, Tensor? norm_bias, Tensor? res1, "
        "Tensor? res2, Tensor tail_weight, Tensor? tail_bias, bool add_x, float eps, int activation, float scale, int tail, float tail_eps, "
        "bool emit_s, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_site_backward(Tensor? g_s, Tensor g_n, Tensor s, Tensor tail_stats, Tensor tail_weight, Tensor x, Tensor z, Tensor stats, Tensor w_down, "
        "Tensor w_up, Tensor? norm_weight, Tensor? norm_bias, bool add_x, int activation, float scale, int tail, int needs, Tensor? tail_bias=None, "
        "bool s_is_n=False) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastpetl, CPU, m) {
  m.impl("cpu_site_forward", TORCH_BOX(&forward));
  m.impl("cpu_site_backward", TORCH_BOX(&backward));
}
