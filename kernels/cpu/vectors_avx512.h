/* AVX-512, for one register of 16 lanes. */
#ifndef TREEQ_VECTORS_AVX512_H
#define TREEQ_VECTORS_AVX512_H

#include <immintrin.h>

#include "vectors.h"

namespace treeq {
namespace {

constexpr bool kFastMultiplyAdd = true;
constexpr int kBlockVectors = 8;
constexpr int kFloatRows = 6;  // x 2 registers: 12 sums, more than latency x throughput
constexpr int kFloatHalves = 2;

TREEQ_INLINE FloatPart multiply_add(FloatPart a, FloatPart b, FloatPart c) {
  return _mm512_fmadd_ps(a, b, c);
}

TREEQ_INLINE IntPart round_clamped(FloatPart v, FloatPart low, FloatPart high) {
  /* Both return the second operand where there is a NaN. */
  const __m512 clipped = _mm512_min_ps(high, _mm512_max_ps(low, v));
  const __mmask16 ordered = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
  return IntPart(_mm512_maskz_cvt_roundps_epi32(ordered, clipped,
                                                _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

TREEQ_INLINE void store_bytes(int8_t* p, Ints v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(__m512i(v.part[0])));
}

}  // namespace
}  // namespace treeq
#endif
