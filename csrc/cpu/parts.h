// Threads that share a task. A stage is split into parts, each of which computes results of its own from beginning to end, in the order
// of the whole: no bit depends on their number, and none waits for another within a stage.
#pragma once

#include "pack.h"

namespace miras::cpu::MIRAS_LEVEL {

// What the stages of a chunk are split by: hidden units, tokens, channels.
struct Extent {
  int units, tokens, channels;
};

struct Part {
  int index;
  Range units, tokens, channels;

  MIRAS_FN Part(const Extent& all, int index, int parts)
      : index(index), units(share(all.units, index, parts)), tokens(share(all.tokens, index, parts)),
        channels(share(all.channels, index, parts)) {}

  // Only one part prefetches.
  template <class Soon> MIRAS_FN Soon once(const Soon& soon) const { return index == 0 ? soon : Soon(); }

 private:
  // Whole cache lines: of n, part `index` of `parts`
  MIRAS_INLINE Range share(int n, int index, int parts) {
    const int lines = round_up(n, kPad) / kPad;
    return {minimum(n, lines * index / parts * kPad), minimum(n, lines * (index + 1) / parts * kPad)};
  }
};

// stage(part) for all parts of a chunk, and waits for them.
template <class Stage> static void in_parts(const MemoryParams& p, const Extent& all, const Stage& stage) {
  struct Run {
    int parts;
    const Extent& all;
    const Stage& stage;
  } run{p.parts, all, stage};
  const auto body = [](int64_t first, int64_t last, void* self) {
    FlushDenormals flush;
    const Run& run = *static_cast<const Run*>(self);
    for (int64_t i = first; i < last; ++i) run.stage(Part(run.all, int(i), run.parts));
  };
  if (p.parts == 1) body(0, 1, &run);
  else p.parallel_for(p.parts, 1, body, &run);
}
// stage(channels) likewise, whole vectors of `count` channels
struct ChannelsInParts {
  const MemoryParams& p;
  int count;
  template <class Stage> MIRAS_FN void operator()(const Stage& stage) const {
    in_parts(p, {0, 0, count}, [&](const Part& mine) { stage(mine.channels); });
  }
};
template <class Stage> static void in_parts(const MlpParams& p, int c, const Stage& stage) { in_parts(p, Extent{p.Hd, c, p.D}, stage); }

}  // namespace miras::cpu::MIRAS_LEVEL
