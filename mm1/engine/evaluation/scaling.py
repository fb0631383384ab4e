"""Fit a scaling law to the final losses of models: L = E + A·N^-α + B·D^-β.

N: parameters, D: samples or targets seen. The law minimises the sum of Huber losses, δ = 1e-3, of log(law) - log(loss),
from a grid of starts (Hoffmann et al. 2022, approach 3, section 3.3):

    log(law) = logsumexp(a - α·(log N - mean), b - β·(log D - mean), e)    A = exp(a + α·mean), E = exp(e)

A law is fitted only to points that can determine it: two more points than constants, and three different values of
each variable (two for A·N^-α). Among these laws the one of the lowest AICc is chosen (Hurvich and Tsai 1989), so that
E is 0 unless the points demand it. The intervals come from a bootstrap of residuals.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from mm1.errors import UserError, require

TINY = 1e-300  # keeps divisors positive
DELTA = 1e-3  # Huber loss: residuals of log(loss) above it count linearly
RESAMPLES = 1000
EXPONENTS = (0.02, 0.1, 0.3, 0.6, 1.2)  # of the starts
SHARES = (
    0.02,
    0.3,
    0.6,
    0.9,
)  # of E in the loss, and of A·N^-α in the rest, at the centre of the points: of the starts
SAME = 0.01  # samples within this share of each other count as equal
EXACT = 1e-7  # residuals of log(loss) below it are rounding, and no reason to prefer a law
Objective = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
CONSTANTS = {"parameters": ("A", "alpha"), "samples": ("B", "beta")}  # scale and exponent of each variable's term
SYMBOLS = {"parameters": "A·N^-α", "samples": "B·D^-β", "alpha": "α", "beta": "β"}
NO_TERM = {
    "unknown": "samples are not known of every point: no term B·D^-β",
    "equal": "samples are equal in all points: no term B·D^-β",
    "follow": "samples are a power of the parameters: their effect is part of A·N^-α",
}
LETTERS = {"parameters": "N", "samples": "D"}


class Points(NamedTuple):
    """Hold trained models, float64 [n] each: sizes and final losses. samples: None if they are unknown."""

    parameters: np.ndarray
    samples: np.ndarray | None
    loss: np.ndarray

    def where(self, mask: np.ndarray) -> "Points":
        """Return the points that a bool [n] selects."""
        samples = None if self.samples is None else self.samples[mask]
        return Points(self.parameters[mask], samples, self.loss[mask])


class Law(NamedTuple):
    """Name the terms of a law: its variables, and whether it has the constant E."""

    variables: tuple[str, ...]
    has_floor: bool

    @property
    def constants(self) -> list[str]:
        """Return the names of the constants, in the order of a fit's columns."""
        return [name for variable in self.variables for name in CONSTANTS[variable]] + ["E"] * self.has_floor

    def __str__(self) -> str:
        return "L = " + " + ".join(["E"] * self.has_floor + [SYMBOLS[variable] for variable in self.variables])


