#include "kernels.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <utility>

#include "log.h"

/* In the assembly that embed.py writes; sorted by name, then capability. */
extern "C" const treeq::trt::Kernel treeq_kernel_table[];
extern "C" const uint64_t treeq_num_kernels;

namespace treeq::trt {
namespace {

constexpr uint32_t kWarp = 32;
constexpr int32_t kDefaultSharedBytes = 48 * 1024;  // more has to be asked for
constexpr size_t kMaxArguments = 32;

const Kernel* table_end() noexcept { return treeq_kernel_table + treeq_num_kernels; }

using LoadedKey = std::pair<cuda::DeviceIndex, const Kernel*>;

std::mutex g_mutex;
std::map<LoadedKey, cuda::Kernel*>& loaded_kernels() {
  // Never destroyed: an engine may run while the process ends.
  static auto* loaded = new std::map<LoadedKey, cuda::Kernel*>;
  return *loaded;
}

/* Whether the kernel takes exactly `params` and then hidden pointers only. */
bool takes(const Kernel& kernel, const char* params) noexcept {
  const size_t length = std::strlen(params);
  if (std::strncmp(kernel.params, params, length) != 0) return false;
  const char* rest = kernel.params + length;
  while (rest[0] == '*' && rest[1] == ',') rest += 2;
  return *rest == '\0';
}

bool check(const char* layer, const Kernel& kernel, const char* params) noexcept {
  if (takes(kernel, params)) return true;
  log_error("%s: kernel %s takes (%s), expected (%s); build libtreeq_plugins.so and its kernels "
            "from one version", layer, kernel.name, kernel.params, params);
  return false;
}

cuda::Kernel* load(const char* layer, const cuda::Driver& driver, const cuda::Device& device,
                   const Kernel& kernel) noexcept {
  cuda::Library* library = nullptr;
  cuda::Kernel* function = nullptr;
  cuda::Result result = driver.cuLibraryLoadData(&library, kernel.cubin, nullptr, nullptr, 0,
                                                 nullptr, nullptr, 0);
  if (!result) result = driver.cuLibraryGetKernel(&function, library, kernel.function);
  if (!result && kernel.shared_bytes > kDefaultSharedBytes) {
    result = driver.cuKernelSetAttribute(cuda::kMaxDynamicSharedBytes, kernel.shared_bytes,
                                         function, device.index);
  }
  if (result) {
    log_error("%s: kernel %s (sm_%d, %d bytes of shared memory) does not load on device %d "
              "(sm_%d): %s", layer, kernel.name, kernel.capability, kernel.shared_bytes,
              device.index, device.capability, cuda::describe(driver, result));
    return nullptr;
  }
  return function;
}

/* The function of a kernel on a device: from the cache, or loaded. */
cuda::Kernel* get(const char* layer, const cuda::Driver& driver, const cuda::Device& device,
                  const Kernel& kernel, const char* params) noexcept {
  try {
    const std::lock_guard<std::mutex> lock(g_mutex);
    const LoadedKey key{device.index, &kernel};
    const auto found = loaded_kernels().find(key);
    if (found != loaded_kernels().end()) return found->second;
    if (!check(layer, kernel, params)) return nullptr;
    cuda::Kernel* function = load(layer, driver, device, kernel);
    if (function) loaded_kernels().emplace(key, function);
    return function;
  } catch (...) {
    log_error("%s: kernel %s: out of host memory", layer, kernel.name);
    return nullptr;
  }
}

/* The first entry that is not before `name`. */
const Kernel* find_first(const char* name) noexcept {
  const auto is_before = [](const Kernel& kernel, const char* other) {
    return std::strcmp(kernel.name, other) < 0;
  };
  return std::lower_bound(treeq_kernel_table, table_end(), name, is_before);
}

bool is_named(const Kernel* kernel, const char* name) noexcept {
  return kernel != table_end() && std::strcmp(kernel->name, name) == 0;
}

void log_missing(const char* layer, const char* name, int32_t capability) noexcept {
  char list[160] = "";
  size_t used = 0;
  for (const Kernel* it = find_first(name); is_named(it, name) && used + 10 < sizeof(list); ++it) {
    used += size_t(std::snprintf(list + used, sizeof(list) - used, "%ssm_%d", used ? ", " : "",
                                 it->capability));
  }
  log_error("%s: no kernel %s for sm_%d in libtreeq_plugins.so, which has it for %s; rebuild it "
            "with `python -m treeq_gpu.ahead --arch sm_%d`", layer, name, capability,
            used ? list : "no architecture", capability);
}

}  // namespace

bool runs_on(int32_t kernel, int32_t device) noexcept {
  if (kernel == device) return true;
  return kernel < 90 && kernel / 10 == device / 10 && kernel < device;
}

const Kernel* find_kernel(const char* name, int32_t capability) noexcept {
  const Kernel* best = nullptr;
  for (const Kernel* it = find_first(name); is_named(it, name); ++it) {
    if (runs_on(it->capability, capability)) best = it;
  }
  return best;
}

bool check_embedded(const char* layer, const char* name) noexcept {
  if (is_named(find_first(name), name)) return true;
  log_error("%s: libtreeq_plugins.so has no kernel %s; treeq_gpu/instantiations.py lists what it "
            "is built with", layer, name);
  return false;
}

bool launch(const char* layer, const cuda::Device& device, const char* name, const Grid& grid,
            const char* params, void* const* arguments, size_t num_arguments,
            cuda::Stream* stream) noexcept {
  const cuda::Driver* driver = cuda::open_driver();
  if (!driver) return false;
  const Kernel* kernel = find_kernel(name, device.capability);
  if (!kernel) {
    log_missing(layer, name, device.capability);
    return false;
  }
  cuda::Kernel* function = get(layer, *driver, device, *kernel, params);
  if (!function) return false;
  void* hidden = nullptr;
  void* all[kMaxArguments];
  std::fill(std::begin(all), std::end(all), static_cast<void*>(&hidden));
  std::copy(arguments, arguments + num_arguments, all);
  const cuda::Result result = driver->cuLaunchKernel(
      function, grid.x, grid.y, grid.z, kWarp * uint32_t(kernel->num_warps), 1, 1,
      uint32_t(kernel->shared_bytes), stream, all, nullptr);
  if (result) {
    log_error("%s: launch of %s with grid (%u, %u, %u), %d warps and %d bytes of shared memory: %s",
              layer, name, grid.x, grid.y, grid.z, kernel->num_warps, kernel->shared_bytes,
              cuda::describe(*driver, result));
  }
  return result == cuda::kSuccess;
}

}  // namespace treeq::trt
