// Standard normals from Philox words: Box-Muller as a fixed sequence of IEEE float32 operations. docs/noise.md is its
// specification, fastdiff/reference/normal.py its meaning; the three are held together by bit-equality tests.
//
// L supplies the lanes: `f` (float32) and `i` (32-bit integer) types and the IEEE operations on them.
#pragma once
#include "platform.h"

namespace FASTDIFF_NAMESPACE {

template <class L>
FD_HD inline typename L::f uniform(typename L::i word) {
  return L::fma(L::from_unsigned(word), L::set(0x1p-32f), L::set(0x1p-33f));
}

// sqrt(-2 ln u), u in (0, 1]
template <class L>
FD_HD inline typename L::f radius(typename L::f u) {
  using f = typename L::f;
  const auto bits = L::bits(u);
  const auto exponent = L::template shift_right_signed<23>(L::sub_i(bits, L::set_i(0x3F3504F3)));  // sqrt(1/2)
  const f x = L::sub(L::value(L::sub_i(bits, L::template shift_left<23>(exponent))), L::set(1.0f));
  f q = L::set(-0.2379191517829895f);
  q = L::fma(q, x, L::set(0.3733559846878052f));
  q = L::fma(q, x, L::set(-0.40992698073387146f));
  q = L::fma(q, x, L::set(0.49819502234458923f));
  q = L::fma(q, x, L::set(-0.6662901639938354f));
  q = L::fma(q, x, L::set(1.000022292137146f));
  q = L::fma(q, x, L::set(-2.000001907348633f));
  return L::sqrt(L::fma(L::from_signed(exponent), L::set(-1.3862943611198906f), L::mul(x, q)));
}

// cos(2 pi u) and sin(2 pi u), u in (0, 1]
template <class L>
FD_HD inline void circle(typename L::f u, typename L::f& cosine, typename L::f& sine) {
  using f = typename L::f;
  const f round = L::set(12582912.0f);  // 1.5 * 2^23: leaves the nearest quarter turn in the low bits
  const f shifted = L::fma(u, L::set(4.0f), round);
  const f t = L::fma(L::sub(shifted, round), L::set(-0.25f), u);
  const f w = L::mul(t, t);
  f s = L::set(-75.24006652832031f);
  s = L::fma(s, w, L::set(81.58812713623047f));
  s = L::fma(s, w, L::set(-41.34162902832031f));
  s = L::fma(s, w, L::set(6.283185005187988f));
  s = L::mul(t, s);
  f c = L::set(-83.6659164428711f);
  c = L::fma(c, w, L::set(64.92322540283203f));
  c = L::fma(c, w, L::set(-19.739168167114258f));
  c = L::fma(w, c, L::set(1.0f));
  const auto quarter = L::bits(shifted);
  const auto turn = L::template shift_left<30>(quarter), odd = L::add_i(turn, turn);  // bits 1 and 0 as the sign
  cosine = L::xor_sign(L::select_sign(odd, s, c), L::add_i(turn, L::set_i(1u << 30)));
  sine = L::xor_sign(L::select_sign(odd, c, s), turn);
}

// Four words of one Philox block (or of as many blocks as there are lanes) to four normals, cosine first.
template <class L>
FD_HD inline void box_muller(const typename L::i (&words)[4], typename L::f (&z)[4]) {
  FD_UNROLL
  for (int pair = 0; pair < 4; pair += 2) {
    const auto r = radius<L>(uniform<L>(words[pair]));
    typename L::f c, s;
    circle<L>(uniform<L>(words[pair + 1]), c, s);
    z[pair] = L::mul(r, c);
    z[pair + 1] = L::mul(r, s);
  }
}

// Lanes of L:
//   from_unsigned(i), from_signed(i): to float, to nearest even;  bits(f), value(i): reinterpret
//   select_sign(s, a, b): a where the top bit of s is set, else b;  xor_sign(a, s): a with its sign flipped where it is

}  // namespace FASTDIFF_NAMESPACE
