// Arguments of normal_, fold_in, run_keys and raw_words as the plain structs of launch.h; what is wrong is refused here.
#pragma once
#include "../overlap.h"
#include "../tensor.h"
#include "launch.h"

namespace fastdiff {

inline const int64_t* int64_data(const char* op, const Tensor& t, int64_t dims, const char* shape) {
  if (t.dtype != kEnums.i64) refuse(op, ": ", t, " is ", dtype_name(t.dtype), ": int64 is taken");
  if (dims >= 0 && t.dim != dims) refuse(op, ": ", t, " has shape ", t.shape(), ": ", shape, " is taken");
  return static_cast<const int64_t*>(t.data);
}

inline const int64_t* key_data(const char* op, const Tensor& t, int64_t dims) {
  const int64_t* data = int64_data(op, t, dims, "(samples, 2)");
  if (t.dim < 1 || t.sizes[t.dim - 1] != 2) {
    refuse(op, ": ", t, " has shape ", t.shape(), ": a last dimension of 2 (seed, offset) is taken");
  }
  return data;
}

inline NormalArgs bind_normal(const Tensor& out, const Tensor& keys) {
  NormalArgs a{};
  a.keys = key_data("normal_", keys, 2);
  if (out.dim < 1 || keys.sizes[0] != out.sizes[0]) {
    refuse("normal_: keys has shape ", keys.shape(), ", out ", out.shape(), ": (samples of out, 2) is taken");
  }
  a.key_stride_b = keys.strides[0];
  a.key_stride_pair = keys.strides[1];
  a.out = view_samples("normal_", out);
  a.batch = out.sizes[0];
  a.numel = a.batch == 0 ? 0 : out.numel() / a.batch;
  if (a.batch > 1 && a.out.batch_stride < a.numel) {
    refuse("normal_: out overlaps itself: strides ", Tuple{out.strides, out.dim});
  }
  if (a.batch > 0 && a.numel > 0 && overlap(extent(a.out, a.batch, a.numel), extent(keys))) refuse("normal_: out overlaps keys");
  return a;
}

// keys (..., 2) and data (...) are broadcast against each other.
inline FoldInArgs bind_fold_in(const Tensor& keys, const Tensor& data) {
  FoldInArgs a{};
  a.keys = key_data("fold_in", keys, -1);
  a.data = int64_data("fold_in", data, -1, "");
  const int64_t key_dims = keys.dim - 1;
  a.dims = key_dims > data.dim ? key_dims : data.dim;
  if (a.dims > kMaxDims) {
    refuse("fold_in: keys has shape ", keys.shape(), ", data ", data.shape(), ": at most ", kMaxDims,
           " leading dimensions are taken");
  }
  a.key_stride_pair = keys.strides[key_dims];
  a.count = 1;
  for (int64_t i = 0; i < a.dims; ++i) {
    const int64_t k = i - (a.dims - key_dims), d = i - (a.dims - data.dim);
    const int64_t key_size = k < 0 ? 1 : keys.sizes[k], data_size = d < 0 ? 1 : data.sizes[d];
    if (key_size != data_size && key_size != 1 && data_size != 1) {
      refuse("fold_in: keys has shape ", keys.shape(), ", data ", data.shape(),
             ": the leading dimensions of keys must broadcast with data");
    }
    a.size[i] = key_size == 1 ? data_size : key_size;
    a.key_stride[i] = key_size == 1 ? 0 : keys.strides[k];
    a.data_stride[i] = data_size == 1 ? 0 : data.strides[d];
    a.count *= a.size[i];
  }
  return a;
}

inline RunKeysArgs bind_run_keys(const Tensor& seeds, const Tensor& streams, const Tensor& draws) {
  RunKeysArgs a{};
  a.seeds = int64_data("run_keys", seeds, 1, "(batch,)");
  a.streams = int64_data("run_keys", streams, 2, "(rows, noise terms)");
  a.draws = int64_data("run_keys", draws, 2, "(rows, noise terms)");
  if (draws.sizes[0] != streams.sizes[0] || draws.sizes[1] != streams.sizes[1]) {
    refuse("run_keys: draws has shape ", draws.shape(), ", streams ", streams.shape(), ": one shape is taken");
  }
  a.rows = streams.sizes[0];
  a.noises = streams.sizes[1];
  a.batch = seeds.sizes[0];
  a.seed_stride = seeds.strides[0];
  for (int i = 0; i < 2; ++i) {
    a.stream_stride[i] = streams.strides[i];
    a.draw_stride[i] = draws.strides[i];
  }
  return a;
}

inline RawWordsArgs bind_raw_words(const Tensor& keys, int64_t count) {
  RawWordsArgs a{};
  a.keys = key_data("raw_words", keys, 2);
  if (count < 0) refuse("raw_words: count is ", count, ": at least 0 is taken");
  a.batch = keys.sizes[0];
  a.count = count;
  a.key_stride_b = keys.strides[0];
  a.key_stride_pair = keys.strides[1];
  return a;
}

}  // namespace fastdiff
