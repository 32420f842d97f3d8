"""model.py against other ways to compute the same: torch's own layers, torchvision's ResNet, loops and formulas."""

import ast
import inspect
import itertools
import math
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import model

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def randomized(module):
    """The module in float64, every parameter but gamma at random, so that no zero or one can hide a mistake."""
    for name, parameter in module.double().named_parameters():
        nn.init.ones_(parameter) if "gamma" in name else nn.init.normal_(parameter, std=0.3)
    return module


def randn(*shape):
    torch.manual_seed(0)
    return torch.randn(shape, dtype=torch.float64)


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def gradients(module, out):
    """By name, each parameter's gradient for a loss that weighs every output differently."""
    names, parameters = zip(*module.named_parameters())
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return dict(zip(names, torch.autograd.grad((out * weights).sum(), parameters)))


# ---------------------------------------------------------------------------------------------------------------------
# Layers

def attention_paths(attention, x):
    """What eval mode (the fused kernel), train mode and `return_weights` (both explicit) compute, on a CPU."""
    return attention.eval()(x), attention.train()(x), attention.eval()(x, return_weights=True)[0]


def test_attention_equals_torchs():
    """Both paths give the output, weights and gradients of torch's multi-head attention."""
    x, attention = randn(3, 7, 24), randomized(model.Attention(24, 4))
    tokens = x.transpose(0, 1)  # torch's function wants (N, B, D)
    want, want_weights = F.multi_head_attention_forward(
        tokens, tokens, tokens, 24, 4, attention.qkv.weight, attention.qkv.bias, None, None, False, 0.0,
        attention.proj.weight, attention.proj.bias, need_weights=True, average_attn_weights=False)
    want = want.transpose(0, 1)
    want_gradients = gradients(attention, want)
    for out in attention_paths(attention, x):
        close(out, want)
        for name, gradient in gradients(attention, out).items():
            close(gradient, want_gradients[name])
    weights = attention(x, return_weights=True)[1]
    close(weights, want_weights)
    close(weights.sum(dim=-1), torch.ones(3, 4, 7, dtype=torch.float64))


def test_attention_takes_the_path_it_says(monkeypatch):
    """On a CPU the fused kernel runs in eval mode, and not in train mode or when the weights are asked for."""
    calls, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args: calls.append(args) or fused(*args))
    attention, x = model.Attention(8, 2), torch.randn(1, 3, 8)
    attention.eval()(x)
    assert len(calls) == 1
    attention.train()(x), attention.eval()(x, return_weights=True)
    assert len(calls) == 1


def test_attention_is_scaled_with_the_width_of_a_head():
    """Loops over images, heads and queries, with the root of D / H, give the same numbers."""
    B, N, D, H, E = 2, 5, 12, 3, 4
    x, attention = randn(B, N, D), randomized(model.Attention(D, H)).requires_grad_(False)
    W, b, want = attention.qkv.weight, attention.qkv.bias, torch.empty_like(x)
    for i in range(B):
        for n in range(N):
            heads = []
            for h in range(H):
                q, k, v = (x[i] @ W[s : s + E].T + b[s : s + E] for s in (h * E, D + h * E, 2 * D + h * E))
                scores = [math.exp(float(q[n] @ k[m]) / math.sqrt(E)) for m in range(N)]
                heads.append(sum(score / sum(scores) * v[m] for m, score in enumerate(scores)))
            want[i, n] = attention.proj(torch.cat(heads))
    for out in attention_paths(attention, x):
        close(out, want)


