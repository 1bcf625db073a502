// 4 lanes: SSE2, which every x86-64 has. See scalar.h for what each function means, philox.h for the words.
#pragma once
#include "scalar.h"

namespace FASTDIFF_NAMESPACE {

struct Lane {
  using f = __m128;
  using i = __m128i;
  using nan = __m128;
  static constexpr int kWidth = 4;

  static f set(float v) { return _mm_set1_ps(v); }
  static i set_i(uint32_t v) { return _mm_set1_epi32(static_cast<int>(v)); }
  static f add(f a, f b) { return _mm_add_ps(a, b); }
  static f sub(f a, f b) { return _mm_sub_ps(a, b); }
  static f mul(f a, f b) { return _mm_mul_ps(a, b); }
  // See fused() in scalar.h: the product is exact in float64, the sum is rounded to odd, then to float32. An inexact sum
  // is replaced by its odd neighbour on the side of what was lost.
  static __m128d round_to_odd(__m128d product, __m128d c, __m128d total) {
    const __m128d other = _mm_sub_pd(total, product), zero = _mm_setzero_pd();
    const __m128d error = _mm_add_pd(_mm_sub_pd(product, _mm_sub_pd(total, other)), _mm_sub_pd(c, other));
    const __m128i inexact = _mm_castpd_si128(_mm_or_pd(_mm_cmplt_pd(error, zero), _mm_cmpgt_pd(error, zero)));  // not NaN
    const __m128i bits = _mm_castpd_si128(total), one = _mm_set1_epi64x(1);
    // -1 where error and total differ in sign, else +1; the total of an inexact sum is not zero
    const __m128i differ = _mm_castpd_si128(_mm_xor_pd(_mm_cmpgt_pd(error, zero), _mm_cmpgt_pd(total, zero)));
    const __m128i toward = _mm_or_si128(differ, one);
    const __m128i even = _mm_sub_epi64(_mm_and_si128(bits, one), one);  // all ones where the last bit is 0
    return _mm_castsi128_pd(_mm_add_epi64(bits, _mm_and_si128(_mm_and_si128(toward, inexact), even)));
  }
  // All ones in the lower half where rounding twice could differ from rounding once: the float64 lies on the midpoint of
  // two float32, or (the lower half is then set too) where those may be subnormal.
  static __m128i doubtful(__m128d total) {
    const __m128i low = _mm_and_si128(_mm_castpd_si128(total), _mm_set1_epi64x(0x1FFFFFFF));
    const __m128d small = _mm_cmplt_pd(_mm_andnot_pd(_mm_set1_pd(-0.0), total), _mm_set1_pd(0x1p-125));
    return _mm_or_si128(_mm_cmpeq_epi32(low, _mm_set1_epi64x(0x10000000)), _mm_castpd_si128(small));
  }
  static f fma(f a, f b, f c) {
    const __m128d c_low = _mm_cvtps_pd(c), c_high = _mm_cvtps_pd(_mm_movehl_ps(c, c));
    const __m128d low = _mm_mul_pd(_mm_cvtps_pd(a), _mm_cvtps_pd(b));
    const __m128d high = _mm_mul_pd(_mm_cvtps_pd(_mm_movehl_ps(a, a)), _mm_cvtps_pd(_mm_movehl_ps(b, b)));
    __m128d sum_low = _mm_add_pd(low, c_low), sum_high = _mm_add_pd(high, c_high);
    if (__builtin_expect(_mm_movemask_epi8(_mm_or_si128(doubtful(sum_low), doubtful(sum_high))) & 0x0F0F, 0)) {
      sum_low = round_to_odd(low, c_low, sum_low);
      sum_high = round_to_odd(high, c_high, sum_high);
    }
    return _mm_movelh_ps(_mm_cvtpd_ps(sum_low), _mm_cvtpd_ps(sum_high));
  }
  static f negate(f a) { return _mm_xor_ps(a, set(-0.0f)); }
  // max and min return their second operand where the comparison is false: NaN and equal zeros stay as they are.
  static f raise(f v, f low) { return _mm_max_ps(low, v); }
  static f lower(f v, f high) { return _mm_min_ps(high, v); }
  static i add_i(i a, i b) { return _mm_add_epi32(a, b); }
  static i sub_i(i a, i b) { return _mm_sub_epi32(a, b); }
  template <int n>
  static i shift_right(i a) { return _mm_srli_epi32(a, n); }
  static f from_unsigned(i a) {  // 2^39 + the upper half, 2^23 + the lower half: exact but for the last sum
    const f high = value(_mm_or_si128(_mm_srli_epi32(a, 16), set_i(0x53000000)));
    const f low = value(_mm_or_si128(_mm_and_si128(a, set_i(0xFFFF)), set_i(0x4B000000)));
    return add(sub(high, set(0x1p39f + 0x1p23f)), low);
  }
  static i bits(f a) { return _mm_castps_si128(a); }
  static f value(i a) { return _mm_castsi128_ps(a); }
  static f select(f mask, f a, f b) { return _mm_or_ps(_mm_and_ps(mask, a), _mm_andnot_ps(mask, b)); }
  static i insert(i a, i mask, i rest) { return _mm_or_si128(_mm_and_si128(a, mask), rest); }
  static i funnel(i high, i low) { return _mm_or_si128(_mm_slli_epi32(high, 31), _mm_srli_epi32(low, 1)); }

