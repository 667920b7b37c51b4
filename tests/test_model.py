"""The model, its loss, modes, sampling, optimizer groups and schedule, against references and formulas."""

import argparse

import numpy as np
import pytest
import torch
from conftest import write_shards
from torch.nn import functional as F

import train_gpt2
from train_gpt2 import GPT, DataLoaderLite, GPTConfig, UserError, export_hf, get_lr

SIZES = {name: {k: n for k, n in preset.items() if k in ("n_layer", "n_head", "n_embd")}
         for name, preset in train_gpt2.PRESETS.items()}
SMALL = dict(block_size=32, vocab_size=96, n_layer=2, n_head=4, n_embd=32)
VARIANTS = [{}, dict(pos="rope"), dict(mlp="swiglu"), dict(norm="rmsnorm"),
            dict(pos="rope", mlp="swiglu", norm="rmsnorm")]


def small_gpt(model_class=GPT, **changes):
    """A small GPT with weights large enough that every part shows in the logits."""
    torch.manual_seed(0)
    model = model_class(GPTConfig(**SMALL | changes))
    for p in model.parameters():
        p.data.normal_(0, 0.1)
    return model


def tokens(*shape, high=96, seed=1):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def test_initial_weights_are_build_nanogpts():
    torch.manual_seed(1337)
    model = GPT(GPTConfig(vocab_size=50304))
    state = model.state_dict()
    first = {
        "transformer.wte.weight": [0.00897012, -0.00099618, -0.04377645, -0.00838525],
        "transformer.wpe.weight": [-0.00879707, -0.05003349, -0.01467433, -0.02348222],
        "transformer.h.0.attn.c_attn.weight": [-0.02396797, -0.00847834, -0.01034393, 0.03177827],
        "transformer.h.11.mlp.c_proj.weight": [-0.00225190, 0.00709499, 0.00142978, -0.00125523],
    }
    for name, values in first.items():
        assert torch.allclose(state[name][0, :4], torch.tensor(values), atol=1e-8), name
    assert len(state) == 149
    assert state["transformer.h.5.attn.c_proj.weight"].std().item() == pytest.approx(0.02 / 24**0.5, rel=0.01)
    assert model.transformer.wte.weight is model.lm_head.weight
    x = torch.arange(64).view(2, 32)
    with torch.no_grad():
        assert model(x, x + 1)[1].item() == pytest.approx(10.948524, abs=2e-5)
    groups = model.configure_optimizers(0.1, 6e-4, "cpu").param_groups
    counts = [(len(g["params"]), sum(p.numel() for p in g["params"]), g["weight_decay"]) for g in groups]
    assert counts == [(50, 124_354_560, 0.1), (98, 121_344, 0.0)]
    assert groups[0]["betas"] == (0.9, 0.95) and groups[0]["eps"] == 1e-8
    # wte is in a matmul as the head, wpe is only looked up
    assert model.flops_per_token(1024) == 6 * (124_475_904 - 1024 * 768) + 12 * 12 * 768 * 1024


@pytest.mark.parametrize("count, changes", [
    (124_439_808, SIZES["gpt2"]), (354_823_168, SIZES["gpt2-medium"]), (774_030_080, SIZES["gpt2-large"]),
    (1_557_611_200, SIZES["gpt2-xl"]), (123_653_376, dict(pos="rope")),
    (123_665_664, dict(pos="rope", mlp="swiglu")), (123_646_464, VARIANTS[-1]),
])  # fmt: skip
def test_parameter_counts(count, changes):
    with torch.device("meta"):
        assert sum(p.numel() for p in GPT(GPTConfig(**changes)).parameters()) == count


def test_hugging_face_weights_of_any_shape_give_its_logits_and_come_back(rng, tmp_path):
    transformers = pytest.importorskip("transformers")
    n_head, length = rng.randint(1, 5), rng.randint(8, 40)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=rng.randint(50, 150), n_positions=length, n_embd=n_head * rng.randint(3, 12),
        n_layer=rng.randint(1, 3), n_head=n_head)).eval()
    torch.manual_seed(0)
    for p in theirs.parameters():
        p.data.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    model, idx = GPT.from_pretrained(str(tmp_path / "theirs")), tokens(3, length, high=50)
    export_hf(model, str(tmp_path / "hf"))
    exported = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    back = GPT.from_pretrained(str(tmp_path / "hf"))
    with torch.no_grad():
        assert torch.allclose(model(idx)[0], theirs(idx).logits, atol=1e-5)
        assert torch.allclose(model(idx)[0], exported(idx).logits, atol=1e-5)
    assert back.config == model.config and not back.training
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in model.state_dict().items())


