// Keys and raw words: small integer work, one counter at a time.
#pragma once
#include "../overlap.h"
#include "../philox.h"
#include "../tensor.h"

namespace fastdiff {

inline AtenTensorHandle new_cpu_tensor(const int64_t* sizes, int64_t dims, int32_t dtype) {
  int64_t strides[64], next = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = next;
    next *= sizes[i] > 1 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  FD_SHIM(aoti_torch_empty_strided(dims, sizes, strides, dtype, kEnums.cpu, 0, &handle));
  return handle;
}

inline int64_t* data_of(AtenTensorHandle handle) {
  void* data;
  FD_SHIM(aoti_torch_get_data_ptr(handle, &data));
  return static_cast<int64_t*>(data);
}

inline void need_int64(const char* op, const Tensor& t, int64_t dims, const char* shape) {
  if (t.dtype != kEnums.i64) refuse(op, ": ", t, " is ", dtype_name(t.dtype), ": int64 is taken");
  if (t.device_type != kEnums.cpu) refuse(op, ": ", t, " is not on the CPU, but other arguments are");
  if (dims >= 0 && t.dim != dims) refuse(op, ": ", t, " has shape ", t.shape(), ": ", shape, " is taken");
}

inline void need_keys(const char* op, const Tensor& t, int64_t dims) {
  need_int64(op, t, dims, "(samples, 2)");
  if (t.dim < 1 || t.sizes[t.dim - 1] != 2) refuse(op, ": ", t, " has shape ", t.shape(), ": a last dimension of 2 (seed, offset) is taken");
}

inline Key key_at(const int64_t* p, int64_t stride) { return {static_cast<uint64_t>(p[0]), static_cast<uint64_t>(p[stride])}; }

inline void put_key(int64_t* to, Key key) {
  to[0] = static_cast<int64_t>(key.seed);
  to[1] = static_cast<int64_t>(key.offset);
}

// keys (..., 2) with data (...) broadcast against each other.
inline AtenTensorHandle fold_in_all(const Tensor& keys, const Tensor& data) {
  need_keys("fold_in", keys, -1);
  need_int64("fold_in", data, -1, "");
  const int64_t key_dims = keys.dim - 1, dims = key_dims > data.dim ? key_dims : data.dim;
  if (dims > 62) refuse("fold_in: more than 62 dimensions");
  int64_t sizes[64], key_step[64], data_step[64], count = 1;
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t k = i - (dims - key_dims), d = i - (dims - data.dim);
    const int64_t key_size = k < 0 ? 1 : keys.sizes[k], data_size = d < 0 ? 1 : data.sizes[d];
    if (key_size != data_size && key_size != 1 && data_size != 1) {
      refuse("fold_in: keys has shape ", keys.shape(), ", data ", data.shape(), ": the leading dimensions of keys must broadcast with data");
    }
    sizes[i] = key_size == 1 ? data_size : key_size;
    key_step[i] = key_size == 1 ? 0 : keys.strides[k];
    data_step[i] = data_size == 1 ? 0 : data.strides[d];
    count *= sizes[i];
  }
  sizes[dims] = 2;
  const AtenTensorHandle handle = new_cpu_tensor(sizes, dims + 1, kEnums.i64);
  int64_t* out = data_of(handle);
  for (int64_t n = 0; n < count; ++n) {
    int64_t key_offset = 0, data_offset = 0, rest = n;
    for (int64_t i = dims - 1; i >= 0; --i) {
      key_offset += rest % sizes[i] * key_step[i];
      data_offset += rest % sizes[i] * data_step[i];
      rest /= sizes[i];
    }
    const Key key = key_at(static_cast<const int64_t*>(keys.data) + key_offset, keys.strides[key_dims]);
    put_key(out + 2 * n, fold_in(key, static_cast<uint64_t>(static_cast<const int64_t*>(data.data)[data_offset])));
  }
  return handle;
}

