// The kernels of one instruction set, as the rest of the library sees them.
#pragma once
#include <cstdint>

namespace fastdiff {

// Of one block of project_: samples that share what is read of the vectors, terms, and floats for the second level by sample.
constexpr int kGroup = 16, kColumns = 64, kPartials = 1024;

struct Kernels {
  const char* name;
  // Applies the row to units first .. last - 1 of the batch; `args` is the StepArgs of that instruction set's namespace,
  // the same struct under another name.
  void (*step)(const void* args, int64_t unit, int64_t first, int64_t last);
  // Likewise of the ops on vectors: project.h, lift.h and edit.h say what a unit is.
  void (*project)(const void* args, int64_t columns, int64_t first, int64_t last);
  void (*lift)(const void* args, int64_t samples, int64_t elements, int64_t first, int64_t last);
  // Of lift_ where all samples have the same terms (returns their number, or -1), in slices of `lift_slice` elements.
  int (*lift_shared)(const void* args, int32_t* vector, float* weight);
  void (*lift_slices)(const void* args, const int32_t* vector, const float* weight, int terms, float* copy, int64_t first, int64_t last);
  int64_t lift_slice;
  void (*squares)(const void* args, float* sums, int64_t first, int64_t last);
  void (*edit)(const void* args, const float* sums, int64_t unit, int64_t first, int64_t last);
  // Of quantile_: whole samples; one pass over pieces of one sample, `search` being the Search so far. See quantile.h.
  void (*quantile)(const void* args, int64_t first, int64_t last);
  void (*count)(const void* args, const void* search, int pass, int64_t b, int64_t piece, int64_t first, int64_t last, void* counts);
};

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512;
#endif

}  // namespace fastdiff
