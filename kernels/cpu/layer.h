/* What create makes of a configuration, and what one run hands to the kernels of an instruction set.
 * Included by every kernel file, each compiled for another processor: plain data only. A template or
 * inline function of the standard library that is instantiated here could be linked in its AVX-512
 * form for all processors. */
#ifndef TREEQ_LAYER_H
#define TREEQ_LAYER_H

#include "treeq/packing.h"
#include "treeq/qlinear.h"

namespace treeq {

constexpr int kLanes = 16;      // floats of a vector; the order of every float sum follows from it
constexpr int kMaxRows = 12;    // tokens of a panel: 12 x 2 sums fill 24 of 32 vector registers
constexpr int kTilesPerTask = 2;  // beside each other: a panel is read once for both, and 256 bytes of
                                  // an output row are written at a time
constexpr int kInputs = 4;      // input channels of one 32-bit word of codes

/* A Monarch branch, its factors padded to whole vectors. */
struct Branch {
  int64_t in_features, out_features, num_in, num_out, rank;
  int64_t z_width;     // b_out * r
  int64_t r_width;     // the same in whole vectors
  int64_t depth;       // b_in * r, length of the second sum
  const float* r;      // [b_in][K / b_in][r_width]
  const float* l;      // per segment [depth][32], zero outside its block
  const int64_t* first_segment;  // [num_tiles + 1]
  const int64_t* segment_block;  // block of outputs that a segment belongs to
};

struct Layer {
  treeq_layer_format format;
  int64_t num_groups, group_size;
  int64_t group_words;    // 32-bit words of codes of one group, padded to whole chunks
  int64_t num_words;      // of all groups
  int64_t num_tiles;
  size_t tile_bytes;
  const uint8_t* stream;      // [num_tiles][tile_bytes], see packing.h
  const float* weight_scale;  // [num_tiles][num_groups][32], zero where padded
  const float* bias;          // [num_tiles][32] or null
  const Branch* branch;       // or null
};

/* m tokens cut into panels whose sizes differ by at most one. */
struct Panels {
  int64_t m, count, base, extra;
};

static inline Panels cut_panels(int64_t m) {
  const int64_t count = (m + kMaxRows - 1) / kMaxRows;
  return {m, count, count ? m / count : 0, count ? m % count : 0};
}
static inline int64_t first_row(const Panels& panels, int64_t p) {
  return p * panels.base + (p < panels.extra ? p : panels.extra);
}
static inline int num_rows(const Panels& panels, int64_t p) {
  return int(panels.base + (p < panels.extra ? 1 : 0));
}

/* One run. Buffers of the caller; z is null without branch, sums where nobody asked. */
struct Run {
  const Layer* layer;  // null for a branch of its own
  const Branch* branch;
  const float* x;      // [m][K]
  Panels panels;
  int32_t* codes;      // panel after panel: [num_words][rows] words of four int8
  float* rotated;      // [m][padded K] where activations are not quantized, else null
  float* scales;       // [m]
  int32_t* row_sums;   // [m][num_groups]
  float* z;            // [m][b_out][b_in * r]
  float* y[TREEQ_MAX_OUTPUTS];  // [m][N / num_outputs] each
  treeq_fusion fusion;
  int32_t* sums;       // [m][num_groups][N] or null
};

/* The kernels of one instruction set; equal results in every bit. */
struct Kernels {
  const char* name;
  /* Rotates and quantizes a panel, and does the first half of its branch. scratch: prepare_bytes. */
  void (*prepare_panel)(const Run&, int64_t panel, uint8_t* scratch);
  /* All tokens of kTilesPerTask tiles of output channels. scratch: tile_scratch_bytes. */
  void (*run_tiles)(const Run&, int64_t task, uint8_t* scratch);
  int32_t (*peak)(int64_t iterations, int64_t* num_operations);
};

static inline size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

/* Floats of a token, rotated, in whole vectors. */
static inline int64_t padded_features(int64_t in_features) {
  return int64_t(round_up(size_t(in_features), kLanes));
}
/* A rotated token and its codes; before them a panel of tokens that were normalised. */
static inline size_t prepare_scratch_bytes(int64_t in_features, bool is_normalised) {
  const size_t token = size_t(padded_features(in_features));
  const size_t panel = is_normalised ? kMaxRows * size_t(in_features) * sizeof(float) : 0;
  return round_up(panel, kVector) + token * (sizeof(float) + 1) + 2 * kVector;
}
static inline size_t tile_scratch_bytes(const Layer& layer) {
  const size_t codes = size_t(layer.num_words) * kTile * kInputs;
  return layer.format.act_bits ? codes * kTilesPerTask : codes * (1 + sizeof(float));
}

const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512vnni_kernels();
const Kernels* neon_kernels();

}  // namespace treeq
#endif
