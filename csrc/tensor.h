// Arguments of an op as they arrive over libtorch's stable ABI: owned handles, read once, and errors in plain words.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>

namespace fastdiff {

// Python sees a ValueError.
template <class... Parts>
[[noreturn]] __attribute__((noinline, cold)) void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline void check(AOTITorchError error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string("fastdiff: libtorch failed in ") + what);
}
#define FD_SHIM(call) ::fastdiff::check(call, #call)

// The numbers that this libtorch gives to dtypes and devices.
struct Enums {
  int32_t f32 = aoti_torch_dtype_float32(), f16 = aoti_torch_dtype_float16(), bf16 = aoti_torch_dtype_bfloat16();
  int32_t f64 = aoti_torch_dtype_float64(), i32 = aoti_torch_dtype_int32(), i64 = aoti_torch_dtype_int64();
  int32_t u8 = aoti_torch_dtype_uint8(), i8 = aoti_torch_dtype_int8(), i16 = aoti_torch_dtype_int16();
  int32_t boolean = aoti_torch_dtype_bool();
  int32_t cpu = aoti_torch_device_type_cpu(), cuda = aoti_torch_device_type_cuda();
  int32_t strided = aoti_torch_layout_strided();
};
inline const Enums kEnums;

inline const char* dtype_name(int32_t dtype) {
  const Enums& e = kEnums;
  return dtype == e.f32 ? "float32" : dtype == e.f16 ? "float16" : dtype == e.bf16 ? "bfloat16" : dtype == e.f64 ? "float64"
       : dtype == e.i32 ? "int32" : dtype == e.i64 ? "int64" : dtype == e.i16 ? "int16" : dtype == e.i8 ? "int8"
       : dtype == e.u8 ? "uint8" : dtype == e.boolean ? "bool" : "another dtype";
}

// A tuple as Python prints it.
struct Tuple {
  const int64_t* values;
  int64_t count;
};
inline std::ostream& operator<<(std::ostream& s, const Tuple& t) {
  s << "(";
  for (int64_t i = 0; i < t.count; ++i) s << (i ? ", " : "") << t.values[i];
  return s << (t.count == 1 ? ",)" : ")");
}

// What a kernel needs to know of a tensor, borrowed from its handle. `op`, `name` and `index` are for messages.
struct Tensor {
  AtenTensorHandle handle = nullptr;
  const char* op = "fastdiff";
  const char* name = nullptr;
  int index = -1;
  int32_t dtype = 0, device_type = 0, device_index = 0;
  int64_t dim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  void* data = nullptr;

  Tensor() = default;
  Tensor(const char* name, int index) : name(name), index(index) {}
  explicit operator bool() const { return handle != nullptr; }
  Tuple shape() const { return {sizes, dim}; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t i = 0; i < dim; ++i) n *= sizes[i];
    return n;
  }
  int64_t element_size() const {
    const Enums& e = kEnums;
    return dtype == e.f32 || dtype == e.i32 ? 4 : dtype == e.f16 || dtype == e.bf16 ? 2 : dtype == e.i64 ? 8
         : static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
  }

  void read(AtenTensorHandle given, const char* caller) {
    handle = given;
    op = caller;
    int32_t layout;
    FD_SHIM(aoti_torch_get_layout(given, &layout));
    if (layout != kEnums.strided) refuse(op, ": ", *this, " is sparse or of another layout: a strided tensor is taken");
    int64_t *size, *stride;
    FD_SHIM(aoti_torch_get_dim(given, &dim));
    FD_SHIM(aoti_torch_get_sizes(given, &size));
    FD_SHIM(aoti_torch_get_strides(given, &stride));
    sizes = size, strides = stride;
    FD_SHIM(aoti_torch_get_dtype(given, &dtype));
    FD_SHIM(aoti_torch_get_device_type(given, &device_type));
    if (device_type != kEnums.cpu) FD_SHIM(aoti_torch_get_device_index(given, &device_index));
    FD_SHIM(aoti_torch_get_data_ptr(given, &data));
  }

  friend std::ostream& operator<<(std::ostream& s, const Tensor& t) {
    s << t.name;
    if (t.index >= 0) s << "[" << t.index << "]";
    return s;
  }
};

// Takes over what the dispatcher put on the stack, so that every handle is deleted however the op ends. Arguments are
// to be taken in order of the schema, and all of them before anything can throw.
template <int kCapacity>
class Owned {
 public:
  Owned() = default;
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() {
    for (int i = 0; i < count_; ++i) aoti_torch_delete_tensor_object(handles_[i]);
  }

  static AtenTensorHandle pointer(StableIValue value) {
    AtenTensorHandle handle;
    std::memcpy(&handle, &value, sizeof handle);
    return handle;
  }
  AtenTensorHandle tensor(StableIValue value) { return handles_[count_++] = pointer(value); }
  AtenTensorHandle optional(StableIValue value) {
    StableIValue* inner;
    std::memcpy(&inner, &value, sizeof inner);
    if (inner == nullptr) return nullptr;
    const AtenTensorHandle handle = tensor(*inner);
    delete inner;  // as torch/csrc/stable does for this target version
    return handle;
  }
  // Fills at most `most` handles and returns how many the list holds; what is beyond is deleted at once.
  int list(StableIValue value, AtenTensorHandle* out, int most) {
    StableListHandle list;
    std::memcpy(&list, &value, sizeof list);
    size_t size = 0;
    torch_list_size(list, &size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      if (torch_list_get_item(list, i, &item) != 0) continue;
      if (i < static_cast<size_t>(most)) {
        out[i] = tensor(item);
      } else {
        aoti_torch_delete_tensor_object(pointer(item));
      }
    }
    torch_delete_list(list);
    return static_cast<int>(size);
  }

 private:
  AtenTensorHandle handles_[kCapacity];
  int count_ = 0;
};

}  // namespace fastdiff
