// Copies with the vectors of the instruction set being compiled, through the vector extensions of GCC and
// clang. This file is included inside the namespace of an instruction set.
#pragma once

namespace {

typedef unsigned char vector_bytes __attribute__((vector_size(QFAST_VECTOR_BYTES), aligned(1), may_alias));
// Elements read and written as unsigned words of their size.
typedef uint32_t word32 __attribute__((may_alias));
typedef uint64_t word64 __attribute__((may_alias));
typedef unsigned char bytes_16 __attribute__((vector_size(16), aligned(1), may_alias));

// Two functions, not a template: the alignment of a vector type is lost when it is a template argument.
static inline void move_vector(unsigned char* to, const unsigned char* from) {
  *reinterpret_cast<vector_bytes*>(to) = *reinterpret_cast<const vector_bytes*>(from);
}

static inline void move_16(unsigned char* to, const unsigned char* from) {
  *reinterpret_cast<bytes_16*>(to) = *reinterpret_cast<const bytes_16*>(from);
}

// Prefetches a cache line to the second-level cache. In the first level, the window being copied, its copy
// and the next window would evict each other (measured: a third slower for windows of 12 KB).
static inline void will_read(const unsigned char* line) { __builtin_prefetch(line, 0, 2); }

// Copies `bytes` bytes, a multiple of 4, and prefetches as many bytes at `ahead`, which will be read soon. It
// prefetches line by line during the copy, because a burst of prefetches would stall. The last vector
// overlaps the one before it, so there is no scalar remainder.
static inline void copy_bytes(unsigned char* to, const unsigned char* from, int64_t bytes,
                              const unsigned char* ahead) {
  constexpr int64_t wide = QFAST_VECTOR_BYTES;
  will_read(ahead);
  if (bytes >= wide) {
    int64_t i = 0;
    for (; i + wide <= bytes; i += wide) {
      if (wide == 64 || i % 64 == 0) will_read(ahead + i + 63);
      move_vector(to + i, from + i);
    }
    if (i < bytes) move_vector(to + bytes - wide, from + bytes - wide);
  } else if (bytes >= 16) {
    int64_t i = 0;
    for (; i + 16 <= bytes; i += 16) move_16(to + i, from + i);
    if (i < bytes) move_16(to + bytes - 16, from + bytes - 16);
  } else {
    for (int64_t i = 0; i < bytes; i += 4) __builtin_memcpy(to + i, from + i, 4);
  }
}

// The same as copy_bytes, with non-temporal stores of whole cache lines, for output that is larger than the
// caches.
static inline void stream_bytes(unsigned char* to, const unsigned char* from, int64_t bytes,
                                const unsigned char* ahead) {
#if defined(__x86_64__)
  const int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & 63);
  if (head + 64 > bytes) return copy_bytes(to, from, bytes, ahead);
  copy_bytes(to, from, head, ahead);
  int64_t i = head;
  for (; i + 64 <= bytes; i += 64) {
    will_read(ahead + i);
    for (int64_t j = i; j < i + 64; j += 16) {
      const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j));
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + j), part);
    }
  }
  copy_bytes(to + i, from + i, bytes - i, ahead + i);
#else
  copy_bytes(to, from, bytes, ahead);
#endif
}

// Orders the non-temporal stores before later stores.
static inline void finish_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace
