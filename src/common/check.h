// SPDX-License-Identifier: Apache-2.0
// Every argument rule of the library, once. Each function checks public params completely and, if
// they are right, fills the normalised problem that the backends run.
#pragma once

#include "common/problem.h"
#include "sinkattn/params.h"
#include "sinkattn/status.h"

namespace sinkattn {

Status make_forward_problem(const ForwardParams& params, ForwardProblem* problem);
Status make_backward_problem(const BackwardParams& params, BackwardProblem* problem);
Status make_append_problem(const AppendParams& params, AppendProblem* problem);
Status make_combine_problem(const CombineParams& params, CombineProblem* problem);
Status check_schedule(const ScheduleParams& params);

}  // namespace sinkattn
