/* A libcuda.so.1 that launches nothing and writes down what it is asked for, one JSON line a call.
 *
 * A "cubin" of it is text: name, architecture, and one digit for the bytes of each argument.
 * TREEQ_FAKE_LOG: the file; TREEQ_FAKE_CAPABILITY, TREEQ_FAKE_SMS: the device;
 * TREEQ_FAKE_FAIL: the entry that fails. */
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#define ENTRY extern "C" __attribute__((visibility("default"))) int

namespace {

struct Image {
  std::string name, arch, sizes, function;
};

std::map<std::string, Image*> g_images;

bool fails(const char* entry) {
  const char* failing = std::getenv("TREEQ_FAKE_FAIL");
  return failing && std::strcmp(failing, entry) == 0;
}

FILE* log_file() {
  static FILE* file = std::fopen(std::getenv("TREEQ_FAKE_LOG"), "a");
  return file;
}

}  // namespace

ENTRY cuGetErrorString(int result, const char** text) {
  *text = result == 700 ? "a fake failure" : nullptr;
  return 0;
}

ENTRY cuCtxGetDevice(int* device) {
  *device = 0;
  return fails("cuCtxGetDevice") ? 700 : 0;
}

ENTRY cuDeviceGetAttribute(int* value, int attribute, int) {
  const int capability = std::atoi(std::getenv("TREEQ_FAKE_CAPABILITY"));
  if (attribute == 75) *value = capability / 10;
  if (attribute == 76) *value = capability % 10;
  if (attribute == 16) *value = std::atoi(std::getenv("TREEQ_FAKE_SMS"));
  return 0;
}

ENTRY cuLibraryLoadData(void** library, const void* code, void*, void**, unsigned, void*, void**,
                        unsigned) {
  if (fails("cuLibraryLoadData")) return 700;
  char name[128], arch[16], sizes[64];
  const int count =
      std::sscanf(static_cast<const char*>(code), "%127s %15s %63s", name, arch, sizes);
  if (count != 3) return 1;
  *library = new Image{name, arch, sizes, ""};
  std::fprintf(log_file(), "{\"call\": \"load\", \"name\": \"%s\", \"arch\": \"%s\"}\n", name,
               arch);
  return 0;
}

ENTRY cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  static_cast<Image*>(library)->function = name;
  *kernel = library;
  return 0;
}

ENTRY cuKernelSetAttribute(int attribute, int value, void* kernel, int) {
  std::fprintf(log_file(),
               "{\"call\": \"attribute\", \"name\": \"%s\", \"attribute\": %d, \"value\": %d}\n",
               static_cast<Image*>(kernel)->name.c_str(), attribute, value);
  return 0;
}

ENTRY cuLaunchKernel(void* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                     unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                     void* stream, void** arguments, void**) {
  if (fails("cuLaunchKernel")) return 700;
  const Image& image = *static_cast<Image*>(kernel);
  std::string bytes;
  for (size_t i = 0; i < image.sizes.size(); ++i) {
    char text[3];
    for (int b = 0; b < image.sizes[i] - '0'; ++b) {
      std::snprintf(text, sizeof(text), "%02x", static_cast<unsigned char*>(arguments[i])[b]);
      bytes += text;
    }
  }
  std::fprintf(log_file(),
               "{\"call\": \"launch\", \"name\": \"%s\", \"arch\": \"%s\", \"function\": \"%s\", "
               "\"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"shared_bytes\": %u, "
               "\"stream\": %llu, \"arguments\": \"%s\"}\n",
               image.name.c_str(), image.arch.c_str(), image.function.c_str(), grid_x, grid_y,
               grid_z, block_x, block_y, block_z, shared_bytes,
               static_cast<unsigned long long>(reinterpret_cast<size_t>(stream)), bytes.c_str());
  std::fflush(log_file());
  return 0;
}
