#include "compile.h"

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <stdexcept>

namespace miras {
namespace {

constexpr int kInputs = 3;  // e, norm2, delta; of a gate only the first, A
constexpr int kError = 0, kNorm2 = 1, kDelta = 2;
constexpr size_t kMaxValues = 2048;  // of one program, far more than Python lets pass

#define MIRAS_OPERATION_ROW(name, operands) {#name, operands},
constexpr std::pair<const char*, int> kOperations[] = {MIRAS_OPERATIONS(MIRAS_OPERATION_ROW)};

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("miras_kernels._C: a program ") + what);
}

struct Node {
  Operation operation = Operation::copy;  // of inputs and constants: unused
  int count = 0;                          // of operands
  std::array<int, 3> operands = {};
  auto operator<=>(const Node&) const = default;
};

// The nodes of both programs, equal ones shared: inputs first, then constants and instructions as they come.
struct Nodes {
  std::vector<Node> all = std::vector<Node>(kInputs);
  std::map<int, int> constant;  // node -> its place in `constants`
  std::vector<float> constants;
  std::map<Node, int> known;
  std::map<float, int> numbers;

  int number(double value) {
    const float x = float(value);
    require(x == x, "has a constant that is not a number");
    const auto [found, fresh] = numbers.try_emplace(x, int(all.size()));
    if (fresh) {
      constant[found->second] = int(constants.size());
      constants.push_back(x), all.emplace_back();
    }
    return found->second;
  }

  // The nodes of a program's outputs
  std::vector<int> add(int inputs, const StraightLine& program, int outputs) {
    require(program.constants.size() + program.instructions.size() <= kMaxValues, "is too long");
    std::vector<int> values = {kError, kNorm2, kDelta};
    values.resize(size_t(inputs));
    for (const double x : program.constants) values.push_back(number(x));
    const auto value = [&](int i) {
      require(i >= 0 && size_t(i) < values.size(), "refers to a value that it does not have");
      return values[size_t(i)];
    };
    for (const auto& [name, operands] : program.instructions) {
      const auto* found = std::find_if(std::begin(kOperations), std::end(kOperations), [&](auto& row) { return name == row.first; });
      require(found != std::end(kOperations), "has an unknown operation");
      require(operands.size() == size_t(found->second), "has an operation with a wrong number of operands");
      Node node{Operation(found - std::begin(kOperations)), found->second, {}};
      std::transform(operands.begin(), operands.end(), node.operands.begin(), value);
      if (node.operation == Operation::power) {
        const auto exponent = constant.find(node.operands[1]);
        require(exponent != constant.end() && constants[size_t(exponent->second)] > 0, "has an exponent that is not a positive constant");
      }
      const auto [at, fresh] = known.try_emplace(node, int(all.size()));
      if (fresh) all.push_back(node);
      values.push_back(at->second);
    }
    require(program.outputs.size() == size_t(outputs), "has a wrong number of outputs");
    std::vector<int> nodes;
    std::transform(program.outputs.begin(), program.outputs.end(), std::back_inserter(nodes), value);
    return nodes;
  }

  bool depends(int node, int input) const {
    std::vector<bool> found(all.size());
    found[size_t(input)] = true;
    for (size_t i = kInputs; i < all.size(); ++i)
      for (int k = 0; k < all[i].count; ++k) found[i] = found[i] || found[size_t(all[i].operands[size_t(k)])];
    return found[size_t(node)];
  }
};

// The instructions of one stage.
class Writer {
 public:
  std::vector<Instruction> rows, elements;
  int row_vectors = kGiven, vectors = kGiven;

  // `psi`: its node, if the stage is given it, else -1
  Writer(const Nodes& nodes, bool delta_per_channel, int psi)
      : nodes_(nodes), place_(nodes.all.size(), kNowhere), varies_(nodes.all.size()) {
    varies_[kError] = true, varies_[kDelta] = delta_per_channel;
    for (size_t i = kInputs; i < varies_.size(); ++i)
      for (int k = 0; k < nodes.all[i].count; ++k) varies_[i] = varies_[i] || varies_[size_t(nodes.all[i].operands[size_t(k)])];
    place_[kError] = 0, place_[kNorm2] = 0, place_[kDelta] = 1;
    for (const auto& [node, at] : nodes.constant) place_[size_t(node)] = at;
    if (psi >= kInputs && varies(psi)) place_[size_t(psi)] = kPsi;
  }

