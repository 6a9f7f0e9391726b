// The site's forward with its rows resident: read once into shared memory, where the sum takes their place and is
// normalised. Each matrix crosses the chip's edge once; a block of 128 rows reads the weights from the second-level
// cache once, which is a third of what blocks of 64 rows that read x and s again ask of it (benchmarks/NOTES.md).
// bf16 and fp16, d a multiple of 64, r one of 8 up to 192; what it does not serve is site_forward.cu's.
#include <initializer_list>

#include "cuda/fastpetl_cuda.h"
#include "cuda/resident.cuh"
#include "cuda/resident.h"

namespace {

using Args = fp_cuda_site_forward;

// w_down's chunks, then w_up's, STAGES - 1 of them on their way.
template <int G, int W>
struct Weights {
  using M = Room<G, W>;
  Copies<G, W> now;
  uint16_t* const stages;
  const Args& a;
  int asked = 0, stage = 0, free = 0;

  __device__ Weights(const Args& a, uint16_t* stages) : stages(stages), a(a) {
    now.columns(a.w_down, a.r, a.d);
    for (int k = 0; k < M::STAGES - 1; ++k) ask();
  }
  __device__ void ask() {
    const int chunks = a.d / 32;
    if (asked == chunks) now.valid = 0, now.rows(a.w_up, a.r);
    if (asked < 2 * chunks) now.copy(stages + free * M::STAGE);
    fp_cp_commit();
    ++asked, free = free + 1 == M::STAGES ? 0 : free + 1;
  }
  // The next chunk is there; another is on its way to the place of the one before, which all have read.
  __device__ const uint16_t* next() {
    fp_cp_wait<M::STAGES - 2>();
    FP_SYNC(FP_CHUNK);
    ask();
    const uint16_t* there = stages + stage * M::STAGE;
    stage = stage + 1 == M::STAGES ? 0 : stage + 1;
    return there;
  }
};

template <typename T, int G, int W>
struct Rows {
  using M = Room<G, W>;
  const Args& a;
  uint16_t* const mine;  // this thread's columns of its first row; the other is 8 rows below
  const int chunks, thread, odd;
  const int64_t row;
  const bool valid[2];

  __device__ Rows(const Args& a, uint16_t* smem)
      : a(a), mine(smem + (threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4) * a.d + threadIdx.x % 4 * 8), chunks(a.d / 32),
        thread(threadIdx.x % 4), odd(threadIdx.x / 4 % 2),
        row(static_cast<int64_t>(blockIdx.x) * M::BM + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4),
        valid{row < a.rows, row + 8 < a.rows} {}

  __device__ uint16_t* here(int c, int half) const { return mine + half * 8 * a.d + 32 * (c ^ odd); }
  __device__ int column(int c) const { return 32 * c + 8 * thread; }
  __device__ int64_t at(int c, int half) const { return (row + 8 * half) * a.d + column(c); }

  __device__ void fetch_rows() const {
    for (int part = 0; part < 4; ++part) {
      for (int c = part * chunks / 4; c < (part + 1) * chunks / 4; ++c)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          fp_cp_async16_or_zero(here(c, h), static_cast<const uint16_t*>(a.x) + (valid[h] ? at(c, h) : 0), valid[h]);
      fp_cp_commit();
    }
  }

