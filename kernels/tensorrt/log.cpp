#include "log.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>

namespace treeq::trt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> g_finder{nullptr};
std::atomic<nvinfer1::ILogger* (*)()> g_getter{nullptr};

nvinfer1::ILogger* find_logger() noexcept {
  nvinfer1::ILoggerFinder* finder = g_finder.load();
  if (finder) return finder->findLogger();
  const auto getter = g_getter.load();
  return getter ? getter() : nullptr;
}

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { g_finder.store(finder); }

void set_logger_getter(nvinfer1::ILogger* (*getter)()) noexcept { g_getter.store(getter); }

void log_error(const char* format, ...) noexcept {
  char text[768];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  nvinfer1::ILogger* logger = find_logger();
  if (logger) {
    logger->log(nvinfer1::ILogger::Severity::kERROR, text);
  } else {
    std::fprintf(stderr, "treeq: %s\n", text);
  }
}

}  // namespace treeq::trt
