#include "dispatch.h"

#include <cstdlib>
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
#endif

namespace treeq {
namespace {

/* Best first; only those that run here. */
int list_kernels(const Kernels* out[4]) {
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni"))
    out[count++] = avx512vnni_kernels();
  if (avx2) out[count++] = avx2_kernels();
#endif
#if defined(__aarch64__) && defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) out[count++] = neon_kernels();
#endif
  out[count++] = portable_kernels();
  return count;
}

}  // namespace

const Kernels* choose_kernels() {
  const Kernels* kernels[4];
  const int count = list_kernels(kernels);
  const char* wanted = std::getenv("TREEQ_ISA");
  if (!wanted || !*wanted) return kernels[0];
  for (int i = 0; i < count; ++i)
    if (!std::strcmp(kernels[i]->name, wanted)) return kernels[i];
  return nullptr;
}

}  // namespace treeq

const char* treeq_isa(void) {
  const treeq::Kernels* kernels = treeq::choose_kernels();
  return kernels ? kernels->name : nullptr;
}

int32_t treeq_abi_version(void) { return TREEQ_ABI_VERSION; }

const char* treeq_version(void) { return TREEQ_VERSION; }

const char* treeq_status_message(treeq_status status) {
  switch (status) {
    case TREEQ_OK: return "done";
    case TREEQ_NULL_POINTER: return "a required array is missing";
    case TREEQ_BAD_VERSION: return "the caller was built for another version of the kernels";
    case TREEQ_BAD_SHAPE: return "a size is not positive or too large";
    case TREEQ_BAD_WEIGHT_BITS: return "weight_bits is not in 2..8";
    case TREEQ_BAD_ACT_BITS: return "act_bits is not in 2..8, or not 0 where act_scale is none";
    case TREEQ_BAD_ACT_SCALE:
      return "act_scale is unknown, act_step is not a positive number, or activations are not "
             "quantized";
    case TREEQ_BAD_ROTATION: return "rotation_group is no power of two that divides in_features";
    case TREEQ_BAD_GROUP: return "group_size does not divide in_features";
    case TREEQ_BAD_BRANCH: return "the branch's block grid does not divide the layer";
    case TREEQ_BAD_ISA:
      return "TREEQ_ISA names an instruction set that is unknown or missing here; use avx512vnni, "
             "avx2, neon or portable";
    case TREEQ_OUT_OF_MEMORY: return "out of memory";
    case TREEQ_BAD_FUSION:
      return "the fused activation is unknown, tokens do not divide the rows, the outputs do not "
             "share the channels in tiles of 32, or addend and gate are both given";
    case TREEQ_SUM_OVERFLOW: return "in_features is so large that an int32 sum could overflow";
  }
  return "unknown status";
}
