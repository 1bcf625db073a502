// The CUDA library of the project, csrc/cuda/library.cpp as it is, registered for CPU tensors under a name of its own:
//
//     torch.ops.fastdiff_cuda_recorded.step_(...)
//
// checks and binds its arguments and calls the real launcher. Linked with stub_runtime.cpp, that records the launch
// which the same call with CUDA tensors would make.
#define USE_CUDA
#include <Python.h>
#include <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(fastdiff_cuda_recorded, CPU, m, recorded)

#include "../../csrc/cuda/library.cpp"

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
}
