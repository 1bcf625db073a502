// One row of a plan for the elements of one GPU thread. fastdiff/reference/step.py is the definition.
//
// The sums of d and of every y run side by side over the inputs, so that each input is read once and none is kept; the
// inputs of a group are asked for together, so that their loads are under way at the same time. Which terms
// there are is the same for a whole block (but for (B, T) rows and tiny samples): the branches on coefficients, dtypes
// and layouts do not diverge.
#pragma once
#include "launch.h"
#include "thread.h"

namespace FASTDIFF_NAMESPACE {

constexpr int kGroup = 2;  // inputs asked for together

// The row's mask: mix(v) = fma(m, v, fma(-m, k, k)), k = k0 known + k1 N(key). What the targets share is read once.
template <int E, Features features>
struct Mask {
  uint32_t targets;  // bit 0 the input, 1 d, 2 + i y_i
  const float* mixes;
  float m[E], known[E], noise[E];

  FD_HD void prepare(const StepLaunch& launch, const Place& p, uint32_t flags, const float* row, uint32_t r, uint32_t noise_term) {
    const StepArgs& a = launch.args;
    const int count = 2 + a.layout.outputs;
    targets = a.mask.data ? flags / kMaskInput & ((1u << count) - 1) : 0;
    mixes = row + a.layout.mask(0);
    if (!targets) return;
    bool reads = false, draws = false;  // a target beyond the count has no bit
    FD_UNROLL
    for (int t = 0; t < 2 + kMaxOutputs; ++t) {
      if (!has(targets, t)) continue;
      reads |= mixes[2 * t] != 0.0f;
      draws |= mixes[2 * t + 1] != 0.0f;
    }
    Raw<E> raw;
    if (reads && a.known.data) {
      load<E, features>(a.known, p, has(launch.aligned, kAlignedKnown), raw);
      widen<E, features>(raw, a.known.dtype, known);
    } else {
      clear(known);
    }
    if (draws && a.keys && noise_term < static_cast<uint32_t>(a.layout.noises)) {
      const int64_t* key = a.keys + times(r, a.key_stride_row) + times(noise_term, a.key_stride_noise) + times(p.b, a.key_stride_b);
      draw<E, features>({static_cast<uint64_t>(key[0]), static_cast<uint64_t>(key[1])}, p, noise);
    } else {
      clear(noise);
    }
    Place q = p;
    q.e0 = p.e0 - quotient(p.e0, a.mask_period) * a.mask_period;
    if (has(launch.aligned, kAlignedMask)) {
      q.lo = 0, q.hi = E;  // its period is one of whole threads
      load<E, features>(a.mask, q, true, raw);
    } else {  // one by one; a thread's elements that are not there have a mask as well, which is a period's
      int64_t at = q.e0;
      FD_UNROLL
      for (int l = 0; l < E; ++l) {
        const int64_t from = times(p.b, a.mask.batch_stride) + a.mask.at(at);
        if (all_f32(E, features) || a.mask.dtype == Dtype::f32) {
          raw.w[l] = static_cast<const uint32_t*>(a.mask.data)[from];
        } else {
          const uint32_t half = static_cast<const uint16_t*>(a.mask.data)[from];
          raw.w[l / 2] = l % 2 ? raw.w[l / 2] | half << 16 : half;
        }
        if (++at == a.mask_period) at = 0;
      }
    }
    widen<E, features>(raw, a.mask.dtype, m);
  }

