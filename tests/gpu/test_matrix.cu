// SPDX-License-Identifier: Apache-2.0
// stmatrix and ldmatrix, plain and transposed, through the swizzle of core/tile.cuh: what registers
// write must be what the copy engine would have written, and what they read, what it did write.
#include <cstdint>
#include <vector>

#include "gpu_test.h"
#include "hopper/core/tensor_map.h"
#include "hopper/core/tile.cuh"
#include "hopper/ptx/matrix.cuh"
#include "hopper/ptx/mbarrier.cuh"
#include "hopper/ptx/sync.cuh"
#include "hopper/ptx/tma.cuh"

namespace sinkattn::hopper::testing {
namespace {

constexpr int rows = 64, columns = 128;
using Block = Tile<rows, columns>;

enum class Layout { plain, transposed };

/// Where lane l points for a 16 x 16 block at (row, chunk) of a tile. Plain: matrices 0 to 3 are
/// (rows 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15). Transposed, the registers hold
/// the block with rows and columns exchanged, so that matrices 1 and 2 change places.
template <Layout layout>
__device__ std::uint32_t lane_address(std::uint32_t tile, int row, int chunk) {
  const int lane = threadIdx.x % 32;
  const int low = lane / 8 % 2, high = lane / 16;
  row += lane % 8 + 8 * (layout == Layout::plain ? low : high);
  chunk += layout == Layout::plain ? high : low;
  return tile + chunk / 8 * Block::slab_bytes + swizzled_offset(row, chunk % 8);
}

/// Register i of this lane for that block, by the fragment map: rows g and g + 8, columns 2q and
/// 2q + 8. Read from the row-major matrix.
template <Layout layout>
__device__ std::uint32_t fragment(const Bits* matrix, int row, int column, int i) {
  const int lane = threadIdx.x % 32;
  const int a = lane / 4 + 8 * (i % 2), b = 2 * (lane % 4) + 8 * (i / 2);
  const bool plain = layout == Layout::plain;
  const std::uint32_t low = matrix[(row + (plain ? a : b)) * columns + column + (plain ? b : a)];
  const std::uint32_t high =
      matrix[(row + (plain ? a : b + 1)) * columns + column + (plain ? b + 1 : a)];
  return low | high << 16;
}

struct Outcome {
  std::uint32_t store_mismatches;  ///< 16-byte words that differ from the copy engine's
  std::uint32_t load_mismatches;   ///< registers that differ from the fragment map
};

/// Four warps of 16 rows each.
template <Layout layout>
__global__ void __launch_bounds__(128)
    move_blocks(const __grid_constant__ CUtensorMap map, const Bits* matrix, Outcome* outcome) {
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ std::uint64_t full;
  unsigned char* const copied = shared;
  unsigned char* const stored = shared + Block::bytes;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&full, 1);
    ptx::mbarrier_init_fence();
    ptx::mbarrier_arrive_expect_tx(&full, Block::bytes);
    for (int slab = 0; slab < Block::slabs; ++slab) {
      // A tensor of one sequence: rows - length = 0 and first + length = rows.
      ptx::tma_load(ptx::shared_address(copied) + slab * Block::slab_bytes, &map, &full,
                    {slab * slab_columns, 0, rows, 0, 0});
    }
  }
  __syncthreads();
  ptx::mbarrier_wait(&full, 0);

  const int row = threadIdx.x / 32 * 16;
  for (int column = 0; column < columns; column += 16) {
    std::uint32_t expected[4], loaded[4];
    for (int i = 0; i < 4; ++i) expected[i] = fragment<layout>(matrix, row, column, i);
    const std::uint32_t from = lane_address<layout>(ptx::shared_address(copied), row, column / 8);
    const std::uint32_t to = lane_address<layout>(ptx::shared_address(stored), row, column / 8);
    if constexpr (layout == Layout::plain) {
      ptx::load_matrix_x4(loaded, from);
      ptx::store_matrix_x4(to, expected[0], expected[1], expected[2], expected[3]);
    } else {
      ptx::load_matrix_x4_transposed(loaded, from);
      ptx::store_matrix_x4_transposed(to, expected[0], expected[1], expected[2], expected[3]);
    }
    for (int i = 0; i < 4; ++i) {
      if (loaded[i] != expected[i]) atomicAdd(&outcome->load_mismatches, 1u);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < Block::bytes / 16; i += 128) {
    const uint4 a = reinterpret_cast<const uint4*>(copied)[i];
    const uint4 b = reinterpret_cast<const uint4*>(stored)[i];
    if (a.x != b.x || a.y != b.y || a.z != b.z || a.w != b.w) {
      atomicAdd(&outcome->store_mismatches, 1u);
    }
  }
}

class Matrix : public HopperTest {
 protected:
  void check(void (*kernel)(CUtensorMap, const Bits*, Outcome*)) {
    std::vector<Bits> values(rows * columns);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<Bits>(i);
    const DeviceArray<Bits> matrix(values);
    DeviceArray<Outcome> outcome(1, Outcome{});
    HeadsTensor tensor;
    tensor.data = matrix.device();
    tensor.dtype = DType::bfloat16;
    tensor.stride_row = tensor.stride_head = columns;
    CUtensorMap map;
    const Status status = make_tensor_map(tensor_map_key(tensor, columns, rows, 1, 1, rows), &map);
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_CUDA(launch(kernel, 1, 128, 2 * Block::bytes, map, matrix.device(), outcome.device()));
    ASSERT_CUDA(outcome.download());
    EXPECT_EQ(outcome.host[0].load_mismatches, 0u);
    EXPECT_EQ(outcome.host[0].store_mismatches, 0u);
  }
};

TEST_F(Matrix, PlainThroughTheSwizzle) { check(&move_blocks<Layout::plain>); }

TEST_F(Matrix, TransposedThroughTheSwizzle) { check(&move_blocks<Layout::transposed>); }

}  // namespace
}  // namespace sinkattn::hopper::testing
