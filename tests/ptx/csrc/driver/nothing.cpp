// Launches that do nothing: what remains is the host's time.
#include "driver_api.h"

namespace {
int something;
unsigned long long launches;
}  // namespace

extern "C" __attribute__((visibility("default"))) unsigned long long stub_launches() { return launches; }

CUresult load(Handle* module, const void*) {
  *module = &something;
  return kSuccess;
}

CUresult find_function(Handle* function, Handle, const char*) {
  *function = &something;
  return kSuccess;
}

CUresult launch(const LaunchConfig&, Handle, void**) {
  ++launches;
  return kSuccess;
}

const char* last_error() { return "a launch that does nothing"; }