def compare_with_torch(ours, theirs):
    """Load our weights into torch's module: the same output, and the same gradient of every parameter."""
    def torch_name(name):
        for own, other in (("blocks.", "blocks.layers."), ("attn.qkv.", "self_attn.in_proj_"), ("mlp.fc", "linear"),
                           ("attn.proj", "self_attn.out_proj")):
            name = name.replace(own, other)
        return name

    x = randn(3, 7, 24)
    theirs.double().load_state_dict({torch_name(k): v for k, v in ours.state_dict().items() if "gamma" not in k})
    for mode in (True, False):
        out, want = ours.train(mode)(x), theirs.train(mode)(x)
        close(out, want)
        want_gradients = gradients(theirs, want)
        for name, gradient in gradients(ours, out).items():
            assert "gamma" in name or close(gradient, want_gradients[torch_name(name)]) is None
    with torch.no_grad():
        close(ours(x), theirs(x))  # without gradients torch takes another path


@pytest.mark.parametrize("gamma", [1.0, None])
def test_block_equals_torchs_layer(gamma):
    """With gamma 1, or without gamma, a block is torch's pre-norm TransformerEncoderLayer, gradients included."""
    block = randomized(model.Block(24, 4, mlp_ratio=3, drop_path=0.0, gamma_init=gamma))
    compare_with_torch(block, nn.TransformerEncoderLayer(24, 4, 72, dropout=0.0, activation="gelu", batch_first=True,
                                                         norm_first=True))


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("gamma", [1.0, None])
def test_explicit_encoder_equals_builtin(pool, gamma):
    """Our blocks and torch's nn.TransformerEncoder are the same function of the same weights."""
    explicit = randomized(model.Encoder(7, 24, 3, 4, gamma_init=gamma, pool=pool))
    compare_with_torch(explicit, model.Encoder(7, 24, 3, 4, gamma_init=None, pool=pool, encoder="builtin"))


def test_drop_path_drops_whole_images():
    """Each image is all zero or x / (1 - rate); the share that stays, and the mean, are as expected; draws are new."""
    drop, x = model.DropPath(0.3), randn(4000, 3, 2) + 5
    out = drop(x)
    kept = out[:, 0, 0] != 0
    for image, dropped, stays in zip(x, out, kept):
        close(dropped, image / 0.7 * stays)
    sigma = (0.3 * 0.7 / 4000) ** 0.5
    assert abs(float(kept.double().mean()) - 0.7) < 4 * sigma
    assert abs(float(out.mean() / x.mean()) - 1) < 4 * sigma / 0.7
    assert not torch.equal(kept, drop(x)[:, 0, 0] != 0)
    assert drop(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(drop.eval()(x), x) and torch.equal(model.DropPath(0.0)(x), x)


def test_drop_path_grows_linearly():
    """From 0 in the first block to drop_path in the last."""
    rates = [block.drop_path.rate for block in model.Encoder(4, 8, 5, 2, drop_path=0.2).blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.2, 5), atol=1e-12)
    assert model.Encoder(4, 8, 1, 2, drop_path=0.2).blocks[0].drop_path.rate == 0.2


def test_layer_scale_equals_numpy():
    """x times one factor per channel, all `init` at first; with the small start a block is nearly the identity."""
    scale, x = model.LayerScale(6, init=0.1).double(), randn(2, 3, 6)
    np.testing.assert_allclose(scale(x).detach().numpy(), x.numpy() * 0.1, rtol=1e-6)
    nn.init.normal_(scale.gamma)
    np.testing.assert_allclose(scale(x).detach().numpy(), x.numpy() * scale.gamma.detach().numpy())
    assert 0 < float((model.Block(6, 2, gamma_init=1e-4).double()(x) - x).detach().abs().max()) < 1e-3


def test_a_block_drops_both_of_its_branches():
    x, block = randn(2, 3, 6), randomized(model.Block(6, 2, drop_path=1 - 1e-9, gamma_init=1.0))
    assert torch.equal(block(x), x) and not torch.equal(block.eval()(x), x)


def test_patch_embed_is_a_convolution():
    """The same numbers as a convolution with kernel and stride P and the same weights, tokens row by row."""
    images, embed = randn(3, 2, 12, 12), randomized(model.PatchEmbed(12, 4, 2, 10))
    want = F.conv2d(images, embed.proj.weight.view(10, 2, 4, 4), embed.proj.bias, stride=4).flatten(2).transpose(1, 2)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        close(embed(images.contiguous(memory_format=memory_format)), want)


