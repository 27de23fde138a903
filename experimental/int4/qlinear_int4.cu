/* QLinear of weights and activations of at most 4 bits on the int4 tensor cores of Ampere and Ada
 * (sm_80, 86, 89): mma.sync m16n8k64 s4, which the Triton language does not have. Later chips have
 * no such unit. Speed: unmeasured.
 *
 *   acc = q_x q_w^T                                   exact
 *   y   = (acc * s_w) * s_x + bias                    fp32, rounded once to fp16
 *
 * Order of channels. Inside 32 channels, place 8*i + j of a packed row is channel 4*j + i, i in
 * 0..3, j in 0..7: nibble j of word i. A bit-plane word then expands by a rotation and a mask: its
 * bit 4*j + i is for nibble j of word i. A thread of the MMA needs word i = lane % 4 of four words,
 * for activations and weights alike, so nothing is moved between threads.
 *
 * Weight codes sit at the top of their nibble: (u << (4-b)) ^ 8 is code * 2^(4-b), as a signed one.
 * The sum carries that factor; one shift at the end takes it out, exactly.
 *
 * A block of 8 warps makes 128 x 128 of y, a warp 64 x 32, in steps of 128 channels. While a step
 * is multiplied, cp.async brings the next one's codes and words to the other half of shared memory.
 */
#ifdef __CUDACC__
#include "ptx.cuh"
#else
#include "emulation.h"
#endif

namespace treeq::int4 {

constexpr int kTile = 128;                    // rows and columns of y of a block
constexpr int kStep = 128;                    // channels of a step: 64 bytes of codes a row
constexpr int kThreads = 256;                 // 8 warps: 2 down, 4 across
constexpr int kWarpRows = 64, kWarpColumns = 32;
constexpr int kMmaRows = 16, kMmaColumns = 8; // and 64 channels
constexpr int kRowTiles = kWarpRows / kMmaRows, kColumnTiles = kWarpColumns / kMmaColumns;
constexpr int kStepWords = kStep / 32;        // words of a plane, chunks of codes, of a row
constexpr int kChunk = 16;                    // bytes: the codes of 32 channels
constexpr uint32_t kNibbles = 0x11111111u;    // the lowest bit of each

/* Shared memory of one step. */
template <int BITS>
struct Step {
  unsigned char codes[kTile * kStep / 2];
  uint32_t words[BITS][kTile][kStepWords];
};

/* The arguments of a launch; all matrices are row-major. */
struct Problem {
  const unsigned char* codes;   // (M, KP/2): int4 in the order above, zeros from K to KP
  const uint32_t* planes;       // (BITS, N, KW)
  const float* act_scale;       // (M,)
  const float* weight_scale;    // (N,)
  const float* bias;            // (N,), read where has_bias is not 0
  int m, n, kp, kw;             // kp: multiple of 128; kw: words a row, ceil(K / 32)
  int has_bias;
};

/* Byte of a chunk of codes in shared memory. The four chunks of a row change places from one pair
 * of rows to the next: the eight rows that ldmatrix reads at a time then lie in all 32 banks. */
__device__ __forceinline__ int place_of(int row, int chunk) {
  return row * (kStep / 2) + ((chunk ^ (row >> 1)) & 3) * kChunk;
}

__device__ __forceinline__ int clamp_below(int index, int size) {
  return index < size ? index : size - 1;
}

/* Starts the copies of the codes of a step. Rows past M repeat the last one and are not stored. */
__device__ __forceinline__ void fetch_codes(const Problem& problem, int first_row, int step,
                                            unsigned char* codes) {
  for (int i = int(threadIdx.x); i < kTile * kStepWords; i += kThreads) {
    const int row = i / kStepWords, chunk = i % kStepWords;
    const size_t source = size_t(clamp_below(first_row + row, problem.m)) * size_t(problem.kp / 2) +
                          size_t(step) * (kStep / 2) + size_t(chunk * kChunk);
    copy_async_16(codes + place_of(row, chunk), problem.codes + source);
  }
}

/* Starts the copies of the words of a step: all four of a row at once where rows are multiples of
 * 16 bytes. Words past KW repeat the last one: the codes there are zero. */
template <int BITS>
__device__ __forceinline__ void fetch_words(const Problem& problem, int first_column, int step,
                                            Step<BITS>& out) {
  const bool is_aligned = problem.kw % kStepWords == 0;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < BITS * kTile; i += kThreads) {
    const int plane = i / kTile, row = i % kTile;
    const uint32_t* words =
        problem.planes +
        (size_t(plane) * size_t(problem.n) + size_t(clamp_below(first_column + row, problem.n))) *
            size_t(problem.kw);
    if (is_aligned) {
      copy_async_16(&out.words[plane][row][0], words + step * kStepWords);
    } else {
      for (int w = 0; w < kStepWords; ++w) {
        copy_async_4(&out.words[plane][row][w],
                     words + clamp_below(step * kStepWords + w, problem.kw));
      }
    }
  }
}

