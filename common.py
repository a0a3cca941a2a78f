"""
Plumbing shared by the scripts; no machine learning in here.

    dataclass --from_cli--> config --init_distributed--> Run(device, rank, world) --> loop --> out/<run>/
                                                                       config.json  model.safetensors  resume.pt  log.jsonl
Sections: command line and errors; devices and torchrun; schedule and EMA; files and checkpoints; logging.
Nothing to run here. Next: data.py, or go back to the reading order in README.md.
"""
import argparse
import dataclasses
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel


# ---------------------------------------------------------------------------------------------------------------
# Command line and errors


class UserError(Exception):
    """What the user can mend: one sentence naming the file or flag, the value found and what was expected."""


def shown(value):
    """A value from a file as it may stand in an error: short and on one line."""
    text = re.sub(r"\s+", " ", repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def command(main, *args):
    """Run a script's `main(*args)`; a `UserError`, or a file that the system refuses, becomes one line on stderr and exit code 2."""
    try:
        return main(*args)
    except UserError as error:
        problem = error
    except OSError as error:  # no permission, a full disk, a name that is too long or leads through a file
        if error.filename is None:
            raise
        problem = f"{error.filename}: {error.strerror}"
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


def check_range(config, least, most, *names):
    """Raise `UserError` for a field of `config` among `names` that is not a finite number from `least` to `most`."""
    for name in names:
        value = getattr(config, name)
        if not (least <= value <= most and math.isfinite(value)):
            raise UserError(f"--{name} {value}: expected " + (f"at least {least}" if most == math.inf else f"{least} to {most}"))


def from_cli(Config, presets={}, argv=None, positional=""):
    """Build the dataclass `Config` from the command line: one --flag per field, and the field's comment is its help text.

    `presets` maps a name to field values that replace the defaults; flags given by the user win over both. Tuples are
    given as several words (--ks 1 2 4); the field named `positional` takes the words without a flag. An unknown flag or a
    value of the wrong type ends the program with code 2.
    """
    notes = dict(re.findall(r"^\s+(\w+)\s*:[^#\n]*#\s*(.+)$", inspect.getsource(Config), re.M))
    # allow_abbrev: without this, --time would silently mean --timesteps
    parser = argparse.ArgumentParser(description=(Config.__doc__ or "").strip(), allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    if presets:
        parser.add_argument("--preset", choices=list(presets), help="start from a named set of values; flags override it")
    for field in dataclasses.fields(Config):
        default, help_text = field.default, notes.get(field.name, " ").replace("%", "%%")  # a bare % would crash --help
        if field.name == positional:
            parser.add_argument(field.name, nargs="*", default=default, help=help_text)
            continue
        if isinstance(default, bool):  # type=bool would read "False" as true
            kind = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(default, tuple):
            kind = dict(nargs="+", type=type(default[0]), metavar=type(default[0]).__name__.upper())
        else:
            kind = dict(type=type(default), metavar=type(default).__name__.upper())
        parser.add_argument("--" + field.name, default=default, help=help_text, **kind)
    if presets:
        parser.set_defaults(**presets.get(parser.parse_known_args(argv)[0].preset, {}))
    values = vars(parser.parse_args(argv))
    values.pop("preset", None)
    return Config(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


# ---------------------------------------------------------------------------------------------------------------
# Devices and torchrun


@dataclasses.dataclass
class Run:
    """Where this process runs: its device, its rank among `world` processes, and whether it may print and save."""
    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def is_main(self):
        return self.rank == 0


def pick_device(name="auto"):
    """"auto" -> cuda, else mps, else cpu. A device asked for by name and absent raises `UserError`: no silent fallback."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: not usable here ({str(error).splitlines()[0]}); try --device auto") from None
    return device


def init_distributed(device="auto"):
    """The launcher decides: RANK in the environment (torchrun) -> a process group, nccl on CUDA, else gloo. Absent -> world 1.

    Returns a `Run`. The same training code then runs on one CPU, one GPU or many.
    """
    if "RANK" not in os.environ:
        return Run(pick_device(device))
    device = pick_device(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # A day: some things the main process does alone, such as filling a cache or evaluating, and the others wait. If one of
        # them dies, torchrun ends the others at once, without waiting so long.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    return Run(device, dist.get_rank(), dist.get_world_size())


def autocast(device, precision):
    """Context for the forward pass: precision "bf16" runs matrix products in bfloat16, "fp32" changes nothing.

    "auto" is bf16 where the hardware multiplies it natively (CUDA from Ampere on, CPUs with AVX512-BF16 or AMX).
    Raises UserError for any other word.
    """
    if precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"--precision {precision}: expected auto, bf16 or fp32")
    if precision == "auto":
        precision = "bf16" if has_native_bf16(device) else "fp32"
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def attention_kernel(device):
    """Context that picks the kernel of attention in training, to be entered inside `autocast`: torch's own choice, but for one case.

    torch 2.13's fused CPU kernel is slow backwards in bfloat16 for short sequences: with it, a step of the cpu preset takes
    twice as long as with the plain one. In float32 it is the faster one (measured from 80 to 512 tokens), and keeps no n x n matrix.
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" and torch.is_autocast_enabled("cpu") else nullcontext()


def has_native_bf16(device):
    """Whether bfloat16 products are done in hardware here, and not emulated (which is slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        asks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
        return torch.backends.mkldnn.is_available() and any(ask() for ask in asks if ask)
    return False  # mps: left at float32, not tested here


# ---------------------------------------------------------------------------------------------------------------
# Schedule and EMA


def learning_rate(step, peak, warmup, steps, final=0.01):
    """Linear warm-up to `peak` over `warmup` steps, then cosine to `final`·peak at `steps`. `step` counts from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))  # in [0, 1]
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_ema(model, decay):
    """A copy of `model` whose parameters follow p_ema <- d·p_ema + (1-d)·p at each `.update_parameters(model)`.

    d = min(decay, (1+n)/(10+n)) at update n, so that a short run is not dominated by its random initial weights
    (the rule of tf.train.ExponentialMovingAverage). The averaged model is `.module`.
    """
    def average(ema_params, params, n):
        n = int(averaged.n_averaged)  # the argument is a copy on the device, and reading it would wait for the device
        d = min(decay, (1 + n) / (10 + n))
        own = lambda tensors: [x.to_local() if hasattr(x, "to_local") else x for x in tensors]  # noqa: E731, this process's part
        torch._foreach_lerp_(own(ema_params), own(params), 1 - d)
    averaged = AveragedModel(model, multi_avg_fn=average).requires_grad_(False)
    return averaged


def fill_with_average(module, ema):
    """Give `module`, which may be on "meta", the averaged weights in `ema`, the state dict of what `make_ema` returns.

    Returns it, in eval mode. They are not copied.
    """
    weights = {name.removeprefix("module."): x for name, x in ema.items() if name != "n_averaged"}
    module.load_state_dict(weights, assign=True)
    return module.eval()


# ---------------------------------------------------------------------------------------------------------------
# Files and checkpoints


@contextmanager
def replacing(path):
    """Yield a temporary path beside `path` and rename it over `path` if the block succeeds: no reader sees half a file."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_json(path, value):
    """Write `value` as indented JSON, atomically."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path):
    """Read a JSON file; a missing, broken or enormous one raises `UserError` naming it."""
    try:
        if os.path.getsize(path) > 2**30:
            raise UserError(f"{path}: larger than 1 GiB, which no JSON file of ours is")
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, or a number of thousands of digits
        raise UserError(f"{path}: not valid JSON ({error})") from None


STORED_AS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
             torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}  # safetensors' names


