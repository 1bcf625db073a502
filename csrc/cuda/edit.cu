// The kernels of edit_ and their launches.
#include <cuda_runtime_api.h>

#include "edit.h"
#include "plan.h"

namespace FASTDIFF_NAMESPACE {

template <int V>
__global__ void __launch_bounds__(kThreads) squares_kernel(const __grid_constant__ SquaresLaunch launch) {
  const Thread thread = this_thread();
  const int64_t column = thread.column + thread.lane, chunk = column / kWarp;
  if (thread.b >= launch.batch || chunk >= launch.chunks) return;
  if (first_term(launch.terms, thread.b) == launch.terms.count) return;
  const int t = static_cast<int>(column % kWarp);
  float lanes[kHeld];
  squares<V>(launch, thread.b, chunk, t, lanes);
  const float sum = added<V>(lanes);
  if (t == 0) launch.sums[times(thread.b, launch.chunks) + chunk] = sum;
}

template <int E, Features features>
__global__ void __launch_bounds__(kThreads) edit_kernel(const __grid_constant__ EditLaunch launch) {
  edit_thread<E, features>(launch, this_thread(), [&](uint32_t b) {
    return Lane::root(sum_of_chunks(launch.sums + times(b, launch.chunks), launch.chunks));
  });
}

struct SquaresKernelOf {
  template <int V>
  const void* run() const {
    return reinterpret_cast<const void*>(squares_kernel<V>);
  }
};

struct EditKernelOf {
  template <int E, Features features>
  const void* run() const {
    return reinterpret_cast<const void*>(edit_kernel<E, features>);
  }
};

template <class Launch>
static int start(const void* kernel, Launch& launch, const Grid& g, void* stream) {
  void* parameters[] = {&launch};
  return cudaLaunchKernel(kernel, dim3(g.x, g.y, g.z), dim3(g.block_x, g.block_y), parameters, 0,
                          static_cast<cudaStream_t>(stream));
}

int launch_edit(const EditArgs& args, float* sums, void* stream) {
  EditPlan plan = plan_edit(args, sums);
  if (!plan.valid) return cudaErrorInvalidValue;
  if (plan.elements == 0) return cudaSuccess;
  if (args.terms.count) {
    const int code = start(choose_squares(plan, SquaresKernelOf{}), plan.squares, plan.squares_grid, stream);
    if (code != cudaSuccess) return code;
  } else if (plan.launch.in_place) {
    return cudaSuccess;
  }
  return start(choose_kernel(plan, EditKernelOf{}), plan.launch, plan.grid, stream);
}

}  // namespace FASTDIFF_NAMESPACE
