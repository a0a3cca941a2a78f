"""
The prior: a GPT that writes the tokens of an image, coarse to fine, so that wherever it stops there is an image.

    class ──────────────────────┐                                    ┌── caption ── text encoder ── states (B, M, E)
    [SOS + class, t0, t1, ...] (B, T, D) ── blocks: look back, look at the text, think ── head ── logits (B, T, V)
                                                                        output i says what token i is likely to be

Paper: FlexTok, arXiv 2502.13967, section 3.3; the model is LlamaGen's (arXiv 2406.06525) with learned positions. Numerically
equal to the official FlexAR code (test_all.py, section ar), but it keeps keys and values (KV cache), computes those of the
text once, and its loss never holds the logits of a whole batch.
Letters: B batch, T tokens, D width, nh hd heads and head size, V vocabulary, M text length, E width of the text states.

    python ar.py            # prints who sees whom, and the sizes of the paper's priors          Next: train_ar.py
"""
import functools
import math
import os
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from common import UserError, load_tensors, load_weights, read_json, save_tensors, write_json
from text import CaptionEncoder


@dataclass
class GPTConfig:
    """Sizes of a prior. The defaults are the paper's 85M, without a condition."""
    vocab_size: int = 64_000          # V, of the tokenizer's FSQ
    length: int = 256                 # T, the most tokens it can write
    width: int = 768
    depth: int = 12
    head_dim: int = 64
    hidden: int = 0                   # of SwiGLU; 0: 8/3 of the width, rounded up to a multiple of 256
    classes: int = 0                  # how many classes it can be asked for; 0: none
    text_width: int = 0               # E, width of the text states it looks at; 0: no text
    levels: tuple = ()                # FSQ's, to split tokens into two halves, see SplitHead; (): a vector for each, official
    cfg_scale: float = 1.0            # the guidance that its maker recommends; 1.0: none
    # what released checkpoints may do differently; the defaults are the paper's
    norm: str = "rms"                 # rms, layer, or layer_nobias
    norm_eps: float = 1e-5
    qk_norm: str = ""                 # norm of the self-attention's queries and keys; "" is none
    cross_qk_norm: str = ""           # and of the cross-attention's
    qk_norm_eps: float = 1e-6
    activation: str = "swiglu"        # swiglu, geglu, or without the gate gelu, gelu_tanh
    attention_scale: float = 0.0      # of the self-attention's logits; 0: 1/√head_dim
    text_activation: str = "gelu_tanh"  # between the two layers that project the text: gelu_tanh or gelu
    positions: bool = True            # a learned vector for each position
    post_norm: bool = True            # a norm after the last block
    head_norm: bool = False           # a LayerNorm before the head
    biases: tuple = ()                # linear layers that have one: qkv, proj, mlp, cross_qkv, cross_proj, head, text


# The paper's class-conditional priors: name -> (width, depth), named after what is in the blocks, 12·width²·depth
SIZES = {"49M": (640, 10), "85M": (768, 12), "201M": (1024, 16), "393M": (1280, 20), "679M": (1536, 24), "1.33B": (1920, 30)}


# ---------------------------------------------------------------------------------------------------------------
# Parts of a block. Attribute names are those of the released checkpoints.


def make_norm(kind, width, eps):
    """RMSNorm (arXiv 1910.07467) or LayerNorm over the last axis; both compute in float32 whatever they are given."""
    if kind == "rms":
        return nn.RMSNorm(width, eps=eps)
    if kind in ("layer", "layer_nobias"):
        return nn.LayerNorm(width, eps=eps, bias=kind == "layer")
    raise ValueError(f"norm {kind!r}: expected rms, layer or layer_nobias")


