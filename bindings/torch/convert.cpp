// SPDX-License-Identifier: Apache-2.0
#include "convert.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>
#include <string>

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

DType core_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::Float8_e4m3fn:
      return DType::float8_e4m3;
    case ScalarType::Int:
      return DType::int32;
    default:
      return DType::undefined;
  }
}

Device core_device(const Tensor& tensor, const char* name) {
  if (tensor.is_cpu()) return {DeviceType::cpu, 0};
  if (tensor.is_cuda()) return {DeviceType::cuda, tensor.get_device_index()};
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

ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::float64:
      return ScalarType::Double;
    case DType::bfloat16:
      return ScalarType::BFloat16;
    case DType::float16:
      return ScalarType::Half;
    case DType::float8_e4m3:
      return ScalarType::Float8_e4m3fn;
    case DType::int32:
      return ScalarType::Int;
    default:
      return ScalarType::Float;
  }
}

TensorView view(const Tensor& tensor, const char* name) {
  TensorView result;
  result.dtype = core_dtype(tensor.scalar_type());
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
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
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

Tensor new_empty(const Tensor& like, std::initializer_list<std::int64_t> shape, DType dtype) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, scalar_type(dtype));
}

Tensor new_empty_like(const Tensor& like) {
  const auto sizes = like.sizes();
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, like.scalar_type());
}

Call::Call(const Tensor& tensor) : tensor_(tensor) {
  const Device device = core_device(tensor, "q");
  if (device.type == DeviceType::cuda) guard_.emplace(device.index);
  raise_if_error(query_device(device, &properties_));
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
    const std::int64_t size = bytes + workspace_alignment;
    workspace_ = torch::stable::new_empty(tensor_, {&size, 1}, ScalarType::Byte);
    const auto address = reinterpret_cast<std::uintptr_t>(workspace_->data_ptr());
    const auto mask = static_cast<std::uintptr_t>(workspace_alignment - 1);
    context.workspace = reinterpret_cast<void*>((address + mask) & ~mask);
    context.workspace_bytes = plan.workspace_bytes;
  }
  return context;
}

}  // namespace sinkattn::torch_binding
