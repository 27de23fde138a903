/* The part of the kernels that is the same for every instruction set, on vectors of 16 lanes. The
 * compiler lowers them to what there is; the order of every sum and rounding is fixed here, so the
 * results agree bit for bit. Included once by each qlinear_<isa>.cpp inside an unnamed namespace,
 * after it has defined
 *
 *   constexpr bool kFastMultiplyAdd                              whether multiply_add is one instruction
 *   Floats multiply_add(Floats a, Floats b, Floats c)            a * b + c, rounded once
 *   Ints round_clamped(Floats v, Floats low, Floats high)        clip(rint(v)), 0 for NaN
 *   Bytes narrow(Ints v)                                         low byte of each lane
 *   void unpack_tile(const uint8_t* stream, int bits, int64_t chunks, uint8_t* codes)
 *   void multiply_panel(const uint8_t* codes, const int32_t* x, int rows, int64_t words,
 *                       const treeq_qlinear_config& config, int32_t* sums)   sums[rows][32]
 *   bool can_multiply_packed(int64_t m)                          whether m tokens are few enough for
 *   void multiply_packed(const uint8_t* stream, int bits, const int32_t* x, int rows, int64_t chunks,
 *                        int32_t* sums)                          the same, straight from the stream
 */

#include "quantize.inl"

#include "branch.inl"

#include "prepare.inl"

#include "tile.inl"
