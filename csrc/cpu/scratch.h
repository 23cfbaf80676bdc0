// Working memory of a thread: grows when needed, is reused by every later call, never shrinks.
#pragma once

#include <cstddef>

namespace miras::cpu {

// 64-byte aligned room for that many floats, private to the calling thread. Invalidates what an earlier call returned.
float* thread_scratch(std::size_t floats);

}  // namespace miras::cpu
