"""A network with a time, concepts for its blocks, and what ``fd.sample`` does with them done by hand."""

from dataclasses import dataclass

import torch
from torch import nn

import fastdiff as fd
from fastdiff.steering.inject import edited
from steering.networks import directions, zoo


@dataclass
class Made:
    """What Injection needs of a concept."""

    direction: torch.Tensor
    block: str


SHAPE = (5, 1, 12, 12)
PLANS = {
    "heun": {"schedule": "edm", "prediction": "denoised", "steps": 5},
    "ddim": {"schedule": "linear", "prediction": "epsilon", "steps": 6},
    "dpmpp_2m_sde": {"schedule": "edm", "prediction": "denoised", "steps": 6},
}


def plan_of(name):
    return fd.plan(name, **PLANS[name])


class Model(nn.Module):
    """The zoo's network, with a time that it can take."""

    def __init__(self):
        super().__init__()
        self.net = zoo()

    def forward(self, x, t):
        return self.net(x / (1 + x.abs().mean((1, 2, 3), keepdim=True)), t.to(x.dtype).log1p())


def concepts(count=2, block="net.enc.2", seed=5):
    return [Made(v, block) for v in directions((32, 3, 3), count, seed)]


def manual(model, plan, terms, seeds=0, shape=SHAPE, block="net.enc.2"):
    """The same with whole evaluations, by hand. terms(sigma): [(scale, [(weight, direction), ...]), ...] of that row."""
    def evaluate(edits, run):
        if not edits:
            return model(run.model_input, run.time)
        with edited(model, block, [v for _, v in edits], [w for w, _ in edits]):
            return model(run.model_input, run.time)

    run = fd.Stepper(plan, shape, range(seeds, seeds + shape[0]))
    with torch.no_grad():
        while not run.done:
            here = terms(run.sigma)
            always = [e for scale, edits in here if scale == 1 for e in edits]
            base = total = evaluate(always, run)
            others = [(scale, evaluate(always + edits, run)) for scale, edits in here if scale != 1]
            if "uncond" in plan.inputs:
                run.step(others[0][1] if others else base, base)
            else:
                for scale, out in others:
                    total = total + scale * (out - base)
                run.step(total)
    return run.result()


def bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))
