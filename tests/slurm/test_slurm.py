"""A run through a real SLURM, and what it says and does when things go wrong there."""

import json
import math
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from cluster import Cluster, Run, query, unavailable, wait_until, write_profile
from comparison import differing_files
from conftest import ROOT, SMALL, copy_checkout, run_snakemake
from pockettune.machine import run as machine_run
from pockettune.machine.slurm import check_slurm
from test_sweep import run_sweep, write_sweep

LOCAL = {"fetch_model", "fetch_dataset", "fetch_converter", "compare", "choose", "report", "all"}
ADAPTER = "results/small/adapter"
LOG = "results/small/logs/train.log"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running cluster; what it started is ended with the session."""
    if reason := unavailable():
        pytest.skip(f"no SLURM: {reason}")
    started = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        started.start()
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="session")
def checkout(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which the run was made through SLURM, from nothing."""
    folder = copy_checkout(tmp_path_factory.mktemp("cluster") / "pocket tune")
    write_profile(folder)
    run = Run(folder)
    assert run.finish(seconds=1500) == 0, run.text()[-5000:]
    (folder / "run.txt").rename(folder / "whole.txt")
    return folder


def start_training(checkout: Path, epochs: int, seed: int, *arguments: str) -> Run:
    settings = {"train": {"seed": seed, "epochs": epochs, "eval_every": None}}
    (checkout / LOG).unlink(missing_ok=True)
    (checkout / "runs/fault.yaml").write_text(yaml.safe_dump(settings))
    return Run(checkout, "runs/fault.yaml", *arguments, "--", ADAPTER)


@pytest.fixture(scope="session")
def pace(checkout: Path) -> float:
    """Seconds that an epoch takes here: trainings are made long enough to be disturbed, not longer."""
    epochs = 3
    run = start_training(checkout, epochs, 0)
    assert run.finish() == 0, run.text()[-3000:]
    seconds: float = json.loads((checkout / ADAPTER / "training.json").read_text())["seconds"]
    return seconds / epochs


@pytest.fixture
def train(checkout: Path, cluster: Cluster, pace: float) -> Iterator[Callable[..., Run]]:
    """Start a training of settings of its own, so that it has to be made; nothing is left running."""
    seed = time.monotonic_ns() % 1_000_000
    runs: list[Run] = []

    def start(*arguments: str, seconds: float = 15) -> Run:
        epochs = math.ceil(seconds / pace)
        runs.append(start_training(checkout, epochs, seed, *arguments))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            run.kill()
    subprocess.run(["scancel", "--user=root"], check=False)
    wait_until(lambda: not cluster.jobs("RUNNING", "COMPLETING"), 60, "the jobs to end")
    run_snakemake(checkout, "--unlock", *SMALL)


def wait_for_updates(cluster: Cluster, checkout: Path) -> str:
    """Wait until the training job makes updates; return the job's number."""
    log = checkout / LOG
    wait_until(
        lambda: running_training(cluster) and "trainable parameters" in read(log), 120, "updates"
    )
    time.sleep(2)
    return running_training(cluster)


def running_training(cluster: Cluster) -> str:
    return next((number for number, rule, _ in cluster.jobs("RUNNING") if rule == "train"), "")


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def resumed(checkout: Path) -> int:
    """Return how often the finished training was gone on with."""
    return json.loads((checkout / ADAPTER / "training.json").read_text())["resumed"]


# --- the whole run ---


def test_each_job_ran_where_it_belongs(checkout: Path, cluster: Cluster) -> None:
    output = (checkout / "whole.txt").read_text()
    local = set(re.findall(r"^localrule (\w+):", output, re.MULTILINE))
    assert local == LOCAL
    rules = {number: rule for number, rule, _ in cluster.jobs()}
    assert not LOCAL & set(rules.values())
    partitions = {(rules[job["JobId"]], job["Partition"]) for job in cluster.finished()}
    assert ("train", "gpu") in partitions
    assert {partition for rule, partition in partitions if rule != "train"} == {"cpu"}
    gpus = {(rules[job], gpu) for job, _, gpu in cluster.tasks()}
    assert ("train", "0") in gpus
    assert {gpu for rule, gpu in gpus if rule != "train"} == {"none"}


