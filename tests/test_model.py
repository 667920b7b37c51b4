"""The model, its loss, sampling, optimizer groups and schedule, against oracles and formulas."""

import math

import pytest
import torch
from torch.nn import functional as F

import train_gpt2
from plumbing import hardware
from plumbing.checkpoint import export_hf, from_hf, swap_conv1d
from plumbing.errors import UserError
from train_gpt2 import GPT, GPTConfig, get_lr

SMALL = dict(block_size=32, vocab_size=96, n_layer=2, n_head=4, n_embd=32)
VARIANTS = [
    {}, dict(pos="rope"), dict(mlp="swiglu"), dict(norm="rmsnorm"),
    dict(pos="rope", mlp="swiglu", norm="rmsnorm"),
]  # fmt: skip


def small_gpt(seed=0, **changes):
    """A small GPT with weights large enough that every part shows in the logits."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SMALL | changes))
    for p in model.parameters():
        p.data.normal_(0, 0.1)
    return model


def tokens(*shape, high=96, seed=1):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


# --- the faithful model ---


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
    assert sum(p.numel() for p in model.parameters()) == 124_475_904
    std = state["transformer.h.5.attn.c_proj.weight"].std().item()
    assert std == pytest.approx(0.02 / math.sqrt(24), rel=0.01)
    assert model.transformer.wte.weight is model.lm_head.weight
    x = torch.arange(64).view(2, 32)
    with torch.no_grad():
        assert model(x, x + 1)[1].item() == pytest.approx(10.948524, abs=2e-5)
    groups = model.configure_optimizers(0.1, 6e-4, "cpu").param_groups
    counts = [(len(g["params"]), sum(p.numel() for p in g["params"]), g["weight_decay"])
              for g in groups]
    assert counts == [(50, 124_354_560, 0.1), (98, 121_344, 0.0)]
    assert groups[0]["betas"] == (0.9, 0.95) and groups[0]["eps"] == 1e-8


@pytest.mark.parametrize("count, changes", [
    (124_439_808, dict(vocab_size=50257)),
    (123_689_472, dict(pos="rope")),
    (123_701_760, dict(pos="rope", mlp="swiglu")),
    (123_682_560, dict(pos="rope", mlp="swiglu", norm="rmsnorm")),
])  # fmt: skip
def test_parameter_counts(count, changes):
    with torch.device("meta"):
        model = GPT(GPTConfig(**dict(vocab_size=50304) | changes))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("preset, millions", [
    ("gpt2", 124), ("gpt2-medium", 355), ("gpt2-large", 774), ("gpt2-xl", 1558)])  # fmt: skip
def test_preset_sizes(preset, millions):
    with torch.device("meta"):
        model = GPT(GPTConfig(**train_gpt2.GPT2_SIZES[preset]))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_wrong_length_is_refused():
    model = small_gpt()
    with pytest.raises(AssertionError, match="33 tokens"):
        model(tokens(1, 33))
    assert model(tokens(2, 7))[0].shape == (2, 7, 96) and model(tokens(2, 7))[1] is None


@pytest.mark.parametrize("changes", VARIANTS)
def test_no_token_sees_the_future(changes):
    model, idx = small_gpt(**changes), tokens(1, 20)
    other = idx.clone()
    other[0, 12:] = (other[0, 12:] + 1) % 96
    a, b = model(idx)[0], model(other)[0]
    assert torch.allclose(a[:, :12], b[:, :12], atol=1e-6)
    assert not torch.allclose(a[:, 12:], b[:, 12:], atol=1e-2)


# --- Hugging Face as the oracle ---


@pytest.fixture
def hf():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4)).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.1)
    return model


def test_weights_from_hugging_face_give_its_logits(hf):
    idx = tokens(3, 32)
    with torch.no_grad():
        assert torch.allclose(GPT.load(from_hf(hf), "hf")(idx)[0], hf(idx).logits, atol=1e-5)


def test_export_gives_our_logits_and_comes_back_bit_equal(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small_gpt()
    export_hf(model, str(tmp_path / "hf"))
    hf = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    idx = tokens(3, 32)
    with torch.no_grad():
        assert torch.allclose(model(idx)[0], hf(idx).logits, atol=1e-5)
    back = GPT.load(from_hf(hf), "hf").state_dict()
    assert all(torch.equal(v, back[k]) for k, v in model.state_dict().items())


def test_export_cuts_the_padding_rows_off(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = small_gpt(vocab_size=50304, n_layer=1)
    export_hf(model, str(tmp_path))
    hf = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert hf.config.vocab_size == 50257
    assert torch.equal(hf.lm_head.weight, model.lm_head.weight[:50257])


@pytest.mark.parametrize("changes", VARIANTS[1:])
def test_export_refuses_what_gpt2_is_not(changes, tmp_path):
    with pytest.raises(UserError, match="only the faithful model"):
        export_hf(small_gpt(**changes), str(tmp_path))


def test_swapping_twice_is_the_identity():
    state = small_gpt().state_dict()
    twice = swap_conv1d(swap_conv1d(state))
    assert all(torch.equal(v, twice[k]) for k, v in state.items())


# --- the variations, against formulas in float64 ---


def test_rope_depends_on_distance_only():
    torch.manual_seed(0)
    model = small_gpt(pos="rope").double()
    attn = model.transformer.h[0].attn
    assert "transformer.wpe.weight" not in model.state_dict()
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(m, n):
        def rope(pos):
            angles = torch.tensor(float(pos)) * 10000.0 ** (-torch.arange(4) / 4)
            return angles.cos().double(), angles.sin().double()

        turned = [train_gpt2.rotate(x.double(), *rope(p)) for x, p in ((q, m), (k, n))]
        return (turned[0] * turned[1]).sum()

    assert score(7, 3) == pytest.approx(score(27, 23).item(), abs=1e-5)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3
    assert score(0, 0) == pytest.approx((q * k).sum().item(), abs=1e-6)  # position 0: identity
    assert attn.n_head == 4


def test_rope_layout_against_complex_numbers():
    """Pair (i, i + 4) of a head of 8 is one complex number, turned by pos * 10000^(-i/4)."""
    x = torch.randn(1, 1, 5, 8, dtype=torch.float64)
    angles = torch.arange(5.0)[:, None] * 10000.0 ** (-torch.arange(4) / 4)
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones(5, 4), angles)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    assert torch.allclose(train_gpt2.rotate(x, angles.cos(), angles.sin()), expected, atol=1e-5)


def test_swiglu_and_rmsnorm_against_formulas():
    model = small_gpt(mlp="swiglu", norm="rmsnorm").double()
    block, x = model.transformer.h[0], torch.randn(2, 5, 32, dtype=torch.float64)
    assert block.mlp.c_proj.in_features == 256  # 8/3 * 32 = 85.3, up to a multiple of 256
    y = x @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias
    gate, value = y[..., :256], y[..., 256:]
    expected = (gate / (1 + (-gate).exp()) * value) @ block.mlp.c_proj.weight.T
    assert torch.allclose(block.mlp(x), expected + block.mlp.c_proj.bias, atol=1e-12)
    rms = (x.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(block.ln_1(x), x / rms * block.ln_1.weight, atol=1e-12)
    assert not hasattr(block.ln_1, "bias") or block.ln_1.bias is None


def test_attention_against_explicit_softmax():
    model = small_gpt().double()
    attn, x = model.transformer.h[0].attn, torch.randn(2, 6, 32, dtype=torch.float64)
    q, k, v = (attn.c_attn(x)[..., i * 32:(i + 1) * 32].view(2, 6, 4, 8).transpose(1, 2)
               for i in range(3))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(
        torch.ones(6, 6).triu(1).bool(), -math.inf)
    y = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(2, 6, 32)
    assert torch.allclose(attn(x), attn.c_proj(y), atol=1e-12)


# --- the loss ---


@pytest.mark.parametrize("cap", [None, 2.0], ids=["plain", "capped-with-bias"])
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-6),
                                         (torch.bfloat16, 1e-2)])
def test_chunked_loss_equals_plain_cross_entropy(monkeypatch, dtype, atol, cap):
    monkeypatch.setitem(train_gpt2.CHUNK_ROWS, "cpu", 32)  # 100 = 3 * 32 + 4
    master = torch.float64 if dtype == torch.float64 else torch.float32
    torch.manual_seed(0)
    h = torch.randn(4, 25, 16, dtype=master, requires_grad=True)
    w = torch.randn(50, 16, dtype=master, requires_grad=True)
    b = torch.randn(50, dtype=master, requires_grad=True)
    y = torch.randint(0, 50, (4, 25))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        chunked = train_gpt2.head_cross_entropy(h, w, y, *([b, cap] if cap else []))
    assert "ChunkedCrossEntropy" in type(chunked.grad_fn).__name__
    logits = h @ w.T
    if cap:
        logits = cap * (logits + b) / ((logits + b) ** 2 + cap**2).sqrt()
    plain = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    assert chunked.item() == pytest.approx(plain.item(), abs=atol)
    wanted = (h, w, b) if cap else (h, w)
    ours = torch.autograd.grad(chunked / 3, wanted)
    theirs = torch.autograd.grad(plain / 3, wanted)
    for x, z in zip(ours, theirs, strict=True):
        assert torch.allclose(x, z, atol=atol / 10)


def test_a_product_for_an_apple_gpu_has_short_sums():
    a, b = torch.randn(3, 50304, dtype=torch.float64), torch.randn(50304, 4, dtype=torch.float64)
    terms = []

    class Seen(torch.Tensor):
        def __matmul__(self, other):
            terms.append(self.size(1))
            return self.as_subclass(torch.Tensor) @ other

    in_parts = hardware.product(a.as_subclass(Seen), b, "mps")
    assert torch.allclose(in_parts, a @ b) and sum(terms) == 50304 and max(terms) < 32767
    assert torch.equal(hardware.product(a, b, "cpu"), a @ b)


def test_model_takes_the_chunked_way_where_rows_are_many():
    model, idx, y = small_gpt(), tokens(20, 32), tokens(20, 32, seed=2)  # 640 rows > 256
    loss = model(idx, y)[1]
    assert "ChunkedCrossEntropy" in type(loss.grad_fn).__name__
    expected = F.cross_entropy(model(idx)[0].flatten(0, 1), y.flatten())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    with torch.no_grad():
        assert model(idx, y)[1].item() == pytest.approx(expected.item(), abs=1e-6)


def test_autocast_on_a_gpu_leaves_cross_entropy_to_us():
    """Why the model says float() before its loss: autocast has a list of functions that it takes in
    float32, and on CUDA this one is not among them, as it is on a CPU. The day this fails, the
    float() may go."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert not has_kernel("aten::cross_entropy_loss", "AutocastCUDA")
    assert has_kernel("aten::cross_entropy_loss", "AutocastCPU")


