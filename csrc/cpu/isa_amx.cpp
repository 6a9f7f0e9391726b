#define FP_ISA fp_amx
#define FP_NAME "amx"
#define FP_ENGINE(T) EngineAmx<std::is_same<T, bf16>::value ? 1 : 3>
// fp32 adapters up to this bottleneck go to the FMA units: tiles are 32 wide, and splitting x costs as much whatever r is
#define FP_NARROW 48
#define FP_NARROW_TABLE fp_avx512bf16::table
#include "fastpetl_cpu.h"
namespace fp_avx512bf16 { extern const fp_kernels table; }
#include "engine_amx.h"
#include "kernels_impl.h"
