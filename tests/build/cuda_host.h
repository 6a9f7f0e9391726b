// Runs simple CUDA C++ kernels on the CPU, to check indexing, tails, barriers and dtypes on machines without a GPU:
//   g++ -x c++ -include cuda_host.h -isystem $CUDA/include kernel.cu
// Each CUDA thread of a block is a fiber; blocks run one after another. A fiber runs until it meets a barrier or a warp
// exchange. Shared memory starts as NaN in each block, threads run in forward or reverse order (CUDA_HOST_REVERSE=1),
// and a barrier that not every thread reaches aborts. With -DCUDA_HOST_THREADS each CUDA thread is a std::thread
// instead, for -fsanitize=thread: a missing barrier is then a data race. Tensor-core instructions are emulated lane by
// lane from the PTX manual's fragment layouts. An asynchronous copy arrives when it is waited for, no sooner. Not modelled:
// speed, limits of a real launch.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <pthread.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_host {

enum State { READY, AT_BLOCK_BARRIER, AT_WARP_EXCHANGE, DONE };
struct Slot {
  alignas(16) unsigned char bytes[32];
};

struct Fiber {
  ucontext_t context;
  State state;
  uint3 index;
  unsigned mask;    // lanes that take part in the warp exchange this fiber waits for
  unsigned rounds;  // warp exchanges so far; two buffers, used in turn, suffice
  int line;         // of the barrier it waits at
  void* fake_stack;  // AddressSanitizer's, while the fiber is away
  std::vector<std::pair<void*, const void*>> open;               // copies asked for, 16 bytes each
  std::vector<std::vector<std::pair<void*, const void*>>> sent;  // ... and committed, in groups
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<char> stacks;
  std::vector<Slot> lanes;  // [2, threads]: what each lane offers in a warp exchange
  float* smem;
  std::function<void()> body;
  ucontext_t scheduler;
  const void* main_stack;
  size_t main_size;
  int current;
  dim3 grid_dim, block_dim;
  uint3 index;
  pthread_barrier_t all;
  std::vector<pthread_barrier_t> warps;
};
inline Block block;

#ifdef CUDA_HOST_THREADS
inline thread_local int current_thread;
inline int current() { return current_thread; }
#else
inline int current() { return block.current; }
#endif
inline Fiber& self() { return block.fibers[current()]; }

[[noreturn]] inline void die(const char* what, int line) {
  std::fprintf(stderr, "cuda_host: %s (line %d, block %u, thread %d)\n", what, line, block.index.x, current());
  std::abort();
}

#ifdef CUDA_HOST_THREADS

inline void block_barrier(int) { pthread_barrier_wait(&block.all); }
inline void warp_barrier(unsigned) { pthread_barrier_wait(&block.warps[current() / 32]); }

inline void run_block(bool) {
  const int n = block.block_dim.x;
  block.fibers.assign(n, {});
  block.warps.resize((n + 31) / 32);
  pthread_barrier_init(&block.all, nullptr, n);
  for (size_t w = 0; w < block.warps.size(); ++w)
    pthread_barrier_init(&block.warps[w], nullptr, std::min<int>(32, n - 32 * w));
  std::vector<std::thread> threads;
  for (int i = 0; i < n; ++i) {
    block.fibers[i].index = {static_cast<unsigned>(i), 0, 0};
    threads.emplace_back([i] { current_thread = i, block.body(); });
  }
  for (std::thread& t : threads) t.join();
  pthread_barrier_destroy(&block.all);
  for (auto& w : block.warps) pthread_barrier_destroy(&w);
}

#else

constexpr size_t STACK = 128 << 10;

// AddressSanitizer has to be told of every change of stacks.
inline void enter(int i) {
  block.current = i;
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, &block.stacks[i * STACK], STACK);
#endif
  swapcontext(&block.scheduler, &self().context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void pause(State state) {
  Fiber& me = self();
  me.state = state;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(state == DONE ? nullptr : &me.fake_stack, block.main_stack, block.main_size);
#endif
  swapcontext(&me.context, &block.scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(me.fake_stack, &block.main_stack, &block.main_size);
#endif
}

inline void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &block.main_stack, &block.main_size);
#endif
  block.body();
  pause(DONE);
}

inline void block_barrier(int line) {
  self().line = line;
  pause(AT_BLOCK_BARRIER);
}
inline void warp_barrier(unsigned mask) {
  self().mask = mask;
  pause(AT_WARP_EXCHANGE);
}

