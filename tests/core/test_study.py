"""``python -m miras_kernels study``: its tasks, its fairness, its verdicts, and that the page says what the numbers do."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path

import pytest
import torch

from miras_kernels.__main__ import main
from miras_kernels.study import contestants, mqar, page, phrases, program, recall, tasks, verdicts
from miras_kernels.study.document import Document
from miras_kernels.study.recall import Cell

DOCS = Path(__file__).resolve().parents[2] / "docs"
BUDGET = recall.Budget(points=4, tuning=3, repeats=5)
DIM = tasks.DIM


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    command = ["study", "--quick", "--json", f"{folder}/a.json", "--page", f"{folder}/a.md", "--plots", f"{folder}/figures"]
    assert main(command) == 0
    return folder


def test_a_quick_run_writes_what_was_asked_for(quick):
    document = Document.load((quick / "a.json").read_text())
    assert list(document.levels) == list(tasks.TABLE) and document.names == list(contestants.TABLE)
    assert {(c.task, c.level) for c in document.cells} == {(t.name, t.levels[-1]) for t in tasks.TABLE.values()}
    assert all(len(c.error) == len(c.accuracy) == program.QUICK.budget.repeats for c in document.cells)
    assert document.trained == ["dot product", "L2"] and len(document.runs) == 4
    text = (quick / "a.md").read_text()
    assert text == page.render(document, "figures")
    for picture in ("recall", "accuracy", "trained"):
        assert f"(figures/{picture}.png)" in text
        assert (quick / "figures" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_results_make_the_same_page_again(quick, capsys):
    before = (quick / "a.json").read_text()
    assert main(["study", "--results", f"{quick}/a.json", "--json", f"{quick}/b.json", "--page", f"{quick}/b.md"]) == 0
    document = Document.load(before)
    assert (quick / "b.json").read_text() == before
    assert (quick / "b.md").read_text() == page.render(document) and ".png" not in page.render(document)
    assert capsys.readouterr().out == page.in_short(document) + "\n"


@pytest.mark.parametrize(
    ("text", "message"), [(None, "No such file"), ("{}", "expected the JSON of a study, format 1"), ("no", "Expecting")]
)
def test_wrong_results_are_refused(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    assert main(["study", "--results", str(tmp_path / "x.json")]) == 2
    assert message in capsys.readouterr().err


def test_plots_without_matplotlib_are_refused_at_once(monkeypatch, tmp_path, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest))
    monkeypatch.setattr(program, "measure", lambda *_: pytest.fail("it was not told before measuring"))
    assert main(["study", "--quick", "--plots", str(tmp_path)]) == 2
    assert "--plots needs matplotlib" in capsys.readouterr().err


def test_it_repeats_bitwise_and_another_seed_is_another_study():
    of = lambda seed: recall.measure("load", 0.5, ["L2", "MLP L2 + decay", "softmax attention"], BUDGET, seed)
    assert of(0) == of(0) != of(1)
    training = mqar.Training(steps=2, repeats=2)
    assert mqar.run("L2", training, 0) == mqar.run("L2", training, 0) != mqar.run("L2", training, 1)


@pytest.mark.slow
def test_processes_that_share_the_work_change_nothing():
    plan = dataclasses.replace(program.QUICK, tasks=("drift",), memories=("L2",))
    alone, shared = (program.measure(plan, 0, workers) for workers in (1, 2))
    assert shared.cells == alone.cells and shared.runs == alone.runs
    assert [c.task for c in shared.cells] == ["drift"] * len(contestants.TABLE)


# ----------------------------------------------------------------------------------------------- what is in the docs


def test_the_page_says_what_its_results_do():
    text = (DOCS / "which-bias.json").read_text()
    document = Document.load(text)
    assert document.dump() == text
    assert page.render(document, "which-bias") == (DOCS / "which-bias.md").read_text()


def test_the_results_are_of_a_full_study():
    document, plan = Document.load((DOCS / "which-bias.json").read_text()), program.FULL
    assert document.about.items() >= dataclasses.asdict(plan.budget).items()
    assert document.about["training_steps"] == plan.training.steps
    assert document.levels == {name: list(task.levels) for name, task in tasks.TABLE.items()}
    assert document.names == list(contestants.TABLE) and document.trained == list(mqar.MEMORIES)
    assert len(document.cells) == len(document.names) * sum(len(t.levels) for t in tasks.TABLE.values())
    assert {len(document.trained_values(name, mqar.PAIRS)) for name in document.trained} == {plan.training.repeats}


def test_the_pictures_are_there_and_small():
    pictures = sorted((DOCS / "which-bias").iterdir())
    assert [x.name for x in pictures] == ["accuracy.png", "recall.png", "trained.png"]
    assert all(x.stat().st_size < 60_000 for x in pictures)


# ---------------------------------------------------------------------------------------------------------- fairness


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_tuning_and_reporting_share_no_seed(seed):
    studies = [set(group) for s in (seed, seed + 1) for group in recall.seeds(s, program.FULL.budget)]
    assert sum(map(len, studies)) == len(set.union(*studies))
    tuning, reporting = mqar.seeds(seed, program.FULL.training)
    assert tuning not in reporting


def test_choices_are_searched_on_streams_that_are_not_reported(monkeypatch):
    used, read = [], contestants.read
    monkeypatch.setattr(
        contestants, "read", lambda c, points, stream, seeds: used.append((len(points), seeds)) or read(c, points, stream, seeds)
    )
    for name in ("L2", "Huber norm + decay", "softmax attention"):
        used.clear()
        recall.measure("load", 0.5, [name], BUDGET, 0)
        tuning, reporting = recall.seeds(0, BUDGET)
        assert [seeds for _, seeds in used] == [tuning] * (1 + len(recall.BOXES)) + [reporting]
        assert [count for count, _ in used] == [4, 2, 2, 2, 2], "not the same budget for everybody"


def test_learning_rates_are_chosen_on_a_seed_that_is_not_reported():
    training, trained = mqar.Training(steps=7, repeats=2), []

    def train(preset, rate, steps, seed):
        trained.append((rate, steps, seed))
        return mqar._model(preset)

    runs = mqar.run("L2", training, 0, train)
    tuning, reporting = mqar.seeds(0, training)
    assert trained[: len(mqar.RATES)] == [(rate, 7, tuning) for rate in mqar.RATES]
    assert trained[len(mqar.RATES) :] == [(runs[0].rate, 7, seed) for seed in reporting] and [r.seed for r in runs] == reporting


def test_the_search_finds_the_step_that_is_best():
    """Orthogonal keys, read once: L2 is exact with a step of 1, and worse with any other."""
    keys, values = torch.linalg.qr(torch.randn(2, DIM, DIM))[0], torch.randn(2, DIM, DIM)
    stream = tasks.Stream(keys, values, keys, values, values, torch.arange(DIM).expand(2, -1))
    best = recall._search(contestants.TABLE["L2"], recall.Budget(48, 2, 2), stream, [0, 1])
    found = contestants.AXES["step"](best[0, 0]).item()
    # The last round looks every 1/12 / 12 of the axis, a factor 40000^(1/144): it must land within one such step.
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
        assert contestants.score(x.answers[None], x)["error"].max() == 0 and contestants.score(x.answers[None], x)["accuracy"].min() == 1
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


# ------------------------------------------------------------------------------------------------------- contestants


def point(name: str, **choices: float) -> torch.Tensor:
    """Where in the unit cube these choices lie."""
    axes = contestants.TABLE[name].axes
    assert set(choices) == set(axes)
    ends = {axis: contestants.AXES[axis](torch.tensor([0.0, 1.0])).tolist() for axis in axes}
    return torch.tensor([[math.log(choices[a] / ends[a][0]) / math.log(ends[a][1] / ends[a][0]) for a in axes]])


def error(name: str, stream: tasks.Stream, **choices: float) -> float:
    answers = contestants.read(contestants.TABLE[name], point(name, **choices), stream, list(range(len(stream.keys))))
    return contestants.score(answers, stream)["error"].max().item()


def test_readers_and_memories_answer_what_they_must():
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


@pytest.mark.parametrize("name", [name for name, row in contestants.TABLE.items() if row.kind != "reader"])
def test_asking_changes_nothing(name):
    """Queries after queries: the first half's answers are those without the second half, and asking twice gives the same."""
    row, stream = contestants.TABLE[name], tasks.draw(tasks.TABLE["load"], 0.5, [5, 6])
    points = torch.full((2, len(row.axes)), 0.6)
    whole = contestants.read(row, points, stream, [5, 6])
    twice = dataclasses.replace(stream, queries=torch.cat([stream.queries, stream.queries], 1))
    again = contestants.read(row, points, twice, [5, 6])
    torch.testing.assert_close(again, torch.cat([whole, whole], 2), rtol=1e-5, atol=1e-5)
    assert whole.std() > 1e-3


