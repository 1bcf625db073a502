// What one GPU thread does with its elements: where they are, vector access, rounding to what is stored, noise and the status
// word. Everything has a second body for the host, so that tests run the kernels on a CPU.
#pragma once
#include "lane.h"
#include "launch.h"

// A loop whose body must not be copied: its length is an argument, and registers are dear.
#if defined(__CUDACC__)
#define FD_ROLLED _Pragma("unroll 1")
#else
#define FD_ROLLED
#endif

namespace FASTDIFF_NAMESPACE {

// ----------------------------------------------------------------------------------------------------------- access

struct alignas(16) Words4 {
  uint32_t w[4];
};
struct alignas(8) Words2 {
  uint32_t w[2];
};

FD_HD inline void read16(const void* at, uint32_t* w) {
  const Words4 v = *static_cast<const Words4*>(at);
  FD_UNROLL
  for (int i = 0; i < 4; ++i) w[i] = v.w[i];
}
FD_HD inline void read8(const void* at, uint32_t* w) {
  const Words2 v = *static_cast<const Words2*>(at);
  w[0] = v.w[0], w[1] = v.w[1];
}
// Asked for by name: nvcc takes some stores apart.
FD_HD inline void write16(void* at, const uint32_t* w) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(at)), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
               : "memory");
#else
  *static_cast<Words4*>(at) = Words4{{w[0], w[1], w[2], w[3]}};
#endif
}
FD_HD inline void write8(void* at, const uint32_t* w) { *static_cast<Words2*>(at) = Words2{{w[0], w[1]}}; }

// a / b for b > 0, in 32 bits where both fit: a 64-bit division costs about seventy instructions.
FD_HD inline int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// Where a thread stands in its launch: sample, first column of its block, its place in the block, columns of a block.
struct Thread {
  uint32_t b;
  int64_t column;
  uint32_t lane, width;
};

#if defined(__CUDACC__)
__device__ inline Thread this_thread() {
  return {(blockIdx.z * gridDim.y + blockIdx.y) * blockDim.y + threadIdx.y, static_cast<int64_t>(blockIdx.x) * blockDim.x, threadIdx.x,
          blockDim.x};
}
#endif

// The E elements of sample b that one thread owns, of which [lo, hi) are there: e0 .. e0 + E - 1, or, where every access is a
// vector (kDense), e0 .. e0 + E / 2 - 1 and as many again `apart` from them, so that the vectors of a warp lie side by
// side. Those before lo belong to another token: they may be read. pixel and group are e0 % inner and e0 / inner, for the
// channels-last views, which share one `inner`. The first `sure` are there in any case: a thread that owns none has left, or sets
// it to 0.
struct Place {
  uint32_t b;
  int64_t e0, pixel, group, inner;
  int lo, hi;
  int64_t apart;
  int sure;
};

template <int E, Features features>
FD_HD inline Place place(const Thread& t, int64_t numel, int64_t inner) {
  Place p{t.b, 0, 0, 0, inner, 0, E, 0, 1};
  if (features == kDense) {
    p.e0 = t.column * E + t.lane * (E / 2);
    p.apart = static_cast<int64_t>(t.width) * (E / 2);
    return p;
  }
  p.e0 = (t.column + t.lane) * E;
  if (numel - p.e0 < E) p.hi = static_cast<int>(numel - p.e0);
  if (inner && p.hi > 0) {
    p.group = quotient(p.e0, inner);
    p.pixel = p.e0 - p.group * inner;
  }
  return p;
}

// The q-th element of a thread.
template <int E, Features features>
FD_HD inline int64_t element(const Place& p, int q) {
  return features == kDense && q >= E / 2 ? p.e0 + p.apart + (q - E / 2) : p.e0 + q;
}

// The Philox block of that element, q being a multiple of 4 as all the rest are.
template <int E, Features features>
FD_HD inline uint64_t block_of(const Place& p, int q) {
  const uint64_t first = static_cast<uint64_t>(p.e0) / 4;
  return features == kDense && q >= E / 2 ? first + static_cast<uint64_t>(p.apart) / 4 + (q - E / 2) / 4 : first + q / 4;
}

// b * stride, b < 2^32: two instructions where a product of two 64-bit numbers takes four.
FD_HD inline int64_t times(uint32_t b, int64_t stride) {
  return static_cast<int64_t>(static_cast<uint64_t>(b) * static_cast<uint64_t>(stride));
}

// One view's stored elements: E words of float32, or E / 2 words of 16-bit pairs.
template <int E>
struct Raw {
  uint32_t w[E];
};

// Is lane l one of [lo, p.hi)?
FD_HD inline bool within(int l, const Place& p, int lo) { return l >= lo && (l < p.sure || l < p.hi); }

