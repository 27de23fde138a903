/* What the kernels read off a node and off a call. Every failure is a Status with the node's name, what
 * was received and what was expected. */
#ifndef TREEQ_ORT_NODE_H
#define TREEQ_ORT_NODE_H

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "api.h"
#include "treeq/qlinear.h"

namespace treeq::ort {

extern ApiTable g_api;  // set once by RegisterCustomOps

Status* fail(const std::string& message);

/* A tensor that ONNX Runtime owns; data is null where there is none. */
struct Tensor {
  const void* data = nullptr;
  std::vector<int64_t> shape;
  int64_t dimension(size_t axis) const { return shape[axis]; }
};

/* A node while its kernel is made. */
class Node {
 public:
  explicit Node(const KernelInfo* info);
  const std::string& name() const { return name_; }
  size_t num_inputs() const { return num_inputs_; }
  Status* read(const char* attribute, int64_t& out) const;
  Status* read(const char* attribute, float& out) const;
  Status* read(const char* attribute, std::string& out) const;
  /* An input that has to be an initializer of `rank` axes; empty where it is left out and may be. */
  Status* read(size_t index, const char* what, size_t rank, bool is_required, Tensor& out) const;
  Status* error(const std::string& message) const { return fail(name_ + ": " + message); }

 private:
  /* Whether an optional input is there: its name is not empty. */
  bool has_input(size_t index) const;

  const KernelInfo* info_;
  std::string name_;
  size_t num_inputs_ = 0;
};

Status* read_tensor(const Value* value, Tensor& out);

/* A call of a kernel. */
class Call {
 public:
  Call(KernelContext* context, const std::string& name) : context_(context), name_(name) {}
  /* Input 0, x (..., in_features). */
  Status* open(int64_t in_features);
  /* Input `index` with the shape that is expected; data stays null where the input is left out. */
  Status* input(size_t index, const char* what, const std::vector<int64_t>& shape,
                const float** data) const;
  /* y (..., columns). */
  Status* output(size_t index, int64_t columns, float** data) const;
  Status* count_outputs(size_t* count) const;

  const float* x() const { return x_; }
  int64_t m() const { return m_; }            // all rows
  int64_t images() const { return images_; }  // first axis, 1 where x has one axis only
  const std::vector<int64_t>& shape() const { return shape_; }

 private:
  KernelContext* context_;
  const std::string& name_;
  const float* x_ = nullptr;
  int64_t m_ = 0, images_ = 1;
  std::vector<int64_t> shape_;
};

/* ONNX Runtime's own threads. */
treeq_parallel parallel_of(KernelContext* context);

Status* status_of(treeq_status status, const std::string& name);

std::string shape_text(const std::vector<int64_t>& shape);

}  // namespace treeq::ort
#endif
