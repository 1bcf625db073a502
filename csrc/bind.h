// The arguments of fastdiff::step_ as StepArgs, shared by the CPU and the CUDA library. Everything that can be refused
// without reading tensor data is refused here, before any work; check_rows() reads the data too, for the CPU.
#pragma once
#include "need.h"
#include "overlap.h"
#include "row.h"
#include "tensor.h"

namespace fastdiff {

constexpr int kStepArguments = 16;

struct StepTensors {
  Owned<kMaxInputs + kMaxOutputs + 14> owned;
  int input_count, output_count;
  Tensor in[kMaxInputs], out[kMaxOutputs];
  Tensor ring{"ring", -1}, coef{"coef", -1}, meta{"meta", -1}, row{"row", -1}, keys{"keys", -1}, scale{"scale", -1};
  Tensor bank{"bank", -1}, bank_index{"bank_index", -1}, bank_weight{"bank_weight", -1}, clip{"clip", -1};
  Tensor known{"known", -1}, mask{"mask", -1}, status{"status", -1};
  int64_t row_index;

  // stack: the 16 arguments of the schema, in order. Takes them over.
  explicit StepTensors(const StableIValue* stack) {
    AtenTensorHandle in_handles[kMaxInputs], out_handles[kMaxOutputs];
    input_count = owned.list(stack[0], in_handles, kMaxInputs);
    output_count = owned.list(stack[1], out_handles, kMaxOutputs);
    Tensor* const rest[] = {&ring,       &coef,        &meta, &row,   nullptr, &keys,  &scale, &bank,
                            &bank_index, &bank_weight, &clip, &known, &mask,   &status};
    AtenTensorHandle handles[14] = {};
    for (int i = 0; i < 14; ++i) {
      if (i == 1 || i == 2) {
        handles[i] = owned.tensor(stack[2 + i]);
      } else if (rest[i] != nullptr) {
        handles[i] = owned.optional(stack[2 + i]);
      }
    }
    std::memcpy(&row_index, &stack[6], sizeof row_index);
    // From here on everything is owned, and reading may throw.
    if (input_count > kMaxInputs) refuse("step_: inputs holds ", input_count, " tensors: at most ", kMaxInputs, " are taken");
    if (output_count > kMaxOutputs) refuse("step_: outputs holds ", output_count, " tensors: at most ", kMaxOutputs, " are taken");
    for (int i = 0; i < input_count; ++i) {
      in[i].name = "inputs", in[i].index = i;
      in[i].read(in_handles[i], "step_");
    }
    for (int i = 0; i < output_count; ++i) {
      out[i].name = "outputs", out[i].index = i;
      out[i].read(out_handles[i], "step_");
    }
    for (int i = 0; i < 14; ++i) {
      if (handles[i] != nullptr) rest[i]->read(handles[i], "step_");
    }
  }

