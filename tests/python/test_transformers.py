# SPDX-License-Identifier: Apache-2.0
"""The Transformers integration against eager attention on a tiny random GPT-OSS."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.17")

from sinkattn.integrations import transformers as integration  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _registered():
    integration.register()


def gpt_oss(attention, seed=0, **changes):
    options = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = transformers.GptOssConfig(**(options | changes), attn_implementation=attention)
    torch.manual_seed(seed)
    model = transformers.GptOssForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_()
    return model


def pair(**changes):
    return gpt_oss("eager", **changes), gpt_oss(integration.KEY, **changes)


def tokens(batch=2, length=40, seed=3):
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_training_gradients():
    """Loss and every parameter's gradient; sink gradients are there and not zero."""
    ids = tokens()
    results = []
    for model in pair():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append((loss, dict(model.named_parameters())))
    (loss_a, eager), (loss_b, ours) = results
    torch.testing.assert_close(loss_a, loss_b)
    for name, parameter in eager.items():
        gradient = ours[name].grad
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
        if name.endswith("sinks"):
            assert gradient.abs().max() > 0
            assert gradient.dtype == parameter.dtype


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    ids = tokens(3, 30)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 7, 25)):
        columns = slice(0, padding) if side == "left" else slice(30 - padding, 30)
        mask[row, columns] = 0
        ids[row, columns] = 0
    labels = ids.masked_fill(mask == 0, -100)
    results = []
    for model in pair():
        out = model(input_ids=ids, attention_mask=mask, labels=labels)
        out.loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((out.logits[mask.bool()], out.loss, *gradients))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens"])
def test_packing(how):
    """Three sequences in one row give what each gives alone."""
    lengths = [11, 1, 20]
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    _, model = pair()
    extra = {"position_ids": positions}
    if how == "cu_seq_lens":
        cu = torch.tensor([0, 11, 12, 32], dtype=torch.int32)
        extra |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 20, "max_length_k": 20}
    packed = model(input_ids=ids, **extra).logits[0]
    start = 0
    for n in lengths:
        alone = model(input_ids=ids[:, start : start + n]).logits[0]
        torch.testing.assert_close(packed[start : start + n], alone, rtol=1e-4, atol=1e-5)
        start += n


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_generation(cache, padded, device):
    """Greedy decoding, token for token, beyond the window. On CUDA in half precision: there the two
    differ by rounding, which a tie of two tokens would show."""
    ids = tokens(2, 12).to(device)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :5] = 0
        ids[1, :5] = 0
    texts = []
    for model in pair():
        model.eval().to(device, torch.float16 if device == "cuda" else torch.float32)
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=20,
            do_sample=False,
            disable_compile=True,
            **({} if cache == "dynamic" else {"cache_implementation": "static"}),
        )
        texts.append(out)
    assert torch.equal(*texts)


def test_half_precision_model_with_fp32_queries():
    """Adapters upcast activations: the sink keeps its dtype and gets its gradient."""
    model = gpt_oss(integration.KEY).to(torch.bfloat16)
    attention = model.model.layers[0].self_attn
    query = torch.randn(1, 6, 9, 16, requires_grad=True)
    key, value = torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    out, weights = integration.attention(
        attention, query, key, value, None, scaling=0.25, s_aux=attention.sinks
    )
    assert weights is None
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert attention.sinks.grad.dtype == torch.bfloat16
    assert query.grad is not None


def test_models_without_sinks():
    config = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    ids = tokens()
    results = []
    for attention in ("eager", integration.KEY):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**config, attn_implementation=attention)
        )
        results.append(model(input_ids=ids, labels=ids).loss)
    torch.testing.assert_close(*results)


def arguments():
    q, k = torch.randn(1, 4, 6, 16), torch.randn(1, 2, 6, 16)
    return torch.nn.Linear(2, 2), q, k, k


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("dropout: expected 0 while training", {"dropout": 0.1}),
        ("output_attentions: expected False", {"output_attentions": True}),
        ("alibi: expected None", {"alibi": torch.zeros(4)}),
        ("cache: expected None", {"cache": object()}),
    ],
)
def test_refusals(text, options):
    with pytest.raises(NotImplementedError, match=text):
        integration.attention(*arguments(), None, **options)


def test_prepared_masks_are_refused():
    with pytest.raises(NotImplementedError, match="attention_mask: expected None or"):
        integration.attention(*arguments(), torch.zeros(1, 1, 6, 6))


def test_sliding_window_counts_the_own_token():
    module, q, k, v = arguments()
    out, _ = integration.attention(module, q, k, v, None, sliding_window=1)
    expected = v.repeat_interleave(2, dim=1).transpose(1, 2)
    torch.testing.assert_close(out, expected)
