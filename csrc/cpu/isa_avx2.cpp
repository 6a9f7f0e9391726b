#define FP_ISA fp_avx2
#define FP_NAME "avx2"
#define FP_ENGINE(T) EngineF32
#include "fastpetl_cpu.h"
#include "engine_f32.h"
#include "kernels_impl.h"