  FD_HD void mix(int target, float (&v)[E]) const {
    if (!has(targets, target)) return;
    float k[E];
    clear(k);
    add(k, mixes[2 * target], known);
    add(k, mixes[2 * target + 1], noise);
    FD_UNROLL
    for (int l = 0; l < E; ++l) v[l] = Lane::fma(m[l], v[l], Lane::fma(-m[l], k[l], k[l]));
  }
};

// sum_m g_m q_bm V_m added to up to `n` sums, whose weights start at row[first + i * stride].
template <int E, Features features, int n>
FD_HD inline void steer(const StepLaunch& launch, const Place& p, const float* row, int first, int stride, int count,
                        float (&sums)[n][E]) {
  const StepArgs& a = launch.args;
  FD_ROLLED
  for (int term = 0; term < a.layout.bank; ++term) {
    const float q = a.bank_weight[times(p.b, a.bank_weight_stride_b) + term];
    float c[n];
    bool any = false;
    FD_UNROLL
    for (int i = 0; i < n; ++i) {
      c[i] = i < count ? scaled(row[first + i * stride + term], q) : 0.0f;
      any |= c[i] != 0.0f;
    }
    if (!any) continue;
    const int64_t at = times(p.b, a.bank_index_stride_b) + term;
    int64_t index = a.bank_index_is_64 ? static_cast<const int64_t*>(a.bank_index)[at]
                                       : static_cast<const int32_t*>(a.bank_index)[at];
    if (index < 0 || index >= a.bank_size) {
      report_flag(a.status, kBadBank);
      index = index < 0 ? 0 : a.bank_size - 1;
    }
    Place vector = p;
    vector.b = static_cast<uint32_t>(index);
    Raw<E> raw;
    float v[E];
    load<E, features>(a.bank, vector, has(launch.aligned, kAlignedBank), raw);
    widen<E, features>(raw, a.bank.dtype, v);
    FD_UNROLL
    for (int i = 0; i < n; ++i) add(sums[i], c[i], v);
  }
}

// The elements [p.lo, p.hi) of a thread, which belong to one token. kOut outputs, or up to three where it is three.
template <int E, Features features, int kOut>
FD_HD inline void apply_row(const StepLaunch& launch, const Place& p, int64_t token) {
  constexpr bool kFull = features == kEverything, kBank = kFull || features == kWithBank;
  const StepArgs& a = launch.args;
  RowLayout layout = a.layout;
  if (kOut < kMaxOutputs) layout.outputs = kOut;  // known when compiled: no sums for outputs that are not there

  int64_t wanted = a.row_index;
  if (a.row) {
    const int64_t at = times(p.b, a.row_stride_b) + token * a.row_stride_t;
    wanted = a.row_is_64 ? static_cast<const int64_t*>(a.row)[at] : static_cast<const int32_t*>(a.row)[at];
  }
  uint32_t r = static_cast<uint32_t>(wanted);
  if (wanted < 0 || wanted >= a.rows) {
    report_flag(a.status, kBadRow);
    r = wanted < 0 ? 0 : a.rows - 1;
  }
  const float* row = a.coef + times(r, layout.width());
  const int32_t* meta = a.meta + times(r, kMetaWidth);
  const int32_t slot = meta[kRingSlot], flags = meta[kFlags];

  Mask<E, features> mask;
  int32_t masked = -1;
  if (kFull) {
    mask.prepare(launch, p, static_cast<uint32_t>(flags), row, r, static_cast<uint32_t>(meta[kMaskNoise]));
    if (has(mask.targets, 0)) masked = meta[kMaskedInput];
  }

  float d[1][E], y[kOut][E];
  clear(d[0]);
  FD_UNROLL
  for (int i = 0; i < kOut; ++i) clear(y[i]);

  FD_ROLLED
  for (int first = 0; first < layout.inputs; first += kGroup) {
    float weight[kGroup][1 + kOut];  // of d, then of the y_i
    bool needed[kGroup];
    Raw<E> raw[kGroup];
    FD_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      const int k = first + j;
      needed[j] = false;
      if (k >= layout.inputs) continue;
      const float s = a.scale ? a.scale[times(p.b, a.scale_stride_b) + k * a.scale_stride_k] : 1.0f;
      FD_UNROLL
      for (int i = 0; i <= kOut; ++i) {
        weight[j][i] = i <= layout.outputs ? scaled(row[i ? layout.y(i - 1) + k : k], s) : 0.0f;
        needed[j] |= weight[j][i] != 0.0f;
      }
      if (needed[j]) load<E, features>(a.in[k], p, has(launch.aligned, k), raw[j]);
    }
    FD_UNROLL
    for (int j = 0; j < kGroup; ++j) {
      if (!needed[j]) continue;
      float v[E];
      widen<E, features>(raw[j], a.in[first + j].dtype, v);
      if (kFull && first + j == masked) mask.mix(0, v);
      add(d[0], weight[j][0], v);
      FD_UNROLL
      for (int i = 0; i < kOut; ++i) add(y[i], weight[j][1 + i], v);
    }
  }

