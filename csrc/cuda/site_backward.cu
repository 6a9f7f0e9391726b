// The backward of one adapter site over the rows, as one launch: through the trailing norm, the up projection, the
// activation, the down projection and the adapter's own norm, for a block of rows.
//
// The weights' gradients are sums over all rows, dWd = dz^T own(x) and dWu = g^T h: they are left to cuBLAS, called from
// Python on the dz and h written here. A block of this kernel cannot hold them (2 * r * d floats), partial sums of its
// own would be written and read again for every few rows, and cuBLAS is deterministic and bound by memory there.
#include <initializer_list>

#include "cuda/fastpetl_cuda.h"
#include "cuda/tile.cuh"

namespace {

using Args = fp_cuda_site_backward;

template <typename T, int WM>
struct Site {
  using S = Shape<T, WM>;
  const Args& a;
  const Layout<T, WM, true> at;
  unsigned char* smem;
  const bool vec_d, vec_r;
  const int64_t m0;
  const int rows, warp, lane, wm, wn, r_padded;

  __device__ Site(const Args& a, unsigned char* smem, bool vec_d, bool vec_r)
      : a(a), at(a.r), smem(smem), vec_d(vec_d), vec_r(vec_r), m0(static_cast<int64_t>(blockIdx.x) * S::BM),
        rows(a.rows - m0 < S::BM ? static_cast<int>(a.rows - m0) : S::BM), warp(threadIdx.x / 32),
        lane(threadIdx.x & 31), wm(warp / S::WN), wn(warp % S::WN), r_padded(fp_up16(a.r)) {}

  __device__ T* weights(int i) const { return reinterpret_cast<T*>(smem + (i & 1) * at.weights); }
  __device__ T* tile(int i) const { return reinterpret_cast<T*>(smem + at.rows) + (i & 1) * S::BM * S::LDX; }
  __device__ T* bottleneck() const { return reinterpret_cast<T*>(smem + at.bottleneck); }
  __device__ float* patch() const { return reinterpret_cast<float*>(smem + at.rows) + warp * 16 * S::LDP; }
  template <typename P>
  __device__ static T* as(P* p) { return static_cast<T*>(const_cast<void*>(static_cast<const void*>(p))); }
  __device__ const T* g() const { return as(a.g_n ? a.g : a.g_s); }
  __device__ static Moments moments(const float* stats, int64_t row) { return {stats[2 * row], stats[2 * row + 1]}; }

  // g = g_s + the gradient of s through the tail; and the block's share of the tail's own gradients.
  __device__ void tail() const {
    for (int m = warp; m < rows; m += WARPS) {
      const int64_t row = m0 + m, first = row * a.d;
      norm_backward_row(as(a.g) + first, as(a.g_n) + first, as(a.s) + first, moments(a.tail_stats, row),
                        as(a.tail_weight), a.g_s ? as(a.g_s) + first : nullptr, a.d, a.tail == FP_CUDA_RMSNORM, vec_d);
    }
    if (!a.tail_partial) return;
    float* partial = a.tail_partial + static_cast<int64_t>(blockIdx.x) * 2 * a.d;
    for (int c = threadIdx.x; c < a.d; c += THREADS) {
      float weight = 0.f, bias = 0.f;
      for (int m = 0; m < rows; ++m) {
        const Moments s = moments(a.tail_stats, m0 + m);
        const float gn = load(as(a.g_n), (m0 + m) * a.d + c);
        weight += gn * ((load(as(a.s), (m0 + m) * a.d + c) - s.mean) * s.rstd), bias += gn;
      }
      partial[c] = weight, partial[a.d + c] = bias;
    }
  }

  __device__ void stage_up(int chunk, int r0, int columns) const {
    const int k0 = chunk * S::BK, width = fp_up16(columns);
    stage(weights(chunk), fp_min(r_padded, R_TILE) + S::V, as(a.w_up) + static_cast<int64_t>(k0) * a.r + r0, a.r,
          a.d - k0, columns, S::BK, width, vec_r);
    stage(tile(chunk), S::LDX, g() + m0 * a.d + k0, a.d, rows, a.d - k0, S::BM, S::BK, vec_d);
    fp_cp_commit();
  }

