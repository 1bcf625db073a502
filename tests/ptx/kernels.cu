// Small kernels with known results, for the tests of the executor. kernels.ptx is what nvcc makes of them:
//   nvcc -ptx -std=c++17 -O3 -fmad=false -arch=sm_90 kernels.cu -o kernels.ptx
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define KERNEL extern "C" __global__ void

__constant__ int table[8] = {3, 1, 4, 1, 5, 9, 2, 6};
__device__ unsigned counter = 7;

// Nested branches and an early return.
KERNEL nested(const int* x, int* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int v = x[i];
  if (v & 1) {
    if (v & 2) {
      y[i] = v * 3;
    } else {
      if (v > 100) return;
      y[i] = v - 7;
    }
    y[i] += 1;
  } else {
    for (int k = 0; k < (v & 15); ++k) {
      if ((v >> k) % 3 == 0) continue;
      if (k == 11) break;
      y[i] += k * v;
    }
  }
}

// A trip count of its own for each thread, and a switch.
KERNEL collatz(const uint32_t* x, uint32_t* steps, uint32_t* kinds) {
  const int i = threadIdx.x;
  uint32_t v = x[i], n = 0;
  while (v != 1) {
    v = v % 2 ? 3 * v + 1 : v / 2;
    ++n;
  }
  steps[i] = n;
  uint32_t kind;
  switch (n % 9) {
    case 0: kind = x[i] ^ 0x1234; break;
    case 1: kind = x[i] * 17; break;
    case 2: kind = x[i] >> 3; break;
    case 3: kind = n + x[i] * n; break;
    case 4: kind = x[i] | 0xF0; break;
    case 5: kind = ~x[i]; break;
    case 6: kind = n / (x[i] + 1); break;
    default: kind = 99;
  }
  kinds[i] = kind;
}

// A block's sum through shared memory; the last warp by shuffles.
KERNEL block_sum(const uint32_t* x, uint32_t* sums, int n) {
  __shared__ uint32_t part[128];
  const int t = threadIdx.x;
  uint32_t v = 0;
  for (int i = blockIdx.x * blockDim.x + t; i < n; i += gridDim.x * blockDim.x) v += x[i];
  part[t] = v;
  __syncthreads();
  for (int half = 64; half >= 32; half /= 2) {
    if (t < half) part[t] += part[t + half];
    __syncthreads();
  }
  if (t < 32) {
    v = part[t];
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_down_sync(0xFFFFFFFFu, v, offset);
    if (t == 0) sums[blockIdx.x] = v;
  }
}

