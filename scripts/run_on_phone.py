"""Replay a bundle's rows on a phone or an ARM board, and measure there: one JSON file.

Finds the device (adb, or ssh with --host), sends it the program for its processor, the model and
the rows, runs, and compares every label's log probability with that which was scored. Exit status 2
where an answer is another.

Input   a bundle of make_bundle.py and the programs of build_phone.py
Output  answers, rates (prompt and generation), memory, temperature, the battery's energy a token;
        null is what the device does not tell
"""

import argparse
from pathlib import Path

from pockettune.common import program
from pockettune.common.errors import UserError
from pockettune.data.records import read_records
from pockettune.phone.devices import Device, find_device
from pockettune.phone.results import compare, describe, summarize
from pockettune.phone.selection import choose_program

FILES = ("model.gguf", "conformance.jsonl")


def run_on_phone(
    device: Device, bundle: Path, programs: Path, options: tuple[int, int, int], output: Path
) -> None:
    """Send, run, compare, and write `output`."""
    name = choose_program(device.run("uname -m"), device.run("cat /proc/cpuinfo"))
    files = [programs / f"score-{name}", *(bundle / file for file in FILES)]
    if missing := [str(path) for path in files if not path.is_file()]:
        raise UserError(f"{', '.join(missing)}: not there; make phone builds them")
    if "labels" not in next(read_records(bundle / "conformance.jsonl")):
        raise UserError(
            f"{bundle} is of a task whose answers are text, and the program for phones answers with labels; run"
            " llama-server there with the bundle's llama-server.ini and scripts/conform.py here (docs/phone.md)"
        )
    device.run(f"mkdir -p {device.folder}")
    sent = {path.name: device.put(path, path.name) for path in files}
    program.logger.info("running score-%s on %s", name, device.name)
    arguments = " ".join([*FILES, *map(str, options)])
    # Behind exit the shell waits for the program, and so tells of a signal in a number; sshd does not.
    command = f"cd {device.folder} && chmod 755 score-{name} && ./score-{name} {arguments}; exit $?"
    measured = summarize(device.run(command, seconds=None))
    comparison = compare(list(read_records(files[-1])), measured["rows"])
    result = {
        "device": {"name": device.name, "model": _model(device), "program": name},
        "model": {"sha256": sent["model.gguf"]},
        "comparison": comparison,
        **{key: value for key, value in measured.items() if key != "rows"},
    }
    program.write_json(output, result)
    program.logger.info("%s", describe(result))
    if comparison["wrong"]:
        raise UserError(
            f"{len(comparison['wrong'])} rows are answered otherwise than was scored; see {output}"
        )


def _model(device: Device) -> str:
    """Return the maker's name of the device, as far as it tells."""
    if device.client[0] == "adb":
        return device.run("getprop ro.product.model").strip()
    return device.run("tr -d '\\0' < /proc/device-tree/model 2>/dev/null || uname -sr").strip()


def main() -> None:
    parser = program.argument_parser(__doc__)
    parser.add_argument("--look", action="store_true", help="only see whether there is a device")
    parser.add_argument("--host", help="user@host of a board, by ssh")
    parser.add_argument("--serial", help="of the phone, where adb sees several")
    parser.add_argument("--bundle", type=Path, default=Path("results/bundle"))
    parser.add_argument("--programs", type=Path, default=Path("resources/phone"))
    parser.add_argument("--threads", type=int, default=4, help="as many as it has big cores")
    parser.add_argument("--rounds", type=int, default=5, help="of measuring")
    parser.add_argument("--rest", type=int, default=20, help="seconds before each, to cool down")
    parser.add_argument("--output", type=Path, default=Path("results/phone.json"))

    def work(arguments: argparse.Namespace) -> None:
        device = find_device(arguments.host, arguments.serial)
        program.logger.info("found %s", device.name)
        if not arguments.look:
            options = (arguments.threads, arguments.rounds, arguments.rest)
            run_on_phone(device, arguments.bundle, arguments.programs, options, arguments.output)

    program.run(parser, work)


if __name__ == "__main__":
    main()
