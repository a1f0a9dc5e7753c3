"""The embedded engine beside `transformers` generate and vLLM, on the same model, prompts, lengths and stops.

Every side draws at temperature 1 and returns the log-prob of each token. How many tokens a reply has is drawn too where
stops are allowed, so sides are compared by seconds per token. Before anything is timed, tokens that each side drew are
given to the engine to score, and the log-probs must agree.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from keel.bench import vllm_program
from keel.bench.measure import BenchError, Times, alternately, require_close, timed
from keel.config import EngineConfig
from keel.config_vllm import VllmConfig
from keel.engines.base import GenerateRequest
from keel.engines.embedded.engine import EmbeddedEngine
from keel.engines.vllm.command import find_python
from keel.models.policy import PolicyModel
from keel.models.tiny import build_tiny_model
from keel.types import SamplingSettings

SHAPE: Mapping[str, int] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 288,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": 128,
}
"""8.1 M parameters of GPT-OSS's kind."""
NUM_SEQUENCES, NEW_TOKENS, CAPACITY = 64, 128, 256
TOLERANCE = 1e-5  # of the largest log-prob, which is about 10
CHECKED = 8
PEERS = ("transformers", "vllm")
EXPERTS = ("eager", "grouped_mm")  # batched_mm copies experts for each token and takes minutes
NOTES = (
    (
        "8.1 M parameters of GPT-OSS's kind (random, float32): 4 layers, hidden 256, 8 / 2 heads of 32, 6 experts of "
        "which 2, window 128 in every other layer, 4,096 tokens. Draws at temperature 1, log-probs on."
    ),
    (
        "Ratios are of seconds per drawn token, round by round. Each side runs with the threads, transformers also with"
        " the experts, that were fastest in that case; vLLM runs compiled, in a process of its own, without HTTP."
    ),
)
Replies = list[tuple[list[int], list[float]]]
"""Of each sequence the drawn tokens and their log-probs."""
Side = Callable[["Case"], Replies]


@dataclass(frozen=True)
class Case:
    """What is asked of a side; a token of `stops` ends a reply."""

    name: str
    prompts: tuple[tuple[int, ...], ...]
    stops: tuple[int, ...] = ()


def equal_case() -> Case:
    """64 prompts of 64 tokens, 128 new tokens each."""
    return Case("64 x (64 + 128)", _prompts(random.Random(1), 64, 64))


def ragged_case() -> Case:
    """64 prompts of 16 to 112 tokens, replies that end at one of 64 stop tokens, at the latest after 128."""
    return Case("64 x (16..112 + up to 128, stops)", _prompts(random.Random(2), 16, 112), tuple(range(100, 164)))


CASES: Mapping[str, Callable[[], Case]] = {"equal": equal_case, "ragged": ragged_case}


