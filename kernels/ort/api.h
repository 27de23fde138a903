/* The part of ONNX Runtime's C API that the custom ops use, so that no header of it is needed.
 *
 * OrtApi is a table of function pointers that is only ever appended to: an entry keeps its place in
 * every later release. OrtCustomOp is a struct that begins with the version it was filled for.
 * tests/kernels/test_ort_api.py compares both with the real header where there is one.
 */
#ifndef TREEQ_ORT_API_H
#define TREEQ_ORT_API_H

#include <cstddef>
#include <cstdint>

namespace treeq::ort {

constexpr uint32_t kApiVersion = 18;  // ONNX Runtime 1.18: the first with all of the entries below

/* Opaque types of the API. */
struct Status;
struct Value;
struct TensorInfo;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct Domain;
struct CustomOp;

using ApiTable = const void* const*;

struct ApiBase {
  ApiTable (*get_api)(uint32_t version);
  const char* (*get_version)();
};

/* Places in the table. */
enum Entry : size_t {
  kCreateStatus = 0,
  kGetErrorMessage = 2,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetTensorElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kKernelInfoGetAttributeFloat = 85,
  kKernelInfoGetAttributeInt64 = 86,
  kKernelInfoGetAttributeString = 87,
  kKernelContextGetInputCount = 88,
  kKernelContextGetOutputCount = 89,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseStatus = 93,
  kReleaseTensorTypeAndShapeInfo = 99,
  kKernelInfoGetInputCount = 230,
  kKernelInfoGetInputName = 232,
  kKernelInfoGetNodeName = 244,
  kKernelInfoGetConstantInputTensor = 249,
  kKernelContextParallelFor = 274,
};

constexpr int kInvalidArgument = 2;  // OrtErrorCode
constexpr int kFloat = 1;            // ONNXTensorElementDataType
constexpr int kInt32 = 6;
constexpr int kRequired = 0;         // OrtCustomOpInputOutputCharacteristic
constexpr int kOptional = 1;
constexpr int kDefaultMemory = 0;    // OrtMemType

struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, ApiTable, const KernelInfo*);
  const char* (*get_name)(const CustomOp*);
  const char* (*get_provider)(const CustomOp*);
  int (*get_input_type)(const CustomOp*, size_t);
  size_t (*get_input_count)(const CustomOp*);
  int (*get_output_type)(const CustomOp*, size_t);
  size_t (*get_output_count)(const CustomOp*);
  void (*compute)(void*, KernelContext*);
  void (*destroy)(void*);
  int (*get_input_characteristic)(const CustomOp*, size_t);
  int (*get_output_characteristic)(const CustomOp*, size_t);
  int (*get_input_memory)(const CustomOp*, size_t);
  int (*get_variadic_input_min)(const CustomOp*);
  int (*get_variadic_input_homogeneity)(const CustomOp*);
  int (*get_variadic_output_min)(const CustomOp*);
  int (*get_variadic_output_homogeneity)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, ApiTable, const KernelInfo*, void**);
  Status* (*compute_v2)(void*, KernelContext*);
  Status* (*infer_shape)(const CustomOp*, void*);
  int (*get_start_version)(const CustomOp*);
  int (*get_end_version)(const CustomOp*);
  size_t (*get_may_inplace)(int**, int**);
  void (*release_may_inplace)(int*, int*);
  size_t (*get_alias_map)(int**, int**);
  void (*release_alias_map)(int*, int*);
};
static_assert(offsetof(CustomOp, create_kernel_v2) == 136, "as in version 18");
static_assert(offsetof(CustomOp, get_start_version) == 160, "as in version 18");
static_assert(sizeof(CustomOp) == 208, "as in version 18");

/* Calls an entry of the table. */
template <typename Result, typename... Arguments>
Result call(ApiTable api, Entry entry, Arguments... arguments) {
  using Function = Result (*)(Arguments...);
  return reinterpret_cast<Function>(const_cast<void*>(api[entry]))(arguments...);
}

}  // namespace treeq::ort
#endif
