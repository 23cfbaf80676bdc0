// Threads that share a task. A stage is split into parts, each of which computes results of its own from beginning to end, in the order
// of the whole: no bit depends on their number, and none waits for another within a stage.
#pragma once

#include "pack.h"

namespace miras::cpu::MIRAS_LEVEL {

// Of the hidden units, the tokens of a chunk and the channels.
struct Part {
  int index;
  Range units, tokens, channels;

  MIRAS_FN Part(const MlpParams& p, int index, int c)
      : index(index), units(share(p.Hd, index, p.parts)), tokens(share(c, index, p.parts)), channels(share(p.D, index, p.parts)) {}

  // Only one part prefetches.
  template <class Soon> MIRAS_FN Soon once(const Soon& soon) const { return index == 0 ? soon : Soon(); }

 private:
  // Whole cache lines: of n, part `index` of `parts`
  MIRAS_INLINE Range share(int n, int index, int parts) {
    const int lines = round_up(n, kPad) / kPad;
    return {minimum(n, lines * index / parts * kPad), minimum(n, lines * (index + 1) / parts * kPad)};
  }
};

// stage(part) for all parts of a chunk of c tokens, and waits for them.
template <class Stage> static void in_parts(const MlpParams& p, int c, const Stage& stage) {
  struct Run {
    const MlpParams& p;
    int c;
    const Stage& stage;
  } run{p, c, stage};
  const auto body = [](int64_t first, int64_t last, void* self) {
    FlushDenormals flush;
    const Run& run = *static_cast<const Run*>(self);
    for (int64_t i = first; i < last; ++i) run.stage(Part(run.p, int(i), run.c));
  };
  if (p.parts == 1) body(0, 1, &run);
  else p.parallel_for(p.parts, 1, body, &run);
}

}  // namespace miras::cpu::MIRAS_LEVEL
