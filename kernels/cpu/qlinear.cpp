/* The C ABI: checks, ownership, and the two phases of a run. */
#include "treeq/qlinear.h"

#include <cmath>
#include <new>

#include "buffer.h"
#include "dispatch.h"
#include "layer.h"
#include "repack.h"

struct treeq_qlinear {
  treeq::Layer layer;
  const treeq::Kernels* kernels;
  treeq::Buffer stream, weight_scale, bias;
  std::unique_ptr<treeq::BranchStorage> branch;
  size_t bytes;
};

struct treeq_monarch {
  const treeq::Kernels* kernels;
  std::unique_ptr<treeq::BranchStorage> branch;
};

namespace treeq {
namespace {

constexpr int64_t kMaxFeatures = int64_t(1) << 30;
constexpr int64_t kMaxTokens = int64_t(1) << 40;

bool is_bits(int32_t bits) { return bits >= TREEQ_MIN_BITS && bits <= TREEQ_MAX_BITS; }

treeq_status check_activation(const treeq_layer_format& c) {
  if (c.act_scale < TREEQ_SCALE_NONE || c.act_scale > TREEQ_SCALE_TENSOR_STATIC)
    return TREEQ_BAD_ACT_SCALE;
  if (c.act_scale == TREEQ_SCALE_NONE) return c.act_bits == 0 ? TREEQ_OK : TREEQ_BAD_ACT_BITS;
  if (!is_bits(c.act_bits)) return TREEQ_BAD_ACT_BITS;
  if (!std::isfinite(c.act_step) || c.act_step <= 0.0f) return TREEQ_BAD_ACT_SCALE;
  const int64_t largest = ((int64_t(1) << c.weight_bits) - 1) << (c.act_bits - 1);
  return c.in_features > INT32_MAX / largest ? TREEQ_SUM_OVERFLOW : TREEQ_OK;
}

treeq_status check_branch(int64_t in_features, int64_t out_features, int64_t branch_in,
                          int64_t branch_out, int64_t rank) {
  if (rank < 1 || rank > kMaxFeatures || branch_in < 1 || branch_out < 1) return TREEQ_BAD_BRANCH;
  if (branch_in > in_features || branch_out > out_features) return TREEQ_BAD_BRANCH;
  return in_features % branch_in || out_features % branch_out ? TREEQ_BAD_BRANCH : TREEQ_OK;
}

treeq_status check(const treeq_qlinear_config& config) {
  if (config.abi_version != TREEQ_ABI_VERSION) return TREEQ_BAD_VERSION;
  const treeq_layer_format& c = config.layer;
  if (c.in_features < 1 || c.out_features < 1 || c.in_features > kMaxFeatures ||
      c.out_features > kMaxFeatures)
    return TREEQ_BAD_SHAPE;
  if (!is_bits(c.weight_bits)) return TREEQ_BAD_WEIGHT_BITS;
  if (const treeq_status status = check_activation(c)) return status;
  const int32_t g = c.rotation_group;
  if (g < 1 || (g & (g - 1)) || c.in_features % g) return TREEQ_BAD_ROTATION;
  if (c.group_size < 0 || (c.group_size && c.in_features % c.group_size)) return TREEQ_BAD_GROUP;
  if (!config.branch_rank) return TREEQ_OK;
  return check_branch(c.in_features, c.out_features, config.branch_in, config.branch_out,
                      config.branch_rank);
}

void fill_sizes(Layer& layer) {
  const treeq_layer_format& c = layer.format;
  layer.group_size = c.group_size ? c.group_size : c.in_features;
  layer.num_groups = c.in_features / layer.group_size;
  layer.group_words = int64_t(round_up(size_t(layer.group_size), kChunk)) / kInputs;
  layer.num_words = layer.group_words * layer.num_groups;
  layer.num_tiles = (c.out_features + kTile - 1) / kTile;
  layer.tile_bytes = size_t(layer.num_words * kInputs / kChunk) * chunk_bytes(c.weight_bits);
}

void serial_for(void*, treeq_task task, size_t num_tasks, void* argument) {
  for (size_t i = 0; i < num_tasks; ++i) task(argument, i);
}

/* One phase on the caller's threads. A task that finds no memory says so here. */
struct Phase {
  const Kernels* kernels;
  const Run* run;
  size_t scratch_bytes;
  bool is_tile;
  bool failed;
};

void run_task(void* argument, size_t i) {
  Phase& phase = *static_cast<Phase*>(argument);
  try {
    const Lease scratch(phase.scratch_bytes);
    (phase.is_tile ? phase.kernels->run_tiles : phase.kernels->prepare_panel)(
        *phase.run, int64_t(i), scratch.get());
  } catch (const std::bad_alloc&) {
    __atomic_store_n(&phase.failed, true, __ATOMIC_RELAXED);
  }
}

treeq_status run_phases(const Kernels* kernels, const Run& run, int64_t num_tiles,
                        size_t prepare_bytes, size_t tile_bytes, const treeq_parallel* parallel) {
  const treeq_parallel serial = {serial_for, nullptr};
  const treeq_parallel& on = parallel ? *parallel : serial;
  Phase prepare = {kernels, &run, prepare_bytes, false, false};
  on.parallel_for(on.context, run_task, size_t(run.panels.count), &prepare);
  if (prepare.failed) return TREEQ_OUT_OF_MEMORY;
  Phase tiles = {kernels, &run, tile_bytes, true, false};
  const int64_t tasks = (num_tiles + kTilesPerTask - 1) / kTilesPerTask;
  on.parallel_for(on.context, run_task, size_t(tasks), &tiles);
  return tiles.failed ? TREEQ_OUT_OF_MEMORY : TREEQ_OK;
}

/* Hands out parts of one lease. */
struct Cutter {
  uint8_t* base;
  size_t used;
  template <typename T>
  void take(T*& pointer, int64_t count) {
    if (base) pointer = reinterpret_cast<T*>(base + used);
    used += round_up(size_t(count) * sizeof(T), kVector);
  }
};

size_t cut_workspace(const Layer& layer, Run& run, uint8_t* base) {
  Cutter cutter = {base, 0};
  const int64_t m = run.panels.m;
  if (layer.format.act_bits) {
    cutter.take(run.codes, m * layer.num_words);
    cutter.take(run.scales, m);
    cutter.take(run.row_sums, m * layer.num_groups);
  } else {
    cutter.take(run.rotated, m * padded_features(layer.format.in_features));
  }
  if (run.branch) cutter.take(run.z, m * run.branch->num_out * run.branch->depth);
  return cutter.used;
}

treeq_status run_layer(const treeq_qlinear& q, Run& run, const treeq_parallel* parallel) {
  return run_phases(q.kernels, run, q.layer.num_tiles,
                    prepare_scratch_bytes(q.layer.format.in_features, run.fusion.norm_scale),
                    tile_scratch_bytes(q.layer), parallel);
}

constexpr treeq_fusion kNoFusion = {nullptr, nullptr, 0.0f, TREEQ_ACTIVATION_NONE,
                                    nullptr, nullptr, 1,    1, nullptr};

treeq_status check_fusion(const treeq_fusion& f, int64_t m, int64_t out_features) {
  if (f.activation != TREEQ_ACTIVATION_NONE && f.activation != TREEQ_ACTIVATION_GELU_TANH)
    return TREEQ_BAD_FUSION;
  if (f.num_outputs < 1 || f.num_outputs > TREEQ_MAX_OUTPUTS || out_features % f.num_outputs)
    return TREEQ_BAD_FUSION;
  if (f.addend && f.gate) return TREEQ_BAD_FUSION;
  if (f.num_outputs > 1 && (f.gate || f.addend || out_features / f.num_outputs % kTile))
    return TREEQ_BAD_FUSION;
  if (f.tokens < 1 || m % f.tokens) return TREEQ_BAD_FUSION;
  if ((f.norm_scale == nullptr) != (f.norm_shift == nullptr)) return TREEQ_NULL_POINTER;
  return (f.gate == nullptr) != (f.residual == nullptr) ? TREEQ_NULL_POINTER : TREEQ_OK;
}

void copy_codes(const Layer& layer, const Run& run, int8_t* codes) {
  for (int64_t p = 0; p < run.panels.count; ++p) {
    const int64_t first = first_row(run.panels, p);
    const int rows = num_rows(run.panels, p);
    const int8_t* panel = reinterpret_cast<const int8_t*>(run.codes + first * layer.num_words);
    for (int t = 0; t < rows; ++t)
      for (int64_t k = 0; k < layer.format.in_features; ++k) {
        const int64_t g = k / layer.group_size, i = k % layer.group_size;
        const int64_t word = g * layer.group_words + i / kInputs;
        codes[(first + t) * layer.format.in_features + k] =
            panel[(word * rows + t) * kInputs + i % kInputs];
      }
  }
}

}  // namespace
}  // namespace treeq

