// The kernels on any machine, one element at a time.
#define FASTDIFF_NAMESPACE fastdiff::baseline
#include "kernel.h"

const fastdiff::Kernels fastdiff::kBaseline = {"baseline", fastdiff::baseline::run_units};
