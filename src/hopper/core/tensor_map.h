// SPDX-License-Identifier: Apache-2.0
// Tensor maps for the copy engine: one five-dimensional form for dense, packed and cached tensors.
//
// Dimensions, innermost first: column, row, offset, head, batch. Row and offset both have the
// stride of a row, and the base lies `rows` rows before the tensor. For row r of a sequence of
// `length` rows that starts at row `first` of the tensor, the coordinates are
//   row = rows - length + r,  offset = first + length,
// whose address is that of row first + r, and which is outside the map exactly for r >= length. So
// the hardware itself clips at the end of every sequence: loads fill with zeros, stores are
// dropped. There is no lower clip: never ask for r < 0.
// Every box must have a row and a column inside the tensor: for one that lies wholly outside, the
// copy engine touches the map's base address (seen on an H100: illegal address), and that lies
// before the tensor, where nothing need be mapped.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/problem.h"
#include "sinkattn/status.h"

namespace sinkattn::hopper {

/// What a tensor map depends on; equal keys give equal maps.
struct TensorMapKey {
  const void* data = nullptr;
  DType dtype = DType::undefined;
  std::int32_t box_rows = 0;  ///< rows of a box, 1 to 256; its columns are always 64
  std::int64_t columns = 0, rows = 0, heads = 0, batches = 0;
  std::int64_t stride_row = 0, stride_head = 0, stride_batch = 0;  ///< elements
  bool ragged = true;  ///< false: row r is coordinate r, and offset is 0; nothing clips

  friend bool operator==(const TensorMapKey&, const TensorMapKey&) = default;
};

/// Key of a (batch, row, head, column) tensor. `rows` bounds every sequence in it.
TensorMapKey tensor_map_key(const HeadsTensor& tensor, std::int64_t columns, std::int64_t rows,
                            std::int64_t heads, std::int64_t batches, int box_rows);

/// Encodes the map of `key`, or takes it from this thread's cache.
Status make_tensor_map(const TensorMapKey& key, CUtensorMap* map);

}  // namespace sinkattn::hopper
