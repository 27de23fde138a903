/* 64-bit ARM with the dot-product extension: sdot multiplies signed by signed, so codes of 8 bits lose
 * 128 before and get it back by the sum of the activation codes. */
#include "rows.h"
#include "vectors_neon.h"

namespace treeq {
namespace {

constexpr int kQuarter = 4;  // registers of 16 codes in a vector

#include "unpack.inl"

int8x16_t inputs_of(const int32_t* x) { return vreinterpretq_s8_s32(vdupq_n_s32(*x)); }

/* kRows tokens and 16 channels. */
template <bool kWide, int kRows>
void multiply_rows(const uint8_t* codes, const int32_t* x, int stride, int64_t words,
                   int32_t* sums) {
  int32x4_t sum[kRows][kQuarter];
  for (int t = 0; t < kRows; ++t)
    for (int i = 0; i < kQuarter; ++i) sum[t][i] = vdupq_n_s32(0);
  int32x4_t total[kRows] = {};
  const int8x16_t ones = vdupq_n_s8(1);
  for (int64_t w = 0; w < words; ++w, codes += 2 * kVector, x += stride) {
    int8x16_t weights[kQuarter];
    for (int i = 0; i < kQuarter; ++i) {
      const uint8x16_t loaded = vld1q_u8(codes + 16 * i);
      weights[i] = vreinterpretq_s8_u8(kWide ? veorq_u8(loaded, vdupq_n_u8(128)) : loaded);
    }
    for (int t = 0; t < kRows; ++t) {
      const int8x16_t inputs = inputs_of(x + t);
      if (kWide) total[t] = vdotq_s32(total[t], ones, inputs);
      for (int i = 0; i < kQuarter; ++i) sum[t][i] = vdotq_s32(sum[t][i], weights[i], inputs);
    }
  }
  for (int t = 0; t < kRows; ++t)
    for (int i = 0; i < kQuarter; ++i) {
      if (kWide) sum[t][i] = vaddq_s32(sum[t][i], vshlq_n_s32(total[t], 7));
      vst1q_s32(sums + t * kTile + 4 * i, sum[t][i]);
    }
}

template <bool kWide>
void multiply_all(const uint8_t* codes, const int32_t* x, int rows, int64_t words, int32_t* sums) {
  for (int half = 0; half < 2; ++half) {
    const uint8_t* w = codes + half * kVector;
    int32_t* out = sums + half * kLanes;
    int t = 0;
    for (; t + 4 <= rows; t += 4) multiply_rows<kWide, 4>(w, x + t, rows, words, out + t * kTile);
    for (; t < rows; ++t) multiply_rows<kWide, 1>(w, x + t, rows, words, out + t * kTile);
  }
}

void multiply_panel(const uint8_t* codes, const int32_t* x, int rows, int64_t words,
                    const treeq_layer_format& format, int32_t* sums) {
  if (format.weight_bits < 8)
    multiply_all<false>(codes, x, rows, words, sums);
  else
    multiply_all<true>(codes, x, rows, words, sums);
}

#include "generic.inl"

int32_t peak(int64_t iterations, int64_t* num_operations) {
  constexpr int kSums = 16;
  int32x4_t sum[kSums];
  for (int i = 0; i < kSums; ++i) sum[i] = vdupq_n_s32(0);
  const int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(5);
  for (int64_t n = 0; n < iterations; ++n)
    for (int i = 0; i < kSums; ++i)
      asm volatile("sdot %0.4s, %1.16b, %2.16b" : "+w"(sum[i]) : "w"(a), "w"(b));
  *num_operations = iterations * kSums * 16 * 2;
  int32_t total = 0;
  for (int i = 0; i < kSums; ++i) total ^= vgetq_lane_s32(sum[i], 0);
  return total;
}

}  // namespace

const Kernels* neon_kernels() {
  static const Kernels kernels = {"neon", prepare_panel, run_tiles, peak};
  return &kernels;
}

}  // namespace treeq