def test_a_memory_that_diverged_is_bad_and_not_missing():
    stream = tasks.draw(tasks.TABLE["outliers"], 0.4, range(3))
    answers = contestants.read(contestants.TABLE["L3"], point("L3", step=4.0), stream, [0, 1, 2])
    assert not answers.isfinite().any()
    scores = contestants.score(answers, stream)
    assert (scores["error"] == contestants.HUGE).all() and (scores["accuracy"] == 0).all()


# ---------------------------------------------------------------------------------------------------------- verdicts


def test_intervals_cover_what_they_say():
    for count in (3, 5, 16, 20):
        rank, coverage = verdicts.interval_rank(count)
        # By brute force over all patterns of being above or below the median.
        patterns = [bin(i).count("1") for i in range(2 ** min(count, 16))]
        if count <= 16:
            assert coverage == sum(rank <= ones <= count - rank for ones in patterns) / 2**count
        assert coverage >= verdicts.CONFIDENCE or rank == 1
    assert verdicts.interval_rank(16)[0] == 3 and verdicts.interval_rank(5) == (1, 1 - 2 / 32)


def test_a_planted_difference_is_one_and_a_tie_is_a_tie():
    g = torch.Generator().manual_seed(0)
    noise = lambda: torch.randn(16, generator=g) * 0.02
    common = 0.5 + torch.randn(16, generator=g) * 0.3  # much larger than the difference, but the same for both
    a, b, c = ((common + shift + noise()).tolist() for shift in (0.0, 0.1, 0.0))
    outcome = lambda x, y, less: verdicts.compare(x, y, less_is_better=less).outcome
    assert outcome(a, b, True) == "better" and outcome(b, a, True) == "worse" and outcome(a, b, False) == "worse"
    assert outcome(a, c, True) == outcome(c, a, True) == "tie"
    assert outcome(a, a, True) == "tie"
    assert outcome(a, [x + 0.5 * verdicts.MATERIAL for x in a], True) == "tie", "sure, but too small to matter"
    assert abs(verdicts.compare(a, b, less_is_better=True).difference - 0.1) < 0.02


