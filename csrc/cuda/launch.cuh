// How kernels here name their launch and their dynamic shared memory, so that the same source also runs on the CPU in
// tests/build (cuda_host.h defines both there).
#pragma once
#ifdef __CUDACC__
#define FP_UNPAREN(...) __VA_ARGS__
#define FP_LAUNCH(KERNEL, GRID, BLOCK, SMEM, STREAM, ...) FP_UNPAREN KERNEL<<<GRID, BLOCK, SMEM, STREAM>>>(__VA_ARGS__)
#define FP_DYN_SMEM(T, NAME)                                  \
  extern __shared__ __align__(16) unsigned char fp_dyn_smem[]; \
  T* NAME = reinterpret_cast<T*>(fp_dyn_smem)
#endif
