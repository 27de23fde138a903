/* A token to its codes: rotation, scale, rounding, clipping. */

/* One butterfly: lane i becomes x[i] + x[i ^ stride], or the difference in the upper lane of a pair. */
template <int kStride>
TREEQ_INLINE Floats butterfly(Floats x) {
  if constexpr (kStride >= kPartLanes) {
    constexpr int stride = kStride / kPartLanes;
    TREEQ_UNROLL
    for (int i = 0; i < kParts; ++i) {
      if (i & stride) continue;
      const FloatPart sum = x.part[i] + x.part[i + stride];
      x.part[i + stride] = x.part[i] - x.part[i + stride];
      x.part[i] = sum;
    }
  } else {
#define TREEQ_SIGN(i) (i) & kStride ? -1.0f : 1.0f
    const FloatPart sign = {TREEQ_LANES(TREEQ_SIGN)};
#undef TREEQ_SIGN
    TREEQ_UNROLL
    for (int i = 0; i < kParts; ++i) {
      const FloatPart partner = swap_lanes<kStride>(x.part[i]);
      x.part[i] = kFastMultiplyAdd ? multiply_add(x.part[i], sign, partner)
                                   : partner + x.part[i] * sign;
    }
  }
  return x;
}

TREEQ_INLINE Floats butterflies(Floats x, int group) {
  if (group > 1) x = butterfly<1>(x);
  if (group > 2) x = butterfly<2>(x);
  if (group > 4) x = butterfly<4>(x);
  if (group > 8) x = butterfly<8>(x);
  return x;
}

/* Transform of kCount vectors in registers, times norm: strides 1..8, then 16, 32, 64. */
template <int kCount>
void transform_block(const float* x, float* out, Floats norm) {
  Floats v[kCount];
  TREEQ_UNROLL
  for (int i = 0; i < kCount; ++i) v[i] = butterflies(load(x + i * kLanes), kLanes);
  TREEQ_UNROLL
  for (int stride = 1; stride < kCount; stride *= 2) {
    TREEQ_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (i & stride) continue;
      const Floats sum = v[i] + v[i + stride];
      v[i + stride] = v[i] - v[i + stride];
      v[i] = sum;
    }
  }
  TREEQ_UNROLL
  for (int i = 0; i < kCount; ++i) store(out + i * kLanes, v[i] * norm);
}

void transform_group(const float* x, int64_t group, float* out, Floats norm) {
  constexpr int64_t kBlock = kBlockVectors * kLanes;
  if (group == kLanes) return transform_block<1>(x, out, norm);
  if constexpr (kBlockVectors > 2)
    if (group == 2 * kLanes) return transform_block<2>(x, out, norm);
  if constexpr (kBlockVectors > 4)
    if (group == 4 * kLanes) return transform_block<4>(x, out, norm);
  if (group == kBlock) return transform_block<kBlockVectors>(x, out, norm);
  for (int64_t k = 0; k < group; k += kBlock)
    transform_block<kBlockVectors>(x + k, out + k, splat(1.0f));
  for (int64_t stride = kBlock; stride < group; stride *= 2) {
    const Floats factor = 2 * stride == group ? norm : splat(1.0f);
    for (int64_t first = 0; first < group; first += 2 * stride)
      for (int64_t k = first; k < first + stride; k += kLanes) {
        const Floats a = load(out + k), b = load(out + k + stride);
        store(out + k, (a + b) * factor);
        store(out + k + stride, (a - b) * factor);
      }
  }
}

/* x' = x H_g, with zeros behind it up to a whole vector. x itself is returned where nothing has to
 * be done. */
const float* rotate_token(const float* x, int64_t k, int group, float* out) {
  const int64_t padded = padded_features(k);
  const Floats norm = splat(1.0f / __builtin_sqrtf(float(group)));
  if (group == 1 && k == padded) return x;
  if (group < kLanes) {
    __builtin_memcpy(out, x, size_t(k) * sizeof(float));
    for (int64_t i = k; i < padded; ++i) out[i] = 0.0f;
    if (group == 1) return out;
    for (int64_t i = 0; i < padded; i += kLanes)
      store(out + i, butterflies(load(out + i), group) * norm);
  } else {
    for (int64_t i = 0; i < k; i += group) transform_group(x + i, group, out + i, norm);
  }
  return out;
}

