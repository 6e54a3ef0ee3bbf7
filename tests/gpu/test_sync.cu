// SPDX-License-Identifier: Apache-2.0
// Rings of mbarriers over many rounds, named barriers as turns, election, reductions into global
// memory, edge values of the arithmetic.
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "gpu_test.h"
#include "hopper/ptx/math.cuh"
#include "hopper/ptx/mbarrier.cuh"
#include "hopper/ptx/sync.cuh"
#include "hopper/ptx/tma.cuh"

namespace sinkattn::hopper::testing {
namespace {

constexpr int words = 256;  // of one item of the ring

/// A producer thread copies items into a ring; two warpgroups read each item and release its stage
/// with one arrival each. Warpgroup 0 is the slower one in even rounds, 1 in odd ones.
template <int Stages>
__global__ void __launch_bounds__(384)
    ring_of_copies(const std::uint32_t* items, int count, std::uint32_t* out) {
  __shared__ alignas(128) std::uint32_t ring[Stages][words];
  __shared__ std::uint64_t full[Stages], empty[Stages];
  if (threadIdx.x == 0) {
    for (int i = 0; i < Stages; ++i) {
      ptx::mbarrier_init(&full[i], 1);
      ptx::mbarrier_init(&empty[i], 2);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / 128 - 1;
  if (warpgroup < 0) {
    if (threadIdx.x != 0) return;
    for (int i = 0; i < count; ++i) {
      const int stage = i % Stages, round = i / Stages;
      ptx::mbarrier_wait(&empty[stage], (round & 1) ^ 1);
      ptx::mbarrier_arrive_expect_tx(&full[stage], words * 4);
      ptx::bulk_load(ptx::shared_address(ring[stage]), items + i * words, words * 4, &full[stage]);
    }
    return;
  }
  const int thread = threadIdx.x % 128;
  for (int i = 0; i < count; ++i) {
    const int stage = i % Stages, round = i / Stages;
    ptx::mbarrier_wait(&full[stage], round & 1);
    if (round % 2 == warpgroup) __nanosleep(500);
    for (int j = thread; j < words; j += 128) {
      out[(warpgroup * count + i) * words + j] = ring[stage][j];
    }
    ptx::named_barrier_sync(1 + warpgroup, 128);  // everybody has read
    if (thread == 0) ptx::mbarrier_arrive(&empty[stage]);
  }
}

class Sync : public HopperTest {
 protected:
  template <int Stages>
  void check_ring() {
    constexpr int count = 7 * Stages + 3;  // more than seven rounds
    std::vector<std::uint32_t> items(count * words);
    for (std::size_t i = 0; i < items.size(); ++i) items[i] = static_cast<std::uint32_t>(i) * 77u;
    const DeviceArray<std::uint32_t> input(items);
    DeviceArray<std::uint32_t> out(2 * items.size(), 0u);
    ASSERT_CUDA(launch(&ring_of_copies<Stages>, 1, 384, 0, input.device(), count, out.device()));
    ASSERT_CUDA(out.download());
    for (std::size_t i = 0; i < out.host.size(); ++i) {
      ASSERT_EQ(out.host[i], items[i % items.size()]) << "stages " << Stages << ", word " << i;
    }
  }
};

TEST_F(Sync, RingKeepsItsPhases) {
  check_ring<1>();
  check_ring<2>();
  check_ring<3>();
  check_ring<4>();
}

/// A fresh barrier lets the waiter of parity 1 through at once; that of parity 0 waits for the
/// arrivals *and* the bytes.
__global__ void phase_of_barrier(const std::uint32_t* source, bool* seen) {
  __shared__ alignas(128) std::uint32_t target[4];
  __shared__ std::uint64_t barrier;
  ptx::mbarrier_init(&barrier, 2);
  ptx::mbarrier_init_fence();
  seen[0] = ptx::mbarrier_try_wait(&barrier, 1);
  seen[1] = ptx::mbarrier_try_wait(&barrier, 0);
  ptx::mbarrier_arrive(&barrier);
  seen[2] = ptx::mbarrier_try_wait(&barrier, 0);
  ptx::mbarrier_arrive_expect_tx(&barrier, 16);
  seen[3] = ptx::mbarrier_try_wait(&barrier, 0);
  ptx::bulk_load(ptx::shared_address(target), source, 16, &barrier);
  ptx::mbarrier_wait(&barrier, 0);
  seen[4] = target[3] == source[3];
  seen[5] = ptx::mbarrier_try_wait(&barrier, 1);  // the next phase is open
}

TEST_F(Sync, PhaseNeedsArrivalsAndBytes) {
  const DeviceArray<std::uint32_t> source(std::vector<std::uint32_t>{1, 2, 3, 4});
  DeviceArray<unsigned char> seen(6, static_cast<unsigned char>(7));
  ASSERT_CUDA(
      launch(&phase_of_barrier, 1, 1, 0, source.device(), reinterpret_cast<bool*>(seen.device())));
  ASSERT_CUDA(seen.download());
  EXPECT_EQ(seen.host, (std::vector<unsigned char>{1, 0, 0, 0, 1, 0}));
}

/// Warpgroups take turns as in the forward kernel: 0, 1, .., 0, 1, .. whatever their speed.
template <int Warpgroups>
__global__ void __launch_bounds__(128 * Warpgroups) take_turns(int rounds, int* order) {
  __shared__ int next;
  const int warpgroup = threadIdx.x / 128, successor = (warpgroup + 1) % Warpgroups;
  constexpr int threads = 256;  // the one that passes a turn and the one that takes it
  if (threadIdx.x == 0) next = 0;
  __syncthreads();
  if (warpgroup == Warpgroups - 1) ptx::named_barrier_arrive(1, threads);
  for (int round = 0; round < rounds; ++round) {
    ptx::named_barrier_sync(1 + warpgroup, threads);
    if (threadIdx.x % 128 == 0) order[next++] = warpgroup;
    __nanosleep(100 * ((warpgroup + round) % Warpgroups));
    ptx::named_barrier_arrive(1 + successor, threads);
  }
  if (warpgroup == 0) ptx::named_barrier_sync(1, threads);
}

TEST_F(Sync, NamedBarriersKeepTurns) {
  constexpr int rounds = 50;
  const auto check = [&](int warpgroups, void (*kernel)(int, int*)) {
    DeviceArray<int> order(static_cast<std::size_t>(warpgroups) * rounds, -1);
    ASSERT_CUDA(launch(kernel, 1, 128 * warpgroups, 0, rounds, order.device()));
    ASSERT_CUDA(order.download());
    for (int i = 0; i < warpgroups * rounds; ++i) ASSERT_EQ(order.host[i], i % warpgroups) << i;
  };
  check(2, &take_turns<2>);
  check(3, &take_turns<3>);
  check(4, &take_turns<4>);
}

__global__ void elect(int* elected) {
  if (ptx::elect_one()) atomicAdd(&elected[threadIdx.x / 32], 1);
}

TEST_F(Sync, OneLaneOfEveryWarpIsElected) {
  DeviceArray<int> elected(8, 0);
  ASSERT_CUDA(launch(&elect, 1, 256, 0, elected.device()));
  ASSERT_CUDA(elected.download());
  EXPECT_EQ(elected.host, std::vector<int>(8, 1));
}

constexpr int block_values = 1024;  // that each block adds, 8 blocks to every place

/// Block b adds its values to part b / 8, by one instruction per four values or one bulk copy.
__global__ void __launch_bounds__(256) reduce_values(const float* values, float* out, bool bulk) {
  __shared__ alignas(128) float staged[block_values];
  const float* mine = values + blockIdx.x * block_values;
  float* target = out + blockIdx.x / 8 * block_values;
  const int i = 4 * static_cast<int>(threadIdx.x);
  if (!bulk) {
    ptx::reduce_add(target + i, mine[i], mine[i + 1], mine[i + 2], mine[i + 3]);
    return;
  }
  for (int j = 0; j < 4; ++j) staged[i + j] = mine[i + j];
  ptx::fence_proxy_async_shared();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::bulk_reduce_add(target, ptx::shared_address(staged), block_values * 4);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}

TEST_F(Sync, ReductionsEqualPlainSums) {
  constexpr int blocks = 64;
  Integers integers(5);
  const std::vector<int> numbers = integers.many(blocks * block_values, 1000);
  std::vector<float> values(numbers.begin(), numbers.end());
  std::vector<float> sums(blocks / 8 * block_values, 3.0f);
  for (int i = 0; i < blocks * block_values; ++i) {
    sums[i / block_values / 8 * block_values + i % block_values] += values[i];
  }
  const DeviceArray<float> input(values);
  for (const bool bulk : {false, true}) {
    DeviceArray<float> out(sums.size(), 3.0f);
    ASSERT_CUDA(launch(&reduce_values, blocks, 256, 0, input.device(), out.device(), bulk));
    ASSERT_CUDA(out.download());
    EXPECT_EQ(out.host, sums) << (bulk ? "bulk" : "red.v4");
  }
}

__global__ void evaluate(const float* x, int count, float* power, float* inverse) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= count) return;
  power[i] = ptx::exp2_approx(x[i]);
  inverse[i] = ptx::reciprocal_approx(x[i]);
}

TEST_F(Sync, ExponentialAtTheEdges) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> x{-infinity, 0.0f, -0.0f,   NAN,     infinity, 1.0f, -1.0f,
                             10.0f,     8.0f, -126.0f, -200.0f, 128.0f,   0.5f, -7.25f};
  const DeviceArray<float> input(x);
  DeviceArray<float> power(x.size(), -1.0f), inverse(x.size(), -1.0f);
  ASSERT_CUDA(launch(&evaluate, 1, 32, 0, input.device(), static_cast<int>(x.size()),
                     power.device(), inverse.device()));
  ASSERT_CUDA(power.download());
  ASSERT_CUDA(inverse.download());
  EXPECT_EQ(power.host[0], 0.0f);
  EXPECT_FALSE(std::signbit(power.host[0]));
  EXPECT_EQ(power.host[1], 1.0f);  // the largest exponential of a row is exactly 1
  EXPECT_EQ(power.host[2], 1.0f);
  EXPECT_TRUE(std::isnan(power.host[3]));  // a NaN score reaches the sum of its row
  EXPECT_EQ(power.host[4], infinity);
  EXPECT_EQ(power.host[10], 0.0f);  // below every representable number
  EXPECT_EQ(power.host[11], infinity);
  for (const int i : {5, 6, 7, 8, 9, 12, 13}) {
    const float exact = std::exp2(x[static_cast<std::size_t>(i)]);
    EXPECT_NEAR(power.host[i], exact, exact * 2.4e-7f) << x[static_cast<std::size_t>(i)];
  }
  for (const int i : {5, 6, 7, 8, 12}) {
    const float exact = 1.0f / x[static_cast<std::size_t>(i)];
    EXPECT_NEAR(inverse.host[i], exact, std::fabs(exact) * 1.2e-7f);
  }
}

template <class T>
__global__ void pack_values(float low, float high, std::uint32_t* packed) {
  packed[0] = ptx::pack<T>(low, high);
}

TEST_F(Sync, PackPutsTheFirstValueLow) {
  DeviceArray<std::uint32_t> packed(1, 0u);
  const auto check = [&](void (*kernel)(float, float, std::uint32_t*), std::uint32_t expected) {
    ASSERT_CUDA(launch(kernel, 1, 1, 0, 1.5f, -2.0f, packed.device()));
    ASSERT_CUDA(packed.download());
    EXPECT_EQ(packed.host[0], expected);
  };
  check(&pack_values<__nv_bfloat16>, 0xC0003FC0u);
  check(&pack_values<__half>, 0xC0003E00u);
}

}  // namespace
}  // namespace sinkattn::hopper::testing
