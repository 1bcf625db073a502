// The launches of the CUDA backend: plain arguments in, a CUDA error code out. Neither torch nor CUDA headers here, so
// that tests link them with a stub runtime.
#pragma once
#include "../reduce.h"
#include "../row.h"

namespace FASTDIFF_NAMESPACE {

// A kernel's parameter: the arguments and what the host has found out about them.
struct StepLaunch {
  StepArgs args;
  int64_t inner;         // of every channels-last view; 0 where there is none
  int64_t token_numel;   // elements a token
  uint32_t aligned;      // bit by view: vector access; inputs from 0, outputs from kAlignedOut, bank, known, mask
};
constexpr int kAlignedOut = kMaxInputs, kAlignedBank = kAlignedOut + kMaxOutputs, kAlignedKnown = kAlignedBank + 1,
              kAlignedMask = kAlignedBank + 2;

struct NormalArgs {
  int64_t batch, numel;
  const int64_t* keys;
  int64_t key_stride_b, key_stride_pair;  // in int64
  View out;
};

struct NormalLaunch {
  NormalArgs args;
  int64_t inner;
  uint32_t aligned;
};

// The first launch of edit_: the sum of squares of every chunk of h.
struct SquaresLaunch {
  int64_t batch, numel;
  int32_t chunks;  // of a sample
  Terms terms;
  View h;
  float* sums;  // dense (batch, chunks)
};

// The second one. in_place: out is h.
struct EditLaunch {
  EditArgs args;
  int32_t chunks;
  const float* sums;
  int64_t inner;
  uint32_t aligned;  // bit by view: out, h, bank
  uint32_t in_place;
};
constexpr int kEditOut = 0, kEditH = 1, kEditBank = 2;

constexpr int kMaxDims = 8;

// out[i] = fold_in(keys[i], data[i]) over a shape that keys and data are broadcast to; strides in int64.
struct FoldInArgs {
  int64_t count, dims;
  int64_t size[kMaxDims], key_stride[kMaxDims], data_stride[kMaxDims];
  int64_t key_stride_pair;
  const int64_t *keys, *data;
  int64_t* out;  // dense (count, 2)
};

struct RunKeysArgs {
  int64_t rows, noises, batch;  // N, J, B
  int64_t seed_stride, stream_stride[2], draw_stride[2];
  const int64_t *seeds, *streams, *draws;
  int64_t* out;  // dense (N, J, B, 2)
};

struct RawWordsArgs {
  int64_t batch, count;
  const int64_t* keys;
  int64_t key_stride_b, key_stride_pair;
  uint32_t* out;  // dense (batch, count)
};

constexpr int kWarp = 32;

struct Grid {
  unsigned x, y, z, block_x, block_y;
};

// What a kernel can do, since what it can do costs registers and instructions even where a row does not ask for it.
// Everything: bank, masks, rows by token. Dense: no more than plain, and every access is a whole vector.
enum Features : int { kPlain = 0, kWithBank = 1, kEverything = 2, kDense = 3 };

// Are all views float32, known when compiled? `elements` is how many a thread owns.
FD_HD constexpr bool all_f32(int elements, Features features) {
  return features == kDense ? elements == 8 : features != kEverything && elements == 4;
}

// What a launch will be; see plan.h. `elements` is 0 when there is nothing to do.
struct StepPlan {
  StepLaunch launch;
  Grid grid;
  int elements;
  Features features;
  bool valid;
};

struct NormalPlan {
  NormalLaunch launch;
  Grid grid;
  int elements;
  Features features;  // kPlain or kDense
};

// vector: elements of h that the sums read at once, 1 where they are not side by side. No sums where there are no terms.
struct EditPlan {
  SquaresLaunch squares;
  EditLaunch launch;
  Grid squares_grid, grid;
  int vector, elements;
  Features features;  // kPlain or kDense
  bool valid;
};

// `stream` is a cudaStream_t, the result a cudaError_t. Asynchronous, one launch (two where sums are taken), no allocation.
int launch_step(const StepArgs& args, void* stream);
// How many float32 launch_edit needs at `sums`.
inline int64_t edit_sums(const EditArgs& args) { return args.terms.count ? args.batch * chunks_of(args.numel) : 0; }
int launch_edit(const EditArgs& args, float* sums, void* stream);
int launch_normal(const NormalArgs& args, void* stream);
int launch_fold_in(const FoldInArgs& args, void* stream);
int launch_run_keys(const RunKeysArgs& args, void* stream);
int launch_raw_words(const RawWordsArgs& args, void* stream);
const char* launch_error(int code);

}  // namespace FASTDIFF_NAMESPACE
