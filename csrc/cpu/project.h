// The loops of project_: for a group of samples and a range of terms, chunk by chunk, all dot products that are needed.
#pragma once
#include "dot.h"

namespace FASTDIFF_NAMESPACE {

struct ProjectSpace {
  alignas(64) float x[kGroup][kChunk];
  alignas(64) float v[kTileVectors][kChunk];
  alignas(64) float x_tail[kGroup][Lane::kWidth], v_tail[kTileVectors][Lane::kWidth];
  alignas(64) float sums[kGroup * kPartials];  // (samples of the group, listed terms, lanes of the second level)
  int32_t vector[kGroup][kColumns];   // of each term: v where its dot product is needed, -2 - v where the gain is 0, -1 without weight
  int column[kColumns], listed;       // the terms whose dot product is needed
};

inline int64_t table_row(const ProjectArgs& a, int64_t b) {
  if (a.row == nullptr) return a.row_index;
  const int64_t at = b * a.row_stride_b;
  return a.row_is_64 ? static_cast<const int64_t*>(a.row)[at] : static_cast<const int32_t*>(a.row)[at];
}

template <int kB>
inline void dot_tile(const Operand* x, const Operand* v, int elements, int samples, int64_t sample_step, int vectors,
                     int lanes, float* to) {
  float sum[kB][kTileVectors];
  dot_chunk<kB, kTileVectors, kB == 1 && Lane::kWidth >= 8 ? 2 : 1>(x, v, elements, sum);
  for (int b = 0; b < samples; ++b) {
    for (int m = 0; m < vectors; ++m) to[b * sample_step + m * lanes] += sum[b][m];
  }
}

// The dot products of samples first .. first + count - 1, which need the same vectors, in w.sums.
inline void dot_products(const ProjectArgs& a, ProjectSpace& w, int64_t first, int count, const int32_t* vector) {
  const int lanes = lanes_of(a.numel);
  const int64_t sample_step = static_cast<int64_t>(w.listed) * lanes;
  for (int64_t i = 0; i < count * sample_step; ++i) w.sums[i] = 0.0f;
  for (int64_t e = 0; e < a.numel; e += kChunk) {
    const int64_t stop = e + kChunk < a.numel ? e + kChunk : a.numel;
    const int elements = static_cast<int>(stop - e);
    Operand x[kGroup + kTileSamples], v[kTileVectors];
    for (int b = 0; b < count; ++b) x[b] = operand(a.x, first + b, e, stop, w.x[b], w.x_tail[b]);
    for (int b = count; b < count + kTileSamples; ++b) x[b] = x[count - 1];  // what a tile lacks is computed and dropped
    float* const lane = w.sums + e / kChunk % kLanes;
    for (int i = 0; i < w.listed; i += kTileVectors) {
      const int vectors = w.listed - i < kTileVectors ? w.listed - i : kTileVectors;
      for (int m = 0; m < vectors; ++m) v[m] = operand(a.basis, vector[w.column[i + m]], e, stop, w.v[m], w.v_tail[m]);
      for (int m = vectors; m < kTileVectors; ++m) v[m] = v[0];
      for (int b = 0; b < count; b += kTileSamples) {
        const int samples = count - b < kTileSamples ? count - b : kTileSamples;
        float* to = lane + b * sample_step + static_cast<int64_t>(i) * lanes;
        if (samples == 1) {
          dot_tile<1>(x + b, v, elements, samples, sample_step, vectors, lanes, to);
        } else {
          dot_tile<kTileSamples>(x + b, v, elements, samples, sample_step, vectors, lanes, to);
        }
      }
    }
  }
}

// Terms m0 .. m1 - 1 of samples b0 .. b1 - 1; at most kGroup samples, and m1 - m0 so that w.sums holds them.
inline void project_block(const ProjectArgs& a, ProjectSpace& w, int64_t b0, int64_t b1, int m0, int m1) {
  const int columns = m1 - m0, lanes = lanes_of(a.numel);
  for (int64_t b = b0; b < b1; ++b) {
    const float* gain = a.gain + table_row(a, b) * a.gain_stride;
    for (int m = 0; m < columns; ++m) {
      int32_t vector = -1;
      if (a.terms.used(b, m0 + m)) {
        vector = static_cast<int32_t>(a.terms.vector(b, m0 + m));
        if (gain[vector] == 0.0f) vector = -2 - vector;
      }
      w.vector[b - b0][m] = vector;
    }
  }
  for (int64_t b = b0, next; b < b1; b = next) {
    const int32_t* vector = w.vector[b - b0];
    for (next = b + 1; next < b1 && __builtin_memcmp(vector, w.vector[next - b0], columns * sizeof *vector) == 0; ++next) {
    }
    w.listed = 0;
    for (int m = 0; m < columns; ++m) {
      if (vector[m] >= 0) w.column[w.listed++] = m;
    }
    dot_products(a, w, b, static_cast<int>(next - b), vector);
    float* sums = w.sums;
    for (int64_t c = b; c < next; ++c) {
      const float* gain = a.gain + table_row(a, c) * a.gain_stride;
      const float* offset = a.offset + table_row(a, c) * a.offset_stride;
      const float* weight = a.terms.weight == nullptr ? nullptr : a.terms.weight + c * a.terms.weight_stride_b + m0;
      float* out = a.out + c * a.out_stride_b + m0 * a.out_stride_m;
      for (int m = 0; m < columns; ++m) {
        const int32_t v = vector[m];
        float value = 0.0f;
        if (v >= 0) {
          value = fused(gain[v], combine(sums, lanes), offset[v]);
          sums += lanes;
        } else if (v != -1) {
          value = offset[-2 - v];
        }
        if (weight != nullptr && v != -1) value = weight[m] * value;
        out[m * a.out_stride_m] = canonical(value);
      }
    }
  }
}

// Units first .. last - 1: kGroup samples by `columns` terms each, the terms of one group before the next group.
__attribute__((noinline)) inline void project_units(const void* args, int64_t columns, int64_t first, int64_t last) {
  const ProjectArgs& a = *static_cast<const ProjectArgs*>(args);
  const int64_t M = a.terms.count, blocks = (M + columns - 1) / columns;
  ProjectSpace w;
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t b = unit / blocks * kGroup, m = unit % blocks * columns;
    project_block(a, w, b, b + kGroup < a.batch ? b + kGroup : a.batch, static_cast<int>(m),
                  static_cast<int>(m + columns < M ? m + columns : M));
  }
}

}  // namespace FASTDIFF_NAMESPACE