  if (kBank) steer<E, features>(launch, p, row, layout.g(), 0, 1, d);
  if (flags & kClip) {  // compares and selects: NaN stays NaN
    const float* bounds = a.clip ? a.clip + times(p.b, a.clip_stride_b) : row + layout.clip();
    const float lo = bounds[0], hi = bounds[1], factor = bounds[2];
    FD_UNROLL
    for (int l = 0; l < E; ++l) {
      float v = d[0][l];
      v = v < lo ? lo : v;
      v = v > hi ? hi : v;
      d[0][l] = Lane::mul(v, factor);
    }
  }
  if (kFull) mask.mix(1, d[0]);

  const bool keeps = slot >= 0 && slot < layout.inputs - a.listed;
  bool bad = false;
  if (keeps) {
    const bool nans = maybe_nan(d[0]);
    if (nans) bad = any_nan(p, d[0]);
    store<E, features>(a.in[a.listed + slot], p, has(launch.aligned, a.listed + slot), nans, d[0]);
  }

  FD_UNROLL
  for (int i = 0; i < kOut; ++i)
    if (i < layout.outputs) add(y[i], row[layout.y_d(i)], d[0]);
  if (kBank) steer<E, features>(launch, p, row, layout.y_bank(0), layout.y_width(), layout.outputs, y);
  FD_ROLLED
  for (int j = 0; j < layout.noises; ++j) {
    float w[kOut];
    bool any = false;
    FD_UNROLL
    for (int i = 0; i < kOut; ++i) {
      w[i] = i < layout.outputs ? row[layout.y_noise(i) + j] : 0.0f;
      any |= w[i] != 0.0f;
    }
    if (!any) continue;
    const int64_t* key = a.keys + times(r, a.key_stride_row) + j * a.key_stride_noise + times(p.b, a.key_stride_b);
    const uint64_t seed = static_cast<uint64_t>(key[0]), offset = static_cast<uint64_t>(key[1]);
    FD_UNROLL
    for (int q = 0; q < E; q += 4) {
      float z[4];
      draw_four(seed, offset + block_of<E, features>(p, q), z);
      FD_UNROLL
      for (int i = 0; i < kOut; ++i) {
        if (w[i] == 0.0f) continue;
        FD_UNROLL
        for (int l = 0; l < 4; ++l) y[i][q + l] = Lane::fma(w[i], z[l], y[i][q + l]);
      }
    }
  }

  FD_UNROLL
  for (int i = 0; i < kOut; ++i) {
    if (i >= layout.outputs) continue;
    if (kFull) mask.mix(2 + i, y[i]);
    const bool nans = maybe_nan(y[i]);
    if (nans) bad |= any_nan(p, y[i]);
    store<E, features>(a.out[i], p, has(launch.aligned, kAlignedOut + i), nans, y[i]);
  }
  if (bad) report_row(a.status, static_cast<int32_t>(r));
}

template <int E, Features features, int kOut>
FD_HD inline void step_thread(const StepLaunch& launch, const Thread& thread) {
  const StepArgs& a = launch.args;
  Place p = place<E, features>(thread, a.numel, launch.inner);
  if (p.b >= a.batch || p.e0 >= a.numel) return;
  if constexpr (features == kEverything) {
    const int count = p.hi;
    for (int64_t token = quotient(p.e0, launch.token_numel); p.lo < count; ++token, p.lo = p.hi) {
      const int64_t end = (token + 1) * launch.token_numel - p.e0;
      p.hi = end < count ? static_cast<int>(end) : count;
      apply_row<E, features, kOut>(launch, p, token);
    }
  } else {
    apply_row<E, features, kOut>(launch, p, 0);
  }
}

}  // namespace FASTDIFF_NAMESPACE
