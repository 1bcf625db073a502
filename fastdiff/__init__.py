"""Fused, reproducible diffusion samplers, and steering without gradients.

    import fastdiff as fd

    plan = fd.plan("dpmpp_2m_sde", schedule="edm", prediction="denoised", steps=20)
    images = fd.sample(model, plan, (16, 3, 32, 32), seeds=range(16))
"""

from . import guidance, noise, ops, reference, schedules, steering
from .action import Actions
from .differentiable import step
from .noise import STREAMS, fold_in, randn
from .plan import Plan, Row, plan
from .sample import Progress, Stepper, sample
from .samplers import SAMPLERS
from .schedules import SCHEDULES
from .torch_cuda import TorchCudaGenerator

__version__ = "0.1.0"

__all__ = ["SAMPLERS", "SCHEDULES", "STREAMS", "Actions", "Plan", "Progress", "Row", "Stepper", "TorchCudaGenerator", "fold_in",
           "guidance", "noise", "ops", "plan", "randn", "reference", "sample", "schedules", "steering", "step"]
