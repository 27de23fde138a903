/* The part of the kernels that is the same for every instruction set, on vectors of 16 lanes. The
 * compiler lowers them to what there is; the order of every sum and rounding is fixed here, so the
 * results agree bit for bit. Included once by each qlinear_<isa>.cpp inside an unnamed namespace,
 * after it has defined
 *
 *   Floats multiply_add(Floats a, Floats b, Floats c)            a * b + c, rounded once
 *   Ints round_clamped(Floats v, Floats low, Floats high)        clip(rint(v)), 0 for NaN
 *   Bytes narrow(Ints v)                                         low byte of each lane
 *   void unpack_tile(const uint8_t* stream, int bits, int64_t chunks, uint8_t* codes)
 *   void multiply_panel(const uint8_t* codes, const int32_t* x, int rows, int64_t words,
 *                       const treeq_qlinear_config& config, int32_t* sums)   sums[rows][32]
 *   bool multiply_packed(...)                                    straight from the stream, or false
 */

/* ---- quantization of activations ---- */

Floats splat(float value) { return Floats{} + value; }

Floats load(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }

/* Sum of lanes, in a tree: 8 + 8, 4 + 4, 2 + 2, 1 + 1. */
float sum_of_lanes(Floats v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

/* One butterfly inside a vector: lane i becomes x[i] + x[i ^ stride], or the difference in the upper
 * lane of a pair. */
template <int kStride>
inline __attribute__((always_inline)) Floats butterfly(Floats x) {
  Ints order;
  Floats sign;
  for (int i = 0; i < kLanes; ++i) {
    order[i] = i ^ kStride;
    sign[i] = i & kStride ? -1.0f : 1.0f;
  }
  const Floats partner = __builtin_shuffle(x, order);
  return kFastMultiplyAdd ? multiply_add(x, sign, partner) : partner + x * sign;
}

inline __attribute__((always_inline)) Floats butterflies(Floats x, int group) {
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
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) v[i] = butterflies(load(x + i * kLanes), kLanes);
#pragma GCC unroll 3
  for (int stride = 1; stride < kCount; stride *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      if (i & stride) continue;
      const Floats sum = v[i] + v[i + stride];
      v[i + stride] = v[i] - v[i + stride];
      v[i] = sum;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) store(out + i * kLanes, v[i] * norm);
}

void transform_group(const float* x, int64_t group, float* out, Floats norm) {
  constexpr int64_t kBlock = 8 * kLanes;
  if (group == kLanes) return transform_block<1>(x, out, norm);
  if (group == 2 * kLanes) return transform_block<2>(x, out, norm);
  if (group == 4 * kLanes) return transform_block<4>(x, out, norm);
  if (group == kBlock) return transform_block<8>(x, out, norm);
  for (int64_t k = 0; k < group; k += kBlock) transform_block<8>(x + k, out + k, splat(1.0f));
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
    for (int64_t i = 0; i < k; ++i) out[i] = x[i];
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
  Floats even{}, odd{};  // two chains of additions, for their latency
  int64_t i = 0;
  for (; i + kLanes < k; i += 2 * kLanes) {
    even += load(x + i) * load(x + i);
    odd += load(x + i + kLanes) * load(x + i + kLanes);
  }
  if (i < k) even += load(x + i) * load(x + i);
  return __builtin_sqrtf(sum_of_lanes(even + odd) / float(k));
}

/* max |x|, NaN where there is one: above infinity as integers. */
float absolute_maximum(const float* x, int64_t k) {
  Ints most{};
  for (int64_t i = 0; i < k; i += kLanes) {
    Ints v;
    __builtin_memcpy(&v, x + i, sizeof v);
    v &= 0x7fffffff;
    most = v > most ? v : most;
  }
  int32_t best = 0;
  for (int i = 0; i < kLanes; ++i) best = most[i] > best ? most[i] : best;
  float value;
  __builtin_memcpy(&value, &best, sizeof value);
  return value;
}

constexpr float kScaleFloor = 1e-20f;

