"""Fresh processes: what comes back when a model behaves, fails, crashes, hangs or is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import bench_paper
import pytest

from harness.errors import ReplivitError
from harness.measurement import child, isolation
from harness.measurement.cell import Cell
from harness.measurement.isolation import Worker, run_isolated

#: A worker in ten lines of standard library: answers with what it is asked to.
FAKE = (
    sys.executable, "-c",
    """
import json, os, sys, time
for line in sys.stdin:
    exec(json.loads(line)["do"])
""",
)  # fmt: skip


def answering(code: str) -> dict[str, str]:
    return {"do": code}


@pytest.fixture
def fake():
    with Worker(command=FAKE) as worker:
        yield worker


def say(what: str) -> dict[str, str]:
    return answering(f"print(json.dumps({what}), flush=True)")


def test_answers_and_environment_come_back(fake):
    request = say('{"threads": os.environ["OMP_NUM_THREADS"], "pid": os.getpid()}')
    first, second = fake.ask(request, 30), fake.ask(request, 30)
    assert first["threads"] == "1"
    assert first == second  # the same worker answers


def test_large_answers_are_whole(fake):
    assert len(fake.ask(say('{"long": "x" * 3_000_000}'), 30)["long"]) == 3_000_000


def test_exit_names_code_and_last_words(fake):
    code = 'print("first", file=sys.stderr); print("too bad", file=sys.stderr); os._exit(3)'
    answer = fake.ask(answering(code), 30)
    assert answer == {
        "status": "failed",
        "reason": "the process ended with code 3; its last words: too bad",
    }
    assert "pid" in fake.ask(say('{"pid": 1}'), 30)  # a new worker took over
    assert fake.ask(answering("os._exit(0)"), 30)["reason"] == "the process ended with code 0"


def test_torn_answer_is_a_failure(fake):
    code = 'print(\'{"records": [\', end="", flush=True); os._exit(1)'
    assert fake.ask(answering(code), 30)["status"] == "failed"


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [
        (signal.SIGSEGV, "failed", "SIGSEGV"),
        (signal.SIGABRT, "failed", "SIGABRT"),
        (signal.SIGKILL, "out_of_memory", "lack of memory"),
    ],
)
def test_signals_are_told_apart(fake, number, status, word):
    answer = fake.ask(answering(f"os.kill(os.getpid(), {int(number)}); time.sleep(60)"), 30)
    assert answer["status"] == status
    assert word in answer["reason"]


def test_time_limit_ends_worker_and_what_it_started(fake, tmp_path):
    mark = tmp_path / "pid"
    code = (
        "import subprocess; p = subprocess.Popen(['sleep', '600']);"
        f"open({str(mark)!r}, 'w').write(str(p.pid)); os.sync(); time.sleep(600)"
    )
    assert fake.ask(answering(code), 3) == {"status": "timeout", "reason": "not done after 3 s"}
    assert is_gone(int(mark.read_text()))


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where these tests run in the background of a shell that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupt_ends_the_worker(fake, interruptible):
    process = fake._start()
    main, over = threading.main_thread().ident, threading.Event()

    def interrupt():  # the thread, not the process: another thread could take the signal
        while not over.wait(1):  # again, where a finaliser happened to swallow it
            signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        try:
            fake.ask(answering("time.sleep(600)"), 60)
        finally:
            over.set()
    assert process.returncode == -signal.SIGKILL
    assert process not in isolation._running


def test_ending_all_workers_frees_the_one_that_waits(fake):
    fake._start()
    threading.Timer(0.5, isolation.end_workers).start()
    assert fake.ask(answering("time.sleep(600)"), 60)["status"] == "out_of_memory"


def test_a_worker_that_cannot_start_is_a_failure():
    with Worker(command=("/no/such/program",)) as worker:
        answer = worker.ask({}, 5)
    assert answer["status"] == "failed"
    assert answer["reason"].startswith("no worker process: ")


def is_gone(pid: int, within_s: float = 20) -> bool:
    """Whether a process ends (or is but a zombie) within some seconds."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.05)
    return False


