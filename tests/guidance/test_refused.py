"""What is refused before the model is called, and what can only be found at the first call."""

import math

import pytest
import torch
from guidance.cases import METHODS, MIXTURE, MODEL, SHAPE, conditional, edm, log_prob

import fastdiff as fd
from fastdiff import guidance


class Counting:
    calls = 0

    def __call__(self, x, sigma):
        self.calls += 1
        return MODEL(x, sigma)



def in_training(*layers):
    """A classifier in training mode, behind a function."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(math.prod(MIXTURE.shape), 3), *layers).double()
    return guidance.labels(lambda x0: network(x0.double()), 3)


NAMED = guidance.labels(lambda x0: MIXTURE.log_joint(x0, 0.0), ["shirt", "bag", "boot"])

BEFORE = {
    "log_prob is not callable": (lambda: guidance.mpgd(3, 0), TypeError, ["log_prob is int"]),
    "log_prob without sigma": (lambda: guidance.classifier(log_prob, 0), TypeError, ["log_prob(x, sigma, y)"]),
    "log_prob with sigma": (lambda: guidance.tfg(MIXTURE.log_prob_noisy, 0), TypeError, ["log_prob(x0, y)"]),
    "a label that is not there": (lambda: guidance.mpgd(NAMED, 3), ValueError, ["3", "0 to 2"]),
    "a name that is not there": (lambda: guidance.mpgd(NAMED, "bags"), ValueError, ["'bags'", "did you mean 'bag'"]),
    "a name without names": (lambda: guidance.mpgd(log_prob, "bag"), TypeError, ["'bag'", "fd.guidance.labels"]),
    "no target": (lambda: guidance.mpgd(NAMED, None), TypeError, ["None", "shirt"]),
    "too few targets": (lambda: guidance.mpgd(log_prob, [0, 1]), ValueError, ["2 entries", "4 samples"]),
    "targets of floats": (lambda: guidance.mpgd(NAMED, torch.zeros(4)), TypeError, ["float32", "int64"]),
    "target 0.5": (lambda: guidance.mpgd(log_prob, 0.5), TypeError, ["0.5"]),
    "strengths of another batch": (lambda: guidance.dps(log_prob, 0, [1.0, 2.0]), ValueError, ["(2,)", "4 samples"]),
    "strength NaN": (lambda: guidance.classifier(MIXTURE.log_prob_noisy, 0, math.nan), ValueError, ["nan", "finite"]),
    "strength as text": (lambda: guidance.dps(log_prob, 0, "1"), TypeError, ["'1'"]),
    "a strength over n as text": (lambda: guidance.lgd(log_prob, 0, "1"), TypeError, ["'1'", "a number"]),
    "a strength over n that is none": (lambda: guidance.lgd(log_prob, 0, None), TypeError, ["None", "a number"]),
    "a strength over n that is True": (lambda: guidance.lgd(log_prob, 0, True), TypeError, ["True", "a number"]),
    "a window above the plan": (lambda: guidance.dps(log_prob, 0, window=(30, 40)), ValueError, ["(30, 40)", "20"]),
    "a window upside down": (lambda: guidance.dps(log_prob, 0, window=(2, 1)), ValueError, ["low <= high"]),
    "a window of one": (lambda: guidance.classifier(MIXTURE.log_prob_noisy, 0, window=(2,)), TypeError, ["(low, high)"]),
    "n_iter negative": (lambda: guidance.tfg(log_prob, 0, n_iter=-1), ValueError, ["n_iter is -1"]),
    "n_mc 0": (lambda: guidance.tfg(log_prob, 0, n_mc=0), ValueError, ["n_mc is 0"]),
    "n 0": (lambda: guidance.lgd(log_prob, 0, n=0), ValueError, ["n is 0"]),
    "n_recur 0": (lambda: guidance.freedom(log_prob, 0, n_recur=0), ValueError, ["n_recur is 0"]),
    "sigma_bar negative": (lambda: guidance.tfg(log_prob, 0, sigma_bar=-1.0), ValueError, ["sigma_bar is -1.0"]),
    "an unknown rule": (lambda: guidance.training_free(log_prob, 0, rule="tgf"), ValueError, ["'tgf'", "'tfg'"]),
    "an unknown schedule": (lambda: guidance.freedom(log_prob, 0, schedule="increasing"), ValueError, ["'increase'"]),
    "no conditional model": (lambda: guidance.classifier_free(None, 0), TypeError, ["conditional_model(x, time, y)"]),
    "no condition": (lambda: guidance.classifier_free(conditional, None), TypeError, ["target is None"]),
    "a conditional model without a condition": (lambda: guidance.classifier_free(lambda x, time: x, 0), TypeError,
                                                ["conditional_model(x, time, y)", "positional"]),
    "a null of another shape": (lambda: guidance.classifier_free(conditional, torch.zeros(4, 5), null=1), ValueError,
                                ["null", "(4,)", "(4, 5)"]),
    "outside by sample": (lambda: guidance.classifier_free(conditional, 0, outside=[0, 0, 0, 0]), TypeError, ["outside"]),
    "a classifier that draws": (lambda: guidance.tfg(in_training(torch.nn.Dropout(0.1)), 0), ValueError, ["Dropout", "eval()"]),
    "a classifier that learns": (lambda: guidance.dps(in_training(torch.nn.BatchNorm1d(3)), 0), ValueError,
                                 ["training mode", "BatchNorm1d"]),
    "one class": (lambda: guidance.labels(lambda x: x, 1), ValueError, ["two or more"]),
    "a class twice": (lambda: guidance.labels(lambda x: x, ["a", "a"]), ValueError, ["a, a"]),
    "classes as text": (lambda: guidance.labels(lambda x: x, "ab"), TypeError, ["'ab'"]),
}


@pytest.mark.parametrize("case", BEFORE)
def test_refused_before_the_model_is_called(case):
    make, kind, words = BEFORE[case]
    model = Counting()
    with pytest.raises(kind) as error:
        fd.sample(model, edm(), SHAPE, 0, steering=[make()])
    assert model.calls == 0
    for word in words:
        assert word in str(error.value)


TOGETHER = {
    "recurrences after another action": ("euler", ["mpgd", ("tfg", 2)], ["first in steering"]),
    "recurrences with history": ("dpmpp_2m", [("tfg", 2)], ["earlier estimates"]),
    "a stage that does not move the base": ("heun", ["tfg"], ["does not write its estimate"]),
    "classifier-free twice": ("euler", ["classifier_free", "classifier_free"], ["taken once"]),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_plans_and_actions_that_do_not_go_together(case):
    sampler, names, words = TOGETHER[case]
    steering = [METHODS[n](1.0) if isinstance(n, str) else METHODS[n[0]](1.0, n_recur=n[1]) for n in names]
    model = Counting()
    with pytest.raises(ValueError) as error:
        fd.sample(model, edm(sampler), SHAPE, 0, steering=steering)
    assert model.calls == 0
    for word in words:
        assert word in str(error.value)


def detached(x, sigma):
    return MODEL(x.detach(), sigma)


@torch.no_grad()
def without_grad(x, sigma):
    return MODEL(x, sigma)


def underflown(x0, y):
    """log of a probability that is 0 in float32, computed as one should not."""
    return (x0.flatten(1).sum(1) * 0.0 - 200).exp().log().clamp(min=-1e4)


AT_THE_FIRST_CALL = {
    "a scalar": (MODEL, lambda x0, y: log_prob(x0, y).sum(), ValueError, ["()", "(4,)"]),
    "a column": (MODEL, lambda x0, y: log_prob(x0, y)[:, None], ValueError, ["(4, 1)", "(4,)"]),
    "labels": (MODEL, lambda x0, y: y, ValueError, ["int64"]),
    "a number": (MODEL, lambda x0, y: 0.0, TypeError, ["float"]),
    "NaN": (MODEL, lambda x0, y: log_prob(x0, y) * torch.tensor([1, math.nan, 1, 1]), FloatingPointError,
            ["NaN", "1 of 4", "sigma 20"]),
    "a gradient of NaN": (MODEL, underflown, FloatingPointError, ["gradient of log_prob(x0, y)", "4 of 4", "sigma 20", "log_softmax"]),
    "a model that returns nothing": (lambda x, sigma: None, log_prob, TypeError, ["the model returned NoneType"]),
    "a model that returns one sample": (lambda x, sigma: MODEL(x, sigma)[:1], log_prob, ValueError, ["(1, 3, 2)", "(4, 3, 2)"]),
    "no gradient": (MODEL, lambda x0, y: log_prob(x0, y).detach(), RuntimeError, ["without gradient"]),
    "logits of another number": (MODEL, guidance.labels(lambda x0: MIXTURE.log_joint(x0, 0), 4), ValueError,
                                 ["(4, 3)", "(4, 4)"]),
    "a model that detaches": (detached, log_prob, RuntimeError, ["model's output has no gradient"]),
    "a model under no_grad": (without_grad, log_prob, RuntimeError, ["model's output has no gradient", "torch.no_grad"]),
}


@pytest.mark.parametrize("case", AT_THE_FIRST_CALL)
def test_found_at_the_first_call(case):
    model, judge, kind, words = AT_THE_FIRST_CALL[case]
    with pytest.raises(kind) as error:
        fd.sample(model, edm(), SHAPE, 0, steering=[guidance.dps(judge, 0)])
    for word in words:
        assert word in str(error.value)


def test_training_mode_is_no_matter_where_it_changes_nothing():
    for layer in (torch.nn.Dropout(0.0), torch.nn.Tanh(), torch.nn.BatchNorm1d(3).eval()):
        fd.sample(MODEL, edm(), SHAPE, 0, steering=[guidance.mpgd(in_training(layer), 0)])


def test_the_gradient_of_a_noisy_classifier_is_checked():
    with pytest.raises(FloatingPointError, match="gradient of log_prob.x, sigma, y. at sigma 20"):
        fd.sample(MODEL, edm(), SHAPE, 0, steering=[guidance.classifier(lambda x, sigma, y: underflown(x, y), 0)])


CONDITIONALS = {
    "one sample": (lambda x, time, y: conditional(x, time, y)[:1], ValueError, ["conditional_model", "(1, 3, 2)"]),
    "a pair": (lambda x, time, y: (x, x), ValueError, ["2 outputs"]),
    "nothing": (lambda x, time, y: None, TypeError, ["NoneType"]),
}


@pytest.mark.parametrize("case", CONDITIONALS)
@pytest.mark.parametrize("options", [{}, {"null": 2}, {"scale": [2.0, 1.0, 0.0, 3.0]}, {"scale": [2.0] * 4, "null": 2}], ids=str)
def test_a_conditional_model_returns_one_output_of_the_shape(case, options):
    network, kind, words = CONDITIONALS[case]
    with pytest.raises(kind) as error:
        fd.sample(MODEL, edm(), SHAPE, 0, steering=[guidance.classifier_free(network, 0, **options)])
    for word in words:
        assert word in str(error.value)
