/* Loops over the rows of a panel, a constant number of them in registers. */
#ifndef TREEQ_ROWS_H
#define TREEQ_ROWS_H

#include "vectors.h"

namespace treeq {
namespace {

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

template <int kMost, typename F>
TREEQ_INLINE void call_with(int count, int first, const F& f) {
  if (count == kMost) return f(Count<kMost>(), first);
  if constexpr (kMost > 1) call_with<kMost - 1>(count, first, f);
}

/* Calls f(Count<n>(), first) for all of `rows`, in parts of at most kMost that differ by at most one,
 * so that no row is left alone with its latency. */
template <int kMost, typename F>
TREEQ_INLINE void for_rows(int rows, const F& f) {
  int first = 0;
  for (int parts = (rows + kMost - 1) / kMost; parts; --parts) {
    const int count = (rows - first + parts - 1) / parts;
    call_with<kMost>(count, first, f);
    first += count;
  }
}

}  // namespace
}  // namespace treeq
#endif
