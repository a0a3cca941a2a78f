"""
Plumbing shared by all scripts; no machine learning in here. What only training needs is in runs.py.

    dataclass --from_cli--> config     torchrun or not --init_distributed--> Run(device, rank, world)
    (seed, step, "noise") --generator--> random numbers     safetensors, JSON --load_weights, read_json--> checked

Sections: command line and errors; devices and torchrun; learning rate, random numbers; files; the log of a run.
Nothing to run here. Next: data.py, or go back to the reading order in README.md.
"""
import argparse
import dataclasses
import difflib
import gc
import hashlib
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel


# ---------------------------------------------------------------------------------------------------------------
# Command line and errors


class UserError(Exception):
    """What the user can mend: one sentence naming the file or flag, the value found and what was expected."""


def shown(value):
    """A value from a file as it may stand in an error: short and on one line."""
    text = re.sub(r"\s+", " ", repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


def one_line(message):
    """A message as it is printed: one line of at most 300 characters, whatever a path or a flag in it may hold."""
    line = " ".join(message.split())
    return line if len(line) <= 300 else f"{line[:200]} ... {line[-95:]}"


def clock(seconds):
    """Seconds -> "1h02m" or "3m20s"."""
    seconds = int(seconds)
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"


stop_signals = []  # those that a run has answered by saving (runs.StopRequest)


def command(main, *args):
    """Run a script's `main(*args)`; what the user or the system can mend becomes one line on stderr and exit code 2.

    That is a `UserError`; a file or disk that the system refuses; a reader of the output who has gone away (`| head`).
    Ctrl-C ends the program in one line as well, with code 130 as shells expect; so does a run that a signal stopped,
    and the second half of `train_tokenizer.py && train_ar.py` does not begin.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's way to press Ctrl-C
    try:
        result = main(*args)
        sys.stdout.flush()  # a full disk or a closed pipe behind it shows here at the latest
        if stop_signals and not result and not dist.is_initialized():  # torchrun has an exit code of its own
            sys.exit(130)
        return result
    except UserError as error:
        problem, code = f"error: {error}", 2
    except OSError as error:
        if error.strerror is None:
            raise
        problem, code = f"error: {error.filename or 'output'}: {error.strerror}", 2
    except KeyboardInterrupt:
        problem, code = "stopped", 130
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # torchrun tells those that are ending as well
            signal.signal(number, signal.SIG_DFL)
        if dist.is_initialized():
            gc.collect()  # DDP holds the group too; threads left to the interpreter's last breath abort one run in 30
            dist.destroy_process_group()
    print(one_line(problem), file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # Python writes what is left when it ends, and would fail once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def check_range(config, least, most, *names):
    """Raise `UserError` for a field of `config` among `names` that is not a finite number from `least` to `most`."""
    for name in names:
        value = getattr(config, name)
        if not least <= value <= min(most, 2**63 - 1):
            expected = f"at least {least}" if most == math.inf else f"{least} to {most}"
            raise UserError(f"--{name} {value}: expected {expected}")


def nearest(word, words):
    """"; did you mean X?", where X is the one of `words` that is most like `word`; "" if none is like it."""
    near = difflib.get_close_matches(word, words, 1)
    return f"; did you mean {near[0]}?" if near else ""


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line instead of a screen of usage, and -1e-3 is a number, not an unknown flag."""

    def __init__(self, **options):
        # allow_abbrev: without this, --time would silently mean --timesteps
        super().__init__(allow_abbrev=False, add_help=False, **options,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self._negative_number_matcher = re.compile(r"-\.?\d")

    def error(self, message):
        self.exit(2, one_line(f"error: {message.removeprefix('argument ')}") + "\n")


def from_cli(Config, presets={}, argv=None, positional="", needs_preset=False):
    """Build the dataclass `Config` from the command line: a --flag per field, whose comment is its help text.

    Tuples are given as several words (--ks 1 2 4) or by repeating the flag. positional: names of the fields that take
    the words without a flag, in that order ("tokenizer prior"); a tuple takes all. presets: {name: values that replace
    the defaults}, and flags win over both; the comment behind `"name": dict(` says what a preset needs and takes. With
    `needs_preset` a command without --preset and --data prints these and stops: a run of days should not begin because
    a flag was forgotten. Whatever is wrong ends the program with one line and code 2.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    fields = [field.name for field in dataclasses.fields(Config)]
    names = [name for name in positional.split() if name in fields]
    parser = Parser(description=inspect.cleandoc(Config.__doc__ or ""),
                    usage=" ".join(["%(prog)s", *(f"[{name}]" for name in names), "[--flag value ...]"]))
    chosen = {}
    if presets:
        known = list_presets(Config, presets)
        parser.epilog = f"presets; --preset NAME --help shows the values of one:\n{known}"
        parser.add_argument("--preset", metavar="NAME", help="start from a named set of values; flags override it")
        name = parser.parse_known_args(argv)[0].preset
        if name is not None and name not in presets:
            parser.error(f"--preset {name[:80]}: expected {', '.join(presets)}{nearest(name, presets)}")
        chosen = presets.get(name, {})
    parser.add_argument("-h", "--help", action="help", help="show this and exit")
    add_fields(parser, Config, chosen, names)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        word = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0][:80]
        flags = [f"--{start}{name}" for name in fields if name not in names for start in ("", "no-")]
        parser.error(f"{word}: no such flag{nearest(word, [*flags, '--preset', '--help'])}" if word.startswith("-") else
                     f"{word}: belongs to no flag; names come first, then the flags")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(values).items()}
    if presets and not given.pop("preset") and needs_preset and "data" not in given:
        parser.exit(2, f"error: name one of these with --preset, or your own --data; --preset NAME --help shows its "
                       f"values\n{known}\n")
    return Config(**{**chosen, **given})


def list_presets(Config, presets):
    """A line per preset: its name and the comment behind it in the file that defines `Config`."""
    source = inspect.getsource(sys.modules[Config.__module__])
    notes = dict(re.findall(r'^ +"([^"]+)": dict\([^#\n]*# *(.+)$', source, re.M))
    return "\n".join(f"  {name:{max(map(len, presets))}}  {notes.get(name, '')}".rstrip() for name in presets)


def add_fields(parser, Config, chosen, positional):
    """A flag per field of `Config`; the parser's result holds those that were given. `chosen`: the preset's values."""
    notes = dict(re.findall(r"^\s+(\w+)\s*:[^#\n]*#\s*(.+)$", inspect.getsource(Config), re.M))
    for field in dataclasses.fields(Config):
        default = chosen.get(field.name, field.default)
        written = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        text = notes.get(field.name, "") + (f" (default: {written})" if written else "")
        text = text.replace("%", "%%")  # argparse takes % for the start of a name
        several = isinstance(default, tuple)
        like = type((*field.default, "")[0] if several else field.default)
        if field.name in positional:
            count = "*" if several else "?"
            parser.add_argument(field.name, nargs=count, type=like, default=argparse.SUPPRESS, help=text)
            if several:
                continue  # a single word may be given as a flag as well
        kind = dict(type=like, metavar=like.__name__.upper())
        if like is bool:  # type=bool would read "False" as true
            kind = dict(action=argparse.BooleanOptionalAction)
        elif several:
            kind.update(action="extend", nargs="+")
        parser.add_argument("--" + field.name, default=argparse.SUPPRESS, help=text, **kind)


def shipped(path):
    """A path that begins with assets/ and is not in the current folder is meant beside this file."""
    path = os.fspath(path)
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), path)
    return beside if re.match(r"assets[/\\]", path) and not os.path.exists(path) and os.path.exists(beside) else path


def check_output(path, *endings, flag="--out"):
    """Raise `UserError` if `path` has none of these endings ("": a folder), or cannot be written. Call it early."""
    if os.path.splitext(path)[1] not in endings:
        expected = " or ".join(ending or "none, for a folder" for ending in endings)
        raise UserError(f"{flag} {path}: expected the ending {expected}")
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass  # any other error, such as a name that is too long, is the answer
    folder = os.path.abspath(path)
    if not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder):
        raise UserError(f"{flag} {path}: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: {folder} cannot be written to; name another place")


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

    def part(self, B):
        """This process's slice of a batch of B that all processes share."""
        return slice(self.rank * B // self.world, (self.rank + 1) * B // self.world)


def pick_device(name="auto"):
    """"auto" -> cuda, else mps, else cpu. A device asked for by name and absent raises `UserError`."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: expected auto, cpu, cuda, cuda:1 or mps")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type == "cuda" and device.index:
            torch.cuda.set_device(device)  # a CUDA graph records what runs on the current one
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not usable here ({str(error).splitlines()[0]}); try --device auto") from None
    return device


def init_distributed(device="auto"):
    """The launcher decides: RANK in the environment (torchrun) -> a process group; else one process. Returns a `Run`.

    The same training code then runs on one CPU, one GPU or many. Gradients travel over nccl between GPUs; what the
    processes only agree on, such as whether to stop, over gloo between CPUs, so that no GPU is waited for.
    """
    if "RANK" not in os.environ:
        return Run(pick_device(device))
    on_gpu = torch.cuda.is_available() and (device == "auto" or device.startswith("cuda"))
    if on_gpu:  # first of all: whatever touches a GPU before takes memory of the first one, in every process
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else pick_device(device)
    if not dist.is_initialized():
        # A day: some things the main process does alone, such as filling a cache or evaluating, and the others wait.
        # If one of them dies, torchrun ends the others at once, without waiting so long.
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(days=1),
                                device_id=device if on_gpu else None)
    return Run(device, dist.get_rank(), dist.get_world_size())


def barrier(run):
    """Wait until all processes are here; over gloo, so that no GPU is waited for."""
    if run.world > 1:
        dist.all_reduce(torch.zeros(1))


HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # --precision in 16 bits


def autocast(device, precision):
    """Context for the forward pass: "bf16" and "fp16" run matrix products in that type, "fp32" changes nothing.

    "auto" is bf16 where the hardware multiplies it natively (CUDA from Ampere on, CPUs with AVX512-BF16 or AMX), else
    fp32. fp16 is for older GPUs (T4, V100), and in training needs a `runs.Scaler`. Raises UserError for any other word.
    """
    if precision not in ("auto", "fp32", *HALF):
        raise UserError(f"--precision {precision}: expected auto, bf16, fp16 or fp32")
    if precision == "auto":
        precision = "bf16" if has_native_bf16(device) else "fp32"
    return torch.autocast(device.type, dtype=HALF[precision]) if precision in HALF else nullcontext()


# On CUDA flash attention computes, else the memory-efficient kernel, in training and sampling: cuDNN's, torch's first
# choice on Hopper, would plan anew for every shape.
torch.backends.cuda.enable_cudnn_sdp(False)


def attention_kernel(device):
    """Context that picks the kernel of attention in training, to be entered inside `autocast`: torch's own choice,
    except on a CPU in bfloat16, where its fused kernel is slow backwards for short sequences: a step of the cpu preset
    takes twice as long as with the plain one. In float32 the fused one is faster (80 to 512 tokens).
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


def compile_blocks(blocks, dynamic=True, **options):
    """torch.compile modules that compute the same on weights of their own: one graph serves all. Changes no name.

    A copy made afterwards would run the weights of the original. dynamic: for any batch and length above 1.

    Two settings keep the graphs few: sizes that are equal the first time are not taken for one size, and the 0.0 within
    torch's causal mask counts as a constant. In bfloat16 compiled blocks round elsewhere than eager ones; in float32
    both agree.
    """
    from torch.fx.experimental import _config  # late: it takes a second
    _config.use_duck_shape = False
    torch._dynamo.config.specialize_float = True
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=dynamic, **options)


# ---------------------------------------------------------------------------------------------------------------
# Learning rate, random numbers


def learning_rate(step, peak, warmup, steps):
    """Linear warm-up to `peak` over `warmup` steps, then cosine to 1 % of it at `steps`. `step` counts from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))  # in [0, 1]
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def generator(device, *key):
    """A random generator on `device` for `key`, say (seed, step, "noise"): what it draws depends on nothing else."""
    # hashed, as torch's CPU generator uses the lowest 32 bits of a seed only
    hashed = hashlib.sha256(repr(key).encode()).digest()[:7]
    return torch.Generator(device).manual_seed(int.from_bytes(hashed, "little"))


# ---------------------------------------------------------------------------------------------------------------
# Files


@contextmanager
def writing(path):
    """What the system refuses inside, a full disk for one, raises `UserError` naming `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or shown(str(error))})") from None


@contextmanager
def replacing(path):
    """Yield a temporary path beside `path` and rename it over `path` if the block succeeds: no reader sees half a file.

    A full disk, or whatever else the system refuses, raises `UserError` naming `path`; what was there before stays.
    """
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with writing(path):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def sweep(directory, name=""):
    """Remove what killed processes left half-written of the files in `directory` whose names begin with `name`."""
    for leftover in os.listdir(directory or "."):
        if leftover.startswith(name) and re.search(r"\.tmp\d+$", leftover):
            os.remove(os.path.join(directory, leftover))


@contextmanager
def locked(path, what=None):
    """Hold the lock file `path` for this process. If another one holds it, raise `UserError(what)`, or wait if None.

    The system drops the lock when its process ends, however that ends. Windows and some file systems have none.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | (0 if what is None else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(what) from None
        except (ImportError, OSError):
            pass
        yield


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
        with open(path, encoding="utf-8-sig") as file:  # Windows' editors write a mark at the beginning
            return json.load(file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, not UTF-8, or a number of thousands of digits
        raise UserError(f"{path}: not valid JSON ({error})") from None


def checked(Config, fields, where):
    """JSON `fields` -> the dataclass `Config`, checked against its defaults; what is left out keeps its default.

    A list becomes a tuple whose elements are like the default's first (integers if it has none); an integer will do for
    a float. Numbers are at most 2^31 and not negative; where the default is above 0, so are they. `where`: the file and
    the entry that they are from. Raises `UserError` naming it, the field, its value and what was expected.
    """
    if not isinstance(fields, dict):
        raise UserError(f"{where} is {shown(fields)}, expected the fields of a {Config.__name__}")
    defaults, values = {field.name: field.default for field in dataclasses.fields(Config)}, {}
    for name, value in fields.items():
        if name not in defaults:
            raise UserError(f"{where}: unknown field {shown(name)}; is the file of another version?")
        default, many = defaults[name], isinstance(defaults[name], tuple)
        like = (*default, 0)[0] if many else default
        number = type(like) in (int, float)
        positive = number and like > 0
        kinds = (int, float) if type(like) is float else (type(like),)  # not isinstance: True is an int
        items = value if many and isinstance(value, (list, tuple)) else [value]
        fits = all(type(x) in kinds and (not number or 0 < x <= 2**31 or x == 0 and not positive) for x in items)
        if not fits or many != isinstance(value, (list, tuple)) or positive and not items:
            what = {bool: "true or false", str: "text", int: "a whole number", float: "a number"}[type(like)]
            raise UserError(f"{where}: {name} is {shown(value)}, expected {'a list, each ' * many}{what}"
                            f"{' above 0' if positive else ' from 0' * number}")
        values[name] = tuple(value) if many else type(like)(value)
    try:
        return Config(**values)
    except ValueError as error:  # what the dataclass itself refuses
        raise UserError(f"{where}: {str(error)[:150]}") from None


# safetensors' names
STORED_AS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
             torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


def save_tensors(path, tensors, dtype=torch.float32, keep=(), metadata={"format": "pt"}):
    """Write a state dict as safetensors, atomically: floating-point tensors in `dtype`, but for those named in `keep`.

    dtype=None writes all as they are. metadata: texts for the file's header; older loaders insist on this default.
    One tensor at a time: safetensors' own save_file holds a second copy of all of them in memory.
    """
    kinds = {name: dtype if dtype and x.is_floating_point() and name not in keep else x.dtype
             for name, x in tensors.items()}
    order = sorted(tensors, key=lambda name: (-kinds[name].itemsize, name))  # wide types first: all stay aligned
    header, end = {"__metadata__": metadata}, 0
    for name in order:
        start, end = end, end + tensors[name].numel() * kinds[name].itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": STORED_AS[kinds[name]], "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            stored = tensors[name].detach().to("cpu", kinds[name]).contiguous()
            file.write(stored.view(-1).view(torch.uint8).numpy())                 # (bytes,)


def load_tensors(path, read=load_file):
    """A safetensors file as {name: tensor}, mapped: bytes are read when used. Raises `UserError` if it is unfit."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    try:
        return read(path)
    except (SafetensorError, OSError, MemoryError) as error:
        raise UserError(f"{path}: not a valid safetensors file ({shown(str(error))})") from None


def digest_of(settings, *modules):
    """A hash of plain values and of all tensors of `modules`, in hexadecimal."""
    digest = hashlib.sha256(repr(settings).encode())
    for module in modules:
        for tensor in module.state_dict().values():
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())  # numpy has no bfloat16
    return digest.hexdigest()


def load_weights(module, tensors, path, device="cpu", dtype=torch.float32, keep=(), called={}):
    """Put `tensors` into `module`, strictly: a missing, extra, misshapen or non-finite one raises `UserError`.

    They take the place of the module's own, which may therefore be on "meta", without memory. A tensor that already has
    the right type and device stays mapped from the file. dtype: None is as stored; tensors in `keep` become float32
    otherwise. called: {name: its name in the file} where that differs, for the errors.
    """
    wanted = module.state_dict()

    def label(name):
        return shown(called.get(name, name))[1:-1]

    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    for kind, names in (("lacks", missing), ("has the unexpected", extra)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"{path}: {kind} tensor {label(names[0])}{more}; it belongs to a model of other sizes or "
                            f"another kind")
    for name, x in tensors.items():
        tensor = f"{path}: tensor {label(name)}"
        if x.shape != wanted[name].shape:
            raise UserError(f"{tensor} is {shown(list(x.shape))}, expected {list(wanted[name].shape)}")
        if (x.is_floating_point() != wanted[name].is_floating_point()
                or x.is_floating_point() and x.element_size() < 2):
            raise UserError(f"{tensor} is {x.dtype}, expected {wanted[name].dtype}")
        # the extremes tell: NaN passes through both, and unlike isfinite they need no memory. Of 1e38, a flipped bit,
        # squares are infinite, and what is computed of them is NaN
        if x.is_floating_point() and x.numel() and not (torch.stack(x.aminmax()).float().abs() < 1e15).all():
            raise UserError(f"{tensor} holds NaN or infinite values, or some beyond 1e15")

    def target(name, x):
        return None if dtype is None or not x.is_floating_point() else torch.float32 if name in keep else dtype
    module.load_state_dict({name: x.to(device, target(name, x)) for name, x in tensors.items()}, assign=True)


# ---------------------------------------------------------------------------------------------------------------
# The log of a run


class Log:
    """One line on the screen and the same record in `<directory>/log.jsonl`, from the main process only.

    start: the steps done before, on resume; the records of later ones, which will be done again, are dropped. part:
    what is training, in front of each line. steps: how many there will be. later: seconds that the parts after this
    one will take, for the ETA of the whole command.
    """

    def __init__(self, directory, run, start=0, part="", steps=0, later=0.0):
        self.path, self.run = os.path.join(directory, "log.jsonl"), run
        self.part, self.steps, self.later = part, steps, later
        self.since, self.logged, self.least = time.time(), start, math.inf
        if run.is_main and os.path.exists(self.path):
            kept = [record for record in read_log(directory) if record["step"] <= start]
            with replacing(self.path) as temporary, open(temporary, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in kept)

    def __call__(self, **record):
        if not self.run.is_main:
            return
        record = {name: round(v, 6) if isinstance(v, float) else v for name, v in record.items()}
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        record["step"] = f"{record['step']}/{self.steps}"
        self.say("  ".join([self.part, *(f"{name} {_short(v)}" for name, v in record.items())]).strip())

    def training(self, step, batch_size, loss, **record):
        """The record of a training step, with speed and ETA, and a word if the loss explodes."""
        rate = (step - self.logged) / max(1e-9, time.time() - self.since)
        self(step=step, loss=loss, **record, images_per_s=rate * batch_size,
             eta=clock((self.steps - step) / rate + self.later))
        if loss > 10 * self.least:
            self.say(f"the loss is {loss:.3g} and was {self.least:.3g}: it diverges; lower learning rates may help")
        self.least = min(self.least, loss)
        self.reset(step)

    def say(self, sentence):
        """A line on the screen alone."""
        if self.run.is_main:
            print(sentence, flush=True)

    def reset(self, step):
        """Start the clock anew: what came before, such as an evaluation, is not training time."""
        self.since, self.logged = time.time(), step


def read_log(directory):
    """The records of `<directory>/log.jsonl`; lines that are none, such as a power cut leaves, are left out."""
    records = []
    with open(os.path.join(directory, "log.jsonl"), encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def _short(value):
    """A number, or a list of numbers, as it stands in a log line; None, "nothing to measure", is a dash."""
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return "/".join(_short(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
