// One adapter site's forward as one launch: own norm, down, activation, up, residuals and the trailing norm, for a block
// of rows. The bottleneck never leaves the SM; what is read of the stream is read from memory once and then from cache.
//
// fp16 and bf16 use tensor cores (mma.sync, ldmatrix, cp.async: sm_80 and newer), fp32 uses FMA, one source for all.
// Many rows of two bytes a number go to resident_forward.cu. Both are slower than Triton's on an H100 and an H200
// (benchmarks/results): backend="auto" therefore takes them only where fastpetl/tuned.json, made on that GPU, says so.
#include <initializer_list>

#include "cuda/fastpetl_cuda.h"
#include "cuda/resident.h"
#include "cuda/tile.cuh"

namespace {

using Args = fp_cuda_site_forward;

template <typename T, int WM>
struct Site {
  using S = Shape<T, WM>;
  const Args& a;
  const Layout<T, WM, false> at;
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
  __device__ float* stats() const { return reinterpret_cast<float*>(smem + at.stats); }
  __device__ float* patch() const { return reinterpret_cast<float*>(smem + at.rows) + warp * 16 * S::LDP; }
  template <typename P>
  __device__ static T* as(P* p) { return static_cast<T*>(const_cast<void*>(static_cast<const void*>(p))); }

  __device__ void own_stats() const {
    for (int m = warp; m < rows; m += WARPS) {
      const Moments s = row_moments(as(a.x) + (m0 + m) * a.d, a.d, false, a.eps, vec_d);
      if (lane) continue;
      stats()[2 * m] = s.mean, stats()[2 * m + 1] = s.rstd;
      if (a.stats) a.stats[2 * (m0 + m)] = s.mean, a.stats[2 * (m0 + m) + 1] = s.rstd;
    }
  }

  // A chunk of x: into registers early, normalised and into shared memory when it is needed.
  static constexpr int PER_ROW = S::BK / S::V, X_VECS = (S::BM * PER_ROW + THREADS - 1) / THREADS;
  __device__ void fetch_x(Vec<T> (&x)[X_VECS], int k0) const {
#pragma unroll
    for (int i = 0; i < X_VECS; ++i) {
      const int at = threadIdx.x + i * THREADS, m = at / PER_ROW, k = k0 + at % PER_ROW * S::V;
      x[i] = load_vec(as(a.x), (m0 + m) * a.d + k, m < rows ? a.d - k : 0, vec_d);
    }
  }
  __device__ void store_x(Vec<T> (&x)[X_VECS], int k0, T* to) const {
#pragma unroll
    for (int i = 0; i < X_VECS; ++i) {
      const int at = threadIdx.x + i * THREADS, m = at / PER_ROW, column = at % PER_ROW * S::V;
      if (m >= S::BM) break;
      if (a.norm_weight && m < rows) {
        const float mean = stats()[2 * m], rstd = stats()[2 * m + 1];
#pragma unroll
        for (int e = 0; e < S::V; ++e) {
          const int k = k0 + column + e;
          if (k < a.d)
            x[i].v[e] = static_cast<T>((static_cast<float>(x[i].v[e]) - mean) * rstd * load(as(a.norm_weight), k) +
                                       load(as(a.norm_bias), k));
        }
      }
      *reinterpret_cast<Vec<T>*>(to + m * S::LDX + column) = x[i];
    }
  }

  __device__ void stage_down(int chunk, int r0, int columns) const {
    const int k0 = chunk * S::BK;
    stage(weights(chunk), S::LDX, as(a.w_down) + static_cast<int64_t>(r0) * a.d + k0, a.d, columns,
          fp_min(S::BK, a.d - k0), fp_up16(columns), S::BK, vec_d);
    fp_cp_commit();
  }

