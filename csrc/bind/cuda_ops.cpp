// torch.ops.fastpetl.cuda_*: checks arguments, allocates results and calls csrc/cuda. On the LibTorch stable ABI; empty
// unless the build found an nvcc. Dense operands only: what a raw pointer would misread is refused here.
#ifdef FASTPETL_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bind/cuda_stream.h"
#include "cuda/fastpetl_cuda.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using torch::stable::new_empty;
using Guard = std::optional<torch::stable::accelerator::DeviceGuard>;

namespace {

// The checks of one call: its name, and the tensor whose dtype and device all others have.
struct Call {
  const char* op;
  const Tensor& x;

  int dtype() const {
    switch (x.scalar_type()) {
      case ScalarType::Float: return FP_CUDA_F32;
      case ScalarType::Half: return FP_CUDA_F16;
      case ScalarType::BFloat16: return FP_CUDA_BF16;
      default: STD_TORCH_CHECK(false, op, ": x has an unsupported dtype, expected float32, float16 or bfloat16");
    }
    return -1;
  }
  // The data of t, a dense [d0] (d1 == 0) or [d0, d1] tensor on x's device.
  const void* data(const char* name, const Tensor& t, int64_t d0, int64_t d1, ScalarType type) const {
    STD_TORCH_CHECK(t.scalar_type() == type, op, ": ", name, " has another dtype than expected");
    STD_TORCH_CHECK(t.is_cuda() && t.get_device() == x.get_device(), op, ": ", name, " is not on x's CUDA device");
    STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " is not contiguous");
    const bool fits = d1 ? t.dim() == 2 && t.size(0) == d0 && t.size(1) == d1 : t.dim() == 1 && t.size(0) == d0;
    STD_TORCH_CHECK(fits, op, ": ", name, " has ", t.dim(), " dimensions and ", t.numel(), " elements, expected (", d0,
                    d1 ? ", " : "", d1 ? std::to_string(d1) : "", ") to match x");
    return t.const_data_ptr();
  }
  const void* data(const char* name, const Optional& t, int64_t d0, int64_t d1 = 0) const {
    return t ? data(name, *t, d0, d1, x.scalar_type()) : nullptr;
  }
  const float* floats(const char* name, const Optional& t, int64_t d0, int64_t d1) const {
    return t ? static_cast<const float*>(data(name, *t, d0, d1, ScalarType::Float)) : nullptr;
  }
  const int64_t* integers(const char* name, const Optional& t, int64_t d0) const {
    return t ? static_cast<const int64_t*>(data(name, *t, d0, 0, ScalarType::Long)) : nullptr;
  }
  // Rows, hidden width and bottleneck.
  std::tuple<int64_t, int64_t, int64_t> sizes(const Tensor& w_down) const {
    STD_TORCH_CHECK(x.dim() == 2, op, ": x has ", x.dim(), " dimensions, expected 2");
    STD_TORCH_CHECK(w_down.dim() == 2, op, ": w_down has ", w_down.dim(), " dimensions, expected 2");
    const int64_t rows = x.size(0), d = x.size(1), r = w_down.size(0), limit = std::numeric_limits<int32_t>::max();
    STD_TORCH_CHECK(d > 0 && r > 0 && d <= limit && r <= limit && rows <= limit, op, ": x has shape (", rows, ", ", d,
                    ") and w_down ", r, " rows, expected 1..", limit);
    return {rows, d, r};
  }
  void codes(int64_t activation, int64_t tail) const {
    STD_TORCH_CHECK(activation >= 0 && activation <= 4, op, ": activation is ", activation, ", expected 0..4");
    STD_TORCH_CHECK(tail >= 0 && tail <= 2, op, ": tail is ", tail, ", expected 0..2");
  }
  // [d0, ...] of x's dtype, or 0 elements
  Tensor make(bool want, std::vector<int64_t> size, std::optional<ScalarType> type = std::nullopt) const {
    if (!want) size = {0};
    return new_empty(x, size, type);
  }
  // The device is switched back before anything is thrown.
  void launched(Guard& guard, int error) const {
    guard.reset();
    STD_TORCH_CHECK(error == 0, op, ": CUDA error ", error,
                    " at launch (9: the bottleneck is too wide for this device's shared memory)");
  }
  void* stream() const { return fastpetl::current_cuda_stream(x.get_device_index()); }
};
void* out(Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; }