  // dz = scale * (g Wu) * act'(z) for the bottleneck's columns from r0 on; stays in shared memory too.
  __device__ void up(int r0) const {
    const int columns = fp_min(R_TILE, a.r - r0), chunks = (a.d + S::BK - 1) / S::BK;
    float acc[S::R_PAIRS][2][4] = {};
    stage_up(0, r0, columns);
    for (int c = 0; c < chunks; ++c) {
      fp_cp_wait<0>();
      FP_SYNC(FP_CHUNK);
      if (c + 1 < chunks) stage_up(c + 1, r0, columns);
      multiply<true>(acc, tile(c) + wm * 16 * S::LDX, S::LDX, weights(c), fp_min(r_padded, R_TILE) + S::V, S::BK, wn,
                     S::WN, fp_up16(columns) / 16);
    }
#pragma unroll
    for (int p = 0; p < S::R_PAIRS; ++p)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int m = wm * 16 + lane / 4 + 8 * (i % 4 / 2);
        const int j = r0 + (wn + p * S::WN) * 16 + 8 * (i / 4) + 2 * (lane % 4) + i % 2;
        if (j >= fp_min(r0 + R_TILE, r_padded)) continue;
        const bool inside = j < a.r && m < rows;
        const int64_t at_z = (m0 + m) * a.r + j;
        const float z = inside ? load(as(a.z), at_z) : 0.f;
        const T dz = static_cast<T>(inside ? a.scale * acc[p][i / 4][i % 4] * activate_backward(z, a.activation) : 0.f);
        bottleneck()[m * at.ldh + j] = dz;
        if (!inside) continue;
        as(a.dz)[at_z] = dz;
        if (a.h) as(a.h)[at_z] = static_cast<T>(activate(z, a.activation));
      }
  }

  __device__ void stage_down(int step, int k_steps) const {
    const int n0 = step / k_steps * S::BN, k0 = step % k_steps * S::KU, k = fp_min(S::KU, r_padded - k0);
    stage(weights(step), S::BN + S::V, as(a.w_down) + static_cast<int64_t>(k0) * a.d + n0, a.d, a.r - k0, a.d - n0, k,
          S::BN, vec_d);
    fp_cp_commit();
  }

  // dz Wd, panel by panel, into dx.
  __device__ void down() const {
    const int k_steps = (r_padded + S::KU - 1) / S::KU, steps = (a.d + S::BN - 1) / S::BN * k_steps;
    float acc[S::U_PAIRS][2][4];
    stage_down(0, k_steps);
    for (int step = 0; step < steps; ++step) {
      const int k0 = step % k_steps * S::KU;
      fp_cp_wait<0>();
      FP_SYNC(FP_PANEL);
      if (step + 1 < steps) stage_down(step + 1, k_steps);
      if (k0 == 0) {
#pragma unroll
        for (int i = 0; i < 8 * S::U_PAIRS; ++i) acc[i / 8][i / 4 % 2][i % 4] = 0.f;
      }
      multiply<true>(acc, bottleneck() + wm * 16 * at.ldh + k0, at.ldh, weights(step), S::BN + S::V,
                     fp_min(S::KU, r_padded - k0), wn * S::U_PAIRS, 1, S::BN / 16);
      if (step % k_steps == k_steps - 1) write_panel(acc, step / k_steps * S::BN + wn * 16 * S::U_PAIRS);
    }
  }

