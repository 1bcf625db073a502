"""Networks that make it hard to share what lies before a block: they write in place, grow lists, and change their minds."""

import random
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from fastdiff.steering.branch import Branch
from fastdiff.steering.inject import edited
from steering.networks import MODES, both, randomised, same, whole


class Adds(nn.Module):
    """Writes into its argument, and returns something else."""

    def forward(self, x):
        x += 1
        return x * 2


class Collects(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x, kept):
        kept.append(x)
        return self.layer(x)


class Box:
    def __init__(self, value):
        self.value = value


class Boxes(nn.Module):
    def forward(self, x):
        return Box(x * 2)


class Fills(nn.Module):
    def forward(self, x, box):
        box.value = x * 2
        return x * 3


class Lists(nn.Module):
    def forward(self, x):
        return [x * 2, {"more": [x * 3]}]


class Hard(nn.Module):
    """forward(self, x) is given as a function."""

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c, self.block, self.head = (nn.Linear(8, 8) for _ in range(5))
        self.relu, self.adds, self.collects, self.boxes = nn.ReLU(inplace=True), Adds(), Collects(), Boxes()
        self.lists, self.fills, self.pair = Lists(), Fills(), nn.Sequential(Adds(), self.a)
        self.program = forward

    def forward(self, x):
        return self.program(self, x)


def activation_in_place(n, x):
    skip = n.a(x)
    h = n.relu(skip)  # skip is changed too
    return n.head(n.block(n.b(h)) + skip)


def read_before_it_changes(n, x):
    skip = n.a(x)
    before = skip * 3
    return n.head(n.block(n.relu(skip)) + before)


def glue_in_place(n, x):
    skip = n.a(x)
    h = n.b(skip)
    skip += 1
    return n.head(n.block(h) + skip)


def writes_behind_the_block(n, x):
    skip = n.a(x)
    h = n.block(n.b(skip))
    skip.mul_(2).add_(h)
    return n.head(skip)


def writes_into_a_view(n, x):
    skip = n.a(x)
    n.relu(skip[:, :4])
    return n.head(n.block(n.b(skip)) + skip)


def an_argument_is_changed(n, x):
    g = x * 2
    h = n.adds(g)
    return n.head(n.block(h) + g)


def a_list_grows(n, x):
    kept = []
    h = n.collects(n.collects(x, kept), kept)
    return n.head(n.block(h) + kept.pop() + kept.pop())


def a_module_called_often(n, x):
    h = n.a(n.a(n.a(x)))
    return n.head(n.block(h) + n.a(h))


def a_module_inside_another(n, x):
    h = n.pair(x * 2)  # computed again, with n.a in it; the next call of n.a is not
    return n.head(n.block(n.a(h)))


def a_returned_list_is_emptied(n, x):
    kept = n.lists(n.a(x))
    more = kept.pop()["more"]
    h = n.b(kept.pop() + more.pop())
    assert not kept and not more
    return n.head(n.block(h))


def an_object_returned(n, x):
    return n.head(n.block(n.boxes(n.a(x)).value))


def an_object_filled(n, x):
    box = Box(0)
    h = n.fills(n.a(x), box)
    return n.head(n.block(h) + box.value)


def a_caught_error(n, x):
    try:
        h = n.a(x[:, :3])
    except RuntimeError:
        h = n.a(x) * 2
    return n.head(n.block(n.b(h)) + h)


def written_by_out(n, x):
    out = torch.empty_like(x)
    torch.mul(n.a(x), 2, out=out)
    h = n.b(out)
    torch.add(out, 1, out=out)
    return n.head(n.block(h) + out)


