/* Vectors of 16 lanes in the processor's own registers: one of 512 bits, two of 256 or four of 128.
 * What all instruction sets write alike is here; vectors_<isa>.h adds what has an instruction of its
 * own. Everything is inlined and of internal linkage: each file is compiled for another processor. */
#ifndef TREEQ_VECTORS_H
#define TREEQ_VECTORS_H

#include <cstdint>

#include "layer.h"

#define TREEQ_INLINE inline __attribute__((always_inline))
/* For loops that need all registers: what is around them must not take any. */
#define TREEQ_NOINLINE __attribute__((noinline))
/* Before a loop of a few constant rounds, so that its vectors stay in registers. */
#ifdef __clang__
#define TREEQ_UNROLL _Pragma("unroll")
#else
#define TREEQ_UNROLL _Pragma("GCC unroll 32")
#endif

#if defined(__AVX512F__)
#define TREEQ_PART_BYTES 64
#define TREEQ_LANES(f) \
  f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#elif defined(__AVX2__)
#define TREEQ_PART_BYTES 32
#define TREEQ_LANES(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)
#else
#define TREEQ_PART_BYTES 16
#define TREEQ_LANES(f) f(0), f(1), f(2), f(3)
#endif

namespace treeq {
namespace {

typedef float FloatPart __attribute__((vector_size(TREEQ_PART_BYTES)));
typedef int32_t IntPart __attribute__((vector_size(TREEQ_PART_BYTES)));

constexpr int kPartLanes = TREEQ_PART_BYTES / 4;
constexpr int kParts = kLanes / kPartLanes;

template <typename Part>
struct Lanes {
  Part part[kParts];
};
using Floats = Lanes<FloatPart>;
using Ints = Lanes<IntPart>;

#define TREEQ_OPERATOR(op)                                                     \
  template <typename Part>                                                     \
  TREEQ_INLINE Lanes<Part> operator op(Lanes<Part> a, Lanes<Part> b) {         \
    TREEQ_UNROLL                                                               \
    for (int i = 0; i < kParts; ++i) a.part[i] = a.part[i] op b.part[i];       \
    return a;                                                                  \
  }
TREEQ_OPERATOR(+)
TREEQ_OPERATOR(-)
TREEQ_OPERATOR(*)
TREEQ_OPERATOR(/)
TREEQ_OPERATOR(&)
#undef TREEQ_OPERATOR

TREEQ_INLINE Ints operator<<(Ints a, int count) {
  TREEQ_UNROLL
  for (int i = 0; i < kParts; ++i) a.part[i] = a.part[i] << count;
  return a;
}
TREEQ_INLINE Ints operator>>(Ints a, int count) {
  TREEQ_UNROLL
  for (int i = 0; i < kParts; ++i) a.part[i] = a.part[i] >> count;
  return a;
}

TREEQ_INLINE FloatPart splat_part(float value) {
#define TREEQ_VALUE(i) value
  return FloatPart{TREEQ_LANES(TREEQ_VALUE)};
}
TREEQ_INLINE Floats splat(float value) {
  Floats v;
  TREEQ_UNROLL
  for (int i = 0; i < kParts; ++i) v.part[i] = splat_part(value);
  return v;
}
TREEQ_INLINE Ints splat(int32_t value) {
  Ints v;
  TREEQ_UNROLL
  for (int i = 0; i < kParts; ++i) v.part[i] = IntPart{TREEQ_LANES(TREEQ_VALUE)};
  return v;
#undef TREEQ_VALUE
}

template <typename V>
TREEQ_INLINE V load_as(const void* p) {
  V v;
  TREEQ_UNROLL
  for (int i = 0; i < kParts; ++i)
    __builtin_memcpy(&v.part[i], static_cast<const char*>(p) + i * TREEQ_PART_BYTES,
                     TREEQ_PART_BYTES);
  return v;
}
TREEQ_INLINE Floats load(const float* p) { return load_as<Floats>(p); }
TREEQ_INLINE Ints load(const int32_t* p) { return load_as<Ints>(p); }

template <typename T, typename V>
TREEQ_INLINE void store(T* p, V v) {
  TREEQ_UNROLL
  for (int i = 0; i < kParts; ++i)
    __builtin_memcpy(p + i * kPartLanes, &v.part[i], TREEQ_PART_BYTES);
}

/* The first `count` floats, zeros in the other lanes. */
TREEQ_INLINE Floats load_some(const float* p, int64_t count) {
  alignas(kVector) float lanes[kLanes] = {};
  __builtin_memcpy(lanes, p, size_t(count) * sizeof *p);
  return load(lanes);
}
template <typename T, typename V>
TREEQ_INLINE void store_some(T* p, V v, int64_t count) {
  alignas(kVector) T lanes[kLanes];
  store(lanes, v);
  __builtin_memcpy(p, lanes, size_t(count) * sizeof *p);
}

/* a > b ? yes : no in every lane. */
template <typename Part, typename V>
TREEQ_INLINE V select_greater(Lanes<Part> a, Lanes<Part> b, V yes, V no) {
  TREEQ_UNROLL
  for (int i = 0; i < kParts; ++i)
    no.part[i] = a.part[i] > b.part[i] ? yes.part[i] : no.part[i];
  return no;
}

TREEQ_INLINE Floats to_floats(Ints v) {
  Floats out;
  TREEQ_UNROLL
  for (int i = 0; i < kParts; ++i) out.part[i] = __builtin_convertvector(v.part[i], FloatPart);
  return out;
}
TREEQ_INLINE Ints bits_of(Floats v) {
  Ints out;
  TREEQ_UNROLL
  for (int i = 0; i < kParts; ++i) out.part[i] = reinterpret_cast<IntPart>(v.part[i]);
  return out;
}
TREEQ_INLINE Floats floats_of(Ints bits) {
  Floats out;
  TREEQ_UNROLL
  for (int i = 0; i < kParts; ++i) out.part[i] = reinterpret_cast<FloatPart>(bits.part[i]);
  return out;
}

/* Lane i gets lane i ^ kStride, inside a register. */
template <int kStride, typename Part>
TREEQ_INLINE Part swap_lanes(Part x) {
#define TREEQ_ORDER(i) (i) ^ kStride
#ifdef __clang__
  return __builtin_shufflevector(x, x, TREEQ_LANES(TREEQ_ORDER));
#else
  return __builtin_shuffle(x, IntPart{TREEQ_LANES(TREEQ_ORDER)});
#endif
#undef TREEQ_ORDER
}

/* All lanes combined in a tree: 8 with 8, 4 with 4, 2 with 2, 1 with 1. */
template <typename Part, typename F>
TREEQ_INLINE auto reduce_lanes(Lanes<Part> v, const F& combine) {
  TREEQ_UNROLL
  for (int half = kParts / 2; half; half /= 2) {
    TREEQ_UNROLL
    for (int i = 0; i < half; ++i) v.part[i] = combine(v.part[i], v.part[i + half]);
  }
  Part all = v.part[0];
  if constexpr (kPartLanes > 8) all = combine(all, swap_lanes<8>(all));
  if constexpr (kPartLanes > 4) all = combine(all, swap_lanes<4>(all));
  all = combine(all, swap_lanes<2>(all));
  all = combine(all, swap_lanes<1>(all));
  return all[0];
}
template <typename V>
TREEQ_INLINE auto sum_of_lanes(V v) {
  return reduce_lanes(v, [](auto a, auto b) { return a + b; });
}
template <typename V>
TREEQ_INLINE auto largest_lane(V v) {
  return reduce_lanes(v, [](auto a, auto b) { return a > b ? a : b; });
}

}  // namespace
}  // namespace treeq
#endif
