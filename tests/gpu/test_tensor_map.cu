// SPDX-License-Identifier: Apache-2.0
// The ragged tensor maps of core/tensor_map.h: loads and stores end where a sequence ends, whatever
// lies behind it. Everything that is not the sequence, the head and the columns under test is NaN.
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "gpu_test.h"
#include "hopper/core/tensor_map.h"
#include "hopper/core/tile.cuh"
#include "hopper/ptx/mbarrier.cuh"
#include "hopper/ptx/sync.cuh"
#include "hopper/ptx/tma.cuh"

namespace sinkattn::hopper::testing {
namespace {

constexpr int tile_rows = 64, store_rows = 16;
constexpr int max_columns = 256;
using Staging = Tile<tile_rows, max_columns>;
constexpr Bits untouched = 0xABCD;

/// One sequence and head of a tensor, as the kernels see it.
struct Sequence {
  int map_rows, first, length, head, batch, columns;
};

/// Coordinates of row `row` of the sequence, column 64 * slab.
__device__ ptx::BoxCoordinates at(const Sequence& x, int row, int slab) {
  return {slab * slab_columns, x.map_rows - x.length + row, x.first + x.length, x.head, x.batch};
}

__device__ int slabs_of(const Sequence& x) { return (x.columns + slab_columns - 1) / slab_columns; }

__device__ Bits* element(unsigned char* tile, int row, int column) {
  return reinterpret_cast<Bits*>(tile + column / slab_columns * Staging::slab_bytes +
                                 swizzled_offset(row, column % slab_columns / 8) + column % 8 * 2);
}

/// Loads every tile of the sequence that has a row, writes the tiles row-major.
__global__ void __launch_bounds__(128)
    load_sequence(const __grid_constant__ CUtensorMap map, const Sequence x, Bits* out) {
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ std::uint64_t full;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&full, 1);
    ptx::mbarrier_init_fence();
  }
  const int slabs = slabs_of(x);
  std::uint32_t parity = 0;
  for (int row = 0; row < x.length; row += tile_rows, parity ^= 1) {
    __syncthreads();
    if (threadIdx.x == 0) {
      // Boxes count in full, also where they hang over the end.
      ptx::mbarrier_arrive_expect_tx(&full, slabs * Staging::slab_bytes);
      for (int slab = 0; slab < slabs; ++slab) {
        ptx::tma_load(ptx::shared_address(shared) + slab * Staging::slab_bytes, &map, &full,
                      at(x, row, slab));
      }
    }
    ptx::mbarrier_wait(&full, parity);
    const int columns = slabs * slab_columns;
    for (int i = threadIdx.x; i < tile_rows * columns; i += blockDim.x) {
      const int r = i / columns, c = i % columns;
      out[(row + r) * columns + c] = *element(shared, r, c);
    }
  }
}

/// Writes value(row, column) of the sequence by one box per warp of 16 rows.
__global__ void __launch_bounds__(128)
    store_sequence(const __grid_constant__ CUtensorMap map, const Sequence x, const Bits* values) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int slabs = slabs_of(x), columns = slabs * slab_columns;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int row = 0; row < x.length; row += tile_rows) {
    for (int i = lane; i < store_rows * columns; i += 32) {
      const int r = warp * store_rows + i / columns, c = i % columns;
      *element(shared, r, c) = values[(row + r) * columns + c];
    }
    ptx::fence_proxy_async_shared();
    __syncwarp();
    const int first = row + warp * store_rows;
    if (lane == 0 && first < x.length) {  // never a box that is wholly outside
      for (int slab = 0; slab < slabs; ++slab) {
        ptx::tma_store(&map,
                       ptx::shared_address(shared) + slab * Staging::slab_bytes +
                           warp * store_rows * slab_row_bytes,
                       at(x, first, slab));
      }
      ptx::bulk_commit();
      ptx::bulk_wait_read<0>();
    }
    __syncwarp();
  }
  if (lane == 0) ptx::bulk_wait<0>();
}

/// How a (batch, row, head, column) tensor lies in memory; strides in elements.
struct Memory {
  const char* name;
  std::int64_t elements;
  std::int64_t offset;  ///< of element (0, 0, 0, 0)
  std::int64_t stride_row, stride_head, stride_batch;
  int batches, rows, heads, columns;
};

