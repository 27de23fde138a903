/* The definition in C++: any processor, no intrinsics. Everything else is compared with it. */
#include "layer.h"
#include "rows.h"
#include "vectors_portable.h"

namespace treeq {
namespace {

#include "unpack.inl"

void multiply_panel(const uint8_t* codes, const int32_t* x, int rows, int64_t words,
                    const treeq_layer_format&, int32_t* sums) {
  for (int i = 0; i < rows * kTile; ++i) sums[i] = 0;
  for (int64_t w = 0; w < words; ++w, x += rows, codes += 2 * kVector)
    for (int t = 0; t < rows; ++t) {
      int8_t inputs[kInputs];
      __builtin_memcpy(inputs, x + t, kInputs);
      for (int n = 0; n < kTile; ++n)
        for (int i = 0; i < kInputs; ++i)
          sums[t * kTile + n] += int32_t(codes[n * kInputs + i]) * inputs[i];
    }
}

#include "generic.inl"

int32_t peak(int64_t iterations, int64_t* num_operations) {
  volatile int32_t factor = 3;
  int32_t sum[kLanes] = {};
  for (int64_t i = 0; i < iterations; ++i)
    for (int lane = 0; lane < kLanes; ++lane) sum[lane] = sum[lane] * factor + lane;
  *num_operations = iterations * kLanes * 2;
  int32_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total ^= sum[lane];
  return total;
}

}  // namespace

const Kernels* portable_kernels() {
  static const Kernels kernels = {"portable", prepare_panel, run_tiles, peak};
  return &kernels;
}

}  // namespace treeq
