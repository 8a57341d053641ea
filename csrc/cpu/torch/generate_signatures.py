"""Write the C++ side of the operators' signatures: ``generate_signatures.py SIGNATURES.PY HEADER``.

For each operator a struct of references to its arguments, and a function template that takes them one by one, as
torch's dispatcher hands them over, for a kernel that takes the struct. Run by CMake; nothing but Python is needed.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_TYPES = {
    "Tensor": "const Tensor&",
    "Tensor | None": "const std::optional<Tensor>&",
    "list[Tensor]": "const std::vector<Tensor>&",
    "str": "const std::string&",
    "float": "double",
    "bool": "bool",
    "list[float]": "const std::vector<double>&",
    "list[bool]": "const std::vector<bool>&",
}


def header(definitions: Path) -> str:
    """The whole header."""
    spec = importlib.util.spec_from_file_location("signatures", definitions)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["signatures"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    lines = [
        f"// Made from {definitions.name} by generate_signatures.py: what each operator is called with.",
        "#pragma once",
        "",
        "#include <torch/csrc/stable/tensor.h>",
        "",
        "#include <optional>",
        "#include <string>",
        "#include <vector>",
        "",
        "namespace stella::signatures {",
        "",
        "using torch::stable::Tensor;",
    ]
    for signature in (*module.SIGNATURES, *module.PHASES):
        arguments = {name: _TYPES[kind] for name, kind in signature.arguments().items()}
        lines += ["", f"struct {signature.__name__} {{"]
        lines += [f'  static constexpr const char* op = "{signature.name}";']
        lines += [f"  {kind} {name};" for name, kind in arguments.items()]
        lines += ["};", "", "template <auto kernel>", f"auto {signature.name}("]
        lines += [",\n".join(f"    {kind} {name}" for name, kind in arguments.items()) + ") {"]
        lines += [f"  return kernel(::stella::signatures::{signature.__name__}{{{', '.join(arguments)}}});", "}"]
    return "\n".join([*lines, "", "}  // namespace stella::signatures", ""])


if __name__ == "__main__":
    definitions, out = map(Path, sys.argv[1:])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(header(definitions))
