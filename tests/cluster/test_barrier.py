import asyncio
import inspect

from hypothesis import given, strategies
from ray.train.v2._internal.execution.checkpoint.sync_actor import SynchronizationActor
from ray.train.v2._internal.execution.worker_group import worker_group

from aliprod.cluster import trainer
from aliprod.processes import Barrier

REPORTS = 3


async def report(barrier: Barrier, rank: int, ranks: int, begun: list[int], pauses: list[int]) -> list[str]:
    """What a rank gets of its reports. It asserts that all have begun a report before one of them is over."""
    found = []
    for number in range(REPORTS):
        for _ in range(pauses[number]):
            await asyncio.sleep(0)
        begun[number] += 1
        found.append(
            await barrier.broadcast_from_rank_zero(rank, ranks, f"{rank}:{number}", caller_method_name="report")
        )
        assert begun[number] == ranks
    return found


@given(strategies.lists(strategies.lists(strategies.integers(0, 9), min_size=REPORTS, max_size=REPORTS), min_size=1))
def test_ranks_wait_for_each_other_and_get_what_rank_0_says(pauses: list[list[int]]) -> None:
    async def together() -> list[list[str]]:
        barrier, begun = Barrier(timeout_s=None, warn_interval_s=60.0), [0] * REPORTS
        calls = [report(barrier, rank, len(pauses), begun, its) for rank, its in enumerate(pauses)]
        return await asyncio.wait_for(asyncio.gather(*calls), 20)

    assert asyncio.run(together()) == [[f"0:{number}" for number in range(REPORTS)]] * len(pauses)


def test_ray_train_starts_it_and_calls_it_by_these_names() -> None:
    assert worker_group.SynchronizationActor.__ray_metadata__.modified_class.__name__ == "Barrier", trainer
    start = worker_group.WorkerGroup._start_impl
    assert "SynchronizationActor" in start.__code__.co_names
    rays = SynchronizationActor.__ray_metadata__.modified_class
    given, asked = (inspect.signature(one.broadcast_from_rank_zero).parameters for one in (rays, Barrier))
    assert [name for name in asked if not name.startswith("_")] == list(given)[:4]
