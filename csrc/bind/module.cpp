// The Python module fastpetl._C: what was built and which CPU instructions are in use. Importing it also registers
// torch.ops.fastpetl.* (ops.cpp). No torch header here: see setup.py.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "fastpetl_config.h"

namespace py = pybind11;

extern "C" {  // csrc/cpu: run-time choice of the instruction set
const char* fastpetl_cpu_isa();
int fastpetl_set_cpu_isa(const char* name);  // 0 on success
const char* fastpetl_cpu_isas();             // space separated
double fastpetl_cpu_fma(int64_t iterations, int threads);
#ifdef FASTPETL_WITH_CUDA
int fastpetl_cuda_site_fits(int r, int dtype, int backward, int device);
#endif
}

static py::dict build_info() {
  py::dict info;
#ifdef __clang__
  info["compiler"] = __VERSION__;  // begins with "Clang"
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
  info["torch_headers"] = FASTPETL_TORCH;
  info["x86"] = bool(FASTPETL_X86);
#ifdef FASTPETL_WITH_CUDA
  info["cuda"] = true;
  info["cuda_archs"] = FASTPETL_CUDA_ARCHS;
  info["nvcc"] = FASTPETL_NVCC;
#else
  info["cuda"] = false;
  info["cuda_archs"] = "";
  info["nvcc"] = "";
#endif
  return info;
}

static py::list cpu_isas() {
  py::list names;
  std::istringstream words(fastpetl_cpu_isas());
  for (std::string word; words >> word;) names.append(word);
  return names;
}

static void set_cpu_isa(const std::string& name) {
  if (fastpetl_set_cpu_isa(name.c_str()) != 0)
    throw py::value_error("set_cpu_isa: name is '" + name + "', expected one of: " + fastpetl_cpu_isas());
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastpetl's compiled part; importing it registers torch.ops.fastpetl.*";
  m.def("build_info", &build_info, "What this module was built with.");
  m.def("cpu_isa", [] { return std::string(fastpetl_cpu_isa()); }, "The instruction set the CPU kernels use now.");
  m.def("cpu_isas", &cpu_isas, "The instruction sets this build and this CPU can use.");
  m.def("fma", &fastpetl_cpu_fma, py::arg("iterations"), py::arg("threads"), "Runs FMA chains; returns the FLOP done (for measuring the peak).");
#ifdef FASTPETL_WITH_CUDA
  m.def("cuda_site_fits", [](int r, int dtype, bool backward, int device) { return fastpetl_cuda_site_fits(r, dtype, backward, device) != 0; },
        py::arg("r"), py::arg("dtype"), py::arg("backward"), py::arg("device"),
        "Whether a bottleneck fits a CUDA device's shared memory; dtype: 0 float32, 1 float16, 2 bfloat16.");
#endif
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("name"), "Use this instruction set from now on (tests, measurements).");
}