/* Nibbles of 8 channels from the words of all planes; rotations[p] brings the bits that this thread
 * needs to where plane p has its place in a nibble. */
template <int BITS>
__device__ __forceinline__ uint32_t expand(const uint32_t (&words)[BITS],
                                           const uint32_t (&rotations)[BITS]) {
  uint32_t nibbles = kNibbles << 3;  // turns the offset code into a signed one
#pragma unroll
  for (int p = 0; p < BITS; ++p) {
    nibbles ^= rotate_right(words[p], rotations[p]) & (kNibbles << (4 - BITS + p));
  }
  return nibbles;
}

/* Multiplies 64 channels of a step, `half` 0 or 1. */
template <int BITS>
__device__ __forceinline__ void multiply_half(const Step<BITS>& step, int half, int warp_row,
                                              int warp_column, const uint32_t (&rotations)[BITS],
                                              int32_t (&acc)[kRowTiles][kColumnTiles][4]) {
  const int lane = int(threadIdx.x) % 32;
  uint32_t a[kRowTiles][4];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
    // Matrices 0, 1: rows 0..7, 8..15 of the first 32 channels; 2, 3: of the second.
    const int row = warp_row + i * kMmaRows + lane % kMmaRows;
    load_matrices(a[i], step.codes + place_of(row, 2 * half + lane / kMmaRows));
  }
#pragma unroll
  for (int j = 0; j < kColumnTiles; ++j) {
    const int column = warp_column + j * kMmaColumns + lane / 4;
    uint32_t first[BITS], second[BITS];
#pragma unroll
    for (int p = 0; p < BITS; ++p) {
      const uint2 pair = *reinterpret_cast<const uint2*>(&step.words[p][column][2 * half]);
      first[p] = pair.x;
      second[p] = pair.y;
    }
    const uint32_t b[2] = {expand<BITS>(first, rotations), expand<BITS>(second, rotations)};
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) multiply(acc[i][j], a[i], b);
  }
}

__device__ __forceinline__ void store(const Problem& problem, int row, int column, int32_t sum,
                                      __half* y) {
  float value = __fmul_rn(__fmul_rn(float(sum), problem.weight_scale[column]),
                          problem.act_scale[row]);
  if (problem.has_bias) value = __fadd_rn(value, problem.bias[column]);
  y[size_t(row) * size_t(problem.n) + size_t(column)] = __float2half_rn(value);
}

/* Sums alone, for tests. */
__device__ __forceinline__ void store(const Problem& problem, int row, int column, int32_t sum,
                                      int32_t* y) {
  y[size_t(row) * size_t(problem.n) + size_t(column)] = sum;
}

template <int BITS, typename Out>
__device__ __forceinline__ void store_tile(const Problem& problem, int first_row, int first_column,
                                           const int32_t (&acc)[kRowTiles][kColumnTiles][4],
                                           Out* y) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = first_row + i * kMmaRows + e / 2 * 8 + lane / 4;
        const int column = first_column + j * kMmaColumns + lane % 4 * 2 + e % 2;
        if (row < problem.m && column < problem.n) {
          store(problem, row, column, acc[i][j][e] >> (4 - BITS), y);
        }
      }
    }
  }
}

