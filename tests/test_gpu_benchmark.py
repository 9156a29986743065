"""`benchmarks/gpu.py` at its tiny shapes on the CPU: what is measured, what is counted, and what the record and the table say."""

import json
import subprocess
import sys
import time

import pytest

from benchmarks import gpu
from benchmarks.equal_contestants import MASK, OURS_OUTPUT, PLAIN, SHELL, Compilation
from benchmarks.equal_worker import STEP
from benchmarks.gpu_contestants import COMPILED, EAGER, GRAPHS, MAKERS, ORT, ROUNDS, GpuWorker, compilation, host_reads, shapes

TINY = shapes("cpu", tiny=True)["wan"]


def measured(name):
    worker = GpuWorker(name, TINY, compilation(EAGER))
    return {**worker.ready(), **worker.watched(), **worker.timed()}


def test_a_record_and_its_table(tmp_path, monkeypatch):
    """Two contestants are measured, one fails, and for the rest no time is left: all four are in the record."""

    def in_this_process(make, deadline, device, cache):
        name = make.args[0]
        if name == "MagCache":
            return {}, "RuntimeError: out of memory"
        if name == OURS_OUTPUT:  # what comes after it finds no time left
            monkeypatch.setattr(time, "monotonic", lambda: deadline)
            return {}, "stopped"
        return measured(name), ""

    monkeypatch.setattr(gpu, "measured", in_this_process)
    monkeypatch.setattr(gpu, "ROUNDS", (tuple((name, EAGER) for name in ("MagCache", SHELL, PLAIN, OURS_OUTPUT, "FirstBlockCache")),))
    out, table = tmp_path / "gpu.json", tmp_path / "gpu.md"
    argv = ["gpu.py", "--tiny", "--device", "cpu", "--shapes", "wan", "--each", "1e9", "--out", str(out), "--table", str(table)]
    monkeypatch.setattr(sys, "argv", argv)
    gpu.main()
    part = json.loads(out.read_text())["shapes"]["wan"]
    assert part["not_run"] == [gpu.key("FirstBlockCache", EAGER)]
    plain = part["rows"][gpu.key(PLAIN, EAGER)]
    assert (plain["steps"], len(plain["step_ms"]), plain["reused_step_ms"]) == (TINY.baseline_steps, TINY.baseline_steps, None)
    assert plain["host_reads"] == {"computed step": {"scalar reads": 0, "stream waits": 0, "copies to the host": 0}}
    assert plain["peak_bytes"] > 0
    text = table.read_text()
    assert "| MagCache | eager | RuntimeError: out of memory |" in text
    assert "| prologue and epilogue | eager |  | " in text
    assert "Not run, no time was left: FirstBlockCache (eager)." in text


def row(name, mode, seconds, sample=(1.0, 2.0)):
    return {"name": name, "mode": mode, "why": "", "run_seconds": seconds, "steps": len(MASK), "sample": sample}


def test_rows_are_compared_with_the_ideal_of_their_mode_or_the_nearest():
    made = [row(SHELL, EAGER, 1.4), row(PLAIN, EAGER, 14.0), row(SHELL, COMPILED, 1.4), row(PLAIN, COMPILED, 7.0)]
    made += [row(OURS_OUTPUT, EAGER, 5.9), row(OURS_OUTPUT, GRAPHS, 6.8, (1.0, 2.5)), row(ORT, EAGER, 5.9, (1.0, 2.0))]
    rows = gpu.compared({gpu.key(row["name"], row["mode"]): row for row in made})
    eager, graphs = rows[gpu.key(OURS_OUTPUT, EAGER)], rows[gpu.key(OURS_OUTPUT, GRAPHS)]
    assert eager["run_over_ideal"] == pytest.approx(5.9 / (5 * 1.0 + 9 * 0.1))
    assert eager["speed_up_over_plain"] == pytest.approx(14.0 / 5.9)
    assert graphs["run_over_ideal"] == pytest.approx(6.8 / (5 * 0.5 + 9 * 0.1))
    assert graphs["difference_from_ours_eager"] == pytest.approx(0.5 / 5**0.5)
    assert rows[gpu.key(ORT, EAGER)]["difference_from_ours_eager"] == 0
    assert "run_over_ideal" not in rows[gpu.key(PLAIN, EAGER)]


def test_host_reads_are_those_within_steps():
    events = [(STEP, 0, 10), (STEP, 20, 30), (STEP, 40, 50), ("Memcpy DtoH (Device -> Pageable)", 12, 13)]
    events += [
        ("aten::_local_scalar_dense", 5, 6),
        ("cudaStreamSynchronize", 6, 7),
        ("aten::mm", 22, 23),
        ("cudaStreamSynchronize", 41, 42),
    ]
    none = {"scalar reads": 0, "stream waits": 0, "copies to the host": 0}
    assert host_reads(events, (0, 1, 0)) == {
        "computed step": {"scalar reads": 0.5, "stream waits": 1, "copies to the host": 0},
        "reused step": none,
    }


def test_every_contestant_has_a_maker_and_every_mode_a_compilation():
    pairs = [pair for each in ROUNDS for pair in each]
    assert len(pairs) == len(set(pairs))
    assert {name for name, _ in pairs} <= set(MAKERS)
    assert compilation(GRAPHS).options == {"backend": "inductor", "mode": "reduce-overhead"}
    assert {compilation(mode, "aot_eager").options["backend"] for _, mode in pairs} == {"aot_eager"}
    assert compilation(EAGER) == Compilation("eager")


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main()
    assert "there is no GPU here; --tiny --device cpu tries the script" in capsys.readouterr().err


@pytest.mark.slow
def test_everything_that_a_cpu_can(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--device", "cpu", "--seconds", "1200", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    for part in json.loads(out.read_text())["shapes"].values():
        assert not part["not_run"]
        assert {title: row["why"] for title, row in part["rows"].items() if row["why"]} == {}
