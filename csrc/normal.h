// Standard normals from Philox words: Box-Muller as a fixed sequence of IEEE float32 operations. docs/noise.md is its
// specification, fastdiff/reference/normal.py its meaning; the three are held together by bit-equality tests.
//
// L supplies the lanes: `f` (float32) and `i` (32-bit integer) types and the IEEE operations on them.
#pragma once
#include "platform.h"

namespace FASTDIFF_NAMESPACE {

// -2 ln((float(word) + 1/2) / 2^32), in [0, 45.75]
template <class L>
FD_HD inline typename L::f minus_2_log(typename L::i word) {
  using f = typename L::f;
  const auto bits = L::bits(L::add(L::from_unsigned(word), L::set(0.5f)));
  // 2^k (1 + x), x in [-1/2, 0): the exponent is read as the last place of a float of 2^23.
  const f k = L::sub(L::value(L::add_i(L::template shift_right<23>(bits), L::set_i(0x4B000000))), L::set(8388766.0f));
  const f x = L::sub(L::value(L::insert(bits, L::set_i(0x007FFFFF), L::set_i(0x3F000000))), L::set(1.0f));
  f q = L::set(-2.3718159198760986f);
  q = L::fma(q, x, L::set(-1.9029700756072998f));
  q = L::fma(q, x, L::set(-1.4325278997421265f));
  q = L::fma(q, x, L::set(0.26047030091285706f));
  q = L::fma(q, x, L::set(-0.694304883480072f));
  q = L::fma(q, x, L::set(0.9986182451248169f));
  q = L::fma(q, x, L::set(-2.0000197887420654f));
  return L::fma(k, L::set(-1.3862943611198906f), L::mul(x, q));
}

// sqrt(v) for v >= 0, negative where the lowest bit of `word` is set: an estimate of 1 / sqrt(v) from the bits of v, which
// takes the sign along, and one correction of high order.
template <class L>
FD_HD inline typename L::f signed_sqrt(typename L::f v, typename L::i word) {
  using f = typename L::f;
  const f y = L::value(L::funnel(word, L::sub_i(L::set_i(0xBE620000), L::bits(v))));
  const f g = L::mul(v, y), e = L::fma(L::negate(g), y, L::set(1.0f));
  f p = L::set(0.3580171763896942f);
  p = L::fma(p, e, L::set(0.3036709725856781f));
  p = L::fma(p, e, L::set(0.37535253167152405f));
  p = L::fma(p, e, L::set(0.4999956786632538f));
  return L::fma(L::mul(g, e), p, g);
}

// The two words of a pair to r cos a and r sin a, a = 2 pi u, u = float(second) / 2^32: the nearest half turn n is the
// sign of r, the rest, pi t / 2 with t in [-1, 1], is twice the angle that the polynomials take.
template <class L>
FD_HD inline void box_muller_pair(typename L::i first, typename L::i second, typename L::f& cosine, typename L::f& sine) {
  using f = typename L::f;
  const f u = L::from_unsigned(second), round = L::set(25165824.0f);  // 1.5 * 2^24: leaves n in the lowest bits
  const f shifted = L::fma(u, L::set(0x1p-30f), round);
  const f t = L::fma(u, L::set(0x1p-30f), L::sub(round, shifted));
  const f r = signed_sqrt<L>(minus_2_log<L>(first), L::bits(shifted));
  const f w = L::mul(t, t);
  f s = L::set(-5.07010227011051e-05f);  // sqrt(2) sin(pi t / 4)
  s = L::fma(s, w, L::set(0.0035211509093642235f));
  s = L::fma(s, w, L::set(-0.11419116705656052f));
  s = L::fma(s, w, L::set(0.11072071641683578f));
  s = L::fma(t, s, t);
  f c = L::set(-0.00044974935008212924f);  // sqrt(2) cos(pi t / 4) - 1
  c = L::fma(c, w, L::set(0.02241302654147148f));
  c = L::fma(c, w, L::set(-0.43617668747901917f));
  c = L::fma(c, w, L::set(0.4142133891582489f));
  const f rs = L::mul(r, s);
  cosine = L::fma(L::negate(rs), s, r);
  sine = L::fma(rs, c, rs);
}

// Four words of one Philox block (or of as many blocks as there are lanes) to four normals, cosine first.
template <class L>
FD_HD inline void box_muller(const typename L::i (&words)[4], typename L::f (&z)[4]) {
  FD_UNROLL
  for (int pair = 0; pair < 4; pair += 2) box_muller_pair<L>(words[pair], words[pair + 1], z[pair], z[pair + 1]);
}

// Lanes of L:
//   from_unsigned(i): to float, to nearest even;  bits(f), value(i): reinterpret
//   insert(a, mask, rest): (a & mask) | rest;  funnel(high, low): the lower word of (high : low) >> 1

}  // namespace FASTDIFF_NAMESPACE