  const Tensor& sample() const { return output_count > 0 ? out[0] : input_count > 0 ? in[0] : ring; }
};

namespace detail {

// mask (B or 1, 1, ..., 1, trailing dimensions of shape)
inline void bind_mask(StepArgs& a, const Tensor& t, const Tensor& like, const int64_t* shape, int64_t dims) {
  bool fits = t.dim == dims + 1 && (t.sizes[0] == a.batch || t.sizes[0] == 1);
  int64_t lead = 0;
  while (fits && lead < dims && t.sizes[1 + lead] == 1) ++lead;
  for (int64_t i = lead; fits && i < dims; ++i) fits = t.sizes[1 + i] == shape[i];
  if (!fits) {
    refuse("step_: ", t, " has shape ", t.shape(), ", ", like, " has ", like.shape(),
           ": (batch or 1, 1, ..., 1, trailing dimensions of it) is taken");
  }
  a.mask = view_samples("step_", t);
  if (t.sizes[0] == 1) a.mask.batch_stride = 0;
  a.mask_period = 1;
  for (int64_t i = 0; i < dims; ++i) a.mask_period *= t.sizes[1 + i];
}

inline void bind_bank(StepArgs& a, const StepTensors& t, const Tensor& like, const int64_t* shape, int64_t dims) {
  const bool index = static_cast<bool>(t.bank_index), weight = static_cast<bool>(t.bank_weight);
  if (!t.bank || !index || !weight) {
    refuse("step_: bank, bank_index and bank_weight go together: given ", t.bank ? "bank " : "", index ? "bank_index " : "",
           weight ? "bank_weight" : "");
  }
  need_samples(t.bank, -1, like, shape, dims);
  a.bank = view_samples("step_", t.bank);
  a.bank_size = static_cast<int32_t>(t.bank.sizes[0]);
  if (t.bank.sizes[0] > INT32_MAX) refuse("step_: bank holds ", t.bank.sizes[0], " vectors: at most 2^31 - 1 are taken");
  a.bank_index_is_64 = need_index(t.bank_index);
  need_dtype(t.bank_weight, kEnums.f32);
  if (t.bank_index.dim != 2 || t.bank_index.sizes[0] != a.batch || t.bank_index.sizes[1] > kMaxBank) {
    refuse("step_: bank_index has shape ", t.bank_index.shape(), ": (batch, terms) = (", a.batch, ", 0 to ", kMaxBank, ") is taken");
  }
  const int64_t terms = t.bank_index.sizes[1];
  need_shape(t.bank_weight, {a.batch, terms}, "(batch, terms)");
  need_dense_last(t.bank_index);
  need_dense_last(t.bank_weight);
  a.layout.bank = static_cast<int>(terms);
  a.bank_index = t.bank_index.data;
  a.bank_index_stride_b = t.bank_index.strides[0];
  a.bank_weight = static_cast<const float*>(t.bank_weight.data);
  a.bank_weight_stride_b = t.bank_weight.strides[0];
}

inline void bind_row(StepArgs& a, const StepTensors& t, const Tensor& like) {
  a.tokens = 1;
  if (!t.row) {
    if (t.row_index < 0 || t.row_index >= a.rows) {
      refuse("step_: row_index is ", t.row_index, ": the table has rows 0 to ", a.rows - 1);
    }
    a.row_index = static_cast<int32_t>(t.row_index);
    return;
  }
  a.row = t.row.data;
  a.row_is_64 = need_index(t.row);
  if (t.row.dim >= 1 && t.row.dim <= 2 && t.row.sizes[0] == a.batch) {
    a.row_stride_b = t.row.strides[0];
    if (t.row.dim == 1) return;
    if (like.dim >= 2 && t.row.sizes[1] == like.sizes[&like == &t.ring ? 2 : 1]) {
      a.tokens = t.row.sizes[1];
      a.row_stride_t = t.row.strides[1];
      return;
    }
  }
  if (t.row.dim != 0) {
    refuse("step_: row has shape ", t.row.shape(), ", ", like, " has ", like.shape(),
           ": (), (batch,) or (batch, first dimension of a sample) is taken");
  }
}

inline void bind_keys(StepArgs& a, const Tensor& t) {
  need_dtype(t, kEnums.i64);
  if (t.dim != 4 || (t.sizes[0] != 1 && t.sizes[0] != a.rows) || t.sizes[2] != a.batch || t.sizes[3] != 2 || t.sizes[1] > kMaxNoises) {
    refuse("step_: keys has shape ", t.shape(), ": (rows or 1, noise terms, batch, 2) = (", a.rows, " or 1, 0 to ", kMaxNoises, ", ",
           a.batch, ", 2) is taken");
  }
  need_dense_last(t);
  a.layout.noises = static_cast<int>(t.sizes[1]);
  a.keys = static_cast<const int64_t*>(t.data);
  a.key_stride_row = t.sizes[0] == 1 ? 0 : t.strides[0];
  a.key_stride_noise = t.strides[1];
  a.key_stride_b = t.strides[2];
}

// Nothing that is written may meet anything else, except exactly.
inline void check_overlap(const StepArgs& a, const StepTensors& t) {
  const int ring = a.layout.inputs - a.listed, written = a.layout.outputs + ring;
  const auto view = [&](int i) -> const View& { return i < a.layout.outputs ? a.out[i] : a.in[a.listed + i - a.layout.outputs]; };
  const auto label = [&](int i) { return i < a.layout.outputs ? t.out[i] : t.ring; };
  for (int i = 0; i < written; ++i) {
    if (a.batch > 1 && view(i).batch_stride < a.numel) {
      refuse("step_: ", label(i), " overlaps itself: its samples of ", a.numel, " elements are ", view(i).batch_stride, " apart");
    }
  }
  const Tensor* const small[] = {&t.coef, &t.meta, &t.row, &t.keys, &t.scale, &t.bank_index, &t.bank_weight, &t.clip, &t.status};
  for (int i = 0; i < written; ++i) {
    const Extent here = extent(view(i), a.batch, a.numel);
    const auto meets = [&](const Tensor& other, const Extent& there) {
      if (overlap(here, there)) refuse("step_: ", label(i), " overlaps ", other, ": only an input may be overwritten, and only exactly");
    };
    for (int j = i + 1; j < written; ++j) meets(label(j), extent(view(j), a.batch, a.numel));
    for (int k = 0; k < a.listed; ++k) {
      if (!same_place(view(i), a.in[k], a.batch)) meets(t.in[k], extent(a.in[k], a.batch, a.numel));
    }
    if (t.known && !same_place(view(i), a.known, a.batch)) meets(t.known, extent(a.known, a.batch, a.numel));
    if (t.bank) meets(t.bank, extent(a.bank, a.bank_size, a.numel));
    if (t.mask) meets(t.mask, extent(a.mask, a.mask.batch_stride == 0 ? 1 : a.batch, a.mask_period));
    for (const Tensor* other : small) {
      if (*other && other->numel() > 0) meets(*other, extent(*other));
    }
  }
}

}  // namespace detail

// Everything about one call except what stands in the tensors. Nothing is to be done where batch or numel is 0.
inline StepArgs bind_step(const StepTensors& t) {
  using namespace detail;
  StepArgs a{};
  if (t.output_count == 0 && !t.ring) refuse("step_: outputs is empty and ring is None: nothing to write");
  const Tensor& like = t.sample();
  const int lead = &like == &t.ring ? 2 : 1;
  if (like.dim < lead) {
    refuse("step_: ", like, " has shape ", like.shape(), ": ", lead == 2 ? "(slots, batch, *shape)" : "(batch, *shape)", " is taken");
  }
  const int64_t* shape = like.sizes + lead;
  const int64_t dims = like.dim - lead;
  a.batch = like.sizes[lead - 1];
  a.numel = 1;
  for (int64_t i = 0; i < dims; ++i) a.numel *= shape[i];

  a.listed = t.input_count;
  for (int k = 0; k < t.input_count; ++k) {
    need_device(t.in[k], like);
    need_samples(t.in[k], a.batch, like, shape, dims);
    a.in[k] = view_samples("step_", t.in[k]);
  }
  for (int i = 0; i < t.output_count; ++i) {
    need_device(t.out[i], like);
    need_samples(t.out[i], a.batch, like, shape, dims);
    a.out[i] = view_samples("step_", t.out[i]);
  }
  int64_t slots = 0;
  if (t.ring) {
    need_device(t.ring, like);
    need_samples(t.ring, a.batch, like, shape, dims, 2);
    slots = t.ring.sizes[0];
    if (slots + t.input_count > kMaxInputs) {
      refuse("step_: inputs holds ", t.input_count, " tensors and ring ", slots, " slots: at most ", kMaxInputs, " together are taken");
    }
    const View view = view_samples("step_", t.ring, 2);
    for (int64_t s = 0; s < slots; ++s) {
      a.in[t.input_count + s] = view;
      a.in[t.input_count + s].data = static_cast<char*>(view.data) + s * t.ring.strides[0] * size_of(view.dtype);
    }
  }
  a.layout = {static_cast<int>(t.input_count + slots), t.output_count, 0, 0};

  for (const Tensor* other : {&t.coef, &t.meta, &t.row, &t.keys, &t.scale, &t.bank, &t.bank_index, &t.bank_weight, &t.clip, &t.known,
                              &t.mask, &t.status}) {
    need_device(*other, like);
  }
  if (t.bank || t.bank_index || t.bank_weight) bind_bank(a, t, like, shape, dims);
  need_dtype(t.coef, kEnums.f32);
  need_dtype(t.meta, kEnums.i32);
  if (t.coef.dim != 2 || t.coef.sizes[0] < 1 || t.coef.sizes[0] > INT32_MAX) {
    refuse("step_: coef has shape ", t.coef.shape(), ": (rows, width) with at least one row is taken");
  }
  a.rows = static_cast<int32_t>(t.coef.sizes[0]);
  if (t.keys) bind_keys(a, t.keys);
  if (t.coef.sizes[1] != a.layout.width()) {
    refuse("step_: coef has ", t.coef.sizes[1], " columns: ", a.layout.inputs, " inputs and ring slots, ", a.layout.outputs, " outputs, ",
           a.layout.bank, " bank terms and ", a.layout.noises, " noise terms take ", a.layout.width());
  }
  need_shape(t.meta, {a.rows, kMetaWidth}, "(rows, 4)");
  need_contiguous(t.coef);
  need_contiguous(t.meta);
  a.coef = static_cast<const float*>(t.coef.data);
  a.meta = static_cast<const int32_t*>(t.meta.data);
  bind_row(a, t, like);
  if (t.scale) {
    need_dtype(t.scale, kEnums.f32);
    need_shape(t.scale, {a.batch, a.layout.inputs}, "(batch, inputs and ring slots)");
    a.scale = static_cast<const float*>(t.scale.data);
    a.scale_stride_b = t.scale.strides[0];
    a.scale_stride_k = t.scale.strides[1];
  }
  if (t.clip) {
    need_dtype(t.clip, kEnums.f32);
    need_shape(t.clip, {a.batch, 3}, "(batch, 3)");
    need_dense_last(t.clip);
    a.clip = static_cast<const float*>(t.clip.data);
    a.clip_stride_b = t.clip.strides[0];
  }
  if (t.known) {
    need_samples(t.known, a.batch, like, shape, dims);
    a.known = view_samples("step_", t.known);
  }
  if (t.mask) bind_mask(a, t.mask, like, shape, dims);
  if (t.status) {
    need_dtype(t.status, kEnums.i32);
    need_shape(t.status, {2}, "(2,)");
    need_contiguous(t.status);
    a.status = static_cast<int32_t*>(t.status.data);
  }
  if (a.batch > 0 && a.numel > 0) check_overlap(a, t);
  return a;
}

}  // namespace fastdiff