  // z = n(x) Wd^T + bd for the bottleneck's columns from r0 on; act(z) stays in shared memory.
  __device__ void down(int r0) const {
    const int columns = fp_min(R_TILE, a.r - r0), chunks = (a.d + S::BK - 1) / S::BK;
    float acc[S::R_PAIRS][2][4] = {};
    Vec<T> x[X_VECS];
    stage_down(0, r0, columns);
    fetch_x(x, 0);
    for (int c = 0; c < chunks; ++c) {
      store_x(x, c * S::BK, tile(c));
      fp_cp_wait<0>();
      FP_SYNC(FP_CHUNK);  // chunk c is there, and nobody reads chunk c - 1 any more
      if (c + 1 < chunks) {
        stage_down(c + 1, r0, columns);
        fetch_x(x, (c + 1) * S::BK);
      }
      multiply<false>(acc, tile(c) + wm * 16 * S::LDX, S::LDX, weights(c), S::LDX, S::BK, wn, S::WN,
                      fp_up16(columns) / 16);
    }
#pragma unroll
    for (int p = 0; p < S::R_PAIRS; ++p)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int m = wm * 16 + lane / 4 + 8 * (i % 4 / 2);
        const int j = r0 + (wn + p * S::WN) * 16 + 8 * (i / 4) + 2 * (lane % 4) + i % 2;
        if (j >= fp_min(r0 + R_TILE, r_padded)) continue;
        const float z = acc[p][i / 4][i % 4] + (j < a.r ? load(as(a.b_down), j) : 0.f);
        bottleneck()[m * at.ldh + j] = static_cast<T>(j < a.r ? activate(z, a.activation) : 0.f);
        if (a.z && j < a.r && m < rows) as(a.z)[(m0 + m) * a.r + j] = static_cast<T>(z);
      }
  }

  __device__ void stage_up(int step, int k_steps) const {
    const int n0 = step / k_steps * S::BN, k0 = step % k_steps * S::KU, k = fp_min(S::KU, r_padded - k0);
    stage(weights(step), fp_min(S::KU, r_padded) + S::V, as(a.w_up) + static_cast<int64_t>(n0) * a.r + k0, a.r,
          a.d - n0, a.r - k0, S::BN, k, vec_r);
    fp_cp_commit();
  }

  // s = scale * (h Wu^T + bu) + residuals, panel by panel.
  __device__ void up() const {
    const int k_steps = (r_padded + S::KU - 1) / S::KU, steps = (a.d + S::BN - 1) / S::BN * k_steps;
    const int ldw = fp_min(S::KU, r_padded) + S::V;
    float acc[S::U_PAIRS][2][4];
    stage_up(0, k_steps);
    for (int step = 0; step < steps; ++step) {
      const int k0 = step % k_steps * S::KU;
      fp_cp_wait<0>();
      FP_SYNC(FP_PANEL);
      if (step + 1 < steps) stage_up(step + 1, k_steps);
      if (k0 == 0) {
#pragma unroll
        for (int i = 0; i < 8 * S::U_PAIRS; ++i) acc[i / 8][i / 4 % 2][i % 4] = 0.f;
      }
      multiply<false>(acc, bottleneck() + wm * 16 * at.ldh + k0, at.ldh, weights(step), ldw,
                      fp_min(S::KU, r_padded - k0), wn * S::U_PAIRS, 1, S::BN / 16);
      if (step % k_steps == k_steps - 1) write_panel(acc, step / k_steps * S::BN + wn * 16 * S::U_PAIRS);
    }
  }

