# From the hub, or local files, to token ids. The fetch rules need the network, so on a cluster
# they stay on the login node.


localrules:
    fetch_dataset,
    fetch_converter,
    pack_offline,
    pack_offline_with_everything,
    pack_offline_with_wheels,


if GGUF_BASE:

    rule import_gguf:
        input:
            **program("import_gguf"),
            source=model_files(),
        output:
            model=directory(FETCHED_MODEL),
            manifest=f"{FETCHED_MODEL}.sha256",
        log:
            "<results>/logs/import_gguf.log",
        benchmark:
            "<results>/benchmarks/import_gguf.tsv"
        conda:
            "../envs/llama_cpp.yaml"
        threads: 4
        resources:
            mem_mb=memory(8000, "check_parity"),
            runtime="1h",
        params:
            settings=fetch_settings,
        shell:
            command("params.settings threads output=output.model")

else:

    localrules:
        fetch_model,

    rule fetch_model:
        input:
            **program("fetch_model"),
            source=model_files(),
        output:
            model=directory(FETCHED_MODEL),
            manifest=f"{FETCHED_MODEL}.sha256",
        log:
            "<results>/logs/fetch_model.log",
        benchmark:
            "<results>/benchmarks/fetch_model.tsv"
        conda:
            "../envs/data.yaml"
        params:
            settings=fetch_settings,
        shell:
            command("params.settings downloads=resources/downloads output=output.model")


rule fetch_dataset:
    input:
        **program("fetch_dataset"),
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
        command("params.settings downloads=resources/downloads output.audit")


rule fetch_converter:
    input:
        **program("fetch_converter"),
    output:
        converter=directory(CONVERTER),
        manifest=f"{CONVERTER}.sha256",
    log:
        "<results>/logs/fetch_converter.log",
    benchmark:
        "<results>/benchmarks/fetch_converter.tsv"
    conda:
        "../envs/data.yaml"
    params:
        version=LLAMA_CPP_PYTHON,
    shell:
        command("params.version downloads=resources/downloads output=output.converter")


# All that this config needs from outside, in one file for a machine without a network. Made only
# when it is asked for; scripts/unpack_offline.py places it there.
rule pack_offline:
    input:
        **program("pack_offline"),
        model=hub_model(),
        fetched=OUT_OF_PACKAGES,
        requirements="requirements.txt",
        extras=expand("requirements-{kind}.txt", kind=FORMATS),
        constraints="constraints.txt",
    output:
        bundle="<results>/offline.tar",
    log:
        "<results>/logs/pack_offline.log",
    benchmark:
        "<results>/benchmarks/pack_offline.tsv"
    conda:
        "../envs/data.yaml"
    params:
        settings=settings("model", "dataset"),
        packages=PACKAGES,
        wheels="none",
        devices="none",
    shell:
        command(
            "params.settings input.model params.packages downloads=resources/downloads"
            " params.wheels params.devices input.requirements input.extras input.constraints"
            " output=output.bundle"
        )


use rule pack_offline as pack_offline_with_wheels with:
    output:
        bundle="<results>/offline-with-wheels.tar",
    log:
        "<results>/logs/pack_offline_with_wheels.log",
    benchmark:
        "<results>/benchmarks/pack_offline_with_wheels.tsv"
    params:
        settings=settings("model", "dataset"),
        packages=PACKAGES,
        wheels="all",
        devices="none",


use rule pack_offline as pack_offline_with_everything with:
    output:
        bundle="<results>/offline-with-everything.tar",
    log:
        "<results>/logs/pack_offline_with_everything.log",
    benchmark:
        "<results>/benchmarks/pack_offline_with_everything.tsv"
    params:
        settings=settings("model", "dataset"),
        packages=PACKAGES,
        wheels="all",
        devices="all",


rule tokenize:
    input:
        **program("tokenize_dataset"),
        **folder("model", FETCHED_MODEL),
        train="<results>/dataset/train.jsonl",
        validation="<results>/dataset/validation.jsonl",
        test="<results>/dataset/test.jsonl",
    output:
        tokens=directory("<results>/tokens"),
        manifest="<results>/tokens.sha256",
    log:
        "<results>/logs/tokenize.log",
    benchmark:
        "<results>/benchmarks/tokenize.tsv"
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=memory(4000, "tokenize"),
        runtime="1h",
    params:
        settings=settings("task", "tokenize", "dataset"),
    shell:
        command(
            "params.settings input.model input.train input.validation input.test"
            " output=output.tokens"
        )
