// Launches that run in the emulator: an image is PTX's text. What tests set and ask for beside it.
#include <memory>
#include <string>

#include "../emulator/block.h"
#include "../emulator/instructions/table.h"
#include "driver_api.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// A launch that ran, to its end or to its fault; as ctypes reads it.
struct Record {
  Handle function;
  const char* kernel;
  uint32_t grid[3];
  uint32_t warps;
  int32_t static_barriers;
  uint64_t instructions, barriers, products, bytes_read, bytes_written;
};

std::string g_error;
int g_unkindness;
uint64_t g_seed = 1;
const ptx::Program* g_removed_from;
int g_removed = -1;
std::vector<Record> g_records;
std::string g_known;

}  // namespace

CUresult load(Handle* module, const void* image) {
  try {
    auto program = std::make_unique<ptx::Program>(ptx::parse(static_cast<const char*>(image)));
    *module = program.release();  // kernels are kept for as long as the process runs, by Triton as well
    return kSuccess;
  } catch (const std::exception& error) {
    g_error = error.what();
    return kInvalidImage;
  }
}

CUresult find_function(Handle* function, Handle module, const char*) {
  *function = module;
  return kSuccess;
}

CUresult launch(const LaunchConfig& config, Handle function, void** parameters) {
  const auto& program = *static_cast<const ptx::Program*>(function);
  CUresult result = kSuccess;
  ptx::Launch launch{program,
                     {config.grid_x, config.grid_y, config.grid_z},
                     config.block_x * config.block_y * config.block_z,
                     program.static_shared + config.shared_bytes,
                     std::vector<uint8_t>(8 * program.parameters.size()),
                     g_unkindness,
                     ptx::Chance(g_seed),
                     g_seed * 0x2545f4914f6cdd1dull};
  ++g_seed;
  if (&program == g_removed_from) launch.removed_barrier = g_removed;
  for (size_t i = 0; i < program.parameters.size(); ++i) {
    if (!parameters[i]) continue;
    std::memcpy(launch.parameters.data() + program.parameters[i].offset, parameters[i],
                static_cast<size_t>(program.parameters[i].size));
  }
  try {
    ptx::run(launch);
  } catch (const std::exception& error) {
    g_error = "the emulator, in " + program.name + ": " + error.what();
    result = kLaunchFailed;
  }
  const ptx::Counts& counts = launch.counts;
  g_records.push_back({function,
                       program.name.c_str(),
                       {config.grid_x, config.grid_y, config.grid_z},
                       launch.threads / ptx::kLanes,
                       program.barriers,
                       counts.instructions,
                       counts.barriers,
                       counts.products,
                       counts.bytes_read,
                       counts.bytes_written});
  return result;
}

// Triton copies it to a buffer of a kilobyte; the whole is ptx_error()'s.
const char* last_error() {
  static std::string brief;
  brief = g_error.substr(0, 700);
  return brief.c_str();
}

EXPORT const char* ptx_error() { return g_error.c_str(); }

EXPORT void ptx_set(int unkindness, uint64_t seed) {
  g_unkindness = unkindness;
  g_seed = seed;
}

EXPORT uint64_t ptx_launches() { return g_records.size(); }
EXPORT const Record* ptx_launch(uint64_t which) { return &g_records.at(which); }
EXPORT void ptx_forget_launches() { g_records.clear(); }

// A kernel outside Triton: a handle, or null and an error.
EXPORT Handle ptx_load(const char* text) {
  Handle module = nullptr;
  return load(&module, text) == kSuccess ? module : nullptr;
}

EXPORT int ptx_run(Handle function, unsigned blocks, unsigned threads, unsigned shared_bytes, void** parameters) {
  return launch({blocks, 1, 1, threads, 1, 1, shared_bytes}, function, parameters);
}

EXPORT int ptx_barriers(Handle function) { return static_cast<const ptx::Program*>(function)->barriers; }

// One barrier of a kernel is passed over from now on; -1 puts it back.
EXPORT void ptx_remove_barrier(Handle function, int which) {
  g_removed_from = static_cast<const ptx::Program*>(function);
  g_removed = which;
}

// Opcodes of the table, one a line.
EXPORT const char* ptx_known() {
  g_known.clear();
  for (const auto& entry : ptx::table()) g_known += entry.first + "\n";
  return g_known.c_str();
}

// The memory of what is not one of torch's tensors.
EXPORT void ptx_add_memory(uint64_t begin, uint64_t bytes) { ptx::Registry::one().add(begin, bytes); }
EXPORT void ptx_remove_memory(uint64_t begin) { ptx::Registry::one().remove(begin); }
