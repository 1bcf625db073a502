"""The training loop of the zoo: resumable, repeatable, interruptible.

What a step sees is a pure function of (seed, step): the order of the images is one permutation per epoch, and each
step's random draws come from a generator seeded for that step. A checkpoint holds the weights, their moving average and
the optimiser's moments, so a run that was interrupted and resumed gives the same bits as one that was not (same
machine, torch and number of threads).

The learning rate rises over `warmup` steps, stays, and falls linearly to zero over the last `decay` fraction of the
steps. Unlike a cosine, it does not depend on the number of steps until the decay begins, so a run can be resumed with
another `steps` before that, and ends as if it had been started so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

Loss = Callable[[nn.Module, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of a run, beside the network, the loss and the data.

    `shards`: each batch is cut into so many parts, computed side by side by one thread each. They wait for one another
    once per step instead of once per operator, which is several times faster where other programs use the cores too,
    and the bits do not depend on the number of cores. Not for networks with batch normalisation or dropout, whose
    state the parts would share.
    """

    name: str
    seed: int
    steps: int
    batch: int
    lr: float
    warmup: int = 200
    decay: float = 0.2
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    ema: float = 0.999
    clip: float = 1.0
    bf16: bool = True
    shards: int = 1

    def fixed(self) -> dict[str, object]:
        """The settings that a resumed run must share with its checkpoint: all but the length."""
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if k not in ("steps", "decay")
        }


def stream(*key: object) -> torch.Generator:
    """A generator for one purpose; its seed is the first 8 bytes of the key's sha256."""
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Order:
    """Image indices of step s: slice s of an endless concatenation of permutations, one per epoch."""

    def __init__(self, seed: int, total: int, batch: int):
        self.seed, self.total, self.batch = seed, total, batch
        self._kept: dict[int, Tensor] = {}

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._kept:
            self._kept = {e: p for e, p in self._kept.items() if e == epoch - 1}
            self._kept[epoch] = torch.randperm(self.total, generator=stream("order", self.seed, epoch))
        return self._kept[epoch]

    def __call__(self, step: int) -> Tensor:
        start, parts, left = step * self.batch, [], self.batch
        while left:
            epoch, offset = divmod(start, self.total)
            part = self._epoch(epoch)[offset : offset + left]
            parts.append(part)
            start, left = start + len(part), left - len(part)
        return torch.cat(parts)


def learning_rate(settings: Settings, step: int) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, constant, linear decay to zero at `steps`."""
    up = min(1.0, (step + 1) / max(1, settings.warmup))
    down = min(1.0, (settings.steps - step) / max(1.0, settings.steps - decay_start(settings)))
    return settings.lr * min(up, down)


def decay_start(settings: Settings) -> float:
    """The step at which the learning rate begins to fall."""
    return settings.steps * (1 - settings.decay)


def serialise(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file whose bytes are a function of its content.

    The library writes the metadata in an order that differs from run to run, so the header is written again, sorted.
    """
    blob = safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata=metadata)
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data to begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + blob[8 + size :]


