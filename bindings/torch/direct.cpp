// SPDX-License-Identifier: Apache-2.0
#include "direct.h"

#include "convert.h"

namespace sinkattn::torch_binding {
namespace {

MaskParams mask_of(const DirectOptions& options) {
  return {options.causal, options.window_left, options.window_right, 0};
}

/// Runs `body`, which throws where the operator would. What went wrong is for the operator to say.
template <class Body>
bool succeeds(Body&& body) noexcept {
  try {
    body();
    return true;
  } catch (...) {
    return false;
  }
}

ForwardParams forward_params(const DirectForward& c) {
  ForwardParams params;
  params.query = c.query;
  params.key = c.key;
  params.value = c.value;
  params.out = c.out;
  params.softmax_lse = c.softmax_lse;
  params.learnable_sink = c.learnable_sink;
  params.softmax_scale = c.options.softmax_scale;
  params.mask = mask_of(c.options);
  return params;
}

bool is_current(Device device) noexcept {
  if (device.type == DeviceType::cpu) return true;
  std::int32_t index = -1;
  return aoti_torch_get_current_device_index(&index) == AOTI_TORCH_SUCCESS && index == device.index;
}

bool forward_outputs(DirectForward& c) noexcept {
  return succeeds([&] {
    const ForwardParams params = forward_params(c);
    check_dense(params);
    c.out = out_view(params);
    if (c.want_lse) c.softmax_lse = statistics_view(params.query, false);
  });
}

bool forward(const DirectForward& c) noexcept {
  return succeeds([&] { Call(c.query.device, c.workspace).run(forward_params(c)); });
}

bool backward(const DirectBackward& c) noexcept {
  return succeeds([&] {
    BackwardParams params;
    params.dout = c.dout;
    params.dlse = c.dlse;
    params.query = c.query;
    params.key = c.key;
    params.value = c.value;
    params.out = c.out;
    params.softmax_lse = c.softmax_lse;
    params.dq = c.dq;
    params.dk = c.dk;
    params.dv = c.dv;
    params.dsink = c.dsink;
    if (c.dsink.defined()) params.learnable_sink = c.learnable_sink;
    params.softmax_scale = c.options.softmax_scale;
    params.mask = mask_of(c.options);
    params.deterministic = c.options.deterministic;
    if (c.dout.defined()) check_ready(c.dout, "dout");
    Call(c.query.device, c.workspace).run(params);
  });
}

}  // namespace
}  // namespace sinkattn::torch_binding

extern "C" __attribute__((visibility("default"))) const sinkattn::torch_binding::DirectTable*
sinkattn_direct() {
  using namespace sinkattn::torch_binding;
  static const DirectTable table{.grad_enabled = aoti_torch_grad_mode_is_enabled,
                                 .is_current = is_current,
                                 .forward_outputs = forward_outputs,
                                 .forward = forward,
                                 .backward = backward};
  return &table;
}
