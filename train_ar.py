"""
Train the prior: a GPT that writes the tokens of a trained tokenizer, by class and by caption.

    images --tokenizer, once--> tokens.npy (n·views, K) --GPT--> how likely is each token, given those before it
                                labels, captions ------------>   loss = -log p(token)

Paper: FlexTok, arXiv 2502.13967, section 3.3. Differences: no dropout inside the network, `token_dropout`
before it instead; captions are read by a small encoder that is trained along, not by a frozen T5.

    python train_ar.py --preset cpu                                              # after train_tokenizer.py --preset cpu
    python train_ar.py --preset emoji64-cpu
    torchrun --nproc_per_node 8 train_ar.py --preset 201M --data /data/imagenet/train --tokenizer out/d18-d28

Writes out/<run>/: tokens.npy, config.json, model.safetensors (averaged weights: what sample.py reads), resume.pt,
log.jsonl, curves.png and pictures. Times and expected numbers: RESULTS.md.               Next: sample.py generate
"""
import math
import os
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ar import GPT, SIZES, GPTConfig
from clips import save_clip_grid
from common import (Log, UserError, attention_kernel, autocast, check_range, command, compile_blocks, from_cli,
                    generator, init_distributed, shipped)
from data import Cached, Films, MovingShapes, Shapes, batches, open_clips, open_data, spread
from evaluate import GROUPS, by_position, held_out_loss, open_tokenizer, sample_grid
from images import draw_curves, save_grid, to_float
from runs import (Average, Checkpoints, Means, Recorded, Scaler, check_run, fill_with_average, optimizer_for,
                  provenance, recorded, seconds_of)
from text import CaptionConfig, CaptionEncoder
from video import ClipSequences


@dataclass
class ARConfig:
    """Train a prior over the tokens of a trained tokenizer."""
    # data
    data: str = "emoji"                  # emoji, shapes, or a folder of images; of clips: moving, or a folder
    tokenizer: str = "assets/emoji64"    # directory of a trained tokenizer
    tokens: str = ""                     # file of tokens, made if it is not there; empty: <out>/tokens.npy
    views: int = 10                      # versions of each image, half of the time as it is; of shapes: more scenes
    out: str = "out/prior"               # the run's directory
    init: str = ""                       # a trained prior of these sizes to go on from; empty: random weights
    workers: int = 0                     # processes that load tokens, per GPU
    # model
    condition: tuple = ("class", "text")  # what it can be asked for: class, text, both, or none
    length: int = 0                      # tokens per image, the first ones; 0: all the tokenizer has
    width: int = 768                     # of the blocks
    depth: int = 12                      # blocks
    head_dim: int = 64                   # size of an attention head
    caption_width: int = 128             # of the caption encoder
    caption_depth: int = 2               # of the caption encoder
    caption_words: int = 48              # longer captions are cut
    # method
    condition_dropout: float = 0.1       # chance per sample to be trained without any condition, which guidance needs
    word_dropout: float = 0.0            # chance per caption that a coin decides for each word whether it stays
    token_dropout: float = 0.0           # chance per token that those after it are not told which it is
    # optimisation
    steps: int = 100_000                 # optimizer steps
    batch_size: int = 256                # images per step over all processes and micro-batches
    micro_batch: int = 0                 # images per forward pass and process; 0: all at once
    lr: float = 6e-4                     # peak learning rate
    muon_lr: float = 0.0                 # peak for matrices of blocks, by Muon; 0: by AdamW, official; 0.01 if short
    mup_base_width: int = 0              # muP: AdamW's matrices learn at lr·base/width; 0: off
    warmup: int = 1000                   # steps
    beta2: float = 0.95                  # of AdamW; beta1 is 0.9
    weight_decay: float = 0.05           # on matrices only
    grad_clip: float = 1.0               # largest gradient norm
    ema_decay: float = 0.9999            # decay of the averaged weights
    # running
    seed: int = 0                        # of the weights, the data order and the dropped conditions
    device: str = "auto"                 # auto, cpu, cuda, cuda:1, mps
    precision: str = "auto"              # auto, bf16, fp16 (GPUs without bf16) or fp32
    compile: bool = False                # torch.compile the blocks; on one GPU, record a step as a CUDA graph
    log_every: int = 100                 # steps
    eval_every: int = 5000               # steps; also saves
    eval_images: int = 256               # held-out images whose tokens are scored
    cfg_scale: float = 1.5               # guidance of the sample grid, and what sample.py uses unless told otherwise
    resume: bool = False                 # continue the run in --out
    stop_at: int = 0                     # save and end before this step, as if interrupted; 0: never


