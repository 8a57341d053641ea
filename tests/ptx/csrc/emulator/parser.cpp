// PTX text to a Program. Names are looked up in the scopes they stand in, as inline assembly opens scopes of its own.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "program.h"

namespace ptx {
namespace {

std::string trimmed(const std::string& text) {
  const char* blank = " \t\r\n";
  const size_t first = text.find_first_not_of(blank);
  return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(blank) - first + 1);
}

bool starts(const std::string& text, const char* with) { return text.rfind(with, 0) == 0; }

// Without comments and the lines that tell debuggers where code comes from.
std::string stripped(const std::string& text) {
  std::string bare;
  for (size_t i = 0; i < text.size();) {
    if (text.compare(i, 2, "//") == 0) {
      i = std::min(text.find('\n', i), text.size());
    } else if (text.compare(i, 2, "/*") == 0) {
      i = text.find("*/", i) + 2;
    } else {
      bare += text[i++];
    }
  }
  std::string kept;
  for (size_t i = 0; i < bare.size();) {
    const size_t end = std::min(bare.find('\n', i), bare.size());
    const std::string line = trimmed(bare.substr(i, end - i));
    if (!starts(line, ".loc") && !starts(line, ".file")) kept += line + "\n";
    i = end + 1;
  }
  return kept;
}

// At the separators that no bracket encloses.
std::vector<std::string> parts(const std::string& text, const char* separators) {
  std::vector<std::string> found(1);
  int depth = 0;
  for (char c : text) {
    depth += (c == '{' || c == '[' || c == '(') - (c == '}' || c == ']' || c == ')');
    if (depth == 0 && std::strchr(separators, c)) {
      found.emplace_back();
    } else {
      found.back() += c;
    }
  }
  for (auto& part : found) part = trimmed(part);
  if (found.size() == 1 && found[0].empty()) found.clear();
  return found;
}

std::vector<std::string> words_of(const std::string& text) {
  auto words = parts(text, " \t\n");
  words.erase(std::remove(words.begin(), words.end(), ""), words.end());
  return words;
}

int bytes_of(const std::string& type) {
  if (type == ".pred") return 1;
  for (int bits : {8, 16, 32, 64}) {
    if (type == ".b" + std::to_string(bits) || type == ".u" + std::to_string(bits) ||
        type == ".s" + std::to_string(bits) || type == ".f" + std::to_string(bits)) {
      return bits / 8;
    }
  }
  throw Fault("a type that is not known: " + type);
}

const char* const kSpecial[] = {"%tid.x",   "%tid.y",   "%tid.z",    "%ntid.x",   "%ntid.y",   "%ntid.z", "%ctaid.x",
                                "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid"};

constexpr uint32_t kNowhere = ~0u;

class Parser {
 public:
  explicit Parser(const std::string& text) : text_(stripped(text)) {}

  Program program() {
    const size_t entry = text_.find(".entry");
    if (entry == std::string::npos) throw Fault("no kernel in the text");
    if (text_.find(".entry", entry + 1) != std::string::npos) throw Fault("more than one kernel in the text");
    if (text_.find(".func") != std::string::npos) throw Fault("a device function, which is not known");
    shared_symbols(text_.substr(0, entry));
    const size_t open = text_.find('(', entry);
    const size_t close = text_.find(')', open);
    program_.name = trimmed(text_.substr(entry + 6, open - entry - 6));
    parameters(text_.substr(open + 1, close - open - 1));
    body(text_.find('{', close));
    for (auto& instruction : program_.code) {
      if (instruction.flow != Instruction::Flow::kBranch) continue;
      const auto label = labels_.find(targets_[instruction.index]);
      if (label == labels_.end()) instruction.fault("no such label");
      instruction.target = label->second;
    }
    return std::move(program_);
  }

 private:
  struct Register {
    int width;
    uint32_t place;
  };

