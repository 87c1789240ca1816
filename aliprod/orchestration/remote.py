"""A plain function becomes a Ray task that says why it failed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

import ray

from aliprod.errors import AliprodError
from aliprod.orchestration.scheduler import Share
from aliprod.store import commit

Given = ParamSpec("Given")


def start(
    name: str, share: Share, out: Path | None, work: Callable[Given, None], *args: Given.args, **kwargs: Given.kwargs
) -> Any:
    """Start ``work`` on the cluster; resolves to why it failed, or ''.

    Args:
        name: of the task, in the dashboard.
        out: committed folder that it makes: where it is there, nothing is done. None: it is done each time.
        work: a function of a module, which Ray sends by its name.
    """
    named: dict[str, Any] = {"name": name}
    task = _told.options(num_cpus=share.cpus, num_gpus=share.gpus, **named)
    return task.remote(out, work, *args, **kwargs)


@ray.remote(max_retries=3)
def _told(out: Path | None, work: Callable[Given, None], *args: Given.args, **kwargs: Given.kwargs) -> str:
    if out is not None and commit.read(out) is not None:
        return ""
    try:
        work(*args, **kwargs)
    except AliprodError as error:
        return str(error)
    return ""
