"""On a CUDA device: the same numbers as on the CPU, and a training step in which the host never waits."""

from __future__ import annotations

import importlib.util
import math
from contextlib import closing
from pathlib import Path

import pytest
import torch

from fastconv.bench import bench, kernels
from fastconv.chat import SystemTurn
from fastconv.engine import train as loop
from fastconv.engine.attention import Padded
from fastconv.engine.cuda_graph import CapturedSteps, StepTimes
from fastconv.engine.decode import sample_tokens
from fastconv.engine.generate import sample
from fastconv.engine.kernels.lora import StackedKernel
from fastconv.engine.locate import locate
from fastconv.engine.model import load_base, pack
from fastconv.engine.score import LetterItem, hidden_fp32, score_letters
from fastconv.engine.stack import Slot, Stack
from fastconv.engine.train import Hooks, Job, Trainee, save_state, start, train, weighted_cross_entropy
from fastconv.engine.vllm.sampler import VllmSampler
from fastconv.engine.vllm.server import launch
from fastconv.recipe import LoraSettings, ModelSettings, SamplingSettings
from tests.engine.draw_reference import nucleus
from tests.engine_kit import SNAPSHOT, ragged_rows, random_adapter, train_settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def stack_on(device: str, folder: Path, dtype: str = "float32") -> Stack:
    return Stack(
        load_base(
            ModelSettings.model_validate({"id": str(folder), "device": device, "dtype": dtype, "engine": "torch"})
        ),
        SNAPSHOT,
    )


def trained(stack: Stack, dropout: float) -> Trainee:
    """A few steps above a frozen adapter."""
    frozen = stack.take(random_adapter(stack, 1))
    job = Job("job", ragged_rows(12), train_settings(dropout=dropout), ("gpu",), (frozen,))
    trainee = start(stack, job)
    train(stack, [trainee], Hooks())
    return trainee


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_training_gives_the_cpus_losses_and_weights(tiny_qwen: Path, dropout: float) -> None:
    on_cpu, on_gpu = (trained(stack_on(device, tiny_qwen), dropout) for device in ("cpu", "cuda"))
    assert on_gpu.losses.cpu().tolist() == pytest.approx(on_cpu.losses.tolist(), abs=1e-4)
    assert torch.allclose(on_gpu.adapter.flat.cpu(), on_cpu.adapter.flat, atol=1e-3)


def graphs_of(stack: Stack) -> CapturedSteps:
    return stack.base.kept["steps"]


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_captured_steps_are_the_plain_ones(
    tiny_qwen: Path, dtype: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepTimes, "worth_capturing", lambda *_: True)
    monkeypatch.setattr(CapturedSteps, "end_of_trainees", lambda steps: None)
    stack = stack_on("cuda", tiny_qwen, dtype)
    captured = trained(stack, dropout)
    assert len(graphs_of(stack))
    monkeypatch.setattr(loop, "captured_steps", lambda stack: None)
    plain = trained(stack_on("cuda", tiny_qwen, dtype), dropout)
    near = 1e-4 if dtype == "float32" else 3e-2
    assert captured.losses.tolist() == pytest.approx(plain.losses.tolist(), abs=near)


