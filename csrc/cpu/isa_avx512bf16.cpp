#include <type_traits>
#define FP_ISA fp_avx512bf16
#define FP_NAME "avx512bf16"
#define FP_ENGINE(T) std::conditional_t<std::is_same<T, bf16>::value, EngineBf16, EngineF32>
#include "fastpetl_cpu.h"
#include "engine_f32.h"
#include "engine_bf16.h"
#include "kernels_impl.h"
