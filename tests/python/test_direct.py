# SPDX-License-Identifier: Apache-2.0
"""The direct entry, which calls the core without torch's dispatcher: which calls it takes, which it
leaves to the operators, and that nobody can tell the two apart."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref

import pytest
import sinkattn
import torch
from sinkattn import _direct, autograd
from support import PLAIN_OPTIONS
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.skipif(
    _direct.module is None, reason=f"no direct entry: {_direct.unavailable}"
)


def inputs(gradient=False, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(7)
    shapes = (2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 24)
    tensors = [torch.randn(*shape, generator=g).to(device, dtype) for shape in shapes]
    sink = torch.randn(4, generator=g).to(device)
    return [x.requires_grad_(gradient) for x in (*tensors, sink)]


class Taken:
    """What the direct entry did: one entry per call, whether it took it."""

    def __init__(self, monkeypatch):
        self.calls, self.gradients = [], []
        monkeypatch.setattr(_direct, "call", self._recorded(_direct.call, self.calls))
        gradients = self._recorded(autograd._direct_gradients, self.gradients)
        monkeypatch.setattr(autograd, "_direct_gradients", gradients)

    @staticmethod
    def _recorded(function, answers):
        def recorded(*arguments):
            result = function(*arguments)
            answers.append(result is not None)
            return result

        return recorded


@pytest.fixture
def taken(monkeypatch):
    return Taken(monkeypatch)


@pytest.fixture
def refused(taken):
    """As taken; afterwards one call must have come by and must have been refused."""
    yield taken
    assert taken.calls == [False]


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("options", PLAIN_OPTIONS, ids=str)
@pytest.mark.parametrize("sink", [True, False])
def test_plain_calls_are_taken(taken, monkeypatch, needs, device, gradient, options, sink):
    needs("forward")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def results():
        leaves = inputs(gradient, dtype, device)[: 4 if sink else 3]
        more = {"learnable_sink": leaves[3]} if sink else {}
        found = sinkattn.flash_attn_func(*leaves[:3], **more, **options)
        found = found if isinstance(found, tuple) else (found,)
        assert all(x.requires_grad == gradient for x in found)
        if gradient:
            found += torch.autograd.grad(found, leaves, [torch.ones_like(x) for x in found])
        return found

    direct = results()
    assert taken.calls == [True]
    assert taken.gradients == ([True] if gradient else [])
    monkeypatch.setattr(_direct, "call", lambda *arguments: None)
    for a, b in zip(direct, results(), strict=True):
        assert type(a) is torch.Tensor
        assert a.stride() == b.stride()
        assert torch.equal(a, b) or device == "cuda"


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_only_wanted_gradients(taken, wanted):
    leaves = inputs(gradient=True)
    q, k, v, sink = [x if i in wanted else x.detach() for i, x in enumerate(leaves)]
    out = sinkattn.flash_attn_func(q, k, v, learnable_sink=sink)
    found = torch.autograd.grad(out.sum(), [leaves[i] for i in wanted])
    leaves = inputs(gradient=True)
    out = sinkattn.flash_attn_func(*leaves[:3], learnable_sink=leaves[3], softcap=0)
    expected = torch.autograd.grad(out.sum(), leaves)
    for i, gradient in zip(wanted, found, strict=True):
        assert torch.equal(gradient, expected[i])
    assert taken.calls == [True, False]


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"softcap": 0},
        {"num_splits": 2},
        {"attention_chunk": 4},
        {"attention_chunk": None},
        {"softmax_scale": 1},
        {"window_size": [2, 2]},
        {"window_size": (2, None)},
        {"window_size": (2, torch.tensor(2))},
        {"window_size": None},
        {"pack_gqa": True},
        {"return_attn_probs": 1},
    ],
    ids=str,
)
def test_other_options_are_refused(refused, options):
    q, k, v, sink = inputs()
    sinkattn.flash_attn_func(q, k, v, learnable_sink=sink, **options)


@pytest.mark.parametrize("name", ["s_aux", "sinks"])
def test_other_names_of_the_sink_are_refused(refused, name):
    q, k, v, sink = inputs()
    sinkattn.flash_attn_func(q, k, v, **{name: sink})


# --- whoever watches operators must see one -------------------------------------------------------


class SeenByDispatch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class SeenByFunction(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [SeenByDispatch, SeenByFunction])
@pytest.mark.parametrize("gradient", [False, True])
def test_modes_see_the_operator(refused, mode, gradient):
    q, k, v, sink = inputs(gradient)
    with mode() as seen:
        sinkattn.flash_attn_func(q, k, v, learnable_sink=sink)
    assert any("sinkattn" in name for name in seen.names)


def test_a_mode_sees_the_operator_of_the_backward(taken):
    q, k, v, sink = inputs(gradient=True)
    out = sinkattn.flash_attn_func(q, k, v, learnable_sink=sink)
    with SeenByDispatch() as seen:
        out.sum().backward()
    assert any("sinkattn.bwd" in name for name in seen.names)
    assert (taken.calls, taken.gradients) == ([True], [False])


def test_flop_counters_meet_no_surprise(refused):
    q, k, v, sink = inputs()
    with FlopCounterMode(display=False):
        sinkattn.flash_attn_func(q, k, v, learnable_sink=sink)


def test_fake_tensors(refused):
    with FakeTensorMode():
        q = torch.empty(2, 3, 4, 64, dtype=torch.bfloat16, device="cuda")
        assert sinkattn.flash_attn_func(q, q, q).shape == q.shape


def test_profilers_see_the_operator(refused):
    q, k, v, sink = inputs()
    with torch.profiler.profile() as profile:
        sinkattn.flash_attn_func(q, k, v, learnable_sink=sink)
    assert any(event.key.startswith("sinkattn::") for event in profile.key_averages())


def test_transforms_of_torch_func_are_refused(refused):
    q, k, v, _ = inputs()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda q: sinkattn.flash_attn_func(q, k, v).sum())(q)


@pytest.mark.filterwarnings("ignore")
def test_traces_contain_the_operator():
    traced = torch.jit.trace(
        lambda q, k, v: sinkattn.flash_attn_func(q, k, v), inputs()[:3], check_trace=False
    )
    assert "sinkattn::fwd_dense" in str(traced.graph)


def test_proxies_contain_the_operator():
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda q, k, v: sinkattn.flash_attn_func(q, k, v))(*inputs()[:3])
    assert "sinkattn.fwd_dense" in graph.code


def test_compiled_autograd_traces_the_backward(taken):
    from torch._dynamo import compiled_autograd

    q, k, v, sink = leaves = inputs(gradient=True)
    with compiled_autograd._enable(lambda graph: graph):
        out = sinkattn.flash_attn_func(q, k, v, learnable_sink=sink)
        found = torch.autograd.grad(out.square().sum(), leaves)
    assert taken.calls == [True]
    out = sinkattn.flash_attn_func(q, k, v, learnable_sink=sink, softcap=0)
    for a, b in zip(found, torch.autograd.grad(out.square().sum(), leaves), strict=True):
        assert torch.equal(a, b)


def test_explain_comes_first(refused):
    q, k, v, _ = inputs()
    assert "kernel" in sinkattn.explain(sinkattn.flash_attn_func, q, k, v)


def test_calls_are_taken_again_after_an_explanation_that_failed(taken):
    q, k, v, _ = inputs()
    with pytest.raises(ValueError):
        sinkattn.explain(sinkattn.flash_attn_func, q, k[:1], v)
    sinkattn.flash_attn_func(q, k, v)
    assert taken.calls == [False, True]


# --- tensors that are more than memory ------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


def neg_sink(sink):
    view = torch.complex(torch.zeros_like(sink), -sink).conj().imag
    assert view.is_neg()
    return view


def test_subclasses_are_refused(refused):
    q, k, v, sink = inputs()
    sinkattn.flash_attn_func(q, k.as_subclass(Subclass), v, learnable_sink=sink)


def test_a_negated_view_is_refused(refused):
    q, k, v, sink = inputs()
    found = sinkattn.flash_attn_func(q, k, v, learnable_sink=neg_sink(sink))
    assert torch.equal(found, sinkattn.flash_attn_varlen_func(
        q, k, v, None, None, None, None, learnable_sink=sink
    ))  # fmt: skip


def test_a_sink_that_is_a_parameter_is_taken(taken):
    q, k, v, sink = inputs()
    parameter = torch.nn.Parameter(sink)
    out = sinkattn.flash_attn_func(q, k, v, learnable_sink=parameter)
    out.square().sum().backward()
    assert parameter.grad is not None
    assert (taken.calls, taken.gradients) == ([True], [True])


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to_sparse(),
        lambda x: x.to("meta"),
        lambda x: x.to(torch.int32),
        lambda x: x.to(torch.complex64),
        lambda x: torch._efficientzerotensor(x.shape),
        lambda x: torch.nested.as_nested_tensor(list(x.unbind())),
        lambda x: [x],
        lambda x: None,
    ],
    ids=["sparse", "meta", "int32", "complex", "zero", "nested", "list", "none"],
)
@pytest.mark.parametrize("position", [0, 1, 3])
def test_what_has_no_memory_of_its_own_is_refused(taken, monkeypatch, change, position):
    arguments = inputs()
    try:
        arguments[position] = change(arguments[position])
    except RuntimeError as error:
        pytest.skip(str(error))
    q, k, v, sink = arguments

    def outcome():
        try:
            return sinkattn.flash_attn_func(q, k, v, learnable_sink=sink)
        except Exception as error:
            return type(error), str(error).splitlines()[:1]

    found = outcome()
    assert taken.calls == [position == 3 and sink is None]
    monkeypatch.setattr(_direct, "call", lambda *arguments: None)
    expected = outcome()
    if isinstance(found, torch.Tensor):
        assert found.shape == expected.shape
        assert any(x is not None and x.is_meta for x in (q, k, sink)) or found.equal(expected)
    else:
        assert found == expected


def test_layouts_that_need_a_copy_are_refused(refused):
    q, k, v, sink = inputs()
    turned = q.transpose(2, 3).contiguous().transpose(2, 3)
    sinkattn.flash_attn_func(turned, k, v, learnable_sink=sink)


def test_strided_views_are_taken(taken):
    q, k, v, sink = inputs()
    packed = torch.cat([q, q], dim=2)
    found = sinkattn.flash_attn_func(packed[:, :, 4:], k, v, learnable_sink=sink)
    assert torch.equal(found, sinkattn.flash_attn_func(q, k, v, learnable_sink=sink))
    assert taken.calls == [True, True]


@pytest.mark.parametrize("shape", [(0, 5, 4, 16), (2, 0, 4, 16)])
def test_empty_problems_are_taken(taken, shape):
    _, k, v, sink = inputs()
    found = sinkattn.flash_attn_func(
        torch.zeros(shape), k[: shape[0]], v[: shape[0]], learnable_sink=sink
    )
    assert found.shape == (*shape[:3], 24)
    assert taken.calls == [True]


# --- what comes out is torch's own ----------------------------------------------------------------


def test_results_are_ordinary_tensors(device, needs):
    needs("forward")
    q, k, v, _ = inputs(dtype=torch.bfloat16, device=device)
    out = sinkattn.flash_attn_func(q, k, v)
    assert (out._version, out._base, out.is_leaf) == (0, None, True)
    assert out.untyped_storage().resizable()
    out.add_(1)
    assert out._version == 1
    out.resize_(4, 1000)
    if device == "cuda":
        out.record_stream(torch.cuda.Stream(device))


def test_inference_mode_marks_the_result(taken):
    q, k, v, _ = inputs()
    with torch.inference_mode():
        out = sinkattn.flash_attn_func(q, k, v)
    assert out.is_inference()
    assert taken.calls == [True]


def test_no_grad_records_nothing(taken):
    q, k, v, sink = inputs(gradient=True)
    with torch.no_grad():
        out = sinkattn.flash_attn_func(q, k, v, learnable_sink=sink)
    assert out.grad_fn is None
    assert taken.calls == [True]


@pytest.mark.parametrize("gradient", [False, True])
def test_nothing_is_kept(gradient):
    """The results die with their last reference, and so does what the backward saved."""
    leaves = inputs(gradient)
    out, lse = sinkattn.flash_attn_func(
        *leaves[:3], learnable_sink=leaves[3], return_attn_probs=True
    )
    if gradient:
        torch.autograd.grad(out.sum() + lse.sum(), leaves)
    dead = [weakref.ref(out), weakref.ref(lse)]
    del out, lse
    gc.collect()
    assert [x() for x in dead] == [None, None]


def test_a_cuda_result_frees_its_memory(device, needs):
    if device == "cpu":
        pytest.skip("counts the memory of CUDA's allocator")
    needs("backward")
    leaves = inputs(True, torch.bfloat16, device)

    def step():
        out = sinkattn.flash_attn_func(*leaves[:3], learnable_sink=leaves[3])
        torch.autograd.grad(out.sum(), leaves)
        with torch.no_grad():
            sinkattn.flash_attn_func(*leaves[:3], learnable_sink=leaves[3])

    step()
    before = torch.cuda.memory_allocated(device)
    for _ in range(10):
        step()
    assert torch.cuda.memory_allocated(device) == before


def test_saved_tensors_that_change_are_noticed(taken):
    for position in range(4):
        leaves = inputs(gradient=True)
        out = sinkattn.flash_attn_func(*leaves[:3], learnable_sink=leaves[3])
        with torch.no_grad():
            leaves[position].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    assert taken.calls == [True] * 4


def test_saved_tensor_hooks_see_every_tensor(taken):
    seen = []

    def pack(x):
        seen.append(x.shape)
        return x

    q, k, v, sink = inputs(gradient=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = sinkattn.flash_attn_func(q, k, v, learnable_sink=sink)
    assert seen == [q.shape, k.shape, v.shape, sink.shape, out.shape, (2, 4, 5)]
    out.sum().backward()
    assert taken.calls == [True]


def test_a_second_derivative_is_an_error(taken):
    q, k, v, sink = inputs(gradient=True)
    out = sinkattn.flash_attn_func(q, k, v, learnable_sink=sink)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    assert taken.gradients == [False]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_gradients_of_the_lse_alone(taken):
    q, k, v, sink = inputs(gradient=True)
    _, lse = sinkattn.flash_attn_func(q, k, v, learnable_sink=sink, return_attn_probs=True)
    found = torch.autograd.grad(lse.sum(), (q, k, sink))
    _, lse = sinkattn.flash_attn_func(
        q, k, v, learnable_sink=sink, return_attn_probs=True, softcap=0
    )
    for a, b in zip(found, torch.autograd.grad(lse.sum(), (q, k, sink)), strict=True):
        assert torch.equal(a, b)
    assert taken.gradients[0]


def test_threads(taken):
    q, k, v, sink = inputs(gradient=True)
    expected = sinkattn.flash_attn_func(q, k, v, learnable_sink=sink)
    wrong = []

    def work():
        for _ in range(50):
            out = sinkattn.flash_attn_func(q, k, v, learnable_sink=sink)
            torch.autograd.grad(out.sum(), (q, k, v, sink))
            if not torch.equal(out, expected):
                wrong.append(out)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert taken.calls == [True] * 201


def test_the_device_and_the_stream_are_those_of_the_call(device, needs, taken):
    """On the last GPU while the first is current, and on a stream that waits for its input."""
    if device == "cpu":
        pytest.skip("CPU tensors have neither")
    needs("forward")
    place = torch.device("cuda", torch.cuda.device_count() - 1)
    q, k, v, sink = inputs(dtype=torch.bfloat16, device=place)
    expected = sinkattn.flash_attn_func(q, k, v, learnable_sink=sink)
    late = torch.zeros_like(q)
    torch.cuda.synchronize(place)
    stream = torch.cuda.Stream(place)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(q)
        found = sinkattn.flash_attn_func(late, k, v, learnable_sink=sink)
    stream.synchronize()
    assert torch.equal(found, expected)
    with torch.cuda.device(0):
        assert torch.equal(sinkattn.flash_attn_func(q, k, v, learnable_sink=sink), expected)
        assert torch.cuda.current_device() == 0
    assert taken.calls == [True] * 3


# --- without it ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("sys.modules['sinkattn.lib._direct'] = None", "the module is missing"),
        ("del torch.Tensor.__dlpack_c_exchange_api__", "lacks what it needs"),
    ],
)
def test_the_operators_serve_without_it(missing, reason):
    program = (
        "import sys, torch\n"
        f"{missing}\n"
        "import sinkattn\n"
        "q = torch.randn(1, 3, 2, 8, requires_grad=True)\n"
        "out = sinkattn.flash_attn_func(q, q, q)\n"
        "out.sum().backward()\n"
        "assert 'EagerFunc' in out.grad_fn.name()\n"
        "print(sinkattn.build_info()['direct_unavailable'])\n"
    )
    path = os.pathsep.join(sys.path)
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert reason in run.stdout