  __device__ void add(Moving (&m)[2], int from, int to) const {
    for (int c = from; c < to; ++c)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float x[8];
        widen<T>(eight(here(c, h)), x);
#pragma unroll
        for (int e = 0; e < 8; ++e) m[h].add(x[e]);
      }
  }
  // Of the own norm, while the rows arrive.
  __device__ void own_moments(Moments (&own)[2]) const {
    const int part = chunks / 4 ? chunks / 4 : 1;
    Moving first[2], m[2];
    chunks / 4 ? fp_cp_wait<M::STAGES - 1 + 3>() : fp_cp_wait<M::STAGES - 1>();
    add(first, 0, part);
#pragma unroll
    for (int h = 0; h < 2; ++h) m[h].shift = row_sum(first[h].sum) / (32 * part);
    add(m, 0, chunks / 4);
    fp_cp_wait<M::STAGES - 1 + 2>();
    add(m, chunks / 4, chunks / 2);
    fp_cp_wait<M::STAGES - 1 + 1>();
    add(m, chunks / 2, 3 * chunks / 4);
    fp_cp_wait<M::STAGES - 1>();
    add(m, 3 * chunks / 4, chunks);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      own[h] = m[h].finish(a.d, false, a.eps);
      save(a.stats, own[h], h);
    }
  }
  __device__ void save(float* stats, const Moments& m, int h) const {
    if (stats && thread == 0 && valid[h]) stats[2 * (row + 8 * h)] = m.mean, stats[2 * (row + 8 * h) + 1] = m.rstd;
  }

  // (v - mean) * rstd * weight + bias, rounded.
  __device__ static Eight normed(const Eight& v, const Moments& m, const Eight& weight, const Eight& bias) {
    float x[8], w[8], b[8];
    widen<T>(v, x), widen<T>(weight, w), widen<T>(bias, b);
    const float moved = -m.mean * m.rstd;
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = (x[e] * m.rstd + moved) * w[e] + b[e];
    return narrow<T>(x);
  }
  __device__ Eight vector(const void* p, int c) const { return p ? operand(p, column(c)) : Eight{}; }

  // z but for its bias. The norm's vectors are asked for a chunk ahead, the residuals on their way into the second-level
  // cache meanwhile: the memory is idle here.
  __device__ void down(float (&acc)[4 * G][4], const Moments (&own)[2], Weights<G, W>& weights) const {
    const void* residual = thread < 2 ? a.res1 : a.res2;
    const uint16_t* ahead = nullptr;
    if (residual && (thread % 2 ? valid[1] : valid[0]))
      ahead = static_cast<const uint16_t*>(residual) + (row + 8 * (thread % 2)) * a.d;
    Eight weight = vector(a.norm_weight, 0), bias = vector(a.norm_bias, 0);
    for (int c = 0; c < chunks; ++c) {
      Eight x[2] = {eight(here(c, 0)), eight(here(c, 1))};
      if (a.norm_weight) {
        x[0] = normed(x[0], own[0], weight, bias), x[1] = normed(x[1], own[1], weight, bias);
        if (c + 1 < chunks) weight = vector(a.norm_weight, c + 1), bias = vector(a.norm_bias, c + 1);
      }
      if (ahead && c % 2 == 0) fp_prefetch(ahead + 32 * c);
      const uint16_t* w = weights.next() + threadIdx.x % 32 / 4 * 32 + 8 * thread;
#pragma unroll
      for (int g = 0; g < G; ++g) mma32<T>(acc + 4 * g, x[0], x[1], w + g * 32 * 32, 8 * 32);
    }
  }

  // act(z) as operands of the product that follows; z to memory.
  __device__ void bottleneck(const float (&acc)[4 * G][4], Eight (&hidden)[G][2]) const {
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const int j = 32 * g + 8 * thread;
      float bias[8] = {};
      if (a.b_down && j < a.r) widen<T>(eight(a.b_down, j), bias);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float z[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) z[e] = acc[4 * g + e / 2][2 * h + e % 2] + bias[e];
        const Eight rounded = narrow<T>(z);
        if (a.z && valid[h] && j < a.r) put(a.z, (row + 8 * h) * a.r + j, rounded);
        widen<T>(rounded, z);
        activate(z, a.activation);
        hidden[g][h] = narrow<T>(z);
      }
    }
  }

  // What a chunk of s is made of besides the product, asked for two chunks ahead.
  struct Operands {
    Eight bias, residual[2];
  };
  __device__ Operands operands(int c) const {
    Operands o{vector(a.b_up, c), {}};
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (a.res1 && valid[h]) o.residual[h] = operand(a.res1, at(c, h));
    return o;
  }

  // s = scale * (h Wu^T + bu) + residuals, chunk by chunk, in x's place and to memory; its moments on the way.
  __device__ void up(const Eight (&hidden)[G][2], Moving (&m)[2], Weights<G, W>& weights) const {
    Operands next[2] = {operands(0), operands(1)};
    for (int first = 0; first < chunks; first += 2)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int c = first + i;
        const Operands o = next[i];
        if (c + 2 < chunks) next[i] = operands(c + 2);
        const uint16_t* w = weights.next() + threadIdx.x % 32 / 4 * M::R + 8 * thread;
        float acc[4][4] = {};
#pragma unroll
        for (int g = 0; g < G; ++g)
          mma32<T>(acc, hidden[g][0], hidden[g][1], w + 32 * (G % 2 ? g : g ^ odd), 8 * M::R);
        emit(acc, c, o, m);
      }
  }
  __device__ void emit(const float (&acc)[4][4], int c, const Operands& o, Moving (&m)[2]) const {
    void* out = a.s ? a.s : a.tail ? nullptr : a.n;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Eight second{};
      if (a.res2 && valid[h]) second = operand(a.res2, at(c, h));
      const Eight s = sum(acc, h, o.bias, eight(here(c, h)), o.residual[h], second);
      if (out && valid[h]) put(out, at(c, h), s);
      if (!a.tail) continue;
      put(here(c, h), 0, s);
      float v[8], all = 0.f;
      widen<T>(s, v);
      if (c == 0 && a.tail == FP_CUDA_LAYERNORM) {
#pragma unroll
        for (int e = 0; e < 8; ++e) all += v[e];
        m[h].shift = row_sum(all) / 32;
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) m[h].add(v[e]);
    }
  }
  __device__ static void add_to(float (&y)[8], const Eight& more) {
    float v[8];
    widen<T>(more, v);
#pragma unroll
    for (int e = 0; e < 8; ++e) y[e] += v[e];
  }
  __device__ Eight sum(const float (&acc)[4][4], int h, const Eight& bias, const Eight& x, const Eight& r1,
                       const Eight& r2) const {
    float y[8], v[8];
    widen<T>(bias, v);
#pragma unroll
    for (int e = 0; e < 8; ++e) y[e] = a.scale * acc[e / 2][2 * h + e % 2] + a.scale * v[e];
    if (a.add_x) add_to(y, x);
    if (a.res1) add_to(y, r1);
    if (a.res2) add_to(y, r2);
    return narrow<T>(y);
  }

  __device__ void tail(const Moving (&m)[2]) const {
    Moments t[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      t[h] = m[h].finish(a.d, a.tail == FP_CUDA_RMSNORM, a.tail_eps);
      save(a.tail_stats, t[h], h);
    }
    Eight weight = vector(a.tail_weight, 0), bias = vector(a.tail_bias, 0);
#pragma unroll 2
    for (int c = 0; c < chunks; ++c) {
      const Eight n[2] = {normed(eight(here(c, 0)), t[0], weight, bias), normed(eight(here(c, 1)), t[1], weight, bias)};
      if (c + 1 < chunks) weight = vector(a.tail_weight, c + 1), bias = vector(a.tail_bias, c + 1);
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (valid[h]) put(a.n, at(c, h), n[h]);
    }
  }
};

