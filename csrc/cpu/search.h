// The search for two elements of a sample in ascending order, digit by digit: numbers that are not negative sort as their bits do.
// fastdiff/reference/quantile.py says what comes of them.
#pragma once
#include "../quantile.h"
#include "scalar.h"

namespace FASTDIFF_NAMESPACE {

// The 31 bits below the sign, 11 and 10 and 10 of them at a time.
constexpr int kPasses = 3, kBins = 2048;
constexpr int kShift[kPasses + 1] = {20, 10, 0, 0};  // of the bits that a pass looks at
constexpr uint32_t kDigits[kPasses] = {0x7FF, 0x3FF, 0x3FF};
constexpr uint32_t kNaN = 0x7FC00000u;  // of any kind, when it is counted

struct Search {
  uint32_t prefix[2];  // what is known of the two elements' bits
  int64_t rank[2];     // which of the elements with that prefix they are
  bool apart, nan;     // have they different prefixes, is there a NaN

  explicit Search(const QuantileArgs& a) : prefix{0, 0}, rank{a.below, a.above}, apart(false), nan(false) {}
};

// After a pass: the digit at which the counts reach each rank. counts: of the first element's prefix, of the second's where apart.
template <class Count>
inline void advance(Search& s, int pass, const Count (&counts)[2][kBins]) {
  if (pass == 0) s.nan = counts[0][kNaN >> kShift[0]] != 0;
  uint32_t digit[2];
  for (int i = 0; i < 2; ++i) {
    const Count* count = counts[i & s.apart];
    digit[i] = 0;
    while (digit[i] + 1 < kBins && s.rank[i] >= static_cast<int64_t>(count[digit[i]])) s.rank[i] -= count[digit[i]++];
  }
  for (int i = 0; i < 2; ++i) s.prefix[i] = s.prefix[i] << (pass == 0 ? 11 : 10) | digit[i];
  s.apart = s.prefix[0] != s.prefix[1];
}

// Writes what follows from the two elements of sample b.
inline void finish(const QuantileArgs& a, int64_t b, const Search& s) {
  const float from = bit_cast<float>(s.prefix[0]), to = bit_cast<float>(s.prefix[1]), apart = to - from;
  float value = a.weight < 0.5f ? fused(a.weight, apart, from) : fused(a.weight - 1.0f, apart, to);
  value = canonical(s.nan ? bit_cast<float>(kNaN) : value);
  if (a.out != nullptr) a.out[b * a.out_stride] = value;
  if (a.clip == nullptr) return;
  float* clip = a.clip + b * a.clip_stride_b;
  value = ScalarLane::lower(ScalarLane::raise(value, a.low), a.high);
  clip[0] = canonical(-value), clip[1] = value, clip[2] = canonical(1.0f / value);
}

}  // namespace FASTDIFF_NAMESPACE
