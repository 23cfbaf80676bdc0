"""``make study`` (examples/which_bias): tasks, tuning, comparisons, and that the page contains what was measured."""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
methods, page, plan, program, results, search, tasks, training = (
    importlib.import_module(f"examples.which_bias.{name}")
    for name in ("methods", "page", "plan", "__main__", "results", "search", "tasks", "training")
)
Cell, Results = results.Cell, results.Results

DOCS = ROOT / "docs"
BUDGET = search.Budget(points=4, tuning=3, repeats=5)
DIM = tasks.DIM


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    command = ["--quick", "--json", f"{folder}/a.json", "--page", f"{folder}/a.md", "--plot", f"{folder}/figures/recall.png"]
    assert program.main(command) == 0
    return folder


def test_a_quick_run_writes_all_files(quick):
    found = Results.load((quick / "a.json").read_text())
    assert list(found.levels) == list(tasks.TABLE) and found.names == list(methods.TABLE)
    assert {(c.task, c.level) for c in found.cells} == {(t.name, t.levels[-1]) for t in tasks.TABLE.values()}
    assert all(len(c.error) == len(c.accuracy) == plan.QUICK.budget.repeats for c in found.cells)
    assert found.trained == ["dot product", "L2"] and len(found.runs) == 4
    text = (quick / "a.md").read_text()
    assert text == page.render(found, "figures/recall.png") and "(figures/recall.png)" in text
    assert (quick / "figures" / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_stored_results_give_the_same_page(quick, capsys):
    before = (quick / "a.json").read_text()
    assert program.main(["--results", f"{quick}/a.json", "--json", f"{quick}/b.json", "--page", f"{quick}/b.md"]) == 0
    text = page.render(Results.load(before))
    assert (quick / "b.json").read_text() == before
    assert (quick / "b.md").read_text() == text and ".png" not in text and "\n\n\n" not in text
    assert capsys.readouterr().out == page.summary(text) + "\n" and page.summary(text).startswith("## Summary\n")


@pytest.mark.parametrize(
    ("text", "message"), [(None, "No such file"), ("{}", "expected the JSON of this study, format 1"), ("no", "Expecting")]
)
def test_wrong_results_are_refused(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    assert program.main(["--results", str(tmp_path / "x.json")]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_matplotlib_is_reported_before_measuring(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "examples.which_bias.plot", raising=False)
    monkeypatch.delattr(sys.modules["examples.which_bias"], "plot", raising=False)
    monkeypatch.setattr(program, "measure", lambda *_: pytest.fail("measured before matplotlib was imported"))
    with pytest.raises(ModuleNotFoundError, match="matplotlib"):
        program.main(["--quick", "--plot", str(tmp_path / "a.png")])


def test_results_repeat_bitwise_and_depend_on_the_seed():
    of = lambda seed: search.measure("load", 0.5, ["L2", "MLP L2 + decay", "softmax attention"], BUDGET, seed)
    assert of(0) == of(0) != of(1)
    budget = training.Training(steps=2, repeats=2)
    assert training.run("L2", budget, 0) == training.run("L2", budget, 0) != training.run("L2", budget, 1)


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_processes():
    small = dataclasses.replace(plan.QUICK, tasks=("drift",), memories=("L2",))
    alone, shared = (plan.measure(small, 0, workers) for workers in (1, 2))
    assert shared.cells == alone.cells and shared.runs == alone.runs
    assert [c.task for c in shared.cells] == ["drift"] * len(methods.TABLE)


# ---------------------------------------------------------------------------------------------------- committed files


def test_the_committed_page_is_made_from_the_committed_results():
    text = (DOCS / "which-bias.json").read_text()
    found = Results.load(text)
    assert found.dump() == text
    assert page.render(found, "which-bias/recall.png") == (DOCS / "which-bias.md").read_text()


def test_the_committed_results_are_those_of_the_full_plan():
    found, full = Results.load((DOCS / "which-bias.json").read_text()), plan.FULL
    assert found.about.items() >= dataclasses.asdict(full.budget).items()
    assert found.about["training_steps"] == full.training.steps
    assert found.levels == {name: list(task.levels) for name, task in tasks.TABLE.items()}
    assert found.names == list(methods.TABLE) and found.trained == list(training.MEMORIES)
    assert len(found.cells) == len(found.names) * sum(len(t.levels) for t in tasks.TABLE.values())
    assert {len(found.trained_values(name, training.PAIRS)) for name in found.trained} == {full.training.repeats}


def test_the_committed_plot_is_small():
    assert 10_000 < (DOCS / "which-bias" / "recall.png").stat().st_size < 60_000


# ---------------------------------------------------------------------------------------------------------- tuning


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_tuning_and_reporting_use_different_seeds(seed):
    studies = [set(group) for s in (seed, seed + 1) for group in search.seeds(s, plan.FULL.budget)]
    assert sum(map(len, studies)) == len(set.union(*studies))
    tuning, reporting = training.seeds(seed, plan.FULL.training)
    assert tuning not in reporting


def test_hyperparameters_are_searched_on_streams_that_are_not_reported(monkeypatch):
    used, read = [], methods.read
    monkeypatch.setattr(
        methods, "read", lambda c, points, stream, seeds: used.append((len(points), seeds)) or read(c, points, stream, seeds)
    )
    for name in ("L2", "Huber norm + decay", "softmax attention"):
        used.clear()
        search.measure("load", 0.5, [name], BUDGET, 0)
        tuning, reporting = search.seeds(0, BUDGET)
        assert [seeds for _, seeds in used] == [tuning] * (1 + len(search.BOXES)) + [reporting]
        assert [count for count, _ in used] == [4, 2, 2, 2, 2], "not the same budget for every method"


def test_learning_rates_are_chosen_on_a_seed_that_is_not_reported():
    budget, trained = training.Training(steps=7, repeats=2), []

    def train(preset, rate, steps, seed):
        trained.append((rate, steps, seed))
        return training._model(preset)

    runs = training.run("L2", budget, 0, train)
    tuning, reporting = training.seeds(0, budget)
    assert trained[: len(training.RATES)] == [(rate, 7, tuning) for rate in training.RATES]
    assert trained[len(training.RATES) :] == [(runs[0].rate, 7, seed) for seed in reporting] and [r.seed for r in runs] == reporting


def test_the_search_finds_the_best_step_size():
    """With orthogonal keys, each read once, L2 is exact at step size 1 and worse at any other."""
    keys, values = torch.linalg.qr(torch.randn(2, DIM, DIM))[0], torch.randn(2, DIM, DIM)
    stream = tasks.Stream(keys, values, keys, values, values, torch.arange(DIM).expand(2, -1))
    best = search.tune(methods.TABLE["L2"], search.Budget(48, 2, 2), stream, [0, 1])
    found = methods.AXES["step"](best[0, 0]).item()
    # The last round has points every 1/12 / 12 of the axis, a factor of 40000^(1/144): it must come within one such factor.
    assert abs(math.log(found)) < math.log(4e4) / 144


# ------------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("name", tasks.TABLE)
def test_streams(name):
    task = tasks.TABLE[name]
    for level in task.levels:
        x = tasks.draw(task, level, [3, 4])
        assert x.keys.shape == x.values.shape == (2, x.keys.shape[1], DIM)
        assert x.queries.shape == x.answers.shape
        torch.testing.assert_close(x.keys.norm(dim=-1), torch.ones(x.keys.shape[:2]))
        torch.testing.assert_close(x.candidates.norm(dim=-1), torch.full(x.candidates.shape[:2], DIM**0.5))
        right = x.candidates.gather(1, x.right[..., None].expand(-1, -1, DIM))
        assert torch.equal(right, x.answers)
        assert methods.score(x.answers[None], x)["error"].max() == 0 and methods.score(x.answers[None], x)["accuracy"].min() == 1
        assert not torch.equal(x.keys[0], x.keys[1])


def last_value(stream: tasks.Stream) -> torch.Tensor:
    """The value last read with each query's key, by comparing keys."""
    same = (stream.queries[:, :, None] == stream.keys[:, None]).all(-1)
    last = (same * torch.arange(1, same.shape[-1] + 1)).amax(-1) - 1
    assert (last >= 0).all()
    return stream.values.gather(1, last[..., None].expand(-1, -1, DIM))


@pytest.mark.parametrize("name", ["load", "collisions", "prominence", "drift", "stream"])
def test_the_right_value_is_the_last_one_read(name):
    for level in tasks.TABLE[name].levels:
        stream = tasks.draw(tasks.TABLE[name], level, range(4))
        assert torch.equal(last_value(stream), stream.answers)


def test_difficulties_are_as_strong_as_their_levels():
    of = lambda name, level: tasks.draw(tasks.TABLE[name], level, range(200))
    share = (of("outliers", 0.2).values.norm(dim=-1) > 2 * DIM**0.5).float().mean()
    assert abs(share - 0.2) < 5 * (0.2 * 0.8 / (200 * 96)) ** 0.5
    wrong = of("prominence", 4)
    assert wrong.keys.shape[1] == 16 + 8 * 4
    cosines = torch.einsum("sqd,spd->sqp", wrong.values, wrong.candidates) / DIM > 1 - 1e-5
    assert torch.equal(cosines.sum(1), torch.tensor([1] * 16 + [4] * 8).expand(200, -1))
    keys = of("collisions", 0.8).queries.unflatten(1, (4, 4))
    within = torch.einsum("sgid,sgjd->sgij", keys, keys)[..., 0, 1]
    assert abs(within.mean() - 0.8) < 0.02  # own parts are orthogonal only on average: a second-order effect, (1 - 0.8)^2 / DIM
    noisy = of("value noise", 2.0)
    of_key = (noisy.keys[:, :, None] == noisy.queries[:, None]).all(-1).int().argmax(-1)
    noise = noisy.values - noisy.answers.gather(1, of_key[..., None].expand(-1, -1, DIM))
    assert abs(noise.std() - 2) < 5 * 2 / (2 * noise.numel()) ** 0.5


# ------------------------------------------------------------------------------------------------------- methods


def point(name: str, **choices: float) -> torch.Tensor:
    """The point of the unit cube with these hyperparameters."""
    axes = methods.TABLE[name].axes
    assert set(choices) == set(axes)
    ends = {axis: methods.AXES[axis](torch.tensor([0.0, 1.0])).tolist() for axis in axes}
    return torch.tensor([[math.log(choices[a] / ends[a][0]) / math.log(ends[a][1] / ends[a][0]) for a in axes]])


def error(name: str, stream: tasks.Stream, **choices: float) -> float:
    answers = methods.read(methods.TABLE[name], point(name, **choices), stream, list(range(len(stream.keys))))
    return methods.score(answers, stream)["error"].max().item()


def test_methods_on_streams_with_known_answers():
    clean, drift = tasks.draw(tasks.TABLE["load"], 0.5, range(3)), tasks.draw(tasks.TABLE["drift"], 1.0, range(3))
    assert error("ridge regression", clean, ridge=1e-4) < 1e-2
    assert error("hard attention", drift) == 0
    assert error("softmax attention", clean, temperature=0.01) < 1e-5
    assert (
        error("softmax attention", drift, temperature=0.01) > 0.5 > error("softmax attention + decay", drift, temperature=0.01, forget=0.5)
    )
    keys = torch.linalg.qr(torch.randn(3, DIM, DIM))[0]
    values = torch.randn(3, DIM, DIM)
    orthogonal = tasks.Stream(keys, values, keys, values, values, torch.arange(DIM).expand(3, -1))
    assert error("dot product", orthogonal, step=1.0) < 1e-5 and error("L2", orthogonal, step=1.0) < 1e-5
    assert error("Huber norm", orthogonal, step=1.0, delta=100.0) < 1e-5 and error("Huber norm", orthogonal, step=1.0, delta=0.5) > 0.4
    assert error("L2 + decay", orthogonal, step=1.0, forget=0.5) > 0.5


@pytest.mark.parametrize("name", [name for name, row in methods.TABLE.items() if row.kind != "baseline"])
def test_queries_do_not_change_a_memory(name):
    """Queries that are asked twice give the same answers twice."""
    row, stream = methods.TABLE[name], tasks.draw(tasks.TABLE["load"], 0.5, [5, 6])
    points = torch.full((2, len(row.axes)), 0.6)
    whole = methods.read(row, points, stream, [5, 6])
    twice = dataclasses.replace(stream, queries=torch.cat([stream.queries, stream.queries], 1))
    again = methods.read(row, points, twice, [5, 6])
    torch.testing.assert_close(again, torch.cat([whole, whole], 2), rtol=1e-5, atol=1e-5)
    assert whole.std() > 1e-3


def test_a_memory_that_diverged_gets_the_worst_scores():
    stream = tasks.draw(tasks.TABLE["outliers"], 0.4, range(3))
    answers = methods.read(methods.TABLE["L3"], point("L3", step=4.0), stream, [0, 1, 2])
    assert not answers.isfinite().any()
    scores = methods.score(answers, stream)
    assert (scores["error"] == methods.HUGE).all() and (scores["accuracy"] == 0).all()


# ------------------------------------------------------------------------------------------------- results and page


def test_interval_rank_has_the_stated_coverage():
    for count in (3, 5, 16, 20):
        rank, coverage = results.interval_rank(count)
        if count <= 16:  # by brute force over all patterns of being above or below the median
            patterns = [bin(i).count("1") for i in range(2**count)]
            assert coverage == sum(rank <= ones <= count - rank for ones in patterns) / 2**count
        assert coverage >= results.CONFIDENCE or rank == 1
    assert results.interval_rank(16)[0] == 3 and results.interval_rank(5) == (1, 1 - 2 / 32)


def test_a_planted_difference_is_found_and_equal_methods_tie():
    g = torch.Generator().manual_seed(0)
    noise = lambda: torch.randn(16, generator=g) * 0.02
    common = 0.5 + torch.randn(16, generator=g) * 0.3  # much larger than the difference, but the same for both
    a, b, c = ((common + shift + noise()).tolist() for shift in (0.0, 0.1, 0.0))
    outcome = lambda x, y, less: results.compare(x, y, less_is_better=less)
    assert outcome(a, b, True) == "better" and outcome(b, a, True) == "worse" and outcome(a, b, False) == "worse"
    assert outcome(a, c, True) == outcome(c, a, True) == outcome(a, a, True) == "tie"
    assert outcome(a, [x + 0.5 * results.MATERIAL for x in a], True) == "tie", "significant, but too small to matter"


ABOUT = {"seed": 0, "points": 4, "tuning": 2, "repeats": 16, "training_steps": 9, "training_repeats": 5, "versions": {}, "cpu_minutes": 1.0}


def planted(errors: dict[str, float], accuracies: dict[str, float] | None = None):
    """Results of the outlier task with an error of 0.6 and an accuracy of 0.5 for all methods but those that are given."""
    wiggle = [0.001 * i for i in range(16)]
    cells = [
        Cell("outliers", level, name, [errors.get(name, 0.6) + x for x in wiggle], [(accuracies or {}).get(name, 0.5)] * 16, {})
        for level in (0.1, 0.4)
        for name in methods.TABLE
    ]
    return Results(ABOUT, cells, [])


def cells(found, start: str) -> list[str]:
    """The cells of the page's first row that begins so."""
    row = next(line for line in page.render(found).splitlines() if line.startswith(f"| {start}"))
    return row.strip("| ").split(" | ")[1:]


HUBER = [f"Huber {kind}{d}" for kind in ("coordinate", "norm", "switch") for d in ("", " + decay")]


@pytest.mark.parametrize(
    ("errors", "summary", "claim"),
    [
        (dict.fromkeys(HUBER, 0.2),
         ["Huber coordinate (± decay), Huber norm (± decay), Huber switch (± decay)", "24 of 24, with the dot product",
          "0.21 (Huber coordinate); 0.61 (dot product)", "0 and 2 of 2", "0 / 16 / 0", "0 / 2 / 0"],
         "supported: 12 better, 0 tied, 0 worse"),
        ({},
         ["24 of 24, with the dot product", "24 of 24, with the dot product", "0.61 (dot product); 0.61 (dot product)", "2 and 2 of 2",
          "0 / 16 / 0", "0 / 2 / 0"],
         "no difference: 0 better, 12 tied, 0 worse"),
        (dict.fromkeys(HUBER, 0.9),
         ["18 of 24, with the dot product", "24 of 24, with the dot product", "0.61 (dot product); 0.61 (dot product)", "2 and 2 of 2",
          "0 / 16 / 0", "0 / 2 / 0"],
         "contradicted: 0 better, 0 tied, 12 worse"),
        ({"L2 + decay": 0.3, "dot product": 0.9},
         ["L2 + decay", "24 of 24, with the dot product", "0.31 (L2 + decay); 0.61 (dot product + decay)", "0 and 2 of 2", "4 / 12 / 0",
          "0 / 2 / 0"],
         "partly contradicted: 0 better, 6 tied, 6 worse"),
    ],
)  # fmt: skip
def test_the_page_follows_the_numbers(errors, summary, claim):
    found = planted(errors)
    assert cells(found, "Grossly wrong values") == summary
    assert cells(found, "L2 is sensitive")[2] == claim


def test_the_page_follows_the_accuracies():
    found = planted({}, {"L2": 0.9, "L1": 0.1, "softmax attention": 0.8})
    assert cells(found, "Grossly wrong values")[1:] == [
        "L2",
        "0.61 (dot product); 0.61 (dot product)",
        "2 and 0 of 2",
        "0 / 16 / 0",
        "2 / 0 / 0",
    ]
    text = page.render(found)
    row = next(line for line in text.splitlines() if line.startswith("| L2 ") and "[" in line and "0.90" in line)
    assert row == "| L2 | **0.90 [0.90, 0.90]** | **0.90 [0.90, 0.90]** |"


@pytest.mark.parametrize(
    ("better", "tie", "worse", "word"),
    [
        (3, 0, 0, "supported"), (0, 3, 0, "no difference"), (2, 1, 0, "partly supported"), (0, 0, 3, "contradicted"),
        (0, 1, 2, "partly contradicted"), (1, 1, 1, "mixed"),
    ],
)  # fmt: skip
def test_verdicts(better, tie, worse, word):
    outcomes = ["better"] * better + ["tie"] * tie + ["worse"] * worse
    assert page.verdict(outcomes) == f"{word}: {better} better, {tie} tied, {worse} worse"
    assert page.verdict([]) == "not measured"


def test_trained_memories_differ_only_if_one_is_better_on_every_seed():
    def made(*accuracies: float):
        runs = [results.Run("L1", i, 0.01, dict.fromkeys(training.ASKED, 0.55)) for i in range(5)]
        return Results(ABOUT, [], runs + [results.Run("L2", i, 0.01, dict.fromkeys(training.ASKED, x)) for i, x in enumerate(accuracies)])

    assert made(0.8, 0.9, 0.7, 0.8, 0.6).trained_leaders(8) == ["L2"]
    assert made(0.8, 0.9, 0.4, 0.8, 0.6).trained_leaders(8) == ["L1", "L2"]
    assert cells(made(0.8, 0.9, 0.4, 0.8, 0.6), "L2 | **0.80 [0.40, 0.90]**")
    assert "not learned in 9 steps: none." in page.render(made(0.8, 0.9, 0.7, 0.8, 0.6))
    assert "not learned in 9 steps: L2." in page.render(made(0.1, 0.1, 0.1, 0.8, 0.6))


def test_results_survive_being_written():
    found = planted({"L2": 0.123})
    text = found.dump()
    again = Results.load(text)
    assert again.dump() == text and again.cells == found.cells
    assert sum('":[[' in line for line in text.splitlines()) == len(found.cells), "one line for each"
