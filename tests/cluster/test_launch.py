import subprocess
import sys

HEAVY = ("ray.train", "torch", "torchvision", "timm", "mlflow", "pandas")


def test_the_door_to_a_job_imports_nothing_that_trains() -> None:
    code = f"import sys, aliprod.cluster.launch; print([name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
