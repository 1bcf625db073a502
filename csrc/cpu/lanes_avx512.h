// 16 lanes: AVX-512 F, BW, DQ, VL. See scalar.h for what each function means, philox.h for the words.
#pragma once
#include "scalar.h"

namespace FASTDIFF_NAMESPACE {

struct Lane {
  using f = __m512;
  using i = __m512i;
  using nan = __mmask16;
  static constexpr int kWidth = 16;

  static f set(float v) { return _mm512_set1_ps(v); }
  static i set_i(uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
  static f add(f a, f b) { return _mm512_add_ps(a, b); }
  static f sub(f a, f b) { return _mm512_sub_ps(a, b); }
  static f mul(f a, f b) { return _mm512_mul_ps(a, b); }
  static f fma(f a, f b, f c) { return _mm512_fmadd_ps(a, b, c); }
  static f negate(f a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
  // max and min return their second operand where the comparison is false: NaN and equal zeros stay as they are.
  static f raise(f v, f low) { return _mm512_max_ps(low, v); }
  static f lower(f v, f high) { return _mm512_min_ps(high, v); }
  static i add_i(i a, i b) { return _mm512_add_epi32(a, b); }
  static i sub_i(i a, i b) { return _mm512_sub_epi32(a, b); }
  template <int n>
  static i shift_right(i a) { return _mm512_srli_epi32(a, n); }
  static f from_unsigned(i a) { return _mm512_cvtepu32_ps(a); }
  static i bits(f a) { return _mm512_castps_si512(a); }
  static f value(i a) { return _mm512_castsi512_ps(a); }
  static i insert(i a, i mask, i rest) { return _mm512_ternarylogic_epi32(a, mask, rest, (0xF0 & 0xCC) | 0xAA); }
  static i funnel(i high, i low) { return _mm512_or_si512(_mm512_slli_epi32(high, 31), _mm512_srli_epi32(low, 1)); }

  static f load_f32(const void* p, int64_t at) { return _mm512_loadu_ps(static_cast<const float*>(p) + at); }
  static __m256i load_16(const void* p, int64_t at) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(p) + at));
  }
  static f load_f16(const void* p, int64_t at) { return _mm512_cvtph_ps(load_16(p, at)); }
  static f load_bf16(const void* p, int64_t at) { return value(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_16(p, at)), 16)); }
  static void store_f32(void* p, int64_t at, f v) { _mm512_storeu_ps(static_cast<float*>(p) + at, v); }
  static void store_16(void* p, int64_t at, __m256i v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(p) + at), v);
  }
  static void store_f16(void* p, int64_t at, f v) { store_16(p, at, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
  static void store_bf16(void* p, int64_t at, f v) {
    const i b = bits(v), odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), set_i(1));
    store_16(p, at, _mm512_cvtepi32_epi16(_mm512_srli_epi32(add_i(add_i(b, set_i(0x7FFF)), odd), 16)));
  }

  static nan no_nan() { return 0; }
  static f canonical(f v, nan& seen) {
    const nan here = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    seen = _kor_mask16(seen, here);
    return _mm512_mask_mov_ps(v, here, value(set_i(0x7FC00000u)));
  }
  // a[i] + a[i + 8], a[i] + a[i + 4], ...
  static float tree(f v) {
    const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
  }
  static bool any(nan seen) { return seen != 0; }
};

// Philox words in the lower halves of 64-bit lanes.
struct Words {
  using word = __m512i;
  static constexpr int kWidth = 8;
  static word mul(word a, uint32_t m) { return _mm512_mul_epu32(a, _mm512_set1_epi64(m)); }
  static word high(word p) { return _mm512_castps_si512(_mm512_movehdup_ps(_mm512_castsi512_ps(p))); }
  static word low(word p) { return p; }
  static word xor3(word a, word b, word c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
  static word xor2(word a, word b) { return _mm512_xor_si512(a, b); }
  static word key(uint64_t k) { return _mm512_set1_epi64(static_cast<long long>(k)); }
  static word counter(uint64_t c) { return _mm512_set1_epi64(static_cast<long long>(c)); }
  static word add(word a, word b) { return _mm512_add_epi64(a, b); }
  // Even 32-bit lanes from `even`, odd ones from `odd`.
  static Lane::i merge(word even, word odd) {
    return _mm512_castps_si512(_mm512_mask_moveldup_ps(_mm512_castsi512_ps(even), 0xAAAA, _mm512_castsi512_ps(odd)));
  }
  // Lane 4 l + k of a register of 16 holds block 4 k + l: after transpose() register k holds blocks 4 k .. 4 k + 3.
  static word even_blocks() { return _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11); }
  static word odd_blocks() { return _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15); }
  static void transpose(Lane::f (&z)[4]) {
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(z[0], z[1])), b = _mm512_castps_pd(_mm512_unpackhi_ps(z[0], z[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(z[2], z[3])), d = _mm512_castps_pd(_mm512_unpackhi_ps(z[2], z[3]));
    z[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    z[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    z[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    z[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
};

}  // namespace FASTDIFF_NAMESPACE
