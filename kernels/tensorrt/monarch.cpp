/* Monarch: the branch's two products; the transpose between them is in an address. */
#include <initializer_list>
#include <new>

#include "arguments.h"
#include "choose.h"
#include "log.h"
#include "ops.h"

namespace treeq::trt {
namespace {

using namespace nvinfer1;

/* x (..., K), R (b_in, K / b_in, b_out * rank), L (b_out, b_in * rank, N / b_out). */
enum Input : int32_t {
  kX = TREEQ_MONARCH_X,
  kR = TREEQ_MONARCH_R,
  kL = TREEQ_MONARCH_L,
  kNumInputs = TREEQ_MONARCH_INPUTS,
};

/* The sizes of a branch. */
struct Sizes {
  int32_t b_in, block_in, b_out, rank, block_out;
};

class Monarch final : public Plugin {
 public:
  explicit Monarch(const LayerName& layer) noexcept : Plugin(TREEQ_MONARCH, layer) {}

  IPluginV3* clone() noexcept override {
    auto* copy = new (std::nothrow) Monarch(layer_name());
    if (!copy) log_error("%s: out of host memory", layer());
    return copy;
  }

  int32_t getOutputShapes(DimsExprs const* inputs, int32_t num_inputs, DimsExprs const*, int32_t,
                          DimsExprs* outputs, int32_t num_outputs,
                          IExprBuilder& builder) noexcept override {
    if (!check_num_inputs(num_inputs, kNumInputs, kNumInputs) || num_outputs != 1) return 1;
    if (inputs[kL].nbDims != 3) {
      log_error("%s: L has %d axes, expected 3", layer(), inputs[kL].nbDims);
      return 1;
    }
    outputs[0] = inputs[kX];
    outputs[0].d[inputs[kX].nbDims - 1] =
        builder.operation(DimensionOperation::kPROD, *inputs[kL].d[0], *inputs[kL].d[2]);
    return outputs[0].d[inputs[kX].nbDims - 1] ? 0 : 1;
  }

  int32_t configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t num_inputs,
                          DynamicPluginTensorDesc const*, int32_t) noexcept override {
    Sizes sizes;
    if (!check_num_inputs(num_inputs, kNumInputs, kNumInputs)) return 1;
    if (!read_sizes(inputs[kX].desc.dims, inputs[kR].desc.dims, inputs[kL].desc.dims, sizes)) {
      return 1;
    }
    return check_kernels(inputs[kX].desc.type) ? 0 : 1;
  }

  size_t getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t,
                          DynamicPluginTensorDesc const*, int32_t) const noexcept override {
    int64_t rows = 0;
    if (!count_rows(inputs[kX].max, rows)) {
      log_error("%s: the profile of x has no largest shape of fewer than 2^31 tokens", layer());
      return 0;
    }
    // z, (M, b_out, b_in * rank)
    const Dims& l = inputs[kL].desc.dims;
    return size_t(rows * l.d[0] * l.d[1] * type_bytes(inputs[kX].desc.type));
  }

  int32_t onShapeChange(PluginTensorDesc const* inputs, int32_t num_inputs,
                        PluginTensorDesc const*, int32_t) noexcept override {
    Sizes sizes;
    if (!check_num_inputs(num_inputs, kNumInputs, kNumInputs)) return 1;
    return read_sizes(inputs[kX].dims, inputs[kR].dims, inputs[kL].dims, sizes) ? 0 : 1;
  }

  int32_t enqueue(PluginTensorDesc const* descs, PluginTensorDesc const*,
                  void const* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;

  PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &no_fields_; }

 protected:
  DataType input_type(int32_t, DynamicPluginTensorDesc const* tensors,
                      int32_t) const noexcept override {
    return tensors[kX].desc.type;
  }

 private:
  bool read_sizes(const Dims& x, const Dims& r, const Dims& l, Sizes& out) const noexcept;
  bool check_kernels(DataType type) const noexcept;

  PluginFieldCollection no_fields_{};
};

