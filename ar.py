"""
The prior: a GPT that writes the tokens of an image, coarse to fine, so that wherever it stops there is an image.

    class ──────────────────────┐                                    ┌── caption ── text encoder ── states (B, M, E)
    [SOS + class, t0, t1, ...] (B, T, D) ── blocks: look back, look at the text, think ── head ── logits (B, T, V)
                                                                        output i says what token i is likely to be

Paper: FlexTok, arXiv 2502.13967, section 3.3; the model is LlamaGen's (arXiv 2406.06525) with learned positions.
Numerically equal to the official FlexAR code (test_all.py, section ar), but it keeps keys and values (KV cache),
computes those of the text once, and its loss never holds the logits of a whole batch. What released checkpoints do
differently is in extras/pretrained.py.
Letters: B batch, T tokens, D width, nh hd heads and head size, V vocabulary, M text length, E width of the text states.

    python ar.py            # prints who sees whom, and the sizes of the paper's priors          Next: train_ar.py
"""
import functools
import math
import os
from dataclasses import asdict, dataclass, make_dataclass

import torch
import torch.nn.functional as F
from torch import nn

from common import UserError, checked, load_tensors, load_weights, read_json, save_tensors, shipped, shown, write_json
from text import CaptionConfig, CaptionEncoder


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
    cfg_scale: float = 1.0            # the guidance that its maker recommends; 1.0: none


# The paper's class-conditional priors: name -> (width, depth), named after what is in the blocks, 12·width²·depth
SIZES = {"49M": (640, 10), "85M": (768, 12), "201M": (1024, 16), "393M": (1280, 20), "679M": (1536, 24),
         "1.33B": (1920, 30)}


# ---------------------------------------------------------------------------------------------------------------
# Parts of a block. Attribute names are those of the released checkpoints; linear layers have no biases.


def look_back(q, k, v, scale, past=None, positions=None):
    """Causal attention: token i looks at tokens 0 to i. q, k, v (B, nh, n, hd) -> (B, nh, n, hd).

    Training gives whole sequences. Generation gives new tokens only, their `positions` (n,) int64, and `past`, the KV
    cache: keys and values of all positions, each (B, nh, T, hd), into which those of the new tokens are written first.
    They can be kept, as no token ever looks at a later one: what a new token adds changes none of those before it.
    """
    if past is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)  # (B, nh, n, hd)
    keys, values = past
    keys[:, :, positions] = k.to(keys.dtype)  # in place, at one address: a CUDA graph can replay it
    values[:, :, positions] = v.to(keys.dtype)
    seen = torch.arange(keys.shape[2], device=q.device) <= positions[:, None]     # (n, T)
    return F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, attn_mask=seen, scale=scale)


def split_heads(x, head_dim):
    """(B, n, nh·hd) -> (B, nh, n, hd)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)                        # (B, nh, n, hd)


class SelfAttention(nn.Module):
    """Tokens look at the tokens before them."""

    def __init__(self, config):
        super().__init__()
        D, self.head_dim = config.width, config.head_dim
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.proj = nn.Linear(D, D, bias=False)

    def forward(self, x, past=None, positions=None):
        """x (B, n, D) -> (B, n, D); past and positions as in `look_back`."""
        q, k, v = (split_heads(part, self.head_dim) for part in self.qkv(x).chunk(3, -1))  # (B, nh, n, hd) each
        x = look_back(q, k, v, self.head_dim**-0.5, past, positions)              # (B, nh, n, hd)
        return self.proj(x.transpose(1, 2).flatten(2))                            # (B, n, D)


class CrossAttention(nn.Module):
    """Tokens look at the text. The text's keys and values do not depend on the tokens: `keys_values` is called once."""

    def __init__(self, config):
        super().__init__()
        D, self.head_dim = config.width, config.head_dim
        self.Wq, self.Wk, self.Wv, self.proj = (nn.Linear(D, D, bias=False) for _ in range(4))

    def keys_values(self, text):
        """Projected text (B, M, D) -> keys and values, each (B, nh, M, hd)."""
        return split_heads(self.Wk(text), self.head_dim), split_heads(self.Wv(text), self.head_dim)

    def forward(self, x, keys, values, text_mask):
        """x (B, n, D); keys, values (B, nh, M, hd); text_mask (B, 1, 1, M), True where real, or None -> (B, n, D)."""
        q = split_heads(self.Wq(x), self.head_dim)                                # (B, nh, n, hd)
        x = F.scaled_dot_product_attention(q.to(values.dtype), keys, values, attn_mask=text_mask)  # (B, nh, n, hd)
        return self.proj(x.transpose(1, 2).flatten(2))                            # (B, n, D)


