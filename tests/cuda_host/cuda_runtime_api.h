// Stands for the CUDA run-time's header where g++ compiles the kernels for the CPU: the few names that csrc/cuda/launch.h needs.
#pragma once

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
using cudaStream_t = struct CUstream_st*;

// The message of the last failed launch.
const char* cudaGetErrorString(cudaError_t error);
