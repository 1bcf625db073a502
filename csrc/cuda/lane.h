// What one GPU thread computes with: IEEE float32 operations that no compiler option may change, and conversions. Everything has
// a second body for the host, so that tests run the kernels on a CPU.
#pragma once
#include <cstdint>
#include <cstring>

#include "../normal.h"
#include "../row.h"

#if !defined(__CUDA_ARCH__)
#include <cmath>
#endif

namespace FASTDIFF_NAMESPACE {

// One lane: what normal.h asks for. The _rn intrinsics are never contracted, whatever -fmad says.
struct Lane {
  using f = float;
  using i = uint32_t;

  FD_HD static i bits(f v) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(v);
#else
    i b;
    std::memcpy(&b, &v, 4);
    return b;
#endif
  }
  FD_HD static f value(i b) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(b);
#else
    f v;
    std::memcpy(&v, &b, 4);
    return v;
#endif
  }
#if defined(__CUDA_ARCH__)
  __device__ static f fma(f a, f b, f c) { return __fmaf_rn(a, b, c); }
  __device__ static f mul(f a, f b) { return __fmul_rn(a, b); }
  __device__ static f add(f a, f b) { return __fadd_rn(a, b); }
  __device__ static f sub(f a, f b) { return __fsub_rn(a, b); }
  __device__ static f root(f a) { return __fsqrt_rn(a); }
  __device__ static f from_unsigned(i a) { return __uint2float_rn(a); }
  __device__ static i funnel(i high, i low) { return __funnelshift_r(low, high, 1); }
#else
  FD_HD static f fma(f a, f b, f c) { return std::fma(a, b, c); }
  FD_HD static f mul(f a, f b) { return a * b; }
  FD_HD static f add(f a, f b) { return a + b; }
  FD_HD static f sub(f a, f b) { return a - b; }
  FD_HD static f root(f a) { return std::sqrt(a); }
  FD_HD static f from_unsigned(i a) { return static_cast<f>(a); }
  FD_HD static i funnel(i high, i low) { return high << 31 | low >> 1; }
#endif
  FD_HD static f set(f v) { return v; }
  FD_HD static i set_i(uint32_t v) { return v; }
  FD_HD static i add_i(i a, i b) { return a + b; }
  FD_HD static i sub_i(i a, i b) { return a - b; }
  template <int n>
  FD_HD static i shift_right(i a) {
    return a >> n;
  }
  FD_HD static i insert(i a, i mask, i rest) { return (a & mask) | rest; }
  FD_HD static f negate(f a) { return -a; }
};

// Philox words. The 64-bit product is asked for by name: written as a multiplication in uint64_t, nvcc keeps an addition
// of zero to the upper half of each product, two instructions a round.
#if defined(__CUDA_ARCH__)
struct ThreadWords : ScalarWords {
  __device__ static uint64_t mul(uint32_t a, uint32_t m) {
    uint64_t p;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(p) : "r"(a), "r"(m));
    return p;
  }
  __device__ static uint32_t high(uint64_t p) {
    uint32_t half;
    asm("{.reg .b32 low;\n mov.b64 {low, %0}, %1;}" : "=r"(half) : "l"(p));
    return half;
  }
};
#else
using ThreadWords = ScalarWords;
#endif

FD_HD inline bool is_nan(float v) { return v != v; }
// The same for code that seldom runs: nvcc would hoist comparisons that it knows from is_nan into code that often does.
FD_HD inline bool is_nan_bits(float v) { return (Lane::bits(v) & 0x7FFFFFFFu) > 0x7F800000u; }

// ------------------------------------------------------------------------------------------------------ conversions

// Two stored 16-bit numbers, the first in the lower half, to float32: exact.
FD_HD inline void widen_half(uint32_t pair, float& first, float& second) {
#if defined(__CUDA_ARCH__)
  asm("{.reg .b16 l, h;\n mov.b32 {l, h}, %2;\n cvt.f32.f16 %0, l;\n cvt.f32.f16 %1, h;}" : "=f"(first), "=f"(second) : "r"(pair));
#else
  float* out[2] = {&first, &second};
  for (int i = 0; i < 2; ++i) {
    const uint32_t h = pair >> 16 * i & 0xFFFFu, exponent = h >> 10 & 31u, fraction = h & 1023u;
    const float magnitude = exponent == 31 ? Lane::value(0x7F800000u | fraction << 13)
                            : exponent     ? Lane::value((exponent + 112u) << 23 | fraction << 13)
                                           : static_cast<float>(fraction) * 0x1p-24f;
    *out[i] = h & 0x8000u ? -magnitude : magnitude;
  }
#endif
}

FD_HD inline void widen_bfloat(uint32_t pair, float& first, float& second) {
  first = Lane::value(pair << 16);
  second = Lane::value(pair & 0xFFFF0000u);
}

// float32, not NaN, to a stored 16-bit number, to nearest even.
#if !defined(__CUDA_ARCH__)
FD_HD inline uint32_t narrow_one(float v, Dtype dtype) {
  const uint32_t bits = Lane::bits(v), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (dtype == Dtype::bf16) return (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  if (magnitude >= 0x47800000u) return sign | 0x7C00u;  // 2^16 and above, infinities
  if (magnitude < 0x38800000u)  // subnormal halves: adding 0.5 rounds at their last place
    return sign | (Lane::bits(Lane::value(magnitude) + 0.5f) - 0x3F000000u);
  const uint32_t rebased = magnitude - 0x38000000u;
  return sign | (rebased + 0xFFFu + (rebased >> 13 & 1u)) >> 13;
}
#endif

FD_HD inline uint32_t narrow_pair(float first, float second, Dtype dtype) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  if (dtype == Dtype::f16)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return narrow_one(first, dtype) | narrow_one(second, dtype) << 16;
#endif
}

}  // namespace FASTDIFF_NAMESPACE
