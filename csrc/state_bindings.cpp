// Decoding steps of a short call, on a state as a value.
#include "step_bindings.h"
#include "step_signature.h"

namespace miras {
namespace {

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

// Whether a dual [N, H, Dv, Dk] lies in memory as linear kernels hold it, [N, H, Dk, Dv]
bool is_transposed(const View& x) {
  int64_t stride = 1;
  for (const int i : {2, 3, 1, 0}) {
    if (x.size(i) != 1 && x.stride(i) != stride) return false;
    stride *= x.size(i);
  }
  return true;
}

// (out, duals, momenta, starts, open_log_decay), the last two of the open chunk; no starts where every token is a chunk and W = A: then
// the dual is the state. It is read where it lies, if the kernels hold it so; with `overwrite` its successor takes its place, and the
// same tensor is returned.
template <class Memory>
std::tuple<Tensor, Matrices, Matrices, Matrices, Tensor> steps(const TokenTuple& tokens_, NormTuple norm, const StateTuple& state_,
                                                               const OpenChunkTuple& open_chunk, const RuleTuple& rules, bool decay_first,
                                                               bool overwrite) {
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
  const bool plain = p.C == 1 && !position && gate.identity, direct = plain && m == 1 && is_transposed(dual[0]);
  require(!decay_first || (plain && m == 1), "decay_first needs a linear memory, chunks of one token and L2 retention");
  require(is_float(dual[0]) && dual[0].has_shape({p.N, p.H, cols, rows}), "a state's matrices must be float32 and of one shape");
  if constexpr (Memory::kMatrices == 1) p.decay_first = decay_first;
  overwrite = overwrite && direct;
  std::optional<Held> now, before, moving, primal;
  if (!overwrite) now.emplace(p, m, rows, cols);
  if (!direct) now->copy(dual);
  if (!plain) before.emplace(p, m, rows, cols);
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
  state.by_value = !plain, state.width = int(width), state.rows = int(room);
  state.start = direct ? dual[0].data<float>() : plain ? now->data() : before->data(), state.written = plain ? nullptr : now->data();
  if (direct && !overwrite) state.result = now->data();
  state.open_log_decay = decayed.data<float>(), state.position = at.data();
  state.left = take(heads * m * room * rows), state.right = take(heads * m * room * cols);
  state.weights = take(heads * (2 + room) * width);
  if (moving) state.momenta = moving->data(), state.momentum_weights = take(heads * (2 + room));
  if (plain) {  // a kernel does this to a state by value
    std::fill_n(state.weights, heads * (2 + room) * width, 0.0f);
    for (int64_t i = 0; moving && i < heads * (2 + room); ++i) state.momentum_weights[i] = i % (2 + room) == 1 ? 1.0f : 0.0f;
  }
  if (primal) state.primal = primal->data();
  if (gate.coupling == Coupling::matrix) state.rho = take(heads * m);
  const Tensor out = small_tensor(v.sizes(), v.type());
  p.out = tokens(out);
  run<Memory>(p, cpu::kernels());
  return {out, overwrite ? dual : now->views(), moving ? moving->views() : Matrices(), before ? before->views() : Matrices(), decayed};
}

// Short calls of one signature on a linear memory's state, where every token is a chunk and the dual is the state, in memory as the
// kernels hold it. A call that does not fit does nothing and returns None.
class StateCalls {
 public:
  StateCalls(const TokenTuple& tokens, const RuleTuple& rules, bool decay_first, bool overwrite, bool check_values)
      : StateCalls(Tokens(tokens), rules, decay_first, overwrite, check_values) {}

  // (out, the dual after the tokens)
  py::object operator()(py::handle q, py::handle k, py::handle v, py::handle lr, py::handle log_decay, py::handle delta,
                        py::handle dual_) const {
    LinearStep p = p_;
    Signature::Call call{q, k, v, lr, log_decay, delta, py::none()};
    const View dual(dual_);
    if (!dual.defined() || !is_float(dual) || !dual.has_shape({p.N, p.H, p.Dv, p.Dk}) || !is_transposed(dual)) return py::none();
    if (!signature_.fill(p, call)) return py::none();
    StepBuffers& state = p.state;
    const int64_t heads = p.N * p.H, width = state.width = p.decay_per_channel ? p.Dv : 1;
    const Storage scratch = new_storage(heads * (p.Dk + p.Dv + 4 * width) * int64_t(sizeof(float)) + p.N * int64_t(sizeof(int64_t)));
    state.position = static_cast<int64_t*>(scratch.get());
    state.left = reinterpret_cast<float*>(state.position + p.N), state.right = state.left + heads * p.Dk;
    state.weights = state.right + heads * p.Dv, state.open_log_decay = state.weights + heads * 3 * width;
    std::fill_n(state.position, p.N, 0), std::fill_n(state.weights, heads * 4 * width, 0.0f);

    std::optional<Held> after;
    state.start = dual.data<float>();
    if (!overwrite_) state.result = after.emplace(p, 1, p.Dk, p.Dv).data();
    const Tensor out = signature_.new_out();
    p.out = tokens(out);
    run<Linear>(p, cpu::kernels());
    return py::make_tuple(out, after ? after->views()[0].object() : dual_);
  }

