// The CUDA library of the project, csrc/cuda/library.cpp as it is, registered for CPU tensors under a name of its own:
//
//     torch.ops.fastdiff_cuda_recorded.step_(...)
//
// checks and binds its arguments and calls the real launcher. Linked with stub_runtime.cpp, that records the launch
// which the same call with CUDA tensors would make.
#define USE_CUDA
#include <Python.h>
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include <vector>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(fastdiff_cuda_recorded, CPU, m, recorded)

#include "../../csrc/cuda/library.cpp"

static std::vector<AtenTensorHandle> allocated;

// The CUDA side of libtorch, which a CPU build lacks.
extern "C" {
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = reinterpret_cast<void*>(0x5000);
  return 0;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }

// What an op allocates lives on: the launches that work in it run later.
AOTITorchError aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device_type,
                                        int32_t device_index, AtenTensorHandle* out) {
  static const auto real = reinterpret_cast<decltype(&aoti_torch_empty_strided)>(dlsym(RTLD_NEXT, "aoti_torch_empty_strided"));
  const AOTITorchError code = real(dims, sizes, strides, dtype, device_type, device_index, out);
  AtenTensorHandle kept;
  if (code == 0 && aoti_torch_new_tensor_handle(*out, &kept) == 0) allocated.push_back(kept);
  return code;
}
int allocated_count() { return static_cast<int>(allocated.size()); }
void* take_allocated() {  // a handle that the caller owns, the last one first
  AtenTensorHandle tensor = allocated.back();
  allocated.pop_back();
  return tensor;
}
}