def test_the_loss_is_taken_in_float32(monkeypatch):
    """Of logits that came in bfloat16, in the path of one chunk and in that of several."""
    model, seen, real = small_gpt(), [], F.cross_entropy

    def cross_entropy(logits, *args, **kwargs):
        seen.append(logits.dtype)
        return real(logits, *args, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens(2, 7))[0].dtype == torch.bfloat16
        for rows, taken in ((7, [torch.float32]), (20, [])):  # 20 * 32 rows are many
            seen.clear()
            idx, y = tokens(rows, 32), tokens(rows, 32, seed=2)
            loss = model(idx, y)[1]
            logits = model(idx)[0].float().flatten(0, 1)
            assert seen == taken and loss.dtype == torch.float32
            assert loss.item() == pytest.approx(real(logits, y.flatten()).item(), abs=1e-3)


# --- sampling ---


def generate(model, idx, n, **kwargs):
    return torch.cat([idx, *model.generate(idx, n, **kwargs)], dim=1)


@pytest.mark.parametrize("changes", VARIANTS)
def test_greedy_output_is_the_same_with_and_without_the_cache(changes):
    """20 tokens within the context and 20 beyond it, where both recompute the last 32."""
    model, idx = small_gpt(**changes), tokens(3, 5)
    both = [generate(model, idx, 40, temperature=0, n_vocab=96, use_cache=c) for c in (True, False)]
    assert torch.equal(*both)


