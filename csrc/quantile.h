// The arguments of quantile_, as a plain struct: no torch here. fastdiff/reference/quantile.py says what it means.
#pragma once
#include "row.h"

namespace FASTDIFF_NAMESPACE {

struct QuantileArgs {
  StepArgs step;        // batch, numel, layout.inputs, in, coef, rows, row, scale: what makes d
  int64_t coef_stride;  // from row to row
  float* out;           // (B,), or null
  int64_t out_stride;
  float* clip;  // (B, 3), the last dimension dense, or null
  int64_t clip_stride_b;
  int64_t below, above;  // elements of a sample in ascending order,
  float weight;          // and how far the quantile lies from the first to the second
  float low, high;
};

}  // namespace FASTDIFF_NAMESPACE
