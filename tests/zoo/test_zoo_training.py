"""The zoo's training loop (resumable bit for bit, interruptible) and the figures it is judged by."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import fastdiff as fd
from benchmarks.zoo import data, evaluate, metrics, train
from benchmarks.zoo.classifiers import load_classifier
from benchmarks.zoo.trainer import Order, Settings, Trainer, decay_start, learning_rate
from benchmarks.zoo.unet import IMAGE_SHAPE, WEIGHTS, load

ROOT = Path(__file__).parents[2]


def settings(**changes: object) -> Settings:
    base = Settings("guide", seed=3, steps=12, batch=12, lr=1e-3, warmup=2, decay=0.5, ema=0.9)
    return dataclasses.replace(base, **changes)


def trainer(name: str, folder: Path, checkpoint: Path, **changes: object) -> Trainer:
    images = data.load_images("train", folder, count=64)
    chosen = settings(name=name, **changes)
    net, loss = train.build(name, images, chosen.seed, WEIGHTS)
    return Trainer(net, loss, len(images), chosen, checkpoint, images.checksum)


def test_order_is_one_permutation_per_epoch_and_depends_on_nothing_else() -> None:
    order = Order(seed=5, total=50, batch=20)
    seen = torch.cat([order(step) for step in range(5)])
    assert sorted(seen[:50].tolist()) == sorted(seen[50:].tolist()) == list(range(50))
    assert not torch.equal(seen[:50], seen[50:])
    assert torch.equal(Order(seed=5, total=50, batch=20)(3), seen[60:80])
    assert not torch.equal(Order(seed=6, total=50, batch=20)(0), seen[:20])
    assert len(Order(seed=5, total=3, batch=20)(7)) == 20


def test_learning_rate() -> None:
    chosen = settings(steps=100, warmup=10, decay=0.2, lr=1.0)
    rates = [learning_rate(chosen, s) for s in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and set(rates[9:81]) == {1.0}
    assert rates[99] == pytest.approx(0.05) and rates[80:] == sorted(rates[80:], reverse=True)
    # before the decay begins the length does not matter
    longer = dataclasses.replace(chosen, steps=500)
    assert rates[:80] == [learning_rate(longer, s) for s in range(80)] and decay_start(chosen) == 80


@pytest.mark.parametrize("name", ["unet", "unet_cond", "guide", "guide_noisy", "judge"])
def test_resumed_equals_uninterrupted_in_every_bit(name: str, folder: Path, tmp_path: Path) -> None:
    whole = trainer(name, folder, tmp_path / "whole.safetensors", steps=4)
    assert whole.run(quiet=True) and whole.as_if_uninterrupted
    parts = trainer(name, folder, tmp_path / "parts.safetensors", steps=4)
    assert not parts.run(until=2, quiet=True)
    torch.randn(7)  # the global generator has no say
    again = trainer(name, folder, tmp_path / "parts.safetensors", steps=4)
    assert again.run(quiet=True) and again.step == 4 and again.as_if_uninterrupted
    a, b = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "parts.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert {k.split(".")[0] for k in a} == {"net", "ema", "opt"}
    assert not any(torch.equal(a["ema." + k], p.detach()) for k, p in whole.net.named_parameters() if p.numel() > 64)


def test_the_conditional_network_starts_as_the_unconditional_one(folder: Path, tmp_path: Path) -> None:
    net = trainer("unet_cond", folder, tmp_path / "c.safetensors").net.eval()
    x, c_noise, label = torch.randn(3, *IMAGE_SHAPE), torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([0, 9, 10])
    with torch.no_grad():
        assert torch.equal(net(x, c_noise, label), load()(x, c_noise))
        assert torch.equal(net(x, c_noise), net(x, c_noise, torch.tensor([10, 10, 10])))


def test_a_tenth_of_the_labels_is_dropped(folder: Path) -> None:
    images = data.load_images("train", folder, count=64)
    loss, index = train.ConditionalLoss(images), torch.arange(64).repeat(200)
    (told,) = loss.labels(index, torch.Generator().manual_seed(0))
    dropped = told == 10
    assert 0.09 < dropped.double().mean() < 0.11
    assert torch.equal(told[~dropped], images.labels[index][~dropped])


def test_shards_see_the_whole_batch_and_no_thread_decides(folder: Path, tmp_path: Path) -> None:
    def run(checkpoint: str) -> dict[str, torch.Tensor]:
        assert trainer("unet", folder, tmp_path / checkpoint, steps=2, shards=3, bf16=False).run(quiet=True)
        return load_file(tmp_path / checkpoint)

    first = run("a")
    torch.set_num_threads(2)
    second = run("b")
    assert all(torch.equal(first[k], second[k]) for k in first)

    whole = trainer("unet", folder, tmp_path / "c", shards=1, bf16=False)
    cut = trainer("unet", folder, tmp_path / "d", shards=3, bf16=False)
    for one in (whole, cut):  # a loss without noise, so that only the cutting differs
        one.loss = lambda net, index, generator, images=one.loss.images: (
            (net(images.batch(index), torch.zeros(len(index))).float() - 1).square().mean()
        )
        assert not one.run(until=1, quiet=True)
    for a, b in zip(whole.net.parameters(), cut.net.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_shards_are_refused_where_they_would_share_state(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch normalisation or dropout"):
        trainer("judge", folder, tmp_path / "run.safetensors", shards=2)
    with pytest.raises(ValueError, match="12 cannot be cut into 5 equal shards"):
        trainer("unet", folder, tmp_path / "run.safetensors", shards=5)


def test_length_may_change_before_the_decay_and_is_told_after(folder: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.safetensors"
    assert not trainer("guide", folder, checkpoint, steps=40).run(until=4, quiet=True)
    shorter = trainer("guide", folder, checkpoint, steps=8)
    assert not shorter.run(until=6, quiet=True) and shorter.as_if_uninterrupted
    longer = trainer("guide", folder, checkpoint, steps=40)
    assert not longer.run(until=7, quiet=True) and not longer.as_if_uninterrupted
    last = trainer("guide", folder, checkpoint, steps=8)
    assert last.run(quiet=True) and not last.as_if_uninterrupted


def test_another_length_before_the_decay_gives_the_same_bits(folder: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.safetensors"
    assert not trainer("guide", folder, checkpoint, steps=40).run(until=4, quiet=True)
    assert trainer("guide", folder, checkpoint, steps=8).run(quiet=True)
    assert trainer("guide", folder, tmp_path / "whole.safetensors", steps=8).run(quiet=True)
    assert checkpoint.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()  # the metadata's order too


def test_checkpoint_of_another_run_is_refused(folder: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.safetensors"
    trainer("guide", folder, checkpoint).run(until=1, quiet=True)
    before = checkpoint.read_bytes()
    with pytest.raises(ValueError, match=r"from another run.*'seed': \(3, 4\)"):
        trainer("guide", folder, checkpoint, seed=4).run(until=2, quiet=True)
    other = trainer("guide", folder, checkpoint)
    other.checksum = "0" * 64
    with pytest.raises(ValueError, match="'data': "):
        other.run(until=2, quiet=True)
    assert checkpoint.read_bytes() == before


def test_training_learns(folder: Path, tmp_path: Path) -> None:
    run = trainer("guide", folder, tmp_path / "run.safetensors", steps=60, decay=0.3)
    assert run.run(quiet=True)
    images = data.load_images("train", folder, count=64)
    run.net.load_state_dict(run.ema)
    assert evaluate.accuracy(run.net.eval(), images)[0] > 0.9


def test_export_keeps_origin(folder: Path, tmp_path: Path) -> None:
    run = trainer("judge", folder, tmp_path / "run.safetensors", steps=3)
    run.run(quiet=True)
    path = train.export(run, tmp_path / "weights")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        kinds = {file.get_tensor(k).dtype for k in file.keys()}
    assert metadata["command"] == "python -m benchmarks.zoo.train judge --steps 3 --seed 3 --batch 12"
    assert metadata["data_sha256"] == run.checksum and kinds == {torch.float16, torch.int64}
    load_classifier("judge", path)


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_where_it_stands(folder: Path, tmp_path: Path, number: int) -> None:
    """Ctrl-C ends the run after the step, with a checkpoint at it; a pause (SIGSTOP, SIGCONT) changes nothing."""
    code = (
        "import sys\nfrom benchmarks.zoo import data, train\n"
        "data.COUNT['train'] = 64\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "guide",
        "--data",
        str(folder),
        "--runs",
        str(tmp_path),
        "--out",
        str(tmp_path / "w"),
        "--steps",
        "100000",
        "--batch",
        "8",
        "--every",
        "5",
        "--threads",
        "1",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    checkpoint = tmp_path / "guide.safetensors"
    try:
        deadline = time.monotonic() + 60
        while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGSTOP)
        process.send_signal(signal.SIGCONT)
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 130 and "the same command goes on from there" in output, output
    with safe_open(checkpoint, "pt") as file:
        step = int(file.metadata()["step"])
    assert f"stopped after {step} of 100000 steps" in output and step >= 5
    assert not (tmp_path / "w").exists() and [p.name for p in tmp_path.glob(".*")] == []


def test_command_line_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["unet", "--data", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["unet", "--steps", "0"])
    assert evaluate.main(["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 2
    assert list(tmp_path.iterdir()) == []


# metrics


def test_sigma_is_stratified_lognormal() -> None:
    sigma = train.lognormal(1000, -0.6, 1.4, torch.Generator().manual_seed(0))
    assert sigma.dtype == torch.float32 and (sigma.diff() >= 0).all()
    assert sigma.log().mean().item() == pytest.approx(-0.6, abs=0.01)
    assert sigma.log().std().item() == pytest.approx(1.4, abs=0.02)


def test_frechet_against_scipy_and_closed_form() -> None:
    from scipy.linalg import sqrtm

    generator = torch.Generator().manual_seed(0)
    a = metrics.moments(
        torch.randn(200, 8, generator=generator, dtype=torch.float64) @ torch.randn(8, 8, generator=generator).double()
    )
    b = metrics.moments(torch.randn(200, 8, generator=generator, dtype=torch.float64) + 1)
    expected = (a[0] - b[0]).square().sum() + (a[1] + b[1]).trace() - 2 * np.trace(sqrtm((a[1] @ b[1]).numpy()).real)
    assert metrics.frechet(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-9)
    eye = torch.eye(3, dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    assert metrics.frechet((zero, eye), (zero + 2, 4 * eye)) == pytest.approx(12 + 3 * (1 + 4 - 4))
    flat = torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))  # singular covariances are fine
    assert metrics.frechet((zero, flat), (zero, eye)) == pytest.approx(2.0)


def test_nearest_finds_copies() -> None:
    others = torch.rand(50, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    images = others[[7, 31]].clone()
    images[1] += 0.01
    distance, index = metrics.nearest(images, others, batch=16, quiet=True)
    assert index.tolist() == [7, 31] and distance[0] == 0
    assert distance[1].item() == pytest.approx(0.28, rel=1e-4)


def test_sampler_solves_a_gaussian() -> None:
    """F = 0 makes D the ideal denoiser of N(0, 0.7^2); the flow then ends at x_T 0.7 / sqrt(0.7^2 + 80^2)."""
    found = evaluate.sample(lambda x, c_noise: torch.zeros_like(x), 4, seed=1, steps=60, batch=3, quiet=True)
    noise = fd.randn((4, *IMAGE_SHAPE), seeds=1, stream="init")
    exact = (noise * 80 * 0.7 / math.hypot(80, 0.7)).clamp(-1, 1)
    torch.testing.assert_close(found, exact, rtol=0, atol=5e-3)
