"""
Train the prior: a GPT that writes the tokens of a trained tokenizer, by class and by caption (stage 2).

    images --tokenizer, once--> tokens.npy (n·views, K) --GPT--> how likely is each token, given those before it
                                labels, captions ------------>   loss = -log p(token)

Paper: FlexTok, arXiv 2502.13967, section 3.3. Differences: no dropout inside the network; captions are read by a small encoder
that is trained along, not by a frozen T5; small priors split each token into two halves (`SplitHead` in ar.py).

    python train_ar.py --preset cpu                                              # after train_tokenizer.py --preset cpu
    python train_ar.py --preset emoji64-cpu
    torchrun --nproc_per_node 8 train_ar.py --preset 201M --data /data/imagenet/train --tokenizer out/d18-d28

Writes out/<run>/: tokens.npy, config.json, model.safetensors (EMA weights: what sample.py reads), resume.pt, log.jsonl, pictures.
Times and expected numbers: README.md.                                                        Next: sample.py generate
"""
import fcntl
import math
import os
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ar import GPT, SIZES, GPTConfig
from common import (Background, Log, StopRequest, UserError, attention_kernel, autocast, check_range, claim_directory,
                    clock, command, fill_with_average, from_cli, init_distributed, learning_rate, load_resume, make_ema,
                    provenance, read_json, replacing, save_resume, seed_step, snapshot, write_json)
from images import save_grid, to_float
from data import Shapes, batches, files_digest, get_readable, open_data
from model import FlexTok, powers_of_two
from text import CaptionConfig, CaptionEncoder


@dataclass
class ARConfig:
    """Train a prior over the tokens of a trained tokenizer (stage 2)."""
    # data
    data: str = "emoji"                  # emoji, shapes, or a folder of images
    tokenizer: str = "assets/emoji64"    # directory of a trained tokenizer
    tokens: str = ""                     # file of tokens, made if it is not there; empty: <out>/tokens.npy
    views: int = 10                      # augmented versions of each image; of the drawn shapes, that many more scenes
    augment: bool = True                 # move, scale and tint; without, all views are alike, and a small set is learned by heart
    out: str = "out/prior"               # the run's directory
    workers: int = 0                     # processes that load tokens, per GPU
    # model
    condition: tuple = ("class", "text")  # what it can be asked for: class, text, both, or none
    length: int = 0                      # tokens per image, the first ones; 0: all the tokenizer has
    width: int = 768
    depth: int = 12
    head_dim: int = 64                   # size of an attention head
    caption_width: int = 128             # of the caption encoder
    caption_depth: int = 2               # of the caption encoder
    caption_words: int = 48              # longer captions are cut
    split_tokens: bool = False           # write each token as two halves, which small priors learn faster: see SplitHead in ar.py
    # method
    condition_dropout: float = 0.1       # chance per sample to be trained without any condition, which guidance needs
    word_dropout: float = 0.0            # chance per caption that each of its words is taken away or not by a coin: so words are
                                         # learned too, not only whole captions
    nested_length: bool = False          # train each step on the first 1, 2, 4, ... or all tokens, drawn anew: cheaper, and a third of
                                         # the loss (of 32 tokens) is then that of token 1, which decides most. The logged
                                         # loss mixes lengths; loss_by_position does not
    # optimisation
    steps: int = 100_000                 # optimizer steps
    batch_size: int = 256                # images per step over all processes and micro-batches
    micro_batch: int = 0                 # images per forward pass and process; 0: all at once
    lr: float = 6e-4                     # peak learning rate
    mup_base_width: int = 0              # muP: matrices learn at lr·base/width, so that lr can be tuned at this width; 0: off
    warmup: int = 1000                   # steps
    beta2: float = 0.95                  # of AdamW; beta1 is 0.9
    weight_decay: float = 0.05           # of AdamW, on matrices only
    grad_clip: float = 1.0               # largest gradient norm
    ema_decay: float = 0.9999            # decay of the averaged weights
    # running
    seed: int = 0                        # of the weights, the data order and the dropped conditions
    device: str = "auto"                 # auto, cpu, cuda, cuda:1, mps
    precision: str = "auto"              # auto, bf16 or fp32
    log_every: int = 100                 # steps
    eval_every: int = 5000               # steps; also saves
    eval_images: int = 256               # held-out images whose tokens are scored
    cfg_scale: float = 1.5               # guidance of the sample grid, and what sample.py uses unless told otherwise
    resume: bool = False                 # continue the run in --out
    stop_at: int = 0                     # save and end before this step, as if interrupted; 0: never


