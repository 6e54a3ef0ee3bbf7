// SPDX-License-Identifier: Apache-2.0
// The schedule of a decode step on the device (get_scheduler_metadata).
#pragma once

#include <cuda_runtime_api.h>

#include "sinkattn/params.h"
#include "sinkattn/status.h"

namespace sinkattn::hopper {

/// Fills params.metadata: word 0 the batch size, word 1 + b the number of pieces into which the
/// decode kernel cuts the keys of sequence b, then zeros. Lengths are read on the device.
Status launch_schedule(const ScheduleParams& params, int sm_count, cudaStream_t stream);

}  // namespace sinkattn::hopper
