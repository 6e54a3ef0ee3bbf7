# SPDX-License-Identifier: Apache-2.0
"""The benchmark's decode providers compute one and the same thing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sinkattn.bench.cases import decode_cases
from sinkattn.bench.providers import PROVIDERS, make_inputs


@pytest.mark.parametrize("provider", ["sinkattn-page16", "sinkattn-append"])
@pytest.mark.parametrize("queries", [1, 3])
def test_decode_providers_agree(provider, queries, device):
    case = replace(
        decode_cases()[0],
        **{"batch": 2, "seqlen_q": queries, "seqlen_k": 64, "lengths": (50, 64)},
        **{"heads_q": 8, "heads_kv": 2},
    )
    inputs = make_inputs(case, torch.device(device))
    arguments = (inputs.query, inputs.key, inputs.value, inputs.sink)

    def run(name):
        return PROVIDERS[name]().forward_function(case, inputs)(*(x.clone() for x in arguments))

    torch.testing.assert_close(run(provider), run("sinkattn"), rtol=1e-2, atol=1e-2)
