// The CUDA kernels on a CPU: plan.h decides the launch, and every thread of every block of its grid runs in turn.
// The bodies are the very functions that the kernels in csrc/cuda call; only the IEEE operations have host versions.
#include "../../csrc/cuda/edit.h"
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

// The lanes of a warp, added in pairs. held(t, numbers): those of thread t.
template <int V, class Held>
float added_of(const Held& held) {
  float lanes[kLanes];
  for (int t = 0; t < kWarp; ++t) {
    float numbers[kHeld];
    held(t, numbers);
    for (int j = 0; j < kHeld; ++j) lanes[lane_of<V>(t, j)] = numbers[j];
  }
  for (int apart = kLanes / 2; apart; apart /= 2)
    for (int i = 0; i < apart; ++i) lanes[i] = lanes[i] + lanes[i + apart];
  return lanes[0];
}

// The sum of one chunk, by one warp.
struct SquaresWarp {
  const SquaresLaunch& a;
  uint32_t b;
  int64_t chunk;
  template <int V>
  float run() const {
    return added_of<V>([&](int t, float (&numbers)[kHeld]) { squares<V>(a, b, chunk, t, numbers); });
  }
};

struct EditThreads {
  const EditPlan& plan;
  template <int E, Features features>
  void run() const {
    const EditLaunch& a = plan.launch;
    const auto norm = [&](uint32_t b) {
      const float* sums = a.sums + b * int64_t{a.chunks};
      return Lane::root(added_of<1>([&](int t, float (&numbers)[kHeld]) { add_chunks(sums, a.chunks, t, numbers); }));
    };
    each_thread(plan.grid, [&](const Thread& t) { edit_thread<E, features>(a, t, norm); });
  }
};

struct EditThread {
  const EditLaunch& launch;
  Thread thread;
  float norm;
  template <int E, Features features>
  void run() const {
    edit_thread<E, features>(launch, thread, [&](uint32_t) { return norm; });
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

int launch_edit(const EditArgs& args, float* sums, void*) {
  const EditPlan plan = plan_edit(args, sums);
  if (!plan.valid) return 1;
  if (plan.elements == 0) return 0;
  const SquaresLaunch& a = plan.squares;
  each_thread(plan.squares_grid, [&](const Thread& t) {
    const int64_t column = t.column + t.lane, chunk = column / kWarp;
    if (column % kWarp || t.b >= a.batch || chunk >= a.chunks || first_term(a.terms, t.b) == a.terms.count) return;
    a.sums[t.b * int64_t{a.chunks} + chunk] = choose_squares(plan, SquaresWarp{a, t.b, chunk});
  });
  choose_kernel(plan, EditThreads{plan});
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
int emulate_edit(const EditArgs* args, float* sums) { return launch_edit(*args, sums, nullptr); }
int emulate_fold_in(const FoldInArgs* args) { return launch_fold_in(*args, nullptr); }
int emulate_run_keys(const RunKeysArgs* args) { return launch_run_keys(*args, nullptr); }
int emulate_raw_words(const RawWordsArgs* args) { return launch_raw_words(*args, nullptr); }

// What cuda_args.py must agree with.
void emulate_layout(int64_t* out) {
  const int64_t values[] = {sizeof(View), sizeof(StepArgs), offsetof(StepArgs, coef), offsetof(StepArgs, in), offsetof(StepArgs, mask),
                            offsetof(StepArgs, mask_period), sizeof(NormalArgs), sizeof(FoldInArgs), sizeof(RunKeysArgs),
                            sizeof(RawWordsArgs), sizeof(Terms), sizeof(EditArgs), offsetof(EditArgs, terms), sizeof(SquaresLaunch),
                            sizeof(EditLaunch), sizeof(StepLaunch), sizeof(StepPlan)};
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

// How edit_ would be launched: elements that are summed at once and the grid of the sums, then elements a thread, features, aligned,
// inner, in place, and the grid of the edit.
int emulate_edit_plan(const EditArgs* args, int64_t* out) {
  const EditPlan p = plan_edit(*args, nullptr);
  const Grid &s = p.squares_grid, &g = p.grid;
  const int64_t values[] = {p.vector, s.x, s.y, s.z, s.block_x, s.block_y, p.elements, p.features, p.launch.aligned, p.launch.inner,
                            p.launch.in_place, g.x, g.y, g.z, g.block_x, g.block_y};
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

// One chunk of a sum and one thread of an edit, given the norm.
float emulate_chunk(const EditArgs* args, uint32_t b, int64_t chunk) {
  const EditPlan p = plan_edit(*args, nullptr);
  return choose_squares(p, SquaresWarp{p.squares, b, chunk});
}
void emulate_edit_thread(const EditArgs* args, float norm, uint32_t b, int64_t column) {
  const EditPlan p = plan_edit(*args, nullptr);
  const uint32_t lane = static_cast<uint32_t>(column % p.grid.block_x);
  choose_kernel(p, EditThread{p.launch, Thread{b, column - lane, lane, p.grid.block_x}, norm});
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
