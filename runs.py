"""
What every training run does beside its algorithm: hand out steps, log, evaluate, keep checkpoints, stop when asked.

    for step, lr in checkpoints.steps(...):  a trainer's own lines: batch, loss, backwards, optimizer, average
         |-- every --log_every steps    common.Log: a line on the screen, the same in log.jsonl
         |-- every --eval_every steps   metrics of the averaged weights; resume.pt, model.safetensors, config.json
         `-- Ctrl-C, SIGTERM            the same at once, and --resume goes on bit for bit

Why apart: four trainers need the same, and each then reads as its algorithm. Here too: the optimizer, averaged weights,
16 bits, a step as a CUDA graph, a model split over processes.
Nothing to run here. Next: train_tokenizer.py, to see it used.
"""
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch.optim.swa_utils import AveragedModel

from common import (UserError, autocast, barrier, check_range, has_native_bf16, learning_rate, locked, read_json,
                    replacing, shown, stop_signals, sweep)


# ---------------------------------------------------------------------------------------------------------------
# The loop, and what it keeps


class Checkpoints:
    """The directory of a run, which holds a whole state to go on from at any moment, whatever kills the process.

    resume.pt   comes first: settings, step, metrics, weights, their average, optimizer. A run is here if it is.
    the model   comes then, by `export(state)`, its config.json last. A model is here if that is.

    Each file takes the place of the one before when it is whole. torchrun kills 30 s after a signal, and a large model
    may take longer to save: then the checkpoint before stands, or resume.pt is new and `restore` exports the model.

    Use as a context: one process at a time, and the files that a killed one left half-written are removed. `saved` is
    the state to go on from, or None. free: the settings that may differ when a run is resumed. Raises `UserError` if
    the directory holds a run or a model already; on --resume, if it holds none, or one with other settings.
    A trainer calls `restore`, then loops over `steps`.
    """

    def __init__(self, config, free, run):
        self.config, self.run, self.path = config, run, os.path.join(config.out, "resume.pt")
        self.writer, self.under_way, self.saved = ThreadPoolExecutor(1), None, None
        self.stop, self.start, self.metrics = StopRequest(), 0, {}
        has_run, has_model = os.path.exists(self.path), os.path.exists(os.path.join(config.out, "config.json"))
        if not config.resume and has_run:
            raise UserError(f"--out {config.out}: already holds a run; add --resume to continue it, or name another")
        if not config.resume and has_model:
            raise UserError(f"--out {config.out}: already holds a model; name another directory")
        if config.resume and has_model and not has_run:
            raise UserError(f"--resume: the resume.pt of {config.out} is gone, without which there is no going on")
        if config.resume and not os.path.exists(os.path.join(config.out, "lock")):
            raise UserError(f"--resume: there is no run in {config.out}")
        if config.resume and not has_run and run.is_main:
            print(f"{config.out}: nothing was saved yet, so this starts at step 0", flush=True)
        if has_run:
            self.saved = load_resume(self.path)
            self._check_settings(free)
        barrier(run)  # every process has looked before one of them writes

    def _check_settings(self, free):
        """Raise `UserError` for a setting that differs. One that did not exist when the run began had its default."""
        defaults = {field.name: field.default for field in dataclasses.fields(self.config)}
        settings = {**defaults, **self.saved["settings"]}
        for name, value in dataclasses.asdict(self.config).items():
            if name not in free and json.dumps(settings[name]) != json.dumps(value):  # a tuple is a list there
                raise UserError(f"--{name} {value}: the run in {self.config.out} was started with "
                                f"{shown(settings[name])}; keep that, or start another run")

    def __enter__(self):
        if self.run.is_main:
            out = self.config.out
            self.lock = locked(os.path.join(out, "lock"), f"--out {out}: another process trains there")
            self.lock.__enter__()
            sweep(out)
        return self

    def __exit__(self, *error):
        self.stop.__exit__()  # the loop that `steps` feeds may have ended in an error
        self.writer.shutdown()
        if self.run.is_main:
            self.lock.__exit__(None, None, None)

    def restore(self, parts, export):
        """Put the saved state into `parts`, {name: model, average or optimizer}; returns its step, 0 if there is none.

        export(state): writes the model. If the process was killed between resume.pt and the model, it is called now.
        Raises `UserError` for a state that does not fit.
        """
        self.parts, self.export = parts, export
        if self.saved is None:
            return 0
        try:
            for name, part in parts.items():
                like, saved = part.state_dict(), self.saved.get(name, {})
                if isinstance(part, torch.optim.Optimizer):
                    saved = {"state": saved["state"], "param_groups": like["param_groups"]}  # these follow from --flags
                    learned = [(p, group) for group in part.param_groups for p in group["params"]]
                    like = {"state": {i: p for i, (p, _) in enumerate(learned)}}
                    for i, moments in saved["state"].items():
                        p, group = learned[i]
                        names = ["step", "average"] if group.get("muon") else ["step", "exp_avg", "exp_avg_sq"]
                        shapes = {name: () if name == "step" else p.shape for name in names}
                        if shapes != {key: x.shape for key, x in moments.items() if not x.is_sparse}:
                            raise ValueError(f"moments of parameter {i} are missing or of another shape")
                part.load_state_dict(split_like(saved, like))
            if self.run.is_main and read_saved(self.config.out).get("step") != self.saved["step"]:
                export(self.saved)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{self.path}: does not fit this run ({shown(str(error))})") from None
        self.start, self.metrics, self.saved = self.saved["step"], self.saved["metrics"], None  # frees the memory
        return self.start

    def steps(self, log, report, average, evaluate):
        """Yield (step, learning rate) of each step to do; between them log, evaluate, save, and stop if asked to.

        report() -> what the log says of the steps since it was last asked: a dict with "loss", and as "grad_norm" the
        norm () of the last step's gradient, still on the device. average() -> the averaged model, or None where another
        process evaluates; all processes call it. evaluate(averaged, step) -> metrics, a dict; it changes nothing, so
        that a signal may cut it short. Afterwards `metrics` is what the last evaluation said, {} if the run was stopped
        (Ctrl-C, SIGTERM, --stop_at). Raises `UserError` for a loss or gradient that is not finite.
        """
        config, run, stop = self.config, self.run, self.stop

        def evaluate_and_save(step, due):
            if due:
                averaged = average()
                found = [stop.unless_stopped(lambda: evaluate(averaged, step)) if averaged else None]
                if run.world > 1:
                    dist.broadcast_object_list(found)
                self.metrics = found[0] or {}
                if self.metrics:
                    log(step=step, **self.metrics)
            self.save(step, self.metrics)
            log.reset(step)  # this does not count as training time

        with stop:
            if evaluation_due(config, self.start) and not self.metrics:  # stopped before it, or within
                evaluate_and_save(self.start, True)
            for step in range(self.start, config.steps):
                lr = learning_rate(step, config.lr, config.warmup, config.steps)
                yield step, lr
                done = step + 1
                if done == config.stop_at:
                    stop.requested = True
                stopping, due = stop.agreed(run), evaluation_due(config, done)
                if stopping or due or done % config.log_every == 0:
                    seen = report()
                    seen["grad_norm"] = self.finite(done, seen["loss"], seen["grad_norm"])
                    log.training(done, config.batch_size, **seen, lr=lr)
                if stopping or due:
                    evaluate_and_save(done, due)
                if stopping or (due and stop.agreed(run)):  # asked again: a signal may have come meanwhile
                    break
            self.wait()
            if stop.agreed(run):
                log.say(f"stopped after step {log.logged}; go on with --resume")
                self.metrics = {}

    def save(self, step, metrics):
        """Write the state after `step` steps, in a thread of its own: training goes on. All processes call this.

        Raises `UserError`, at the next call at the latest, if it cannot be written, or holds a number that is not
        finite; then the checkpoint before stands.
        """
        self.wait()  # one copy of everything at a time
        since = time.time()
        state = snapshot({name: part.state_dict() for name, part in self.parts.items()}, self.run.is_main)
        if not self.run.is_main:
            return
        bad = not_finite(state)
        if bad:
            raise UserError(f"step {step}: {bad} holds a number that is not finite; {self.standing()}")
        state |= {"settings": dataclasses.asdict(self.config), "step": step, "metrics": metrics}

        def write():
            save_resume(self.path, state)
            self.export(state)
            print(f"step {step}: saved in {time.time() - since:.1f} s", flush=True)
        self.under_way = self.writer.submit(write)

    def wait(self):
        """Return when everything is written."""
        last, self.under_way = self.under_way, None
        if last:
            last.result()

    def finite(self, step, loss, grad_norm):
        """The gradient's norm as a number. Raises `UserError`, on all processes, if it or the loss is not finite.

        Once a gradient is not, all weights are not: so it is enough to look when a line is logged. None: a `Scaler`
        left this step out.
        """
        norm = (grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm).item()
        if math.isfinite(loss) and self.parts["scaler"].skips(norm):
            return None
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "gradient" if math.isfinite(loss) else "loss"
            raise UserError(f"step {step}: the {what} is not finite; {self.standing()}; lower learning rates than "
                            f"--lr {self.config.lr} may help")
        return norm

    def standing(self):
        """Which checkpoint there is to go on from, for errors."""
        self.wait()
        saved = os.path.exists(self.path)
        return f"the checkpoint in {self.config.out} stands" if saved else "no checkpoint was saved yet"