// Lets every fiber go whose whole block, or whose whole warp, has arrived; true if any could.
inline bool release() {
  const int n = block.fibers.size();
  int done = 0, waiting = 0, line = 0;
  for (Fiber& f : block.fibers) {
    done += f.state == DONE;
    if (f.state != AT_BLOCK_BARRIER) continue;
    if (waiting++ && f.line != line) die("threads wait at different __syncthreads", f.line);
    line = f.line;
  }
  if (waiting && waiting + done == n) {
    if (done) die("__syncthreads that exited threads never reach", line);
    for (Fiber& f : block.fibers) f.state = READY;
    return true;
  }
  bool any = false;
  for (int first = 0; first < n; first += 32) {
    unsigned arrived = 0, wanted = 0;
    for (int l = 0; l < 32 && first + l < n; ++l) {
      const Fiber& f = block.fibers[first + l];
      if (f.state == AT_WARP_EXCHANGE) arrived |= 1u << l, wanted |= f.mask;
    }
    if (!arrived || arrived != wanted) continue;
    any = true;
    for (int l = 0; l < 32; ++l)
      if (arrived >> l & 1) block.fibers[first + l].state = READY;
  }
  return any;
}

inline void run_block(bool reverse) {
  const int n = block.block_dim.x;
  block.stacks.resize(n * STACK);
  block.fibers.assign(n, {});
  for (int i = 0; i < n; ++i) {
    Fiber& f = block.fibers[i];
    f.index = {static_cast<unsigned>(i), 0, 0};
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = &block.stacks[i * STACK];
    f.context.uc_stack.ss_size = STACK;
    makecontext(&f.context, fiber_main, 0);
  }
  for (;;) {
    bool ran = false, all_done = true;
    for (int k = 0; k < n; ++k) {
      const int i = reverse ? n - 1 - k : k;
      if (block.fibers[i].state == READY) ran = true, enter(i);
    }
    for (Fiber& f : block.fibers) all_done &= f.state == DONE;
    if (all_done) return;
    if (!release() && !ran) die("deadlock: threads wait for others that never come", 0);
  }
}

#endif

// What every lane of the warp offers; valid until the exchange after the next.
template <typename T>
inline auto exchange(unsigned mask, const T& value) {
  static_assert(sizeof(T) <= sizeof(Slot));
  const int me = current();
  Slot* slots = &block.lanes[(self().rounds++ & 1) * block.fibers.size() + me / 32 * 32];
  std::memcpy(slots[me & 31].bytes, &value, sizeof(T));
  warp_barrier(mask);
  return [slots](int lane) {
    T got;
    std::memcpy(&got, slots[lane].bytes, sizeof(T));
    return got;
  };
}

inline float shuffle_xor(unsigned mask, float value, int lane_mask) {
  const int lane = current() & 31;
  return exchange(mask, value)(lane ^ lane_mask);
}
inline unsigned ballot(unsigned mask, bool value) {
  const auto all = exchange(mask, value);
  unsigned bits = 0;
  for (int l = 0; l < 32; ++l) bits |= (mask >> l & 1 && all(l)) ? 1u << l : 0;
  return bits;
}

inline void launch(dim3 grid, dim3 threads, size_t smem, std::function<void()> body) {
  const char* order = std::getenv("CUDA_HOST_REVERSE");
  block.grid_dim = grid, block.block_dim = threads, block.body = std::move(body);
  block.lanes.assign(2 * (threads.x + 31) / 32 * 32, {});
  for (unsigned x = 0; x < grid.x; ++x) {
    block.index = {x, 0, 0};
    block.smem = static_cast<float*>(std::malloc(smem));  // exactly as large: AddressSanitizer guards its ends
    std::fill_n(block.smem, smem / sizeof(float), NAN);
    run_block(order && *order == '1');
    std::free(block.smem);
  }
}

// The number of the barrier (FpBarrier) that this process leaves out, to plant a race: CUDA_HOST_PLANTED.
inline int planted() {
  static const int number = std::getenv("CUDA_HOST_PLANTED") ? std::atoi(std::getenv("CUDA_HOST_PLANTED")) : 0;
  return number;
}

inline cudaError_t ok() { return cudaSuccess; }

