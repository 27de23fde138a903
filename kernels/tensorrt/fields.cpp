#include "fields.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

#include "log.h"

namespace treeq::trt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

struct FieldInfo {
  const char* name;
  PluginFieldType type;
  size_t offset;
};

/* TensorRT has no 64-bit fields; text is of characters. */
constexpr FieldInfo kInfos[kNumFields] = {
#define TREEQ_INT(name) {#name, PluginFieldType::kINT32, offsetof(treeq_layer_format, name)},
#define TREEQ_REAL(name) {#name, PluginFieldType::kFLOAT32, offsetof(treeq_layer_format, name)},
#define TREEQ_TEXT(name) {#name, PluginFieldType::kCHAR, offsetof(treeq_layer_format, name)},
    TREEQ_LAYER_FIELDS(TREEQ_INT, TREEQ_REAL, TREEQ_TEXT)};
constexpr const char* kScales = "token_rms, token_absmax or tensor_static";
constexpr size_t kMaxText = 15;  // characters that are shown of an unknown one

const PluginField* find(const PluginFieldCollection& fields, const char* name) noexcept {
  for (int32_t i = 0; i < fields.nbFields; ++i) {
    const PluginField& field = fields.fields[i];
    if (field.name && std::strcmp(field.name, name) == 0) return &field;
  }
  return nullptr;
}

/* The number of an activation scale: text of `length` characters, with or without a zero behind. */
bool read_scale(const char* layer, const PluginField& field, void* out) noexcept {
  const char* text = static_cast<const char*>(field.data);
  const size_t length = strnlen(text, size_t(std::max(field.length, 0)));
  for (int32_t i = 0; i < int32_t(std::size(kScaleNames)); ++i) {
    if (std::strlen(kScaleNames[i]) != length || std::memcmp(kScaleNames[i], text, length)) continue;
    std::memcpy(out, &i, sizeof(i));
    return true;
  }
  if (length > kMaxText) {
    log_error("%s: field %s is %d characters long, expected %s", layer, field.name, field.length,
              kScales);
  } else {
    log_error("%s: %s is \"%.*s\", expected %s", layer, field.name, int(length), text, kScales);
  }
  return false;
}

bool read_field(const char* layer, const PluginFieldCollection& fields, const FieldInfo& info,
                void* out) noexcept {
  const PluginField* field = find(fields, info.name);
  if (!field || !field->data) {
    log_error("%s: field %s is missing; compile the model with this version's treeq-export", layer,
              info.name);
    return false;
  }
  if (field->type != info.type) {
    log_error("%s: field %s has TensorRT's field type %d, expected %d", layer, info.name,
              int(field->type), int(info.type));
    return false;
  }
  if (info.type == PluginFieldType::kCHAR) return read_scale(layer, *field, out);
  std::memcpy(out, field->data, sizeof(int32_t));  // a float is as long
  return true;
}

bool check_range(const char* layer, const char* name, int32_t value, int32_t low,
                 int32_t high) noexcept {
  if (value >= low && value <= high) return true;
  log_error("%s: %s is %d, expected %d..%d", layer, name, value, low, high);
  return false;
}

bool check_divides(const char* layer, const char* name, int32_t value, int32_t k) noexcept {
  if (k % value == 0) return true;
  log_error("%s: %s %d does not divide in_features %d", layer, name, value, k);
  return false;
}

bool check_act(const char* layer, const treeq_layer_format& fields) noexcept {
  if (fields.act_scale == TREEQ_SCALE_NONE) {
    log_error("%s: act_scale is \"none\", expected %s", layer, kScales);
    return false;
  }
  if (std::isfinite(fields.act_step) && fields.act_step > 0) return true;
  log_error("%s: act_step is %g, expected a positive number", layer, double(fields.act_step));
  return false;
}

bool check_groups(const char* layer, const treeq_layer_format& fields) noexcept {
  const int32_t rotation = fields.rotation_group, group = fields.group_size;
  if (!check_range(layer, "rotation_group", rotation, 1, TREEQ_MAX_ROTATION)) return false;
  if (rotation & (rotation - 1)) {
    log_error("%s: rotation_group is %d, expected a power of two", layer, rotation);
    return false;
  }
  if (!check_divides(layer, "rotation_group", rotation, fields.in_features)) return false;
  if (group == 0) return true;
  if (group < 0 || group % TREEQ_PACK_WORD) {
    log_error("%s: group_size is %d, expected 0 or a multiple of %d", layer, group,
              TREEQ_PACK_WORD);
    return false;
  }
  return check_divides(layer, "group_size", group, fields.in_features);
}

bool check(const char* layer, const treeq_layer_format& fields) noexcept {
  if (fields.act_bits == 0) {
    log_error("%s: act_bits is 0; a weight-only layer has no plugin: compile for TensorRT again, "
              "which lowers it to DequantizeLinear and MatMul", layer);
    return false;
  }
  return check_range(layer, "weight_bits", fields.weight_bits, TREEQ_MIN_BITS, TREEQ_MAX_BITS) &&
         check_range(layer, "act_bits", fields.act_bits, TREEQ_MIN_BITS, TREEQ_MAX_BITS) &&
         check_range(layer, "in_features", fields.in_features, 1, TREEQ_MAX_IN_FEATURES) &&
         check_range(layer, "out_features", fields.out_features, 1, 1 << 20) &&
         check_act(layer, fields) && check_groups(layer, fields);
}

}  // namespace

const PluginFieldCollection& qlinear_field_names() noexcept {
  static PluginField fields[kNumFields];
  static const PluginFieldCollection collection = [] {
    for (size_t i = 0; i < kNumFields; ++i) {
      fields[i] = PluginField(kInfos[i].name, nullptr, kInfos[i].type, 1);
    }
    return PluginFieldCollection{int32_t(kNumFields), fields};
  }();
  return collection;
}

bool read_fields(const char* layer, const PluginFieldCollection& fields,
                 treeq_layer_format& out) noexcept {
  for (const FieldInfo& info : kInfos) {
    if (!read_field(layer, fields, info, reinterpret_cast<char*>(&out) + info.offset)) return false;
  }
  return check(layer, out);
}

void write_fields(const treeq_layer_format& fields, PluginField (&out)[kNumFields]) noexcept {
  const char* scale = kScaleNames[fields.act_scale];
  for (size_t i = 0; i < kNumFields; ++i) {
    const FieldInfo& info = kInfos[i];
    const bool is_text = info.type == PluginFieldType::kCHAR;
    const char* data = is_text ? scale : reinterpret_cast<const char*>(&fields) + info.offset;
    out[i] = PluginField(info.name, data, info.type, is_text ? int32_t(std::strlen(scale)) : 1);
  }
}

}  // namespace treeq::trt
