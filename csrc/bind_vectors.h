// The arguments of project_, lift_ and edit_, shared by the CPU and the CUDA library; fastdiff/vector_checks.py refuses the same.
// check_used() and check_rows() read the data too, for the CPU.
#pragma once
#include "need.h"
#include "overlap.h"
#include "reduce.h"

namespace fastdiff {

// Tensors of one op, read once from the dispatcher's stack. optional: a bit for each argument that may be None.
template <int kCount>
struct VectorTensors {
  Owned<kCount> owned;
  Tensor at[kCount];

  VectorTensors(const StableIValue* stack, const char* op, const char* const (&names)[kCount], unsigned optional) {
    AtenTensorHandle handles[kCount];
    for (int i = 0; i < kCount; ++i) handles[i] = optional >> i & 1 ? owned.optional(stack[i]) : owned.tensor(stack[i]);
    for (int i = 0; i < kCount; ++i) {  // from here on everything is owned, and reading may throw
      at[i].op = op, at[i].name = names[i];
      if (handles[i] != nullptr) at[i].read(handles[i], op);
    }
    for (int i = 1; i < kCount; ++i) detail::need_device(at[i], at[0]);
  }
};

namespace detail {

inline int64_t sample_size(const Tensor& t) {
  if (t.dim < 1) refuse(t.op, ": ", t, " has shape (): (batch, *shape) is taken");
  int64_t n = 1;
  for (int64_t i = 1; i < t.dim; ++i) n *= t.sizes[i];
  return n;
}

// Vectors (V, *shape) float32 of the samples' shape, at least one where there is a term.
inline View bind_vectors(Terms& terms, const Tensor& t, const Tensor& like) {
  need_dtype(t, kEnums.f32);
  bool same = t.dim == like.dim && t.sizes[0] >= (terms.count > 0 ? 1 : 0);
  for (int64_t i = 1; same && i < t.dim; ++i) same = t.sizes[i] == like.sizes[i];
  if (!same) {
    refuse(t.op, ": ", t, " has shape ", t.shape(), ", ", like, " has ", like.shape(), ": (vectors, *shape) with the same shape is taken");
  }
  if (t.sizes[0] > INT32_MAX) refuse(t.op, ": ", t, " holds ", t.sizes[0], " vectors: at most 2^31 - 1 are taken");
  terms.vectors = static_cast<int32_t>(t.sizes[0]);
  return view_samples(t.op, t);
}

inline void bind_index(Terms& terms, const Tensor& t, const Tensor& vectors, int64_t batch) {
  if (t) {
    terms.index_is_64 = need_index(t);
    need_shape(t, {batch, terms.count}, "(batch, terms)");
    need_dense_last(t);
    terms.index = t.data;
    terms.index_stride_b = t.strides[0];
  } else if (terms.count > terms.vectors) {
    refuse(t.op, ": index is None and ", vectors, " holds ", terms.vectors, " vectors: ", terms.count, " terms take as many");
  }
}

inline void bind_weight(Terms& terms, const Tensor& t, int64_t batch) {
  need_dtype(t, kEnums.f32);
  if (t.dim != 2 || t.sizes[0] != batch || t.sizes[1] > kMaxWeights) {
    refuse(t.op, ": weight has shape ", t.shape(), ": (batch, terms) = (", batch, ", 0 to ", kMaxWeights, ") is taken");
  }
  need_dense_last(t);
  terms.count = static_cast<int32_t>(t.sizes[1]);
  terms.weight = static_cast<const float*>(t.data);
  terms.weight_stride_b = t.strides[0];
}

// Of a table with dense rows each row, of another small tensor all that lies between its ends.
inline Extent rows_of(const Tensor& t) {
  if (t.dim != 2) return extent(t);
  const int64_t size = t.element_size();
  return {static_cast<const char*>(t.data), t.sizes[0], t.sizes[1] * size, t.strides[0] * size};
}

// `out`, which is `here`, meets nothing of what is read.
inline void need_apart(const Tensor& out, const Extent& here, const Tensor& other, const Extent& there) {
  if (other && other.numel() > 0 && overlap(here, there)) refuse(out.op, ": out overlaps ", other, ": out must stand elsewhere");
}

inline void need_own_places(const Tensor& out, const View& v, int64_t batch, int64_t numel) {
  if (batch > 1 && v.batch_stride < numel) {
    refuse(out.op, ": out of shape ", out.shape(), " overlaps itself: it has strides ", Tuple{out.strides, out.dim});
  }
}

}  // namespace detail

struct ProjectTensors : VectorTensors<8> {
  static constexpr const char* kNames[] = {"out", "x", "basis", "index", "gain", "offset", "weight", "row"};
  int64_t row_index;
  explicit ProjectTensors(const StableIValue* stack) : VectorTensors<8>(stack, "project_", kNames, 0xC8) {
    std::memcpy(&row_index, &stack[8], sizeof row_index);
  }
};

struct LiftTensors : VectorTensors<4> {
  static constexpr const char* kNames[] = {"out", "basis", "index", "weight"};
  explicit LiftTensors(const StableIValue* stack) : VectorTensors<4>(stack, "lift_", kNames, 0x4) {}
};

struct EditTensors : VectorTensors<5> {
  static constexpr const char* kNames[] = {"out", "h", "bank", "index", "weight"};
  explicit EditTensors(const StableIValue* stack) : VectorTensors<5>(stack, "edit_", kNames, 0x8) {}
};

// Nothing is to be done where batch or terms is 0.
inline ProjectArgs bind_project(const ProjectTensors& t) {
  using namespace detail;
  const Tensor &out = t.at[0], &x = t.at[1], &basis = t.at[2], &index = t.at[3], &weight = t.at[6], &row = t.at[7];
  ProjectArgs a{};
  a.numel = sample_size(x);
  a.batch = x.sizes[0];
  a.x = view_samples("project_", x);
  need_dtype(out, kEnums.f32);
  if (out.dim != 2 || out.sizes[0] != a.batch || out.sizes[1] > INT32_MAX) {
    refuse("project_: out has shape ", out.shape(), ", x has ", x.shape(), ": (batch, terms) with the same batch is taken");
  }
  a.out = static_cast<float*>(out.data);
  a.out_stride_b = out.strides[0], a.out_stride_m = out.strides[1];
  a.terms.count = static_cast<int32_t>(out.sizes[1]);
  a.basis = bind_vectors(a.terms, basis, x);
  bind_index(a.terms, index, basis, a.batch);
  const Tensor& gain = t.at[4];
  for (const Tensor* table : {&gain, &t.at[5]}) {
    need_dtype(*table, kEnums.f32);
    if (table->dim != 2 || table->sizes[0] < 1 || table->sizes[0] > INT32_MAX || table->sizes[1] != a.terms.vectors ||
        table->sizes[0] != gain.sizes[0]) {
      refuse("project_: ", *table, " has shape ", table->shape(), ", gain ", gain.shape(), ", basis ", basis.shape(),
             ": (rows, vectors) with at least one row, the same for both, is taken");
    }
    need_dense_last(*table);
  }
  a.rows = static_cast<int32_t>(gain.sizes[0]);
  a.gain = static_cast<const float*>(gain.data);
  a.gain_stride = gain.strides[0];
  a.offset = static_cast<const float*>(t.at[5].data);
  a.offset_stride = t.at[5].strides[0];
  if (weight) {
    need_dtype(weight, kEnums.f32);
    need_shape(weight, {a.batch, a.terms.count}, "(batch, terms)");
    need_dense_last(weight);
    a.terms.weight = static_cast<const float*>(weight.data);
    a.terms.weight_stride_b = weight.strides[0];
  }
  if (row) {
    a.row = row.data;
    a.row_is_64 = need_index(row);
    if (row.dim != 0 && !(row.dim == 1 && row.sizes[0] == a.batch)) {
      refuse("project_: row has shape ", row.shape(), ", x has ", x.shape(), ": () or (batch,) is taken");
    }
    a.row_stride_b = row.dim == 1 ? row.strides[0] : 0;
  } else {
    if (t.row_index < 0 || t.row_index >= a.rows) {
      refuse("project_: row_index is ", t.row_index, ": gain has rows 0 to ", a.rows - 1);
    }
    a.row_index = static_cast<int32_t>(t.row_index);
  }

  const int64_t M = a.terms.count;
  if (a.batch == 0 || M == 0) return a;
  // Values that are neither in one place nor between each other's.
  const bool turned = a.batch > 1 && M > 1 && a.out_stride_b < a.out_stride_m;
  const int64_t inner = turned ? a.batch : M, inner_step = turned ? a.out_stride_b : a.out_stride_m;
  const int64_t outer = turned ? M : a.batch, outer_step = turned ? a.out_stride_m : a.out_stride_b;
  const int64_t last = inner > 1 ? (inner - 1) * inner_step : 0;
  if ((inner > 1 && inner_step < 1) || (outer > 1 && outer_step <= last)) {
    refuse("project_: out of shape ", out.shape(), " overlaps itself: it has strides ", Tuple{out.strides, out.dim});
  }
  const Extent here = turned || (M > 1 && inner_step > 1) ? extent(out)
                      : Extent{reinterpret_cast<const char*>(a.out), a.batch, 4 * M, 4 * (a.batch > 1 ? outer_step : M)};
  if (a.numel > 0) {
    need_apart(out, here, x, extent(a.x, a.batch, a.numel));
    need_apart(out, here, basis, extent(a.basis, a.terms.vectors, a.numel));
  }
  for (int i = 3; i < 8; ++i) {
    if (t.at[i]) need_apart(out, here, t.at[i], rows_of(t.at[i]));
  }
  return a;
}

// Nothing is to be done where batch or numel is 0.
inline LiftArgs bind_lift(const LiftTensors& t) {
  using namespace detail;
  const Tensor &out = t.at[0], &basis = t.at[1], &index = t.at[2], &weight = t.at[3];
  LiftArgs a{};
  need_dtype(out, kEnums.f32);
  a.numel = sample_size(out);
  a.batch = out.sizes[0];
  a.out = view_samples("lift_", out);
  bind_weight(a.terms, weight, a.batch);
  a.basis = bind_vectors(a.terms, basis, out);
  bind_index(a.terms, index, basis, a.batch);
  if (a.batch == 0 || a.numel == 0) return a;
  need_own_places(out, a.out, a.batch, a.numel);
  const Extent here = extent(a.out, a.batch, a.numel);
  need_apart(out, here, basis, extent(a.basis, a.terms.vectors, a.numel));
  if (index) need_apart(out, here, index, rows_of(index));
  need_apart(out, here, weight, rows_of(weight));
  return a;
}

// Nothing is to be done where batch or numel is 0. out may stand exactly where h does.
inline EditArgs bind_edit(const EditTensors& t) {
  using namespace detail;
  const Tensor &out = t.at[0], &h = t.at[1], &bank = t.at[2], &index = t.at[3], &weight = t.at[4];
  EditArgs a{};
  a.numel = sample_size(out);
  a.batch = out.sizes[0];
  a.out = view_samples("edit_", out);
  sample_size(h);
  a.h = view_samples("edit_", h);
  bool same = h.dim == out.dim;
  for (int64_t i = 0; same && i < h.dim; ++i) same = h.sizes[i] == out.sizes[i];
  if (!same) refuse("edit_: h has shape ", h.shape(), ", out has ", out.shape(), ": one shape is taken");
  bind_weight(a.terms, weight, a.batch);
  a.bank = bind_vectors(a.terms, bank, out);
  bind_index(a.terms, index, bank, a.batch);
  if (a.batch == 0 || a.numel == 0) return a;
  need_own_places(out, a.out, a.batch, a.numel);
  const Extent here = extent(a.out, a.batch, a.numel);
  if (!same_place(a.out, a.h, a.batch)) need_apart(out, here, h, extent(a.h, a.batch, a.numel));
  need_apart(out, here, bank, extent(a.bank, a.terms.vectors, a.numel));
  if (index) need_apart(out, here, index, rows_of(index));
  need_apart(out, here, weight, rows_of(weight));
  return a;
}

// CPU only: every index that a weight uses is that of a vector.
inline void check_used(const char* op, const Terms& terms, const char* vectors, int64_t batch) {
  if (terms.index == nullptr) return;
  for (int64_t b = 0; b < batch; ++b) {
    for (int m = 0; m < terms.count; ++m) {
      const int64_t v = terms.vector(b, m);
      if ((v < 0 || v >= terms.vectors) && terms.used(b, m)) {
        refuse(op, ": index[", b, ", ", m, "] is ", v, ": ", vectors, " holds vectors 0 to ", terms.vectors - 1);
      }
    }
  }
}

// CPU only: every row is one of the tables.
inline void check_rows(const ProjectArgs& a) {
  for (int64_t b = 0; a.row != nullptr && b < (a.row_stride_b == 0 ? 1 : a.batch); ++b) {
    const int64_t at = b * a.row_stride_b;
    const int64_t r = a.row_is_64 ? static_cast<const int64_t*>(a.row)[at] : static_cast<const int32_t*>(a.row)[at];
    if (r < 0 || r >= a.rows) refuse("project_: row holds ", r, " for sample ", b, ": gain has rows 0 to ", a.rows - 1);
  }
}

}  // namespace fastdiff
