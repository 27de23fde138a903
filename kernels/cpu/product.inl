/* Products of floats: rows of x against 16 channels a vector, summed one input after the other. */

/* sum[t][h] += x[t * stride + i] * w[i * w_stride + 16 h] for i = 0..k-1. */
template <int kRows, int kHalves>
TREEQ_INLINE void add_products(const float* x, int64_t stride, const float* w, int64_t w_stride,
                               int64_t k, Floats (&sum)[kRows][kHalves]) {
  for (int64_t i = 0; i < k; ++i, w += w_stride) {
    Floats weight[kHalves];
    TREEQ_UNROLL
    for (int h = 0; h < kHalves; ++h) weight[h] = load(w + h * kLanes);
    TREEQ_UNROLL
    for (int t = 0; t < kRows; ++t) {
      const Floats value = splat(x[t * stride + i]);
      TREEQ_UNROLL
      for (int h = 0; h < kHalves; ++h) sum[t][h] = multiply_add(value, weight[h], sum[t][h]);
    }
  }
}

template <int kRows, int kHalves>
TREEQ_INLINE void clear(Floats (&sum)[kRows][kHalves]) {
  TREEQ_UNROLL
  for (int t = 0; t < kRows; ++t) {
    TREEQ_UNROLL
    for (int h = 0; h < kHalves; ++h) sum[t][h] = splat(0.0f);
  }
}

template <int kRows, int kHalves>
TREEQ_INLINE void store_rows(const Floats (&sum)[kRows][kHalves], float* out) {
  TREEQ_UNROLL
  for (int t = 0; t < kRows; ++t) {
    TREEQ_UNROLL
    for (int h = 0; h < kHalves; ++h) store(out + t * kTile + h * kLanes, sum[t][h]);
  }
}
