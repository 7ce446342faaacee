"""Numbers, decisions and weights under every way of training on several ranks, against one process in float64."""

from functools import cache
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from gradwatch.callbacks import GradWatch
from tests.modes import (
    alone_cases,
    change_cases,
    company_cases,
    ddp_cases,
    expert_cases,
    flat_cases,
    lightning_cases,
    pipeline_cases,
    sharded_cases,
    statistic_cases,
)
from tests.modes.ranks import run_group
from tests.modes.reference import Net, batches

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DDP, LIGHTNING = list(ddp_cases.CASES), list(lightning_cases.CASES)
ALONE = list(alone_cases.CASES)
CHANGES = list(change_cases.CASES)
COMPANY = list(company_cases.CASES)
STATISTICS = list(statistic_cases.CASES)
TWO, FOUR = list(sharded_cases.TWO), list(sharded_cases.FOUR)
PIPELINE_TWO, PIPELINE_FOUR = list(pipeline_cases.TWO), list(pipeline_cases.FOUR)
EXPERTS_TWO, EXPERTS_FOUR = list(expert_cases.TWO), list(expert_cases.FOUR)
FLAT_TWO, FLAT_FOUR = list(flat_cases.TWO), list(flat_cases.FOUR)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Start the processes of a group once, whichever of its cases is asked for first."""

    @cache
    def of_group(module: str, world: int, names: tuple[str, ...]) -> tuple[Path, dict[str, str]]:
        folder = tmp_path_factory.mktemp("ranks")
        return folder, run_group(module, world, folder, list(names))

    return of_group


@pytest.mark.parametrize("name", DDP)
def test_distributed_data_parallel(name: str, outcomes) -> None:
    _, found = outcomes("tests.modes.ddp_cases", 2, tuple(DDP))
    assert not found[name], found[name]


@pytest.mark.parametrize("name", LIGHTNING)
def test_lightnings_ddp_strategy(name: str, outcomes) -> None:
    _, found = outcomes("tests.modes.lightning_cases", 2, tuple(LIGHTNING))
    assert not found[name], found[name]


@pytest.mark.parametrize("name", TWO)
def test_pieces_on_two_ranks(name: str, outcomes) -> None:
    _, found = outcomes("tests.modes.sharded_cases", 2, tuple(TWO))
    assert not found[name], found[name]


@pytest.mark.parametrize("name", FOUR)
def test_pieces_on_four_ranks(name: str, outcomes) -> None:
    _, found = outcomes("tests.modes.sharded_cases", 4, tuple(FOUR))
    assert not found[name], found[name]


@pytest.mark.parametrize("name", FLAT_TWO)
def test_flat_parameters_on_two_ranks(name: str, outcomes) -> None:
    _, found = outcomes("tests.modes.flat_cases", 2, tuple(FLAT_TWO))
    assert not found[name], found[name]


@pytest.mark.parametrize("name", FLAT_FOUR)
def test_flat_parameters_on_four_ranks(name: str, outcomes) -> None:
    _, found = outcomes("tests.modes.flat_cases", 4, tuple(FLAT_FOUR))
    assert not found[name], found[name]


@pytest.mark.parametrize("name", PIPELINE_TWO)
def test_pipelines_on_two_ranks(name: str, outcomes) -> None:
    _, found = outcomes("tests.modes.pipeline_cases", 2, tuple(PIPELINE_TWO))
    assert not found[name], found[name]


@pytest.mark.parametrize("name", PIPELINE_FOUR)
def test_pipelines_on_four_ranks(name: str, outcomes) -> None:
    _, found = outcomes("tests.modes.pipeline_cases", 4, tuple(PIPELINE_FOUR))
    assert not found[name], found[name]


@pytest.mark.parametrize("name", EXPERTS_TWO)
def test_experts_on_two_ranks(name: str, outcomes) -> None:
    _, found = outcomes("tests.modes.expert_cases", 2, tuple(EXPERTS_TWO))
    assert not found[name], found[name]


@pytest.mark.parametrize("name", EXPERTS_FOUR)
def test_experts_on_four_ranks(name: str, outcomes) -> None:
    _, found = outcomes("tests.modes.expert_cases", 4, tuple(EXPERTS_FOUR))
    assert not found[name], found[name]


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_of_ones_own(name: str, outcomes) -> None:
    _, found = outcomes("tests.modes.statistic_cases", 2, tuple(STATISTICS))
    assert not found[name], found[name]


@pytest.mark.parametrize("name", ALONE)
def test_a_failure_on_one_rank_alone(name: str, outcomes) -> None:
    _, found = outcomes("tests.modes.alone_cases", 2, tuple(ALONE))
    assert not found[name], found[name]


@pytest.mark.parametrize("name", CHANGES)
def test_models_that_change_on_all_ranks_or_on_one(name: str, outcomes) -> None:
    _, found = outcomes("tests.modes.change_cases", 2, tuple(CHANGES))
    assert not found[name], found[name]


@pytest.mark.parametrize("name", COMPANY)
def test_ranks_that_do_not_all_take_part_alike(name: str, outcomes) -> None:
    _, found = outcomes("tests.modes.company_cases", 2, tuple(COMPANY))
    assert not found[name], found[name]


def test_a_run_of_two_ranks_goes_on_with_one(outcomes, tmp_path: Path) -> None:
    folder, found = outcomes("tests.modes.lightning_cases", 2, tuple(LIGHTNING))
    assert not found["resume-on-fewer-ranks"], found["resume-on-fewer-ranks"]
    watch = GradWatch(verbose=False, on_error="raise", run_dir=False, rules="autoclip")
    run = pl.Trainer(
        callbacks=[watch],
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    module = lightning_cases.Module(Net(), rank=0)
    checkpoint = folder / "resume-on-fewer-ranks" / "two.ckpt"
    run.fit(module, lightning_cases.loader(batches(1), 0), ckpt_path=str(checkpoint))
    assert [r.step for r in watch.history] == list(range(6, 12))
    assert [(i.rule, i.first_step) for i in watch.incidents][:1] == [("non_finite", 3)]
    assert watch._session is not None
    assert watch._session.engine.completion.num_skipped == 1
    assert all(torch.isfinite(p).all() for p in module.parameters())