def check_run(config, run):
    """Raise `UserError` for settings that all trainers have and that cannot work."""
    check_range(config, 1, math.inf, "steps", "batch_size", "warmup", "log_every", "eval_every")
    check_range(config, 0, math.inf, "workers", "stop_at")
    check_range(config, 0, 1, "ema_decay")
    check_range(config, 1e-12, 1, "lr")  # not 0: that of Muon is a multiple of it
    check_range(config, 1e-9, math.inf, "grad_clip")
    check_range(config, 0, 2**31 - 1, "seed")
    autocast(run.device, config.precision)
    compilers = "g++", "clang++", "cl", os.environ.get("CXX", "")
    if config.compile and not any(map(shutil.which, compilers)):
        raise UserError("--compile: torch needs a C++ compiler for it, such as g++, and there is none")
    micro = max(1, getattr(config, "micro_batch", 1))
    if config.batch_size % (run.world * micro):
        raise UserError(f"--batch_size {config.batch_size}: expected a multiple of processes x micro_batch = "
                        f"{run.world} x {micro}")
    if 4 * config.steps < config.warmup:
        raise UserError(f"--warmup {config.warmup}: --steps {config.steps} end before a quarter of --lr is reached; "
                        f"give a --warmup of at most {config.steps}")
    if config.steps < config.warmup and run.is_main:
        print(f"--warmup {config.warmup} is longer than --steps {config.steps}: --lr is never reached", flush=True)


