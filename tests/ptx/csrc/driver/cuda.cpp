// A libcuda.so.1 that has one device: what Triton's host code asks a driver for.
#include <cstddef>
#include <cstring>

#include "driver_api.h"

#define API extern "C" __attribute__((visibility("default"))) CUresult

namespace {

int context;  // its address is a context that is not null

// Attributes by the numbers of CUdevice_attribute; limits as large as any chip's.
int attribute(int which) {
  switch (which) {
    case 8:
      return 48 << 10;  // shared memory of a block
    case 10:
      return 32;  // lanes of a warp
    case 12:
      return 65536;  // registers of a block
    case 16:
      return 108;  // multiprocessors
    case 81:
      return 228 << 10;  // shared memory of a multiprocessor
    case 97:
      return 227 << 10;  // shared memory that a block may ask for
    default:
      return 1000000;
  }
}

}  // namespace

API cuInit(unsigned) { return kSuccess; }
API cuDriverGetVersion(int* version) {
  *version = 13000;
  return kSuccess;
}
API cuDeviceGetCount(int* count) {
  *count = 1;
  return kSuccess;
}
API cuDeviceGet(int* device, int which) {
  *device = which;
  return kSuccess;
}
API cuDeviceGetAttribute(int* value, int which, int) {
  *value = attribute(which);
  return kSuccess;
}
API cuDevicePrimaryCtxRetain(Handle* found, int) {
  *found = &context;
  return kSuccess;
}
API cuCtxGetCurrent(Handle* found) {
  *found = &context;
  return kSuccess;
}
API cuCtxSetCurrent(Handle) { return kSuccess; }
API cuCtxGetDevice(int* device) {
  *device = 0;
  return kSuccess;
}
API cuCtxGetLimit(size_t* value, int) {
  *value = 1 << 20;
  return kSuccess;
}
API cuCtxSetLimit(int, size_t) { return kSuccess; }
API cuFuncGetAttribute(int* value, int which, Handle) {
  *value = which == 0 ? 1024 : 0;  // threads that a block may have
  return kSuccess;
}
API cuFuncSetAttribute(Handle, int, int) { return kSuccess; }
API cuFuncSetCacheConfig(Handle, int) { return kSuccess; }
API cuGetErrorString(CUresult, const char** text) {
  *text = last_error();
  return kSuccess;
}
API cuModuleLoadData(Handle* module, const void* image) { return load(module, image); }
API cuModuleGetFunction(Handle* function, Handle module, const char* name) {
  return find_function(function, module, name);
}
API cuModuleUnload(Handle) { return kSuccess; }
API cuLaunchKernelEx(const LaunchConfig* config, Handle function, void** parameters, void**) {
  return launch(*config, function, parameters);
}
API cuOccupancyMaxActiveClusters(int* count, Handle, const void*) {
  *count = 1;
  return kSuccess;
}
// Every address is the device's.
API cuPointerGetAttribute(void* value, int, uint64_t address) {
  std::memcpy(value, &address, sizeof address);
  return kSuccess;
}
API cuPointerGetAttributes(unsigned, int*, void**, uint64_t) { return 1; }
API cuStreamIsCapturing(Handle, int* capturing) {
  *capturing = 0;
  return kSuccess;
}
API cuTensorMapEncodeTiled() { return 1; }
API cuTensorMapEncodeIm2col() { return 1; }
