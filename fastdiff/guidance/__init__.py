"""Guidance by gradients: what steering without gradients is timed against, each method in its cheapest correct form.

    guide = fd.guidance.tfg(fd.guidance.labels(network, classes=10), target=3, rho=1.0, mu=0.25)
    images = fd.sample(model, plan, shape, seeds, steering=[guide])
    guide.counts

classifier        a classifier of noisy images: no gradient through the network
classifier_free   a conditional network against an unconditional one
arithmetic        corrections of a conditional and an unconditional output: cfg_rescale, cfg_zero_star, apg, perp_neg
cfg_pp            CFG++: back to the next level along the unconditional noise
spectral          an encoder of noisy images that was trained without labels, and a linear fit
threshold         dynamic thresholding of the estimate
training_free     a classifier of clean images; dps, lgd, freedom, mpgd, ugd, tfg are settings of it
time_travel       the plan that takes each step several times
"""

from .arithmetic import Arithmetic, apg, cfg_rescale, cfg_zero_star, perp_neg
from .cfg_pp import CfgPp, cfg_pp
from .classifier import ClassifierGuidance, classifier
from .classifier_free import ClassifierFree, classifier_free
from .gradient import Labels, labels
from .presets import dps, freedom, lgd, mpgd, tfg, ugd
from .spectral import Expected, Spectral, SpectralGuidance, expected, spectral, spectral_loss
from .threshold import DynamicThreshold, dynamic_threshold
from .training_free import TrainingFree, training_free
from .travel import time_travel

__all__ = ["Arithmetic", "CfgPp", "ClassifierFree", "ClassifierGuidance", "DynamicThreshold", "Expected", "Labels", "Spectral",
           "SpectralGuidance", "TrainingFree", "apg", "cfg_pp", "cfg_rescale", "cfg_zero_star", "classifier", "classifier_free",
           "dps", "dynamic_threshold", "expected", "freedom", "labels", "lgd", "mpgd", "perp_neg", "spectral", "spectral_loss",
           "tfg", "time_travel", "training_free", "ugd"]