float activation_scale(const treeq_qlinear_config& config, const float* x) {
  float scale = config.act_step;
  if (config.act_scale == TREEQ_SCALE_TOKEN_RMS)
    scale *= root_mean_square(x, config.in_features);
  else if (config.act_scale == TREEQ_SCALE_TOKEN_ABSMAX)
    scale *= absolute_maximum(x, config.in_features);
  return scale < kScaleFloor ? kScaleFloor : scale;  // NaN stays
}

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
  const treeq_qlinear_config& config = layer.config;
  const int64_t k = config.in_features, padded = padded_features(k);
  float* buffer = reinterpret_cast<float*>(scratch);
  int8_t* q = reinterpret_cast<int8_t*>(buffer + padded);
  const float* x = rotate_token(source, k, config.rotation_group, buffer);
  const float scale = activation_scale(config, x);
  const Floats inverse = splat(1.0f / scale);
  const float high = float((1 << (config.act_bits - 1)) - 1);
  const Floats highs = splat(high), lows = splat(-high - 1.0f);
  Ints sum{};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Ints v = round_clamped(load(x + i) * inverse, lows, highs);
    const Bytes codes = narrow(v);
    __builtin_memcpy(q + i, &codes, sizeof codes);
    sum += v;  // zeros behind the last input have the code 0
  }
  run.scales[row] = scale;
  int32_t* sums = run.row_sums + row * layer.num_groups;
  if (layer.num_groups > 1) {
    sum_groups(layer, q, sums);
  } else {
    *sums = 0;
    for (int lane = 0; lane < kLanes; ++lane) *sums += sum[lane];
  }
  scatter_codes(layer, q, rows, panel + column);
}

/* ---- the branch ---- */

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

/* Adds x[i] - mean, or its square, to the lanes; those behind k add nothing. */
template <bool kSquare>
Floats add_deviations(const float* x, int64_t k, float mean) {
  Floats sum{};
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    const Floats d = load(x + i) - mean;
    sum += kSquare ? d * d : d;
  }
  for (int lane = 0; i + lane < k; ++lane) {
    const float d = x[i + lane] - mean;
    sum[lane] += kSquare ? d * d : d;
  }
  return sum;
}

/* LayerNorm(x) * (1 + scale) + shift of one token. */
void normalise_token(const float* x, int64_t k, float epsilon, const float* scale,
                     const float* shift, float* out) {
  const float mean = sum_of_lanes(add_deviations<false>(x, k, 0.0f)) / float(k);
  const float variance = sum_of_lanes(add_deviations<true>(x, k, mean)) / float(k);
  const float inverse = 1.0f / __builtin_sqrtf(variance + epsilon);
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes)
    store(out + i, (load(x + i) - mean) * inverse * (load(scale + i) + 1.0f) + load(shift + i));
  for (; i < k; ++i) out[i] = (x[i] - mean) * inverse * (scale[i] + 1.0f) + shift[i];
}

void prepare_layer(const Run& run, int64_t first, int rows, const float* x, uint8_t* scratch) {
  const Layer& layer = *run.layer;
  const int64_t k = layer.config.in_features, padded = padded_features(k);
  for (int t = 0; t < rows; ++t) {
    const int64_t row = first + t;
    if (layer.config.act_bits) {
      quantize_token(run, x + t * k, row, t, rows, run.codes + first * layer.num_words, scratch);
      continue;
    }
    float* out = run.rotated + row * padded;
    const float* rotated = rotate_token(x + t * k, k, layer.config.rotation_group, out);
    if (rotated != out) __builtin_memcpy(out, rotated, size_t(k) * sizeof(float));
  }
}

void prepare_panel(const Run& run, int64_t p, uint8_t* scratch) {
  const int64_t first = first_row(run.panels, p);
  const int rows = num_rows(run.panels, p);
  const int64_t k = run.layer ? run.layer->config.in_features : run.branch->in_features;
  const float* x = run.x + first * k;
  const treeq_fusion& fusion = run.fusion;
  if (fusion.norm_scale) {
    float* normalised = reinterpret_cast<float*>(scratch);
    for (int t = 0; t < rows; ++t) {
      const int64_t image = (first + t) / fusion.tokens * k;
      normalise_token(x + t * k, k, fusion.norm_epsilon, fusion.norm_scale + image,
                      fusion.norm_shift + image, normalised + t * k);
    }
    x = normalised;
    scratch += round_up(kMaxRows * size_t(k) * sizeof(float), kVector);
  }
  if (run.layer) prepare_layer(run, first, rows, x, scratch);
  if (run.branch)
    reduce_panel(*run.branch, x, rows, run.z + first * run.branch->num_out * run.branch->depth);
}

/* ---- the tile ---- */

/* e^x for x <= 0 and for x up to 88: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2], error below
 * 2e-7 of the result. */
