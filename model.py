"""Vision Transformers for small images: the layers and the models, each written out in plain PyTorch.

From leaf to root: DropPath, LayerScale, Attention, MLP, Block, PatchEmbed, sine_positions, Encoder, classifier,
TwoHeads, ViT; then BasicBlock, resnet_trunk, ResNet18 and Hybrid (a ResNet-18 trunk whose feature map becomes the
tokens of the same encoder); last whiten, a start for the first layer, and build_model, which makes a model by name.
Each needs torch alone, or says what of this file it builds on: copy that along.

    from model import ViT
    logits = ViT(dim=384, depth=7, num_heads=6)(images)  # images (B, 3, 32, 32) float, normalised; logits (B, 10)

Letters in the shape comments:
    B  images in the batch          N  tokens of an image, as they enter     H  attention heads
    C  channels, as they enter      D  width of a token                      E  width of one head, D / H
    S  side of a square image       M  width of the MLP's hidden layer       K  classes
    P  side of a square patch       O  channels, as they leave               R  side of a feature map, as it leaves
    T  tokens in front of the image's, for its class and for a teacher's: 1 or 2
"""

import torch
import torch.nn.functional as F
from torch import nn


class DropPath(nn.Module):
    """Stochastic depth: leave a residual branch out, for a random part of the images (Huang et al. 2016, 1603.09382).

    x (B, ...) of any float dtype -> the same shape and dtype. In training each image loses its branch with
    probability `rate`, drawn anew for every image and call (the paper draws once for a batch), and the others are
    scaled by 1 / (1 - rate), so that the expected value is what evaluation computes, where nothing happens. ValueError
    unless 0 <= rate < 1.
    """

    def __init__(self, rate=0.0):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"the drop_path rate must be at least 0 and below 1, not {rate}")
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate
        # A mask, and not an index: dropped branches are computed too, but no shape depends on the draw, as compiled
        # code and CUDA graphs need.
        return x * keep.to(x.dtype) / (1 - self.rate)

    def extra_repr(self):
        return f"rate={self.rate}"


class LayerScale(nn.Module):
    """gamma: one learned factor per channel on a residual branch (CaiT, Touvron et al. 2021, 2103.17239).

    x (..., D) -> the same shape. All D factors start at `init`; 1 starts as a plain pre-norm Transformer. A small start
    makes every block begin near the identity, which lets deep encoders train: the paper has 0.1 for up to 18 blocks,
    and less for more. ViTs of 4 and 6 blocks did not need it here, and learnt more slowly with it (results/README.md,
    "What the runs say").
    """

    def __init__(self, dim, init=1.0):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x):
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q k^T / sqrt(E)) v in every head (Vaswani et al. 2017, 1706.03762).

    x (B, N, D) -> (B, N, D); with `return_weights` also the attention weights (B, H, N, N), whose rows sum to one.
    ValueError unless dim is divisible by num_heads.
    """

    def __init__(self, dim, num_heads):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"the width {dim} is not divisible by {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)  # queries, keys and values in one product
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, return_weights=False):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)  # (B, N, 3, H, E)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, E)
        if return_weights or (self.training and x.device.type == "cpu"):
            # The root of the head's width E, not of D: q . k has variance E if the entries have variance 1.
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, N, N)
            weights = scores.softmax(dim=-1)
            out = weights @ v  # (B, H, N, E)
        else:
            # The same in one kernel, which never writes the N x N weights to memory. It never gets a mask: there is
            # nothing to hide, and with a mask cuDNN's gradients for 64 tokens can be nan (pytorch issue 196678). On
            # CPUs its backward pass is slower than the lines above, in bf16 several times (README, "What is unusual
            # here").
            out = F.scaled_dot_product_attention(q, k, v)  # (B, H, N, E)
        out = self.proj(out.transpose(1, 2).reshape(B, N, D))  # (B, N, D)
        return (out, weights) if return_weights else out


class MLP(nn.Module):
    """Two linear layers with a GELU between them, on every token by itself. x (..., D) -> (..., D)."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        x = self.act(self.fc1(x))  # (B, N, M)
        return self.fc2(x)  # (B, N, D)


