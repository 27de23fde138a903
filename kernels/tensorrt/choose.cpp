#include "choose.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "treeq/op.h"

namespace treeq::trt {
namespace {

struct Tile {
  const char* shape_class;
  int64_t bm, bn, bk;
};

/* treeq_gpu/instantiations.py. */
constexpr int64_t kTokenRows = 16;
constexpr int64_t kMaxSplits = 16;
constexpr int64_t kAlignment = 256;
constexpr int64_t kQuantizeRows = 16;
constexpr Tile kToken{"token", 16, 64, 128}, kSmall{"small", 64, 64, 128};
constexpr Tile kWide{"wide", 128, 128, 128};
constexpr Tile kGroupedWide{"wide", 128, 64, 128};  // the other classes are alike for groups
constexpr Tile kFinish{"", 4, 256, 0};
constexpr Tile kMonarchToken{"token", 16, 64, 64}, kMonarchWide{"wide", 64, 64, 32};

int64_t ceil_div(int64_t a, int64_t b) noexcept { return (a + b - 1) / b; }

int64_t aligned(int64_t bytes) noexcept { return ceil_div(bytes, kAlignment) * kAlignment; }

int64_t num_tiles(int64_t m, int64_t n, const Tile& tile) noexcept {
  return ceil_div(m, tile.bm) * ceil_div(n, tile.bn);
}

const Tile& tile_of(int64_t m, int64_t n, int32_t group_size, int32_t num_sms) noexcept {
  if (m <= kTokenRows) return kToken;
  if (num_tiles(m, n, kWide) < num_sms) return kSmall;
  return group_size ? kGroupedWide : kWide;
}

/* Channels of a step where scales are per group. */
int32_t group_step(int32_t group_size) noexcept {
  return group_size % 128 == 0 ? 128 : group_size % 64 == 0 ? 64 : 32;
}

void set_grid(Launch& launch, int64_t x, int64_t y, int64_t z) noexcept {
  launch.grid[0] = int32_t(x);
  launch.grid[1] = int32_t(y);
  launch.grid[2] = int32_t(z);
}

void name_qlinear(Launch& launch, const Tile& tile, int32_t weight_bits, int32_t group_size,
                  const char* dtype) noexcept {
  if (group_size) {
    std::snprintf(launch.name, kNameBytes, "qlinear_w%d_g%d_%s_%s", weight_bits,
                  group_step(group_size), tile.shape_class, dtype);
  } else {
    std::snprintf(launch.name, kNameBytes, "qlinear_w%d_%s_%s", weight_bits, tile.shape_class,
                  dtype);
  }
}

/* rms for token_rms, absmax for token_absmax, static for tensor_static. */
const char* kind_of(int32_t act_scale) noexcept {
  static constexpr const char* kNames[] = TREEQ_SCALE_NAMES;
  const char* end = std::strchr(kNames[act_scale], '_');
  return end ? end + 1 : kNames[act_scale];
}

}  // namespace

int64_t padded(int64_t k) noexcept { return ceil_div(k, kCodesPadding) * kCodesPadding; }

QLinearChoice choose_qlinear(int64_t m, int64_t n, int64_t k, int32_t weight_bits,
                             int32_t group_size, int32_t num_sms, const char* dtype) noexcept {
  const Tile& tile = tile_of(m, n, group_size, num_sms);
  const int64_t tiles = num_tiles(m, n, tile), steps = padded(k) / tile.bk;
  int64_t wanted = 1;
  if (&tile != &kWide && group_size == 0) {
    wanted = std::max(int64_t(1), std::min({num_sms / tiles, steps, kMaxSplits}));
  }
  QLinearChoice choice{};
  const int64_t k_per_split = ceil_div(steps, wanted) * tile.bk;
  const int64_t splits = ceil_div(padded(k), k_per_split);
  choice.split_k = int32_t(splits);
  choice.k_per_split = int32_t(splits == 1 ? padded(k) : k_per_split);
  set_grid(choice.product, tiles, splits, 1);
  if (splits == 1) {
    name_qlinear(choice.product, tile, weight_bits, group_size, dtype);
    return choice;
  }
  std::snprintf(choice.product.name, kNameBytes, "qlinear_partials_w%d_%s", weight_bits,
                tile.shape_class);
  std::snprintf(choice.finish.name, kNameBytes, "finish_%s", dtype);
  set_grid(choice.finish, ceil_div(m, kFinish.bm), ceil_div(n, kFinish.bn), 1);
  return choice;
}

QuantizeChoice choose_quantize(int64_t m, int64_t k, int32_t act_scale, int32_t rotation_group,
                               int32_t num_sms, const char* dtype) noexcept {
  const int64_t rows = ceil_div(m, kQuantizeRows), steps = padded(k) / kCodesPadding;
  const int64_t parts = std::max(int64_t(1), std::min(steps, num_sms / rows));
  const int64_t columns = ceil_div(steps, parts) * kCodesPadding;
  QuantizeChoice choice{};
  std::snprintf(choice.launch.name, kNameBytes, "quantize_%s_h%d_%s", kind_of(act_scale),
                rotation_group, dtype);
  set_grid(choice.launch, rows, ceil_div(padded(k), columns), 1);
  choice.columns_per_program = int32_t(columns);
  return choice;
}

MonarchChoice choose_monarch(int64_t m, int32_t b_in, int32_t b_out, int32_t rank,
                             int32_t block_out, const char* dtype) noexcept {
  const Tile& tile = m <= kTokenRows ? kMonarchToken : kMonarchWide;
  const int64_t rows = ceil_div(m, tile.bm);
  MonarchChoice choice{};
  std::snprintf(choice.in.name, kNameBytes, "monarch_in_%s_%s", tile.shape_class, dtype);
  std::snprintf(choice.out.name, kNameBytes, "monarch_out_%s_%s", tile.shape_class, dtype);
  set_grid(choice.in, rows, ceil_div(int64_t(b_out) * rank, tile.bn), b_in);
  set_grid(choice.out, rows, ceil_div(block_out, tile.bn), b_out);
  return choice;
}

Workspace place_workspace(int64_t m, int64_t n, int64_t k, int32_t split_k) noexcept {
  const int64_t codes = aligned(m * padded(k)), scales = aligned(4 * m);
  const int64_t partials = split_k > 1 ? aligned(4 * split_k * m * n) : 0;
  return {codes, codes + scales, codes + scales + partials};
}

int64_t max_workspace_bytes(int64_t max_m, int64_t n, int64_t k, int32_t group_size) noexcept {
  const Workspace without = place_workspace(max_m, n, k, 1);
  if (group_size) return without.total_bytes;
  // K is cut in at most kMaxSplits slices, and only while the tiles of all slices, which are at
  // most those of kSmall, are no more than the multiprocessors.
  const int64_t sums = std::min(kMaxSplits * max_m * n, kMaxSms * kSmall.bm * kSmall.bn);
  return without.total_bytes + aligned(4 * sums);
}

}  // namespace treeq::trt

