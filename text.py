"""
Captions as states that the prior can look at: a small transformer over words, trained with the prior.

    "a red star" --words of bytes, END--> ids (B, M, P), mask (B, M)
    ids --a vector for the word + one for each byte at its place in it, summed, + position--> (B, M, E)
        --blocks: everyone sees everyone--> states (B, M, E)

Not in the paper, which takes the frozen flan-T5-XL (arXiv 2210.11416): this one needs no download, knows every
language's letters, and learns only the words of the captions it was trained on. The empty string is the unconditional
caption. Why words: a caption of a drawn scene is about 80 bytes but 16 words, and what looks at bytes must first learn
to spell. (A prior of the cpu preset, trained for 200 seconds: 5.83 nats per token after 1,350 steps with the bytes one
by one, 4.86 after 2,660 with words.) Why a vector for the whole word as well: bytes alone make "rocket" and "pocket"
nearly the same, and the names of 1,900 things were not learned in 320,000 samples (JOURNAL.md). The bytes remain for
words that no caption had: a name with an ending that is new.

    python text.py          # prints ids, mask and shapes of three captions                           Next: ar.py
"""
import functools
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

WORD_BYTES = 12           # of the longest word; longer ones are cut into several
BUCKETS = 8192            # how many words have a vector of their own; of more, some share one
END = 1 + 256 * WORD_BYTES  # an id like a byte's. It closes every caption: the empty one has to hold something too
P = 1 + WORD_BYTES        # ids of a word


@dataclass
class CaptionConfig:
    """Sizes of the caption encoder."""
    width: int = 128       # E
    depth: int = 2
    head_dim: int = 32
    max_words: int = 48    # longer captions are cut


@functools.lru_cache(maxsize=100_000)
def word_ids(word):
    """A word -> its pieces, each P ids: that of the whole, then byte b at place i is 1 + 256·i + b, and 0 is none."""
    data = word.encode("utf-8", "replace")
    pieces = [data[start:start + WORD_BYTES] for start in range(0, len(data), WORD_BYTES)]
    return [[END + 1 + zlib.crc32(piece) % BUCKETS] + [1 + 256 * i + byte for i, byte in enumerate(piece)]
            + [0] * (WORD_BYTES - len(piece)) for piece in pieces]


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
        qkv = self.qkv(self.norm_1(x)).unflatten(-1, (3, -1, self.head_dim))      # (B, M, 3, nh, hd)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                      # (B, nh, M, hd) each
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)            # (B, nh, M, hd)
        x = x + self.proj(seen.transpose(1, 2).flatten(2))                        # (B, M, E)
        return x + self.fc2(F.gelu(self.fc1(self.norm_2(x))))


class CaptionEncoder(nn.Module):
    """Caption encoder that reads words, and those byte by byte: it has no vocabulary."""

    def __init__(self, config):
        super().__init__()
        if config.width % config.head_dim:
            raise ValueError(f"caption width {config.width} is not a multiple of head_dim {config.head_dim}")
        self.config = config
        self.width = config.width
        self.embedding = nn.Embedding(END + 1 + BUCKETS, config.width)
        self.positions = nn.Parameter(torch.empty(config.max_words + 1, config.width))  # + 1: END
        self.blocks = nn.ModuleList(CaptionBlock(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        nn.init.normal_(self.embedding.weight, std=0.5)  # about 5 of them are summed
        nn.init.normal_(self.positions, std=0.5)

    def tokenize(self, captions, multiple=1):
        """List of B strings -> ids (B, M, P) int64, mask (B, M), True where real; M: words of the longest, and its END.

        A word is what lies between spaces and commas; how many there are, and capitals, make no difference, nor do
        quotation marks around the caption and a full stop at its end. multiple: M is rounded up to a multiple of
        it, which makes fewer shapes to compile for.
        """
        rows = []
        for caption in captions:
            words = caption.lower().strip(" .\"“”").replace(",", " ").split()
            pieces = [piece for word in words for piece in word_ids(word)][:self.config.max_words]
            rows.append(torch.tensor([*pieces, [END] + [0] * (P - 1)]))  # (m, P)
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)                   # (B, M, P)
        M = ids.shape[1]
        ids = F.pad(ids, (0, 0, 0, min(-M % multiple, self.config.max_words + 1 - M)))  # (B, M, P)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]        # (B, M)
        # non_blocking: training does not wait for the GPU
        return tuple(x.to(self.positions.device, non_blocking=True) for x in (ids, mask))

    def forward(self, ids, mask):
        """ids (B, M, P), mask (B, M) -> states (B, M, E) and the mask. What is masked changes no state that is not."""
        x = (self.embedding(ids) * (ids > 0)[..., None]).sum(2)                   # (B, M, E)
        x = x + self.positions[:ids.shape[1]]                                     # (B, M, E)
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])
        return self.norm(x), mask


if __name__ == "__main__":
    encoder = CaptionEncoder(CaptionConfig())
    ids, mask = encoder.tokenize(["red heart", "Größe", ""])
    for caption_ids, caption_mask in zip(ids.tolist(), mask.int().tolist()):
        print("mask", caption_mask, "ids", *caption_ids, sep="\n  ")
    count = sum(p.numel() for p in encoder.parameters())
    print("states", tuple(encoder(ids, mask)[0].shape), f"from {count:,} parameters")
