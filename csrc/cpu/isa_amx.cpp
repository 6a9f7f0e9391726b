#define FP_ISA fp_amx
#define FP_NAME "amx"
#define FP_ENGINE(T) EngineAmx<std::is_same<T, bf16>::value ? 1 : 3>
#include "fastpetl_cpu.h"
#include "engine_amx.h"
#include "kernels_impl.h"
