// SPDX-License-Identifier: Apache-2.0
// What the Python module (bindings/python) asks of the operator library: a plain dense call without
// torch's dispatcher. Both are built together; the module finds this table through an exported
// function and refuses a library of another layout.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "sinkattn/tensor.h"

namespace sinkattn::torch_binding {

/// The options of a plain call.
struct DirectOptions {
  std::optional<double> softmax_scale;
  bool causal = false;
  std::int64_t window_left = -1;
  std::int64_t window_right = -1;
  bool deterministic = false;
};

/// Allocates the workspace of a call: `bytes` bytes on its device, or null.
struct DirectWorkspace {
  void* (*allocate)(void* self, std::int64_t bytes) = nullptr;
  void* self = nullptr;
};

/// `out` and `softmax_lse` are allocated by the caller, as forward_outputs() says.
struct DirectForward {
  TensorView query, key, value, learnable_sink, out, softmax_lse;
  DirectOptions options;
  DirectWorkspace workspace;
  bool want_lse = false;
};

/// The gradients that are wanted are allocated by the caller, shaped as their inputs; dk and dv
/// come together.
struct DirectBackward {
  TensorView dout, dlse, query, key, value, learnable_sink, out, softmax_lse;
  TensorView dq, dk, dv, dsink;
  DirectOptions options;
  DirectWorkspace workspace;
};

/// The functions need no GIL. Where one returns false, the operator says why.
struct DirectTable {
  std::size_t layout = sizeof(DirectForward) * 1000 + sizeof(DirectBackward);
  bool (*grad_enabled)();
  /// Whether torch allocates on this device and the core launches on it as things are.
  bool (*is_current)(Device) noexcept;
  /// Fills shape, dtype and device of the outputs.
  bool (*forward_outputs)(DirectForward&) noexcept;
  bool (*forward)(const DirectForward&) noexcept;
  bool (*backward)(const DirectBackward&) noexcept;
};

}  // namespace sinkattn::torch_binding

extern "C" const sinkattn::torch_binding::DirectTable* sinkattn_direct();
