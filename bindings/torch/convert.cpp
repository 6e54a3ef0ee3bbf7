// SPDX-License-Identifier: Apache-2.0
#include "convert.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <new>
#include <stdexcept>
#include <string>

#include "common/prepared.h"

// Declared by torch only where CUDA is in use, and defined in libtorch_cuda.so. Weak: null under a
// CPU build of torch, so that one library loads on both.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(std::int32_t device_index, void** ret_stream);

namespace sinkattn::torch_binding {
namespace {

constexpr std::int64_t workspace_alignment = 256;

const char* code_name(StatusCode code) {
  switch (code) {
    case StatusCode::type_error:
      return "TypeError";
    case StatusCode::value_error:
      return "ValueError";
    case StatusCode::not_implemented:
      return "NotImplementedError";
    default:
      return "RuntimeError";
  }
}

/// torch's numbers for the dtypes the core knows, and for the two devices: asked once, since every
/// answer is a call into torch and a dozen of them per tensor add up.
struct TorchCodes {
  std::int32_t float64 = aoti_torch_dtype_float64();
  std::int32_t float32 = aoti_torch_dtype_float32();
  std::int32_t bfloat16 = aoti_torch_dtype_bfloat16();
  std::int32_t float16 = aoti_torch_dtype_float16();
  std::int32_t float8_e4m3 = aoti_torch_dtype_float8_e4m3fn();
  std::int32_t int32 = aoti_torch_dtype_int32();
  std::int32_t cpu = aoti_torch_device_type_cpu();
  std::int32_t cuda = aoti_torch_device_type_cuda();
};

const TorchCodes& codes() {
  static const TorchCodes known;
  return known;
}

DType core_dtype(std::int32_t type) {
  const TorchCodes& known = codes();
  if (type == known.bfloat16) return DType::bfloat16;
  if (type == known.float32) return DType::float32;
  if (type == known.float16) return DType::float16;
  if (type == known.int32) return DType::int32;
  if (type == known.float64) return DType::float64;
  if (type == known.float8_e4m3) return DType::float8_e4m3;
  return DType::undefined;
}

std::int32_t torch_dtype(DType dtype) {
  const TorchCodes& known = codes();
  switch (dtype) {
    case DType::float64:
      return known.float64;
    case DType::bfloat16:
      return known.bfloat16;
    case DType::float16:
      return known.float16;
    case DType::float8_e4m3:
      return known.float8_e4m3;
    case DType::int32:
      return known.int32;
    default:
      return known.float32;
  }
}

Device core_device(const Tensor& tensor, const char* name) {
  std::int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  if (type == codes().cpu) return {DeviceType::cpu, 0};
  if (type == codes().cuda) return {DeviceType::cuda, tensor.get_device_index()};
  raise_if_error(Status::error(StatusCode::type_error,
                               "%s: expected a CPU or CUDA tensor, got another device", name));
  return {};
}

void* current_stream(int device_index) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    raise_if_error(Status::error(StatusCode::runtime_error,
                                 "q: expected a torch built with CUDA, got a CPU build"));
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return stream;
}

/// torch's thread pool as the core's ParallelFor.
void torch_parallel(void*, std::int64_t n, void (*body)(void*, std::int64_t, std::int64_t),
                    void* body_context) {
  torch::stable::parallel_for(
      0, n, 1, [=](std::int64_t begin, std::int64_t end) { body(body_context, begin, end); });
}

}  // namespace

void raise_if_error(const Status& status) {
  if (status.ok()) return;
  throw std::runtime_error(std::string("sinkattn: ") + code_name(status.code()) + ": " +
                           status.message());
}

TensorView view(const Tensor& tensor, const char* name) {
  TensorView result;
  std::int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  result.dtype = core_dtype(dtype);
  if (result.dtype == DType::undefined) {
    raise_if_error(Status::error(
        StatusCode::type_error,
        "%s: expected float64, float32, bfloat16, float16, float8_e4m3fn or int32, got %s", name,
        torch::headeronly::toString(tensor.scalar_type())));
  }
  result.device = core_device(tensor, name);
  const std::int64_t rank = tensor.dim();
  if (rank > TensorView::max_rank) {
    raise_if_error(Status::error(StatusCode::value_error,
                                 "%s: expected at most %d dimensions, got %lld", name,
                                 TensorView::max_rank, static_cast<long long>(rank)));
  }
  result.rank = static_cast<int>(rank);
  std::int64_t* sizes = nullptr;
  std::int64_t* strides = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &strides));
  for (int i = 0; i < result.rank; ++i) {
    result.shape[i] = sizes[i];
    result.stride[i] = strides[i];
  }
  result.data = tensor.data_ptr();
  return result;
}

TensorView view(const OptionalTensor& tensor, const char* name) {
  return tensor.has_value() ? view(*tensor, name) : TensorView{};
}

// Through the C function and not the stable wrapper of aten::new_empty, which looks the operator up
// by name and boxes its arguments: that took as long as everything else a call does here.
Tensor new_empty(const TensorView& like, const std::int64_t* shape, int rank, DType dtype) {
  std::int64_t strides[TensorView::max_rank];
  std::int64_t stride = 1;
  for (int i = rank; i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<std::int64_t>(shape[i], 1);
  }
  const bool cuda = like.device.type == DeviceType::cuda;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(rank, shape, strides, torch_dtype(dtype),
                                                  cuda ? codes().cuda : codes().cpu,
                                                  like.device.index, &handle));
  return Tensor(handle);
}

