"""The recipes' settings: what was published, and the table of it in their README."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.recipes import settings
from benchmarks.recipes.__main__ import main

README = Path(__file__).parents[2] / "benchmarks" / "recipes" / "README.md"


def test_settings_are_the_published_ones():
    def values(*which):
        return {name: given.value for name, given in settings.settings(*which).items()}

    edm_cifar = values("cifar10", "edm", "na")
    assert (edm_cifar["sampler"], edm_cifar["steps"], edm_cifar["weight"], edm_cifar["window_steps"]) == ("heun", 18, 3.0, (0, 7))
    ddpm = values("celebahq", "diffusers", "na-rfm")
    assert (ddpm["sampler"], ddpm["steps"], ddpm["eta"], ddpm["iterations"]) == ("ddim", 100, 0.0, 5)
    names = ("steps", "eta", "rho", "mu", "sigma_bar", "n_iter")
    tfg = [[values(data, "openai", "tfg")[name] for name in names] for data in settings.DATA]
    assert tfg == [[50, 1.0, 1.0, 0.25, 0.001, 4], [100, 1.0, 2.0, 0.5, 0.1, 4], [100, 1.0, 0.5, 8.0, 1.0, 4]]
    assert set(settings.OPTIONS) >= {rule.option for rule in settings.RULES}


def test_the_readme_has_the_table(capsys):
    assert main(["table"]) == 0
    assert capsys.readouterr().out.strip() in README.read_text()


def test_an_option_that_was_given_stands_in_place_of_what_it_excludes():
    given = settings.settings("cifar10", "edm", "na", {"window": (1.0, 80.0)})
    assert given["window"] == settings.Given((1.0, 80.0), "given") and "window_steps" not in given
    assert "s_churn" in settings.settings("imagenet", "edm", "na")
    assert "s_churn" not in settings.settings("imagenet", "edm", "na", {"sampler": "ddim"})
    with pytest.raises(ValueError, match="--strength is not of tfg, which takes .*--rho"):
        settings.settings("imagenet", "edm", "tfg", {"strength": 1.0})
