/* Fields of the QLinear plugin, as treeq_export/ops.py has them. */
#ifndef TREEQ_TENSORRT_FIELDS_H
#define TREEQ_TENSORRT_FIELDS_H

#include <NvInferRuntime.h>

#include <cstddef>
#include <cstdint>

namespace treeq::trt {

struct QLinearFields {
  int32_t weight_bits = 0;     // 2..8
  int32_t act_bits = 0;        // 2..8
  char act_scale[16] = "";     // token_rms, token_absmax or tensor_static
  float act_step = 0;
  int32_t rotation_group = 0;  // power of two, 1..128, divides in_features
  int32_t group_size = 0;      // 0: one scale a channel; else a multiple of 32 dividing K
  int32_t in_features = 0;     // K
  int32_t out_features = 0;    // N
};

constexpr size_t kNumQLinearFields = 8;

/* Names and types alone, for TensorRT's parser; lives as long as the library. */
const nvinfer1::PluginFieldCollection& qlinear_field_names() noexcept;

/* Reads and checks the fields of a layer; false after one logged line that names it. */
bool read_fields(const char* layer, const nvinfer1::PluginFieldCollection& fields,
                 QLinearFields& out) noexcept;

/* Points `out` into `fields`, for serialization. */
void write_fields(const QLinearFields& fields,
                  nvinfer1::PluginField (&out)[kNumQLinearFields]) noexcept;

}  // namespace treeq::trt
#endif
