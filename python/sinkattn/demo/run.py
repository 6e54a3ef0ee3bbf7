# SPDX-License-Identifier: Apache-2.0
"""Compare, train, draw, sample."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from .._info import unavailable_reason
from ..integrations import transformers as integration
from ..interface import flash_attn_func
from .model import (
    EXPERTS,
    SIZES,
    Batch,
    batches,
    corpus,
    make_model,
    packed_batches,
    sinks_of,
)
from .picture import draw

# Both runs compute in fp32. A relative L2 error of 1e-4 in a gradient is some hundred times the
# rounding of one fp32 operation, after four layers, and far below any real mistake.
GRADIENT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5
# Two fp32 runs that differ by a rounding stay together over the whole demo; with three times the
# learning rate, or with a choice among experts, they drift apart (docs/numerics.md).
CURVE_TOLERANCE = 1e-3
RECORD_EVERY = 5


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sinkattn demo", description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--experts-per-token", type=int, default=EXPERTS)
    parser.add_argument("--size", choices=SIZES, default="small", help="large is meant for a GPU")
    parser.add_argument(
        "--packed", action="store_true", help="train on documents packed one behind another"
    )
    parser.add_argument(
        "--twin",
        action="store_true",
        help="a third run: eager attention from weights changed by one ulp, to see what rounding "
        "does by itself (always on CUDA, where all is bf16)",
    )
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    return parser.parse_args(arguments)


def choose_device() -> torch.device:
    """The Hopper GPU if it can train already, else the CPU; says which and why."""
    reason = unavailable_reason()
    if reason is None:
        try:
            x = torch.randn(1, 8, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            flash_attn_func(x, x, x, causal=True).sum().backward()
            return torch.device("cuda")
        except NotImplementedError as error:
            reason = str(error)
    print(f"Running on the CPU: {reason}.")
    return torch.device("cpu")


def step(model, batch: Batch) -> torch.Tensor:
    eager = model.config._attn_implementation == "eager"
    return model(
        input_ids=batch.ids,
        position_ids=batch.positions,
        attention_mask=batch.masks(model.dtype) if eager else None,
        labels=batch.ids,
        use_cache=False,
    ).loss


def compare(device: torch.device, batch: Batch, options) -> bool:
    """Loss and every gradient of one step, sinkattn against eager, from the same weights."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    results = {}
    for name in ("eager", integration.KEY):
        model = make_model(name, size=SIZES[options.size]).to(device, dtype)
        loss = step(model, batch.to(device))
        loss.backward()
        results[name] = (loss.item(), {n: p.grad for n, p in model.named_parameters()})
    (loss_a, eager), (loss_b, ours) = results["eager"], results[integration.KEY]
    factor = 1.0 if dtype == torch.float32 else 2.0**16  # ratio of the two roundings
    worst, worst_name, worst_sink = 0.0, "", 0.0
    for name, expected in eager.items():
        gradient = ours[name]
        if gradient is None or not gradient.abs().max() > 0:
            print(f"  {name}: no gradient")
            return False
        error = float((gradient - expected).norm() / expected.norm().clamp_min(1e-12))
        if error > worst:
            worst, worst_name = error, name
        if name.endswith("sinks"):
            worst_sink = max(worst_sink, error)
    loss_error = abs(loss_a - loss_b) / loss_a
    print(
        f"Compared with eager attention, one step from the same weights:\n"
        f"  loss {loss_b:.6f} against {loss_a:.6f}\n"
        f"  {len(eager)} gradients, largest relative error {worst:.1e} ({worst_name})\n"
        f"  the {sum(n.endswith('sinks') for n in eager)} sink gradients among them: "
        f"{worst_sink:.1e}"
    )
    return loss_error < LOSS_TOLERANCE * factor and worst < GRADIENT_TOLERANCE * factor


class SinkMass:
    """Mean over rows of exp(sink - LSE): the share of attention that goes to the sink."""

    def __init__(self, model, ids):
        self.model = model
        self.ids = ids

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        masses = []
        handles = [
            layer.self_attn.register_forward_pre_hook(self._hook(masses), with_kwargs=True)
            for layer in self.model.model.layers
        ]
        self.model(input_ids=self.ids, use_cache=False)
        for handle in handles:
            handle.remove()
        return torch.stack(masses).cpu()

    @staticmethod
    def _hook(masses):
        def record(module, args, kwargs):
            from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb

            hidden = kwargs.get("hidden_states", args[0] if args else None)
            shape = (*hidden.shape[:2], -1, module.head_dim)
            q = module.q_proj(hidden).view(shape).transpose(1, 2)
            k = module.k_proj(hidden).view(shape).transpose(1, 2)
            q, k = apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"])
            window = module.sliding_window
            _, lse = flash_attn_func(
                q.transpose(1, 2),
                k.transpose(1, 2),
                k.transpose(1, 2),
                softmax_scale=module.scaling,
                causal=True,
                window_size=(-1, -1) if window is None else (window - 1, 0),
                return_attn_probs=True,
                learnable_sink=module.sinks,
            )
            masses.append(torch.exp(module.sinks.float()[None, :, None] - lse).mean((0, 2)))

        return record