def save_tensors(path, tensors, dtype=torch.float32, keep=(), metadata={"format": "pt"}):
    """Write a state dict as safetensors, atomically: floating-point tensors in `dtype`, but for those named in `keep`.

    dtype=None writes all of them as they are. metadata: texts for the file's header; older loaders insist on this default.
    One tensor at a time: safetensors' own save_file holds a second copy of all of them in memory.
    """
    kinds = {name: dtype if dtype and x.is_floating_point() and name not in keep else x.dtype for name, x in tensors.items()}
    order = sorted(tensors, key=lambda name: (-kinds[name].itemsize, name))  # wide types first: every tensor stays aligned
    header, end = {"__metadata__": metadata}, 0
    for name in order:
        start, end = end, end + tensors[name].numel() * kinds[name].itemsize
        header[name] = {"dtype": STORED_AS[kinds[name]], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            file.write(tensors[name].detach().to("cpu", kinds[name]).contiguous().view(-1).view(torch.uint8).numpy())  # (bytes,)


def load_tensors(path):
    """Open a safetensors file, {name: tensor}. The tensors are mapped from the file: its bytes are read when they are used.

    Raises `UserError` if it is missing or damaged.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, MemoryError) as error:
        raise UserError(f"{path}: not a valid safetensors file ({error})") from None


def open_header(path):
    """A safetensors file whose header has been read and checked, and none of its tensors. Raises `UserError`."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError, MemoryError) as error:
        raise UserError(f"{path}: not a valid safetensors file ({error})") from None


def load_weights(module, tensors, path, device="cpu", dtype=torch.float32, keep=(), called={}):
    """Put `tensors` into `module`, strictly: a missing, extra, misshapen or non-finite one raises `UserError`.

    They take the place of the module's own, which may therefore be on "meta", without memory. A tensor that already has the
    right type and device stays mapped from the file. dtype: None is as stored; tensors named in `keep` become float32
    otherwise. called: {name: its name in the file} where that differs, for the errors.
    """
    wanted = module.state_dict()
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    for kind, names in (("lacks", missing), ("has the unexpected", extra)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{path}: {kind} tensor {called.get(names[0], names[0])}{more}; it belongs to a model of other sizes "
                            f"or another kind")
    for name, x in tensors.items():
        tensor = f"{path}: tensor {called.get(name, name)}"
        if x.shape != wanted[name].shape:
            raise UserError(f"{tensor} is {list(x.shape)}, expected {list(wanted[name].shape)}")
        if x.is_floating_point() != wanted[name].is_floating_point() or x.is_floating_point() and x.element_size() < 2:
            raise UserError(f"{tensor} is {x.dtype}, expected {wanted[name].dtype}")
        # the extremes tell: NaN passes through both, and unlike isfinite they need no memory
        if x.is_floating_point() and x.numel() and not torch.stack(x.aminmax()).isfinite().all():
            raise UserError(f"{tensor} holds NaN or infinite values")
    def target(name, x):
        return None if dtype is None or not x.is_floating_point() else torch.float32 if name in keep else dtype
    module.load_state_dict({name: x.to(device, target(name, x)) for name, x in tensors.items()}, assign=True)


def save_resume(path, **state):
    """Write everything a run needs to go on (weights, optimizer, step), atomically, with torch.save.

    No random states: every step of our training scripts seeds itself.
    """
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_resume(path):
    """Read `save_resume`'s file onto the CPU; tensors and plain values only (weights_only=True executes nothing).

    Mapped from the file: of eight processes on a machine, none holds a copy of what it takes only a part of.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises half a dozen types for a damaged file
        raise UserError(f"{path}: cannot be read as a resume file ({str(error).splitlines()[0]})") from None


def snapshot(state, keep=True):
    """A copy of a state dict on the CPU, which training does not change any more; no tensors if not `keep`.

    Tensors that are split over the processes are made whole, one at a time. For that all processes have to call this, though
    only the one that writes will keep them.
    """
    if isinstance(state, (dict, list)):
        return {name: snapshot(x, keep) for name, x in state.items()} if isinstance(state, dict) else [snapshot(x, keep) for x in state]
    if hasattr(state, "full_tensor"):
        state = state.full_tensor()
    if torch.is_tensor(state):
        return state.detach().to("cpu", copy=True) if keep else None
    return state


def split_like(state, like):
    """The way back: a state dict of whole tensors -> each split over the processes as its namesake in `like` is, if that is.

    One tensor in `like` may stand for a dict: its shape says which of those are split (AdamW's moments, not its step).
    """
    if isinstance(state, dict):
        return {name: split_like(x, like.get(name) if isinstance(like, dict) else like) for name, x in state.items()}
    if hasattr(like, "full_tensor") and torch.is_tensor(state) and state.shape == like.shape:
        from torch.distributed.tensor import distribute_tensor  # late: not in every build of torch
        return distribute_tensor(state, like.device_mesh, like.placements)
    return state


class Background:
    """Makes one call at a time in a thread, so that training goes on while files are written.

    What the call is given must not change meanwhile: see `snapshot`. A failure raises `UserError` at the next call or `wait`;
    and however the program ends, Python lets the thread finish first.
    """

    def __init__(self):
        self.thread, self.under_way = ThreadPoolExecutor(1), None

    def __call__(self, write):
        """Begin `write()` as soon as the one before has ended."""
        self.wait()
        self.under_way = self.thread.submit(write)

    def wait(self):
        """Return when everything is written."""
        last, self.under_way = self.under_way, None
        try:
            if last:
                last.result()
        except (OSError, RuntimeError) as error:  # RuntimeError: what torch.save makes of a full disk
            raise UserError(f"the checkpoint cannot be written ({error})") from None


def seed_step(seed, step, run):
    """Seed torch's global generators for this step and rank: what is drawn does not depend on what was drawn before."""
    torch.manual_seed((((seed << 32) + step) * run.world + run.rank) % 2**63)


def provenance(run):
    """What made this file: the commit (with + if the tree was changed), torch's version, the devices of the `Run`."""
    here = os.path.dirname(os.path.abspath(__file__))
    def git(*args):
        done = subprocess.run(["git", "-C", here, *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""
    try:
        commit = git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except FileNotFoundError:  # no git on this machine
        commit = ""
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else f"{run.device.type}, {torch.get_num_threads()} threads"
    return {"commit": commit, "torch": torch.__version__, "hardware": f"{run.world} x {device}"}


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a flag that the loop reads by `agreed`, so that it saves before it ends.

    It takes over the signals until `release`: make it right before the loop.
    """

    def __init__(self):
        self.requested = False
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def release(self):
        """Give the signals back to whoever had them."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        if self.requested:  # the second time means now
            sys.exit(130)
        self.requested = True
        print("stopping after this step; once more to quit at once", file=sys.stderr)


    def agreed(self, run):
        """Whether any process was asked to stop: all must leave the loop at the same step, or the others wait for ever."""
        if run.world == 1:
            return self.requested
        flag = torch.tensor(float(self.requested), device=run.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return flag.item() > 0


def claim_directory(config, settings, free, run):
    """Make `config.out` the directory of this run, or raise `UserError`: it holds a run already, or, on resume, another one.

    settings: what the run in that directory was started with, a dict (None if there is none). free: the fields that may
    differ on resume.
    """
    if not config.resume and settings is not None:
        raise UserError(f"--out {config.out}: already holds a run; add --resume to continue it, or name another directory")
    if not config.resume and os.path.exists(os.path.join(config.out, "config.json")):
        raise UserError(f"--out {config.out}: already holds a model; name another directory")
    if config.resume and settings is None:
        raise UserError(f"--resume: there is no run in {config.out}, or its resume.pt is gone")
    for name, value in json.loads(json.dumps(dataclasses.asdict(config))).items():  # as JSON: tuples have become lists
        if config.resume and name not in free and settings.get(name) != value:
            raise UserError(f"--{name} {value}: the run in {config.out} was started with {settings.get(name)}; keep "
                            f"that, or start another run")
    os.makedirs(config.out, exist_ok=True)
    if run.world > 1:
        dist.barrier()  # every process has looked before one of them writes


# ---------------------------------------------------------------------------------------------------------------
# Logging


class Log:
    """One line on the screen and the same record in `<directory>/log.jsonl`, from the main process only.

    On resume the records of steps that will be done again are dropped, so that every step stands there once.
    """

    def __init__(self, directory, run, start_step=0):
        self.path, self.active = os.path.join(directory, "log.jsonl"), run.is_main
        if self.active and os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as file:  # a killed run may have left half a line at its end
                kept = [line for line in file if line.endswith("\n") and json.loads(line)["step"] < start_step]
            with replacing(self.path) as temporary, open(temporary, "w", encoding="utf-8") as file:
                file.writelines(kept)

    def __call__(self, **record):
        if not self.active:
            return
        record = {name: round(v, 6) if isinstance(v, float) else v for name, v in record.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print("  ".join(f"{name} {_short(v)}" for name, v in record.items()), flush=True)


def _short(value):
    """A number, or a list of numbers, as it stands in a log line; None, "nothing to measure", is a dash."""
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return "/".join(_short(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def clock(seconds):
    """Seconds -> "1h02m" or "3m20s"."""
    seconds = int(seconds)
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m" if seconds >= 3600 else f"{seconds // 60}m{seconds % 60:02d}s"
