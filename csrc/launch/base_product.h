// What a layer asks of torch beside its launches: the base's product, and a seed.
#pragma once

#include "launch/plans.h"

namespace stella::launch {

inline uint64_t address_of(const torch::stable::Tensor& t) { return reinterpret_cast<uint64_t>(t.mutable_data_ptr()); }

// y = x Wᵀ + b by torch's own linear, of the first three arguments; autocast has its say.
torch::stable::Tensor linear_product(const StableIValue* stack);

// a @ b by torch's own matmul.
torch::stable::Tensor product(StableIValue a, StableIValue b);

// As torch.randint(2**63 - 1, (), dtype=torch.int64) draws it, from the default generator of the call's device.
torch::stable::Tensor drawn_seed(const Call& call);

// Whether the base product is what the plan was made with: of that dtype, contiguous, aligned.
bool expects(const Plan& plan, const torch::stable::Tensor& y);

}  // namespace stella::launch