  __device__ void write_panel(const float (&acc)[S::U_PAIRS][2][4], int n0) const {
    T* out = as(a.s ? a.s : a.n);
    constexpr int GROUPS = 16 * S::U_PAIRS / S::V;
    to_patch<S::U_PAIRS, S::LDP>(patch(), acc);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * GROUPS / 32; ++i) {
      const int task = lane + 32 * i, m = wm * 16 + task / GROUPS, column = task % GROUPS * S::V, n = n0 + column;
      if (m >= rows || n >= a.d) continue;
      const int64_t at = (m0 + m) * a.d + n;
      const int valid = a.d - n;
      Vec<T> x{}, r1{}, r2{}, y;
      if (a.add_x) x = load_vec(as(a.x), at, valid, vec_d);
      if (a.res1) r1 = load_vec(as(a.res1), at, valid, vec_d);
      if (a.res2) r2 = load_vec(as(a.res2), at, valid, vec_d);
#pragma unroll
      for (int e = 0; e < S::V; ++e) {
        const float u = patch()[task / GROUPS * S::LDP + column + e] + (e < valid ? load(as(a.b_up), n + e) : 0.f);
        y.v[e] = static_cast<T>(a.scale * u + static_cast<float>(x.v[e]) + static_cast<float>(r1.v[e]) +
                                static_cast<float>(r2.v[e]));
      }
      store_vec(out, at, y, valid, vec_d);
    }
    __syncwarp();  // the patch is read before the next panel overwrites it
  }

  // n = tail(s) from the rounded sum, which this block has just written.
  __device__ void tail() const {
    const bool rms = a.tail == FP_CUDA_RMSNORM;
    for (int m = warp; m < rows; m += WARPS) {
      const T* s = as(a.s ? a.s : a.n) + (m0 + m) * a.d;
      T* n = as(a.n) + (m0 + m) * a.d;
      const Moments t = row_moments(s, a.d, rms, a.tail_eps, vec_d);
      if (a.tail_stats && lane == 0) a.tail_stats[2 * (m0 + m)] = t.mean, a.tail_stats[2 * (m0 + m) + 1] = t.rstd;
      for (int c = lane * S::V; c < a.d; c += 32 * S::V) {
        const int valid = a.d - c;
        const Vec<T> v = load_vec(s, c, valid, vec_d), w = load_vec(as(a.tail_weight), c, valid, vec_d);
        Vec<T> b{}, y;
        if (a.tail_bias) b = load_vec(as(a.tail_bias), c, valid, vec_d);
#pragma unroll
        for (int e = 0; e < S::V; ++e)
          y.v[e] = static_cast<T>((static_cast<float>(v.v[e]) - t.mean) * t.rstd * static_cast<float>(w.v[e]) +
                                  static_cast<float>(b.v[e]));
        store_vec(n, c, y, valid, vec_d);
      }
    }
  }
};

template <typename T, int WM>
__global__ void __launch_bounds__(THREADS, WM == 4 ? 2 : 3) site_forward(Args a, bool vec_d, bool vec_r) {
  FP_DYN_SMEM(unsigned char, smem);
  const Site<T, WM> site(a, smem, vec_d, vec_r);
  if (a.norm_weight) {
    site.own_stats();
    FP_SYNC(FP_STATS);
  }
  for (int r0 = 0; r0 < a.r; r0 += R_TILE) {
    if (r0) FP_SYNC(FP_REUSE);  // the last chunk of the tile before is read
    site.down(r0);
  }
  FP_SYNC(FP_BOTTLENECK);
  site.up();
  if (a.tail) {
    FP_SYNC(FP_SUM);
    site.tail();
  }
}

template <typename T, int WM>
int launch(const Args& a, cudaStream_t stream) {
  const int smem = Layout<T, WM, false>(a.r).total;
  constexpr int V = 16 / sizeof(T), BM = Shape<T, WM>::BM;
  const bool vec_d = a.d % V == 0 && aligned({a.x, a.w_down, a.res1, a.res2, a.s, a.n, a.tail_weight, a.tail_bias});
  const bool vec_r = a.r % V == 0 && aligned({a.w_up});
  if (const int error = allow_shared(site_forward<T, WM>, smem, a.device)) return error;
  const unsigned grid = static_cast<unsigned>((a.rows + BM - 1) / BM);
  FP_LAUNCH((site_forward<T, WM>), grid, THREADS, smem, stream, a, vec_d, vec_r);
  return cudaGetLastError();
}

template <typename T>
int pick(const Args& a, cudaStream_t stream) {
  return rows_warps<T, false>(a.rows, a.r, a.device, a.warps_m) == 4 ? launch<T, 4>(a, stream) : launch<T, 1>(a, stream);
}

}  // namespace

extern "C" int fastpetl_cuda_site_forward(const Args* args, int dtype, void* stream) {
  if (args->rows == 0) return cudaSuccess;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (const int warps = fp_resident_forward_warps(*args, dtype)) return fp_resident_forward(*args, dtype, warps, s);
  switch (dtype) {
    case FP_CUDA_F32: return pick<float>(*args, s);
    case FP_CUDA_F16: return pick<__half>(*args, s);
    case FP_CUDA_BF16: return pick<__nv_bfloat16>(*args, s);
  }
  return cudaErrorInvalidValue;
}

extern "C" int fastpetl_cuda_site_fits(int r, int dtype, int backward, int device) {
  const int wide = dtype == FP_CUDA_F32;
  const int bytes = backward ? (wide ? Layout<float, 1, true>(r).total : Layout<__half, 1, true>(r).total)
                             : (wide ? Layout<float, 1, false>(r).total : Layout<__half, 1, false>(r).total);
  return bytes <= shared_limit(device);
}
