/* AVX2 with FMA, for two registers of 8 lanes. */
#ifndef TREEQ_VECTORS_AVX2_H
#define TREEQ_VECTORS_AVX2_H

#include <immintrin.h>

#include "vectors.h"

namespace treeq {
namespace {

constexpr bool kFastMultiplyAdd = true;
constexpr int kBlockVectors = 4;  // 8 of 16 registers hold a block of a rotation
constexpr int kFloatRows = 6;     // x 2 registers: 12 sums
constexpr int kFloatHalves = 1;

TREEQ_INLINE FloatPart multiply_add(FloatPart a, FloatPart b, FloatPart c) {
  return _mm256_fmadd_ps(a, b, c);
}

TREEQ_INLINE IntPart round_clamped(FloatPart v, FloatPart low, FloatPart high) {
  /* Both return the second operand where there is a NaN. */
  const __m256 clipped = _mm256_min_ps(high, _mm256_max_ps(low, v));
  const __m256 ordered = _mm256_cmp_ps(v, v, _CMP_ORD_Q);
  return IntPart(_mm256_and_si256(_mm256_cvtps_epi32(clipped), _mm256_castps_si256(ordered)));
}

TREEQ_INLINE void store_bytes(int8_t* p, Ints v) {
  /* The values fit, so saturation does nothing. */
  const __m256i words = _mm256_permute4x64_epi64(
      _mm256_packs_epi32(__m256i(v.part[0]), __m256i(v.part[1])), 0xd8);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

}  // namespace
}  // namespace treeq
#endif
