"""Networks of full size to ONNX, torch.export and timm, compared on photographs: difference, bytes, seconds, memory.

Weights are random, but their batch norms have seen the photographs and their classifiers tell them apart. Each
export is a process of its own; then the lines of its card run in another, without aliprod, on one photograph.

    python benchmarks/export.py G [--only PART_OF_A_NAME]
"""

import argparse
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from ratio import header

from aliprod.data.augment import normalise
from aliprod.errors import AliprodError
from aliprod.export.folder import export
from aliprod.inference.classify import Recogniser
from aliprod.inference.pictures import listed, squares
from aliprod.models import weights
from aliprod.models.classifier import Classifier
from aliprod.store import commit
from aliprod.store.lineage import Voice

NETWORKS = {  # classes, side of the square, crop
    "resnet50": (50_030, 256, 224),
    "seresnext50_32x4d": (1_000, 256, 224),
    "legacy_seresnet101": (1_000, 512, 448),
    "efficientnet_b3": (1_000, 256, 224),
    "efficientnet_b4": (1_000, 256, 224),
    "vit_base_patch16_224": (1_000, 256, 224),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    """Each network in each format, ten crops of the first, and an ensemble."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs")
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    print(header())
    cases = [((network,), form, "center") for network in NETWORKS for form in ("onnx", "torch", "timm")]
    cases += [(("resnet50",), form, "ten_crop") for form in ("onnx", "torch")]
    cases += [(("efficientnet_b3", "legacy_seresnet101"), form, "center") for form in ("onnx", "torch")]
    with tempfile.TemporaryDirectory(prefix="export-") as temporary:
        for networks, form, views in cases:
            name = f"{' + '.join(networks)}, {form}, {views}"
            if asked.only not in name:
                continue
            with ProcessPoolExecutor(1, get_context("spawn")) as own:
                print(own.submit(told, Path(temporary), networks, form, views, asked.photographs, name).result())


def told(place: Path, networks: Sequence[str], form: str, views: str, photographs: str, name: str) -> str:
    """A line about one export, in this process."""
    voices = [Voice(made(place, network, photographs)) for network in networks]
    out, began = place / re.sub(r"\W+", "-", name), time.perf_counter()
    try:
        found = export(voices, out, form, views, photographs)
    except AliprodError as error:
        return f"{name}: {error}"
    seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    apart, sure = outside(out, voices, views, photographs)
    size = found["bytes"] / 2**20
    return (
        f"{name}: largest difference {found['largest_difference']:.1e} on {found['images']} photographs, "
        f"{apart:.1e} by its card, which is {sure:.0%} sure; {size:,.0f} MiB, {seconds:.0f} s, peak {peak:.1f} GiB"
    )


def outside(out: Path, voices: Sequence[Voice], views: str, photographs: str) -> tuple[float, float]:
    """What the card's lines say of one photograph, where there is no aliprod: the largest difference from what aliprod
    says, and the highest probability."""
    file = Path(listed([photographs])[0].name)
    (out / "picture.jpg").write_bytes(file.read_bytes())
    [lines] = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text("utf-8"), re.DOTALL)
    save = "import numpy\nnumpy.save('said.npy', torch.as_tensor(probabilities).detach().numpy())\n"
    start = "import sys\nsys.modules['aliprod'] = None\nimport torch\n"
    subprocess.run([sys.executable, "-c", start + lines + save], cwd=out, check=True, stderr=subprocess.DEVNULL)
    recogniser = Recogniser.load(voices, views)
    ours = recogniser.probabilities([squares(recogniser.sizes, file)]).numpy()
    said = np.load(out / "said.npy")
    return float(np.abs(ours - said).max()), float(said.max())


def made(place: Path, network: str, photographs: str) -> Path:
    """A weights folder, kept for the next format."""
    folder = place / network
    if not folder.exists():
        classes, resize, crop = NETWORKS[network]
        config = weights.Config(network, MEAN, STD, "bicubic", resize, crop, network, epoch=0)
        torch.manual_seed(0)
        model = Classifier(network, classes, crop=crop).train()
        files = [Path(one.name) for one in listed([photographs])[::90]]
        pixels = np.stack([squares({(crop, "bicubic")}, file)[crop, "bicubic"] for file in files])
        images = normalise(torch.from_numpy(pixels), MEAN, STD)
        with torch.no_grad():
            for _ in range(10):
                model(images)
            pooled, weight = model.eval().pool(model.features(images)), model.classifier.weight
            usual = pooled.mean(dim=0)  # without it, since of random weights one class would win always
            weight -= torch.outer(weight @ usual, usual) / usual.square().sum()
            weight *= 3 / (pooled @ weight.T).std()
        names = weights.Classes(tuple(range(classes)), ("",) * classes)
        commit.write(folder, lambda new: weights.save(new, model.state_dict(), config, names), {})
    return folder


if __name__ == "__main__":
    main()