# As transcribed from the paper by others (README): batch 1024, 300 epochs of ImageNet in 375k steps, 30 of them warm-up; the
# peak learning rate is known for 49M only
PAPER = dict(data="data/imagenet/train", tokenizer="out/d18-d28", condition=("class",), views=10, batch_size=1024, micro_batch=64,
             steps=375_000, warmup=37_500, lr=1.2e-3, mup_base_width=640, workers=8)
PRESETS = {
    # One thread of a cloud CPU, on the tokenizer of train_tokenizer.py --preset cpu: 13 minutes of CPU time, 4 of them for the tokens.
    # With 30,000 scenes in place of 100,000 the held-out loss was at its best, 3.95, after 5,700 of 9,600 steps; with these it ends at 3.75
    "cpu": dict(data="shapes", tokenizer="out/cpu", out="out/cpu-prior", views=10, width=128, depth=4, head_dim=32, caption_width=64,
                split_tokens=True, steps=7000, batch_size=32, lr=2e-3, warmup=100, ema_decay=0.997, eval_every=3500, cfg_scale=3.0),
    # The same thread, on the shipped tokenizer: 10 minutes. Small enough to be shipped itself; it can only learn by heart
    "emoji64-cpu": dict(data="emoji", tokenizer="assets/emoji64", out="out/emoji64-prior", views=1, augment=False, width=192, depth=4,
                        head_dim=48, caption_width=96, split_tokens=True, word_dropout=0.3, nested_length=True,
                        steps=4500, batch_size=64, lr=2e-3, warmup=100, ema_decay=0.995, log_every=100, eval_every=1500),
    # One GPU: meant for minutes on one; not run here, so neither time nor quality is known
    "emoji64": dict(data="emoji", tokenizer="out/emoji64", out="out/emoji64-prior-gpu", views=64, width=384, depth=6,
                    split_tokens=True, steps=10_000, batch_size=256, lr=8e-4, warmup=500, ema_decay=0.999, eval_every=2000),
    **{name: dict(PAPER, width=width, depth=depth, out=f"out/prior-{name}") for name, (width, depth) in SIZES.items()},
}
RUN_FIELDS = ("out", "workers", "device", "precision", "log_every", "eval_every", "eval_images", "cfg_scale", "resume", "stop_at",
              "micro_batch", "tokens")  # may differ when a run is resumed
GROUPS = ((0, 1), (1, 8), (8, 64), (64, None))  # positions whose losses are logged apart: where are the bits?


# ---------------------------------------------------------------------------------------------------------------
# Tokens, made once


