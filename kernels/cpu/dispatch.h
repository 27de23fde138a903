/* Which kernels run on this processor. */
#ifndef TREEQ_DISPATCH_H
#define TREEQ_DISPATCH_H

#include "layer.h"

namespace treeq {

/* The best of this processor, or what TREEQ_ISA names; null where that does not run here. */
const Kernels* choose_kernels();

}  // namespace treeq
#endif