using namespace treeq;

treeq_status treeq_qlinear_create(const treeq_qlinear_config* config, const int32_t* planes,
                                  const float* weight_scale, const float* bias,
                                  const float* branch_r, const float* branch_l,
                                  treeq_qlinear** layer) {
  if (!config || !planes || !weight_scale || !layer) return TREEQ_NULL_POINTER;
  *layer = nullptr;
  if (const treeq_status status = check(*config)) return status;
  if (config->branch_rank && (!branch_r || !branch_l)) return TREEQ_NULL_POINTER;
  const Kernels* kernels = choose_kernels();
  if (!kernels) return TREEQ_BAD_ISA;
  try {
    auto made = std::make_unique<treeq_qlinear>();
    Layer& l = made->layer;
    l = {};
    l.format = config->layer;
    fill_sizes(l);
    made->kernels = kernels;
    made->stream = repack_planes(l, planes);
    made->weight_scale = tile_channels(weight_scale, l.format.out_features, l.num_groups);
    l.stream = made->stream.get();
    l.weight_scale = reinterpret_cast<const float*>(made->weight_scale.get());
    const size_t tiles = size_t(l.num_tiles);
    made->bytes = tiles * (l.tile_bytes + size_t(l.num_groups) * kTile * sizeof(float));
    if (bias) {
      made->bias = tile_channels(bias, l.format.out_features, 1);
      l.bias = reinterpret_cast<const float*>(made->bias.get());
      made->bytes += tiles * kTile * sizeof(float);
    }
    if (config->branch_rank) {
      made->branch = repack_branch(l.format.in_features, l.format.out_features, config->branch_in,
                                   config->branch_out, config->branch_rank, branch_r, branch_l);
      l.branch = &made->branch->branch;
      made->bytes += made->branch->bytes;
    }
    *layer = made.release();
  } catch (const std::bad_alloc&) {
    return TREEQ_OUT_OF_MEMORY;
  }
  return TREEQ_OK;
}