  void shared_symbols(const std::string& head) {
    uint64_t extern_at = 0;
    std::vector<std::string> dynamic;
    for (const auto& statement : parts(head, ";")) {
      const size_t at = statement.find(".shared");
      if (at == std::string::npos) continue;  // memory of the module is not known, where an instruction names it
      const size_t open = statement.find('[', at);
      std::string name = trimmed(statement.substr(0, open));
      name = name.substr(name.find_last_of(" \t\n") + 1);
      const uint64_t size = std::strtoull(statement.c_str() + open + 1, nullptr, 0);
      if (size == 0) {
        dynamic.push_back(name);
        continue;
      }
      shared_[name] = extern_at;
      extern_at += (size + 15) / 16 * 16;
    }
    for (const auto& name : dynamic) shared_[name] = extern_at;
    program_.static_shared = extern_at;
  }

  void parameters(const std::string& list) {
    int offset = 0;
    for (const auto& declaration : parts(list, ",")) {
      const auto words = words_of(declaration);
      const auto type = std::find(words.begin(), words.end(), ".param");
      if (type == words.end()) throw Fault("a parameter that is not known: " + declaration);
      const Parameter parameter{bytes_of(*(type + 1)), offset};
      parameter_names_[words.back()] = offset;
      program_.parameters.push_back(parameter);
      offset += 8;
    }
  }

  void body(size_t open) {
    scopes_.emplace_back();
    std::string statement;
    for (size_t i = open + 1; i < text_.size() && !scopes_.empty(); ++i) {
      const char c = text_[i];
      const bool fresh = trimmed(statement).empty();
      if (c == '{' && fresh) {
        scopes_.emplace_back();
      } else if (c == '}' && fresh) {
        scopes_.pop_back();
      } else if (c == ':' && trimmed(statement).find_first_of(" \t\n.[{") == std::string::npos) {
        labels_[trimmed(statement)] = static_cast<int>(program_.code.size());
        statement.clear();
      } else if (c == ';') {
        take(trimmed(statement));
        statement.clear();
      } else {
        statement += c;
      }
    }
  }

  void take(const std::string& statement) {
    if (statement.empty() || starts(statement, ".pragma")) return;
    if (starts(statement, ".reg")) {
      declare(statement);
    } else if (statement[0] == '.') {
      throw Fault("a directive that is not known: " + statement);
    } else {
      instruction(statement);
    }
  }

  uint32_t new_place(int width) {
    const uint32_t place = program_.file_bytes;
    program_.file_bytes += width == 1 ? 4 : width * kLanes;
    // lanes begin where vectors of the host do
    program_.file_bytes = (program_.file_bytes + 63) / 64 * 64;
    return place;
  }

  void declare(const std::string& statement) {
    const auto words = words_of(statement);
    const int width = bytes_of(words.at(1));
    const size_t after = statement.find(words[1]) + words[1].size();
    for (const auto& name : parts(statement.substr(after), ",")) {
      const size_t range = name.find('<');
      if (range == std::string::npos) {
        scopes_.back()[name] = {width, kNowhere};
        continue;
      }
      const int count = std::atoi(name.c_str() + range + 1);
      for (int i = 0; i < count; ++i) scopes_.back()[name.substr(0, range) + std::to_string(i)] = {width, kNowhere};
    }
  }

  // A place is given to a register of a range when it is first used: most ranges have gaps.
  Operand named(const std::string& name) {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->find(name);
      if (found == scope->end()) continue;
      if (found->second.place == kNowhere) found->second.place = new_place(found->second.width);
      Operand operand;
      operand.kind = Operand::Kind::kRegister;
      operand.width = found->second.width;
      operand.place = found->second.place;
      return operand;
    }
    throw Fault("a name that is not known: " + name);
  }

  Operand special(const std::string& name) {
    if (!program_.special.count(name)) program_.special[name] = new_place(4);
    Operand operand;
    operand.kind = Operand::Kind::kRegister;
    operand.width = 4;
    operand.place = program_.special[name];
    return operand;
  }

