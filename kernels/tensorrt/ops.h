/* The plugins, made from their fields. */
#ifndef TREEQ_TENSORRT_OPS_H
#define TREEQ_TENSORRT_OPS_H

#include "plugin.h"

namespace treeq::trt {

/* A new plugin, or null after one logged line that names the layer. */
nvinfer1::IPluginV3* make_qlinear(const char* layer,
                                  const nvinfer1::PluginFieldCollection& fields) noexcept;
nvinfer1::IPluginV3* make_monarch(const char* layer,
                                  const nvinfer1::PluginFieldCollection& fields) noexcept;

}  // namespace treeq::trt
#endif