def planted(errors: dict[str, float], accuracies: dict[str, float] | None = None) -> Document:
    """Results of the outlier task in which everybody has an error of 0.6 and an accuracy of 0.5, and some have others."""
    wiggle = [0.001 * i for i in range(16)]
    cells = [
        Cell("outliers", level, name, [errors.get(name, 0.6) + x for x in wiggle], [(accuracies or {}).get(name, 0.5)] * 16, {})
        for level in (0.1, 0.4)
        for name in contestants.TABLE
    ]
    about = {"seed": 0, "points": 4, "tuning": 2, "repeats": 16, "versions": {}, "cpu_minutes": 1.0}
    return Document(about, cells, [])


def claim(text: str, which: str) -> str:
    """The page's verdict on a claim, by error."""
    return next(line for line in text.splitlines() if line.startswith(f"| {which}")).split(" | ")[3]


def test_sentences_follow_the_numbers():
    huber = dict.fromkeys([f"Huber {kind}{d}" for kind in ("coordinate", "norm", "switch") for d in ("", " + decay")], 0.2)
    good, level, bad = (planted(x) for x in (huber, {}, dict.fromkeys(huber, 0.9)))
    winners = {name: phrases.leading(x, "outliers", "error") for name, x in (("good", good), ("level", level), ("bad", bad))}
    assert winners["good"] == "**Huber coordinate (± decay), Huber norm (± decay) and Huber switch (± decay)**"
    assert winners["level"] == "every memory"
    assert winners["bad"] == "18 of 24 memories, with the dot product among them"
    of = {name: claim(page.render(x), "L2 is sensitive") for name, x in (("good", good), ("level", level), ("bad", bad))}
    assert of == {"good": "borne out, every time", "level": "no difference, every time", "bad": "the opposite in 12 of 12"}
    assert "is beaten by relative error at every level, by 0.40, and is level" in phrases.task_sentences(good, "outliers")
    assert "is level with the best memory by relative error at every level" in phrases.task_sentences(level, "outliers")
    assert "level with the best memory at 0 of 2 task levels.\n" in page.in_short(good)
    assert "level with the best memory at 2 of 2 task levels: outliers (10% wrong and 40% wrong).\n" in page.in_short(level)
    nothing = planted(dict.fromkeys(contestants.TABLE, 1.2))
    assert "no memory's error is below that of answering nothing" in phrases.task_sentences(nothing, "outliers")
    alone = planted({"L2 + decay": 0.3})
    assert phrases.leading(alone, "outliers", "error") == "**L2 + decay**"
    accurate = planted({}, {"L2": 0.9, "L1": 0.1})
    assert [phrases.leading(accurate, "outliers", metric) for metric in ("error", "accuracy")] == ["every memory", "**L2**"]
    assert "Decay lowered the error in 2, raised it in 0 and made no difference in 14" in phrases.task_sentences(alone, "outliers")