def test_a_killed_parent_takes_the_worker_along():
    code = (
        "import subprocess, sys, time;"
        "inner = 'from harness.measurement.child import die_with_parent as d; d();'"
        "        'import time; print(1, flush=True); time.sleep(600)';"
        "p = subprocess.Popen([sys.executable, '-c', inner], stdout=subprocess.PIPE);"
        "p.stdout.readline(); print(p.pid, flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=-1, env=environment, text=True)
    pid = int(parent.stdout.readline())
    assert not is_gone(pid, within_s=0.2)
    parent.kill()
    parent.wait()
    assert is_gone(pid)
    parent.stdout.close()


# --- the real worker and models of every kind ----------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The test paper and one real worker for all tests below."""
    with bench_paper.installed(tmp_path_factory.mktemp("bench")), Worker() as worker:
        yield worker


def peak(name: str, worker: Worker, **changes):
    cell = Cell(f"benchpaper_{name}", "memory_inference", **changes)
    (record,) = run_isolated(cell, "run", worker)
    return record


def test_a_model_that_prints_is_measured(bench):
    record = peak("chatty", bench)
    assert record.status == "ok"
    assert record.value > 0
    assert record.detail["isolation"] == "fresh process"
    assert record.paper == "benchpaper"
    assert record.run_id == "run"


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("raising", "failed", "the model is unwell"),
        ("exiting", "failed", "the process ended with code 3"),
        ("crashing", "failed", "the process crashed with SIGSEGV"),
        ("killed", "out_of_memory", "lack of memory"),
        ("hogging", "out_of_memory", "allocate"),
    ],
)
def test_a_model_that_fails_is_a_row_and_the_worker_lives_on(bench, name, status, reason):
    worker = bench._process or bench._start()
    record = peak(name, bench)
    assert record.value is None
    assert record.status == status
    assert reason in record.reason and "\n" not in record.reason
    assert record.conditions.image_size == 32 and record.conditions.num_classes == 10
    assert bench._process is worker


def test_forks_do_not_see_each_other(bench):
    """The second model of one worker is measured as the first was: a fork leaves no trace."""
    first, second = (peak("wide", bench).value for _ in range(2))
    assert second == pytest.approx(first, abs=512 * 1024)


def test_latency_in_a_fresh_process(bench):
    effort = {"budget_s": 0.2, "min_rounds": 2, "max_rounds": 2, "warm_up_limit_s": 0.2}
    records = run_isolated(Cell("benchpaper_small", "latency", effort=effort), "run", bench)
    found = {record.metric: record for record in records}
    assert set(found) == {"latency", "latency_ratio", "first_call"}
    latency, ratio = found["latency"], found["latency_ratio"]
    assert latency.interval[0] <= latency.value <= latency.interval[1]
    assert latency.n == len(latency.detail["rounds"]) == 2
    assert latency.conditions.threads == 1 and latency.conditions.image_size == 32
    assert 0 < ratio.value < 1  # far smaller than DeiT-Ti
    assert ratio.detail["yardstick"] == "deit_tiny_patch16_224"


def test_unknown_variant_and_impossible_cells_are_refused(bench):
    with pytest.raises(ReplivitError, match="did you mean benchpaper_small"):
        run_isolated(Cell("benchpaper_smal", "latency"), "run", bench)
    with pytest.raises(ReplivitError, match="4096 threads do not fit"):
        run_isolated(Cell("benchpaper_small", "latency", threads=4096), "run", bench)


def test_a_model_that_hangs_is_a_timeout(bench):
    peak("small", bench)  # the worker is up: the limit is the model's alone
    record = peak("sleeping", bench, limit_s=2.0)
    assert record.status == "timeout"
    assert record.reason == "not done after 2 s"


# --- the child's own parts -----------------------------------------------------------------


def test_out_of_memory_is_recognised():
    assert child._is_out_of_memory(MemoryError())
    assert child._is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate"))
    assert not child._is_out_of_memory(RuntimeError("shape mismatch"))


def test_answers_of_this_process(bench, capsys):
    """What a system without fork does: measure right here."""
    cell = Cell("benchpaper_raising", "memory_inference").to_dict()
    answer = child.answer_to({"cell": cell, "run_id": "x", "cpus": []})
    assert answer == {"status": "failed", "reason": "the model is unwell"}
    assert "Traceback" in capsys.readouterr().err


def test_without_forks_a_worker_answers_once_and_is_replaced(bench, monkeypatch):
    answer = say('{"pid": os.getpid(), "last": True}')
    with Worker(command=FAKE) as worker:
        pids = [worker.ask(answer, 30)["pid"] for _ in range(2)]
    assert pids[0] != pids[1]