def save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file that is either the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(serialise(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that each run torch's operators alone; the caller's own number of threads is as before afterwards."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


class Trainer:
    """Trains `net` in place by `loss(net, indices, generator)`; `run` goes on from the checkpoint if there is one."""

    def __init__(self, net: nn.Module, loss: Loss, total: int, settings: Settings, checkpoint: Path, checksum: str):
        self.net, self.loss, self.settings, self.checkpoint, self.checksum = net, loss, settings, checkpoint, checksum
        self.order = Order(settings.seed, total, settings.batch)
        self.device = next(net.parameters()).device
        self.optimizer = torch.optim.AdamW(
            net.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, eps=1e-8
        )
        # Buffers (running statistics of batch normalisation) are averaged like weights; integer counters are copied.
        self.ema = {k: v.detach().clone() for k, v in net.state_dict().items()}
        self.step = 0
        self.as_if_uninterrupted = True
        if settings.batch % settings.shards:
            raise ValueError(f"a batch of {settings.batch} cannot be cut into {settings.shards} equal shards")
        if settings.shards > 1 and any(
            isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.Dropout)) for m in net.modules()
        ):
            raise ValueError("a network with batch normalisation or dropout cannot be trained in shards")

    def _save(self) -> None:
        tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()} | {
            f"ema.{k}": v for k, v in self.ema.items()
        }
        for name, parameter in self.net.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"opt.{key}.{name}"] = value
        # The file must not share memory between tensors; clones also keep it unchanged if training goes on.
        tensors = {k: v.detach().clone() for k, v in tensors.items()}
        save(
            tensors,
            self.checkpoint,
            {
                "step": str(self.step),
                "data": self.checksum,
                "settings": json.dumps(self.settings.fixed(), sort_keys=True),
                "length": json.dumps([self.settings.steps, self.settings.decay]),
                "as_if_uninterrupted": json.dumps(self.as_if_uninterrupted),
            },
        )

    def _load(self) -> None:
        with safe_open(self.checkpoint, "pt") as file:
            metadata = file.metadata()
            tensors = {k: file.get_tensor(k) for k in file.keys()}
        saved, mine = json.loads(metadata["settings"]), self.settings.fixed()
        different = {k: (saved.get(k), mine[k]) for k in mine if saved.get(k) != mine[k]}
        if metadata["data"] != self.checksum:
            different["data"] = (metadata["data"][:12], self.checksum[:12])
        if different:
            raise ValueError(
                f"{self.checkpoint} is from another run, (there, here): {different}. Remove it to start again."
            )
        self.net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
        self.ema = {k[4:]: v.to(self.device) for k, v in tensors.items() if k.startswith("ema.")}
        state = {}
        for i, (name, _) in enumerate(self.net.named_parameters()):
            state[i] = {
                k: tensors[f"opt.{k}.{name}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"opt.{k}.{name}" in tensors
            }
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.step = int(metadata["step"])
        # Another length is as good as none at all, so long as neither had begun to decay by the step reached.
        steps, decay = json.loads(metadata["length"])
        before = dataclasses.replace(self.settings, steps=steps, decay=decay)
        same = before == self.settings or self.step <= min(decay_start(before), decay_start(self.settings))
        self.as_if_uninterrupted = same and json.loads(metadata["as_if_uninterrupted"])

    def _one(self) -> float:
        settings, step = self.settings, self.step
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        parts = self.order(step).chunk(settings.shards)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream("dropout", settings.seed, step).initial_seed())  # dropout takes no generator
            if len(parts) == 1:
                results = [self._gradients((), parts[0])]
            else:
                results = list(self.workers.map(self._gradients, [(i,) for i in range(len(parts))], parts))
        loss = sum(value for value, _ in results) / len(results)
        for parameter, *gradients in zip(self.net.parameters(), *(g for _, g in results), strict=True):
            parameter.grad = sum(gradients[1:], start=gradients[0]) / len(gradients)
        nn.utils.clip_grad_norm_(self.net.parameters(), settings.clip)
        self.optimizer.step()
        self.step += 1
        # A short memory at first, so that the average forgets the random start: Karras et al. 2022 ramp it likewise.
        rate = 1 - min(settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for key, value in self.net.state_dict().items():
                if value.is_floating_point():
                    self.ema[key].lerp_(value, rate)
                else:
                    self.ema[key].copy_(value)
        return loss

    def _gradients(self, shard: tuple[int, ...], index: Tensor) -> tuple[float, tuple[Tensor, ...]]:
        """Loss and gradients of one shard of this step's batch. Autocast is the thread's own state, hence set here."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
            loss = self.loss(self.net, index, stream("step", self.settings.seed, self.step, *shard))
        return loss.item(), torch.autograd.grad(loss, list(self.net.parameters()))

    @contextmanager
    def _workers(self) -> Iterator[None]:
        """The threads of the shards, each running its operators alone."""
        with one_thread_each(self.settings.shards) as self.workers:
            if self.settings.shards > 1:
                torch.set_num_threads(1)
            yield

    def run(self, *, every: int = 250, until: int | None = None, quiet: bool | None = None) -> bool:
        """Train to `settings.steps` (or `until`), saving every `every` steps and when interrupted. True if complete.

        `quiet`: no progress bar; None shows it on a terminal only.
        """
        if self.checkpoint.exists():
            self._load()
        end = min(self.settings.steps, self.settings.steps if until is None else until)
        self.net.train()
        with (
            stop_flag() as stopped,
            self._workers(),
            tqdm(
                total=self.settings.steps,
                initial=self.step,
                desc=self.settings.name,
                unit="step",
                disable=quiet,
                mininterval=1.0,
            ) as bar,
        ):
            mean = None
            while self.step < end and not stopped():
                value = self._one()
                mean = value if mean is None else mean + 0.02 * (value - mean)
                bar.update()
                bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                if self.step % every == 0:
                    self._save()
        self._save()
        return self.step >= self.settings.steps


@contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """Within the block, Ctrl-C and SIGTERM set a flag that the loop reads after its step, so nothing is cut in half."""
    received: list[int] = []

    def handler(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
        received.append(number)

    try:
        old = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: leave signals to whoever owns them
        old = {}
    try:
        yield lambda: bool(received)
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