// Shared memory of a size known at launch only, read in another order.
KERNEL reversed(const uint16_t* x, uint16_t* y) {
  extern __shared__ uint16_t tile[];
  tile[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  y[blockIdx.x * blockDim.x + threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

KERNEL atomics(const int* x, int* out, unsigned long long* total, uint32_t* old) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicMin(out, x[i]);
  atomicMax(out + 1, x[i]);
  atomicAdd(out + 2, x[i]);
  atomicOr(reinterpret_cast<unsigned*>(out) + 3, 1u << (x[i] & 31));
  atomicAnd(reinterpret_cast<unsigned*>(out) + 4, ~(1u << (x[i] & 31)));
  atomicAdd(total, static_cast<unsigned long long>(x[i] & 0xFFFF) << 20);
  old[i] = atomicAdd(&counter, 1u);
  if ((x[i] & 31) == 5) atomicExch(out + 5, 55);
  atomicCAS(out + 6, 0, 77);
}

// 16 bytes an access where whole, elements at the end.
KERNEL scale4(const float* x, float* y, float a, int64_t n) {
  const int64_t i = 4 * (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x);
  if (i + 4 <= n) {
    float4 v = reinterpret_cast<const float4*>(x)[i / 4];
    v.x *= a, v.y *= a, v.z *= a, v.w *= a;
    reinterpret_cast<float4*>(y)[i / 4] = v;
  } else {
    for (int64_t k = i; k < n; ++k) y[k] = x[k] * a;
  }
}

// Elements beyond 2^32 bytes.
KERNEL strided(const uint8_t* x, uint8_t* y, int64_t stride) {
  const int64_t at = (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * stride + threadIdx.x;
  y[at] = x[at] + 1;
}

// An array in local memory, indexed at run time, and a table in constant memory.
KERNEL local_array(const uint32_t* x, uint32_t* y) {
  uint32_t a[16];
  const uint32_t v = x[threadIdx.x];
  for (int k = 0; k < 16; ++k) a[(k * 7 + v) & 15] = v * k + table[k & 7];
  uint32_t s = 0;
  for (int k = 0; k < 16; ++k) s = s * 31 + a[(v >> k) & 15];
  y[threadIdx.x] = s + table[v & 7];
}

KERNEL floats(const float* a, const float* b, const float* c, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  out[i] = __fmaf_rn(a[i], b[i], c[i]);
  out[n + i] = a[i] * b[i] + c[i];
  out[2 * n + i] = a[i] / b[i];
  out[3 * n + i] = sqrtf(a[i]);
  out[4 * n + i] = a[i] - b[i];
  out[5 * n + i] = a[i] < b[i] ? a[i] : c[i];
}

KERNEL halves(const __half* h, const __nv_bfloat16* b, const float* f, float* wide, uint16_t* narrow, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  wide[i] = __half2float(h[i]);
  wide[n + i] = __bfloat162float(b[i]);
  narrow[i] = __half_as_ushort(__float2half_rn(f[i]));
  narrow[n + i] = __bfloat16_as_ushort(__float2bfloat16_rn(f[i]));
}

KERNEL integers(const int64_t* a, const int64_t* b, int64_t* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const int64_t x = a[i], y = b[i];
  const uint64_t ux = x, uy = y;
  const int32_t sx = static_cast<int32_t>(x), sy = static_cast<int32_t>(y);
  const uint32_t wx = static_cast<uint32_t>(x), wy = static_cast<uint32_t>(y);
  int64_t* o = out + 16 * i;
  o[0] = x * y;
  o[1] = __mul64hi(x, y);
  o[2] = static_cast<int64_t>(__umul64hi(ux, uy));
  o[3] = y ? x / y : -1;
  o[4] = y ? x % y : -1;
  o[5] = uy ? static_cast<int64_t>(ux / uy) : -1;
  o[6] = static_cast<int64_t>(sx) * sy;
  o[7] = static_cast<int64_t>(static_cast<uint64_t>(wx) * wy);
  o[8] = __clz(sx) * 1000 + __popc(wx) + (__clzll(x) * 1000 + __popcll(ux)) * 100000ll;
  o[9] = __brev(wx) + (static_cast<uint64_t>(__funnelshift_l(wx, wy, wx)) << 32);
  o[10] = __byte_perm(wx, wy, wx >> 7);
  o[11] = x >> (y & 63);
  o[12] = static_cast<int64_t>(ux >> (y & 63));
  o[13] = static_cast<int8_t>(x) + 1000ll * static_cast<int16_t>(y) + 100000000ll * static_cast<uint8_t>(x);
  o[14] = x < y ? (ux < uy ? 1 : 2) : (ux < uy ? 3 : 4);
  o[15] = __ffsll(x) + (sx > sy ? sx : sy) + (wx < wy ? wx : wy);
}

// Votes and shuffles within a warp that has split.
KERNEL warps(const uint32_t* x, uint32_t* y) {
  const uint32_t v = x[threadIdx.x];
  uint32_t r = __ballot_sync(0xFFFFFFFFu, v & 1);
  r ^= __shfl_xor_sync(0xFFFFFFFFu, v, 5);
  r += __shfl_up_sync(0xFFFFFFFFu, v, 3, 16);
  r ^= __shfl_sync(0xFFFFFFFFu, v, v & 31);
  if (threadIdx.x % 32 < 16) {
    r += __reduce_max_sync(0x0000FFFFu, v);
    r += __any_sync(0x0000FFFFu, v == 3);
  } else {
    r -= __reduce_add_sync(0xFFFF0000u, v);
  }
  __syncwarp();
  y[threadIdx.x] = r;
}