/* For the comparison with choose.py. */
#define TREEQ_API extern "C" __attribute__((visibility("default")))

TREEQ_API void treeq_plugin_choose_qlinear(int64_t m, int64_t n, int64_t k, int32_t weight_bits,
                                           int32_t group_size, int32_t num_sms, const char* dtype,
                                           treeq::trt::QLinearChoice* out) {
  *out = treeq::trt::choose_qlinear(m, n, k, weight_bits, group_size, num_sms, dtype);
}

TREEQ_API void treeq_plugin_choose_quantize(int64_t m, int64_t k, int32_t act_scale,
                                            int32_t rotation_group, int32_t num_sms,
                                            const char* dtype, treeq::trt::QuantizeChoice* out) {
  *out = treeq::trt::choose_quantize(m, k, act_scale, rotation_group, num_sms, dtype);
}

TREEQ_API void treeq_plugin_choose_monarch(int64_t m, int32_t b_in, int32_t b_out, int32_t rank,
                                           int32_t block_out, const char* dtype,
                                           treeq::trt::MonarchChoice* out) {
  *out = treeq::trt::choose_monarch(m, b_in, b_out, rank, block_out, dtype);
}

TREEQ_API void treeq_plugin_place_workspace(int64_t m, int64_t n, int64_t k, int32_t split_k,
                                            treeq::trt::Workspace* out) {
  *out = treeq::trt::place_workspace(m, n, k, split_k);
}

TREEQ_API int64_t treeq_plugin_max_workspace_bytes(int64_t max_m, int64_t n, int64_t k,
                                                   int32_t group_size) {
  return treeq::trt::max_workspace_bytes(max_m, n, k, group_size);
}
