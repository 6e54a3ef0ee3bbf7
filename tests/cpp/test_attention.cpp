// SPDX-License-Identifier: Apache-2.0
// The operations from C++: the oracle against finite differences, the blocked path against the
// oracle, error rules, workspaces, threads.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "common/prepared.h"
#include "problem_builder.h"

namespace sinkattn {
namespace {

using testing::Array;
using testing::Attention;
using testing::run;
using testing::Workspace;

MaskParams causal() { return {true, -1, -1, 0}; }

/// Central differences of the loss in `tensor` against the gradient in `gradient`.
void expect_gradient(Attention<double>& a, Array<double>& tensor, Array<double>& gradient) {
  constexpr double step = 1e-5;
  for (std::int64_t i = 0; i < tensor.view().numel(); ++i) {
    const double value = tensor[i];
    tensor[i] = value + step;
    const double above = a.loss();
    tensor[i] = value - step;
    const double below = a.loss();
    tensor[i] = value;
    EXPECT_NEAR((above - below) / (2 * step), gradient[i], 1e-6) << i;
  }
}

class OracleGradients : public ::testing::TestWithParam<int> {};

TEST_P(OracleGradients, AgreeWithFiniteDifferences) {
  Attention<double> a(1, 4, 5, 4, 2, 8, 8);
  const MaskParams masks[] = {{}, causal(), {false, 1, 1, 0}, {false, -1, -1, 2}, {true, 0, 0, 0}};
  a.mask = masks[GetParam() % 5];
  a.softcap = GetParam() >= 5 ? 2.0 : 0.0;
  (void)a.loss();
  ASSERT_TRUE(run(a.backward_params()).ok());
  for (auto* pair : {&a}) {
    expect_gradient(*pair, pair->query, pair->dq);
    expect_gradient(*pair, pair->key, pair->dk);
    expect_gradient(*pair, pair->value, pair->dv_out);
    expect_gradient(*pair, pair->sink, pair->dsink);
  }
}

INSTANTIATE_TEST_SUITE_P(Masks, OracleGradients, ::testing::Range(0, 10));

void expect_near(Array<float>& actual, Array<double>& expected, double tolerance) {
  double scale = 1e-3;
  for (double x : expected) scale = std::max(scale, std::isfinite(x) ? std::abs(x) : 0.0);
  for (std::int64_t i = 0; i < expected.view().numel(); ++i) {
    if (std::isinf(expected[i])) {
      EXPECT_EQ(actual[i], static_cast<float>(expected[i])) << i;
    } else {
      EXPECT_NEAR(actual[i], expected[i], tolerance * scale) << i;
    }
  }
  EXPECT_TRUE(actual.guards_intact());
  EXPECT_TRUE(expected.guards_intact());
}

TEST(BlockedPath, AgreesWithTheOracle) {
  const MaskParams masks[] = {
      {}, causal(), {true, 20, 0, 0}, {false, 3, 9, 0}, {false, -1, -1, 32}};
  for (const MaskParams& mask : masks) {
    for (const auto& [sq, sk] : {std::pair{1, 1}, {130, 70}, {65, 200}, {3, 0}}) {
      Attention<float> fast(2, sq, sk, 6, 2, 24, 40);
      Attention<double> oracle(2, sq, sk, 6, 2, 24, 40);
      fast.mask = oracle.mask = mask;
      const auto round = [](Array<double>& to, Array<float>& from) {
        for (std::int64_t i = 0; i < from.view().numel(); ++i) to[i] = from[i];
      };
      round(oracle.query, fast.query);
      round(oracle.key, fast.key);
      round(oracle.value, fast.value);
      round(oracle.sink, fast.sink);
      round(oracle.dout, fast.dout);
      round(oracle.dlse, fast.dlse);
      ASSERT_TRUE(run(fast.forward_params()).ok());
      ASSERT_TRUE(run(oracle.forward_params()).ok());
      expect_near(fast.out, oracle.out, 1e-5);
      expect_near(fast.lse, oracle.lse, 1e-5);
      ASSERT_TRUE(run(fast.backward_params()).ok());
      ASSERT_TRUE(run(oracle.backward_params()).ok());
      expect_near(fast.dq, oracle.dq, 2e-5);
      expect_near(fast.dk, oracle.dk, 2e-5);
      expect_near(fast.dv_out, oracle.dv_out, 2e-5);
      expect_near(fast.dsink, oracle.dsink, 2e-5);
    }
  }
}

TEST(Errors, NameTheArgument) {
  struct Rule {
    const char* text;
    StatusCode code;
    void (*spoil)(ForwardParams*);
  };
  const Rule rules[] = {
      {"q: expected a tensor, got none", StatusCode::type_error,
       [](ForwardParams* p) { p->query = {}; }},
      {"q: expected 4 dimensions, got 2", StatusCode::value_error,
       [](ForwardParams* p) { p->query.rank = 2; }},
      {"k: expected the dtype of q, float32, got float64", StatusCode::type_error,
       [](ForwardParams* p) { p->key.dtype = DType::float64; }},
      {"v: expected a tensor on cpu:0 like q, got cuda:1", StatusCode::type_error,
       [](ForwardParams* p) { p->value.device = {DeviceType::cuda, 1}; }},
      {"k: expected strides in", StatusCode::value_error,
       [](ForwardParams* p) { p->key.stride[0] = -8; }},
      {"q: expected stride 1 in the last dimension", StatusCode::value_error,
       [](ForwardParams* p) { p->query.stride[3] = 2; }},
      {"q: expected sizes whose product fits 47 bits", StatusCode::value_error,
       [](ForwardParams* p) { p->query.shape[1] = INT64_MAX; }},
      {"out: expected size 5 in dimension 1, got 4", StatusCode::value_error,
       [](ForwardParams* p) { p->out.shape[1] = 4; }},
      {"softmax_lse: expected float32, got float64", StatusCode::type_error,
       [](ForwardParams* p) { p->softmax_lse.dtype = DType::float64; }},
      {"learnable_sink: expected size 4 in dimension 0, got 3", StatusCode::value_error,
       [](ForwardParams* p) { p->learnable_sink.shape[0] = 3; }},
      {"num_splits: expected an integer in [0, 256], got -1", StatusCode::value_error,
       [](ForwardParams* p) { p->num_splits = -1; }},
      {"softcap: expected a finite number >= 0", StatusCode::value_error,
       [](ForwardParams* p) { p->softcap = NAN; }},
      {"softmax_scale: expected a finite number > 0", StatusCode::value_error,
       [](ForwardParams* p) { p->softmax_scale = -1.0; }},
  };
  for (const Rule& rule : rules) {
    const Attention<float> a(2, 5, 6, 4, 2, 16, 16);
    ForwardParams params = a.forward_params();
    rule.spoil(&params);
    Plan plan;
    const Status status = plan_forward(params, {}, &plan);
    EXPECT_EQ(status.code(), rule.code) << rule.text;
    EXPECT_NE(std::strstr(status.message(), rule.text), nullptr) << status.message();
  }
}

TEST(Errors, WorkspaceAndPlanAreVerified) {
  const Attention<float> a(2, 5, 6, 4, 2, 16, 16);
  const ForwardParams params = a.forward_params();
  Plan plan;
  ASSERT_TRUE(plan_forward(params, {}, &plan).ok());
  ASSERT_GT(plan.workspace_bytes, 0u);
  EXPECT_EQ(forward(params, plan, {}).code(), StatusCode::runtime_error);
  Workspace workspace(plan);
  workspace.context.workspace_bytes = plan.workspace_bytes - 1;
  EXPECT_EQ(forward(params, plan, workspace.context).code(), StatusCode::runtime_error);
  Plan foreign = plan;
  foreign.backend = Backend::hopper;
  workspace.context.workspace_bytes = plan.workspace_bytes;
  EXPECT_EQ(forward(params, foreign, workspace.context).code(), StatusCode::value_error);
}

TEST(Prepared, RunsWhatThePublicPairRuns) {
  Attention<float> a(2, 5, 6, 4, 2, 16, 16);
  a.mask = causal();
  ASSERT_TRUE(run(a.forward_params()).ok());
  const std::vector<float> out(a.out.begin(), a.out.end());
  for (float& x : a.out) x = 0.0f;
  Prepared<ForwardProblem> prepared;
  ASSERT_TRUE(prepare_forward(a.forward_params(), {}, &prepared).ok());
  Plan plan;
  ASSERT_TRUE(plan_forward(a.forward_params(), {}, &plan).ok());
  EXPECT_EQ(prepared.plan.workspace_bytes, plan.workspace_bytes);
  EXPECT_STREQ(prepared.plan.kernel, "");  // its text is left out
  EXPECT_EQ(run_prepared(prepared, {}).code(), StatusCode::runtime_error);
  const Workspace workspace(plan);
  ASSERT_TRUE(run_prepared(prepared, workspace.context).ok());
  EXPECT_TRUE(std::equal(out.begin(), out.end(), a.out.begin()));
  ForwardParams wrong = a.forward_params();
  wrong.softcap = -1.0;
  EXPECT_EQ(prepare_forward(wrong, {}, &prepared).code(), StatusCode::value_error);
}

TEST(Errors, CudaTensorsNeverFallBack) {
  const Attention<float> a(1, 5, 6, 4, 2, 16, 16);
  ForwardParams params = a.forward_params();
  for (TensorView* t : {&params.query, &params.key, &params.value, &params.out, &params.softmax_lse,
                        &params.learnable_sink}) {
    t->device = {DeviceType::cuda, 0};
    t->dtype = t->dtype == DType::float32 && t->rank == 4 ? DType::bfloat16 : t->dtype;
  }
  DeviceProperties old;
  old.device = {DeviceType::cuda, 0};
  old.compute_capability = 80;
  Plan plan;
  EXPECT_FALSE(plan_forward(params, old, &plan).ok());
}

TEST(Errors, TheBackwardOnCudaKeepsNoSmsFree) {
  if (!built_with_cuda()) GTEST_SKIP() << "this build has no CUDA kernels";
  const Attention<float> a(1, 5, 6, 4, 2, 16, 16);
  BackwardParams params = a.backward_params();
  for (TensorView* t : {&params.query, &params.key, &params.value, &params.out, &params.dout,
                        &params.dq, &params.dk, &params.dv, &params.softmax_lse, &params.dlse,
                        &params.learnable_sink, &params.dsink}) {
    t->device = {DeviceType::cuda, 0};
    t->data = reinterpret_cast<void*>(4096);  // aligned; plans read no data
    if (t->rank == 4) t->dtype = DType::bfloat16;
  }
  DeviceProperties hopper;
  hopper.device = {DeviceType::cuda, 0};
  hopper.compute_capability = 90;
  hopper.sm_count = 132;
  Plan plan;
  const Status served = plan_backward(params, hopper, &plan);
  ASSERT_TRUE(served.ok()) << served.message();
  params.sm_margin = 8;
  const Status refused = plan_backward(params, hopper, &plan);
  EXPECT_EQ(refused.code(), StatusCode::not_implemented);
  EXPECT_NE(std::string(refused.message()).find("sm_margin: expected 0"), std::string::npos);
}

TEST(Threads, ConcurrentCallsGiveTheSameBits) {
  Attention<float> expected(2, 70, 90, 4, 2, 32, 32);
  ASSERT_TRUE(run(expected.forward_params()).ok());
  std::vector<std::jthread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&expected] {
      Attention<float> a(2, 70, 90, 4, 2, 32, 32);
      for (int i = 0; i < 5; ++i) ASSERT_TRUE(run(a.forward_params()).ok());
      EXPECT_EQ(std::memcmp(a.out.begin(), expected.out.begin(),
                            sizeof(float) * static_cast<std::size_t>(a.out.view().numel())),
                0);
    });
  }
}

TEST(Splits, ExactlyAsManyAsAsked) {
  const Attention<float> a(1, 3, 1000, 4, 2, 64, 64);
  ForwardParams params = a.forward_params();
  for (int splits : {1, 2, 7, 256}) {
    params.num_splits = splits;
    Plan plan;
    ASSERT_TRUE(plan_forward(params, {}, &plan).ok());
    EXPECT_EQ(plan.num_splits, splits);
    EXPECT_TRUE(run(params).ok());
  }
}

TEST(Plans, WorkspaceIsLinearInTheSequence) {
  std::size_t bytes[2];
  for (int i = 0; i < 2; ++i) {
    const Attention<float> a(1, 4096 << i, 64, 1, 1, 8, 8);
    Plan plan;
    ASSERT_TRUE(plan_backward(a.backward_params(), {}, &plan).ok());
    bytes[i] = plan.workspace_bytes;
  }
  EXPECT_LE(bytes[1], 2 * bytes[0]);
}

TEST(Version, IsThere) {
  EXPECT_STRNE(version(), "");
  EXPECT_EQ(schedule_length(0), 1);
  EXPECT_LE(schedule_length(5), 33);
}

}  // namespace
}  // namespace sinkattn
