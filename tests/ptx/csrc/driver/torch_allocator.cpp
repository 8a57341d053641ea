// Torch's tensors in memory that the emulator knows: full of NaN when new, with nothing alive right beside it.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <cstring>

#include "../emulator/memory.h"

namespace {

constexpr size_t kApart = 1024;
constexpr size_t kAlignment = 64;

void release(void* data) {
  if (!data) return;
  ptx::Registry::one().remove(reinterpret_cast<uint64_t>(data));
  std::free(static_cast<char*>(data) - kApart);
}

struct KnownMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, nullptr, &release, cpu};
    void* whole = nullptr;
    if (posix_memalign(&whole, kAlignment, bytes + 2 * kApart)) throw std::bad_alloc();
    std::memset(whole, 0xff, bytes + 2 * kApart);
    char* data = static_cast<char*>(whole) + kApart;
    ptx::Registry::one().add(reinterpret_cast<uint64_t>(data), bytes);
    return {data, data, &release, cpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) void ptx_know_tensors() {
  static KnownMemory* const memory = new KnownMemory;
  c10::SetCPUAllocator(memory, 255);
}
