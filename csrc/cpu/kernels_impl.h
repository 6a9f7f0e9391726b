// One instruction set's table. Included by isa_*.cpp after FP_ISA, FP_TABLE and FP_ENGINE(T) are defined.
#include "activation_impl.h"
#include "adapter_backward_impl.h"
#include "attention_impl.h"
#include "linear_impl.h"
#include "residual_norm_impl.h"
#include "phm_impl.h"

namespace FP_ISA {

#define FP_BY_TYPE(...)                                           \
  if (dtype == FP_F32) {                                          \
    using T = float;                                              \
    using E = FP_ENGINE(T);                                       \
    __VA_ARGS__;                                                  \
  } else if (dtype == FP_F16) {                                   \
    using T = half;                                               \
    using E = FP_ENGINE(T);                                       \
    __VA_ARGS__;                                                  \
  } else {                                                        \
    using T = bf16;                                               \
    using E = FP_ENGINE(T);                                       \
    __VA_ARGS__;                                                  \
  }

static void adapter_forward(const fp_adapter_forward& a, int dtype) {
#ifdef FP_NARROW
  if (dtype == FP_F32 && a.r <= FP_NARROW) return FP_NARROW_TABLE.adapter_forward(a, dtype);
#endif
  FP_BY_TYPE(AdapterForward<T, E>::run(a))
}
static void adapter_backward(const fp_adapter_backward& a, int dtype) {
#ifdef FP_NARROW
  if (dtype == FP_F32 && a.r <= FP_NARROW) return FP_NARROW_TABLE.adapter_backward(a, dtype);
#endif
  FP_BY_TYPE(AdapterBackward<T, E>::run(a))
}
static void linear_forward(const fp_linear& a, int dtype) { FP_BY_TYPE(Linear<T, E>::forward(a)) }
static void linear_backward(const fp_linear& a, int dtype) { FP_BY_TYPE(Linear<T, E>::backward(a)) }
static size_t pack_bytes(int k, int n, int dtype, int transposed) { FP_BY_TYPE(return Linear<T, E>::pack_bytes(k, n, transposed)) }
static void pack(const fp_linear& a, void* out, int dtype, int transposed) { FP_BY_TYPE(Linear<T, E>::pack(a, out, transposed)) }
static void attention_forward(const fp_attention& a, int dtype) { FP_BY_TYPE(Attention<T, E>::forward(a)) }
static void attention_backward(const fp_attention& a, int dtype) { FP_BY_TYPE(Attention<T, E>::backward(a)) }
static void activation_forward(const fp_activation_code& a, int dtype) { FP_BY_TYPE((void)sizeof(E); Activation<T>::forward(a)) }
static void activation_backward(const fp_activation_code& a, int dtype) { FP_BY_TYPE((void)sizeof(E); Activation<T>::backward(a)) }
static void phm_forward(const fp_phm& a, int dtype) { FP_BY_TYPE(Phm<T, E>::forward(a)) }
static void phm_backward(const fp_phm& a, int dtype) { FP_BY_TYPE(Phm<T, E>::backward(a)) }

static void residual_norm_forward(const fp_residual_norm& a, int dtype) { FP_BY_TYPE((void)sizeof(E); ResidualNorm<T>::forward(a)) }
static void residual_norm_backward(const fp_residual_norm& a, int dtype) { FP_BY_TYPE((void)sizeof(E); ResidualNorm<T>::backward(a)) }

// A ruler: independent FMA chains, as many as hide the latency. Returns the FLOP done by all threads.
static float fma_chain(int64_t iterations, float factor) {
  constexpr int CHAINS = 12;
  vf a[CHAINS] = {}, x = splat(factor), y = splat(1e-9f);
  for (int64_t n = 0; n < iterations; ++n)
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i) a[i] = fma(a[i], x, y + splat(i * 1e-12f));
  for (int i = 1; i < CHAINS; ++i) a[0] += a[i];
  return a[0][0];
}
static double fma_chains(int64_t iterations, int threads) {
  parallel(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) *scratch<float>(4, 1) = fma_chain(iterations, 1.f - 1e-6f * threads);
  });
  return 2. * VL * 12 * iterations * threads;
}

extern const fp_kernels table;
const fp_kernels table = {FP_NAME, adapter_forward, adapter_backward, linear_forward, linear_backward, pack_bytes, pack,
                          attention_forward, attention_backward, residual_norm_forward, residual_norm_backward,
                          activation_forward, activation_backward, phm_forward, phm_backward, fma_chains};

}  // namespace FP_ISA
