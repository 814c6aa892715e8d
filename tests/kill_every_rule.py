"""Kill snakemake and its jobs with SIGKILL in every rule, and see that nothing is lost.

The small run is started again and again in a checkout of its own. Each time, a job that was not killed
often enough is let run for a random share of its usual time, then everything dies at once, as when
the machine loses power. After every kill the plan must hold just the jobs that had not finished.
At the end the run is let finish, and what it made is compared with an undisturbed run's. Then the same
with the rules that it does not need, in the same folders: files of the other formats whose packages are
here; then on fewer layers, with the run itself as teacher, with importance, with a trimmed vocabulary.

    python tests/kill_every_rule.py --rounds 3
"""

import argparse
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import yaml

from comparison import differing_files
from conftest import CONVERTER, SMALL, copy_checkout, kill_session, run_snakemake, start_snakemake
from formats_run import ask_for_formats
from small_run import copy_as_teacher

# The rules that the small run does not need, up to the last of them.
MORE = ("runs/more.yaml", "--", "results/small/importance.gguf", "results/small/trimmed_tokens")

# What other tests ask for in the checkout that is left undisturbed.
ASKED_FOR = ("bundle", "app")

JOB = re.compile(r"^(?:local)?rule (\w+):\n((?: +.*\n)+)", re.MULTILINE)

# Rules whose benchmarks are not named after rule and wildcard.
NAMED_OTHERWISE = {
    "evaluate_variant": "evaluate",
    "evaluate_onnx": "evaluate",
    "evaluate_litert": "evaluate",
    "export_onnx": "export",
    "export_litert": "export_litert_float",
    "quantize_litert": "export",
    "measure_speed_onnx": "measure_speed",
    "measure_speed_litert": "measure_speed",
}

Job = str  # a rule's name and its wildcards, "evaluate_variant variant=q4_k_m"


def jobs_in(output: str) -> dict[str, Job]:
    """Return the jobs that Snakemake announced, by the number that it gave them."""
    jobs = {}
    for rule, block in JOB.findall(output):
        number = re.search(r"^ +jobid: (\d+)$", block, re.MULTILINE)
        wildcards = re.search(r"^ +wildcards: (.*)$", block, re.MULTILINE)
        assert number, block
        jobs[number[1]] = f"{rule} {wildcards[1]}" if wildcards else rule
    return jobs


def finished_in(output: str) -> set[Job]:
    """Return the jobs that Snakemake said were finished."""
    jobs = jobs_in(output)
    return {jobs[number] for number in re.findall(r"^Finished jobid: (\d+) ", output, re.MULTILINE)}


def planned(folder: Path, *target: str) -> set[Job]:
    """Return the jobs that the next call would run."""
    result = run_snakemake(folder, "--dry-run", *SMALL, *target)
    assert result.returncode == 0, result.stdout[-3000:]
    return set(jobs_in(result.stdout).values())


def usual_seconds(folder: Path) -> dict[Job, float]:
    """Return how long each job took in a finished run, from its benchmark files."""
    files = sorted((folder / "results/small/benchmarks").glob("*.tsv"))
    return {file.stem: float(file.read_text().splitlines()[1].split("\t")[0]) for file in files}


def usual_time(job: Job, usual: dict[str, float]) -> float:
    """Return a job's usual time; two seconds where no benchmark tells."""
    rule, _, wildcards = job.partition(" ")
    step, value = NAMED_OTHERWISE.get(rule, rule), wildcards.partition("=")[2]
    return usual.get(f"{step}_{value}" if value else step, 2.0)


class Victim:
    """A snakemake under way."""

    def __init__(self, folder: Path, output: Path, *target: str) -> None:
        self.output = output
        self.process = start_snakemake(folder, output, "--cores", "2", *SMALL, *target)

    def running(self) -> set[Job]:
        """Return the jobs that were announced and not said to be finished."""
        output = self.output.read_text()
        return set(jobs_in(output).values()) - finished_in(output) - {"all"}

    def wait_for_job(self, open_jobs: Callable[[set[Job]], list[Job]]) -> Job | None:
        """Return the first of the running jobs that are still to be hit; None when the run ended."""
        while self.process.poll() is None:
            if open_jobs(self.running()):
                time.sleep(0.1)  # for those that start with it
                if jobs := open_jobs(self.running()):
                    return jobs[0]
            time.sleep(0.02)
        assert self.process.returncode == 0, self.output.read_text()[-3000:]
        return None

    def kill(self, moment: float) -> None:
        """After so many seconds end snakemake and all its jobs, without a chance to clean up."""
        try:
            self.process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            kill_session(self.process)


