// 8 lanes: AVX2, FMA, F16C. See scalar.h for what each function means, philox.h for the words.
#pragma once
#include "scalar.h"

namespace FASTDIFF_NAMESPACE {

struct Lane {
  using f = __m256;
  using i = __m256i;
  using nan = __m256;
  static constexpr int kWidth = 8;

  static f set(float v) { return _mm256_set1_ps(v); }
  static i set_i(uint32_t v) { return _mm256_set1_epi32(static_cast<int>(v)); }
  static f add(f a, f b) { return _mm256_add_ps(a, b); }
  static f sub(f a, f b) { return _mm256_sub_ps(a, b); }
  static f mul(f a, f b) { return _mm256_mul_ps(a, b); }
  static f fma(f a, f b, f c) { return _mm256_fmadd_ps(a, b, c); }
  static f negate(f a) { return _mm256_xor_ps(a, _mm256_set1_ps(-0.0f)); }
  // max and min return their second operand where the comparison is false: NaN and equal zeros stay as they are.
  static f raise(f v, f low) { return _mm256_max_ps(low, v); }
  static f lower(f v, f high) { return _mm256_min_ps(high, v); }
  static i add_i(i a, i b) { return _mm256_add_epi32(a, b); }
  static i sub_i(i a, i b) { return _mm256_sub_epi32(a, b); }
  template <int n>
  static i shift_right(i a) { return _mm256_srli_epi32(a, n); }
  static f from_unsigned(i a) {  // 2^39 + the upper half, 2^23 + the lower half: exact but for the last sum
    const f high = value(_mm256_or_si256(_mm256_srli_epi32(a, 16), set_i(0x53000000)));
    const f low = value(_mm256_blend_epi16(a, set_i(0x4B000000), 0xAA));
    return add(sub(high, set(0x1p39f + 0x1p23f)), low);
  }
  static i bits(f a) { return _mm256_castps_si256(a); }
  static f value(i a) { return _mm256_castsi256_ps(a); }
  static i insert(i a, i mask, i rest) { return _mm256_or_si256(_mm256_and_si256(a, mask), rest); }
  static i funnel(i high, i low) { return _mm256_or_si256(_mm256_slli_epi32(high, 31), _mm256_srli_epi32(low, 1)); }

  static f load_f32(const void* p, int64_t at) { return _mm256_loadu_ps(static_cast<const float*>(p) + at); }
  static __m128i load_16(const void* p, int64_t at) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(p) + at));
  }
  static f load_f16(const void* p, int64_t at) { return _mm256_cvtph_ps(load_16(p, at)); }
  static f load_bf16(const void* p, int64_t at) { return value(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16(p, at)), 16)); }
  static void store_f32(void* p, int64_t at, f v) { _mm256_storeu_ps(static_cast<float*>(p) + at, v); }
  static void store_16(void* p, int64_t at, __m128i v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(p) + at), v);
  }
  static void store_f16(void* p, int64_t at, f v) { store_16(p, at, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
  static void store_bf16(void* p, int64_t at, f v) {
    const i b = bits(v), odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), set_i(1));
    const i rounded = _mm256_srli_epi32(add_i(add_i(b, set_i(0x7FFF)), odd), 16);
    store_16(p, at, _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
  }

  static nan no_nan() { return _mm256_setzero_ps(); }
  static f canonical(f v, nan& seen) {
    const nan here = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    seen = _mm256_or_ps(seen, here);
    return _mm256_blendv_ps(v, value(set_i(0x7FC00000u)), here);
  }
  // a[i] + a[i + 4], a[i] + a[i + 2], a[i] + a[i + 1]
  static float tree(f v) {
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
  }
  static bool any(nan seen) { return _mm256_movemask_ps(seen) != 0; }
};

// Philox words in the lower halves of 64-bit lanes.
struct Words {
  using word = __m256i;
  static constexpr int kWidth = 4;
  static word mul(word a, uint32_t m) { return _mm256_mul_epu32(a, _mm256_set1_epi64x(m)); }
  static word high(word p) { return _mm256_castps_si256(_mm256_movehdup_ps(_mm256_castsi256_ps(p))); }
  static word low(word p) { return p; }
  static word xor3(word a, word b, word c) { return _mm256_xor_si256(a, _mm256_xor_si256(b, c)); }
  static word xor2(word a, word b) { return _mm256_xor_si256(a, b); }
  static word key(uint64_t k) { return _mm256_set1_epi64x(static_cast<long long>(k)); }
  static word counter(uint64_t c) { return _mm256_set1_epi64x(static_cast<long long>(c)); }
  static word add(word a, word b) { return _mm256_add_epi64(a, b); }
  // Even 32-bit lanes from `even`, odd ones from `odd`.
  static Lane::i merge(word even, word odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }
  // Lane 4 l + k of a register of 8 holds block 2 k + l: after transpose() register k holds blocks 2 k and 2 k + 1.
  static word even_blocks() { return _mm256_setr_epi64x(0, 4, 1, 5); }
  static word odd_blocks() { return _mm256_setr_epi64x(2, 6, 3, 7); }
  static void transpose(Lane::f (&z)[4]) {
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(z[0], z[1])), b = _mm256_castps_pd(_mm256_unpackhi_ps(z[0], z[1]));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(z[2], z[3])), d = _mm256_castps_pd(_mm256_unpackhi_ps(z[2], z[3]));
    z[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    z[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    z[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    z[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
  }
};

}  // namespace FASTDIFF_NAMESPACE
