// How kernels here name their launch, their dynamic shared memory and their barriers, so that the same source also runs
// on the CPU in tests/build (cuda_host.h defines the first two there).
#pragma once
#ifdef __CUDACC__
#define FP_UNPAREN(...) __VA_ARGS__
#define FP_LAUNCH(KERNEL, GRID, BLOCK, SMEM, STREAM, ...) FP_UNPAREN KERNEL<<<GRID, BLOCK, SMEM, STREAM>>>(__VA_ARGS__)
#define FP_DYN_SMEM(T, NAME)                                  \
  extern __shared__ __align__(16) unsigned char fp_dyn_smem[]; \
  T* NAME = reinterpret_cast<T*>(fp_dyn_smem)
#endif

// A block-wide barrier with a name. On the CPU a test leaves one out (FP_PLANTED) to see that the race is then reported.
enum FpBarrier { FP_NONE, FP_STATS, FP_REUSE, FP_CHUNK, FP_BOTTLENECK, FP_PANEL, FP_SUM, FP_LIST };
#ifndef FP_PLANTED
#define FP_PLANTED FP_NONE
#endif
#define FP_SYNC(NAME) \
  do {                \
    if (NAME != FP_PLANTED) __syncthreads(); \
  } while (0)
