"""The members of the training-free family by name, as their papers and the TFG authors' code have them.

Source of every rule and setting: Ye et al. 2024 and its code (github.com/YWolfeee/Training-Free-Guidance, methods/*.py),
section by section the original papers. Costs are those of one call of the model, in evaluations and gradients.
"""

from collections.abc import Callable

from .training_free import TrainingFree, training_free

__all__ = ["dps", "freedom", "lgd", "mpgd", "tfg", "ugd"]

_PLAIN = {"rho_schedule": "constant", "mu_schedule": "constant", "sigma_bar_schedule": "decrease"}


def dps(log_prob: Callable, target, strength=1.0, window=None) -> TrainingFree:
    """Diffusion posterior sampling (Chung et al. 2023, algorithm 1).

        x_{t-1} += strength grad_{x_t} log p(y | x0_hat(x_t)) / |log p|

    One evaluation of the network and one gradient through it, one of the classifier. Arguments: see `training_free`.
    """
    return training_free(log_prob, target, rho=strength, mu=0.0, n_iter=0, sigma_bar=0.0, rule="state", over_log_prob=True,
                         window=window, **_PLAIN)


def lgd(log_prob: Callable, target, strength=1.0, n: int = 10, window=None) -> TrainingFree:
    """Loss-guided diffusion (Song et al. 2023, equation 12): the expected p around the estimate.

        x_{t-1} += (strength / n) grad_{x_t} logsumexp_i log p(y | x0_hat(x_t) + sqrt(1 - abar_t) delta_i)

    with the division by n of the TFG authors' code. One evaluation of the network and one gradient through it, n of the
    classifier, in one batch. Arguments: see `training_free`; strength may be one a sample.
    """
    if isinstance(n, bool) or not hasattr(n, "__index__") or n < 1:
        raise ValueError(f"n is {n!r}: an int of 1 or more is taken")
    return training_free(log_prob, target, rho=_over(strength, n), mu=0.0, n_iter=0, n_mc=n, sigma_bar=1.0, rule="state",
                         window=window, **_PLAIN)


def freedom(log_prob: Callable, target, strength=1.0, n_recur: int = 1, schedule: str = "increase", window=None) -> TrainingFree:
    """FreeDoM (Yu et al. 2023, algorithm 1), with time travel.

        x_{t-1} += rho_t grad_{x_t} log p(y | x0_hat(x_t)),    rho_t = strength alpha_t / mean alpha

    n_recur times one evaluation of the network, one gradient through it and one of the classifier.
    """
    return training_free(log_prob, target, rho=strength, mu=0.0, n_iter=0, sigma_bar=0.0, n_recur=n_recur, rule="state",
                         window=window, **{**_PLAIN, "rho_schedule": schedule})


def mpgd(log_prob: Callable, target, strength=1.0, window=None) -> TrainingFree:
    """Manifold preserving guided diffusion (He et al. 2024, algorithm 1, without its autoencoder).

        x0_hat += strength grad_{x0_hat} log p(y | x0_hat),    eps as it was

    One evaluation of the network and none of its gradient; one of the classifier.
    """
    return training_free(log_prob, target, rho=0.0, mu=strength, n_iter=1, sigma_bar=0.0, rule="state", window=window, **_PLAIN)


def ugd(log_prob: Callable, target, strength=1.0, backward_steps: int = 3, n_recur: int = 1, window=None) -> TrainingFree:
    """Universal guidance (Bansal et al. 2023, algorithm 1): forward and backward guidance, with time travel.

        eps -= strength sqrt(1 - abar_t) grad_{x_t} log p(y | x0_hat(x_t)) + sqrt(abar_t / (1 - abar_t)) Delta_0

    Delta_0 from m = backward_steps steps x0 += strength grad log p(y | x0); 3 is iter_steps = 4 of the TFG authors' scripts,
    where m = iter_steps - 1. n_recur times one evaluation of the network, one gradient through it and max(1, m) of the
    classifier.
    """
    return training_free(log_prob, target, rho=strength, mu=strength, n_iter=backward_steps, sigma_bar=0.0, n_recur=n_recur,
                         rule="epsilon", window=window, **_PLAIN)


def tfg(log_prob: Callable, target, rho=1.0, mu=0.25, sigma_bar: float = 0.001, n_iter: int = 4, n_mc: int = 1, n_recur: int = 1,
        window=None) -> TrainingFree:
    """TFG (Ye et al. 2024, algorithm 1). The defaults are theirs for CIFAR-10 (scripts/cifar10_label.sh).

        x_{t-1} += rho_t grad_{x_t} log p~(y | x0_hat(x_t)) / sqrt(alpha_t) + sqrt(abar_{t-1}) Delta_0

    rho and mu "increase", sigma_bar "decrease". Their other settings (rho, mu, sigma_bar), all with n_iter 4: ImageNet 2, 0.5,
    0.1; CelebA-HQ combinations 0.5, 8, 1; birds 0.5, 0.5, 0.01. n_recur times one evaluation of the network, one gradient
    through it and n_iter n_mc of the classifier.
    """
    return training_free(log_prob, target, rho=rho, mu=mu, n_iter=n_iter, n_mc=n_mc, sigma_bar=sigma_bar, n_recur=n_recur,
                         rule="tfg", window=window)


def _over(strength, n: int):
    """A strength over n. What is none stays as it is, so that it is refused as everywhere."""
    if isinstance(strength, (list, tuple)):
        return [_over(s, n) for s in strength]
    return strength if isinstance(strength, (bool, str, bytes, type(None))) else strength / n
