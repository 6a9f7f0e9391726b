// The kernels with resident rows, behind fastpetl_cuda.h's interface.
#pragma once
#include <cuda_runtime.h>

#include "cuda/fastpetl_cuda.h"

// Warps of a block, 8 or 4 (16 rows each), where the kernel serves the call and is expected to be the faster one; else 0.
int fp_resident_forward_warps(const fp_cuda_site_forward& args, int dtype);
int fp_resident_forward(const fp_cuda_site_forward& args, int dtype, int warps, cudaStream_t stream);
