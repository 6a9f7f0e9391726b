#define FP_ISA fp_portable
#define FP_NAME "portable"
#define FP_ENGINE(T) EngineF32
#include "fastpetl_cpu.h"
#include "engine_f32.h"
#include "kernels_impl.h"