class Block(nn.Module):
    """One pre-norm Transformer block. Builds on Attention, MLP, LayerScale and DropPath.

    x (B, N, D) -> (B, N, D): x + drop_path(gamma * attention(norm(x))), then the same with the MLP. Normalising
    inside the branch leaves the sum itself untouched, so the gradient reaches every block undiminished (Xiong et al.
    2020, 2002.04745). `gamma_init=None` leaves gamma out. The layers start as torch's do; in an Encoder, init_weights
    starts them anew.
    """

    def __init__(self, dim, num_heads, mlp_ratio=4.0, drop_path=0.0, gamma_init=1.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.gamma1 = nn.Identity() if gamma_init is None else LayerScale(dim, gamma_init)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.gamma2 = nn.Identity() if gamma_init is None else LayerScale(dim, gamma_init)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = x + self.drop_path(self.gamma1(self.attn(self.norm1(x))))
        x = x + self.drop_path(self.gamma2(self.mlp(self.norm2(x))))
        return x


class PatchEmbed(nn.Module):
    """Cut the image into P x P patches and project each to a token (Dosovitskiy et al. 2021, 2010.11929).

    images (B, C, S, S) -> tokens (B, N, D) with N = (S / P)^2, row by row. The same numbers as a convolution with
    kernel and stride P, written as what it is: one matrix product. ValueError unless S is divisible by P.
    """

    def __init__(self, image_size=32, patch_size=4, in_channels=3, dim=384):
        super().__init__()
        if patch_size < 1 or image_size % patch_size:
            raise ValueError(f"the image side {image_size} is not divisible by the patch size {patch_size}")
        self.patch_size = patch_size
        self.num_tokens = (image_size // patch_size) ** 2
        fan_in = in_channels * patch_size**2
        self.proj = nn.Linear(fan_in, dim)
        # Normalised pixels have unit variance; so should tokens, or the position embeddings' scale means nothing.
        nn.init.trunc_normal_(self.proj.weight, std=fan_in**-0.5)
        nn.init.zeros_(self.proj.bias)

    def forward(self, images):
        B, C, S, _ = images.shape
        P = self.patch_size
        x = images.view(B, C, S // P, P, S // P, P)  # (B, C, S/P, P, S/P, P)
        x = x.permute(0, 2, 4, 1, 3, 5)  # (B, S/P, S/P, C, P, P)
        x = x.reshape(B, self.num_tokens, C * P * P)  # (B, (S/P)**2, C*P*P)
        return self.proj(x)  # (B, (S/P)**2, D)


def sine_positions(num_tokens, dim):
    """Position embeddings of a square grid of tokens, row by row, (N, D).

    The D numbers are, in quarters: sines of the row, its cosines, sines of the column, its cosines.
    Neighbours are alike, which random vectors would have to learn. The frequencies fall from 1 radian a token to 0.1;
    to 1 / 10,000, as for long texts (Vaswani et al. 2017, 1706.03762), most would hardly vary over a small image.
    ValueError unless the grid is square and D divisible by 4.
    """
    side = round(num_tokens**0.5)
    if side**2 != num_tokens:
        raise ValueError(f"sine positions need a square grid, not {num_tokens} tokens")
    if dim % 4:
        raise ValueError(f"sine positions need a width divisible by 4, not {dim}")
    frequency = 0.1 ** torch.linspace(0, 1, dim // 4)  # (D/4)
    angle = torch.arange(side)[:, None] * frequency  # (side, D/4)
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, D/2)
    row, col = wave.repeat_interleave(side, dim=0), wave.repeat(side, 1)  # (N, D/2)
    return torch.cat([row, col], dim=1)  # (N, D)


class Encoder(nn.Module):
    """Tokens in, one feature vector per image out. Builds on Block and sine_positions.

    x (B, N, D) -> (B, D): adds learned position embeddings (and a class token in front, with pool="cls"), runs `depth`
    blocks and a final LayerNorm, and takes the class token, or the mean over all tokens (pool="mean"). pool="distill"
    puts a distillation token beside the class token, and takes both: (B, 2, D), for TwoHeads.
    pos_init says what the position embeddings start from: "noise" that is small beside the tokens, or "sine",
    sine_positions, about as large as they are. The DropPath rate grows linearly with depth, from 0 in the first block
    to `drop_path` in the last. encoder="builtin" puts torch's nn.TransformerEncoder in the place of our blocks:
    pre-norm and GELU as well, but without gamma and DropPath. ValueError for an unknown pool, pos_init or encoder, or
    for options that "builtin" does not have.
    """

    def __init__(self, num_tokens, dim, depth, num_heads, mlp_ratio=4.0, drop_path=0.0, gamma_init=1.0,
                 pool="mean", pos_init="noise", encoder="explicit"):
        super().__init__()
        if pool not in ("mean", "cls", "distill"):
            raise ValueError(f"unknown pool {pool!r}: choose mean, cls or distill")
        if pos_init not in ("noise", "sine"):
            raise ValueError(f"unknown pos_init {pos_init!r}: choose noise or sine")
        if encoder not in ("explicit", "builtin"):
            raise ValueError(f"unknown encoder {encoder!r}: choose explicit or builtin")
        if depth < 1:
            raise ValueError(f"the encoder needs a depth of at least 1, not {depth}")
        self.pool = pool
        extra_tokens = {"mean": 0, "cls": 1, "distill": 2}[pool]
        # (1, T, D): the class token, and with "distill" beside it the one that a teacher teaches (distill.py).
        self.cls_token = nn.Parameter(torch.zeros(1, extra_tokens, dim)) if extra_tokens else None
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens + extra_tokens, dim))
        if encoder == "explicit":
            rates = [drop_path * (i / (depth - 1) if depth > 1 else 1) for i in range(depth)]
            self.blocks = nn.Sequential(*[Block(dim, num_heads, mlp_ratio, rate, gamma_init) for rate in rates])
        else:
            if drop_path or gamma_init is not None:
                raise ValueError("torch's built-in encoder has no DropPath and no gamma: leave both out "
                                 "(drop_path=0, gamma_init=None)")
            if num_heads < 1 or dim % num_heads:  # as our Attention says it; torch's fails in an assertion
                raise ValueError(f"the width {dim} is not divisible by {num_heads} heads")
            layer = nn.TransformerEncoderLayer(dim, num_heads, int(dim * mlp_ratio), dropout=0.0, activation="gelu",
                                               batch_first=True, norm_first=True)
            self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(dim)
        self.init_weights(depth)
        if pos_init == "sine":
            with torch.no_grad():
                self.pos_embed[0, extra_tokens:] = sine_positions(num_tokens, dim)

    def init_weights(self, depth):
        """Matrices and embeddings from a normal of standard deviation 0.02 (trunc_normal_ cuts at 2, far beyond it),
        biases zero, norms as they are.

        0.02 keeps a branch's output well below its input at every width used here. Each block adds two branches to the
        same sum; with their last layers divided by sqrt(2 * depth) the sum's variance does not grow with depth (GPT-2).
        """
        for name, parameter in self.named_parameters():
            last = name.endswith(("proj.weight", "fc2.weight", "linear2.weight"))  # of a branch, in either encoder
            if parameter.ndim >= 2:
                nn.init.trunc_normal_(parameter, std=0.02 / (2 * depth) ** 0.5 if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x):
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, T+N, D)
        x = self.norm(self.blocks(x + self.pos_embed))
        if self.pool == "distill":
            return x[:, :2]  # (B, T, D)
        return x[:, 0] if self.pool == "cls" else x.mean(dim=1)  # (B, D)


