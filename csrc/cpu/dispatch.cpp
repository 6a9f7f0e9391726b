// Which instruction set serves this process: asked of the CPU once, never of its vendor.
#include <string.h>

#include "fastpetl_cpu.h"
#if FASTPETL_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fp_portable { extern const fp_kernels table; }
#if FASTPETL_X86
namespace fp_avx2 { extern const fp_kernels table; }
namespace fp_avx512 { extern const fp_kernels table; }
namespace fp_avx512bf16 { extern const fp_kernels table; }
namespace fp_amx { extern const fp_kernels table; }
#endif

static void serial(int64_t n, int64_t, fp_task task, void* ctx) { task(ctx, 0, n); }
void (*fp_parallel_for)(int64_t, int64_t, fp_task, void*) = serial;
int (*fp_threads)() = [] { return 1; };

namespace {

#if FASTPETL_X86
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
// edx or eax of cpuid leaf 7: what gcc's built-in test of older compilers does not know
unsigned leaf7(unsigned sub, bool edx) {
  unsigned a = 7, b = 0, c = sub, d = 0;
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return edx ? d : a;
}
bool has_avx512bf16() { return has_avx512() && (leaf7(1, false) >> 5 & 1); }
bool has_amx() {
#ifdef __linux__
  const unsigned d = leaf7(0, true);
  if (!(d >> 22 & 1) || !(d >> 24 & 1) || !has_avx512bf16()) return false;  // amx-bf16, amx-tile
  const long request_permission = 0x1023, tile_data = 18;                   // the kernel keeps tiles off until asked
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

struct Choice {
  const fp_kernels* usable[5];
  int count = 0;
  const fp_kernels* active;
  char names[64] = "";
  void add(const fp_kernels& t) {
    if (count) strcat(names, " ");
    strcat(names, t.isa);
    usable[count++] = &t;
  }
  Choice() {
#if FASTPETL_X86
    if (has_amx()) add(fp_amx::table);
    if (has_avx512bf16()) add(fp_avx512bf16::table);
    if (has_avx512()) add(fp_avx512::table);
    if (has_avx2()) add(fp_avx2::table);
#endif
    add(fp_portable::table);
    active = usable[0];
  }
};
Choice& choice() {
  static Choice c;
  return c;
}

}  // namespace

const fp_kernels* fp_active() { return choice().active; }
extern "C" const char* fastpetl_cpu_isa() { return choice().active->isa; }
extern "C" const char* fastpetl_cpu_isas() { return choice().names; }
extern "C" double fastpetl_cpu_fma(int64_t iterations, int threads) { return fp_active()->fma_chains(iterations, threads); }
extern "C" int fastpetl_set_cpu_isa(const char* name) {
  Choice& c = choice();
  for (int i = 0; i < c.count; ++i)
    if (!strcmp(c.usable[i]->isa, name)) {
      c.active = c.usable[i];
      return 0;
    }
  return -1;
}
