/* QLinear: quantize_tokens, then one product, or slices of K and their sum. */
#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <new>

#include "arguments.h"
#include "choose.h"
#include "fields.h"
#include "log.h"
#include "ops.h"

namespace treeq::trt {
namespace {

using namespace nvinfer1;

enum Input : int32_t {
  kX = TREEQ_QLINEAR_X,
  kPlanes = TREEQ_QLINEAR_PLANES,
  kWeightScale = TREEQ_QLINEAR_WEIGHT_SCALE,
  kNumRequired = TREEQ_QLINEAR_REQUIRED,
};
constexpr int32_t kMaxInputs = TREEQ_QLINEAR_INPUTS;

Dims make_dims(std::initializer_list<int64_t> extents) noexcept {
  Dims dims{};
  for (int64_t extent : extents) dims.d[dims.nbDims++] = extent;
  return dims;
}

/* Where the optional inputs are; -1 where they are left out. A bias has one axis. */
struct Optional {
  int32_t bias = -1, addend = -1;
};

class QLinear final : public Plugin {
 public:
  QLinear(const LayerName& layer, const treeq_layer_format& fields) noexcept
      : Plugin(TREEQ_QLINEAR, layer), fields_(fields) {}

  IPluginV3* clone() noexcept override {
    auto* copy = new (std::nothrow) QLinear(layer_name(), fields_);
    if (!copy) log_error("%s: out of host memory", layer());
    if (copy) copy->optional_ = optional_, copy->is_shaped_ = is_shaped_;
    return copy;
  }

  int32_t getOutputShapes(DimsExprs const* inputs, int32_t num_inputs, DimsExprs const*, int32_t,
                          DimsExprs* outputs, int32_t num_outputs,
                          IExprBuilder& builder) noexcept override {
    if (!check_num_inputs(num_inputs, kNumRequired, kMaxInputs) || num_outputs != 1) return 1;
    outputs[0] = inputs[kX];
    outputs[0].d[inputs[kX].nbDims - 1] = builder.constant(fields_.out_features);
    return 0;
  }

  int32_t configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t num_inputs,
                          DynamicPluginTensorDesc const*, int32_t) noexcept override {
    if (!check_num_inputs(num_inputs, kNumRequired, kMaxInputs)) return 1;
    Dims dims[kMaxInputs];
    for (int32_t i = 0; i < num_inputs; ++i) dims[i] = inputs[i].desc.dims;
    return check_shapes(dims, num_inputs) && check_kernels(inputs[kX].desc.type) ? 0 : 1;
  }

  size_t getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t,
                          DynamicPluginTensorDesc const*, int32_t) const noexcept override {
    int64_t rows = 0;
    if (!count_rows(inputs[kX].max, rows)) {
      log_error("%s: the profile of x has no largest shape of fewer than 2^31 tokens", layer());
      return 0;
    }
    return size_t(max_workspace_bytes(rows, fields_.out_features, fields_.in_features,
                                      fields_.group_size));
  }

  int32_t onShapeChange(PluginTensorDesc const* inputs, int32_t num_inputs,
                        PluginTensorDesc const*, int32_t) noexcept override {
    is_shaped_ = false;
    if (!check_num_inputs(num_inputs, kNumRequired, kMaxInputs)) return 1;
    Dims dims[kMaxInputs];
    for (int32_t i = 0; i < num_inputs; ++i) dims[i] = inputs[i].dims;
    if (!check_shapes(dims, num_inputs)) return 1;
    optional_ = find_optional(dims, num_inputs);
    is_shaped_ = true;
    return 0;
  }