def evaluation_due(config, step):
    """Whether a run is evaluated after `step` steps: every --eval_every, and at the end."""
    return step > 0 and step % config.eval_every == 0 or step == config.steps


class StopRequest:
    """Turns Ctrl-C or SIGTERM into a flag that the loop reads by `agreed`, so that it saves before it ends. A context.

    What only measures may be cut short: see `unless_stopped`. A second signal ends the program at once.
    """

    def __init__(self):
        self.requested, self.may_interrupt, self.before = False, False, {}

    def __enter__(self):
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        while self.before:
            signal.signal(*self.before.popitem())

    def _ask(self, number, frame):
        again, self.requested = self.requested, True
        stop_signals.append(number)
        if not again:
            print("stopping after this step; once more to quit at once", file=sys.stderr, flush=True)
        if again or self.may_interrupt:
            raise KeyboardInterrupt

    def unless_stopped(self, work):
        """work(), which changes nothing, or None if a signal comes meanwhile."""
        if self.requested:
            return None
        self.may_interrupt = True
        try:
            return work()
        except KeyboardInterrupt:
            return None
        finally:
            self.may_interrupt = False

    def agreed(self, run):
        """Whether any process was asked to stop: all must leave the loop at the same step."""
        if run.world > 1:
            flag = torch.tensor(float(self.requested))  # on the CPU, over gloo: no GPU is waited for
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            if flag.item() > 0:
                self.requested = True
        return self.requested


def save_resume(path, state):
    """Write what a run needs to go on, atomically (no random states: steps draw by number). Raises `UserError`."""
    try:
        with replacing(path) as temporary:
            torch.save(state, temporary)
    except RuntimeError:  # what torch makes of a full disk
        raise UserError(f"{path}: cannot be written; is the disk full?") from None


