// SPDX-License-Identifier: Apache-2.0
// Elements of every storage dtype to and from a compute type. Everything here has internal linkage:
// the header is compiled for several instruction sets.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

#include "sinkattn/tensor.h"

namespace sinkattn::cpu {
namespace {

inline float bfloat16_to_float(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

/// Round to nearest even; a NaN stays a NaN (its payload could round to infinity).
inline std::uint16_t float_to_bfloat16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/// OCP 8-bit floating point, E4M3: bias 7, no infinity, S.1111.111 is NaN.
inline float e4m3_to_float(std::uint8_t bits) {
  const int exponent = (bits >> 3) & 15;
  const int mantissa = bits & 7;
  float magnitude;
  if (exponent == 15 && mantissa == 7) {
    magnitude = std::numeric_limits<float>::quiet_NaN();
  } else if (exponent == 0) {
    magnitude = static_cast<float>(mantissa) * 0x1p-9f;
  } else {
    magnitude =
        std::bit_cast<float>(static_cast<std::uint32_t>((exponent + 120) << 23 | mantissa << 20));
  }
  return (bits & 0x80) != 0 ? -magnitude : magnitude;
}

/// `T::load` and `T::store` of one dtype; Storage is its memory type.
struct Float64 {
  using Storage = double;
  static double load(double x) { return x; }
  static double store(double x) { return x; }
};
struct Float32 {
  using Storage = float;
  static float load(float x) { return x; }
  static float store(float x) { return x; }
};
struct BFloat16 {
  using Storage = std::uint16_t;
  static float load(std::uint16_t x) { return bfloat16_to_float(x); }
  static std::uint16_t store(float x) { return float_to_bfloat16(x); }
};
struct Float16 {
  using Storage = _Float16;
  static float load(_Float16 x) { return static_cast<float>(x); }
  static _Float16 store(float x) { return static_cast<_Float16>(x); }
};
struct Float8E4M3 {
  using Storage = std::uint8_t;
  static float load(std::uint8_t x) { return e4m3_to_float(x); }
};

/// Calls `function(T{})` with the element type of a dtype that loads.
template <class Function>
inline decltype(auto) with_element(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::float64:
      return function(Float64{});
    case DType::bfloat16:
      return function(BFloat16{});
    case DType::float16:
      return function(Float16{});
    case DType::float8_e4m3:
      return function(Float8E4M3{});
    default:
      return function(Float32{});
  }
}

/// One element by dtype; for the few values outside inner loops (sinks, descales).
inline double load_element(const void* data, DType dtype, std::int64_t index) {
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    return static_cast<double>(T::load(static_cast<const typename T::Storage*>(data)[index]));
  });
}

/// Stores one element, rounding once.
inline void store_element(void* data, DType dtype, std::int64_t index, double value) {
  switch (dtype) {
    case DType::float64:
      static_cast<double*>(data)[index] = value;
      break;
    case DType::bfloat16:
      static_cast<std::uint16_t*>(data)[index] = float_to_bfloat16(static_cast<float>(value));
      break;
    case DType::float16:
      static_cast<_Float16*>(data)[index] = Float16::store(static_cast<float>(value));
      break;
    default:
      static_cast<float*>(data)[index] = static_cast<float>(value);
      break;
  }
}

/// n contiguous elements from `offset` into compute values.
template <class Compute>
inline void load_row(const void* data, DType dtype, std::int64_t offset, std::int64_t n,
                     Compute* to) {
  with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const auto* from = static_cast<const typename T::Storage*>(data) + offset;
    for (std::int64_t i = 0; i < n; ++i) to[i] = static_cast<Compute>(T::load(from[i]));
  });
}

/// n compute values, multiplied by `factor`, into contiguous elements at `offset`.
template <class Compute>
inline void store_row(void* data, DType dtype, std::int64_t offset, std::int64_t n,
                      const Compute* from, Compute factor) {
  const auto store = [&](auto element) {
    using T = decltype(element);
    auto* to = static_cast<typename T::Storage*>(data) + offset;
    for (std::int64_t i = 0; i < n; ++i) {
      to[i] = T::store(static_cast<decltype(T::load(to[i]))>(from[i] * factor));
    }
  };
  switch (dtype) {
    case DType::float64:
      store(Float64{});
      break;
    case DType::bfloat16:
      store(BFloat16{});
      break;
    case DType::float16:
      store(Float16{});
      break;
    default:
      store(Float32{});
      break;
  }
}

}  // namespace
}  // namespace sinkattn::cpu
