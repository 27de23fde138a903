#include "fields.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "log.h"

namespace treeq::trt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

constexpr int32_t kMaxInFeatures = 130944;  // the int32 sum of so many products of bytes is exact

struct FieldInfo {
  const char* name;
  PluginFieldType type;
  size_t offset;
};

constexpr FieldInfo kInfos[kNumQLinearFields] = {
    {"weight_bits", PluginFieldType::kINT32, offsetof(QLinearFields, weight_bits)},
    {"act_bits", PluginFieldType::kINT32, offsetof(QLinearFields, act_bits)},
    {"act_scale", PluginFieldType::kCHAR, offsetof(QLinearFields, act_scale)},
    {"act_step", PluginFieldType::kFLOAT32, offsetof(QLinearFields, act_step)},
    {"rotation_group", PluginFieldType::kINT32, offsetof(QLinearFields, rotation_group)},
    {"group_size", PluginFieldType::kINT32, offsetof(QLinearFields, group_size)},
    {"in_features", PluginFieldType::kINT32, offsetof(QLinearFields, in_features)},
    {"out_features", PluginFieldType::kINT32, offsetof(QLinearFields, out_features)},
};

const PluginField* find(const PluginFieldCollection& fields, const char* name) noexcept {
  for (int32_t i = 0; i < fields.nbFields; ++i) {
    const PluginField& field = fields.fields[i];
    if (field.name && std::strcmp(field.name, name) == 0) return &field;
  }
  return nullptr;
}

/* Copies text of `length` characters, with or without a zero at its end. */
bool copy_text(const PluginField& field, char* out, size_t capacity) noexcept {
  const char* text = static_cast<const char*>(field.data);
  const size_t length = strnlen(text, size_t(std::max(field.length, 0)));
  if (length >= capacity) return false;
  std::memcpy(out, text, length);
  out[length] = '\0';
  return true;
}

bool read_field(const char* layer, const PluginFieldCollection& fields, const FieldInfo& info,
                char* out) noexcept {
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
  if (info.type == PluginFieldType::kCHAR) {
    if (copy_text(*field, out, sizeof(QLinearFields::act_scale))) return true;
    log_error("%s: field %s is %d characters long, expected token_rms, token_absmax or "
              "tensor_static", layer, info.name, field->length);
    return false;
  }
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

bool check_act(const char* layer, const QLinearFields& fields) noexcept {
  const bool is_known = !std::strcmp(fields.act_scale, "token_rms") ||
                        !std::strcmp(fields.act_scale, "token_absmax") ||
                        !std::strcmp(fields.act_scale, "tensor_static");
  if (!is_known) {
    log_error("%s: act_scale is \"%s\", expected token_rms, token_absmax or tensor_static", layer,
              fields.act_scale);
    return false;
  }
  if (std::isfinite(fields.act_step) && fields.act_step > 0) return true;
  log_error("%s: act_step is %g, expected a positive number", layer, double(fields.act_step));
  return false;
}

bool check_groups(const char* layer, const QLinearFields& fields) noexcept {
  const int32_t rotation = fields.rotation_group, group = fields.group_size;
  if (!check_range(layer, "rotation_group", rotation, 1, 128)) return false;
  if (rotation & (rotation - 1)) {
    log_error("%s: rotation_group is %d, expected a power of two", layer, rotation);
    return false;
  }
  if (!check_divides(layer, "rotation_group", rotation, fields.in_features)) return false;
  if (group == 0) return true;
  if (group < 0 || group % 32) {
    log_error("%s: group_size is %d, expected 0 or a multiple of 32", layer, group);
    return false;
  }
  return check_divides(layer, "group_size", group, fields.in_features);
}

bool check(const char* layer, const QLinearFields& fields) noexcept {
  if (fields.act_bits == 0) {
    log_error("%s: act_bits is 0; a weight-only layer has no plugin: compile for TensorRT again, "
              "which lowers it to DequantizeLinear and MatMul", layer);
    return false;
  }
  return check_range(layer, "weight_bits", fields.weight_bits, 2, 8) &&
         check_range(layer, "act_bits", fields.act_bits, 2, 8) &&
         check_range(layer, "in_features", fields.in_features, 1, kMaxInFeatures) &&
         check_range(layer, "out_features", fields.out_features, 1, 1 << 20) &&
         check_act(layer, fields) && check_groups(layer, fields);
}

}  // namespace

const PluginFieldCollection& qlinear_field_names() noexcept {
  static PluginField fields[kNumQLinearFields];
  static const PluginFieldCollection collection = [] {
    for (size_t i = 0; i < kNumQLinearFields; ++i) {
      fields[i] = PluginField(kInfos[i].name, nullptr, kInfos[i].type, 1);
    }
    return PluginFieldCollection{int32_t(kNumQLinearFields), fields};
  }();
  return collection;
}

bool read_fields(const char* layer, const PluginFieldCollection& fields,
                 QLinearFields& out) noexcept {
  for (const FieldInfo& info : kInfos) {
    if (!read_field(layer, fields, info, reinterpret_cast<char*>(&out) + info.offset)) return false;
  }
  return check(layer, out);
}

void write_fields(const QLinearFields& fields, PluginField (&out)[kNumQLinearFields]) noexcept {
  for (size_t i = 0; i < kNumQLinearFields; ++i) {
    const char* data = reinterpret_cast<const char*>(&fields) + kInfos[i].offset;
    const bool is_text = kInfos[i].type == PluginFieldType::kCHAR;
    out[i] = PluginField(kInfos[i].name, data, kInfos[i].type,
                         is_text ? int32_t(std::strlen(data)) : 1);
  }
}

}  // namespace treeq::trt
