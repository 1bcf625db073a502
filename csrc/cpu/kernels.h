// The kernels of one instruction set, as the rest of the library sees them.
#pragma once
#include <cstdint>

namespace fastdiff {

struct Kernels {
  const char* name;
  // Applies the row to units first .. last - 1 of the batch; `args` is the StepArgs of that instruction set's namespace,
  // the same struct under another name.
  void (*step)(const void* args, int64_t unit, int64_t first, int64_t last);
};

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512;
#endif

}  // namespace fastdiff
