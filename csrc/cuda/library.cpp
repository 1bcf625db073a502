// fastdiff._C_cuda: the CUDA implementations of the ops whose schemas fastdiff._C defines. Arguments are checked as on
// the CPU, except what stands in tensors on the device: the kernels clamp such indices and set a flag. Nothing here
// waits for the device, and step_ and normal_ allocate nothing: they can be captured in a CUDA graph. So can edit_, whose sums of
// chunks stand in memory of torch's allocator. project_, lift_ and quantile_ are left to Triton.
#ifndef USE_CUDA
#define USE_CUDA  // declares what libtorch has for CUDA in its stable headers
#endif
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "../bind.h"
#include "../bind_vectors.h"
#include "bind_keys.h"
#include "launch.h"

namespace fastdiff {
namespace {

// The device of an op's tensors is the current one while this lives, and its current stream is where work goes.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) {
    FD_SHIM(aoti_torch_get_current_cuda_stream(t.device_index, &stream));
    FD_SHIM(aoti_torch_create_device_guard(t.device_index, &guard_));
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() { aoti_torch_delete_device_guard(guard_); }
  void* stream = nullptr;

 private:
  DeviceGuardHandle guard_ = nullptr;
};

void launched(const char* op, int code) {
  if (code != 0) throw std::runtime_error(std::string(op) + ": the kernel was not launched: " + launch_error(code));
}

void step(StableIValue* stack, uint64_t, uint64_t) {
  const StepTensors tensors(stack);
  const StepArgs args = bind_step(tensors);
  if (args.batch == 0 || args.numel == 0) return;
  const OnDevice device(tensors.sample());
  launched("step_", launch_step(args, device.stream));
}

// Takes `count` tensors off the stack and reads them.
template <int count>
struct Taken {
  Owned<count> owned;
  Tensor t[count];
  Taken(StableIValue* stack, const char* op, const char* const (&names)[count]) {
    AtenTensorHandle handles[count];
    for (int i = 0; i < count; ++i) handles[i] = owned.tensor(stack[i]);
    for (int i = 0; i < count; ++i) {
      t[i].name = names[i];
      t[i].read(handles[i], op);
    }
    for (int i = 1; i < count; ++i) {
      if (t[i].device_type != t[0].device_type || t[i].device_index != t[0].device_index) {
        refuse(op, ": ", t[i], " and ", t[0], " are on different devices: all tensors must be on one");
      }
    }
  }
};

void normal(StableIValue* stack, uint64_t, uint64_t) {
  const Taken<2> taken(stack, "normal_", {"out", "keys"});
  const NormalArgs args = bind_normal(taken.t[0], taken.t[1]);
  const OnDevice device(taken.t[0]);
  launched("normal_", launch_normal(args, device.stream));
}

// A new dense tensor on the device of `like`; the caller returns it through the stack.
AtenTensorHandle empty(const Tensor& like, const int64_t* sizes, int64_t dims, int32_t dtype) {
  int64_t strides[kMaxDims + 2];
  int64_t next = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = next;
    next *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  FD_SHIM(aoti_torch_empty_strided(dims, sizes, strides, dtype, like.device_type, like.device_index, &handle));
  return handle;
}

// Owns a result until it is on the stack.
class Result {
 public:
  Result(const Tensor& like, const int64_t* sizes, int64_t dims, int32_t dtype) : handle_(empty(like, sizes, dims, dtype)) {}
  Result(const Result&) = delete;
  Result& operator=(const Result&) = delete;
  ~Result() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  void* data() const {
    void* at;
    FD_SHIM(aoti_torch_get_data_ptr(handle_, &at));
    return at;
  }
  void give(StableIValue* slot) {
    *slot = 0;
    std::memcpy(slot, &handle_, sizeof handle_);
    handle_ = nullptr;
  }

 private:
  AtenTensorHandle handle_;
};

void edit(StableIValue* stack, uint64_t, uint64_t) {
  const EditTensors tensors(stack);
  const EditArgs args = bind_edit(tensors);
  if (args.batch == 0 || args.numel == 0) return;
  const OnDevice device(tensors.at[0]);
  // Given back before the kernels have run: whoever gets it next in this stream comes after them.
  const int64_t count = edit_sums(args);
  const Result sums(tensors.at[0], &count, 1, kEnums.f32);
  launched("edit_", launch_edit(args, static_cast<float*>(sums.data()), device.stream));
}

void fold_in_op(StableIValue* stack, uint64_t, uint64_t) {
  const Taken<2> taken(stack, "fold_in", {"keys", "data"});
  FoldInArgs args = bind_fold_in(taken.t[0], taken.t[1]);
  const OnDevice device(taken.t[0]);
  int64_t sizes[kMaxDims + 1];
  for (int64_t i = 0; i < args.dims; ++i) sizes[i] = args.size[i];
  sizes[args.dims] = 2;
  Result out(taken.t[0], sizes, args.dims + 1, kEnums.i64);
  args.out = static_cast<int64_t*>(out.data());
  launched("fold_in", launch_fold_in(args, device.stream));
  out.give(&stack[0]);
}

void run_keys_op(StableIValue* stack, uint64_t, uint64_t) {
  const Taken<3> taken(stack, "run_keys", {"seeds", "streams", "draws"});
  RunKeysArgs args = bind_run_keys(taken.t[0], taken.t[1], taken.t[2]);
  const OnDevice device(taken.t[0]);
  const int64_t sizes[] = {args.rows, args.noises, args.batch, 2};
  Result out(taken.t[0], sizes, 4, kEnums.i64);
  args.out = static_cast<int64_t*>(out.data());
  launched("run_keys", launch_run_keys(args, device.stream));
  out.give(&stack[0]);
}

void raw_words_op(StableIValue* stack, uint64_t, uint64_t) {
  int64_t count;
  std::memcpy(&count, &stack[1], sizeof count);
  const Taken<1> taken(stack, "raw_words", {"keys"});
  RawWordsArgs args = bind_raw_words(taken.t[0], count);
  const OnDevice device(taken.t[0]);
  const int64_t sizes[] = {args.batch, args.count};
  Result out(taken.t[0], sizes, 2, kEnums.i32);
  args.out = static_cast<uint32_t*>(out.data());
  launched("raw_words", launch_raw_words(args, device.stream));
  out.give(&stack[0]);
}

}  // namespace
}  // namespace fastdiff

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) {
  m.impl("step_", fastdiff::step);
  m.impl("normal_", fastdiff::normal);
  m.impl("edit_", fastdiff::edit);
  m.impl("fold_in", fastdiff::fold_in_op);
  m.impl("run_keys", fastdiff::run_keys_op);
  m.impl("raw_words", fastdiff::raw_words_op);
}

// `import fastdiff._C_cuda` registers the implementations by loading the library; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C_cuda() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