Floats exponential(Floats x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: rounds to an integer in its low bits
  const Floats shifted = multiply_add(x, splat(1.44269504f), magic);
  const Floats n = shifted - magic;
  const Floats r = multiply_add(n, splat(2.12194440e-4f),
                                multiply_add(n, splat(-0.693359375f), x));
  /* 1 + r + r^2 / 2! + ... + r^7 / 7! */
  Floats p = splat(1.98412698e-4f);
  p = multiply_add(p, r, splat(1.38888889e-3f));
  p = multiply_add(p, r, splat(8.33333333e-3f));
  p = multiply_add(p, r, splat(4.16666667e-2f));
  p = multiply_add(p, r, splat(1.66666667e-1f));
  p = multiply_add(p, r, splat(0.5f));
  p = multiply_add(p, r, splat(1.0f));
  p = multiply_add(p, r, splat(1.0f));
  const Ints exponent = (reinterpret_cast<Ints>(shifted) - reinterpret_cast<Ints>(magic)) << 23;
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(p) + exponent);
}

/* x / 2 * (1 + tanh(u)) = x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3). */
Floats gelu_tanh(Floats x) {
  const Floats cubic = multiply_add(x * x * x, splat(0.044715f), x);
  const Floats exponent = cubic * -1.59576912f;
  const Floats y = x / (exponential(exponent) + 1.0f);
  return exponent > 88.0f ? x * 0.0f : y;  // e^88 is the largest that is computed
}

/* Two vectors of which `width` floats exist. */
void load_part(const float* p, int width, Floats out[2]) {
  if (width == kTile) {
    out[0] = load(p);
    out[1] = load(p + kLanes);
    return;
  }
  out[0] = out[1] = Floats{};
  __builtin_memcpy(out, p, size_t(width) * sizeof(float));
}

/* Where a panel's 32 output channels go. */
struct Target {
  float* y;
  int64_t stride;
  int width;
};

Target find_target(const Run& run, int64_t tile) {
  const int64_t all = run.layer ? run.layer->config.out_features : run.branch->out_features;
  const int64_t n = all / run.fusion.num_outputs, column = tile * kTile;
  const int64_t left = n - column % n;  // several outputs hold whole tiles
  return {run.y[column / n] + column % n, n, left < kTile ? int(left) : kTile};
}

/* Asks for the lines that write_rows will need, so that they come while sums are computed: outputs
 * of a wide layer are in no cache. */
void prefetch_rows(const Run& run, int64_t tile, int64_t first, int rows) {
  const Target target = find_target(run, tile);
  for (int t = 0; t < rows; ++t) {
    const int64_t at = (first + t) * target.stride;
    __builtin_prefetch(target.y + at, 1);
    __builtin_prefetch(target.y + at + kLanes, 1);
    if (!run.fusion.residual) continue;
    __builtin_prefetch(run.fusion.residual + at + tile * kTile);
    __builtin_prefetch(run.fusion.residual + at + tile * kTile + kLanes);
  }
}

/* A panel's 32 output channels before bias: what multiplies floats leaves in `floats`, or the last
 * group's sums with the earlier groups' in `floats`. */
struct Products {
  const float* floats;   // [rows][32], or null where there is one group
  const int32_t* sums;   // [rows][32], or null where activations are not quantized
};

/* (sum of codes) * s_w of one token, one group and half h of a tile. */
inline __attribute__((always_inline)) Floats scaled_sum(const Run& run, int64_t tile, int64_t group,
                                                        int64_t row, int h, const int32_t* sums) {
  const Layer& layer = *run.layer;
  Ints v;
  __builtin_memcpy(&v, sums + h * kLanes, sizeof v);
  v -= run.row_sums[row * layer.num_groups + group] * (1 << (layer.config.weight_bits - 1));
  if (__builtin_expect(run.sums != nullptr, 0)) {
    const int64_t n = layer.config.out_features, column = tile * kTile + h * kLanes;
    int32_t* target = run.sums + (row * layer.num_groups + group) * n + column;
    for (int i = 0; i < kLanes && column + i < n; ++i) target[i] = v[i];
  }
  const float* scale = layer.weight_scale + (tile * layer.num_groups + group) * kTile;
  return __builtin_convertvector(v, Floats) * load(scale + h * kLanes);
}

