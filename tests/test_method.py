"""ppd.py against closed forms, finite differences and the library's own layers."""

import math

import pytest
import torch
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from safetensors import safe_open

from bases import load_base
from ppd import UserAdapter, UserAttnProcessor, guard_scale, ppd_loss
from utils import InputError

STAR_AND_CROSS = ["a red star", "a blue cross"]


@pytest.fixture(scope="module")
def base():
    return load_base("tiny", dtype=torch.float64)


@pytest.fixture(scope="module")
def plain():
    return load_base("tiny")


def random_adapter(base, seed=0, user_dim=3, tokens=4):
    """An adapter with nothing left at zero."""
    torch.manual_seed(seed)
    adapter = UserAdapter(user_dim, base.channels, tokens=tokens, token_dim=16)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return adapter.install(base.attention_layers()).to(base.dtype)


def inputs(base, b=2, seed=0):
    """What predict() takes: noisy latents, timesteps, conditions."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, *base.latent_shape, generator=g, dtype=base.dtype)
    t = torch.rand(b, generator=g, dtype=base.dtype)
    return x, t, *base.encode_prompts(["a red star", "a blue circle"][:b])


def users(*rows):
    """One-hot users of width 3, in float64."""
    return torch.eye(3, dtype=torch.float64)[list(rows)]


# ----------------------------------------------------------------------------------- the loss
def test_loss_by_hand():
    """Two pairs of one-number 'images', computed with math alone."""
    noise = [1.0, 2.0, -1.0, 0.5]
    pred = [0.9, 1.0, -0.5, 0.4]
    ref = [0.8, 1.5, -0.6, 0.2]
    columns = torch.tensor([pred, ref, noise], dtype=torch.float64).view(3, 4, 1, 1, 1)
    losses, log = ppd_loss(*columns, beta=0.01, T=100)

    def error(prediction, k):
        return (noise[k] - prediction[k]) ** 2

    for i, (w, z) in enumerate(((0, 2), (1, 3))):
        delta = error(pred, w) - error(ref, w) - (error(pred, z) - error(ref, z))
        want = math.log(1 + math.exp(0.01 * 100 * delta))
        assert losses[i].item() == pytest.approx(want, abs=1e-12)
        assert log["implicit_accuracy"][i] == (delta < 0)
        assert log["error_ref_dispreferred"][i].item() == pytest.approx(error(ref, z), abs=1e-12)


def test_loss_is_diffusion_dpo_at_beta_dpo_2000():
    """Diffusion-DPO's published code: -logsigmoid(-0.5 beta_dpo ((w - l) - (w_ref - l_ref))), means
    over C, H, W."""
    g = torch.Generator().manual_seed(1)
    pred, ref, noise = torch.randn(3, 8, 16, 6, 6, generator=g).unbind()
    for beta in (0.001, 0.1, 1.0, 2.0):
        w, z = (pred - noise).pow(2).mean(dim=[1, 2, 3]).chunk(2)
        w_ref, z_ref = (ref - noise).pow(2).mean(dim=[1, 2, 3]).chunk(2)
        inside = -0.5 * 2000 * beta * ((w - z) - (w_ref - z_ref))
        published = -torch.nn.functional.logsigmoid(inside)
        assert torch.allclose(ppd_loss(pred, ref, noise, beta)[0], published, rtol=1e-5, atol=1e-6)


def test_loss_squares_in_float32():
    g = torch.Generator().manual_seed(0)
    pred, ref, noise = torch.randn(3, 4, 16, 8, 8, generator=g).bfloat16()
    exact = ppd_loss(pred.double(), ref.double(), noise.double(), beta=0.01)[0]
    assert torch.allclose(ppd_loss(pred, ref, noise, beta=0.01)[0].double(), exact, rtol=1e-5)


# ----------------------------------------------------------------------------------- the hook
def test_hook_equals_diffusers_ip_adapter_layer():
    torch.manual_seed(0)
    layer = Attention(query_dim=64, heads=2, dim_head=32, bias=True).double().eval()
    adapter = UserAdapter(3, [64], tokens=4, token_dim=16).double()
    torch.nn.init.normal_(adapter.to_v[0].weight)
    theirs = IPAdapterAttnProcessor2_0(64, cross_attention_dim=16, num_tokens=(4,), scale=0.7)
    theirs = theirs.double()
    theirs.to_k_ip[0].weight.data.copy_(adapter.to_k[0].weight)
    theirs.to_v_ip[0].weight.data.copy_(adapter.to_v[0].weight)
    x = torch.randn(2, 64, 4, 4, dtype=torch.float64)
    text = torch.randn(2, 21, 64, dtype=torch.float64)
    tokens = adapter(torch.randn(2, 3, dtype=torch.float64))
    with adapter.user(tokens, 0.7):
        ours = UserAttnProcessor(adapter, adapter.to_k[0], adapter.to_v[0])(layer, x, text)
    want = theirs(layer, x, encoder_hidden_states=(text, [tokens[:, None]]))
    assert torch.allclose(ours, want, atol=1e-12)


def test_no_user_is_the_stock_network_bit_for_bit(plain):
    x = inputs(plain)
    stock = load_base("tiny").predict(*x)  # its processors are diffusers' own
    adapter = random_adapter(plain)
    assert torch.equal(plain.predict(*x), stock)
    tokens = adapter(torch.eye(3)[:2])
    with adapter.user(tokens):
        assert not torch.equal(plain.predict(*x), stock)
    assert torch.equal(plain.predict(*x), stock)
    with adapter.reference(tokens):
        assert torch.equal(plain.predict(*x), stock)
    with pytest.raises(RuntimeError), adapter.user(tokens):
        raise RuntimeError("in the middle")
    assert torch.equal(plain.predict(*x), stock)


def test_user_scale_zero_is_the_base_and_seeds_stand_alone(plain):
    adapter = random_adapter(plain)
    prompts, seeds, tokens = ["a red star"] * 3, [5, 6, 7], adapter(torch.eye(3))
    how = dict(adapter=adapter, steps=3)
    stock = plain.sample(prompts, seeds, steps=3)
    latents = plain.sample(prompts, seeds, user_tokens=tokens, **how)
    assert torch.equal(plain.sample(prompts, seeds, user_tokens=tokens, user_scale=0, **how), stock)
    assert not torch.equal(latents, stock)
    alone = plain.sample(["a red star"], [6], user_tokens=tokens[1:2], **how)
    assert torch.allclose(alone[0], latents[1], rtol=1e-3, atol=1e-3)


def test_guidance_by_hand(base):
    """One step of sampling against two separate passes, both of which see the user."""
    adapter = random_adapter(base)
    tokens, scale, g = adapter(users(0, 1)), 1.7, torch.Generator()
    got = base.sample(STAR_AND_CROSS, [3, 4], adapter, tokens, scale, guidance=2.5, steps=1)

    def noise(seed):
        g.manual_seed(seed)
        return torch.randn(base.latent_shape, generator=g, dtype=torch.float64)

    x = torch.stack([noise(3), noise(4)])
    t = torch.ones(2, dtype=torch.float64)
    with adapter.user(tokens, scale):
        conditional = base.predict(x, t, *base.encode_prompts(STAR_AND_CROSS))
        empty = base.predict(x, t, *base.encode_prompts(["", ""]))
    base.scheduler.set_timesteps(1)
    guided = empty + 2.5 * (conditional - empty)
    want = base.scheduler.step(guided, t, x).prev_sample  # the last step adds no noise
    assert torch.allclose(got, want, rtol=1e-9)


def test_one_row_of_tokens_serves_both_halves_of_a_batch(base):
    adapter = random_adapter(base)
    x = inputs(base)
    with adapter.user(adapter(users(0, 1))):
        two = base.predict(*x)
        halves = base.predict(*(torch.cat([part, part]) for part in x))
    assert torch.allclose(halves, torch.cat([two, two]), atol=1e-12)


def test_zero_user_is_the_mean_user_and_not_the_reference(base):
    adapter = random_adapter(base)
    adapter.mean.copy_(torch.tensor([1.0, -2.0, 3.0]))
    adapter.std.copy_(torch.tensor([2.0, 0.5, 1.0]))
    u = torch.randn(2, 3, dtype=torch.float64)
    dropped = adapter(u, drop=torch.tensor([True, False]))
    assert torch.equal(dropped[:1], adapter(adapter.mean.expand(1, -1)))
    assert torch.equal(dropped[1:], adapter(u[1:]))
    x = inputs(base)
    reference = base.predict(*x)
    with adapter.user(adapter(adapter.mean.expand(2, -1))):
        assert not torch.allclose(base.predict(*x), reference)


def test_one_odd_dimension_cannot_drown_a_user():
    """Rounding makes dimensions that hardly vary over the training users: who is off in one there
    keeps what they are elsewhere."""
    torch.manual_seed(0)
    seen = torch.randn(500, 64)
    seen[:, 7] = 100 + 1e-5 * torch.randn(500)
    adapter = UserAdapter(64, [16, 16])
    adapter.set_statistics(seen)
    median = seen.std(0, correction=0).median().item()
    assert adapter.std[7].item() == pytest.approx(0.01 * median, rel=1e-4)
    two = torch.randn(2, 64)
    two[:, 7] = 103  # both, and nobody in training
    tokens = adapter(two).flatten(1)
    assert torch.cosine_similarity(tokens[0], tokens[1], dim=0) < 0.7
    plain = two.clone()
    plain[:, 7] = 100
    kept = torch.cosine_similarity(adapter(plain).flatten(1), tokens)
    assert (kept > 0.7).all()
    two[0, 3] = 1e30
    assert adapter(two).isfinite().all()


def test_gradients_against_finite_differences(base):
    adapter = random_adapter(base)
    x = inputs(base)
    u = torch.randn(1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    noise = torch.randn_like(x[0])
    reference = base.predict(*x)

    def loss():
        with adapter.user(adapter(u)):
            return ppd_loss(base.predict(*x), reference, noise, beta=0.05)[0].sum()

    loss().backward()
    names = ["project.weight", "project.bias", "norm.weight"]
    names += ["to_k.0.weight", "to_k.7.weight", "to_v.0.weight", "to_v.7.weight"]
    for name in names:
        p = adapter.get_parameter(name)
        g = torch.Generator().manual_seed(4)
        direction = torch.randn(p.shape, dtype=torch.float64, generator=g)
        sides = []
        with torch.no_grad():
            for h in (1e-5, -1e-5):
                p.add_(h * direction)
                sides.append(loss().item())
                p.sub_(h * direction)
        slope = (sides[0] - sides[1]) / 2e-5
        assert (p.grad * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-9), name
        assert p.grad.abs().max() > 0, name
    assert all(p.grad is None and not p.requires_grad for p in base.prior.parameters())


def test_one_token_gives_keys_no_gradient(base):
    """Why there are several: a softmax over a single key is 1 whatever the key is."""
    for tokens, moves in ((1, False), (4, True)):
        adapter = random_adapter(base, tokens=tokens)
        with adapter.user(adapter(users(0, 1))):
            base.predict(*inputs(base)).square().sum().backward()
        assert (adapter.to_k[0].weight.grad.abs().max() > 1e-9) == moves


def test_checkpointing_gives_the_same_gradients(base, monkeypatch):
    grads, calls, real = [], [], UserAttnProcessor.__call__

    def counted(self, *arguments, **named):
        calls.append(1)
        return real(self, *arguments, **named)

    monkeypatch.setattr(UserAttnProcessor, "__call__", counted)
    for switch in ("disable_gradient_checkpointing", "enable_gradient_checkpointing"):
        adapter = random_adapter(base)
        getattr(base.prior, switch)()
        with adapter.user(adapter(users(0, 1))):
            base.predict(*inputs(base)).square().sum().backward()
        grads.append([p.grad.clone() for p in adapter.parameters()])
    base.prior.disable_gradient_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert len(calls) == 8 + 16  # once a layer, and once more a layer where backward recomputes


def test_the_faster_norm_is_diffusers(plain):
    norms = [m for m in plain.prior.modules() if type(m).__name__ == "GlobalResponseNorm"]
    values = torch.randn(2, 8, 8, norms[0].gamma.shape[-1], generator=torch.Generator())
    values[..., 5] = 0  # a dead channel has no norm to divide by, and a gradient all the same
    outs, grads = [], []
    for forward in (norms[0].forward, type(norms[0]).forward.__get__(norms[0])):
        x = values.clone().requires_grad_()
        outs.append(forward(x))
        outs[-1].square().sum().backward()
        grads.append(x.grad)
    assert len(norms) == 8 and torch.allclose(*outs, atol=1e-5)
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------- the files
def test_adapter_round_trip_holds_adapter_tensors_only(plain, tmp_path):
    adapter = random_adapter(plain)
    adapter.mean.fill_(0.25)
    adapter.save(tmp_path / "adapter.safetensors", base="tiny", beta=1.0)
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        assert set(file.keys()) == set(adapter.state_dict()) and len(file.keys()) == 2 + 4 + 2 * 8
    again = UserAdapter.load(tmp_path)
    assert again.header["base"] == "tiny" and again.header["beta"] == 1.0
    for key, value in adapter.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert not [k for k in plain.prior.state_dict() if "adapter" in k or "processor" in k]


def test_float16_is_refused():
    with pytest.raises(InputError, match="float16"):
        load_base("tiny", dtype=torch.float16)


# ------------------------------------------------------------------------------------ the guard
def test_the_guard_keeps_the_preferred_error_from_growing():
    """Both images' predictions move alike, as one shared offset: the worst case that the guard is
    derived for. Without it a step can raise the preferred image's error, with it none does."""
    grew = dict.fromkeys((False, True), 0)
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        preferred = torch.randn(1, 2, 4, 4, generator=g)
        dispreferred = 1.6 * preferred + 0.8 * torch.randn(1, 2, 4, 4, generator=g)
        pred = torch.cat([preferred, dispreferred])
        target, reference = torch.zeros_like(pred), 1.1 * pred
        for guard in grew:
            offset = torch.zeros(1, 2, 4, 4, requires_grad=True)
            losses, log = ppd_loss(pred + offset, reference, target, 0.01, guard=guard)
            losses.sum().backward()
            plain, _ = ppd_loss(pred, reference, target, 0.01)
            assert torch.equal(losses.detach(), plain)  # the loss is what it was
            slope = -(preferred * offset.grad).sum().item()  # of its error, along the step
            grew[guard] += slope > 1e-4
    assert grew[False] > 20 and grew[True] == 0
    scale = guard_scale(pred, target)
    inner = (preferred * dispreferred).sum()
    assert scale.item() == pytest.approx((preferred.square().sum() / inner).item())
    assert guard_scale(torch.cat([preferred, -dispreferred]), target).item() == 1
