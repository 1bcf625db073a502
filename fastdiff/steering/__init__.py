"""Steering without gradients: what is added to the denoised estimate, or to an activation, found offline from data alone.

    na = fd.steering.NoiseAlignment.fit({"cat": cats, "dog": dogs}, everything)
    fd.sample(model, plan, (16, 3, 32, 32), seeds=0, steering=[na.at(weight=3, window=(5.3, 80), target="cat")])
"""

from .alignment import NoiseAlignment
from .branch import Branch
from .collect import collect
from .concept import Concept, fit_concepts
from .gaussian import Gaussian
from .inject import Edit, Injection, edited
from .latent import LatentVector

__all__ = ["Branch", "Concept", "Edit", "Gaussian", "Injection", "LatentVector", "NoiseAlignment", "collect", "edited", "fit_concepts"]
