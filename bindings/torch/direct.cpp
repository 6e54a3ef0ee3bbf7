// SPDX-License-Identifier: Apache-2.0
#include "direct.h"

#include <memory>

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

/// A new tensor until its owner takes it.
class Fresh {
 public:
  explicit Fresh(TensorView like) : view_(like), handle_(new_empty_handle(view_)) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle_.get(), &view_.data));
  }

  const TensorView& view() const { return view_; }
  void* release() { return handle_.release(); }

 private:
  struct Delete {
    void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
  };
  TensorView view_;
  std::unique_ptr<AtenTensorOpaque, Delete> handle_;
};

bool forward(DirectForward& c) noexcept {
  return succeeds([&] {
    Call call(c.query.device);
    ForwardParams params;
    params.query = c.query;
    params.key = c.key;
    params.value = c.value;
    params.learnable_sink = c.learnable_sink;
    params.softmax_scale = c.options.softmax_scale;
    params.mask = mask_of(c.options);
    check_dense(params);
    Fresh out(out_view(params));
    params.out = out.view();
    std::optional<Fresh> lse;
    if (c.want_lse) params.softmax_lse = lse.emplace(statistics_view(params.query, false)).view();
    call.run(params);
    c.out = out.release();
    if (lse) c.softmax_lse = lse->release();
  });
}

bool backward(DirectBackward& c) noexcept {
  return succeeds([&] {
    Call call(c.query.device);
    BackwardParams params;
    params.dout = c.dout;
    params.dlse = c.dlse;
    params.query = c.query;
    params.key = c.key;
    params.value = c.value;
    params.out = c.out;
    params.softmax_lse = c.softmax_lse;
    params.softmax_scale = c.options.softmax_scale;
    params.mask = mask_of(c.options);
    params.deterministic = c.options.deterministic;
    if (c.dout.defined()) check_ready(c.dout, "dout");
    std::optional<Fresh> gradients[4];
    if (c.need_dq) params.dq = gradients[0].emplace(c.query).view();
    if (c.need_dkv) {
      params.dk = gradients[1].emplace(c.key).view();
      params.dv = gradients[2].emplace(c.value).view();
    }
    if (c.need_dsink) {
      params.learnable_sink = c.learnable_sink;
      params.dsink = gradients[3].emplace(c.learnable_sink).view();
    }
    call.run(params);
    for (int i = 0; i < 4; ++i) {
      if (gradients[i]) c.gradients[i] = gradients[i]->release();
    }
  });
}

void release_handle(void* handle) noexcept {
  aoti_torch_delete_tensor_object(static_cast<AtenTensorHandle>(handle));
}

}  // namespace
}  // namespace sinkattn::torch_binding

extern "C" __attribute__((visibility("default"))) const sinkattn::torch_binding::DirectTable*
sinkattn_direct() {
  using namespace sinkattn::torch_binding;
  static const DirectTable table{.grad_enabled = aoti_torch_grad_mode_is_enabled,
                                 .forward = forward,
                                 .backward = backward,
                                 .release = release_handle};
  return &table;
}
