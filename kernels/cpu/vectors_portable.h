/* Any processor, without intrinsics: four vectors of 4 lanes, which the compiler knows to lower. */
#ifndef TREEQ_VECTORS_PORTABLE_H
#define TREEQ_VECTORS_PORTABLE_H

#include "vectors.h"

namespace treeq {
namespace {

constexpr bool kFastMultiplyAdd = false;
constexpr int kBlockVectors = 2;  // 8 of 16 registers hold a block of a rotation
constexpr int kFloatRows = 2;
constexpr int kFloatHalves = 1;

TREEQ_INLINE FloatPart multiply_add(FloatPart a, FloatPart b, FloatPart c) {
  for (int i = 0; i < kPartLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}

TREEQ_INLINE IntPart round_clamped(FloatPart v, FloatPart low, FloatPart high) {
  v = v < low ? low : v;
  v = v > high ? high : v;
  v = v == v ? v : FloatPart{};
  /* Adding 1.5 * 2^23 leaves the integer nearest to v, ties to even, in the low bits. */
  const FloatPart magic = splat_part(12582912.0f);
  return reinterpret_cast<IntPart>(v + magic) - reinterpret_cast<IntPart>(magic);
}

TREEQ_INLINE void store_bytes(int8_t* p, Ints v) {
  int32_t lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) p[i] = int8_t(lanes[i]);
}

}  // namespace
}  // namespace treeq
#endif