def kill_in_turn(
    folder: Path,
    usual: dict[str, float],
    rounds: int,
    dice: random.Random,
    *target: str,
    spare: Collection[Job] = (),
) -> Iterator[tuple[float, set[Job]]]:
    """Aim at each job `rounds` times, until the run is through; yield the moment and what was hit.

    The run is for all, or for the `target` that is given as to snakemake. At those to `spare` it is not
    aimed.

    Raises AssertionError where the next call would make a finished file again, or would take a
    job that was hit for finished.
    """
    everything = planned(folder, *target)
    aimed: Counter[Job] = Counter()
    finished: set[Job] = set()
    while True:
        victim = Victim(folder, folder.parent / "killed.txt", *target)
        job = victim.wait_for_job(
            lambda jobs: sorted(
                (j for j in jobs - set(spare) if aimed[j] < rounds),
                key=lambda j: usual_time(j, usual),
            )
        )
        if job is None:
            return
        aimed[job] += 1
        moment = dice.uniform(0, 0.8 * usual_time(job, usual))
        victim.kill(moment)
        finished |= finished_in(victim.output.read_text())
        hit = victim.running()
        run_snakemake(folder, "--unlock", *SMALL)
        plan = planned(folder, *target)
        assert not plan & finished, (
            f"{job} hit at {moment:.2f} s: would be made again: {plan & finished}"
        )
        # One may end in the blink before Snakemake says so; the comparison will tell if it had not.
        gone = everything - finished - plan
        assert gone <= hit, (
            f"{job} hit at {moment:.2f} s: never made, but not planned: {gone - hit}"
        )
        finished |= gone
        yield moment, hit - gone


def leftovers(folder: Path) -> list[str]:
    """Return what killed programs left under temporary names and no later one removed."""
    places = [folder / "results", folder / "resources"]
    return [str(path) for place in places for path in place.rglob("*.partial")]


def begin(folder: Path) -> Path:
    """Make a checkout in which everything is still to be made."""
    copy_checkout(folder)
    shutil.rmtree(folder / "resources" / CONVERTER.name)  # it is to be fetched under kills, too
    return folder


def ask_for_more(folder: Path) -> None:
    """Write runs/more.yaml into a checkout with a finished run: what changes with it are the rules of MORE."""
    teacher = copy_as_teacher(folder)
    run = {
        "model": {"keep_layers": {"count": 1, "choose": "auto"}},
        "train": {"teacher": {"path": teacher}, "epochs": 0.2, "eval_every": None},
        "vocabulary": {"keep": "task"},
        "quantize": {"q4_0": {"type": "Q4_0", "importance": True}},
    }
    (folder / "runs/more.yaml").write_text(yaml.safe_dump(run))


def kill_all(
    undisturbed: Path,
    folder: Path,
    rounds: int,
    seed: int,
    *target: str,
    spare: Collection[Job] = (),
) -> Counter[Job]:
    """Run all, or the target, under kills in `folder`; return the hits."""
    hits: Counter[Job] = Counter()
    dice, usual = random.Random(seed), usual_seconds(undisturbed)
    for moment, hit in kill_in_turn(folder, usual, rounds, dice, *target, spare=spare):
        hits.update(hit)
        print(
            f"after {moment:.2f} s: {', '.join(sorted(hit)) or 'nothing, it was quicker'}",
            flush=True,
        )
    return hits


def compare(undisturbed: Path, folder: Path) -> None:
    """Raise AssertionError where a run that was killed made other files, or left something behind."""
    for part in (
        "results/small",
        "data",
        "resources/models",
        f"resources/{CONVERTER.name}",
    ):
        differing = [
            name
            for name in differing_files(undisturbed / part, folder / part)
            if name.split("/")[0].removesuffix(".sha256") not in ASKED_FOR
        ]
        assert not differing, f"{part}: not as in the undisturbed run: {differing}"
    assert not leftovers(folder), leftovers(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often to aim at each job")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 100_000)
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = copy_checkout(Path(folder, "undisturbed"))
        result = run_snakemake(undisturbed, *SMALL)
        assert result.returncode == 0, result.stdout[-3000:]
        killed = begin(Path(folder, "killed", "checkout"))
        hits = kill_all(undisturbed, killed, arguments.rounds, arguments.seed)
        compare(undisturbed, killed)
        for ask, target in ((ask_for_formats, ()), (ask_for_more, MORE)):
            for checkout in (undisturbed, killed):
                ask(checkout)
            result = run_snakemake(undisturbed, *SMALL, *target)
            assert result.returncode == 0, result.stdout[-3000:]
            hits += kill_all(undisturbed, killed, arguments.rounds, arguments.seed, *target)
            compare(undisturbed, killed)
    for job, count in sorted(hits.items()):
        print(f"{count:3} {job}")
    print(
        f"{hits.total()} jobs killed; the same files as undisturbed, nothing finished was made again"
    )


if __name__ == "__main__":
    main()
