"""Whatever is secret in an address or the environment stands in no file, page, log or output of a run."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PASSWORD, CANARIES = (
    "canary-of-the-address",
    {
        "MLFLOW_TRACKING_PASSWORD": "canary-of-mlflow",
        "AWS_SECRET_ACCESS_KEY": "canary-of-aws",
        "AZURE_STORAGE_ACCOUNT_KEY": "canary-of-azure",
        "GOOGLE_SERVICE_ACCOUNT_KEY": "canary-of-google",
        "RAY_AUTH_TOKEN": "canary-of-ray",
        "PGPASSWORD": "canary-of-postgres",
        "HF_TOKEN": "canary-of-the-hub",
    },
)


def holding(folder: Path, secret: str) -> Iterator[Path]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return (path for path in files if secret.encode() in path.read_bytes())


def test_no_secret_is_written_or_said(cluster: Any, plan: Path, server: Any, tmp_path: Path) -> None:
    uri, storage = server.uri.replace("//", f"//user:{PASSWORD}@"), tmp_path / "storage"
    text = plan.read_text().replace('path = "catalogue"', f"path = {str(plan.parent / 'catalogue')!r}")
    sets = ('jobs={efficientnet=["full"]}', 'ensemble.members=["efficientnet/full"]', "stages.full.epochs=1")
    flags = [word for one in sets for word in ("--set", one)] + ["--storage", str(storage)]
    said = ""

    def say(*words: str | Path) -> None:
        nonlocal said
        command = [sys.executable, "-m", "aliprod", *map(str, words)]
        environment = cluster.environment | CANARIES
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr

    named, plain = tmp_path / "named.toml", tmp_path / "plain.toml"
    named.write_text(f'{text}tracking_uri = "{uri}"\n')
    plain.write_text(text)
    say("run", named, *flags, "--address", cluster.address)
    say("run", plain, *flags, "--tracking-uri", uri)
    for command in ("plan", "report"):
        say(command, named, *flags)
    say("status", named, *flags, "--json")
    say("trace", storage / "tiny" / "submission.csv", "--json", "--storage", storage)
    assert "127.0.0.1" in said
    for secret in (PASSWORD, *CANARIES.values()):
        assert secret not in said
        for folder in (storage, server.folder, cluster.home):
            assert list(holding(folder, secret)) == []