  // Writes what the outputs need, so that values live shortly; `to`: the vector of the only output, or -1. Returns the outputs' vectors.
  std::vector<int> write(const std::vector<int>& outputs, int to) {
    std::vector<int> order;
    std::vector<bool> seen(place_.size());
    const std::function<void(int)> visit = [&](int node) {
      if (seen[size_t(node)] || place_[size_t(node)] != kNowhere) return;
      seen[size_t(node)] = true;
      for (int k = 0; k < at(node).count; ++k) visit(at(node).operands[size_t(k)]);
      order.push_back(node);
    };
    for (const int node : outputs) visit(node);

    std::map<int, size_t> last_use;
    for (size_t i = 0; i < order.size(); ++i)
      for (int k = 0; k < at(order[i]).count; ++k) last_use[at(order[i]).operands[size_t(k)]] = i;
    for (const int node : outputs) last_use[node] = order.size();

    for (size_t i = 0; i < order.size(); ++i) {
      const int node = order[i];
      if (varies(node)) {  // operands read for the last time leave their place to the result
        for (int k = 0; k < at(node).count; ++k) {
          const int operand = at(node).operands[size_t(k)];
          if (varies(operand) && place_[size_t(operand)] >= kGiven && last_use[operand] == i) release(place_[size_t(operand)]);
        }
      }
      const Instruction instruction = encode(node);  // while the operands' places are known
      place_[size_t(node)] = !varies(node) ? row_vectors++ : to >= 0 && node == outputs[0] ? to : take();
      (varies(node) ? elements : rows).push_back(instruction);
      (varies(node) ? elements : rows).back().to = uint16_t(place_[size_t(node)]);
    }

    std::vector<int> found;
    for (const int node : outputs) {
      if (varies(node) && (to < 0 || place_[size_t(node)] == to)) {
        found.push_back(place_[size_t(node)]);
      } else if (to < 0 && is_zero(node)) {
        found.push_back(-1);
      } else {
        found.push_back(to < 0 ? take() : to);
        Instruction copy{Operation::copy, uint8_t(!varies(node)), uint16_t(found.back()), {}};
        copy.operands[0] = operand(node, true);
        elements.push_back(copy);
      }
    }
    return found;
  }

 private:
  static constexpr int kNowhere = -1;

  const Node& at(int node) const { return nodes_.all[size_t(node)]; }
  bool varies(int node) const { return varies_[size_t(node)]; }
  bool is_constant(int node) const { return nodes_.constant.contains(node); }
  bool is_zero(int node) const { return is_constant(node) && nodes_.constants[size_t(place_[size_t(node)])] == 0.0f; }

  // A scalar's number among those that `elements` sees; `rows` reads the others as vectors.
  uint16_t operand(int node, bool in_elements) const {
    const bool shifted = in_elements && !varies(node) && !is_constant(node);
    return uint16_t(place_[size_t(node)] + (shifted ? int(nodes_.constants.size()) : 0));
  }
  Instruction encode(int node) const {
    Instruction x{at(node).operation, 0, 0, {}};
    for (int k = 0; k < at(node).count; ++k) {
      const int from = at(node).operands[size_t(k)];
      x.operands[k] = operand(from, varies(node));
      if (is_constant(from) || (varies(node) && !varies(from))) x.scalars = uint8_t(x.scalars | 1 << k);
    }
    return x;
  }
  int take() {
    if (free_.empty()) return vectors++;
    const int found = free_.back();
    free_.pop_back();
    return found;
  }
  void release(int vector) {
    if (std::find(free_.begin(), free_.end(), vector) == free_.end()) free_.push_back(vector);
  }

  const Nodes& nodes_;
  std::vector<int> place_;  // among the constants, the vectors of `rows` or those of `elements`
  std::vector<bool> varies_;
  std::vector<int> free_;
};

}  // namespace

CompiledProgram::CompiledProgram(int inputs, const StraightLine& psi, const StraightLine& derivatives) {
  require(inputs == 1 || inputs == kInputs, "has 1 or 3 inputs");
  Nodes nodes;
  const std::vector<int> value = nodes.add(inputs, psi, 1), derived = nodes.add(inputs, derivatives, inputs);
  program_.inputs = inputs;
  code_.reserve(8);
  const auto keep = [this](std::vector<Instruction>&& code, int vectors) {
    code_.push_back(std::move(code));
    return Code{code_.back().data(), int(code_.back().size()), vectors};
  };
  const auto stage = [&](const std::vector<int>& outputs, bool per_channel, bool given_psi) {
    Writer writer(nodes, per_channel, given_psi ? value[0] : -1);
    const std::vector<int> found = writer.write(outputs, given_psi ? -1 : kPsi);
    Stage x{keep(std::move(writer.rows), writer.row_vectors), keep(std::move(writer.elements), writer.vectors), {-1, -1, -1}};
    std::copy(found.begin(), found.end(), x.outputs);
    return x;
  };
  for (int per_channel = 0; per_channel < 2; ++per_channel) {
    program_.value[per_channel] = stage(value, per_channel != 0, false);
    program_.derivatives[per_channel] = stage(derived, per_channel != 0, true);
  }
  constants_ = nodes.constants;
  program_.constants = constants_.data(), program_.constant_count = int(constants_.size());
  const auto any = [&](int input) {
    return nodes.depends(value[0], input) || std::any_of(derived.begin(), derived.end(), [&](int x) { return nodes.depends(x, input); });
  };
  program_.couples_row = any(kNorm2), program_.uses_delta = any(kDelta);
}

std::vector<std::pair<std::string, int>> operations() { return {std::begin(kOperations), std::end(kOperations)}; }

}  // namespace miras
