// The fixed tree that sums over a sample, and the arguments of the ops on vectors, as plain structs: no torch here.
// fastdiff/reference/reduce.py says what the tree is, project.py and edit.py what the ops mean.
#pragma once
#include "row.h"

namespace FASTDIFF_NAMESPACE {

constexpr int kChunk = 2048, kLanes = 256;  // elements of a chunk; lanes, which stand kLanes elements apart
constexpr int kMaxWeights = 4096;           // of lift_ and edit_

FD_HD inline int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// Which vector with which weight, for each sample and term.
struct Terms {
  int32_t count;        // M
  int32_t vectors;      // V
  int32_t index_is_64;  // element type of index
  const void* index;    // (B, M), the last dimension dense; null: term m takes vector m
  int64_t index_stride_b;
  const float* weight;  // (B, M), the last dimension dense; null where project_ has none
  int64_t weight_stride_b;

  FD_HD int64_t vector(int64_t b, int m) const {
    if (index == nullptr) return m;
    const int64_t at = b * index_stride_b + m;
    return index_is_64 ? static_cast<const int64_t*>(index)[at] : static_cast<const int32_t*>(index)[at];
  }
  FD_HD bool used(int64_t b, int m) const { return weight == nullptr || weight[b * weight_stride_b + m] != 0.0f; }
};

struct ProjectArgs {
  int64_t batch, numel;
  View x, basis;  // basis.batch_stride is the stride from vector to vector
  Terms terms;
  const float* gain;  // (rows, V), the last dimension dense
  const float* offset;
  int64_t gain_stride, offset_stride;
  int32_t rows, row_index, row_is_64;
  const void* row;  // null: row_index
  int64_t row_stride_b;
  float* out;  // (B, M)
  int64_t out_stride_b, out_stride_m;
};

struct LiftArgs {
  int64_t batch, numel;
  View out, basis;
  Terms terms;
};

struct EditArgs {
  int64_t batch, numel;
  View out, h, bank;
  Terms terms;
};

}  // namespace FASTDIFF_NAMESPACE
