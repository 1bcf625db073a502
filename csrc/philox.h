// Philox4x32-10 (Salmon et al., SC 2011), written once for scalar code, SIMD lanes and GPU threads.
//
// W supplies the words: `word` holds a 32-bit value (a SIMD word may carry rubbish in the upper half of a 64-bit lane),
// `mul` gives the 64-bit product of a constant and a word, `high` and `low` its halves as words, `xor3` and `key` what
// their names say.
#pragma once
#include <cstdint>

#include "platform.h"

namespace FASTDIFF_NAMESPACE {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

struct Key {
  uint64_t seed, offset;
};

template <class W>
FD_HD inline void philox(typename W::word (&c)[4], uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  FD_UNROLL
  for (int round = 0; round < 10; ++round) {
    const auto p0 = W::mul(c[0], kPhiloxM0);
    const auto p1 = W::mul(c[2], kPhiloxM1);
    c[0] = W::xor3(W::high(p1), c[1], W::key(k0));
    c[1] = W::low(p1);
    c[2] = W::xor3(W::high(p0), c[3], W::key(k1));
    c[3] = W::low(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

struct ScalarWords {
  using word = uint32_t;
  FD_HD static uint64_t mul(uint32_t a, uint32_t m) { return static_cast<uint64_t>(a) * m; }
  FD_HD static uint32_t high(uint64_t p) { return static_cast<uint32_t>(p >> 32); }
  FD_HD static uint32_t low(uint64_t p) { return static_cast<uint32_t>(p); }
  FD_HD static uint32_t xor3(uint32_t a, uint32_t b, uint32_t c) { return a ^ b ^ c; }
  FD_HD static uint32_t key(uint32_t k) { return k; }
};

// Block `block` of a key's stream: elements 4 block .. 4 block + 3.
FD_HD inline void philox_block(Key key, uint64_t block, uint32_t (&words)[4]) {
  const uint64_t counter = key.offset + block;
  words[0] = static_cast<uint32_t>(counter);
  words[1] = static_cast<uint32_t>(counter >> 32);
  words[2] = words[3] = 0;
  philox<ScalarWords>(words, key.seed);
}

// The i-th child of a key.
FD_HD inline Key fold_in(Key key, uint64_t i) {
  uint32_t r[4];
  philox_block(key, i, r);
  return {r[0] | static_cast<uint64_t>(r[1]) << 32, r[2] | static_cast<uint64_t>(r[3]) << 32};
}

}  // namespace FASTDIFF_NAMESPACE
