#include "table.h"

namespace ptx {

const Table& table() {
  static const Table known = [] {
    Table made;
    add_integers(made);
    add_logic(made);
    add_floats(made);
    add_conversions(made);
    add_warp_wide(made);
    return made;
  }();
  return known;
}

namespace {

void nothing(const Instruction&, Warp&, uint32_t) {}

void trap(const Instruction& in, Warp&, uint32_t) { in.fault("a trap"); }

void check(const Instruction& in, const std::vector<int>& widths) {
  if (in.operands.size() != widths.size()) in.fault("another number of operands than is known");
  for (size_t i = 0; i < widths.size(); ++i) {
    const Operand& operand = in.operands[i];
    if (widths[i] == kAny) continue;
    const bool fits = operand.kind == Operand::Kind::kRegister ? operand.width == widths[i]
                                                               : i > 0 && operand.kind == Operand::Kind::kConstant;
    if (!fits) in.fault("operand " + std::to_string(i) + " is of another kind than is known");
  }
}

}  // namespace

void bind(Instruction& in, Program& program) {
  const std::string& op = in.opcode;
  if (in.guarded && in.guard.width != kPredicate) in.fault("a guard that is no predicate");
  if (op == "bra" || op == "bra.uni") {
    in.flow = Instruction::Flow::kBranch;
  } else if (op == "ret" || op == "exit") {
    in.flow = Instruction::Flow::kExit;
  } else if (op == "bar.sync" || op == "barrier.sync" || op == "barrier.sync.aligned") {
    const Operand* which = in.operands.size() == 1 ? &in.operands[0] : nullptr;
    if (!which || which->kind != Operand::Kind::kConstant || program.constants[which->place] != 0) {
      in.fault("a barrier of another kind than is known");
    }
    in.flow = Instruction::Flow::kBarrier;
    in.barrier = program.barriers++;
  } else if (op == "bar.warp.sync" || op == "membar.gl" || op == "membar.cta" || op == "fence.acq_rel.gpu") {
    in.run = nothing;  // lanes of a warp run together, and memory is in order
  } else if (op == "trap") {
    in.run = trap;
  } else if (!bind_access(in, program)) {
    auto found = table().find(op + "(3)");  // where there is one of two operands and one of three
    if (found == table().end() || in.operands.size() != 4) found = table().find(op);
    if (found == table().end()) in.fault("an instruction that is not known");
    check(in, found->second.widths);
    in.run = found->second.run;
  }
}

}  // namespace ptx
