// What an op demands of one tensor; each refuses in the words of fastdiff/checks.py.
#pragma once
#include <initializer_list>

#include "tensor.h"

namespace fastdiff {
namespace detail {

inline void need_dtype(const Tensor& t, int32_t dtype) {
  if (t.dtype != dtype) refuse(t.op, ": ", t, " is ", dtype_name(t.dtype), ": ", dtype_name(dtype), " is taken");
}

inline bool need_index(const Tensor& t) {
  if (t.dtype != kEnums.i32 && t.dtype != kEnums.i64) {
    refuse(t.op, ": ", t, " is ", dtype_name(t.dtype), ": int32 or int64 is taken");
  }
  return t.dtype == kEnums.i64;
}

inline void need_shape(const Tensor& t, std::initializer_list<int64_t> shape, const char* meaning) {
  bool same = t.dim == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) same = same && t.sizes[i++] == size;
  if (!same) {
    refuse(t.op, ": ", t, " has shape ", t.shape(), ": ", meaning, " = ",
           Tuple{shape.begin(), static_cast<int64_t>(shape.size())}, " is taken");
  }
}

inline void need_dense_last(const Tensor& t) {
  const int64_t last = t.dim - 1;
  if (t.sizes[last] > 1 && t.strides[last] != 1 && t.numel() > 0) {
    refuse(t.op, ": ", t, " has strides ", Tuple{t.strides, t.dim}, ": its last dimension must have stride 1");
  }
}

inline void need_contiguous(const Tensor& t) {
  int64_t next = 1;
  for (int64_t i = t.dim - 1; i >= 0; --i) {
    if (t.sizes[i] != 1 && t.strides[i] != next && t.numel() > 0) {
      refuse(t.op, ": ", t, " of shape ", t.shape(), " has strides ", Tuple{t.strides, t.dim}, ": contiguous is taken");
    }
    next *= t.sizes[i];
  }
}

// (count, *shape) like the sample; count < 0: any number of at least 1.
inline void need_samples(const Tensor& t, int64_t count, const Tensor& like, const int64_t* shape, int64_t dims, int lead = 1) {
  bool same = t.dim == dims + lead && (count < 0 ? t.sizes[0] >= 1 : t.sizes[lead - 1] == count);
  for (int64_t i = 0; same && i < dims; ++i) same = t.sizes[lead + i] == shape[i];
  if (!same) {
    refuse(t.op, ": ", t, " has shape ", t.shape(), ", ", like, " has ", like.shape(), ": ",
           lead == 2 ? "(slots, batch, *shape) with the same batch and shape" : count < 0 ? "(vectors, *shape) with the same shape"
                                                                                         : "one shape", " is taken");
  }
}

inline void need_device(const Tensor& t, const Tensor& like) {
  if (t && (t.device_type != like.device_type || t.device_index != like.device_index)) {
    refuse(t.op, ": ", t, " and ", like, " are on different devices: all tensors must be on one");
  }
}

}  // namespace detail
}  // namespace fastdiff
