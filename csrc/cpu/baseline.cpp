// The kernels on any machine: SSE2 where it is x86-64, else one element at a time.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>

#include "kernels.h"

#define FASTDIFF_NAMESPACE fastdiff::baseline
#if defined(__x86_64__)
#define FASTDIFF_VECTOR
#include "lanes_sse2.h"
#endif

#include "edit.h"
#include "kernel.h"
#include "lift.h"
#include "project.h"
#include "quantile.h"

const fastdiff::Kernels fastdiff::kBaseline = {
    "baseline",
    fastdiff::baseline::run_units,
    fastdiff::baseline::project_units,
    fastdiff::baseline::lift_units,
    fastdiff::baseline::lift_shared,
    fastdiff::baseline::lift_slices,
    fastdiff::baseline::kSlice,
    fastdiff::baseline::square_units,
    fastdiff::baseline::edit_units,
    fastdiff::baseline::quantile_samples,
    fastdiff::baseline::quantile_pieces,
};
