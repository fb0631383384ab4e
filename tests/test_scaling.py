"""Scaling laws: published constants return, intervals cover the truth, undetermined constants are not claimed."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
from small import small_model

from mm1.cli import main
from mm1.engine.evaluation import scaling
from mm1.engine.evaluation.scaling import Law, Points, fit, held_out, laws, minimize, report, resample, show
from mm1.engine.evaluation.scaling_points import place, read_points
from mm1.engine.models.mm1 import MM1
from mm1.engine.run_config import Run, to_dict
from mm1.engine.train.config import Train
from mm1.errors import UserError

# Validation losses of AIM with 0.6B, 1B, 3B and 7B (El-Nouby et al. 2024, figure 1).
AIM = Points(np.array([0.68e9, 1.21e9, 2.72e9, 6.44e9]), None, np.array([0.3119, 0.3084, 0.3039, 0.2989]))
CHINCHILLA = {"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69}  # Hoffmann et al. 2022
N_LAW, N_LAW_E = Law(("parameters",), False), Law(("parameters",), True)
BOTH_E = Law(("parameters", "samples"), True)


def chinchilla(parameters, samples, A=406.4, alpha=0.34, B=410.7, beta=0.28, E=1.69):
    return E + A * parameters**-alpha + B * samples**-beta


def grid(sizes=6, lengths=5):
    parameters, samples = np.meshgrid(np.geomspace(4e7, 1.6e10, sizes), np.geomspace(1e9, 1e12, lengths))
    return parameters.ravel(), samples.ravel()


def power_law(parameters, noise=0.0, seed=0, A=20.0, alpha=0.1, E=0.0):
    factor = np.exp(noise * np.random.default_rng(seed).standard_normal(len(parameters)))
    return Points(parameters, None, (E + A * parameters**-alpha) * factor)


def test_aims_published_losses_are_a_power_of_0_019():
    stats = pytest.importorskip("scipy.stats")
    result, *_ = report(AIM)
    alpha = result["constants"]["alpha"]
    assert alpha["value"] == pytest.approx(0.019, abs=4e-4)
    assert result["law"] == "L = A·N^-α"
    assert result["constants"]["E"] is None
    line = stats.linregress(np.log(AIM.parameters), np.log(AIM.loss))
    assert alpha["value"] == pytest.approx(-line.slope, rel=0.03)
    student = stats.t(2).ppf(0.975) * line.stderr
    assert (alpha["high"] - alpha["low"]) / 2 == pytest.approx(student, rel=0.35)
    assert abs(result["held_out"]["error"]) < 1e-3
    assert "the points do not determine it" in show(result)


def test_noiseless_losses_give_chinchillas_constants():
    parameters, samples = grid()
    one = fit(Points(parameters, samples, chinchilla(parameters, samples)))
    assert one.law == BOTH_E
    assert dict(zip(one.law.constants, one.values()[0])) == pytest.approx(CHINCHILLA, rel=1e-3)


@pytest.mark.parametrize(
    "law, parameters, noise, truth, sets",
    [
        (N_LAW, AIM.parameters, 3e-4, {"A": 0.46, "alpha": 0.019}, 40),
        (N_LAW, np.geomspace(1e7, 1e10, 7), 5e-3, {"A": 20.0, "alpha": 0.1}, 40),
        (N_LAW_E, np.geomspace(1e6, 1e10, 9), 5e-3, {"A": 400.0, "alpha": 0.34, "E": 1.7}, 16),
    ],
    ids=["four points", "seven points", "with E"],
)
def test_intervals_cover_the_truth_as_often_as_they_say(law, parameters, noise, truth, sets):
    inside = []
    for seed in range(sets):
        points = power_law(parameters, noise, seed, **truth)
        many = resample(scaling._fitted(law, points), points, 120, seed).values()
        low, high = np.quantile(many, [0.025, 0.975], axis=0)
        expected = np.array([truth[name] for name in law.constants])
        inside.append((low <= expected) & (expected <= high))
    assert np.all(np.mean(inside, 0) > 0.95 - 3 * math.sqrt(0.95 * 0.05 / sets)), np.mean(inside, 0)


def test_noisy_losses_of_both_variables_give_the_constants_within_their_intervals():
    parameters, samples = grid()
    noise = np.exp(2e-3 * np.random.default_rng(3).standard_normal(len(parameters)))
    result, *_ = report(Points(parameters, samples, chinchilla(parameters, samples) * noise))
    for name, truth in CHINCHILLA.items():
        low, high = result["constants"][name]["low"], result["constants"][name]["high"]
        assert low < truth < high
    assert result["constants"]["E"]["value"] == pytest.approx(1.69, rel=0.03)
    share = result["share_of_compute_for_parameters"]
    assert share["low"] < 0.28 / 0.62 < share["high"]
    assert abs(result["held_out"]["error"]) < 0.01


def test_the_minimum_is_the_one_that_scipy_finds_from_the_papers_starts():
    optimize = pytest.importorskip("scipy.optimize")
    special = pytest.importorskip("scipy.special")
    parameters, samples = grid(4, 4)
    loss = chinchilla(parameters, samples) * np.exp(5e-3 * np.random.default_rng(0).standard_normal(16))
    sizes = np.log([parameters, samples])

    def huber(theta):  # e, a, b, alpha, beta
        e, a, b, alpha, beta = theta
        logs = [np.full(16, e), a - alpha * sizes[0], b - beta * sizes[1]]
        return special.huber(1e-3, special.logsumexp(logs, 0) - np.log(loss)).sum() / 1e-6

    best = min(
        optimize.minimize(huber, [e, a, b, alpha, 0.5], method="BFGS").fun
        for e in (-0.5, 0.5) for a in (3.0, 8.0) for b in (3.0, 8.0) for alpha in (0.2, 0.5)
    )  # fmt: skip
    one = scaling._fitted(BOTH_E, Points(parameters, samples, loss))
    A, alpha, B, beta, E = one.values()[0]
    assert huber([np.log(E), np.log(A), np.log(B), alpha, beta]) <= best * (1 + 1e-6)


def test_gradients_are_those_of_the_objective():
    draw = np.random.default_rng(0)
    centred, log_loss = draw.normal(size=(2, 7)), 0.01 * draw.normal(size=(3, 7))
    objective = scaling._objective(centred, log_loss)
    theta, rows = draw.normal(size=(3, 5)), np.arange(3)
    _, gradient = objective(theta, rows)
    for i in range(5):
        step = np.zeros(5)
        step[i] = 1e-6
        difference = (objective(theta + step, rows)[0] - objective(theta - step, rows)[0]) / 2e-6
        np.testing.assert_allclose(gradient[:, i], difference, rtol=1e-5, atol=1e-2)


def test_minimize_finds_the_minimum_from_each_start_by_itself():
    def rosenbrock(x, rows):
        a, b = x.T
        value = (1 - a) ** 2 + 100 * (b - a**2) ** 2 + rows
        return value, np.stack([-2 * (1 - a) - 400 * a * (b - a**2), 200 * (b - a**2)], 1)

    starts = np.array([[-1.2, 1.0], [2.0, -3.0], [1.0, 1.0]])
    ends, values = minimize(rosenbrock, starts)
    np.testing.assert_allclose(ends, 1, atol=1e-4)
    np.testing.assert_allclose(values, [0, 1, 2], atol=1e-7)
    alone, _ = minimize(rosenbrock, starts[:1])
    np.testing.assert_array_equal(alone, ends[:1])


def test_e_is_claimed_only_where_the_points_demand_it():
    sizes, shape = np.geomspace(1e6, 1e10, 8), {"A": 400.0, "alpha": 0.34}
    assert fit(power_law(sizes, **shape, E=1.7)).law == N_LAW_E
    assert fit(power_law(sizes[:4], **shape, E=1.7)).law == N_LAW  # three constants of four points prove nothing
    assert fit(power_law(sizes)).law == N_LAW
    chosen = [fit(power_law(sizes, 5e-3, seed)).law for seed in range(40)]
    assert chosen.count(N_LAW_E) <= 6


def test_samples_have_a_term_where_they_vary_by_themselves():
    sizes = np.geomspace(1e7, 1e9, 8)
    loss = power_law(sizes).loss
    for samples, role in [
        (None, "unknown"),
        (np.full(8, 1e9), "equal"),
        (20 * sizes, "follow"),
        (1e9 * sizes[::-1] ** -0.3, "follow"),
        (np.tile([1e9, 4e9, 2e9, 9e9], 2), "vary"),
    ]:
        points = Points(sizes, samples, loss)
        assert scaling.role_of_samples(points) == role
        assert {law.variables for law in laws(points)} == {("parameters", "samples")[: 1 + (role == "vary")]}
    result, *_ = report(Points(sizes, 20 * sizes, loss))
    assert "samples are a power of the parameters" in show(result)


def test_the_largest_model_is_predicted_from_the_others():
    points = power_law(np.array([1e7, 3e7, 1e8, 3e8, 1e9, 1e9]), 5e-3)
    check = held_out(points)
    slope, level = np.polyfit(np.log(points.parameters[:4]), np.log(points.loss[:4]), 1)
    assert check["predicted"] == pytest.approx(np.exp(level + slope * np.log(1e9)), rel=0.01)
    assert check["measured"] == points.loss[4:].mean()
    assert check["error"] == pytest.approx(check["predicted"] / check["measured"] - 1)
    doubled = Points(points.parameters, None, np.where(points.parameters == 1e9, 2, 1) * points.loss)
    assert held_out(doubled)["predicted"] == check["predicted"]
    assert held_out(power_law(np.array([1e7, 1e7, 1e7, 1e8]))) is None  # one size remains
    two = power_law(np.array([1e7, 1e7, 1e8, 1e8]))
    assert "too few" in show(report(two)[0])


def test_wild_points_give_valid_json():
    draw = np.random.default_rng(20)
    points = Points(10 ** draw.uniform(0, 12, 7), None, 10 ** draw.uniform(-8, 8, 7))
    result, *_ = report(points, {"N=1e30": {"parameters": 1e30}})
    json.dumps(result, allow_nan=False)
    show(result)


@pytest.mark.parametrize(
    "points, message",
    [
        (AIM.where(np.arange(4) < 3), "3 points, expected at least 4"),
        (Points(np.ones(0), None, np.ones(0)), "0 points, expected at least 4"),
        (Points(np.full(5, 1e9), None, np.linspace(2, 3, 5)), "parameters is 1e.09 in all 5 points"),
        (AIM._replace(loss=np.array([0.3, 0.2, np.nan, 0.1])), "loss is .*nan.*, expected positive numbers"),
        (AIM._replace(loss=np.array([0.3, 0.2, -0.1, 0.1])), "loss is .*expected positive numbers"),
        (AIM._replace(samples=np.array([1, 0, 2, 1.0])), "samples is .*expected positive numbers"),
        (AIM._replace(samples=np.array([1, 3, 2, 1.0])), "4 points of 4 different parameters and 3 different samples"),
    ],
)
def test_points_that_determine_no_law_are_refused(points, message):
    with pytest.raises(UserError, match=message) as error:
        report(points)
    assert "\n" not in str(error.value)


def made_run(folder, width, steps=40, done=None, **fields):
    """The files of a run that a law needs, without training it."""
    run = Run(dataclasses.replace(small_model(width=width), context=64), train=Train(steps=steps, warmup=1))
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint" / "config.json").write_text(json.dumps(to_dict(run)))
    lines = [{"step": step, "loss": 4 / step + width**-0.1, "targets": 100 + step % 2} | fields
             for step in range(1, (done or steps) + 1)]  # fmt: skip
    lines.insert(3, {"step": 4, "left_out": "no target tokens"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_give_their_size_their_targets_and_the_mean_loss_of_their_last_steps(tmp_path):
    paths = [made_run(tmp_path / str(width), width, accuracy=0.5) for width in (8, 16, 32, 48)]
    points = read_points(paths)
    model = MM1(small_model(width=48))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    vocabulary = sizes["decoder.embedding.weight"]
    assert points.parameters[3] == sum(sizes.values()) - vocabulary
    np.testing.assert_allclose(points.samples, 40 * 100.5)
    np.testing.assert_allclose(points.loss[1], np.mean([4 / 39, 4 / 40]) + 16**-0.1)
    decoder = read_points(paths, "accuracy", "decoder")
    assert decoder.parameters[3] == sum(n for name, n in sizes.items() if name.startswith("decoder.")) - vocabulary
    np.testing.assert_array_equal(decoder.loss, 0.5)
    assert report(points)[0]["samples"] == "equal"
    table = tmp_path / "more.csv"
    table.write_text("\ufeffname,loss,parameters\nlarge,0.7,1e6\n")
    both = read_points([*paths, table])
    assert both.samples is None
    assert both.parameters[4] == 1e6


def test_paths_without_a_final_loss_are_refused(tmp_path):
    run = made_run(tmp_path / "half", 16, done=20)
    with pytest.raises(UserError, match="half is at step 20 of 40: its final loss is not known yet"):
        read_points([run])
    with pytest.raises(UserError, match=r"neither a \.csv file nor the folder of a run"):
        read_points([tmp_path])
    whole = made_run(tmp_path / "whole", 16)
    with pytest.raises(UserError, match=r"metric is 'accuracy', expected one of .*whole: loss"):
        read_points([whole], "accuracy")
    with pytest.raises(UserError, match="part is 'head', expected one of vision, connector, "):
        read_points([whole], part="head")
    (whole / "checkpoint" / "config.json").unlink()
    with pytest.raises(UserError, match="whole has no checkpoint with settings"):
        read_points([whole])
    table = tmp_path / "table.csv"
    for text, message in [
        ("parameters,samples\n1,2\n", r"header is \['parameters', 'samples'\], expected parameters, loss"),
        ("parameters,loss\n1,high\n", "loss is 'high', expected a number"),
        ("parameters,loss\n1\n", "loss is None, expected a number"),
        ("", "header is"),
    ]:
        table.write_text(text)
        with pytest.raises(UserError, match=message):
            read_points([table])
    with pytest.raises(UserError, match=r"missing\.csv: No such file"):
        read_points([tmp_path / "missing.csv"])


def test_places_to_predict():
    assert place("N=13e9") == {"parameters": 13e9}
    assert place("N=1e9, D=2e12") == {"parameters": 1e9, "samples": 2e12}
    for text in ("13e9", "N", "N=", "N=many", "M=3", "N=-1", "N=nan", "N=1e9,", "N=inf"):
        with pytest.raises(UserError, match=r"predict is .*, expected N=13e9 or N=13e9,D=2e12"):
            place(text)
    parameters, samples = grid()
    with pytest.raises(UserError, match="predict is 'N=1', expected also D: the law is L = E"):
        report(Points(parameters, samples, chinchilla(parameters, samples)), {"N=1": {"parameters": 1.0}})


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["mm1", "scaling", *map(str, arguments)])
    status = 0
    try:
        main()
    except SystemExit as ended:
        status = ended.code
    return status, *capsys.readouterr()


def test_the_command_prints_a_table_and_one_line_of_json(tmp_path, monkeypatch, capsys):
    table = tmp_path / "aim.csv"
    rows = zip(AIM.parameters, AIM.loss)
    table.write_text("parameters,loss\n" + "".join(f"{n},{loss}\n" for n, loss in rows))
    status, out, _ = command(monkeypatch, capsys, table, "--predict", "N=13e9", "N=1e11")
    assert status == 0
    result = json.loads(out.splitlines()[-1])
    assert result["constants"]["alpha"]["value"] == pytest.approx(0.0189, abs=2e-4)
    prediction = result["predictions"]["N=13e9"]
    assert prediction["low"] < prediction["value"] < prediction["high"] < 0.2989
    assert out.startswith("L = A·N^-α, 4 points")
    status, _, errors = command(monkeypatch, capsys, table, "--predict", "13e9")
    assert (status, errors.count("\n")) == (2, 1)


def test_the_plot_shows_a_panel_for_each_variable(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    parameters, samples = grid(3, 3)
    rows = zip(parameters, samples, chinchilla(parameters, samples))
    table = tmp_path / "grid.csv"
    table.write_text("parameters,samples,loss\n" + "".join(f"{n},{d},{loss}\n" for n, d, loss in rows))
    status, *_ = command(monkeypatch, capsys, table, "--plot", tmp_path / "law.svg")
    assert status == 0
    assert (tmp_path / "law.svg").read_text().count('id="axes_') == 2
    status, _, errors = command(monkeypatch, capsys, table, "--plot", tmp_path / "law.doc")
    assert status == 2
    assert "law.doc" in errors
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, errors = command(monkeypatch, capsys, table, "--plot", tmp_path / "law.png")
    assert (status, errors) == (2, "mm1: charts need matplotlib: pip install matplotlib\n")