void treeq_qlinear_destroy(treeq_qlinear* layer) { delete layer; }

treeq_status treeq_qlinear_run(const treeq_qlinear* layer, const float* x, int64_t m, float* y,
                               const treeq_parallel* parallel) {
  return treeq_qlinear_run_fused(layer, x, m, &y, nullptr, parallel);
}

treeq_status treeq_qlinear_run_fused(const treeq_qlinear* layer, const float* x, int64_t m,
                                     float* const* y, const treeq_fusion* fusion,
                                     const treeq_parallel* parallel) {
  if (!layer) return TREEQ_NULL_POINTER;
  if (m < 0 || m > kMaxTokens) return TREEQ_BAD_SHAPE;
  if (m == 0) return TREEQ_OK;
  if (!x || !y) return TREEQ_NULL_POINTER;
  Run run = {};
  run.layer = &layer->layer;
  run.branch = layer->layer.branch;
  run.x = x;
  run.fusion = fusion ? *fusion : kNoFusion;
  if (const treeq_status status = check_fusion(run.fusion, m, layer->layer.format.out_features))
    return status;
  for (int32_t i = 0; i < run.fusion.num_outputs; ++i) {
    if (!y[i]) return TREEQ_NULL_POINTER;
    run.y[i] = y[i];
  }
  run.panels = cut_panels(m);
  try {
    const Lease workspace(cut_workspace(layer->layer, run, nullptr));
    cut_workspace(layer->layer, run, workspace.get());
    return run_layer(*layer, run, parallel);
  } catch (const std::bad_alloc&) {
    return TREEQ_OUT_OF_MEMORY;
  }
}

