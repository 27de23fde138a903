/* The instructions of qlinear_int4.cu that CUDA C++ has no name for, one wrapper each.
 *
 * experimental/tests/emulate_int4/emulation.h has the same names in plain C++, after the PTX ISA's fragment
 * layouts, so that the kernel's source runs on a processor.
 */
#ifndef TREEQ_INT4_PTX_CUH
#define TREEQ_INT4_PTX_CUH

#include <cstdint>
#include <cuda_fp16.h>

#define TREEQ_SHARED __shared__

namespace treeq::int4 {

/* 16 bytes from global to shared memory without registers; both addresses are multiples of 16. */
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

/* The same for 4 bytes; both addresses are multiples of 4. */
__device__ __forceinline__ void copy_async_4(void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(global) : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits until at most PENDING groups of this thread's copies are under way. */
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/* Four matrices of 8 rows of 16 bytes: lane 8*i + r gives the address of row r of matrix i, and gets
 * 4 bytes, from 4*(lane % 4) on, of row lane / 4 of each matrix. */
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

/* acc (16 x 8, int32) += a (16 x 64, int4, rows) * b (64 x 8, int4, columns). */
__device__ __forceinline__ void multiply(int32_t (&acc)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ uint32_t rotate_right(uint32_t word, uint32_t by) {
  return __funnelshift_r(word, word, by);
}

}  // namespace treeq::int4
#endif