def measure_engine(
    cases: Sequence[str], peers: Sequence[str], *, threads: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """A row for each case and peer. Every side runs with the number of `threads` that suits it best in that case.

    Raises BenchError for an unknown case or peer, and if log-probs do not agree.
    """
    for kind, given, known in (("cases", cases, tuple(CASES)), ("peers", peers, PEERS)):
        if strange := [name for name in given if name not in known]:
            raise BenchError(f"bench engine: {kind} are {', '.join(known)}; got {strange[0]!r}")
    with tempfile.TemporaryDirectory(prefix="keel-bench-") as directory, ExitStack() as stack:
        path = Path(directory) / "model"
        build_tiny_model("gpt_oss", path, **SHAPE)
        engine = EmbeddedEngine(PolicyModel.load(path), EngineConfig(slots=NUM_SEQUENCES), max_sequence_tokens=CAPACITY)
        sides = {"keel": {f"{n} threads": _keel_side(engine, n) for n in threads}}
        if "transformers" in peers:
            sides["transformers"] = _transformers_sides(path, threads)
        if "vllm" in peers:
            sides["vllm"] = {f"{n} threads": stack.enter_context(_vllm_side(path, n)) for n in threads}
        return [row for name in cases for row in _rows(CASES[name](), engine, sides, rounds)]


def _rows(
    case: Case, engine: EmbeddedEngine, sides: Mapping[str, Mapping[str, Side]], rounds: int
) -> list[dict[str, Any]]:
    chosen = {name: _best(settings, case) for name, settings in sides.items()}
    apart = {name: _distance(engine, case, name, sides[name][chosen[name]](case)) for name in sides}
    counts: dict[str, list[int]] = {name: [] for name in sides}

    def contender(name: str) -> Callable[[], None]:
        side = sides[name][chosen[name]]
        return lambda: counts[name].append(sum(len(tokens) for tokens, _ in side(case)))

    raw = alternately({name: contender(name) for name in sides}, rounds=rounds)
    per_token = Times(
        {name: tuple(s / n for s, n in zip(raw.seconds[name], counts[name][-rounds:], strict=True)) for name in sides}
    )
    rates = {name: 1.0 / per_token.median(name) for name in sides}
    rows = []
    for peer in sides:
        if peer == "keel":
            continue
        ratio = per_token.ratio(peer, "keel")
        rows.append(
            {
                "case": case.name,
                "ours": f"keel, {chosen['keel']}",
                "peer": f"{peer}, {chosen[peer]}",
                "ours_ms": 1e3 * raw.median("keel"),
                "peer_ms": 1e3 * raw.median(peer),
                "ours_tokens_per_s": rates["keel"],
                "peer_tokens_per_s": rates[peer],
                "ratio": ratio.median,
                "low": ratio.low,
                "high": ratio.high,
                "equal_to": max(apart["keel"], apart[peer]),
            }
        )
    return rows


def _best(settings: Mapping[str, Side], case: Case) -> str:
    """The setting with which a side draws most tokens a second, in one run each."""

    def seconds_per_token(side: Side) -> float:
        counts: list[int] = []
        taken = timed(lambda: counts.append(sum(len(tokens) for tokens, _ in side(case))))
        return taken / counts[0]

    return min(settings, key=lambda name: seconds_per_token(settings[name]))


def _distance(engine: EmbeddedEngine, case: Case, name: str, replies: Replies) -> float:
    """How far the log-probs of some replies are from those that the engine scores them with."""
    found: list[float] = []
    scored: list[float] = []
    for prompt, (tokens, logprobs) in list(zip(case.prompts, replies, strict=True))[:CHECKED]:
        whole = asyncio.run(engine.score((*prompt, *tokens)))
        scored += whole.logprobs[len(prompt) - 1 :]
        found += logprobs
    return require_close(
        f"{case.name}, log-probs of {name}", torch.tensor(scored), torch.tensor(found), tolerance=TOLERANCE
    )


def _keel_side(engine: EmbeddedEngine, num_threads: int) -> Side:
    async def run(case: Case) -> Replies:
        requests = [
            GenerateRequest(str(number), "", prompt, SamplingSettings(), NEW_TOKENS, case.stops, number)
            for number, prompt in enumerate(case.prompts)
        ]
        results = await asyncio.gather(*(engine.generate(request) for request in requests))
        return [(list(result.token_ids), list(result.spans[0].logprobs)) for result in results]

    def side(case: Case) -> Replies:
        torch.set_num_threads(num_threads)
        # New weights under a new number: no prompt of the last round is still held.
        engine._scheduler.invalidate(engine._scheduler.version)
        return asyncio.run(run(case))

    return side


def _transformers_sides(path: Path, threads: Sequence[int]) -> dict[str, Side]:
    from transformers import AutoModelForCausalLM

    sides: dict[str, Side] = {}
    for experts in EXPERTS:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation=experts).eval()
        for count in threads:
            sides[f"experts {experts}, {count} threads"] = _transformers_side(model, count)
    return sides


def _transformers_side(model: Any, num_threads: int) -> Side:
    @torch.no_grad()
    def side(case: Case) -> Replies:
        torch.set_num_threads(num_threads)
        longest = max(len(prompt) for prompt in case.prompts)
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in case.prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in case.prompts])
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=list(case.stops) or None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        drawn = made.sequences[:, longest:]
        steps = [torch.log_softmax(logits, -1).gather(1, drawn[:, i, None]) for i, logits in enumerate(made.logits)]
        return [_cut(*row, case.stops) for row in zip(drawn.tolist(), torch.cat(steps, 1).tolist(), strict=True)]

    return side


def _cut(tokens: list[int], logprobs: list[float], stops: Sequence[int]) -> tuple[list[int], list[float]]:
    """Up to the first stop, itself included; what follows is padding."""
    end = next((place + 1 for place, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end], logprobs[:end]


@contextmanager
def _vllm_side(path: Path, num_threads: int) -> Iterator[Side]:
    """vLLM in a process of its own, without HTTP between. Raises BenchError if it ends."""
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{num_threads - 1}" if num_threads > 1 else "0",
        "OMP_NUM_THREADS": str(num_threads),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    command = [find_python(VllmConfig()), vllm_program.__file__, str(path), str(CAPACITY), str(NUM_SEQUENCES)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(  # noqa: S603
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdin is not None
        assert process.stdout is not None

        def line() -> str:
            assert process.stdout is not None
            if answer := process.stdout.readline():
                return answer
            errors.seek(0)
            raise BenchError(f"bench engine: vLLM ended with {process.wait()}: {errors.read()[-2000:]}")

        def side(case: Case) -> Replies:
            assert process.stdin is not None
            asked = {"prompts": case.prompts, "max_tokens": NEW_TOKENS, "stop": case.stops}
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            return [(tokens, logprobs) for tokens, logprobs in json.loads(line())]

        try:
            line()
            yield side
        finally:
            process.stdin.close()
            process.terminate()
            process.wait()


def _prompts(draw: random.Random, shortest: int, longest: int) -> tuple[tuple[int, ...], ...]:
    lengths = [draw.randint(shortest, longest) for _ in range(NUM_SEQUENCES)]
    return tuple(tuple(draw.randrange(SHAPE["vocab_size"]) for _ in range(length)) for length in lengths)
