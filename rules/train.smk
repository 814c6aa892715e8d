# The adapter, and the model it makes of the base.


rule train:
    input:
        program="scripts/train_adapter.py",
        modules=modules("scripts/train_adapter.py"),
        base=BASE_MODEL,
        tokens="<results>/tokens",
    output:
        adapter=directory("<results>/adapter"),
    log:
        "<results>/logs/train.log",
    benchmark:
        "<results>/benchmarks/train.tsv"
    conda:
        "../envs/train.yaml"
    threads: 4
    resources:
        gpu=1,
        mem_mb=16000,
        runtime="4h",
    params:
        settings=settings("train"),
    shell:
        "python {input.program:q}"
        " --settings {params.settings:q}"
        " --base {input.base:q}"
        " --tokens {input.tokens:q}"
        " --threads {threads}"
        " --output {output.adapter:q}"
        " --log {log:q}"


rule merge:
    input:
        program="scripts/merge_adapter.py",
        modules=modules("scripts/merge_adapter.py"),
        base=BASE_MODEL,
        adapter="<results>/adapter",
    output:
        merged=directory("<results>/merged"),
    log:
        "<results>/logs/merge.log",
    benchmark:
        "<results>/benchmarks/merge.tsv"
    conda:
        "../envs/train.yaml"
    resources:
        mem_mb=8000,
        runtime="30m",
    shell:
        "python {input.program:q}"
        " --base {input.base:q}"
        " --adapter {input.adapter:q}"
        " --output {output.merged:q}"
        " --log {log:q}"