def test_a_graph_of_one_adapter_trains_the_next_to_the_same_bits(
    tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other weights above another frozen adapter, with no capture of their own, against the same steps launched. Between
    them letters were scored in fp32, layer by layer: had the weights moved by it, the graphs would read what lies there now."""
    weights, n_graphs = [], []
    for worth in (True, False):
        monkeypatch.setattr(StepTimes, "worth_capturing", lambda *_, worth=worth: worth)
        stack = stack_on("cuda", tiny_qwen, "bfloat16")
        for _ in range(2):  # every size of these rows in this order is met twice
            assert trained(stack, 0.05).step
        n_graphs.append(len(graphs_of(stack)))
        hidden_fp32(stack.base, *pack([[1, 2, 3]], stack.base))
        assert torch.full((1 << 22,), math.nan, device="cuda").isnan().all(), "what was freed is written over"
        below = (stack.take(random_adapter(stack, 7)),)
        second = start(stack, Job("next", ragged_rows(12), train_settings(dropout=0.05), ("gpu",), below))
        train(stack, [second], Hooks())
        assert len(graphs_of(stack)) == n_graphs[-1], "the next adapter meets the same sizes"
        weights.append(second.adapter.flat)
    assert n_graphs[0]
    assert not n_graphs[1]
    assert torch.equal(*weights)


def test_a_group_is_captured_and_trains_as_one_after_another(tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepTimes, "worth_capturing", lambda *_: True)
    stack = stack_on("cuda", tiny_qwen, "bfloat16")
    jobs = [Job(f"{i}", ragged_rows(12, seed=i), train_settings(dropout=0.05, epochs=4), ("gpu", i)) for i in range(3)]
    together, alone = ([start(stack, job) for job in jobs] for _ in range(2))
    train(stack, together, Hooks())
    n_graphs = len(graphs_of(stack))
    assert n_graphs
    for trainee in alone:
        train(stack, [trainee], Hooks())
    for one, other in zip(together, alone, strict=True):
        assert one.losses.tolist() == pytest.approx(other.losses.tolist(), abs=3e-2)


def test_the_loss_kernel_gives_torchs_loss_and_gradient() -> None:
    drawn = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(700, 64, generator=drawn), torch.randn(9000, 64, generator=drawn)
    targets, weights = torch.randint(0, 9000, (700,), generator=drawn), torch.rand(700, generator=drawn) / 700
    found = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        given = hidden.bfloat16().to(device, dtype).requires_grad_()
        total, losses = weighted_cross_entropy(
            given, head.bfloat16().to(device, dtype), targets.to(device), weights.to(device)
        )
        total.backward()
        assert given.grad is not None
        found.append((losses.detach().cpu(), given.grad.float().cpu()))
    (exact, exact_grad), (ours, ours_grad) = found
    assert torch.allclose(ours, exact, atol=0.15)  # logits of size 30 are rounded to 0.125
    assert float((ours - exact).mean().abs()) < 5e-3
    assert float((ours_grad - exact_grad).norm() / exact_grad.norm()) < 2e-2


def test_a_resumed_run_gives_the_same_bits(tiny_qwen: Path) -> None:
    """Rows of many blocks of keys, again and again: gradients that are added in no fixed order differ in few steps."""
    stack = stack_on("cuda", tiny_qwen, "bfloat16")
    job = Job("job", ragged_rows(64, longest=900), train_settings(dropout=0.05), ("gpu",))
    whole = start(stack, job)
    train(stack, [whole], Hooks())
    for step in (2, 11, 25):
        part = start(stack, job)
        train(stack, [part], Hooks(), until_step=step)
        again = start(stack, job, save_state(part))
        train(stack, [again], Hooks())
        assert torch.equal(again.adapter.flat, whole.adapter.flat)


def test_the_recorded_losses_are_the_same_bits_again(tiny_qwen: Path) -> None:
    """Not only the weights: thousands of supervised tokens are added up, which atomics would do in any order."""
    stack = stack_on("cuda", tiny_qwen, "bfloat16")
    job = Job("job", ragged_rows(256, longest=90), train_settings(batch_rows=128), ("gpu",))
    found = []
    for _ in range(4):
        trainee = start(stack, job)
        train(stack, [trainee], Hooks())
        found.append(trainee.losses)
    assert all(torch.equal(found[0], losses) for losses in found[1:])


def test_attention_gives_the_same_gradients_whatever_runs_beside_it() -> None:
    """Blocks end in another order where the card has other work; cuDNN's gradients of queries then have other bits."""
    padded = Padded.of([400, 390, 301, 412, 188, 333])
    padded = padded.with_inputs([part.cuda() for part in padded.inputs])
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(heads, padded.n_tok, 128, generator=generator).to("cuda", torch.bfloat16).requires_grad_()
        for heads in (12, 2, 2)
    ]
    others = [torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for n in (256, 700, 1500, 2100)]
    side = torch.cuda.Stream()

    def gradients(turn: int) -> list[torch.Tensor]:
        with torch.cuda.stream(side):
            for other in others[turn % 4 :]:
                torch.matmul(other, other)
        out = padded.attend(0, parts[0], parts[1], parts[2], 128**-0.5)
        found = torch.autograd.grad(out.float().square().sum(), parts)
        torch.cuda.synchronize()
        return list(found)

    first = gradients(3)
    differing = [turn for turn in range(200) if not all(map(torch.equal, first, gradients(turn)))]
    assert not differing


def test_a_graph_of_decoding_follows_the_stack_that_is_live(tiny_qwen: Path) -> None:
    stack = stack_on("cuda", tiny_qwen)
    prompts = [row.ids for row in ragged_rows(16)]
    drawn = []
    for seed in (1, 2, 1):
        with stack.live(Slot(frozen=(stack.take(random_adapter(stack, seed)),))):
            drawn.append(sample(stack.base, prompts, list(range(16)), SamplingSettings(max_new_tok=8)))
    assert drawn[0] == drawn[2] != drawn[1]


