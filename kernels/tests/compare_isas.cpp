/* Runs random layers on every instruction set of this processor and compares all bits with the portable
 * kernels, and the portable sums with a plain loop. For processors that have no Python at hand, such
 * as an emulated one: exit status 0 and "equal: <names>", or 1 and the first difference. */
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "treeq/qlinear.h"

namespace {

struct Result {
  std::vector<int8_t> codes;
  std::vector<float> scales, y;
  std::vector<int32_t> sums;
};

struct Case {
  treeq_qlinear_config config;
  int64_t m;
  std::vector<int32_t> planes;
  std::vector<int> weight;  // codes
  std::vector<float> scale, bias, r, l, x;
};

Case make_case(std::mt19937& random) {
  const auto pick = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  std::normal_distribution<float> gauss;
  Case c = {};
  treeq_qlinear_config& config = c.config;
  config.abi_version = TREEQ_ABI_VERSION;
  treeq_layer_format& q = config.layer;
  q.weight_bits = int32_t(pick(2, 8));
  q.act_bits = int32_t(pick(2, 8));
  q.act_scale = int32_t(pick(1, 3));
  q.act_step = q.act_scale == TREEQ_SCALE_TENSOR_STATIC ? 0.1f : 0.4f / float(q.act_bits);
  q.rotation_group = 1 << pick(0, 8);
  const int64_t groups = pick(1, 3);
  q.in_features = int32_t(q.rotation_group * pick(1, 6) * groups);
  q.group_size = groups == 1 ? 0 : int32_t(q.in_features / groups);
  q.out_features = int32_t(pick(1, 90));
  c.m = pick(1, 30);
  if (pick(0, 1)) config.branch_in = config.branch_out = 1, config.branch_rank = pick(1, 9);
  const int64_t n = q.out_features, k = q.in_features, words = (k + 31) / 32;
  c.planes.assign(size_t(q.weight_bits * n * words), 0);
  c.weight.resize(size_t(n * k));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < k; ++j) {
      const int64_t u = pick(0, (1 << q.weight_bits) - 1);
      c.weight[size_t(i * k + j)] = int(u) - (1 << (q.weight_bits - 1));
      for (int p = 0; p < q.weight_bits; ++p)
        if (u >> p & 1) c.planes[size_t((p * n + i) * words + j / 32)] |= int32_t(1u << (j % 32));
    }
  const auto fill = [&](std::vector<float>& v, int64_t count) {
    for (int64_t i = 0; i < count; ++i) v.push_back(gauss(random));
  };
  fill(c.scale, n * groups);
  fill(c.bias, n);
  fill(c.r, k * config.branch_rank);
  fill(c.l, n * config.branch_rank);
  fill(c.x, c.m * k);
  return c;
}

bool run(const Case& c, Result& out) {
  const treeq_layer_format& q = c.config.layer;
  const int64_t groups = q.group_size ? q.in_features / q.group_size : 1;
  treeq_qlinear* layer = nullptr;
  if (treeq_qlinear_create(&c.config, c.planes.data(), c.scale.data(), c.bias.data(), c.r.data(),
                           c.l.data(), &layer))
    return false;
  out.codes.resize(c.x.size());
  out.scales.resize(size_t(c.m));
  out.sums.resize(size_t(c.m * groups * q.out_features));
  out.y.resize(size_t(c.m * q.out_features));
  bool fine = !treeq_qlinear_inspect(layer, c.x.data(), c.m, out.codes.data(), out.scales.data(),
                                     out.sums.data());
  fine = fine && !treeq_qlinear_run(layer, c.x.data(), c.m, out.y.data(), nullptr);
  treeq_qlinear_destroy(layer);
  return fine;
}

bool sums_are_right(const Case& c, const Result& got) {
  const treeq_layer_format& q = c.config.layer;
  const int64_t k = q.in_features, n = q.out_features;
  const int64_t size = q.group_size ? q.group_size : k, groups = k / size;
  for (int64_t t = 0; t < c.m; ++t)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = 0; i < n; ++i) {
        int32_t sum = 0;
        for (int64_t j = g * size; j < (g + 1) * size; ++j)
          sum += got.codes[size_t(t * k + j)] * c.weight[size_t(i * k + j)];
        if (sum != got.sums[size_t((t * groups + g) * n + i)]) return false;
      }
  return true;
}

template <typename T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && !std::memcmp(a.data(), b.data(), a.size() * sizeof(T));
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 200;
  std::string names;
  for (const char* isa : {"avx512vnni", "avx2", "neon"}) {
    setenv("TREEQ_ISA", isa, 1);
    if (!treeq_isa()) continue;
    std::mt19937 random(1);
    for (int i = 0; i < count; ++i) {
      const Case c = make_case(random);
      Result got, expected;
      setenv("TREEQ_ISA", isa, 1);
      const bool ran = run(c, got);
      setenv("TREEQ_ISA", "portable", 1);
      if (!ran || !run(c, expected)) return std::printf("%s: case %d did not run\n", isa, i), 1;
      const bool equal = same(got.codes, expected.codes) && same(got.scales, expected.scales) &&
                         same(got.sums, expected.sums) && same(got.y, expected.y);
      if (!equal || !sums_are_right(c, got))
        return std::printf("%s: case %d (W%d A%d, K %d, N %d) differs\n", isa, i,
                           c.config.layer.weight_bits, c.config.layer.act_bits,
                           c.config.layer.in_features, c.config.layer.out_features),
               1;
    }
    names += std::string(" ") + isa;
  }
  std::printf("equal:%s\n", names.c_str());
  return 0;
}
