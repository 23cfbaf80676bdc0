// Working memory of a thread: grows when needed, is reused by every later call, never shrinks.
#pragma once

#include <cstddef>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace miras::cpu {

// 64-byte aligned memory for that many floats, private to the calling thread. Invalidates what an earlier call for the same block returned:
// 0 is a kernel's, 1 that of an interpreted program.
float* thread_scratch(std::size_t floats, int block = 0);

// What the calling thread has.
std::size_t scratch_bytes();

// AddressSanitizer sees scratch as one allocation: all of it is marked out of bounds until handed out, including the gaps between parts.
// What is handed out holds NaN, so that reading before writing shows in the results.
static inline __attribute__((always_inline)) void forbid(float* from, std::size_t floats) {
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(from, floats * sizeof(float));
#else
  (void)from, (void)floats;
#endif
}
static inline __attribute__((always_inline)) void allow(float* from, std::size_t floats) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(from, floats * sizeof(float));
  __builtin_memset(from, 0xff, floats * sizeof(float));
#else
  (void)from, (void)floats;
#endif
}

}  // namespace miras::cpu
