#include "plugin.h"

#include <algorithm>
#include <cstdio>

#include "log.h"

namespace treeq::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

constexpr uintptr_t kAlignment = 16;

/* Writes dims as (a, b, c). */
void write_dims(const Dims& dims, char* out, size_t capacity) noexcept {
  size_t used = size_t(std::snprintf(out, capacity, "("));
  for (int32_t i = 0; i < dims.nbDims && used + 24 < capacity; ++i) {
    used += size_t(std::snprintf(out + used, capacity - used, "%s%lld", i ? ", " : "",
                                 static_cast<long long>(dims.d[i])));
  }
  std::snprintf(out + used, capacity - used, ")");
}

}  // namespace

const char* type_name(DataType type) noexcept {
  switch (type) {
    case DataType::kHALF: return "fp16";
    case DataType::kBF16: return "bf16";
    case DataType::kFLOAT: return "fp32";
    default: return nullptr;
  }
}

int64_t type_bytes(DataType type) noexcept { return type == DataType::kFLOAT ? 4 : 2; }

bool count_rows(const Dims& dims, int64_t& rows) noexcept {
  rows = 1;
  for (int32_t i = 0; i + 1 < dims.nbDims; ++i) {
    if (dims.d[i] < 0) return false;
    rows *= dims.d[i];
    if (rows > INT32_MAX) return false;
  }
  return dims.nbDims > 0;
}

LayerName::LayerName(const char* name) noexcept {
  std::snprintf(text, sizeof(text), "%s", name && *name ? name : TREEQ_DOMAIN);
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

int32_t Plugin::getOutputDataTypes(DataType* outputs, int32_t num_outputs, DataType const* inputs,
                                   int32_t num_inputs) const noexcept {
  if (num_outputs != 1 || num_inputs < 1) return 1;
  outputs[0] = inputs[0];
  return 0;
}

bool Plugin::supportsFormatCombination(int32_t position,
                                       nvinfer1::DynamicPluginTensorDesc const* tensors,
                                       int32_t num_inputs, int32_t num_outputs) noexcept {
  if (position < 0 || position >= num_inputs + num_outputs) return false;
  const nvinfer1::PluginTensorDesc& tensor = tensors[position].desc;
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  if (position == 0) return type_name(tensor.type) != nullptr;
  const DataType expected = position < num_inputs ? input_type(position, tensors, num_inputs)
                                                  : tensors[0].desc.type;
  return tensor.type == expected;
}

nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  return clone();
}

bool Plugin::check_num_inputs(int32_t num_inputs, int32_t low, int32_t high) const noexcept {
  if (num_inputs >= low && num_inputs <= high) return true;
  log_error("%s: %s has %d inputs, expected %d..%d", layer(), op_, num_inputs, low, high);
  return false;
}

bool Plugin::check_dims(const char* what, const Dims& dims, const Dims& expected) const noexcept {
  bool is_equal = dims.nbDims == expected.nbDims;
  for (int32_t i = 0; is_equal && i < dims.nbDims; ++i) {
    is_equal = dims.d[i] == expected.d[i] || dims.d[i] < 0 || expected.d[i] < 0;
  }
  if (is_equal) return true;
  char received[128], wanted[128];
  write_dims(dims, received, sizeof(received));
  write_dims(expected, wanted, sizeof(wanted));
  log_error("%s: %s has the shape %s, expected %s", layer(), what, received, wanted);
  return false;
}

bool Plugin::check_aligned(void const* const* pointers, int32_t count) const noexcept {
  for (int32_t i = 0; i < count; ++i) {
    if (reinterpret_cast<uintptr_t>(pointers[i]) % kAlignment == 0) continue;
    log_error("%s: tensor %d is at %p, expected an address that is a multiple of %d", layer(), i,
              pointers[i], int(kAlignment));
    return false;
  }
  return true;
}

}  // namespace treeq::trt
