/* The part of the kernels that is the same for every instruction set, on vectors of 16 lanes. The
 * order of every sum and rounding is fixed here, so the results agree bit for bit. Included once by
 * each qlinear_<isa>.cpp inside an unnamed namespace, after vectors_<isa>.h, which has
 *
 *   constexpr bool kFastMultiplyAdd                              whether multiply_add is one instruction
 *   constexpr int kBlockVectors                                  vectors of a rotation in registers
 *   constexpr int kFloatRows, kFloatHalves                       tokens x 16 channels in registers
 *   FloatPart multiply_add(FloatPart a, FloatPart b, FloatPart c)   a * b + c, rounded once
 *   IntPart round_clamped(FloatPart v, FloatPart low, FloatPart high)   clip(rint(v)), 0 for NaN
 *   void store_bytes(int8_t* p, Ints v)                          low byte of each lane
 *
 * and after the file itself has defined
 *
 *   void unpack_tile(const uint8_t* stream, int bits, int64_t chunks, uint8_t* codes)   2..7 bits
 *   void multiply_panel(const uint8_t* codes, const int32_t* x, int rows, int64_t words,
 *                       const treeq_layer_format& format, int32_t* sums)   sums[rows][32]
 *   bool can_multiply_packed(int64_t m, const treeq_layer_format& format)   are m tokens few enough for
 *   void multiply_packed(const uint8_t* stream, const int32_t* x, int rows, int64_t chunks,
 *                        const treeq_layer_format& format, int32_t* sums)
 *                                                                the same, straight from the stream
 */

TREEQ_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  TREEQ_UNROLL
  for (int i = 0; i < kParts; ++i) c.part[i] = multiply_add(a.part[i], b.part[i], c.part[i]);
  return c;
}
TREEQ_INLINE Ints round_clamped(Floats v, Floats low, Floats high) {
  Ints out;
  TREEQ_UNROLL
  for (int i = 0; i < kParts; ++i)
    out.part[i] = round_clamped(v.part[i], low.part[i], high.part[i]);
  return out;
}

#include "quantize.inl"

#include "product.inl"

#include "branch.inl"

#include "prepare.inl"

#include "tile.inl"
