# Every stage is scored on the same rows; the scores are put side by side and into the report.


localrules:
    compare,
    report,


rule evaluate_base:
    input:
        program="scripts/evaluate_model.py",
        modules=modules("scripts/evaluate_model.py"),
        model=BASE_MODEL,
        tokens="<results>/tokens",
    output:
        metrics="<results>/metrics/base.json",
        predictions="<results>/predictions/base.parquet",
    log:
        "<results>/logs/evaluate_base.log",
    benchmark:
        "<results>/benchmarks/evaluate_base.tsv"
    conda:
        "../envs/train.yaml"
    threads: 4
    resources:
        mem_mb=8000,
        runtime="2h",
    params:
        settings=settings("task", "dataset", "evaluate"),
        stage="base",
    shell:
        "python {input.program:q}"
        " --settings {params.settings:q}"
        " --stage {params.stage:q}"
        " --model {input.model:q}"
        " --tokens {input.tokens:q}"
        " --threads {threads}"
        " --metrics {output.metrics:q}"
        " --predictions {output.predictions:q}"
        " --log {log:q}"


use rule evaluate_base as evaluate_merged with:
    input:
        program="scripts/evaluate_model.py",
        modules=modules("scripts/evaluate_model.py"),
        model="<results>/merged",
        tokens="<results>/tokens",
    output:
        metrics="<results>/metrics/merged.json",
        predictions="<results>/predictions/merged.parquet",
    log:
        "<results>/logs/evaluate_merged.log",
    benchmark:
        "<results>/benchmarks/evaluate_merged.tsv"
    params:
        settings=settings("task", "dataset", "evaluate"),
        stage="merged",


rule evaluate_gguf:
    input:
        program="scripts/evaluate_gguf.py",
        modules=modules("scripts/evaluate_gguf.py"),
        gguf="<results>/{stage}.gguf",
        tokens="<results>/tokens",
    output:
        metrics="<results>/metrics/{stage}.json",
        predictions="<results>/predictions/{stage}.parquet",
    log:
        "<results>/logs/evaluate_{stage}.log",
    benchmark:
        "<results>/benchmarks/evaluate_{stage}.tsv"
    wildcard_constraints:
        stage="|".join(["f16", *VARIANTS]),
    conda:
        "../envs/llama_cpp.yaml"
    threads: 4
    resources:
        mem_mb=4000,
        runtime="2h",
    params:
        settings=settings("task", "dataset", "evaluate"),
    shell:
        "python {input.program:q}"
        " --settings {params.settings:q}"
        " --stage {wildcards.stage:q}"
        " --model {input.gguf:q}"
        " --tokens {input.tokens:q}"
        " --threads {threads}"
        " --metrics {output.metrics:q}"
        " --predictions {output.predictions:q}"
        " --log {log:q}"


rule compare:
    input:
        program="scripts/compare_stages.py",
        modules=modules("scripts/compare_stages.py"),
        metrics=expand("<results>/metrics/{stage}.json", stage=STAGES),
        predictions=expand("<results>/predictions/{stage}.parquet", stage=STAGES),
    output:
        json="<results>/metrics.json",
        csv="<results>/metrics.csv",
    log:
        "<results>/logs/compare.log",
    benchmark:
        "<results>/benchmarks/compare.tsv"
    conda:
        "../envs/report.yaml"
    shell:
        "python {input.program:q}"
        " --metrics {input.metrics:q}"
        " --predictions {input.predictions:q}"
        " --json {output.json:q}"
        " --csv {output.csv:q}"
        " --log {log:q}"


rule report:
    input:
        program="scripts/write_report.py",
        modules=modules("scripts/write_report.py"),
        template="report/report.html.j2",
        metrics="<results>/metrics.json",
        audit="<results>/dataset/audit.json",
        tokens="<results>/tokens",
        adapter="<results>/adapter",
        base=BASE_MODEL,
        benchmarks=expand("<results>/benchmarks/{job}.tsv", job=JOBS),
    output:
        html="<results>/report.html",
    log:
        "<results>/logs/report.log",
    benchmark:
        "<results>/benchmarks/report.tsv"
    conda:
        "../envs/report.yaml"
    params:
        settings=report_settings,
    shell:
        "python {input.program:q}"
        " --settings {params.settings:q}"
        " --template {input.template:q}"
        " --metrics {input.metrics:q}"
        " --audit {input.audit:q}"
        " --tokens {input.tokens:q}"
        " --adapter {input.adapter:q}"
        " --base {input.base:q}"
        " --benchmarks {input.benchmarks:q}"
        " --output {output.html:q}"
        " --log {log:q}"
