/* The embedded kernels: embed.py writes the table from the files of `python -m treeq_gpu.ahead`. */
#ifndef TREEQ_TENSORRT_KERNELS_H
#define TREEQ_TENSORRT_KERNELS_H

#include <cstddef>
#include <cstdint>

#include "driver.h"

namespace treeq::trt {

/* One cubin. The layout is that of embed.py: five pointers or sizes, then four int32. */
struct Kernel {
  const char* name;      // instantiation, such as qlinear_w3_wide
  const char* function;  // symbol in the cubin
  const char* params;    // names in order, each with a comma behind it; hidden pointers as "*,"
  const void* cubin;
  uint64_t cubin_bytes;
  int32_t capability;    // 80, 90, ...
  int32_t shared_bytes;  // dynamic
  int32_t num_warps;
  int32_t reserved;
};
static_assert(sizeof(Kernel) == 56, "embed.py writes 56 bytes a kernel");

/* Whether a cubin for `kernel` runs on `device`, both 10 * major + minor. Code for Ampere and Ada
 * (8.x) runs on later minors of its major; code for later chips uses features of one chip only. */
bool runs_on(int32_t kernel, int32_t device) noexcept;

/* The kernel of that name with the highest capability that runs on the device, null without one. */
const Kernel* find_kernel(const char* name, int32_t capability) noexcept;

/* Whether a kernel of that name was embedded, for whatever device; else one logged line. */
bool check_embedded(const char* layer, const char* name) noexcept;

struct Grid {
  uint32_t x = 1, y = 1, z = 1;
};

/* One launch on a stream. Loads the cubin at the first launch on a device.
 *
 * layer:  name of the TensorRT layer, for messages
 * name:   instantiation
 * params: the names that `arguments` stand for, each with a comma behind it; the kernel may have
 *         hidden pointers behind them, which are passed as null
 * Returns false after one logged line. */
bool launch(const char* layer, const cuda::Device& device, const char* name, const Grid& grid,
            const char* params, void* const* arguments, size_t num_arguments,
            cuda::Stream* stream) noexcept;

}  // namespace treeq::trt
#endif