using Site = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Site site_forward(const Call& c, const Tensor& w_down, const Optional& b_down, const Tensor& w_up, const Optional& b_up,
                  const Optional& norm_weight, const Optional& norm_bias, const Optional& res1, const Optional& res2,
                  const Optional& tail_weight, const Optional& tail_bias, bool add_x, double eps, int64_t activation,
                  double scale, int64_t tail, double tail_eps, bool emit_s, bool save) {
  const Tensor& x = c.x;
  const auto [rows, d, r] = c.sizes(w_down);
  c.codes(activation, tail);
  const int dtype = c.dtype();
  Guard guard(std::in_place, x.get_device_index());
  Tensor s = c.make(emit_s || save || !tail, {rows, d}), n = c.make(tail, {rows, d}), z = c.make(save, {rows, r});
  Tensor stats = c.make(save && norm_weight, {rows, 2}, ScalarType::Float);
  Tensor tail_stats = c.make(save && tail, {rows, 2}, ScalarType::Float);
  fp_cuda_site_forward a{};
  a.x = c.data("x", Optional(x), rows, d);
  a.w_down = c.data("w_down", Optional(w_down), r, d);
  a.b_down = c.data("b_down", b_down, r);
  a.w_up = c.data("w_up", Optional(w_up), d, r);
  a.b_up = c.data("b_up", b_up, d);
  a.norm_weight = c.data("norm_weight", norm_weight, d);
  a.norm_bias = c.data("norm_bias", norm_bias, d);
  a.res1 = c.data("res1", res1, rows, d);
  a.res2 = c.data("res2", res2, rows, d);
  a.tail_weight = c.data("tail_weight", tail_weight, d);
  a.tail_bias = c.data("tail_bias", tail_bias, d);
  STD_TORCH_CHECK(!tail == !tail_weight, c.op, ": tail_weight must be given if and only if there is a tail");
  a.s = out(s), a.n = out(n), a.z = out(z);
  a.stats = static_cast<float*>(out(stats)), a.tail_stats = static_cast<float*>(out(tail_stats));
  a.rows = rows, a.d = static_cast<int>(d), a.r = static_cast<int>(r);
  a.activation = static_cast<int>(activation), a.add_x = add_x, a.tail = static_cast<int>(tail);
  a.device = x.get_device_index();
  a.eps = static_cast<float>(eps), a.tail_eps = static_cast<float>(tail_eps), a.scale = static_cast<float>(scale);
  c.launched(guard, fastpetl_cuda_site_forward(&a, dtype, c.stream()));
  return {s, n, z, stats, tail_stats};
}

Site cuda_site_forward(const Tensor& x, const Tensor& w_down, const Optional& b_down, const Tensor& w_up,
                       const Optional& b_up, const Optional& norm_weight, const Optional& norm_bias, const Optional& res1,
                       const Optional& res2, const Tensor& tail_weight, const Optional& tail_bias, bool add_x, double eps,
                       int64_t activation, double scale, int64_t tail, double tail_eps, bool emit_s, bool save) {
  const Call c{"cuda_site_forward", x};
  STD_TORCH_CHECK(tail, c.op, ": tail is 0, expected 1 or 2 (without a tail it is cuda_adapter_forward)");
  return site_forward(c, w_down, b_down, w_up, b_up, norm_weight, norm_bias, res1, res2, Optional(tail_weight), tail_bias,
                      add_x, eps, activation, scale, tail, tail_eps, emit_s, save);
}

