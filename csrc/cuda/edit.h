// edit_ for GPU threads: a warp adds the squares of a chunk, then every thread edits its elements. fastdiff/reference/edit.py and
// reduce.py are the definition.
//
// No warp waits for another: the 256 lanes of a chunk are eight numbers of each thread of one warp, which are added in pairs
// within a thread or between two, and every warp of the second launch adds up the chunks of its sample again.
#pragma once
#include <type_traits>

#include "launch.h"
#include "thread.h"

namespace FASTDIFF_NAMESPACE {

constexpr int kHeld = kLanes / kWarp;  // lanes of a chunk that a thread holds

// The number of the j-th lane that thread t holds, where vectors of V elements are read: the bits of t and j in another order.
template <int V>
FD_HD constexpr int lane_of(int t, int j) {
  return V == 8 ? 8 * t + j : V == 4 ? 4 * t + j % 4 + j / 4 * 128 : 32 * j + t;
}

// The first term of sample b whose weight is not 0; their number where there is none.
FD_HD inline int first_term(const Terms& terms, uint32_t b) {
  const float* weight = terms.weight + times(b, terms.weight_stride_b);
  int m = 0;
  FD_ROLLED
  while (m < terms.count && weight[m] == 0.0f) ++m;
  return m;
}

FD_HD inline void square(float v, float& sum) { sum = Lane::fma(v, v, sum); }

// The squares of a chunk in the lanes of thread t. An element that is not there counts as 0, which changes no sum.
template <int V>
FD_HD inline void squares(const SquaresLaunch& a, uint32_t b, int64_t chunk, int t, float (&sums)[kHeld]) {
  FD_UNROLL
  for (int j = 0; j < kHeld; ++j) sums[j] = 0.0f;
  const int64_t first = chunk * kChunk;
  if constexpr (V > 1) {  // 8 elements of 16 bits; or 4 of float32, and 4 that are 128 further
    constexpr int kRows = 64 / V, kApart = kChunk / kRows;
    using Stored = std::conditional_t<V == 8, uint16_t, uint32_t>;
    const Stored* base = static_cast<const Stored*>(a.h.data) + times(b, a.h.batch_stride) + first + V * t;
    uint32_t w[kRows][4];
    if (a.numel - first >= kChunk) {  // without conditions, so that all are under way at the same time
      FD_UNROLL
      for (int row = 0; row < kRows; ++row) read16(base + kApart * row, w[row]);
    } else {
      FD_UNROLL
      for (int row = 0; row < kRows; ++row) {
        w[row][0] = w[row][1] = w[row][2] = w[row][3] = 0;
        if (first + kApart * row + V * t < a.numel) read16(base + kApart * row, w[row]);
      }
    }
    FD_UNROLL
    for (int row = 0; row < kRows; ++row) {
      FD_UNROLL
      for (int l = 0; l < 4; ++l) {
        if constexpr (V == 4) {
          square(Lane::value(w[row][l]), sums[row % 2 * 4 + l]);
        } else {
          float low, high;
          if (a.h.dtype == Dtype::f16) {
            widen_half(w[row][l], low, high);
          } else {
            widen_bfloat(w[row][l], low, high);
          }
          square(low, sums[2 * l]);
          square(high, sums[2 * l + 1]);
        }
      }
    }
  } else {  // of any dtype and layout, one by one
    const int64_t inner = a.h.groups == 1 ? a.numel : a.h.inner;
    int64_t e = first + t, group = quotient(e, inner), pixel = e - group * inner;
    const int64_t groups_on = inner > kWarp ? 0 : quotient(kWarp, inner), pixels_on = kWarp - groups_on * inner;
    FD_ROLLED
    for (int row = 0; row < 8; ++row) {
      uint32_t w[kHeld];
      FD_UNROLL
      for (int j = 0; j < kHeld; ++j) {
        w[j] = 0;
        const int64_t at = times(b, a.h.batch_stride) + (a.h.groups == 1 ? e : pixel * a.h.groups + group);
        if (e < a.numel) {
          if (a.h.dtype == Dtype::f32) {
            w[j] = static_cast<const uint32_t*>(a.h.data)[at];
          } else {
            w[j] = static_cast<const uint16_t*>(a.h.data)[at];
          }
        }
        e += kWarp, pixel += pixels_on, group += groups_on;
        if (pixel >= inner) pixel -= inner, ++group;
      }
      FD_UNROLL
      for (int j = 0; j < kHeld; ++j) {
        float v = Lane::value(w[j]), rest;
        if (a.h.dtype == Dtype::f16) widen_half(w[j], v, rest);
        if (a.h.dtype == Dtype::bf16) widen_bfloat(w[j], v, rest);
        square(v, sums[j]);
      }
    }
  }
}

// The second level: the sums of a sample's chunks in the lanes of thread t, as lane_of<1> numbers them.
FD_HD inline void add_chunks(const float* sums, int chunks, int t, float (&lanes)[kHeld]) {
  FD_UNROLL
  for (int j = 0; j < kHeld; ++j) lanes[j] = 0.0f;
  FD_ROLLED
  for (int first = t; first < chunks; first += kLanes) {
    FD_UNROLL
    for (int j = 0; j < kHeld; ++j)
      if (first + 32 * j < chunks) lanes[j] = Lane::add(lanes[j], sums[first + 32 * j]);
  }
}

#if defined(__CUDACC__)
// The 256 lanes of a warp, added in pairs: a[i] + a[i + 128], then a[i] + a[i + 64], ..., a[i] + a[i + 1]. Every thread gets the sum,
// since of two that exchange their numbers both add them.
template <int V>
__device__ inline float added(float (&a)[kHeld]) {
  int gone = 0;  // bits of j: what has them is part of another lane
  FD_UNROLL
  for (int apart = kLanes / 2; apart; apart /= 2) {
    FD_UNROLL
    for (int j = 1; j < kHeld; j *= 2) {
      if (lane_of<V>(0, j) != apart) continue;
      FD_UNROLL
      for (int i = 0; i < kHeld; ++i)
        if (!(i & (gone | j))) a[i] = Lane::add(a[i], a[i | j]);
      gone |= j;
    }
    FD_UNROLL
    for (int t = 1; t < kWarp; t *= 2) {
      if (lane_of<V>(t, 0) != apart) continue;
      FD_UNROLL
      for (int i = 0; i < kHeld; ++i)
        if (!(i & gone)) a[i] = Lane::add(a[i], __shfl_xor_sync(0xFFFFFFFFu, a[i], t));
    }
  }
  return a[0];
}

// The second level. Up to 32 chunks are one number of each thread: the other lanes are 0, which added to a sum leaves it as it is.
__device__ inline float sum_of_chunks(const float* sums, int chunks) {
  const int t = static_cast<int>(threadIdx.x % kWarp);
  if (chunks <= kWarp) {
    float sum = t < chunks ? sums[t] : 0.0f;
    FD_UNROLL
    for (int apart = kWarp / 2; apart; apart /= 2) sum = Lane::add(sum, __shfl_xor_sync(0xFFFFFFFFu, sum, apart));
    return sum;
  }
  float lanes[kHeld];
  add_chunks(sums, chunks, t, lanes);
  return added<1>(lanes);
}
#endif

// Adds the vectors to the elements of a thread. norm_of(b): the norm of sample b, asked for by whole warps.
template <int E, Features features, class Norm>
FD_HD inline void edit_thread(const EditLaunch& launch, const Thread& thread, const Norm& norm_of) {
  const EditArgs& a = launch.args;
  Place p = place<E, features>(thread, a.numel, launch.inner);
  if (p.b >= a.batch) return;
  p.sure = 0;  // who owns no element helps to find the norm
  Raw<E> raw;
  load<E, features>(a.h, p, has(launch.aligned, kEditH), raw);  // under way while the norm is found
  int m = first_term(a.terms, p.b);
  const float norm = m < a.terms.count ? norm_of(p.b) : 0.0f;
  float v[E];
  widen<E, features>(raw, a.h.dtype, v);
  bool edited = false;
  View bank = a.bank;
  bank.dtype = Dtype::f32;  // for the compiler
  FD_ROLLED
  for (; m < a.terms.count; ++m) {
    const float c = scaled(a.terms.weight[times(p.b, a.terms.weight_stride_b) + m], norm);
    if (c == 0.0f) continue;
    const int64_t index = a.terms.vector(p.b, m), last = a.terms.vectors - 1;
    Place vector = p;
    vector.b = static_cast<uint32_t>(index < 0 ? 0 : index > last ? last : index);
    float u[E];
    load<E, features>(bank, vector, has(launch.aligned, kEditBank), raw);
    widen<E, features>(raw, Dtype::f32, u);
    add(v, c, u);
    edited = true;
  }
  if (edited || a.out.dtype != a.h.dtype) {
    store<E, features>(a.out, p, has(launch.aligned, kEditOut), maybe_nan(v), v);
  } else if (!launch.in_place) {  // as it was, in every bit
    load<E, features>(a.h, p, has(launch.aligned, kEditH), raw);
    store_raw<E, features>(a.out, p, has(launch.aligned, kEditOut), raw);
  }
}

}  // namespace FASTDIFF_NAMESPACE
