// What only the data can tell: rows and bank indices inside their tables, flags that have what they need. The CPU looks
// before it starts; a device clamps and reports.
#pragma once
#include "../bind.h"

namespace fastdiff {

// Row r, as far as it does not depend on the sample.
inline void check_row(const StepArgs& a, int64_t r) {
  const RowLayout& layout = a.layout;
  const float* coef = a.coef + r * layout.width();
  const int32_t* meta = a.meta + r * kMetaWidth;
  const int slots = layout.inputs - a.listed;
  if (meta[kRingSlot] >= slots) {
    refuse("step_: row ", r, " of meta keeps d in ring slot ", meta[kRingSlot], ": the ring has ", slots, " slots");
  }
  const int32_t known_flags = kClip | ((1 << (2 + layout.outputs)) - 1) * kMaskInput;
  if ((meta[kFlags] & ~known_flags) != 0) {
    refuse("step_: row ", r, " of meta has flags ", meta[kFlags], ": with ", layout.outputs, " outputs the sum of some of ", known_flags,
           " is taken");
  }
  if ((meta[kFlags] & kMaskInput) != 0 && (meta[kMaskedInput] < 0 || meta[kMaskedInput] >= layout.inputs)) {
    refuse("step_: row ", r, " of meta masks input ", meta[kMaskedInput], ": inputs and ring slots are 0 to ", layout.inputs - 1);
  }
  for (int target = 0; target < 2 + layout.outputs; ++target) {
    if ((meta[kFlags] & kMaskInput << target) == 0) continue;
    if (a.mask.data == nullptr) refuse("step_: row ", r, " of meta has a mask flag (", meta[kFlags], "), but mask is None");
    if (coef[layout.mask(target)] != 0.0f && a.known.data == nullptr) {
      refuse("step_: row ", r, " of coef mixes in the known image, but known is None");
    }
    if (coef[layout.mask(target) + 1] != 0.0f && (meta[kMaskNoise] < 0 || meta[kMaskNoise] >= layout.noises)) {
      refuse("step_: row ", r, " of meta masks with noise term ", meta[kMaskNoise], ": keys holds ", layout.noises, " noise terms");
    }
  }
}

// A vector is used where the row's coefficient times the sample's weight is not zero.
inline void check_bank(const StepArgs& a, int64_t b, int64_t r) {
  const RowLayout& layout = a.layout;
  const float* coef = a.coef + r * layout.width();
  for (int m = 0; m < layout.bank; ++m) {
    const int64_t at = b * a.bank_index_stride_b + m;
    const int64_t index = a.bank_index_is_64 ? static_cast<const int64_t*>(a.bank_index)[at] : static_cast<const int32_t*>(a.bank_index)[at];
    if (index >= 0 && index < a.bank_size) continue;
    const float weight = a.bank_weight[b * a.bank_weight_stride_b + m];
    for (int i = -1; i < layout.outputs; ++i) {
      const float c = coef[(i < 0 ? layout.g() : layout.y_bank(i)) + m];
      if (c != 0.0f && c * weight != 0.0f) {
        refuse("step_: bank_index[", b, ", ", m, "] is ", index, ": the bank holds vectors 0 to ", a.bank_size - 1);
      }
    }
  }
}

inline void check_rows(const StepArgs& a) {
  int64_t checked = -1;  // rows mostly repeat
  for (int64_t b = 0; b < a.batch; ++b) {
    for (int64_t t = 0; t < a.tokens; ++t) {
      int64_t r = a.row_index;
      if (a.row != nullptr) {
        const int64_t at = b * a.row_stride_b + t * a.row_stride_t;
        r = a.row_is_64 ? static_cast<const int64_t*>(a.row)[at] : static_cast<const int32_t*>(a.row)[at];
        if (r < 0 || r >= a.rows) refuse("step_: row holds ", r, " for sample ", b, ": the table has rows 0 to ", a.rows - 1);
      }
      if (r != checked) check_row(a, r);
      checked = r;
      if (a.layout.bank > 0) check_bank(a, b, r);
    }
    const bool same = a.row == nullptr || (a.row_stride_b == 0 && a.tokens == 1);
    if (same && a.layout.bank == 0) return;
  }
}

}  // namespace fastdiff
