// The processor's own instructions, each with a host twin that does the same arithmetic lane by
// lane, for the emulator in csrc/lab/emu. The only file with inline PTX, and the only one that
// knows whether nvcc or g++ compiles it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/types.h"

#if defined(FMK_EMULATE_CUDA)
#include <cmath>

#include "lab/emu/emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace fmk::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarp = 32;

// --- shared memory ---

// A block's dynamic shared memory, aligned to 16 bytes.
__device__ inline unsigned char* dynamic_shared() {
#if defined(FMK_EMULATE_CUDA)
  return static_cast<unsigned char*>(emu::dynamic_shared());
#else
  extern __shared__ __align__(16) unsigned char fmk_dynamic_shared[];
  return fmk_dynamic_shared;
#endif
}

// Declares `type* name`, `count` elements of a block's static shared memory.
#if defined(FMK_EMULATE_CUDA)
#define FMK_SHARED(type, name, count) \
  static const char name##_key = 0;   \
  type* const name =                  \
      static_cast<type*>(::fmk::emu::static_shared(&name##_key, sizeof(type) * (count)))
#else
#define FMK_SHARED(type, name, count)                \
  __shared__ __align__(16) type name##_array[count]; \
  type* const name = name##_array
#endif

// --- storage types ---

__device__ inline float bits_to_float(uint32_t bits) {
#if defined(FMK_EMULATE_CUDA)
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#else
  return __uint_as_float(bits);
#endif
}
__device__ inline uint32_t float_to_bits(float value) {
#if defined(FMK_EMULATE_CUDA)
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#else
  return __float_as_uint(value);
#endif
}

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(bf16 value) {
  return bits_to_float(static_cast<uint32_t>(value.bits) << 16);
}
__device__ inline float to_float(f16 value) {
#if defined(FMK_EMULATE_CUDA)
  _Float16 half;
  std::memcpy(&half, &value.bits, sizeof half);
  return static_cast<float>(half);
#else
  return __half2float(__ushort_as_half(value.bits));
#endif
}

// Rounds to nearest, ties to even.
template <class T>
__device__ inline T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else if constexpr (std::is_same_v<T, bf16>) {
#if defined(FMK_EMULATE_CUDA)
    const uint32_t bits = float_to_bits(value);
    if (std::isnan(value)) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#else
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#endif
  } else {
    static_assert(std::is_same_v<T, f16>);
#if defined(FMK_EMULATE_CUDA)
    const _Float16 half = static_cast<_Float16>(value);
    f16 result;
    std::memcpy(&result.bits, &half, sizeof half);
    return result;
#else
    return {__half_as_ushort(__float2half_rn(value))};
#endif
  }
}

// Two elements side by side in a register, the first in the low half.
template <class T>
__device__ inline uint32_t pack(float first, float second) {
  return static_cast<uint32_t>(from_float<T>(first).bits) |
         static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}
template <class T>
__device__ inline float low_half(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word)});
}
template <class T>
__device__ inline float high_half(uint32_t word) {
  return to_float(T{static_cast<uint16_t>(word >> 16)});
}

// --- 16-byte vectors ---

struct alignas(16) Words4 {
  uint32_t word[4];
};

template <class T>
inline constexpr int kVectorElements = static_cast<int>(sizeof(Words4) / sizeof(T));

__device__ inline Words4 load16(const void* address) {
#if defined(FMK_EMULATE_CUDA)
  emu::check_aligned(address, sizeof(Words4));
  return *static_cast<const Words4*>(address);
#else
  const uint4 v = *static_cast<const uint4*>(address);
  return {{v.x, v.y, v.z, v.w}};
#endif
}
// Reads what other multiprocessors wrote: past this one's own cache.
__device__ inline Words4 load16_shared_by_grid(const void* address) {
#if defined(FMK_EMULATE_CUDA)
  return load16(address);
#else
  const uint4 v = __ldcg(static_cast<const uint4*>(address));
  return {{v.x, v.y, v.z, v.w}};
#endif
}
__device__ inline void store16(void* address, const Words4& value) {
#if defined(FMK_EMULATE_CUDA)
  emu::check_aligned(address, sizeof(Words4));
  *static_cast<Words4*>(address) = value;
#else
  *static_cast<uint4*>(address) =
      make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]);
#endif
}

// The elements of a vector as floats, and back.
template <class T>
__device__ inline void unpack(const Words4& vector, float (&values)[kVectorElements<T>]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      values[i] = bits_to_float(vector.word[i]);
    } else {
      values[2 * i] = low_half<T>(vector.word[i]);
      values[2 * i + 1] = high_half<T>(vector.word[i]);
    }
  }
}
template <class T>
__device__ inline Words4 pack_vector(const float (&values)[kVectorElements<T>]) {
  Words4 vector;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      vector.word[i] = float_to_bits(values[i]);
    } else {
      vector.word[i] = pack<T>(values[2 * i], values[2 * i + 1]);
    }
  }
  return vector;
}