float root_mean_square(const float* x, int64_t k) {
  Floats even = splat(0.0f), odd = even;  // two chains of additions, for their latency
  int64_t i = 0;
  for (; i + kLanes < k; i += 2 * kLanes) {
    even = even + load(x + i) * load(x + i);
    odd = odd + load(x + i + kLanes) * load(x + i + kLanes);
  }
  if (i < k) even = even + load(x + i) * load(x + i);
  return __builtin_sqrtf(sum_of_lanes(even + odd) / float(k));
}

/* max |x|, NaN where there is one: above infinity as integers. */
float absolute_maximum(const float* x, int64_t k) {
  Ints most = splat(0);
  for (int64_t i = 0; i < k; i += kLanes) {
    const Ints v = bits_of(load(x + i)) & splat(0x7fffffff);
    most = select_greater(v, most, v, most);
  }
  const int32_t best = largest_lane(most);
  float value;
  __builtin_memcpy(&value, &best, sizeof value);
  return value;
}

constexpr float kScaleFloor = 1e-20f;

float activation_scale(const treeq_layer_format& format, const float* x) {
  float scale = format.act_step;
  if (format.act_scale == TREEQ_SCALE_TOKEN_RMS)
    scale *= root_mean_square(x, format.in_features);
  else if (format.act_scale == TREEQ_SCALE_TOKEN_ABSMAX)
    scale *= absolute_maximum(x, format.in_features);
  return scale < kScaleFloor ? kScaleFloor : scale;  // NaN stays
}

/* Sums of the codes of groups that are no whole vectors. */
void sum_groups(const Layer& layer, const int8_t* q, int32_t* sums) {
  for (int64_t g = 0; g < layer.num_groups; ++g) {
    int32_t sum = 0;
    for (int64_t k = 0; k < layer.group_size; ++k) sum += q[g * layer.group_size + k];
    sums[g] = sum;
  }
}

/* Codes of one token into its column of a panel. */
void scatter_codes(const Layer& layer, const int8_t* q, int rows, int32_t* panel) {
  for (int64_t g = 0; g < layer.num_groups; ++g) {
    const int8_t* codes = q + g * layer.group_size;
    const int64_t whole = layer.group_size / kInputs;
    int32_t* out = panel + g * layer.group_words * rows;
    for (int64_t w = 0; w < whole; ++w) __builtin_memcpy(out + w * rows, codes + w * kInputs, 4);
    for (int64_t w = whole; w < layer.group_words; ++w) {
      int32_t word = 0;
      const int64_t left = layer.group_size - w * kInputs;
      if (left > 0) __builtin_memcpy(&word, codes + w * kInputs, size_t(left));
      out[w * rows] = word;
    }
  }
}

void quantize_token(const Run& run, const float* source, int64_t row, int column, int rows,
                    int32_t* panel, uint8_t* scratch) {
  const Layer& layer = *run.layer;
  const treeq_layer_format& format = layer.format;
  const int64_t k = format.in_features, padded = padded_features(k);
  float* buffer = reinterpret_cast<float*>(scratch);
  int8_t* q = reinterpret_cast<int8_t*>(buffer + padded);
  const float* x = rotate_token(source, k, format.rotation_group, buffer);
  const float scale = activation_scale(format, x);
  const Floats inverse = splat(1.0f / scale);
  const float high = float((1 << (format.act_bits - 1)) - 1);
  const Floats highs = splat(high), lows = splat(-high - 1.0f);
  int32_t* sums = run.row_sums + row * layer.num_groups;
  /* Zeros behind the last input have the code 0. */
  const bool whole = layer.num_groups == 1 || layer.group_size % kLanes == 0;
  const int64_t size = whole && layer.num_groups > 1 ? layer.group_size : padded;
  for (int64_t first = 0; first < padded; first += size) {
    Ints sum = splat(0);
    for (int64_t i = first; i < first + size; i += kLanes) {
      const Ints v = round_clamped(load(x + i) * inverse, lows, highs);
      store_bytes(q + i, v);
      sum = sum + v;
    }
    if (whole) *sums++ = sum_of_lanes(sum);
  }
  if (!whole) sum_groups(layer, q, sums);
  run.scales[row] = scale;
  scatter_codes(layer, q, rows, panel + column);
}