template <typename T, int G, int W>
__global__ void __launch_bounds__(32 * W, 1) resident_forward(Args a) {
  FP_DYN_SMEM(uint16_t, smem);
  const Rows<T, G, W> site(a, smem);
  using M = Room<G, W>;
  site.fetch_rows();
  Weights<G, W> weights(a, smem + M::BM * a.d);
  Moments own[2];
  if (a.norm_weight) site.own_moments(own);
  else fp_cp_wait<M::STAGES - 1>();
  Eight hidden[G][2];
  {
    float acc[4 * G][4] = {};
    site.down(acc, own, weights);
    site.bottleneck(acc, hidden);
  }
  Moving m[2];
  site.up(hidden, m, weights);
  if (a.tail) site.tail(m);
}

template <typename T, int G, int W>
int launch(const Args& a, cudaStream_t stream) {
  const int smem = Room<G, W>::bytes(a.d);
  if (const int error = allow_shared(resident_forward<T, G, W>, smem, a.device)) return error;
  const unsigned grid = static_cast<unsigned>((a.rows + 16 * W - 1) / (16 * W));
  FP_LAUNCH((resident_forward<T, G, W>), grid, 32 * W, smem, stream, a);
  return cudaGetLastError();
}

template <typename T, int G>
int with_warps(const Args& a, int warps, cudaStream_t stream) {
  return warps == 8 ? launch<T, G, 8>(a, stream) : launch<T, G, 4>(a, stream);
}

template <typename T>
int pick(const Args& a, int warps, cudaStream_t stream) {
  switch ((a.r + 31) / 32) {
    case 1: return with_warps<T, 1>(a, warps, stream);
    case 2: return with_warps<T, 2>(a, warps, stream);
    case 3: return with_warps<T, 3>(a, warps, stream);
    case 4: return with_warps<T, 4>(a, warps, stream);
    default: return with_warps<T, 6>(a, warps, stream);
  }
}

template <int W>
int room(const Args& a) {
  switch ((a.r + 31) / 32) {
    case 1: return Room<1, W>::bytes(a.d);
    case 2: return Room<2, W>::bytes(a.d);
    case 3: return Room<3, W>::bytes(a.d);
    case 4: return Room<4, W>::bytes(a.d);
    default: return Room<6, W>::bytes(a.d);
  }
}

}  // namespace

int fp_resident_forward_warps(const Args& a, int dtype) {
  if (dtype == FP_CUDA_F32 || a.d % 64 || a.r % 8 || a.r > 192 || a.warps_m > 0) return 0;
  if (!aligned({a.x, a.w_down, a.b_down, a.w_up, a.b_up, a.norm_weight, a.norm_bias, a.res1, a.res2, a.tail_weight,
                a.tail_bias, a.s, a.n, a.z}))
    return 0;
  const int limit = shared_limit(a.device);
  if (a.warps_m) return (a.warps_m == -8 ? room<8>(a) : room<4>(a)) <= limit ? -a.warps_m : 0;
  if (a.rows > 8192 && room<8>(a) <= limit) return 8;
  return a.rows > 4096 && room<4>(a) <= limit ? 4 : 0;
}

int fp_resident_forward(const Args& a, int dtype, int warps, cudaStream_t stream) {
  return dtype == FP_CUDA_F16 ? pick<__half>(a, warps, stream) : pick<__nv_bfloat16>(a, warps, stream);
}
