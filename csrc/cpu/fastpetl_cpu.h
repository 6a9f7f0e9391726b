// The CPU kernels' C interface: pointers and sizes, no framework header. All matrices are dense and row-major.
#pragma once
#include <stddef.h>
#include <stdint.h>

enum fp_dtype { FP_F32 = 0, FP_BF16 = 1, FP_F16 = 2 };
enum fp_activation { FP_IDENTITY = 0, FP_RELU = 1, FP_GELU = 2, FP_GELU_TANH = 3, FP_SILU = 4 };
enum fp_prologue { FP_NONE = 0, FP_LAYERNORM = 1, FP_PROLOGUE_GELU = 2 };

// y = scale * (act(own(x) Wd^T + bd) Wu^T + bu) + [x] + res1 + res2;  null pointers leave a term out.
// A site has a tail, n = norm(y), of y as rounded to the element type.
// order, of `rows` ascending row numbers: only those rows of the matrices are taken (one task's); null: the first `rows`.
struct fp_adapter_forward {
  const void *x, *w_down, *b_down, *w_up, *b_up, *norm_weight, *norm_bias, *res1, *res2, *tail_weight, *tail_bias;
  void *y, *z, *n;            // y: with a tail null for not wanted; z: pre-activation [rows, r] or null; n: with a tail
  float *stats, *tail_stats;  // (mean, rstd) per row of x and of y, or null
  const int64_t* order;
  int64_t rows;
  int d, r, activation, add_x, tail;  // tail: 0 none, 1 LayerNorm, 2 RMSNorm
  float eps, scale, tail_eps;
};
struct fp_adapter_backward {
  const void *grad, *x, *z, *w_down, *w_up, *norm_weight, *norm_bias;
  const float* stats;
  void *dx, *dw_down, *db_down, *dw_up, *db_up, *dnorm_weight, *dnorm_bias;  // null: not wanted
  const int64_t* order;
  int64_t rows;
  int d, r, activation, add_x, tail;
  float scale;
  // With a tail, instead of grad: g = g_s (may be null) + the gradient of y through the norm, written and then used.
  const void *g_s, *g_n, *y, *tail_weight;
  const void* tail_bias;  // read only with y_is_n
  int y_is_n;             // y is the norm's output, from which its input is told: no gain may be near 0
  const float* tail_stats;
  void *g, *dtail_weight, *dtail_bias;  // the latter two null: not wanted
};
// y = p(x) [W_0; W_1; ...]^T + [b_0, b_1, ...] with the frozen weights W_i [n[i], k] side by side.
struct fp_linear {
  const void* x;            // forward: input [rows, k].  backward: the same x, for the prologue's derivative
  const void* grad;         // backward only: [rows, sum n]
  const void* const* w;
  const void* const* b;     // null or one pointer (null allowed) per weight; forward only
  const int* n;
  const void* packed;       // from fp_kernels.pack, or null: packed into scratch on the fly
  const void *norm_weight, *norm_bias;
  void* out;                // forward: y [rows, sum n].  backward: dx [rows, k]
  float* stats;             // LayerNorm prologue: written by forward (may be null), read by backward
  uint8_t* code;            // GELU's derivative (activation_impl.h), written by forward: of the prologue's, k a multiple of
                            // 32, read by backward instead of x; or of `then`, sum n a multiple of 32; or null
  int64_t rows;
  int k, count, prologue;
  int then;                 // forward: out = then(y), FP_IDENTITY, FP_RELU or FP_GELU
  float eps;
};
// forward: out = act(x), out null for x activated already; backward: out = scale * x * act'. act: FP_RELU or, with k a
// multiple of 32, FP_GELU. code: ceil(rows k / 8) bytes for ReLU, rows of 5 k / 2 bytes for GELU (activation_impl.h).
struct fp_activation_code {
  const void* x;
  void* out;
  uint8_t* code;
  int64_t rows;
  int k, activation;
  float scale;              // backward of ReLU only: what dropout behind it multiplies by
};
// out = softmax(scale * q k^T + key_mask) v per head; qkv [batch, tokens, 3, heads, head_dim].
struct fp_attention {
  const void *qkv, *out_in, *grad;  // out_in: the forward's out; null: not kept, at the price of scratch for tokens^2 * 2
  const float* key_mask;    // additive [batch, tokens] or null
  void *out, *dqkv;
  float* lse;               // [batch, heads, tokens]; written by forward (may be null), read by backward
  int64_t batch, tokens;
  int heads, head_dim;
  float scale;
};
// H[c out + q, a in + k] = sum_i rule[i, a, c] w[i, k, q]: PHM weights of many layers. w [n, in, out], rule [n, n, n].
struct fp_phm_layer {
  const void *rule, *w;
  void* h;                  // [n * out, n * in]; forward: written, backward: its gradient
  void *drule, *dw;         // backward only; null in every layer: not wanted
  int n, in, out;
};
struct fp_phm {
  const fp_phm_layer* layers;
  int count, shared;        // shared: all layers have one rule, whose gradients are summed
};

