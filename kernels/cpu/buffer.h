/* Aligned memory: owned by a layer, or lent to a run and kept for the next one. */
#ifndef TREEQ_BUFFER_H
#define TREEQ_BUFFER_H

#include <cstddef>
#include <cstdint>
#include <memory>

namespace treeq {

struct Free {
  void operator()(void* p) const;
};
using Buffer = std::unique_ptr<uint8_t[], Free>;

/* 64-byte aligned, zeroed. Throws std::bad_alloc. */
Buffer allocate(size_t bytes);

/* A buffer of at least `bytes` that goes back when this object ends; layers share the buffers, so
 * there are as many as are in use at the same time. Contents are undefined. */
class Lease {
 public:
  explicit Lease(size_t bytes);
  ~Lease();
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  uint8_t* get() const { return buffer_.get(); }

 private:
  Buffer buffer_;
  size_t bytes_;
};

void release_leases();

}  // namespace treeq
#endif
