// SPDX-License-Identifier: Apache-2.0
// Building blocks of the argument checks: one rule each, one error text form.
#pragma once

#include <cstdint>

#include "common/problem.h"
#include "sinkattn/status.h"

namespace sinkattn::check {

/// Sizes whose product could leave 64 bits are refused; no tensor that exists comes near it.
inline constexpr std::int64_t max_extent = std::int64_t{1} << 47;

Status defined(const TensorView& tensor, const char* name);
Status rank(const TensorView& tensor, const char* name, int expected);
Status dtype(const TensorView& tensor, const char* name, DType expected);
Status size(const TensorView& tensor, const char* name, int dimension, std::int64_t expected);
Status same_device(const TensorView& tensor, const char* name, Device expected);

/// int32 vector of `length` entries, contiguous, on `device`; undefined is fine.
Status index_vector(const TensorView& tensor, const char* name, std::int64_t length, Device device);

/// Last stride 1, no negative stride, sizes within bounds; on CUDA also 16-byte alignment of the
/// base pointer and of every other stride.
Status data_layout(const TensorView& tensor, const char* name);

Status head_dims(std::int64_t head_dim, std::int64_t head_dim_v, DType type, Device device);
Status softmax_scale(const std::optional<double>& scale);
Status softcap(double softcap);
Status mask(const MaskParams& params);
Status sink(const TensorView& sink, std::int64_t heads, DType query_dtype, Device device);

/// Dtypes a backend computes in.
Status compute_dtype(const TensorView& query, bool with_e4m3);

HeadsTensor heads_tensor(const TensorView& tensor, bool packed);
RowsTensor rows_tensor(const TensorView& tensor, bool packed);
VectorView vector_view(const TensorView& tensor);
const std::int32_t* index_data(const TensorView& tensor);

/// Statistics tensor: (b, h, rows) or packed (h, rows), fp32 (fp64 with fp64 queries).
Status statistics(const TensorView& tensor, const char* name, const AttentionShape& shape,
                  DType query_dtype, Device device);

/// The tensors both directions have in common; fills the shape and checks everything about it.
struct SharedArguments {
  const TensorView& query;
  const TensorView& key;
  const TensorView& value;
  const TensorView& cu_seqlens_q;
  const TensorView& cu_seqlens_k;
  const TensorView& seqused_q;
  const TensorView& seqused_k;
  std::int64_t max_seqlen_q;
  std::int64_t max_seqlen_k;
  const TensorView& page_table;
  const TensorView& cache_batch_idx;
  const TensorView& cache_leftpad;
  const TensorView& learnable_sink;
  const std::optional<double>& softmax_scale;
  const MaskParams& mask;
  double softcap;
  int sm_margin;
  bool with_e4m3;
  bool with_query_v;
};
Status shared(const SharedArguments& arguments, AttentionShape* shape);

/// Page table or dense cache behind key and value.
Status key_storage(const TensorView& key, const TensorView& value, const TensorView& page_table,
                   const TensorView& cache_batch_idx, std::int64_t batch, bool packed,
                   Device device, KeyStorage* storage);

}  // namespace sinkattn::check
