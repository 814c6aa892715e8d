# PocketTune: dataset -> tokens -> LoRA adapter -> merged FP16 -> GGUF F16 -> quantized -> metrics.
# The rules are in rules/, one file per part; each runs the program of the same name in scripts/.

import shlex
import sys
from pathlib import Path

from snakemake.utils import min_version

min_version("9.12")

# The paths of the rules and of a run file count from here, in every job too.
if Path.cwd().resolve() != Path(workflow.basedir).resolve():
    print(
        f"error: run in {Path.cwd()}, where the Snakefile is not:"
        f" cd {shlex.quote(workflow.basedir)} first, without --snakefile and --directory; a run"
        " file's pathvars.results may lead elsewhere",
        file=sys.stderr,
    )
    sys.exit(2)


configfile: "config.yaml"


report: "report/workflow.rst"


include: "rules/common.smk"
include: "rules/data.smk"
include: "rules/train.smk"
include: "rules/export.smk"
include: "rules/onnx.smk"
include: "rules/litert.smk"
include: "rules/evaluate.smk"
include: "rules/bundle.smk"
include: "rules/app.smk"
include: "rules/demo.smk"


onstart:
    prepare_cluster()


onerror:
    repeat_errors(log)


rule all:
    default_target: True
    input:
        variants=FILES,
        metrics="<results>/metrics.json",
        report="<results>/report.html",
        best=CHOICE,
