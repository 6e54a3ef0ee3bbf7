// SPDX-License-Identifier: Apache-2.0
// Arithmetic on fp32 blocks: exp2, matrix products, packing. Compiled once per instruction set; the
// vector width follows the compiler's target. Internal linkage throughout (see element.h).
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/element.h"

namespace sinkattn::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
constexpr int tile_rows = 8;  // 8 x 3 accumulators and 3 operands of 32 registers
constexpr int tile_vectors = 3;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
constexpr int tile_rows = 4;  // 4 x 3 accumulators of 16 registers
constexpr int tile_vectors = 3;
#else
constexpr int vector_bytes = 16;
constexpr int tile_rows = 4;
constexpr int tile_vectors = 2;
#endif
constexpr int lanes = vector_bytes / 4;

using Vector = float __attribute__((vector_size(vector_bytes), may_alias));
using IntVector = std::int32_t __attribute__((vector_size(vector_bytes), may_alias));
using BitVector = std::uint32_t __attribute__((vector_size(vector_bytes), may_alias));

inline Vector load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

inline void store(float* to, Vector v) { std::memcpy(to, &v, sizeof(v)); }

inline Vector broadcast(float x) { return Vector{} + x; }

/// Rounds up to whole vectors: leading dimensions of all blocks are multiples of this.
constexpr std::int64_t padded(std::int64_t n) { return (n + lanes - 1) / lanes * lanes; }

/// 2^x. Exactly 0 below -126 (and for -inf), exactly 1 at 0, +inf from 128 on; NaN stays NaN.
/// x = n + f with |f| <= 1/2; 2^f is the Taylor polynomial of degree 7, whose first neglected term
/// (ln 2 / 2)^8 / 8! = 5.2e-9 is below half an ulp of fp32.
inline Vector exp2_vector(Vector x) {
  constexpr float ln2 = 0x1.62e42fefa39efp-1;
  constexpr float c2 = ln2 * ln2 / 2, c3 = c2 * ln2 / 3, c4 = c3 * ln2 / 4, c5 = c4 * ln2 / 5,
                  c6 = c5 * ln2 / 6, c7 = c6 * ln2 / 7;
  const Vector magic = broadcast(0x1.8p23f);  // adding it rounds to an integer in the low bits
  const IntVector tiny = x < broadcast(-126.0f);
  const IntVector huge = x >= broadcast(128.0f);
  const Vector clamped = tiny ? broadcast(-126.0f) : x;
  const Vector shifted = clamped + magic;
  const Vector f = clamped - (shifted - magic);
  Vector p = broadcast(c7);
  p = p * f + c6;
  p = p * f + c5;
  p = p * f + c4;
  p = p * f + c3;
  p = p * f + c2;
  p = p * f + ln2;
  p = p * f + 1.0f;
  // Unsigned: huge lanes wrap around here and are replaced below; NaN lanes stay NaN through p.
  const BitVector exponent = (std::bit_cast<BitVector>(shifted) << 23) + 0x3f800000;
  const Vector result = p * std::bit_cast<Vector>(exponent);
  return tiny ? Vector{} : (huge ? broadcast(std::numeric_limits<float>::infinity()) : result);
}

/// A matrix operand read one scalar at a time: element (row, k).
struct ScalarOperand {
  const float* data;
  std::int64_t row_stride;
  std::int64_t k_stride;
};

/// Rows x (Vectors * lanes) piece of C = [C +] A B; B row-major with leading dimension ldb.
template <int Rows, int Vectors>
inline void product_tile(std::int64_t depth, const ScalarOperand& a, const float* b,
                         std::int64_t ldb, float* c, std::int64_t ldc, bool accumulate) {
  Vector sum[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      sum[r][v] = accumulate ? load(c + r * ldc + v * lanes) : Vector{};
    }
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    Vector row[Vectors];
    for (int v = 0; v < Vectors; ++v) row[v] = load(b + k * ldb + v * lanes);
    for (int r = 0; r < Rows; ++r) {
      const Vector x = broadcast(a.data[r * a.row_stride + k * a.k_stride]);
      for (int v = 0; v < Vectors; ++v) sum[r][v] += x * row[v];
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) store(c + r * ldc + v * lanes, sum[r][v]);
  }
}

template <int Vectors>
inline void product_columns(std::int64_t rows, std::int64_t depth, ScalarOperand a, const float* b,
                            std::int64_t ldb, float* c, std::int64_t ldc, bool accumulate) {
  std::int64_t r = 0;
  for (; r + tile_rows <= rows; r += tile_rows) {
    product_tile<tile_rows, Vectors>(depth, a, b, ldb, c + r * ldc, ldc, accumulate);
    a.data += tile_rows * a.row_stride;
  }
  for (; r < rows; ++r) {
    product_tile<1, Vectors>(depth, a, b, ldb, c + r * ldc, ldc, accumulate);
    a.data += a.row_stride;
  }
}

/// C (rows x columns) = [C +] A (rows x depth) B (depth x columns). `columns` counts whole vectors.
inline void product(std::int64_t rows, std::int64_t columns, std::int64_t depth, ScalarOperand a,
                    const float* b, std::int64_t ldb, float* c, std::int64_t ldc, bool accumulate) {
  std::int64_t n = 0;
  for (; n + tile_vectors * lanes <= columns; n += tile_vectors * lanes) {
    product_columns<tile_vectors>(rows, depth, a, b + n, ldb, c + n, ldc, accumulate);
  }
  if constexpr (tile_vectors > 2) {
    if (n + 2 * lanes <= columns) {
      product_columns<2>(rows, depth, a, b + n, ldb, c + n, ldc, accumulate);
      n += 2 * lanes;
    }
  }
  for (; n < columns; n += lanes) {
    product_columns<1>(rows, depth, a, b + n, ldb, c + n, ldc, accumulate);
  }
}

/// to[column][row] = from[row][column]; rows beyond `rows` up to padded(rows) become zero.
inline void transpose(const float* from, std::int64_t ld_from, std::int64_t rows,
                      std::int64_t columns, float* to, std::int64_t ld_to) {
  constexpr std::int64_t step = 8;  // keeps one destination line per source column in cache
  for (std::int64_t r0 = 0; r0 < rows; r0 += step) {
    const std::int64_t r1 = r0 + step < rows ? r0 + step : rows;
    for (std::int64_t c = 0; c < columns; ++c) {
      for (std::int64_t r = r0; r < r1; ++r) to[c * ld_to + r] = from[r * ld_from + c];
    }
  }
  const std::int64_t end = padded(rows);
  for (std::int64_t c = 0; c < columns; ++c) {
    for (std::int64_t r = rows; r < end; ++r) to[c * ld_to + r] = 0.0f;
  }
}

inline void zero(float* data, std::int64_t n) {
  std::memset(data, 0, static_cast<std::size_t>(n) * sizeof(float));
}

/// Hands out pieces of one lane's workspace, aligned for vectors. Starting from null it only
/// counts.
class Arena {
 public:
  explicit Arena(void* memory) : start_(reinterpret_cast<std::uintptr_t>(memory)), next_(start_) {}

  float* floats(std::int64_t n) {
    const std::uintptr_t piece = next_;
    next_ += (static_cast<std::uintptr_t>(n) * sizeof(float) + 63) / 64 * 64;
    return reinterpret_cast<float*>(piece);
  }

  std::int64_t used() const { return static_cast<std::int64_t>(next_ - start_); }

 private:
  std::uintptr_t start_;
  std::uintptr_t next_;
};

}  // namespace
}  // namespace sinkattn::cpu
