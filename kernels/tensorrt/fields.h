/* A layer as the fields of the QLinear plugin. */
#ifndef TREEQ_TENSORRT_FIELDS_H
#define TREEQ_TENSORRT_FIELDS_H

#include <NvInferRuntime.h>

#include <cstddef>

#include "treeq/op.h"

namespace treeq::trt {

#define TREEQ_ONE(name) +1
constexpr size_t kNumFields = 0 TREEQ_LAYER_FIELDS(TREEQ_ONE, TREEQ_ONE, TREEQ_ONE);
#undef TREEQ_ONE

/* Texts of a treeq_act_scale. */
constexpr const char* kScaleNames[] = TREEQ_SCALE_NAMES;

/* Names and types alone, for TensorRT's parser; lives as long as the library. */
const nvinfer1::PluginFieldCollection& qlinear_field_names() noexcept;

/* Reads and checks the fields of a layer; false after one logged line that names it. */
bool read_fields(const char* layer, const nvinfer1::PluginFieldCollection& fields,
                 treeq_layer_format& out) noexcept;

/* Points `out` into `fields`, for serialization. */
void write_fields(const treeq_layer_format& fields,
                  nvinfer1::PluginField (&out)[kNumFields]) noexcept;

}  // namespace treeq::trt
#endif
