"""CFG++: the guided estimate, and the way back to the next level along the unconditional noise."""

import math
from dataclasses import dataclass, replace

from ..action import Acting, Setting
from ..plan import Plan, Row
from ..samplers.stage import Noise
from ..steering.amplify import Injecting
from ..steering.window import fresh_name, rows_in
from .threshold import Thresholding
from .travel import base_units

__all__ = ["CfgPp", "Renoising", "cfg_pp"]

DEFINED = "euler, flow_euler, euler_ancestral, ddim, ddpm, tcd and dpmpp_2m (midpoint)"


def cfg_pp(window: tuple[float, float] | None = None) -> "CfgPp":
    """CFG++ (Chung et al. 2024, arXiv:2406.08070, algorithm 2), for a plan with guidance (see `cfg_rescale`).

        D = U + w (C - U),    x' = D + (sigma' / sigma) (x - U)            in x0 + sigma n; for VP:
        x_{t-1} = sqrt(abar_{t-1}) D + sqrt(1 - abar_{t-1}) eps_u

    with C and U the estimates of x0 from the conditional and the unconditional output, where classifier-free guidance takes
    D in both places. w: the guidance scale of the plan, 0 to 1 in the paper, where 0.6 does what 7.5 does without. Taken by
    samplers whose step is x' = D + k (x - D) + noise (euler, flow_euler, euler_ancestral, ddim, ddpm, tcd; k is sigma' / sigma,
    with noise sigma_down / sigma), and by dpmpp_2m as its authors' code and ComfyUI have it, with U_last the unconditional
    estimate of the call before:

        x' = D + (sigma' / sigma) (x - U) + (1 - sigma' / sigma) h / (2 h_last) (D - U_last),    h = ln(sigma / sigma')

    window: (low, high), noise levels sigma; None: all. D may be clipped or steered, U is neither. It costs no launch and no
    input, since the row reads both outputs anyway; for dpmpp_2m U is kept from step to step.

    After `classifier_free` in steering, before guidance by gradients and concepts; not together with `cfg_rescale`,
    `cfg_zero_star`, `apg` and `perp_neg`. Raises ``ValueError``/``TypeError`` before the model is called for what does not
    fit, and for a sampler of which no such form is published.

    >>> import fastdiff as fd
    >>> plan = fd.plan("ddim", schedule="scaled_linear", steps=10).with_guidance(0.6)
    >>> model = lambda x, t: (0.9 * x, 0.8 * x)
    >>> fd.sample(model, plan, (2, 1, 8, 8), seeds=0, steering=[cfg_pp()]).shape
    torch.Size([2, 1, 8, 8])
    """
    return CfgPp(window)


@dataclass(frozen=True, eq=False)
class CfgPp:
    """What `cfg_pp` returns: an action."""

    window: tuple[float, float] | None = None

    def begin(self, setting: Setting) -> Acting:
        return Renoising(setting, self.window)


class Renoising(Acting):
    """CFG++ at work: other weights in the rows, and nothing at a call."""

    def __init__(self, setting: Setting, window):
        plan = setting.plan
        _check_place(setting)
        inside = rows_in(plan, window)
        before, units, last, acts = plan.rows, base_units(plan), fresh_name("last", plan), 0
        rows = list(before)
        for r, row in enumerate(before):
            if not inside[r] or not row.d.get("out"):  # a scale of 0: D is U
                continue
            made, moves = _renoised(plan, before[:r], row, units[r], last)
            if moves and setting.acting and not row.d.get("uncond"):
                raise ValueError(f"the guidance scale is 1 at sigma {row.sigma:.4g}, where an action before this does not call "
                                 "the unconditional network, along whose noise CFG++ goes: a scale other than 1 is taken, a "
                                 "window without it, or plan.with_guidance(1.0), whose model returns both")
            rows[r], acts = made, acts + moves
        if not acts:
            raise ValueError(f"no row of the plan ({plan.name!r}) in the window takes guidance and goes back along noise: scales "
                             "of 0, and samplers that draw all noise anew (lcm, the last step), leave CFG++ nothing to do")
        self.plan = _with_last(plan, rows, last)


def _check_place(setting: Setting) -> None:
    plan = setting.plan
    if "uncond" not in plan.inputs:
        raise ValueError(f"the plan ({plan.name!r}) has no guidance: one from plan.with_guidance(w), whose model returns "
                         "(conditional, unconditional), is taken, or classifier_free with one scale for all samples before "
                         "this in steering")
    if any(isinstance(acting, Renoising) for acting in setting.acting):
        raise ValueError("cfg_pp was given twice: it is taken once")
    if any(isinstance(acting, Thresholding) for acting in setting.acting):
        raise ValueError("dynamic_threshold stands before cfg_pp in steering, which reads the model's outputs: put it after")
    if any(acting.scales for acting in setting.acting):
        raise ValueError("an action before cfg_pp multiplies the outputs by factors, which would act on the unconditional noise "
                         "too: cfg_rescale, cfg_zero_star, apg and perp_neg are not taken together with it")
    if any(isinstance(acting, Injecting) for acting in setting.acting):
        raise ValueError("a concept stands before cfg_pp in steering: put it after, where it acts on all outputs")
    if any(name.startswith("guide") for name in plan.inputs):
        raise ValueError("guidance by gradients stands before cfg_pp in steering, which changes how far an estimate moves the "
                         "base: put it after")