/* Adds up all groups but the last in `out`. */
void add_group(const Run& run, int64_t tile, int64_t group, int64_t first, int rows,
               const int32_t* sums, float* out) {
  for (int t = 0; t < rows; ++t)
    for (int h = 0; h < 2; ++h) {
      float* at = out + t * kTile + h * kLanes;
      const Floats y = scaled_sum(run, tile, group, first + t, h, sums + t * kTile);
      store(at, group ? y + load(at) : y);
    }
}

/* One vector of outputs: products, scale, bias, branch, activation. */
inline __attribute__((always_inline)) Floats finish(const Run& run, int64_t tile, int64_t row,
                                                    int h, int at, const Products& products,
                                                    const float* branch) {
  Floats y;
  if (products.sums) {
    y = scaled_sum(run, tile, run.layer->num_groups - 1, row, h, products.sums + at - h * kLanes);
    if (products.floats) y += load(products.floats + at);
    y *= run.scales[row];
  } else {
    y = load((products.floats ? products.floats : branch) + at);
  }
  if (run.layer && run.layer->bias) y += load(run.layer->bias + tile * kTile + h * kLanes);
  if (run.layer && branch) y += load(branch + at);
  return run.fusion.activation == TREEQ_ACTIVATION_GELU_TANH ? gelu_tanh(y) : y;
}

/* Finishes a panel's 32 output channels and writes those that exist. */
void write_rows(const Run& run, int64_t tile, int64_t first, int rows, const Products& products) {
  const treeq_fusion& fusion = run.fusion;
  const Target target = find_target(run, tile);
  float expanded[kMaxRows * kTile];
  const float* branch = run.branch ? expanded : nullptr;
  if (run.branch)
    expand_panel(*run.branch, tile, run.z + first * run.branch->num_out * run.branch->depth, rows,
                 expanded);
  for (int t = 0; t < rows; ++t) {
    const int64_t row = first + t;
    Floats y0 = finish(run, tile, row, 0, t * kTile, products, branch);
    Floats y1 = finish(run, tile, row, 1, t * kTile + kLanes, products, branch);
    if (fusion.gate) {
      const int64_t column = tile * kTile;
      Floats gate[2], residual[2];
      load_part(fusion.gate + row / fusion.tokens * target.stride + column, target.width, gate);
      load_part(fusion.residual + row * target.stride + column, target.width, residual);
      y0 = residual[0] + gate[0] * y0;
      y1 = residual[1] + gate[1] * y1;
    }
    float* to = target.y + row * target.stride;
    if (target.width == kTile) {
      store(to, y0);
      store(to + kLanes, y1);
    } else {
      const Floats both[2] = {y0, y1};
      __builtin_memcpy(to, both, size_t(target.width) * sizeof(float));
    }
  }
}

/* Codes of an unpacked tile as floats times s_w: [group_size][32] per group. */
void dequantize_tile(const Layer& layer, int64_t tile, const uint8_t* codes, float* weight) {
  const int32_t offset = 1 << (layer.config.weight_bits - 1);
  for (int64_t g = 0; g < layer.num_groups; ++g) {
    const float* scale = layer.weight_scale + (tile * layer.num_groups + g) * kTile;
    for (int64_t k = 0; k < layer.group_size; ++k)
      for (int h = 0; h < 2; ++h) {
        const int64_t word = g * layer.group_words + k / kInputs;
        Ints v;
        __builtin_memcpy(&v, codes + (word * 2 + h) * kVector, sizeof v);
        v = ((v >> (8 * int(k % kInputs))) & 255) - offset;
        store(weight + ((g * layer.group_size + k) * 2 + h) * kLanes,
              __builtin_convertvector(v, Floats) * load(scale + h * kLanes));
      }
  }
}

template <int kRows>
void multiply_floats(const float* x, int64_t stride, const float* weight, int64_t k, float* out) {
  Floats sum[kRows][2] = {};
  for (int64_t i = 0; i < k; ++i) {
    const Floats w0 = load(weight + i * kTile), w1 = load(weight + i * kTile + kLanes);
#pragma GCC unroll 4
    for (int t = 0; t < kRows; ++t) {
      const Floats value = splat(x[t * stride + i]);
      sum[t][0] = multiply_add(value, w0, sum[t][0]);
      sum[t][1] = multiply_add(value, w1, sum[t][1]);
    }
  }
  for (int t = 0; t < kRows; ++t) {
    store(out + t * kTile, sum[t][0]);
    store(out + t * kTile + kLanes, sum[t][1]);
  }
}

