// SPDX-License-Identifier: Apache-2.0
// Checked and normalised operations: what the backends see. check.cpp builds these from the public
// params; after that nobody looks at ranks, optional arguments or defaults again.
#pragma once

#include <cstdint>

#include "common/mask.h"
#include "common/sequence.h"
#include "sinkattn/params.h"

namespace sinkattn {

/// (batch, row, head, dim) data with last stride 1, strides in elements. Packed tensors have
/// stride_batch 0, paged caches one page per "batch" entry. data is null when not given.
struct HeadsTensor {
  void* data = nullptr;
  DType dtype = DType::undefined;
  std::int64_t stride_batch = 0;
  std::int64_t stride_row = 0;
  std::int64_t stride_head = 0;

  SINKATTN_HOST_DEVICE constexpr std::int64_t offset(std::int64_t batch, std::int64_t row,
                                                     std::int64_t head) const {
    return batch * stride_batch + row * stride_row + head * stride_head;
  }
};

/// (batch, head, row) statistics (LSE, its gradient, D'); packed: stride_batch 0. May be null.
struct RowsTensor {
  void* data = nullptr;
  DType dtype = DType::undefined;
  std::int64_t stride_batch = 0;
  std::int64_t stride_head = 0;
  std::int64_t stride_row = 1;

  SINKATTN_HOST_DEVICE constexpr std::int64_t offset(std::int64_t batch, std::int64_t head,
                                                     std::int64_t row) const {
    return batch * stride_batch + head * stride_head + row * stride_row;
  }
};

/// A 1-D or 2-D side array with any strides: sink (h,), descales (b, hk).
struct VectorView {
  void* data = nullptr;
  DType dtype = DType::undefined;
  std::int64_t stride[2] = {0, 0};
};

/// What forward and backward share.
struct AttentionShape {
  std::int64_t batch = 0;  ///< number of sequences
  std::int64_t heads_q = 0, heads_kv = 0;
  std::int64_t group = 1;  ///< heads_q / heads_kv
  std::int64_t head_dim = 0, head_dim_v = 0;
  bool packed_q = false, packed_k = false;
  std::int64_t rows_q = 0;  ///< rows of the query tensor: total_q, or sq per batch entry
  std::int64_t rows_k = 0;  ///< total_k, or capacity in slots per batch entry (paged: pages * size)
  std::int64_t longest_q = 0;  ///< upper bound of one sequence's rows, for grids
  std::int64_t longest_k = 0;  ///< upper bound of one sequence's keys
  SequenceSide side_q, side_k;
  Mask mask;
  double softmax_scale = 1.0;
  double softcap = 0.0;
  VectorView sink;  ///< data null: none
  int sm_margin = 0;
  bool describe = true;  ///< false: the plan may leave out its text
};

/// Row in `key`/`value` storage of key token t of sequence b: dense, packed and paged caches.
struct KeyStorage {
  HeadsTensor key, value;
  const std::int32_t* page_table = nullptr;  ///< (.., max_pages), row stride below
  std::int64_t page_table_stride = 0;
  std::int64_t page_size = 0;  ///< 0: not paged
  std::int64_t num_pages = 0;
  std::int64_t max_pages = 0;                     ///< entries of a page-table row
  std::int64_t cache_rows = 0;                    ///< dense: b_k; paged: rows of the page table
  const std::int32_t* cache_batch_idx = nullptr;  ///< (b,)

  SINKATTN_HOST_DEVICE std::int64_t cache_row(std::int64_t b) const {
    return cache_batch_idx == nullptr ? b : clamp_index(cache_batch_idx[b], 0, cache_rows - 1);
  }
};

struct ForwardProblem : AttentionShape {
  HeadsTensor query, query_v, out;
  KeyStorage keys;
  RowsTensor lse;                              ///< data null: not wanted
  VectorView q_descale, k_descale, v_descale;  ///< strides (batch, kv head)
  const std::int32_t* scheduler_metadata = nullptr;
  int num_splits = 1;
  PackGqa pack_gqa = PackGqa::automatic;
  DeviceType device = DeviceType::cpu;
};

struct BackwardProblem : AttentionShape {
  HeadsTensor query, key, value, out;
  HeadsTensor dout;        ///< data null: only dlse
  HeadsTensor dq, dk, dv;  ///< data null: not wanted
  RowsTensor lse, dlse, softmax_d;
  VectorView dsink;  ///< data null without a sink
  bool deterministic = false;
  DeviceType device = DeviceType::cpu;
};

struct AppendProblem {
  std::int64_t batch = 0, heads_q = 0, heads_kv = 0, head_dim = 0, head_dim_v = 0;
  HeadsTensor key_new, value_new;
  SequenceSide side_new;  ///< new tokens of each sequence
  std::int64_t longest_new = 0;
  KeyStorage cache;
  std::int64_t capacity = 0;  ///< slots per sequence: rows, or max_pages * page_size
  const std::int32_t* cache_seqlens = nullptr;
  const std::int32_t* cache_leftpad = nullptr;
  std::int32_t* seqused_after = nullptr;
  HeadsTensor query, query_rotated;  ///< data null without rotary
  SequenceSide side_q;
  bool packed_q = false;
  std::int64_t rows_q = 0, longest_q = 0;
  bool rotate_queries_by_position = false;  ///< causal or windowed: query i at offset + i
  const void* rotary_cos = nullptr;
  const void* rotary_sin = nullptr;
  std::int64_t rotary_stride = 0;     ///< elements between positions (cos and sin alike)
  std::int64_t rotary_dim = 0;        ///< 0: no rotary
  std::int64_t rotary_positions = 0;  ///< seqlen_ro
  const std::int32_t* rotary_seqlens = nullptr;
  bool rotary_interleaved = true;
  DeviceType device = DeviceType::cpu;
};

struct CombineProblem {
  std::int64_t splits = 0, batch = 0, rows = 0, heads = 0, head_dim_v = 0;  ///< packed: batch 1
  HeadsTensor out_partial;  ///< (batch, row, head); split stride below
  std::int64_t out_partial_stride_split = 0;
  RowsTensor lse_partial;
  std::int64_t lse_partial_stride_split = 0;
  HeadsTensor out;
  RowsTensor lse;
  VectorView sink;
  DeviceType device = DeviceType::cpu;
};

}  // namespace sinkattn
