/* The creators and how TensorRT finds them.
 *
 * IPluginRegistry::loadLibrary calls setLoggerFinder and getCreators. A host that only opens the
 * library, such as Triton's TensorRT backend, calls nothing: a static initialiser then registers
 * the creators where TensorRT is in the process. loadLibrary refuses creators that are registered,
 * and it opens the library too, so getCreators takes the initialiser's registration back first.
 *
 * The table of IPluginRegistry's virtual functions differs between TensorRT 10 and 11, so the
 * initialiser touches no registry but that of the release whose headers it was compiled with;
 * getCreators works with every release.
 */
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <iterator>

#include "fields.h"
#include "log.h"
#include "ops.h"

#define TREEQ_TEXT_OF(text) #text
#define TREEQ_TEXT(text) TREEQ_TEXT_OF(text)
#define TREEQ_API extern "C" __attribute__((visibility("default")))

namespace treeq::trt {
namespace {

using namespace nvinfer1;

class Creator : public IPluginCreatorV3One {
 public:
  using Make = IPluginV3* (*)(const char* layer, const PluginFieldCollection& fields);
  Creator(const char* op, const PluginFieldCollection& fields, Make make) noexcept
      : op_(op), fields_(fields), make_(make) {}
  AsciiChar const* getPluginName() const noexcept override { return op_; }
  AsciiChar const* getPluginVersion() const noexcept override { return TREEQ_OP_VERSION; }
  AsciiChar const* getPluginNamespace() const noexcept override { return TREEQ_DOMAIN; }
  PluginFieldCollection const* getFieldNames() noexcept override { return &fields_; }
  IPluginV3* createPlugin(AsciiChar const* name, PluginFieldCollection const* fields,
                          TensorRTPhase) noexcept override {
    return make_(name, fields ? *fields : PluginFieldCollection{});
  }

 private:
  const char* op_;
  PluginFieldCollection fields_;
  Make make_;
};

/* Never destroyed: a registry may hold them longer than the library's static objects live. */
IPluginCreatorInterface* const (&creators())[2] {
  static auto* qlinear = new Creator(TREEQ_QLINEAR, qlinear_field_names(), make_qlinear);
  static auto* monarch = new Creator(TREEQ_MONARCH, PluginFieldCollection{}, make_monarch);
  static IPluginCreatorInterface* const list[] = {qlinear, monarch};
  return list;
}

using GetRegistry = IPluginRegistry* (*)();
using GetLogger = ILogger* (*)();
using GetVersion = int32_t (*)();

int32_t read_version(void* library, const char* name) noexcept {
  const auto function = reinterpret_cast<GetVersion>(dlsym(library, name));
  return function ? function() : 0;
}

/* Whether the registry of a library has the table that we were compiled for. */
bool has_our_registry(void* library) noexcept {
  const int32_t major = read_version(library, "getInferLibMajorVersion");
  if (major == NV_TENSORRT_MAJOR) return true;
  // TensorRT-RTX counts for itself. 1.7 has TensorRT 11's table (tried); before it is unknown.
  return NV_TENSORRT_MAJOR >= 11 && major == 1 &&
         read_version(library, "getInferLibMinorVersion") >= 7;
}

/* The registry of a TensorRT that is in the process already, null where there is none. */
IPluginRegistry* find_registry() noexcept {
  // A library that was opened privately is found by its name only.
  void* const libraries[] = {
      dlopen("libnvinfer.so." TREEQ_TEXT(NV_TENSORRT_MAJOR), RTLD_LAZY | RTLD_NOLOAD),
      dlopen("libtensorrt_rtx.so.1", RTLD_LAZY | RTLD_NOLOAD),
      RTLD_DEFAULT,
  };
  for (void* library : libraries) {
    // RTLD_DEFAULT is null itself: what a missing library is replaced by, which is as good.
    const auto function = reinterpret_cast<GetRegistry>(dlsym(library, "getPluginRegistry"));
    if (!function || !has_our_registry(library)) continue;
    set_logger_getter(reinterpret_cast<GetLogger>(dlsym(library, "getLogger")));
    return function();
  }
  return nullptr;
}

/* The registration by the static initialiser. */
class SelfRegistration {
 public:
  SelfRegistration() noexcept {
    registry_ = find_registry();
    if (!registry_) return;
    for (size_t i = 0; i < std::size(creators()); ++i) {
      // False, without an error (tried: TensorRT-RTX 1.7), where another copy of this library or
      // the plugins in Python were first.
      is_registered_[i] = registry_->registerCreator(*creators()[i], TREEQ_DOMAIN);
    }
  }
  void take_back() noexcept {
    for (size_t i = 0; i < std::size(creators()); ++i) {
      if (is_registered_[i]) registry_->deregisterCreator(*creators()[i]);
      is_registered_[i] = false;
    }
  }

 private:
  IPluginRegistry* registry_ = nullptr;
  bool is_registered_[2] = {};
};

SelfRegistration g_self_registration;

}  // namespace
}  // namespace treeq::trt

TREEQ_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  treeq::trt::set_logger_finder(finder);
}

TREEQ_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& num_creators) {
  treeq::trt::g_self_registration.take_back();
  num_creators = int32_t(std::size(treeq::trt::creators()));
  return treeq::trt::creators();
}
