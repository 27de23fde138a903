/* The Monarch branch: x R while a panel is prepared, z L while a tile is finished. */

/* z of kRows tokens, one vector of z_width at a time, stored as [b_out][b_in * r]. */
template <int kRows>
void reduce_rows(const Branch& branch, const float* x, float* z) {
  const int64_t k = branch.in_features, size = k / branch.num_in;
  for (int64_t i = 0; i < branch.num_in; ++i)
    for (int64_t v = 0; v < branch.r_width; v += kLanes) {
      Floats sum[kRows] = {};
      const float* r = branch.r + i * size * branch.r_width + v;
      for (int64_t j = 0; j < size; ++j) {
        const Floats factor = load(r + j * branch.r_width);
#pragma GCC unroll 4
        for (int t = 0; t < kRows; ++t)
          sum[t] = multiply_add(splat(x[t * k + i * size + j]), factor, sum[t]);
      }
      for (int t = 0; t < kRows; ++t)
        for (int lane = 0; lane < kLanes && v + lane < branch.z_width; ++lane) {
          const int64_t o = (v + lane) / branch.rank, j = (v + lane) % branch.rank;
          z[(t * branch.num_out + o) * branch.depth + i * branch.rank + j] = sum[t][lane];
        }
    }
}

/* The branch's part of kRows tokens and 32 output channels. */
template <int kRows>
void expand_rows(const Branch& branch, int64_t tile, const float* z, float* out) {
  Floats sum[kRows][2] = {};
  const int64_t stride = branch.num_out * branch.depth;
  for (int64_t s = branch.first_segment[tile]; s < branch.first_segment[tile + 1]; ++s) {
    const float* l = branch.l + s * branch.depth * kTile;
    const float* zs = z + branch.segment_block[s] * branch.depth;
    for (int64_t q = 0; q < branch.depth; ++q) {
      const Floats l0 = load(l + q * kTile), l1 = load(l + q * kTile + kLanes);
#pragma GCC unroll 4
      for (int t = 0; t < kRows; ++t) {
        const Floats value = splat(zs[t * stride + q]);
        sum[t][0] = multiply_add(value, l0, sum[t][0]);
        sum[t][1] = multiply_add(value, l1, sum[t][1]);
      }
    }
  }
  for (int t = 0; t < kRows; ++t) {
    store(out + t * kTile, sum[t][0]);
    store(out + t * kTile + kLanes, sum[t][1]);
  }
}

void reduce_panel(const Branch& branch, const float* x, int rows, float* z) {
  const int64_t k = branch.in_features, width = branch.num_out * branch.depth;
  int t = 0;
  for (; t + 4 <= rows; t += 4) reduce_rows<4>(branch, x + t * k, z + t * width);
  for (; t < rows; ++t) reduce_rows<1>(branch, x + t * k, z + t * width);
}

void expand_panel(const Branch& branch, int64_t tile, const float* z, int rows, float* out) {
  const int64_t width = branch.num_out * branch.depth;
  int t = 0;
  for (; t + 4 <= rows; t += 4) expand_rows<4>(branch, tile, z + t * width, out + t * kTile);
  for (; t < rows; ++t) expand_rows<1>(branch, tile, z + t * width, out + t * kTile);
}
