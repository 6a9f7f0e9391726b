// residual_norm on the LibTorch stable ABI.
#include "bind/check.h"

namespace {

// What forward and backward share: shape, mask and seed
fp_residual_norm args(const Tensor& like, const MaybeTensor& mask, const MaybeTensor& seed, int64_t tail, double dropout, const char* op) {
  STD_TORCH_CHECK(like.dim() == 2 && like.size(0) > 0, op, ": x must be 2-D with rows");
  fp_residual_norm a{};
  a.rows = like.size(0), a.d = like.size(1), a.tail = tail, a.dropout = dropout, a.sample = a.rows;
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() && mask->numel() > 0 && a.rows % mask->numel() == 0, op,
                    ": mask must be contiguous bool with a divisor of the rows as its size");
    a.mask = static_cast<const uint8_t*>(mask->const_data_ptr()), a.sample = a.rows / mask->numel();
  }
  if (dropout > 0) {
    STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1, op, ": seed must be one int64");
    a.seed = *static_cast<const int64_t*>(seed->const_data_ptr());
  }
  return a;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const MaybeTensor& f, const MaybeTensor& weight, const MaybeTensor& bias,
                                           const MaybeTensor& mask, const MaybeTensor& seed, int64_t tail, int64_t emit, double eps,
                                           double dropout, bool save) {
  const char* op = "cpu_residual_norm_forward";
  const int dtype = code(x, op);
  fp_residual_norm a = args(x, mask, seed, tail, dropout, op);
  const int64_t numel = a.rows * a.d;
  a.x = in(x, x, numel, op, "x"), a.f = in(f, x, numel, op, "f"), a.eps = eps;
  a.weight = in(weight, x, a.d, op, "weight"), a.bias = in(bias, x, a.d, op, "bias");
  STD_TORCH_CHECK((tail == 0) == !a.weight, op, ": weight must be given if and only if there is a tail");
  auto s = wanted(f && ((emit & 1) || (save && tail)), x, {a.rows, a.d}), n = wanted(emit & 2, x, {a.rows, a.d});
  Tensor stats = make(x, save && tail ? std::vector<int64_t>{a.rows, 2} : std::vector<int64_t>{0}, ScalarType::Float);
  a.s = s.second, a.n = n.second, a.stats = static_cast<float*>(out(stats));
  fp_active()->residual_norm_forward(a, dtype);
  return {s.first, n.first, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const MaybeTensor& g_s, const MaybeTensor& g_n, const Tensor& s, const Tensor& stats,
                                                    const MaybeTensor& weight, const MaybeTensor& mask, const MaybeTensor& seed,
                                                    int64_t tail, double dropout, int64_t needs) {
  const char* op = "cpu_residual_norm_backward";
  STD_TORCH_CHECK(g_s || g_n, op, ": g_s or g_n must be given");
  const Tensor& like = g_n ? *g_n : *g_s;
  const int dtype = code(like, op);
  fp_residual_norm a = args(like, mask, seed, tail, dropout, op);
  const int64_t numel = a.rows * a.d;
  a.g_s = in(g_s, like, numel, op, "g_s"), a.g_n = in(g_n, like, numel, op, "g_n");
  if (g_n) {
    STD_TORCH_CHECK(tail != 0 && weight, op, ": g_n needs a tail and its weight");
    a.s_in = in(s, like, numel, op, "s"), a.weight = in(weight, like, a.d, op, "weight");
    a.stats = const_cast<float*>(in_float(stats, a.rows * 2, op, "stats"));
  }
  auto dx = wanted(needs & 1, like, {a.rows, a.d}), df = wanted(needs & 2, like, {a.rows, a.d});
  auto dw = wanted(needs & 4, like, {a.d}), db = wanted(needs & 8, like, {a.d});
  if (!g_n) {  // the norm was not used
    if (needs & 4) torch::stable::zero_(dw.first);
    if (needs & 8) torch::stable::zero_(db.first);
  }
  a.dx = dx.second, a.df = df.second, a.dweight = g_n ? dw.second : nullptr, a.dbias = g_n ? db.second : nullptr;
  fp_active()->residual_norm_backward(a, dtype);
  return {dx.first, df.first, dw.first, db.first};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastpetl, m) {
  m.def("cpu_residual_norm_forward(Tensor x, Tensor? f, Tensor? weight, Tensor? bias, Tensor? mask, Tensor? seed, int tail, int emit, float eps, "
        "float dropout, bool save) -> (Tensor, Tensor, Tensor)");
  m.def("cpu_residual_norm_backward(Tensor? g_s, Tensor? g_n, Tensor s, Tensor stats, Tensor? weight, Tensor? mask, Tensor? seed, int tail, "
        "float dropout, int needs) -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastpetl, CPU, m) {
  m.impl("cpu_residual_norm_forward", TORCH_BOX(&forward));
  m.impl("cpu_residual_norm_backward", TORCH_BOX(&backward));
}