# As transcribed from the paper by others: batch 1024, 300 epochs of ImageNet in 375k steps, 30 epochs of it
# warm-up; the peak learning rate is known for 49M only
PAPER = dict(data="data/imagenet/train", tokenizer="out/d18-d28", condition=("class",), views=10, batch_size=1024,
             micro_batch=64, steps=375_000, warmup=37_500, lr=1.2e-3, mup_base_width=640, workers=8)
PRESETS = {
    "cpu": dict(          # a CPU core, 7 minutes, after train_tokenizer.py --preset cpu: drawn scenes
        data="shapes", tokenizer="out/cpu", out="out/cpu-prior", views=10, width=128, depth=4, head_dim=32,
        caption_width=64, cfg_scale=3.0,
        steps=4000, batch_size=32, lr=2e-3, muon_lr=0.01, warmup=100, ema_decay=0.997, eval_every=2000),
    "video-cpu": dict(    # a CPU core, 8 minutes, after train_video.py --preset video-cpu: drawn clips
        data="moving", tokenizer="out/video-cpu", out="out/video-cpu-prior", views=1, width=128, depth=4, head_dim=32,
        caption_width=64, cfg_scale=3.0, condition=("text",),
        steps=3000, batch_size=32, lr=2e-3, warmup=100, ema_decay=0.997, eval_every=1500),
    "emoji64-cpu": dict(  # two CPU cores, an hour, after train_tokenizer.py --preset emoji64-cpu
        data="emoji", tokenizer="out/emoji64-cpu", out="out/emoji64-cpu-prior", views=16, width=192, depth=4,
        head_dim=48, caption_width=96, word_dropout=0.3, token_dropout=0.4, cfg_scale=3.0,
        steps=7500, batch_size=128, lr=2e-3, muon_lr=0.01, warmup=100, ema_decay=0.998, eval_every=2500),
    "emoji64": dict(      # one H100, 2 minutes with --compile, after train_tokenizer.py --preset emoji64
        data="emoji", tokenizer="out/emoji64", out="out/emoji64-prior", views=8, width=192, depth=4, workers=4,
        head_dim=48, caption_width=96, word_dropout=0.3, token_dropout=0.4, cfg_scale=3.0,
        steps=5000, batch_size=256, lr=2e-3, muon_lr=0.01, warmup=100, ema_decay=0.998, eval_every=2500),
    "49M": dict(          # the paper's smallest (not run): 8 GPUs, ImageNet in --data, a trained --tokenizer
        PAPER, width=SIZES["49M"][0], depth=SIZES["49M"][1], out="out/prior-49M"),
    "85M": dict(          # the paper's (not run)
        PAPER, width=SIZES["85M"][0], depth=SIZES["85M"][1], out="out/prior-85M"),
    "201M": dict(         # the paper's (not run)
        PAPER, width=SIZES["201M"][0], depth=SIZES["201M"][1], out="out/prior-201M"),
    "393M": dict(         # the paper's (not run)
        PAPER, width=SIZES["393M"][0], depth=SIZES["393M"][1], out="out/prior-393M"),
    "679M": dict(         # the paper's (not run)
        PAPER, width=SIZES["679M"][0], depth=SIZES["679M"][1], out="out/prior-679M"),
    "1.33B": dict(        # the paper's largest (not run)
        PAPER, width=SIZES["1.33B"][0], depth=SIZES["1.33B"][1], out="out/prior-1.33B"),
}
# may differ when a run is resumed
RUN_FIELDS = ("out", "workers", "device", "precision", "compile", "log_every", "eval_every", "eval_images",
              "cfg_scale", "resume", "stop_at", "micro_batch", "tokens")


# ---------------------------------------------------------------------------------------------------------------
# The algorithm