  __device__ void write_panel(const float (&acc)[S::U_PAIRS][2][4], int n0) const {
    constexpr int GROUPS = 16 * S::U_PAIRS / S::V;
    const bool add = a.add_x && !a.norm_weight;  // with a norm, g is added behind it
    to_patch<S::U_PAIRS, S::LDP>(patch(), acc);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * GROUPS / 32; ++i) {
      const int task = lane + 32 * i, m = wm * 16 + task / GROUPS, column = task % GROUPS * S::V, n = n0 + column;
      if (m >= rows || n >= a.d) continue;
      const int64_t at = (m0 + m) * a.d + n;
      Vec<T> r{}, y;
      if (add) r = load_vec(g(), at, a.d - n, vec_d);
#pragma unroll
      for (int e = 0; e < S::V; ++e)
        y.v[e] = static_cast<T>(patch()[task / GROUPS * S::LDP + column + e] + static_cast<float>(r.v[e]));
      store_vec(as(a.dx), at, y, a.d - n, vec_d);
    }
    __syncwarp();
  }

  // dx through the adapter's own norm, in place: the gradient of the norm's output is rounded once, as torch rounds it.
  __device__ void own_norm() const {
    for (int m = warp; m < rows; m += WARPS) {
      const int64_t row = m0 + m, first = row * a.d;
      norm_backward_row(as(a.dx) + first, as(a.dx) + first, as(a.x) + first, moments(a.stats, row), as(a.norm_weight),
                        a.add_x ? g() + first : nullptr, a.d, false, vec_d);
    }
  }
};

template <typename T, int WM>
__global__ void __launch_bounds__(THREADS, WM == 4 ? 2 : 3) site_backward(Args a, bool vec_d, bool vec_r) {
  FP_DYN_SMEM(unsigned char, smem);
  const Site<T, WM> site(a, smem, vec_d, vec_r);
  if (a.g_n) {
    site.tail();
    FP_SYNC(FP_SUM);
  }
  for (int r0 = 0; r0 < a.r; r0 += R_TILE) {
    if (r0) FP_SYNC(FP_REUSE);
    site.up(r0);
  }
  if (!a.dx) return;
  FP_SYNC(FP_BOTTLENECK);
  site.down();
  if (a.norm_weight) {
    FP_SYNC(FP_STATS);
    site.own_norm();
  }
}

template <typename T, int WM>
int launch(const Args& a, cudaStream_t stream) {
  const int smem = Layout<T, WM, true>(a.r).total;
  constexpr int V = 16 / sizeof(T), BM = Shape<T, WM>::BM;
  const bool vec_d =
      a.d % V == 0 && aligned({a.g_s, a.g_n, a.g, a.s, a.tail_weight, a.x, a.w_down, a.norm_weight, a.dx});
  const bool vec_r = a.r % V == 0 && aligned({a.w_up});
  if (const int error = allow_shared(site_backward<T, WM>, smem, a.device)) return error;
  const unsigned grid = static_cast<unsigned>((a.rows + BM - 1) / BM);
  FP_LAUNCH((site_backward<T, WM>), grid, THREADS, smem, stream, a, vec_d, vec_r);
  return cudaGetLastError();
}

template <typename T>
int pick(const Args& a, cudaStream_t stream) {
  return rows_warps<T, true>(a.rows, a.r, a.device, a.warps_m) == 4 ? launch<T, 4>(a, stream) : launch<T, 1>(a, stream);
}

}  // namespace

extern "C" int fastpetl_cuda_site_block_rows(const Args* a, int dtype) {
  return 16 * (dtype == FP_CUDA_F32 ? rows_warps<float, true>(a->rows, a->r, a->device, a->warps_m)
                                    : rows_warps<__half, true>(a->rows, a->r, a->device, a->warps_m));
}

extern "C" int fastpetl_cuda_site_backward(const Args* args, int dtype, void* stream) {
  if (args->rows == 0) return cudaSuccess;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case FP_CUDA_F32: return pick<float>(*args, s);
    case FP_CUDA_F16: return pick<__half>(*args, s);
    case FP_CUDA_BF16: return pick<__nv_bfloat16>(*args, s);
  }
  return cudaErrorInvalidValue;
}