def classifier(dim, num_classes):
    """The last linear layer, (B, D) -> (B, K). It starts at zero: all classes equally likely, a loss of ln K."""
    head = nn.Linear(dim, num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class TwoHeads(nn.Module):
    """A classifier each for the class token and the distillation token (DeiT, Touvron et al. 2021, 2012.12877).

    x (B, 2, D) -> (B, K), the mean of both heads' logits, as in DeiT's code; but in training (B, 2, K), where the
    labels teach the first and another model the second. Builds on classifier.
    """

    def __init__(self, dim, num_classes):
        super().__init__()
        self.by_label = classifier(dim, num_classes)
        self.by_teacher = classifier(dim, num_classes)

    def forward(self, x):
        logits = torch.stack([self.by_label(x[:, 0]), self.by_teacher(x[:, 1])], dim=1)  # (B, 2, K)
        return logits if self.training else logits.mean(dim=1)


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al. 2021, 2010.11929). Builds on PatchEmbed, Encoder, TwoHeads and classifier.

    images (B, C, S, S), float, normalised -> logits (B, K). The options are those of PatchEmbed and Encoder; with
    pool="distill" the logits are TwoHeads'.
    """

    def __init__(self, num_classes=10, image_size=32, in_channels=3, patch_size=4, dim=384, depth=7, num_heads=6,
                 **options):
        super().__init__()
        self.patch_embed = PatchEmbed(image_size, patch_size, in_channels, dim)
        self.encoder = Encoder(self.patch_embed.num_tokens, dim, depth, num_heads, **options)
        self.head = (TwoHeads if self.encoder.pool == "distill" else classifier)(dim, num_classes)

    def forward(self, images):
        x = self.patch_embed(images)  # (B, (S/P)**2, D)
        x = self.encoder(x)  # (B, D), or (B, 2, D) with pool="distill"
        return self.head(x)  # (B, K), or (B, 2, K) in training with pool="distill"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them (He et al. 2016, 1512.03385, figure 5). Needs torch alone.

    x (B, C, S, S) -> (B, O, R, R); R is S, or S / 2 with downsample="stride" or "pool". "stride" is ResNet's own:
    the first convolution steps over every other pixel. "pool" computes it everywhere and keeps the largest of each
    2 x 2: four times the arithmetic in that layer. ResNet's own activation is "relu"; the other is "gelu". ValueError
    for any other downsample or activation.
    """

    def __init__(self, in_channels, out_channels, downsample=None, activation="relu"):
        super().__init__()
        if downsample not in (None, "stride", "pool"):
            raise ValueError(f"unknown downsample {downsample!r}: choose stride or pool")
        if activation not in ("relu", "gelu"):
            raise ValueError(f"unknown activation {activation!r}: choose relu or gelu")
        stride = 2 if downsample == "stride" else 1
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2) if downsample == "pool" else nn.Identity()
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.act = nn.GELU() if activation == "gelu" else nn.ReLU()
        if downsample is None and in_channels == out_channels:
            self.shortcut = nn.Identity()
        else:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(self.pool, conv, nn.BatchNorm2d(out_channels))
        # Initialisation is torch's own: a BatchNorm follows every convolution, so the scale of a kernel does not reach
        # the output. The last BatchNorm's gamma starts at 1, not at 0 as for very large batches: AdamW moves it by
        # about the learning rate a step, so a short run would spend hundreds of steps near 0.

    def forward(self, x):
        y = self.act(self.norm1(self.pool(self.conv1(x))))  # (B, O, R, R)
        y = self.norm2(self.conv2(y))
        return self.act(y + self.shortcut(x))  # (B, O, R, R)


