// What a launch will be: grid, elements a thread, which views can be read 16 bytes at a time. Plain C++, so that tests
// plan here and run on the CPU what a GPU would run.
#pragma once
#include "launch.h"

namespace FASTDIFF_NAMESPACE {

constexpr int kThreads = 128;
constexpr int64_t kMaxGridX = 2147483647, kMaxGridYZ = 65535;
constexpr int64_t kMaxSamples = kMaxGridYZ * kMaxGridYZ;  // 2^32 less 2^17, so that no index of a thread wraps

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads side by side in a sample along x, samples along y and z: no dimension reaches its limit below 2^40 elements a
// sample and 2^32 samples, so that no thread loops. Small samples share a block. at_most, at_least: threads side by side.
inline bool plan_grid(int64_t batch, int64_t numel, int elements, Grid& grid, int64_t at_most = kThreads, int64_t at_least = 1) {
  const int64_t width = ceil_div(numel, elements);
  int64_t x = at_least;
  while (x < width && x < at_most) x *= 2;
  const int64_t y = kThreads / x;
  const int64_t columns = ceil_div(width, x), samples = ceil_div(batch, y);
  const int64_t layers = ceil_div(samples, kMaxGridYZ);
  if (columns > kMaxGridX || samples * y > kMaxSamples) return false;
  grid = {static_cast<unsigned>(columns), static_cast<unsigned>(layers ? ceil_div(samples, layers) : 0),
          static_cast<unsigned>(layers), static_cast<unsigned>(x), static_cast<unsigned>(y)};
  return true;
}

// How many threads of a block stand side by side in a dense launch, where each has all its elements; 0 where too few of them
// would lie side by side in memory.
inline int64_t dense_threads(int64_t numel, int elements) {
  if (numel % elements) return 0;
  const int64_t width = numel / elements;
  int64_t x = 1;
  while (width % (2 * x) == 0 && x < kThreads) x *= 2;
  return x >= 16 || x == width ? x : 0;
}

inline int element_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Can a thread's whole span of this view be read or written in vectors? Spans start at multiples of `elements`.
inline bool vectors(const View& v, int64_t samples, int elements) {
  const int64_t size = element_size(v.dtype), span = size * elements < 16 ? size * elements : 16;
  return v.groups == 1 && reinterpret_cast<uintptr_t>(v.data) % span == 0 && (samples <= 1 || v.batch_stride * size % span == 0);
}

// A view with one group, or with one element a group, is contiguous.
inline void settle(View& v) {
  if (v.groups <= 1 || v.inner <= 1) v.groups = 1, v.inner = 0;
}

template <class Visit>
void each_view(StepArgs& a, const Visit& visit) {
  for (int k = 0; k < a.layout.inputs; ++k) visit(a.in[k], a.batch, k);
  for (int i = 0; i < a.layout.outputs; ++i) visit(a.out[i], a.batch, kAlignedOut + i);
  if (a.layout.bank) visit(a.bank, a.bank_size, kAlignedBank);
  if (a.mask.data && a.known.data) visit(a.known, a.batch, kAlignedKnown);
}

inline StepPlan plan_step(const StepArgs& given) {
  StepPlan plan{};
  plan.launch.args = given;
  StepArgs& a = plan.launch.args;
  plan.valid = true;
  if (a.batch == 0 || a.numel == 0 || a.rows == 0) return plan;

  bool wide = true, alike = true, first = true;
  View some{};
  each_view(a, [&](View& v, int64_t, int) {
    settle(v);
    wide &= v.dtype == Dtype::f32;
    if (first) some = v;
    alike &= v.groups == some.groups && v.inner == some.inner;
    first = false;
  });
  if (a.mask.data) {
    settle(a.mask);
    wide &= a.mask.dtype == Dtype::f32;
  }
  plan.features = a.mask.data || a.tokens > 1 ? kEverything : a.layout.bank > 0 ? kWithBank : kPlain;

  // Nothing follows the logical order where there is neither noise nor a mask nor a token: samples that all lie in
  // memory in the same order are then walked in that order.
  if (alike && a.layout.noises == 0 && !a.mask.data && a.tokens <= 1)
    each_view(a, [](View& v, int64_t, int) { v.groups = 1, v.inner = 0; });

  const int most = wide ? 8 : 16;
  const int64_t threads = dense_threads(a.numel, most);
  bool dense = plan.features == kPlain && threads > 0;
  each_view(a, [&](View& v, int64_t samples, int) { dense &= vectors(v, samples, most); });
  if (dense) plan.features = kDense;
  plan.elements = dense ? most : wide || plan.features == kEverything ? 4 : 8;

  each_view(a, [&](View& v, int64_t samples, int bit) {
    if (vectors(v, samples, plan.elements)) plan.launch.aligned |= 1u << bit;
    if (v.groups == 1) return;
    plan.valid &= plan.launch.inner == 0 || plan.launch.inner == v.inner;
    plan.launch.inner = v.inner;
  });
  if (a.mask.data && a.mask_period % plan.elements == 0 && a.numel % a.mask_period == 0 &&
      vectors(a.mask, a.batch, plan.elements))
    plan.launch.aligned |= 1u << kAlignedMask;
  plan.launch.token_numel = a.tokens > 1 ? a.numel / a.tokens : a.numel;
  plan.valid &= a.tokens <= 1 || plan.launch.token_numel * a.tokens == a.numel;
  plan.valid &= plan_grid(a.batch, a.numel, plan.elements, plan.grid, dense ? threads : kThreads);
  return plan;
}

// Calls go.run<elements, features, outputs>() for the kernel of a plan: the one list of kernels that there are.
template <class Go>
auto choose_kernel(const StepPlan& plan, const Go& go) {
  const int outputs = plan.launch.args.layout.outputs;
  if (plan.features == kEverything) return go.template run<4, kEverything, 3>();
  if (plan.features == kWithBank) return plan.elements == 4 ? go.template run<4, kWithBank, 3>() : go.template run<8, kWithBank, 3>();
  if (plan.features == kDense && outputs == 1) return plan.elements == 8 ? go.template run<8, kDense, 1>() : go.template run<16, kDense, 1>();
  if (plan.features == kDense && outputs == 2) return plan.elements == 8 ? go.template run<8, kDense, 2>() : go.template run<16, kDense, 2>();
  if (plan.features == kDense) return plan.elements == 8 ? go.template run<8, kDense, 3>() : go.template run<16, kDense, 3>();
  return plan.elements == 4 ? go.template run<4, kPlain, 3>() : go.template run<8, kPlain, 3>();
}

inline NormalPlan plan_normal(const NormalArgs& given) {
  NormalPlan plan{};
  plan.launch.args = given;
  View& out = plan.launch.args.out;
  if (given.batch == 0 || given.numel == 0) return plan;
  settle(out);
  plan.launch.inner = out.inner;
  const int most = out.dtype == Dtype::f32 ? 8 : 16;
  const int64_t threads = dense_threads(given.numel, most);
  const bool dense = threads > 0 && vectors(out, given.batch, most);
  const int elements = dense ? most : most / 2;
  plan.features = dense ? kDense : kPlain;
  plan.launch.aligned = vectors(out, given.batch, elements);
  if (plan_grid(given.batch, given.numel, elements, plan.grid, dense ? threads : kThreads)) plan.elements = elements;
  return plan;
}

// The kernel of a NormalPlan, or the second one of an EditPlan.
template <class Plan, class Go>
auto choose_kernel(const Plan& plan, const Go& go) {
  if (plan.features == kDense) return plan.elements == 8 ? go.template run<8, kDense>() : go.template run<16, kDense>();
  return plan.elements == 4 ? go.template run<4, kPlain>() : go.template run<8, kPlain>();
}

// Whole warps belong to one sample: they add up what they hold.
inline EditPlan plan_edit(const EditArgs& given, float* sums) {
  EditPlan plan{};
  plan.launch.args = given;
  EditArgs& a = plan.launch.args;
  plan.valid = true;
  if (a.batch == 0 || a.numel == 0) return plan;
  settle(a.out), settle(a.h), settle(a.bank);
  const auto each = [&](const auto& visit) {
    visit(a.out, a.batch, kEditOut);
    visit(a.h, a.batch, kEditH);
    if (a.terms.count) visit(a.bank, a.terms.vectors, kEditBank);
  };

  const int64_t chunks = chunks_of(a.numel);
  const int whole = 16 / element_size(a.h.dtype);
  plan.squares = {a.batch, a.numel, static_cast<int32_t>(chunks), a.terms, a.h, sums};  // in the logical order
  plan.vector = a.numel % whole == 0 && vectors(a.h, a.batch, whole) ? whole : 1;
  plan.launch.chunks = static_cast<int32_t>(chunks);
  plan.launch.sums = sums;
  plan.valid &= chunks <= INT32_MAX - kLanes;
  plan.valid &= plan_grid(a.batch, chunks * kWarp, 1, plan.squares_grid, kThreads, kWarp);

  bool alike = true, wide = true;
  each([&](View& v, int64_t, int) {
    alike &= v.groups == a.h.groups && v.inner == a.h.inner;
    wide &= v.dtype == Dtype::f32;
  });
  if (alike) each([](View& v, int64_t, int) { v.groups = 1, v.inner = 0; });  // in the order of the memory
  const int most = wide ? 8 : 16;
  const int64_t threads = dense_threads(a.numel, most);
  bool dense = threads > 0 && threads % kWarp == 0;
  each([&](View& v, int64_t samples, int) { dense &= vectors(v, samples, most); });
  plan.features = dense ? kDense : kPlain;
  plan.elements = dense ? most : most / 2;
  each([&](View& v, int64_t samples, int bit) {
    if (vectors(v, samples, plan.elements)) plan.launch.aligned |= 1u << bit;
    if (v.groups == 1) return;
    plan.valid &= plan.launch.inner == 0 || plan.launch.inner == v.inner;
    plan.launch.inner = v.inner;
  });
  plan.launch.in_place = a.out.data == a.h.data && a.out.dtype == a.h.dtype && a.out.groups == a.h.groups &&
                         (a.batch == 1 || a.out.batch_stride == a.h.batch_stride);
  plan.valid &= plan_grid(a.batch, a.numel, plan.elements, plan.grid, dense ? threads : kThreads, kWarp);
  return plan;
}

template <class Go>
auto choose_squares(const EditPlan& plan, const Go& go) {
  return plan.vector == 8 ? go.template run<8>() : plan.vector == 4 ? go.template run<4>() : go.template run<1>();
}

}  // namespace FASTDIFF_NAMESPACE