def load_resume(path):
    """Read `save_resume`'s file onto the CPU; tensors and plain values only (weights_only=True executes nothing).

    Mapped from the file: of eight processes on a machine, none holds a copy of what it takes only a part of.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises half a dozen types for a damaged file
        raise UserError(f"{path}: cannot be read as a resume file ({shown(str(error))})") from None
    types = {"settings": dict, "step": int, "metrics": dict, "model": dict, "ema": dict}
    for name, kind in types.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            raise UserError(f"{path}: is no resume file of a run (its {name} is missing or damaged)")
    if not 0 <= state["step"] <= 2**31:
        raise UserError(f"{path}: is no resume file of a run (its step is {shown(state['step'])})")
    try:
        json.dumps([state["settings"], state["metrics"]])
    except (TypeError, ValueError):
        raise UserError(f"{path}: is no resume file of a run (its settings or metrics are no plain values)") from None
    return state


def read_saved(directory):
    """What the config.json of a run says, with its "step" and "metrics"; {} if it is missing or damaged."""
    try:
        saved = read_json(os.path.join(directory, "config.json"))
    except UserError:
        return {}
    return saved if isinstance(saved, dict) and isinstance(saved.get("metrics"), dict) else {}


def snapshot(state, keep=True):
    """A copy of a state dict on the CPU, which training does not change any more; no tensors if not `keep`.

    Tensors that are split over the processes are made whole, one at a time. For that all processes have to call this,
    though only the one that writes will keep them.
    """
    if isinstance(state, dict):
        return {name: snapshot(x, keep) for name, x in state.items()}
    if isinstance(state, list):
        return [snapshot(x, keep) for x in state]
    if hasattr(state, "full_tensor"):
        state = state.full_tensor()
    if torch.is_tensor(state):
        return state.detach().to("cpu", copy=True) if keep else None
    return state


def not_finite(state, name=""):
    """The name of a tensor in nested dicts of them that holds NaN or an infinity; "" if none does."""
    if isinstance(state, dict):
        return next(filter(None, (not_finite(x, f"{name} {key}".strip()) for key, x in state.items())), "")
    number = torch.is_tensor(state) and state.is_floating_point() and state.numel()
    return name if number and not torch.stack(state.aminmax()).isfinite().all() else ""


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
    cpu = f"{run.device.type}, {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else cpu
    return {"commit": commit, "torch": torch.__version__, "hardware": f"{run.world} x {device}"}


# ---------------------------------------------------------------------------------------------------------------
# Means and times


class Means:
    """Running means that stay on the device until they are read, so that no step waits for it."""

    def __init__(self, count, run):
        self.run, self.sums = run, torch.zeros(2, count, dtype=torch.float32, device=run.device)

    def add(self, sums, counts):
        """sums, counts (count,): of what was summed, and how often."""
        self.sums += torch.stack([sums.detach(), counts.to(sums)])                # (2, count)

    def take(self):
        """The means over all processes since the last call, a list; None where nothing was counted."""
        if self.run.world > 1:
            dist.all_reduce(self.sums)
        sums, counts = self.sums.tolist()
        self.sums.zero_()
        return [total / n if n else None for total, n in zip(sums, counts)]


def seconds_of(work):
    """How long `work()`, which returns a tensor of one number, takes the second time; the first takes longer."""
    float(work())
    since = time.time()
    float(work())  # waits for a GPU
    return time.time() - since


# ---------------------------------------------------------------------------------------------------------------
# The step: average, optimizer, 16 bits, CUDA graphs


class Average(AveragedModel):
    """`.module`: a copy of a model whose parameters follow p_ema <- d·p_ema + (1-d)·p at each update.

    d = min(decay, (1+n)/(10+n)) at update n, so that a short run is not dominated by its random initial weights
    (the rule of tf.train.ExponentialMovingAverage). torch's own update would wait for the GPU each time.
    """

    def __init__(self, model, decay):
        super().__init__(model)
        self.decay = decay
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def update_parameters(self, model):
        n = self.n_averaged.item()  # on the CPU
        d = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        local = lambda x: x.to_local() if hasattr(x, "to_local") else x           # noqa: E731, this process's part
        pairs = [(mine, p) for mine, p in zip(self.module.parameters(), model.parameters()) if p.requires_grad]
        torch._foreach_lerp_([local(mine) for mine, _ in pairs], [local(p) for _, p in pairs], 1 - d)
        for mine, buffer in zip(self.module.buffers(), model.buffers()):
            mine.copy_(buffer)
        self.n_averaged += 1


def fill_with_average(module, ema):
    """Give `module`, which may be on "meta", the weights in `ema`, an `Average`'s state dict; returns it."""
    weights = {name.removeprefix("module."): x for name, x in ema.items() if name != "n_averaged"}
    module.load_state_dict(weights, assign=True)
    return module.eval()