def progress(iterable, total: int, text: str):
    """A progress bar: tqdm, which every installation of Transformers has."""
    from tqdm import tqdm

    return tqdm(iterable, total=total, desc=text, file=sys.stdout, ncols=88, leave=True)


@torch.no_grad()
def change_one_ulp(model) -> None:
    """Half of all weights, at random, become their upper neighbour."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        chosen = torch.rand(weight.shape, generator=generator) < 0.5
        up = torch.nextafter(weight.cpu(), torch.full_like(weight, torch.inf, device="cpu"))
        weight.copy_(torch.where(chosen, up, weight.cpu()))


def train(name: str, device, data, options, masses=None, twin=False):
    """Losses of one run; `masses` collects the sink mass along the way. A twin starts one ulp from
    where the others start."""
    size = SIZES[options.size]
    model = make_model(name, experts_per_token=options.experts_per_token, size=size).to(device)
    if device.type == "cuda":
        model = model.to(torch.bfloat16)
    if twin:
        change_one_ulp(model)
    rate = options.learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=options.steps + 1, pct_start=0.2
    )
    mass = SinkMass(model, next(batches(data, 1, 2, size.context, seed=99)).ids.to(device))
    losses = []
    text = f"{name} + 1 ulp" if twin else name
    make_batches = packed_batches if options.packed else batches
    every = make_batches(data, options.steps, options.batch, size.context)
    bar = progress(every, options.steps, f"{text:>13}")
    for index, batch in enumerate(bar):
        if masses is not None and index % RECORD_EVERY == 0:
            masses.append(mass())
        loss = step(model, batch.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return model, losses


def distance(losses: list[float], reference: list[float]) -> float:
    """Largest distance of two loss curves."""
    return max(abs(a - b) for a, b in zip(losses, reference, strict=True))


def final_sinks(model) -> torch.Tensor:
    """All layers' sinks, (layers, heads) fp32 on the CPU."""
    return torch.stack([x.detach().cpu().float() for x in sinks_of(model)])


def sample(model, device) -> str:
    prompt = "def "
    tokens = torch.tensor([list(prompt.encode())], device=device)
    torch.manual_seed(0)
    model.eval()
    generated = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=160,
        do_sample=True,
        temperature=0.7,
        top_k=20,
        pad_token_id=0,
    )
    return bytes(generated[0].tolist()).decode(errors="replace")


def main(arguments: list[str] | None = None) -> int:
    """0 if every comparison held."""
    options = parse(arguments or [])
    started = time.monotonic()
    integration.register()
    device = choose_device()
    data = corpus()
    print(f"Text: {data.numel() / 1e6:.1f} MB of Python's standard library, as bytes.")
    size = SIZES[options.size]
    make_batches = packed_batches if options.packed else batches
    same = compare(device, next(make_batches(data, 1, 2, size.context, seed=7)), options)
    print("  within the tolerance" if same else "  OUTSIDE the tolerance")
    masses: list[torch.Tensor] = []
    model, ours = train(integration.KEY, device, data, options, masses)
    sinks = final_sinks(model)
    moved = (sinks - final_sinks(make_model("eager", size=size))).abs().amax(1).tolist()
    reference, eager = train("eager", device, data, options)
    eager_sinks = final_sinks(reference)
    del reference
    history = {"eager attention": eager, "sinkattn": ours}
    gap, limit = distance(ours, eager), CURVE_TOLERANCE
    sink_gap, sink_limit = float((sinks - eager_sinks).abs().max()), CURVE_TOLERANCE
    if options.twin or device.type == "cuda":
        other, twin = train("eager", device, data, options, twin=True)
        history["eager, weights + 1 ulp"] = twin
        limit = max(limit, 4 * distance(twin, eager))
        sink_limit = max(sink_limit, 4 * float((final_sinks(other) - eager_sinks).abs().max()))
    followed = gap <= limit and sink_gap <= sink_limit
    path = (options.output / "training.png").resolve()
    title = f"GPT-OSS architecture, {sum(p.numel() for p in model.parameters()):,} parameters"
    draw(history, masses, RECORD_EVERY, path, f"{title}, {device.type}")
    print(f"Loss {ours[0]:.3f} -> {ours[-1]:.3f}. Largest distance to the eager run:")
    for name, losses in list(history.items())[1:]:
        print(f"  {name:<26} {distance(losses, eager):.1e} over {options.steps} steps")
    print(
        f"Sinks at the end: up to {sink_gap:.1e} from the eager run's, {sink_limit:.1e} allowed.\n"
        f"  {'within' if followed else 'OUTSIDE'} the tolerance\n"
        f"Sinks moved by up to {', '.join(f'{m:.3f}' for m in moved)} (per layer).\n"
        "A sample from the model, decoded with its KV cache:\n"
    )
    print("\n".join("    " + line for line in sample(model, device).splitlines()))
    learned = ours[-1] < ours[0] and all(m > 0 for m in moved)
    print(f"\nPicture: {path}\nDone in {time.monotonic() - started:.0f} s.")
    return 0 if same and followed and learned else 1
