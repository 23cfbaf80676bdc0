// Decoding steps: a decoder's, bound once to its buffers and called for every token, and a short call's, on a state as a value.
#include "step_bindings.h"

#include <array>
#include <cmath>

#include "cpu/capability.h"
#include "tensors.h"

namespace miras {
namespace {

namespace py = pybind11;

// How many elements of a state are worth a thread.
constexpr int64_t kGrain = int64_t(1) << 16;

// ---- the two memories ----

struct Linear {
  using Params = LinearStep;
  static constexpr int kMatrices = 1;
  static auto kernel(const cpu::Kernels& kernels) { return kernels.linear_step; }
  static void fill(LinearStep& p, int64_t dk, int64_t dv) {
    p.Dk = int(dk), p.Dv = int(dv), p.panel_width = int(dv);
    require(dk <= kMaxHead && dv <= kMaxHead, "Dk or Dv is out of range");
  }
  static std::array<int64_t, 2> shape(const LinearStep& p) { return {p.Dk, p.Dv}; }
};

struct Mlp {
  using Params = MlpStep;
  static constexpr int kMatrices = 2;
  static auto kernel(const cpu::Kernels& kernels) { return kernels.mlp_step; }
  static void fill(MlpStep& p, int64_t hd, int64_t d) {
    p.Hd = int(hd), p.D = int(d);
    require(d <= kMaxHead && hd <= kMaxHidden, "D or Hd is out of range");
    require(!p.lr_per_channel && !p.decay_per_channel && !p.delta_per_channel, "an MLP memory has no channel-wise gates");
  }
  static std::array<int64_t, 2> shape(const MlpStep& p) { return {p.Hd, p.D}; }
};

// ln_weight, ln_bias and ln_eps of an MLP memory; None for a linear one
using NormTuple = std::tuple<OptionalTensor, OptionalTensor, double>;
void fill_norm(LinearStep&, NormTuple& norm) { require(!std::get<0>(norm) && !std::get<1>(norm), "a linear memory has no LayerNorm"); }
void fill_norm(MlpStep& p, NormTuple& norm) {
  auto& [weight, bias, eps] = norm;
  for (OptionalTensor* x : {&weight, &bias}) {
    require(*x && is_float(**x) && (*x)->has_shape({p.H, p.D}), "ln_weight and ln_bias must be float32 [H, D]");
    *x = (*x)->contiguous();
  }
  p.ln_weight = weight->data<float>(), p.ln_bias = bias->data<float>();
  p.ln_eps = float(eps);
}

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

template <class Memory> void run(const typename Memory::Params& p, const cpu::Kernels& kernels) {
  const auto kernel = Memory::kernel(kernels);
  const auto [K, V] = Memory::shape(p);
  const int64_t tasks = p.N * p.H, task = Memory::kMatrices * K * V * p.T;
  if (tasks * task <= kGrain) {
    kernel(p, 0, tasks);
  } else {
    py::gil_scoped_release nogil;
    const int64_t grain = std::max<int64_t>(1, kGrain / task);
    parallel_for(tasks, grain, [&](int64_t first, int64_t last) { kernel(p, first, last); });
  }
  for (int64_t n = 0; n < p.N; ++n) p.state.position[n] = (p.state.position[n] + p.T) % p.C;
}

// ---- a decoder's steps ----

// The properties of an argument that a step was prepared for.
struct Expected {
  Shape sizes;
  Type type = kFloat32;
  bool given = false;

