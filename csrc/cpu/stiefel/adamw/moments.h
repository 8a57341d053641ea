// AdamW's moments and step, element by element.
#pragma once

#include "common/panel.h"

namespace stella::STELLA_ISA {
namespace {

template <typename T>
struct Moments {
  T keep1, keep2, add2, rate, root_correction, epsilon, sign;

  explicit Moments(const AdamwJob& job)
      : keep1(static_cast<T>(1.0 - job.beta1)),
        keep2(static_cast<T>(job.beta2)),
        add2(static_cast<T>(1.0 - job.beta2)),
        rate(static_cast<T>(-job.learning_rate / job.correction1 / job.divisor)),
        root_correction(static_cast<T>(1.0 / __builtin_sqrt(job.correction2))),
        epsilon(static_cast<T>(job.epsilon)),
        sign(static_cast<T>(job.sign)) {}

  // A vector of Riemannian gradients becomes one of steps; the moments are advanced where they are.
  template <typename V>
  STELLA_INLINE V advance(V gradient, T* first, T* second) const {
    const V g = gradient * sign, m0 = load<V>(first);
    const V m = m0 + keep1 * (g - m0), v = keep2 * load<V>(second) + add2 * g * g;
    store(first, m);
    store(second, v);
    return rate * m / (square_root(v) * root_correction + epsilon);
  }

  // Riemannian gradients in `values` become steps; the moments are advanced in their own storage.
  template <typename S>
  void advance(T* __restrict values, S* __restrict first, S* __restrict second, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      const T g = values[i] * sign;
      const T m0 = static_cast<T>(widen(first[i]));
      const T m = m0 + keep1 * (g - m0);
      const T v = keep2 * static_cast<T>(widen(second[i])) + add2 * g * g;
      first[i] = Narrow<S>::from(m);
      second[i] = Narrow<S>::from(v);
      T root;
      if constexpr (std::is_same_v<T, float>)
        root = __builtin_sqrtf(v);
      else
        root = __builtin_sqrt(v);
      values[i] = rate * m / (root * root_correction + epsilon);
    }
  }
};

}  // namespace
}  // namespace stella::STELLA_ISA
