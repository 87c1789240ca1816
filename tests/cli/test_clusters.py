"""aliprod cluster: arguments make a file that Ray accepts, as far as Ray looks without a cloud."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from shop import aliprod, refusal

ROOT = Path(__file__).parents[2]
AWS = ("--ami", "ami-0123456789abcdef0", "--nfs", "fs-0123.efs.eu-west-1.amazonaws.com:/")
LOCAL = ("--user", "ann", "--head", "192.0.2.10", "--worker", "192.0.2.11", "--worker", "gpu2.cellar")


@pytest.fixture(autouse=True)
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def accepted_by_ray(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of a configuration before it speaks to the cloud; raises where it would refuse."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config)
    validate_config(prepared)
    return prepared


def written(out: Path, *arguments: str) -> dict[str, Any]:
    result = aliprod("cluster", arguments[0], out, *arguments[1:])
    assert result.exit_code == 0, result.output
    assert "FILL" not in out.read_text()
    return accepted_by_ray(yaml.safe_load(out.read_text()))


def test_a_cluster_on_aws_has_what_its_arguments_say(tmp_path: Path) -> None:
    machine = ("--region", "eu-west-1", "--machine", "p5.48xlarge", "--cpus", "192", "--gpus", "8", "--most", "2")
    config = written(tmp_path / "aws.yaml", "aws", *AWS, *machine, "--spot")
    types, own = config["available_node_types"], config["provider"]
    assert (own["type"], own["region"], config["max_workers"]) == ("aws", "eu-west-1", 2)
    assert {kind["node_config"]["ImageId"] for kind in types.values()} == {"ami-0123456789abcdef0"}
    assert types[config["head_node_type"]]["resources"].get("GPU", 0) == 0
    gpu = types["gpu"]
    assert (gpu["min_workers"], gpu["max_workers"], gpu["resources"]) == (0, 2, {"CPU": 192, "GPU": 8})
    assert gpu["node_config"]["InstanceType"] == "p5.48xlarge"
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    mounts = [line for line in config["initialization_commands"] if "mount -t nfs4" in line]
    assert len(mounts) == 1
    assert "fs-0123.efs.eu-west-1.amazonaws.com:/ /mnt/aliprod" in mounts[0]


def test_a_cluster_on_aws_keeps_results_in_a_bucket_and_mounts_nothing(tmp_path: Path) -> None:
    config = written(tmp_path / "aws.yaml", "aws", *AWS[:2], "--bucket", "s3://ours/aliprod", "--role", "ours")
    assert not any("nfs" in line for line in config["initialization_commands"])
    options = config["docker"]["run_options"]
    assert [one for one in options if "ALIPROD_STORAGE" in one] == ["-e ALIPROD_STORAGE=s3://ours/aliprod"]
    profiles = {
        name: kind["node_config"].get("IamInstanceProfile") for name, kind in config["available_node_types"].items()
    }
    assert profiles == {"head": None, "gpu": {"Name": "ours"}}  # the head's is Ray's own: it starts machines


def test_a_cluster_of_ones_own_machines_names_them(tmp_path: Path) -> None:
    config = written(tmp_path / "cellar.yaml", "local", *LOCAL, "--nfs", "192.0.2.10:/srv/aliprod")
    assert config["provider"]["type"] == "local"
    assert (config["provider"]["head_ip"], config["max_workers"]) == ("192.0.2.10", 2)
    assert config["provider"]["worker_ips"] == ["192.0.2.11", "gpu2.cellar"]
    assert config["auth"] == {"ssh_user": "ann", "ssh_private_key": "~/.ssh/id_ed25519"}
    assert any("192.0.2.10:/srv/aliprod /mnt/aliprod" in line for line in config["initialization_commands"])
    assert not any("boto3" in line for line in config["head_setup_commands"])
    mounted = written(tmp_path / "mounted.yaml", "local", *LOCAL)
    assert not any("nfs" in line for line in mounted["initialization_commands"])


@pytest.mark.parametrize("kind", [("aws", *AWS), ("local", *LOCAL)], ids=["aws", "local"])
def test_an_image_of_ones_own_installs_nothing_and_a_token_is_always_on(tmp_path: Path, kind: tuple[str, ...]) -> None:
    plain, own = written(tmp_path / "plain.yaml", *kind), written(tmp_path / "own.yaml", *kind, "--docker", "me/it:1")
    assert plain["setup_commands"]
    assert (own["setup_commands"], own["head_setup_commands"]) == ([], [])
    assert own["docker"]["head_image"] == own["docker"]["worker_image"] == "me/it:1"
    assert all("-e RAY_AUTH_MODE=token" in one["docker"]["run_options"] for one in (plain, own))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("aws", *AWS[:2], "--nfs", "host:/x; rm -rf /"), "is no folder of a file server"),
        (("aws", *AWS[:2], "--nfs", "host"), "HOST:/FOLDER"),
        (("aws", *AWS[:2]), "--bucket with --role"),
        (("aws", *AWS[:2], "--bucket", "s3://ours/x"), "--bucket with --role"),
        (("aws", *AWS, "--bucket", "s3://ours/x", "--role", "y"), "--bucket with --role"),
        (("aws", *AWS[:2], "--bucket", "s3://ours/x; y", "--role", "y"), "is no bucket"),
        (("aws", *AWS[2:], "--ami", "FILL-IN"), "is no machine image"),
        (("local", *LOCAL, "--worker", "-oProxyCommand=x"), "is no address"),
        (("local", *LOCAL[:4]), "Missing option '--worker'"),
    ],
)
def test_what_could_not_be_is_refused(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    result = aliprod("cluster", arguments[0], tmp_path / "x.yaml", *arguments[1:])
    assert result.exit_code == 2
    assert says in result.stderr
    assert not (tmp_path / "x.yaml").exists()


def test_no_file_is_written_over_and_a_checkout_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("mine")
    assert "is there already" in refusal(2, "cluster", "local", tmp_path / "mine.yaml", *LOCAL)
    monkeypatch.chdir(tmp_path)
    assert "Go into a checkout" in refusal(2, "cluster", "local", tmp_path / "x.yaml", *LOCAL)


def test_ray_refuses_a_misspelt_key() -> None:
    with pytest.raises(Exception, match="idle_timeout_minute"):
        accepted_by_ray(yaml.safe_load((ROOT / "cluster.yaml").read_text()) | {"idle_timeout_minute": 5})
