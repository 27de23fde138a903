/* The second phase: all panels of tokens against tiles of 32 output channels. */

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
