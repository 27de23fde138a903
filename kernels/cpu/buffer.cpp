#include "buffer.h"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "treeq/packing.h"

namespace treeq {
namespace {

struct Idle {
  size_t bytes;
  Buffer buffer;
};

std::mutex& idle_mutex() {
  static std::mutex mutex;
  return mutex;
}

std::vector<Idle>& idle_buffers() {
  static std::vector<Idle> buffers;
  return buffers;
}

Buffer allocate_raw(size_t bytes) {
  const size_t rounded = (bytes + kVector - 1) / kVector * kVector + kVector;
  void* p = rounded < bytes ? nullptr : std::aligned_alloc(kVector, rounded);
  if (!p) throw std::bad_alloc();
  return Buffer(static_cast<uint8_t*>(p));
}

}  // namespace

void Free::operator()(void* p) const { std::free(p); }

Buffer allocate(size_t bytes) {
  Buffer buffer = allocate_raw(bytes);
  std::memset(buffer.get(), 0, bytes);
  return buffer;
}

Lease::Lease(size_t bytes) : bytes_(bytes) {
  {
    const std::lock_guard<std::mutex> lock(idle_mutex());
    std::vector<Idle>& idle = idle_buffers();
    size_t best = idle.size();
    for (size_t i = 0; i < idle.size(); ++i)
      if (idle[i].bytes >= bytes && (best == idle.size() || idle[i].bytes < idle[best].bytes))
        best = i;
    if (best < idle.size()) {
      buffer_ = std::move(idle[best].buffer);
      bytes_ = idle[best].bytes;
      idle.erase(idle.begin() + std::ptrdiff_t(best));
      return;
    }
    /* None is large enough: grow the largest instead of keeping one of every size. */
    for (size_t i = 0; i < idle.size(); ++i)
      if (best == idle.size() || idle[i].bytes > idle[best].bytes) best = i;
    if (best < idle.size() && idle[best].bytes * 4 > bytes)
      idle.erase(idle.begin() + std::ptrdiff_t(best));
  }
  buffer_ = allocate_raw(bytes);
}

Lease::~Lease() {
  const std::lock_guard<std::mutex> lock(idle_mutex());
  try {
    idle_buffers().push_back({bytes_, std::move(buffer_)});
  } catch (const std::bad_alloc&) {
    buffer_.reset();
  }
}

void release_leases() {
  const std::lock_guard<std::mutex> lock(idle_mutex());
  idle_buffers().clear();
}

}  // namespace treeq
