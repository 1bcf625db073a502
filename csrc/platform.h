// What differs between a host compiler and nvcc. Code for each instruction set is compiled from the same headers into a
// namespace of its own, so that the linker can never give one instruction set's copy of a function to another.
#pragma once

#ifndef FASTDIFF_NAMESPACE
#define FASTDIFF_NAMESPACE fastdiff
#endif

#if defined(__CUDACC__)
#define FD_HD __host__ __device__
#define FD_UNROLL _Pragma("unroll")
#else
#define FD_HD
#define FD_UNROLL _Pragma("GCC unroll 16")
#endif
