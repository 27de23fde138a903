/* Packed weights: the canonical bit planes, and the order that the CPU kernels read.
 *
 * Canonical (plan, ONNX, TensorRT):
 *   planes: int32 [bits][N][ceil(K / 32)]; bit k % 32 of word k / 32 of plane p is bit p of
 *   u = code + 2^(bits-1). Exactly `bits` bits per weight.
 *
 * CPU order: tiles of 32 output channels; in a tile, chunks of 8 input channels:
 *   a chunk is 4 vectors of 64 codes; vector 2 * i + h holds channels 16h..16h+15 x inputs 4i..4i+3,
 *   byte 4 * channel + input: the operand of vpdpbusd.
 *   A chunk stores its 256 codes as parts: the low 4 bits as nibbles (128 bytes: bytes of vectors 0, 1
 *   in the low nibbles, of 2, 3 in the high ones), then 2 bits (64 bytes: vector j at bits 2j), then
 *   1 bit (32 bytes: 64 bits a vector). bits = sum of the parts' widths, 8 is stored as 256 bytes.
 *   Again exactly `bits` bits per weight.
 * Each group of input channels is padded to whole chunks with u = 0, N to whole tiles.
 */
#ifndef TREEQ_PACKING_H
#define TREEQ_PACKING_H

#include <cstddef>
#include <cstdint>

namespace treeq {

constexpr int kTile = 32;               // output channels; two 512-bit vectors of int32 sums
constexpr int kChunk = 8;               // input channels of a chunk
constexpr int kChunkCodes = kTile * kChunk;
constexpr int kVector = 64;             // bytes of a vector
constexpr int kVectors = kChunkCodes / kVector;
static_assert(kVectors == 4, "the parts of a chunk are made for four vectors");

/* Which parts the codes of a width are stored in. */
struct Parts {
  int nibbles, pairs, singles;  // 0 or 1 each; all 0 is whole bytes
};

static constexpr Parts parts_of(int bits) {
  return bits == 8 ? Parts{0, 0, 0} : Parts{(bits >> 2) & 1, (bits >> 1) & 1, bits & 1};
}

static constexpr size_t chunk_bytes(int bits) { return size_t(bits) * kChunkCodes / 8; }
static_assert(chunk_bytes(3) == 64 + 32 && chunk_bytes(8) == kChunkCodes, "exactly b bits a code");

/* Eight bits to eight bytes of 0 or 1. */
static inline uint64_t spread_bits(uint64_t bits) {
  bits = (bits | bits << 28) & 0x0000000f0000000full;
  bits = (bits | bits << 14) & 0x0003000300030003ull;
  return (bits | bits << 7) & 0x0101010101010101ull;
}

}  // namespace treeq
#endif
