"""
Finite scalar quantisation: a vector of L numbers becomes one of V = Π levels tokens, without a learned codebook.

    latents (..., L) --bound--> width l --round--> codes (..., L) in [-1, 1] <--digits--> tokens (...) in [0, V)

Paper: FSQ, arXiv 2309.15505; FlexTok, arXiv 2502.13967, uses levels [8, 8, 8, 5, 5, 5]: V = 64,000, 16 bits a token.
There is no codebook, hence no codebook loss and no dead entries to revive: the only learned parts are the linear
layers before and after. Differences from the official code: tokens are computed in integers, so that every level
count up to 64 is exact, and noise in training, off by default there (codes left unrounded, tokens replaced by random
ones), is left out: it gained nothing (JOURNAL.md).

    python fsq.py           # prints how the number line falls into 8 and into 5 levels              Next: flow.py
"""
import math

import torch
from torch import nn


class FSQ(nn.Module):
    """Quantise the last axis: dimension i takes exactly `levels[i]` values, evenly spaced.

    levels: L whole numbers, each from 2 to 64. vocab_size = their product; it must fit into int64.
    Raises ValueError if a level count is out of range.
    """

    def __init__(self, levels):
        super().__init__()
        if not levels or any(int(l) != l or not 2 <= l <= 64 for l in levels):
            raise ValueError(f"levels {list(levels)}: expected whole numbers from 2 to 64")
        self.levels = [int(l) for l in levels]
        self.code_width, self.vocab_size = len(self.levels), math.prod(self.levels)
        if self.vocab_size >= 2**63:
            raise ValueError(f"levels {self.levels}: their product does not fit into 63 bits")
        levels = torch.tensor(self.levels)
        # The FIRST level is the least significant digit: token = d0 + l0·d1 + l0·l1·d2 + ...
        basis = torch.tensor([math.prod(self.levels[:i]) for i in range(len(self.levels))])
        # persistent=False: constants of the configuration, they do not belong into a checkpoint
        self.register_buffer("basis", basis, persistent=False)                    # (L,)
        self.register_buffer("level_counts", levels, persistent=False)            # (L,)
        self.register_buffer("half_width", levels // 2, persistent=False)         # (L,)  8 -> 4, 5 -> 2

    def extra_repr(self):
        """Stands in the module's `repr`, which is part of a tokenizer's fingerprint: what decides tokens."""
        return f"levels={self.levels}"

    def forward(self, latents):
        """latents (..., L), any float dtype -> codes (..., L) float32 in [-1, 1], tokens (...) int64 in [0, V)."""
        # float32 even under autocast: bfloat16 has 8 bits of precision, and a value near a rounding boundary would
        # fall to the other side, giving another token. `.float()` lifts the input, autocast must not lower it again.
        with torch.autocast(latents.device.type, enabled=False):
            bounded = self.bound(latents.float())
            # Straight-through estimator: forward the rounded value, backward as if rounding were the identity.
            # torch.round is half-to-even.                                                        (FSQ paper)
            rounded = bounded + (bounded.round() - bounded).detach()
            codes = rounded / self.half_width                                     # (..., L)
            return codes, self.codes_to_tokens(codes.detach())                    # (..., L), (...)

    def bound(self, latents):
        """latents (..., L) -> the same squashed into l values' worth of width; 0 maps to 0.

        bounded = tanh(latents + shift)·half - offset,  half = (l-1)(1+1e-3)/2,  shift = atanh(offset/half)
        """
        # Odd l: rounding (-2.002, 2.002) gives 5 values. Even l has no middle value, so the interval is moved down by
        # half a step, (-4.0035, 3.0035), to give 8; `shift` moves it back at the origin. The 1e-3 lets the extreme
        # values be reached at finite input.
        half = (self.level_counts - 1) * (1 + 1e-3) / 2                           # (L,)
        offset = torch.where(self.level_counts % 2 == 0, 0.5, 0.0)                # (L,)
        shift = torch.atanh(offset / half)                                        # (L,)
        return torch.tanh(latents + shift) * half - offset

    def codes_to_tokens(self, codes):
        """codes (..., L) on the grid, in [-1, 1] -> tokens (...) int64."""
        # .round(): codes like 11/13 times 13 are 10.999..., and a plain cast to integers would lose one
        digits = (codes.float() * self.half_width).round().long() + self.half_width   # (..., L), each in [0, l)
        return (digits * self.basis).sum(-1)                                      # (...)

    def tokens_to_codes(self, tokens):
        """tokens (...) of an integer dtype in [0, V) -> codes (..., L) float32 in [-1, 1]; else raises ValueError."""
        if tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ValueError(f"tokens are {tokens.dtype}, expected integers")
        tokens = tokens.long()  # first: 64,000 does not fit every integer type, and torch cannot compare uint16
        if tokens.numel() and (tokens.min() < 0 or tokens.max() >= self.vocab_size):
            bad = tokens[(tokens < 0) | (tokens >= self.vocab_size)][0].item()
            raise ValueError(f"token {bad} is out of range: {self.levels} levels give 0 to {self.vocab_size - 1}")
        digits = tokens.unsqueeze(-1) // self.basis % self.level_counts    # (..., L)
        return (digits - self.half_width) / self.half_width


if __name__ == "__main__":
    line = torch.linspace(-3, 3, 61)
    for levels in ([8], [5]):
        codes, tokens = FSQ(levels)(line[:, None])
        print(f"{levels[0]} levels: an input from -3 to 3 becomes")
        print("  token ", "".join(str(t.item()) for t in tokens))
        print("  code  ", "  ".join(f"{c:g}" for c in codes[:, 0].unique().tolist()))
    fsq = FSQ([8, 8, 8, 5, 5, 5])
    tokens = torch.tensor([0, 1, 8, 63_999])
    print(f"vocabulary {fsq.vocab_size:,}; tokens {tokens.tolist()} have the codes")
    for code in fsq.tokens_to_codes(tokens):
        print("  ", code.tolist())
