#include "launch/base_product.h"

#include <cstdint>
#include <limits>
#include <optional>

namespace stella::launch {

namespace {

using torch::stable::Tensor;
using torch::stable::detail::from;

AtenTensorHandle handle_of(StableIValue value) { return reinterpret_cast<AtenTensorHandle>(value); }

// A reference of its own to an argument, for a callee to drop.
StableIValue again(StableIValue tensor) {
  AtenTensorHandle own = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_of(tensor), &own));
  return reinterpret_cast<StableIValue>(own);
}

Tensor called(const char* name, const char* overload, StableIValue* stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION));
  return Tensor(handle_of(stack[0]));
}

}  // namespace

Tensor linear_product(const StableIValue* given) {
  std::optional<Tensor> b;
  if (given[2]) b = Tensor(handle_of(again(*reinterpret_cast<const StableIValue*>(given[2]))));
  StableIValue stack[] = {again(given[0]), again(given[1]), from(b)};
  return called("aten::linear", "", stack);
}

Tensor product(StableIValue a, StableIValue b) {
  StableIValue stack[] = {again(a), again(b)};
  return called("aten::matmul", "", stack);
}

Tensor drawn_seed(const Call& call) {
  const Tensor empty = allocated(call, nullptr, nullptr, 0, aoti_torch_dtype_int64());
  const std::optional<int64_t> end = std::numeric_limits<int64_t>::max();
  StableIValue stack[] = {from(empty), from(int64_t{0}), from(end), from(std::nullopt)};
  return called("aten::random_", "from", stack);
}

bool expects(const Plan& plan, const Tensor& y) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(y.get(), &dtype));
  return dtype == plan.accumulated && y.is_contiguous() && address_of(y) % 16 == 0;
}

}  // namespace stella::launch
