// SPDX-License-Identifier: Apache-2.0
// Torch tensors to core views, core errors to exceptions, device and stream of a call. Everything
// goes through PyTorch's stable ABI; no mathematics lives here.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "direct.h"
#include "sinkattn/attention.h"

namespace sinkattn::torch_binding {

using Tensor = torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using ScalarType = torch::headeronly::ScalarType;

/// Throws std::runtime_error "sinkattn: <code>: <message>" unless ok; interface.py maps the code to
/// TypeError, ValueError, NotImplementedError or RuntimeError.
void raise_if_error(const Status& status);

/// View of a tensor; a dtype the core does not know is an error that names the argument.
TensorView view(const Tensor& tensor, const char* name);
TensorView view(const OptionalTensor& tensor, const char* name);

/// A fresh contiguous tensor on the device of `like`.
Tensor new_empty(const TensorView& like, const std::int64_t* shape, int rank, DType dtype);
Tensor new_empty(const TensorView& like, std::initializer_list<std::int64_t> shape, DType dtype);
Tensor new_empty(const Tensor& like, std::initializer_list<std::int64_t> shape, DType dtype);
Tensor new_empty_like(const Tensor& like);

/// Shape, dtype and device, without data, of the output for `params` (dtype of q, bf16 for e4m3)
/// and of the LSE of a query: (b, h, sq) or (h, total_q).
TensorView out_view(const ForwardParams& params);
TensorView statistics_view(const TensorView& query, bool packed);

void check_query_rank(const TensorView& query, bool packed);
/// Throws for layouts that Python's ready() would copy. On CUDA that is stricter than what the core
/// accepts: no repeated rows.
void check_ready(const TensorView& tensor, const char* name);
/// The two above for the tensors of a plain dense call.
void check_dense(const ForwardParams& params);

/// The device of a tensor, its facts, and while it lives, the current device of the thread.
class Call {
 public:
  explicit Call(const Tensor& tensor);
  /// For a device that is known to be current, with a workspace from elsewhere.
  Call(Device device, const DirectWorkspace& workspace);

  const DeviceProperties& device() const { return properties_; }

  /// Stream, threads and a fresh workspace for `plan`.
  ExecutionContext context(const Plan& plan);

  void run(const ForwardParams& params);
  void run(const BackwardParams& params);  ///< nothing, if no gradient is wanted

 private:
  void* new_workspace(std::int64_t bytes);

  TensorView like_;  ///< its device alone
  DeviceProperties properties_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  OptionalTensor workspace_;
  DirectWorkspace direct_workspace_;
};

}  // namespace sinkattn::torch_binding
