#include "launch.h"

#include <torch/csrc/stable/c/shim.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../tensor.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastdiff {

#if defined(__x86_64__)
IeeeMode::IeeeMode() : saved_(_mm_getcsr()) {
  if (saved_ != 0x1F80) _mm_setcsr(0x1F80);  // all exceptions masked, no flag set
}
IeeeMode::~IeeeMode() { _mm_setcsr(static_cast<unsigned>(saved_)); }
#elif defined(__aarch64__)
IeeeMode::IeeeMode() {
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  asm volatile("msr fpcr, %0" ::"r"(saved_ & ~uint64_t{0x01C00003}));  // FIZ, AH, the rounding mode, FZ
}
IeeeMode::~IeeeMode() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }
#else
IeeeMode::IeeeMode() : saved_(0) {}
IeeeMode::~IeeeMode() {}
#endif

namespace {

bool runs_here(const Kernels& k) {
#if defined(__x86_64__)
  if (&k == &kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && runs_here(kAvx2);
  }
  if (&k == &kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return &k == &kBaseline;
}

const Kernels* const kAll[] = {
#if defined(__x86_64__)
    &kAvx512, &kAvx2,
#endif
    &kBaseline};

const Kernels& find(const char* name) {
  for (const Kernels* k : kAll) {
    if (name == nullptr || *name == 0 ? runs_here(*k) : std::strcmp(name, k->name) == 0) {
      if (!runs_here(*k)) refuse("fastdiff: this machine cannot run ", name, ": ", usable_kernels(), " run here");
      return *k;
    }
  }
  refuse("fastdiff: no instruction set is called '", name, "': ", usable_kernels(), " run here");
}

std::atomic<const Kernels*> chosen{nullptr};

// The least work for a thread of its own, in values read, written or (at seven times that) drawn: some 20 us.
std::atomic<int64_t> grain{1 << 17};

struct Job {
  const StepArgs* args;
  const Kernels* kernels;
  int64_t unit;
};

void work(int64_t first, int64_t last, void* context) {
  const Job& job = *static_cast<const Job*>(context);
  const IeeeMode mode;
  job.kernels->step(job.args, job.unit, first, last);
}

bool is_dense(const View& v, int64_t batch, int64_t numel) { return v.groups == 1 && (batch == 1 || v.batch_stride == numel); }

// Without noise, masks and tokens the order of the elements does not matter, so that one order for all is as good as
// contiguous, and samples that share a row and touch are one sample.
void simplify(StepArgs& a) {
  if (a.layout.noises > 0 || a.mask.data != nullptr || a.tokens > 1) return;
  int64_t groups = 0;
  bool touching = a.row == nullptr || a.row_stride_b == 0;
  touching = touching && a.scale == nullptr && a.layout.bank == 0 && a.clip == nullptr;
  const auto look = [&](const View& v) {
    groups = groups == 0 || groups == v.groups ? v.groups : -1;
    touching = touching && is_dense({v.data, v.batch_stride, v.inner, 1, v.dtype}, a.batch, a.numel);
  };
  for (int k = 0; k < a.layout.inputs; ++k) look(a.in[k]);
  for (int i = 0; i < a.layout.outputs; ++i) look(a.out[i]);
  if (a.layout.bank > 0) look(a.bank);
  if (groups < 0) return;
  const int64_t batch = touching ? a.batch : 1;
  for (int k = 0; k < a.layout.inputs; ++k) a.in[k].groups = 1, a.in[k].inner = batch * a.numel;
  for (int i = 0; i < a.layout.outputs; ++i) a.out[i].groups = 1, a.out[i].inner = batch * a.numel;
  a.bank.groups = 1;
  if (touching) {
    a.numel *= a.batch;
    a.batch = 1;
  }
}

}  // namespace

const Kernels& kernels() {
  const Kernels* k = chosen.load(std::memory_order_relaxed);
  return k != nullptr ? *k : use_kernels(std::getenv("FASTDIFF_ISA"));
}

const Kernels& use_kernels(const char* name) {
  const Kernels& k = find(name);
  chosen.store(&k, std::memory_order_relaxed);
  return k;
}

const char* usable_kernels() {
  static const std::string names = [] {
    std::string all;
    for (const Kernels* k : kAll) {
      if (runs_here(*k)) all += std::string(all.empty() ? "" : " ") + k->name;
    }
    return all;
  }();
  return names.c_str();
}

int64_t set_grain(int64_t values) { return grain.exchange(values < 1 ? 1 : values); }
int64_t current_grain() { return grain.load(std::memory_order_relaxed); }

void launch_step(const StepArgs& given) {
  StepArgs a = given;
  simplify(a);
  const int64_t unit = 2048;  // elements: small enough to share evenly, and a multiple of every kernel's blocks
  Job job{&a, &kernels(), unit};
  const int64_t units = a.batch * ((a.numel + unit - 1) / unit);
  const int64_t least = grain.load(std::memory_order_relaxed);
  const int64_t per_element = a.layout.inputs + a.layout.outputs + a.layout.bank + 7 * a.layout.noises;
  const int64_t per_unit = (a.numel < unit ? a.numel : unit) * per_element;
  if (units * per_unit < 2 * least) {
    job.kernels->step(&a, unit, 0, units);
    return;
  }
  FD_SHIM(torch_parallel_for(0, units, (least + per_unit - 1) / per_unit, work, &job));
}

}  // namespace fastdiff