class SwiGLU(nn.Module):
    """fc2(SiLU(fc1 x) · fc3 x), (B, n, D) -> (B, n, D) (arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        D, hidden = config.width, hidden_size(config)
        self.fc1 = nn.Linear(D, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, D, bias=False)
        self.fc3 = nn.Linear(D, hidden, bias=False)

    def forward(self, x):
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


def hidden_size(config):
    """8/3 of the width, so that three matrices cost what two of 4 times the width would, rounded up: 768 -> 2048."""
    return config.hidden or -(-int(2 / 3 * 4 * config.width) // 256) * 256


class Block(nn.Module):
    """x += attn(norm_1 x); x += mlp(norm_2 x). RMSNorm: arXiv 1910.07467, in float32 whatever it is given."""

    def __init__(self, config):
        super().__init__()
        self.norm_1, self.norm_2 = (nn.RMSNorm(config.width, eps=1e-5) for _ in range(2))
        self.attn = SelfAttention(config)
        self.mlp = SwiGLU(config)

    def forward(self, x, text=None, past=None, positions=None):
        x = x + self.attn(self.norm_1(x), past, positions)
        return x + self.mlp(self.norm_2(x))


class TextBlock(nn.Module):
    """x += self_attn(norm_1 x); x += cross_attn(norm_2 x, text); x += mlp(norm_3 x). The text is not normalised."""

    def __init__(self, config):
        super().__init__()
        self.norm_1, self.norm_2, self.norm_3 = (nn.RMSNorm(config.width, eps=1e-5) for _ in range(3))
        self.self_attn = SelfAttention(config)
        self.cross_attn = CrossAttention(config)
        self.mlp = SwiGLU(config)

    def forward(self, x, text, past=None, positions=None):
        """text: keys, values and mask, as `CrossAttention.forward` takes them."""
        x = x + self.self_attn(self.norm_1(x), past, positions)
        x = x + self.cross_attn(self.norm_2(x), *text)
        return x + self.mlp(self.norm_3(x))


# ---------------------------------------------------------------------------------------------------------------
# What stands before, around and after the blocks


class Preprocessor(nn.Module):
    """Tokens and class -> what the blocks read: a learned start vector, then the tokens, each with its position."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.sos_token_embed = nn.Parameter(torch.empty(1, 1, config.width))
        self.positional_embedding = nn.Parameter(torch.empty(config.length, config.width))
        self.cls_embedding = nn.Embedding(config.classes, config.width) if config.classes else None

    def forward(self, tokens, labels=None, kept=None):
        """tokens (B, n) -> (B, n + 1, D), the start first. labels (B,): a class is added to it; -1 adds nothing.

        kept (B, n), bools: where False, the token is not told, only that there is one. None: all are.
        """
        B, n = tokens.shape
        x = self.embedding(tokens)                                                # (B, n, D)
        x = x if kept is None else x * kept[..., None]                            # (B, n, D)
        x = torch.cat([self.sos_token_embed.expand(B, -1, -1), x], 1)             # (B, n + 1, D)
        x = x + self.positional_embedding[:n + 1]                                 # (B, n + 1, D)
        if labels is not None:
            # Trap: the official code zeroes -1 in the caller's own tensor, so that from the second token on its
            # "unconditional" half is asked for class 0. Here labels are only read.
            known = (labels >= 0)[:, None]                                        # (B, 1)
            start = x[:, :1] + (self.cls_embedding(labels.clamp(min=0)) * known)[:, None]  # (B, 1, D)
            x = torch.cat([start, x[:, 1:]], 1)                                   # (B, n + 1, D)
        return x


