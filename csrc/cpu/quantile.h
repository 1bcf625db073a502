// The loops of quantile_: how often each digit occurs among the elements of a sample, d being made anew in each pass.
#pragma once
#include "kernel.h"
#include "search.h"

namespace FASTDIFF_NAMESPACE {

// What sample b adds up, as step_ does for its d.
inline void compile_sum(const QuantileArgs& args, int64_t b, Program& p) {
  const StepArgs& a = args.step;
  p.readers = p.noises = p.d.count = 0;
  __builtin_memset(p.used, 0, sizeof p.used);
  p.row = row_of(a, b, 0);
  add_inputs(a, p, p.d, a.coef + p.row * args.coef_stride, b);
}

// |d| of elements first .. last - 1, all of one block; every NaN as one.
inline void size_block(Workspace& w, int64_t first, int64_t last, float (&sizes)[kBlock]) {
  const Program& p = w.program;
  const int64_t base = first - first % kBlock;
  for (int i = 0; i < p.readers; ++i) {
    const Reader& r = p.reader[i];
    if (last - first == kBlock && dense(*r.view)) {
      w.at[r.source] = r.data + base * (r.view->dtype == Dtype::f32 ? 4 : 2);
      w.dtype[r.source] = r.view->dtype;
    } else {
      gather(w.buffer[r.source], r.data, *r.view, first, last, 0);
      w.at[r.source] = w.buffer[r.source];
      w.dtype[r.source] = Dtype::f32;
    }
  }
  Lane::f v[kVectors];
  add_up<false>(v, p.d, w);
  Lane::nan seen = Lane::no_nan();
  FD_UNROLL
  for (int u = 0; u < kVectors; ++u) {
    v[u] = Lane::value(Lane::insert(Lane::bits(Lane::canonical(v[u], seen)), Lane::set_i(0x7FFFFFFFu), Lane::set_i(0)));
  }
  store_block(v, sizes, 0, Dtype::f32);
}

// Adds to counts how often each digit occurs among elements first .. last - 1 of the sample in w, first being where a block begins:
// among those with the first prefix, and among those with the second where that is another.
inline void count_digits(Workspace& w, const Search& s, int pass, int64_t first, int64_t last, uint32_t (&counts)[2][kBins]) {
  alignas(64) float sizes[kBlock];
  const int shift = kShift[pass], above = pass == 0 ? 31 : kShift[pass - 1];
  const uint32_t digits = kDigits[pass];
  for (int64_t e = first, next; e < last; e = next) {
    next = e + kBlock < last ? e + kBlock : last;
    size_block(w, e, next, sizes);
    const int count = static_cast<int>(next - e);
    if (pass == 0) {
      for (int i = 0; i < count; ++i) ++counts[0][bit_cast<uint32_t>(sizes[i]) >> shift];
      continue;
    }
    for (int i = 0; i < count; ++i) {
      const uint32_t bits = bit_cast<uint32_t>(sizes[i]), prefix = bits >> above;
      if (prefix == s.prefix[0]) {
        ++counts[0][bits >> shift & digits];
      } else if (prefix == s.prefix[1]) {
        ++counts[1][bits >> shift & digits];
      }
    }
  }
}

// Samples first .. last - 1, each from beginning to end.
__attribute__((noinline)) inline void quantile_samples(const void* args, int64_t first, int64_t last) {
  const QuantileArgs& a = *static_cast<const QuantileArgs*>(args);
  Workspace w;
  uint32_t counts[2][kBins];
  for (int64_t b = first; b < last; ++b) {
    compile_sum(a, b, w.program);
    Search s(a);
    for (int pass = 0; pass < kPasses; ++pass) {
      __builtin_memset(counts, 0, sizeof counts);
      count_digits(w, s, pass, 0, a.step.numel, counts);
      advance(s, pass, counts);
    }
    finish(a, b, s);
  }
}

// One pass over pieces first .. last - 1 of `piece` elements of sample b. search: the Search so far; counts: of all pieces, at 0
__attribute__((noinline)) inline void quantile_pieces(const void* args, const void* search, int pass, int64_t b, int64_t piece,
                                                      int64_t first, int64_t last, void* counts) {
  const QuantileArgs& a = *static_cast<const QuantileArgs*>(args);
  Workspace w;
  compile_sum(a, b, w.program);
  for (int64_t i = first; i < last; ++i) {
    const int64_t end = (i + 1) * piece < a.step.numel ? (i + 1) * piece : a.step.numel;
    count_digits(w, *static_cast<const Search*>(search), pass, i * piece, end, static_cast<uint32_t(*)[2][kBins]>(counts)[i]);
  }
}

}  // namespace FASTDIFF_NAMESPACE
