// The fixed tree over one chunk, for a tile of samples and vectors at once: what is loaded serves several sums, and as many sums as
// the registers hold hide the latency of an fma. csrc/reduce.h and fastdiff/reference/reduce.py say what the tree is.
#pragma once
#include "../reduce.h"
#include "kernel.h"

namespace FASTDIFF_NAMESPACE {

// Where there are few registers of lanes, their tree is one piece of code.
#if defined(FASTDIFF_VECTOR) && (defined(__AVX2__) || defined(__AVX512F__))
#define FD_INLINE __attribute__((always_inline))
#else
#define FD_INLINE
#endif

constexpr int kRegisters = kLanes / Lane::kWidth;  // that hold the lanes of a chunk

// Samples and vectors of a tile: their sums, and what is loaded for them, fit into the registers.
constexpr int kTileSamples = Lane::kWidth == 16 ? 4 : Lane::kWidth == 8 ? 2 : 1;
constexpr int kTileVectors = Lane::kWidth >= 8 ? 4 : 1;

// The elements of one chunk. The last of them that fill no register stand in `tail`, followed by zeros: an fma of zeros changes at
// most the sign of a zero, which the second level of the tree does not see.
struct Operand {
  const float* at;
  const float* tail;
};

template <int kB, int kM>
struct Tile {
  const float *x[kB], *v[kM], *x_tail[kB], *v_tail[kM];
  int count;  // elements of the chunk

  int rows(int reg) const {  // in which a register of lanes is whole
    const int end = (reg + 1) * Lane::kWidth;
    return count < end ? 0 : (count - end) / kLanes + 1;
  }
  bool has_tail(int reg) const { return count % Lane::kWidth != 0 && count / Lane::kWidth % kRegisters == reg; }
};

template <int kB, int kM>
inline void multiply_add(Lane::f (&sum)[kB][kM], const float* const (&x)[kB], const float* const (&v)[kM], int64_t e) {
  Lane::f a[kB];
  FD_UNROLL
  for (int b = 0; b < kB; ++b) a[b] = Lane::load_f32(x[b], e);
  FD_UNROLL
  for (int m = 0; m < kM; ++m) {
    const Lane::f c = Lane::load_f32(v[m], e);
    FD_UNROLL
    for (int b = 0; b < kB; ++b) sum[b][m] = Lane::fma(c, a[b], sum[b][m]);
  }
}

template <int kB, int kM>
inline void add_tile(Lane::f (&sum)[kB][kM], const Lane::f (&other)[kB][kM]) {
  FD_UNROLL
  for (int b = 0; b < kB; ++b) {
    FD_UNROLL
    for (int m = 0; m < kM; ++m) sum[b][m] = Lane::add(sum[b][m], other[b][m]);
  }
}

// The tree of registers reg, reg + kStep, reg + 2 kStep, ...: of the first and third and so on, of the others, and their sum. The last
// kP of a branch are summed side by side, for the latency of their fmas.
template <int kStep, int kP, int kB, int kM>
FD_INLINE inline void sum_registers(const Tile<kB, kM>& tile, int reg, Lane::f (&total)[kB][kM]) {
  if constexpr (kStep * kP < kRegisters) {
    Lane::f first[kB][kM];
    sum_registers<2 * kStep, kP>(tile, reg, first);
    sum_registers<2 * kStep, kP>(tile, reg + kStep, total);
    add_tile(total, first);
  } else {
    Lane::f sum[kP][kB][kM];
    FD_UNROLL
    for (int p = 0; p < kP; ++p) {
      FD_UNROLL
      for (int b = 0; b < kB; ++b) {
        FD_UNROLL
        for (int m = 0; m < kM; ++m) sum[p][b][m] = Lane::set(0.0f);
      }
    }
    const int rows = tile.rows(reg + (kP - 1) * kStep);
    const int64_t first = reg * Lane::kWidth, apart = kStep * Lane::kWidth, end = first + rows * kLanes;
    for (int64_t e = first; e < end; e += kLanes) {
      FD_UNROLL
      for (int p = 0; p < kP; ++p) multiply_add(sum[p], tile.x, tile.v, e + p * apart);
    }
    FD_UNROLL
    for (int p = 0; p < kP; ++p) {  // registers of lower lanes may have one row more
      if (p + 1 < kP && tile.rows(reg + p * kStep) > rows) multiply_add(sum[p], tile.x, tile.v, end + p * apart);
      if (tile.has_tail(reg + p * kStep)) multiply_add(sum[p], tile.x_tail, tile.v_tail, 0);
    }
    FD_UNROLL
    for (int half = kP / 2; half >= 1; half /= 2) {
      FD_UNROLL
      for (int p = 0; p < half; ++p) add_tile(sum[p], sum[p + half]);
    }
    FD_UNROLL
    for (int b = 0; b < kB; ++b) {
      FD_UNROLL
      for (int m = 0; m < kM; ++m) total[b][m] = sum[0][b][m];
    }
  }
}

// out[b][m] = S_c of sample b and vector m, for kB samples and kM vectors.
template <int kB, int kM, int kP>
inline void dot_chunk(const Operand* x, const Operand* v, int count, float (&out)[kB][kM]) {
  Tile<kB, kM> tile;
  tile.count = count;
  for (int b = 0; b < kB; ++b) tile.x[b] = x[b].at, tile.x_tail[b] = x[b].tail;
  for (int m = 0; m < kM; ++m) tile.v[m] = v[m].at, tile.v_tail[m] = v[m].tail;
  Lane::f sum[kB][kM];
  sum_registers<1, kP>(tile, 0, sum);
  FD_UNROLL
  for (int b = 0; b < kB; ++b) {
    FD_UNROLL
    for (int m = 0; m < kM; ++m) out[b][m] = Lane::tree(sum[b][m]);
  }
}

// Elements first .. last - 1 of a sample, at most a chunk, as floats in logical order, with zeros up to a multiple of kBlock.
inline void gather_chunk(float* to, const char* from, const View& v, int64_t first, int64_t last) {
  for (int64_t e = first; e < last; e += kBlock) {
    gather(to + (e - first), from, v, e, e + kBlock < last ? e + kBlock : last, 0);
  }
}

// The chunk first .. last - 1 of a sample: in place where it is dense float32, else in `buffer` (kChunk floats).
inline Operand operand(const View& v, int64_t sample, int64_t first, int64_t last, float* buffer, float* tail) {
  const char* from = sample_of(v, sample);
  const int64_t whole = (last - first) / Lane::kWidth * Lane::kWidth;
  if (!dense(v) || v.dtype != Dtype::f32) {
    gather_chunk(buffer, from, v, first, last);
    return {buffer, buffer + whole};
  }
  const float* at = reinterpret_cast<const float*>(from) + first;
  for (int64_t i = 0; i < Lane::kWidth && whole < last - first; ++i) tail[i] = i < last - first - whole ? at[whole + i] : 0.0f;
  return {at, tail};
}

// How many lanes of the second level can be other than zero, as a power of 2.
inline int lanes_of(int64_t numel) {
  int lanes = 1;
  while (lanes < kLanes && lanes < chunks_of(numel)) lanes *= 2;
  return lanes;
}

// The second level. sums: of each lane the sum of its chunks, from 0.0 on; overwritten.
inline float combine(float* sums, int lanes) {
  for (int half = lanes / 2; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

}  // namespace FASTDIFF_NAMESPACE
