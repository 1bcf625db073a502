// A CUDA runtime that launches nothing: it keeps what the last launch asked for, so that tests see the kernel, the grid
// and the very parameter bytes that a GPU would be given.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>

#include "../../csrc/cuda/launch.h"

namespace {
std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}
struct Launch {
  std::string kernel;
  uint32_t grid[3], block[3];
  uint64_t shared;
  void* stream;
  void* parameters;
} last;
int launches = 0, others = 0;
}  // namespace

extern "C" {
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernels()[host] = name;
}
// Never called by the launches; counted in case that changes.
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t) { return ++others; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return ++others, cudaErrorUnknown; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return ++others, cudaErrorUnknown; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return ++others, cudaErrorUnknown; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** parameters, size_t shared, cudaStream_t stream) {
  ++launches;
  last = {kernels()[function], {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, stream, nullptr};
  alignas(16) static char kept[4096];  // the parameter lives no longer than the call
  const size_t size = last.kernel.find("step_kernel") != std::string::npos ? sizeof(fastdiff::StepLaunch)
                      : last.kernel.find("normal_kernel") != std::string::npos ? sizeof(fastdiff::NormalLaunch)
                                                                               : 0;
  std::memcpy(kept, parameters[0], size);
  last.parameters = size ? kept : nullptr;
  return cudaSuccess;
}

// For the tests.
int real_step(const fastdiff::StepArgs* args, void* stream) { return fastdiff::launch_step(*args, stream); }
int real_normal(const fastdiff::NormalArgs* args, void* stream) { return fastdiff::launch_normal(*args, stream); }
int real_fold_in(const fastdiff::FoldInArgs* args, void* stream) { return fastdiff::launch_fold_in(*args, stream); }
int real_run_keys(const fastdiff::RunKeysArgs* args, void* stream) { return fastdiff::launch_run_keys(*args, stream); }
int real_raw_words(const fastdiff::RawWordsArgs* args, void* stream) { return fastdiff::launch_raw_words(*args, stream); }
int launch_count() { return launches; }
int other_count() { return others; }
const char* last_kernel() { return last.kernel.c_str(); }
const void* last_parameters() { return last.parameters; }
void last_shape(uint64_t* out) {
  for (int i = 0; i < 3; ++i) out[i] = last.grid[i], out[3 + i] = last.block[i];
  out[6] = last.shared;
  out[7] = reinterpret_cast<uint64_t>(last.stream);
}
}