def test_letters_and_samples_are_the_cpus(tiny_qwen: Path) -> None:
    items = [LetterItem(row.ids, (65, 66, 67)) for row in ragged_rows(16)]
    prompts = [row.ids for row in ragged_rows(16)]
    scores, drawn = [], []
    for device in ("cpu", "cuda"):
        stack = stack_on(device, tiny_qwen)
        with stack.live(Slot(frozen=(stack.take(random_adapter(stack, 1)),))):
            scores.append(score_letters(stack.base, items, 256))
            drawn.append(sample(stack.base, prompts, list(range(16)), SamplingSettings(max_new_tok=8)))
    for one, other in zip(*scores, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
    same = sum(one == other for one, other in zip(*drawn, strict=True))
    assert same >= 15  # a draw within rounding of a boundary may differ


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_are_drawn_from_the_nucleus_of_a_large_vocabulary(dtype: torch.dtype) -> None:
    """Peaked rows, wide ones and such as have more tokens in their nucleus than are copied aside."""
    drawn, sizes = torch.Generator().manual_seed(0), (0.0, 0.5, 1.0, 2.0, 2.5, 3.0, 4.0, 8.0)
    logits = torch.stack([torch.randn(151_936, generator=drawn) * size for size in sizes]).to(dtype)
    uniforms = torch.rand(len(sizes), 32, generator=drawn) * 0.999
    uniforms[:, 0] = 0
    settings = SamplingSettings(temperature=1.0, top_p=0.95)
    rows, numbers = logits.cuda().repeat_interleave(32, 0), uniforms.flatten().cuda()
    tokens = sample_tokens(rows, numbers, settings)
    assert torch.equal(tokens, sample_tokens(rows, numbers, settings))
    for row, theirs, given in zip(logits, tokens.reshape(-1, 32).tolist(), uniforms.tolist(), strict=True):
        found = nucleus(row, 1.0, 0.95)
        assert all(found.takes(token, uniform) for token, uniform in zip(theirs, given, strict=True))


def test_a_bf16_base_trains_fp32_adapters(tiny_qwen: Path) -> None:
    trainee = trained(stack_on("cuda", tiny_qwen, "bfloat16"), 0.05)
    assert trainee.adapter.flat.dtype == trainee.grad.dtype == torch.float32
    assert bool(torch.isfinite(trainee.losses).all())


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.timeout(900)
def test_a_real_vllm_serves_the_stack(tmp_path: Path) -> None:
    """Nearly greedy, so that both draw the likeliest token: the server's completions begin as the resident ones do."""
    settings = ModelSettings(id="builtin:smollm2", device="cuda", dtype="bfloat16")
    prompt_ids, cold = [], SamplingSettings(temperature=0.01, top_p=0.1, max_new_tok=12)
    server = launch(settings, locate(settings), 256, 64, tmp_path)
    with closing(server):
        stack = Stack(load_base(settings), LoraSettings())
        ask = stack.base.tokenizer.prompt_ids
        prompt_ids = [ask(SystemTurn("text", "You are a pirate."), f"What is {n} + 1?") for n in range(32)]
        adapters = tuple(stack.take(random_adapter(stack, seed, size=0.02)) for seed in (1, 2))
        with closing(VllmSampler(server, stack)) as sampler:
            for live in ((), adapters[:1], adapters):
                with stack.live(*([Slot(frozen=live)] if live else [])):
                    theirs = sampler.draw(prompt_ids, range(32), cold, lambda n_tok: None)
                    mine = sample(stack.base, prompt_ids, list(range(32)), cold)
                same = sum(a.ids[:4] == b.ids[:4] for a, b in zip(mine, theirs, strict=True))
                assert same >= 26, len(live)  # near ties in bf16


def test_a_step_never_makes_the_host_wait(tiny_qwen: Path) -> None:
    stack = stack_on("cuda", tiny_qwen)
    trained(stack, 0.05)  # kernels are loaded and memory is taken
    frozen = stack.take(random_adapter(stack, 1))
    trainee = start(stack, Job("job", ragged_rows(12), train_settings(dropout=0.05), ("gpu",), (frozen,)))
    waits: list[str] = []

    def first_step_is_over(active: object) -> None:
        torch.cuda.set_sync_debug_mode("error" if trainee.step < 3 else "default")

    try:
        train(stack, [trainee], Hooks(first_step_is_over), until_step=4)
    except RuntimeError as error:
        waits.append(str(error))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits == []


def test_the_stacked_kernel_trains_as_torchs_operations(tiny_qwen: Path) -> None:
    plain, stacked = (stack_on("cuda", tiny_qwen) for _ in range(2))
    stacked.route.kernel = StackedKernel(stacked.base.device)
    one, other = trained(plain, 0.05), trained(stacked, 0.05)
    assert one.losses.tolist() == pytest.approx(other.losses.tolist(), abs=1e-5)
    assert torch.allclose(one.adapter.flat, other.adapter.flat, atol=1e-4)
    assert torch.equal(trained(stacked, 0.05).adapter.flat, other.adapter.flat)


@pytest.mark.parametrize("case", [(300, 1), (777, 3)], ids=["one_slot", "three_slots"])
def test_the_stacked_kernel_in_bf16_errs_no_more_than_torchs_operations(
    monkeypatch: pytest.MonkeyPatch, case: tuple[int, int]
) -> None:
    monkeypatch.setattr(kernels, "CASES", (case,))
    found = bench("kernel", "random:smollm2-135m", device="cuda", dtype="bfloat16")
    for errors in found["extra"]["errors"]:
        for way in kernels.TILINGS:
            assert all(error < 1.5 * errors[kernels.PLAIN][key] + 1e-4 for key, error in errors[way].items()), way
