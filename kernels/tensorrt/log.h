/* Messages of the plugins: to TensorRT's logger where it gave one, else to the error stream. */
#ifndef TREEQ_TENSORRT_LOG_H
#define TREEQ_TENSORRT_LOG_H

#include <NvInferRuntime.h>

namespace treeq::trt {

/* Takes the finder that TensorRT hands to a library that it loads; null takes it back. */
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

/* Takes TensorRT's own getLogger(), for a library that no finder is given to. */
void set_logger_getter(nvinfer1::ILogger* (*getter)()) noexcept;

/* Writes one line of severity "error". Never throws, never allocates. */
__attribute__((format(printf, 1, 2))) void log_error(const char* format, ...) noexcept;

}  // namespace treeq::trt
#endif
