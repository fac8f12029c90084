"""What all parts share: the model, the sizes, how engines and prompts are made, who runs when."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from batchcore.bench.compare import interleave
from batchcore.bench.monitor import Monitor
from batchcore.bench.workload import Workload
from batchcore.engine import Engine
from batchcore.lab.runs import Watched, complete, run_figures
from batchcore.params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from batchcore.bench.model_cost import ModelCost
    from batchcore.bench.runners import RunResult
    from batchcore.lab.plan import LabConfig
    from batchcore.model import Model

    Prompts = list[tuple[int, ...]]

__all__ = ["Lab", "cells_per_seq", "greedy", "warm"]

# llama.cpp rounds the cells of a sequence up to a multiple of this.
_CELL_QUANTUM = 256
_WARM_TOKENS = 4


@dataclass
class Lab:
    """One model, and what is to be measured."""

    model: Model
    config: LabConfig
    cost: ModelCost | None
    """None where the shapes of the model can't be read; `why_no_cost` says why."""
    why_no_cost: str = ""
    on_step: Callable[[float, str], None] = field(default=lambda _done, _note: None)
    """Called between runs with the share of the part that is done, and what comes next."""

    def engine(self, max_num_seqs: int, longest: int, *, autostart: bool = True) -> Engine:
        """An engine for so many sequences of at most `longest` tokens.

        Without the prefix cache: a run must not find the prompts of the one before in it.
        """
        return Engine(
            self.model,
            max_num_seqs=max_num_seqs,
            n_ctx=max_num_seqs * cells_per_seq(longest),
            n_threads=self.config.n_threads,
            prefix_caching=False,
            autostart=autostart,
        )

    def prompts(self, count: int, tokens: int | str, *, seed_offset: int = 0) -> Prompts:
        """Made-up texts of exactly so many tokens, or as a distribution says."""
        workload = Workload.generate(
            self.model,
            num_prompts=count,
            prompt_tokens=tokens,
            output_tokens=1,
            seed=self.config.seed + seed_offset,
        )
        return [
            tuple(request.prompt) for request in workload if not isinstance(request.prompt, str)
        ]

    def varied_prompts(self, count: int, *, seed_offset: int = 0) -> Prompts:
        """Short and long ones."""
        return self.prompts(count, self.varied_distribution, seed_offset=seed_offset)

    @property
    def varied_distribution(self) -> str:
        """Of the prompts of parts 4, 5 and 6."""
        low, high = self.config.varied_tokens
        return f"loguniform:{low}:{high}"

    def watch(self, engine: Engine, call: Callable[[], RunResult]) -> Watched:
        """Run something, with its utilisation and the engine's counters."""
        before = engine.stats()
        with Monitor(engine, cost=self.cost) as monitor:
            result = call()
        return Watched(run_figures(complete(result)), monitor.result(), before, engine.stats())

    def in_turns(self, rounds: int, variants: Mapping[str, Callable[[], Any]]) -> list[list[Any]]:
        """Run every variant once per round; see `interleave`. Shows the progress in between."""
        total, count = rounds * len(variants), 0

        def shown(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
            def run_once() -> Any:
                nonlocal count
                self.on_step(count / total, name)
                count += 1
                return call()

            return run_once

        calls = [shown(name, call) for name, call in variants.items()]
        return interleave(calls, rounds, seed=self.config.seed)


def cells_per_seq(longest: int) -> int:
    """KV cells that a sequence of so many tokens takes."""
    return -(-longest // _CELL_QUANTUM) * _CELL_QUANTUM


def greedy(max_tokens: int) -> SamplingParams:
    """Always as many tokens as asked for."""
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


def warm(engine: Engine, prompts: Prompts) -> None:
    """A few tokens, alone and with all slots: what happens only once is not measured."""
    few = [prompt[:_WARM_TOKENS] for prompt in prompts[: engine.max_num_seqs]]
    engine.generate(few[:1], greedy(2))
    engine.generate(few, greedy(2))