def training_loss(gpt, tokens, labels, ids, mask, kept=None):
    """How surprised the prior is by each token: -log p in nats, the mean, and each (b, T) without gradient.

    Paper Sec. 3.3.

    tokens (b, T): the first T of each image, coarse to fine. labels (b,), -1 where the class is not said, or None.
    ids (b, M, P), mask (b, M): the words of captions, of "" where nothing is said (text.py), or None.
    """
    # A caption's words become states, which every block of the GPT looks at; a class is a vector added to the start.
    text, mask = (None, None) if ids is None else gpt.text_encoder(ids, mask)     # (b, M, E), (b, M)
    # Token i is predicted from those before it. They are ordered, so that the first ones decide what is in the picture:
    # whoever writes them one by one can stop anywhere and has an image.
    # FORK: another objective. Return its mean, and one number for each token, for the log.
    return gpt.loss(tokens, labels, text, mask, kept)                             # (), (b, T)


class Loss(nn.Module):
    """`training_loss` as one module, which is what DistributedDataParallel wants to wrap."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def forward(self, tokens, labels, ids, mask, kept=None):
        return training_loss(self.gpt, tokens, labels, ids, mask, kept)


def drop_conditions(config, labels, captions, step, run):
    """Labels (b,) and captions of this process -> the same, some taken away: -1 and "". None: not a condition at all.

    Drawn for the global batch from (seed, step) alone. With class and text a sample keeps either or both, so that each
    will do alone; `condition_dropout` of all samples keep none.
    """
    b = len(labels)
    source = generator("cpu", config.seed, step, "conditions")
    dropped = torch.rand(b * run.world, generator=source) < config.condition_dropout   # (B,)
    which = torch.randint(3, (b * run.world,), generator=source)                  # (B,): text only, class only, both
    mine = run.part(b * run.world)
    both = set(config.condition) == {"class", "text"}
    no_class, no_text = (dropped | both & (which == w) for w in (0, 1))            # (B,) each
    labels = torch.where(no_class[mine], -1, labels) if "class" in config.condition else None
    fewer = (torch.rand(b * run.world, generator=source) < config.word_dropout)[mine]          # (b,)
    coins = torch.rand(b * run.world, config.caption_words, generator=source)[mine] < 0.5  # (b, W)
    captions = ["" if no else some_words(caption, coin) if few else caption
                for no, few, coin, caption in zip(no_text[mine], fewer, coins, captions)]
    captions = captions if "text" in config.condition else None
    return labels, captions


def kept_tokens(config, T, step, run):
    """Which tokens the prior may read, (b, T - 1) bools, drawn as above; None if there is no --token_dropout."""
    if not config.token_dropout:
        return None
    B, source = config.batch_size, generator("cpu", config.seed, step, "tokens")
    kept = torch.rand(B, T - 1, generator=source) >= config.token_dropout         # (B, T - 1)
    return kept[run.part(B)].to(run.device, non_blocking=True)                    # (b, T - 1)


def some_words(caption, keep):
    """Those of a caption's first W words for which `keep` (W,), bools, says so; all of them if that would be none."""
    words = caption.split()[:len(keep)]
    return " ".join([word for word, kept in zip(words, keep) if kept] or words)


# ---------------------------------------------------------------------------------------------------------------
# The pieces of a run


def build_prior(config, tokenizer, classes):
    """A new GPT for the tokens of `tokenizer`."""
    text = CaptionEncoder(CaptionConfig(config.caption_width, config.caption_depth, max_words=config.caption_words)) \
        if "text" in config.condition else None
    return GPT(GPTConfig(
        vocab_size=tokenizer.quantizer.vocab_size, length=config.length or tokenizer.config.registers,
        width=config.width, depth=config.depth, head_dim=config.head_dim,
        classes=classes if "class" in config.condition else 0, text_width=config.caption_width if text else 0,
        cfg_scale=config.cfg_scale), text)


def parameter_groups(model, config):
    """AdamW's groups: matrices decay, vectors and embeddings do not. With muP, wider matrices learn more slowly.

    muP (arXiv 2203.03466) for Adam: a matrix whose inputs grow with the width learns at lr·base/width, so that an lr
    found on a narrow model serves a wide one of the same depth. The head is such a matrix: it begins at zero, so this
    equals muP's multiplier of the readout. Embeddings, norms, vectors and what reads captions keep lr.
    """
    def group_of(name, p):
        if p.dim() != 2 or any(word in name for word in ("embedding", "positions")):
            return 0
        return 1 if name.startswith(("text_encoder.", "text_mlp.")) else 2
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [[p for name, p in named if group_of(name, p) == i] for i in range(3)]
    slow = config.mup_base_width / config.width if config.mup_base_width else 1.0
    return [{"params": group, "weight_decay": decay, "lr_scale": scale}
            for group, decay, scale in zip(groups, (0.0, *[config.weight_decay] * 2), (1.0, 1.0, slow)) if group]


