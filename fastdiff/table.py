"""Plan: a sampler as a table, computed once in float64 on the host.

One row is what `fastdiff.reference.step` defines: d, up to three linear outputs y_i, a ring slot that keeps d. A Plan
is immutable; what depends on a run (tensors, keys, the row index) lives in its State.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np

from .reference import Layout
from .samplers.table import CLIP, Row, addresses, columns_of_noise, pack, show, unpack, validate

__all__ = ["Plan"]

FORMAT = 2
_COLUMNS = {
    "coef": np.float64,
    "meta": np.int32,
    "streams": np.int64,
    "draws": np.int64,
    "sigmas": np.float64,
    "sigmas_next": np.float64,
    "times": np.float64,
    "input_scales": np.float64,
    "base_scales": np.float64,
    "calls_model": np.bool_,
    "steps": np.int64,
    "offsets": np.float64,
}
_EXACT = ("sigmas", "sigmas_next", "times", "input_scales", "base_scales", "offsets")


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """A sampler's table of N rows. Row r is applied after the r-th round: where `calls_model[r]`, the model is called
    first, with the buffer `model_input` and the time `times[r]`.

    inputs: names of the input slots: "x" the base, "out" the model's output, "uncond" its second output under guidance,
    further names the tensors that steering hands over with them (`with_input`), "in" the model input read back (float32
    models), "carry" the evaluation point kept in float32; ring: how many ring slots follow them. outputs: names of the y_i:
    "x" the next base (float32), "in" the next model input in the model's dtype (where there is none, the base is the model
    input), "carry" (float32). A name that is in both is one buffer, updated in place. bank: steering columns.

    coef (N, width) float64 and meta (N, 4) int32 are laid out as `reference.Layout`; streams, draws (N, J) int64 are
    the addresses of the noise terms; sigmas (N,) are the levels sigma_t/alpha_t of the points that the rows read,
    sigmas_next (N,) of the bases that they write, which are base_scales (N,) times x0 + sigma n; the model is called with
    input_scales (N,) times x0 + sigma n; steps (N,) is the sampler's step that a row is part of, -1 before the
    first. A row's d is the denoised estimate less offsets (N,) times the base that it reads: 0 but where the row keeps a
    slope, which is what a multistep method of slopes mixes. info says how the plan was made, for people.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ring: int
    bank: int
    coef: np.ndarray
    meta: np.ndarray
    streams: np.ndarray
    draws: np.ndarray
    sigmas: np.ndarray
    sigmas_next: np.ndarray
    times: np.ndarray
    input_scales: np.ndarray
    base_scales: np.ndarray
    calls_model: np.ndarray
    steps: np.ndarray
    offsets: np.ndarray
    info: Mapping = field(default_factory=dict)

    def __post_init__(self):
        for name, kind in _COLUMNS.items():
            values = np.array(getattr(self, name), dtype=kind)
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        object.__setattr__(self, "inputs", tuple(self.inputs))
        object.__setattr__(self, "outputs", tuple(self.outputs))
        validate(self)

    # ---- what a run needs

    def __len__(self) -> int:
        return len(self.coef)

    @property
    def slots(self) -> tuple[str, ...]:
        """Input slots, then ring slots: the order of the table's columns."""
        return self.inputs + tuple(f"ring{i}" for i in range(self.ring))

    @property
    def noises(self) -> int:
        """J, the noise columns of a row."""
        return self.streams.shape[1]

    @property
    def layout(self) -> Layout:
        return Layout(len(self.slots), len(self.outputs), self.bank, self.noises)

    @property
    def model_input(self) -> str:
        """The buffer that the model is called with: "in", or the base "x" itself."""
        return "in" if "in" in self.outputs else "x"

    @property
    def reads_start(self) -> bool:
        """Whether the caller fills the base "x" before row 0 (start="image" or "latent")."""
        columns = [self.layout.y(i) + k for i in range(len(self.outputs)) for k, name in enumerate(self.inputs) if name == "x"]
        return bool(self.calls_model[0]) or bool(self.coef[0, columns].any())

    @property
    def uses_mask(self) -> bool:
        """Whether the caller gives `known` and `mask` (inpainting)."""
        return bool((self.meta[:, 1] & ~CLIP).any())

    @property
    def d_weight(self) -> np.ndarray:
        """(N,) float64: the weight of d in the base that a row writes, both as x0 + sigma n. To move that base by u is to
        move d by u / d_weight."""
        return self.coef[:, self.layout.y(0) + len(self.slots)] / self.base_scales

    @property
    def evaluations(self) -> int:
        """Model calls of one run."""
        return int(self.calls_model.sum())

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """coef (N, width) float32 and meta (N, 4) int32, as `step_` takes them."""
        return self.coef.astype(np.float32), self.meta.copy()

    def window(self, low: float, high: float) -> np.ndarray:
        """(N,) bool: the rows whose model call has low <= sigma <= high."""
        if not low <= high:
            raise ValueError(f"window from {low} to {high}; it takes low <= high")
        return self.calls_model & (self.sigmas >= low) & (self.sigmas <= high)

    # ---- rows

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Row],
        *,
        inputs=("x", "out"),
        outputs=("x",),
        ring=0,
        bank=0,
        noises=None,
        name="custom",
        info=None,
    ) -> "Plan":
        """A plan from readable rows. noises: columns for noise, if more than the busiest row needs."""
        rows, slots = list(rows), tuple(inputs) + tuple(f"ring{i}" for i in range(ring))
        if not rows:
            raise ValueError("a plan takes at least one row, given 0")
        busiest = max(len(addresses(row)) for row in rows)
        J = busiest if noises is None else noises
        if J < busiest:
            raise ValueError(f"noises={noises}; the busiest row draws {busiest}")
        layout = Layout(len(slots), len(outputs), bank, J)
        coef, meta = np.zeros((len(rows), layout.width)), np.zeros((len(rows), 4), np.int32)
        where = np.array([columns_of_noise(row, J) for row in rows], dtype=np.int64).reshape(len(rows), 2, J)
        for r, row in enumerate(rows):
            pack(row, f"row {r}", layout, slots, bank, coef[r], meta[r])
        names = ("sigma", "sigma_next", "time", "input_scale", "base_scale", "calls_model", "step", "offset")
        per_row = [[getattr(row, name) for row in rows] for name in names]
        return cls(name, inputs, outputs, ring, bank, coef, meta, where[:, 0], where[:, 1], *per_row, dict(info or {}))

    @property
    def rows(self) -> list[Row]:
        """The table, readable: `Plan.from_rows` of these rows gives this plan again."""
        per_row = zip(self.sigmas, self.sigmas_next, self.times, self.input_scales, self.base_scales, self.calls_model, self.steps,
                      self.offsets)
        return [
            Row(
                **unpack(*table, self.layout, self.slots, self.bank),
                sigma=float(s),
                sigma_next=float(s_next),
                time=float(t),
                input_scale=float(c_in),
                base_scale=float(a),
                calls_model=bool(c),
                step=int(i),
                offset=float(o),
            )
            for *table, (s, s_next, t, c_in, a, c, i, o) in zip(self.coef, self.meta, self.streams, self.draws, per_row)
        ]

    def _with_rows(self, rows, **changes) -> "Plan":
        same = {name: getattr(self, name) for name in ("inputs", "outputs", "ring", "bank", "name", "info")}
        return Plan.from_rows(rows, **{**same, **changes})

    def _once(self, key, make) -> "Plan":
        """A variation, made once for each key, of the last few keys: plans do not change, and every run asks again."""
        made = self.__dict__.setdefault("_variations", {})
        plan = made.get(key)
        if plan is None:
            plan = make()
            for old in list(made)[:-7]:  # room for one more of 8; another thread may have been here
                made.pop(old, None)
            made[key] = plan
        return plan

    # ---- variations

    def with_model_dtype(self, dtype) -> "Plan":
        """The plan for a model that takes this dtype ("float32", "float16", "bfloat16", or torch's).

        The base stays float32. A 16-bit model gets its input as an output of its own; where a row reads the evaluation
        point back, that is carried beside it in float32, so that d is not computed from rounded values.
        """
        dtype = str(dtype).removeprefix("torch.")
        if dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"model dtype {dtype!r}; it takes float32, float16 or bfloat16")
        if dtype == "float32" or ("in" in self.outputs and "in" not in self.inputs):
            return self
        twin, original = ("carry", self.outputs.index("in")) if "in" in self.outputs else ("in", 0)

        def rename(terms):
            return {"carry" if name == "in" else name: c for name, c in terms.items()}

        def widen(row):
            mask = {"input:carry" if target == "input:in" else target: mix for target, mix in row.mask.items()}
            if f"y{original}" in mask:
                mask[f"y{len(row.y)}"] = mask[f"y{original}"]
            return replace(row, d=rename(row.d), y=(*map(rename, row.y), rename(row.y[original])), mask=mask)

        inputs = tuple("carry" if name == "in" else name for name in self.inputs)
        return self._with_rows(map(widen, self.rows), inputs=inputs, outputs=(*self.outputs, twin))

    def with_guidance(self, scale) -> "Plan":
        """Classifier-free guidance inside the row: d = d_uncond + w (d_cond - d_uncond), from "out" and "uncond".

        scale: w, or (N,) for each row, or a function of sigma such as `lambda s: 4.0 if 0.3 < s < 5 else 1.0`.
        """
        if "uncond" in self.inputs:
            raise ValueError(f"the plan has guidance already: its inputs are {', '.join(self.inputs)}")

        def split(terms, w):
            return {**terms, "out": terms["out"] * w, "uncond": terms["out"] * (1 - w)} if "out" in terms else terms

        scales = self._each_row(scale, "the guidance scale", ())

        def made():
            rows = [replace(row, d=split(row.d, w), y=tuple(split(terms, w) for terms in row.y)) for row, w in zip(self.rows, scales)]
            return self._with_rows(rows, inputs=(*self.inputs, "uncond"))

        return self._once(("with_guidance", scales.tobytes()), made)

    def with_input(self, name: str, d) -> "Plan":
        """One more tensor for every call of the model, handed to ``Stepper.step`` after the others: d += weight * tensor.

        name: of the slot; d: (N,) its weight by row, or a function of sigma. Where it is 0 the tensor is not read.
        """
        taken = (*self.slots, *self.outputs, "d")
        if name in taken or name.startswith(("ring", "bank")) or not name.isidentifier():
            raise ValueError(f"an input named {name!r}; it takes an identifier other than ring..., bank... and {', '.join(taken)}")
        weights = self._each_row(d, f"the weight of {name}", ()) * self.calls_model

        def made():
            rows = [replace(row, d={**row.d, name: float(w)} if w else row.d) for row, w in zip(self.rows, weights)]
            return self._with_rows(rows, inputs=(*self.inputs, name))

        return self._once(("with_input", name, weights.tobytes()), made)

    def with_bank(self, g=None, h=None) -> "Plan":
        """Steering columns: V_m enters d with weight g[row, m] and output i with weight h[row, i, m].

        g: (N, M), or (M,) for every row that calls the model, or a function of sigma that returns (M,);
        h: (N, outputs, M). A window in sigma is a factor: `g * plan.window(0.3, 5.0)[:, None]`.
        """
        if g is None and h is None:
            raise ValueError("with_bank takes g, h or both, given neither")
        h = None if h is None else np.asarray(h, np.float64)
        for name, value in (("g", g(1.0) if callable(g) else g), ("h", h)):
            if value is not None and np.ndim(value) == 0:
                raise ValueError(f"{name} is {value!r}; it takes an array whose last dimension is the number of vectors")
        M = h.shape[-1] if g is None else np.shape(g(1.0) if callable(g) else g)[-1]
        g = np.zeros((len(self), M)) if g is None else self._each_row(g, "g", (M,)) * self.calls_model[:, None]
        h = np.zeros((len(self), len(self.outputs), M)) if h is None else h
        if h.shape != (len(self), len(self.outputs), M):
            raise ValueError(
                f"h has shape {h.shape}; it takes (rows, outputs, M) = {(len(self), len(self.outputs), M)}"
            )

        def named(weights):
            return {f"bank{self.bank + m}": c for m, c in enumerate(weights)}

        rows = [
            replace(row, d={**row.d, **named(g[r])}, y=tuple({**t, **named(h[r, i])} for i, t in enumerate(row.y)))
            for r, row in enumerate(self.rows)
        ]
        return self._with_rows(rows, bank=self.bank + M)

    def with_denoised(self) -> "Plan":
        """The plan in which every row that calls the model leaves its denoised estimate, for previews: in ring slot
        meta[row, 0], or where rows keep slopes there, in an output named "denoised"."""
        if self.offsets.any():
            return self if "denoised" in self.outputs else self._with_estimate_written()
        rows = [replace(row, keep=self.ring) if row.calls_model and row.keep < 0 else row for row in self.rows]
        return self._with_rows(rows, ring=self.ring + 1) if any(row.keep == self.ring for row in rows) else self

    def _with_estimate_written(self) -> "Plan":
        rows, there, read = [], False, False
        for row in self.rows:
            here = {s: c for s, c in (("d", 1.0), ("x", row.offset)) if c} if row.calls_model else {"denoised": 1.0} if there else {}
            there, read = there or row.calls_model, read or "denoised" in here
            rows.append(replace(row, y=(*row.y, here)))
        return self._with_rows(rows, inputs=self.inputs + ("denoised",) * read, outputs=(*self.outputs, "denoised"))

    def _each_row(self, values, what, shape):
        values = np.asarray([values(float(s)) for s in self.sigmas] if callable(values) else values, dtype=np.float64)
        if values.shape not in (shape, (len(self), *shape)):
            raise ValueError(f"{what} has shape {values.shape}; it takes {shape} or {(len(self), *shape)}")
        return np.broadcast_to(values, (len(self), *shape))

    # ---- keeping them

    def to_json(self) -> str:
        """The plan as text. Coefficients are kept as the float32 of the table in hexadecimal: exact and stable."""
        coef, _ = self.table()
        text = {f.name: getattr(self, f.name) for f in fields(self)}
        text |= {name: text[name].tolist() for name in _COLUMNS}
        text |= {name: [value.hex() for value in text[name]] for name in _EXACT}
        if not self.offsets.any():
            del text["offsets"]
        text |= {"format": FORMAT, "coef": [row.astype(">f4").tobytes().hex() for row in coef], "info": dict(self.info)}
        return json.dumps(text, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote: the same table, bit by bit."""
        data = json.loads(text)
        given = data.pop("format", None) if isinstance(data, dict) else type(data).__name__
        if given != FORMAT:
            raise ValueError(f"this is not a plan of format {FORMAT}: its format is {given!r}")
        names = {f.name for f in fields(cls)}
        data.setdefault("offsets", [0.0.hex()] * len(data.get("coef", ())))
        if set(data) != names:
            wrong = ", ".join(sorted(set(data) ^ names))
            raise ValueError(f"this plan's fields are not those of format {FORMAT}: missing or not known: {wrong}")
        data |= {name: [float.fromhex(value) for value in data[name]] for name in _EXACT}
        data["coef"] = [np.frombuffer(bytes.fromhex(row), ">f4").astype(np.float64) for row in data["coef"]]
        data |= {
            name: np.array(data[name], np.int64).reshape(len(data["coef"]), -1 if np.size(data[name]) else 0)
            for name in ("streams", "draws")
        }
        return cls(**data)

    def __getstate__(self):
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __setstate__(self, state):
        """After a copy or from a pickle: arrays are read-only again."""
        for name, value in state.items():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)
            object.__setattr__(self, name, value)

    def __eq__(self, other) -> bool:
        """The same table, bit by bit, made in the same way."""
        return self.to_json() == other.to_json() if isinstance(other, Plan) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.name, self.slots, self.coef.astype(np.float32).tobytes()))

    def __repr__(self) -> str:
        return show(self)