HARD = [activation_in_place, read_before_it_changes, glue_in_place, writes_behind_the_block, writes_into_a_view,
        an_argument_is_changed, a_list_grows, a_module_called_often, a_module_inside_another, a_returned_list_is_emptied,
        an_object_returned, an_object_filled, a_caught_error, written_by_out]


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
@pytest.mark.parametrize("program", HARD, ids=lambda f: f.__name__)
def test_hard_networks(program, mode):
    network = randomised(Hard(program))
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    v = torch.eye(8)[2]
    branch = Branch(network, "block")
    with MODES[mode]():
        x = x.clone()
        for _ in range(2):
            assert same(both(branch, network, lambda: edited(network, "block", v, 0.7), x),
                        whole(network, lambda: edited(network, "block", v, 0.7), x))
            assert "block" in branch.shared


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
def test_what_is_computed_again_is_told(mode):
    with MODES[mode]():
        x = torch.ones(2, 8)
        for program, told in [
            (activation_in_place, {"a": "its output was written into", "relu": "it writes into its arguments"}),
            (writes_behind_the_block, {"a": "its output was written into"}),
            (a_list_grows, {"collects": "it writes into its arguments"}),
            (an_object_filled, {"fills": "it takes an object that cannot be looked into"}),
            (an_object_returned, {"boxes": "it returns an object that cannot be looked into"}),
        ]:
            network = randomised(Hard(program))
            branch = Branch(network, "block")
            both(branch, network, partial(edited, network, "block", torch.eye(8)[0], 1.0), x)
            assert branch.computed == told, program.__name__


class Program(nn.Module):
    """A random program: modules, in place and not, and what lies between them, on a few registers."""

    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        kinds = [lambda: nn.Linear(4, 4), lambda: nn.ReLU(inplace=True), nn.Tanh, nn.Identity, Adds,
                 lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)),
                 lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)),
                 lambda: nn.Sequential(nn.Identity(), nn.Sequential(nn.LeakyReLU(0.3, inplace=True)))]
        self.modules_ = nn.ModuleList(draw.choice(kinds)() for _ in range(5))
        self.block, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        what = ["call"] * 5 + ["add_", "view_", "new", "nested"]
        steps = [(draw.choice(what), draw.randrange(5), draw.randrange(4), draw.randrange(4))
                 for _ in range(draw.randrange(4, 14))]
        steps.insert(draw.randrange(2, len(steps)), ("block", 0, draw.randrange(4), draw.randrange(4)))
        if draw.random() < 0.3:
            steps.append(("block", 0, draw.randrange(4), draw.randrange(4)))
        self.steps = steps

    def forward(self, x):
        r = [x * (i + 1) for i in range(4)]
        for kind, m, a, b in self.steps:
            if kind == "call":
                r[b] = self.modules_[m](r[a])
            elif kind == "add_":
                r[a] += 0.5 if m % 2 else r[b].detach().clone()
            elif kind == "view_":
                r[a][:, 1:3].mul_(-1)
            elif kind == "new":
                r[b] = r[a] + r[m % 4]
            elif kind == "nested":
                r[b] = self.modules_[m](self.modules_[a](r[a]))
            else:
                r[b] = self.block(r[a])
        return self.head(torch.stack(r).sum(0)), *r


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
def test_random_programs(mode):
    shared = 0
    with MODES[mode](), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(150):
            network = randomised(Program(seed), seed)
            x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
            branch = Branch(network, "block")
            edit = partial(edited, network, "block", torch.tensor([0.5, -0.5, 0.5, 0.5]), 0.8)
            for _ in range(2):
                got, expected = both(branch, network, edit, x), whole(network, edit, x)
                assert same(got[0], expected[0]) and same(got[1], expected[1]), f"seed {seed}: {network.steps}"
            shared += len(branch.shared) > 1
    assert shared > 50  # else the test says nothing


def test_a_model_that_does_something_else_the_second_time():
    network = randomised(Hard(None))
    calls = []

    def program(n, x):
        calls.append(1)
        h = n.b(n.a(x)) if len(calls) % 2 else n.a(n.b(x))
        return n.head(n.block(n.c(h)))

    network.program = program
    branch, x = Branch(network, "block"), torch.ones(2, 8)
    edit = partial(edited, network, "block", torch.eye(8)[0], 1.0)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="nothing before block 'block' is shared"):
            got = both(branch, network, edit, x)
        assert same(got, whole(network, edit, x))
