// The loops of one row applied to a range of the batch. Blocks stand at multiples of their size within a sample;
// a whole block of dense memory is read and written in place, anything else (a tail, a token that starts elsewhere,
// another order of the elements) is first gathered into floats, so that the arithmetic is written once.
#pragma once
#include "kernels.h"
#include "program.h"

namespace FASTDIFF_NAMESPACE {

constexpr int kVectors = kBlock / Lane::kWidth;

struct Workspace {
  alignas(64) float buffer[kSources][kBlock];
  alignas(64) float y[kMaxOutputs][kBlock];
  const void* at[kSources];  // the values of each source for the block at hand
  Dtype dtype[kSources];
  Program program;
};

#define FD_EACH_DTYPE(dtype, CALL)       \
  switch (dtype) {                       \
    case Dtype::f32: CALL(f32); break;   \
    case Dtype::f16: CALL(f16); break;   \
    default: CALL(bf16);                 \
  }

inline void load_block(Lane::f (&v)[kVectors], const void* from, Dtype dtype) {
#define FD_LOAD(name) \
  FD_UNROLL           \
  for (int u = 0; u < kVectors; ++u) v[u] = Lane::load_##name(from, u * Lane::kWidth)
  FD_EACH_DTYPE(dtype, FD_LOAD)
#undef FD_LOAD
}

inline void store_block(Lane::f (&v)[kVectors], void* to, int64_t first, Dtype dtype) {
#define FD_STORE(name) \
  FD_UNROLL            \
  for (int u = 0; u < kVectors; ++u) Lane::store_##name(to, first + u * Lane::kWidth, v[u])
  FD_EACH_DTYPE(dtype, FD_STORE)
#undef FD_STORE
}

template <bool plain = false>
inline void accumulate(Lane::f (&sum)[kVectors], float weight, const void* from, Dtype dtype) {
  const Lane::f w = Lane::set(weight);
#define FD_FMA(name) \
  FD_UNROLL          \
  for (int u = 0; u < kVectors; ++u) sum[u] = Lane::fma(w, Lane::load_##name(from, u * Lane::kWidth), sum[u])
  if (plain) {
    FD_FMA(f32);
  } else {
    FD_EACH_DTYPE(dtype, FD_FMA)
  }
#undef FD_FMA
}

template <bool plain>
inline void add_up(Lane::f (&sum)[kVectors], const Sum& terms, const Workspace& w) {
  FD_UNROLL
  for (int u = 0; u < kVectors; ++u) sum[u] = Lane::set(-0.0f);  // neutral: the first fma is a product, rounded once
  for (int i = 0; i < terms.count; ++i) accumulate<plain>(sum, terms.terms[i].weight, w.at[terms.terms[i].source], w.dtype[terms.terms[i].source]);
}

// fma(m, v, fma(-m, k, k)), k = k0 known + k1 N
inline void mix_block(Lane::f (&v)[kVectors], const Mix& mix, const Workspace& w) {
  Lane::f k[kVectors], m[kVectors];
  FD_UNROLL
  for (int u = 0; u < kVectors; ++u) k[u] = Lane::set(-0.0f);
  if (mix.k0 != 0.0f) accumulate(k, mix.k0, w.at[kFromKnown], w.dtype[kFromKnown]);
  const int noise = kFromNoise + w.program.mask_noise;
  if (mix.k1 != 0.0f) accumulate(k, mix.k1, w.at[noise], w.dtype[noise]);
  load_block(m, w.at[kFromMask], w.dtype[kFromMask]);
  FD_UNROLL
  for (int u = 0; u < kVectors; ++u) v[u] = Lane::fma(m[u], v[u], Lane::fma(Lane::negate(m[u]), k[u], k[u]));
}

inline bool dense(const View& v) { return v.groups == 1; }

// Elements first .. last - 1 of a sample to their places in a block; the others become 0. Whole vectors of dense memory
// are converted as such.
inline void gather(float* to, const char* from, const View& v, int64_t first, int64_t last, int64_t period) {
  const int64_t base = first - first % kBlock;
  for (int i = 0; i < kBlock; ++i) to[i] = 0.0f;
  if (period != 0) {
    for (int64_t e = first; e < last; ++e) to[e - base] = load(from, v.dtype, v.at(e % period));
  } else if (dense(v)) {
    int64_t e = first;
#define FD_VECTOR(name) \
  for (; e + Lane::kWidth <= last; e += Lane::kWidth) Lane::store_f32(to, e - base, Lane::load_##name(from, e))
    FD_EACH_DTYPE(v.dtype, FD_VECTOR)
#undef FD_VECTOR
    for (; e < last; ++e) to[e - base] = load(from, v.dtype, e);
  } else {
    for (int64_t e = first; e < last;) {  // channel by channel
      const int64_t channel = e / v.inner, pixel = e - channel * v.inner;
      const int64_t count = v.inner - pixel < last - e ? v.inner - pixel : last - e, at = pixel * v.groups + channel;
#define FD_STRIDED(name) \
  for (int64_t i = 0; i < count; ++i) to[e - base + i] = ScalarLane::load_##name(from, at + i * v.groups)
      FD_EACH_DTYPE(v.dtype, FD_STRIDED)
#undef FD_STRIDED
      e += count;
    }
  }
}

// A block of values to elements first .. last - 1 of a sample.
template <bool plain>
inline void put(Lane::f (&v)[kVectors], char* sample, const View& to, int64_t first, int64_t last, Lane::nan& seen, bool& tail_seen) {
  const int64_t base = first - first % kBlock;
  if (plain || (last - first == kBlock && dense(to))) {
    FD_UNROLL
    for (int u = 0; u < kVectors; ++u) v[u] = Lane::canonical(v[u], seen);
    store_block(v, sample, base, plain ? Dtype::f32 : to.dtype);
    return;
  }
  alignas(64) float values[kBlock];
  store_block(v, values, 0, Dtype::f32);
  int64_t e = first;
  if (dense(to)) {
#define FD_VECTOR(name)                                                     \
  for (; e + Lane::kWidth <= last; e += Lane::kWidth) {                     \
    Lane::store_##name(sample, e, Lane::canonical(Lane::load_f32(values, e - base), seen)); \
  }
    FD_EACH_DTYPE(to.dtype, FD_VECTOR)
#undef FD_VECTOR
  }
  while (e < last) {  // channel by channel, or the rest of a dense sample
    const int64_t channel = e / to.inner, pixel = e - channel * to.inner;
    const int64_t count = to.inner - pixel < last - e ? to.inner - pixel : last - e, at = pixel * to.groups + channel;
#define FD_STRIDED(name) \
  for (int64_t i = 0; i < count; ++i) ScalarLane::store_##name(sample, at + i * to.groups, ScalarLane::canonical(values[e - base + i], tail_seen))
    FD_EACH_DTYPE(to.dtype, FD_STRIDED)
#undef FD_STRIDED
    e += count;
  }
}

inline char* sample_of(const View& v, int64_t b) {
  return static_cast<char*>(v.data) + b * v.batch_stride * (v.dtype == Dtype::f32 ? 4 : 2);
}

// Whether the whole blocks of the program need no look at dtypes, layouts and masks: the most common case by far, where
// such looks would take as long as the arithmetic.
inline bool is_plain(const StepArgs& a, const Program& p) {
  const auto fits = [](const View& v) { return dense(v) && v.dtype == Dtype::f32; };
  for (int i = 0; i < p.readers; ++i) {
    if (!fits(*p.reader[i].view)) return false;
  }
  for (int i = 0; i < a.layout.outputs; ++i) {
    if (!fits(a.out[i]) || p.mix[2 + i].on) return false;
  }
  return !p.mix[0].on && !(p.has_d && p.mix[1].on) && (p.slot < 0 || fits(a.in[a.listed + p.slot]));
}

// Elements first .. last - 1, all of one block, of sample b. Returns whether a stored value was NaN.
template <bool plain>
inline bool run_block(const StepArgs& a, Workspace& w, int64_t b, int64_t first, int64_t last) {
  const Program& p = w.program;
  const bool whole = last - first == kBlock;
  const int64_t base = first - first % kBlock;

  for (int i = 0; i < p.readers; ++i) {
    const Reader& r = p.reader[i];
    if (plain) {
      w.at[r.source] = r.data + base * 4;
      continue;
    }
    const View& v = *r.view;
    const int64_t period = r.source == kFromMask ? a.mask_period : 0;
    const int64_t size = v.dtype == Dtype::f32 ? 4 : 2;
    if (whole && dense(v) && (period == 0 || period % kBlock == 0)) {
      w.at[r.source] = r.data + (period == 0 ? base : base % period) * size;
      w.dtype[r.source] = v.dtype;
    } else {
      gather(w.buffer[r.source], r.data, v, first, last, period);
      w.at[r.source] = w.buffer[r.source];
      w.dtype[r.source] = Dtype::f32;
    }
  }
  for (int i = 0; i < p.noises; ++i) {
    const int source = kFromNoise + p.noise[i];
    normals(p.stream[p.noise[i]], base, first, last, w.buffer[source]);
    w.at[source] = w.buffer[source];
    w.dtype[source] = Dtype::f32;
  }

  Lane::f v[kVectors];
  if (!plain && p.mix[0].on) {
    load_block(v, w.at[p.masked], w.dtype[p.masked]);
    mix_block(v, p.mix[0], w);
    store_block(v, w.buffer[p.masked], 0, Dtype::f32);
    w.at[p.masked] = w.buffer[p.masked];
    w.dtype[p.masked] = Dtype::f32;
  }
  if (p.has_d) {
    add_up<plain>(v, p.d, w);
    if (p.clip) {
      const Lane::f low = Lane::set(p.low), high = Lane::set(p.high), factor = Lane::set(p.factor);
      FD_UNROLL
      for (int u = 0; u < kVectors; ++u) v[u] = Lane::mul(Lane::lower(Lane::raise(v[u], low), high), factor);
    }
    if (!plain && p.mix[1].on) mix_block(v, p.mix[1], w);
    store_block(v, w.buffer[kFromD], 0, Dtype::f32);
    w.at[kFromD] = w.buffer[kFromD];
    w.dtype[kFromD] = Dtype::f32;
  }

  // An output may be an input of a later one: nothing is stored before all are computed.
  Lane::nan seen = Lane::no_nan();
  bool tail_seen = false;
  const int outputs = a.layout.outputs;
  for (int i = 0; i < outputs; ++i) {
    add_up<plain>(v, p.y[i], w);
    if (!plain && p.mix[2 + i].on) mix_block(v, p.mix[2 + i], w);
    if (i + 1 < outputs) store_block(v, w.y[i], 0, Dtype::f32);
  }
  for (int i = outputs - 1; i >= 0; --i) {
    if (i + 1 < outputs) load_block(v, w.y[i], Dtype::f32);
    put<plain>(v, sample_of(a.out[i], b), a.out[i], first, last, seen, tail_seen);
  }
  if (p.slot >= 0) {
    const View& to = a.in[a.listed + p.slot];
    load_block(v, w.buffer[kFromD], Dtype::f32);
    put<plain>(v, sample_of(to, b), to, first, last, seen, tail_seen);
  }
  return tail_seen || Lane::any(seen);
}

// Elements first .. last - 1 of sample b, token by token; neighbours of one row are taken together.
inline void run_range(const StepArgs& a, Workspace& w, int64_t b, int64_t first, int64_t last, int32_t& bad_row) {
  const int64_t length = a.numel / a.tokens;
  for (int64_t e = first; e < last;) {
    int64_t t = e / length;
    const int32_t row = row_of(a, b, t);
    int64_t stop = last;
    while (++t < a.tokens && t * length < last) {
      if (row_of(a, b, t) != row) {
        stop = t * length;
        break;
      }
    }
    compile(a, b, row, w.program);
    bool seen = false;
    if (e % kBlock == 0 && is_plain(a, w.program)) {
      for (; e + kBlock <= stop; e += kBlock) seen |= run_block<true>(a, w, b, e, e + kBlock);
    }
    while (e < stop) {
      const int64_t next = e - e % kBlock + kBlock < stop ? e - e % kBlock + kBlock : stop;
      seen |= run_block<false>(a, w, b, e, next);
      e = next;
    }
    if (seen && row < bad_row) bad_row = row;
  }
}

// Units first .. last - 1 of the batch, each of `unit` elements of one sample (the last of a sample may be smaller).
__attribute__((noinline)) inline void run_units(const void* args, int64_t unit, int64_t first, int64_t last) {
  const StepArgs& a = *static_cast<const StepArgs*>(args);
  const int64_t units = (a.numel + unit - 1) / unit;
  Workspace w;
  int32_t bad_row = INT32_MAX;
  while (first < last) {
    const int64_t b = first / units, in_sample = first - b * units;
    const int64_t stop = units - in_sample < last - first ? units : in_sample + (last - first);
    const int64_t end = stop * unit < a.numel ? stop * unit : a.numel;
    run_range(a, w, b, in_sample * unit, end, bad_row);
    first += stop - in_sample;
  }
  if (a.status != nullptr && bad_row != INT32_MAX) {
    int32_t old = __atomic_load_n(a.status, __ATOMIC_RELAXED);
    while (bad_row < old && !__atomic_compare_exchange_n(a.status, &old, bad_row, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }
}

inline void run_words(const int64_t* key, int64_t count, uint32_t* out) {
  for (int64_t first = 0; first < count; first += 4) {
    uint32_t words[4];
    philox_block({static_cast<uint64_t>(key[0]), static_cast<uint64_t>(key[1])}, static_cast<uint64_t>(first) / 4, words);
    for (int64_t j = first; j < count && j < first + 4; ++j) out[j] = words[j - first];
  }
}

}  // namespace FASTDIFF_NAMESPACE