def test_pooling():
    """Without blocks, "mean" is the mean of the normalised tokens with their positions, "cls" the class token alone."""
    for pool in ("mean", "cls"):
        x, encoder = randn(2, 5, 8), randomized(model.Encoder(5, 8, 1, 2, pool=pool))
        encoder.blocks = nn.Identity()
        norm, position = encoder.norm, encoder.pos_embed[0]
        close(encoder(x), norm(x + position).mean(1) if pool == "mean" else
              norm(encoder.cls_token[0] + position[:1]).expand(2, 8))


# ---------------------------------------------------------------------------------------------------------------------
# Models

def test_resnet_equals_torchvisions():
    """With torchvision's weights and its stem made small, the same outputs: in train mode, then in eval mode."""
    images, ours = randn(4, 3, 16, 16), model.ResNet18()
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    assert len(ours.state_dict()) == len(theirs.state_dict())
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values())))
    with torch.no_grad():
        for mode in (True, False):
            want = theirs.double().train(mode)(images)
            torch.testing.assert_close(ours.double().train(mode)(images), want, rtol=1e-9, atol=1e-9)


def test_pooling_block_by_hand():
    """With downsample="pool" the largest of each 2 x 2 is kept: after the first convolution, before the shortcut's."""
    x, block = randn(2, 3, 8, 8), randomized(model.BasicBlock(3, 5, "pool"))
    norm = lambda y, layer: F.batch_norm(y, None, None, layer.weight, layer.bias, training=True)
    largest = lambda y: y.unflatten(3, (4, 2)).unflatten(2, (4, 2)).amax(dim=(3, 5))
    y = F.relu(norm(largest(F.conv2d(x, block.conv1.weight, padding=1)), block.norm1))
    y = norm(F.conv2d(y, block.conv2.weight, padding=1), block.norm2)
    close(block(x), F.relu(y + norm(F.conv2d(largest(x), block.shortcut[1].weight), block.shortcut[2])))


def size(module):
    """Parameters, and the multiply-accumulates for one image, which torch counts as two operations each."""
    # In train mode attention is two plain matrix products on a CPU, which every version of torch counts.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.train()(torch.randn(1, 3, 32, 32))
    return sum(p.numel() for p in module.parameters()), counter.get_total_flops() / 2