std::tuple<Tensor, Tensor, Tensor> cuda_adapter_forward(const Tensor& x, const Tensor& w_down, const Optional& b_down,
                                                        const Tensor& w_up, const Optional& b_up,
                                                        const Optional& norm_weight, const Optional& norm_bias,
                                                        const Optional& res1, const Optional& res2, bool add_x, double eps,
                                                        int64_t activation, double scale, bool save) {
  auto [s, n, z, stats, tail_stats] =
      site_forward({"cuda_adapter_forward", x}, w_down, b_down, w_up, b_up, norm_weight, norm_bias, res1, res2, {}, {},
                   add_x, eps, activation, scale, 0, 0, true, save);
  return {s, z, stats};
}

// (g, dx, dz, h, tail_partial): what runs over the rows. g is 0 elements without g_n: it is g_s then. The parameters'
// gradients are products over the rows of these, which fastpetl/ops/_cuda.py asks cuBLAS for.
Site cuda_site_backward(const Optional& g_s, const Optional& g_n, const Optional& s, const Optional& tail_stats,
                        const Optional& tail_weight, const Tensor& x, const Tensor& z, const Optional& stats,
                        const Tensor& w_down, const Tensor& w_up, const Optional& norm_weight, bool add_x,
                        int64_t activation, double scale, int64_t tail, bool want_dx, bool want_h, bool want_tail) {
  const Call c{"cuda_site_backward", x};
  const auto [rows, d, r] = c.sizes(w_down);
  c.codes(activation, tail);
  const int dtype = c.dtype();
  STD_TORCH_CHECK(g_n ? tail && s && tail_stats && tail_weight : g_s.has_value(), c.op,
                  ": expected g_s, or g_n with s, tail_stats, tail_weight and a tail");
  STD_TORCH_CHECK(!norm_weight || stats, c.op, ": stats is missing, expected it with norm_weight");
  Guard guard(std::in_place, x.get_device_index());
  fp_cuda_site_backward a{};
  a.g_s = c.data("g_s", g_s, rows, d);
  a.g_n = c.data("g_n", g_n, rows, d);
  if (g_n) {
    a.s = c.data("s", s, rows, d);
    a.tail_weight = c.data("tail_weight", tail_weight, d);
    a.tail_stats = c.floats("tail_stats", tail_stats, rows, 2);
  }
  a.x = c.data("x", Optional(x), rows, d);
  a.z = c.data("z", Optional(z), rows, r);
  a.w_down = c.data("w_down", Optional(w_down), r, d);
  a.w_up = c.data("w_up", Optional(w_up), d, r);
  a.norm_weight = c.data("norm_weight", norm_weight, d);
  a.stats = norm_weight ? c.floats("stats", stats, rows, 2) : nullptr;
  a.rows = rows, a.d = static_cast<int>(d), a.r = static_cast<int>(r);
  a.activation = static_cast<int>(activation), a.add_x = add_x, a.tail = static_cast<int>(tail);
  a.device = x.get_device_index(), a.scale = static_cast<float>(scale);
  const bool partial = want_tail && g_n;
  const int64_t block = partial ? fastpetl_cuda_site_block_rows(&a, dtype) : 1;
  Tensor g = c.make(g_n.has_value(), {rows, d}), dx = c.make(want_dx, {rows, d});
  Tensor dz = c.make(true, {rows, r}), h = c.make(want_h, {rows, r});
  Tensor tail_partial = c.make(partial, {(rows + block - 1) / block, 2, d}, ScalarType::Float);
  a.g = out(g), a.dx = out(dx), a.dz = out(dz), a.h = out(h), a.tail_partial = static_cast<float*>(out(tail_partial));
  c.launched(guard, fastpetl_cuda_site_backward(&a, dtype, c.stream()));
  return {g, dx, dz, h, tail_partial};
}

// --- rows -------------------------------------------------------------------------------------------------------------

int64_t bytes(const Tensor& x) { return x.size(1) * (x.scalar_type() == ScalarType::Float ? 4 : 2); }