inline float half_of(uint32_t bits, int i, bool bf16) {
  const uint16_t half = static_cast<uint16_t>(i ? bits >> 16 : bits);
  if (!bf16) {
    __half_raw raw;
    raw.x = half;
    return static_cast<float>(__half(raw));
  }
  const uint32_t wide = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// d += a b: thread l holds of a [16, 16] rows l/4 (+8) and columns l%4*2 (+1, +8, +9), of b [16, 8] column l/4 and rows
// l%4*2 (+1, +8, +9), of d [16, 8] rows l/4 (+8) and columns l%4*2 (+1).
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16) {
  struct Fragments {
    uint32_t a[4], b[2];
  };
  const int lane = current() & 31, row = lane >> 2, column = (lane & 3) * 2;
  const auto all = exchange(~0u, Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  float am[2][16], bm[2][16];
  for (int t = 0; t < 4; ++t) {
    const Fragments of_row = all(row * 4 + t), left = all(column * 4 + t), right = all((column + 1) * 4 + t);
    for (int k = 0; k < 4; ++k) {  // columns 2t, 2t+1, 2t+8, 2t+9 of 16
      const int at = 2 * t + k % 2 + k / 2 * 8;
      am[0][at] = half_of(of_row.a[k / 2 * 2], k % 2, bf16), am[1][at] = half_of(of_row.a[k / 2 * 2 + 1], k % 2, bf16);
      bm[0][at] = half_of(left.b[k / 2], k % 2, bf16), bm[1][at] = half_of(right.b[k / 2], k % 2, bf16);
    }
  }
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) d[i] += am[i / 2][k] * bm[i % 2][k];
}

inline void ldmatrix(uint32_t (&r)[4], const void* row, bool trans) {
  if (reinterpret_cast<uintptr_t>(row) % 16) die("ldmatrix needs rows aligned to 16 bytes", 0);
  const auto rows = exchange(~0u, row);
  const int lane = current() & 31;
  for (int i = 0; i < 4; ++i)
    for (int half = 0; half < 2; ++half) {
      const int y = trans ? lane % 4 * 2 + half : lane / 4, x = trans ? lane / 4 : lane % 4 * 2 + half;
      std::memcpy(reinterpret_cast<char*>(&r[i]) + 2 * half, static_cast<const char*>(rows(8 * i + y)) + 2 * x, 2);
    }
}

}  // namespace cuda_host

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __align__
#define __align__(...)
#define threadIdx (::cuda_host::self().index)
#define blockIdx (::cuda_host::block.index)
#define blockDim (::cuda_host::block.block_dim)
#define gridDim (::cuda_host::block.grid_dim)
#define __syncthreads() ::cuda_host::block_barrier(__LINE__)
#define __syncwarp() ((void)::cuda_host::exchange(~0u, 0))
#define __shfl_xor_sync(mask, value, lane_mask) ::cuda_host::shuffle_xor(mask, value, lane_mask)
#define __ballot_sync(mask, value) ::cuda_host::ballot(mask, value)
#define __popc(bits) __builtin_popcount(bits)
#define __trap() ::cuda_host::die("__trap", __LINE__)
#define cudaGetLastError() ::cuda_host::ok()
#define cudaSetDevice(...) ::cuda_host::ok()
#define cudaFuncSetAttribute(...) ::cuda_host::ok()
#define cudaDeviceGetAttribute(value, ...) (*(value) = CUDA_HOST_SHARED, ::cuda_host::ok())
#ifndef CUDA_HOST_SHARED
#define CUDA_HOST_SHARED 232448  // bytes a block may have: sm_90's and sm_100's
#endif
#define FP_PLANTED ::cuda_host::planted()
#define FP_UNPAREN(...) __VA_ARGS__
#define FP_LAUNCH(KERNEL, GRID, BLOCK, SMEM, STREAM, ...) \
  ::cuda_host::launch(dim3(GRID), dim3(BLOCK), SMEM, [=] { (void)STREAM; FP_UNPAREN KERNEL(__VA_ARGS__); })
#define FP_DYN_SMEM(T, NAME) T* NAME = reinterpret_cast<T*>(::cuda_host::block.smem)
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline void fp_ldmatrix_x4(uint32_t (&r)[4], const void* row) { ::cuda_host::ldmatrix(r, row, false); }
inline void fp_ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { ::cuda_host::ldmatrix(r, row, true); }
inline void fp_mma_bf16_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ::cuda_host::mma(d, a, b0, b1, true);
}
inline void fp_mma_f16_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ::cuda_host::mma(d, a, b0, b1, false);
}
inline void fp_cp_async16(void* shared, const void* global) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16)
    ::cuda_host::die("cp.async needs addresses aligned to 16 bytes", 0);
  ::cuda_host::self().open.emplace_back(shared, global);
}
inline void fp_cp_async16_or_zero(void* shared, const void* global, bool valid) {
  static const unsigned char zeros[16] alignas(16) = {};
  fp_cp_async16(shared, valid ? global : zeros);
}
inline void fp_prefetch(const void*) {}
inline void fp_cp_commit() {
  auto& me = ::cuda_host::self();
  me.sent.push_back(std::move(me.open));
  me.open.clear();
}
template <int N>
inline void fp_cp_wait() {
  auto& sent = ::cuda_host::self().sent;
  for (; sent.size() > N; sent.erase(sent.begin()))
    for (const auto& [shared, global] : sent.front()) std::memcpy(shared, global, 16);
}