def cache_tokens(images, views, config, tokenizer, run, plain=None):
    """The tokens of so many versions of every image, made once, with labels and captions: a `Cached` of (K,).

    plain: the images as they are, where the first version is to be that. Raises UserError for a class without an image.
    """
    labels, captions = [images.label(i) for i in range(len(images))], [images.caption(i) for i in range(len(images))]
    absent = set(range(len(images.classes))) - set(labels)
    if absent and "class" in config.condition:
        raise UserError(f"--data {config.data}: no training image is of the class {images.classes[min(absent)]!r}; "
                        f"remove its folder or put images into it")
    if "text" in config.condition and not any(captions):
        raise UserError(f"--data {config.data}: no training image has a caption; give --condition class, or a "
                        f"captions.json")
    made_by = {"tokenizer": tokenizer.fingerprint(), "data": config.data}
    path = config.tokens or os.path.join(config.out, "tokens.npy")
    cached = Cached(path, images, views, (tokenizer.config.registers,),
                    np.uint16 if tokenizer.quantizer.vocab_size <= 2**16 else np.uint32, made_by, run, config.seed,
                    plain, labels, captions)
    cached.fill(lambda part, row: torch.cat(tokenizer.tokenize(to_float(part.to(run.device)))).cpu().numpy(),
                "part 1 of 2, tokens:", lambda: seconds_to_come(config, run, tokenizer, len(images.classes)))
    most = np.load(path, mmap_mode="r").max()
    if most >= tokenizer.quantizer.vocab_size:
        raise UserError(f"{path}: damaged, it holds the token {most}; delete it and {path}.json")
    return cached


def seconds_to_come(config, run, tokenizer, classes):
    """About how long the prior will take for all its steps: timed with random weights and tokens."""
    b = config.batch_size // run.world
    gpt, micro = build_prior(config, tokenizer, classes).to(run.device), config.micro_batch or b
    tokens = torch.randint(gpt.config.vocab_size, (micro, gpt.config.length), device=run.device)  # (micro, T)
    muon = optimizer_for(gpt, config, parameter_groups(gpt, config)) if config.muon_lr else None

    def step():
        with autocast(run.device, config.precision), attention_kernel(run.device):
            words = gpt.text_encoder.tokenize(["a few words"] * micro) if gpt.text_encoder else (None, None)
            loss, _ = training_loss(gpt, tokens, None, *words)
        loss.backward()
        if muon:
            muon.step()
        return loss.detach()
    return config.steps * seconds_of(step) * b / micro


def open_split(config, tokenizer, split, augment=False):
    """The data set of --data at the tokenizer's size. Of clips, clips, which have no augmentation."""
    side = max(tokenizer.image_size)
    if isinstance(tokenizer, ClipSequences):
        return open_clips(config.data, side, split, config.seed, tokenizer.config.frames)
    return open_data(config.data, side, split, augment, config.seed)


def tokens_of(dataset, tokenizer, count, T):
    """The first T tokens of `count` images spread over a data set (n, T), their labels (n,), and their captions."""
    images, rows = spread(dataset, count)                                         # (n, 3, H, W)
    tokens = torch.cat([row for part in images.split(64) for row in tokenizer.tokenize(part, k=T)]).cpu()    # (n, T)
    return tokens, torch.tensor([dataset.label(i) for i in rows]), [dataset.caption(i) for i in rows]


def go_on_from(directory, gpt):
    """Copy the weights of a trained prior (--init). Raises UserError if its sizes are others."""
    trained = GPT.from_pretrained(directory)
    if replace(trained.config, cfg_scale=gpt.config.cfg_scale) != gpt.config:
        raise UserError(f"--init {directory}: its prior has other sizes than this run's")
    try:
        gpt.load_state_dict(trained.state_dict())
    except RuntimeError:  # the caption encoder's sizes are not in that config
        raise UserError(f"--init {directory}: its caption encoder has other sizes than this run's") from None


