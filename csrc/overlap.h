// Which samples, dtypes and memory ranges go together: a tensor of samples as a View, and whether two views overlap.
#pragma once
#include "row.h"
#include "tensor.h"

namespace fastdiff {

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

inline Dtype float_dtype(const char* op, const Tensor& t) {
  const Enums& e = kEnums;
  if (t.dtype == e.f32) return Dtype::f32;
  if (t.dtype == e.f16) return Dtype::f16;
  if (t.dtype == e.bf16) return Dtype::bf16;
  refuse(op, ": ", t, " is ", dtype_name(t.dtype), ": float32, float16 or bfloat16 is taken");
}

// The view of (count, *shape) that starts `lead` dimensions into t. Sizes of 1 put no condition on their strides.
inline View view_samples(const char* op, const Tensor& t, int lead = 1) {
  View view{t.data, 0, 1, 1, float_dtype(op, t)};
  const int64_t* size = t.sizes + lead;
  const int64_t* stride = t.strides + lead;
  const int64_t dims = t.dim - lead;
  int64_t n = 1;
  for (int64_t i = 0; i < dims; ++i) n *= size[i];
  view.inner = n > 0 ? n : 1;
  view.batch_stride = lead > 0 && t.sizes[lead - 1] > 1 ? t.strides[lead - 1] : n;
  if (n <= 1) return view;

  int64_t next = 1;
  bool dense = true;
  for (int64_t i = dims - 1; i >= 0; --i) {
    dense &= size[i] == 1 || stride[i] == next;
    next *= size[i];
  }
  if (dense) return view;
  if (dims == 3 || dims == 4) {
    next = size[0];
    dense = size[0] == 1 || stride[0] == 1;
    for (int64_t i = dims - 1; i >= 1; --i) {
      dense &= size[i] == 1 || stride[i] == next;
      next *= size[i];
    }
    if (dense) {
      view.groups = size[0];
      view.inner = n / size[0];
      return view;
    }
  }
  refuse(op, ": ", t, " of shape ", t.shape(), " has strides ", Tuple{t.strides, t.dim},
         ": each sample must be dense, contiguous or channels-last");
}

// `count` pieces of `bytes` bytes, `stride` bytes apart.
struct Extent {
  const char* begin;
  int64_t count, bytes, stride;
  const char* end() const { return begin + (count - 1) * stride + bytes; }
};

inline Extent extent(const View& v, int64_t count, int64_t numel) {
  const int64_t size = size_of(v.dtype);
  return {static_cast<const char*>(v.data), count, numel * size, v.batch_stride * size};
}

// All bytes from the first to the last element of a small tensor.
inline Extent extent(const Tensor& t) {
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim; ++i) last += (t.sizes[i] - 1) * t.strides[i];
  return {static_cast<const char*>(t.data), 1, (last + 1) * t.element_size(), 0};
}

inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }  // b > 0

// Whether any piece of a meets any piece of b: views interleaved in one buffer do not.
inline bool overlap(const Extent& a, const Extent& b) {
  if (a.end() <= b.begin || b.end() <= a.begin) return false;
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t from = a.begin + i * a.stride - b.begin;  // pieces j of b with j stride in (from - b.bytes, from + a.bytes)
    if (b.stride == 0 || b.count == 1) {
      if (from < b.bytes && from + a.bytes > 0) return true;
      continue;
    }
    const int64_t first = floor_div(from - b.bytes, b.stride) + 1, last = floor_div(from + a.bytes - 1, b.stride);
    if (last >= 0 && first < b.count && first <= last) return true;
  }
  return false;
}

// The same elements at the same places, so that each is read before it is written.
inline bool same_place(const View& a, const View& b, int64_t batch) {
  return a.data == b.data && a.dtype == b.dtype && a.groups == b.groups && (batch == 1 || a.batch_stride == b.batch_stride);
}

}  // namespace fastdiff