// fold_in(fold_in((seed_b, 0), stream), draw)
inline AtenTensorHandle run_keys(const Tensor& seeds, const Tensor& streams, const Tensor& draws) {
  need_int64("run_keys", seeds, 1, "(batch,)");
  need_int64("run_keys", streams, 2, "(rows, noise terms)");
  need_int64("run_keys", draws, 2, "(rows, noise terms)");
  if (draws.sizes[0] != streams.sizes[0] || draws.sizes[1] != streams.sizes[1]) {
    refuse("run_keys: draws has shape ", draws.shape(), ", streams ", streams.shape(), ": one shape is taken");
  }
  const int64_t N = streams.sizes[0], J = streams.sizes[1], B = seeds.sizes[0];
  const int64_t sizes[4] = {N, J, B, 2};
  const AtenTensorHandle handle = new_cpu_tensor(sizes, 4, kEnums.i64);
  int64_t* out = data_of(handle);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t j = 0; j < J; ++j) {
      const int64_t stream = static_cast<const int64_t*>(streams.data)[n * streams.strides[0] + j * streams.strides[1]];
      const int64_t draw = static_cast<const int64_t*>(draws.data)[n * draws.strides[0] + j * draws.strides[1]];
      for (int64_t b = 0; b < B; ++b, out += 2) {
        const uint64_t seed = static_cast<uint64_t>(static_cast<const int64_t*>(seeds.data)[b * seeds.strides[0]]);
        put_key(out, fold_in(fold_in(Key{seed, 0}, static_cast<uint64_t>(stream)), static_cast<uint64_t>(draw)));
      }
    }
  }
  return handle;
}

inline AtenTensorHandle raw_words(const Tensor& keys, int64_t count) {
  need_keys("raw_words", keys, 2);
  if (count < 0) refuse("raw_words: count is ", count, ": at least 0 is taken");
  const int64_t sizes[2] = {keys.sizes[0], count};
  const AtenTensorHandle handle = new_cpu_tensor(sizes, 2, kEnums.i32);
  uint32_t* out = reinterpret_cast<uint32_t*>(data_of(handle));
  for (int64_t b = 0; b < sizes[0]; ++b) {
    const Key key = key_at(static_cast<const int64_t*>(keys.data) + b * keys.strides[0], keys.strides[1]);
    for (int64_t e = 0; e < count; e += 4) {
      uint32_t words[4];
      philox_block(key, static_cast<uint64_t>(e / 4), words);
      for (int64_t j = e; j < count && j < e + 4; ++j) out[b * count + j] = words[j - e];
    }
  }
  return handle;
}

// The table of one row that normal_ is: out = 1 N(key).
inline void bind_normal(StepArgs& a, const Tensor& out, const Tensor& keys) {
  static const RowLayout layout{0, 1, 0, 1};
  static const int32_t meta[kMetaWidth] = {-1, 0, 0, 0};
  struct Coefficients {
    float values[16] = {};
    Coefficients() { values[layout.y_noise(0)] = 1.0f; }
  };
  static const Coefficients coef;
  need_keys("normal_", keys, 2);
  if (out.device_type != kEnums.cpu) refuse("normal_: out is not on the CPU, but keys is");
  if (out.dim < 1 || keys.sizes[0] != out.sizes[0]) {
    refuse("normal_: keys has shape ", keys.shape(), ", out ", out.shape(), ": (samples of out, 2) is taken");
  }
  if (keys.strides[1] != 1 && keys.sizes[0] > 0) refuse("normal_: keys has strides ", Tuple{keys.strides, 2}, ": its last dimension must have stride 1");
  a.out[0] = view_samples("normal_", out);
  a.batch = out.sizes[0];
  a.numel = a.batch == 0 ? 0 : out.numel() / a.batch;
  if (a.batch > 1 && a.out[0].batch_stride < a.numel) refuse("normal_: out overlaps itself: strides ", Tuple{out.strides, out.dim});
  if (a.numel > 0 && a.batch > 0 && overlap(extent(a.out[0], a.batch, a.numel), extent(keys))) refuse("normal_: out overlaps keys");
  a.tokens = 1;
  a.layout = layout;
  a.rows = 1;
  a.coef = coef.values;
  a.meta = meta;
  a.keys = static_cast<const int64_t*>(keys.data);
  a.key_stride_b = keys.strides[0];
}

}  // namespace fastdiff