std::int64_t position(const Memory& m, int batch, int row, int head, int column) {
  return m.offset + batch * m.stride_batch + row * m.stride_row + head * m.stride_head + column;
}

Memory contiguous(const char* name, int batches, int rows, int heads, int columns) {
  const std::int64_t row = std::int64_t{heads} * columns;
  return {name, batches * rows * row, 0, row, columns, rows * row, batches, rows, heads, columns};
}

/// The middle of (row, 3, head, column): queries, keys and values in one projection.
Memory interleaved(int batches, int rows, int heads, int columns) {
  const std::int64_t row = 3 * std::int64_t{heads} * columns;
  return {
      "interleaved", batches * rows * row, row / 3, row, columns, rows * row, batches, rows, heads,
      columns};
}

/// (batch, head, row, column) seen as (batch, row, head, column).
Memory head_major(int batches, int rows, int heads, int columns) {
  const std::int64_t head = std::int64_t{rows} * columns;
  return {
      "head-major", batches * heads * head, 0, columns, head, heads * head, batches, rows, heads,
      columns};
}

/// Packed: one batch entry holds all sequences.
constexpr int packed_rows = 230;

std::vector<Memory> memories(int columns) {
  return {contiguous("packed", 1, packed_rows, 3, columns),
          contiguous("one head", 1, packed_rows, 1, columns),
          contiguous("dense", 2, 150, 3, columns), interleaved(2, 150, 2, columns),
          head_major(2, 150, 3, columns)};
}

class TensorMap : public HopperTest {
 protected:
  static CUtensorMap map_of(const Memory& m, const DeviceArray<Bits>& data, int box_rows) {
    HeadsTensor tensor;
    tensor.data = data.device() + m.offset;
    tensor.dtype = DType::bfloat16;
    tensor.stride_row = m.stride_row;
    tensor.stride_head = m.stride_head;
    tensor.stride_batch = m.stride_batch;
    CUtensorMap map{};
    const Status status = make_tensor_map(
        tensor_map_key(tensor, m.columns, m.rows, m.heads, m.batches, box_rows), &map);
    EXPECT_TRUE(status.ok()) << m.name << ": " << status.message();
    return map;
  }

  static std::string describe(const Memory& m, const Sequence& x) {
    return std::string(m.name) + ", columns " + std::to_string(x.columns) + ", first " +
           std::to_string(x.first) + ", length " + std::to_string(x.length);
  }

  /// Calls check(memory, sequence) for every layout, and lengths around a tile, at the beginning,
  /// in the middle and at the end of the tensor.
  template <class Check>
  void for_each_sequence(Check check) {
    for (const int columns : {64, 72, 96, 128, 192, 256}) {
      for (const Memory& m : memories(columns)) {
        for (const int length : {0, 1, 15, 16, 17, tile_rows - 1, tile_rows, tile_rows + 1, 130}) {
          for (const int first : {0, 5, m.rows - length}) {
            if (m.batches > 1 && first > 0) continue;  // dense sequences begin at row 0
            check(m, Sequence{m.rows, first, length, m.heads - 1, m.batches - 1, columns});
            if (::testing::Test::HasFatalFailure()) return;
          }
        }
      }
    }
  }
};

TEST_F(TensorMap, LoadsEndWithTheSequence) {
  for_each_sequence([](const Memory& m, const Sequence& x) {
    std::vector<Bits> values(static_cast<std::size_t>(m.elements), nan_bits);
    const int width = (x.columns + 63) / 64 * 64;
    const int out_rows = (x.length + tile_rows - 1) / tile_rows * tile_rows;
    // Beyond the sequence and beyond the columns of the head: zeros.
    std::vector<Bits> expected(static_cast<std::size_t>(out_rows + 1) * width, 0);
    for (int r = 0; r < x.length; ++r) {
      for (int c = 0; c < x.columns; ++c) {
        const Bits value = static_cast<Bits>(1 + (r * 251 + c) % 30000);
        values[position(m, x.batch, x.first + r, x.head, c)] = value;
        expected[static_cast<std::size_t>(r) * width + c] = value;
      }
    }
    for (int c = 0; c < width; ++c)
      expected[static_cast<std::size_t>(out_rows) * width + c] = untouched;
    const DeviceArray<Bits> tensor(values);
    DeviceArray<Bits> out(expected.size(), untouched);
    const CUtensorMap map = map_of(m, tensor, tile_rows);
    ASSERT_CUDA(launch(&load_sequence, 1, 128, Staging::bytes, map, x, out.device()));
    ASSERT_CUDA(out.download());
    ASSERT_EQ(out.host, expected) << describe(m, x);
  });
}

