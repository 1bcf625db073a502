"""Concepts of one run, acting together: which edits a call of the model sees, and how many calls there are.

A row with concepts of scale 1 only is one call of the model, with their edits. With concepts of other scales s_g it is one more
call for each of these scales, behind the edited block only, and the output is eps0 + sum_g s_g (eps_g - eps0).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..action import Acting, Setting
from ..plan import Plan
from .branch import Branch, inside_compiled
from .collect import find_block
from .inject import Edit, compiled
from .window import per_sample, rows_in

if TYPE_CHECKING:
    from ..stepper import Stepper
    from .inject import Injection

__all__ = ["Injecting", "begin"]


def begin(injection: Injection, setting: Setting) -> Injecting:
    """What ``Injection.begin`` returns: the concept joins those that an earlier one of the list brought."""
    earlier = [acting for acting in setting.acting if isinstance(acting, Injecting)]
    together = earlier[0].together if earlier else _Together(setting)
    added = together.add(injection, setting)
    return Injecting(together, first=not earlier, **added)


@dataclass(eq=False)
class _Part:
    """One concept of the run."""

    injection: Injection
    all_weights: torch.Tensor  # (B,) float32 on the CPU
    column: int  # among the directions of its block

    def select(self, index: torch.Tensor) -> None:
        self.weight = self.all_weights[index]  # (size,)
        self.acts = bool(self.weight.any())

    @property
    def scale(self) -> float:
        return float(self.injection.scale)

    @property
    def one_weight(self) -> bool:
        return np.ndim(self.injection.weight) == 0


class Injecting(Acting):
    """One concept of a run at work. The first of the list acts for all of them.

    shared: names of the modules that the last row's second evaluations did not compute, by the names of the blocks edited there.
    """

    def __init__(self, together: _Together, *, first: bool, plan: Plan, brings_second: bool):
        self.together, self.plan = together, plan
        self._first, self._brings_second = first, brings_second

    @property
    def shared(self) -> dict[tuple[str, ...], tuple[str, ...]]:
        return {blocks: branch.shared for blocks, branch in self.together.branches.items()}

    def select(self, index: torch.Tensor) -> None:
        if self._first:
            self.together.select(index)

    def outputs(self, run: Stepper, evaluate: Callable[[], tuple]) -> tuple:
        outputs = self.together.outputs(run, evaluate) if self._first else evaluate()
        return (*outputs, self.together.second) if self._brings_second else outputs

    def close(self) -> None:
        self.together.close()


class _Together:
    """All concepts of a run."""

    def __init__(self, setting: Setting):
        self._device, self._size = setting.device, setting.size
        names = [name for name in setting.plan.inputs if name not in ("x", *setting.plan.outputs)]
        self._combined = [i for i, name in enumerate(names) if name in ("out", "uncond")]  # the model's own outputs
        self._network = None
        self._parts: list[_Part] = []
        self._edits: dict[str, Edit] = {}  # by block
        self._in_row = False  # whether the plan's second output is ours
        self._rows = (None, [])  # a plan, and the parts that act in each of its rows
        self.branches: dict[tuple[str, ...], Branch] = {}  # by the blocks that are edited
        self.second: torch.Tensor | None = None

    # ---- before the run

    def add(self, injection: Injection, setting: Setting) -> dict:
        """Checks a concept, and adds it to the edits and to the plan."""
        plan, concept = setting.plan, injection.concept
        network = self._resolve(injection, setting)
        if hasattr(concept, "check"):
            concept.check(network)
        block, direction = concept.block, concept.direction.to(self._device)
        weight = per_sample(injection.weight, setting.shape[0])
        before = [part for part in self._parts if part.injection.concept.block == block]
        if before and before[0].injection.skip != injection.skip:
            raise ValueError(f"concepts of block {block!r} were given with skip=True and with skip=False: one of them is taken")
        if before and self._edits[block].directions.shape[1:] != direction.shape:
            shapes = " and ".join(str(tuple(v.shape)) for v in (self._edits[block].directions[0], direction))
            raise ValueError(f"concepts of block {block!r} have directions of shape {shapes}: one shape is taken")
        directions = [self._edits[block].directions] if before else []
        edit = Edit(network, block, torch.cat([*directions, direction[None].to(torch.float32)]), skip=injection.skip)
        rows_in(plan, injection.window, injection.steps)
        part = _Part(injection, weight, len(before))
        if part.scale == 0 or part.one_weight and not weight.any():  # no bit changes
            return {"plan": plan, "brings_second": False}
        self._network = network
        self._edits[block] = edit
        self._parts.append(part)
        return self._replan(plan)

    def _resolve(self, injection, setting) -> torch.nn.Module:
        """The network that was given, or the model, or the one module in it that has the block, as in a wrapper."""
        network, block = injection.network, injection.concept.block
        if network is None:
            network = setting.model
            if not isinstance(network, torch.nn.Module):
                kind = type(network).__name__
                raise TypeError(f"the model is a {kind}, so the network of block {block!r} is not known: give it, as "
                                "concept.at(..., network=...)")
            names = dict(network.named_modules())
            inner = [name.removesuffix("." + block) for name in names if name.endswith("." + str(block))]
            if block not in names and len(inner) > 1:
                places = " and in ".join(map(repr, inner))
                raise ValueError(f"block {block!r} is in {places} of the model: give the network that is meant, as "
                                 "concept.at(..., network=...)")
            if block not in names and inner:
                network = names[inner[0]]
        if isinstance(setting.model, torch.nn.Module) and find_block(network, block) in inside_compiled(setting.model):
            raise ValueError(compiled(block))
        if self._network not in (None, network):
            raise ValueError("concepts for two networks were given: the concepts of one run are for one network")
        return network

    def _replan(self, plan: Plan) -> dict:
        """The plan whose rows combine eps0 and eps1 where one scale acts."""
        scales = np.array([self._scale_in_row(parts) for parts in self._acting(plan)])
        if "uncond" in plan.inputs:
            return {"plan": _with_scales(plan, scales) if self._in_row else plan, "brings_second": False}
        if (scales == 1).all():
            return {"plan": plan, "brings_second": False}
        self._in_row = True
        return {"plan": plan.with_guidance(scales), "brings_second": True}

    def _acting(self, plan: Plan) -> list[list[_Part]]:
        """The parts that act in each row."""
        inside = [rows_in(plan, part.injection.window, part.injection.steps) for part in self._parts]
        return [[part for part, rows in zip(self._parts, inside) if rows[r]] for r in range(len(plan))]

    @staticmethod
    def _scale_in_row(parts) -> float:
        """s where the row itself combines; 1 where it takes what was combined, or where nothing is."""
        amplified = [part for part in parts if part.scale != 1]
        scales = {part.scale for part in amplified}
        return scales.pop() if len(scales) == 1 and all(part.one_weight for part in amplified) else 1.0

    # ---- in the run

    def select(self, index: torch.Tensor) -> None:
        for part in self._parts:
            part.select(index)
        self._on_device: dict = {}

    def outputs(self, run: Stepper, evaluate: Callable[[], tuple]) -> tuple:
        """The model's outputs with the concepts that act in this row; ``second`` is the row's second one."""
        if self._rows[0] is not run.plan:
            self._rows = run.plan, self._acting(run.plan)
        here = self._rows[1][run.row]
        acting = [part for part in here if part.acts]
        always = [part for part in acting if part.scale == 1]
        groups: dict[float, list[_Part]] = {}
        for part in acting:
            if part.scale != 1:
                groups.setdefault(part.scale, []).append(part)
        first, amplified = self._evaluate(always, groups, evaluate)
        if len(first) <= max(self._combined, default=-1):
            raise ValueError(f"the model returned {len(first)} output{'s' * (len(first) != 1)}: {len(self._combined)} are taken")
        for i in self._combined if amplified else ():
            memory = [outputs[i].data_ptr() for outputs in (first, *(outputs for _, outputs in amplified))]
            if len(set(memory)) < len(memory) and memory[0] not in (0, run.x.data_ptr()):  # run.x stands for what is not read
                raise RuntimeError("the model returned the same memory for two calls: it has to return a new tensor each time")
        if self._in_row and self._scale_in_row(here) != 1:
            (_, outputs), = amplified
            self.second = first[0]
            return (outputs[0], *first[1:])
        combined = list(first)
        for i in self._combined:
            combined[i] = self._sum(first[i], [(scale, groups[scale], outputs[i]) for scale, outputs in amplified])
        self.second = combined[0]
        return tuple(combined)

    def _evaluate(self, always, groups, evaluate):
        """(eps0, [(s_g, eps_g), ...]), each a tuple of outputs."""
        branches = [self._branch(parts) for parts in groups.values()]
        with ExitStack() as stack:
            for branch in branches:
                stack.enter_context(branch.first())
            self._edit(stack, always)
            first = evaluate()
        amplified = []
        for branch, (scale, parts) in zip(branches, groups.items()):
            with ExitStack() as stack:
                stack.enter_context(branch.second())
                self._edit(stack, always + parts, kept=always)
                outputs = evaluate()
            branch.forget()
            amplified.append((scale, outputs))
        return first, amplified

    def _branch(self, parts) -> Branch:
        blocks = tuple(dict.fromkeys(part.injection.concept.block for part in parts))
        if blocks not in self.branches:
            self.branches[blocks] = Branch(self._network, blocks)
        return self.branches[blocks]

    def _edit(self, stack: ExitStack, parts, kept=()) -> None:
        """kept: parts that the first evaluation had too. Where their block is part of what is shared, it is not called again."""
        again = {part.injection.concept.block for part in parts if part not in kept}
        for block in dict.fromkeys(part.injection.concept.block for part in parts):
            stack.enter_context(self._edits[block].at(self._column_weights(block, parts), required=block in again))

    def _column_weights(self, block, parts) -> torch.Tensor:
        """(size, M) float32: the weights of a block's directions, 0 for those that do not act."""

        def made():
            weight = torch.zeros(self._size, len(self._edits[block].directions), device="cpu")
            for part in parts:
                if part.injection.concept.block == block:
                    weight[:, part.column] = part.weight
            return weight

        return self._kept(("weights", block), parts, made)

    def _weighted(self, parts) -> torch.Tensor | None:
        """(size,) bool: the samples with a weight; None where all have one."""
        weighted = torch.stack([part.weight != 0 for part in parts]).any(0)
        return None if weighted.all() else self._kept(("weighted",), parts, lambda: weighted)

    def _kept(self, what, parts, make) -> torch.Tensor:
        """Made once for a batch and the parts that act: no copy to the device in every row."""
        key = *what, *map(id, parts)
        if key not in self._on_device:
            self._on_device[key] = make().to(self._device)
        return self._on_device[key]

    def _sum(self, first, terms) -> torch.Tensor:
        """eps0 + sum_g s_g (eps_g - eps0); a sample without a weight in a group keeps its bits."""
        if not terms:
            return first
        base = total = first.to(torch.float32)
        for scale, parts, output in terms:
            moved = total + scale * (output.to(torch.float32) - base)
            weighted = self._weighted(parts)
            total = moved if weighted is None else torch.where(weighted.view(-1, *(1,) * (moved.ndim - 1)), moved, total)
        return total

    def close(self) -> None:
        self.branches.clear()
        self._on_device = {}
        self.second = None


def _with_scales(plan: Plan, scales) -> Plan:
    """A guided plan with other scales."""

    def split(terms, w):
        whole = terms.get("out", 0.0) + terms.get("uncond", 0.0)
        return {**terms, "out": whole * w, "uncond": whole * (1 - w)} if whole else terms

    rows = [replace(row, d=split(row.d, w), y=tuple(split(t, w) for t in row.y)) for row, w in zip(plan.rows, scales.tolist())]
    return Plan.from_rows(rows, inputs=plan.inputs, outputs=plan.outputs, ring=plan.ring, bank=plan.bank, noises=plan.noises,
                          name=plan.name, info=plan.info)
