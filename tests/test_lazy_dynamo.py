"""In processes of their own, since pytest's may have compiled something."""

import subprocess
import sys

TRAIN = """
import sys
from aliprod.training import job, learner
import torch, timm
model = timm.create_model("test_resnet")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
model(torch.zeros(2, 3, 64, 64)).sum().backward()
optimizer.step()
optimizer.zero_grad()
"""
LOADED = '"torch._dynamo.eval_frame" in sys.modules'


def printed(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_step_does_not_import_what_compiles() -> None:
    assert printed(f"{TRAIN}\nprint({LOADED})") == ["False"]


def test_what_compiles_is_there_when_it_is_asked_for() -> None:
    code = """
sees = torch.compiler.disable(lambda x: x + torch.compiler.is_compiling())
broken = torch._dynamo.explain(lambda x: sees(x * 2) * 3)(torch.ones(2))
print(broken.graph_break_count, *torch.compile(lambda x: x * 2 + torch.compiler.is_compiling())(torch.ones(2)).tolist())
from torch._dynamo.utils import is_compile_supported
from torchvision.ops.roi_align import is_compile_supported as torchvisions
print(torchvisions("cpu") == is_compile_supported("cpu"), torch._dynamo is sys.modules["torch._dynamo"])
"""
    assert printed(f"{TRAIN}\n{code}\nprint({LOADED})") == ["1", "3.0", "3.0", "True", "True", "True"]


def test_a_function_that_was_kept_out_before_stays_kept_out() -> None:
    code = """
kept_out = torch.compiler.disable(lambda x: x + torch.compiler.is_compiling())
print(LOADED, kept_out(torch.zeros(1)).item())
print(torch._dynamo.explain(lambda x: kept_out(x * 2) * 3)(torch.ones(2)).graph_break_count)
print(*torch.compile(lambda x: kept_out(x * 2))(torch.ones(2)).tolist())
"""
    assert printed(TRAIN + code.replace("LOADED", LOADED)) == ["False", "0.0", "1", "2.0", "2.0"]


def test_it_leaves_alone_what_is_there() -> None:
    code = "import sys, torch._dynamo as real, aliprod; print(sys.modules['torch._dynamo'] is real)"
    assert printed(code) == ["True"]
