/* The part of the CUDA driver API that the plugins use, so that nothing of CUDA is linked.
 *
 * libcuda.so.1 is opened at the first launch: a host without a GPU loads the library and builds
 * engines with it. Kernels are taken from CUDA 12's libraries (cuLibrary*), which belong to no
 * context. tests/kernels/test_tensorrt_plugin.py compares the declarations with cuda.h.
 */
#ifndef TREEQ_TENSORRT_DRIVER_H
#define TREEQ_TENSORRT_DRIVER_H

#include <cstdint>

namespace treeq::cuda {

using Result = int;  // CUresult
using DeviceIndex = int;
struct Library;  // CUlib_st
struct Kernel;   // CUkern_st; cuLaunchKernel takes one in the place of a CUfunction
struct Stream;   // CUstream_st

constexpr Result kSuccess = 0;
constexpr int kNumMultiprocessors = 16;  // CUdevice_attribute
constexpr int kCapabilityMajor = 75;
constexpr int kCapabilityMinor = 76;
constexpr int kMaxDynamicSharedBytes = 8;  // CUfunction_attribute

/* Entries of libcuda.so.1, each under its plain name: every driver from CUDA 12.0 on has them. */
struct Driver {
  Result (*cuGetErrorString)(Result, const char**);
  Result (*cuCtxGetDevice)(DeviceIndex*);
  Result (*cuDeviceGetAttribute)(int*, int attribute, DeviceIndex);
  Result (*cuLibraryLoadData)(Library**, const void* code, void* jit_options, void** jit_values,
                              unsigned num_jit, void* options, void** values, unsigned num);
  Result (*cuLibraryGetKernel)(Kernel**, Library*, const char* name);
  Result (*cuKernelSetAttribute)(int attribute, int value, Kernel*, DeviceIndex);
  Result (*cuLaunchKernel)(Kernel*, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                           unsigned block_x, unsigned block_y, unsigned block_z,
                           unsigned shared_bytes, Stream*, void** arguments, void** extra);
};

/* The driver, or null after one logged line. */
const Driver* open_driver() noexcept;

/* Text of a result, never null. */
const char* describe(const Driver& driver, Result result) noexcept;

struct Device {
  DeviceIndex index;
  int32_t capability;  // 10 * major + minor
  int32_t num_sms;
};

/* The device of the calling thread's context; false after one logged line that names `layer`. */
bool find_device(const char* layer, Device& out) noexcept;

}  // namespace treeq::cuda
#endif
