// torch's current CUDA stream, found at run time in the libtorch that is loaded. Linking to it instead would tie the
// library to a CUDA build of torch; this way one file loads everywhere.
#pragma once
#include <dlfcn.h>
#include <stdint.h>
#include <torch/headeronly/util/Exception.h>

namespace fastpetl {

inline void* current_cuda_stream(int32_t device) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(getter != nullptr, "fastpetl: the torch in this process was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device, &stream) == 0, "fastpetl: torch gave no CUDA stream for device ", device);
  return stream;
}

}  // namespace fastpetl