def test_export_refuses_other_architectures(tmp_path):
    pytest.importorskip("transformers")
    for changes in VARIANTS[1:]:
        with pytest.raises(UserError, match="needs the GPT-2 architecture"):
            export_hf(small_gpt(**changes), str(tmp_path))


def test_rope_against_complex_numbers():
    """Pair (i, i + 4) of a head of 8 is one complex number, rotated by pos * 10000^(-i/4)."""
    q = torch.randn(1, 5, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(5.0)[:, None] * 10000.0 ** (-torch.arange(4) / 4)
    cos, sin = small_gpt(pos="rope").rotary_cos_sin(torch.arange(5))
    assert torch.allclose(torch.stack((cos, sin)).view(2, 5, 4), torch.stack((angles.cos(), angles.sin())))
    rotated = train_gpt2.apply_rotary_emb(q, cos, sin)
    expected = torch.complex(*q[:, :, 0].chunk(2, dim=-1)) * torch.polar(torch.ones(5, 4), angles)
    assert torch.allclose(rotated[:, :, 0], torch.cat((expected.real, expected.imag), dim=-1), atol=1e-5)
    assert torch.allclose(rotated[:, 0], q[:, 0])  # position 0: the identity
    assert "transformer.wpe.weight" not in small_gpt(pos="rope").state_dict()


def test_swiglu_and_rmsnorm_against_formulas():
    model = small_gpt(mlp="swiglu", norm="rmsnorm").double()
    block, x = model.transformer.h[0], torch.randn(2, 5, 32, dtype=torch.float64)
    assert block.mlp.c_proj.in_features == 256  # 8/3 * 32 = 85.3, rounded up to a multiple of 256
    y = x @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias
    gate, value = y[..., :256], y[..., 256:]
    expected = (gate / (1 + (-gate).exp()) * value) @ block.mlp.c_proj.weight.T
    assert torch.allclose(block.mlp(x), expected + block.mlp.c_proj.bias, atol=1e-12)
    rms = (x.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(block.ln_1(x), x / rms * block.ln_1.weight, atol=1e-12)  # without a bias


@pytest.mark.parametrize("bias", [False, True])
def test_the_head_on_an_apple_gpu_has_no_long_sums(bias):
    """Forward and backward as on other devices, but the gradient of x sums over part of the vocabulary."""
    sizes = []

    class OnApple(torch.Tensor):
        device = torch.device("mps")

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is F.linear:
                sizes.append(args[1].size(0))
            return super().__torch_function__(func, types, args, kwargs)

    head, x = torch.nn.Linear(8, 50304, bias=bias).double(), torch.randn(3, 8).double().requires_grad_()
    logits = train_gpt2.apply_head(head, x.as_subclass(OnApple)).as_subclass(torch.Tensor)
    assert sum(sizes) == 50304 and max(sizes) < 32767
    assert torch.allclose(logits, head(x)) and torch.equal(train_gpt2.apply_head(head, x), head(x))
    wanted, up = (x, *head.parameters()), torch.randn(3, 50304).double()
    for a, b in zip(*(torch.autograd.grad((y * up).sum(), wanted) for y in (logits, head(x))), strict=True):
        assert torch.allclose(a, b)


def test_the_loss_is_computed_in_float32(monkeypatch):
    """From bfloat16 logits: autocast does not convert cross_entropy on CUDA as it does on a CPU."""
    model, idx, y, seen, real = small_gpt(), tokens(7, 32), tokens(7, 32, seed=2), [], F.cross_entropy

    def cross_entropy(logits, *args, **kwargs):
        seen.append(logits.dtype)
        return real(logits, *args, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    with torch.autocast("cpu", torch.bfloat16):
        logits, none = model(idx)
        no_logits, loss = model(idx, y)
    assert none is None and no_logits is None
    assert logits.shape == (7, 32, 96) and logits.dtype == torch.bfloat16
    assert seen == [torch.float32] and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(real(logits.float().flatten(0, 1), y.flatten()).item(), abs=1e-3)


class WithDropout(GPT):
    def embed(self, idx, pos):
        return F.dropout(super().embed(idx, pos), 0.5, self.training)


def test_evaluation_is_in_eval_mode_and_updates_in_train_mode(tmp_path):
    """Full batches, and only they, go through the compiled model."""
    streams = train_gpt2.open_shards(write_shards(tmp_path / "s", val=16 * 23 + 1, high=96))
    defaults = train_gpt2.build_parser(GPT).defaults
    args = argparse.Namespace(**defaults | dict(
        dtype="float32", val_tokens=10**4, total_batch_size=64, log_dir=str(tmp_path), sample_length=9))
    dist, model, shapes = train_gpt2.Dist(0, 0, 1, torch.device("cpu")), small_gpt(WithDropout), []
    train_loader, loader = (DataLoaderLite(4, 16, 0, 1, stream) for stream in streams.values())
    stop, tokenizer = train_gpt2.StopSignal(dist), train_gpt2.get_tokenizer("bytes")
    compiled = lambda x, y: shapes.append(tuple(x.shape)) or model(x, y)  # noqa: E731
    evaluator = train_gpt2.Evaluator(args, dist, model, compiled, loader, [], [1, 2, 3], tokenizer, stop)
    with torch.no_grad():
        expected = small_gpt()(*loader.read(np.arange(23)))[1].item()
    for _ in range(2):  # each draw of the dropout would give another loss
        assert evaluator.validate() == pytest.approx(expected, rel=1e-6)
    assert shapes == [(4, 16)] * 10  # 23 windows: the last three do not fill a batch
    assert evaluator.sample() == evaluator.sample()
    trainer = train_gpt2.Trainer(args, dist, model, model, train_loader, stop, run_metadata={})
    with torch.no_grad():
        expected = small_gpt()(*trainer.batch)[1].item()
    model.eval()
    loss, _ = trainer.update(lr=1e-3)
    assert abs(loss - expected) > 1e-3 and model.training  # with dropout


def generate(model, idx, n, n_vocab=96, **kwargs):
    return torch.cat([idx, *model.generate(idx, n, n_vocab=n_vocab, **kwargs)], dim=1)


@pytest.mark.parametrize("changes", VARIANTS)
def test_the_cache_changes_nothing(changes):
    """Hidden states at all positions; and greedy tokens, half of them beyond block_size."""
    model, idx, kv_cache = small_gpt(**changes), tokens(2, 32), dict(length=0, size=32)
    with torch.no_grad():
        parts = [model.hidden_states(idx[:, i:j], kv_cache=kv_cache) for i, j in
                 zip([0, *range(10, 32)], [*range(10, 32), 32], strict=True)]
        assert torch.allclose(torch.cat(parts, dim=1), model.hidden_states(idx), atol=1e-5)
    idx = tokens(3, 5)
    assert torch.equal(*(generate(model, idx, 40, temperature=0, use_cache=c) for c in (True, False)))
    with pytest.raises(AssertionError, match="33 tokens"):
        model(tokens(1, 33))


def test_sampling_is_seeded_and_stays_inside_the_vocabulary():
    model, before = small_gpt(), torch.get_rng_state()
    model.lm_head.weight.data[50:] = 10.0  # the padded ids are the likeliest
    model.lm_head.weight.data[:50] *= 0.1
    for top_k in (0, 5, 1000):
        out = [generate(model, tokens(4, 3, high=50), 30, n_vocab=50, top_k=top_k,
                        generator=torch.Generator().manual_seed(42)) for _ in range(2)]
        assert out[0].max() < 50 and torch.equal(*out)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("args, lr", [
    ([0], 8.3916083916e-07), ([713], 5.9916083916e-04), ([714], 6e-04), ([715], 6e-04),
    ([716], 5.9999999605e-04), ([1000], 5.9967893984e-04), ([9894], 3.3e-04), ([10000], 3.2510254652e-04),
    ([19071], 6.0000015814e-05), ([19072], 6.0000003954e-05), ([19073], 6e-05), ([30000], 6e-05),
    # a warm-up of no step, of all steps, and of more
    ([0, 1.0, 0.1, 0, 10], 1.0), ([3, 1.0, 0.1, 5, 5], 0.8), ([2, 1.0, 0.1, 100, 10], 0.03),
])  # fmt: skip
def test_learning_rate(args, lr):
    assert get_lr(*args) == pytest.approx(lr, rel=1e-9)