@pytest.mark.parametrize("changes", VARIANTS)
def test_cache_gives_the_same_hidden_states_at_every_position(changes):
    model, idx, cache = small_gpt(**changes), tokens(2, 32), dict(length=0, size=32)
    with torch.no_grad():
        parts = [model.hidden(idx[:, i:j], cache=cache) for i, j in
                 zip([0, *range(10, 32)], [*range(10, 32), 32], strict=True)]
        assert torch.allclose(torch.cat(parts, dim=1), model.hidden(idx), atol=1e-5)


def test_sampling_stays_inside_the_vocabulary_and_leaves_random_states_alone():
    model, before = small_gpt(), torch.get_rng_state()
    model.lm_head.weight.data[50:] = 10.0  # the padding rows are the likeliest
    model.lm_head.weight.data[:50] *= 0.1
    for top_k in (0, 5, 1000):
        out = [generate(model, tokens(4, 3, high=50), 30, top_k=top_k, n_vocab=50,
                        generator=torch.Generator().manual_seed(42)) for _ in range(2)]
        assert out[0].max() < 50 and torch.equal(*out)
    assert torch.equal(before, torch.get_rng_state())


def test_top_k_one_is_greedy_and_temperature_sharpens():
    model, idx = small_gpt(), tokens(2, 4)
    gen = torch.Generator().manual_seed(0)
    greedy = generate(model, idx, 10, temperature=0, n_vocab=96)
    assert torch.equal(generate(model, idx, 10, top_k=1, n_vocab=96, generator=gen), greedy)
    assert torch.equal(
        generate(model, idx, 10, temperature=1e-4, n_vocab=96, generator=gen), greedy)


# --- the schedule ---


@pytest.mark.parametrize("it, lr", [
    (0, 8.3916083916e-07), (249, 2.0979020979e-04), (713, 5.9916083916e-04), (714, 6.0e-04),
    (715, 6.0e-04), (716, 5.9999999605e-04), (1000, 5.9967893984e-04), (5000, 5.3060375144e-04),
    (9894, 3.3e-04), (10000, 3.2510254652e-04), (15000, 1.2297343086e-04),
    (19000, 6.0021067978e-05), (19071, 6.0000015814e-05), (19072, 6.0000003954e-05),
    (19073, 6.0e-05), (30000, 6.0e-05),
])  # fmt: skip
def test_learning_rate(it, lr):
    assert get_lr(it) == pytest.approx(lr, rel=1e-9)


def test_learning_rate_with_odd_settings():
    assert get_lr(0, 1.0, 0.1, 0, 10) == 1.0  # no warm-up
    assert get_lr(3, 1.0, 0.1, 5, 5) == 0.8  # warm-up to the end
    assert get_lr(5, 1.0, 0.1, 5, 5) == 0.1
    assert get_lr(2, 1.0, 0.1, 100, 10) == pytest.approx(0.03)  # warm-up beyond the end
