// The kernels with AVX2, FMA and F16C. System headers come first: what they define must stay compiled for any machine, since the
// linker may keep this file's copy of it for the whole library.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

#define FASTDIFF_NAMESPACE fastdiff::avx2
#define FASTDIFF_VECTOR
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "lanes_avx2.h"

#include "edit.h"
#include "kernel.h"
#include "lift.h"
#include "project.h"
#include "quantile.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const fastdiff::Kernels fastdiff::kAvx2 = {
    "avx2",
    fastdiff::avx2::run_units,
    fastdiff::avx2::project_units,
    fastdiff::avx2::lift_units,
    fastdiff::avx2::lift_shared,
    fastdiff::avx2::lift_slices,
    fastdiff::avx2::kSlice,
    fastdiff::avx2::square_units,
    fastdiff::avx2::edit_units,
    fastdiff::avx2::quantile_samples,
    fastdiff::avx2::quantile_pieces,
};
#endif
