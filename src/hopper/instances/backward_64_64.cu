// SPDX-License-Identifier: Apache-2.0
#include "hopper/instances/backward_instance.cuh"

SINKATTN_BACKWARD_INSTANCE(NarrowKeyPass, 64, 64)
