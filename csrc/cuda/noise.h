// Noise and keys for one GPU thread: the bodies of normal_, fold_in, run_keys and raw_words.
#pragma once
#include "launch.h"
#include "thread.h"

namespace FASTDIFF_NAMESPACE {

FD_HD inline Key key_at(const int64_t* keys, int64_t at, int64_t pair) {
  return {static_cast<uint64_t>(keys[at]), static_cast<uint64_t>(keys[at + pair])};
}

template <int E, Features features>
FD_HD inline void normal_thread(const NormalLaunch& launch, const Thread& thread) {
  const NormalArgs& a = launch.args;
  const Place p = place<E, features>(thread, a.numel, launch.inner);
  if (p.b >= a.batch || p.e0 >= a.numel) return;
  float z[E];
  draw<E, features>(key_at(a.keys, times(p.b, a.key_stride_b), a.key_stride_pair), p, z);
  store<E, features>(a.out, p, launch.aligned != 0, false, z);
}

FD_HD inline void write_key(int64_t* out, Key key) {
  out[0] = static_cast<int64_t>(key.seed);
  out[1] = static_cast<int64_t>(key.offset);
}

FD_HD inline void fold_in_thread(const FoldInArgs& a, int64_t i) {
  if (i >= a.count) return;
  int64_t key = 0, datum = 0, rest = i;
  FD_ROLLED
  for (int64_t d = a.dims - 1; d >= 0; --d) {
    const int64_t up = quotient(rest, a.size[d]), at = rest - up * a.size[d];
    key += at * a.key_stride[d];
    datum += at * a.data_stride[d];
    rest = up;
  }
  write_key(a.out + 2 * i, fold_in(key_at(a.keys, key, a.key_stride_pair), static_cast<uint64_t>(a.data[datum])));
}

FD_HD inline void run_keys_thread(const RunKeysArgs& a, int64_t i) {
  if (i >= a.rows * a.noises * a.batch) return;
  const int64_t entry = quotient(i, a.batch), b = i - entry * a.batch;
  const int64_t row = quotient(entry, a.noises), j = entry - row * a.noises;
  const int64_t stream = a.streams[row * a.stream_stride[0] + j * a.stream_stride[1]];
  const int64_t draw = a.draws[row * a.draw_stride[0] + j * a.draw_stride[1]];
  const Key seed{static_cast<uint64_t>(a.seeds[b * a.seed_stride]), 0};
  write_key(a.out + 2 * i, fold_in(fold_in(seed, static_cast<uint64_t>(stream)), static_cast<uint64_t>(draw)));
}

// Words 4 block .. 4 block + 3 of stream b.
FD_HD inline void raw_words_thread(const RawWordsArgs& a, uint32_t b, int64_t e0) {
  if (b >= a.batch || e0 >= a.count) return;
  uint32_t words[4];
  philox_block(key_at(a.keys, times(b, a.key_stride_b), a.key_stride_pair), static_cast<uint64_t>(e0) / 4, words);
  uint32_t* out = a.out + times(b, a.count) + e0;
  FD_UNROLL
  for (int l = 0; l < 4; ++l)
    if (e0 + l < a.count) out[l] = words[l];
}

}  // namespace FASTDIFF_NAMESPACE
