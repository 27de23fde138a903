#include "node.h"

namespace treeq::ort {

ApiTable g_api = nullptr;

namespace {

/* Takes the place of ONNX Runtime's message, which does not name the node. */
Status* replace(Status* status, const std::string& message) {
  if (!status) return nullptr;
  const char* reason = call<const char*>(g_api, kGetErrorMessage, static_cast<const Status*>(status));
  const std::string text = message + " (" + (reason ? reason : "") + ")";
  call<void>(g_api, kReleaseStatus, status);
  return fail(text);
}

std::string read_name(const KernelInfo* info) {
  size_t size = 0;
  Status* status =
      call<Status*>(g_api, kKernelInfoGetNodeName, info, static_cast<char*>(nullptr), &size);
  if (status) call<void>(g_api, kReleaseStatus, status);
  std::string name(size, '\0');
  if (!size) return TREEQ_DOMAIN;
  status = call<Status*>(g_api, kKernelInfoGetNodeName, info, name.data(), &size);
  if (status) {
    call<void>(g_api, kReleaseStatus, status);
    return TREEQ_DOMAIN;
  }
  name.resize(size - 1);
  return name;
}

}  // namespace

Status* fail(const std::string& message) {
  return call<Status*>(g_api, kCreateStatus, kInvalidArgument, message.c_str());
}

Node::Node(const KernelInfo* info) : info_(info), name_(read_name(info)) {
  Status* status = call<Status*>(g_api, kKernelInfoGetInputCount, info, &num_inputs_);
  if (status) call<void>(g_api, kReleaseStatus, status);
}

Status* Node::read(const char* attribute, int64_t& out) const {
  return replace(call<Status*>(g_api, kKernelInfoGetAttributeInt64, info_, attribute, &out),
                 name_ + ": attribute " + attribute + " is missing, expected an integer");
}

Status* Node::read(const char* attribute, float& out) const {
  return replace(call<Status*>(g_api, kKernelInfoGetAttributeFloat, info_, attribute, &out),
                 name_ + ": attribute " + attribute + " is missing, expected a float");
}

Status* Node::read(const char* attribute, std::string& out) const {
  const std::string message = name_ + ": attribute " + attribute + " is missing, expected a string";
  size_t size = 0;
  Status* status = call<Status*>(g_api, kKernelInfoGetAttributeString, info_, attribute,
                                 static_cast<char*>(nullptr), &size);
  if (status) return replace(status, message);
  out.assign(size, '\0');
  status = call<Status*>(g_api, kKernelInfoGetAttributeString, info_, attribute, out.data(), &size);
  if (status) return replace(status, message);
  out.resize(size ? size - 1 : 0);
  return nullptr;
}

bool Node::has_input(size_t index) const {
  if (index >= num_inputs_) return false;
  size_t size = 0;
  Status* status =
      call<Status*>(g_api, kKernelInfoGetInputName, info_, index, static_cast<char*>(nullptr), &size);
  if (status) call<void>(g_api, kReleaseStatus, status);
  return !status && size > 1;
}

Status* Node::read(size_t index, const char* what, size_t rank, bool is_required,
                   Tensor& out) const {
  if (!has_input(index))
    return is_required ? error(std::string("input ") + what + " is missing") : nullptr;
  int is_constant = 0;
  const Value* value = nullptr;
  Status* status = call<Status*>(g_api, kKernelInfoGetConstantInputTensor, info_, index,
                                 &is_constant, &value);
  const std::string message = name_ + ": input " + what + " has to be an initializer";
  if (status) return replace(status, message);
  if (!is_constant || !value) return fail(message);
  if (Status* failed = read_tensor(value, out)) return failed;
  if (out.shape.size() == rank) return nullptr;
  return error(std::string("input ") + what + " has shape " + shape_text(out.shape) +
               ", expected " + std::to_string(rank) + " axes");
}

Status* read_tensor(const Value* value, Tensor& out) {
  TensorInfo* info = nullptr;
  if (Status* status = call<Status*>(g_api, kGetTensorTypeAndShape, value, &info)) return status;
  size_t rank = 0;
  Status* status =
      call<Status*>(g_api, kGetDimensionsCount, static_cast<const TensorInfo*>(info), &rank);
  out.shape.assign(rank, 0);
  if (!status)
    status = call<Status*>(g_api, kGetDimensions, static_cast<const TensorInfo*>(info),
                           out.shape.data(), rank);
  call<void>(g_api, kReleaseTensorTypeAndShapeInfo, info);
  if (status) return status;
  void* data = nullptr;
  status = call<Status*>(g_api, kGetTensorMutableData, const_cast<Value*>(value), &data);
  out.data = data;
  return status;
}

Status* Call::open(int64_t in_features) {
  const Value* value = nullptr;
  if (Status* status = call<Status*>(g_api, kKernelContextGetInput,
                                     static_cast<const KernelContext*>(context_), size_t(0), &value))
    return status;
  Tensor x;
  if (Status* status = read_tensor(value, x)) return status;
  if (x.shape.empty() || x.shape.back() != in_features)
    return fail(name_ + ": x has shape " + shape_text(x.shape) + ", expected (..., " +
                std::to_string(in_features) + ")");
  x_ = static_cast<const float*>(x.data);
  m_ = 1;
  for (size_t i = 0; i + 1 < x.shape.size(); ++i) m_ *= x.shape[i];
  images_ = x.shape.size() > 1 ? x.shape[0] : 1;
  shape_ = x.shape;
  return nullptr;
}

Status* Call::input(size_t index, const char* what, const std::vector<int64_t>& shape,
                    const float** data) const {
  const auto* context = static_cast<const KernelContext*>(context_);
  *data = nullptr;
  size_t count = 0;
  if (Status* status = call<Status*>(g_api, kKernelContextGetInputCount, context, &count))
    return status;
  if (index >= count) return nullptr;
  const Value* value = nullptr;
  if (Status* status = call<Status*>(g_api, kKernelContextGetInput, context, index, &value))
    return status;
  if (!value) return nullptr;
  Tensor tensor;
  if (Status* status = read_tensor(value, tensor)) return status;
  if (tensor.shape != shape)
    return fail(name_ + ": " + what + " has shape " + shape_text(tensor.shape) + ", expected " +
                shape_text(shape));
  *data = static_cast<const float*>(tensor.data);
  return nullptr;
}

Status* Call::output(size_t index, int64_t columns, float** data) const {
  std::vector<int64_t> shape = shape_;
  shape.back() = columns;
  Value* value = nullptr;
  if (Status* status =
          call<Status*>(g_api, kKernelContextGetOutput, context_, index,
                        static_cast<const int64_t*>(shape.data()), shape.size(), &value))
    return status;
  void* y = nullptr;
  Status* status = call<Status*>(g_api, kGetTensorMutableData, value, &y);
  *data = static_cast<float*>(y);
  return status;
}

Status* Call::count_outputs(size_t* count) const {
  return call<Status*>(g_api, kKernelContextGetOutputCount,
                       static_cast<const KernelContext*>(context_), count);
}

treeq_parallel parallel_of(KernelContext* context) {
  const auto parallel_for = [](void* context, treeq_task task, size_t num_tasks, void* argument) {
    Status* status =
        num_tasks > 1
            ? call<Status*>(g_api, kKernelContextParallelFor,
                            static_cast<const KernelContext*>(static_cast<KernelContext*>(context)),
                            task, num_tasks, size_t(0), argument)
            : nullptr;
    if (num_tasks > 1 && !status) return;
    if (status) call<void>(g_api, kReleaseStatus, status);
    for (size_t i = 0; i < num_tasks; ++i) task(argument, i);  // no pool: this thread does it
  };
  return {parallel_for, context};
}

Status* status_of(treeq_status status, const std::string& name) {
  return status == TREEQ_OK ? nullptr : fail(name + ": " + treeq_status_message(status));
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + ")";
}

}  // namespace treeq::ort