class SelfAttention(nn.Module):
    """Causal self-attention. In training over a whole sequence; with `past`, over what was kept as well."""

    def __init__(self, config):
        super().__init__()
        D, self.head_dim = config.width, config.head_dim
        self.scale = config.attention_scale or self.head_dim**-0.5
        self.qkv = nn.Linear(D, 3 * D, bias="qkv" in config.biases)
        self.proj = nn.Linear(D, D, bias="proj" in config.biases)
        add_qk_norm(self, config.qk_norm, config)

    def forward(self, x, past=None, positions=None):
        """x (B, n, D) -> (B, n, D). past: keys and values, each (B, nh, T, hd), into which those of x are written at
        `positions` (n,) int64, and which x then looks at, up to its own position."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))  # (B, nh, n, hd)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if past is None:
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)           # (B, nh, n, hd)
        else:
            keys, values = past
            keys.index_copy_(2, positions, k.to(keys.dtype))  # in place, at one address: a CUDA graph can replay it
            values.index_copy_(2, positions, v.to(keys.dtype))
            seen = torch.arange(keys.shape[2], device=x.device) <= positions[:, None]               # (n, T)
            x = F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, attn_mask=seen, scale=self.scale)  # (B, nh, n, hd)
        return self.proj(x.transpose(1, 2).flatten(2))                            # (B, n, D)


class CrossAttention(nn.Module):
    """Tokens look at the text. The text's keys and values do not depend on the tokens: `keys_values` is called once."""

    def __init__(self, config):
        super().__init__()
        D, self.head_dim = config.width, config.head_dim
        self.Wq, self.Wk, self.Wv = (nn.Linear(D, D, bias="cross_qkv" in config.biases) for _ in range(3))
        self.proj = nn.Linear(D, D, bias="cross_proj" in config.biases)
        add_qk_norm(self, config.cross_qk_norm, config)

    def split(self, x):
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)               # (B, n, D) -> (B, nh, n, hd)

    def keys_values(self, text):
        """Projected text (B, M, D) -> keys and values, each (B, nh, M, hd)."""
        values = self.split(self.Wv(text))
        return self.k_norm(self.split(self.Wk(text))).to(values.dtype), values

    def forward(self, x, keys, values, text_mask):
        """x (B, n, D); keys, values (B, nh, M, hd); text_mask (B, 1, 1, M), True where there is text -> (B, n, D)."""
        q = self.q_norm(self.split(self.Wq(x))).to(values.dtype)                  # (B, nh, n, hd)
        x = F.scaled_dot_product_attention(q, keys, values, attn_mask=text_mask)  # (B, nh, n, hd)
        return self.proj(x.transpose(1, 2).flatten(2))                            # (B, n, D)


def add_qk_norm(attention, kind, config):
    """Give an attention layer its q_norm and k_norm, per head; with kind "" they do nothing."""
    for name in ("q_norm", "k_norm"):
        attention.add_module(name, make_norm(kind, config.head_dim, config.qk_norm_eps) if kind else nn.Identity())


class MLP(nn.Module):
    """fc2(SiLU(fc1 x) · fc3 x), (B, n, D) -> (B, n, D): SwiGLU (arXiv 2002.05202). Or with GELU, or without the gate fc3."""

    def __init__(self, config):
        super().__init__()
        D, hidden, bias = config.width, hidden_size(config), "mlp" in config.biases
        if config.activation not in ("swiglu", "geglu", "gelu", "gelu_tanh"):
            raise ValueError(f"activation {config.activation!r}: expected swiglu, geglu, gelu or gelu_tanh")
        self.activation = {"swiglu": F.silu, "geglu": F.gelu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}[
            config.activation]
        self.fc1 = nn.Linear(D, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, D, bias=bias)
        self.fc3 = nn.Linear(D, hidden, bias=bias) if config.activation in ("swiglu", "geglu") else None

    def forward(self, x):
        hidden = self.activation(self.fc1(x))                                     # (B, n, hidden)
        return self.fc2(hidden if self.fc3 is None else hidden * self.fc3(x))


