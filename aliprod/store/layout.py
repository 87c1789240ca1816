"""Where things lie in the storage path.

jobs/BACKBONE/STAGE/KEY/    metrics.jsonl, resume/, last/, weights/ (its commit record says that the job is finished),
                            kept/, probabilities/, labels that it made or took
hashes/FINGERPRINT/         of a catalogue's training images
held-out/KEY/               which images of a catalogue without val were held out as val
pretrained/NETWORK/         ImageNet weights
tune/JOB-KEY.json           learning rates that were tried
.leases/                    who is at work on which plan and job
PLAN/                       submission.csv, result.json, ensemble/, ...: what people open
"""

from pathlib import Path

METRICS, RESUME, LAST, WEIGHTS, KEPT = "metrics.jsonl", "resume", "last", "weights", "kept"
HELD_OUT, TUNE = "held-out", "tune"
OWN = ("jobs", "hashes", HELD_OUT, "pretrained", TUNE, "ray", "models", "catalogues", "mlartifacts", "mlflow.db")
PACE = "pace.json"  # beside the checkpoints: how far a job is, and how fast
MODEL = "model.safetensors"  # in a folder of weights
PREDICTIONS = "predictions.parquet"  # in an ensemble's folder


def job_place(name: str, key: str) -> str:
    """The folder of a job, BACKBONE/STAGE, below the storage path."""
    return f"jobs/{name}/{key}"


def job_folder(storage: Path, name: str, key: str) -> Path:
    """The folder of a job."""
    return storage / job_place(name, key)


def newest_step(folder: Path) -> int | None:
    """The step of a job's newest resume checkpoint, whose bytes are not looked at; None where there is none."""
    steps = (path for path in (folder / RESUME).glob("step-*") if path.suffix != ".bad")
    return max(map(step_of, steps), default=None)


def step_of(checkpoint: Path) -> int:
    """The step that a resume checkpoint was written after."""
    return int(checkpoint.name.removeprefix("step-"))
