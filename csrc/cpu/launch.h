// Which kernels run, on how many threads, and in which floating-point mode.
#pragma once
#include "../quantile.h"
#include "../reduce.h"
#include "../row.h"
#include "kernels.h"

namespace fastdiff {

// Rounding to nearest with subnormals kept, whatever torch.set_flush_denormal or the caller left; restored at the end.
class IeeeMode {
 public:
  IeeeMode();
  ~IeeeMode();
  IeeeMode(const IeeeMode&) = delete;
  IeeeMode& operator=(const IeeeMode&) = delete;

 private:
  uint64_t saved_;
};

// The kernels in use: the best that this machine has, or what FASTDIFF_ISA or use_kernels() names.
const Kernels& kernels();
// "" takes the best. Refuses names that are unknown or that this machine cannot run.
const Kernels& use_kernels(const char* name);
// Names of those that run here, best first, separated by spaces.
const char* usable_kernels();
// The least work for a thread of its own (see launch.cpp); 1 for tests of threads. Returns the former.
int64_t set_grain(int64_t values);
int64_t current_grain();

// The step, checked and with samples and elements. Call it within IeeeMode.
void launch_step(const StepArgs& args);

// The ops on vectors and quantile_, likewise; of these only launch_quantile need be called within IeeeMode. Where there are no terms,
// launch_project has nothing to do.
void launch_project(const ProjectArgs& args);
void launch_lift(const LiftArgs& args);
void launch_edit(const EditArgs& args);
void launch_quantile(const QuantileArgs& args);

}  // namespace fastdiff
