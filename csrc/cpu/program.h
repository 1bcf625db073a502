// One row of the table, resolved for one sample: only what has a coefficient, in the order in which it is added.
#pragma once
#include "noise.h"

namespace FASTDIFF_NAMESPACE {

// Where a value comes from.
constexpr int kFromD = kMaxInputs, kFromBank = kFromD + 1, kFromNoise = kFromBank + kMaxBank;
constexpr int kFromKnown = kFromNoise + kMaxNoises, kFromMask = kFromKnown + 1, kSources = kFromMask + 1;
constexpr int kMaxTerms = kMaxInputs + 1 + kMaxBank + kMaxNoises;

struct Term {
  int32_t source;
  float weight;
};

struct Sum {
  int32_t count;
  Term terms[kMaxTerms];
  void add(int source, float weight) { terms[count++] = {source, weight}; }
};

struct Mix {
  bool on;
  float k0, k1;
};

struct Reader {  // a tensor that the program reads, at the first element of the sample
  int32_t source;
  const char* data;
  const View* view;
};

struct Program {
  Sum d, y[kMaxOutputs];
  Mix mix[2 + kMaxOutputs];  // input, d, y_i
  bool has_d, clip;
  float low, high, factor;
  int32_t row, slot, masked, mask_noise;
  int32_t readers, noises;
  Reader reader[kSources];
  int32_t noise[kMaxNoises];
  Stream stream[kMaxNoises];
  bool used[kSources];

  void use_view(int source, const View& v, int64_t sample) {
    if (used[source]) return;
    used[source] = true;
    const int64_t size = v.dtype == Dtype::f32 ? 4 : 2;
    reader[readers++] = {source, static_cast<const char*>(v.data) + sample * v.batch_stride * size, &v};
  }
  void use_noise(const StepArgs& a, int j, int64_t b) {
    if (used[kFromNoise + j]) return;
    used[kFromNoise + j] = true;
    stream[j].set(a.keys + row * a.key_stride_row + j * a.key_stride_noise + b * a.key_stride_b);
    noise[noises++] = j;
  }
};

inline int32_t row_of(const StepArgs& a, int64_t b, int64_t t) {
  if (a.row == nullptr) return a.row_index;
  const int64_t at = b * a.row_stride_b + t * a.row_stride_t;
  const int64_t r = a.row_is_64 ? static_cast<const int64_t*>(a.row)[at] : static_cast<const int32_t*>(a.row)[at];
  return r < 0 || r >= a.rows ? -1 : static_cast<int32_t>(r);
}

inline int64_t bank_index_of(const StepArgs& a, int64_t b, int m) {
  const int64_t at = b * a.bank_index_stride_b + m;
  return a.bank_index_is_64 ? static_cast<const int64_t*>(a.bank_index)[at] : static_cast<const int32_t*>(a.bank_index)[at];
}

// A coefficient times its factor, rounded once; a coefficient of zero stays zero whatever the factor.
inline float scaled(float coefficient, const float* factor) {
  return factor == nullptr || coefficient == 0.0f ? coefficient : coefficient * *factor;
}

inline void add_inputs(const StepArgs& a, Program& p, Sum& sum, const float* weights, int64_t b) {
  for (int k = 0; k < a.layout.inputs; ++k) {
    const float c = scaled(weights[k], a.scale ? a.scale + b * a.scale_stride_b + k * a.scale_stride_k : nullptr);
    if (c == 0.0f) continue;
    sum.add(k, c);
    p.use_view(k, a.in[k], b);
  }
}

inline void add_bank(const StepArgs& a, Program& p, Sum& sum, const float* weights, int64_t b) {
  for (int m = 0; m < a.layout.bank; ++m) {
    const float c = scaled(weights[m], a.bank_weight + b * a.bank_weight_stride_b + m);
    if (c == 0.0f) continue;
    sum.add(kFromBank + m, c);
    p.use_view(kFromBank + m, a.bank, bank_index_of(a, b, m));
  }
}

inline void set_mix(const StepArgs& a, Program& p, int target, const float* coef, int32_t flags, int64_t b) {
  Mix& mix = p.mix[target];
  mix = {(flags & kMaskInput << target) != 0, coef[a.layout.mask(target)], coef[a.layout.mask(target) + 1]};
  if (!mix.on) return;
  p.use_view(kFromMask, a.mask, b);
  if (mix.k0 != 0.0f) p.use_view(kFromKnown, a.known, b);
  if (mix.k1 != 0.0f) p.use_noise(a, p.mask_noise, b);
}

inline void compile(const StepArgs& a, int64_t b, int32_t row, Program& p) {
  const float* coef = a.coef + static_cast<int64_t>(row) * a.layout.width();
  const int32_t* meta = a.meta + static_cast<int64_t>(row) * kMetaWidth;
  const int32_t flags = meta[kFlags];
  p.row = row;
  p.slot = meta[kRingSlot] < 0 ? -1 : meta[kRingSlot];
  p.mask_noise = meta[kMaskNoise];
  p.readers = p.noises = 0;
  __builtin_memset(p.used, 0, sizeof p.used);

  p.has_d = p.slot >= 0;
  for (int i = 0; i < a.layout.outputs; ++i) p.has_d |= coef[a.layout.y_d(i)] != 0.0f;
  p.d.count = 0;
  p.clip = p.has_d && (flags & kClip) != 0;
  p.mix[1].on = false;
  if (p.has_d) {
    add_inputs(a, p, p.d, coef, b);
    add_bank(a, p, p.d, coef + a.layout.g(), b);
    const float* bounds = a.clip ? a.clip + b * a.clip_stride_b : coef + a.layout.clip();
    p.low = bounds[0], p.high = bounds[1], p.factor = bounds[2];
    set_mix(a, p, 1, coef, flags, b);
  }
  for (int i = 0; i < a.layout.outputs; ++i) {
    Sum& y = p.y[i];
    y.count = 0;
    add_inputs(a, p, y, coef + a.layout.y(i), b);
    const float a_d = coef[a.layout.y_d(i)];
    if (a_d != 0.0f) y.add(kFromD, a_d);
    add_bank(a, p, y, coef + a.layout.y_bank(i), b);
    const float* w = coef + a.layout.y_noise(i);
    for (int j = 0; j < a.layout.noises; ++j) {
      if (w[j] == 0.0f) continue;
      y.add(kFromNoise + j, w[j]);
      p.use_noise(a, j, b);
    }
    set_mix(a, p, 2 + i, coef, flags, b);
  }
  p.masked = meta[kMaskedInput];
  p.mix[0].on = false;
  if ((flags & kMaskInput) != 0 && p.used[p.masked]) set_mix(a, p, 0, coef, flags, b);
}

}  // namespace FASTDIFF_NAMESPACE
