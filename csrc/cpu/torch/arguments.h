// What the operators ask of their arguments, all of it before anything is written: a message names the argument, what
// was found and what is wanted. stella_kernels/operators/arguments.py asks the same of every other backend's.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <ostream>
#include <string>
#include <vector>

#include "torch/bindings.h"

namespace stella::bindings {

// An argument, or one of its tensors where it is a list.
struct Argument {
  const char* op;
  const char* name;
  int64_t index = -1;
};

inline std::ostream& operator<<(std::ostream& out, const Argument& a) {
  out << a.op << ": " << a.name;
  if (a.index >= 0) out << '[' << a.index << ']';
  return out << ": ";
}

// The same inside a sentence.
inline std::string called(const Argument& a) {
  return a.index < 0 ? a.name : std::string(a.name) + "[" + std::to_string(a.index) + "]";
}

inline std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + (t.dim() == 1 ? ",)" : ")");
}

inline std::string dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(t.scalar_type());
  }
}

inline Storage storage_of(const Tensor& t, const Argument& a) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Storage::float32;
    case ScalarType::Double:
      return Storage::float64;
    case ScalarType::BFloat16:
      return Storage::bfloat16;
    case ScalarType::Half:
      return Storage::float16;
    case ScalarType::ComplexHalf:
    case ScalarType::ComplexFloat:
    case ScalarType::ComplexDouble:
      STD_TORCH_CHECK(false, a, "found ", dtype_of(t), ", wanted a real one: complex factors are not supported.");
    default:
      STD_TORCH_CHECK(false, a, "found ", dtype_of(t), ", wanted float32, float64, bfloat16 or float16; convert it.");
  }
}

// Its storage holds all its elements: what offloads shrinks it under the tensor, and to read that ends the process.
inline void check_in_memory(const Tensor& t, const Argument& a) {
  int64_t last = t.storage_offset(), bytes = 0;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) == 0) return;
    last += (t.size(d) - 1) * t.stride(d);
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  const int64_t wanted = (last + 1) * static_cast<int64_t>(t.element_size());
  STD_TORCH_CHECK(bytes >= wanted, a, "found a storage of ", bytes, " bytes for ", shape_of(t), ", ", dtype_of(t),
                  ", wanted ", wanted, ": it was freed or shrunk, as an offload does; bring it back first.");
}

// (rows, columns) as it is, or seen from its transpose.
inline MatrixView matrix_of(const Tensor& t, const Argument& a, bool transposed = false) {
  STD_TORCH_CHECK(t.is_cpu(), a,
                  "found a tensor of another device, wanted one on the CPU, as the others are; move it.");
  STD_TORCH_CHECK(t.dim() == 2, a, "found ", shape_of(t), ", wanted a matrix.");
  check_in_memory(t, a);
  const int row = transposed ? 1 : 0, column = 1 - row;
  return {data_of(t), t.size(row), t.size(column), t.stride(row), t.stride(column), storage_of(t, a)};
}

inline MatrixView tall_matrix_of(const Tensor& t, const Argument& a) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) >= t.size(1), a, "found ", shape_of(t),
                  ", wanted (n, r) with n >= r; pass a factor that is stored transposed as its .mT view.");
  return matrix_of(t, a);
}

inline void check_counts(const Argument& a, size_t count, const char* first, size_t wanted) {
  STD_TORCH_CHECK(count == wanted, a, "found ", wanted, " and ", count, " tensors in ", first, " and ", a.name,
                  ", wanted as many of each.");
}

inline void check_alike(const Tensor& t, const Argument& a, const Tensor& first, const Argument& b) {
  STD_TORCH_CHECK(t.scalar_type() == first.scalar_type(), a, "found ", dtype_of(t), ", wanted ", dtype_of(first),
                  ", the same dtype as ", called(b), "; convert it.");
  STD_TORCH_CHECK(t.dim() == 2 && first.dim() == 2 && t.size(0) == first.size(0) && t.size(1) == first.size(1), a,
                  "found ", shape_of(t), ", wanted ", shape_of(first), ", the same shape as ", called(b), ".");
}

// Rows of an AdamW step's settings: learning rate, beta1, beta2, epsilon, step, divisor, sign.
constexpr int64_t kHyperparameters = 7;

inline const double* hyperparameters_of(const Tensor& settings, const Argument& a, size_t count) {
  STD_TORCH_CHECK(settings.is_cpu() && settings.dim() == 2 && settings.size(0) == static_cast<int64_t>(count) &&
                      settings.size(1) == kHyperparameters && settings.is_contiguous() &&
                      settings.scalar_type() == ScalarType::Double,
                  a, "found ", shape_of(settings), ", ", dtype_of(settings),
                  ", wanted a contiguous float64 tensor on the CPU of shape (", count, ", ", kHyperparameters,
                  "): learning rate, beta1, beta2, epsilon, step, divisor, sign.");
  return static_cast<const double*>(settings.const_data_ptr());
}

inline void check_step(const double* row, const Argument& a) {
  STD_TORCH_CHECK(row[5] > 0 && row[4] >= 1, a, "found divisor ", row[5], " and step ", row[4],
                  ", wanted a positive divisor, and steps from 1 on.");
}

