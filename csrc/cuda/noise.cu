// The kernels of normal_, fold_in, run_keys and raw_words, and their launches.
#include <cuda_runtime_api.h>

#include "noise.h"
#include "plan.h"

namespace FASTDIFF_NAMESPACE {

__device__ inline int64_t column_of(const Thread& t) { return t.column + t.lane; }

template <int E, Features features>
__global__ void __launch_bounds__(kThreads) normal_kernel(const __grid_constant__ NormalLaunch launch) {
  normal_thread<E, features>(launch, this_thread());
}

__global__ void __launch_bounds__(kThreads) fold_in_kernel(const __grid_constant__ FoldInArgs args) {
  fold_in_thread(args, column_of(this_thread()));
}

__global__ void __launch_bounds__(kThreads) run_keys_kernel(const __grid_constant__ RunKeysArgs args) {
  run_keys_thread(args, column_of(this_thread()));
}

__global__ void __launch_bounds__(kThreads) raw_words_kernel(const __grid_constant__ RawWordsArgs args) {
  const Thread t = this_thread();
  raw_words_thread(args, t.b, column_of(t) * 4);
}

template <class Launch>
static int start(const void* kernel, Launch launch, const Grid& g, void* stream) {
  void* parameters[] = {&launch};
  return cudaLaunchKernel(kernel, dim3(g.x, g.y, g.z), dim3(g.block_x, g.block_y), parameters, 0,
                          static_cast<cudaStream_t>(stream));
}

struct NormalKernelOf {
  template <int E, Features features>
  const void* run() const {
    return reinterpret_cast<const void*>(normal_kernel<E, features>);
  }
};

int launch_normal(const NormalArgs& args, void* stream) {
  const NormalPlan plan = plan_normal(args);
  if (args.batch == 0 || args.numel == 0) return cudaSuccess;
  if (plan.elements == 0) return cudaErrorInvalidValue;
  return start(choose_kernel(plan, NormalKernelOf{}), plan.launch, plan.grid, stream);
}

template <class Kernel, class Args>
static int start_flat(Kernel* kernel, const Args& args, int64_t batch, int64_t numel, int elements, void* stream) {
  if (batch == 0 || numel == 0) return cudaSuccess;
  Grid grid;
  if (!plan_grid(batch, numel, elements, grid)) return cudaErrorInvalidValue;
  return start(reinterpret_cast<const void*>(kernel), args, grid, stream);
}

int launch_fold_in(const FoldInArgs& args, void* stream) { return start_flat(fold_in_kernel, args, 1, args.count, 1, stream); }

int launch_run_keys(const RunKeysArgs& args, void* stream) {
  return start_flat(run_keys_kernel, args, 1, args.rows * args.noises * args.batch, 1, stream);
}

int launch_raw_words(const RawWordsArgs& args, void* stream) {
  return start_flat(raw_words_kernel, args, args.batch, args.count, 4, stream);
}

}  // namespace FASTDIFF_NAMESPACE