  Expected() = default;
  Expected(const Tensor& x) : sizes(x.sizes().begin(), x.sizes().end()), type(x.type()), given(true) {}
  Expected(const OptionalTensor& x) {
    if (x) *this = Expected(*x);
  }
  bool fits(py::handle object, const View& x) const { return given ? x.is(type) && x.has_shape(sizes) && x.on_cpu() : object.is_none(); }
};

// Whether all values of a gate [B, T, H] or [B, T, H, D] are valid
template <class Allowed> bool all_values(const TokenTensor& x, const Shape& sizes, Allowed&& allowed) {
  const float* data = static_cast<const float*>(x.data);
  const int64_t channels = sizes.size() == 4 ? sizes[3] : 1;
  for (int64_t b = 0; b < sizes[0]; ++b)
    for (int64_t t = 0; t < sizes[1]; ++t)
      for (int64_t h = 0; h < sizes[2]; ++h)
        for (int64_t j = 0; j < channels; ++j)
          if (!allowed(data[b * x.batch + t * x.token + h * x.head + j * x.channel])) return false;
  return true;
}

// Steps of one signature on one decoder's buffers. A call with another signature, or with values that validation.py refuses, does
// nothing and returns None.
template <class Memory> class Stepper {
 public:
  Stepper(const TokenTuple& tokens, const NormTuple& norm, const std::vector<OptionalTensor>& buffers, const RuleTuple& rules,
          bool check_values)
      : kernels_(cpu::kernels()), rules_(rules), norm_(norm), buffers_(buffers_of(buffers)), check_values_(check_values) {
    const Tokens x(tokens);
    wanted_ = {x.q, x.k, x.v, x.lr, x.log_decay, x.delta, x.momentum};
    fill_tokens(p_, x, {}, rules, 0);
    const Tensor &start = buffers_.start, &q = x.q, &v = x.v;
    require(start.dim() == 5, "start must be float32 [N, H, m, K, V]");
    Memory::fill(p_, start.size(3), start.size(4));
    require(start.size(4) == v.size(3) && (Memory::kMatrices == 2 ? start.size(4) : start.size(3)) == q.size(3),
            "start does not fit q and v");
    fill_norm(p_, norm_);
    fill_buffers<Memory>(p_, buffers_);
  }
  Stepper(const Stepper&) = delete;

  py::object step(py::handle q_, py::handle k_, py::handle v_, py::handle lr_, py::handle log_decay_, py::handle delta_,
                  py::handle momentum_, py::handle out_) {
    const View q(q_), k(k_), v(v_), lr(lr_), log_decay(log_decay_), momentum(momentum_), out(out_);
    const View delta = PyFloat_Check(delta_.ptr()) ? View() : View(delta_);
    if (!wanted_.q.fits(q_, q) || !wanted_.k.fits(k_, k) || !wanted_.v.fits(v_, v) || !wanted_.lr.fits(lr_, lr) ||
        !wanted_.log_decay.fits(log_decay_, log_decay) || !wanted_.momentum.fits(momentum_, momentum) ||
        !(out_.is_none() || wanted_.v.fits(out_, out)) || !(wanted_.delta.fits(delta_, delta) || is_number(delta_)))
      return py::none();
    Tensor copies[3];
    p_.q = rows(q_, q, copies[0]), p_.k = rows(k_, k, copies[1]), p_.v = rows(v_, v, copies[2]);
    p_.lr = tokens(lr);
    if (wanted_.log_decay.given) p_.log_decay = tokens(log_decay);
    if (delta.defined()) p_.delta = tokens(delta);
    else if (wanted_.delta.given) p_.delta = TokenTensor{&delta_number_, 0, 0, 0, 0};
    if (wanted_.momentum.given) p_.momentum = tokens(momentum);
    if (check_values_ && !values_allowed()) return py::none();

    const bool in_place = out.defined() && are_channels_together(out);
    const Tensor result = in_place ? Tensor() : small_tensor(wanted_.v.sizes, wanted_.v.type);
    p_.out = tokens(in_place ? out : result);
    run<Memory>(p_, kernels_);
    if (in_place) return py::reinterpret_borrow<py::object>(out_);
    return out.defined() ? out_.attr("copy_")(result.object()) : py::reinterpret_borrow<py::object>(result.object());
  }

 private:
  // An argument if its channels are together, else a copy
  static TokenTensor rows(py::handle object, const View& x, Tensor& copy) {
    if (are_channels_together(x)) return tokens(x);
    copy = Tensor(py::reinterpret_borrow<py::object>(object)).contiguous();
    return tokens(copy);
  }
  // One number for all tokens, then stored in delta_number_
  bool is_number(py::handle x) {
    if (!wanted_.delta.given || !PyFloat_Check(x.ptr())) return false;
    delta_number_ = float(PyFloat_AS_DOUBLE(x.ptr()));
    return std::isfinite(delta_number_);
  }
  bool values_allowed() const {
    return (!wanted_.log_decay.given || all_values(p_.log_decay, wanted_.log_decay.sizes, [](float x) { return !(x > 0.0f); })) &&
           (!wanted_.delta.given || all_values(p_.delta, wanted_.delta.sizes, [](float x) { return !(x < 0.0f); })) &&
           (!wanted_.momentum.given || all_values(p_.momentum, wanted_.momentum.sizes, [](float x) { return !(x < 0.0f || x >= 1.0f); }));
  }

  typename Memory::Params p_;
  const cpu::Kernels& kernels_;
  RuleTuple rules_;
  NormTuple norm_;
  Buffers buffers_;
  struct {
    Expected q, k, v, lr, log_decay, delta, momentum;
  } wanted_;
  float delta_number_ = 0.0f;
  bool check_values_;
};

template <class Memory> void bind_stepper(py::module_& m, const char* name) {
  using namespace pybind11::literals;
  py::class_<Stepper<Memory>>(m, name)
      .def(py::init<const TokenTuple&, const NormTuple&, const std::vector<OptionalTensor>&, const RuleTuple&, bool>(), "tokens"_a,
           "norm"_a, "buffers"_a, "rules"_a, "check_values"_a)
      .def("__call__", &Stepper<Memory>::step);
}

// ---- a short call on a state as a value ----

// As Python passes them: duals and momenta; start, position and open_log_decay of an open chunk. Empty or None if absent.
using Matrices = std::vector<Tensor>;
using StateTuple = std::tuple<Matrices, Matrices>;
using OpenChunkTuple = std::tuple<Matrices, OptionalTensor, OptionalTensor>;

// The matrices of a state, in a buffer [N, H, m, K, V].
class Held {
 public:
  Held(const MemoryParams& p, int64_t m, int64_t K, int64_t V)
      : N_(p.N), H_(p.H), m_(m), K_(K), V_(V), storage_(new_storage(N_ * H_ * m * K * V * int64_t(sizeof(float)))) {}

