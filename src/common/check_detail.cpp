// SPDX-License-Identifier: Apache-2.0
#include "common/check_detail.h"

#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <limits>

namespace sinkattn::check {
namespace {

Status type_error(const char* name, const char* expected, const char* got) {
  return Status::error(StatusCode::type_error, "%s: expected %s, got %s", name, expected, got);
}

Status value_error(const char* name, const char* expected, const char* got) {
  return Status::error(StatusCode::value_error, "%s: expected %s, got %s", name, expected, got);
}

const char* device_name(Device device) { return device.type == DeviceType::cpu ? "cpu" : "cuda"; }

bool is_16_bit(DType type) { return type == DType::bfloat16 || type == DType::float16; }

}  // namespace

Status defined(const TensorView& tensor, const char* name) {
  if (tensor.defined()) return {};
  return type_error(name, "a tensor", "none");
}

Status rank(const TensorView& tensor, const char* name, int expected) {
  if (tensor.rank == expected) return {};
  return Status::error(StatusCode::value_error, "%s: expected %d dimensions, got %d", name,
                       expected, tensor.rank);
}

Status dtype(const TensorView& tensor, const char* name, DType expected) {
  if (tensor.dtype == expected) return {};
  return type_error(name, dtype_name(expected), dtype_name(tensor.dtype));
}

Status size(const TensorView& tensor, const char* name, int dimension, std::int64_t expected) {
  if (tensor.shape[dimension] == expected) return {};
  return Status::error(StatusCode::value_error,
                       "%s: expected size %" PRId64 " in dimension %d, got %" PRId64, name,
                       expected, dimension, tensor.shape[dimension]);
}

Status same_device(const TensorView& tensor, const char* name, Device expected) {
  if (tensor.device == expected) return {};
  return Status::error(StatusCode::type_error, "%s: expected a tensor on %s:%d like q, got %s:%d",
                       name, device_name(expected), expected.index, device_name(tensor.device),
                       tensor.device.index);
}

Status index_vector(const TensorView& tensor, const char* name, std::int64_t length,
                    Device device) {
  if (!tensor.defined()) return {};
  SINKATTN_RETURN_IF_ERROR(same_device(tensor, name, device));
  SINKATTN_RETURN_IF_ERROR(dtype(tensor, name, DType::int32));
  SINKATTN_RETURN_IF_ERROR(rank(tensor, name, 1));
  SINKATTN_RETURN_IF_ERROR(size(tensor, name, 0, length));
  if (length > 1 && tensor.stride[0] != 1) {
    return value_error(name, "a contiguous vector", "a strided one");
  }
  return {};
}

Status data_layout(const TensorView& tensor, const char* name) {
  std::int64_t elements = 1;
  for (int i = 0; i < tensor.rank; ++i) {
    const std::int64_t n = tensor.shape[i];
    // Not max_extent / n: twenty divisions a call are a tenth of what a plan costs the host.
    if (n < 0 || __builtin_mul_overflow(elements, n, &elements) || elements > max_extent) {
      return value_error(name, "sizes whose product fits 47 bits", "larger ones");
    }
  }
  if (elements == 0) return {};
  if (tensor.data == nullptr) return value_error(name, "a data pointer", "null");
  const int last = tensor.rank - 1;
  if (tensor.shape[last] > 1 && tensor.stride[last] != 1) {
    return Status::error(StatusCode::value_error,
                         "%s: expected stride 1 in the last dimension, got %" PRId64, name,
                         tensor.stride[last]);
  }
  const bool cuda = tensor.device.type == DeviceType::cuda;
  const std::int64_t bytes = dtype_size(tensor.dtype);
  for (int i = 0; i < last; ++i) {
    if (tensor.shape[i] <= 1) continue;
    if (tensor.stride[i] < 0 || tensor.stride[i] > max_extent) {
      return Status::error(StatusCode::value_error,
                           "%s: expected strides in [0, 2^47], got %" PRId64 " in dimension %d",
                           name, tensor.stride[i], i);
    }
    if (cuda && tensor.stride[i] * bytes % 16 != 0) {
      return Status::error(StatusCode::value_error,
                           "%s: expected strides that are multiples of 16 bytes, got %" PRId64
                           " elements in dimension %d",
                           name, tensor.stride[i], i);
    }
  }
  if (cuda && reinterpret_cast<std::uintptr_t>(tensor.data) % 16 != 0) {
    return value_error(name, "a base pointer aligned to 16 bytes", "an unaligned one");
  }
  return {};
}

Status head_dims(std::int64_t head_dim, std::int64_t head_dim_v, DType type, Device device) {
  const std::int64_t step = type == DType::float8_e4m3 ? 16 : 8;
  if (head_dim < 8 || head_dim > 256 || head_dim % step != 0) {
    return Status::error(StatusCode::value_error,
                         "q: expected a head dim in [8, 256] that is a multiple of %" PRId64
                         ", got %" PRId64,
                         step, head_dim);
  }
  const std::int64_t largest = head_dim <= 64 ? 512 : 256;
  if (head_dim_v < 8 || head_dim_v > largest || head_dim_v % step != 0) {
    return Status::error(StatusCode::value_error,
                         "v: expected a head dim in [8, %" PRId64 "] that is a multiple of %" PRId64
                         " (above 256 only with a q head dim of at most 64), got %" PRId64,
                         largest, step, head_dim_v);
  }
  (void)device;
  return {};
}

Status softmax_scale(const std::optional<double>& scale) {
  if (!scale.has_value() || (std::isfinite(*scale) && *scale > 0.0)) return {};
  return Status::error(StatusCode::value_error,
                       "softmax_scale: expected a finite number > 0, got %g", *scale);
}

Status softcap(double softcap) {
  if (std::isfinite(softcap) && softcap >= 0.0) return {};
  return Status::error(StatusCode::value_error, "softcap: expected a finite number >= 0, got %g",
                       softcap);
}

Status mask(const MaskParams& params) {
  if (params.attention_chunk >= 0) return {};
  return Status::error(StatusCode::value_error,
                       "attention_chunk: expected an integer >= 0, got %" PRId64,
                       params.attention_chunk);
}

Status sink(const TensorView& sink, std::int64_t heads, DType query_dtype, Device device) {
  if (!sink.defined()) return {};
  const char* name = "learnable_sink";
  SINKATTN_RETURN_IF_ERROR(same_device(sink, name, device));
  SINKATTN_RETURN_IF_ERROR(rank(sink, name, 1));
  SINKATTN_RETURN_IF_ERROR(size(sink, name, 0, heads));
  const bool fp64 = sink.dtype == DType::float64 && query_dtype == DType::float64;
  if (sink.dtype == DType::float32 || is_16_bit(sink.dtype) || fp64) return {};
  return type_error(name, "float32, bfloat16 or float16 (float64 with float64 q)",
                    dtype_name(sink.dtype));
}

Status compute_dtype(const TensorView& query, bool with_e4m3) {
  const DType type = query.dtype;
  if (is_16_bit(type)) return {};
  if (type == DType::float8_e4m3) {
    if (with_e4m3) return {};
    return Status::error(StatusCode::not_implemented,
                         "q: expected bfloat16 or float16 (no gradients exist for float8_e4m3), "
                         "got float8_e4m3");
  }
  const bool cpu = query.device.type == DeviceType::cpu;
  if (cpu && (type == DType::float32 || type == DType::float64)) return {};
  return type_error("q",
                    cpu ? "bfloat16, float16, float32, float64 or float8_e4m3"
                        : "bfloat16, float16 or float8_e4m3 on CUDA",
                    dtype_name(type));
}

HeadsTensor heads_tensor(const TensorView& tensor, bool packed) {
  HeadsTensor view;
  if (!tensor.defined()) return view;
  view.data = tensor.data;
  view.dtype = tensor.dtype;
  view.stride_batch = packed ? 0 : tensor.stride[0];
  view.stride_row = tensor.stride_back(2);
  view.stride_head = tensor.stride_back(1);
  return view;
}

RowsTensor rows_tensor(const TensorView& tensor, bool packed) {
  RowsTensor view;
  if (!tensor.defined()) return view;
  view.data = tensor.data;
  view.dtype = tensor.dtype;
  view.stride_batch = packed ? 0 : tensor.stride[0];
  view.stride_head = tensor.stride_back(1);
  view.stride_row = tensor.stride_back(0);
  return view;
}

VectorView vector_view(const TensorView& tensor) {
  VectorView view;
  if (!tensor.defined()) return view;
  view.data = tensor.data;
  view.dtype = tensor.dtype;
  view.stride[0] = tensor.stride[0];
  view.stride[1] = tensor.rank > 1 ? tensor.stride[1] : 0;
  return view;
}

const std::int32_t* index_data(const TensorView& tensor) {
  return tensor.defined() ? tensor.as<const std::int32_t>() : nullptr;
}

Status statistics(const TensorView& tensor, const char* name, const AttentionShape& shape,
                  DType query_dtype, Device device) {
  if (!tensor.defined()) return {};
  const DType expected = query_dtype == DType::float64 ? DType::float64 : DType::float32;
  SINKATTN_RETURN_IF_ERROR(same_device(tensor, name, device));
  SINKATTN_RETURN_IF_ERROR(dtype(tensor, name, expected));
  const int dims = shape.packed_q ? 2 : 3;
  SINKATTN_RETURN_IF_ERROR(rank(tensor, name, dims));
  if (!shape.packed_q) SINKATTN_RETURN_IF_ERROR(size(tensor, name, 0, shape.batch));
  SINKATTN_RETURN_IF_ERROR(size(tensor, name, dims - 2, shape.heads_q));
  return size(tensor, name, dims - 1, shape.rows_q);
}

namespace {

/// q, k, v: dtypes, devices, ranks, heads, head dims.
Status tensors(const SharedArguments& a, AttentionShape* shape) {
  const Device device = a.query.device;
  shape->packed_q = a.cu_seqlens_q.defined();
  shape->packed_k = a.cu_seqlens_k.defined();
  SINKATTN_RETURN_IF_ERROR(compute_dtype(a.query, a.with_e4m3));
  SINKATTN_RETURN_IF_ERROR(rank(a.query, "q", shape->packed_q ? 3 : 4));
  const struct {
    const TensorView& tensor;
    const char* name;
  } sides[] = {{a.key, "k"}, {a.value, "v"}};
  for (const auto& side : sides) {
    SINKATTN_RETURN_IF_ERROR(defined(side.tensor, side.name));
    SINKATTN_RETURN_IF_ERROR(same_device(side.tensor, side.name, device));
    if (side.tensor.dtype != a.query.dtype) {
      return Status::error(StatusCode::type_error, "%s: expected the dtype of q, %s, got %s",
                           side.name, dtype_name(a.query.dtype), dtype_name(side.tensor.dtype));
    }
    SINKATTN_RETURN_IF_ERROR(rank(side.tensor, side.name, shape->packed_k ? 3 : 4));
    SINKATTN_RETURN_IF_ERROR(data_layout(side.tensor, side.name));
  }
  SINKATTN_RETURN_IF_ERROR(data_layout(a.query, "q"));
  shape->heads_q = a.query.size_back(1);
  shape->heads_kv = a.key.size_back(1);
  shape->head_dim = a.query.size_back(0);
  shape->head_dim_v = a.value.size_back(0);
  for (int i = 0; i < a.key.rank - 1; ++i) {
    SINKATTN_RETURN_IF_ERROR(size(a.value, "v", i, a.key.shape[i]));
  }
  SINKATTN_RETURN_IF_ERROR(size(a.key, "k", a.key.rank - 1, shape->head_dim));
  SINKATTN_RETURN_IF_ERROR(head_dims(shape->head_dim, shape->head_dim_v, a.query.dtype, device));
  if (shape->heads_kv < 1 || shape->heads_q < 1 || shape->heads_q % shape->heads_kv != 0) {
    return Status::error(StatusCode::value_error,
                         "q: expected a number of heads that is a positive multiple of the %" PRId64
                         " heads of k, got %" PRId64,
                         shape->heads_kv, shape->heads_q);
  }
  shape->group = shape->heads_q / shape->heads_kv;
  return {};
}

Status bound(std::int64_t value, const char* name, bool required) {
  if (value < -1 || value > std::numeric_limits<std::int32_t>::max()) {
    return Status::error(StatusCode::value_error,
                         "%s: expected a length in [0, 2^31), got %" PRId64, name, value);
  }
  if (required && value < 0) {
    return Status::error(StatusCode::value_error,
                         "%s: expected a length (required with cu_seqlens), got none", name);
  }
  return {};
}

/// Packed keys are one thing, a cache with rows or pages another.
Status contradictions(const SharedArguments& a) {
  const bool packed = a.cu_seqlens_k.defined();
  if (packed && a.page_table.defined()) {
    return value_error("cu_seqlens_k", "none together with page_table", "both");
  }
  if (packed && a.cache_batch_idx.defined()) {
    return value_error("cu_seqlens_k", "none together with cache_batch_idx", "both");
  }
  if (packed && a.cache_leftpad.defined()) {
    return value_error("cu_seqlens_k", "none together with cache_leftpad", "both");
  }
  return {};
}

/// Batch size, lengths and index vectors.
Status lengths(const SharedArguments& a, AttentionShape* shape) {
  const Device device = a.query.device;
  if (shape->packed_q) {
    SINKATTN_RETURN_IF_ERROR(rank(a.cu_seqlens_q, "cu_seqlens_q", 1));
    if (a.cu_seqlens_q.shape[0] < 1) {
      return value_error("cu_seqlens_q", "batch + 1 entries", "none");
    }
    shape->batch = a.cu_seqlens_q.shape[0] - 1;
  } else {
    shape->batch = a.query.shape[0];
  }
  const std::int64_t batch = shape->batch;
  SINKATTN_RETURN_IF_ERROR(index_vector(a.cu_seqlens_q, "cu_seqlens_q", batch + 1, device));
  SINKATTN_RETURN_IF_ERROR(index_vector(a.cu_seqlens_k, "cu_seqlens_k", batch + 1, device));
  SINKATTN_RETURN_IF_ERROR(index_vector(a.seqused_q, "seqused_q", batch, device));
  SINKATTN_RETURN_IF_ERROR(index_vector(a.seqused_k, "seqused_k", batch, device));
  SINKATTN_RETURN_IF_ERROR(index_vector(a.cache_batch_idx, "cache_batch_idx", batch, device));
  SINKATTN_RETURN_IF_ERROR(index_vector(a.cache_leftpad, "cache_leftpad", batch, device));
  SINKATTN_RETURN_IF_ERROR(bound(a.max_seqlen_q, "max_seqlen_q", shape->packed_q));
  SINKATTN_RETURN_IF_ERROR(bound(a.max_seqlen_k, "max_seqlen_k", shape->packed_k));
  shape->rows_q = a.query.shape[shape->packed_q ? 0 : 1];
  shape->longest_q =
      shape->packed_q && a.max_seqlen_q < shape->rows_q ? a.max_seqlen_q : shape->rows_q;
  shape->side_q = {index_data(a.cu_seqlens_q), index_data(a.seqused_q), nullptr, shape->rows_q,
                   a.max_seqlen_q};
  if (a.page_table.defined()) {
    SINKATTN_RETURN_IF_ERROR(rank(a.page_table, "page_table", 2));
    shape->rows_k = a.page_table.shape[1] * a.key.shape[1];
  } else {
    shape->rows_k = a.key.shape[shape->packed_k ? 0 : 1];
  }
  shape->longest_k =
      shape->packed_k && a.max_seqlen_k < shape->rows_k ? a.max_seqlen_k : shape->rows_k;
  shape->side_k = {index_data(a.cu_seqlens_k), index_data(a.seqused_k), index_data(a.cache_leftpad),
                   shape->rows_k, a.max_seqlen_k};
  if (shape->rows_k > std::numeric_limits<std::int32_t>::max() ||
      shape->rows_q > std::numeric_limits<std::int32_t>::max()) {
    return value_error(shape->rows_q > shape->rows_k ? "q" : "k", "fewer than 2^31 tokens", "more");
  }
  return {};
}

}  // namespace

Status shared(const SharedArguments& a, AttentionShape* shape) {
  SINKATTN_RETURN_IF_ERROR(defined(a.query, "q"));
  SINKATTN_RETURN_IF_ERROR(contradictions(a));
  SINKATTN_RETURN_IF_ERROR(tensors(a, shape));
  SINKATTN_RETURN_IF_ERROR(lengths(a, shape));
  SINKATTN_RETURN_IF_ERROR(sink(a.learnable_sink, shape->heads_q, a.query.dtype, a.query.device));
  SINKATTN_RETURN_IF_ERROR(softmax_scale(a.softmax_scale));
  SINKATTN_RETURN_IF_ERROR(softcap(a.softcap));
  SINKATTN_RETURN_IF_ERROR(mask(a.mask));
  if (a.sm_margin < 0) {
    return Status::error(StatusCode::value_error, "sm_margin: expected an integer >= 0, got %d",
                         a.sm_margin);
  }
  const std::int64_t dims = shape->head_dim + (a.with_query_v ? shape->head_dim_v : 0);
  shape->softmax_scale = a.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(dims)));
  shape->softcap = a.softcap;
  shape->mask = make_mask(a.mask);
  shape->sink = vector_view(a.learnable_sink);
  shape->sm_margin = a.sm_margin;
  return {};
}

