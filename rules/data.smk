# From the hub, or local files, to token ids. The fetch rules need the network, so on a cluster
# they stay on the login node.


localrules:
    fetch_model,
    fetch_dataset,
    fetch_converter,


rule fetch_model:
    input:
        program="scripts/fetch_model.py",
        modules=modules("scripts/fetch_model.py"),
        source=model_files(),
    output:
        model=directory(BASE_MODEL),
    log:
        "<results>/logs/fetch_model.log",
    benchmark:
        "<results>/benchmarks/fetch_model.tsv"
    conda:
        "../envs/data.yaml"
    params:
        settings=settings("model"),
    shell:
        "python {input.program:q}"
        " --settings {params.settings:q}"
        " --downloads resources/downloads"
        " --output {output.model:q}"
        " --log {log:q}"


rule fetch_dataset:
    input:
        program="scripts/fetch_dataset.py",
        modules=modules("scripts/fetch_dataset.py"),
        files=dataset_files(),
    output:
        train="<results>/dataset/train.jsonl",
        validation="<results>/dataset/validation.jsonl",
        test="<results>/dataset/test.jsonl",
        audit="<results>/dataset/audit.json",
    log:
        "<results>/logs/fetch_dataset.log",
    benchmark:
        "<results>/benchmarks/fetch_dataset.tsv"
    conda:
        "../envs/data.yaml"
    params:
        settings=dataset_settings,
    shell:
        "python {input.program:q}"
        " --settings {params.settings:q}"
        " --downloads resources/downloads"
        ' --output "$(dirname {output.audit:q})"'
        " --log {log:q}"


rule fetch_converter:
    input:
        program="scripts/fetch_converter.py",
        modules=modules("scripts/fetch_converter.py"),
    output:
        converter=directory(CONVERTER),
    log:
        "<results>/logs/fetch_converter.log",
    benchmark:
        "<results>/benchmarks/fetch_converter.tsv"
    conda:
        "../envs/data.yaml"
    params:
        version=LLAMA_CPP_PYTHON,
    shell:
        "python {input.program:q}"
        " --version {params.version:q}"
        " --downloads resources/downloads"
        " --output {output.converter:q}"
        " --log {log:q}"


rule tokenize:
    input:
        program="scripts/tokenize_dataset.py",
        modules=modules("scripts/tokenize_dataset.py"),
        model=BASE_MODEL,
        train="<results>/dataset/train.jsonl",
        validation="<results>/dataset/validation.jsonl",
        test="<results>/dataset/test.jsonl",
    output:
        tokens=directory("<results>/tokens"),
    log:
        "<results>/logs/tokenize.log",
    benchmark:
        "<results>/benchmarks/tokenize.tsv"
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=memory(4000),
        runtime="1h",
    params:
        settings=settings("task", "tokenize", "dataset"),
    shell:
        "python {input.program:q}"
        " --settings {params.settings:q}"
        " --model {input.model:q}"
        " --train {input.train:q}"
        " --validation {input.validation:q}"
        " --test {input.test:q}"
        " --output {output.tokens:q}"
        " --log {log:q}"
