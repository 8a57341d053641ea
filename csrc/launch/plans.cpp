#include "launch/plans.h"

#include <dlfcn.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <mutex>
#include <optional>

namespace stella::launch {

namespace {

// CUlaunchConfig of the driver's interface, which is stable.
struct LaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};

struct Driver {
  int (*launch)(const LaunchConfig*, void* function, void** parameters, void** extra) = nullptr;
  int (*current_context)(void**) = nullptr;
  int (*error_string)(int, const char**) = nullptr;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY);
    if (!library) return;
    launch = reinterpret_cast<decltype(launch)>(dlsym(library, "cuLaunchKernelEx"));
    current_context = reinterpret_cast<decltype(current_context)>(dlsym(library, "cuCtxGetCurrent"));
    error_string = reinterpret_cast<decltype(error_string)>(dlsym(library, "cuGetErrorString"));
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

AtenTensorHandle handle_of(StableIValue value) { return reinterpret_cast<AtenTensorHandle>(value); }

// Adds what a plan depends on of a tensor; its address.
uint64_t describe(AtenTensorHandle tensor, Call& call) {
  void* address = nullptr;
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor, &address));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &call.device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &call.device));
  const uint64_t place = reinterpret_cast<uint64_t>(address);
  call.key.push_back(dim << 48 | static_cast<int64_t>(dtype) << 32 | (call.device & 0xffff) << 8 |
                     static_cast<int64_t>(place & 15) << 1 | 1);
  call.key.insert(call.key.end(), sizes, sizes + dim);
  call.key.insert(call.key.end(), strides, strides + dim);
  for (int64_t d = dim - 1, step = 1; dim > 2 && d >= 0; step *= sizes[d--])
    call.flat &= sizes[d] == 1 || strides[d] == step;
  return place;
}

void read_tensor(AtenTensorHandle tensor, bool written, Call& call) {
  call.addresses[call.tensors] = describe(tensor, call);
  call.written[call.tensors++] = written;
}

}  // namespace

void read(const Operator& op, const StableIValue* stack, Call& call) {
  for (size_t i = 0; i < op.kinds.size(); ++i) {
    const char kind = op.kinds[i];
    if (kind == 'f') {
      call.key.push_back(static_cast<int64_t>(stack[i]));
    } else if (kind == 'b') {
      call.key.push_back(torch::stable::detail::to<bool>(stack[i]));
    } else if (kind == 'l') {
      const auto list = reinterpret_cast<StableListHandle>(stack[i]);
      size_t size = 0;
      int64_t flags = 1;
      TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
      for (size_t j = 0; j < size; ++j) {
        StableIValue flag = 0;
        TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, j, &flag));
        flags = flags << 1 | torch::stable::detail::to<bool>(flag);
      }
      call.key.push_back(flags);
    } else if (kind == 'T' || kind == 'W') {
      read_tensor(handle_of(stack[i]), kind == 'W', call);
    } else if (stack[i]) {
      read_tensor(handle_of(*reinterpret_cast<const StableIValue*>(stack[i])), kind == 'w', call);
    } else {
      call.key.push_back(0);
      call.addresses[call.tensors] = 0;
      call.written[call.tensors++] = false;
    }
  }
}

int64_t number_of(StableListHandle tensors) {
  static std::mutex one_at_a_time;
  static std::unordered_map<Key, int64_t, Hash> known;
  static int64_t given = 0;
  Call call;
  size_t size = 0;
  TORCH_ERROR_CODE_CHECK(torch_list_size(tensors, &size));
  call.key.reserve(6 * size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue item = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(tensors, i, &item));
    const torch::stable::Tensor owned(handle_of(item));
    call.key.push_back(static_cast<int64_t>(describe(owned.get(), call)));
    call.key.push_back(call.device_type);
  }
  const std::lock_guard lock(one_at_a_time);
  if (known.size() >= kMostNumbers && !known.count(call.key)) known.clear();
  const auto [found, is_new] = known.try_emplace(std::move(call.key), given + 1);
  given += is_new;
  return found->second;
}

void drop(const Operator& op, StableIValue* stack) {
  for (size_t i = 0; i < op.kinds.size(); ++i) {
    const char kind = op.kinds[i];
    if (kind == 'T' || kind == 'W') {
      TORCH_ERROR_CODE_CHECK(aoti_torch_delete_tensor_object(handle_of(stack[i])));
    } else if (kind == 't' || kind == 'w') {
      torch::stable::detail::to<std::optional<torch::stable::Tensor>>(stack[i]);
    } else if (kind == 'l') {
      TORCH_ERROR_CODE_CHECK(torch_delete_list(reinterpret_cast<StableListHandle>(stack[i])));
    }
  }
}

std::shared_ptr<const Plan> find(Operator& op, const Call& call) {
  std::shared_ptr<const Plan> plan;
  {
    const std::shared_lock lock(op.mutex);
    const auto found = op.plans.find(call.key);
    if (found == op.plans.end()) return nullptr;
    plan = found->second;
  }
  for (size_t i = 0; i < call.tensors; ++i) {
    if (!call.written[i]) continue;
    const uint64_t begin = call.addresses[i], end = begin + plan->extents[i];
    for (size_t j = 0; j < call.tensors; ++j)
      if (j != i && call.addresses[j] < end && begin < call.addresses[j] + plan->extents[j]) return nullptr;
  }
  return plan;
}

bool has_driver() { return driver().launch && driver().current_context; }

bool has_context() {
  void* context = nullptr;
  return driver().current_context(&context) == 0 && context;
}

torch::stable::Tensor allocated(const Call& call, const int64_t* sizes, const int64_t* strides, size_t dim,
                                int32_t dtype) {
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(dim), sizes, strides, dtype, call.device_type, call.device, &made));
  return torch::stable::Tensor(made);
}

std::vector<torch::stable::Tensor> replay(const Plan& plan, const Call& call, void* stream) {
  const auto address_of = [](const torch::stable::Tensor& t) {
    return reinterpret_cast<uint64_t>(t.mutable_data_ptr());
  };
  std::vector<torch::stable::Tensor> results;
  results.reserve(plan.results.size());
  uint64_t made[kMostResults], base = 0;
  for (const Result& r : plan.results) {
    results.push_back(allocated(call, r.sizes.data(), r.strides.data(), r.sizes.size(), r.dtype));
    made[results.size() - 1] = address_of(results.back());
  }
  std::optional<torch::stable::Tensor> scratch;
  if (plan.scratch) {
    const int64_t one = 1;
    scratch = allocated(call, &plan.scratch, &one, 1, aoti_torch_dtype_uint8());
    base = address_of(*scratch);
  }
  for (const Launch& step : plan.launches) {
    uint64_t values[kMostParameters];
    void* parameters[kMostParameters];
    std::memcpy(values, step.values.data(), 8 * step.values.size());
    for (size_t i = 0; i < step.values.size(); ++i) parameters[i] = &values[i];
    for (const Place& place : step.places)
      values[place.parameter] = place.source == kArgument ? call.addresses[place.which]
                                : place.source == kResult ? made[place.which]
                                                          : base + static_cast<uint64_t>(place.which);
    const LaunchConfig config = {
        step.grid[0], step.grid[1], step.grid[2], step.threads, 1, 1, step.shared_bytes, stream, nullptr, 0};
    if (const int error = driver().launch(&config, step.function, parameters, nullptr)) {
      const char* text = nullptr;
      if (driver().error_string) driver().error_string(error, &text);
      throw LaunchFailure(std::string("Triton Error [CUDA]: ") + (text ? text : std::to_string(error).c_str()));
    }
  }
  return results;
}

}  // namespace stella::launch
