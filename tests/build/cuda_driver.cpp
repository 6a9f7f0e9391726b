// Runs the kernels of csrc/cuda on small cases in buffers exactly as large as they have to be, for the sanitizers:
//   cuda_driver forward|resident|backward|large|rows|short     (short: a buffer too small by one, which must be reported)
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "cuda/fastpetl_cuda.h"

namespace {

std::mt19937 generator(0);
template <typename T>
struct Buffer {
  std::unique_ptr<T[]> data;
  size_t size;
  explicit Buffer(size_t size, float spread = 1.f) : data(new T[size]), size(size) {
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < size; ++i) data[i] = static_cast<T>(spread * normal(generator));
  }
  operator T*() const { return data.get(); }
  bool finite() const {
    for (size_t i = 0; i < size; ++i)
      if (!std::isfinite(static_cast<float>(data[i]))) return false;
    return true;
  }
};

template <typename T>
bool forward(int dtype, int rows, int d, int r, int warps_m, int missing = 0) {
  Buffer<T> x(rows * d - missing), wd(r * d, 0.1f), bd(r), wu(d * r, 0.1f), bu(d), nw(d), nb(d), res(rows * d), tw(d), tb(d);
  Buffer<T> s(rows * d, NAN), n(rows * d, NAN), z(rows * r, NAN);
  Buffer<float> stats(rows * 2, NAN), tail_stats(rows * 2, NAN);
  fp_cuda_site_forward a{};
  a.x = x, a.w_down = wd, a.b_down = bd, a.w_up = wu, a.b_up = bu, a.norm_weight = nw, a.norm_bias = nb, a.res1 = res;
  a.tail_weight = tw, a.tail_bias = tb, a.s = s, a.n = n, a.z = z, a.stats = stats, a.tail_stats = tail_stats;
  a.rows = rows, a.d = d, a.r = r, a.activation = 1, a.add_x = 1, a.tail = 1, a.warps_m = warps_m;
  a.eps = a.tail_eps = 1e-5f, a.scale = 1.f;
  if (fastpetl_cuda_site_forward(&a, dtype, nullptr)) return false;
  return s.finite() && n.finite() && z.finite() && stats.finite() && tail_stats.finite();
}

template <typename T>
bool backward(int dtype, int rows, int d, int r, int warps_m) {
  Buffer<T> gs(rows * d), gn(rows * d), s(rows * d), tw(d), x(rows * d), z(rows * r), wd(r * d, 0.1f), wu(d * r, 0.1f), nw(d);
  Buffer<float> stats(rows * 2), tail_stats(rows * 2);
  Buffer<T> g(rows * d, NAN), dx(rows * d, NAN), dz(rows * r, NAN), h(rows * r, NAN);
  fp_cuda_site_backward a{};
  a.g_s = gs, a.g_n = gn, a.s = s, a.tail_weight = tw, a.x = x, a.z = z, a.w_down = wd, a.w_up = wu, a.norm_weight = nw;
  a.stats = stats, a.tail_stats = tail_stats, a.g = g, a.dx = dx, a.dz = dz, a.h = h;
  a.rows = rows, a.d = d, a.r = r, a.activation = 1, a.add_x = 1, a.tail = 1, a.warps_m = warps_m, a.scale = 1.f;
  const int block = fastpetl_cuda_site_block_rows(&a, dtype);
  Buffer<float> partial((rows + block - 1) / block * 2 * d, NAN);
  a.tail_partial = partial;
  if (fastpetl_cuda_site_backward(&a, dtype, nullptr)) return false;
  return g.finite() && dx.finite() && dz.finite() && h.finite() && partial.finite();
}

bool rows() {
  constexpr int N = 40, M = 260, SOME = 12, D = 9;  // M: two chunks of the index
  Buffer<float> x(N * D), grad(M * D), y(SOME * D, NAN), sums(N * D, NAN);
  std::unique_ptr<int64_t[]> index(new int64_t[M]), count(new int64_t[1]{M - 1});
  for (int i = 0; i < M; ++i) index[i] = i * 7 % N;
  index[M - 1] = -1;  // behind the count
  int error = fastpetl_cuda_add_rows(grad, index.get(), count.get(), sums, N, M, D, FP_CUDA_F32, 0, nullptr);
  count[0] = SOME - 1;
  error |= fastpetl_cuda_gather_rows(x, index.get(), count.get(), y, N, SOME, D * 4, 0, nullptr);
  error |= fastpetl_cuda_scatter_rows(y, index.get(), count.get(), x, N, SOME, D * 4, 0, nullptr);
  return !error && y.finite() && sums.finite() && x.finite();
}

}  // namespace

int main(int count, char** arguments) {
  const char* what = count > 1 ? arguments[1] : "";
  bool good = false;
  if (!std::strcmp(what, "forward")) {
    good = forward<__nv_bfloat16>(FP_CUDA_BF16, 3, 136, 208, 1) && forward<float>(FP_CUDA_F32, 3, 70, 13, 1);
  } else if (!std::strcmp(what, "resident")) {
    good = forward<__nv_bfloat16>(FP_CUDA_BF16, 19, 128, 40, -4) && forward<__half>(FP_CUDA_F16, 19, 64, 96, -4);
  } else if (!std::strcmp(what, "backward")) {
    good = backward<__nv_bfloat16>(FP_CUDA_BF16, 3, 136, 208, 1) && backward<float>(FP_CUDA_F32, 3, 70, 13, 1);
  } else if (!std::strcmp(what, "large")) {
    good = forward<__half>(FP_CUDA_F16, 66, 72, 24, 4) && backward<__half>(FP_CUDA_F16, 66, 72, 24, 4);
  } else if (!std::strcmp(what, "rows")) {
    good = rows();
  } else if (!std::strcmp(what, "short")) {
    good = forward<float>(FP_CUDA_F32, 3, 70, 13, 1, 1);
  }
  std::puts(good ? "good" : "wrong");
  return !good;
}
