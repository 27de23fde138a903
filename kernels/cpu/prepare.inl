/* The first phase of a run: a panel of tokens is normalised, quantized, and multiplied by R. */

/* Lane by lane, the sum of x[i] - mean, or of its square. */
template <bool kSquare>
Floats add_deviations(const float* x, int64_t k, float mean) {
  Floats sum = splat(0.0f);
  const Floats means = splat(mean);
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    const Floats d = load(x + i) - means;
    sum = sum + (kSquare ? d * d : d);
  }
  if (i == k) return sum;
  /* The lanes behind k hold the mean: they add nothing. */
  alignas(kVector) float last[kLanes];
  store(last, means);
  __builtin_memcpy(last, x + i, size_t(k - i) * sizeof(float));
  const Floats d = load(last) - means;
  return sum + (kSquare ? d * d : d);
}

TREEQ_INLINE Floats normalise(Floats x, Floats mean, Floats inverse, Floats scale, Floats shift) {
  return (x - mean) * inverse * (scale + splat(1.0f)) + shift;
}

/* LayerNorm(x) * (1 + scale) + shift of one token. */
void normalise_token(const float* x, int64_t k, float epsilon, const float* scale,
                     const float* shift, float* out) {
  const float mean = sum_of_lanes(add_deviations<false>(x, k, 0.0f)) / float(k);
  const float variance = sum_of_lanes(add_deviations<true>(x, k, mean)) / float(k);
  const Floats inverse = splat(1.0f / __builtin_sqrtf(variance + epsilon)), means = splat(mean);
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes)
    store(out + i, normalise(load(x + i), means, inverse, load(scale + i), load(shift + i)));
  const int64_t left = k - i;
  if (!left) return;
  store_some(out + i,
             normalise(load_some(x + i, left), means, inverse, load_some(scale + i, left),
                       load_some(shift + i, left)),
             left);
}

void prepare_layer(const Run& run, int64_t first, int rows, const float* x, uint8_t* scratch) {
  const Layer& layer = *run.layer;
  const int64_t k = layer.format.in_features, padded = padded_features(k);
  for (int t = 0; t < rows; ++t) {
    const int64_t row = first + t;
    if (layer.format.act_bits) {
      quantize_token(run, x + t * k, row, t, rows, run.codes + first * layer.num_words, scratch);
      continue;
    }
    float* out = run.rotated + row * padded;
    const float* rotated = rotate_token(x + t * k, k, layer.format.rotation_group, out);
    if (rotated != out) __builtin_memcpy(out, rotated, size_t(k) * sizeof(float));
  }
}

void prepare_panel(const Run& run, int64_t p, uint8_t* scratch) {
  const int64_t first = first_row(run.panels, p);
  const int rows = num_rows(run.panels, p);
  const int64_t k = run.layer ? run.layer->format.in_features : run.branch->in_features;
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
