// The loops of edit_: sums of squares over chunks, then vectors added in proportion to their root.
#pragma once
#include "dot.h"

namespace FASTDIFF_NAMESPACE {

// sums[chunk] of chunks first .. last - 1, counted over all samples; of samples without a weight it is left as it is.
__attribute__((noinline)) inline void square_units(const void* args, float* sums, int64_t first, int64_t last) {
  const EditArgs& a = *static_cast<const EditArgs*>(args);
  const int64_t chunks = chunks_of(a.numel);
  alignas(64) float buffer[kChunk];
  alignas(64) float tail[Lane::kWidth];
  constexpr int kTogether = Lane::kWidth >= 8 ? 8 : 1;
  bool needed = false;
  for (int64_t unit = first, looked = -1; unit < last; ++unit) {
    const int64_t b = unit / chunks;
    if (b != looked) {
      needed = false;
      for (int m = 0; m < a.terms.count; ++m) needed |= a.terms.used(b, m);
      looked = b;
    }
    if (!needed) continue;
    const int64_t e = unit % chunks * kChunk, stop = e + kChunk < a.numel ? e + kChunk : a.numel;
    const Operand h = operand(a.h, b, e, stop, buffer, tail);
    float sum[1][1];
    dot_chunk<1, 1, kTogether>(&h, &h, static_cast<int>(stop - e), sum);
    sums[unit] = sum[0][0];
  }
}

// sqrt of the sum of squares of one sample. sums: those of its chunks
inline float norm_of(const float* sums, int64_t numel) {
  const int lanes = lanes_of(numel);
  float lane[kLanes];
  for (int i = 0; i < lanes; ++i) lane[i] = 0.0f;
  for (int64_t c = 0; c < chunks_of(numel); ++c) lane[c % kLanes] += sums[c];
  return __builtin_sqrtf(combine(lane, lanes));
}

struct EditSpace {
  const float* vector[kMaxWeights];  // of each term that is there
  float weight[kMaxWeights];
};

inline int list_edits(const EditArgs& a, int64_t b, const float* sums, EditSpace& w) {
  const Terms& t = a.terms;
  int count = 0;
  float norm = -1.0f;  // not known yet
  for (int m = 0; m < t.count; ++m) {
    if (!t.used(b, m)) continue;
    if (norm == -1.0f) norm = norm_of(sums, a.numel);
    const float c = t.weight[b * t.weight_stride_b + m] * norm;
    if (c == 0.0f) continue;
    w.vector[count] = static_cast<const float*>(a.bank.data) + t.vector(b, m) * a.bank.batch_stride;
    w.weight[count++] = c;
  }
  return count;
}

// A sample without a term keeps every bit where it keeps its dtype.
inline void copy_bits(const EditArgs& a, int64_t b, int64_t first, int64_t last) {
  const char* from = sample_of(a.h, b);
  char* to = sample_of(a.out, b);
  if (from == to && a.h.groups == a.out.groups) return;
  const int64_t size = a.h.dtype == Dtype::f32 ? 4 : 2;
  if (dense(a.h) && dense(a.out)) {
    __builtin_memcpy(to + first * size, from + first * size, (last - first) * size);
    return;
  }
  for (int64_t e = first; e < last; ++e) __builtin_memcpy(to + a.out.at(e) * size, from + a.h.at(e) * size, size);
}

// Elements first .. last - 1 of sample b, which begin where a block does.
inline void edit_range(const EditArgs& a, const EditSpace& w, int terms, int64_t b, int64_t first, int64_t last) {
  alignas(64) float buffer[kBlock];
  const char* from = sample_of(a.h, b);
  const int64_t size = a.h.dtype == Dtype::f32 ? 4 : 2;
  Lane::nan seen = Lane::no_nan();
  bool tail_seen = false;
  for (int64_t e = first, next; e < last; e = next) {
    next = e + kBlock < last ? e + kBlock : last;
    const bool whole = next - e == kBlock;
    Lane::f v[kVectors];
    if (whole && dense(a.h)) {
      load_block(v, from + e * size, a.h.dtype);
    } else {
      gather(buffer, from, a.h, e, next, 0);
      load_block(v, buffer, Dtype::f32);
    }
    for (int m = 0; m < terms; ++m) {
      if (whole && dense(a.bank)) {
        accumulate<true>(v, w.weight[m], w.vector[m] + e, Dtype::f32);
      } else {
        gather(buffer, reinterpret_cast<const char*>(w.vector[m]), a.bank, e, next, 0);
        accumulate<true>(v, w.weight[m], buffer, Dtype::f32);
      }
    }
    put<false>(v, sample_of(a.out, b), a.out, e, next, seen, tail_seen);
  }
}

// Units first .. last - 1 of `unit` elements of one sample each. sums: of all chunks of all samples.
__attribute__((noinline)) inline void edit_units(const void* args, const float* sums, int64_t unit, int64_t first, int64_t last) {
  EditArgs a = *static_cast<const EditArgs*>(args);
  const int64_t units = (a.numel + unit - 1) / unit, chunks = chunks_of(a.numel);
  if (a.h.groups == a.out.groups && a.h.groups == a.bank.groups) {  // one order of the elements is as good as another
    a.h.groups = a.out.groups = a.bank.groups = 1;
    a.h.inner = a.out.inner = a.bank.inner = a.numel;
  }
  EditSpace w;
  int terms = 0;
  for (int64_t listed = -1; first < last; ++first) {
    const int64_t b = first / units, e = first % units * unit, stop = e + unit < a.numel ? e + unit : a.numel;
    if (b != listed) terms = list_edits(a, b, sums + b * chunks, w);
    listed = b;
    if (terms == 0 && a.h.dtype == a.out.dtype) {
      copy_bits(a, b, e, stop);
    } else {
      edit_range(a, w, terms, b, e, stop);
    }
  }
}

}  // namespace FASTDIFF_NAMESPACE
