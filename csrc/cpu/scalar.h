// One float32 at a time on any machine: fused multiply-add and 16-bit conversions from the definition where there is no
// instruction for them. Also the tails and the gathered elements of the vector kernels.
#pragma once
#include <cstdint>

#include "../platform.h"
#include "../row.h"

namespace FASTDIFF_NAMESPACE {

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// a * b + c, rounded once. Without an FMA unit std::fma would be a call into libm, whose choice of code is its own:
// the product is exact in float64, the sum is rounded to odd there (Boldo and Melquiond, 2008), and then to float32.
inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  const double product = static_cast<double>(a) * static_cast<double>(b), addend = c;
  const double total = product + addend;
  const double virtual_part = total - product;
  const double error = (product - (total - virtual_part)) + (addend - virtual_part);  // exact, or NaN beside infinities
  int64_t bits = bit_cast<int64_t>(total);
  if ((bits & 1) == 0 && (error > 0 || error < 0)) bits += ((error > 0) == (total > 0)) ? 1 : -1;
  return static_cast<float>(bit_cast<double>(bits));
#endif
}

inline bool is_nan(float v) { return v != v; }

inline float widen_f16(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, magnitude = h & 0x7FFFu;
  if (magnitude >= 0x7C00u) return bit_cast<float>(sign | 0x7F800000u | magnitude << 13);
  if (magnitude >= 0x0400u) return bit_cast<float>(sign | (magnitude + (112u << 10)) << 13);
  return bit_cast<float>(sign | bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f));  // exact
#endif
}

// v is not NaN, or the canonical one.
inline uint16_t narrow_f16(float v) {
#if defined(__F16C__)
  return _cvtss_sh(v, 0);
#else
  const uint32_t bits = bit_cast<uint32_t>(v), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return 0x7E00u;
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65520 and above
  if (magnitude >= 0x38800000u) {  // normal: 2^-14 and above; the carry may run into the exponent
    return static_cast<uint16_t>(sign | (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1)) >> 13);
  }
  // Adding 1/2 leaves a multiple of 2^-24, rounded to nearest even, in the low bits.
  return static_cast<uint16_t>(sign | (bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u));
#endif
}

inline float widen_bf16(uint16_t h) { return bit_cast<float>(static_cast<uint32_t>(h) << 16); }

inline uint16_t narrow_bf16(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

inline float canonical(float v) { return is_nan(v) ? bit_cast<float>(0x7FC00000u) : v; }

inline float load(const void* data, Dtype dtype, int64_t i) {
  if (dtype == Dtype::f32) return static_cast<const float*>(data)[i];
  const uint16_t h = static_cast<const uint16_t*>(data)[i];
  return dtype == Dtype::f16 ? widen_f16(h) : widen_bf16(h);
}

inline void store(void* data, Dtype dtype, int64_t i, float v) {
  v = canonical(v);
  if (dtype == Dtype::f32) {
    static_cast<float*>(data)[i] = v;
  } else {
    static_cast<uint16_t*>(data)[i] = dtype == Dtype::f16 ? narrow_f16(v) : narrow_bf16(v);
  }
}

// A lane of width 1: what normal.h and step.h need.
struct ScalarLane {
  using f = float;
  using i = uint32_t;
  using nan = bool;
  static constexpr int kWidth = 1;

  static f set(float v) { return v; }
  static i set_i(uint32_t v) { return v; }
  static f add(f a, f b) { return a + b; }
  static f sub(f a, f b) { return a - b; }
  static f mul(f a, f b) { return a * b; }
  static f fma(f a, f b, f c) { return fused(a, b, c); }
  static f negate(f a) { return bit_cast<float>(bit_cast<uint32_t>(a) ^ 0x80000000u); }
  static f raise(f v, f low) { return v < low ? low : v; }
  static f lower(f v, f high) { return v > high ? high : v; }
  static i add_i(i a, i b) { return a + b; }
  static i sub_i(i a, i b) { return a - b; }
  template <int n>
  static i shift_right(i a) { return a >> n; }
  static f from_unsigned(i a) { return static_cast<float>(a); }
  static i bits(f a) { return bit_cast<uint32_t>(a); }
  static f value(i a) { return bit_cast<float>(a); }
  static i insert(i a, i mask, i rest) { return (a & mask) | rest; }
  static i funnel(i high, i low) { return high << 31 | low >> 1; }

  static f load_f32(const void* p, int64_t at) { return static_cast<const float*>(p)[at]; }
  static f load_f16(const void* p, int64_t at) { return widen_f16(static_cast<const uint16_t*>(p)[at]); }
  static f load_bf16(const void* p, int64_t at) { return widen_bf16(static_cast<const uint16_t*>(p)[at]); }
  static void store_f32(void* p, int64_t at, f v) { static_cast<float*>(p)[at] = v; }
  static void store_f16(void* p, int64_t at, f v) { static_cast<uint16_t*>(p)[at] = narrow_f16(v); }
  static void store_bf16(void* p, int64_t at, f v) { static_cast<uint16_t*>(p)[at] = narrow_bf16(v); }

  static nan no_nan() { return false; }
  static f canonical(f v, nan& seen) {
    seen |= is_nan(v);
    return FASTDIFF_NAMESPACE::canonical(v);
  }
  // The pairwise sum of the lanes: the upper half is added to the lower one until one lane is left.
  static float tree(f v) { return v; }
  static bool any(nan seen) { return seen; }
};

}  // namespace FASTDIFF_NAMESPACE
