// SPDX-License-Identifier: Apache-2.0
// Small CPU problems for tests: owning tensors, views, plan and run.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <random>
#include <vector>

#include "sinkattn/attention.h"

namespace sinkattn::testing {

/// A contiguous tensor of float or double with canary elements on both sides.
template <class T>
class Array {
 public:
  static constexpr std::int64_t guard = 16;
  static constexpr T canary = static_cast<T>(-1234.5);

  explicit Array(std::initializer_list<std::int64_t> shape) {
    view_.dtype = sizeof(T) == 8 ? DType::float64 : DType::float32;
    view_.rank = static_cast<int>(shape.size());
    std::int64_t stride = 1;
    for (int i = view_.rank - 1; i >= 0; --i) {
      view_.shape[i] = shape.begin()[i];
      view_.stride[i] = stride;
      stride *= view_.shape[i];
    }
    data_.assign(static_cast<std::size_t>(stride + 2 * guard), canary);
    view_.data = data_.data() + guard;
  }

  Array& randomize(unsigned seed) {
    std::mt19937 engine(seed);
    std::normal_distribution<double> normal;
    for (T& x : *this) x = static_cast<T>(normal(engine));
    return *this;
  }

  bool guards_intact() const {
    for (std::int64_t i = 0; i < guard; ++i) {
      if (data_[static_cast<std::size_t>(i)] != canary) return false;
      if (data_[data_.size() - 1 - static_cast<std::size_t>(i)] != canary) return false;
    }
    return true;
  }

  const TensorView& view() const { return view_; }
  T* begin() { return data_.data() + guard; }
  T* end() { return data_.data() + data_.size() - guard; }
  T& operator[](std::int64_t i) { return begin()[i]; }

 private:
  std::vector<T> data_;
  TensorView view_;
};

/// Workspace of a plan, 256-byte aligned, with its size.
struct Workspace {
  explicit Workspace(const Plan& plan)
      : memory(std::aligned_alloc(256, (plan.workspace_bytes + 255) / 256 * 256 + 256), std::free) {
    context.workspace = memory.get();
    context.workspace_bytes = plan.workspace_bytes;
  }
  std::unique_ptr<void, void (*)(void*)> memory;
  ExecutionContext context;
};

inline Status run(const ForwardParams& params) {
  Plan plan;
  SINKATTN_RETURN_IF_ERROR(plan_forward(params, {}, &plan));
  const Workspace workspace(plan);
  return forward(params, plan, workspace.context);
}

inline Status run(const BackwardParams& params) {
  Plan plan;
  SINKATTN_RETURN_IF_ERROR(plan_backward(params, {}, &plan));
  const Workspace workspace(plan);
  return backward(params, plan, workspace.context);
}

/// Dense attention of b sequences with its tensors; gradients of sum(out * dout) + sum(lse * dlse).
template <class T>
struct Attention {
  Attention(std::int64_t b, std::int64_t sq, std::int64_t sk, std::int64_t h, std::int64_t hk,
            std::int64_t d, std::int64_t dv)
      : query({b, sq, h, d}),
        key({b, sk, hk, d}),
        value({b, sk, hk, dv}),
        sink({h}),
        out({b, sq, h, dv}),
        lse({b, h, sq}),
        dout({b, sq, h, dv}),
        dlse({b, h, sq}),
        dq({b, sq, h, d}),
        dk({b, sk, hk, d}),
        dv_out({b, sk, hk, dv}),
        dsink({h}) {
    query.randomize(1);
    key.randomize(2);
    value.randomize(3);
    sink.randomize(4);
    dout.randomize(5);
    dlse.randomize(6);
  }

  ForwardParams forward_params() const {
    ForwardParams p;
    p.query = query.view();
    p.key = key.view();
    p.value = value.view();
    p.learnable_sink = sink.view();
    p.out = out.view();
    p.softmax_lse = lse.view();
    p.mask = mask;
    p.softcap = softcap;
    return p;
  }

  BackwardParams backward_params() const {
    BackwardParams p;
    p.query = query.view();
    p.key = key.view();
    p.value = value.view();
    p.learnable_sink = sink.view();
    p.out = out.view();
    p.softmax_lse = lse.view();
    p.dout = dout.view();
    p.dlse = dlse.view();
    p.dq = dq.view();
    p.dk = dk.view();
    p.dv = dv_out.view();
    p.dsink = dsink.view();
    p.mask = mask;
    p.softcap = softcap;
    return p;
  }

  /// The loss whose gradients backward() computes.
  double loss() {
    (void)run(forward_params());
    double sum = 0.0;
    for (std::int64_t i = 0; i < out.view().numel(); ++i) sum += out[i] * dout[i];
    for (std::int64_t i = 0; i < lse.view().numel(); ++i) {
      if (lse[i] > -1e300) sum += lse[i] * dlse[i];
    }
    return sum;
  }

  Array<T> query, key, value, sink, out, lse, dout, dlse, dq, dk, dv_out, dsink;
  MaskParams mask;
  double softcap = 0.0;
};

}  // namespace sinkattn::testing
