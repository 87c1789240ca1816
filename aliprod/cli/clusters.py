"""The commands that fill cluster.yaml in, for `ray up`."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

from aliprod.cli.flags import path, say, together
from aliprod.errors import Refused
from aliprod.store import commit

_TEMPLATE = Path("cluster.yaml")
_OF_CLOUDS = ("max_workers", "head_node_type", "available_node_types", "head_setup_commands")


class _Word(click.ParamType[str]):
    """What a pattern matches as a whole: parts of it stand in commands of a shell."""

    def __init__(self, name: str, pattern: str) -> None:
        self.name, self.pattern = name, pattern

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not re.fullmatch(self.pattern, value):
            self.fail(f"{value!r} is no {self.name}.", param, ctx)
        return str(value)


_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}[A-Za-z0-9])?"
_host = _Word("address", rf"{_HOST}|[0-9a-fA-F:]+")
_nfs = _Word("folder of a file server, HOST:/FOLDER", rf"{_HOST}:/[A-Za-z0-9._/-]*")
_bucket = _Word("bucket, s3://BUCKET/PREFIX", r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9._-]+)*")
_machines = click.IntRange(1, 1024)
_docker = click.option(
    "--docker", type=_Word("image", r"[a-z0-9][\w.:/@-]*"), help="Image of your own, with aliprod's packages."
)


@click.group("cluster")
def cluster_group() -> None:
    """Fill cluster.yaml in, for `ray up`. In a checkout."""


@cluster_group.command("aws")
@together(
    click.option("--ami", required=True, type=_Word("machine image", "ami-[0-9a-f]+"), help="Its docker sees GPUs."),
    click.option("--nfs", type=_nfs, help="Storage, mounted everywhere: EFS, FSx."),
    click.option("--bucket", type=_bucket, help="Storage instead, s3://BUCKET/PREFIX; takes --role."),
    click.option("--role", type=_Word("instance profile", r"[\w+=,.@-]+"), help="That may use the bucket, of workers."),
    click.option("--region", default="us-west-2", show_default=True, type=_Word("region", r"[a-z0-9-]+")),
    click.option("--machine", default="g5.12xlarge", show_default=True, type=_Word("type", r"[a-z0-9.-]+")),
    click.option("--cpus", default=48, show_default=True, type=_machines, help="That it has."),
    click.option("--gpus", default=4, show_default=True, type=_machines, help="That it has."),
    click.option("--most", default=4, show_default=True, type=_machines, help="Machines with GPUs at a time."),
    click.option("--spot", is_flag=True, help="Cheaper machines, which AWS may take away."),
    _docker,
)
@click.argument("out", type=path)
def aws_command(out: Path, **given: Any) -> None:
    """Write the file of a cluster on AWS, which grows and shrinks.

    \b
    Example: aliprod cluster aws aws.yaml --ami ami-0123456789abcdef0 \\
               --bucket s3://ours/aliprod --role ours-aliprod
    """
    asked = SimpleNamespace(**given)
    if bool(asked.nfs) == bool(asked.bucket) or bool(asked.bucket) != bool(asked.role):
        raise click.UsageError("Storage is --nfs, or --bucket with --role.")
    config = _template(asked.nfs, asked.docker)
    config["provider"]["region"] = asked.region
    config["max_workers"] = asked.most
    types = config["available_node_types"]
    for kind in types.values():
        kind["node_config"]["ImageId"] = asked.ami
    types["gpu"] |= {"max_workers": asked.most, "resources": {"CPU": asked.cpus, "GPU": asked.gpus}}
    types["gpu"]["node_config"]["InstanceType"] = asked.machine
    if asked.spot:
        types["gpu"]["node_config"]["InstanceMarketOptions"] = {"MarketType": "spot"}
    if asked.bucket:
        own = [f"-e ALIPROD_STORAGE={asked.bucket}", "-e ALIPROD_CACHE=/mnt/aliprod", f"-e AWS_REGION={asked.region}"]
        plain = [one for one in config["docker"]["run_options"] if "ALIPROD_STORAGE" not in one]
        config["docker"]["run_options"] = plain + own
        types["gpu"]["node_config"]["IamInstanceProfile"] = {"Name": asked.role}
    _write(out, config)


@cluster_group.command("local")
@together(
    click.option("--head", required=True, type=_host, help="The machine of the driver; it needs no GPU."),
    click.option("--worker", "workers", required=True, multiple=True, type=_host, help="Another; repeat it."),
    click.option("--user", required=True, type=_Word("user", r"[a-z_][a-z0-9_-]*"), help="May use sudo and docker."),
    click.option("--key", default="~/.ssh/id_ed25519", show_default=True, help="Of ssh."),
    click.option("--nfs", type=_nfs, help="Storage. [/mnt/aliprod is mounted already]"),
    _docker,
)
@click.argument("out", type=path)
def local_command(out: Path, **given: Any) -> None:
    """Write the file of a cluster of machines of your own.

    \b
    Example: aliprod cluster local cellar.yaml --user ann --head 192.0.2.10 \\
               --worker 192.0.2.11 --nfs 192.0.2.10:/srv/aliprod
    """
    asked = SimpleNamespace(**given)
    config = {key: value for key, value in _template(asked.nfs, asked.docker).items() if key not in _OF_CLOUDS}
    config["provider"] = {"type": "local", "head_ip": asked.head, "worker_ips": list(asked.workers)}
    config["auth"] = {"ssh_user": asked.user, "ssh_private_key": asked.key}
    _write(out, config)


def _template(nfs: str | None, docker: str | None) -> dict[str, Any]:
    import yaml

    try:
        config: dict[str, Any] = yaml.safe_load(_TEMPLATE.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(f"cannot be read: {error.strerror}.", _TEMPLATE, "Go into a checkout of aliprod.") from error
    commands = [line for line in config["initialization_commands"] if nfs or "nfs" not in line]
    config["initialization_commands"] = [line.replace("FILL-IN:/", str(nfs)) for line in commands]
    if docker:
        config["docker"] |= {"head_image": docker, "worker_image": docker}
        config |= {"setup_commands": [], "head_setup_commands": []}
    return config


def _write(out: Path, config: dict[str, Any]) -> None:
    import yaml

    if out.exists():
        raise Refused("is there already.", out, "Give another name, or move it away.")
    commit.write_file(out, yaml.safe_dump(config, sort_keys=False, width=120))
    say(f"{out} is written. Next: ray up {out}")