# ---- rows


def _renoised(plan: Plan, before: list[Row], row: Row, unit: float, last: str) -> tuple[Row, int]:
    """The row along the unconditional noise, and 1 where that is another row. unit: alpha of the base that it reads.

    Every output is s (k x + (1 - k - c) d + c d_last) + noise, x the base in x0 + sigma n and d_last of the call before, or
    has in place of k d the estimate as it was before it was clipped. It becomes s (d + k (x - U) + c (U_last - d)) + noise.
    """
    level = before[-1].sigma_next if before else row.sigma
    if not math.isclose(level, row.sigma, rel_tol=1e-9):
        _refuse(plan, row, "has several calls in one step")
    if row.offset:
        _refuse(plan, row, "mixes slopes of earlier calls")
    whole = row.d.get("out", 0.0) + row.d.get("uncond", 0.0)
    own = {s: c for s, c in row.d.items() if s in ("x", "in", "carry")}
    history = {s for terms in (row.d, *row.y) for s in terms if isinstance(s, str) and s.startswith("ring")}
    if history and not _of_2m(plan, before, row, history):
        _refuse(plan, row, "mixes earlier estimates")
    shares, made = [], []
    for terms in row.y:
        if not any(terms.get(s) for s in ("x", "d", "out", "uncond")):
            made.append(terms)
            continue
        raw = terms.get("out", 0.0) + terms.get("uncond", 0.0)  # past the bounds of d: raw / whole of the estimate
        k = (terms.get("x", 0.0) - raw / whole * own.get("x", 0.0)) * unit
        c = sum(terms.get(s, 0.0) for s in history)
        scale = k + terms.get("d", 0.0) + raw / whole + c
        odd = any(terms.get(s) for s in ("in", "carry")) or abs(raw / whole) > 1e-9 * abs(scale) and not _near(-raw / whole, k)
        if odd or not scale:
            _refuse(plan, row, "has several calls in one step")
        shares.append(k / scale)
        kept = {s: v for s, v in terms.items() if s not in (*history, "x", "d", "out", "uncond")}
        along = {"x": k / unit, "uncond": -k * whole}
        for s, v in own.items():
            along[s] = along.get(s, 0.0) - k * v
        least = 1e-12 * abs(k / unit)  # what is left of terms that cancelled
        made.append({**kept, "d": scale - c, **{s: v for s, v in along.items() if abs(v) > least}, **({last: c} if c else {})})
    if any(not _near(share, shares[0]) for share in shares) or _near(shares[0], 1.0):
        _refuse(plan, row, "has several calls in one step")
    if not shares[0] and not history:
        return row, 0
    return replace(row, y=tuple(made)), 1


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


def _of_2m(plan: Plan, before: list[Row], row: Row, history: set) -> bool:
    """Whether the row is one of DPM-Solver++(2M), which reads the estimate of the call before, and draws nothing."""
    calls = [earlier for earlier in before if earlier.calls_model]
    reads_last = bool(calls) and history == {f"ring{calls[-1].keep}"}
    draws = any(isinstance(s, Noise) for terms in row.y for s in terms)
    midpoint = plan.info.get("solver_type", "midpoint") == "midpoint"
    return plan.name == "dpmpp_2m" and reads_last and midpoint and not draws


def _refuse(plan: Plan, row: Row, why: str) -> None:
    raise ValueError(f"the plan ({plan.name!r}) {why}, at sigma {row.sigma:.4g}, and for such a sampler no CFG++ is published: "
                     f"{DEFINED} are taken")


def _with_last(plan: Plan, rows: list[Row], last: str) -> Plan:
    """The plan of the rows; where one reads `last`, the unconditional estimate of the call before, every call leaves it."""
    if not any(last in terms for row in rows for terms in row.y):
        return Plan.from_rows(rows, inputs=plan.inputs, outputs=plan.outputs, ring=plan.ring, bank=plan.bank, name=plan.name,
                              info=plan.info)
    for r, row in enumerate(rows):
        estimate = {s: c for s, c in row.d.items() if s in ("x", "in", "carry")}
        if row.calls_model:
            estimate["uncond"] = row.d.get("out", 0.0) + row.d.get("uncond", 0.0)
        rows[r] = replace(row, y=(*row.y, estimate))
    reads = any(isinstance(s, str) and s.startswith("ring") for row in rows for terms in (row.d, *row.y) for s in terms)
    previews = all(row.keep >= 0 for row in rows if row.calls_model)  # `Plan.with_denoised`
    ring = plan.ring if reads or previews else 0
    rows = rows if ring else [replace(row, keep=-1) for row in rows]
    return Plan.from_rows(rows, inputs=(*plan.inputs, last), outputs=(*plan.outputs, last), ring=ring, bank=plan.bank,
                          name=plan.name, info=plan.info)