class Trunk(nn.Module):
    """All blocks and the norm after them."""

    def __init__(self, config):
        super().__init__()
        self.blocks = nn.ModuleList((TextBlock if config.text_width else Block)(config) for _ in range(config.depth))
        self.post_trunk_norm = nn.RMSNorm(config.width, eps=1e-5)

    def forward(self, x, cache, positions=None):
        """x (B, n, D), cache: for each block what it may look at, (past, text) -> (B, n, D)."""
        for block, (past, text) in zip(self.blocks, cache):
            x = block(x, text, past, positions)                                   # (B, n, D)
        return self.post_trunk_norm(x)


class Head(nn.Module):
    """(B, n, D) -> logits (B, n, V). Not tied to the embedding."""

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, x):
        return self.linear(x)

    def loss(self, x, targets):
        """x (n, D), targets (n,) -> mean cross-entropy in nats, and each one's (n,), without gradient."""
        return cross_entropy(x, self.linear.weight, targets)


class TextMLP(nn.Module):
    """Text states (B, M, E) -> (B, M, D): what cross-attention reads."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.text_width, config.text_width, bias=False)
        self.activation = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(config.text_width, config.width, bias=False)

    def forward(self, states):
        return self.fc2(self.activation(self.fc1(states)))


def stacked(parts, B, multiple):
    """[(states (B or 1, M_i, E), mask or None), ...] -> all below each other, of one length M: (n·B, M, E), (n·B, M).

    None: all of it is real. M is a `multiple`: a step is compiled for each M anew.
    """
    M = -(-max(text.shape[1] for text, _ in parts) // multiple) * multiple
    texts, masks = [], []
    for text, mask in parts:
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask.bool()
        texts.append(F.pad(text, (0, 0, 0, M - text.shape[1])).expand(B, -1, -1))  # (B, M, E)
        masks.append(F.pad(mask, (0, M - text.shape[1])).expand(B, -1))           # (B, M)
    return torch.cat(texts), torch.cat(masks)


class GPT(nn.Module):
    """The prior.

    >>> gpt = GPT.from_pretrained("assets/emoji64/prior")
    >>> tokens = gpt.generate(labels=torch.tensor([3, 3]), k=16, cfg_scale=1.5)   # (2, 16)
    >>> images = tokenizer.detokenize(list(tokens))
    """

    def __init__(self, config, text_encoder=None):
        """text_encoder: a `CaptionEncoder` whose states the blocks look at; None if states are given from outside."""
        super().__init__()
        if config.width % config.head_dim:
            raise ValueError(f"width {config.width} is not a multiple of head_dim {config.head_dim}")
        if text_encoder is not None and text_encoder.width != config.text_width:
            raise ValueError(f"text states are {text_encoder.width} wide, expected {config.text_width}")
        self.config = config
        self.preprocessor = Preprocessor(config)
        self.trunk = Trunk(config)
        self.head = Head(config)
        self.text_mlp = TextMLP(config) if config.text_width else None
        self.init_weights()
        self.text_encoder = text_encoder  # after init_weights: it has its own
        self.official = {}       # of a released checkpoint: its config, and how it varies, see extras/pretrained.py
        self.notes = {}          # what else our config.json said: names of classes, tokenizer, training, and more
        self.static_caches = {}  # of compiled generation

    def init_weights(self):
        """Matrices with std 1/√fan_in, those that end a branch smaller by √(number of branches); a head of zeros."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            elif isinstance(layer, nn.Embedding):
                nn.init.normal_(layer.weight, std=0.02)
        for name, layer in self.trunk.named_modules():
            if name.endswith(("proj", "fc2")):
                layer.weight.data *= (self.config.depth * (3 if self.config.text_width else 2)) ** -0.5
        for vectors in (self.preprocessor.sos_token_embed, self.preprocessor.positional_embedding):
            nn.init.normal_(vectors, std=0.02)
        nn.init.zeros_(self.head.linear.weight)  # all tokens are equally likely at first, and the first loss is ln V

    @property
    def device(self):
        return self.preprocessor.sos_token_embed.device

    @property
    def dtype(self):
        """Of the weights."""
        return self.preprocessor.sos_token_embed.dtype

    def hidden(self, tokens, labels=None, text=None, text_mask=None, kept=None):
        """Like `forward`, but the input of the head, (B, T, D). kept (B, T - 1): as `Preprocessor.forward` takes it."""
        x = self.preprocessor(tokens[:, :-1], labels, kept)                       # (B, T, D)
        return self.trunk(x, [(None, of_block) for of_block in self.memory(text, text_mask, len(tokens))])

    def forward(self, tokens, labels=None, text=None, text_mask=None):
        """tokens (B, T) -> logits (B, T, V); output i predicts token i from those before it.

        labels (B,) int64, -1 or None: no class. text (B, M, E): states of a text encoder, before the projection;
        text_mask (B, M), True where real (None: everywhere); text None: the empty caption.
        """
        return self.head(self.hidden(tokens, labels, text, text_mask))

    def loss(self, tokens, labels=None, text=None, text_mask=None, kept=None):
        """Mean cross-entropy in nats per token, and that of each token (B, T), without gradient."""
        x = self.hidden(tokens, labels, text, text_mask, kept)                    # (B, T, D)
        mean, each = self.head.loss(x.flatten(0, 1), tokens.flatten())            # (), (B·T,)
        return mean, each.view(tokens.shape)                                      # (B, T)

    def memory(self, text, text_mask, B):
        """Text states and mask -> for each block the (keys, values, mask) it looks at; () for each without text."""
        if not self.config.text_width:
            return [()] * self.config.depth
        if text is None:
            text, text_mask = (x.expand(B, *x.shape[1:]) for x in self.encode_text([""]))
        mask = None if text_mask is None else text_mask.bool()[:, None, None, :]  # (B, 1, 1, M)
        projected = self.text_mlp(text.to(self.dtype))                            # (B, M, D)
        return [(*block.cross_attn.keys_values(projected), mask) for block in self.trunk.blocks]

    def encode_text(self, captions):
        """A list of B captions -> states (B, M, E) and mask (B, M). Raises ValueError if it has no text encoder."""
        if self.text_encoder is None:
            raise ValueError("this prior has no text encoder of its own; pass text, text_mask, and null_text to guide")
        return self.text_encoder(*self.text_encoder.tokenize(captions))

    # -- generation: the loop is `write`, below ------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, labels=None, text=None, text_mask=None, k=None, cfg_scale=1.0, temperature=1.0, top_k=0,
                 top_p=0.0, generator=None, prefix=None, n=1, null_text=None, compile=False, stream=False):
        """Write tokens: (B, k) int64. Conditions as in `forward`; without any, n unconditional images.

        k: how many tokens, None is all. cfg_scale: 1.0 is no guidance; l = uncond + scale·(cond - uncond), on logits.
        temperature: 0 takes the likeliest. top_k, top_p: see `probabilities`. generator: makes it repeatable. prefix
        (B, p): tokens to go on from; they are returned too. null_text (1, M', E): states of the empty caption, needed
        for guidance where the model has no text encoder. compile: torch.compile the step, on CUDA as a CUDA graph.
        stream: instead return an iterator of (B, p + 1), (B, p + 2), ..., (B, k): each is already an image.
        """
        k = self.config.length if k is None else k
        given = (labels, text, text_mask, prefix, null_text)
        labels, text, text_mask, prefix, null_text = (x if x is None else x.to(self.device) for x in given)
        if prefix is None:
            B = next((len(x) for x in (labels, text) if x is not None), n)
            prefix = torch.empty(B, 0, dtype=torch.long, device=self.device)      # (B, 0)
        self.check(labels, text, k, temperature, prefix)
        (B, p), guided = prefix.shape, cfg_scale != 1
        rows = 2 * B if guided else B  # one batch: with the condition above, without it below
        if guided and labels is not None:
            labels = torch.cat([labels, torch.full_like(labels, -1)])             # (2B,)
        if text is not None:
            parts = [(text, text_mask)]
            if guided:
                parts.append(self.encode_text([""]) if null_text is None else (null_text, None))
            text, text_mask = stacked(parts, B, 64 if compile else 1)             # (rows, M, E), (rows, M)
        cache = (static_cache if compile else empty_cache)(self, rows, self.memory(text, text_mask, rows))
        # all random numbers at once: one from the CPU's generator at each token would have the GPU wait each time
        on = self.device if generator is None else generator.device
        u = iter(torch.rand(k - p, B, 1, generator=generator, device=on).to(self.device) if temperature else ())

        def choose(logits):  # (B, V) -> (B, 1)
            if temperature == 0:
                return logits.argmax(-1, keepdim=True)                            # (B, 1)
            return draw(probabilities(logits, temperature, top_k, top_p), next(u))  # (B, 1)

        writing = write(self, prefix, labels, k, cfg_scale, choose, cache, compiled_step() if compile else GPT.step)
        return writing if stream else list(writing)[-1]

    def check(self, labels, text, k, temperature, prefix):
        """Raise ValueError for what `generate` cannot do."""
        (B, p), config = prefix.shape, self.config
        if not p < k <= config.length:
            raise ValueError(f"k={k}: expected {p + 1} to {config.length} tokens")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature={temperature}: expected 0 or more")
        if labels is not None and not config.classes or text is not None and not config.text_width:
            raise ValueError("labels or text given, but this model was not made for them")
        if any(x is not None and len(x) != B for x in (labels, text)):
            raise ValueError("labels, text and prefix are of different numbers of images")
        for name, x, least, count in (("labels", labels, -1, config.classes), ("prefix", prefix, 0, config.vocab_size)):
            if x is not None and x.numel() and not least <= x.min() <= x.max() < count:
                raise ValueError(f"{name} {shown(x.tolist())}: expected {least} to {count - 1}")

    def read(self, x, positions, cache):
        """Embedded x (B, n, D) at `positions` (n,) -> logits (B, V) of what comes after it; writes to the cache."""
        return self.head(self.trunk(x, cache, positions)[:, -1]).float()          # (B, V)

    def step(self, tokens, position, cache):
        """One token: (B, 1), read at `position` (1,) -> logits (B, V) of the next."""
        x = self.preprocessor.embedding(tokens) + self.preprocessor.positional_embedding[position]  # (B, 1, D)
        return self.read(x, position, cache)

    # -- files --------------------------------------------------------------------------------------------------

    def save_pretrained(self, directory, dtype=torch.float32, **notes):
        """Write `directory`/config.json (sizes, and `notes`: anything JSON holds) and model.safetensors in `dtype`."""
        text = {} if self.text_encoder is None else {"text_encoder": asdict(self.text_encoder.config)}
        origin = {"official": self.official} if self.official else {}
        save_tensors(os.path.join(directory, "model.safetensors"), self.state_dict(), dtype)
        write_json(os.path.join(directory, "config.json"),  # last: it says that the model is whole
                   {"format": "minFlexTok prior", "prior": asdict(self.config), **text, **origin, **notes})

    @classmethod
    def from_pretrained(cls, name, device="cpu", dtype=torch.float32):
        """Read what `save_pretrained` wrote, or a released FlexAR: directory, weights file, or a name on the hub.

        In eval mode. dtype: of the weights; None is as stored. Raises UserError naming the file and the reason.
        """
        name = shipped(name)
        path, weights = os.path.join(name, "config.json"), os.path.join(name, "model.safetensors")
        if not os.path.isfile(path):
            from extras.pretrained import read_flexar  # late: it imports this file
            return read_flexar(name, device, dtype)
        saved = read_json(path)
        if not isinstance(saved, dict) or saved.get("format") != "minFlexTok prior":
            raise UserError(f'{path}: not a minFlexTok prior (expected "format": "minFlexTok prior")')
        config, text = checked(GPTConfig, saved.get("prior"), f"{path}: prior"), saved.get("text_encoder")
        captions = None if text is None else checked(CaptionConfig, text, f"{path}: text_encoder")
        if config.depth + (captions.depth if captions else 0) > 1000:  # a billion would never end, even without memory
            raise UserError(f"{path}: asks for more than 1000 blocks")
        try:
            with torch.device("meta"):  # shapes without memory, until the weights come
                model = cls(config, CaptionEncoder(captions) if captions else None)
        except (ValueError, ArithmeticError, RuntimeError) as error:
            raise UserError(f"{path}: does not describe a prior ({shown(str(error))})") from None
        if "official" in saved:
            from extras.pretrained import restore_prior
            restore_prior(model, saved["official"], f"{path}: official")
        model.notes = {x: y for x, y in saved.items() if x not in ("format", "prior", "text_encoder", "official")}
        used = {x: y for x, y in model.notes.items() if x in ("classes", "tokenizer")}  # names, fingerprint
        checked(make_dataclass("Notes", [("classes", tuple, ("",)), ("tokenizer", str, "")]), used, path)
        Sampling = make_dataclass("Sampling", [("temperature", float, 0.0)])
        checked(Sampling, saved.get("sampling", {}), f"{path}: sampling")
        load_weights(model, load_tensors(weights), weights, device, dtype)
        return model.to(device).eval()


