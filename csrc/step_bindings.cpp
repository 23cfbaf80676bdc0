// Decoding steps of a decoder, bound once to its buffers and called for every token.
#include "step_bindings.h"
#include "step_signature.h"

namespace miras {
namespace {

// ---- buffers ----

// The tensors of StepBuffers, undefined if absent.
struct Buffers {
#define MIRAS_BUFFER_TENSOR(type, name) Tensor name;
  MIRAS_STEP_BUFFERS(MIRAS_BUFFER_TENSOR)
};

// From all buffers in their order
Buffers buffers_of(const std::vector<OptionalTensor>& given) {
  require(given.size() == std::size(kStepBuffers), "the number of buffers is wrong");
  auto next = given.begin();
#define MIRAS_NEXT_BUFFER(type, name) (next++)->value_or(Tensor()),
  return {MIRAS_STEP_BUFFERS(MIRAS_NEXT_BUFFER)};
}

template <class Memory> void fill_buffers(typename Memory::Params& p, const Buffers& x) {
  const auto [K, V] = Memory::shape(p);
  const auto numbers = [](const Tensor& t, const Shape& shape, const char* what) -> float* {
    if (!t.defined()) return nullptr;
    require(is_float(t) && t.has_shape(shape) && t.is_contiguous(), what);
    return t.data<float>();
  };
  StepBuffers& state = p.state;
  const int64_t m = Memory::kMatrices, rows = p.C;
  const Shape matrices{p.N, p.H, m, K, V};
  state.start = numbers(x.start, matrices, "start must be float32 [N, H, m, K, V]");
  state.primal = numbers(x.primal, matrices, "primal must be like start");
  state.written = numbers(x.written, matrices, "written must be like start");
  state.momenta = numbers(x.momenta, matrices, "momenta must be like start");
  state.rho = numbers(x.rho, {p.N, p.H, m}, "rho must be float32 [N, H, m]");
  const RetentionTraits gate = retention_traits(p.retention);
  require(state.start && (state.written || p.C == 1), "the state has no buffer for what an open chunk has written");
  require(bool(state.primal) == !gate.identity && bool(state.rho) == (gate.coupling == Coupling::matrix),
          "primal or rho do not fit the retention gate");

  const bool channels = x.open_log_decay.dim() == 3;
  const Shape decays = channels ? Shape{p.N, p.H, V} : Shape{p.N, p.H};
  state.open_log_decay = numbers(x.open_log_decay, decays, "open_log_decay must be float32 [N, H] or [N, H, Dv]");
  require(!p.log_decay || p.decay_per_channel == channels, "log_decay and open_log_decay must both have channels or none");
  state.width = channels ? int(V) : 1, state.rows = int(rows);

  state.left = numbers(x.left, {p.N, p.H, m, rows, K}, "left must be float32 [N, H, m, C, K]");
  state.right = numbers(x.right, {p.N, p.H, m, rows, V}, "right must be float32 [N, H, m, C, V]");
  state.weights = numbers(x.weights, {p.N, p.H, 2 + rows, state.width}, "weights must be float32 [N, H, 2 + C, 1 or Dv]");
  state.momentum_weights = numbers(x.momentum_weights, {p.N, p.H, 2 + rows}, "momentum_weights must be float32 [N, H, 2 + C]");
  require(state.left && state.right && state.weights, "the state has no buffers for factors");
  require(bool(p.momentum) == bool(state.momenta) && bool(p.momentum) == bool(state.momentum_weights),
          "momentum needs a state with momentum");
  require(x.position.is(kInt64) && x.position.has_shape({p.N}) && x.position.is_contiguous(), "bad position");
  state.position = x.position.data<int64_t>();
}

// ---- steps ----

// Steps of one signature on one decoder's buffers. A call that does not fit does nothing and returns None.
template <class Memory> class Stepper {
 public:
  Stepper(const TokenTuple& tokens, const NormTuple& norm, const std::vector<OptionalTensor>& buffers, const RuleTuple& rules,
          bool check_values)
      : Stepper(Tokens(tokens), norm, buffers, rules, check_values) {}
  Stepper(const Stepper&) = delete;

  py::object step(py::handle q, py::handle k, py::handle v, py::handle lr, py::handle log_decay, py::handle delta, py::handle momentum,
                  py::handle out_) {
    const View out(out_);
    Signature::Call call{q, k, v, lr, log_decay, delta, momentum};
    if (!(out_.is_none() || signature_.fits_out(out_, out)) || !signature_.fill(p_, call)) return py::none();
    const bool in_place = out.defined() && are_channels_together(out);
    const Tensor result = in_place ? Tensor() : signature_.new_out();
    p_.out = tokens(in_place ? out : result);
    run<Memory>(p_, kernels_);
    if (in_place) return py::reinterpret_borrow<py::object>(out_);
    return out.defined() ? out_.attr("copy_")(result.object()) : py::reinterpret_borrow<py::object>(result.object());
  }

 private:
  Stepper(const Tokens& x, const NormTuple& norm, const std::vector<OptionalTensor>& buffers, const RuleTuple& rules, bool check_values)
      : kernels_(cpu::kernels()), norm_(norm), buffers_(buffers_of(buffers)), signature_(x, check_values) {
    fill_tokens(p_, x, {}, rules, 0);
    const Tensor &start = buffers_.start, &q = x.q, &v = x.v;
    require(start.dim() == 5, "start must be float32 [N, H, m, K, V]");
    Memory::fill(p_, start.size(3), start.size(4));
    require(start.size(4) == v.size(3) && (Memory::kMatrices == 2 ? start.size(4) : start.size(3)) == q.size(3),
            "start does not fit q and v");
    fill_norm(p_, norm_);
    fill_buffers<Memory>(p_, buffers_);
  }

  typename Memory::Params p_;
  const cpu::Kernels& kernels_;
  NormTuple norm_;
  Buffers buffers_;
  Signature signature_;
};

template <class Memory> void bind_stepper(py::module_& m, const char* name) {
  using namespace pybind11::literals;
  py::class_<Stepper<Memory>>(m, name)
      .def(py::init<const TokenTuple&, const NormTuple&, const std::vector<OptionalTensor>&, const RuleTuple&, bool>(), "tokens"_a,
           "norm"_a, "buffers"_a, "rules"_a, "check_values"_a)
      .def("__call__", &Stepper<Memory>::step);
}

}  // namespace

void bind_steps(py::module_& m) {
  using namespace pybind11::literals;
  bind_stepper<Linear>(m, "LinearStepper");
  bind_stepper<Mlp>(m, "MlpStepper");
}

}  // namespace miras
