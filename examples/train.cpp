// SPDX-License-Identifier: Apache-2.0
// Training without Python: fits queries and sinks of one attention layer to a target by gradient
// descent. Prints the loss and exits with 0 if it fell below a tenth of where it started.
#include <sinkattn/attention.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <random>
#include <vector>

namespace {

using sinkattn::DType;
using sinkattn::Plan;
using sinkattn::Status;
using sinkattn::TensorView;

constexpr std::int64_t batch = 1, rows = 16, keys = 16, heads = 4, kv_heads = 2, dim = 16;

struct Tensor {
  std::vector<float> data;
  TensorView view;

  Tensor(std::initializer_list<std::int64_t> shape, float deviation, unsigned seed) {
    view.dtype = DType::float32;
    view.rank = static_cast<int>(shape.size());
    std::int64_t stride = 1;
    for (int i = view.rank - 1; i >= 0; --i) {
      view.shape[i] = shape.begin()[i];
      view.stride[i] = stride;
      stride *= view.shape[i];
    }
    data.resize(static_cast<std::size_t>(stride));
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal(0.0f, 1.0f);
    for (float& x : data) x = deviation * normal(engine);
    view.data = data.data();
  }

  void descend(const Tensor& gradient, float rate) {
    for (std::size_t i = 0; i < data.size(); ++i) data[i] -= rate * gradient.data[i];
  }
};

void require(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "sinkattn: %s\n", status.message());
  std::exit(2);
}

/// Memory for a plan, aligned as ExecutionContext asks.
sinkattn::ExecutionContext context_for(const Plan& plan, std::vector<char>* memory) {
  memory->resize(plan.workspace_bytes + 256);
  const auto address = reinterpret_cast<std::uintptr_t>(memory->data());
  sinkattn::ExecutionContext context;
  context.workspace = reinterpret_cast<void*>((address + 255) / 256 * 256);
  context.workspace_bytes = plan.workspace_bytes;
  return context;
}

}  // namespace

int main() {
  Tensor query({batch, rows, heads, dim}, 0.5f, 1), key({batch, keys, kv_heads, dim}, 1.0f, 2);
  Tensor value({batch, keys, kv_heads, dim}, 1.0f, 3), sink({heads}, 0.0f, 4);
  Tensor out({batch, rows, heads, dim}, 0, 0), lse({batch, heads, rows}, 0, 0);
  Tensor dout({batch, rows, heads, dim}, 0, 0), dq({batch, rows, heads, dim}, 0, 0);
  Tensor dk({batch, keys, kv_heads, dim}, 0, 0), dv({batch, keys, kv_heads, dim}, 0, 0);
  Tensor dsink({heads}, 0, 0);

  sinkattn::ForwardParams forward;
  forward.query = query.view;
  forward.key = key.view;
  forward.value = value.view;
  forward.learnable_sink = sink.view;
  forward.out = out.view;
  forward.softmax_lse = lse.view;
  forward.mask.causal = true;

  sinkattn::BackwardParams backward;
  backward.query = query.view;
  backward.key = key.view;
  backward.value = value.view;
  backward.learnable_sink = sink.view;
  backward.out = out.view;
  backward.softmax_lse = lse.view;
  backward.mask = forward.mask;
  backward.dout = dout.view;
  backward.dq = dq.view;
  backward.dk = dk.view;
  backward.dv = dv.view;
  backward.dsink = dsink.view;

  sinkattn::DeviceProperties device;
  require(sinkattn::query_device({}, &device));
  Plan plan, backward_plan;
  require(sinkattn::plan_forward(forward, device, &plan));
  require(sinkattn::plan_backward(backward, device, &backward_plan));
  std::vector<char> memory, backward_memory;
  const auto context = context_for(plan, &memory);
  const auto backward_context = context_for(backward_plan, &backward_memory);
  std::printf("forward: %s, backward: %s\n", plan.kernel, backward_plan.kernel);

  // The target: the output shrunk by what sinks of 1 would take away, for a known minimum of 0.
  std::fill(sink.data.begin(), sink.data.end(), 1.0f);
  require(sinkattn::forward(forward, plan, context));
  const std::vector<float> target = out.data;
  std::fill(sink.data.begin(), sink.data.end(), -2.0f);

  float first = 0.0f, loss = 0.0f;
  for (int step = 0; step <= 200; ++step) {
    require(sinkattn::forward(forward, plan, context));
    loss = 0.0f;
    for (std::size_t i = 0; i < target.size(); ++i) {
      const float difference = out.data[i] - target[i];
      loss += difference * difference;
      dout.data[i] = 2.0f * difference;
    }
    if (step == 0) first = loss;
    if (step % 50 == 0)
      std::printf("step %3d  loss %.6f  sink[0] %.3f\n", step, loss, sink.data[0]);
    require(sinkattn::backward(backward, backward_plan, backward_context));
    sink.descend(dsink, 0.05f);
  }
  return std::isfinite(loss) && loss < 0.1f * first ? 0 : 1;
}
