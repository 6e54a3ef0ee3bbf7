// SPDX-License-Identifier: Apache-2.0
// Strided views of tensors that the caller owns. The core never allocates or frees tensor memory.
#pragma once

#include <cstdint>

namespace sinkattn {

enum class DType : std::uint8_t {
  undefined = 0,
  float64,
  float32,
  bfloat16,
  float16,
  float8_e4m3,  ///< OCP e4m3fn: no infinity, one NaN pattern per sign
  int32,
};

/// Bytes per element; 0 for undefined.
constexpr int dtype_size(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return 8;
    case DType::float32:
    case DType::int32:
      return 4;
    case DType::bfloat16:
    case DType::float16:
      return 2;
    case DType::float8_e4m3:
      return 1;
    case DType::undefined:
      break;
  }
  return 0;
}

/// Name used in error messages.
constexpr const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return "float64";
    case DType::float32:
      return "float32";
    case DType::bfloat16:
      return "bfloat16";
    case DType::float16:
      return "float16";
    case DType::float8_e4m3:
      return "float8_e4m3";
    case DType::int32:
      return "int32";
    case DType::undefined:
      break;
  }
  return "undefined";
}

enum class DeviceType : std::uint8_t { cpu = 0, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;  ///< CUDA ordinal; 0 for the CPU

  friend constexpr bool operator==(Device a, Device b) {
    return a.type == b.type && a.index == b.index;
  }
  friend constexpr bool operator!=(Device a, Device b) { return !(a == b); }
};

/// A tensor argument: base pointer of element (0, .., 0), shape and strides in ELEMENTS.
/// A default-constructed view means "argument not given".
struct TensorView {
  static constexpr int max_rank = 5;

  void* data = nullptr;
  DType dtype = DType::undefined;
  Device device;
  int rank = 0;
  std::int64_t shape[max_rank] = {};
  std::int64_t stride[max_rank] = {};

  constexpr bool defined() const { return dtype != DType::undefined; }

  constexpr std::int64_t numel() const {
    std::int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }

  /// Size and stride counted from the last dimension: size_back(0) is the innermost size.
  constexpr std::int64_t size_back(int i) const { return shape[rank - 1 - i]; }
  constexpr std::int64_t stride_back(int i) const { return stride[rank - 1 - i]; }

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace sinkattn