def hidden_size(config):
    """8/3 of the width, so that three matrices cost what two of 4 times the width would, rounded up: 768 -> 2048."""
    return config.hidden or -(-int(2 / 3 * 4 * config.width) // 256) * 256


class Block(nn.Module):
    """x += attn(norm_1 x); x += mlp(norm_2 x)."""

    def __init__(self, config):
        super().__init__()
        self.norm_1, self.norm_2 = (make_norm(config.norm, config.width, config.norm_eps) for _ in range(2))
        self.attn = SelfAttention(config)
        self.mlp = MLP(config)

    def forward(self, x, text=None, past=None, positions=None):
        x = x + self.attn(self.norm_1(x), past, positions)
        return x + self.mlp(self.norm_2(x))


class TextBlock(nn.Module):
    """x += self_attn(norm_1 x); x += cross_attn(norm_2 x, text); x += mlp(norm_3 x). The text itself is not normalised."""

    def __init__(self, config):
        super().__init__()
        self.norm_1, self.norm_2, self.norm_3 = (make_norm(config.norm, config.width, config.norm_eps) for _ in range(3))
        self.self_attn = SelfAttention(config)
        self.cross_attn = CrossAttention(config)
        self.mlp = MLP(config)

    def forward(self, x, text, past=None, positions=None):
        """text: keys, values and mask, as `CrossAttention.forward` takes them."""
        x = x + self.self_attn(self.norm_1(x), past, positions)
        x = x + self.cross_attn(self.norm_2(x), *text)
        return x + self.mlp(self.norm_3(x))


class DigitTable(nn.Module):
    """A vector for each of the Π levels values of a few FSQ digits, (Π levels, D): the sum of its digits' vectors, and one of its own.

    FSQ's digits mean something by themselves: what a digit says is learned from all tokens that have it, an eighth or a fifth
    of them. The own vectors, which begin small, learn what a sum cannot say.
    """

    def __init__(self, levels, width, std):
        super().__init__()
        self.digits = nn.ParameterList(torch.randn(count, width) * std for count in levels)
        self.own = nn.Parameter(torch.randn(math.prod(levels), width) * std / 2)

    def forward(self):
        table = torch.zeros_like(self.own[:1])                                    # (1, D)
        for digit in self.digits:  # the first is the least significant, so it runs fastest
            table = (digit[:, None] + table).flatten(0, 1)                        # (its levels x those before, D)
        return table + self.own                                                   # (Π levels, D)


def in_halves(levels):
    """FSQ's first digits and its last: of these a token is made, low half and high half. (8, 8, 8), (5, 5, 5): 512 and 125 values."""
    return levels[:len(levels) // 2], levels[len(levels) // 2:]


class SplitEmbedding(nn.Module):
    """Tokens (B, n) -> vectors (B, n, D): that of the token's low half plus that of its high half; token = low + 512·high.

    For small priors. 64,000 tokens are too many to meet each of them in a run of minutes, and a table of them would be most of
    the model. But a token is a number of 6 digits: see `DigitTable`.
    """

    def __init__(self, levels, width):
        super().__init__()
        self.low, self.high = (DigitTable(half, width, std=0.2) for half in in_halves(levels))

    def forward(self, tokens):
        low, high = self.low(), self.high()                                       # (512, D), (125, D)
        return F.embedding(tokens % len(low), low) + F.embedding(tokens // len(low), high)        # (B, n, D)


class SplitHead(nn.Module):
    """p(token) = p(low half) · p(high half, given the low one): two small softmaxes in place of one of 64,000.

    Any distribution over the tokens can be written so. The loss needs 512 + 125 logits per token: with a full table it takes
    more time than all blocks of a small prior. Sizes below are those of the usual levels. Not official, and cannot be written out
    as the official table.
    """

    def __init__(self, levels, width):
        super().__init__()
        low, high = in_halves(levels)
        # zeros: all tokens are equally likely at first, and the first loss is ln V
        self.low, self.low_bias = DigitTable(low, width, std=0.0), nn.Parameter(torch.zeros(math.prod(low)))
        self.high, self.high_bias = DigitTable(high, width, std=0.0), nn.Parameter(torch.zeros(math.prod(high)))
        self.given_low = DigitTable(low, width, std=0.2)
        self.hidden = nn.Linear(width, width)

    def of_low(self, x):
        """x (..., D) -> logits (..., 512)."""
        return F.linear(x, self.low(), self.low_bias)                             # (..., 512)

    def of_high(self, x, low):
        """x (..., D), the vectors of low halves (..., D) -> logits (..., 125)."""
        return F.linear(F.silu(self.hidden(x) + low), self.high(), self.high_bias)  # (..., 125)

    def forward(self, x):
        """x (..., D) -> log p, which are logits, of all tokens: (..., V)."""
        low = self.of_low(x).float().log_softmax(-1)                              # (..., 512)
        high = self.of_high(x[..., None, :], self.given_low()).float().log_softmax(-1)            # (..., 512, 125)
        return (low[..., None] + high).transpose(-1, -2).flatten(-2)              # (..., 125·512), the low half fastest

    def loss(self, x, targets):
        """x (n, D), targets (n,) -> mean of -log p in nats, and each one's (n,), without gradient."""
        low, high = targets % len(self.low_bias), targets // len(self.low_bias)   # (n,) each
        of_high = self.of_high(x, F.embedding(low, self.given_low()))             # (n, 125)
        each = (F.cross_entropy(self.of_low(x).float(), low, reduction="none")
                + F.cross_entropy(of_high.float(), high, reduction="none"))       # (n,)
        return each.mean(), each.detach()


class Preprocessor(nn.Module):
    """Tokens and class -> what the blocks read: a learned start vector, then the tokens, each with its position."""

    def __init__(self, config):
        super().__init__()
        self.embedding = SplitEmbedding(config.levels, config.width) if config.levels else nn.Embedding(config.vocab_size, config.width)
        self.sos_token_embed = nn.Parameter(torch.empty(1, 1, config.width))
        self.positional_embedding = nn.Parameter(torch.empty(config.length, config.width)) if config.positions else None
        self.cls_embedding = nn.Embedding(config.classes, config.width) if config.classes else None

    def forward(self, tokens, labels=None):
        """tokens (B, n) -> (B, n + 1, D), the start first. labels (B,) or None: a class is added to the start; -1 adds nothing."""
        B, n = tokens.shape
        x = torch.cat([self.sos_token_embed.expand(B, -1, -1), self.embedding(tokens)], 1)         # (B, n + 1, D)
        if self.positional_embedding is not None:
            x = x + self.positional_embedding[:n + 1]
        if labels is not None:
            # Trap: the official code zeroes -1 in the caller's own tensor, so that from the second token on its
            # "unconditional" half is asked for class 0. Here labels are only read.
            known = (labels >= 0)[:, None]                                        # (B, 1)
            start = x[:, :1] + (self.cls_embedding(labels.clamp(min=0)) * known)[:, None]           # (B, 1, D)
            x = torch.cat([start, x[:, 1:]], 1)                                   # (B, n + 1, D)
        return x

    def next(self, tokens, position):
        """tokens (B, 1), just written, and the position (1,) at which they are read -> (B, 1, D)."""
        x = self.embedding(tokens)                                                # (B, 1, D)
        return x if self.positional_embedding is None else x + self.positional_embedding[position]


class Trunk(nn.Module):
    """All blocks and the norm after them."""

    def __init__(self, config):
        super().__init__()
        self.blocks = nn.ModuleList((TextBlock if config.text_width else Block)(config) for _ in range(config.depth))
        self.post_trunk_norm = make_norm(config.norm, config.width, config.norm_eps) if config.post_norm else nn.Identity()


class Head(nn.Module):
    """(B, n, D) -> logits (B, n, V). Not tied to the embedding."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=1e-5) if config.head_norm else nn.Identity()
        self.linear = (SplitHead(config.levels, config.width) if config.levels else
                       nn.Linear(config.width, config.vocab_size, bias="head" in config.biases))

    def forward(self, x):
        return self.linear(self.norm(x))

    def loss(self, x, targets):
        """x (n, D), targets (n,) -> mean cross-entropy in nats, and each one's (n,), without gradient."""
        if isinstance(self.linear, SplitHead):
            return self.linear.loss(self.norm(x), targets)
        return cross_entropy(self.norm(x), self.linear.weight, self.linear.bias, targets)


class TextMLP(nn.Module):
    """Text states (B, M, E) -> (B, M, D): what cross-attention reads."""

    def __init__(self, config):
        super().__init__()
        self.approximate = {"gelu_tanh": "tanh", "gelu": "none"}[config.text_activation]
        self.fc1 = nn.Linear(config.text_width, config.text_width, bias="text" in config.biases)
        self.fc2 = nn.Linear(config.text_width, config.width, bias="text" in config.biases)

    def forward(self, states):
        return self.fc2(F.gelu(self.fc1(states), approximate=self.approximate))


# ---------------------------------------------------------------------------------------------------------------
# The loss


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of logits = hidden·weightᵀ + bias, `chunk` rows at a time. Use it through `cross_entropy`.

    With 64,000 tokens to choose from, the logits of 32 images x 256 tokens are 2 GB in float32, and autograd would keep
    them, and their softmax, until the backward pass. But their gradient is known as soon as they are:
    d loss / d logits = softmax(logits) - onehot(target). So it is made right here, multiplied through, and thrown away.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk):
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else weight.dtype
        W, n, bias = weight.to(dtype), len(targets), None if bias is None else bias.to(dtype)    # (V, D)
        losses = torch.empty(n, device=hidden.device)
        d_hidden = torch.empty_like(hidden)                                       # (n, D)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)                  # (V, D)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, n, chunk):
                rows, target = slice(start, start + chunk), targets[start:start + chunk, None]  # (chunk, 1)
                h = hidden[rows].to(dtype)                                        # (chunk, D)
                logits = F.linear(h, W, bias)                                     # (chunk, V)
                top, at = logits.max(1, keepdim=True)                             # (chunk, 1) each
                picked = logits.gather(1, target)                                 # (chunk, 1)
                d = logits.softmax(1)  # (chunk, V); sums in float32 even where it writes bfloat16
                # -log p(target) = logsumexp - picked, and logsumexp from the likeliest token, whose p cannot underflow
                losses[rows] = (top.float() - d.gather(1, at).float().log() - picked.float())[:, 0]
                d[torch.arange(len(h), device=h.device), target[:, 0]] -= 1       # softmax - onehot
                if bias is not None:
                    d_bias += d.sum(0, dtype=torch.float32)
                d_hidden[rows] = (d @ W).to(hidden.dtype)
                d_weight += d.T @ h
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.n, ctx.dtype = n, weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.mean(), losses

    @staticmethod
    def backward(ctx, d_mean, _):
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        scale = d_mean / ctx.n
        return d_hidden * scale, (d_weight * scale).to(ctx.dtype), None if d_bias is None else d_bias * scale, None, None


def cross_entropy(hidden, weight, bias, targets, chunk=0):
    """hidden (n, D), weight (V, D), bias (V,) or None, targets (n,) -> mean loss in nats, and each one's (n,), without gradient.

    Equal to F.cross_entropy(F.linear(hidden, weight, bias), targets), value and gradients, up to rounding. Memory: chunk·V
    logits and, with gradient, V·D float32. chunk 0: 256 on a CPU, 2048 elsewhere.
    """
    chunk = chunk or (256 if hidden.device.type == "cpu" else 2048)
    if not torch.is_grad_enabled():
        losses = torch.cat([F.cross_entropy(F.linear(h, weight, bias).float(), t, reduction="none")
                            for h, t in zip(hidden.split(chunk), targets.split(chunk))])          # (n,)
        return losses.mean(), losses
    return ChunkedCrossEntropy.apply(hidden, weight, bias, targets, chunk)


# ---------------------------------------------------------------------------------------------------------------
# Sampling


def probabilities(logits, temperature=1.0, top_k=0, top_p=0.0):
    """logits (..., V) -> probabilities (..., V) float32. top_k: keep the k likeliest; top_p: the likeliest that together reach
    p (nucleus, arXiv 1904.09751), after top_k; 0 turns either off. temperature > 0."""
    logits = logits.float() / temperature
    if top_k > 0:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]        # (..., 1)
        logits = logits.masked_fill(logits < least, -torch.inf)  # what equals the k-th stays
    if top_p > 0:
        ascending, order = logits.sort(-1)                                        # (..., V)
        tail = ascending.softmax(-1).cumsum(-1) <= 1 - top_p                      # (..., V)
        tail[..., -1] = False  # the likeliest always stays
        logits = logits.masked_fill(torch.zeros_like(tail).scatter(-1, order, tail), -torch.inf)
    return logits.softmax(-1)


def choose(logits, temperature, top_k, top_p, generator):
    """logits (B, V) -> tokens (B, 1): drawn, or at temperature 0 the likeliest."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    p = probabilities(logits, temperature, top_k, top_p)                          # (B, V)
    # Where the cumulative sum passes a uniform number. Only B numbers come from the generator's device, and what has
    # probability 0 adds nothing to the sum: it is never passed there.
    sums = p.cumsum(-1)                                                           # (B, V)
    u = torch.rand(len(p), 1, generator=generator, device=p.device if generator is None else generator.device).to(p.device)
    return torch.searchsorted(sums, u * sums[:, -1:], right=True).clamp(max=p.shape[-1] - 1)     # (B, 1)


@functools.cache
def compiled_step():
    """`GPT.step`, compiled once for all models; on CUDA it is replayed as a CUDA graph, which spares a launch per kernel."""
    return torch.compile(GPT.step, mode="reduce-overhead", dynamic=False)


@dataclass
class Cache:
    """What `generate` keeps from token to token, per block: keys and values (B, nh, T, hd) of the tokens so far, and keys,
    values (B, nh, M, hd) and mask (B, 1, 1, M) of the text (None without text)."""
    past: list
    text: list


# ---------------------------------------------------------------------------------------------------------------
# GPT


class GPT(nn.Module):
    """The prior.

    >>> gpt = GPT.from_pretrained("assets/emoji64/prior")
    >>> tokens = gpt.generate(labels=torch.tensor([3, 3]), k=16, cfg_scale=1.5)   # (2, 16)
    >>> images = tokenizer.detokenize(list(tokens))
    """

    def __init__(self, config, text_encoder=None):
        """text_encoder: a `CaptionEncoder` whose states the blocks look at; None if states are given from outside."""
        super().__init__()
        if config.levels and math.prod(config.levels) != config.vocab_size:
            raise ValueError(f"levels {list(config.levels)} do not give a vocabulary of {config.vocab_size}")
        if config.width % config.head_dim:
            raise ValueError(f"width {config.width} is not a multiple of head_dim {config.head_dim}")
        if text_encoder is not None and text_encoder.width != config.text_width:
            raise ValueError(f"the text encoder's states are {text_encoder.width} wide, text_width is {config.text_width}")
        self.config = config
        self.preprocessor = Preprocessor(config)
        self.trunk = Trunk(config)
        self.head = Head(config)
        self.text_mlp = TextMLP(config) if config.text_width else None
        self.init_weights()
        self.text_encoder = text_encoder  # after init_weights: it has its own
        self.official = ""  # the configuration of the released checkpoint that this came from, for `export_official`
        self.notes = {}     # what else its config.json said, if it was read from one of ours: its classes, its tokenizer, and more
        self.graph_caches = {}  # of compiled generation, see new_cache

    def init_weights(self):
        """Matrices with std 1/√fan_in, those that end a branch smaller by √(number of branches); a head of zeros."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.Embedding):
                nn.init.normal_(layer.weight, std=0.02)
        for name, layer in self.trunk.named_modules():
            if name.endswith(("proj", "fc2")):
                layer.weight.data *= (self.config.depth * (3 if self.config.text_width else 2)) ** -0.5
        start, split = self.preprocessor, bool(self.config.levels)
        for parameter in (start.sos_token_embed, start.positional_embedding, start.cls_embedding and start.cls_embedding.weight):
            if parameter is not None:
                # beside the token vectors of SplitEmbedding, of std 0.5, positions of std 0.02 would not be seen
                nn.init.normal_(parameter, std=0.3 if split else 0.02)
        if not split:  # zeros: all tokens are equally likely at first, and the first loss is ln V
            nn.init.zeros_(self.head.linear.weight)

    @property
    def device(self):
        return self.preprocessor.sos_token_embed.device

    @property
    def dtype(self):
        """Of the weights."""
        return self.preprocessor.sos_token_embed.dtype

    def hidden(self, tokens, labels=None, text=None, text_mask=None):
        """Like `forward`, but the input of the head, (B, T, D)."""
        self.check(tokens, labels, text)
        memory = self.memory(text, text_mask, len(tokens))
        x = self.preprocessor(tokens[:, :-1], labels)                             # (B, T, D)
        for block, text_of_block in zip(self.trunk.blocks, memory):
            x = block(x, text_of_block)
        return self.trunk.post_trunk_norm(x)

    def forward(self, tokens, labels=None, text=None, text_mask=None):
        """tokens (B, T) -> logits (B, T, V); output i predicts token i from those before it.

        labels (B,) int64, -1 or None: no class. text (B, M, E): states of a text encoder, before the projection; text_mask
        (B, M), True where real (None: everywhere); text None: the empty caption. Raises ValueError for a condition or a number
        of tokens that this model was not made for; tokens and labels out of range are torch's to find.
        """
        return self.head(self.hidden(tokens, labels, text, text_mask))

    def loss(self, tokens, labels=None, text=None, text_mask=None):
        """Mean cross-entropy in nats per token, and that of each token (B, T), without gradient."""
        x = self.hidden(tokens, labels, text, text_mask)                          # (B, T, D)
        mean, each = self.head.loss(x.flatten(0, 1), tokens.flatten())            # (), (B·T,)
        return mean, each.view(tokens.shape)                                      # (B, T)

    def check(self, tokens, labels, text):
        """Raise ValueError for a condition or a length that this model does not know."""
        if not 1 <= tokens.shape[1] <= self.config.length:
            raise ValueError(f"{tokens.shape[1]} tokens: expected 1 to {self.config.length}")
        if labels is not None and not self.config.classes:
            raise ValueError("labels given, but this model was not made for classes")
        if text is not None and not self.config.text_width:
            raise ValueError("text given, but this model was not made for text")
        if text is not None and text.shape[-1] != self.config.text_width:
            raise ValueError(f"text states are {text.shape[-1]} wide, expected {self.config.text_width}")

    def memory(self, text, text_mask, B):
        """Text states and mask -> for each block the (keys, values, mask) it looks at; [None, ...] for a model without text."""
        if not self.config.text_width:
            return [None] * self.config.depth
        if text is None:
            text, text_mask = (x.expand(B, *x.shape[1:]) for x in self.encode_text([""]))
        if text_mask is None:
            text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        mask = text_mask.bool()[:, None, None, :]                                 # (B, 1, 1, M)
        projected = self.text_mlp(text.to(self.dtype))                            # (B, M, D)
        return [(*block.cross_attn.keys_values(projected), mask) for block in self.trunk.blocks]

    def encode_text(self, captions):
        """A list of B captions -> states (B, M, E) and mask (B, M). Raises ValueError if this model has no text encoder."""
        if self.text_encoder is None:
            raise ValueError("this prior has no text encoder of its own; pass text and text_mask (and null_text to guide)")
        return self.text_encoder(*self.text_encoder.tokenize(captions))

    # -- generation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, labels=None, text=None, text_mask=None, k=None, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=0.0,
                 generator=None, prefix=None, n=1, null_text=None, compile=False, stream=False):
        """Write tokens: (B, k) int64. Conditions as in `forward`; without any, n unconditional images.

        k: how many tokens, None is all. cfg_scale: 1.0 is no guidance; l = uncond + scale·(cond - uncond), on the logits.
        temperature: 0 takes the likeliest. top_k, top_p: see `probabilities`. generator: makes it repeatable. prefix (B, p):
        tokens to go on from; they are returned too. null_text (1, M', E): states of the empty caption, needed for guidance
        where the model has no text encoder of its own. compile: torch.compile the step, on CUDA as a CUDA graph.
        stream: instead return an iterator of (B, p + 1), (B, p + 2), ..., (B, k): each is already an image.
        """
        k = self.config.length if k is None else k
        labels, prefix = (None if x is None else x.to(self.device) for x in (labels, prefix))
        text, text_mask = (None if x is None else x.to(self.device) for x in (text, text_mask))
        if prefix is None:
            B = next((len(x) for x in (labels, text) if x is not None), n)
            prefix = torch.empty(B, 0, dtype=torch.long, device=self.device)
        p = prefix.shape[1]
        if not p < k <= self.config.length:
            raise ValueError(f"k={k}: expected {p + 1} to {self.config.length} tokens")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature={temperature}: expected 0 or more")
        self.check(prefix if p else prefix.new_zeros(1, 1), labels, text)
        if any(x is not None and len(x) != len(prefix) for x in (labels, text)):
            raise ValueError("labels, text and prefix are of different numbers of images")
        if labels is not None and not -1 <= labels.min() <= labels.max() < self.config.classes:
            raise ValueError(f"labels {labels.tolist()}: expected 0 to {self.config.classes - 1}, or -1")
        if p and not 0 <= prefix.min() <= prefix.max() < self.config.vocab_size:
            raise ValueError(f"prefix holds {prefix.min()} to {prefix.max()}: expected tokens 0 to {self.config.vocab_size - 1}")
        writing = self.write(prefix, labels, text, text_mask, k, cfg_scale, null_text, compile,
                             lambda logits: choose(logits, temperature, top_k, top_p, generator))
        if stream:
            return writing
        for tokens in writing:
            pass
        return tokens

    @torch.no_grad()
    def write(self, tokens, labels, text, text_mask, k, cfg_scale, null_text, compile, choose):
        """The loop of `generate`: yields tokens (B, i) for i up to k; `choose` maps logits (B, V) to tokens (B, 1)."""
        B, guided = len(tokens), cfg_scale != 1
        if guided:  # one batch of 2B: with the condition above, without it below
            if labels is not None:
                labels = torch.cat([labels, torch.full_like(labels, -1)])         # (2B,)
            if text is not None:
                text, text_mask = self.beside_null(text, text_mask, null_text)    # (2B, M, E), (2B, M)
        rows = B * (2 if guided else 1)
        if compile and text is not None:  # captions of all lengths share a few shapes, and so a few compiled graphs
            pad = -text.shape[1] % 64
            text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if text_mask is None else text_mask
            text, text_mask = F.pad(text, (0, 0, 0, pad)), F.pad(text_mask.bool(), (0, pad))         # (rows, M + pad, E)
        cache, step = self.new_cache(rows, text, text_mask, compile), compiled_step() if compile else GPT.step
        # the start and the prefix at once, then token by token
        x = self.preprocessor(tokens.repeat(rows // B, 1), labels)                # (rows, p + 1, D)
        positions = torch.arange(x.shape[1], device=x.device)                     # (p + 1,)
        logits = self.read(x, positions, cache)                                   # (rows, V)
        while True:
            if guided:
                cond, uncond = logits.chunk(2)                                    # (B, V) each
                logits = uncond + cfg_scale * (cond - uncond)                     # (B, V)
            new = choose(logits)                                                  # (B, 1)
            tokens = torch.cat([tokens, new], 1)                                  # (B, i)
            yield tokens
            if tokens.shape[1] == k:
                return
            positions = torch.full((1,), tokens.shape[1], device=x.device)        # (1,)
            logits = step(self, new.repeat(rows // B, 1), positions, cache).clone()  # (rows, V); a graph reuses its output

    def read(self, x, positions, cache):
        """Embedded x (B, n, D) at `positions` (n,) -> logits (B, V) of what comes after it; writes to the cache."""
        for block, past, text in zip(self.trunk.blocks, cache.past, cache.text):
            x = block(x, text, past, positions)                                   # (B, n, D)
        return self.head(self.trunk.post_trunk_norm(x[:, -1])).float()            # (B, V)

    def step(self, tokens, position, cache):
        """One token: (B, 1), read at `position` (1,) -> logits (B, V) of the next."""
        return self.read(self.preprocessor.next(tokens, position), position, cache)

    def new_cache(self, B, text, text_mask, compile):
        """An empty `Cache` for B sequences. With compile, one of each shape is kept for ever: CUDA graphs read and write at fixed
        addresses. So two compiled streams of one shape must not run at the same time."""
        shape = (B, self.config.width // self.config.head_dim, self.config.length, self.config.head_dim)
        text = self.memory(text, text_mask, B)
        if not compile:
            return Cache([self.empty(shape, 2) for _ in text], text)
        shapes = None if text[0] is None else tuple(x.shape for x in text[0])
        key = (shape, shapes, self.dtype, self.device)
        if key not in self.graph_caches:
            kept = [None if x is None else tuple(torch.empty_like(part) for part in x) for x in text]
            self.graph_caches[key] = Cache([self.empty(shape, 2) for _ in text], kept)
            for tensor in (part for x in self.graph_caches[key].past + kept if x is not None for part in x):
                torch._dynamo.mark_static_address(tensor)
        for old, new in zip(self.graph_caches[key].text, text):
            for to, part in zip(old or (), new or ()):
                to.copy_(part)
        return self.graph_caches[key]

    def empty(self, shape, count):
        """`count` tensors of zeros (what lies behind the last position is masked, but must be a number)."""
        return tuple(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(count))

    def beside_null(self, text, text_mask, null_text):
        """Put the empty caption below B captions, padded to one length: states (2B, M, E), mask (2B, M)."""
        if text_mask is None:
            text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        null_mask = torch.ones(1, 1, dtype=torch.bool, device=text.device)
        if null_text is None:
            null_text, null_mask = self.encode_text([""])                         # (1, M', E), (1, M')
        null_mask = null_mask.expand(1, null_text.shape[1])                       # (1, M')
        M = max(text.shape[1], null_text.shape[1])
        states = [F.pad(x, (0, 0, 0, M - x.shape[1])) for x in (text, null_text.to(text).expand(len(text), -1, -1))]
        masks = [F.pad(m.bool(), (0, M - m.shape[1])) for m in (text_mask, null_mask.expand(len(text), -1))]
        return torch.cat(states), torch.cat(masks)                                # (2B, M, E), (2B, M)

    # -- files --------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory, dtype=torch.float32, **notes):
        """Write `directory`/config.json (sizes, and `notes`: anything JSON holds) and model.safetensors in `dtype`."""
        text = {} if self.text_encoder is None else {"text_encoder": asdict(self.text_encoder.config)}
        origin = {"official": self.official} if self.official else {}
        write_json(os.path.join(directory, "config.json"),
                   {"format": "minFlexTok prior", "prior": asdict(self.config), **text, **origin, **notes})
        save_tensors(os.path.join(directory, "model.safetensors"), self.state_dict(), dtype)

    @classmethod
    def from_pretrained(cls, name, device="cpu", dtype=torch.float32):
        """Read what `save_pretrained` wrote, or a released FlexAR: directory, weights file, or a name on the Hugging Face hub.

        In eval mode. dtype: of the weights; None is as stored. Raises UserError naming the file and the reason.
        """
        name = os.fspath(name)
        path = os.path.join(name, "config.json")
        if not os.path.isfile(path):
            from extras.pretrained import read_flexar  # late: it imports this file
            return read_flexar(name, device, dtype)
        saved = read_json(path)
        if not isinstance(saved, dict) or saved.get("format") != "minFlexTok prior":
            raise UserError(f'{path}: not a minFlexTok prior (expected "format": "minFlexTok prior")')
        try:
            config = GPTConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in saved["prior"].items()})
            if config.depth > 1000:
                raise ValueError(f"{config.depth} blocks, at most 1000 are read")
            with torch.device("meta"):  # shapes without memory, until the weights come
                text_encoder = CaptionEncoder.from_config(saved["text_encoder"]) if "text_encoder" in saved else None
                model = cls(config, text_encoder)
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise UserError(f"{path}: does not describe a prior ({error})") from None
        model.official = saved.get("official", "")
        model.notes = {name: value for name, value in saved.items() if name not in ("format", "prior", "text_encoder", "official")}
        weights = os.path.join(name, "model.safetensors")
        load_weights(model, load_tensors(weights), weights, device, dtype)
        return model.to(device).eval()


if __name__ == "__main__":
    gpt = GPT(GPTConfig(vocab_size=8, length=6, width=32, depth=1, head_dim=16))
    nn.init.normal_(gpt.head.linear.weight)
    print("Output i (row) depends on token j (column):")
    tokens = torch.randint(8, (1, 6))
    for i in range(6):
        changed = [(gpt(tokens) - gpt(tokens.index_fill(1, torch.tensor(j), (tokens[0, j].item() + 1) % 8)))[0, i].abs().max() > 0
                   for j in range(6)]
        print("  ", " ".join("x" if c else "." for c in changed))
    for name, (width, depth) in SIZES.items():
        with torch.device("meta"):  # sizes without memory
            gpt = GPT(GPTConfig(width=width, depth=depth, classes=1000))
        trunk, total = (sum(p.numel() for p in module.parameters()) for module in (gpt.trunk, gpt))
        print(f"{name:>6}: width {width:4d}, {depth} blocks, {trunk / 1e6:5.0f} M in them, {total / 1e6:5.0f} M in all")
