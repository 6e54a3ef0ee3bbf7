// SPDX-License-Identifier: Apache-2.0
// Arguments and instances of the general forward kernel.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/problem.h"
#include "hopper/kernels/forward_config.h"
#include "sinkattn/status.h"

namespace sinkattn::hopper {

/// The order in which tiles of query rows are handed out; see core/scheduler.cuh.
struct TileOrder {
  std::int32_t* counter = nullptr;  ///< next tile, zero at launch; null: tile t + grid follows t
  std::int32_t tile_rows = 0;
  std::int32_t sequences = 0;  ///< dense: batch entries; packed: sequences
  std::int32_t heads = 0;      ///< query heads
  std::int32_t group = 0;      ///< query heads per KV head
  std::int32_t splits = 1;
  std::int32_t levels = 0;    ///< dense: tiles per sequence; packed: found on the device
  std::int32_t units = 0;     ///< KV heads; dense: of all batch entries
  std::int32_t sections = 1;  ///< at most `units`: parts of them whose keys and values share the L2
  bool packed = false;

  /// First unit of a section. The sizes differ by one at most, the larger ones come last: the last
  /// section must not be shorter than its longest tile, or the machine waits for that tile.
  __host__ __device__ inline std::int32_t first_unit(std::int32_t index) const {
    const std::int32_t larger = index - (sections - units % sections);
    return index * (units / sections) + (larger > 0 ? larger : 0);
  }
  /// The section of a unit: the inverse of first_unit().
  __host__ __device__ inline std::int32_t section_of(std::int32_t unit) const {
    const std::int32_t size = units / sections, smaller = sections - units % sections;
    return unit < smaller * size ? unit / size : smaller + (unit - smaller * size) / (size + 1);
  }
};

/// Everything a forward kernel reads. Passed by value: the tensor maps lie in constant memory.
struct ForwardArguments {
  CUtensorMap query, key, value, out;
  TileOrder order;
  SequenceSide side_q, side_k;
  Mask32 mask;
  KeyStorage keys;
  bool keys_packed;
  std::int32_t page_box_rows;  ///< paged: rows of a box; divides the page and the key block
  RowsTensor lse;              ///< null: not wanted; with splits that of the partials
  HeadsTensor zero_out;        ///< out again, for the rows that take no part
  VectorView sink;             ///< null with splits: the merge adds it
  float scale;                 ///< raw score (after the soft cap) -> natural units
  float scale_log2;
  float rescale_limit;  ///< growth of the maximum (raw) that the exponentials tolerate
  float softcap;        ///< 0: none
  float scale_over_cap;
  std::int32_t map_rows_q, map_rows_k;  ///< `rows` of the tensor maps
  std::int32_t head_dim_v;
  std::int32_t query_slabs, value_slabs;  ///< of 64 columns, that the tensors have
  float* out_partial;  ///< fp32 (split, batch, row, head, column); null without splits
  std::int64_t partial_stride_split, partial_stride_batch, partial_stride_row;
  std::int64_t lse_stride_split;
};

/// One compiled kernel.
struct ForwardInstance {
  const char* name;
  DType dtype;
  int head_dim, head_dim_v;
  ForwardUse use;
  bool paged;
  int tile_m, tile_n;
  int threads;
  int shared_bytes;
  const void* kernel;
};

/// The instance for these dimensions, rounded up to a compiled pair, and for this use if there is
/// one; null if no pair is large enough.
const ForwardInstance* find_forward(DType dtype, std::int64_t head_dim, std::int64_t head_dim_v,
                                    ForwardUse use, bool paged);

}  // namespace sinkattn::hopper