  int32_t enqueue(PluginTensorDesc const* input_descs, PluginTensorDesc const*,
                  void const* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;

  PluginFieldCollection const* getFieldsToSerialize() noexcept override {
    write_fields(fields_, serialized_);
    collection_ = {int32_t(kNumFields), serialized_};
    return &collection_;
  }

 protected:
  DataType input_type(int32_t position, DynamicPluginTensorDesc const* tensors,
                      int32_t) const noexcept override {
    if (position == kPlanes) return DataType::kINT32;
    if (position == kWeightScale) return DataType::kFLOAT;
    return is_bias(tensors[position].desc.dims) ? DataType::kFLOAT : tensors[kX].desc.type;
  }

 private:
  struct Call;

  static bool is_bias(const Dims& dims) noexcept { return dims.nbDims == 1; }

  static Optional find_optional(const Dims* dims, int32_t num_inputs) noexcept {
    Optional optional;
    for (int32_t i = kNumRequired; i < num_inputs; ++i) {
      (is_bias(dims[i]) ? optional.bias : optional.addend) = i;
    }
    return optional;
  }

  int64_t num_groups() const noexcept {
    return fields_.group_size ? fields_.in_features / fields_.group_size : 1;
  }

  bool check_shapes(const Dims* dims, int32_t num_inputs) const noexcept;
  bool check_kernels(DataType type) const noexcept;
  bool quantize(const Call& call) const noexcept;
  bool multiply(const Call& call) const noexcept;
  bool multiply_in_slices(const Call& call) const noexcept;

  treeq_layer_format fields_;
  Optional optional_;
  bool is_shaped_ = false;  // onShapeChange has said where the optional inputs are
  PluginField serialized_[kNumFields];
  PluginFieldCollection collection_{};
};

/* One enqueue. */
struct QLinear::Call {
  cuda::Device device;
  cuda::Stream* stream;
  int32_t m;
  QuantizeChoice quantize;
  QLinearChoice product;
  void const* const* inputs;
  const void* bias;    // some valid address where there is none
  const void* addend;  // likewise
  void* y;
  char *codes, *scales, *partials;
};

bool QLinear::check_shapes(const Dims* dims, int32_t num_inputs) const noexcept {
  const int64_t n = fields_.out_features, k = fields_.in_features, words = (k + 31) / 32;
  if (dims[kX].nbDims < 2) {
    log_error("%s: x has %d axes, expected at least 2", layer(), dims[kX].nbDims);
    return false;
  }
  Dims x = dims[kX], y = dims[kX];
  x.d[x.nbDims - 1] = k;
  y.d[y.nbDims - 1] = n;
  bool is_right = check_dims("x", dims[kX], x) &&
                  check_dims("planes", dims[kPlanes], make_dims({fields_.weight_bits, n, words})) &&
                  check_dims("weight_scale", dims[kWeightScale], make_dims({n, num_groups()}));
  for (int32_t i = kNumRequired; is_right && i < num_inputs; ++i) {
    is_right = is_bias(dims[i]) ? check_dims("bias", dims[i], make_dims({n}))
                                : check_dims("addend", dims[i], y);
  }
  if (is_right && num_inputs == kMaxInputs && is_bias(dims[3]) == is_bias(dims[4])) {
    log_error("%s: inputs 3 and 4 have %d and %d axes, expected a bias of 1 and an addend of %d",
              layer(), dims[3].nbDims, dims[4].nbDims, y.nbDims);
    return false;
  }
  return is_right;
}

/* Whether every kernel that some number of tokens may need was embedded, for any architecture. */
bool QLinear::check_kernels(DataType type) const noexcept {
  const char* dtype = type_name(type);
  if (!dtype) {
    log_error("%s: x has TensorRT's data type %d, expected half, bfloat16 or float", layer(),
              int(type));
    return false;
  }
  const int64_t n = fields_.out_features, k = fields_.in_features;
  const QuantizeChoice quantize =
      choose_quantize(1, k, fields_.act_scale, fields_.rotation_group, kMaxSms, dtype);
  bool is_there = check_embedded(layer(), quantize.launch.name);
  // Few and many multiprocessors, few and many tokens: all shape classes, whole and in slices.
  for (const int32_t num_sms : {1, kMaxSms}) {
    for (const int64_t m : {int64_t(1), int64_t(17), int64_t(1) << 20}) {
      const QLinearChoice choice = choose_qlinear(m, n, k, fields_.weight_bits, fields_.group_size,
                                                  num_sms, dtype);
      is_there = is_there && check_embedded(layer(), choice.product.name) &&
                 (choice.split_k == 1 || check_embedded(layer(), choice.finish.name));
    }
  }
  return is_there;
}

int32_t QLinear::enqueue(PluginTensorDesc const* input_descs, PluginTensorDesc const*,
                         void const* const* inputs, void* const* outputs, void* workspace,
                         cudaStream_t stream) noexcept {
  Call call{};
  int64_t rows = 0;
  const PluginTensorDesc& x = input_descs[kX];
  const char* dtype = type_name(x.type);
  if (!is_shaped_ || !dtype || !count_rows(x.dims, rows)) {
    log_error("%s: enqueue came before onShapeChange with complete shapes", layer());
    return 1;
  }
  if (rows == 0) return 0;
  const bool has_bias = optional_.bias >= 0, has_addend = optional_.addend >= 0;
  call.inputs = inputs;
  call.bias = inputs[has_bias ? optional_.bias : int32_t(kWeightScale)];
  call.addend = inputs[has_addend ? optional_.addend : int32_t(kX)];
  call.y = outputs[0];
  void const* const pointers[] = {inputs[kX], inputs[kPlanes], inputs[kWeightScale],
                                  call.bias,  call.addend,     call.y,
                                  workspace};
  if (!check_aligned(pointers, int32_t(std::size(pointers)))) return 1;
  if (!cuda::find_device(layer(), call.device)) return 1;
  call.stream = reinterpret_cast<cuda::Stream*>(stream);
  call.m = int32_t(rows);
  const int32_t num_sms = std::min(call.device.num_sms, kMaxSms);
  call.quantize = choose_quantize(rows, fields_.in_features, fields_.act_scale,
                                  fields_.rotation_group, num_sms, dtype);
  call.product = choose_qlinear(rows, fields_.out_features, fields_.in_features,
                                fields_.weight_bits, fields_.group_size, num_sms, dtype);
  const Workspace places = place_workspace(rows, fields_.out_features, fields_.in_features,
                                           call.product.split_k);
  call.codes = static_cast<char*>(workspace);
  call.scales = call.codes + places.scale_offset;
  call.partials = call.codes + places.partials_offset;
  const bool is_done = quantize(call) && (call.product.split_k == 1 ? multiply(call)
                                                                    : multiply_in_slices(call));
  return is_done ? 0 : 1;
}

bool QLinear::quantize(const Call& call) const noexcept {
  const int32_t k = fields_.in_features, half = 1 << (fields_.act_bits - 1);
  const Arguments arguments("x,codes,scale,M,K,KP,qmin,qmax,step,columns_per_program,",
                            call.inputs[kX], call.codes, call.scales, call.m, k,
                            int32_t(padded(k)), -half, half - 1, fields_.act_step,
                            call.quantize.columns_per_program);
  return arguments.launch(layer(), call.device, call.quantize.launch, call.stream);
}

bool QLinear::multiply(const Call& call) const noexcept {
  const int32_t k = fields_.in_features;
  const Arguments arguments(
      "codes,planes,act_scale,weight_scale,bias,addend,y,M,N,KP,KW,num_groups,has_bias,has_addend,",
      call.codes, call.inputs[kPlanes], call.scales, call.inputs[kWeightScale], call.bias,
      call.addend, call.y, call.m, fields_.out_features, int32_t(padded(k)), (k + 31) / 32,
      int32_t(num_groups()), int32_t(optional_.bias >= 0), int32_t(optional_.addend >= 0));
  return arguments.launch(layer(), call.device, call.product.product, call.stream);
}

bool QLinear::multiply_in_slices(const Call& call) const noexcept {
  const int32_t k = fields_.in_features;
  const Arguments product("codes,planes,partials,M,N,KP,KW,k_per_split,", call.codes,
                          call.inputs[kPlanes], call.partials, call.m, fields_.out_features,
                          int32_t(padded(k)), (k + 31) / 32, call.product.k_per_split);
  const Arguments finish(
      "partials,act_scale,weight_scale,bias,addend,y,M,N,num_splits,has_bias,has_addend,",
      call.partials, call.scales, call.inputs[kWeightScale], call.bias, call.addend, call.y, call.m,
      fields_.out_features, call.product.split_k, int32_t(optional_.bias >= 0),
      int32_t(optional_.addend >= 0));
  return product.launch(layer(), call.device, call.product.product, call.stream) &&
         finish.launch(layer(), call.device, call.product.finish, call.stream);
}

}  // namespace

IPluginV3* make_qlinear(const char* layer, const PluginFieldCollection& fields) noexcept {
  const LayerName name(layer);
  treeq_layer_format read{};
  if (!read_fields(name.text, fields, read)) return nullptr;
  auto* plugin = new (std::nothrow) QLinear(name, read);
  if (!plugin) log_error("%s: out of host memory", name.text);
  return plugin;
}

}  // namespace treeq::trt