// Visits the lanes [lo, p.hi): visit(lane, offset from the sample's first element).
template <int E, class Visit>
FD_HD inline void each_lane(const View& v, const Place& p, int lo, const Visit& visit) {
  if (v.groups == 1) {
    FD_UNROLL
    for (int l = 0; l < E; ++l)
      if (within(l, p, lo)) visit(l, p.e0 + l);
  } else {
    int64_t pixel = p.pixel, group = p.group;
    FD_UNROLL
    for (int l = 0; l < E; ++l) {
      if (within(l, p, lo)) visit(l, pixel * v.groups + group);
      if (++pixel == p.inner) pixel = 0, ++group;
    }
  }
}

template <int E, Features features>
FD_HD inline void load(const View& v, const Place& p, bool aligned, Raw<E>& raw) {
  const bool vector = features == kDense || (aligned && p.lo == 0 && p.hi == E);
  if (all_f32(E, features) || v.dtype == Dtype::f32) {
    const uint32_t* base = static_cast<const uint32_t*>(v.data) + times(p.b, v.batch_stride);
    if (vector) {
      FD_UNROLL
      for (int q = 0; q < E; q += 4) read16(base + element<E, features>(p, q), raw.w + q);
    } else {
      FD_UNROLL
      for (int l = 0; l < E; ++l) raw.w[l] = 0;
      each_lane<E>(v, p, 0, [&](int l, int64_t at) { raw.w[l] = base[at]; });
    }
  } else {
    const uint16_t* base = static_cast<const uint16_t*>(v.data) + times(p.b, v.batch_stride);
    if (vector) {
      if constexpr (E == 4) {
        read8(base + p.e0, raw.w);
      } else {
        FD_UNROLL
        for (int q = 0; q < E; q += 8) read16(base + element<E, features>(p, q), raw.w + q / 2);
      }
    } else {
      FD_UNROLL
      for (int l = 0; l < E / 2; ++l) raw.w[l] = 0;
      each_lane<E>(v, p, 0, [&](int l, int64_t at) { raw.w[l / 2] |= static_cast<uint32_t>(base[at]) << 16 * (l % 2); });
    }
  }
}

template <int E, Features features>
FD_HD inline void widen(const Raw<E>& raw, Dtype dtype, float (&v)[E]) {
  if (all_f32(E, features) || dtype == Dtype::f32) {
    FD_UNROLL
    for (int l = 0; l < E; ++l) v[l] = Lane::value(raw.w[l]);
  } else if (dtype == Dtype::f16) {
    FD_UNROLL
    for (int l = 0; l < E; l += 2) widen_half(raw.w[l / 2], v[l], v[l + 1]);
  } else {
    FD_UNROLL
    for (int l = 0; l < E; l += 2) widen_bfloat(raw.w[l / 2], v[l], v[l + 1]);
  }
}

// Is one of the elements NaN? Those of lanes that are not there count only in the first answer, which is the cheap one.
template <int E>
FD_HD inline bool maybe_nan(const float (&v)[E]) {
  bool found = false;
  FD_UNROLL
  for (int l = 0; l < E; ++l) found = found || is_nan(v[l]);
  return found;
}
template <int E>
FD_HD inline bool any_nan(const Place& p, const float (&v)[E]) {
  bool found = false;
  FD_UNROLL
  for (int l = 0; l < E; ++l) found = found || (is_nan_bits(v[l]) && within(l, p, p.lo));
  return found;
}

// Stores words as they are: float32 bits, or pairs of 16-bit ones.
template <int E, Features features>
FD_HD inline void store_words(const View& v, const Place& p, bool vector, const uint32_t (&w)[E]) {
  uint32_t* base = static_cast<uint32_t*>(v.data) + times(p.b, v.batch_stride);
  if (vector) {
    FD_UNROLL
    for (int q = 0; q < E; q += 4) write16(base + element<E, features>(p, q), w + q);
  } else {
    each_lane<E>(v, p, p.lo, [&](int l, int64_t at) { base[at] = w[l]; });
  }
}
template <int E, Features features>
FD_HD inline void store_pairs(const View& v, const Place& p, bool vector, const uint32_t (&w)[E]) {
  uint16_t* base = static_cast<uint16_t*>(v.data) + times(p.b, v.batch_stride);
  if (vector) {
    if constexpr (E == 4) {
      write8(base + p.e0, w);
    } else {
      FD_UNROLL
      for (int q = 0; q < E; q += 8) write16(base + element<E, features>(p, q), w + q / 2);
    }
  } else {
    each_lane<E>(v, p, p.lo, [&](int l, int64_t at) { base[at] = static_cast<uint16_t>(w[l / 2] >> 16 * (l % 2)); });
  }
}

