// What the bindings share: checks that memory safety needs (fastpetl/ops checks the rest, in users' terms) and outputs.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/fastpetl_cpu.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

namespace {  // one copy per file

[[maybe_unused]] int code(const Tensor& t, const char* op) {
  const ScalarType s = t.scalar_type();
  STD_TORCH_CHECK(s == ScalarType::Float || s == ScalarType::BFloat16 || s == ScalarType::Half, op, ": x must be float32, bfloat16 or float16");
  return s == ScalarType::Float ? FP_F32 : s == ScalarType::Half ? FP_F16 : FP_BF16;
}
[[maybe_unused]] const void* in(const Tensor& t, const Tensor& like, int64_t numel, const char* op, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), op, ": ", name, " has another dtype than x");
  STD_TORCH_CHECK(t.numel() == numel, op, ": ", name, " has ", t.numel(), " elements, expected ", numel);
  return t.const_data_ptr();
}
[[maybe_unused]] const void* in(const MaybeTensor& t, const Tensor& like, int64_t numel, const char* op, const char* name) {
  return t ? in(*t, like, numel, op, name) : nullptr;
}
[[maybe_unused]] const float* in_float(const Tensor& t, int64_t numel, const char* op, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous() && t.scalar_type() == ScalarType::Float && t.numel() == numel, op, ": ", name,
                  " must be contiguous float32 with ", numel, " elements");
  return static_cast<const float*>(t.const_data_ptr());
}
// Large results are written all over at once, and every page that is new to the process costs a fault: pages of 2 MiB
// where the system grants them, as THP_MEM_ALLOC_ENABLE=1 asks of torch for all its tensors.
[[maybe_unused]] void in_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = 2 << 20;
  if (bytes < static_cast<int64_t>(4 * PAGE)) return;
  const uintptr_t at = reinterpret_cast<uintptr_t>(p), begin = (at + PAGE - 1) / PAGE * PAGE, end = (at + bytes) / PAGE * PAGE;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // refused: pages as they were
#endif
}
[[maybe_unused]] Tensor make(const Tensor& like, std::vector<int64_t> size, std::optional<ScalarType> type = std::nullopt) {
  Tensor t = torch::stable::new_empty(like, size, type);
  const ScalarType s = t.scalar_type();
  if (t.numel()) in_huge_pages(t.mutable_data_ptr(), t.numel() * (s == ScalarType::Byte ? 1 : s == ScalarType::Float ? 4 : 2));
  return t;
}
[[maybe_unused]] void* out(Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; }
// A tensor of that size, or an empty one whose pointer is null: the kernels' "not wanted"
[[maybe_unused]] std::pair<Tensor, void*> wanted(bool want, const Tensor& like, std::vector<int64_t> size) {
  static char none;  // a wanted gradient of zero elements is not "not wanted"
  if (!want) size = {0};
  Tensor t = make(like, size);
  return {t, want ? (t.numel() ? t.mutable_data_ptr() : &none) : nullptr};
}

}  // namespace
