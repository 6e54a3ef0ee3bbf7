// SPDX-License-Identifier: Apache-2.0
// Warp-wide matrix multiply for few rows: mma.sync m16n8k16 on bf16 or fp16, fp32 accumulators.
//
// Fragments (g = lane / 4, q = lane % 4): accumulator i is row g + 8 (i / 2), column 2 q + i % 2. A
// holds (row g, k 2q..), (g + 8, 2q..), (g, 2q + 8..), (g + 8, 2q + 8..); B holds (k 2q.., column
// g), (k 2q + 8.., column g). Two packed accumulators side by side are an A operand.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace sinkattn::hopper::ptx {

/// d += A B; A is 16 x 16, B is 16 x 8.
template <class T>
__device__ inline void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                    std::uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, __half>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace sinkattn::hopper::ptx