def test_cluster_makes_what_this_machine_makes(checkout: Path, finished_run: Path) -> None:
    assert differing_files(checkout / "results/small", finished_run / "results/small") == []


def test_training_finds_a_gpu_and_stays_off_the_network(
    train: Callable[..., Run], cluster: Cluster, checkout: Path
) -> None:
    run = train()
    wait_for_updates(cluster, checkout)
    (environment,) = [
        process.info["environ"]
        # Asked for so, what a process that has ended does not tell is None.
        for process in psutil.process_iter(["cmdline", "environ"])
        if "scripts/train_adapter.py" in (process.info["cmdline"] or [])
        and str(checkout) in (process.info["environ"] or {}).get("PWD", "")
    ]
    assert environment["CUDA_VISIBLE_DEVICES"] == "0"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert run.finish() == 0


def test_sweep_shares_its_steps_here_too(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two recipes by two seeds, through the daemons: two trainings, on the partition with the GPU."""
    folder = copy_checkout(tmp_path_factory.mktemp("sweep") / "pocket tune")
    write_profile(folder)
    write_sweep(folder, {"quantize.q4_k_m.type": ["Q4_K_M", "Q4_0"], "train.seed": [13, 14]})
    earlier = {number for number, _, _ in cluster.jobs()}
    result = run_sweep(folder, "--profile", "profiles/test")
    assert result.returncode == 0, result.stdout[-5000:]
    jobs = {number: rule.rpartition("__")[2] for number, rule, _ in cluster.jobs() if number not in earlier}  # fmt: skip
    counts = Counter(jobs.values())
    once = ("tokenize", "check_base", "evaluate_base", "evaluate_tfidf")
    assert [counts[rule] for rule in once] == [1] * len(once)
    assert (counts["train"], counts["merge"], counts["quantize"]) == (2, 2, 4)
    assert not (LOCAL | {"leaderboard"}) & counts.keys()
    places = {(jobs[job["JobId"]], job["Partition"]) for job in cluster.finished() if job["JobId"] in jobs}  # fmt: skip
    assert {rule for rule, partition in places if partition == "gpu"} == {"train"}
    assert len(list((folder / "results/x").glob("*/best.gguf"))) == 4
    assert "type-Q4_0_seed-14" in (folder / "results/x/leaderboard.html").read_text()
    again = run_sweep(folder, "--profile", "profiles/test", "--dry-run")
    assert "Nothing to be done" in again.stdout, again.stdout[-3000:]


# --- trouble ---


def test_cancelled_training_goes_on(
    train: Callable[..., Run], cluster: Cluster, checkout: Path
) -> None:
    run = train("--retries", "0")
    number = wait_for_updates(cluster, checkout)
    subprocess.run(["scancel", number], check=True)
    assert run.finish() == 1
    stopped, failed = run.messages()
    assert re.fullmatch(
        r"train: stopped by SIGTERM after update \d+ of \d+; the same command goes on from there",
        stopped,
    )
    assert (
        f"error: train: SLURM job {number} was cancelled, by scancel or by an administrator"
        in failed
    )
    assert not (checkout / ADAPTER).exists()
    assert train().finish() == 0
    assert resumed(checkout) == 1


def test_training_over_its_time_goes_on_in_the_next_job(
    train: Callable[..., Run], checkout: Path
) -> None:
    limited = ("--set-resources", "train:runtime=1", "train:slurm_partition=gpu")
    run = train("--retries", "0", *limited, seconds=100)
    assert run.finish() == 1
    stopped, failed = run.messages()
    assert "stopped by SIGTERM" in stopped
    assert "ran over its time limit: give it a longer one in the profile" in failed
    run = train(seconds=100)
    assert run.finish() == 0, run.text()[-3000:]
    assert resumed(checkout) == 1


def test_training_over_its_memory(train: Callable[..., Run], checkout: Path) -> None:
    limits = ("--set-resources", "train:slurm_partition=gpu", "train:mem_mb=attempt * 300")
    run = train("--retries", "1", *limits, seconds=1)
    assert run.finish() == 1
    first, second = run.messages()
    for message in (first, second):
        assert "ran over its memory: give it more in the profile (set-resources, mem_mb)" in message
    assert "--mem 300" in run.text() or "mem_mb=300" in run.text()
    assert "mem_mb=600" in run.text(), "the second try has twice the memory"
    assert train(seconds=1).finish() == 0


def test_drained_node_is_named(train: Callable[..., Run], cluster: Cluster) -> None:
    node = f"NodeName={cluster.host}"
    subprocess.run(["scontrol", "update", node, "State=DRAIN", "Reason=maintenance"], check=True)
    try:
        run = train(seconds=1)
        run.wait_for("waiting: train, SLURM job")
        assert run.process.poll() is None
    finally:
        subprocess.run(["scontrol", "update", node, "State=RESUME"], check=True)
    assert run.finish() == 0
    assert "sinfo -R" in run.messages()[0]


def test_controller_restarted_under_way(
    train: Callable[..., Run], cluster: Cluster, checkout: Path
) -> None:
    run = train()
    number = wait_for_updates(cluster, checkout)
    cluster.stop_daemon("slurmctld")
    time.sleep(10)
    cluster.start_daemon("slurmctld", "slurmctld", "-D")
    assert run.finish() == 0, run.text()[-3000:]
    assert resumed(checkout) == 0, "the job itself was not disturbed"
    assert (number, "train", "COMPLETED") in cluster.jobs()


def test_interrupted_snakemake_cancels_its_jobs(
    train: Callable[..., Run], cluster: Cluster, checkout: Path
) -> None:
    run = train()
    number = wait_for_updates(cluster, checkout)
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 1
    assert "Terminating processes on user request" in run.text()
    wait_until(lambda: (number, "train", "CANCELLED") in cluster.jobs(), 60, "the job's end")
    assert train().finish() == 0
    assert resumed(checkout) == 1


def test_killed_snakemake_leaves_a_job_that_is_named(
    train: Callable[..., Run], cluster: Cluster, checkout: Path
) -> None:
    run = train(seconds=60)
    number = wait_for_updates(cluster, checkout)
    run.kill()
    assert train(seconds=60).finish() == 1
    assert "--unlock" in (checkout / "run.txt").read_text()
    run_snakemake(checkout, "--unlock", *SMALL)
    run = train(seconds=60)
    assert run.finish() == 2
    (message,) = run.messages()
    assert (
        f"SLURM still has jobs of an earlier snakemake for results/small: {number} (train)"
        in message
    )
    assert query("squeue", "--noheader", "--states=RUNNING", "--format=%i").split() == [number]
    subprocess.run(["scancel", number], check=True)
    wait_until(lambda: not cluster.jobs("RUNNING", "COMPLETING"), 60, "the job's end")
    assert train(seconds=60).finish() == 0
    assert resumed(checkout) == 1


def test_doctor_compares_the_profile_with_this_cluster(cluster: Cluster) -> None:
    """It has the profile's partitions and no accounting."""
    run = machine_run.Run(ROOT, profile=machine_run.load_profile(ROOT / "profiles/slurm"))
    (finding,) = check_slurm(run)
    assert finding.state == "problem" and "accounting storage is disabled" in finding.detail
    run.profile = {**run.profile, "slurm-status-command": "squeue"}
    (finding,) = check_slurm(run)
    assert finding.state == "ok" and "partitions cpu, gpu" in finding.detail
    run.profile = {**run.profile, "set-resources": {"train": {"slurm_partition": "a100"}}}
    (finding,) = check_slurm(run)
    assert finding.state == "problem" and "no partition a100 (of train)" in finding.detail