Tensor cuda_gather_rows(const Tensor& x, const Tensor& index, const Optional& count) {
  const Call c{"cuda_gather_rows", x};
  c.dtype();
  STD_TORCH_CHECK(x.dim() == 2 && index.dim() == 1, c.op, ": expected x [n, d] and index [m]");
  const int64_t n = x.size(0), d = x.size(1), m = index.size(0);
  Guard guard(std::in_place, x.get_device_index());
  Tensor y = c.make(true, {m, d});
  const void* from = d ? c.data("x", Optional(x), n, d) : nullptr;
  c.launched(guard, fastpetl_cuda_gather_rows(from, c.integers("index", Optional(index), m), c.integers("count", count, 1), out(y),
                                       n, m, bytes(x), x.get_device_index(), c.stream()));
  return y;
}

Tensor cuda_scatter_rows(const Tensor& base, const Optional& rows, const Tensor& index, const Optional& count) {
  const Call c{"cuda_scatter_rows", base};
  c.dtype();
  STD_TORCH_CHECK(base.dim() == 2 && index.dim() == 1, c.op, ": expected base [n, d] and index [m]");
  const int64_t n = base.size(0), d = base.size(1), m = index.size(0);
  Guard guard(std::in_place, base.get_device_index());
  if (d) c.data("base", Optional(base), n, d);
  const void* from = d ? c.data("rows", rows, m, d) : nullptr;
  Tensor y = torch::stable::clone(base);
  c.launched(guard, fastpetl_cuda_scatter_rows(from, c.integers("index", Optional(index), m), c.integers("count", count, 1), out(y),
                                        n, m, bytes(base), base.get_device_index(), c.stream()));
  return y;
}

Tensor cuda_add_rows(const Tensor& rows, const Tensor& index, const Optional& count, int64_t n) {
  const Call c{"cuda_add_rows", rows};
  STD_TORCH_CHECK(rows.dim() == 2 && index.dim() == 1, c.op, ": expected rows [m, d] and index [m]");
  const int64_t d = rows.size(1), m = index.size(0);
  Guard guard(std::in_place, rows.get_device_index());
  Tensor y = c.make(true, {n, d}, ScalarType::Float);
  const void* from = d ? c.data("rows", Optional(rows), m, d) : nullptr;
  c.launched(guard, fastpetl_cuda_add_rows(from, c.integers("index", Optional(index), m), c.integers("count", count, 1),
                                    static_cast<float*>(out(y)), n, m, d, c.dtype(), rows.get_device_index(), c.stream()));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastpetl, m) {
  m.def(
      "cuda_adapter_forward(Tensor x, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor? res1, Tensor? res2, bool add_x, float eps, int activation, float scale, bool save) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "cuda_site_forward(Tensor x, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor? res1, Tensor? res2, Tensor tail_weight, Tensor? tail_bias, bool add_x, float eps, "
      "int activation, float scale, int tail, float tail_eps, bool emit_s, bool save) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "cuda_site_backward(Tensor? g_s, Tensor? g_n, Tensor? s, Tensor? tail_stats, Tensor? tail_weight, Tensor x, "
      "Tensor z, Tensor? stats, Tensor w_down, Tensor w_up, Tensor? norm_weight, bool add_x, int activation, "
      "float scale, int tail, bool want_dx, bool want_h, bool want_tail) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("cuda_gather_rows(Tensor x, Tensor index, Tensor? count) -> Tensor");
  m.def("cuda_scatter_rows(Tensor base, Tensor? rows, Tensor index, Tensor? count) -> Tensor");
  m.def("cuda_add_rows(Tensor rows, Tensor index, Tensor? count, int n) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastpetl, CUDA, m) {
  m.impl("cuda_adapter_forward", TORCH_BOX(&cuda_adapter_forward));
  m.impl("cuda_site_forward", TORCH_BOX(&cuda_site_forward));
  m.impl("cuda_site_backward", TORCH_BOX(&cuda_site_backward));
  m.impl("cuda_gather_rows", TORCH_BOX(&cuda_gather_rows));
  m.impl("cuda_scatter_rows", TORCH_BOX(&cuda_scatter_rows));
  m.impl("cuda_add_rows", TORCH_BOX(&cuda_add_rows));
}
#endif  // FASTPETL_WITH_CUDA
