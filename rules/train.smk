# The adapter, and the model it makes of the base.


if OWN_ADAPTER:

    rule import_adapter:
        input:
            program="scripts/import_adapter.py",
            modules=modules("scripts/import_adapter.py"),
            base=BASE_MODEL,
            files=adapter_files(),
        output:
            adapter=directory("<results>/adapter"),
        log:
            "<results>/logs/import_adapter.log",
        benchmark:
            "<results>/benchmarks/import_adapter.tsv"
        conda:
            "../envs/data.yaml"
        params:
            adapter=OWN_ADAPTER,
        shell:
            "python {input.program:q}"
            " --adapter {params.adapter:q}"
            " --base {input.base:q}"
            " --output {output.adapter:q}"
            " --log {log:q}"

else:

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
            mem_mb=memory(16000),
            runtime="4h",
        params:
            settings=settings("train", "task", "dataset"),
        shell:
            "python {input.program:q}"
            " --settings {params.settings:q}"
            " --base {input.base:q}"
            " --tokens {input.tokens:q}"
            " --threads {threads}"
            ' --scratch "$(dirname {output.adapter:q})/scratch"'
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
        mem_mb=memory(8000),
        runtime="30m",
    shell:
        "python {input.program:q}"
        " --base {input.base:q}"
        " --adapter {input.adapter:q}"
        " --output {output.merged:q}"
        " --log {log:q}"