  static f load_f32(const void* p, int64_t at) { return _mm_loadu_ps(static_cast<const float*>(p) + at); }
  static i load_16(const void* p, int64_t at) {  // to the upper halves of 32 bits
    const i h = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(p) + at));
    return _mm_unpacklo_epi16(_mm_setzero_si128(), h);
  }
  static f load_f16(const void* p, int64_t at) {
    const uint16_t* h = static_cast<const uint16_t*>(p) + at;
    return _mm_setr_ps(widen_f16(h[0]), widen_f16(h[1]), widen_f16(h[2]), widen_f16(h[3]));
  }
  static f load_bf16(const void* p, int64_t at) { return value(load_16(p, at)); }
  static void store_f32(void* p, int64_t at, f v) { _mm_storeu_ps(static_cast<float*>(p) + at, v); }
  static void store_f16(void* p, int64_t at, f v) {
    alignas(16) float values[4];
    _mm_store_ps(values, v);
    for (int j = 0; j < 4; ++j) static_cast<uint16_t*>(p)[at + j] = narrow_f16(values[j]);
  }
  static void store_bf16(void* p, int64_t at, f v) {
    const i b = bits(v), odd = _mm_and_si128(_mm_srli_epi32(b, 16), set_i(1));
    const i rounded = _mm_srai_epi32(add_i(add_i(b, set_i(0x7FFF)), odd), 16);  // signed, so that packing keeps the bits
    _mm_storel_epi64(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(p) + at), _mm_packs_epi32(rounded, rounded));
  }

  static nan no_nan() { return _mm_setzero_ps(); }
  static f canonical(f v, nan& seen) {
    const nan here = _mm_cmpunord_ps(v, v);
    seen = _mm_or_ps(seen, here);
    return select(here, value(set_i(0x7FC00000u)), v);
  }
  // a[i] + a[i + 2], a[i] + a[i + 1]
  static float tree(f v) {
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps(v, v, 1)));
  }
  static bool any(nan seen) { return _mm_movemask_ps(seen) != 0; }
};

// Philox words in the lower halves of 64-bit lanes.
struct Words {
  using word = __m128i;
  static constexpr int kWidth = 2;
  static word mul(word a, uint32_t m) { return _mm_mul_epu32(a, _mm_set1_epi64x(m)); }
  static word high(word p) { return _mm_shuffle_epi32(p, 0xF5); }
  static word low(word p) { return p; }
  static word xor3(word a, word b, word c) { return _mm_xor_si128(a, _mm_xor_si128(b, c)); }
  static word xor2(word a, word b) { return _mm_xor_si128(a, b); }
  static word key(uint64_t k) { return _mm_set1_epi64x(static_cast<long long>(k)); }
  static word counter(uint64_t c) { return _mm_set1_epi64x(static_cast<long long>(c)); }
  static word add(word a, word b) { return _mm_add_epi64(a, b); }
  // Even 32-bit lanes from `even`, odd ones from `odd`.
  static Lane::i merge(word even, word odd) {
    return _mm_or_si128(_mm_and_si128(even, _mm_set1_epi64x(0xFFFFFFFF)), _mm_slli_epi64(odd, 32));
  }
  // Lane k holds block k: after transpose() register k holds block k.
  static word even_blocks() { return _mm_set_epi64x(2, 0); }
  static word odd_blocks() { return _mm_set_epi64x(3, 1); }
  static void transpose(Lane::f (&z)[4]) { _MM_TRANSPOSE4_PS(z[0], z[1], z[2], z[3]); }
};

}  // namespace FASTDIFF_NAMESPACE
