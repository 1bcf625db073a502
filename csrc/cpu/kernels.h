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
  void (*squares)(const void* args, float* sums, int64_t first, int64_t last);
  void (*edit)(const void* args, const float* sums, int64_t unit, int64_t first, int64_t last);
};

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512;
#endif

}  // namespace fastdiff