TEST_F(TensorMap, StoresEndWithTheSequence) {
  for_each_sequence([](const Memory& m, const Sequence& x) {
    const int width = (x.columns + 63) / 64 * 64;
    const int rows = (x.length + tile_rows - 1) / tile_rows * tile_rows;
    std::vector<Bits> values(static_cast<std::size_t>(rows + 1) * width);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<Bits>(1 + i % 30000);
    std::vector<Bits> expected(static_cast<std::size_t>(m.elements), untouched);
    for (int r = 0; r < x.length; ++r) {
      for (int c = 0; c < x.columns; ++c) {
        expected[position(m, x.batch, x.first + r, x.head, c)] =
            values[static_cast<std::size_t>(r) * width + c];
      }
    }
    const DeviceArray<Bits> input(values);
    DeviceArray<Bits> tensor(expected.size(), untouched);
    const CUtensorMap map = map_of(m, tensor, store_rows);
    ASSERT_CUDA(launch(&store_sequence, 1, 128, Staging::bytes, map, x, input.device()));
    ASSERT_CUDA(tensor.download());
    ASSERT_EQ(tensor.host, expected) << describe(m, x);
  });
}

/// A box that begins before the first row of the map has zeros there, like one past the end. The
/// kernels never ask for one: in a packed tensor those rows are the sequence before.
TEST_F(TensorMap, RowsBeforeTheMapAreZero) {
  const Memory m = contiguous("dense", 1, 40, 1, 64);
  std::vector<Bits> values(static_cast<std::size_t>(m.elements));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<Bits>(1 + i);
  const DeviceArray<Bits> tensor(values);
  const CUtensorMap map = map_of(m, tensor, tile_rows);
  // map_rows - length = -8: the sequence begins eight rows before the tensor.
  const Sequence x{40, -8, 48, 0, 0, 64};
  DeviceArray<Bits> out(tile_rows * 64, untouched);
  ASSERT_CUDA(launch(&load_sequence, 1, 128, Staging::bytes, map, x, out.device()));
  ASSERT_CUDA(out.download());
  for (int r = 0; r < tile_rows; ++r) {
    for (int c = 0; c < 64; ++c) {
      const Bits expected = r < 8 || r >= 48 ? 0 : values[static_cast<std::size_t>(r - 8) * 64 + c];
      ASSERT_EQ(out.host[static_cast<std::size_t>(r) * 64 + c], expected) << r << ", " << c;
    }
  }
}

TEST_F(TensorMap, EqualKeysGiveEqualMaps) {
  const Memory m = contiguous("dense", 2, 64, 2, 128);
  const DeviceArray<Bits> a(m.elements, untouched), b(m.elements, untouched);
  const CUtensorMap first = map_of(m, a, 64), other = map_of(m, b, 64), again = map_of(m, a, 64);
  EXPECT_EQ(std::memcmp(&first, &again, sizeof(first)), 0);
  EXPECT_NE(std::memcmp(&first, &other, sizeof(first)), 0);
}

TEST_F(TensorMap, UnalignedStridesAreRefusedWithText) {
  Memory m = contiguous("odd", 1, 64, 2, 64);
  const DeviceArray<Bits> data(4 * m.elements, untouched);
  HeadsTensor tensor;
  tensor.data = data.device();
  tensor.dtype = DType::bfloat16;
  tensor.stride_row = 129;  // 258 bytes: not a multiple of 16
  tensor.stride_head = 64;
  CUtensorMap map;
  const Status status = make_tensor_map(tensor_map_key(tensor, 64, 64, 2, 1, 64), &map);
  EXPECT_FALSE(status.ok());
  EXPECT_NE(std::string(status.message()).find("129"), std::string::npos) << status.message();
}

}  // namespace
}  // namespace sinkattn::hopper::testing
