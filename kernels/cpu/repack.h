/* From the plan's arrays to the order that the kernels read; see packing.h. */
#ifndef TREEQ_REPACK_H
#define TREEQ_REPACK_H

#include <vector>

#include "buffer.h"
#include "layer.h"

namespace treeq {

/* Bit planes int32 [bits][N][ceil(K / 32)] to tiles; sizes are the layer's. */
Buffer repack_planes(const Layer& layer, const int32_t* planes);

/* float32 [N][G] to [num_tiles][G][32], zero for channels behind N. G is 1 for a bias. */
Buffer tile_channels(const float* values, int64_t out_features, int64_t num_groups);

/* A branch and what it points to. */
struct BranchStorage {
  Branch branch;
  Buffer r, l;
  std::vector<int64_t> first_segment, segment_block;
  size_t bytes;
};

std::unique_ptr<BranchStorage> repack_branch(int64_t in_features, int64_t out_features,
                                             int64_t branch_in, int64_t branch_out, int64_t rank,
                                             const float* r, const float* l);

}  // namespace treeq
#endif
