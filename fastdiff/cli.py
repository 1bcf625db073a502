"""The command line: fastdiff doctor | selftest | sample | demo."""

import ast
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)


class Refused(Exception):
    """Something that the person at the keyboard can mend: shown as one line."""


@app.command()
def doctor() -> None:
    """Which backends there are, why each is or is not used, and what it runs on."""
    from importlib import metadata

    import numpy
    import torch
    from rich.console import Console
    from rich.table import Table

    import fastdiff
    from fastdiff import ops

    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table("device", "backend", "usable", "in use", "why", title="backends")
    for c in ops.backends():
        table.add_row(c.device, c.backend, "yes" if c.usable else "no", "yes" if c.used else "", c.reason)
    console.print(table)

    facts = Table("", "", show_header=False, title="machine")
    facts.add_row("fastdiff", fastdiff.__version__)
    facts.add_row("torch", torch.__version__)
    try:
        facts.add_row("triton", metadata.version("triton"))  # without importing it: this has to run where it is broken
    except metadata.PackageNotFoundError:
        facts.add_row("triton", "not installed")
    facts.add_row("numpy", numpy.__version__)
    facts.add_row("python", platform.python_version())
    facts.add_row("processor", f"{platform.machine()}, {os.cpu_count()} cores")
    facts.add_row("instruction set", ops.instruction_set())
    facts.add_row("threads", str(torch.get_num_threads()))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts.add_row("GPUs", ", ".join(gpus) or f"none: {ops.no_gpu()}")
    for name in ("FASTDIFF_BACKEND", "FASTDIFF_ISA", "TRITON_INTERPRET"):
        if name in os.environ:
            facts.add_row(name, os.environ[name])
    console.print(facts)

    where = {"device": "cuda"} if gpus else {}
    drawn = fastdiff.randn((1, 4), seeds=[0], **where).flatten().tolist()
    expected = fastdiff.reference.normal(fastdiff.reference.run_keys([0], [[fastdiff.STREAMS["user"]]], [[0]])[0, 0, 0], 4)
    if drawn != expected.tolist():
        raise Refused(f"the first four normals of seed 0 are {drawn}: {expected.tolist()} is right")
    console.print("the first four normals of seed 0 are right, bit by bit")


@app.command()
def selftest(
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1; default: all there are")] = None,
    backend: Annotated[Optional[str], typer.Option(help="cpp, triton-interpreted, reference, cuda or triton; default: all")] = None,
    json: Annotated[Optional[Path], typer.Option(help="file for what goes with a report: versions, devices, digests, times")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="a line for each case")] = False,
    golden: Annotated[Optional[Path], typer.Option(help="folder of other digests than those of this package")] = None,
) -> None:
    """Runs every backend of this machine and compares the bits with stored digests. Exit code 0 if all that ran agree."""
    import torch

    from fastdiff.selftest import selftest as check

    try:
        device is not None and torch.device(device)
    except RuntimeError as error:
        raise Refused(f"--device is {device!r}: {str(error).splitlines()[0]}") from None
    if golden is not None and not golden.is_dir():
        raise Refused(f"--golden is {golden}: a folder is taken")
    if not check(device, backend, report_to=json, verbose=verbose, golden=golden):
        raise typer.Exit(1)


@app.command()
def sample(
    model: Annotated[str, typer.Option(help="FILE.py:NAME, a function that returns the model, called as model(x, time)")],
    shape: Annotated[str, typer.Option(help="shape of one sample, as 3,32,32")],
    out: Annotated[Path, typer.Option(help="safetensors file to write")],
    sampler: Annotated[str, typer.Option(help="its name, as for fd.plan")] = "dpmpp_2m",
    schedule: Annotated[str, typer.Option(help="its name, as for fd.plan")] = "edm",
    prediction: Annotated[str, typer.Option(help="what the model returns")] = "denoised",
    steps: Annotated[int, typer.Option(help="of the sampler")] = 20,
    count: Annotated[int, typer.Option(help="how many samples")] = 16,
    seed: Annotated[int, typer.Option(help="of the first sample; the next have the next seeds")] = 0,
    batch_size: Annotated[Optional[int], typer.Option(help="samples in one call of the model; default: all")] = None,
    device: Annotated[Optional[str], typer.Option(help="cpu, cuda, ...; default: the model's")] = None,
    option: Annotated[Optional[list[str]], typer.Option(help="NAME=VALUE for the sampler, repeatable: eta=0.5")] = None,
    png: Annotated[Optional[Path], typer.Option(help="also a picture: a grid of the samples")] = None,
) -> None:
    """Samples from a model in a Python file of your own."""
    import torch
    from safetensors.torch import save_file

    import fastdiff
    from fastdiff.files import check_target, written

    sizes = _literal("shape", f"({shape},)")
    plan = fastdiff.plan(sampler, schedule=schedule, prediction=prediction, steps=steps, **_options(option or []))
    for path in filter(None, (out, png)):
        check_target(path)
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise Refused(f"--device is {device!r}: {str(error).splitlines()[0]}") from None
    net = load_model(model)
    images = fastdiff.sample(net, plan, (count, *sizes), seed, batch_size=batch_size, device=device).cpu()
    with written(out) as temporary:
        save_file({"samples": images}, temporary, metadata={"plan": plan.to_json(), "seed": str(seed)})
    typer.echo(f"{out}: {tuple(images.shape)}")
    if png is not None:
        from fastdiff.demo import save_grids

        save_grids(png, {f"{plan.name}, {steps} steps": images})
        typer.echo(f"{png}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder to write to")] = Path("demo"),
    network: Annotated[Path, typer.Option(help="the folder of the Fashion-MNIST network")] = Path("benchmarks/zoo"),
    count: Annotated[int, typer.Option(help="images a sampler")] = 64,
) -> None:
    """Draws Fashion-MNIST images with three samplers, and times them beside the schedulers of diffusers."""
    from fastdiff.demo import run

    if not (network / "unet.py").is_file():
        raise Refused(f"{network}/unet.py is not there: run the demo in a checkout of the project, or name the folder with --network")
    run(out, network, count)


def load_model(spec: str):
    """What FILE.py:NAME returns when called."""
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise Refused(f"--model is {spec!r}: FILE.py:NAME is taken")
    if not Path(file).is_file():
        raise Refused(f"--model: {file} is not there")
    found = importlib.util.spec_from_file_location("fastdiff_user_model", file)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise Refused(f"--model: {file} has no function {name!r}")
    return getattr(module, name)()


def _literal(what: str, text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise Refused(f"--{what} is {text!r}: a Python literal is taken") from None


def _options(pairs: list[str]) -> dict:
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise Refused(f"--option is {pair!r}: NAME=VALUE is taken")
        for read in (ast.literal_eval, float, str):
            try:
                options[name] = read(value)
                break
            except (ValueError, SyntaxError):
                pass
    return options


def main() -> None:
    """Entry point: mistakes of the caller end in one line and exit code 2, Ctrl-C in 130."""
    try:
        code = app(standalone_mode=False) or 0
        if code == 130:  # typer returns the code of an interruption
            raise KeyboardInterrupt
        sys.exit(code)
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
    except (Refused, ValueError, TypeError, FloatingPointError) as error:
        typer.echo(f"fastdiff: {error}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("\nfastdiff: stopped", err=True)
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's own: a wrong option
            typer.echo(f"fastdiff: {error.format_message()}", err=True)
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