bool Monarch::read_sizes(const Dims& x, const Dims& r, const Dims& l, Sizes& out) const noexcept {
  if (x.nbDims < 2 || r.nbDims != 3 || l.nbDims != 3) {
    log_error("%s: x, R and L have %d, %d and %d axes, expected at least 2, 3 and 3", layer(),
              x.nbDims, r.nbDims, l.nbDims);
    return false;
  }
  for (int32_t i = 0; i < 3; ++i) {
    if (r.d[i] > 0 && l.d[i] > 0) continue;
    log_error("%s: axis %d of R and L is %lld and %lld, expected weights of a fixed shape", layer(),
              i, static_cast<long long>(r.d[i]), static_cast<long long>(l.d[i]));
    return false;
  }
  const int64_t rank = l.d[1] / r.d[0];
  Dims in = x, fitting = l;
  in.d[x.nbDims - 1] = r.d[0] * r.d[1];
  fitting.d[0] = rank ? r.d[2] / rank : 0;
  fitting.d[1] = r.d[0] * rank;
  out = {int32_t(r.d[0]), int32_t(r.d[1]), int32_t(l.d[0]), int32_t(rank), int32_t(l.d[2])};
  Dims right = r;
  right.d[2] = l.d[0] * rank;
  return check_dims("x", x, in) && check_dims("L", l, fitting) && check_dims("R", r, right);
}

bool Monarch::check_kernels(DataType type) const noexcept {
  const char* dtype = type_name(type);
  if (!dtype) {
    log_error("%s: x has TensorRT's data type %d, expected half, bfloat16 or float", layer(),
              int(type));
    return false;
  }
  for (const int64_t m : {int64_t(1), int64_t(1) << 20}) {
    const MonarchChoice choice = choose_monarch(m, 1, 1, 1, 1, dtype);
    if (!check_embedded(layer(), choice.in.name)) return false;
    if (!check_embedded(layer(), choice.out.name)) return false;
  }
  return true;
}

int32_t Monarch::enqueue(PluginTensorDesc const* descs, PluginTensorDesc const*,
                         void const* const* inputs, void* const* outputs, void* workspace,
                         cudaStream_t stream) noexcept {
  Sizes sizes;
  int64_t rows = 0;
  const char* dtype = type_name(descs[kX].type);
  if (!read_sizes(descs[kX].dims, descs[kR].dims, descs[kL].dims, sizes)) return 1;
  if (!dtype || !count_rows(descs[kX].dims, rows)) {
    log_error("%s: enqueue came with incomplete shapes", layer());
    return 1;
  }
  if (rows == 0) return 0;
  void const* const pointers[] = {inputs[kX], inputs[kR], inputs[kL], outputs[0], workspace};
  if (!check_aligned(pointers, 5)) return 1;
  cuda::Device device;
  if (!cuda::find_device(layer(), device)) return 1;
  const auto m = int32_t(rows);
  auto* on = reinterpret_cast<cuda::Stream*>(stream);
  const MonarchChoice choice =
      choose_monarch(m, sizes.b_in, sizes.b_out, sizes.rank, sizes.block_out, dtype);
  const Arguments in("x,R,z,M,block_in,b_in,b_out,rank,", inputs[kX], inputs[kR], workspace, m,
                     sizes.block_in, sizes.b_in, sizes.b_out, sizes.rank);
  const Arguments out("z,L,y,M,inner,block_out,b_out,", workspace, inputs[kL], outputs[0], m,
                      sizes.b_in * sizes.rank, sizes.block_out, sizes.b_out);
  const bool is_done = in.launch(layer(), device, choice.in, on) &&
                       out.launch(layer(), device, choice.out, on);
  return is_done ? 0 : 1;
}

}  // namespace

IPluginV3* make_monarch(const char* layer, const PluginFieldCollection&) noexcept {
  const LayerName name(layer);
  auto* plugin = new (std::nothrow) Monarch(name);
  if (!plugin) log_error("%s: out of host memory", name.text);
  return plugin;
}

}  // namespace treeq::trt
