// The kernels with AVX-512 F, BW, DQ and VL. System headers come first: what they define must stay compiled for any machine, since the
// linker may keep this file's copy of it for the whole library.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

#define FASTDIFF_NAMESPACE fastdiff::avx512
#define FASTDIFF_VECTOR
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#include "lanes_avx512.h"

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

const fastdiff::Kernels fastdiff::kAvx512 = {
    "avx512",
    fastdiff::avx512::run_units,
    fastdiff::avx512::project_units,
    fastdiff::avx512::lift_units,
    fastdiff::avx512::lift_shared,
    fastdiff::avx512::lift_slices,
    fastdiff::avx512::kSlice,
    fastdiff::avx512::square_units,
    fastdiff::avx512::edit_units,
    fastdiff::avx512::quantile_samples,
    fastdiff::avx512::quantile_pieces,
};
#endif
