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

struct DirectForward {
  TensorView query, key, value, learnable_sink;
  DirectOptions options;
  bool want_lse = false;
  void* out = nullptr;  ///< result: a tensor handle that the caller owns
  void* softmax_lse = nullptr;
};

struct DirectBackward {
  TensorView dout, dlse, query, key, value, learnable_sink, out, softmax_lse;
  DirectOptions options;
  bool need_dq = false, need_dkv = false, need_dsink = false;
  void* gradients[4] = {};  ///< of query, key, value and sink; null where not needed
};

/// The functions need no GIL. Where one returns false, nothing is owned, and the operator says why.
struct DirectTable {
  std::size_t layout = sizeof(DirectForward) * 1000 + sizeof(DirectBackward);
  bool (*grad_enabled)();
  bool (*forward)(DirectForward&) noexcept;
  bool (*backward)(DirectBackward&) noexcept;
  void (*release)(void* handle) noexcept;
};

}  // namespace sinkattn::torch_binding

extern "C" const sinkattn::torch_binding::DirectTable* sinkattn_direct();
