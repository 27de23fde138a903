/* The kernels of qlinear_int4.cu as C functions that run on a processor. */
#include "qlinear_int4.cu"

#define TREEQ_API extern "C" __attribute__((visibility("default")))

TREEQ_API void run_pack(const uint32_t* codes, uint32_t* packed, int64_t count) {
  for (int64_t block = 0; block < (count + 255) / 256; ++block) {
    emulation::run_block(256, {unsigned(block), 0, 0},
                         [&] { pack_int4_kernel(codes, packed, count); });
  }
}

/* sums: y is int32; else fp16. lands_at_once: when asynchronous copies are seen. */
TREEQ_API void run_qlinear(int bits, int sums, int lands_at_once, const unsigned char* codes,
                           const uint32_t* planes, const float* act_scale,
                           const float* weight_scale, const float* bias, void* y, int m, int n,
                           int kp, int kw, int has_bias) {
  emulation::lands_at_once = lands_at_once != 0;
  const auto launch = [&](auto kernel, auto* out) {
    for (int row = 0; row < (m + 127) / 128; ++row) {
      for (int column = 0; column < (n + 127) / 128; ++column) {
        emulation::run_block(treeq::int4::kThreads, {unsigned(row), unsigned(column), 0}, [&] {
          kernel(codes, planes, act_scale, weight_scale, bias, out, m, n, kp, kw, has_bias);
        });
      }
    }
  };
  if (sums) {
    auto* out = static_cast<int32_t*>(y);
    if (bits == 2) launch(qlinear_int4_w2_sums_kernel, out);
    if (bits == 3) launch(qlinear_int4_w3_sums_kernel, out);
    if (bits == 4) launch(qlinear_int4_w4_sums_kernel, out);
  } else {
    auto* out = static_cast<__half*>(y);
    if (bits == 2) launch(qlinear_int4_w2_kernel, out);
    if (bits == 3) launch(qlinear_int4_w3_kernel, out);
    if (bits == 4) launch(qlinear_int4_w4_kernel, out);
  }
}