class TokenSet:
    """Tokens of `views` augmented versions of every image: a data set like data.py's, whose "images" are tokens (K,) int64.

    path: a .npy file (n·views, K), uint16 or uint32, memory-mapped. Beside it <path>.json: the fingerprint of the tokenizer
    that made it, labels and captions; and <path>.progress.json: how many rows are done. Raises UserError if another
    tokenizer, or other images, made it; if another run is writing it; if it is damaged.
    """

    def __init__(self, path, tokenizer, dataset, config, run):
        self.path, self.n, self.classes = path, len(dataset), dataset.classes
        self.views = config.views
        self.labels, self.captions = [dataset.label(i) for i in range(self.n)], [dataset.caption(i) for i in range(self.n)]
        absent = set(range(len(self.classes))) - set(self.labels)
        if absent and "class" in config.condition:
            raise UserError(f"--data {config.data}: no training image is of the class {self.classes[min(absent)]!r}; remove its folder "
                            f"or put images into it")
        made_by = {"tokenizer": tokenizer.fingerprint(), "data": config.data, "files": files_digest(dataset), "images": self.n, "views": self.views,
                   "augment": config.augment, "seed": config.seed}
        shape = (self.n * self.views, tokenizer.config.registers)
        with locked(path, run):
            done = self._begin(made_by, shape, np.uint16 if tokenizer.fsq.vocab_size <= 2**16 else np.uint32, run)
            self.tokens = self._open("r+" if done < shape[0] else "r", shape)     # (n·views, K)
            if done < shape[0]:
                self._fill(done, tokenizer, dataset, config, run)
        # a file that cannot be read is replaced by the next one: by its label and caption too
        for i, source in read_json(path + ".progress.json")["replaced"]:
            self.labels[i], self.captions[i] = self.labels[source], self.captions[source]

    def _begin(self, made_by, shape, kind, run):
        """Check or make the files; returns how many rows are done."""
        if os.path.exists(self.path + ".json"):
            known, progress = read_json(self.path + ".json"), read_json(self.path + ".progress.json")
            for name, value in made_by.items():
                if not isinstance(known, dict) or known.get(name) != value:
                    raise UserError(f"{self.path}: its tokens were made with another {name}; name another file with --tokens, or "
                                    f"delete it and {self.path}.json")
            if not isinstance(progress, dict) or type(progress.get("done")) is not int:
                raise UserError(f"{self.path}.progress.json: damaged; delete it and {self.path}.json")
            return progress["done"]
        if run.world > 1:
            dist.barrier()  # all have looked
        if run.is_main:
            with replacing(self.path) as temporary:
                np.lib.format.open_memmap(temporary, "w+", kind, shape).flush()
            write_json(self.path + ".progress.json", {"done": 0, "replaced": []})
            write_json(self.path + ".json", {**made_by, "classes": self.classes, "labels": self.labels, "captions": self.captions})
        if run.world > 1:
            dist.barrier()  # the files are there
        return 0

    def _open(self, mode, shape):
        try:
            tokens = np.load(self.path, mmap_mode=mode)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: cannot be read ({error}); delete {self.path}.json and it is made anew") from None
        if tokens.shape != shape or tokens.dtype not in (np.uint16, np.uint32):
            raise UserError(f"{self.path}: holds {tokens.dtype} {tokens.shape}, expected {shape}; delete it and {self.path}.json")
        return tokens

    def _fill(self, done, tokenizer, dataset, config, run):
        """Tokenise what is missing; each process every world-th part of 64 rows. What is done survives an interruption."""
        seconds, rows, slab, last = time.time(), len(self.tokens), 64 * run.world, done
        replaced = {int(i): source for i, source in read_json(self.path + ".progress.json")["replaced"]}
        for start in range(done, rows, slab):
            mine = range(start + 64 * run.rank, min(start + 64 * (run.rank + 1), rows))
            if mine:
                read = [get_readable(dataset, row % self.n, np.random.default_rng((config.seed, row))) for row in mine]
                replaced.update({row % self.n: source for row, (_, source) in zip(mine, read) if source != row % self.n})
                images = torch.stack([image for image, _ in read])                # (64, 3, H, W) uint8
                tokens = tokenizer.tokenize(to_float(images.to(run.device)))      # 64 x (1, K)
                self.tokens[mine.start:mine.stop] = torch.cat(tokens).cpu().numpy()
            end = min(start + slab, rows)
            if end - last >= 16 * slab or end == rows:
                self.tokens.flush()
                if run.world > 1:
                    everyones = [None] * run.world
                    dist.all_gather_object(everyones, replaced)  # waits, too: all have written up to here
                    replaced = {i: source for one in everyones for i, source in one.items()}
                if run.is_main:
                    write_json(self.path + ".progress.json", {"done": end, "replaced": sorted(replaced.items())})
                if run.is_main and (end == rows or end * 10 // rows > last * 10 // rows):  # ten lines, whatever the size
                    print(f"tokenised {end:,} of {rows:,} views in {clock(time.time() - seconds)}", flush=True)
                if run.world > 1:
                    dist.barrier()  # the progress is on the disk
                last = end

    def __len__(self):
        return self.n

    def label(self, i):
        return self.labels[i]

    def caption(self, i):
        return self.captions[i]

    def get(self, i, rng):
        row = int(rng.integers(self.views)) * self.n + i
        return torch.from_numpy(self.tokens[row].astype(np.int64))                # (K,)


@contextmanager
def locked(path, run):
    """Only one run at a time may write the file of tokens; the lock goes when its process does. Raises UserError if another has it."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".lock", "w") as file:
        if run.is_main:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{path}: another run is writing it; wait for it, or name another file with --tokens") from None
        yield


# ---------------------------------------------------------------------------------------------------------------
# Model


def build_prior(config, tokenizer, classes):
    """A new GPT for the tokens of `tokenizer`."""
    text = CaptionEncoder(CaptionConfig(config.caption_width, config.caption_depth, max_words=config.caption_words)) \
        if "text" in config.condition else None
    return GPT(GPTConfig(
        vocab_size=tokenizer.fsq.vocab_size, length=config.length or tokenizer.config.registers, width=config.width, depth=config.depth,
        head_dim=config.head_dim, classes=classes if "class" in config.condition else 0, text_width=config.caption_width if text else 0,
        levels=tokenizer.config.levels if config.split_tokens else (), cfg_scale=config.cfg_scale), text)


class Loss(nn.Module):
    """The training pass as one module, which is what DistributedDataParallel wants to wrap."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def forward(self, tokens, labels, captions):
        """tokens (b, T), labels (b,) or None, captions: a list of b, or None -> mean loss, losses (b, T) without gradient."""
        text, mask = self.gpt.encode_text(captions) if captions is not None else (None, None)
        return self.gpt.loss(tokens, labels, text, mask)


def drop_conditions(config, labels, captions, step, run):
    """Labels (b,) and captions of this process -> the same, some of them taken away: -1 and "". None: not a condition at all.

    Drawn for the global batch from (seed, step) alone. With class and text a sample keeps either or both, so that each will
    do alone; `condition_dropout` of all samples keep none.
    """
    b = len(labels)
    generator = torch.Generator().manual_seed((config.seed << 32) + step)
    dropped = torch.rand(b * run.world, generator=generator) < config.condition_dropout   # (B,)
    which = torch.randint(3, (b * run.world,), generator=generator)                # (B,): 0 text only, 1 class only, 2 both
    mine = slice(run.rank * b, (run.rank + 1) * b)
    both = set(config.condition) == {"class", "text"}
    no_class, no_text = (dropped | both & (which == w) for w in (0, 1))            # (B,) each
    labels = torch.where(no_class[mine], -1, labels) if "class" in config.condition else None
    fewer = (torch.rand(b * run.world, generator=generator) < config.word_dropout)[mine]          # (b,)
    coins = torch.rand(b * run.world, config.caption_words, generator=generator)[mine] < 0.5  # (b, W)
    captions = ["" if no else some_words(caption, coin) if few else caption
                for no, few, coin, caption in zip(no_text[mine], fewer, coins, captions)] if "text" in config.condition else None
    return labels, captions


def some_words(caption, keep):
    """Those of a caption's first W words for which `keep` (W,), bools, says so; all of them if that would be none."""
    words = caption.split()[:len(keep)]
    return " ".join([word for word, kept in zip(words, keep) if kept] or words)


def nested_length(config, step, T):
    """How many tokens step `step` trains on: T, or with --nested_length one of 1, 2, 4, ..., T, the same on all processes."""
    lengths = powers_of_two(T) if config.nested_length else [T]
    return lengths[np.random.default_rng((config.seed, step)).integers(len(lengths))]


def parameter_groups(model, config):
    """AdamW's groups: matrices decay, vectors and embeddings do not. With muP, matrices learn more slowly the wider they are.

    muP (arXiv 2203.03466) for Adam: a matrix whose inputs grow with the width learns at lr·base/width, so that an lr found on
    a narrow model serves a wide one (of the same depth; more is not promised). The head is such a matrix: a multiplier
    base/width of the readout would do the same, because the head begins at zero and Adam's steps do not depend on the size
    of the gradient. Embeddings, norms, vectors, and what reads captions (whose width is another) keep lr. Weight decay acts
    through lr and so shrinks with it; it is not scaled back.
    """
    def group_of(name, p):
        if p.dim() != 2 or any(word in name for word in ("embedding", "positions", "given_low")):
            return 0
        return 1 if name.startswith(("text_encoder.", "text_mlp.")) else 2
    groups = [[p for name, p in model.named_parameters() if p.requires_grad and group_of(name, p) == i] for i in range(3)]
    slow = config.mup_base_width / config.width if config.mup_base_width else 1.0
    return [{"params": group, "weight_decay": decay, "lr_scale": scale}
            for group, decay, scale in zip(groups, (0.0, config.weight_decay, config.weight_decay), (1.0, 1.0, slow)) if group]


# ---------------------------------------------------------------------------------------------------------------
# Evaluation


def by_position(losses):
    """Losses (b, T) -> sums per group of positions (1, 2-8, 9-64, 65-), (4,) on the device, and counts, a list of 4."""
    parts = [losses[:, start:end] for start, end in GROUPS]
    return torch.stack([part.sum() for part in parts]), [part.numel() for part in parts]


@torch.no_grad()
def evaluate(gpt, tokenizer, held_out, config, path, run):
    """Score held-out tokens with all their conditions, and draw samples from 1, 2, 4, ... tokens into a picture."""
    tokens, labels, captions = held_out
    sums, counts = torch.zeros(4, device=run.device), [0] * 4
    for start in range(0, len(tokens), 64):
        part = slice(start, start + 64)
        with autocast(run.device, config.precision):
            _, losses = Loss(gpt)(tokens[part].to(run.device), labels[part].to(run.device) if "class" in config.condition else None,
                                  captions[part] if "text" in config.condition else None)
        s, c = by_position(losses)                                                # (4,)
        sums, counts = sums + s, [a + b for a, b in zip(counts, c)]
    picked = [i * len(tokens) // 8 for i in range(8)]
    wanted, words = labels[picked].to(run.device), [captions[i] for i in picked]
    text, mask = gpt.encode_text(words) if "text" in config.condition else (None, None)
    drawn = gpt.generate(wanted if "class" in config.condition else None, text, mask, cfg_scale=config.cfg_scale, n=8,
                         generator=torch.Generator().manual_seed(0))              # (8, T)
    columns = [tokenizer.detokenize(list(row[None, :k] for row in drawn), generator=torch.Generator().manual_seed(0),
                                    guidance_scale=tokenizer.recommended_guidance) for k in powers_of_two(drawn.shape[1])]
    save_grid(path, [[column[i].clamp(-1, 1).cpu() for column in columns] for i in range(8)],
              [f"k={k}" for k in powers_of_two(drawn.shape[1])])
    return {"held_out": sums.sum().item() / sum(counts),
            "held_out_by_position": [s / c if c else None for s, c in zip(sums.tolist(), counts)]}


# ---------------------------------------------------------------------------------------------------------------
# Training


def main(config):
    """Train; returns the last evaluation's metrics. A stopped run (Ctrl-C, SIGTERM, --stop_at) returns {} after saving."""
    # ---- distributed ------------------------------------------------------------------------------------------
    run = init_distributed(config.device)
    check(config, run)
    tokenizer = FlexTok.from_pretrained(config.tokenizer, device=run.device)  # before anything is written: it may not be there
    T = config.length or tokenizer.config.registers
    if T > tokenizer.config.registers:
        raise UserError(f"--length {T}: {config.tokenizer} has {tokenizer.config.registers} tokens per image")
    if len(set(tokenizer.image_size)) > 1:
        raise UserError(f"--tokenizer {config.tokenizer}: was trained on {tokenizer.image_size} pixels; a prior is trained on square images")
    resume_path, config_path = (os.path.join(config.out, name) for name in ("resume.pt", "config.json"))
    claim_directory(config, read_json(config_path).get("train") if os.path.exists(resume_path) else None, RUN_FIELDS, run)
    b = config.batch_size // run.world  # images of this process per step
    micro = config.micro_batch or b     # images of one forward pass

    # ---- data -------------------------------------------------------------------------------------------------
    size = max(tokenizer.image_size)
    images = open_data(config.data, size, "train", augment=config.augment, seed=config.seed)
    views = config.views
    if isinstance(images, Shapes):  # endless: other scenes instead of other views of the same
        images.length, views = images.length * views, 1
    dataset = TokenSet(config.tokens or os.path.join(config.out, "tokens.npy"), tokenizer, images, replace(config, views=views), run)
    held_out = tokens_of(open_data(config.data, size, "held_out", augment=False, seed=config.seed), tokenizer, config.eval_images, T)

    # ---- model ------------------------------------------------------------------------------------------------
    torch.manual_seed(config.seed)
    raw = build_prior(config, tokenizer, len(dataset.classes)).to(run.device)
    ema = make_ema(raw, config.ema_decay)
    model = Loss(raw)
    if run.world > 1:
        model = DistributedDataParallel(model)

    # ---- optimizer --------------------------------------------------------------------------------------------
    trainable = [p for p in raw.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameter_groups(raw, config), lr=config.lr, betas=(0.9, config.beta2), fused=True)

    # ---- resume -----------------------------------------------------------------------------------------------
    start = 0
    if config.resume:
        state = load_resume(resume_path)
        raw.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        del state  # or a second copy of everything stays in memory
    stream = batches(dataset, config.batch_size, config.seed, run, start, config.workers)
    log = Log(config.out, run, start)
    if run.is_main:
        print(f"{sum(p.numel() for p in trainable):,} parameters on {run.device}; {len(dataset.tokens):,} x {T} tokens; batch "
              f"{config.batch_size} = {run.world} processes x {b // micro} micro-batches x {micro}; steps {start} to {config.steps}", flush=True)

    def save(step, metrics):
        background.wait()  # one copy of everything at a time
        state = snapshot(dict(model=raw.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), step=step))
        notes = dict(train=asdict(config), classes=dataset.classes, step=step, metrics=metrics, tokenizer=tokenizer.fingerprint(), **provenance(run))
        with torch.device("meta"):  # shapes without memory
            averaged = build_prior(config, tokenizer, len(dataset.classes))
        def write():
            fill_with_average(averaged, state["ema"]).save_pretrained(config.out, **notes)
            save_resume(resume_path, **state)
        background(write)

    # ---- loop -------------------------------------------------------------------------------------------------
    stop, background = StopRequest(), Background()
    metrics, seconds, logged = {}, time.time(), start
    sums, counts = torch.zeros(4, device=run.device), [0] * 4
    for step in range(start, config.steps):
        lr = learning_rate(step, config.lr, config.warmup, config.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        seed_step(config.seed, step, run)
        tokens, labels, indices = next(stream)                                    # (b, K), (b,), (b,)
        tokens = tokens[:, :T].to(run.device, non_blocking=True)                  # (b, T)
        n = nested_length(config, step, T)
        if step == 0 and run.is_main:  # what it is to learn: looking at it finds most data bugs
            shown = tokenizer.detokenize(list(tokens[:16]), guidance_scale=tokenizer.recommended_guidance,
                                         generator=torch.Generator().manual_seed(0))
            save_grid(os.path.join(config.out, "inputs.png"), shown.clamp(-1, 1).cpu().split(8))
        labels, captions = drop_conditions(config, labels, [dataset.caption(i) for i in indices.tolist()], step, run)
        labels = None if labels is None else labels.to(run.device, non_blocking=True)

        for i in range(0, b, micro):
            part = slice(i, i + micro)
            model.require_backward_grad_sync = i + micro == b  # DDP: talk once per step, not once per micro-batch
            with autocast(run.device, config.precision), attention_kernel(run.device):
                loss, losses = model(tokens[part, :n], None if labels is None else labels[part],
                                     None if captions is None else captions[part])  # (), (micro, n)
            # FORK: another objective
            (loss * micro / b).backward()
            s, c = by_position(losses)                                            # (4,)
            sums, counts = sums + s, [a + b for a, b in zip(counts, c)]

        grad_norm = torch.nn.utils.clip_grad_norm_(trainable, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(raw)

        done = step + 1
        stopping = done == config.stop_at or stop.agreed(run)
        evaluating = done % config.eval_every == 0 or done == config.steps
        if (evaluating or stopping) and not grad_norm.isfinite():  # the same on all processes, and of all micro-batches
            raise UserError(f"the loss is no longer finite at step {step}; the last checkpoint stands, try a lower --lr than {config.lr}")
        if done % config.log_every == 0 or done == config.steps:
            if run.world > 1:
                dist.all_reduce(sums)
                sums /= run.world  # the counts are the same everywhere
            rate = (done - logged) / (time.time() - seconds)
            log(step=step, loss=sums.sum().item() / sum(counts),
                loss_by_position=[s / c if c else None for s, c in zip(sums.tolist(), counts)], lr=lr,
                grad_norm=grad_norm.item(), images_per_s=rate * config.batch_size, eta=clock((config.steps - done) / rate))
            seconds, logged = time.time(), done
            sums, counts = torch.zeros_like(sums), [0] * 4
        if evaluating and run.is_main:
            metrics = evaluate(ema.module.eval(), tokenizer, held_out, config, os.path.join(config.out, f"step{done:07d}.png"), run)
            log(step=step, **metrics)
            save(done, metrics)
            seconds, logged = time.time(), done  # evaluation does not count as training time
        if stopping:
            if run.is_main:
                if not evaluating:
                    save(done, metrics)
                background.wait()
                print(f"stopped after step {done}; go on with --resume")
            metrics = {}
            break
    background.wait()
    stop.release()
    return metrics


def tokens_of(dataset, tokenizer, count, T):
    """The first T tokens of `count` images spread over a data set (n, T), their labels (n,), and their captions."""
    n = min(count, len(dataset))
    picked = [i * len(dataset) // n for i in range(n)]
    images, picked = zip(*(get_readable(dataset, i, np.random.default_rng(0)) for i in picked))
    images = to_float(torch.stack(images))                                        # (n, 3, H, W)
    tokens = torch.cat([row for part in images.split(64) for row in tokenizer.tokenize(part, k=T)]).cpu()    # (n, T)
    return tokens, torch.tensor([dataset.label(i) for i in picked]), [dataset.caption(i) for i in picked]


def check(config, run):
    """Raise UserError for settings that cannot work, before anything is trained or written."""
    check_range(config, 1, math.inf, "steps", "batch_size", "log_every", "eval_every", "eval_images", "warmup", "views", "width", "depth",
                "head_dim", "caption_width", "caption_depth", "caption_words")
    check_range(config, 0, math.inf, "length", "micro_batch", "workers", "mup_base_width", "stop_at", "weight_decay", "cfg_scale")
    check_range(config, 0, 1, "word_dropout", "lr", "beta2", "ema_decay")
    check_range(config, 1e-9, math.inf, "grad_clip")
    check_range(config, 0, 2**31 - 1, "seed")
    if not 0 <= config.condition_dropout < 1:
        raise UserError(f"--condition_dropout {config.condition_dropout}: expected at least 0 and less than 1")
    if config.caption_width % CaptionConfig.head_dim:
        raise UserError(f"--caption_width {config.caption_width}: expected a multiple of {CaptionConfig.head_dim}")
    if not set(config.condition) <= {"class", "text"} and config.condition != ("none",):
        raise UserError(f"--condition {' '.join(config.condition)}: expected class, text, both, or none")
    if config.batch_size % (run.world * max(1, config.micro_batch)):
        raise UserError(f"--batch_size {config.batch_size}: expected a multiple of processes x micro_batch = {run.world} x "
                        f"{max(1, config.micro_batch)}")
    if config.width % config.head_dim:
        raise UserError(f"--width {config.width}: expected a multiple of --head_dim {config.head_dim}")
    autocast(run.device, config.precision)


if __name__ == "__main__":
    command(main, from_cli(ARConfig, PRESETS))
