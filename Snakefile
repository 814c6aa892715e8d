# PocketTune: dataset -> tokens -> LoRA adapter -> merged FP16 -> GGUF F16 -> quantized -> metrics.
# The rules are in rules/, one file per part; each runs the program of the same name in scripts/.

from snakemake.utils import min_version

min_version("9.12")


configfile: "config.yaml"


report: "report/workflow.rst"


include: "rules/common.smk"
include: "rules/data.smk"
include: "rules/train.smk"
include: "rules/export.smk"
include: "rules/evaluate.smk"
include: "rules/demo.smk"


onstart:
    prepare_cluster()


onerror:
    repeat_errors(log)


rule all:
    default_target: True
    input:
        variants=expand("<results>/{variant}.gguf", variant=VARIANTS),
        metrics="<results>/metrics.json",
        report="<results>/report.html",
