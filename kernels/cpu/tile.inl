/* The second phase: all panels of tokens against tiles of 32 output channels. */

/* e^x for x <= 0 and for x up to 88: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2], error below
 * 2e-7 of the result. */
TREEQ_INLINE Floats exponential(Floats x) {
  const Floats low = splat(-87.0f), high = splat(88.0f);
  x = select_greater(low, x, low, x);
  x = select_greater(x, high, high, x);
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
  const Ints exponent = (bits_of(shifted) - bits_of(magic)) << 23;
  return floats_of(bits_of(p) + exponent);
}

/* x / 2 * (1 + tanh(u)) = x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3). */
TREEQ_INLINE Floats gelu_tanh(Floats x) {
  const Floats cubic = multiply_add(x * x * x, splat(0.044715f), x);
  const Floats exponent = cubic * splat(-1.59576912f);
  const Floats y = x / (exponential(exponent) + splat(1.0f));
  /* e^88 is the largest that is computed. */
  return select_greater(exponent, splat(88.0f), x * splat(0.0f), y);
}

/* Two vectors of which `width` floats exist. */
TREEQ_INLINE void load_part(const float* p, int width, Floats out[2]) {
  const int first = width < kLanes ? width : kLanes;
  out[0] = first == kLanes ? load(p) : load_some(p, first);
  out[1] = width == kTile ? load(p + kLanes) : load_some(p + first, width - first);
}
TREEQ_INLINE void store_part(float* p, int width, const Floats v[2]) {
  const int first = width < kLanes ? width : kLanes;
  first == kLanes ? store(p, v[0]) : store_some(p, v[0], first);
  width == kTile ? store(p + kLanes, v[1]) : store_some(p + first, v[1], width - first);
}

/* Where a panel's 32 output channels go. */
struct Target {
  float* y;
  int64_t stride;
  int width;
};

Target find_target(const Run& run, int64_t tile) {
  const int64_t all = run.layer ? run.layer->format.out_features : run.branch->out_features;
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
TREEQ_INLINE Floats scaled_sum(const Run& run, int64_t tile, int64_t group,
                                                        int64_t row, int h, const int32_t* sums) {
  const Layer& layer = *run.layer;
  const int32_t offset = run.row_sums[row * layer.num_groups + group] *
                         (1 << (layer.format.weight_bits - 1));
  const Ints v = load(sums + h * kLanes) - splat(offset);
  if (__builtin_expect(run.sums != nullptr, 0)) {
    const int64_t n = layer.format.out_features, column = tile * kTile + h * kLanes;
    int32_t* target = run.sums + (row * layer.num_groups + group) * n + column;
    if (column < n) store_some(target, v, n - column < kLanes ? n - column : kLanes);
  }
  const float* scale = layer.weight_scale + (tile * layer.num_groups + group) * kTile;
  return to_floats(v) * load(scale + h * kLanes);
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
TREEQ_INLINE Floats finish(const Run& run, int64_t tile, int64_t row,
                                                    int h, int at, const Products& products,
                                                    const float* branch) {
  Floats y;
  if (products.sums) {
    y = scaled_sum(run, tile, run.layer->num_groups - 1, row, h, products.sums + at - h * kLanes);
    if (products.floats) y = y + load(products.floats + at);
    y = y * splat(run.scales[row]);
  } else {
    y = load((products.floats ? products.floats : branch) + at);
  }
  if (run.layer && run.layer->bias) y = y + load(run.layer->bias + tile * kTile + h * kLanes);
  if (run.layer && branch) y = y + load(branch + at);
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
    Floats y[2];
    TREEQ_UNROLL
    for (int h = 0; h < 2; ++h)
      y[h] = finish(run, tile, row, h, t * kTile + h * kLanes, products, branch);
    if (fusion.gate) {
      const int64_t column = tile * kTile;
      Floats gate[2], residual[2];
      load_part(fusion.gate + row / fusion.tokens * target.stride + column, target.width, gate);
      load_part(fusion.residual + row * target.stride + column, target.width, residual);
      TREEQ_UNROLL
      for (int h = 0; h < 2; ++h) y[h] = residual[h] + gate[h] * y[h];
    }
    if (fusion.addend) {
      Floats addend[2];
      load_part(fusion.addend + row * target.stride + tile * kTile, target.width, addend);
      TREEQ_UNROLL
      for (int h = 0; h < 2; ++h) y[h] = y[h] + addend[h];
    }
    store_part(target.y + row * target.stride, target.width, y);
  }
}

/* Codes of an unpacked tile as floats times s_w: [group_size][32] per group. */
void dequantize_tile(const Layer& layer, int64_t tile, const uint8_t* codes, float* weight) {
  const Ints offset = splat(1 << (layer.format.weight_bits - 1)), mask = splat(255);
  for (int64_t g = 0; g < layer.num_groups; ++g) {
    const float* scales = layer.weight_scale + (tile * layer.num_groups + g) * kTile;
    const Floats scale[2] = {load(scales), load(scales + kLanes)};
    for (int64_t k = 0; k < layer.group_size; ++k, weight += kTile) {
      const int64_t word = g * layer.group_words + k / kInputs;
      const int shift = 8 * int(k % kInputs);
      TREEQ_UNROLL
      for (int h = 0; h < 2; ++h) {
        const Ints four = load_as<Ints>(codes + (word * 2 + h) * kVector);
        store(weight + h * kLanes, to_floats(((four >> shift) & mask) - offset) * scale[h]);
      }
    }
  }
}

template <int kRows>
void multiply_floats(const float* x, int64_t stride, const float* weight, int64_t k, float* out) {
  for (int h = 0; h < 2; h += kFloatHalves) {
    Floats sum[kRows][kFloatHalves];
    clear(sum);
    add_products(x, stride, weight + h * kLanes, kTile, k, sum);
    store_rows(sum, out + h * kLanes);
  }
}

void run_float_tile(const Run& run, int64_t tile, const uint8_t* codes, float* weight) {
  const Layer& layer = *run.layer;
  const int64_t k = layer.format.in_features, stride = padded_features(k);
  dequantize_tile(layer, tile, codes, weight);
  for (int64_t p = 0; p < run.panels.count; ++p) {
    const int64_t first = first_row(run.panels, p);
    const int rows = num_rows(run.panels, p);
    float out[kMaxRows * kTile];
    for_rows<kFloatRows>(rows, [&](auto count, int t) {
      multiply_floats<decltype(count)::value>(run.rotated + (first + t) * stride, stride, weight, k,
                                              out + t * kTile);
    });
    write_rows(run, tile, first, rows, {out, nullptr});
  }
}

/* The sums and the outputs of one panel and one tile, whose codes are unpacked, or null. */
void run_panel(const Run& run, int64_t tile, int64_t p, const uint8_t* codes) {
  const Layer& layer = *run.layer;
  const int bits = layer.format.weight_bits;
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
      multiply_panel(codes + g * chunks * kChunkCodes, xg, rows, layer.group_words, layer.format,
                     sums);
    else
      multiply_packed(stream + size_t(g * chunks) * chunk_bytes(bits), xg, rows, chunks,
                      layer.format, sums);
    if (g + 1 < layer.num_groups) add_group(run, tile, g, first, rows, sums, out);
  }
  write_rows(run, tile, first, rows, {layer.num_groups > 1 ? out : nullptr, sums});
}