def draw_inputs(tokenizer, tokens, config):
    """A picture of what the prior is to write, tokens (b, T) decoded: looking at it finds most data bugs."""
    images = tokenizer.detokenize(list(tokens[:16]), guidance_scale=tokenizer.recommended_guidance,
                                  generator=torch.Generator().manual_seed(0))     # (16, 3, H, W)
    save_rows(os.path.join(config.out, "inputs"), images.clamp(-1, 1).cpu().split(8))


def evaluate(gpt, tokenizer, held_out, config, step):
    """Score held-out tokens, labels and captions; draw samples from their conditions into a picture."""
    metrics = held_out_loss(gpt, *held_out, config.precision)
    columns, header = sample_grid(gpt, tokenizer, *held_out[1:], config.cfg_scale)
    rows = [[column[i] for column in columns] for i in range(8)]
    save_rows(os.path.join(config.out, f"step{step:07d}"), rows, header)
    draw_curves(config, step, metrics)
    return metrics


def save_rows(path, rows, header=()):
    """Write rows of images (3, H, W) as a .png; rows of clips (3, F, H, W) as an animated .webp."""
    of_clips = rows[0][0].dim() == 4
    (save_clip_grid if of_clips else save_grid)(path + (".webp" if of_clips else ".png"), rows, header)


# ---------------------------------------------------------------------------------------------------------------
# The run


def main(config):
    """Train; returns the last evaluation's metrics, or {} if it was stopped (Ctrl-C, SIGTERM, --stop_at), after saving.

    Raises UserError for settings that cannot work, before anything is written.
    """
    run = init_distributed(config.device)
    check(config, run)
    tokenizer = open_trained(config, run)  # these two before anything is written: they may not be there
    images = open_split(config, tokenizer, "train", augment=True)
    with Checkpoints(config, RUN_FIELDS, run) as checkpoints:
        return train(config, run, checkpoints, tokenizer, images)


def train(config, run, checkpoints, tokenizer, images):
    """The run itself; see `main`."""
    # ---- data -------------------------------------------------------------------------------------------------
    b = config.batch_size // run.world  # images of this process per step
    micro = config.micro_batch or b     # images of one forward pass
    T = config.length or tokenizer.config.registers
    views = config.views
    if isinstance(images, (Shapes, MovingShapes)):  # endless: other scenes instead of other views of the same
        images.length, views = images.length * views, 1
    plain = None if isinstance(images, (Shapes, MovingShapes, Films)) else open_split(config, tokenizer, "train")
    dataset = cache_tokens(images, views, config, tokenizer, run, plain)
    held_out = open_split(config, tokenizer, "held_out")
    held_out = tokens_of(held_out, tokenizer, config.eval_images, T)              # (n, T), (n,), n captions

    # ---- model ------------------------------------------------------------------------------------------------
    torch.manual_seed(config.seed)
    raw = build_prior(config, tokenizer, len(dataset.classes)).to(run.device)
    if config.init:
        go_on_from(config.init, raw)
    ema = Average(raw, config.ema_decay)
    if config.compile:  # one graph; where captions vary in length, others for sizes of 1: 4 at most
        compile_blocks(raw.trunk.blocks, dynamic="text" in config.condition)
    model = Loss(raw)
    if run.world > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)

    # ---- optimizer --------------------------------------------------------------------------------------------
    trainable = [p for p in raw.parameters() if p.requires_grad]
    optimizer = optimizer_for(raw, config, parameter_groups(raw, config))
    scaler = Scaler(config, run)

    # ---- resume -----------------------------------------------------------------------------------------------
    def export(state):
        with torch.device("meta"):  # shapes without memory
            averaged = build_prior(config, tokenizer, len(dataset.classes))
        fill_with_average(averaged, state["ema"]).save_pretrained(
            config.out, train=asdict(config), classes=dataset.classes, step=state["step"], metrics=state["metrics"],
            tokenizer=tokenizer.fingerprint(), **provenance(run))

    start = checkpoints.restore({"model": raw, "ema": ema, "optimizer": optimizer, "scaler": scaler}, export)
    log = Log(config.out, run, start, "part 2 of 2, prior:", config.steps)
    means = Means(1 + len(GROUPS), run)

    def learn(_, *tensors):
        """Forwards and backwards with a micro-batch: adds to the gradients, returns each token's loss (micro, T)."""
        with autocast(run.device, config.precision), attention_kernel(run.device):
            loss, losses = model(*tensors)                                        # (), (micro, T)
        scaler.scale(loss * micro / b).backward()
        return losses
    learn = recorded(learn, config, run)
    stream = batches(dataset, config.batch_size, config.seed, run, start, config.workers)
    log.say(f"{sum(p.numel() for p in trainable):,} parameters on {run.device}; {len(dataset) * views:,} x {T} tokens; "
            f"batch {config.batch_size} = {run.world} processes x {b // micro} micro-batches x {micro}; "
            f"steps {start} to {config.steps}")

    def report():
        loss, *of_groups = means.take()
        return dict(loss=loss, loss_by_position=of_groups, grad_norm=norm)
    steps = checkpoints.steps(log, report, lambda: ema.module if run.is_main else None,
                              lambda averaged, step: evaluate(averaged, tokenizer, held_out, config, step))

    # ---- loop -------------------------------------------------------------------------------------------------
    for step, lr in steps:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        tokens, labels, indices = next(stream)                                    # (b, K), (b,), (b,)
        tokens = tokens[:, :T].to(run.device, non_blocking=True)                  # (b, T)
        if step == 0 and run.is_main:
            draw_inputs(tokenizer, tokens, config)
        captions = [dataset.caption(i) for i in indices.tolist()]
        labels, captions = drop_conditions(config, labels, captions, step, run)
        labels = None if labels is None else labels.to(run.device, non_blocking=True)  # (b,)
        kept = kept_tokens(config, T, step, run)                                  # (b, T - 1) or None
        words = (None, None) if captions is None else \
            raw.text_encoder.tokenize(captions, multiple=16 if config.compile else 1)  # (b, M, P), (b, M)
        for part in (slice(i, i + micro) for i in range(0, b, micro)):
            model.require_backward_grad_sync = part.stop == b  # DDP: talk once per step, not once per micro-batch
            given = (x if x is None else x[part] for x in (tokens, labels, *words, kept))
            means.add(*by_position(learn(None, *given)))
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trainable, config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=not isinstance(learn, Recorded))
        ema.update_parameters(raw)
    return checkpoints.metrics


