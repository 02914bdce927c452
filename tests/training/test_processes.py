"""Other processes: one that is killed with SIGKILL and started again, two that train together."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_tools import Flat

from harness.checkpoints import read_state_dict
from harness.training import train

ROOT = Path(__file__).resolve().parents[2]
RECIPE = {"batch_size": 16, "epochs": 2, "mixup": 0.8, "ema_decay": 0.9}  # 6 steps per epoch
PROGRAM = f"""
import os, signal, sys
import torch
from harness.training import Callback, train
from training_tools import Net

class Kill(Callback):
    def on_step_end(self, context):
        if context.updates == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
    def identity(self):
        return None

torch.set_num_threads(1)
torch.manual_seed(0)
train(Net(), sys.argv[1], {RECIPE}, out=sys.argv[2], image_size=16, evaluate=False, quiet=True,
      device="cpu", checkpoint_steps=4, callbacks=[Kill()])
"""


def start(data: str, out: Path, kill_at: int) -> int:
    """Train in a process of its own; returns its exit status."""
    command = [sys.executable, "-c", PROGRAM, data, str(out), str(kill_at)]
    return subprocess.run(command, cwd=ROOT, env=environment(), timeout=300).returncode


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


def test_kill_9_and_the_same_command_again(toy_data, tmp_path, net):
    kill_at = random.randint(1, 11)  # of 12 updates; any must do
    assert start(toy_data, tmp_path / "killed", kill_at) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "weights.safetensors").exists()
    assert start(toy_data, tmp_path / "killed", 0) == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = train(net(), toy_data, RECIPE, out=tmp_path / "whole", image_size=16, evaluate=False,
                  quiet=True, device="cpu")  # fmt: skip
    torch.set_num_threads(threads)
    for name in ("weights.safetensors", "weights_ema.safetensors"):
        killed, kept = (read_state_dict(tmp_path / run / name) for run in ("killed", "whole"))
        assert all(torch.equal(kept[key], killed[key]) for key in kept), f"killed at {kill_at}"
    assert len(whole.history) == 2


SHARED = {"batch_size": 24, "epochs": 2, "accumulation": 2}
TOGETHER = f"""
import sys
import torch
from harness.training import train
from training_tools import Flat

torch.set_num_threads(1)
torch.manual_seed(0)
run = train(Flat(), sys.argv[1], {SHARED}, out=sys.argv[2], image_size=16,
            quiet=True, device="cpu")
metrics = [record.metric for record in run.records]
sys.stdout.write(f"records: {{metrics}}\\n")  # in one piece: two processes write into one pipe
"""


@pytest.mark.slow
def test_two_processes_train_as_one_does(toy_data, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(TOGETHER)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(program), toy_data, str(tmp_path / "two"),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), timeout=300, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # the main process alone evaluates and writes
    assert done.stdout.count("'top1'") == 1 and done.stdout.count("records: []") == 1
    torch.manual_seed(0)
    alone = train(Flat(), toy_data, SHARED, out=tmp_path / "one", image_size=16, quiet=True,
                  evaluate=False, device="cpu")  # fmt: skip
    together = read_state_dict(tmp_path / "two" / "weights.safetensors")
    for name, value in alone.model.state_dict().items():
        assert torch.allclose(value, together[name], rtol=1e-4, atol=1e-6), name
