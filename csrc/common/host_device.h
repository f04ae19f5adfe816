// Marks functions that compile for the CPU and for CUDA from one source.
#pragma once

#ifdef __CUDACC__
#define ERC_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ERC_HOST_DEVICE inline __attribute__((always_inline))
#endif