Tensor new_empty(const TensorView& like, std::initializer_list<std::int64_t> shape, DType dtype) {
  return new_empty(like, shape.begin(), static_cast<int>(shape.size()), dtype);
}

Tensor new_empty(const Tensor& like, std::initializer_list<std::int64_t> shape, DType dtype) {
  TensorView place;
  place.device = core_device(like, "q");
  return new_empty(place, shape, dtype);
}

Tensor new_empty_like(const Tensor& like) {
  const TensorView view_of = view(like, "q");
  return new_empty(view_of, view_of.shape, view_of.rank, view_of.dtype);
}

TensorView out_view(const ForwardParams& params) {
  const TensorView& query = params.query;
  if (params.value.rank < 1) {
    raise_if_error(Status::error(StatusCode::value_error, "v: expected 3 or 4 dimensions, got %d",
                                 params.value.rank));
  }
  TensorView out;
  out.device = query.device;
  out.dtype = query.dtype == DType::float8_e4m3 ? DType::bfloat16 : query.dtype;
  out.rank = query.rank;
  std::copy(query.shape, query.shape + query.rank - 1, out.shape);
  out.shape[query.rank - 1] = params.value.size_back(0);
  return out;
}

TensorView statistics_view(const TensorView& query, bool packed) {
  TensorView lse;
  lse.device = query.device;
  lse.dtype = query.dtype == DType::float64 ? DType::float64 : DType::float32;
  lse.rank = query.rank - 1;
  if (!packed) lse.shape[0] = query.shape[0];
  lse.shape[lse.rank - 2] = query.size_back(1);
  lse.shape[lse.rank - 1] = query.size_back(2);
  return lse;
}

void check_query_rank(const TensorView& query, bool packed) {
  const int expected = packed ? 3 : 4;
  if (query.rank == expected) return;
  raise_if_error(Status::error(StatusCode::value_error, "q: expected %d dimensions, got %d",
                               expected, query.rank));
}

void check_ready(const TensorView& tensor, const char* name) {
  if (tensor.device.type != DeviceType::cuda) return;
  for (int i = 0; i + 1 < tensor.rank; ++i) {
    if (tensor.stride[i] > 0 || tensor.shape[i] <= 1) continue;
    raise_if_error(Status::error(StatusCode::value_error,
                                 "%s: expected positive strides, got %lld in dimension %d", name,
                                 static_cast<long long>(tensor.stride[i]), i));
  }
}

void check_dense(const ForwardParams& params) {
  check_query_rank(params.query, false);
  check_ready(params.query, "q");
  check_ready(params.key, "k");
  check_ready(params.value, "v");
}

Call::Call(const Tensor& tensor) {
  const Device device = core_device(tensor, "q");
  like_.device = device;
  // A guard costs several calls into the CUDA runtime; asking whether it is needed costs one.
  if (device.type == DeviceType::cuda &&
      torch::stable::accelerator::getCurrentDeviceIndex() != device.index) {
    guard_.emplace(device.index);
  }
  raise_if_error(query_device(device, &properties_));
}

Call::Call(Device device, const DirectWorkspace& workspace) : direct_workspace_(workspace) {
  like_.device = device;
  raise_if_error(query_device(device, &properties_));
}

void* Call::new_workspace(std::int64_t bytes) {
  if (direct_workspace_.allocate == nullptr) {
    workspace_ = new_empty(like_, {(bytes + 3) / 4}, DType::int32);
    return workspace_->data_ptr();
  }
  void* workspace = direct_workspace_.allocate(direct_workspace_.self, bytes);
  if (workspace == nullptr) throw std::bad_alloc();
  return workspace;
}

ExecutionContext Call::context(const Plan& plan) {
  ExecutionContext context;
  if (properties_.device.type == DeviceType::cuda) {
    context.stream = current_stream(properties_.device.index);
  } else {
    context.parallel_for = torch_parallel;
  }
  if (plan.workspace_bytes > 0) {
    // torch aligns CPU memory to 64 bytes: ask for room to align further.
    const std::int64_t bytes = static_cast<std::int64_t>(plan.workspace_bytes);
    const auto address =
        reinterpret_cast<std::uintptr_t>(new_workspace(bytes + workspace_alignment));
    const auto mask = static_cast<std::uintptr_t>(workspace_alignment - 1);
    context.workspace = reinterpret_cast<void*>((address + mask) & ~mask);
    context.workspace_bytes = plan.workspace_bytes;
  }
  return context;
}

void Call::run(const ForwardParams& params) {
  Prepared<ForwardProblem> prepared;
  raise_if_error(prepare_forward(params, properties_, &prepared));
  raise_if_error(run_prepared(prepared, context(prepared.plan)));
}

void Call::run(const BackwardParams& params) {
  const bool nothing = !params.dq.defined() && !params.dk.defined() && !params.dsink.defined() &&
                       !params.softmax_d.defined();
  if (nothing) return;
  Prepared<BackwardProblem> prepared;
  raise_if_error(prepare_backward(params, properties_, &prepared));
  raise_if_error(run_prepared(prepared, context(prepared.plan)));
}

}  // namespace sinkattn::torch_binding