@pytest.mark.parametrize("d, L, H, p, r", [(384, 7, 6, 4, 4), (96, 3, 4, 8, 2)])
def test_vit_parameters_and_flops(d, L, H, p, r):
    """The counts of a ViT are those of its formulas; the default one takes 0.816 GMAC."""
    C, K, N = 3, 10, (32 // p) ** 2
    attention, mlp, norms, gammas = 4 * d * d + 4 * d, 2 * r * d * d + (r + 1) * d, 4 * d, 2 * d
    parameters, macs = size(model.ViT(patch_size=p, dim=d, depth=L, num_heads=H, mlp_ratio=r))
    assert parameters == (C*p*p*d + d) + N * d + L * (attention + mlp + norms + gammas) + 2 * d + (d * K + K)
    assert macs == L * N * (4 + 2 * r) * d * d + 2 * L * N * N * d + N * (C*p*p) * d + d * K
    assert d != 384 or round(macs / 1e9, 3) == 0.816


def test_resnet_parameters_and_flops():
    """ResNet-18 has the known counts; pooling costs three times the strided convolution on top of striding."""
    parameters, macs = size(model.ResNet18())
    assert parameters == 11_173_962 and 0.555e9 < macs < 0.557e9
    stride, pool = (size(model.BasicBlock(3, 8, downsample=kind)) for kind in ("stride", "pool"))
    assert pool[0] == stride[0] and pool[1] - stride[1] == 3 * (16 * 16 * 8 * 3 * 9)


def test_hybrid_shapes():
    """By default 64 tokens; a shrunken one with pooling works as well, with either pool."""
    hybrid = model.build_model("hybrid").eval()
    assert hybrid.encoder.pos_embed.shape == (1, 64, 256) and hybrid(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    for pool, tokens in (("cls", 65), ("mean", 64)):
        small = model.Hybrid(num_classes=7, image_size=16, widths=(8, 16), depths=(1, 1), downsample="pool", dim=24,
                             depth=2, pool=pool)
        assert small.encoder.pos_embed.shape[1] == tokens and small(torch.randn(2, 3, 16, 16)).shape == (2, 7)


def test_the_hybrids_tokens_are_the_places_of_its_feature_map():
    """Row by row, each projected as a 1 x 1 convolution would."""
    hybrid = randomized(model.Hybrid(image_size=16, widths=(8, 12), depths=(1, 1), dim=24, depth=1, num_heads=2)).eval()
    images, seen = randn(2, 3, 16, 16), []
    hybrid.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    hybrid(images)
    want = F.conv2d(hybrid.trunk(images), hybrid.proj.weight[:, :, None, None], hybrid.proj.bias)
    for row, col in itertools.product(range(8), range(8)):
        close(seen[0][:, 8 * row + col], want[:, :, row, col])


@pytest.mark.parametrize("options", [dict(gamma_init=0.1), dict(encoder="builtin", gamma_init=None)])
def test_encoder_initialisation(options):
    """Matrices and embeddings have std 0.02, a branch's last layer 0.02 / sqrt(2 depth); biases 0, norms 1."""
    torch.manual_seed(0)
    for name, p in model.Encoder(64, 192, 3, 4, pool="cls", **options).named_parameters():
        if p.ndim >= 2:
            last = any(part in name for part in (".attn.proj", "fc2", "out_proj", "linear2"))
            want, rel = 0.02 / math.sqrt(2 * 3) if last else 0.02, 0.03 if p.numel() > 1000 else 0.2
            assert float(p.detach().std()) == pytest.approx(want, rel=rel), name
        else:
            assert torch.all(p == (0 if "bias" in name else 0.1 if "gamma" in name else 1)), name


def test_sine_positions():
    """Every number by its formula; and of all places, those next to a token are most like it."""
    side, D = 5, 12
    made = model.sine_positions(side**2, D).view(side, side, D)
    for row, col, k in itertools.product(range(side), range(side), range(D // 4)):
        frequency = 0.1 ** (k / (D // 4 - 1))
        for start, place in ((0, row), (D // 2, col)):
            assert float(made[row, col, start + k]) == pytest.approx(math.sin(place * frequency), abs=1e-6)
            assert float(made[row, col, start + D // 4 + k]) == pytest.approx(math.cos(place * frequency), abs=1e-6)
    distance = (made - made[2, 2]).norm(dim=2)
    nearest = distance.flatten().argsort()[:5].tolist()
    assert nearest[0] == 12 and set(nearest[1:]) == {7, 11, 13, 17}  # itself, above, left, right, below


@pytest.mark.parametrize("pool, extra", [("mean", 0), ("cls", 1), ("distill", 2)])
def test_sine_positions_are_those_of_the_patches(pool, extra):
    """They start the patches' embeddings and nothing else: all other weights are those that noise would give."""
    made = {}
    for pos_init in ("noise", "sine"):
        torch.manual_seed(0)
        made[pos_init] = model.Encoder(16, 24, 2, 4, pool=pool, pos_init=pos_init).state_dict()
    noise, sine = made["noise"].pop("pos_embed")[0], made["sine"].pop("pos_embed")[0]
    assert torch.equal(sine[extra:], model.sine_positions(16, 24)) and torch.equal(sine[:extra], noise[:extra])
    assert 0.015 < noise.std() < 0.025 and all(map(torch.equal, made["noise"].values(), made["sine"].values()))


def test_model_initialisation():
    """Tokens of unit variance; BatchNorms' gammas are one; the head is zero, so the first loss is ln K."""
    images, embed, hybrid = randn(8, 3, 32, 32).float(), model.PatchEmbed(), model.Hybrid()
    assert float(embed(images).detach().std()) == pytest.approx(1, rel=0.05)
    assert float(hybrid.proj.weight.detach().std()) == pytest.approx(1 / 16, rel=0.03)
    assert not embed.proj.bias.any() and not hybrid.proj.bias.any()
    with torch.no_grad():
        for name in model.MODELS:
            net = model.build_model(name, num_classes=9)
            assert all((m.norm2.weight == 1).all() for m in net.modules() if isinstance(m, model.BasicBlock))
            assert float(F.cross_entropy(net(images[:2]), torch.tensor([3, 8]))) == pytest.approx(math.log(9), abs=1e-6)


@pytest.mark.parametrize("name, options", [
    ("vit", dict(image_size=16, dim=64, depth=2, num_heads=2, pool="cls")),
    ("hybrid", dict(image_size=16, widths=(8, 16), depths=(1, 1), dim=32, depth=1, num_heads=2)),
    ("resnet18", dict(widths=(16, 32), depths=(1, 1))),
])
def test_one_batch_is_learned_by_heart(name, options):
    """A few dozen steps on one batch of noise bring the loss near zero, and no parameter stays where it was."""
    images, labels, net = randn(8, 3, 16, 16).float(), torch.arange(8), model.build_model(name, **options)
    optimizer, before = torch.optim.AdamW(net.parameters(), lr=1e-2), [p.detach().clone() for p in net.parameters()]
    for _ in range(60):
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    assert not any(torch.equal(p, start) for p, start in zip(net.parameters(), before))


@pytest.mark.parametrize("make, message", [
    (lambda: model.ViT(image_size=32, patch_size=5), "32 .*5"),
    (lambda: model.ViT(dim=100, num_heads=3), "100 .*3 heads"),
    (lambda: model.ViT(dim=30, num_heads=4, encoder="builtin", gamma_init=None), "30 .*4 heads"),
    (lambda: model.Attention(10, 4), "10 .*4 heads"),
    (lambda: model.ViT(depth=0), "depth .*0"),
    (lambda: model.Attention(8, 0), "8 .*0 heads"),
    (lambda: model.PatchEmbed(patch_size=0), "patch size 0"),
    (lambda: model.ViT(pool="max"), "'max'.*mean, cls or distill"),
    (lambda: model.ViT(encoder="timm"), "'timm'.*explicit or builtin"),
    (lambda: model.ViT(encoder="builtin", gamma_init=None, drop_path=0.1), "drop_path=0"),
    (lambda: model.ViT(encoder="builtin", gamma_init=1.0), "gamma_init=None"),
    (lambda: model.ViT(pos_init="zeros"), "'zeros'.*noise or sine"),
    (lambda: model.Encoder(7, 24, 2, 4, pos_init="sine"), "7 tokens"),
    (lambda: model.Encoder(9, 18, 2, 3, pos_init="sine"), "divisible by 4, not 18"),
    (lambda: model.ResNet18(downsample="avg"), "'avg'.*stride or pool"),
    (lambda: model.ResNet18(depths=(0,), widths=(8,), activation="tanh"), "'tanh'.*relu or gelu"),
    (lambda: model.BasicBlock(4, 4, activation="tanh"), "'tanh'.*relu or gelu"),
    (lambda: model.ResNet18(widths=(8, 16), depths=(1,)), r"\(8, 16\).*\(1,\)"),
    (lambda: model.ResNet18(widths=(8, 16), depths=(1, 0)), r"\(8, 16\).*\(1, 0\)"),
    (lambda: model.Hybrid(image_size=30), "30 .*4"),
    (lambda: model.build_model("vgg"), "'vgg'.*vit, hybrid, resnet18"),
    (lambda: model.DropPath(1.0), "1.0"),
    (lambda: model.DropPath(-0.1), "-0.1"),
])
def test_impossible_options_raise(make, message):
    """A ValueError that names the numbers or words that do not fit."""
    with pytest.raises(ValueError, match=message):
        make()


def test_whiten_starts_a_convolution_with_the_principal_components():
    """By singular values; the responses to the images are uncorrelated, come with both signs, and fall in variance."""
    images, conv = torch.randn(50, 3, 12, 12).cumsum(2).cumsum(3) / 6, torch.nn.Conv2d(3, 20, 3, bias=False)
    model.whiten(conv, images)
    patches = images.unfold(2, 3, 3).unfold(3, 3, 3).permute(0, 2, 3, 1, 4, 5).reshape(-1, 27).double()
    components = torch.linalg.svd(patches, full_matrices=False).Vh[:10]
    filters = conv.weight.detach().view(20, 27).double()
    torch.testing.assert_close((filters[:10] * components).sum(1).abs(), torch.ones(10).double(), atol=1e-4, rtol=0)
    assert torch.equal(filters[:10], -filters[10:])
    covariance = filters[:10] @ patches.T @ patches @ filters[:10].T
    torch.testing.assert_close(covariance, covariance.diag().diag(), atol=1e-4 * covariance.max().item(), rtol=0)
    assert (covariance.diag().diff() < 0).all()
    wide = torch.nn.Conv2d(3, 64, 3, bias=False)
    before = wide.weight.detach().clone()
    model.whiten(wide, images)
    assert torch.equal(wide.weight[54:], before[54:]) and not torch.equal(wide.weight[:54], before[:54])


def test_whiten_lets_a_patch_embedding_see_whitened_patches():
    """Its weight the identity, the tokens of the images are uncorrelated and of unit variance; else, it mixes those."""
    torch.manual_seed(0)
    images, embed = torch.randn(500, 3, 8, 8).cumsum(2).cumsum(3), model.PatchEmbed(8, 2, 3, dim=12)
    random = embed.proj.weight.detach().clone()
    embed.proj.weight.data.copy_(torch.eye(12))
    model.whiten(embed, images)
    white = embed(images).detach().flatten(0, 1)
    torch.testing.assert_close(white.T @ white / len(white), torch.eye(12), atol=0.05, rtol=0)
    embed.proj.weight.data.copy_(random)
    model.whiten(embed, images)
    torch.testing.assert_close(embed(images).detach().flatten(0, 1), white @ random.T, atol=1e-3, rtol=1e-3)


def test_whiten_does_not_blow_up_what_has_no_variance():
    grey, embed = torch.randn(100, 1, 8, 8).expand(-1, 3, -1, -1), model.PatchEmbed(8, 2, 3, dim=12)
    embed.proj.weight.data.copy_(torch.eye(12))
    model.whiten(embed, grey)
    assert torch.linalg.matrix_norm(embed.proj.weight, 2) < 10.01  # 0.01 ** -0.5


# ---------------------------------------------------------------------------------------------------------------------
# The shape comments, and the promise that each class can be copied out. CASES drives every class alone: its options,
# the letters of its input, and the value of each letter by the legend in model.py's docstring, no two alike.

TOKENS = dict(B=5, N=7, D=12, H=3, E=4, M=24)
IMAGES = dict(B=5, C=3, S=8, P=2, D=12, K=7, O=6, R=4)
TRUNK = dict(num_classes=7, in_channels=3, widths=(4, 6), depths=(1, 1))
CASES = [
    ("DropPath", dict(rate=0.5), "BND", TOKENS),
    ("LayerScale", dict(dim=12), "BND", TOKENS),
    ("Attention", dict(dim=12, num_heads=3), "BND", TOKENS),
    ("MLP", dict(dim=12, hidden_dim=24), "BND", TOKENS),
    ("Block", dict(dim=12, num_heads=3, mlp_ratio=2), "BND", TOKENS),
    ("PatchEmbed", dict(image_size=8, patch_size=2, in_channels=3, dim=12), "BCSS", dict(IMAGES, N=16)),
    ("Encoder", dict(num_tokens=7, dim=12, depth=2, num_heads=3, pool="cls"), "BND", dict(TOKENS, T=1)),
    ("Encoder", dict(num_tokens=7, dim=12, depth=2, num_heads=3, pool="mean"), "BND", TOKENS),
    ("Encoder", dict(num_tokens=7, dim=12, depth=2, num_heads=3, pool="distill"), "BND", dict(TOKENS, T=2)),
    ("TwoHeads", dict(dim=12, num_classes=7), "B2D", {"B": 5, "2": 2, "D": 12, "K": 7}),
    ("ViT", dict(num_classes=7, image_size=8, in_channels=3, patch_size=2, dim=12, depth=1), "BCSS", IMAGES),
    ("BasicBlock", dict(in_channels=3, out_channels=6, downsample="stride"), "BCSS", IMAGES),
    ("BasicBlock", dict(in_channels=3, out_channels=6, downsample="pool"), "BCSS", IMAGES),
    ("ResNet18", TRUNK, "BCSS", IMAGES),
    ("Hybrid", dict(TRUNK, image_size=8, dim=12, depth=1), "BCSS", IMAGES),
]


def shape_comments():
    """{(class, line): (the names that the line assigns, or None where it returns, and the comment's shape)}."""
    lines, found = inspect.getsource(model).splitlines(), {}
    for cls in [node for node in ast.parse("\n".join(lines)).body if isinstance(node, ast.ClassDef)]:
        for forward in [node for node in cls.body if getattr(node, "name", "") == "forward"]:
            for line in range(forward.lineno, forward.end_lineno + 1):
                comment = re.search(r"\S *# (\([A-Z].*)", lines[line - 1])
                if comment:
                    node, = [n for n in ast.walk(forward) if isinstance(n, (ast.Assign, ast.Return))
                             and n.lineno == n.end_lineno == line]
                    names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
                    # The shape is the shortest beginning whose brackets close; a comment may go on after it.
                    starts = [comment[1][:i] for i, c in enumerate(comment[1], 1) if c == ")"]
                    shape = next(s for s in starts if s.count("(") == s.count(")"))
                    found[cls.name, line] = None if isinstance(node, ast.Return) else names, shape
    return found


def assert_shape(tensor, shape, letters, where):
    """`shape` is a comment's text, an expression in the letters; a leading ... stands for any dimensions."""
    want, real = eval(shape, {}, letters), tuple(tensor.shape)
    assert (real if want[0] is not ... else (..., *real[1 - len(want):])) == want, f"{where}: {shape} is {real}"


def checked_call(module, x, letters, comments, reached, **options):
    """Call the module, and hold every shape comment that its own forward passes against the real shape."""
    last = None

    def trace(frame, event, value):
        nonlocal last
        if frame.f_code is not type(module).forward.__code__ or frame.f_locals["self"] is not module:
            return None  # another module: the letters have other values there
        line = (type(module).__name__, last)  # the line that is done, now that the next one, or the return, comes
        if event != "call" and line in comments:
            names, shape = comments[line]
            for tensor in [value] if names is None else [frame.f_locals[name] for name in names]:
                assert_shape(tensor, shape, letters, line)
                reached.add(line)
        last = frame.f_lineno
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return module(x, **options)
    finally:
        sys.settrace(before)


def test_every_shape_comment():
    """Each shape comment in a forward, and the shapes in its class's docstring, are what really comes out."""
    comments, reached = shape_comments(), set()
    for name, options, entering, letters in CASES:
        assert len(set(letters.values())) == len(letters), f"{name}: two letters have the same value"
        module, x = getattr(model, name)(**options), torch.randn([letters[letter] for letter in entering])
        for mode in (True, False):
            out = checked_call(module.train(mode), x, letters, comments, reached)
        if name == "Attention":
            out, weights = checked_call(module, x, letters, comments, reached, return_weights=True)
            assert_shape(weights, re.search(r"weights (\([^)]*\))", module.__doc__)[1], letters, "the docstring")
        documented = re.search(r"\b(?:x|images) (\([^)]*\))[^(]*?-> (?:the same|\w* ?(\([^)]*\)))", module.__doc__)
        if options.get("pool") != "distill":  # the docstring's "it takes both"
            assert_shape(out, documented[2] or str(tuple(x.shape)), letters, f"{name}'s docstring")
        assert name == "DropPath" or assert_shape(x, documented[1], letters, f"{name}'s docstring") is None
    modules = {name for name, c in vars(model).items() if isinstance(c, type) and issubclass(c, nn.Module)}
    assert modules == {name for name, *_ in CASES}
    assert comments and reached == set(comments), f"never reached: {sorted(set(comments) - reached)}"


def test_legend():
    """The letters in the shape comments are those of the legend: each is explained, and none for nothing."""
    legend = re.findall(r"  ([A-Z])  (?=\w)", model.__doc__)
    used = {letter for _, shape in shape_comments().values() for letter in re.findall(r"[A-Za-z]+", shape)}
    assert len(legend) == len(set(legend)) and used == set(legend)


def sources(name):
    """{name: source} of a class or function, after those of all that its docstring, and theirs, say they build on."""
    found, listed = {}, re.search(r"Builds on ([^.]*)\.", inspect.getdoc(getattr(model, name)))
    for other in re.findall(r"\w+", listed[1]) if listed else []:
        found.update(sources(other) if hasattr(model, other) else {})
    return {**found, name: inspect.getsource(getattr(model, name))}


@pytest.mark.parametrize("name, options, entering, letters", CASES)
def test_each_class_can_be_copied_out(name, options, entering, letters):
    """With what its docstring names, a class needs only torch."""
    namespace = {"torch": torch, "nn": nn, "F": F}
    exec("\n\n".join(sources(name).values()), namespace)
    namespace[name](**options)(torch.randn([letters[letter] for letter in entering]))


# ---------------------------------------------------------------------------------------------------------------------
# Compilers and GPUs

@CUDA
@pytest.mark.parametrize("N", [64, 65])
def test_attention_on_cuda(N):
    """Under bf16 autocast both paths' output and gradients are finite, and within bf16's rounding of float32."""
    x, attention = randn(8, N, 384).float().cuda(), model.Attention(384, 6).cuda()
    for options in ({}, {"return_weights": True}):
        results = []
        for cast in (False, True):
            with torch.autocast("cuda", torch.bfloat16, enabled=cast):
                out = attention(x, **options)
            out = (out[0] if options else out).float()
            results.append([out.detach(), *gradients(attention, out).values()])
        for want, real in zip(*results):
            assert bool(real.isfinite().all()) and float((real - want).norm() / want.norm()) < 0.02


@CUDA
@pytest.mark.parametrize("name, options", [("resnet18", {}), *itertools.product(
    ("vit", "hybrid"), ({}, dict(drop_path=0.1, pool="cls"), dict(encoder="builtin", gamma_init=None)))])
def test_models_on_cuda(name, options):
    """One training step's forward and backward pass under bf16: finite, and every parameter gets a gradient."""
    images, net = randn(16, 3, 32, 32).float().cuda(), model.build_model(name, **options)
    nn.init.normal_(net.cuda().head.weight, std=0.02)
    with torch.autocast("cuda", torch.bfloat16):
        loss = F.cross_entropy(net(images), torch.arange(16, device="cuda") % 10)
    loss.backward()
    assert math.isfinite(float(loss.detach())) and all(bool(p.grad.isfinite().all()) for p in net.parameters())