  float* data() const { return static_cast<float*>(storage_.get()); }

  // As in a MemoryState: views, all transposed but an MLP's W2
  Matrices views() const {
    Matrices found;
    for (int i = 0; i < m_; ++i) {
      const int64_t strides[] = {H_ * m_ * K_ * V_, m_ * K_ * V_, i == 0 ? 1 : V_, i == 0 ? V_ : 1};
      found.push_back(tensor_in(storage_, data() + i * K_ * V_, shape(i), strides, kFloat32));
    }
    return found;
  }
  void copy(const Matrices& from) const {
    require(int64_t(from.size()) == m_, "a state has one matrix, or two of an MLP");
    for (int i = 0; i < m_; ++i) {
      const Tensor& x = from[i];
      require(is_float(x) && x.has_shape(shape(i)), "a state's matrices must be float32 and of one shape");
      const int64_t row = x.stride(i == 0 ? 3 : 2), column = x.stride(i == 0 ? 2 : 3);
      parallel_for(N_ * H_, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, K_ * V_)), [&](int64_t first, int64_t last) {
        for (int64_t head = first; head < last; ++head) {
          const float* source = x.data<float>() + head / H_ * x.stride(0) + head % H_ * x.stride(1);
          float* to = data() + (head * m_ + i) * K_ * V_;
          for (int64_t r = 0; r < K_; ++r, to += V_, source += row) {
            if (column == 1) std::copy_n(source, V_, to);
            else
              for (int64_t c = 0; c < V_; ++c) to[c] = source[c * column];
          }
        }
      });
    }
  }

 private:
  std::array<int64_t, 4> shape(int i) const { return {N_, H_, i == 0 ? V_ : K_, i == 0 ? K_ : V_}; }

  int64_t N_, H_, m_, K_, V_;
  Storage storage_;
};

