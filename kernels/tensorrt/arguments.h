/* The arguments of one kernel launch, in the kernel's order, with their names. */
#ifndef TREEQ_TENSORRT_ARGUMENTS_H
#define TREEQ_TENSORRT_ARGUMENTS_H

#include <cstddef>
#include <cstdint>

#include "choose.h"
#include "kernels.h"

namespace treeq::trt {

/* Values of up to 8 bytes each: pointers, int32 and float. */
template <size_t COUNT>
class Arguments {
 public:
  /* names: each with a comma behind it, such as "codes,M,". */
  template <typename... Values>
  explicit Arguments(const char* names, Values... values) noexcept : names_(names) {
    static_assert(sizeof...(Values) == COUNT, "one value for each name");
    size_t i = 0;
    (set(i++, values), ...);
  }

  bool launch(const char* layer, const cuda::Device& device, const Launch& chosen,
              cuda::Stream* stream) const noexcept {
    const Grid grid{uint32_t(chosen.grid[0]), uint32_t(chosen.grid[1]), uint32_t(chosen.grid[2])};
    return trt::launch(layer, device, chosen.name, grid, names_, pointers_, COUNT, stream);
  }

 private:
  void set(size_t i, const void* value) noexcept {
    values_[i].pointer = value;
    pointers_[i] = &values_[i];
  }
  void set(size_t i, int32_t value) noexcept {
    values_[i].integer = value;
    pointers_[i] = &values_[i];
  }
  void set(size_t i, float value) noexcept {
    values_[i].real = value;
    pointers_[i] = &values_[i];
  }

  union Value {
    const void* pointer;
    int32_t integer;
    float real;
  };
  const char* names_;
  Value values_[COUNT];
  void* pointers_[COUNT];
};

template <typename... Values>
Arguments(const char*, Values...) -> Arguments<sizeof...(Values)>;

}  // namespace treeq::trt
#endif