def open_trained(config, run):
    """The trained tokenizer, before anything is written: it may not be there. Raises UserError if it does not fit."""
    name = shipped(config.tokenizer)
    presets = ("cpu", "emoji64-cpu", "emoji64", "d18-d28", "video-cpu")
    made_by = [preset for preset in presets if config.tokenizer == f"out/{preset}"]
    if made_by and not os.path.isdir(name):
        script = "train_video.py" if made_by == ["video-cpu"] else "train_tokenizer.py"
        raise UserError(f"--tokenizer {name}: is not there yet; run {script} --preset {made_by[0]} first")
    tokenizer = open_tokenizer(name, run.device)
    K, rows = tokenizer.config.registers, tokenizer.rows  # of clips at least a token a row
    if config.length > K or 0 < config.length < rows:
        raise UserError(f"--length {config.length}: {config.tokenizer} has {rows} to {K} tokens per image")
    if len(set(tokenizer.image_size)) > 1:
        raise UserError(f"--tokenizer {name}: takes {tokenizer.image_size} pixels; a prior needs square images")
    return tokenizer


def check(config, run):
    """Raise UserError for settings that cannot work, before anything is trained or written."""
    check_run(config, run)
    check_range(config, 1, math.inf, "eval_images", "views", "width", "depth", "head_dim", "caption_width",
                "caption_depth", "caption_words")
    check_range(config, 0, math.inf, "length", "micro_batch", "mup_base_width", "weight_decay", "cfg_scale")
    check_range(config, 0, 1, "word_dropout", "token_dropout", "beta2", "muon_lr")
    if not 0 <= config.condition_dropout < 1:
        raise UserError(f"--condition_dropout {config.condition_dropout}: expected at least 0 and less than 1")
    if config.caption_width % CaptionConfig.head_dim:
        raise UserError(f"--caption_width {config.caption_width}: expected a multiple of {CaptionConfig.head_dim}")
    if not set(config.condition) <= {"class", "text"} and config.condition != ("none",):
        raise UserError(f"--condition {' '.join(config.condition)}: expected class, text, both, or none")
    if config.width % config.head_dim:
        raise UserError(f"--width {config.width}: expected a multiple of --head_dim {config.head_dim}")


if __name__ == "__main__":
    command(main, from_cli(ARConfig, PRESETS, needs_preset=True))
