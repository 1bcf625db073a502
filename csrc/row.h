// The table of a plan and the arguments of one launch, as plain structs: no torch here. fastdiff/reference/step.py says
// what a row means.
#pragma once
#include <cstdint>

#include "philox.h"
#include "platform.h"

namespace FASTDIFF_NAMESPACE {

constexpr int kMaxInputs = 12, kMaxOutputs = 3, kMaxBank = 16, kMaxNoises = 16;

enum class Dtype : int32_t { f32 = 0, f16 = 1, bf16 = 2 };
enum Flag : int32_t { kClip = 1, kMaskInput = 2, kMaskD = 4, kMaskY0 = 8 };
enum StatusBit : int32_t { kBadRow = 1, kBadBank = 2 };
enum Meta { kRingSlot = 0, kFlags = 1, kMaskedInput = 2, kMaskNoise = 3, kMetaWidth = 4 };

// Where a row's numbers stand in coef (N, width); reference.Layout is the same.
struct RowLayout {
  int inputs, outputs, bank, noises;
  FD_HD int g() const { return inputs; }
  FD_HD int clip() const { return inputs + bank; }
  FD_HD int y_width() const { return inputs + 1 + bank + noises; }
  FD_HD int y(int i) const { return clip() + 3 + i * y_width(); }      // a_i
  FD_HD int y_d(int i) const { return y(i) + inputs; }                 // a_id
  FD_HD int y_bank(int i) const { return y_d(i) + 1; }                 // h_i
  FD_HD int y_noise(int i) const { return y_bank(i) + bank; }          // w_i
  FD_HD int mask(int target) const { return y(outputs) + 2 * target; }  // k0, k1; target 0 input, 1 d, 2+i y_i
  FD_HD int width() const { return mask(2 + outputs); }
};

// A batch of dense samples. Logical element e of a sample stands at (e % inner) * groups + e / inner: contiguous when
// groups is 1, channels-last when groups is the number of channels and inner the number of pixels.
struct View {
  void* data;
  int64_t batch_stride;  // in elements
  int64_t inner;
  int64_t groups;
  Dtype dtype;
  FD_HD int64_t at(int64_t e) const { return groups == 1 ? e : (e % inner) * groups + e / inner; }
};

struct StepArgs {
  int64_t batch, numel, tokens;  // samples, elements a sample, tokens a sample (1 unless the row is (B, T))
  RowLayout layout;
  int32_t rows;        // rows in the table
  int32_t listed;      // inputs that are not ring slots
  int32_t row_index;   // where `row` is null
  int32_t row_is_64;   // element type of row, of bank_index
  int32_t bank_index_is_64;
  int32_t bank_size;
  const float* coef;
  const int32_t* meta;
  const void* row;
  int64_t row_stride_b, row_stride_t;  // 0 where broadcast
  const int64_t* keys;
  int64_t key_stride_row, key_stride_noise, key_stride_b;  // in int64; the pair itself is dense
  const float* scale;
  int64_t scale_stride_b, scale_stride_k;
  const void* bank_index;
  const float* bank_weight;
  int64_t bank_index_stride_b, bank_weight_stride_b;  // the last dimension is dense
  const float* clip;
  int64_t clip_stride_b;
  int32_t* status;
  View in[kMaxInputs];  // listed inputs, then ring slots
  View out[kMaxOutputs];
  View bank;  // batch_stride is the stride from vector to vector
  View known;
  View mask;  // mask_period elements a sample, element e takes [e % mask_period]; batch_stride 0 where broadcast
  int64_t mask_period;
};

}  // namespace FASTDIFF_NAMESPACE
