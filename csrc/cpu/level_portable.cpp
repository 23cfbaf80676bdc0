// The kernels at the architecture's baseline: 4 lanes (SSE2, NEON).
#include "capability.h"
#include "profile.h"
#include "scratch.h"

#define MIRAS_LEVEL portable
#define MIRAS_LANES 4
#include "block_backward.h"
#include "block_forward.h"
#include "keyed_backward.h"
#include "keyed_forward.h"
#include "linear_backward.h"
#include "linear_forward.h"
#include "linear_step.h"
#include "mlp_backward.h"
#include "mlp_forward.h"
#include "mlp_step.h"
#include "peak.h"

namespace miras::cpu {

const Kernels* portable_kernels() {
  static constexpr Kernels table = {"portable",
                                    portable::linear_forward,
                                    portable::linear_backward,
                                    portable::block_forward,
                                    portable::block_backward,
                                    portable::keyed_forward,
                                    portable::keyed_backward,
                                    portable::mlp_forward,
                                    portable::mlp_backward,
                                    portable::linear_step,
                                    portable::mlp_step,
                                    portable::multiply_adds};
  return &table;
}

}  // namespace miras::cpu
