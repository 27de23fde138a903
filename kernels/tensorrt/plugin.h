/* What both plugins share: the four interfaces of IPluginV3, names, tensors of a call. */
#ifndef TREEQ_TENSORRT_PLUGIN_H
#define TREEQ_TENSORRT_PLUGIN_H

#include <NvInferRuntime.h>

#include <cstdint>

#include "treeq/op.h"

namespace treeq::trt {

/* fp16, bf16 or fp32 as in the kernels' names; null for other types. */
const char* type_name(nvinfer1::DataType type) noexcept;

/* Bytes of an element of these three. */
int64_t type_bytes(nvinfer1::DataType type) noexcept;

/* Whether all extents are known and the product fits, then the product of all but the last. */
bool count_rows(const nvinfer1::Dims& dims, int64_t& rows) noexcept;

/* The name of a layer, cut to fit. */
struct LayerName {
  explicit LayerName(const char* name) noexcept;
  char text[192];
};

/* One output of x's type; formats are linear. A derived class says which type an input has. */
class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuild,
               public nvinfer1::IPluginV3OneRuntime {
 public:
  Plugin(const char* op, const LayerName& layer) noexcept : op_(op), layer_(layer) {}

  nvinfer1::IPluginCapability* getCapabilityInterface(
      nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::AsciiChar const* getPluginName() const noexcept override { return op_; }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return TREEQ_OP_VERSION; }
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return TREEQ_DOMAIN; }
  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t num_outputs,
                             nvinfer1::DataType const* inputs,
                             int32_t num_inputs) const noexcept override;
  bool supportsFormatCombination(int32_t position,
                                 nvinfer1::DynamicPluginTensorDesc const* tensors,
                                 int32_t num_inputs, int32_t num_outputs) noexcept override;
  nvinfer1::IPluginV3* attachToContext(
      nvinfer1::IPluginResourceContext* context) noexcept override;

 protected:
  /* Type that input `position` needs, given x's. */
  virtual nvinfer1::DataType input_type(int32_t position,
                                        nvinfer1::DynamicPluginTensorDesc const* tensors,
                                        int32_t num_inputs) const noexcept = 0;

  const char* layer() const noexcept { return layer_.text; }
  const LayerName& layer_name() const noexcept { return layer_; }
  bool check_num_inputs(int32_t num_inputs, int32_t low, int32_t high) const noexcept;
  /* Whether `dims` is `expected`, where -1 on either side stands for any extent. */
  bool check_dims(const char* what, const nvinfer1::Dims& dims,
                  const nvinfer1::Dims& expected) const noexcept;
  /* Whether all pointers are aligned to 16 bytes, as the kernels were compiled for. */
  bool check_aligned(void const* const* pointers, int32_t count) const noexcept;

 private:
  const char* op_;
  LayerName layer_;
};

}  // namespace treeq::trt
#endif