class Fit(NamedTuple):
    """Hold fits of a law to one or more sets of losses. theta: float64 [S, k], centred as in the module's docstring."""

    law: Law
    theta: np.ndarray
    centre: np.ndarray  # float64 [variables], mean logarithm of each variable

    def values(self) -> np.ndarray:
        """Return the constants [S, k] in the order of law.constants, not centred."""
        values, scales = self.theta.copy(), slice(0, 2 * len(self.centre), 2)
        values[:, scales] += values[:, 1 : 2 * len(self.centre) : 2] * self.centre
        values[:, scales] = _exp(values[:, scales])
        values[:, 2 * len(self.centre) :] = _exp(values[:, 2 * len(self.centre) :])
        return values

    def terms(self, **variables: np.ndarray) -> np.ndarray:
        """Return the law's terms [S, terms, n] at `variables` [n] of the law; E is the last."""
        return _exp(_log_terms(self.theta, self._centred(variables)))

    def losses(self, **variables: np.ndarray) -> np.ndarray:
        """Return the law's losses [S, n] at `variables` [n] of the law."""
        return self.terms(**variables).sum(1)

    def _centred(self, variables: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.stack([np.log(variables[name]) for name in self.law.variables]) - self.centre[:, None]


def fit(points: Points) -> Fit:
    """Return the law that describes the points best, with one row of constants. Raises UserError, see `laws`."""
    return _best(laws(points), points)


def laws(points: Points) -> list[Law]:
    """Return the laws that the points can determine.

    Raises UserError for values that are not positive numbers, for fewer than four points, and for points of equal
    parameters or too few different samples. Samples that are equal in all points, or a power of the parameters, have no
    term of their own.
    """
    for name, values in zip(Points._fields, points):
        good = values is None or bool(np.all(np.isfinite(values) & (values > 0)))
        require(good, name, None if values is None else values.tolist(), "positive numbers")
    count = len(points.loss)
    if count < 4:
        raise UserError(f"{count} points, expected at least 4: a law of two constants needs two more points")
    if _distinct(points.parameters) < 2:
        raise UserError(f"parameters is {points.parameters[0]:g} in all {count} points, expected different values")
    if not (candidates := _candidates(points, spare=2)):
        different = " and ".join(f"{_distinct(getattr(points, name))} different {name}" for name in LETTERS)
        raise UserError(f"{count} points of {different}, expected at least 6 of 3 and 3, or samples that are equal")
    return candidates


def role_of_samples(points: Points) -> str:
    """Return whether the samples have a term of their own: "vary", or why not: "unknown", "equal" or "follow"."""
    if points.samples is None:
        return "unknown"
    samples, sizes = np.log(points.samples), np.log(points.parameters)
    if np.ptp(samples) < SAME:
        return "equal"
    line = np.stack([np.ones_like(sizes), sizes], 1)
    rest = samples - line @ np.linalg.lstsq(line, samples)[0]
    return "vary" if np.abs(rest).max() > SAME else "follow"  # as a power of the parameters


def resample(one: Fit, points: Points, resamples: int = RESAMPLES, seed: int = 0) -> Fit:
    """Return fits of the same law to resampled losses, a row of constants each.

    The law's losses are multiplied by its residuals, drawn with replacement. Residuals of k constants fitted to n
    points are too small by sqrt(1 - k/n), and their size itself is uncertain, as if by χ² of n - k degrees of freedom:
    intervals of few points are as wide as Student's.
    """
    draw = np.random.default_rng(seed)
    variables = _variables(one.law, points)
    predicted = np.log(one.losses(**variables))  # [1, n]
    residuals = (np.log(points.loss) - predicted)[0]
    count, free = len(residuals), len(residuals) - one.theta.shape[1]
    residuals = (residuals - residuals.mean()) * np.sqrt(count / free)
    scales = np.sqrt(free / draw.chisquare(free, (resamples, 1)))
    drawn = predicted + scales * residuals[draw.integers(0, count, (resamples, count))]
    objective = _objective(one._centred(variables), drawn)
    theta, _ = minimize(objective, np.repeat(one.theta, resamples, 0))
    return one._replace(theta=theta)


def held_out(points: Points) -> dict[str, float] | None:
    """Return how well a law of all points but those of the most parameters predicts their mean loss.

    Three points are enough for it here. Return None if the smaller models cannot determine a law of the variables.
    """
    largest = points.parameters == points.parameters.max()
    rest, top = points.where(~largest), points.where(largest)
    candidates = _candidates(rest, spare=2) or _candidates(rest, spare=1)
    if not candidates or role_of_samples(rest) != role_of_samples(points):
        return None
    one = _best(candidates, rest)
    predicted, measured = one.losses(**_variables(one.law, top)).mean(), top.loss.mean()
    return {"parameters": float(top.parameters[0]), "predicted": float(predicted), "measured": float(measured),
            "error": float(predicted / measured - 1)}  # fmt: skip


def report(points: Points, predict: Mapping[str, Mapping[str, float]] | None = None) -> tuple[dict[str, Any], Fit, Fit]:
    """Return the fitted law as plain values, as `Fit`, and its resampled fits.

    predict: by a name of its own, the variables to predict the loss at. Raises UserError as `laws` does, and for a
    prediction that lacks a variable of the law.
    """
    one = fit(points)
    for name, at in (predict or {}).items():
        missing = [LETTERS[variable] for variable in one.law.variables if variable not in at]
        require(not missing, "predict", name, f"also {', '.join(missing)}: the law is {one.law}")
    many = resample(one, points)
    constants = dict.fromkeys(("E", "A", "alpha", "B", "beta")) | {
        name: _with_interval(value, values)
        for name, value, values in zip(one.law.constants, one.values()[0], many.values().T)
    }
    residuals = np.log(points.loss) - np.log(one.losses(**_variables(one.law, points))[0])
    result: dict[str, Any] = {
        "law": str(one.law), "points": len(points.loss), "samples": role_of_samples(points), "constants": constants,
        "rms_residual": float(np.sqrt(np.mean(residuals**2))), "held_out": held_out(points), "predictions": {},
    }  # fmt: skip
    if len(one.law.variables) == 2:  # the best N for compute C ~ N·D grows as C^share (Hoffmann et al. 2022, eq. 4)
        alpha, beta = (one.values()[0, i] for i in (1, 3))
        alphas, betas = (many.values()[:, i] for i in (1, 3))
        result["share_of_compute_for_parameters"] = _with_interval(beta / (alpha + beta), betas / (alphas + betas))
    for name, at in (predict or {}).items():
        place = {variable: np.array([at[variable]]) for variable in one.law.variables}
        value, values = one.losses(**place)[0, 0], many.losses(**place)[:, 0]
        result["predictions"][name] = _with_interval(value, values)
    return result, one, many


def show(result: Mapping[str, Any]) -> str:
    """Return a report's table as text."""
    lines = [f"{result['law']}, {result['points']} points, rms residual {result['rms_residual']:.2%}",
             f"  {'constant':<16}  {'value':>10}  95 % interval"]  # fmt: skip
    for name, value in result["constants"].items():
        if value:
            lines.append(_line(SYMBOLS.get(name) or name, value))
    if not result["constants"]["E"]:
        lines.append(f"  {'E':<16}  {0:>10}  the points do not determine it")
    if result["samples"] in NO_TERM:
        lines.append(NO_TERM[result["samples"]])
    if share := result.get("share_of_compute_for_parameters"):
        lines.append("best N for compute C ~ N·D grows as C to the power of")
        lines.append(_line("share of N", share))
    if check := result["held_out"]:
        lines.append(
            f"held out, N = {check['parameters']:.4g}: predicted {check['predicted']:.5g}, "
            f"measured {check['measured']:.5g} ({check['error']:+.2%})"
        )
    else:
        lines.append("held out: without the largest model the points are too few for a law")
    lines += ["predicted loss"] * bool(result["predictions"])
    lines += [_line(name, value) for name, value in result["predictions"].items()]
    return "\n".join(lines)


def minimize(objective: Objective, start: np.ndarray, iterations: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Return minima [S, k] of a function and its values [S], from all starts [S, k] at once, by BFGS.

    objective: takes points [R, k] and their starts' numbers int [R], returns values [R] and gradients [R, k]. The
    inverse Hessian is kept whole, because it is small; the limited memory of L-BFGS exists for many variables. Steps
    satisfy the weak Wolfe conditions (Lewis and Overton 2013, algorithm 2.6), which also hold across the kinks of
    nearly absolute losses. A start ends where a step improves it by less than a share of 1e-12.
    """
    rows, identity = np.arange(len(start)), np.eye(start.shape[1])
    theta, (value, gradient) = start.copy(), objective(start, rows)
    ends, end_values = theta.copy(), value.copy()
    inverse = identity / np.maximum(np.linalg.norm(gradient, axis=1), TINY)[:, None, None]
    for iteration in range(iterations):
        direction = -(inverse @ gradient[:, :, None])[:, :, 0]
        moved = _steps(objective, rows, theta, value, gradient, direction)
        new_value, new_gradient = objective(theta + moved, rows)
        lower = new_value < value * (1 - 1e-12)
        rows, theta, value, moved = rows[lower], (theta + moved)[lower], new_value[lower], moved[lower]
        change, gradient = (new_gradient - gradient)[lower], new_gradient[lower]
        ends[rows], end_values[rows] = theta, value
        if not len(rows):
            break
        inverse = inverse[lower]
        if iteration == 0:  # Nocedal and Wright 2006, eq. 6.20
            inverse = (_dot(moved, change) / np.maximum(_dot(change, change), TINY))[:, None, None] * identity
        curved = _dot(moved, change) > 1e-14 * np.sqrt(_dot(moved, moved) * _dot(change, change))
        moved, change = moved[curved], change[curved]
        curvature = _dot(moved, change)[:, None, None]
        left = identity - moved[:, :, None] * change[:, None] / curvature
        added = moved[:, :, None] * moved[:, None] / curvature
        inverse[curved] = left @ inverse[curved] @ left.transpose(0, 2, 1) + added
    return ends, end_values


def _steps(
    objective: Objective, rows: np.ndarray, theta: np.ndarray, value: np.ndarray, gradient: np.ndarray,
    direction: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Return a step [R, k] along each direction by bisection; it is no improvement where none is found."""
    slope = _dot(gradient, direction)
    step, low, high = np.ones_like(value), np.zeros_like(value), np.full_like(value, np.inf)
    searching = np.arange(len(rows))
    for _ in range(40):
        i, length = searching, step[searching]
        tried, tried_gradient = objective(theta[i] + length[:, None] * direction[i], rows[i])
        falls = tried <= value[i] + 1e-4 * length * slope[i]
        flattens = _dot(tried_gradient, direction[i]) >= 0.9 * slope[i]
        high[i] = np.where(falls, high[i], length)
        low[i] = np.where(falls & ~flattens, length, low[i])
        searching = i[~(falls & flattens)]
        if not len(searching):
            break
        bound = high[searching]
        step[searching] = np.where(np.isinf(bound), 2 * low[searching], (low[searching] + bound) / 2)
    return step[:, None] * direction


def _exp(logs: np.ndarray) -> np.ndarray:
    """Return exp of logarithms, at most 1e304: scales and extrapolations of resampled laws may have no bound."""
    return np.exp(np.minimum(logs, 700))


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the products [S] of rows [S, k]."""
    return np.einsum("si,si->s", a, b)


def _log_terms(theta: np.ndarray, centred: np.ndarray) -> np.ndarray:
    """Return the logarithms [S, terms, n] of a law's terms at centred log variables [variables, n]."""
    count = len(centred)
    terms = theta[:, 0 : 2 * count : 2, None] - theta[:, 1 : 2 * count : 2, None] * centred
    floor = np.broadcast_to(theta[:, 2 * count :, None], (len(theta), theta.shape[1] - 2 * count, centred.shape[1]))
    return np.concatenate([terms, floor], 1)


def _objective(centred: np.ndarray, log_loss: np.ndarray) -> Objective:
    """Return the sum of Huber losses over δ² and its gradient. log_loss: [S, n], a row for each start."""

    def objective(theta: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logs = _log_terms(theta, centred)
        top = logs.max(1, keepdims=True)
        terms = np.exp(logs - top)
        total = terms.sum(1, keepdims=True)
        residual = (np.log(total) + top)[:, 0] - log_loss[rows]
        scaled = np.abs(residual) / DELTA
        value = np.where(scaled <= 1, scaled**2 / 2, scaled - 0.5).sum(1)
        pull = terms / total * (np.clip(residual / DELTA, -1, 1) / DELTA)[:, None]  # [S, terms, n]
        count = len(centred)
        gradient = np.empty_like(theta)
        gradient[:, 0 : 2 * count : 2] = pull[:, :count].sum(2)
        gradient[:, 1 : 2 * count : 2] = -(pull[:, :count] * centred).sum(2)
        gradient[:, 2 * count :] = pull[:, count:].sum(2)
        return value, gradient

    return objective


def _fitted(law: Law, points: Points) -> Fit:
    """Return the best fit of a law over the grid of starts, whose terms share the loss at the centre of the points."""
    variables = _variables(law, points)
    centre = np.array([np.log(values).mean() for values in variables.values()])
    log_loss = np.log(points.loss)
    floors, parts = (SHARES if law.has_floor else (0.0,)), (SHARES if len(centre) == 2 else (1.0,))
    starts = []
    for floor, part, *exponents in product(floors, parts, *[EXPONENTS] * len(centre)):
        shares = [(1 - floor) * part, (1 - floor) * (1 - part)]
        terms = [x for share, exponent in zip(shares, exponents) for x in (np.log(share), exponent)]
        starts.append([*terms, *[np.log(floor or 1)] * law.has_floor])
    one = Fit(law, np.array(starts), centre)
    one.theta[:, [*range(0, 2 * len(centre), 2), *range(2 * len(centre), one.theta.shape[1])]] += log_loss.mean()
    log_losses = np.broadcast_to(log_loss, (len(starts), len(log_loss)))
    theta, value = minimize(_objective(one._centred(variables), log_losses), one.theta)
    return one._replace(theta=theta[[np.argmin(value)]])


def _aicc(one: Fit, points: Points) -> float:
    """Return the corrected Akaike criterion of a fit, with the Huber loss in the place of squares."""
    variables, count, constants = _variables(one.law, points), len(points.loss), one.theta.shape[1]
    value, _ = _objective(one._centred(variables), np.log(points.loss)[None])(one.theta, np.zeros(1, int))
    mean_square = 2 * value[0] * DELTA**2 / count + EXACT**2
    spare = max(count - constants - 1, TINY)  # infinite for one point more than constants, which held_out allows
    return count * np.log(mean_square) + 2 * constants * (1 + (constants + 1) / spare)


def _candidates(points: Points, spare: int) -> list[Law]:
    """Return the laws of which the points have `spare` more than constants, and enough different values."""
    variables = ("parameters", "samples") if role_of_samples(points) == "vary" else ("parameters",)
    candidates = []
    for law in (Law(variables, False), Law(variables, True)):
        constants = len(law.constants)
        values = min(_distinct(x) for x in _variables(law, points).values())
        if len(points.loss) >= constants + spare and values >= (2 if constants == 2 else 3):
            candidates.append(law)
    return candidates


def _best(candidates: Sequence[Law], points: Points) -> Fit:
    """Return the fit of the law of the lowest AICc."""
    return min((_fitted(law, points) for law in candidates), key=lambda one: _aicc(one, points))


def _variables(law: Law, points: Points) -> dict[str, np.ndarray]:
    return {name: getattr(points, name) for name in law.variables}


def _distinct(values: np.ndarray) -> int:
    return len(np.unique(values))


def _with_interval(value: float, values: np.ndarray) -> dict[str, float]:
    low, high = np.quantile(values, [0.025, 0.975])  # the percentile interval, as of bootstrap.py
    return {"value": float(value), "low": float(low), "high": float(high)}


def _line(name: str, value: Mapping[str, float]) -> str:
    return f"  {name:<16}  {value['value']:>10.4g}  {value['low']:.4g} to {value['high']:.4g}"
