// Launch plans as stella_kernels/triton_kernels/launch/plan.py makes them, to be launched without Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace stella::launch {

constexpr size_t kMostArguments = 24;
constexpr size_t kMostParameters = 64;  // of a kernel
constexpr size_t kMostResults = 8;
constexpr size_t kMostPlans = 4096;  // of an operator, as in plan.py

constexpr size_t kMostNumbers = 64;

// Where an address comes from, as in plan.py.
enum Source : int { kArgument, kResult, kScratch };

struct Place {
  int parameter, source;
  int64_t which;  // of arguments or results, or bytes into the scratch
};

struct Launch {
  void* function;
  unsigned grid[3], threads, shared_bytes;
  std::vector<uint64_t> values;  // of all parameters, each in the first bytes of a word
  std::vector<Place> places;
};

struct Result {
  std::vector<int64_t> sizes, strides;
  int32_t dtype;
};

struct Plan {
  std::vector<Launch> launches;
  std::vector<Result> results;
  int64_t scratch;               // bytes
  std::vector<int64_t> extents;  // bytes from the first to past the last of each tensor argument
  int32_t accumulated;           // dtype of the base product that the adapter is added to, -1 where there is none
};

// All that a plan depends on, one word after another.
using Key = std::vector<int64_t>;

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = key.size();
    for (const int64_t word : key)
      hash = (hash ^ static_cast<uint64_t>(word)) * 0x9e3779b97f4a7c15ull, hash ^= hash >> 29;
    return hash;
  }
};

// One of the operators, its arguments told by letters: T a tensor that is read, W one that is written, t and w where
// there may be none, f a number, b a flag, l a list of flags.
struct Operator {
  std::string name, kinds;
  bool follows_autocast;
  std::shared_mutex mutex;  // of plans
  std::unordered_map<Key, std::shared_ptr<const Plan>, Hash> plans;
};

// What the arguments of a call are, as far as a plan depends on it, and where its tensors lie.
struct Call {
  Key key;
  size_t tensors = 0;
  uint64_t addresses[kMostArguments];
  bool written[kMostArguments];
  bool flat = true;  // every tensor is a matrix or less, or contiguous: its rows lie one after another
  int32_t device_type = 0, device = -1;
};

// Fills in `call`; nothing is taken off the stack.
void read(const Operator& op, const StableIValue* stack, Call& call);

// A number of its own for a list of tensors as they are and where they lie, from 1 on; the same for the same, for as
// long as there are few others.
int64_t number_of(StableListHandle tensors);

// An owned tensor, uninitialised, on the call's device.
torch::stable::Tensor allocated(const Call& call, const int64_t* sizes, const int64_t* strides, size_t dim,
                                int32_t dtype);

// Drops the arguments, as the callee must.
void drop(const Operator& op, StableIValue* stack);

// The plan of that kind of call, unless what it writes shares memory with anything.
std::shared_ptr<const Plan> find(Operator& op, const Call& call);

// Whether the driver was found; it is looked for at run time, so that nothing of CUDA is needed to build.
bool has_driver();

// Whether a context is current on this thread; a launch needs one.
bool has_context();

// The driver refused a launch: what the call writes may be half written, unlike after any other failure.
struct LaunchFailure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Allocates, launches on the stream, and gives the results.
std::vector<torch::stable::Tensor> replay(const Plan& plan, const Call& call, void* stream);

}  // namespace stella::launch