// Rounds once and stores. `nans` says whether some v may be NaN: only then are they looked for, since a NaN must be
// stored as the canonical one, which the conversion instructions do not give.
template <int E, Features features>
FD_HD inline void store(const View& v, const Place& p, bool aligned, bool nans, const float (&values)[E]) {
  const bool vector = features == kDense || (aligned && p.lo == 0 && p.hi == E);
  uint32_t w[E];
  if (all_f32(E, features) || v.dtype == Dtype::f32) {
    FD_UNROLL
    for (int l = 0; l < E; ++l) w[l] = Lane::bits(values[l]);
    if (nans) {
      FD_UNROLL
      for (int l = 0; l < E; ++l) w[l] = is_nan_bits(values[l]) ? 0x7FC00000u : w[l];
    }
    store_words<E, features>(v, p, vector, w);
  } else {
    FD_UNROLL
    for (int l = 0; l < E; l += 2) w[l / 2] = narrow_pair(values[l], values[l + 1], v.dtype);
    if (nans) {
      const uint32_t canonical = v.dtype == Dtype::f16 ? 0x7E00u : 0x7FC0u;
      FD_UNROLL
      for (int l = 0; l < E; ++l) {
        const uint32_t keep = l % 2 ? 0xFFFFu : 0xFFFF0000u;
        if (is_nan_bits(values[l])) w[l / 2] = (w[l / 2] & keep) | canonical << 16 * (l % 2);
      }
    }
    store_pairs<E, features>(v, p, vector, w);
  }
}

// Stores what was loaded from a view of the same dtype.
template <int E, Features features>
FD_HD inline void store_raw(const View& v, const Place& p, bool aligned, const Raw<E>& raw) {
  const bool vector = features == kDense || (aligned && p.lo == 0 && p.hi == E);
  if (all_f32(E, features) || v.dtype == Dtype::f32) {
    store_words<E, features>(v, p, vector, raw.w);
  } else {
    store_pairs<E, features>(v, p, vector, raw.w);
  }
}

// ------------------------------------------------------------------------------------------------------------- sums

// A coefficient times its factor, rounded once; a coefficient of 0 asks for nothing, whatever the factor.
FD_HD inline float scaled(float c, float factor) { return c == 0.0f ? 0.0f : Lane::mul(c, factor); }

template <int E>
FD_HD inline void add(float (&sum)[E], float c, const float (&v)[E]) {
  if (c == 0.0f) return;
  FD_UNROLL
  for (int l = 0; l < E; ++l) sum[l] = Lane::fma(c, v[l], sum[l]);
}

template <int E>
FD_HD inline void clear(float (&sum)[E]) {
  FD_UNROLL
  for (int l = 0; l < E; ++l) sum[l] = -0.0f;
}

FD_HD inline bool has(uint32_t bits, int bit) { return bits >> bit & 1u; }

// ------------------------------------------------------------------------------------------------------------ noise

// Four elements of N((seed, .)).
FD_HD inline void draw_four(uint64_t seed, uint64_t counter, float (&z)[4]) {
  uint32_t words[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  philox<ThreadWords>(words, seed);
  box_muller<Lane>(words, z);
}

// N(key) at the elements of a thread, the first of which is a multiple of 4.
template <int E, Features features>
FD_HD inline void draw(Key key, const Place& p, float (&z)[E]) {
  FD_UNROLL
  for (int q = 0; q < E; q += 4) {
    float four[4];
    draw_four(key.seed, key.offset + block_of<E, features>(p, q), four);
    FD_UNROLL
    for (int l = 0; l < 4; ++l) z[q + l] = four[l];
  }
}

// ----------------------------------------------------------------------------------------------------------- status

#if defined(__CUDA_ARCH__)
// One atomic for the threads of a warp that arrive together.
__device__ inline bool leads(unsigned lanes) {
  unsigned lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane == static_cast<unsigned>(__ffs(static_cast<int>(lanes)) - 1);
}
#endif

FD_HD inline void report_row(int32_t* status, int32_t row) {
  if (!status) return;
#if defined(__CUDA_ARCH__)
  const unsigned lanes = __activemask();
  const int first = __reduce_min_sync(lanes, row);
  if (leads(lanes)) atomicMin(status, first);
#else
  if (row < status[0]) status[0] = row;
#endif
}

FD_HD inline void report_flag(int32_t* status, int32_t flag) {
  if (!status) return;
#if defined(__CUDA_ARCH__)
  if (leads(__activemask())) atomicOr(status + 1, flag);
#else
  status[1] |= flag;
#endif
}

}  // namespace FASTDIFF_NAMESPACE
