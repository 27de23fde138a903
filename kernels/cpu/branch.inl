/* The Monarch branch: x R while a panel is prepared, z L while a tile is finished. */

/* 16 values z of one token and block of inputs, from column `first` of [b_out][r], to their places in
 * [b_out][b_in * r]. */
void scatter_reduced(const Branch& branch, int64_t block, int64_t first, const float* values,
                     float* z) {
  const int64_t end = first + kLanes < branch.z_width ? first + kLanes : branch.z_width;
  int64_t o = first / branch.rank, j = first % branch.rank;
  for (int64_t at = first; at < end; ++o, j = 0) {
    const int64_t count = branch.rank - j < end - at ? branch.rank - j : end - at;
    __builtin_memcpy(z + o * branch.depth + block * branch.rank + j, values + (at - first),
                     size_t(count) * sizeof(float));
    at += count;
  }
}

/* z of kRows tokens, one vector of z_width at a time, stored as [b_out][b_in * r]. */
template <int kRows>
void reduce_rows(const Branch& branch, const float* x, float* z) {
  const int64_t k = branch.in_features, size = k / branch.num_in;
  for (int64_t i = 0; i < branch.num_in; ++i)
    for (int64_t v = 0; v < branch.r_width; v += kLanes) {
      Floats sum[kRows][1];
      clear(sum);
      add_products(x + i * size, k, branch.r + i * size * branch.r_width + v, branch.r_width, size,
                   sum);
      alignas(kVector) float reduced[kRows * kTile];
      store_rows(sum, reduced);
      for (int t = 0; t < kRows; ++t)
        scatter_reduced(branch, i, v, reduced + t * kTile, z + t * branch.num_out * branch.depth);
    }
}

/* The branch's part of kRows tokens and 32 output channels. */
template <int kRows>
void expand_rows(const Branch& branch, int64_t tile, const float* z, float* out) {
  const int64_t stride = branch.num_out * branch.depth;
  for (int h = 0; h < 2; h += kFloatHalves) {
    Floats sum[kRows][kFloatHalves];
    clear(sum);
    for (int64_t s = branch.first_segment[tile]; s < branch.first_segment[tile + 1]; ++s)
      add_products(z + branch.segment_block[s] * branch.depth, stride,
                   branch.l + s * branch.depth * kTile + h * kLanes, kTile, branch.depth, sum);
    store_rows(sum, out + h * kLanes);
  }
}

void reduce_panel(const Branch& branch, const float* x, int rows, float* z) {
  const int64_t k = branch.in_features, width = branch.num_out * branch.depth;
  for_rows<kFloatRows>(rows, [&](auto count, int t) {
    reduce_rows<decltype(count)::value>(branch, x + t * k, z + t * width);
  });
}

void expand_panel(const Branch& branch, int64_t tile, const float* z, int rows, float* out) {
  const int64_t width = branch.num_out * branch.depth;
  for_rows<kFloatRows>(rows, [&](auto count, int t) {
    expand_rows<decltype(count)::value>(branch, tile, z + t * width, out + t * kTile);
  });
}
