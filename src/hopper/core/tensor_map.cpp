// SPDX-License-Identifier: Apache-2.0
#include "hopper/core/tensor_map.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>

#include "hopper/device.h"

namespace sinkattn::hopper {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

/// The driver's encoder, looked up once; the library is not linked against the driver.
Status encoder(Encode* result) {
  static Encode found = nullptr;
  static const Status status = []() -> Status {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult query{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &query);
    SINKATTN_RETURN_IF_ERROR(cuda_status(error, "cuTensorMapEncodeTiled"));
    if (query != cudaDriverEntryPointSuccess || function == nullptr) {
      return Status::error(
          StatusCode::runtime_error,
          "driver: expected one that encodes tensor maps (CUDA 12.0), got another");
    }
    found = reinterpret_cast<Encode>(function);
    return {};
  }();
  *result = found;
  return status;
}

Status encode(const TensorMapKey& key, CUtensorMap* map) {
  Encode function = nullptr;
  SINKATTN_RETURN_IF_ERROR(encoder(&function));
  constexpr cuuint64_t element = 2;
  const auto size = [](std::int64_t n) {
    return static_cast<cuuint64_t>(std::max<std::int64_t>(n, 1));
  };
  // The stride of a dimension of one element is never used, but must be valid.
  const auto stride = [](std::int64_t elements, std::int64_t extent) {
    return extent > 1 ? static_cast<cuuint64_t>(elements) * element : cuuint64_t{16};
  };
  const cuuint64_t row_stride = stride(key.stride_row, key.rows);
  const cuuint64_t offsets = key.ragged ? size(key.rows) + 1 : 1;
  const cuuint64_t sizes[5] = {size(key.columns), size(key.rows), offsets, size(key.heads),
                               size(key.batches)};
  const cuuint64_t strides[4] = {row_stride, row_stride, stride(key.stride_head, key.heads),
                                 stride(key.stride_batch, key.batches)};
  const cuuint32_t box[5] = {64, static_cast<cuuint32_t>(key.box_rows), 1, 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const auto data = reinterpret_cast<std::uintptr_t>(key.data);
  const auto base = key.ragged ? data - size(key.rows) * row_stride : data;
  const CUtensorMapDataType type = key.dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult error =
      function(map, type, 5, reinterpret_cast<void*>(base), sizes, strides, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error == CUDA_SUCCESS) return {};
  return Status::error(StatusCode::runtime_error,
                       "cuTensorMapEncodeTiled: expected success, got CUDA driver error %d for "
                       "strides of %lld, %lld and %lld elements",
                       static_cast<int>(error), static_cast<long long>(key.stride_row),
                       static_cast<long long>(key.stride_head),
                       static_cast<long long>(key.stride_batch));
}

/// Encoding costs about a microsecond and a training loop sees the same few tensors again and
/// again. Direct mapped; a collision encodes again.
struct CachedMap {
  TensorMapKey key;
  CUtensorMap map;
};

constexpr std::size_t cache_size = 64;

std::size_t cache_slot(const TensorMapKey& key) {
  const auto mix = [](std::size_t h, std::uint64_t x) {
    return (h ^ x) * std::size_t{0x9E3779B97F4A7C15};
  };
  std::size_t h = reinterpret_cast<std::uintptr_t>(key.data) >> 4;
  h = mix(h, static_cast<std::uint64_t>(key.box_rows));
  h = mix(h, static_cast<std::uint64_t>(key.rows));
  h = mix(h, static_cast<std::uint64_t>(key.columns));
  return h >> 58;
}

}  // namespace

TensorMapKey tensor_map_key(const HeadsTensor& tensor, std::int64_t columns, std::int64_t rows,
                            std::int64_t heads, std::int64_t batches, int box_rows) {
  TensorMapKey key;
  key.data = tensor.data;
  key.dtype = tensor.dtype;
  key.box_rows = box_rows;
  key.columns = columns;
  key.rows = rows;
  key.heads = heads;
  key.batches = batches;
  key.stride_row = tensor.stride_row;
  key.stride_head = tensor.stride_head;
  key.stride_batch = tensor.stride_batch;
  return key;
}

Status make_tensor_map(const TensorMapKey& key, CUtensorMap* map) {
  static thread_local CachedMap cache[cache_size];
  CachedMap& entry = cache[cache_slot(key)];
  if (entry.key.data == nullptr || !(entry.key == key)) {
    entry.key = {};
    SINKATTN_RETURN_IF_ERROR(encode(key, &entry.map));
    entry.key = key;
  }
  *map = entry.map;
  return {};
}

}  // namespace sinkattn::hopper
