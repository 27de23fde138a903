/* CUDA on a processor, as far as experimental/int4/qlinear_int4.cu goes: the names of ptx.cuh in
 * plain C++, and blocks of threads that run as fibers, one at a time.
 *
 * Instructions of a whole warp wait for all of its lanes, then follow the PTX ISA: "Matrix Fragments
 * for mma.m16n8k64", and the table of ldmatrix. Asynchronous copies land either at once or not
 * before they are waited for. Hardware may do both, so the sums have to be the same with both.
 */
#ifndef TREEQ_INT4_EMULATION_H
#define TREEQ_INT4_EMULATION_H

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define TREEQ_SHARED static  // one block runs at a time

struct Dim3 {
  unsigned x = 0, y = 0, z = 0;
};
struct uint2 {
  uint32_t x, y;
};
struct __half {
  uint16_t bits;
};

inline Dim3 threadIdx, blockIdx;

namespace emulation {

constexpr int kWarp = 32;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

/* A thread of the block. */
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool is_done = false;
  std::vector<Copy> open;                // copies of no group yet
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
};

/* A meeting of several threads: the last to arrive does the work, then all go on. */
struct Meeting {
  int arrived = 0;
  uint64_t round = 0;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline size_t current = 0;
inline bool lands_at_once = false;
inline Meeting block_meeting;
inline Meeting warp_meetings[32];
inline const void* operands[32][kWarp][3];  // of the instruction that a warp meets at

inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}

inline void meet(Meeting& meeting, int size, const std::function<void()>& work) {
  const uint64_t round = meeting.round;
  if (++meeting.arrived == size) {
    work();
    meeting.arrived = 0;
    ++meeting.round;
  }
  while (meeting.round == round) swapcontext(&fibers[current].context, &scheduler);
}

/* Runs `work` once for a warp with what its lanes brought. */
inline void meet_warp(const void* a, const void* b, const void* c,
                      const std::function<void(const void* (&)[kWarp][3])>& work) {
  const size_t warp = current / kWarp;
  const void* given[3] = {a, b, c};
  std::memcpy(operands[warp][current % kWarp], given, sizeof(given));
  meet(warp_meetings[warp], kWarp, [&] { work(operands[warp]); });
}

inline void copy(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) {
    fail("a copy is not aligned to its size");
  }
  if (lands_at_once) std::memcpy(to, from, bytes);
  fibers[current].open.push_back({to, from, bytes});
}

inline std::function<void()> body;

inline void start() {
  body();
  fibers[current].is_done = true;
  if (!fibers[current].open.empty()) fail("a thread ended with copies of no group");
  swapcontext(&fibers[current].context, &scheduler);
}

/* Lets each thread of a warp run up to its next meeting; false where all of them have ended. */
inline bool run_warp(size_t first) {
  bool is_running = false;
  for (current = first; current < first + kWarp; ++current) {
    if (fibers[current].is_done) continue;
    is_running = true;
    threadIdx.x = unsigned(current);
    swapcontext(&scheduler, &fibers[current].context);
  }
  return is_running;
}

/* Runs one block. A warp runs on while it meets nobody but itself: the last one to reach a barrier
 * is then far ahead of the others behind it, so that a barrier that is missing shows. */
inline void run_block(int num_threads, Dim3 block, const std::function<void()>& kernel) {
  body = kernel;
  blockIdx = block;
  fibers.assign(size_t(num_threads), Fiber());
  for (Fiber& fiber : fibers) {
    fiber.stack.resize(1 << 16);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, start, 0);
  }
  for (bool is_running = true; is_running;) {
    is_running = false;
    for (size_t first = 0; first < fibers.size(); first += kWarp) {
      const uint64_t& round = warp_meetings[first / kWarp].round;
      for (uint64_t before = round - 1; before != round;) {
        before = round;
        is_running = run_warp(first) || is_running;
      }
    }
  }
  if (block_meeting.arrived) fail("threads ended while others wait");
}

/* Signed nibble `index` of a fragment. */
inline int nibble(const uint32_t* registers, int index) {
  const int value = int(registers[index / 8] >> (index % 8 * 4)) & 15;
  return value < 8 ? value : value - 16;
}

}  // namespace emulation

