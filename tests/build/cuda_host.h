// Runs simple CUDA C++ kernels on the CPU, to check indexing, tails, barriers and dtypes on machines without a GPU:
//   g++ -x c++ -include cuda_host.h -isystem $CUDA/include kernel.cu
// Each CUDA thread of a block is a fiber; blocks run one after another. A fiber runs until it meets a barrier or a warp
// exchange. Shared memory starts as NaN in each block, threads run in forward or reverse order (CUDA_HOST_REVERSE=1),
// and a barrier that not every thread reaches aborts. Not modelled: memory ordering, speed, limits of a real launch.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

namespace cuda_host {

enum State { READY, AT_BLOCK_BARRIER, AT_WARP_EXCHANGE, DONE };

struct Fiber {
  ucontext_t context;
  State state;
  uint3 index;
  unsigned mask;    // lanes that take part in the warp exchange this fiber waits for
  unsigned rounds;  // warp exchanges so far; two buffers, used in turn, suffice
  int line;         // of the barrier it waits at
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<char> stacks;
  std::vector<float> lanes;  // [2, threads]: what each lane offers in a warp exchange
  std::vector<float> smem;
  std::function<void()> body;
  ucontext_t scheduler;
  int current;
  dim3 grid_dim, block_dim;
  uint3 index;
};
inline Block block;
inline Fiber& self() { return block.fibers[block.current]; }

[[noreturn]] inline void die(const char* what, int line) {
  std::fprintf(stderr, "cuda_host: %s (line %d, block %u, thread %d)\n", what, line, block.index.x, block.current);
  std::abort();
}

inline void pause(State state) {
  Fiber& me = self();
  me.state = state;
  swapcontext(&me.context, &block.scheduler);
}

inline void fiber_main() {
  block.body();
  pause(DONE);
}

inline void block_barrier(int line) {
  self().line = line;
  pause(AT_BLOCK_BARRIER);
}

inline float shuffle_xor(unsigned mask, float value, int lane_mask) {
  const int me = block.current, buffer = (self().rounds++ & 1) * block.fibers.size();
  block.lanes[buffer + me] = value;
  self().mask = mask;
  pause(AT_WARP_EXCHANGE);
  return block.lanes[buffer + (me ^ lane_mask)];
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
  constexpr size_t STACK = 64 << 10;
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
    for (int i = 0; i < n; ++i) {
      block.current = reverse ? n - 1 - i : i;
      if (self().state == READY) ran = true, swapcontext(&block.scheduler, &self().context);
    }
    for (Fiber& f : block.fibers) all_done &= f.state == DONE;
    if (all_done) return;
    if (!release() && !ran) die("deadlock: threads wait for others that never come", 0);
  }
}

inline void launch(dim3 grid, dim3 threads, size_t smem, std::function<void()> body) {
  const char* order = std::getenv("CUDA_HOST_REVERSE");
  block.grid_dim = grid, block.block_dim = threads, block.body = std::move(body);
  block.lanes.assign(2 * threads.x, NAN);
  for (unsigned x = 0; x < grid.x; ++x) {
    block.index = {x, 0, 0};
    block.smem.assign(smem / sizeof(float), NAN);
    run_block(order && *order == '1');
  }
}

inline cudaError_t ok() { return cudaSuccess; }

}  // namespace cuda_host

#undef __launch_bounds__
#define __launch_bounds__(...)
#define threadIdx (::cuda_host::self().index)
#define blockIdx (::cuda_host::block.index)
#define blockDim (::cuda_host::block.block_dim)
#define gridDim (::cuda_host::block.grid_dim)
#define __syncthreads() ::cuda_host::block_barrier(__LINE__)
#define __shfl_xor_sync(mask, value, lane_mask) ::cuda_host::shuffle_xor(mask, value, lane_mask)
#define cudaGetLastError() ::cuda_host::ok()
#define FP_UNPAREN(...) __VA_ARGS__
#define FP_LAUNCH(KERNEL, GRID, BLOCK, SMEM, STREAM, ...) \
  ::cuda_host::launch(dim3(GRID), dim3(BLOCK), SMEM, [=] { (void)STREAM; FP_UNPAREN KERNEL(__VA_ARGS__); })
#define FP_DYN_SMEM(T, NAME) T* NAME = reinterpret_cast<T*>(::cuda_host::block.smem.data())
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
