/* Plays TensorRT for one plugin, from the same headers: opens the library, takes a creator, builds,
 * serializes, deserializes and enqueues. Reads a description from standard input, prints one JSON
 * object a line.
 *
 *   op NAME | int NAME VALUE | float NAME VALUE | text NAME VALUE     the creator, its fields
 *   input TYPE DIMS... | output TYPE DIMS...                 TYPE: half, bf16, float, int32
 *   run                                                                ends one description
 */
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstring>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

const std::map<std::string, DataType> kTypes = {{"half", DataType::kHALF},
                                                {"bf16", DataType::kBF16},
                                                {"float", DataType::kFLOAT},
                                                {"int32", DataType::kINT32}};

struct Logger : ILogger {
  std::string lines;
  void log(Severity, AsciiChar const* text) noexcept override {
    for (const char* c = text; *c; ++c) {
      if (*c == '"' || *c == '\\') lines += '\\';
      lines += *c;
    }
    lines += "; ";
  }
} g_logger;

struct Finder : ILoggerFinder {
  ILogger* findLogger() override { return &g_logger; }
} g_finder;

struct Case {
  std::string op;
  std::map<std::string, int32_t> integers;
  std::map<std::string, float> floats;
  std::map<std::string, std::string> texts;
  std::vector<PluginTensorDesc> inputs;
  PluginTensorDesc output{};
};

PluginTensorDesc read_tensor(std::istream& words) {
  std::string type;
  words >> type;
  PluginTensorDesc tensor{};
  tensor.type = kTypes.at(type);
  tensor.format = TensorFormat::kLINEAR;
  for (int64_t extent; words >> extent;) tensor.dims.d[tensor.dims.nbDims++] = extent;
  return tensor;
}

DynamicPluginTensorDesc make_dynamic(const PluginTensorDesc& tensor) {
  return {tensor, tensor.dims, tensor.dims, tensor.dims};
}

void* address(size_t index) { return reinterpret_cast<void*>(0x100000 * (index + 1)); }

