// How project_, lift_ and edit_ are divided among threads. The fixed tree makes the result independent of it.
#include <torch/csrc/stable/c/shim.h>

#include <vector>

#include "../tensor.h"
#include "launch.h"

namespace fastdiff {
namespace {

constexpr int64_t kFmaCost = 8;  // fmas in registers that take the time of one value from memory

template <class F>
void call(int64_t first, int64_t last, void* context) {
  const IeeeMode mode;
  (*static_cast<const F*>(context))(first, last);
}

// work(first, last) of units 0 .. units - 1, each of which costs as much as so many values from memory.
template <class F>
void divide(int64_t units, int64_t cost, F work) {
  const int64_t least = current_grain();
  if (cost < 1) cost = 1;
  if (units * cost < 2 * least || units < 2) {
    call<F>(0, units, &work);
  } else {
    FD_SHIM(torch_parallel_for(0, units, (least + cost - 1) / cost, call<F>, &work));
  }
}

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Units of `step` to `most` that share `count` evenly, small enough that there are some for each thread.
int64_t share(int64_t count, int64_t step, int64_t most, int64_t others) {
  uint32_t threads = 1;
  FD_SHIM(torch_get_num_threads(&threads));
  const int64_t wanted = (4 * threads + others - 1) / others;
  int64_t units = (count + most - 1) / most;
  if (units < wanted) units = wanted;
  return round_up((count + units - 1) / units, step);
}

}  // namespace

void launch_project(const ProjectArgs& a) {
  const Kernels& k = kernels();
  const int64_t groups = (a.batch + kGroup - 1) / kGroup, chunks = chunks_of(a.numel);
  int64_t lanes = 1, most = kColumns;
  while (lanes < kLanes && lanes < chunks) lanes *= 2;
  if (most > kPartials / lanes) most = kPartials / lanes;
  const int64_t columns = share(a.terms.count, 4, most, groups);
  const int64_t samples = a.batch < kGroup ? a.batch : kGroup;
  divide(groups * ((a.terms.count + columns - 1) / columns), samples * columns * a.numel / kFmaCost,
         [&](int64_t first, int64_t last) { k.project(&a, columns, first, last); });
}

void launch_lift(const LiftArgs& a) {
  constexpr int64_t kCached = 1 << 17;  // values of the vectors that stay in a cache for the next samples
  const Kernels& k = kernels();
  const int64_t groups = (a.batch + kGroup - 1) / kGroup, terms = a.terms.count > 0 ? a.terms.count : 1;
  const int64_t most = kCached / terms < 128 ? 128 : kCached / terms / 128 * 128;
  const int64_t elements = share(a.numel, 128, most, groups);
  const int64_t samples = a.batch < kGroup ? a.batch : kGroup;
  divide(groups * ((a.numel + elements - 1) / elements), samples * elements * (1 + terms / kFmaCost),
         [&](int64_t first, int64_t last) { k.lift(&a, kGroup, elements, first, last); });
}

// Norms first, then sums; of so many samples at a time that the second pass finds them in a cache.
void launch_edit(const EditArgs& a) {
  constexpr int64_t kCached = 1 << 18;
  const Kernels& k = kernels();
  const int64_t chunks = chunks_of(a.numel), together = a.numel < kCached ? kCached / a.numel : 1;
  std::vector<float> sums(static_cast<size_t>((together < a.batch ? together : a.batch) * chunks));
  for (int64_t b = 0; b < a.batch; b += together) {
    EditArgs part = a;
    part.batch = b + together < a.batch ? together : a.batch - b;
    const auto skip = [&](View& v) { v.data = static_cast<char*>(v.data) + b * v.batch_stride * (v.dtype == Dtype::f32 ? 4 : 2); };
    skip(part.h), skip(part.out);
    part.terms.weight += b * a.terms.weight_stride_b;
    if (a.terms.index != nullptr) {
      part.terms.index = static_cast<const char*>(a.terms.index) + b * a.terms.index_stride_b * (a.terms.index_is_64 ? 8 : 4);
    }
    divide(part.batch * chunks, kChunk, [&](int64_t first, int64_t last) { k.squares(&part, sums.data(), first, last); });
    divide(part.batch * chunks, kChunk * (2 + a.terms.count),
           [&](int64_t first, int64_t last) { k.edit(&part, sums.data(), kChunk, first, last); });
  }
}

}  // namespace fastdiff