# ---------------------------------------------------------------------------------------------------------------
# Generation


def empty_cache(gpt, rows, text):
    """What is kept from token to token, for so many sequences: for each block its `past`, see `look_back`, and its
    `text`, see `GPT.memory`."""
    shape = (rows, gpt.config.width // gpt.config.head_dim, gpt.config.length, gpt.config.head_dim)  # (rows, nh, T, hd)
    # zeros: what lies behind the last position is masked, but must be a number
    zeros = functools.partial(torch.zeros, shape, dtype=gpt.dtype, device=gpt.device)
    return [((zeros(), zeros()), of_block) for of_block in text]


@torch.no_grad()
def write(gpt, tokens, labels, k, cfg_scale, choose, cache, step=GPT.step):
    """The loop: tokens (B, p), p >= 0, grow one by one; yields (B, p + 1), ..., (B, k).

    `choose` maps logits (B, V) to tokens (B, 1). With guidance, labels and cache are of 2B sequences: with and without
    condition. Nothing here waits for the device.
    """
    copies = 1 if cfg_scale == 1 else 2
    x = gpt.preprocessor(tokens.repeat(copies, 1), labels)                        # (copies·B, p + 1, D)
    positions = torch.arange(x.shape[1], device=x.device)                         # (p + 1,)
    logits = gpt.read(x, positions, cache)                                        # (copies·B, V)
    while True:
        if copies == 2:
            cond, uncond = logits.chunk(2)                                        # (B, V) each
            logits = uncond + cfg_scale * (cond - uncond)                         # (B, V)
        new = choose(logits)                                                      # (B, 1)
        tokens = torch.cat([tokens, new], 1)                                      # (B, i)
        yield tokens
        if tokens.shape[1] == k:
            return
        positions = positions[-1:] + 1                                            # (1,)
        logits = step(gpt, new.repeat(copies, 1), positions, cache)               # (copies·B, V)


def probabilities(logits, temperature=1.0, top_k=0, top_p=0.0):
    """logits (..., V) -> probabilities (..., V) float32, of temperature > 0.

    top_k: keep the k likeliest; top_p: of these, the likeliest that together reach p (arXiv 1904.09751); 0 is off.
    """
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


def draw(p, u):
    """Probabilities (B, V), uniform numbers (B, 1) in [0, 1) -> tokens (B, 1): where the sum of the first p passes u.

    What has probability 0 adds nothing to the sum: it is never passed there.
    """
    sums = p.cumsum(-1)                                                           # (B, V)
    return torch.searchsorted(sums, u * sums[:, -1:], right=True).clamp(max=p.shape[-1] - 1)  # (B, 1)


# ---------------------------------------------------------------------------------------------------------------
# Compiled generation: one graph, replayed for every token. All that it reads and writes stays at fixed addresses.


@functools.cache
def compiled_step():
    """`GPT.step`, compiled once for all models; on CUDA replayed as a CUDA graph: one launch instead of hundreds."""
    step = torch.compile(GPT.step, mode="reduce-overhead", dynamic=False)
    return lambda *args: step(*args).clone()  # a graph writes to the same output again


def static_cache(gpt, rows, text):
    """A cache as `empty_cache` makes it, but the one of these shapes, which the model keeps for ever.

    So two compiled streams of one shape must not run at the same time. What it held is overwritten before it is read.
    """
    key = (rows, text[0][0].shape if text[0] else None, gpt.dtype, gpt.device)
    if key not in gpt.static_caches:
        gpt.static_caches[key] = empty_cache(gpt, rows, [tuple(map(torch.empty_like, of_block)) for of_block in text])
        for past, of_block in gpt.static_caches[key]:
            for x in (*past, *of_block):
                torch._dynamo.mark_static_address(x)
    for (_, kept), new in zip(gpt.static_caches[key], text):
        for to, x in zip(kept, new):
            to.copy_(x)
    return gpt.static_caches[key]


# ---------------------------------------------------------------------------------------------------------------
# The loss


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of logits = hidden·weightᵀ, `chunk` rows at a time. Use it through `cross_entropy`.

    With 64,000 tokens to choose from, the logits of 32 images x 256 tokens are 2 GB in float32, and autograd would keep
    them, and their softmax, until the backward pass. But their gradient is known as soon as they are:
    d loss / d logits = softmax(logits) - onehot(target). So it is made right here, multiplied through, and thrown away.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk):
        device, n = hidden.device, len(targets)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
        W = weight.to(dtype)                                                      # (V, D)
        losses, d_hidden = torch.empty(n, device=device), torch.empty_like(hidden)  # (n,), (n, D)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)                  # (V, D)
        with torch.autocast(device.type, enabled=False):
            for start in range(0, n, chunk):
                rows, target = slice(start, start + chunk), targets[start:start + chunk, None]  # (chunk, 1)
                h = hidden[rows].to(dtype)                                        # (chunk, D)
                logits = F.linear(h, W)                                           # (chunk, V)
                top, at = logits.max(1, keepdim=True)                             # (chunk, 1) each
                picked = logits.gather(1, target)                                 # (chunk, 1)
                d = logits.softmax(1)  # (chunk, V); sums in float32 even where it writes bfloat16
                # -log p(target) = logsumexp - picked, and logsumexp from the likeliest token, whose p cannot underflow
                losses[rows] = (top.float() - d.gather(1, at).float().log() - picked.float())[:, 0]
                d[torch.arange(len(h), device=device), target[:, 0]] -= 1         # softmax - onehot
                d_hidden[rows] = (d @ W).to(hidden.dtype)
                d_weight += d.T @ h
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.n, ctx.dtype = n, weight.dtype
        ctx.mark_non_differentiable(losses)
        return losses.mean(), losses

    @staticmethod
    def backward(ctx, d_mean, _):
        d_hidden, d_weight = ctx.saved_tensors
        scale = d_mean / ctx.n
        return d_hidden * scale, (d_weight * scale).to(ctx.dtype), None, None


