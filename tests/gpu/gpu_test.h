// SPDX-License-Identifier: Apache-2.0
// What the tests of the kernel building blocks share: a fixture that skips where no Hopper GPU is,
// device arrays, 16-bit values that make every sum exact.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "sinkattn/tensor.h"

namespace sinkattn::hopper::testing {

/// Empty if this process can run sm_90a kernels, else why not.
inline std::string missing_hopper() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return std::string("no usable GPU: ") + cudaGetErrorString(error);
  if (count == 0) return "no GPU";
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0);
  if (major == 9 && minor == 0) return {};
  return "needs compute capability 9.0, the GPU has " + std::to_string(major) + "." +
         std::to_string(minor);
}

class HopperTest : public ::testing::Test {
 protected:
  void SetUp() override {
    static const std::string reason = missing_hopper();
    if (!reason.empty()) GTEST_SKIP() << reason;
  }
};

#define ASSERT_CUDA(expression)                                                                    \
  do {                                                                                             \
    const cudaError_t cuda_error_ = (expression);                                                  \
    ASSERT_EQ(cuda_error_, cudaSuccess) << #expression << ": " << cudaGetErrorString(cuda_error_); \
  } while (false)

/// Memory of the GPU with a copy on the host. Errors surface at the next ASSERT_CUDA.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(std::size_t count) : host(count) { cudaMalloc(&device_, bytes()); }
  DeviceArray(std::size_t count, T value) : host(count, value) {
    cudaMalloc(&device_, bytes());
    upload();
  }
  explicit DeviceArray(std::vector<T> values) : host(std::move(values)) {
    cudaMalloc(&device_, bytes());
    upload();
  }
  ~DeviceArray() { cudaFree(device_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* device() const { return device_; }
  cudaError_t upload() { return cudaMemcpy(device_, host.data(), bytes(), cudaMemcpyHostToDevice); }
  /// Waits for the kernels before it.
  cudaError_t download() {
    return cudaMemcpy(host.data(), device_, bytes(), cudaMemcpyDeviceToHost);
  }

  std::vector<T> host;

 private:
  std::size_t bytes() const { return host.size() * sizeof(T); }

  T* device_ = nullptr;
};

/// 16-bit elements travel as bits, so that NaNs and canaries compare exactly.
using Bits = std::uint16_t;

template <class T>
inline constexpr DType dtype_of = std::is_same_v<T, __half> ? DType::float16 : DType::bfloat16;

inline constexpr Bits nan_bits = 0x7FFF;  // a NaN of bfloat16 and of float16 alike

template <class T>
Bits bits_of(float value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half_as_ushort(__float2half_rn(value));
  } else {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
}

/// Small reproducible integers in [-limit, limit]: products and sums of them are exact in fp32.
class Integers {
 public:
  explicit Integers(std::uint32_t seed) : state_(seed * 2654435761u + 1) {}

  int next(int limit) {
    state_ = state_ * 1664525u + 1013904223u;
    return static_cast<int>((state_ >> 16) % static_cast<std::uint32_t>(2 * limit + 1)) - limit;
  }
  std::vector<int> many(std::size_t count, int limit) {
    std::vector<int> values(count);
    for (int& x : values) x = next(limit);
    return values;
  }

 private:
  std::uint32_t state_;
};

template <class T>
std::vector<Bits> to_bits(const std::vector<int>& values) {
  std::vector<Bits> bits(values.size());
  for (std::size_t i = 0; i < values.size(); ++i)
    bits[i] = bits_of<T>(static_cast<float>(values[i]));
  return bits;
}

/// Launches with dynamic shared memory beyond 48 KiB.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int blocks, int threads, std::size_t shared_bytes,
                   Arguments... arguments) {
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error != cudaSuccess) return error;
  kernel<<<blocks, threads, shared_bytes>>>(static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
}

}  // namespace sinkattn::hopper::testing
