// What is not about tensors: how the library was built, which kernels were chosen, what they do with a shape.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/kernels.h"

namespace py = pybind11;

namespace {

std::vector<std::string> listed(const char* const* names) {
  std::vector<std::string> list;
  for (; *names; ++names) list.emplace_back(*names);
  return list;
}

stella::Storage storage_of(const std::string& dtype) {
  if (dtype == "float32") return stella::Storage::float32;
  if (dtype == "float64") return stella::Storage::float64;
  if (dtype == "bfloat16") return stella::Storage::bfloat16;
  if (dtype == "float16") return stella::Storage::float16;
  throw py::value_error("dtype: found '" + dtype + "', wanted 'float32', 'float64', 'bfloat16' or 'float16'.");
}

py::dict plan(int64_t n, int64_t r, const std::string& dtype, bool two_operands) {
  if (r < 1 || n < r)
    throw py::value_error("n, r: found (" + std::to_string(n) + ", " + std::to_string(r) + "), wanted n >= r >= 1.");
  const stella::Plan p = stella::kernels().plan(n, r, storage_of(dtype), two_operands);
  py::dict d;
  d["chunk_rows"] = p.chunk_rows;
  d["block_rows"] = p.block_rows;
  d["gram_tile"] = py::make_tuple(p.gram_rows, p.gram_columns);
  d["combine_tile"] = py::make_tuple(p.combine_columns, p.combine_vectors);
  return d;
}

}  // namespace

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "How stella_kernels' CPU library was built and what it chose on this machine.";
  m.attr("compiler") = STELLA_COMPILER;
  m.attr("torch_at_build") = STELLA_TORCH_VERSION;
  m.def(
      "instruction_sets", [] { return listed(stella::built_instruction_sets()); }, "Those in this build, best first.");
  m.def(
      "instruction_sets_here", [] { return listed(stella::instruction_sets_here()); }, "Those of them that run here.");
  m.def("instruction_set", [] { return std::string(stella::kernels().name); }, "The one that serves here.");
  m.def("vector_bytes", [] { return stella::kernels().vector_bytes; }, "Bytes of a vector register of that set.");
  m.def("plan", &plan, py::arg("n"), py::arg("r"), py::arg("dtype") = "float32", py::arg("two_operands") = false,
        "What the kernels do with an (n, r) matrix: rows packed at a time (chunk_rows), rows of a unit of work when "
        "threads share it (block_rows), register tiles. two_operands is true for project-and-retract.");
}
