// The loops of lift_: sums of vectors for a few samples at once, in registers from the first term to the last. An element does not
// depend on its place, so that samples and vectors of one layout are taken in the order of memory.
#pragma once
#include "dot.h"

namespace FASTDIFF_NAMESPACE {

// Samples and registers of elements of a tile, where a few samples have the same terms, and where all have.
constexpr int kLiftSamples = Lane::kWidth == 16 ? 4 : Lane::kWidth == 8 ? 2 : 1, kLiftVectors = 4;
constexpr int kSharedSamples = Lane::kWidth == 16 ? 8 : kLiftSamples, kSharedVectors = Lane::kWidth == 16 ? 3 : kLiftVectors;
constexpr int kSlice = kSharedVectors * Lane::kWidth;

struct LiftSpace {
  const float* vector[kMaxWeights];  // of each term that is there, its first element
  float weight[kMaxWeights * kLiftSamples];
};

// out[b] = sum of the terms at elements e, e + 1, ...: kE registers of each of kB samples. weight: kB of each term.
template <int kB, int kE>
inline void lift_tile(const float* const* vector, const float* weight, int terms, int64_t e, float* const (&out)[kB]) {
  Lane::f sum[kB][kE];
  FD_UNROLL
  for (int b = 0; b < kB; ++b) {
    FD_UNROLL
    for (int i = 0; i < kE; ++i) sum[b][i] = Lane::set(-0.0f);
  }
  for (int m = 0; m < terms; ++m, weight += kB) {
    const float* v = vector[m] + e;
    Lane::f value[kE];
    FD_UNROLL
    for (int i = 0; i < kE; ++i) value[i] = Lane::load_f32(v, i * Lane::kWidth);
    FD_UNROLL
    for (int b = 0; b < kB; ++b) {
      const Lane::f w = Lane::set(weight[b]);
      FD_UNROLL
      for (int i = 0; i < kE; ++i) sum[b][i] = Lane::fma(w, value[i], sum[b][i]);
    }
  }
  Lane::nan seen = Lane::no_nan();
  FD_UNROLL
  for (int b = 0; b < kB; ++b) {
    FD_UNROLL
    for (int i = 0; i < kE; ++i) Lane::store_f32(out[b], e + i * Lane::kWidth, Lane::canonical(sum[b][i], seen));
  }
}

// Elements first .. last - 1 of kB samples that have the same terms.
template <int kB, int kE>
inline void lift_range(const float* const* vector, const float* weight, int terms, int64_t first, int64_t last, float* const (&out)[kB]) {
  constexpr int64_t wide = kE * Lane::kWidth;
  int64_t e = first;
  for (; e + wide <= last; e += wide) lift_tile<kB, kE>(vector, weight, terms, e, out);
  for (; e + Lane::kWidth <= last; e += Lane::kWidth) lift_tile<kB, 1>(vector, weight, terms, e, out);
  if (e < last && last - first >= Lane::kWidth) {
    lift_tile<kB, 1>(vector, weight, terms, last - Lane::kWidth, out);  // some elements a second time
    return;
  }
  for (; e < last; ++e) {
    for (int b = 0; b < kB; ++b) {
      float sum = -0.0f;
      for (int m = 0; m < terms; ++m) sum = fused(weight[m * kB + b], vector[m][e], sum);
      out[b][e] = canonical(sum);
    }
  }
}

// The terms that sample b has; returns their number. step: between the weights of two terms.
inline int list_terms(const Terms& t, const View& vectors, int64_t b, LiftSpace& w, int at, int step) {
  int count = 0;
  for (int m = 0; m < t.count; ++m) {
    const float weight = t.weight[b * t.weight_stride_b + m];
    if (weight == 0.0f) continue;
    w.vector[count] = static_cast<const float*>(vectors.data) + t.vector(b, m) * vectors.batch_stride;
    w.weight[count++ * step + at] = weight;
  }
  return count;
}

// Where out and vectors lie differently: block by block, in logical order.
inline void lift_gathered(const LiftArgs& a, const LiftSpace& w, int terms, int64_t b, int64_t first, int64_t last) {
  alignas(64) float buffer[kBlock];
  Lane::nan seen = Lane::no_nan();
  bool tail_seen = false;
  for (int64_t e = first, next; e < last; e = next) {
    next = e + kBlock < last ? e + kBlock : last;
    Lane::f sum[kVectors];
    FD_UNROLL
    for (int u = 0; u < kVectors; ++u) sum[u] = Lane::set(-0.0f);
    for (int m = 0; m < terms; ++m) {
      gather(buffer, reinterpret_cast<const char*>(w.vector[m]), a.basis, e, next, 0);
      accumulate<true>(sum, w.weight[m], buffer, Dtype::f32);
    }
    put<false>(sum, sample_of(a.out, b), a.out, e, next, seen, tail_seen);
  }
}

inline bool same_terms(const Terms& t, int64_t first, int64_t second) {
  for (int m = 0; m < t.count; ++m) {
    if (t.used(first, m) != t.used(second, m) || (t.used(first, m) && t.vector(first, m) != t.vector(second, m))) return false;
  }
  return true;
}

// Elements first .. last - 1 of samples b0 .. b1 - 1.
inline void lift_block(const LiftArgs& a, LiftSpace& w, int64_t b0, int64_t b1, int64_t first, int64_t last) {
  const bool flat = a.out.groups == a.basis.groups;
  const auto at = [&](int64_t b) { return static_cast<float*>(a.out.data) + b * a.out.batch_stride; };
  for (int64_t b = b0; b < b1;) {
    bool together = flat && kLiftSamples > 1 && b1 - b >= kLiftSamples;
    for (int i = 1; together && i < kLiftSamples; ++i) together = same_terms(a.terms, b, b + i);
    const int samples = together ? kLiftSamples : 1;
    int terms = 0;
    for (int i = 0; i < samples; ++i) terms = list_terms(a.terms, a.basis, b + i, w, i, samples);
    if (together) {
      float* out[kLiftSamples];
      for (int i = 0; i < kLiftSamples; ++i) out[i] = at(b + i);
      lift_range<kLiftSamples, kLiftVectors>(w.vector, w.weight, terms, first, last, out);
    } else if (flat) {
      float* const out[1] = {at(b)};
      lift_range<1, kLiftVectors>(w.vector, w.weight, terms, first, last, out);
    } else {
      lift_gathered(a, w, terms, b, first, last);
    }
    b += samples;
  }
}

// Units first .. last - 1: `elements` elements of `samples` samples each, those of one group of samples before the next group.
__attribute__((noinline)) inline void lift_units(const void* args, int64_t samples, int64_t elements, int64_t first, int64_t last) {
  const LiftArgs& a = *static_cast<const LiftArgs*>(args);
  const int64_t ranges = (a.numel + elements - 1) / elements;
  LiftSpace w;
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t b = unit / ranges * samples, e = unit % ranges * elements;
    lift_block(a, w, b, b + samples < a.batch ? b + samples : a.batch, e, e + elements < a.numel ? e + elements : a.numel);
  }
}

