#include "driver.h"

#include <dlfcn.h>

#include "log.h"

namespace treeq::cuda {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";

template <typename Function>
bool find(void* library, const char* name, Function& out) noexcept {
  out = reinterpret_cast<Function>(dlsym(library, name));
  if (!out) {
    trt::log_error("%s: %s is missing; expected the driver of CUDA 12.0 or later", kLibrary, name);
  }
  return out != nullptr;
}

/* Opens the driver; a null entry at the end says that it failed. */
Driver load() noexcept {
  Driver driver{};
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    trt::log_error("%s: %s; engines with treeq plugins run where NVIDIA's driver is installed",
                   kLibrary, dlerror());
    return driver;
  }
  const bool is_complete = find(library, "cuGetErrorString", driver.cuGetErrorString) &&
                           find(library, "cuCtxGetDevice", driver.cuCtxGetDevice) &&
                           find(library, "cuDeviceGetAttribute", driver.cuDeviceGetAttribute) &&
                           find(library, "cuLibraryLoadData", driver.cuLibraryLoadData) &&
                           find(library, "cuLibraryGetKernel", driver.cuLibraryGetKernel) &&
                           find(library, "cuKernelSetAttribute", driver.cuKernelSetAttribute) &&
                           find(library, "cuLaunchKernel", driver.cuLaunchKernel);
  if (!is_complete) driver.cuLaunchKernel = nullptr;
  return driver;
}

}  // namespace

const Driver* open_driver() noexcept {
  static const Driver driver = load();
  return driver.cuLaunchKernel ? &driver : nullptr;
}

const char* describe(const Driver& driver, Result result) noexcept {
  const char* text = nullptr;
  driver.cuGetErrorString(result, &text);
  return text ? text : "unknown error";
}

bool find_device(const char* layer, Device& out) noexcept {
  const Driver* driver = open_driver();
  if (!driver) return false;  // said once, when it was opened
  int major = 0, minor = 0;
  Result result = driver->cuCtxGetDevice(&out.index);
  if (!result) result = driver->cuDeviceGetAttribute(&major, kCapabilityMajor, out.index);
  if (!result) result = driver->cuDeviceGetAttribute(&minor, kCapabilityMinor, out.index);
  if (!result) result = driver->cuDeviceGetAttribute(&out.num_sms, kNumMultiprocessors, out.index);
  if (result) trt::log_error("%s: no CUDA device: %s", layer, describe(*driver, result));
  out.capability = 10 * major + minor;
  return result == kSuccess;
}

}  // namespace treeq::cuda
