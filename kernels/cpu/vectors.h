/* Vectors of 16 lanes that the compiler lowers to what the processor has. */
#ifndef TREEQ_VECTORS_H
#define TREEQ_VECTORS_H

#include <cstdint>

namespace treeq {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef int8_t Bytes __attribute__((vector_size(16)));

}  // namespace treeq
#endif