void run_float_tile(const Run& run, int64_t tile, const uint8_t* codes, float* weight) {
  const Layer& layer = *run.layer;
  const int64_t k = layer.config.in_features, stride = padded_features(k);
  dequantize_tile(layer, tile, codes, weight);
  for (int64_t p = 0; p < run.panels.count; ++p) {
    const int64_t first = first_row(run.panels, p);
    const int rows = num_rows(run.panels, p);
    float out[kMaxRows * kTile];
    int t = 0;
    for (; t + 4 <= rows; t += 4)
      multiply_floats<4>(run.rotated + (first + t) * stride, stride, weight, k, out + t * kTile);
    for (; t < rows; ++t)
      multiply_floats<1>(run.rotated + (first + t) * stride, stride, weight, k, out + t * kTile);
    write_rows(run, tile, first, rows, {out, nullptr});
  }
}

/* The sums and the outputs of one panel and one tile, whose codes are unpacked, or null. */
void run_panel(const Run& run, int64_t tile, int64_t p, const uint8_t* codes) {
  const Layer& layer = *run.layer;
  const int bits = layer.config.weight_bits;
  const int64_t chunks = layer.group_words * kInputs / kChunk;
  const int64_t first = first_row(run.panels, p);
  const int rows = num_rows(run.panels, p);
  const uint8_t* stream = layer.stream + size_t(tile) * layer.tile_bytes;
  const int32_t* x = run.codes + first * layer.num_words;
  alignas(kVector) int32_t sums[kMaxRows * kTile];
  float out[kMaxRows * kTile];
  prefetch_rows(run, tile, first, rows);
  for (int64_t g = 0; g < layer.num_groups; ++g) {
    const int32_t* xg = x + g * layer.group_words * rows;
    if (codes)
      multiply_panel(codes + g * chunks * kChunkCodes, xg, rows, layer.group_words, layer.config,
                     sums);
    else
      multiply_packed(stream + size_t(g * chunks) * chunk_bytes(bits), bits, xg, rows, chunks, sums);
    if (g + 1 < layer.num_groups) add_group(run, tile, g, first, rows, sums, out);
  }
  write_rows(run, tile, first, rows, {layer.num_groups > 1 ? out : nullptr, sums});
}

void run_integer_tiles(const Run& run, int64_t begin, int64_t end, uint8_t* scratch) {
  const Layer& layer = *run.layer;
  const size_t codes = size_t(layer.num_words) * kTile * kInputs;
  const bool packed = can_multiply_packed(run.panels.m);
  for (int64_t tile = begin; tile < end && !packed; ++tile)
    unpack_tile(layer.stream + size_t(tile) * layer.tile_bytes, layer.config.weight_bits,
                layer.num_words * kInputs / kChunk, scratch + size_t(tile - begin) * codes);
  for (int64_t p = 0; p < run.panels.count; ++p)
    for (int64_t tile = begin; tile < end; ++tile)
      run_panel(run, tile, p, packed ? nullptr : scratch + size_t(tile - begin) * codes);
}

void run_branch_tile(const Run& run, int64_t tile) {
  for (int64_t p = 0; p < run.panels.count; ++p)
    write_rows(run, tile, first_row(run.panels, p), num_rows(run.panels, p), {nullptr, nullptr});
}

void run_weight_only_tile(const Run& run, int64_t tile, uint8_t* scratch) {
  const Layer& layer = *run.layer;
  const size_t codes = size_t(layer.num_words) * kTile * kInputs;
  unpack_tile(layer.stream + size_t(tile) * layer.tile_bytes, layer.config.weight_bits,
              layer.num_words * kInputs / kChunk, scratch);
  run_float_tile(run, tile, scratch, reinterpret_cast<float*>(scratch + codes));
}

void run_tiles(const Run& run, int64_t task, uint8_t* scratch) {
  const int64_t n = run.layer ? run.layer->config.out_features : run.branch->out_features;
  const int64_t tiles = (n + kTile - 1) / kTile, begin = task * kTilesPerTask;
  const int64_t end = begin + kTilesPerTask < tiles ? begin + kTilesPerTask : tiles;
  if (run.layer && run.layer->config.act_bits) return run_integer_tiles(run, begin, end, scratch);
  for (int64_t tile = begin; tile < end; ++tile)
    run.layer ? run_weight_only_tile(run, tile, scratch) : run_branch_tile(run, tile);
}