inline void __syncthreads() {
  emulation::meet(emulation::block_meeting, int(emulation::fibers.size()), [] {});
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }

/* Round to nearest, ties to even. */
inline __half __float2half_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const auto sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {uint16_t(sign | 0x7fff)};
  if (bits >= 0x47800000) return {uint16_t(sign | 0x7c00)};
  if (bits < 0x38800000) {  // subnormal: let the adder of floats round
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return {uint16_t(sign | (bits - 0x3f000000))};
  }
  bits += 0xfff + (bits >> 13 & 1);
  return {uint16_t(sign | ((bits - 0x38000000) >> 13))};
}

namespace treeq::int4 {

inline void copy_async_16(void* shared, const void* global) { emulation::copy(shared, global, 16); }
inline void copy_async_4(void* shared, const void* global) { emulation::copy(shared, global, 4); }

inline void commit_copies() {
  emulation::Fiber& fiber = emulation::fibers[emulation::current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

template <int PENDING>
inline void wait_copies() {
  auto& groups = emulation::fibers[emulation::current].groups;
  for (; groups.size() > size_t(PENDING); groups.pop_front()) {
    if (emulation::lands_at_once) continue;
    for (const emulation::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
  }
}

/* Lane 8*i + r gives row r of matrix i; lane l gets elements 2*(l%4), 2*(l%4)+1 of row l/4. */
inline void load_matrices(uint32_t (&out)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulation::fail("a row of ldmatrix is not aligned");
  emulation::meet_warp(out, row, nullptr, [](const void* (&given)[emulation::kWarp][3]) {
    for (int matrix = 0; matrix < 4; ++matrix) {  // eight rows of 16 bytes: each bank once
      unsigned seen = 0;
      for (int r = 0; r < 8; ++r) {
        seen |= 1u << reinterpret_cast<uintptr_t>(given[8 * matrix + r][1]) / 16 % 8;
      }
      if (seen != 0xff) emulation::fail("rows of ldmatrix share banks");
    }
    for (int lane = 0; lane < emulation::kWarp; ++lane) {
      auto* result = static_cast<uint32_t*>(const_cast<void*>(given[lane][0]));
      for (int matrix = 0; matrix < 4; ++matrix) {
        const auto* source = static_cast<const char*>(given[8 * matrix + lane / 4][1]);
        std::memcpy(&result[matrix], source + lane % 4 * 4, 4);
      }
    }
  });
}

inline void multiply(int32_t (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::meet_warp(acc, a, b, [](const void* (&given)[emulation::kWarp][3]) {
    static int8_t left[16][64], right[8][64];  // right: by column
    for (int lane = 0; lane < emulation::kWarp; ++lane) {
      const int group = lane / 4, thread = lane % 4;
      const auto* a_registers = static_cast<const uint32_t*>(given[lane][1]);
      const auto* b_registers = static_cast<const uint32_t*>(given[lane][2]);
      for (int i = 0; i < 32; ++i) {
        const bool is_upper = i < 8 || (i >= 16 && i < 24);
        const int column = thread * 8 + (i & 7) + (i < 16 ? 0 : 32);
        left[is_upper ? group : group + 8][column] = int8_t(emulation::nibble(a_registers, i));
      }
      for (int i = 0; i < 16; ++i) {
        const int row = thread * 8 + (i & 7) + (i < 8 ? 0 : 32);
        right[group][row] = int8_t(emulation::nibble(b_registers, i));
      }
    }
    for (int lane = 0; lane < emulation::kWarp; ++lane) {
      auto* sums = static_cast<int32_t*>(const_cast<void*>(given[lane][0]));
      for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? lane / 4 : lane / 4 + 8, column = lane % 4 * 2 + (i & 1);
        for (int k = 0; k < 64; ++k) sums[i] += left[row][k] * right[column][k];
      }
    }
  });
}

inline uint32_t rotate_right(uint32_t word, uint32_t by) {
  by &= 31u;
  return by ? word >> by | word << (32 - by) : word;
}

}  // namespace treeq::int4
#endif
