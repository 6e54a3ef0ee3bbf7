// SPDX-License-Identifier: Apache-2.0
// What an operation will run, decided from shapes and options alone (no tensor data is read).
#pragma once

#include <cstddef>
#include <cstdint>

#include "sinkattn/tensor.h"

namespace sinkattn {

/// The facts of a device that plans depend on. Fill it by hand to plan for a machine that is not
/// there, or with query_device().
struct DeviceProperties {
  Device device;
  int sm_count = 0;            ///< CUDA: multiprocessors
  int compute_capability = 0;  ///< CUDA: 10 * major + minor
  std::int64_t l2_bytes = 0;   ///< CUDA
};

enum class Backend : std::uint8_t { cpu, hopper };

/// The decision for one call: which kernels, tiles, splits, how much workspace, and why.
struct Plan {
  Backend backend = Backend::cpu;
  std::size_t workspace_bytes = 0;  ///< the caller provides this much, 256-byte aligned
  int num_splits = 1;
  bool pack_gqa = false;
  int tile_m = 0;             ///< query rows per tile
  int tile_n = 0;             ///< keys per tile
  int grid = 0;               ///< CUDA: blocks of the main kernel
  std::int64_t l2_bytes = 0;  ///< CUDA: L2 of the device the plan was made for
  char kernel[96] = {};       ///< name of the main kernel (instance)
  char reason[256] = {};      ///< why this one, as one printable line
};

}  // namespace sinkattn
