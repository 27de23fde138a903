/* AVX2 with FMA: vpmaddubsw where a pair of products fits 16 bits, vpmaddwd where it may not. */
#include <immintrin.h>

#include "layer.h"
#include "vectors.h"

namespace treeq {
namespace {

constexpr bool kFastMultiplyAdd = true;

Floats multiply_add(Floats a, Floats b, Floats c) {
  union Halves {
    Floats whole;
    __m256 half[2];
  };
  Halves x{a}, y{b}, z{c};
  for (int i = 0; i < 2; ++i) z.half[i] = _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]);
  return z.whole;
}

Ints round_clamped(Floats v, Floats low, Floats high) {
  union Halves {
    Floats whole;
    __m256 half[2];
    __m256i ints[2];
    Ints result;
  };
  Halves x{v}, l{low}, h{high};
  for (int i = 0; i < 2; ++i) {
    /* Both return the second operand where there is a NaN. */
    const __m256 clipped = _mm256_min_ps(h.half[i], _mm256_max_ps(l.half[i], x.half[i]));
    const __m256 ordered = _mm256_cmp_ps(x.half[i], x.half[i], _CMP_ORD_Q);
    x.ints[i] = _mm256_and_si256(_mm256_cvtps_epi32(clipped), _mm256_castps_si256(ordered));
  }
  return x.result;
}

Bytes narrow(Ints v) {
  union Halves {
    Ints whole;
    __m256i half[2];
  };
  const Halves x{v};
  /* The values fit, so saturation does nothing. */
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.half[0], x.half[1]), 0xd8);
  return Bytes(_mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

#include "unpack.inl"

/* u x s of four inputs, summed into eight channels. */
template <bool kWide>
inline __m256i add_products(__m256i sum, __m256i codes, __m256i inputs) {
  if (!kWide)
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, inputs),
                                                   _mm256_set1_epi16(1)));
  const __m256i even = _mm256_and_si256(codes, _mm256_set1_epi16(255));
  const __m256i odd = _mm256_srli_epi16(codes, 8);
  const __m256i even_inputs = _mm256_srai_epi16(_mm256_slli_epi16(inputs, 8), 8);
  const __m256i odd_inputs = _mm256_srai_epi16(inputs, 8);
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, even_inputs));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(odd, odd_inputs));
}

/* kRows tokens and 16 channels: 2 * kRows sums, two registers of codes. */
template <bool kWide, int kRows>
void multiply_rows(const uint8_t* codes, const int32_t* x, int stride, int64_t words,
                   int32_t* sums) {
  __m256i sum[kRows][2];
#pragma GCC unroll 4
  for (int t = 0; t < kRows; ++t) sum[t][0] = sum[t][1] = _mm256_setzero_si256();
  for (int64_t w = 0; w < words; ++w, codes += 2 * kVector, x += stride) {
    const __m256i w0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m256i w1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32));
#pragma GCC unroll 4
    for (int t = 0; t < kRows; ++t) {
      const __m256i inputs = _mm256_set1_epi32(x[t]);
      sum[t][0] = add_products<kWide>(sum[t][0], w0, inputs);
      sum[t][1] = add_products<kWide>(sum[t][1], w1, inputs);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kRows; ++t)
    for (int h = 0; h < 2; ++h)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + t * kTile + 8 * h), sum[t][h]);
}

template <bool kWide>
void multiply_all(const uint8_t* codes, const int32_t* x, int rows, int64_t words, int32_t* sums) {
  for (int half = 0; half < 2; ++half) {
    const uint8_t* w = codes + half * kVector;
    int32_t* out = sums + half * kLanes;
    int t = 0;
    for (; t + 4 <= rows; t += 4) multiply_rows<kWide, 4>(w, x + t, rows, words, out + t * kTile);
    for (; t + 2 <= rows; t += 2) multiply_rows<kWide, 2>(w, x + t, rows, words, out + t * kTile);
    for (; t < rows; ++t) multiply_rows<kWide, 1>(w, x + t, rows, words, out + t * kTile);
  }
}

void multiply_panel(const uint8_t* codes, const int32_t* x, int rows, int64_t words,
                    const treeq_qlinear_config& config, int32_t* sums) {
  const int32_t pair = 2 * ((1 << config.weight_bits) - 1) * (1 << (config.act_bits - 1));
  if (pair <= 32767)
    multiply_all<false>(codes, x, rows, words, sums);
  else
    multiply_all<true>(codes, x, rows, words, sums);
}

#include "generic.inl"

int32_t peak(int64_t iterations, int64_t* num_operations) {
  constexpr int kSums = 8;
  __m256i sum[kSums];
  for (int i = 0; i < kSums; ++i) sum[i] = _mm256_setzero_si256();
  __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5), product;
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i)
      asm volatile("vpmaddubsw %2, %3, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
                   : "+x"(sum[i]), "=&x"(product)
                   : "x"(a), "x"(b), "x"(ones));
  }
  *num_operations = iterations * kSums * 32 * 2;
  int32_t total = 0;
  for (int i = 0; i < kSums; ++i) total ^= _mm256_extract_epi32(sum[i], 0);
  return total;
}

}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels = {"avx2", prepare_panel, run_tiles, peak};
  return &kernels;
}

}  // namespace treeq
