// The kernels of step_ and their launch.
#include <cuda_runtime_api.h>

#include "plan.h"
#include "step.h"

namespace FASTDIFF_NAMESPACE {

// Blocks a multiprocessor that the registers must leave room for: the most that takes no spill on any target.
constexpr int blocks(int elements, Features features, int outputs) {
  if (features == kEverything) return 4;
  if (features == kWithBank) return elements == 4 ? 6 : 4;
  if (features == kDense) return elements == 8 ? (outputs == 1 ? 8 : 6) : outputs < 3 ? 4 : 3;
  return elements == 4 ? 7 : 4;
}

template <int E, Features features, int kOut>
__global__ void __launch_bounds__(kThreads, blocks(E, features, kOut)) step_kernel(const __grid_constant__ StepLaunch launch) {
  step_thread<E, features, kOut>(launch, this_thread());
}

struct KernelOf {
  template <int E, Features features, int kOut>
  const void* run() const {
    return reinterpret_cast<const void*>(step_kernel<E, features, kOut>);
  }
};

int launch_step(const StepArgs& args, void* stream) {
  StepPlan plan = plan_step(args);
  if (!plan.valid) return cudaErrorInvalidValue;
  if (plan.elements == 0) return cudaSuccess;
  void* parameters[] = {&plan.launch};
  const Grid& g = plan.grid;
  return cudaLaunchKernel(choose_kernel(plan, KernelOf{}), dim3(g.x, g.y, g.z), dim3(g.block_x, g.block_y), parameters, 0,
                          static_cast<cudaStream_t>(stream));
}

const char* launch_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace FASTDIFF_NAMESPACE