// Where all samples have the same terms: their vectors, in order, and the weights, side by side for the samples of a tile.
// Returns how many terms they have, or -1 where samples differ. vector: (M), weight: (batch, M).
__attribute__((noinline)) inline int lift_shared(const void* args, int32_t* vector, float* weight) {
  const LiftArgs& a = *static_cast<const LiftArgs*>(args);
  const Terms& t = a.terms;
  if (a.out.groups != a.basis.groups || a.batch < kSharedSamples || kSharedSamples == 1) return -1;
  int count = 0;
  for (int m = 0; m < t.count; ++m) {
    if (t.used(0, m)) vector[count++] = m;
  }
  for (int64_t b = 1; b < a.batch; ++b) {
    const float* own = t.weight + b * t.weight_stride_b;
    bool differs = false;
    for (int m = 0; m < t.count; ++m) differs |= (own[m] != 0.0f) != (t.weight[m] != 0.0f);
    if (differs) return -1;
    for (int i = 0; i < count && t.index != nullptr; ++i) {
      if (t.vector(b, vector[i]) != t.vector(0, vector[i])) return -1;
    }
  }
  const int64_t tiled = a.batch / kSharedSamples * kSharedSamples;
  for (int64_t b = 0; b < a.batch; ++b) {
    const float* own = t.weight + b * t.weight_stride_b;
    const int64_t step = b < tiled ? kSharedSamples : 1, first = b < tiled ? b / step * step : b;
    float* to = weight + first * count + (b - first);
    for (int i = 0; i < count; ++i) to[i * step] = own[vector[i]];
  }
  for (int i = 0; i < count; ++i) vector[i] = static_cast<int32_t>(t.vector(0, vector[i]));
  return count;
}

// Slices first .. last - 1 of all samples, which have the same terms. What is read of the vectors is first copied to where it stands
// side by side, in `copy` (terms, kSlice): gone through in order, again for every tile of samples.
__attribute__((noinline)) inline void lift_slices(const void* args, const int32_t* vector, const float* weight, int terms, float* copy,
                                                  int64_t first, int64_t last) {
  const LiftArgs& a = *static_cast<const LiftArgs*>(args);
  const float* at[kMaxWeights];
  for (int m = 0; m < terms; ++m) at[m] = copy + m * kSlice;
  for (int64_t slice = first; slice < last; ++slice) {
    const int64_t from = slice * kSlice, count = from + kSlice < a.numel ? kSlice : a.numel - from;
    for (int m = 0; m < terms; ++m) {
      const float* v = static_cast<const float*>(a.basis.data) + vector[m] * a.basis.batch_stride + from;
      if (count == kSlice) {
        FD_UNROLL
        for (int i = 0; i < kSharedVectors; ++i) Lane::store_f32(copy, m * kSlice + i * Lane::kWidth, Lane::load_f32(v, i * Lane::kWidth));
      } else {
        for (int64_t e = 0; e < count; ++e) copy[m * kSlice + e] = v[e];
      }
    }
    float* const out = static_cast<float*>(a.out.data) + from;
    int64_t b = 0;
    for (; b + kSharedSamples <= a.batch; b += kSharedSamples) {
      float* tile[kSharedSamples];
      for (int i = 0; i < kSharedSamples; ++i) tile[i] = out + (b + i) * a.out.batch_stride;
      lift_range<kSharedSamples, kSharedVectors>(at, weight + b * terms, terms, 0, count, tile);
    }
    for (; b < a.batch; ++b) {
      float* const one[1] = {out + b * a.out.batch_stride};
      lift_range<1, kSharedVectors>(at, weight + b * terms, terms, 0, count, one);
    }
  }
}

}  // namespace FASTDIFF_NAMESPACE