 private:
  StateCalls(const Tokens& x, const RuleTuple& rules, bool decay_first, bool overwrite, bool check_values)
      : rules_(rules), signature_(x, check_values), overwrite_(overwrite) {
    fill_tokens(p_, x, {}, rules, 0);
    Linear::fill(p_, x.q.size(3), x.v.size(3));
    require(p_.C == 1 && !p_.momentum && retention_traits(p_.retention).identity, "the dual is not the whole state");
    p_.decay_first = decay_first;
  }

  LinearStep p_;
  RuleTuple rules_;
  Signature signature_;
  bool overwrite_;
};

// Whole sequences of one signature through a linear memory without gradients, from a dual, or from zeros without one. A call that does not
// fit does nothing and returns None.
class SequenceCalls {
 public:
  SequenceCalls(const TokenTuple& tokens, const RuleTuple& rules, bool output_final_state, bool check_values)
      : SequenceCalls(Tokens(tokens), rules, output_final_state, check_values) {}

  // (out, the dual after the tokens or None)
  py::object operator()(py::handle q, py::handle k, py::handle v, py::handle lr, py::handle log_decay, py::handle delta,
                        py::handle dual_) const {
    LinearForward p = p_;
    Signature::Call call{q, k, v, lr, log_decay, delta, py::none()};
    const View dual(dual_);
    if (dual.defined() ? !is_float(dual) || !dual.has_shape({p.N, p.H, p.Dv, p.Dk}) : !dual_.is_none()) return py::none();
    if (!signature_.fill(p, call)) return py::none();
    if (dual.defined()) p.dual = states(dual);
    share_rows(p);
    const Tensor out = new_tensor({p.B, p.T, p.H, p.Dv}, p.dtype == Dtype::f32 ? kFloat32 : kBfloat16);
    p.out = tokens(out);
    Tensor after;
    if (output_final_state_) p.final_dual = states(after = new_float({p.N, p.H, p.Dv, p.Dk}));
    run_tasks(cpu::kernels().linear_forward, p);
    return py::make_tuple(out, after);
  }

 private:
  SequenceCalls(const Tokens& x, const RuleTuple& rules, bool output_final_state, bool check_values)
      : rules_(rules), signature_(x, check_values), output_final_state_(output_final_state) {
    fill_tokens(p_, x, {}, rules, 0);
    p_.Dk = int(x.q.size(3)), p_.Dv = int(x.v.size(3));
    require(p_.Dk <= kMaxHead && p_.Dv <= kMaxHead && !p_.momentum && (!output_final_state || p_.T % p_.C == 0), "not such a sequence");
  }

  LinearForward p_;
  RuleTuple rules_;
  Signature signature_;
  bool output_final_state_;
};

}  // namespace

void bind_states(py::module_& m) {
  using namespace pybind11::literals;
  m.def("linear_steps", &steps<Linear>, "tokens"_a, "norm"_a, "state"_a, "open_chunk"_a, "rules"_a, "decay_first"_a, "overwrite"_a);
  m.def("mlp_steps", &steps<Mlp>, "tokens"_a, "norm"_a, "state"_a, "open_chunk"_a, "rules"_a, "decay_first"_a, "overwrite"_a);
  py::class_<StateCalls>(m, "StateCalls")
      .def(py::init<const TokenTuple&, const RuleTuple&, bool, bool, bool>(), "tokens"_a, "rules"_a, "decay_first"_a, "overwrite"_a,
           "check_values"_a)
      .def("__call__", &StateCalls::operator());
  py::class_<SequenceCalls>(m, "SequenceCalls")
      .def(py::init<const TokenTuple&, const RuleTuple&, bool, bool>(), "tokens"_a, "rules"_a, "output_final_state"_a, "check_values"_a)
      .def("__call__", &SequenceCalls::operator());
  m.def("step_buffers", [] { return std::vector<std::string>(std::begin(kStepBuffers), std::end(kStepBuffers)); });
}

}  // namespace miras
