// A CUDA runtime that launches nothing: it keeps what every launch asked for, in order, so that tests see the kernel, the
// grid and the very parameter bytes that a GPU would be given.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.h"

namespace {
std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}
struct Launch {
  std::string kernel;
  uint64_t shape[8];  // grid, block, dynamic shared memory, stream
  std::vector<uint8_t> parameters;
};
std::vector<Launch> launches;
int others = 0;

// Every kernel takes one struct by value.
size_t parameter_size(const std::string& kernel) {
  const auto is = [&](const char* name) { return kernel.find(name) != std::string::npos; };
  return is("step_kernel")        ? sizeof(fastdiff::StepLaunch)
         : is("normal_kernel")    ? sizeof(fastdiff::NormalLaunch)
         : is("squares_kernel")   ? sizeof(fastdiff::SquaresLaunch)
         : is("edit_kernel")      ? sizeof(fastdiff::EditLaunch)
         : is("fold_in_kernel")   ? sizeof(fastdiff::FoldInArgs)
         : is("run_keys_kernel")  ? sizeof(fastdiff::RunKeysArgs)
         : is("raw_words_kernel") ? sizeof(fastdiff::RawWordsArgs)
                                  : 0;
}
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
  const std::string& kernel = kernels()[function];
  const uint8_t* bytes = static_cast<const uint8_t*>(parameters[0]);  // they live no longer than the call
  launches.push_back({kernel, {grid.x, grid.y, grid.z, block.x, block.y, block.z, shared, reinterpret_cast<uint64_t>(stream)},
                      {bytes, bytes + parameter_size(kernel)}});
  return cudaSuccess;
}

// For the tests.
int real_step(const fastdiff::StepArgs* args, void* stream) { return fastdiff::launch_step(*args, stream); }
int real_normal(const fastdiff::NormalArgs* args, void* stream) { return fastdiff::launch_normal(*args, stream); }
int real_edit(const fastdiff::EditArgs* args, float* sums, void* stream) { return fastdiff::launch_edit(*args, sums, stream); }
int real_fold_in(const fastdiff::FoldInArgs* args, void* stream) { return fastdiff::launch_fold_in(*args, stream); }
int real_run_keys(const fastdiff::RunKeysArgs* args, void* stream) { return fastdiff::launch_run_keys(*args, stream); }
int real_raw_words(const fastdiff::RawWordsArgs* args, void* stream) { return fastdiff::launch_raw_words(*args, stream); }
int launch_count() { return static_cast<int>(launches.size()); }
int other_count() { return others; }
void forget_launches() { launches.clear(); }
const char* launch_kernel(int i) { return launches[i].kernel.c_str(); }
void launch_shape(int i, uint64_t* out) { std::memcpy(out, launches[i].shape, sizeof launches[i].shape); }
uint64_t launch_size(int i) { return launches[i].parameters.size(); }
const void* launch_parameters(int i) { return launches[i].parameters.data(); }
}