// --- asynchronous copies to shared memory ---

// 16 bytes, zeros where not `valid` (then `source` is not read). Both aligned to 16.
__device__ inline void copy_async16(void* shared, const void* source, bool valid) {
#if defined(FMK_EMULATE_CUDA)
  emu::copy_async(shared, source, sizeof(Words4), valid ? sizeof(Words4) : 0);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(source), "r"(valid ? 16 : 0)
               : "memory");
#endif
}
__device__ inline void copy_async_commit() {
#if defined(FMK_EMULATE_CUDA)
  emu::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}
// Until at most `kGroupsLeft` of this thread's committed groups are under way.
template <int kGroupsLeft>
__device__ inline void copy_async_wait() {
#if defined(FMK_EMULATE_CUDA)
  emu::copy_async_wait(kGroupsLeft);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroupsLeft) : "memory");
#endif
}

// --- matrix fragments (PTX ISA, "Matrix fragments for mma.m16n8k16", "ldmatrix") ---

// Four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8, and
// gets from each the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; transposed: of column l
// / 4.
template <bool kTransposed>
__device__ inline void load_matrices(uint32_t (&matrix)[4], const void* shared_row) {
#if defined(FMK_EMULATE_CUDA)
  emu::check_aligned(shared_row, sizeof(Words4));
  const auto address = reinterpret_cast<uintptr_t>(shared_row);
  const emu::LaneData* lanes =
      emu::warp_share({static_cast<uint32_t>(address),
                       static_cast<uint32_t>(static_cast<uint64_t>(address) >> 32)});
  const unsigned lane = emu::self().lane(), outer = lane / 4, inner = lane % 4 * 2;
  for (unsigned m = 0; m < 4; ++m) {
    matrix[m] = 0;
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned row = kTransposed ? inner + i : outer,
                     column = kTransposed ? outer : inner + i;
      const emu::LaneData& owner = lanes[8 * m + row];
      const auto* elements = reinterpret_cast<const uint16_t*>(
          static_cast<uintptr_t>(static_cast<uint64_t>(owner[1]) << 32 | owner[0]));
      matrix[m] |= static_cast<uint32_t>(elements[column]) << 16 * i;
    }
  }
#else
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared_row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// d += A B for a 16x16 A and a 16x8 B of half-precision elements, summed in float. With g = lane /
// 4 and t = lane % 4 a lane holds
//   a: (g, 2t..2t+1) (g+8, 2t..) (g, 2t+8..) (g+8, 2t+8..)     [row, column of A]
//   b: (2t..2t+1, g) (2t+8.., g)                               [row, column of B]
//   d: (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1)
template <class T>
__device__ inline void multiply_fragments(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                          uint32_t a3, uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
#if defined(FMK_EMULATE_CUDA)
  const emu::LaneData* lanes = emu::warp_share({a0, a1, a2, a3, b0, b1});
  const unsigned lane = emu::self().lane(), g = lane / 4, t = lane % 4;
  const auto element = [&](unsigned owner, unsigned word, unsigned half) {
    return to_float(T{static_cast<uint16_t>(lanes[owner][word] >> 16 * half)});
  };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row_half = i / 2, column = 2 * t + i % 2;
    float sum = d[i];
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned k_half = k / 8, within = k % 8;
      const float a = element(4 * g + within / 2, 2 * k_half + row_half, within % 2);
      const float b = element(4 * column + within / 2, 4 + k_half, within % 2);
      sum += a * b;
    }
    d[i] = sum;
  }
#else
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
#endif
}

// --- a barrier of resident blocks ---

__device__ inline void add_release(unsigned* counter, unsigned value) {
#if defined(FMK_EMULATE_CUDA)
  std::atomic_ref<unsigned>(*counter).fetch_add(value, std::memory_order_acq_rel);
#else
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;\n" ::"l"(counter), "r"(value) : "memory");
#endif
}
__device__ inline unsigned load_acquire(unsigned* counter) {
#if defined(FMK_EMULATE_CUDA)
  emu::spin();
  return std::atomic_ref<unsigned>(*counter).load(std::memory_order_acquire);
#else
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];\n" : "=r"(value) : "l"(counter) : "memory");
  return value;
#endif
}

// Blocks of one cooperative launch wait for one another. The counter is zero at the launch and only
// grows, so nobody has to reset it and no arrival can be mistaken for one of another round.
class GridBarrier {
 public:
  __device__ GridBarrier(unsigned* arrivals, unsigned blocks)
      : arrivals_(arrivals), blocks_(blocks) {}

  // All threads of all blocks call it; what they stored before is seen by all after.
  __device__ void wait() {
    target_ += blocks_;
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      add_release(arrivals_, 1);
      while (static_cast<int>(load_acquire(arrivals_) - target_) < 0) {
      }
    }
    __syncthreads();
  }

 private:
  unsigned* arrivals_;
  unsigned blocks_, target_ = 0;
};

}  // namespace fmk::cuda
