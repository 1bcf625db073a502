// The CUDA kernels on a CPU: plan.h decides the launch, and every thread of every block of its grid runs in turn.
// The bodies are the very functions that the kernels in csrc/cuda call; only the IEEE operations have host versions.
#include "../../csrc/cuda/noise.h"
#include "../../csrc/cuda/plan.h"
#include "../../csrc/cuda/step.h"

#include <cstddef>

namespace fastdiff {
namespace {

template <class Body>
void each_thread(const Grid& g, const Body& thread) {
  for (int64_t z = 0; z < g.z; ++z)
    for (int64_t y = 0; y < g.y; ++y)
      for (int64_t x = 0; x < g.x; ++x)
        for (unsigned ty = 0; ty < g.block_y; ++ty)
          for (unsigned tx = 0; tx < g.block_x; ++tx)
            thread(Thread{static_cast<uint32_t>((z * g.y + y) * g.block_y + ty), x * g.block_x, tx, g.block_x});
}

using StepThread = void(const StepLaunch&, const Thread&);
struct ThreadOf {
  template <int E, Features features, int kOut>
  StepThread* run() const {
    return step_thread<E, features, kOut>;
  }
};

using NormalThread = void(const NormalLaunch&, const Thread&);
struct NormalThreadOf {
  template <int E, Features features>
  NormalThread* run() const {
    return normal_thread<E, features>;
  }
};

template <class Body>
int flat(int64_t batch, int64_t numel, int elements, const Body& thread) {
  Grid grid;
  if (batch == 0 || numel == 0) return 0;
  if (!plan_grid(batch, numel, elements, grid)) return 1;
  each_thread(grid, thread);
  return 0;
}

}  // namespace

// The names and results of launch.h, so that whatever calls a launch can be linked with this file instead of the GPU's.
int launch_step(const StepArgs& args, void*) {
  const StepPlan plan = plan_step(args);
  if (!plan.valid) return 1;
  if (plan.elements == 0) return 0;
  StepThread* const thread = choose_kernel(plan, ThreadOf{});
  each_thread(plan.grid, [&](const Thread& t) { thread(plan.launch, t); });
  return 0;
}

int launch_normal(const NormalArgs& args, void*) {
  const NormalPlan plan = plan_normal(args);
  if (plan.elements == 0) return 0;
  NormalThread* const thread = choose_kernel(plan, NormalThreadOf{});
  each_thread(plan.grid, [&](const Thread& t) { thread(plan.launch, t); });
  return 0;
}

int launch_fold_in(const FoldInArgs& a, void*) {
  return flat(1, a.count, 1, [&](const Thread& t) { fold_in_thread(a, t.column + t.lane); });
}
int launch_run_keys(const RunKeysArgs& a, void*) {
  return flat(1, a.rows * a.noises * a.batch, 1, [&](const Thread& t) { run_keys_thread(a, t.column + t.lane); });
}
int launch_raw_words(const RawWordsArgs& a, void*) {
  return flat(a.batch, a.count, 4, [&](const Thread& t) { raw_words_thread(a, t.b, (t.column + t.lane) * 4); });
}

}  // namespace fastdiff

using namespace fastdiff;

extern "C" {

int emulate_step(const StepArgs* args) { return launch_step(*args, nullptr); }
int emulate_normal(const NormalArgs* args) { return launch_normal(*args, nullptr); }
int emulate_fold_in(const FoldInArgs* args) { return launch_fold_in(*args, nullptr); }
int emulate_run_keys(const RunKeysArgs* args) { return launch_run_keys(*args, nullptr); }
int emulate_raw_words(const RawWordsArgs* args) { return launch_raw_words(*args, nullptr); }

// What cuda_args.py must agree with.
void emulate_layout(int64_t* out) {
  const int64_t values[] = {sizeof(View), sizeof(StepArgs), offsetof(StepArgs, coef), offsetof(StepArgs, in), offsetof(StepArgs, mask),
                            offsetof(StepArgs, mask_period), sizeof(NormalArgs), sizeof(FoldInArgs), sizeof(RunKeysArgs),
                            sizeof(RawWordsArgs), sizeof(StepLaunch), sizeof(StepPlan)};
  for (size_t i = 0; i < sizeof values / sizeof *values; ++i) out[i] = values[i];
}

// How a step would be launched: elements a thread, features, aligned, inner, grid x y z, block x y.
int emulate_plan(const StepArgs* args, int64_t* out) {
  const StepPlan p = plan_step(*args);
  const Grid& g = p.grid;
  const int64_t values[] = {p.elements, p.features, p.launch.aligned, p.launch.inner, g.x, g.y, g.z, g.block_x, g.block_y};
  for (size_t i = 0; i < sizeof values / sizeof *values; ++i) out[i] = values[i];
  return p.valid;
}

// One thread of a step: for indices that no CPU could loop up to.
int emulate_step_thread(const StepArgs* args, uint32_t b, int64_t column) {
  const StepPlan p = plan_step(*args);
  const uint32_t lane = static_cast<uint32_t>(column % p.grid.block_x);
  choose_kernel(p, ThreadOf{})(p.launch, Thread{b, column - lane, lane, p.grid.block_x});
  return p.valid;
}

// Every 16-bit conversion: 2^16 stored values to float32 bits, and float32 bits to stored pairs.
void emulate_widen(const uint16_t* in, float* out, int64_t count, int32_t bfloat) {
  float rest;
  for (int64_t i = 0; i < count; ++i) bfloat ? widen_bfloat(in[i], out[i], rest) : widen_half(in[i], out[i], rest);
}
void emulate_narrow(const float* in, uint16_t* out, int64_t count, int32_t dtype) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<uint16_t>(narrow_pair(in[i], 0.0f, static_cast<Dtype>(dtype)));
}
}
