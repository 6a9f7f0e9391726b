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

#include "bind/cuda_stream.h"
#include "cuda/fastpetl_cuda.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

namespace {

int dtype_code(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return FP_CUDA_F32;
    case ScalarType::Half: return FP_CUDA_F16;
    case ScalarType::BFloat16: return FP_CUDA_BF16;
    default: STD_TORCH_CHECK(false, "cuda_adapter_forward: x has an unsupported dtype, expected float32, float16 or bfloat16");
  }
  return -1;
}

// The data of t, a dense [d0] (d1 == 0) or [d0, d1] tensor of x's dtype on x's device.
const void* data(const char* name, const Tensor& t, const Tensor& x, int64_t d0, int64_t d1) {
  const char* op = "cuda_adapter_forward: ";
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), op, name, " has another dtype than x");
  STD_TORCH_CHECK(t.is_cuda() && t.get_device() == x.get_device(), op, name, " is not on x's CUDA device");
  STD_TORCH_CHECK(t.is_contiguous(), op, name, " is not contiguous");
  const bool fits = d1 ? t.dim() == 2 && t.size(0) == d0 && t.size(1) == d1 : t.dim() == 1 && t.size(0) == d0;
  STD_TORCH_CHECK(fits, op, name, " has ", t.dim(), " dimensions and ", t.numel(), " elements, expected (", d0,
                  d1 ? ", " : "", d1 ? std::to_string(d1) : "", ") to match x and w_down");
  return t.const_data_ptr();
}
const void* data(const char* name, const Optional& t, const Tensor& x, int64_t d0, int64_t d1) {
  return t ? data(name, *t, x, d0, d1) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> cuda_adapter_forward(const Tensor& x, const Tensor& w_down, const Optional& b_down,
                                                        const Tensor& w_up, const Optional& b_up,
                                                        const Optional& norm_weight, const Optional& norm_bias,
                                                        const Optional& res1, const Optional& res2, bool add_x, double eps,
                                                        int64_t activation, double scale, bool save) {
  STD_TORCH_CHECK(x.dim() == 2, "cuda_adapter_forward: x has ", x.dim(), " dimensions, expected 2");
  STD_TORCH_CHECK(w_down.dim() == 2, "cuda_adapter_forward: w_down has ", w_down.dim(), " dimensions, expected 2");
  STD_TORCH_CHECK(activation >= 0 && activation <= 4, "cuda_adapter_forward: activation is ", activation, ", expected 0..4");
  const int64_t rows = x.size(0), d = x.size(1), r = w_down.size(0);
  const int64_t limit = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(d > 0 && r > 0 && d <= limit && r <= limit && rows <= limit,
                  "cuda_adapter_forward: x has shape (", rows, ", ", d, ") and w_down ", r, " rows, expected 1..", limit);
  const int dtype = dtype_code(x);
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty_like(x);
  Tensor z = torch::stable::new_empty(x, {save ? rows : 0, r});
  Tensor stats = torch::stable::new_empty(x, {save && norm_weight ? rows : 0, 2}, ScalarType::Float);
  fp_cuda_site_forward a{};
  a.x = data("x", x, x, rows, d);
  a.w_down = data("w_down", w_down, x, r, d);
  a.b_down = data("b_down", b_down, x, r, 0);
  a.w_up = data("w_up", w_up, x, d, r);
  a.b_up = data("b_up", b_up, x, d, 0);
  a.norm_weight = data("norm_weight", norm_weight, x, d, 0);
  a.norm_bias = data("norm_bias", norm_bias, x, d, 0);
  a.res1 = data("res1", res1, x, rows, d);
  a.res2 = data("res2", res2, x, rows, d);
  a.s = y.mutable_data_ptr();
  a.z = save ? z.mutable_data_ptr() : nullptr;
  a.stats = save && norm_weight ? static_cast<float*>(stats.mutable_data_ptr()) : nullptr;
  a.rows = rows, a.d = static_cast<int>(d), a.r = static_cast<int>(r);
  a.activation = static_cast<int>(activation), a.add_x = add_x, a.device = x.get_device_index();
  a.eps = static_cast<float>(eps), a.scale = static_cast<float>(scale);
  const int error = fastpetl_cuda_site_forward(&a, dtype, fastpetl::current_cuda_stream(x.get_device_index()));
  STD_TORCH_CHECK(error == 0, "cuda_adapter_forward: CUDA error ", error, " at launch (9: the bottleneck is too wide for this device's shared memory)");
  return {y, z, stats};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastpetl, m) {
  m.def(
      "cuda_adapter_forward(Tensor x, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, Tensor? norm_weight, "
      "Tensor? norm_bias, Tensor? res1, Tensor? res2, bool add_x, float eps, int activation, float scale, bool save) "
      "-> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastpetl, CUDA, m) { m.impl("cuda_adapter_forward", TORCH_BOX(&cuda_adapter_forward)); }
#endif  // FASTPETL_WITH_CUDA