def resnet_trunk(in_channels=3, widths=(64, 128, 256, 512), depths=(2, 2, 2, 2), downsample="stride",
                 activation="relu"):
    """The convolutional part of a ResNet for small images, as an nn.Sequential. Builds on BasicBlock.

    images (B, C, S, S) -> features (B, O, R, R) with O = widths[-1] and R = S / 2^(stages - 1). The CIFAR stem: a 3x3
    convolution at full resolution and no max-pooling. Stage i has depths[i] blocks of widths[i] channels, and each
    stage but the first halves the side. ValueError unless there is one depth per width, and a block wherever the
    side halves.
    """
    if not widths or len(widths) != len(depths) or not all(depths[1:]):
        raise ValueError(f"widths {widths} and depths {depths} do not fit together")
    if downsample not in ("stride", "pool"):
        raise ValueError(f"unknown downsample {downsample!r}: choose stride or pool")
    if activation not in ("relu", "gelu"):
        raise ValueError(f"unknown activation {activation!r}: choose relu or gelu")
    act = nn.GELU() if activation == "gelu" else nn.ReLU()
    layers = [nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), act]
    channels = widths[0]
    for stage, (width, depth) in enumerate(zip(widths, depths)):
        for block in range(depth):
            layers.append(BasicBlock(channels, width, downsample if block == 0 and stage > 0 else None, activation))
            channels = width
    return nn.Sequential(*layers)


class ResNet18(nn.Module):
    """ResNet-18 with the CIFAR stem (He et al. 2016, 1512.03385). Builds on resnet_trunk and classifier.

    images (B, C, S, S), float, normalised -> logits (B, K). The other options, those of resnet_trunk,
    shrink it for a CPU.
    """

    def __init__(self, num_classes=10, in_channels=3, widths=(64, 128, 256, 512), depths=(2, 2, 2, 2),
                 downsample="stride", activation="relu"):
        super().__init__()
        self.trunk = resnet_trunk(in_channels, widths, depths, downsample, activation)
        self.head = classifier(widths[-1], num_classes)

    def forward(self, images):
        x = self.trunk(images)  # (B, O, R, R)
        x = x.mean(dim=(2, 3))  # (B, O)
        return self.head(x)  # (B, K)