IPluginV3OneBuild* build_of(IPluginV3& plugin) {
  return static_cast<IPluginV3OneBuild*>(
      plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
}

IPluginV3OneRuntime* runtime_of(IPluginV3& plugin) {
  return static_cast<IPluginV3OneRuntime*>(
      plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

/* Why a case stopped, empty where it did not. */
std::string run(const Case& one, IPluginCreatorV3One& creator, size_t& workspace,
                std::string& fields) {
  std::vector<PluginField> given;
  for (const auto& [name, value] : one.integers) {
    given.emplace_back(name.c_str(), &value, PluginFieldType::kINT32, 1);
  }
  for (const auto& [name, value] : one.floats) {
    given.emplace_back(name.c_str(), &value, PluginFieldType::kFLOAT32, 1);
  }
  for (const auto& [name, value] : one.texts) {
    given.emplace_back(name.c_str(), value.data(), PluginFieldType::kCHAR, int32_t(value.size()));
  }
  const PluginFieldCollection collection{int32_t(given.size()), given.data()};
  std::unique_ptr<IPluginV3> first(
      creator.createPlugin("layer", &collection, TensorRTPhase::kBUILD));
  if (!first) return "createPlugin";
  std::unique_ptr<IPluginV3> built(first->clone());
  first.reset();
  auto* build = build_of(*built);

  std::vector<DynamicPluginTensorDesc> all;
  for (const auto& input : one.inputs) all.push_back(make_dynamic(input));
  const auto num_inputs = int32_t(all.size());
  const DynamicPluginTensorDesc out = make_dynamic(one.output);
  all.push_back(out);
  for (int32_t i = 0; i <= num_inputs; ++i) {
    if (!build->supportsFormatCombination(i, all.data(), num_inputs, 1)) {
      return "format " + std::to_string(i);
    }
    DynamicPluginTensorDesc other = all[size_t(i)];
    all[size_t(i)].desc.format = TensorFormat::kCHW32;
    if (build->supportsFormatCombination(i, all.data(), num_inputs, 1)) return "accepts CHW32";
    all[size_t(i)] = other;
  }
  if (build->getNbOutputs() != 1) return "getNbOutputs";
  std::vector<DataType> types;
  for (const auto& input : one.inputs) types.push_back(input.type);
  DataType type;
  if (build->getOutputDataTypes(&type, 1, types.data(), num_inputs) || type != one.output.type) {
    return "getOutputDataTypes";
  }
  if (build->configurePlugin(all.data(), num_inputs, &out, 1)) return "configurePlugin";
  workspace = build->getWorkspaceSize(all.data(), num_inputs, &out, 1);

  // What an engine holds is what getFieldsToSerialize says; the plugin itself is gone.
  auto* runtime = runtime_of(*built);
  const PluginFieldCollection* kept = runtime->getFieldsToSerialize();
  std::vector<std::string> bytes;
  std::vector<PluginField> again;
  for (int32_t i = 0; i < kept->nbFields; ++i) {
    const PluginField& field = kept->fields[i];
    const size_t size = size_t(field.length) * (field.type == PluginFieldType::kCHAR ? 1 : 4);
    bytes.emplace_back(static_cast<const char*>(field.data), size);
    fields += std::string(i ? ", " : "") + "\"" + field.name + "\"";
  }
  for (int32_t i = 0; i < kept->nbFields; ++i) {
    const PluginField& field = kept->fields[i];
    again.emplace_back(strdup(field.name), bytes[size_t(i)].data(), field.type, field.length);
  }
  built.reset();
  const PluginFieldCollection read{int32_t(again.size()), again.data()};
  std::unique_ptr<IPluginV3> loaded(creator.createPlugin("layer", &read, TensorRTPhase::kRUNTIME));
  if (!loaded) return "createPlugin again";
  runtime = runtime_of(*loaded);
  std::unique_ptr<IPluginV3> attached(runtime->attachToContext(nullptr));
  runtime = runtime_of(*attached);
  std::vector<void const*> pointers;
  for (size_t i = 0; i < one.inputs.size(); ++i) pointers.push_back(address(i));
  void* outputs[] = {address(8)};
  if (one.integers.count("unshaped") == 0 &&
      runtime->onShapeChange(one.inputs.data(), num_inputs, &one.output, 1)) {
    return "onShapeChange";
  }
  if (one.integers.count("unaligned")) pointers[0] = static_cast<const char*>(pointers[0]) + 2;
  auto* stream = reinterpret_cast<cudaStream_t>(size_t(0x5712));
  // Twice: the second launch takes the kernels from the cache.
  for (int i = 0; i < 2; ++i) {
    if (runtime->enqueue(one.inputs.data(), &one.output, pointers.data(), outputs, address(9),
                         stream)) {
      return "enqueue";
    }
  }
  return "";
}

}  // namespace

int main(int, char** argv) {
  void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    std::cerr << dlerror() << "\n";
    return 1;
  }
  using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
  using SetFinder = void (*)(ILoggerFinder*);
  reinterpret_cast<SetFinder>(dlsym(library, "setLoggerFinder"))(&g_finder);
  int32_t count = 0;
  auto* creators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"))(count);
  Case one;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string kind, name;
    words >> kind;
    if (kind == "op") words >> one.op;
    if (kind == "int" && words >> name) words >> one.integers[name];
    if (kind == "float" && words >> name) words >> one.floats[name];
    if (kind == "text" && words >> name) words >> one.texts[name];
    if (kind == "input") one.inputs.push_back(read_tensor(words));
    if (kind == "output") one.output = read_tensor(words);
    if (kind != "run") continue;
    for (int32_t i = 0; i < count; ++i) {
      auto* creator = static_cast<IPluginCreatorV3One*>(creators[i]);
      if (one.op != creator->getPluginName()) continue;
      size_t workspace = 0;
      std::string fields;
      const std::string stopped = run(one, *creator, workspace, fields);
      std::cout << "{\"stopped\": \"" << stopped << "\", \"workspace\": " << workspace
                << ", \"fields\": [" << fields << "], \"log\": \"" << g_logger.lines << "\"}\n";
    }
    g_logger.lines.clear();
    one = Case{};
  }
  return 0;
}