// (out, duals, momenta, starts, open_log_decay), the last two of the open chunk; no starts where every token is a chunk and W = A: then
// the dual is the state, and a copy of it is stepped in place
template <class Memory>
std::tuple<Tensor, Matrices, Matrices, Matrices, Tensor> steps(const TokenTuple& tokens_, NormTuple norm, const StateTuple& state_,
                                                               const OpenChunkTuple& open_chunk, const RuleTuple& rules) {
  const Tokens x(tokens_);
  const Tensor &q = x.q, &v = x.v;
  const auto& [dual, momenta] = state_;
  const auto& [start, position, open_log_decay] = open_chunk;
  typename Memory::Params p;
  fill_tokens(p, x, {}, rules, 0);
  require(dual.size() == Memory::kMatrices && dual[0].dim() == 4, "a state has one matrix, or two of an MLP");
  const int64_t rows = dual[0].size(3), cols = dual[0].size(2);
  require(cols == v.size(3) && (Memory::kMatrices == 2 ? cols : rows) == q.size(3), "the state does not fit q and v");
  Memory::fill(p, rows, cols);
  fill_norm(p, norm);

  const int64_t m = Memory::kMatrices, room = std::min<int64_t>(p.T, p.C), heads = p.N * p.H, width = p.decay_per_channel ? cols : 1;
  const RetentionTraits gate = retention_traits(p.retention);
  const bool in_place = p.C == 1 && !position && gate.identity;
  const Held now(p, m, rows, cols);
  std::optional<Held> before, moving, primal;
  now.copy(dual);
  if (!in_place) before.emplace(p, m, rows, cols);
  if (p.momentum) moving.emplace(p, m, rows, cols).copy(momenta);
  if (!gate.identity) primal.emplace(p, m, rows, cols);
  const Tensor decayed = small_tensor(open_decay_shape(p, cols), kFloat32);
  std::vector<int64_t> at(p.N);
  if (position) {
    std::copy_n(positions(p, *position), p.N, at.data());
    before->copy(start);
    std::copy_n(open_decays(p, *open_log_decay, cols).template data<float>(), heads * width, decayed.data<float>());
  } else {
    std::fill_n(decayed.data<float>(), heads * width, 0.0f);
  }
  const int64_t spare = heads * (m * room * (rows + cols) + (2 + room) * (width + 1) + m);
  const Storage storage = new_storage(spare * int64_t(sizeof(float)));
  auto take = [next = static_cast<float*>(storage.get())](int64_t count) mutable { return std::exchange(next, next + count); };

  StepBuffers& state = p.state;
  state.by_value = !in_place, state.width = int(width), state.rows = int(room);
  state.start = in_place ? now.data() : before->data(), state.written = in_place ? nullptr : now.data();
  state.open_log_decay = decayed.data<float>(), state.position = at.data();
  state.left = take(heads * m * room * rows), state.right = take(heads * m * room * cols);
  state.weights = take(heads * (2 + room) * width);
  if (moving) state.momenta = moving->data(), state.momentum_weights = take(heads * (2 + room));
  if (in_place) {  // a kernel does this to a state by value
    std::fill_n(state.weights, heads * (2 + room) * width, 0.0f);
    for (int64_t i = 0; moving && i < heads * (2 + room); ++i) state.momentum_weights[i] = i % (2 + room) == 1 ? 1.0f : 0.0f;
  }
  if (primal) state.primal = primal->data();
  if (gate.coupling == Coupling::matrix) state.rho = take(heads * m);
  const Tensor out = small_tensor(v.sizes(), v.type());
  p.out = tokens(out);
  run<Memory>(p, cpu::kernels());
  return {out, now.views(), moving ? moving->views() : Matrices(), before ? before->views() : Matrices(), decayed};
}

}  // namespace

void bind_steps(py::module_& m) {
  using namespace pybind11::literals;
  bind_stepper<Linear>(m, "LinearStepper");
  bind_stepper<Mlp>(m, "MlpStepper");
  m.def("linear_steps", &steps<Linear>, "tokens"_a, "norm"_a, "state"_a, "open_chunk"_a, "rules"_a);
  m.def("mlp_steps", &steps<Mlp>, "tokens"_a, "norm"_a, "state"_a, "open_chunk"_a, "rules"_a);
  m.def("step_buffers", [] { return std::vector<std::string>(std::begin(kStepBuffers), std::end(kStepBuffers)); });
}

}  // namespace miras