// Memory that arguments lie in, to be checked together before the first is written.
class Memory {
 public:
  // A matrix that the operator writes: its elements lie apart.
  void written(const MatrixView& m, const Argument& a) {
    STD_TORCH_CHECK(!overlaps_itself(m), a, "found strides (", m.row_stride, ", ", m.col_stride, ") for shape (", m.n,
                    ", ", m.r, "), several elements in one place, wanted memory of its own for each, since it is ",
                    "written; pass a contiguous copy.");
    add(m, a, true);
  }

  void read(const MatrixView& m, const Argument& a) { add(m, a, false); }

  // None that is written shares memory with another.
  void check() {
    std::sort(spans_.begin(), spans_.end(), [](const Span& x, const Span& y) { return x.begin < y.begin; });
    for (size_t i = 0; i < spans_.size(); ++i)
      for (size_t j = i + 1; j < spans_.size() && spans_[j].begin < spans_[i].end; ++j) {
        const Span &x = spans_[i], &y = spans_[j];
        if (!(x.written || y.written) || !meet(x.view, y.view)) continue;
        const Span &one = x.written ? x : y, &other = x.written ? y : x;
        STD_TORCH_CHECK(false, one.argument, "found memory that ", called(other.argument),
                        " has as well, wanted memory of its own, since it is written; pass a clone of one of them.");
      }
  }

 private:
  struct Span {
    intptr_t begin, end;
    MatrixView view;
    Argument argument;
    bool written;
  };

  void add(const MatrixView& m, const Argument& a, bool written) {
    if (m.n == 0 || m.r == 0) return;
    const intptr_t begin = reinterpret_cast<intptr_t>(m.data);
    const int64_t last = (m.n - 1) * m.row_stride + (m.r - 1) * m.col_stride;
    spans_.push_back({begin, begin + (last + 1) * bytes_of(m.storage), m, a, written});
  }

  // i row_stride = j col_stride for some |i| < n, |j| < r not both zero: the smallest such are strides over their gcd.
  static bool overlaps_itself(const MatrixView& m) {
    if (m.n == 0 || m.r == 0) return false;
    if (m.n == 1 || m.r == 1) return (m.n > 1 && m.row_stride == 0) || (m.r > 1 && m.col_stride == 0);
    if (m.row_stride == 0 || m.col_stride == 0) return true;
    const int64_t common = std::gcd(m.row_stride, m.col_stride);
    return m.col_stride / common < m.n && m.row_stride / common < m.r;
  }

  // Whether an element lies in both, where the spans do: columns of one buffer, for example, do not meet.
  static bool meet(const MatrixView& x, const MatrixView& y) {
    const int64_t bytes = bytes_of(x.storage), distance = static_cast<char*>(y.data) - static_cast<char*>(x.data);
    if (x.storage != y.storage || x.row_stride != y.row_stride || x.col_stride != y.col_stride || distance % bytes)
      return meet_anywhere(x, y);
    int64_t far = x.row_stride, near = x.col_stride, far_x = x.n, far_y = y.n, near_x = x.r, near_y = y.r;
    if (far < near) std::swap(far, near), std::swap(far_x, near_x), std::swap(far_y, near_y);
    // distance = i far + j near, with i and j differences of the two's indices.
    const int64_t d = distance / bytes;
    if (near == 0 || far == 0) return meet_anywhere(x, y);
    const int64_t reach = std::max(near_x, near_y) * near;
    const int64_t first = std::max(-(far_y - 1), (d - reach) / far - 1);
    const int64_t last = std::min(far_x - 1, (d + reach) / far + 1);
    for (int64_t i = first; i <= last; ++i) {
      const int64_t rest = d - i * far;
      if (rest % near == 0 && rest / near < near_x && rest / near > -near_y) return true;
    }
    return false;
  }

  // The same for matrices of different strides, by marking the bytes of one.
  static bool meet_anywhere(const MatrixView& x, const MatrixView& y) {
    const int64_t x_bytes = bytes_of(x.storage), y_bytes = bytes_of(y.storage);
    const int64_t size = ((x.n - 1) * x.row_stride + (x.r - 1) * x.col_stride + 1) * x_bytes;
    const int64_t distance = static_cast<char*>(y.data) - static_cast<char*>(x.data);
    std::vector<bool> marked(size);
    for (int64_t i = 0; i < x.n; ++i)
      for (int64_t j = 0; j < x.r; ++j)
        for (int64_t b = 0; b < x_bytes; ++b) marked[(i * x.row_stride + j * x.col_stride) * x_bytes + b] = true;
    for (int64_t i = 0; i < y.n; ++i)
      for (int64_t j = 0; j < y.r; ++j)
        for (int64_t b = 0; b < y_bytes; ++b) {
          const int64_t at = distance + (i * y.row_stride + j * y.col_stride) * y_bytes + b;
          if (at >= 0 && at < size && marked[at]) return true;
        }
    return false;
  }

  std::vector<Span> spans_;
};

}  // namespace stella::bindings
