/* The ops of treeq/op.h as custom ops of ONNX Runtime:
 *
 *   session_options.register_custom_ops_library("libtreeq_ort.so")
 *
 *   QLinear       x, planes, weight_scale, bias?, addend? -> y
 *   FusedQLinear  x, planes, weight_scale, bias?, branch_R?, branch_L?, norm_scale?, norm_shift?,
 *                 gate?, residual? -> y, y2?, y3?      what qlinear.h calls a fusion
 *   Monarch       x, R, L -> y
 *
 * Planes, scales, bias and factors are initializers: they are repacked when the session is made, and
 * the pages of the planes are given back to the system.
 */
#include <sys/mman.h>
#include <unistd.h>

#include <new>

#include "node.h"

namespace treeq::ort {
namespace {

struct Layer {
  std::string name;
  treeq_qlinear* handle = nullptr;
  int64_t in_features, out_features;
  treeq_fusion fusion = {nullptr, nullptr, 0.0f, TREEQ_ACTIVATION_NONE, nullptr, nullptr, 1, 1, nullptr};
  ~Layer() { treeq_qlinear_destroy(handle); }
};

struct Branch {
  std::string name;
  treeq_monarch* handle = nullptr;
  int64_t in_features, out_features;
  ~Branch() { treeq_monarch_destroy(handle); }
};

/* The planes are not read again. Where they are a mapped file, their pages leave our memory; where
 * they are not, nothing changes. */
void give_back(const Tensor& tensor, size_t element_bytes) {
#ifdef MADV_PAGEOUT
  size_t bytes = element_bytes;
  for (int64_t d : tensor.shape) bytes *= size_t(d);
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_PAGEOUT);
#else
  (void)tensor, (void)element_bytes;
#endif
}

/* The number of an attribute's text among names; `expected` lists them in words. */
template <size_t kCount>
Status* read_choice(const Node& node, const char* what, const char* const (&names)[kCount],
                    const char* expected, int32_t& out) {
  std::string text;
  if (Status* status = node.read(what, text)) return status;
  for (out = 0; out < int32_t(kCount); ++out)
    if (text == names[out]) return nullptr;
  return node.error(std::string("attribute ") + what + " is \"" + text + "\", expected " + expected);
}

Status* read_integer(const Node& node, const char* what, int32_t& out) {
  int64_t value;
  if (Status* status = node.read(what, value)) return status;
  out = value < 0 || value > INT32_MAX ? -1 : int32_t(value);
  return nullptr;
}

Status* read_format(const Node& node, treeq_layer_format& f) {
  static const char* const kNames[] = TREEQ_SCALE_NAMES;
  constexpr const char* kExpected = "token_rms, token_absmax, tensor_static or none";
#define TREEQ_INT(name) \
  if (Status* status = read_integer(node, #name, f.name)) return status;
#define TREEQ_REAL(name) \
  if (Status* status = node.read(#name, f.name)) return status;
#define TREEQ_SCALE(name) \
  if (Status* status = read_choice(node, #name, kNames, kExpected, f.name)) return status;
  TREEQ_LAYER_FIELDS(TREEQ_INT, TREEQ_REAL, TREEQ_SCALE)
  return nullptr;
}

struct Arrays {
  Tensor planes, scale, bias, r, l;
};

/* The linear's inputs are in the same places of both ops; the branch is FusedQLinear's. */
Status* read_arrays(const Node& node, bool is_fused, Arrays& a) {
  if (Status* status = node.read(TREEQ_QLINEAR_PLANES, "planes", 3, true, a.planes)) return status;
  if (Status* status = node.read(TREEQ_QLINEAR_WEIGHT_SCALE, "weight_scale", 2, true, a.scale))
    return status;
  if (Status* status = node.read(TREEQ_QLINEAR_BIAS, "bias", 1, false, a.bias)) return status;
  if (!is_fused) return nullptr;
  if (Status* status = node.read(TREEQ_FUSED_BRANCH_R, "branch_R", 3, false, a.r)) return status;
  return node.read(TREEQ_FUSED_BRANCH_L, "branch_L", 3, a.r.data != nullptr, a.l);
}

Status* expect(const Node& node, const char* what, const std::vector<int64_t>& shape,
               const std::vector<int64_t>& expected) {
  if (shape == expected) return nullptr;
  return node.error(std::string("input ") + what + " has shape " + shape_text(shape) +
                    ", expected " + shape_text(expected));
}

/* The shapes of the branch's factors; fills in its grid. */
Status* check_branch(const Node& node, const char* const names[2], int64_t in_features,
                     int64_t out_features, const Tensor& r, const Tensor& l, int64_t& b_in,
                     int64_t& b_out, int64_t& rank) {
  b_in = r.dimension(0);
  b_out = l.dimension(0);
  if (b_in < 1 || b_out < 1 || r.dimension(2) % b_out || in_features % b_in || out_features % b_out)
    return node.error("branch of shapes " + shape_text(r.shape) + ", " + shape_text(l.shape) +
                      " does not fit " + std::to_string(in_features) + " x " +
                      std::to_string(out_features));
  rank = r.dimension(2) / b_out;
  if (Status* status = expect(node, names[0], r.shape, {b_in, in_features / b_in, b_out * rank}))
    return status;
  return expect(node, names[1], l.shape, {b_out, b_in * rank, out_features / b_out});
}

Status* check_shapes(const Node& node, treeq_qlinear_config& config, const Arrays& a,
                     int64_t words) {
  const treeq_layer_format& c = config.layer;
  const int64_t k = c.in_features;
  if (words != (k + 31) / 32)
    return node.error("planes hold " + std::to_string(words) + " words a row, expected " +
                      std::to_string((k + 31) / 32) + " for in_features " + std::to_string(k));
  if (Status* status =
          expect(node, "planes", a.planes.shape, {c.weight_bits, c.out_features, words}))
    return status;
  const int64_t groups = c.group_size > 0 ? k / c.group_size : 1;
  if (Status* status = expect(node, "weight_scale", a.scale.shape, {c.out_features, groups}))
    return status;
  if (a.bias.data)
    if (Status* status = expect(node, "bias", a.bias.shape, {c.out_features})) return status;
  if (!a.r.data && a.l.data) return node.error("input branch_R is missing, branch_L is there");
  if (!a.r.data) return nullptr;
  static const char* const kNames[] = {"branch_R", "branch_L"};
  return check_branch(node, kNames, k, c.out_features, a.r, a.l, config.branch_in,
                      config.branch_out, config.branch_rank);
}

template <bool kIsFused>
Status* make_layer(const Node& node, Layer& layer) {
  treeq_qlinear_config c = {};
  c.abi_version = TREEQ_ABI_VERSION;
  Arrays a;
  if (Status* status = read_format(node, c.layer)) return status;
  if (Status* status = read_arrays(node, kIsFused, a)) return status;
  if (Status* status = check_shapes(node, c, a, a.planes.dimension(2))) return status;
  const auto floats = [](const Tensor& t) { return static_cast<const float*>(t.data); };
  const treeq_status made = treeq_qlinear_create(&c, static_cast<const int32_t*>(a.planes.data),
                                                 floats(a.scale), floats(a.bias), floats(a.r),
                                                 floats(a.l), &layer.handle);
  give_back(a.planes, sizeof(int32_t));
  layer.name = node.name();
  layer.in_features = c.layer.in_features;
  layer.out_features = c.layer.out_features;
  return status_of(made, node.name());
}

Status* make_branch(const Node& node, Branch& branch) {
  Tensor r, l;
  if (Status* status = node.read(TREEQ_MONARCH_R, "R", 3, true, r)) return status;
  if (Status* status = node.read(TREEQ_MONARCH_L, "L", 3, true, l)) return status;
  static const char* const kNames[] = {"R", "L"};
  int64_t b_in, b_out, rank;
  branch.in_features = r.dimension(0) * r.dimension(1);
  branch.out_features = l.dimension(0) * l.dimension(2);
  if (Status* status =
          check_branch(node, kNames, branch.in_features, branch.out_features, r, l, b_in, b_out, rank))
    return status;
  branch.name = node.name();
  return status_of(
      treeq_monarch_create(branch.in_features, branch.out_features, b_in, b_out, rank,
                           static_cast<const float*>(r.data), static_cast<const float*>(l.data),
                           &branch.handle),
      node.name());
}

template <typename Kernel, Status* (*make)(const Node&, Kernel&)>
Status* create_kernel(const CustomOp*, ApiTable, const KernelInfo* info, void** kernel) {
  *kernel = nullptr;
  Kernel* made = new (std::nothrow) Kernel;
  if (!made) return fail("treeq: out of memory");
  if (Status* status = make(Node(info), *made)) {
    delete made;
    return status;
  }
  *kernel = made;
  return nullptr;
}

Status* make_fused(const Node& node, Layer& layer) {
  static const char* const kNames[] = TREEQ_ACTIVATION_NAMES;
  int32_t& activation = layer.fusion.activation;
  if (Status* status = read_choice(node, "activation", kNames, "gelu_tanh or none", activation))
    return status;
  if (Status* status = node.read("norm_epsilon", layer.fusion.norm_epsilon)) return status;
  return make_layer<true>(node, layer);
}

template <bool kIsFused>
Status* read_fusion(const Layer& k, const Call& c, treeq_fusion& f) {
  f = k.fusion;
  size_t count = 1;
  if (Status* status = c.count_outputs(&count)) return status;
  f.num_outputs = int32_t(count);
  f.tokens = c.images() > 0 && c.m() > 0 ? c.m() / c.images() : 1;
  std::vector<int64_t> full = c.shape();
  full.back() = k.out_features;
  if (!kIsFused) return c.input(TREEQ_QLINEAR_ADDEND, "addend", full, &f.addend);
  const std::vector<int64_t> norm = {c.images(), k.in_features}, gate = {c.images(), k.out_features};
  if (Status* status = c.input(TREEQ_FUSED_NORM_SCALE, "norm_scale", norm, &f.norm_scale))
    return status;
  if (Status* status = c.input(TREEQ_FUSED_NORM_SHIFT, "norm_shift", norm, &f.norm_shift))
    return status;
  if (Status* status = c.input(TREEQ_FUSED_GATE, "gate", gate, &f.gate)) return status;
  return c.input(TREEQ_FUSED_RESIDUAL, "residual", full, &f.residual);
}

template <bool kIsFused>
Status* compute_layer(void* kernel, KernelContext* context) {
  const Layer& k = *static_cast<const Layer*>(kernel);
  Call c(context, k.name);
  if (Status* status = c.open(k.in_features)) return status;
  treeq_fusion fusion;
  if (Status* status = read_fusion<kIsFused>(k, c, fusion)) return status;
  float* y[TREEQ_MAX_OUTPUTS] = {};
  for (int32_t i = 0; i < fusion.num_outputs; ++i)
    if (Status* status = c.output(size_t(i), k.out_features / fusion.num_outputs, &y[i]))
      return status;
  const treeq_parallel parallel = parallel_of(context);
  return status_of(treeq_qlinear_run_fused(k.handle, c.x(), c.m(), y, &fusion, &parallel), k.name);
}

Status* compute_branch(void* kernel, KernelContext* context) {
  const Branch& k = *static_cast<const Branch*>(kernel);
  Call c(context, k.name);
  if (Status* status = c.open(k.in_features)) return status;
  float* y = nullptr;
  if (Status* status = c.output(0, k.out_features, &y)) return status;
  const treeq_parallel parallel = parallel_of(context);
  return status_of(treeq_monarch_run(k.handle, c.x(), c.m(), y, &parallel), k.name);
}

template <typename Kernel>
void destroy_kernel(void* kernel) {
  delete static_cast<Kernel*>(kernel);
}

/* What all ops answer alike. */
CustomOp common_op() {
  CustomOp op = {};
  op.version = kApiVersion;
  op.get_provider = [](const CustomOp*) { return "CPUExecutionProvider"; };
  op.get_output_type = [](const CustomOp*, size_t) { return kFloat; };
  op.get_output_count = [](const CustomOp*) { return size_t(1); };
  op.get_output_characteristic = [](const CustomOp*, size_t) { return kRequired; };
  op.get_input_memory = [](const CustomOp*, size_t) { return kDefaultMemory; };
  op.get_variadic_input_min = [](const CustomOp*) { return 1; };
  op.get_variadic_input_homogeneity = [](const CustomOp*) { return 0; };
  op.get_variadic_output_min = [](const CustomOp*) { return 1; };
  op.get_variadic_output_homogeneity = [](const CustomOp*) { return 0; };
  op.get_start_version = [](const CustomOp*) { return 1; };
  op.get_end_version = [](const CustomOp*) { return 0x7fffffff; };
  return op;
}

CustomOp qlinear_op() {
  CustomOp op = common_op();
  op.get_name = [](const CustomOp*) { return TREEQ_QLINEAR; };
  op.get_input_count = [](const CustomOp*) { return size_t(TREEQ_QLINEAR_INPUTS); };
  op.get_input_type = [](const CustomOp*, size_t i) {
    return i == TREEQ_QLINEAR_PLANES ? kInt32 : kFloat;
  };
  op.get_input_characteristic = [](const CustomOp*, size_t i) {
    return i < TREEQ_QLINEAR_REQUIRED ? kRequired : kOptional;
  };
  op.create_kernel_v2 = create_kernel<Layer, make_layer<false>>;
  op.compute_v2 = compute_layer<false>;
  op.destroy = destroy_kernel<Layer>;
  return op;
}

CustomOp fused_op() {
  CustomOp op = qlinear_op();
  op.get_name = [](const CustomOp*) { return TREEQ_FUSED; };
  op.get_input_count = [](const CustomOp*) { return size_t(TREEQ_FUSED_INPUTS); };
  op.get_output_count = [](const CustomOp*) { return size_t(TREEQ_MAX_OUTPUTS); };
  op.get_output_characteristic = [](const CustomOp*, size_t i) {
    return i < 1 ? kRequired : kOptional;
  };
  op.create_kernel_v2 = create_kernel<Layer, make_fused>;
  op.compute_v2 = compute_layer<true>;
  return op;
}

CustomOp monarch_op() {
  CustomOp op = common_op();
  op.get_name = [](const CustomOp*) { return TREEQ_MONARCH; };
  op.get_input_count = [](const CustomOp*) { return size_t(TREEQ_MONARCH_INPUTS); };
  op.get_input_type = [](const CustomOp*, size_t) { return kFloat; };
  op.get_input_characteristic = [](const CustomOp*, size_t) { return kRequired; };
  op.create_kernel_v2 = create_kernel<Branch, make_branch>;
  op.compute_v2 = compute_branch;
  op.destroy = destroy_kernel<Branch>;
  return op;
}

}  // namespace
}  // namespace treeq::ort

/* What ONNX Runtime calls after it has loaded the library. */
extern "C" TREEQ_API treeq::ort::Status* RegisterCustomOps(treeq::ort::SessionOptions* options,
                                                           const treeq::ort::ApiBase* base) {
  using namespace treeq::ort;
  g_api = base->get_api(kApiVersion);
  if (!g_api) {
    g_api = base->get_api(1);  // old, but CreateStatus is there
    return fail(std::string("libtreeq_ort.so needs ONNX Runtime 1.18 or newer, this is ") +
                base->get_version());
  }
  static const CustomOp qlinear = qlinear_op(), fused = fused_op(), monarch = monarch_op();
  Domain* domain = nullptr;
  if (Status* status = call<Status*>(g_api, kCreateCustomOpDomain, TREEQ_DOMAIN, &domain))
    return status;
  for (const CustomOp* op : {&qlinear, &fused, &monarch})
    if (Status* status = call<Status*>(g_api, kCustomOpDomainAdd, domain, op)) return status;
  return call<Status*>(g_api, kAddCustomOpDomain, options, domain);
}