// s = x + drop(f), n = norm(s);  backward: dx, df, dweight, dbias from g_s and g_n
struct fp_residual_norm {
  const void *x, *f, *weight, *bias;            // forward; f may be null: s is x
  const void *g_s, *g_n, *s_in;                 // backward
  void *s, *n, *dx, *df, *dweight, *dbias;      // null: not wanted
  float* stats;                                 // (mean, rstd) per row; written by forward (may be null), read by backward
  const uint8_t* mask;                          // per sample of `sample` rows, or null
  int64_t rows, sample, seed;
  int d, tail;                                  // 0 none, 1 LayerNorm, 2 RMSNorm
  float eps;
  double dropout;
};

// One table per instruction set; each function takes the element type of all its matrices.
struct fp_kernels {
  const char* isa;
  void (*adapter_forward)(const fp_adapter_forward&, int dtype);
  void (*adapter_backward)(const fp_adapter_backward&, int dtype);
  void (*linear_forward)(const fp_linear&, int dtype);
  void (*linear_backward)(const fp_linear&, int dtype);
  size_t (*pack_bytes)(int k, int n, int dtype, int transposed);
  void (*pack)(const fp_linear&, void* out, int dtype, int transposed);
  void (*attention_forward)(const fp_attention&, int dtype);
  void (*attention_backward)(const fp_attention&, int dtype);
  void (*residual_norm_forward)(const fp_residual_norm&, int dtype);
  void (*residual_norm_backward)(const fp_residual_norm&, int dtype);
  void (*activation_forward)(const fp_activation_code&, int dtype);
  void (*activation_backward)(const fp_activation_code&, int dtype);
  void (*phm_forward)(const fp_phm&, int dtype);
  void (*phm_backward)(const fp_phm&, int dtype);
  double (*fma_chains)(int64_t iterations, int threads);  // for measuring the peak
};
const fp_kernels* fp_active();  // the table in use: the best this CPU has, or what was set

// The binding's thread pool: runs task(ctx, begin, end) over [0, n) in chunks of at least `grain`.
typedef void (*fp_task)(void* ctx, int64_t begin, int64_t end);
extern void (*fp_parallel_for)(int64_t n, int64_t grain, fp_task task, void* ctx);
extern int (*fp_threads)();  // how many it has

extern "C" {
const char* fastpetl_cpu_isa();              // "amx", "avx512bf16", "avx512", "avx2" or "portable"
const char* fastpetl_cpu_isas();             // those usable here, best first, separated by spaces
double fastpetl_cpu_fma(int64_t iterations, int threads);  // runs FMA chains on that many threads; the FLOP done
int fastpetl_set_cpu_isa(const char* name);  // 0, or -1 where this CPU or build lacks it
}
