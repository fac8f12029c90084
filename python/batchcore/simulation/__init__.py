"""The engine without a model: its real scheduler on virtual time, for studies of policy and scale.

The C++ engine, its queue, its scheduler and its account of the KV memory are those that serve real
requests. Only the model is left out: a step takes what a cost model says, and the clock jumps to
whatever happens next. So an hour of a thousand requests per second passes in minutes, the same
trace gives the same result every time, and a policy can be tried on a machine that is not there.

    from batchcore.simulation import SimDevice, Trace, simulate

    device = SimDevice.fitted(engine.stats())  # of a real engine that has worked for a while
    trace = Trace.poisson(2.0, 600.0, prompt_tokens="lognormal:300:0.8", output_tokens=100)
    result = simulate(trace, device, max_num_seqs=32, n_ctx=16384)
    print(result.percentile(result.ttft_s, 95))

All that comes out is simulated. What is left out: the time of the engine's own thread, of
tokenising and of the network; and outputs are exactly as long as the trace says, which the
scheduler knows as the bound `max_tokens`.
"""

from __future__ import annotations

from batchcore.simulation.device import SimDevice
from batchcore.simulation.engine import (
    SimEngineOptions,
    SimulatedEngine,
    prompt_token_ids,
    simulate,
)
from batchcore.simulation.result import Sample, SimResult, jain_index
from batchcore.simulation.trace import SimRequest, Trace

__all__ = [
    "Sample",
    "SimDevice",
    "SimEngineOptions",
    "SimRequest",
    "SimResult",
    "SimulatedEngine",
    "Trace",
    "jain_index",
    "prompt_token_ids",
    "simulate",
]