Status key_storage(const TensorView& key, const TensorView& value, const TensorView& page_table,
                   const TensorView& cache_batch_idx, std::int64_t batch, bool packed,
                   Device device, KeyStorage* storage) {
  storage->key = heads_tensor(key, packed);
  storage->value = heads_tensor(value, packed);
  storage->cache_rows = packed ? batch : key.shape[0];
  storage->cache_batch_idx = index_data(cache_batch_idx);
  const char* rows_of = "k";
  if (page_table.defined()) {
    SINKATTN_RETURN_IF_ERROR(same_device(page_table, "page_table", device));
    SINKATTN_RETURN_IF_ERROR(dtype(page_table, "page_table", DType::int32));
    SINKATTN_RETURN_IF_ERROR(rank(page_table, "page_table", 2));
    if (page_table.shape[1] > 1 && page_table.stride[1] != 1) {
      return value_error("page_table", "stride 1 in the last dimension", "another");
    }
    if (key.shape[1] < 1) return value_error("k", "a page size of at least 1", "0");
    storage->page_table = index_data(page_table);
    storage->page_table_stride = page_table.stride[0];
    storage->page_size = key.shape[1];
    storage->num_pages = key.shape[0];
    storage->max_pages = page_table.shape[1];
    storage->cache_rows = page_table.shape[0];
    rows_of = "page_table";
    if (storage->num_pages < 1 && storage->max_pages > 0) {
      return value_error("k", "at least one page", "none");
    }
  }
  if (!packed && !cache_batch_idx.defined() && storage->cache_rows != batch) {
    return Status::error(StatusCode::value_error,
                         "%s: expected the batch size of q, %" PRId64 ", got %" PRId64, rows_of,
                         batch, storage->cache_rows);
  }
  if (cache_batch_idx.defined() && batch > 0 && storage->cache_rows < 1) {
    return value_error(rows_of, "at least one cache row", "none");
  }
  return {};
}

}  // namespace sinkattn::check