/* The codes of a tile: whole bytes lie in the stream, others are unpacked into scratch. */
const uint8_t* find_codes(const Layer& layer, int64_t tile, uint8_t* scratch) {
  const uint8_t* stream = layer.stream + size_t(tile) * layer.tile_bytes;
  if (layer.format.weight_bits == 8) return stream;
  unpack_tile(stream, layer.format.weight_bits, layer.num_words * kInputs / kChunk, scratch);
  return scratch;
}

void run_integer_tiles(const Run& run, int64_t begin, int64_t end, uint8_t* scratch) {
  const Layer& layer = *run.layer;
  const size_t size = size_t(layer.num_words) * kTile * kInputs;
  const uint8_t* codes[kTilesPerTask] = {};
  if (!can_multiply_packed(run.panels.m, layer.format))
    for (int64_t i = 0; i < end - begin; ++i)
      codes[i] = find_codes(layer, begin + i, scratch + size_t(i) * size);
  for (int64_t p = 0; p < run.panels.count; ++p)
    for (int64_t tile = begin; tile < end; ++tile) run_panel(run, tile, p, codes[tile - begin]);
}

void run_branch_tile(const Run& run, int64_t tile) {
  for (int64_t p = 0; p < run.panels.count; ++p)
    write_rows(run, tile, first_row(run.panels, p), num_rows(run.panels, p), {nullptr, nullptr});
}

void run_weight_only_tile(const Run& run, int64_t tile, uint8_t* scratch) {
  const size_t size = size_t(run.layer->num_words) * kTile * kInputs;
  run_float_tile(run, tile, find_codes(*run.layer, tile, scratch),
                 reinterpret_cast<float*>(scratch + size));
}

void run_tiles(const Run& run, int64_t task, uint8_t* scratch) {
  const int64_t n = run.layer ? run.layer->format.out_features : run.branch->out_features;
  const int64_t tiles = (n + kTile - 1) / kTile, begin = task * kTilesPerTask;
  const int64_t end = begin + kTilesPerTask < tiles ? begin + kTilesPerTask : tiles;
  if (run.layer && run.layer->format.act_bits) return run_integer_tiles(run, begin, end, scratch);
  for (int64_t tile = begin; tile < end; ++tile)
    run.layer ? run_weight_only_tile(run, tile, scratch) : run_branch_tile(run, tile);
}