@pytest.mark.parametrize(
    ("better", "tie", "worse", "said"),
    [
        (3, 0, 0, "borne out, every time"),
        (0, 3, 0, "no difference, every time"),
        (2, 1, 0, "borne out in 2 of 3, no difference in the others"),
        (0, 0, 3, "the opposite in 3 of 3"),
        (0, 1, 2, "the opposite in 2 of 3, no difference in the others"),
        (1, 1, 1, "mixed: better in 1 of 3, worse in 1, no difference in 1"),
        (0, 0, 0, "not measured"),
    ],
)
def test_judgements(better, tie, worse, said):
    assert phrases.judgement({"better": better, "tie": tie, "worse": worse}) == said


def test_trained_models_are_told_apart_only_if_one_is_ahead_on_every_seed():
    def document(*accuracies: float) -> Document:
        runs = [mqar.Run("L2", i, 0.01, dict.fromkeys(mqar.ASKED, x)) for i, x in enumerate(accuracies)]
        return Document({"training_steps": 9}, [], [mqar.Run("L1", i, 0.01, dict.fromkeys(mqar.ASKED, 0.5)) for i in range(5)] + runs)

    assert phrases.trained_sentences(document(0.8, 0.9, 0.7, 0.8, 0.6), 8) == (
        "With 8 pairs: **L2**, 0.80; no other is level with it; behind: L1."
    )
    assert phrases.trained_sentences(document(0.8, 0.9, 0.4, 0.8, 0.6), 8) == "With 8 pairs: **L2**, 0.80; level with it: L1."
    assert phrases.unlearned(document(0.8, 0.9, 0.7, 0.8, 0.6)).startswith("Every memory learned the task")
    assert "(median accuracy below 0.5 at the 8 pairs of training): L2." in phrases.unlearned(document(0.1, 0.1, 0.1, 0.8, 0.6))


def test_documents_survive_being_written():
    document = planted({"L2": 0.123})
    text = document.dump()
    again = Document.load(text)
    assert again.dump() == text and again.cells == document.cells
    assert sum('":[[' in line for line in text.splitlines()) == len(document.cells), "one line for each"
