// N(key) for a block of elements at a time: Philox words, as many at once as there are lanes, then Box-Muller.
#pragma once
#include "../normal.h"
#include "../philox.h"
#include "scalar.h"

namespace FASTDIFF_NAMESPACE {

// Elements that the kernels work on at once: 8 registers, which is what two registers of Philox blocks give.
#if defined(FASTDIFF_VECTOR)
constexpr int kBlock = 8 * Lane::kWidth;
#else
constexpr int kBlock = 64;
#endif

// A key with its round keys, each in 64 bits so that a vector broadcasts it straight from memory.
struct Stream {
  uint64_t seed, offset;
  uint64_t k0[10], k1[10];

  void set(const int64_t* key) {
    seed = static_cast<uint64_t>(key[0]);
    offset = static_cast<uint64_t>(key[1]);
    uint32_t a = static_cast<uint32_t>(seed), b = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      k0[round] = a, k1[round] = b;
      a += kPhiloxW0, b += kPhiloxW1;
    }
  }
};

#ifdef FASTDIFF_VECTOR

// Four chains do not fit into 16 registers; gcc spills less when it schedules before it allocates.
#if defined(__GNUC__) && !defined(__clang__) && !defined(__AVX512F__)
#define FD_SCHEDULE __attribute__((noinline, optimize("schedule-insns", "sched-pressure")))
#else
#define FD_SCHEDULE
#endif

// Philox of pairs * Lane::kWidth counters from `counter` on: registers of 32-bit words, each from two chains of 64-bit
// lanes. Several chains hide each other's latency.
template <int pairs>
FD_SCHEDULE inline void words_of(const Stream& s, uint64_t counter, Words::word (&x)[2 * pairs][4]) {
  using word = Words::word;
  word first[2 * pairs];
  FD_UNROLL
  for (int h = 0; h < 2 * pairs; ++h) {
    first[h] = Words::add(Words::counter(counter + h / 2 * Lane::kWidth), h % 2 == 0 ? Words::even_blocks() : Words::odd_blocks());
  }
  if (__builtin_expect(static_cast<uint32_t>(counter) > 0xFFFFFFFFu - pairs * Lane::kWidth, 0)) {
    for (int h = 0; h < 2 * pairs; ++h) {  // the upper half of the counter differs between lanes
      x[h][0] = first[h];
      x[h][1] = Words::high(first[h]);
      x[h][2] = x[h][3] = Words::key(0);
      philox<Words>(x[h], s.seed);
    }
    return;
  }
  // The first two rounds, without what is zero or the same in every lane.
  const uint64_t same = static_cast<uint64_t>(kPhiloxM0) * static_cast<uint32_t>((counter >> 32) ^ s.k0[0]);
  const word c2 = Words::key(static_cast<uint32_t>(same >> 32) ^ static_cast<uint32_t>(s.k1[1]));
  const word c3 = Words::key(static_cast<uint32_t>(same) ^ static_cast<uint32_t>(s.k1[2]));
  FD_UNROLL
  for (int h = 0; h < 2 * pairs; ++h) {
    const word p0 = Words::mul(first[h], kPhiloxM0);
    const word p1 = Words::mul(Words::xor2(Words::high(p0), Words::key(s.k1[0])), kPhiloxM1);
    const word q0 = Words::mul(Words::xor2(Words::high(p1), Words::key(s.k0[1])), kPhiloxM0);
    const word q1 = Words::mul(Words::xor2(c2, p0), kPhiloxM1);
    x[h][0] = Words::xor3(Words::high(q1), p1, Words::key(s.k0[2]));
    x[h][1] = q1;
    x[h][2] = Words::xor2(Words::high(q0), c3);
    x[h][3] = q0;
  }
  FD_UNROLL
  for (int round = 3; round < 10; ++round) {
    FD_UNROLL
    for (int h = 0; h < 2 * pairs; ++h) {
      const word p0 = Words::mul(x[h][0], kPhiloxM0), p1 = Words::mul(x[h][2], kPhiloxM1);
      x[h][0] = Words::xor3(Words::high(p1), x[h][1], Words::key(s.k0[round]));
      x[h][1] = p1;
      x[h][2] = Words::xor3(Words::high(p0), x[h][3], Words::key(s.k1[round]));
      x[h][3] = p0;
    }
  }
}

// Elements 4 block .. 4 block + 4 pairs Lane::kWidth - 1.
template <int pairs>
inline void normals_of(const Stream& s, uint64_t block, float* out) {
  Words::word x[2 * pairs][4];
  words_of<pairs>(s, s.offset + block, x);
  FD_UNROLL
  for (int p = 0; p < pairs; ++p) {
    Lane::i w[4];
    FD_UNROLL
    for (int j = 0; j < 4; ++j) w[j] = Words::merge(x[2 * p][j], x[2 * p + 1][j]);
    Lane::f z[4];
    box_muller<Lane>(w, z);
    Words::transpose(z);
    FD_UNROLL
    for (int j = 0; j < 4; ++j) Lane::store_f32(out, (4 * p + j) * Lane::kWidth, z[j]);
  }
}

// The normals of the block of elements that starts at `base`; only first .. last - 1 of them are needed.
inline void normals(const Stream& s, int64_t base, int64_t first, int64_t last, float* out) {
  constexpr int half = kBlock / 2;
  const uint64_t block = static_cast<uint64_t>(base) / 4;
  if (first >= base + half) {
    normals_of<1>(s, block + half / 4, out + half);
  } else if (last <= base + half) {
    normals_of<1>(s, block, out);
  } else {
    normals_of<2>(s, block, out);
  }
}

#else

using Lane = ScalarLane;

inline void normals(const Stream& s, int64_t base, int64_t first, int64_t last, float* out) {
  for (int64_t e = first - first % 4; e < last; e += 4) {
    uint32_t words[4];
    float z[4];
    philox_block({s.seed, s.offset}, static_cast<uint64_t>(e) / 4, words);
    box_muller<Lane>(words, z);
    for (int j = 0; j < 4; ++j) out[e - base + j] = z[j];
  }
}

#endif

}  // namespace FASTDIFF_NAMESPACE
