"""Every method, with its strength as an argument, on the mixture."""

import torch
from guidance.mixture import Mixture

import fastdiff as fd
from fastdiff import guidance

MIXTURE = Mixture()
SHAPE = (4, *MIXTURE.shape)
MODEL = MIXTURE.model("denoised")
TARGET = torch.tensor([0, 1, 2, 1])


def edm(name="euler", **options):
    return fd.plan(name, **{"schedule": "edm", "prediction": "denoised", "steps": 5, "sigma_max": 20.0, **options})


def conditional(x, time, y):
    return MIXTURE.conditional_model("denoised")(x, time, y)


# each with its strength as an argument
METHODS = {
    "classifier": lambda s, y=TARGET, **o: guidance.classifier(MIXTURE.log_prob_noisy, y, s, **o),
    "classifier_free": lambda s, y=TARGET, **o: guidance.classifier_free(conditional, y, s, **o),
    "dps": lambda s, y=TARGET, **o: guidance.dps(MIXTURE.doubtful, y, s, **o),
    "lgd": lambda s, y=TARGET, **o: guidance.lgd(MIXTURE.log_prob, y, s, n=2, **o),
    "freedom": lambda s, y=TARGET, **o: guidance.freedom(MIXTURE.log_prob, y, s, **o),
    "mpgd": lambda s, y=TARGET, **o: guidance.mpgd(MIXTURE.log_prob, y, s, **o),
    "ugd": lambda s, y=TARGET, **o: guidance.ugd(MIXTURE.log_prob, y, s, **o),
    "tfg": lambda s, y=TARGET, **o: guidance.tfg(MIXTURE.log_prob, y, rho=s, mu=s, n_mc=2, **o),
}
STRENGTH = dict.fromkeys(METHODS, 0.1) | {"classifier": 2.0, "classifier_free": 2.0, "dps": 5.0}


def log_prob(x0, y):
    return MIXTURE.log_prob(x0, y)


def same(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))