def cross_entropy(hidden, weight, targets, chunk=0):
    """hidden (n, D), weight (V, D), targets (n,) -> mean loss in nats, and each one's (n,), without gradient.

    Equal to F.cross_entropy(F.linear(hidden, weight), targets), value and gradients, up to rounding. Memory: chunk·V
    logits and, with gradient, V·D float32. chunk 0: 256 on a CPU, 2048 elsewhere.
    """
    chunk = chunk or (256 if hidden.device.type == "cpu" else 2048)
    if not torch.is_grad_enabled():
        losses = torch.cat([F.cross_entropy(F.linear(h, weight).float(), t, reduction="none")
                            for h, t in zip(hidden.split(chunk), targets.split(chunk))])  # (n,)
        return losses.mean(), losses
    return ChunkedCrossEntropy.apply(hidden, weight, targets, chunk)


if __name__ == "__main__":
    gpt = GPT(GPTConfig(vocab_size=8, length=6, width=32, depth=1, head_dim=16))
    nn.init.normal_(gpt.head.linear.weight)
    print("Output i (row) depends on token j (column):")
    tokens = torch.randint(8, (1, 6)).expand(6, -1)                               # (6, T), six times the same
    others = (tokens + torch.eye(6, dtype=torch.long)) % 8                        # in row j token j is another one
    changed = (gpt(others) - gpt(tokens)).abs().amax(-1) > 0                      # (6, T)
    for row in changed.T:
        print("  ", *("x" if seen else "." for seen in row))
    for name, (width, depth) in SIZES.items():
        with torch.device("meta"):  # sizes without memory
            gpt = GPT(GPTConfig(width=width, depth=depth, classes=1000))
        trunk, total = (sum(p.numel() for p in module.parameters()) for module in (gpt.trunk, gpt))
        print(f"{name:>6}: width {width:4d}, {depth} blocks, {trunk / 1e6:5.0f} M in them, {total / 1e6:5.0f} M in all")
