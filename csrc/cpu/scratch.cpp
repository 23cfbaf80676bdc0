#include "scratch.h"

#include <cstdlib>
#include <new>

namespace miras::cpu {
namespace {

struct Block {
  float* data = nullptr;
  std::size_t size = 0;
  ~Block() { std::free(data); }
};

thread_local Block blocks[2];

}  // namespace

std::size_t scratch_bytes() { return (blocks[0].size + blocks[1].size) * sizeof(float); }

float* thread_scratch(std::size_t floats, int i) {
  Block& block = blocks[i];
  if (floats > block.size) {
    std::free(block.data);
    block.size = 0;
    const std::size_t bytes = (floats * sizeof(float) + 4095) / 4096 * 4096;
    block.data = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (!block.data) throw std::bad_alloc();
    block.size = bytes / sizeof(float);
  }
  forbid(block.data, block.size);
  return block.data;
}

}  // namespace miras::cpu
