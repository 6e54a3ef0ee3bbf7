// SPDX-License-Identifier: Apache-2.0
// Single elements of the storage dtypes, for the few values outside inner loops.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/problem.h"

namespace sinkattn::hopper {

/// data[index] of a fp32, bf16 or fp16 array.
__device__ inline float load_element(const void* data, DType dtype, std::int64_t index) {
  switch (dtype) {
    case DType::bfloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
    case DType::float16:
      return __half2float(static_cast<const __half*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

/// data[index] = value, rounded to nearest even.
__device__ inline void store_element(void* data, DType dtype, std::int64_t index, float value) {
  switch (dtype) {
    case DType::bfloat16:
      static_cast<__nv_bfloat16*>(data)[index] = __float2bfloat16_rn(value);
      break;
    case DType::float16:
      static_cast<__half*>(data)[index] = __float2half_rn(value);
      break;
    default:
      static_cast<float*>(data)[index] = value;
      break;
  }
}

/// The sink of a head; -inf where there is none.
__device__ inline float load_sink(const VectorView& sink, std::int64_t head) {
  if (sink.data == nullptr) return -INFINITY;
  return load_element(sink.data, sink.dtype, head * sink.stride[0]);
}

}  // namespace sinkattn::hopper
