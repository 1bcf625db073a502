// How project_, lift_, edit_ and quantile_ are divided among threads. The fixed tree makes the result independent of it; counts are
// integers.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../tensor.h"
#include "launch.h"
#include "search.h"

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
  std::vector<int32_t> vector(static_cast<size_t>(a.terms.count));
  const std::unique_ptr<float[]> weight(new float[static_cast<size_t>(a.batch * a.terms.count)]);
  const int shared = k.lift_shared(&a, vector.data(), weight.get());
  if (shared >= 0) {
    divide((a.numel + k.lift_slice - 1) / k.lift_slice, k.lift_slice * (shared + a.batch * (1 + shared / kFmaCost)),
           [&](int64_t first, int64_t last) {
             const std::unique_ptr<float[]> copy(new float[static_cast<size_t>(shared * k.lift_slice)]);
             k.lift_slices(&a, vector.data(), weight.get(), shared, copy.get(), first, last);
           });
    return;
  }
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

// A sample to a thread, or pieces of one sample where there are more threads than samples.
void launch_quantile(const QuantileArgs& given) {
  constexpr int64_t kLeast = 1 << 14, kMost = int64_t{1} << 31;  // elements of a piece: worth its counts, which are 32 bits wide
  const Kernels& k = kernels();
  QuantileArgs a = given;
  bool alike = true;
  for (int i = 1; i < a.step.listed; ++i) alike &= a.step.in[i].groups == a.step.in[0].groups;
  for (int i = 0; alike && i < a.step.listed; ++i) a.step.in[i].groups = 1, a.step.in[i].inner = a.step.numel;  // any order will do
  const int64_t n = a.step.numel, cost = kPasses * (a.step.listed + 2);
  int64_t piece = share(n, kLeast, kMost, a.step.batch);
  if (current_grain() > 1 && piece < current_grain() / cost) piece = n < kMost ? n : kMost;  // too little for two threads
  const int64_t pieces = (n + piece - 1) / piece;
  if (pieces == 1) {
    divide(a.step.batch, n * cost, [&](int64_t first, int64_t last) { k.quantile(&a, first, last); });
    return;
  }
  std::vector<uint32_t> counts(static_cast<size_t>(pieces * 2 * kBins));
  for (int64_t b = 0; b < a.step.batch; ++b) {
    Search s(a);
    for (int pass = 0; pass < kPasses; ++pass) {
      std::fill(counts.begin(), counts.end(), 0);
      divide(pieces, piece * cost / kPasses, [&](int64_t first, int64_t last) { k.count(&a, &s, pass, b, piece, first, last, counts.data()); });
      int64_t total[2][kBins] = {};
      for (int64_t i = 0; i < pieces * 2 * kBins; ++i) total[i / kBins % 2][i % kBins] += counts[static_cast<size_t>(i)];
      advance(s, pass, total);
    }
    finish(a, b, s);
  }
}

}  // namespace fastdiff
