"""Sweeps: planning, generation, resuming after failures and kills, summary, report and command line."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st
from PIL import Image
from plotly.offline import get_plotlyjs
from sweep_units import PROMPTS, die_once, pretend, units

from elakit.errors import OutputError, SettingError
from elakit.guidance import ELA, LatentStep
from elakit.sweep import (
    BENCHMARKS,
    SUITES,
    Unit,
    figures,
    plan,
    read_prompts,
    report,
    run,
    store,
    suite,
    summary,
    sweep,
    table,
)
from elakit.sweep.generation import generate_unit
from elakit.sweep.options import canonical_options
from elakit.world.vocabulary import COLORS, NOUNS


class Remembering:
    """Generates units and records them."""

    def __init__(self, make: Callable[[Unit], list[dict[str, Any]]] = pretend) -> None:
        self.generated: list[Unit] = []
        self._generate = make

    def __call__(self, unit: Unit) -> list[dict[str, Any]]:
        self.generated.append(unit)
        return self._generate(unit)


@pytest.fixture
def thread() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def as_bytes(folder: Path, scratch: Path) -> bytes:
    """The table of a sweep as Parquet, without the seconds."""
    table(folder).drop(columns="seconds").to_parquet(scratch / "table.parquet")
    return (scratch / "table.parquet").read_bytes()


# --- suites and units ---------------------------------------------------------------------------------------


def test_suites_are_reproducible_and_contain_each_prompt_once() -> None:
    sizes = {name: len(suite(name)) for name in SUITES}
    assert sizes == {
        "attend-and-excite": 276, "animals": 66, "animals-objects": 144, "objects": 66,
        "three-entities": 60, "same-color": 60, "similar-animals": 60, "free-captions": 60,
    }  # fmt: skip
    for name in SUITES:
        prompts = suite(name)
        assert prompts == suite(name)
        assert len(set(prompts)) == len(prompts)
    assert suite("attend-and-excite") == suite("animals") + suite("animals-objects") + suite("objects")
    with pytest.raises(SettingError, match=r"'colors'.*same-color"):
        suite("colors")


def test_the_english_parser_finds_the_entities_of_the_generated_prompts() -> None:
    from elakit.english import load_reader, phrases

    wrong = []
    for name, count in {"three-entities": 3, "same-color": 2, "similar-animals": 2, "free-captions": None}.items():
        prompts = suite(name)
        for text, doc in zip(prompts, load_reader().pipe(prompts), strict=True):
            found = [
                (text[slice(*phrase.noun)], [text[slice(*span)] for span in phrase.attributes])
                for phrase in phrases(doc)
            ]
            wanted = count or (3 if "," in text else 2)
            known = all(noun in NOUNS and set(said) <= set(COLORS) for noun, said in found)
            if len(found) != wanted or not known:
                wrong.append((text, found))
    assert not wrong
    colors = [{word for word in text.split() if word in COLORS} for text in suite("same-color")]
    assert {len(some) for some in colors} == {1}


def test_prompts_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("a cat\n\n  a dog and a café \na cat\n", encoding="utf-8")
    assert read_prompts(path) == ("a cat", "a dog and a café")
    with pytest.raises(OutputError, match=r"none\.txt cannot be read"):
        read_prompts(tmp_path / "none.txt")
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(OutputError, match="UTF-8"):
        read_prompts(path)
    path.write_text("\n \n")
    with pytest.raises(SettingError, match="contains no prompt"):
        read_prompts(path)


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "anchor.step_size": st.floats(0, 2),
        "anchor.decay": st.integers(0, 3),
        "anchor.gradient": st.sampled_from(["raw", "normalized"]),
        "localize.lock_from": st.none() | st.integers(0, 9),
    },
)


@tries(deadline=None, max_examples=50)
@given(
    prompts=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=6),
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=5, unique=True),
    options=OPTIONS,
    again=OPTIONS,
    batch=st.none() | st.integers(1, 3),
)
def test_a_plan_contains_each_unit_once_and_keys_do_not_depend_on_order(
    prompts: list[str], seeds: list[int], options: dict[str, Any], again: dict[str, Any], batch: int | None
) -> None:
    methods = ["plain", ("ela", options), ("ela", again)]
    planned = plan(prompts, seeds, methods, batch=batch)
    keys = [unit.key for unit in planned]
    assert len(set(keys)) == len(keys)
    turned = [(name, dict(reversed(some.items()))) for name, some in (("ela", again), ("ela", options))]
    assert {unit.key for unit in plan(prompts[::-1], seeds[::-1], ["plain", *turned], batch=batch)} == set(keys)
    variants = 1 + len({canonical_options("ela", options), canonical_options("ela", again)})
    images = [(unit.prompt, unit.method, unit.options, seed) for unit in planned for seed in unit.seeds]
    assert len(images) == len(set(images)) == len(set(prompts)) * len(seeds) * variants


def test_settings_that_are_not_given_leave_the_key_as_in_sweeps_without_them() -> None:
    (unit,) = plan(["a cat and a lion"], [1, 3], ["plain"])
    assert unit.key == "9490ebfc7ab5d766"
    others = {"negative_prompt": "a dog", "height": 64, "width": 64, "scheduler": "X", "lora": "y", "variant": "fp16"}
    keys = {plan(["a cat and a lion"], [1, 3], ["plain"], **{name: value})[0].key for name, value in others.items()}
    assert len(keys | {unit.key}) == 1 + len(others)


def test_a_unit_is_generated_with_its_negative_prompt_size_and_scheduler() -> None:
    given = {"negative_prompt": "a dog", "height": 64, "scheduler": "EulerDiscreteScheduler"}
    (plain,), (other,) = (
        generate_unit(plan(["a [cat] and a [lion]"], [1], ["plain"], steps=2, **some)[0], keep_images=True)
        for some in ({}, given)
    )
    sizes = [Image.open(io.BytesIO(row["png"])).size for row in (plain, other)]
    assert sizes == [(128, 128), (128, 64)]
    assert {name: other[name] for name in given} == given
    assert plain["height"] is None


def test_a_unit_contains_all_options_of_its_method() -> None:
    (unit,) = plan(["a cat"], [1], [("ela", {"anchor.guided": 1, "regions": [(0, 0, 0.5, 1)]})])
    assert unit.guidance() == ELA(anchor=LatentStep(guided=1.0), regions=[(0, 0, 0.5, 1)])
    assert json.loads(unit.options)["anchor.step_size"] == ELA().anchor.step_size
    assert plan(["a cat"], [1], ["plain"])[0].guidance() is None


def test_a_unit_may_guide_only_images_that_are_likely_to_fail() -> None:
    always, sometimes = plan(["a cat"], [1], ["ela", ("ela", {"guide_above": 0.25})])
    assert always.condition() is None
    assert sometimes.condition() == {"above": 0.25, "after": 0.2}
    assert always.guidance() == sometimes.guidance() == ELA()
    assert always.key != sometimes.key
    for options, said in (
        ({"guide_above": 2}, "guide_above=2: must be a number from 0 to 1"),
        ({"guide_after": 0.3}, "too"),
        ({"guide_above": 0.2, "guide_after": 0.25}, "guide_after=0.25: .* 0.1, 0.2, 0.3, 0.5, 1.0"),
    ):
        with pytest.raises(SettingError, match=said):
            canonical_options("ela", options)


def test_invalid_plans_are_refused() -> None:
    for method, options, said in (
        ("boxdiff", {}, "boxdiff needs one region per entity.*ela"),
        ("magic", {}, "'magic'.*plain, ela"),
        ("plain", {"step_size": 1}, "plain has no options.*step_size"),
        ("ela", {"step_size": 1}, "'step_size'.*Did you mean 'anchor.step_size'"),
        ("ela", {"anchor.step_size": -1}, "step_size=-1"),
        ("ela", {"anchor.guided": "often"}, "guided='often'"),
        ("ela", {"localize.threshold": float("nan")}, "threshold"),
    ):
        with pytest.raises(SettingError, match=said):
            plan(["a cat"], [1], [(method, options)])
    for wrong, said in (
        ({"prompts": []}, "no prompt"),
        ({"seeds": []}, "seeds="),
        ({"seeds": [1, 1]}, "seeds=1 is given more than once"),
        ({"seeds": 4}, r"seeds=4: must be a list of seeds\. Use range\(4\)"),
        ({"methods": []}, "No method is given"),
        ({"steps": 0}, "steps=0"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1"),
        ({"batch": 0}, "batch=0"),
    ):
        with pytest.raises(SettingError, match=said):
            plan(**{"prompts": ["a cat"], "seeds": [1], **wrong})


# --- running ------------------------------------------------------------------------------------------------


def test_a_sweep_is_resumed(tmp_path: Path, thread: Executor) -> None:
    first, second, progress = Remembering(), Remembering(), []
    outcome = run(units()[:4], tmp_path, thread, generate=first)
    assert (outcome.earlier, outcome.generated, outcome.failed) == (0, 4, {})
    settings = (tmp_path / "sweep.json").read_bytes()
    outcome = run(units(), tmp_path, thread, generate=second, on_progress=lambda *done: progress.append(done))
    assert (outcome.earlier, outcome.generated) == (4, 6)
    assert not set(first.generated) & set(second.generated)
    assert progress == [(8 + 2 * i, 20) for i in range(7)]
    assert run(units(), tmp_path, thread, generate=second).generated == 0
    found = table(tmp_path)
    assert list(found.columns) == store.SCHEMA.names
    assert len(found) == 20
    assert found["bleed"].isna().all()
    # other settings join the folder, and mix with nothing
    assert run(units(steps=7), tmp_path, thread, generate=pretend).generated == 10
    assert (tmp_path / "sweep.json").read_bytes() == settings
    assert json.loads(settings)["methods"][0] == {"method": "plain", "options": {}}
    assert table(tmp_path)["steps"].value_counts(dropna=False).tolist() == [20, 20]
    # an image that two units have in common counts once
    run(plan(PROMPTS, [3], ["plain"]), tmp_path, thread, generate=pretend)
    assert len(table(tmp_path)) == 40


def test_the_table_does_not_depend_on_the_order_of_generation(tmp_path: Path, thread: Executor) -> None:
    run(units(), tmp_path / "a", thread, generate=pretend)
    run(units()[::-1], tmp_path / "b", thread, generate=pretend)
    assert as_bytes(tmp_path / "a", tmp_path) == as_bytes(tmp_path / "b", tmp_path)
    assert (table(tmp_path / "a")["seconds"] != table(tmp_path / "b")["seconds"]).all()


def test_a_unit_that_fails_is_reported_and_tried_again(tmp_path: Path, thread: Executor) -> None:
    class Unlucky(Exception):
        def __init__(self, one: int, other: int) -> None:  # cannot be unpickled
            super().__init__(f"no lions {one + other}")

    def unlucky(unit: Unit) -> list[dict[str, Any]]:
        if "lion" in unit.prompt:
            raise Unlucky(1, 2)
        return pretend(unit)[:1] if "bear" in unit.prompt else pretend(unit)

    outcome = run(units(), tmp_path, thread, generate=unlucky)
    assert outcome.generated == 6
    assert sorted(outcome.failed.values())[-2:] == ["Unlucky: no lions 3"] * 2
    assert "one row per seed" in min(outcome.failed.values())
    assert store.failures(tmp_path) == outcome.failed
    note = json.loads((tmp_path / "failed" / f"{units()[4].key}.json").read_text())
    assert note["prompt"] == "a cat and a lion"
    assert "Traceback" in note["details"]
    assert len(table(tmp_path)) == 12
    again = run(units(), tmp_path, thread, generate=pretend)
    assert (again.earlier, again.generated, again.failed) == (6, 4, {})
    assert not store.failures(tmp_path)
    assert len(table(tmp_path)) == 20


class Brittle:
    """Stands in for a pool: a function that returns None kills its worker and all units that are running."""

    def __init__(self, width: int) -> None:
        self.width, self.pools = width, 1
        self.waiting: list[tuple[Future[Any], Any, Unit]] = []
        self.together: list[list[str]] = []

    def submit(self, call: Any, unit: Unit) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, call, unit))
        return future

    def generate(self) -> None:
        waiting, self.waiting = self.waiting, []
        self.together.append([unit.key for *_, unit in waiting])
        dead = any(call.args[0](unit) is None for _, call, unit in waiting)  # the function that generates a unit
        for future, call, unit in waiting:
            if dead:
                future.set_exception(BrokenProcessPool("dead"))
            else:
                future.set_result(call(unit))

    def replace(self) -> None:
        self.pools += 1

    def __enter__(self) -> Brittle:
        return self

    def __exit__(self, *error: object) -> None: ...


@pytest.fixture
def brittle(monkeypatch: pytest.MonkeyPatch) -> Brittle:
    """The pool of the next sweep; it generates units when the sweep waits for it."""
    pool = Brittle(3)

    def generate_first(running: Any, return_when: str) -> None:
        pool.generate()
        assert all(future.done() for future in running)

    monkeypatch.setattr(sweep, "Pool", lambda workers, gpus=(): pool)
    monkeypatch.setattr(sweep, "wait", generate_first)
    return pool


def test_a_unit_that_kills_its_workers_is_given_up_and_no_other(tmp_path: Path, brittle: Brittle) -> None:
    fatal = units()[4]
    outcome = run(units(), tmp_path, generate=lambda unit: None if unit == fatal else pretend(unit))  # type: ignore
    assert list(outcome.failed) == [fatal.key]
    assert "died 4 times" in outcome.failed[fatal.key]
    assert outcome.generated == 9
    deadly = [keys for keys in brittle.together if fatal.key in keys]
    assert [len(keys) for keys in deadly] == [3, 1, 1, 1]
    assert brittle.pools == 5


def test_workers_that_always_die_end_the_sweep(tmp_path: Path, brittle: Brittle) -> None:
    with pytest.raises(OutputError, match=r"2 units in a row.*__main__"):
        run(units(), tmp_path, generate=lambda unit: None)  # type: ignore


def test_finished_units_survive_an_executor_that_breaks(tmp_path: Path) -> None:
    class Breaks(ThreadPoolExecutor):
        def submit(self, call: Any, /, *arguments: Any) -> Future[Any]:
            if "lion" in arguments[0].prompt:
                raise BrokenProcessPool
            return super().submit(call, *arguments)

    with Breaks(1) as pool, pytest.raises(OutputError, match=r"Breaks died.*new executor"):
        run(units(), tmp_path, pool, generate=pretend)
    assert len(table(tmp_path)) == 8


def test_empty_unwritable_and_damaged_folders_are_refused(tmp_path: Path, thread: Executor) -> None:
    with pytest.raises(OutputError, match=r"no finished unit.*elakit sweep run"):
        table(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        run(units(), tmp_path / "file", thread, generate=pretend)
    with pytest.raises(SettingError, match="workers=0"):
        run(units(), tmp_path, workers=0)
    run(units(), tmp_path, thread, generate=pretend)
    broken = tmp_path / "units" / f"{units()[0].key}.parquet"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(OutputError, match=f"{broken.name}.*Delete"):
        table(tmp_path)


def test_process_a_worker_that_dies_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELAKIT_TEST_MARK", str(tmp_path / "mark"))
    outcome = run(units(), tmp_path / "sweep", workers=1, generate=die_once)
    assert (tmp_path / "mark").exists()
    assert (outcome.generated, outcome.failed) == (10, {})
    assert len(table(tmp_path / "sweep")) == 20


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_process_a_killed_sweep_can_be_resumed(tmp_path: Path, thread: Executor, stop: int) -> None:
    killed, whole, lock = tmp_path / "killed", tmp_path / "whole", tmp_path / "lock"
    # a shell that runs tests in the background has them ignore Ctrl-C, and so does what they start
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    # units are read from a file, because planning them imports torch
    code = (
        f"{heed}import pickle, sys; from pathlib import Path; from sweep_units import stall; "
        "from elakit.sweep import run; "
        "run(pickle.loads(Path(sys.argv[2]).read_bytes()), sys.argv[1], workers=1, generate=stall)"
    )
    (tmp_path / "units").write_bytes(pickle.dumps(units()))
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "ELAKIT_TEST_LOCK": str(lock), "PYTHONPATH": path}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(killed), str(tmp_path / "units")],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        # the worker is in the middle of a lion, and four units are kept
        while not (lock.exists() and lock.read_text() == "held" and len(list(killed.glob("units/*.parquet"))) == 4):
            with pytest.raises(subprocess.TimeoutExpired):  # it must not end by itself
                process.wait(0.2)
        if stop == signal.SIGINT:
            os.killpg(process.pid, stop)  # Ctrl-C reaches the workers too
        else:
            process.send_signal(stop)
        assert process.wait() != 0  # of Ctrl-C Python makes the signal or 1
    finally:
        process.kill()
        process.wait()
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # comes back once the worker is gone too
    recorder = Remembering()
    run(units(), killed, thread, generate=recorder)
    assert len(recorder.generated) == 6
    run(units(), whole, thread, generate=pretend)
    assert as_bytes(killed, tmp_path) == as_bytes(whole, tmp_path)
    assert not [path for path in killed.rglob(".*") if path.is_file()]


def test_process_dask_workers_generate_and_may_be_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed")
    import dask

    monkeypatch.setenv("ELAKIT_TEST_MARK", str(tmp_path / "mark"))
    settings = {"distributed.comm.timeouts.connect": "300s", "distributed.scheduler.worker-ttl": "600s"}
    settings["temporary-directory"] = str(tmp_path / "dask")
    with (
        dask.config.set(settings),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        outcome = run(units(), tmp_path / "sweep", client.get_executor(), generate=die_once)
    assert (tmp_path / "mark").exists()
    assert (outcome.generated, outcome.failed) == (10, {})
    with ThreadPoolExecutor(1) as thread:
        run(units(), tmp_path / "whole", thread, generate=pretend)
    assert as_bytes(tmp_path / "sweep", tmp_path) == as_bytes(tmp_path / "whole", tmp_path)


def test_a_real_pipeline_is_swept(tmp_path: Path, thread: Executor) -> None:
    from tiny import tiny_pipeline

    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    prompts = ["a [red car] and a [blue bird]", "a [cat] and a [dog]"]
    # every image is guided, at every step and whatever its loss is
    always = ("ela", {"anchor.start": 0, "anchor.guided": 1, "anchor.needed": None, "anchor.enough": None})
    planned = plan({"mine": prompts}, [1, 3], ["plain", always], model=str(tmp_path / "tiny"), steps=2, device="cpu")
    outcome = run(planned, tmp_path / "sweep", thread)
    assert outcome.failed == {}
    found = table(tmp_path / "sweep")
    assert len(found) == 2 * 2 * 2
    assert (found["suite"] == "mine").all()
    assert (found["steps"] == 2).all()
    assert found["success"].isna().all()  # the built-in judge does not know this model's images
    assert found[["bleed", "intrusion", "spill", "ruzicka"]].notna().all(axis=None)
    assert (found["attribute_bleed"].notna() == found["prompt"].str.contains("car")).all()
    guided = found["method"] == "ela"
    assert (found["loss_first"].notna() == guided).all()
    assert (found["seconds"] > 0).all()
    both = found.set_index(["prompt", "seed", "method"])["bleed"].unstack()
    assert (both["plain"] != both["ela"]).all()
    text = report.write(tmp_path / "sweep").with_suffix(".md").read_text(encoding="utf-8")
    assert "| ELA | 4 | – |" in text


# --- summing up ---------------------------------------------------------------------------------------------


def images(method: str, right: list[int], **columns: Any) -> pd.DataFrame:
    """A table of one seed: prompt i is right or wrong."""
    return pd.DataFrame(
        {"prompt": [f"prompt {i}" for i in range(len(right))], "seed": 1, "method": method, "success": right, **columns}
    )


def test_the_summary_of_a_table_with_a_known_answer() -> None:
    frame = pd.concat(
        [
            images("plain", [0] * 8 + [1] * 4, neglect=[1] * 6 + [0] * 6, seconds=2.0, score=0.5),
            # fixes six of eight, breaks one of four
            images("good", [1] * 6 + [0] * 2 + [0] + [1] * 3, neglect=0, seconds=3.0, score=0.4),
            images("same", [0] * 8 + [1] * 4, neglect=[1] * 6 + [0] * 6, seconds=2.0, score=0.5),
        ]
    )
    found = summary(frame)
    assert found.index.tolist() == ["plain", "good", "same"]
    good = found.loc["good"]
    assert good[["images", "prompts", "fixed_count", "broken_count"]].tolist() == [12, 12, 6, 1]
    assert good[["success", "neglect", "fixed", "broken"]].tolist() == [0.75, 0, 0.75, 0.25]
    assert good[["score", "seconds"]].tolist() == pytest.approx([0.8, 1.5])
    # 7 that changed, at most 1 of them for the worse: 2 * (1 + 7) / 2^7
    assert good["p"] == pytest.approx(0.125)
    assert good["p_holm"] == pytest.approx(0.25)
    assert found.loc["same", "p"] == found.loc["same", "p_holm"] == 1
    # twelve coins of .75 have a standard deviation of .125
    assert good["success_low"] == pytest.approx(0.5, abs=0.01)
    assert good["success_high"] == pytest.approx(1.0, abs=0.09)
    assert found.loc["plain", ["neglect", "seconds", "seconds_low", "seconds_high"]].tolist() == [0.5, 1, 1, 1]
    assert found.loc["plain", ["fixed", "broken", "p", "p_holm"]].isna().all()
    pd.testing.assert_frame_equal(found, summary(frame.sample(frac=1, random_state=0)))


def test_intervals_resample_prompts_with_all_their_images() -> None:
    # four prompts, each right with all 25 seeds or with none: there is no more to tell from than with one seed
    one = images("plain", [1, 1, 0, 0])
    many = pd.concat([one.assign(seed=seed) for seed in range(25)])
    ends = ["success", "success_low", "success_high"]
    assert summary(many).loc["plain", ends].tolist() == summary(one).loc["plain", ends].tolist() == [0.5, 0, 1]


def test_options_and_settings_have_rows_of_their_own_with_their_own_plain_images() -> None:
    frame = pd.concat(
        [
            images("plain", [0, 0], steps=10, options="{}"),
            images("plain", [1, 1], steps=20, options="{}"),
            images("ela", [1, 1], steps=10, options='{"anchor.decay":0.5,"anchor.step_size":0.1}'),
            images("ela", [0, 1], steps=10, options='{"anchor.decay":0.5,"anchor.step_size":0.2}'),
            images("ela", [0, 1], steps=20, options='{"anchor.decay":0.5,"anchor.step_size":0.1}'),
        ]
    )
    found = summary(frame)
    assert found.index.tolist() == [
        "plain, steps 10",
        "plain, steps 20",
        "ela(anchor.step_size=0.1), steps 10",
        "ela(anchor.step_size=0.1), steps 20",
        "ela(anchor.step_size=0.2), steps 10",
    ]
    assert found["fixed_count"].tolist() == [0, 0, 2, 0, 1]
    assert found["broken_count"].tolist() == [0, 0, 0, 1, 0]


def test_images_are_compared_with_plain_ones_of_the_same_negative_prompt_and_size() -> None:
    given = {"steps": 10, "negative_prompt": "blurry", "height": 64}
    frame = pd.concat(
        [images("plain", [0, 0], steps=10), images("plain", [1, 1], **given), images("ela", [0, 1], **given)]
    )
    found = summary(frame)
    assert found.index.tolist() == [
        "plain, negative prompt blurry, height 64",
        "plain, negative prompt default, height default",
        "ela, negative prompt blurry, height 64",
    ]
    assert found["broken_count"].tolist() == [0, 0, 1]


def test_unjudged_images_and_missing_plain_images_give_missing_values() -> None:
    alone = summary(images("ela", [1, 0]))
    assert alone.loc["ela", "success"] == 0.5
    assert alone.loc["ela", ["fixed", "broken", "seconds", "p", "p_holm"]].isna().all()
    frame = pd.concat([images("plain", [1, 0]), images("ela", [1, 0])]).astype({"success": object})
    frame["success"] = None
    unjudged = summary(frame)
    assert unjudged[["success", "success_low", "fixed", "p"]].isna().all(axis=None)
    assert set(figures(frame)) == {"success", "failures", "time"}


def test_labels_of_coinciding_points_do_not_overlap() -> None:
    same = [images(name, [1, 0, 1, 1], seconds=2.0) for name in ("plain", "ela", "syngen", "conform")]
    (points,) = figures(pd.concat(same))["time"].data
    assert len(set(points.textposition)) == 3  # a label to the right would leave the figure


def test_the_report_is_self_contained_and_escaped(tmp_path: Path, thread: Executor) -> None:
    nasty = "<script>alert(1)</script> | `x`"
    folder, out = tmp_path / "sweep", tmp_path / "page.html"
    planned = plan({nasty: PROMPTS[:2], "other": PROMPTS[2:]}, [1, 3])
    run(planned[1:], folder, thread, generate=pretend)
    store.note_failure(folder, planned[0], "Error: no")
    assert report.write(folder, out) == out
    page, text = out.read_bytes().decode(), out.with_suffix(".md").read_bytes().decode()
    bundle = get_plotlyjs()
    assert page.count(bundle) == 1
    page = page.replace(bundle, "")
    assert "<script>alert" not in page + text
    assert "&lt;script&gt;alert" in page
    assert page.count("Plotly.newPlot(") == 3
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert "1 failed unit is not included" in page
    assert "| ELA |" in text
    assert '"ELA"' in page  # in the figures
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {12}
    assert len(rows) == 3 * 3  # a heading, plain and ela, over all prompts and for either suite
    listed = pd.read_csv(out.with_suffix(".csv"))
    assert listed["method"].tolist() == ["plain", "ela"] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.csv", "page.html", "page.md", "sweep"]
    with pytest.raises(OutputError, match="there is no folder"):
        report.write(folder, tmp_path / "no" / "page.html")


# --- command line -------------------------------------------------------------------------------------------


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    from elakit.cli import main

    monkeypatch.setattr(sys, "argv", ["elakit", "sweep", *words])
    with pytest.raises(SystemExit) as leaving:
        main()
    return int(leaving.value.code or 0)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, thread: Executor) -> Callable[[Any], None]:
    """Makes the command line generate with a function of the test, in a thread."""

    def use(make: Any) -> None:
        def instead(planned: list[Unit], folder: Path, executor: None, **options: Any) -> Any:
            assert executor is None
            return run(planned, folder, thread, generate=make, on_progress=options["on_progress"])

        monkeypatch.setattr("elakit.sweep.sweep.run", instead)

    return use


def test_the_command_line_runs_and_reports_a_sweep(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    pretended: Callable[[Any], None],
) -> None:
    pretended(pretend)
    out = tmp_path / "x"
    words = ["run", "--suite", "animals", "--limit", "3", "--set", "ela.anchor.step_size=0.2"]
    words += ["--set", "ela.anchor.gradient=raw"]
    assert call(monkeypatch, *words, "--out", str(out)) == 0
    printed = capsys.readouterr()
    assert f"12 of 12 images are in {out}" in printed.out
    assert "12/12" in printed.err
    found = table(out)
    assert set(found["prompt"]) == {suite("animals")[i] for i in (0, 32, 65)}
    options = json.loads(found.loc[found["method"] == "ela", "options"].iloc[0])
    assert (options["anchor.step_size"], options["anchor.gradient"]) == (0.2, "raw")
    assert call(monkeypatch, "report", str(out)) == 0
    printed = capsys.readouterr()
    assert printed.out.strip().endswith(f"Report: {out / 'report.html'}")
    assert "| ELA | 6 |" in printed.out


def test_ctrl_c_prints_what_is_finished_and_how_to_resume(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    pretended: Callable[[Any], None],
) -> None:
    def interrupted(unit: Unit) -> list[dict[str, Any]]:
        if "frog" in unit.prompt:
            raise KeyboardInterrupt
        return pretend(unit)

    pretended(interrupted)
    prompts = tmp_path / "mine.txt"
    prompts.write_text("\n".join(PROMPTS))
    assert call(monkeypatch, "run", "--prompts", str(prompts), "--out", str(tmp_path / "x")) == 130
    error = capsys.readouterr().err
    assert "4 of 20 images are in" in error
    assert f"elakit sweep run --prompts {prompts} --out {tmp_path / 'x'}" in error
    assert "Traceback" not in error


def test_failed_units_are_reported(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    pretended: Callable[[Any], None],
) -> None:
    def fail(unit: Unit) -> list[dict[str, Any]]:
        raise SettingError("out of paint.")

    pretended(fail)
    assert call(monkeypatch, "run", "--limit", "2", "--out", str(tmp_path)) == 1
    error = capsys.readouterr().err
    assert "4 units failed" in error
    assert "SettingError: out of paint." in error


def test_suites_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "suites") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in SUITES)
    assert all(name in printed and benchmark.source in printed for name, benchmark in BENCHMARKS.items())


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--suite", "colors"], ["colors", "same-color"]),
        (["--prompts", "none.txt"], ["none.txt", "cannot be read"]),
        (["--seeds", "1;3"], ["--seeds 1;3", "1,3"]),
        (["--seeds", "1,1"], ["seeds=1", "more than once"]),
        (["--seeds", "3-1"], ["--seeds 3-1", "ends before it starts"]),
        (["--methods", "plain,magic"], ["'magic'", "plain, ela"]),
        (["--set", "step_size=1"], ["--set step_size=1", "METHOD.OPTION=VALUE"]),
        (["--set", "ela.step_size=1"], ["'step_size'", "anchor.step_size"]),
        (["--set", "ela.anchor.guided=2"], ["guided=2", "from 0 to 1"]),
        (["--methods", "plain", "--set", "ela.anchor.guided=1"], ["'ela'", "--methods plain"]),
        (["--set", "ela.anchor.guided=0", "--set", "ela.anchor.guided=1"], ["set twice"]),
        (["--limit", "0"], ["limit=0"]),
        (["--steps", "0"], ["steps=0"]),
        (["--model", "image-wold"], ["--model image-wold", "picture-world"]),
        (["--detector", "owl"], ["--detector owl", "hub id"]),
        (["--device", "tpu9"], ["tpu9"]),
        (["--dtype", "int8"], ["int8", "float32"]),
        (["--dask", "tcp://127.0.0.1:1"], ["pip install 'elakit[dask]'"]),
        (["--workers", "0"], ["workers=0"]),
        (["--height", "0"], ["height=0"]),
        (["--scheduler", "Eular"], ["scheduler='Eular'", "EulerDiscreteScheduler"]),
        (["--lora", "no-weights"], ["--lora no-weights", "hub id"]),
    ],
)
def test_wrong_input_is_refused_before_any_generation(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: list[str],
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "distributed", None)  # as where it is not installed
    assert call(monkeypatch, "run", *words, "--out", "x") == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err + printed.out
    assert all(part in printed.err for part in parts), printed.err
    assert not list(tmp_path.iterdir())


def test_a_report_without_finished_units_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(monkeypatch, "report", str(tmp_path / "none")) == 2
    assert "contains no finished unit" in capsys.readouterr().err
