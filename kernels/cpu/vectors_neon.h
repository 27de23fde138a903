/* 64-bit ARM, for four registers of 4 lanes. */
#ifndef TREEQ_VECTORS_NEON_H
#define TREEQ_VECTORS_NEON_H

#include <arm_neon.h>

#include "vectors.h"

namespace treeq {
namespace {

constexpr bool kFastMultiplyAdd = true;
constexpr int kBlockVectors = 4;  // 16 of 32 registers hold a block of a rotation
constexpr int kFloatRows = 6;     // x 4 registers: 24 sums
constexpr int kFloatHalves = 1;

TREEQ_INLINE FloatPart multiply_add(FloatPart a, FloatPart b, FloatPart c) {
  return vfmaq_f32(c, a, b);
}

TREEQ_INLINE IntPart round_clamped(FloatPart v, FloatPart low, FloatPart high) {
  /* Minimum and maximum keep NaN, the conversion makes it 0. */
  return vcvtnq_s32_f32(vminq_f32(high, vmaxq_f32(low, v)));
}

TREEQ_INLINE void store_bytes(int8_t* p, Ints v) {
  const int16x8_t low = vcombine_s16(vmovn_s32(v.part[0]), vmovn_s32(v.part[1]));
  const int16x8_t high = vcombine_s16(vmovn_s32(v.part[2]), vmovn_s32(v.part[3]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}

}  // namespace
}  // namespace treeq
#endif