treeq_status treeq_qlinear_inspect(const treeq_qlinear* layer, const float* x, int64_t m,
                                   int8_t* codes, float* scales, int32_t* sums) {
  if (!layer) return TREEQ_NULL_POINTER;
  if (!layer->layer.format.act_bits) return TREEQ_BAD_ACT_SCALE;
  if (m < 0 || m > kMaxTokens) return TREEQ_BAD_SHAPE;
  if (m == 0) return TREEQ_OK;
  if (!x) return TREEQ_NULL_POINTER;
  const Layer& l = layer->layer;
  Run run = {};
  run.layer = &l;
  run.x = x;
  run.fusion = kNoFusion;
  run.panels = cut_panels(m);
  run.sums = sums;
  try {
    const Buffer y = allocate(size_t(m * l.format.out_features) * sizeof(float));
    run.y[0] = reinterpret_cast<float*>(y.get());
    const Lease workspace(cut_workspace(l, run, nullptr));
    cut_workspace(l, run, workspace.get());
    if (const treeq_status status = run_layer(*layer, run, nullptr)) return status;
    if (codes) copy_codes(l, run, codes);
    for (int64_t i = 0; scales && i < m; ++i) scales[i] = run.scales[i];
  } catch (const std::bad_alloc&) {
    return TREEQ_OUT_OF_MEMORY;
  }
  return TREEQ_OK;
}

size_t treeq_qlinear_bytes(const treeq_qlinear* layer) { return layer ? layer->bytes : 0; }

void treeq_release_workspaces(void) { release_leases(); }

treeq_status treeq_monarch_create(int64_t in_features, int64_t out_features, int64_t branch_in,
                                  int64_t branch_out, int64_t branch_rank, const float* branch_r,
                                  const float* branch_l, treeq_monarch** monarch) {
  if (!branch_r || !branch_l || !monarch) return TREEQ_NULL_POINTER;
  *monarch = nullptr;
  if (in_features < 1 || out_features < 1 || in_features > kMaxFeatures ||
      out_features > kMaxFeatures)
    return TREEQ_BAD_SHAPE;
  if (const treeq_status status =
          check_branch(in_features, out_features, branch_in, branch_out, branch_rank))
    return status;
  const Kernels* kernels = choose_kernels();
  if (!kernels) return TREEQ_BAD_ISA;
  try {
    auto made = std::make_unique<treeq_monarch>();
    made->kernels = kernels;
    made->branch = repack_branch(in_features, out_features, branch_in, branch_out, branch_rank,
                                 branch_r, branch_l);
    *monarch = made.release();
  } catch (const std::bad_alloc&) {
    return TREEQ_OUT_OF_MEMORY;
  }
  return TREEQ_OK;
}

void treeq_monarch_destroy(treeq_monarch* monarch) { delete monarch; }

treeq_status treeq_monarch_run(const treeq_monarch* monarch, const float* x, int64_t m, float* y,
                               const treeq_parallel* parallel) {
  if (!monarch) return TREEQ_NULL_POINTER;
  if (m < 0 || m > kMaxTokens) return TREEQ_BAD_SHAPE;
  if (m == 0) return TREEQ_OK;
  if (!x || !y) return TREEQ_NULL_POINTER;
  const Branch& branch = monarch->branch->branch;
  Run run = {};
  run.branch = &branch;
  run.x = x;
  run.y[0] = y;
  run.fusion = kNoFusion;
  run.panels = cut_panels(m);
  try {
    const Lease workspace(size_t(m * branch.num_out * branch.depth) * sizeof(float));
    run.z = reinterpret_cast<float*>(workspace.get());
    return run_phases(monarch->kernels, run, (branch.out_features + kTile - 1) / kTile, kVector,
                      kVector, parallel);
  } catch (const std::bad_alloc&) {
    return TREEQ_OUT_OF_MEMORY;
  }
}

int32_t treeq_peak(int64_t iterations, int64_t* num_operations) {
  const Kernels* kernels = choose_kernels();
  int64_t ignored;
  return kernels ? kernels->peak(iterations, num_operations ? num_operations : &ignored) : 0;
}
