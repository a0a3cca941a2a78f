"""
Captions as states that the prior can look at: a small transformer over UTF-8 bytes, trained together with the prior.

    "a red star" --bytes + END--> ids (B, M), mask --embedding + positions--> blocks: everyone sees everyone --> states (B, M, E)

Not in the paper, which takes the frozen flan-T5-XL (arXiv 2210.11416): this one needs no download, knows every language's
letters, and learns only the words of the captions it was trained on. The empty string is the unconditional caption.

    python text.py          # prints ids, mask and shapes of three captions                           Next: ar.py
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

END = 256  # after the 256 bytes: closes every caption, so that the empty one has something to look at too


@dataclass
class CaptionConfig:
    """Sizes of the caption encoder."""
    width: int = 128       # E
    depth: int = 2
    head_dim: int = 32
    max_bytes: int = 128   # longer captions are cut


class CaptionBlock(nn.Module):
    """Pre-norm transformer block without causality: x += attention(norm x); x += mlp(norm x)."""

    def __init__(self, config):
        super().__init__()
        E, self.head_dim = config.width, config.head_dim
        self.norm_1, self.norm_2 = nn.RMSNorm(E, eps=1e-5), nn.RMSNorm(E, eps=1e-5)
        self.qkv, self.proj = nn.Linear(E, 3 * E, bias=False), nn.Linear(E, E, bias=False)
        self.fc1, self.fc2 = nn.Linear(E, 4 * E, bias=False), nn.Linear(4 * E, E, bias=False)

    def forward(self, x, mask):
        """x (B, M, E), mask (B, 1, 1, M) -> (B, M, E)."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, -1))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)            # (B, nh, M, hd)
        x = x + self.proj(seen.transpose(1, 2).flatten(2))                        # (B, M, E)
        return x + self.fc2(F.gelu(self.fc1(self.norm_2(x))))


class CaptionEncoder(nn.Module):
    """Byte-level caption encoder."""

    def __init__(self, config):
        super().__init__()
        if config.width % config.head_dim:
            raise ValueError(f"caption width {config.width} is not a multiple of head_dim {config.head_dim}")
        self.config = config
        self.width = config.width
        self.embedding = nn.Embedding(257, config.width)
        self.positions = nn.Parameter(torch.empty(config.max_bytes + 1, config.width))  # + 1: END
        self.blocks = nn.ModuleList(CaptionBlock(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        nn.init.normal_(self.embedding.weight)
        nn.init.normal_(self.positions, std=0.5)

    @classmethod
    def from_config(cls, fields):
        """From a dict of `CaptionConfig` fields; raises TypeError or ValueError for what is none."""
        return cls(CaptionConfig(**fields))

    def tokenize(self, captions):
        """List of B strings -> ids (B, M) int64 and mask (B, M), True where real; M is that of the longest, with its END."""
        rows = [torch.tensor([*caption.encode("utf-8", "replace")[:self.config.max_bytes], END]) for caption in captions]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)                   # (B, M)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]        # (B, M)
        return ids.to(self.positions.device), mask.to(self.positions.device)

    def forward(self, ids, mask):
        """ids (B, M), mask (B, M) -> states (B, M, E) and the mask. What is masked never changes the states of what is not."""
        x = self.embedding(ids) + self.positions[:ids.shape[1]]                   # (B, M, E)
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])
        return self.norm(x), mask


if __name__ == "__main__":
    encoder = CaptionEncoder(CaptionConfig())
    ids, mask = encoder.tokenize(["red heart", "Größe", ""])
    print("ids", ids.tolist(), "mask", mask.int().tolist(), sep="\n")
    print("states", tuple(encoder(ids, mask)[0].shape), f"from {sum(p.numel() for p in encoder.parameters()):,} parameters")
