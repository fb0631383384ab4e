"""A profile says where the time goes, and the run that is watched is the run that is not."""

import gzip
import json
import re

import pytest
import torch
from small import small_run
from test_train import Quiet, assert_same, trained

from mm1.engine.models.mm1 import MM1
from mm1.engine.train import profile as profiling
from mm1.engine.train.ledger import ledger
from mm1.engine.train.profile import STEPS, Profile
from mm1.engine.train.safety import WARM
from mm1.engine.train.step import Observer
from mm1.engine.train.trainer import Trainer
from mm1.errors import UserError

RUN = small_run(steps=6)


def profiled(run, folder, *observers, **options) -> Trainer:
    trainer = Trainer(run, folder, Quiet(), observers=observers, **options)
    trainer.observers.append(Profile(trainer.run, trainer.model, trainer.world, folder / "profile"))
    trainer.fit()
    return trainer


def test_weights_and_metrics_are_those_of_a_run_that_nobody_watches(tmp_path):
    trainer = profiled(small_run(steps=8), tmp_path / "watched")
    found = {name: p.detach() for name, p in trainer.model.named_parameters()}
    assert_same(found, trained(tmp_path / "run", small_run(steps=8), display=Quiet()))
    assert len(trainer.display.metrics) == trainer.run.train.steps
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())


class Drawn(Observer):
    """Keeps the batches of a run."""

    def __init__(self):
        self.batches = []

    def batch_drawn(self, batch):
        self.batches.append(batch)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Return the folder of a run, its profile, and the batches that its model saw."""
    folder, drawn = tmp_path_factory.mktemp("run"), Drawn()
    trainer = profiled(RUN, folder, drawn)
    return folder, trainer.observers[-1], drawn.batches


def test_every_millisecond_is_a_parts_and_operations_are_the_ledgers(watched):
    _, profile, drawn = watched
    seconds = profile.seconds()
    assert sum(seconds.values()) == pytest.approx((profile.marks[-1][1] - profile.marks[0][1]) / STEPS)
    parts = {*MM1.PROFILE, *(f"{part} backward" for part in MM1.PROFILE)}
    assert set(seconds) == {*parts, *profiling.OTHER}
    assert all(taken > 0 for taken in seconds.values())
    batches = drawn[2 * WARM : 2 * (WARM + STEPS)]
    assert [c.useful for c in profile.operations()] == [ledger(RUN.model, batch).useful for batch in batches]


def test_marks_stand_in_the_order_of_the_work(watched):
    forward = ["data", "between", "vision", "between", "connector", "between", "decoder", "head", "between"]
    backward = [f"{part} backward" for part in ("head", "decoder", "connector", "vision")]
    step = [*(forward + backward) * 2, "update", "outside"]
    assert [name for name, _ in watched[1].marks] == [*step * STEPS, "end"]


def test_what_it_leaves_can_be_read(watched):
    folder = watched[0] / "profile"
    trace = json.loads(gzip.decompress((folder / "trace-0.json.gz").read_bytes()))
    assert any("mm1::" in str(event.get("name")) for event in trace["traceEvents"])
    table = (folder / "table.txt").read_text()
    shares = [float(found) for found in re.findall(r"([\d.]+)%", table.split("in all")[0])]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert re.search(r"of executed operations [\d.]+% are padding and [\d.]+% run a second time", table)
    assert "aten::mm" in table


def test_compiled_blocks_are_not_compiled_again(tmp_path):
    torch.compiler.reset()
    run = small_run(steps=6, compile=True, recompute="selective")  # where that is an error
    profiled(run, tmp_path, backend="eager")
    torch.compiler.reset()
    assert (tmp_path / "profile" / "table.txt").exists()


def test_a_run_that_is_too_short_is_told_at_once(tmp_path):
    with pytest.raises(UserError, match="a profile needs 6 steps, but only 5 of the run remain"):
        profiled(small_run(steps=5), tmp_path)
