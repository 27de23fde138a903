/* Which kernel runs a shape, and with which grid: treeq_gpu/choose.py in C++.
 *
 * tests/kernels/test_tensorrt_plugin.py compares both through C functions. Reasons are in the Python
 * file; all arithmetic is on integers.
 */
#ifndef TREEQ_TENSORRT_CHOOSE_H
#define TREEQ_TENSORRT_CHOOSE_H

#include <cstdint>

namespace treeq::trt {

constexpr int kNameBytes = 64;
constexpr int64_t kCodesPadding = 128;
/* An engine is built without knowing the GPU: its workspace is made for this many multiprocessors,
 * and no more are counted when it runs. */
constexpr int32_t kMaxSms = 256;

/* A kernel and its grid; the layout is that of the test's ctypes structure, like all below. */
struct Launch {
  char name[kNameBytes];
  int32_t grid[3];
};

struct QLinearChoice {
  Launch product;
  Launch finish;        // name is empty where split_k is 1
  int32_t split_k;      // slices of K
  int32_t k_per_split;  // channels of a slice
};

struct QuantizeChoice {
  Launch launch;
  int32_t columns_per_program;
};

struct MonarchChoice {
  Launch in;
  Launch out;
};

struct Workspace {
  int64_t scale_offset, partials_offset, total_bytes;  // codes are at 0
};

/* KP, the columns of the codes of K channels. */
int64_t padded(int64_t k) noexcept;

/* m >= 1; dtype: fp16, bf16 or fp32. */
QLinearChoice choose_qlinear(int64_t m, int64_t n, int64_t k, int32_t weight_bits,
                             int32_t group_size, int32_t num_sms, const char* dtype) noexcept;
QuantizeChoice choose_quantize(int64_t m, int64_t k, int32_t act_scale, int32_t rotation_group,
                               int32_t num_sms, const char* dtype) noexcept;
MonarchChoice choose_monarch(int64_t m, int32_t b_in, int32_t b_out, int32_t rank,
                             int32_t block_out, const char* dtype) noexcept;

/* Places of codes, scales and partial sums of one call. */
Workspace place_workspace(int64_t m, int64_t n, int64_t k, int32_t split_k) noexcept;

/* Bytes that are enough for up to max_m tokens on every GPU of at most kMaxSms multiprocessors. */
int64_t max_workspace_bytes(int64_t max_m, int64_t n, int64_t k, int32_t group_size) noexcept;

}  // namespace treeq::trt
#endif