def optimizer_for(model, config, groups=None):
    """AdamW; or, if --muon_lr is above 0, `Muon` for the matrices of the model's blocks, and AdamW for the rest.

    The rest: vectors, which have one direction only; tables, the first and the last layers, as is customary;
    modulations, which read t and not what a block computes. groups: AdamW's; by default matrices decay and vectors do
    not. Each comes out with an "lr_scale", by which the schedule's learning rate, that of --lr, is to be multiplied.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = groups or [{"params": [p for _, p in named if p.dim() > 1], "weight_decay": config.weight_decay},
                        {"params": [p for _, p in named if p.dim() <= 1], "weight_decay": 0.0}]
    groups, betas = [{"lr_scale": 1.0, **group} for group in groups], (0.9, config.beta2)
    if not config.muon_lr:
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)
    matrices = [p for name, p in named if p.dim() == 2 and ".blocks." in name and ".adaln." not in name]
    taken = set(matrices)
    for group in groups:
        group["params"] = [p for p in group["params"] if p not in taken]
    groups.append({"params": matrices, "muon": True, "weight_decay": config.weight_decay,
                   "lr_scale": config.muon_lr / config.lr})
    bf16 = config.precision == "bf16" or config.precision == "auto" and has_native_bf16(matrices[0].device)
    return Muon(groups, torch.bfloat16 if bf16 else torch.float32, lr=config.lr, betas=betas, fused=True)


class Muon(torch.optim.AdamW):
    """AdamW, but the matrices of groups with "muon": True learn by Muon (Keller Jordan, 2024; arXiv 2502.16982).

    A gradient is a matrix U·S·Vᵀ, and few of its directions are large: those of what most samples share. AdamW follows
    these. Muon takes a step of one size along all of them, U·Vᵀ, so that rare ones are learned as fast. The average of
    gradients (0.95 of what it was, Nesterov's form) comes first. A step's mean square is (0.2·lr)², about AdamW's, so
    an lr of AdamW will do for a start; for runs of minutes 0.01 was better than 0.02 (JOURNAL.md).

    torch.optim.Muon (from 2.9 on) does the same, matrix by matrix: 15 products each, 945 for preset emoji64-cpu. Here
    those of equal shape go through together.
    """

    def __init__(self, groups, dtype, **settings):
        """dtype: in which U·Vᵀ is computed; bf16 will do where the hardware has it."""
        super().__init__(groups, **settings)
        self.dtype, self._step_supports_amp_scaling = dtype, False  # fp16: the Scaler asks, and waits, whether to step

    @torch.no_grad()
    def step(self, closure=None):
        by_shape, gradients = {}, {}
        for group in self.param_groups:
            for p in group["params"] if group.get("muon") else ():
                if p.grad is None:  # it does not learn now
                    continue
                by_shape.setdefault((p.shape, group["lr"], group["weight_decay"]), []).append(p)
        for (shape, lr, decay), alike in by_shape.items():
            for p in alike:
                if not self.state[p]:  # AdamW, when it loads a state, looks at each parameter's step
                    self.state[p].update(step=torch.zeros(()), average=torch.zeros_like(p))
                gradients[p] = p.grad
            averages, new = [self.state[p]["average"] for p in alike], [p.grad for p in alike]
            torch._foreach_lerp_(averages, new, 0.05)
            step = torch.stack(torch._foreach_lerp(new, averages, 0.95))          # (n, rows, columns)
            step = orthogonal(step.to(self.dtype)).to(step.dtype) * (0.2 * math.sqrt(max(shape)))
            torch._foreach_mul_(alike, 1 - lr * decay)
            torch._foreach_add_(alike, step.unbind(), alpha=-lr)
        for p in gradients:  # AdamW passes over what has none
            p.grad = None
        super().step()
        for p, gradient in gradients.items():
            p.grad = gradient


def orthogonal(x):
    """Matrices U·S·Vᵀ (n, rows, columns) -> about U·Vᵀ: singular values of 0.7 to 1.2, but for those near 0.

    Five steps of a polynomial that takes any number in (0, 1] near 1; S never has to be computed. (Keller Jordan, 2024)
    """
    if x.shape[1] > x.shape[2]:  # the smaller products
        return orthogonal(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)                      # no singular value above 1
    for _ in range(5):
        square = x @ x.mT                                                         # (n, rows, rows)
        square = torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, square, x, beta=3.4445)                              # (n, rows, columns)
    return x


class Scaler(torch.amp.GradScaler):
    """With fp16, whose least number is 6e-8, multiplies the loss, so that small gradients do not become 0 on their way
    back; `unscale_` divides them again. A step with gradients that were too large is left out, and the factor halved.
    With any other precision all this does nothing.
    """

    def __init__(self, config, run):
        super().__init__(run.device.type, enabled=config.precision == "fp16")

    def load_state_dict(self, state):
        if state:  # else it was saved with another precision
            super().load_state_dict(state)

    def skips(self, norm):
        """Whether a step of this gradient norm was left out as too large; below 1, the factor is not to blame."""
        return self.is_enabled() and not math.isfinite(norm) and self.get_scale() >= 1


class Recorded:
    """A function of tensors whose work on the GPU is recorded once, as a CUDA graph, and from then on replayed.

    A training step of a small model is thousands of kernels of microseconds each, and Python needs longer to ask for
    one than the GPU to run it: an H100 stood idle for four fifths of the time. A recording is asked for once. It
    repeats exactly what ran, on the same memory: no decision within `function` may hang on values, gradients have to
    stay where they are (`zero_grad(set_to_none=False)`), and what it returns is overwritten by the next call.
    """

    def __init__(self, function):
        self.function, self.key = function, None

    def __call__(self, what, *tensors):
        """function(what, *tensors). `what`: all that is no tensor; tensors: on the GPU, or None.

        With another `what`, or other shapes, it is recorded anew, so that micro-batches below 16, whose samples are
        grouped otherwise each time, run without ever being recorded. The first three calls run as they are: in them
        torch chooses and compiles kernels, and makes gradients.
        """
        key = (what, *(x if x is None else x.shape for x in tensors))
        if key != self.key:
            self.key, self.calls, self.graph, self.result = key, 0, None, None    # lets go of the last one's memory
        self.calls += 1
        if self.calls <= 3:
            return self.function(what, *tensors)
        if self.graph is None:
            self.inputs, self.graph = [x if x is None else x.clone() for x in tensors], torch.cuda.CUDAGraph()
            # thread_local: meanwhile a loader's thread may pin memory
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.result = self.function(what, *self.inputs)
        for mine, x in zip(self.inputs, tensors):
            if x is not None:
                mine.copy_(x, non_blocking=True)
        self.graph.replay()
        return self.result


def recorded(function, config, run):
    """`function`, `Recorded` where that is possible: with --compile, on one GPU alone."""
    return Recorded(function) if config.compile and run.device.type == "cuda" and run.world == 1 else function


# ---------------------------------------------------------------------------------------------------------------
# Several processes: a model split over them


def shard(trunks, units, run, precision):
    """Split modules over the processes (FSDP2, ZeRO stage 3): of each tensor and its gradient, each holds 1/world.

    A unit's weights are gathered when it computes, forwards and once more backwards, and then dropped; `trunks` are the
    modules that hold the units and whatever is in none of them. Unlike DDP this sums gradients after every micro-batch:
    those that waited for the last one would have to be whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # late: not in every build of torch
    mesh = init_device_mesh(run.device.type, (run.world,))
    with autocast(run.device, precision):
        bf16 = torch.is_autocast_enabled(run.device.type)
    # Units hold only what autocast casts: gathered in bfloat16 they give the same numbers for half the traffic. And
    # autocast's own copies would stay, whole, until the backward pass. The residual stream is float32.
    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    for trunk in trunks:
        # What is in no unit. Dropped after the forward pass too: of a frozen trunk there is no backward pass to do it
        fully_shard(trunk, mesh=mesh, reshard_after_forward=True)


def split_like(state, like):
    """A state dict of whole tensors -> each split over the processes as its namesake in `like` is, if that is.

    One tensor in `like` may stand for a dict: its shape says which of those are split (AdamW's moments, not its step).
    """
    if isinstance(state, dict):
        return {name: split_like(x, like.get(name) if isinstance(like, dict) else like) for name, x in state.items()}
    if hasattr(like, "full_tensor") and torch.is_tensor(state) and state.shape == like.shape:
        from torch.distributed.tensor import distribute_tensor  # late: not in every build of torch
        return distribute_tensor(state, like.device_mesh, like.placements)
    return state