  Operand constant(uint64_t value) {
    Operand operand;
    operand.kind = Operand::Kind::kConstant;
    auto known = constants_.find(value);
    if (known == constants_.end()) {
      const uint32_t place = static_cast<uint32_t>(program_.constants.size());
      program_.constants.resize(place + kConstantBytes);
      uint8_t* at = program_.constants.data() + place;
      for (int lane = 0; lane < kLanes; ++lane) {
        std::memcpy(at + 8 * lane, &value, 8);
        std::memcpy(at + kConstant4 + 4 * lane, &value, 4);
        std::memcpy(at + kConstant2 + 2 * lane, &value, 2);
      }
      known = constants_.emplace(value, place).first;
    }
    operand.place = known->second;
    return operand;
  }

  static bool number(const std::string& text, uint64_t& value) {
    if (text.empty()) return false;
    const bool exact = text.size() > 2 && text[0] == '0' && std::strchr("fFdD", text[1]);
    char* end = nullptr;
    const char* begin = text.c_str() + (exact ? 2 : 0);
    if (text[0] == '-') {
      value = static_cast<uint64_t>(std::strtoll(begin, &end, 0));
    } else {
      value = std::strtoull(begin, &end, exact ? 16 : 0);
    }
    if (*end == 'U') ++end;
    return *end == 0;
  }

  Operand memory(const std::string& inside) {
    Operand operand;
    operand.kind = Operand::Kind::kMemory;
    const auto terms = parts(inside, "+");
    for (const auto& term : terms) {
      uint64_t value = 0;
      if (number(term, value)) {
        operand.displacement += static_cast<int64_t>(value);
      } else if (parameter_names_.count(term)) {
        operand.kind = Operand::Kind::kParameter;
        operand.displacement += parameter_names_[term];
      } else if (shared_.count(term)) {
        operand.displacement += static_cast<int64_t>(shared_[term]);
      } else {
        const Operand base = named(term);
        operand.based = true;
        operand.width = base.width;
        operand.place = base.place;
      }
    }
    return operand;
  }

  Operand operand(const std::string& text) {
    uint64_t value = 0;
    if (text == "_") return {};
    if (text[0] == '{') {
      Operand list;
      list.kind = Operand::Kind::kList;
      for (const auto& part : parts(text.substr(1, text.rfind('}') - 1), ",")) list.list.push_back(operand(part));
      return list;
    }
    if (text[0] == '[') return memory(text.substr(1, text.rfind(']') - 1));
    if (number(text, value)) return constant(value);
    if (shared_.count(text)) return constant(shared_[text]);
    if (std::find(std::begin(kSpecial), std::end(kSpecial), text) != std::end(kSpecial)) return special(text);
    return named(text);
  }

  void instruction(const std::string& statement) {
    Instruction made;
    made.text = statement;
    std::replace(made.text.begin(), made.text.end(), '\n', ' ');
    made.index = static_cast<int>(program_.code.size());
    std::string rest = statement;
    if (rest[0] == '@') {
      const size_t end = rest.find_first_of(" \t\n");
      made.guarded = true;
      made.guard_negated = rest[1] == '!';
      made.guard = named(rest.substr(made.guard_negated ? 2 : 1, end - (made.guard_negated ? 2 : 1)));
      rest = trimmed(rest.substr(end));
    }
    const size_t end = std::min(rest.find_first_of(" \t\n"), rest.size());
    made.opcode = rest.substr(0, end);
    made.modifiers = parts(made.opcode, ".");
    rest = trimmed(rest.substr(end));
    if (made.modifiers[0] == "bra") {
      made.flow = Instruction::Flow::kBranch;
      targets_[made.index] = rest;
    } else {
      for (const auto& text : parts(rest, ",|")) made.operands.push_back(operand(text));
    }
    bind(made, program_);
    program_.code.push_back(std::move(made));
  }

  std::string text_;
  Program program_;
  std::vector<std::unordered_map<std::string, Register>> scopes_;
  std::unordered_map<std::string, int> labels_;
  std::unordered_map<int, std::string> targets_;
  std::unordered_map<std::string, int> parameter_names_;
  std::unordered_map<std::string, uint64_t> shared_;
  std::unordered_map<uint64_t, uint32_t> constants_;
};

}  // namespace

Program parse(const std::string& text) { return Parser(text).program(); }

}  // namespace ptx