/* One tile of y, (blockIdx.x, blockIdx.y) of (ceil(M / 128), ceil(N / 128)). */
template <int BITS, typename Out>
__device__ __forceinline__ void qlinear_tile(const Problem& problem, Out* y) {
  alignas(16) TREEQ_SHARED Step<BITS> steps[2];
  const int first_row = int(blockIdx.x) * kTile, first_column = int(blockIdx.y) * kTile;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int warp_row = warp % 2 * kWarpRows, warp_column = warp / 2 * kWarpColumns;
  const int num_steps = problem.kp / kStep;

  uint32_t rotations[BITS];
#pragma unroll
  for (int p = 0; p < BITS; ++p) rotations[p] = uint32_t(lane % 4 - (4 - BITS + p)) & 31u;
  int32_t acc[kRowTiles][kColumnTiles][4] = {};

  fetch_codes(problem, first_row, 0, steps[0].codes);
  fetch_words<BITS>(problem, first_column, 0, steps[0]);
  commit_copies();
  for (int step = 0; step < num_steps; ++step) {
    if (step + 1 < num_steps) {
      Step<BITS>& next = steps[(step + 1) % 2];
      fetch_codes(problem, first_row, step + 1, next.codes);
      fetch_words<BITS>(problem, first_column, step + 1, next);
    }
    commit_copies();  // an empty group in the last step, so that one stays pending always
    wait_copies<1>();
    __syncthreads();
#pragma unroll 1  // two copies of its addresses cost 60 registers: the second block of the SM
    for (int half = 0; half < 2; ++half) {
      multiply_half<BITS>(steps[step % 2], half, warp_row, warp_column, rotations, acc);
    }
    __syncthreads();  // before the next step's copies overwrite what was read
  }
  store_tile<BITS>(problem, first_row + warp_row, first_column + warp_column, acc, y);
}

}  // namespace treeq::int4

/* Packs int8 codes, as quantize_tokens stores them, to int4: one thread for 32 channels.
 *
 * codes:  (M, KP) int8, byte j of word i of each 32 is channel 8*j + i; values -8..7
 * packed: (M, KP/2), nibble j of word i of each 32 is channel 4*j + i
 * count:  M * KP / 32
 *
 * Channel 4*j + i is byte j / 2 of word i (j even) or i + 4 (j odd): bytes stay where they are. */
extern "C" __global__ void __launch_bounds__(256)
    pack_int4_kernel(const uint32_t* codes, uint32_t* packed, int64_t count) {
  constexpr uint32_t kLow = 0x0f0f0f0fu;
  const int64_t index = int64_t(blockIdx.x) * 256 + int64_t(threadIdx.x);
  if (index >= count) return;
  for (int i = 0; i < 4; ++i) {
    packed[4 * index + i] =
        (codes[8 * index + i] & kLow) | (codes[8 * index + 4 + i] & kLow) << 4;
  }
}

#define TREEQ_INT4_KERNEL(name, bits, type)                                                       \
  extern "C" __global__ void __launch_bounds__(treeq::int4::kThreads, 2) name(                    \
      const unsigned char* codes, const uint32_t* planes, const float* act_scale,                 \
      const float* weight_scale, const float* bias, type* y, int m, int n, int kp, int kw,        \
      int has_bias) {                                                                             \
    const treeq::int4::Problem problem = {codes, planes, act_scale, weight_scale, bias,           \
                                          m,     n,      kp,        kw,           has_bias};      \
    treeq::int4::qlinear_tile<bits>(problem, y);                                                  \
  }

TREEQ_INT4_KERNEL(qlinear_int4_w2_kernel, 2, __half)
TREEQ_INT4_KERNEL(qlinear_int4_w3_kernel, 3, __half)
TREEQ_INT4_KERNEL(qlinear_int4_w4_kernel, 4, __half)
TREEQ_INT4_KERNEL(qlinear_int4_w2_sums_kernel, 2, int32_t)
TREEQ_INT4_KERNEL(qlinear_int4_w3_sums_kernel, 3, int32_t)
TREEQ_INT4_KERNEL(qlinear_int4_w4_sums_kernel, 4, int32_t)
