"""The server beside the run: it draws one cell's completions while the next adapter is trained, and nothing gets lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastconv.engine.stack import Slot
from fastconv.engine.vllm.sampler import VllmSampler
from fastconv.errors import Interrupted
from fastconv.experiment.graph import CellPlan, Graph
from fastconv.recipe import Recipe, SamplingSettings
from fastconv.run.run import Gatekeeper, run_recipe
from fastconv.run.sampling import is_sampled, sampling_requests
from fastconv.run.status import cell_stages
from fastconv.store.ledger import Store
from tests.engine_kit import random_adapter, tiny_stack
from tests.loop_kit import Heard, records, run_tiny, running_slots, tiny_recipe, until
from tests.serve_kit import Fake, fake, served

__all__ = ["fake"]

COLD = SamplingSettings(max_new_tok=4)


def test_a_prompt_that_is_drawn_from_often_is_rendered_once(tiny_qwen: Path) -> None:
    recipe = tiny_recipe(tiny_qwen, eval__samples_per_prompt=3)
    stage = next(one for one in Graph(recipe).stages() if one.kind == "eval" and is_sampled(one))
    asked: list[str] = []
    tokenizer: Any = SimpleNamespace(prompt_ids=lambda system, user: asked.append(user) or [len(user)])
    requests = sampling_requests(stage, tokenizer)
    texts = [user for _, user in stage.work["items"]]
    assert asked == list(dict.fromkeys(texts))
    assert [user for _, user, _ in requests.items] == [user for user in texts for _ in range(3)]
    assert requests.prompts == tuple((len(user),) for _, user, _ in requests.items)


def while_training(recipe: Recipe, workspace: Path, act: Callable[[str, list[str]], None]) -> Heard:
    """A watcher that calls `act` at each training step with its slot and the slots that the server draws meanwhile."""
    drawn = {stage.key: stage.slot for stage in Graph(recipe).stages() if is_sampled(stage)}

    def on_progress(progress: Any) -> None:
        if progress.unit == "steps":
            act(progress.slot, [drawn[key] for key in running_slots(workspace) if key in drawn])

    return Heard(on_progress)


def stopped_beside(recipe: Recipe, workspace: Path, fake: Fake, *, once: Callable[[], bool] | None = None) -> list[str]:
    """Run until the server draws while something is trained, and stop there; what it was drawing then.

    From the convergence on the server answers nothing. With `once` it answers again when something is drawn beside a
    training, and the stop waits until that holds; without, it never does in this run.
    """
    stop, drawn = threading.Event(), []

    def act(slot: str, under_way: list[str]) -> None:
        if slot.startswith("snapshot/"):
            fake.hold.touch()
        elif under_way and not drawn:
            drawn.extend(under_way)
            if once is not None:
                fake.hold.unlink()
                until(once)
            stop.set()

    with pytest.raises(Interrupted):
        run_recipe(recipe, workspace, while_training(recipe, workspace, act), stop=stop)
    fake.hold.unlink(missing_ok=True)
    return drawn


def test_the_server_draws_one_cell_while_the_next_is_trained(tiny_qwen: Path, tmp_path: Path, fake: Fake) -> None:
    recipe = served(tiny_qwen)
    beside: dict[str, set[str]] = {}
    of_e1 = {f"eval/villain/source/e1/refusal/{probe}/s42" for probe in ("assistant", "villain", "librarian")}

    def act(slot: str, drawn: list[str]) -> None:
        beside.setdefault(slot, set()).update(drawn)
        if slot.startswith("snapshot/"):
            fake.hold.touch()  # what is drawn next is answered only once the next training has begun
        elif drawn:
            fake.hold.unlink(missing_ok=True)

    heard = while_training(recipe, tmp_path, act)
    finished = run_recipe(recipe, tmp_path, heard)
    assert of_e1 == beside["behavior/villain/source/e1/refusal/excluded/s42"]
    # Convergence is the dear part: everything drawn before it is in, so that gates can stop it.
    assert beside["snapshot/villain/source"] == set()
    assert heard.drawn
    assert set(heard.drawn[0].slots) <= set(heard.stages)
    assert not finished.failed
    assert running_slots(tmp_path) == {}
    assert len(records(recipe, tmp_path)) == heard.begun[0][0]


def test_a_cell_goes_to_the_gates_once_its_completions_are_in(
    tiny_qwen: Path, tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.script(latency_s=0.2)
    asked: dict[str, bool] = {}
    real = Gatekeeper.after

    def after(self: Gatekeeper, plan: CellPlan) -> None:
        store = Store.open(tmp_path, create=False)
        asked[plan.cell.label] = all(store.record(part.key) is not None for part in cell_stages(plan))
        store.close()
        real(self, plan)

    monkeypatch.setattr(Gatekeeper, "after", after)
    run_tiny(served(tiny_qwen), tmp_path)
    assert len(asked) == 6
    assert all(asked.values())


def test_what_was_drawn_is_kept_when_the_user_stops(
    tiny_qwen: Path, tmp_path: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, drawings, begin = served(tiny_qwen), [], VllmSampler.begin

    def noted(self: VllmSampler, *given: Any) -> Any:
        drawings.append(begin(self, *given))
        return drawings[-1]

    monkeypatch.setattr(VllmSampler, "begin", noted)
    drawn = stopped_beside(recipe, tmp_path, fake, once=lambda: all(one.done for one in drawings))
    assert drawn
    assert set(drawn) <= set(records(recipe, tmp_path))
    assert running_slots(tmp_path) == {}
    _, heard = run_tiny(recipe, tmp_path)
    assert not set(drawn) & set(heard.stages)


@pytest.mark.slow
def test_what_is_still_drawn_is_dropped_when_the_user_stops(tiny_qwen: Path, tmp_path: Path, fake: Fake) -> None:
    """The server has not answered and may never: the run ends all the same, and the next one draws it again."""
    recipe = served(tiny_qwen)
    drawn = stopped_beside(recipe, tmp_path, fake)
    assert drawn
    assert not set(drawn) & set(records(recipe, tmp_path))
    assert running_slots(tmp_path) == {}
    finished, heard = run_tiny(recipe, tmp_path)
    assert set(drawn) <= set(heard.stages)
    assert not finished.failed


def test_a_stack_gives_way_once_everything_under_it_is_drawn(tiny_qwen: Path, fake: Fake) -> None:
    stack = tiny_stack(tiny_qwen)
    server = fake.server(model=tiny_qwen)
    sampler = VllmSampler(server, stack)
    prompts, waited = [list(range(65, 70))] * 4, []

    def answer() -> None:
        waited.append(True)
        fake.hold.unlink(missing_ok=True)

    fake.hold.touch()
    try:
        drawings = []
        for seed in (1, 2):
            with stack.live(Slot(frozen=(random_adapter(stack, seed, size=0.3),))):
                drawings += [sampler.begin(prompts, range(i, i + 4), COLD, answer) for i in (0, 4)]
        assert waited
        assert [drawing.done for drawing in drawings[:2]] == [True, True]
        assert all(len(drawing.result()) == 4 for drawing in drawings)
    finally:
        sampler.close()
        server.close()
    (unload,) = fake.asked("/v1/unload_lora_adapter")
    assert unload["in_flight"] == 0
    assert (
        max(request["in_flight"] for request in fake.asked("/v1/completions")) > 4
    )  # both drawings of a stack at once


def test_drawings_share_the_time_that_passes(tiny_qwen: Path, fake: Fake) -> None:
    fake.script(latency_s=0.3)
    server = fake.server(model=tiny_qwen)
    sampler = VllmSampler(server, tiny_stack(tiny_qwen))
    try:
        began = time.monotonic()
        drawings = [sampler.begin([[65, 66]] * 3, range(i, i + 3), COLD) for i in range(6)]
        for drawing in drawings:
            drawing.result()
        passed_s = time.monotonic() - began
    finally:
        sampler.close()
        server.close()
    # Each by itself took nearly all of it: not shared, they would add up to several times as much.
    assert passed_s / 2 < sum(one.seconds for one in drawings) <= passed_s
    assert sum(one.n_tok for one in drawings) > 18