class Hybrid(nn.Module):
    """A ResNet-18 trunk whose feature map becomes the tokens of a Transformer. Builds on resnet_trunk, Encoder,
    TwoHeads and classifier.

    images (B, C, S, S), float, normalised -> logits (B, K). By default the trunk is the first three stages of
    ResNet-18: 32 x 32 pixels become 8 x 8 features of 256 channels, 64 tokens like those of a ViT with patch size 4,
    but each sees a wide neighbourhood. The convolutions find local patterns, attention relates them across the image.
    ValueError unless S is divisible by the trunk's stride.
    """

    def __init__(self, num_classes=10, image_size=32, in_channels=3, widths=(64, 128, 256), depths=(2, 2, 2),
                 downsample="stride", activation="relu", dim=256, depth=6, num_heads=4, **options):
        super().__init__()
        stride = 2 ** (len(widths) - 1)
        if image_size % stride:
            raise ValueError(f"the image side {image_size} is not divisible by the trunk's stride {stride}")
        self.trunk = resnet_trunk(in_channels, widths, depths, downsample, activation)
        self.proj = nn.Linear(widths[-1], dim)  # a 1x1 convolution: the same matrix on every position
        nn.init.trunc_normal_(self.proj.weight, std=widths[-1] ** -0.5)
        nn.init.zeros_(self.proj.bias)
        self.encoder = Encoder((image_size // stride) ** 2, dim, depth, num_heads, **options)
        self.head = (TwoHeads if self.encoder.pool == "distill" else classifier)(dim, num_classes)

    def forward(self, images):
        x = self.trunk(images)  # (B, O, R, R)
        x = x.flatten(2).transpose(1, 2)  # (B, R*R, O)
        x = self.proj(x)  # (B, R*R, D)
        x = self.encoder(x)  # (B, D), or (B, 2, D) with pool="distill"
        return self.head(x)  # (B, K), or (B, 2, K) in training with pool="distill"


@torch.no_grad()
def whiten(layer, images):
    """Let a model's first layer, a convolution or a PatchEmbed, start from the principal components of the images.

    images (B, C, S, S), float, normalised, on the layer's device. Changes the layer's weight, (O, C, P, P) or
    (D, C*P*P), in place. Neighbouring pixels are nearly equal, so a random filter mostly measures a patch's mean
    colour. The components are uncorrelated (whitened patches: Jordan 2024, 2404.00498, section 3.2; there they stay as
    they are, here they are trained). Builds on PatchEmbed.
    """
    P = layer.patch_size if isinstance(layer, PatchEmbed) else layer.kernel_size[0]
    patches = F.unfold(images.double(), P, stride=P)  # (B, C*P*P, patches)
    patches = patches.transpose(1, 2).flatten(0, 1)  # (B*patches, C*P*P)
    # The strengths (C*P*P), the weakest first, and the components, the columns of (C*P*P, C*P*P).
    variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))
    if isinstance(layer, PatchEmbed):
        # The same random mixture as before, of components of equal strength. About half of a 4 x 4 patch's components
        # have less variance than 0.01: noise, which stays weaker. So the tokens' variance falls from 1 to about a half.
        equal = components * (variances.clamp(min=0) + 0.01) ** -0.5  # (C*P*P, C*P*P)
        layer.proj.weight.copy_(layer.proj.weight.double() @ equal.T)  # (D, C*P*P)
    else:
        # Each component twice, with both signs, as the activation cuts the negative side off. Their strengths do not
        # matter: the BatchNorm that follows makes them equal.
        strongest = components.T.flip(0)[: len(layer.weight) // 2]  # (at most O/2, C*P*P)
        filters = torch.cat([strongest, -strongest]).view(-1, *layer.weight.shape[1:])  # (at most O, C, P, P)
        layer.weight[: len(filters)] = filters.to(layer.weight)  # channels beyond 2 C P^2 stay as they are


# Each has a `head`, and a `trunk` or a `patch_embed` that comes first: train.py looks for the layers at both ends.
MODELS = {"vit": ViT, "hybrid": Hybrid, "resnet18": ResNet18}


def build_model(name, **options):
    """The model of that name (vit, hybrid or resnet18) with the options of its class. ValueError for another name."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    return MODELS[name](**options)
