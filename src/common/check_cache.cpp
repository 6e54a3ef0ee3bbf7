// SPDX-License-Identifier: Apache-2.0
// Checks of the operations around the KV cache and of merging partial results.
#include <cinttypes>

#include "common/check.h"
#include "common/check_detail.h"
#include "sinkattn/attention.h"

namespace sinkattn {
namespace {

Status same_dtype(const TensorView& tensor, const char* name, DType expected, const char* of) {
  if (tensor.dtype == expected) return {};
  return Status::error(StatusCode::type_error, "%s: expected the dtype of %s, %s, got %s", name, of,
                       dtype_name(expected), dtype_name(tensor.dtype));
}

Status check_new_tokens(const AppendParams& p, bool packed, AppendProblem* problem) {
  const Device device = p.key_cache.device;
  const struct {
    const TensorView& tensor;
    const TensorView& cache;
    const char* name;
    const char* cache_name;
  } sides[] = {{p.key_new, p.key_cache, "k", "k_cache"},
               {p.value_new, p.value_cache, "v", "v_cache"}};
  for (const auto& side : sides) {
    SINKATTN_RETURN_IF_ERROR(check::defined(side.tensor, side.name));
    SINKATTN_RETURN_IF_ERROR(check::same_device(side.tensor, side.name, device));
    SINKATTN_RETURN_IF_ERROR(same_dtype(side.tensor, side.name, side.cache.dtype, side.cache_name));
    SINKATTN_RETURN_IF_ERROR(check::rank(side.tensor, side.name, packed ? 3 : 4));
    SINKATTN_RETURN_IF_ERROR(check::data_layout(side.tensor, side.name));
    const int last = side.tensor.rank - 1;
    SINKATTN_RETURN_IF_ERROR(check::size(side.tensor, side.name, last - 1, problem->heads_kv));
    SINKATTN_RETURN_IF_ERROR(check::size(side.tensor, side.name, last, side.cache.size_back(0)));
  }
  for (int i = 0; i < p.key_new.rank - 2; ++i) {
    SINKATTN_RETURN_IF_ERROR(check::size(p.value_new, "v", i, p.key_new.shape[i]));
  }
  if (!packed) SINKATTN_RETURN_IF_ERROR(check::size(p.key_new, "k", 0, problem->batch));
  const std::int64_t rows = p.key_new.shape[packed ? 0 : 1];
  problem->key_new = check::heads_tensor(p.key_new, packed);
  problem->value_new = check::heads_tensor(p.value_new, packed);
  problem->side_new = {check::index_data(p.cu_seqlens_k_new), nullptr, nullptr, rows, -1};
  problem->longest_new = rows;
  return {};
}

Status check_caches(const AppendParams& p, AppendProblem* problem) {
  const Device device = p.key_cache.device;
  SINKATTN_RETURN_IF_ERROR(check::defined(p.value_cache, "v_cache"));
  SINKATTN_RETURN_IF_ERROR(check::same_device(p.value_cache, "v_cache", device));
  SINKATTN_RETURN_IF_ERROR(same_dtype(p.value_cache, "v_cache", p.key_cache.dtype, "k_cache"));
  SINKATTN_RETURN_IF_ERROR(check::rank(p.key_cache, "k_cache", 4));
  SINKATTN_RETURN_IF_ERROR(check::rank(p.value_cache, "v_cache", 4));
  for (int i = 0; i < 3; ++i) {
    SINKATTN_RETURN_IF_ERROR(check::size(p.value_cache, "v_cache", i, p.key_cache.shape[i]));
  }
  SINKATTN_RETURN_IF_ERROR(check::data_layout(p.key_cache, "k_cache"));
  SINKATTN_RETURN_IF_ERROR(check::data_layout(p.value_cache, "v_cache"));
  problem->heads_kv = p.key_cache.shape[2];
  problem->head_dim = p.key_cache.shape[3];
  problem->head_dim_v = p.value_cache.shape[3];
  SINKATTN_RETURN_IF_ERROR(check::defined(p.cache_seqlens, "cache_seqlens"));
  SINKATTN_RETURN_IF_ERROR(check::rank(p.cache_seqlens, "cache_seqlens", 1));
  problem->batch = p.cache_seqlens.shape[0];
  const std::int64_t batch = problem->batch;
  SINKATTN_RETURN_IF_ERROR(check::index_vector(p.cache_seqlens, "cache_seqlens", batch, device));
  SINKATTN_RETURN_IF_ERROR(
      check::index_vector(p.cache_batch_idx, "cache_batch_idx", batch, device));
  SINKATTN_RETURN_IF_ERROR(check::index_vector(p.cache_leftpad, "cache_leftpad", batch, device));
  SINKATTN_RETURN_IF_ERROR(
      check::index_vector(p.seqused_k_after, "seqused_k_after", batch, device));
  SINKATTN_RETURN_IF_ERROR(
      check::index_vector(p.cu_seqlens_k_new, "cu_seqlens_k_new", batch + 1, device));
  SINKATTN_RETURN_IF_ERROR(check::key_storage(p.key_cache, p.value_cache, p.page_table,
                                              p.cache_batch_idx, batch, false, device,
                                              &problem->cache));
  problem->capacity =
      p.page_table.defined() ? p.page_table.shape[1] * p.key_cache.shape[1] : p.key_cache.shape[1];
  return {};
}

Status check_rotary_tables(const AppendParams& p, AppendProblem* problem) {
  const Device device = p.key_cache.device;
  if (!p.rotary_sin.defined() || !p.rotary_cos.defined()) {
    return Status::error(StatusCode::value_error,
                         "rotary_sin: expected together with rotary_cos, got one of them");
  }
  const struct {
    const TensorView& tensor;
    const char* name;
  } tables[] = {{p.rotary_cos, "rotary_cos"}, {p.rotary_sin, "rotary_sin"}};
  for (const auto& table : tables) {
    SINKATTN_RETURN_IF_ERROR(check::same_device(table.tensor, table.name, device));
    SINKATTN_RETURN_IF_ERROR(same_dtype(table.tensor, table.name, p.key_cache.dtype, "q"));
    SINKATTN_RETURN_IF_ERROR(check::rank(table.tensor, table.name, 2));
    if (table.tensor.stride[1] != 1 && table.tensor.shape[1] > 1) {
      return Status::error(StatusCode::value_error,
                           "%s: expected stride 1 in the last dimension, got another", table.name);
    }
  }
  SINKATTN_RETURN_IF_ERROR(check::size(p.rotary_sin, "rotary_sin", 0, p.rotary_cos.shape[0]));
  SINKATTN_RETURN_IF_ERROR(check::size(p.rotary_sin, "rotary_sin", 1, p.rotary_cos.shape[1]));
  if (p.rotary_sin.stride[0] != p.rotary_cos.stride[0]) {
    return Status::error(StatusCode::value_error,
                         "rotary_sin: expected the strides of rotary_cos, got others");
  }
  problem->rotary_dim = 2 * p.rotary_cos.shape[1];
  if (problem->rotary_dim < 16 || problem->rotary_dim % 16 != 0 ||
      problem->rotary_dim > problem->head_dim) {
    return Status::error(StatusCode::value_error,
                         "rotary_cos: expected a rotary dim (twice its last size) that is a "
                         "positive multiple of 16 and <= %" PRId64 ", got %" PRId64,
                         problem->head_dim, problem->rotary_dim);
  }
  problem->rotary_positions = p.rotary_cos.shape[0];
  if (problem->rotary_positions < 1 ||
      (p.page_table.defined() && problem->rotary_positions < problem->capacity)) {
    return Status::error(StatusCode::value_error,
                         "rotary_cos: expected at least %" PRId64 " positions, got %" PRId64,
                         p.page_table.defined() ? problem->capacity : std::int64_t{1},
                         problem->rotary_positions);
  }
  SINKATTN_RETURN_IF_ERROR(
      check::index_vector(p.rotary_seqlens, "rotary_seqlens", problem->batch, device));
  problem->rotary_cos = p.rotary_cos.data;
  problem->rotary_sin = p.rotary_sin.data;
  problem->rotary_stride = p.rotary_cos.stride[0];
  problem->rotary_seqlens = check::index_data(p.rotary_seqlens);
  problem->rotary_interleaved = p.rotary_interleaved;
  return {};
}

Status check_rotated_query(const AppendParams& p, AppendProblem* problem) {
  const Device device = p.key_cache.device;
  const bool packed = p.cu_seqlens_q.defined();
  SINKATTN_RETURN_IF_ERROR(check::defined(p.query, "q"));
  SINKATTN_RETURN_IF_ERROR(check::defined(p.query_rotated, "q"));
  SINKATTN_RETURN_IF_ERROR(check::same_device(p.query, "q", device));
  SINKATTN_RETURN_IF_ERROR(same_dtype(p.query, "q", p.key_cache.dtype, "k_cache"));
  SINKATTN_RETURN_IF_ERROR(check::rank(p.query, "q", packed ? 3 : 4));
  SINKATTN_RETURN_IF_ERROR(check::data_layout(p.query, "q"));
  SINKATTN_RETURN_IF_ERROR(check::data_layout(p.query_rotated, "q"));
  SINKATTN_RETURN_IF_ERROR(check::rank(p.query_rotated, "q", p.query.rank));
  SINKATTN_RETURN_IF_ERROR(same_dtype(p.query_rotated, "q", p.query.dtype, "q"));
  for (int i = 0; i < p.query.rank; ++i) {
    SINKATTN_RETURN_IF_ERROR(check::size(p.query_rotated, "q", i, p.query.shape[i]));
  }
  SINKATTN_RETURN_IF_ERROR(check::size(p.query, "q", p.query.rank - 1, problem->head_dim));
  if (!packed) SINKATTN_RETURN_IF_ERROR(check::size(p.query, "q", 0, problem->batch));
  SINKATTN_RETURN_IF_ERROR(
      check::index_vector(p.cu_seqlens_q, "cu_seqlens_q", problem->batch + 1, device));
  SINKATTN_RETURN_IF_ERROR(check::index_vector(p.seqused_q, "seqused_q", problem->batch, device));
  problem->heads_q = p.query.size_back(1);
  problem->packed_q = packed;
  problem->rows_q = p.query.shape[packed ? 0 : 1];
  problem->longest_q = packed && p.max_seqlen_q >= 0 && p.max_seqlen_q < problem->rows_q
                           ? p.max_seqlen_q
                           : problem->rows_q;
  problem->side_q = {check::index_data(p.cu_seqlens_q), check::index_data(p.seqused_q), nullptr,
                     problem->rows_q, p.max_seqlen_q};
  problem->query = check::heads_tensor(p.query, packed);
  problem->query_rotated = check::heads_tensor(p.query_rotated, packed);
  return {};
}

}  // namespace

Status make_append_problem(const AppendParams& p, AppendProblem* problem) {
  *problem = {};
  SINKATTN_RETURN_IF_ERROR(check::defined(p.key_cache, "k_cache"));
  SINKATTN_RETURN_IF_ERROR(check_caches(p, problem));
  SINKATTN_RETURN_IF_ERROR(check_new_tokens(p, p.cu_seqlens_k_new.defined(), problem));
  SINKATTN_RETURN_IF_ERROR(check::mask(p.mask));
  if (p.rotary_cos.defined() || p.rotary_sin.defined()) {
    SINKATTN_RETURN_IF_ERROR(check_rotary_tables(p, problem));
    SINKATTN_RETURN_IF_ERROR(check_rotated_query(p, problem));
  } else if (p.rotary_seqlens.defined()) {
    return Status::error(StatusCode::value_error,
                         "rotary_seqlens: expected rotary_cos and rotary_sin with it, got none");
  }
  const Mask mask = make_mask(p.mask);
  problem->rotate_queries_by_position = mask.left >= 0 || mask.right >= 0;
  problem->cache_seqlens = check::index_data(p.cache_seqlens);
  problem->cache_leftpad = check::index_data(p.cache_leftpad);
  if (p.seqused_k_after.defined()) {
    problem->seqused_after = p.seqused_k_after.as<std::int32_t>();
  }
  problem->device = p.key_cache.device.type;
  return {};
}

Status make_combine_problem(const CombineParams& p, CombineProblem* problem) {
  *problem = {};
  SINKATTN_RETURN_IF_ERROR(check::defined(p.out_partial, "out_partial"));
  SINKATTN_RETURN_IF_ERROR(check::defined(p.lse_partial, "lse_partial"));
  SINKATTN_RETURN_IF_ERROR(check::defined(p.out, "out"));
  const Device device = p.out_partial.device;
  const DType type = p.out_partial.dtype;
  const bool fp64 = type == DType::float64 && device.type == DeviceType::cpu;
  if (type != DType::float32 && !fp64) {
    return Status::error(StatusCode::type_error, "out_partial: expected float32, got %s",
                         dtype_name(type));
  }
  const int rank = p.out_partial.rank;
  if (rank != 4 && rank != 5) {
    return Status::error(StatusCode::value_error,
                         "out_partial: expected (n, b, s, h, dv) or (n, total, h, dv), got %d "
                         "dimensions",
                         rank);
  }
  SINKATTN_RETURN_IF_ERROR(check::same_device(p.lse_partial, "lse_partial", device));
  SINKATTN_RETURN_IF_ERROR(check::dtype(p.lse_partial, "lse_partial", type));
  SINKATTN_RETURN_IF_ERROR(check::rank(p.lse_partial, "lse_partial", rank - 1));
  SINKATTN_RETURN_IF_ERROR(check::same_device(p.out, "out", device));
  SINKATTN_RETURN_IF_ERROR(check::rank(p.out, "out", rank - 1));
  const bool out_ok = p.out.dtype == DType::float32 || p.out.dtype == DType::bfloat16 ||
                      p.out.dtype == DType::float16 || (fp64 && p.out.dtype == DType::float64);
  if (!out_ok) {
    return Status::error(StatusCode::type_error,
                         "out_dtype: expected float32, bfloat16 or float16, got %s",
                         dtype_name(p.out.dtype));
  }
  for (int i = 0; i < rank - 1; ++i) {
    SINKATTN_RETURN_IF_ERROR(check::size(p.lse_partial, "lse_partial", i, p.out_partial.shape[i]));
    SINKATTN_RETURN_IF_ERROR(check::size(p.out, "out", i, p.out_partial.shape[i + 1]));
  }
  problem->splits = p.out_partial.shape[0];
  if (problem->splits < 1 || problem->splits > 256) {
    return Status::error(StatusCode::value_error,
                         "out_partial: expected 1 to 256 partial results, got %" PRId64,
                         problem->splits);
  }
  problem->head_dim_v = p.out_partial.size_back(0);
  if (problem->head_dim_v < 1) {
    return Status::error(StatusCode::value_error, "out_partial: expected a last size >= 1, got 0");
  }
  if ((p.out_partial.size_back(0) > 1 && p.out_partial.stride_back(0) != 1) ||
      (p.out.size_back(0) > 1 && p.out.stride_back(0) != 1)) {
    return Status::error(StatusCode::value_error,
                         "out_partial: expected stride 1 in the last dimension, got another");
  }
  const bool packed = rank == 4;
  problem->heads = p.out_partial.size_back(1);
  problem->rows = p.out_partial.size_back(2);
  problem->batch = packed ? 1 : p.out_partial.shape[1];
  SINKATTN_RETURN_IF_ERROR(check::sink(p.learnable_sink, problem->heads, type, device));
  problem->out_partial = {p.out_partial.data, type, packed ? 0 : p.out_partial.stride[1],
                          p.out_partial.stride_back(2), p.out_partial.stride_back(1)};
  problem->out_partial_stride_split = p.out_partial.stride[0];
  const auto row_statistics = [packed](const TensorView& tensor, int lead) {
    return RowsTensor{tensor.data, tensor.dtype, packed ? 0 : tensor.stride[lead],
                      tensor.stride_back(0), tensor.stride_back(1)};
  };
  problem->lse_partial = row_statistics(p.lse_partial, 1);
  problem->lse_partial_stride_split = p.lse_partial.stride[0];
  problem->out = check::heads_tensor(p.out, packed);
  if (p.softmax_lse.defined()) {
    SINKATTN_RETURN_IF_ERROR(check::same_device(p.softmax_lse, "softmax_lse", device));
    SINKATTN_RETURN_IF_ERROR(check::dtype(p.softmax_lse, "softmax_lse", type));
    SINKATTN_RETURN_IF_ERROR(check::rank(p.softmax_lse, "softmax_lse", rank - 2));
    for (int i = 0; i < rank - 2; ++i) {
      SINKATTN_RETURN_IF_ERROR(
          check::size(p.softmax_lse, "softmax_lse", i, p.out_partial.shape[i + 1]));
    }
    problem->lse = row_statistics(p.softmax_lse, 0);
  }
  problem->sink = check::vector_view(p.learnable_sink);
  problem->device = device.type;
  return {};
}

Status check_schedule(const ScheduleParams& p) {
  const struct {
    std::int64_t value, low, high;
    const char* name;
  } ranges[] = {
      {p.batch_size, 0, check::max_extent, "batch_size"},
      {p.max_seqlen_q, 0, check::max_extent, "max_seqlen_q"},
      {p.max_seqlen_k, 0, check::max_extent, "max_seqlen_k"},
      {p.num_heads_q, 1, check::max_extent, "num_heads_q"},
      {p.num_heads_kv, 1, check::max_extent, "num_heads_kv"},
      {p.headdim, 8, 256, "headdim"},
      {p.headdim_v, 8, 512, "headdim_v"},
      {p.page_size, 0, check::max_extent, "page_size"},
      {p.max_seqlen_k_new, 0, check::max_extent, "max_seqlen_k_new"},
      {p.num_splits, 0, 256, "num_splits"},
      {p.sm_margin, 0, check::max_extent, "sm_margin"},
  };
  for (const auto& range : ranges) {
    if (range.value >= range.low && range.value <= range.high) continue;
    return Status::error(StatusCode::value_error,
                         "%s: expected an integer in [%" PRId64 ", %" PRId64 "], got %" PRId64,
                         range.name, range.low, range.high, range.value);
  }
  if (p.num_heads_q % p.num_heads_kv != 0) {
    return Status::error(StatusCode::value_error,
                         "num_heads_q: expected a multiple of num_heads_kv, %" PRId64
                         ", got %" PRId64,
                         p.num_heads_kv, p.num_heads_q);
  }
  SINKATTN_RETURN_IF_ERROR(check::mask(p.mask));
  SINKATTN_RETURN_IF_ERROR(check::defined(p.cache_seqlens, "cache_seqlens"));
  const Device device = p.cache_seqlens.device;
  SINKATTN_RETURN_IF_ERROR(
      check::index_vector(p.cache_seqlens, "cache_seqlens", p.batch_size, device));
  SINKATTN_RETURN_IF_ERROR(
      check::index_vector(p.cu_seqlens_q, "cu_seqlens_q", p.batch_size + 1, device));
  SINKATTN_RETURN_IF_ERROR(
      check::index_vector(p.cu_seqlens_k_new, "cu_seqlens_k_new", p.batch_size + 1, device));
  SINKATTN_RETURN_IF_ERROR(
      check::index_vector(p.cache_leftpad, "cache_leftpad", p.batch_size, device));
  SINKATTN_RETURN_IF_ERROR(check::defined(p.metadata, "metadata"));
  return check::index_vector(p.metadata, "metadata", schedule_length(p.batch_size), device);
}

}  // namespace sinkattn
