// The three functions of a bias that the kernels call, built in or a user's.
#pragma once

#include "bias_rows.h"
#include "program_rows.h"

namespace miras::cpu::MIRAS_LEVEL {

struct BiasTable {
  void (*write)(const BiasRows&, float* kw_u, const float* to_end, float* u_end);
  void (*grade)(const BiasRows&, float* kw_e, float* g);
  void (*pull_back)(const BiasRows&, const float* e, const float* g, float* du_de, float* deta, float* ddelta);
  bool predicts, uses_delta;
};

static BiasTable bias_table(const MemoryParams& p, bool channel_eta = false) {
  if (p.bias == BiasTag::custom) {
    using Kernels = ProgramKernels<false>;
    using Channels = ProgramKernels<true>;
    return {channel_eta ? Channels::write : Kernels::write, Kernels::grade, channel_eta ? Channels::pull_back : Kernels::pull_back, true,
            p.bias_program->uses_delta};
  }
  return with_bias(p.bias, p.bias_params, [channel_eta]<class Bias>(const Bias&) {
    using Kernels = BiasKernels<Bias, false>;
    using Channels = BiasKernels<Bias, true>;
    return BiasTable{channel_eta ? Channels::write : Kernels::write, Kernels::grade, channel_eta ? Channels::pull_back : Kernels::pull_back,
                     Bias::kPredicts, Bias::kUsesDelta};
  });
}

}  // namespace miras::cpu::MIRAS_LEVEL
