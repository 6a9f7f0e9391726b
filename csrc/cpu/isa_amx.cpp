#define FP_ISA fp_amx
#define FP_NAME "amx"
#define FP_ENGINE(T) EngineAmx<sizeof(T) == 4 ? 3 : 1>
#include "fastpetl_cpu.h"
#include "engine_amx.h"
#include "kernels_impl.h"
