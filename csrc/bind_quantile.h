// The arguments of quantile_; fastdiff/quantile_checks.py refuses the same. check_rows() reads the data too, for the CPU.
#pragma once
#include <cmath>

#include "need.h"
#include "overlap.h"
#include "quantile.h"

namespace fastdiff {

struct QuantileTensors {
  static constexpr const char* kOp = "quantile_";
  Owned<kMaxInputs + 5> owned;
  int input_count;
  Tensor in[kMaxInputs], out{"out", -1}, clip{"clip", -1}, coef{"coef", -1}, row{"row", -1}, scale{"scale", -1};
  int64_t row_index;
  double q, low, high;

  // stack: the 10 arguments of the schema, in order. Takes them over.
  explicit QuantileTensors(const StableIValue* stack) {
    AtenTensorHandle in_handles[kMaxInputs], handles[5];
    handles[0] = owned.optional(stack[0]);
    handles[1] = owned.optional(stack[1]);
    input_count = owned.list(stack[2], in_handles, kMaxInputs);
    handles[2] = owned.tensor(stack[3]);
    handles[3] = owned.optional(stack[4]);
    std::memcpy(&row_index, &stack[5], sizeof row_index);
    handles[4] = owned.optional(stack[6]);
    double* const numbers[] = {&q, &low, &high};
    for (int i = 0; i < 3; ++i) std::memcpy(numbers[i], &stack[7 + i], sizeof(double));
    // From here on everything is owned, and reading may throw.
    if (input_count < 1 || input_count > kMaxInputs) {
      refuse("quantile_: inputs holds ", input_count, " tensors: 1 to ", kMaxInputs, " are taken");
    }
    for (int i = 0; i < input_count; ++i) {
      in[i].name = "inputs", in[i].index = i;
      in[i].read(in_handles[i], kOp);
    }
    Tensor* const rest[] = {&out, &clip, &coef, &row, &scale};
    for (int i = 0; i < 5; ++i) {
      if (handles[i] != nullptr) rest[i]->read(handles[i], kOp);
    }
  }
};

namespace detail {

// Where the quantile q of n elements in ascending order lies; position() of fastdiff/reference/quantile.py is the same.
inline void set_position(QuantileArgs& a, int64_t n, double q) {
  double rank = q * static_cast<double>(n - 1);
  if (n <= int64_t{1} << 24) {  // volatile: rounded to float32, whatever the compiler keeps numbers in
    const volatile float rounded = static_cast<float>(q) * static_cast<float>(n - 1);
    rank = rounded;
  }
  a.below = static_cast<int64_t>(std::floor(rank));
  a.above = static_cast<int64_t>(std::ceil(rank));
  a.weight = static_cast<float>(rank - std::floor(rank));
}

inline void bind_written(const Tensor& written, int64_t batch, int64_t width) {
  need_dtype(written, kEnums.f32);
  if (width == 1) {
    need_shape(written, {batch}, "(batch,)");
  } else {
    need_shape(written, {batch, width}, "(batch, 3)");
    need_dense_last(written);
  }
  if (batch > 1 && written.strides[0] < width) {
    refuse("quantile_: ", written, " of shape ", written.shape(), " overlaps itself: it has strides ",
           Tuple{written.strides, written.dim});
  }
}

inline void need_own_place(const QuantileTensors& t, const QuantileArgs& a, const Tensor& written) {
  const Extent here = extent(written);
  const auto meets = [&](const Tensor& other, const Extent& there) {
    if (overlap(here, there)) refuse("quantile_: ", written, " overlaps ", other, ": it must stand elsewhere");
  };
  for (int k = 0; k < t.input_count; ++k) meets(t.in[k], extent(a.step.in[k], a.step.batch, a.step.numel));
  for (const Tensor* other : {&t.coef, &t.row, &t.scale}) {
    if (*other) meets(*other, extent(*other));
  }
}

}  // namespace detail

// Nothing is to be done where batch is 0.
inline QuantileArgs bind_quantile(const QuantileTensors& t) {
  using namespace detail;
  QuantileArgs args{};
  StepArgs& a = args.step;
  if (!t.out && !t.clip) refuse("quantile_: out and clip are None: nothing to write");
  const Tensor& like = t.in[0];
  for (int k = 1; k < t.input_count; ++k) need_device(t.in[k], like);
  for (const Tensor* other : {&t.out, &t.clip, &t.coef, &t.row, &t.scale}) need_device(*other, like);
  a.numel = 1;
  for (int64_t i = 1; i < like.dim; ++i) a.numel *= like.sizes[i];
  if (like.dim < 1 || a.numel == 0) {
    refuse("quantile_: inputs[0] has shape ", like.shape(), ": (batch, *shape) with at least one element a sample is taken");
  }
  a.batch = like.sizes[0];
  a.tokens = 1;
  a.listed = t.input_count;
  a.layout = {t.input_count, 0, 0, 0};
  for (int k = 0; k < t.input_count; ++k) {
    need_samples(t.in[k], a.batch, like, like.sizes + 1, like.dim - 1);
    a.in[k] = view_samples("quantile_", t.in[k]);
  }
  if (t.out) {
    bind_written(t.out, a.batch, 1);
    args.out = static_cast<float*>(t.out.data);
    args.out_stride = t.out.strides[0];
  }
  if (t.clip) {
    bind_written(t.clip, a.batch, 3);
    args.clip = static_cast<float*>(t.clip.data);
    args.clip_stride_b = t.clip.strides[0];
  }
  need_dtype(t.coef, kEnums.f32);
  if (t.coef.dim != 2 || t.coef.sizes[0] < 1 || t.coef.sizes[0] > INT32_MAX || t.coef.sizes[1] < t.input_count) {
    refuse("quantile_: coef has shape ", t.coef.shape(), ": (rows, ", t.input_count, " or more) with at least one row is taken");
  }
  need_dense_last(t.coef);
  a.rows = static_cast<int32_t>(t.coef.sizes[0]);
  a.coef = static_cast<const float*>(t.coef.data);
  args.coef_stride = t.coef.strides[0];
  if (t.scale) {
    need_dtype(t.scale, kEnums.f32);
    need_shape(t.scale, {a.batch, a.layout.inputs}, "(batch, inputs)");
    a.scale = static_cast<const float*>(t.scale.data);
    a.scale_stride_b = t.scale.strides[0];
    a.scale_stride_k = t.scale.strides[1];
  }
  if (!(t.q >= 0 && t.q <= 1)) refuse("quantile_: q is ", t.q, ": 0 to 1 is taken");
  if (!(t.low > 0 && t.high > 0)) refuse("quantile_: low is ", t.low, ", high is ", t.high, ": limits above 0 are taken");
  args.low = static_cast<float>(t.low), args.high = static_cast<float>(t.high);
  set_position(args, a.numel, t.q);
  if (a.batch > 0) {
    if (t.out) need_own_place(t, args, t.out);
    if (t.clip) need_own_place(t, args, t.clip);
    if (t.out && t.clip && overlap(extent(t.out), extent(t.clip))) {
      refuse("quantile_: clip overlaps out: it must stand elsewhere");
    }
  }
  if (t.row) {
    a.row = t.row.data;
    a.row_is_64 = need_index(t.row);
    if (t.row.dim != 0 && !(t.row.dim == 1 && t.row.sizes[0] == a.batch)) {
      refuse("quantile_: row has shape ", t.row.shape(), ": () or (batch,) = (", a.batch, ",) is taken");
    }
    a.row_stride_b = t.row.dim == 1 ? t.row.strides[0] : 0;
  } else {
    if (t.row_index < 0 || t.row_index >= a.rows) {
      refuse("quantile_: row_index is ", t.row_index, ": coef has rows 0 to ", a.rows - 1);
    }
    a.row_index = static_cast<int32_t>(t.row_index);
  }
  return args;
}

// CPU only: every row is one of the table's.
inline void check_rows(const QuantileArgs& args) {
  const StepArgs& a = args.step;
  for (int64_t b = 0; a.row != nullptr && b < (a.row_stride_b == 0 ? 1 : a.batch); ++b) {
    const int64_t at = b * a.row_stride_b;
    const int64_t r = a.row_is_64 ? static_cast<const int64_t*>(a.row)[at] : static_cast<const int32_t*>(a.row)[at];
    if (r < 0 || r >= a.rows) refuse("quantile_: row holds ", r, " for sample ", b, ": coef has rows 0 to ", a.rows - 1);
  }
}

}  // namespace fastdiff
