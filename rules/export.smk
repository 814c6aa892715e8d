# GGUF files: 16-bit by llama.cpp's converter, then a quantized file for each variant.


if TRIM:

    # Its priority puts it before the training, which does not need it.
    rule check_vocabulary:
        input:
            **program("check_vocabulary"),
            **folder("base", FETCHED_MODEL),
            **folder("tokens", "<results>/tokens"),
            train="<results>/dataset/train.jsonl",
        output:
            check="<results>/vocabulary_check.json",
        log:
            "<results>/logs/check_vocabulary.log",
        benchmark:
            "<results>/benchmarks/check_vocabulary.tsv"
        priority: 1
        conda:
            "../envs/train.yaml"
        resources:
            mem_mb=memory(4000),
            runtime="30m",
        params:
            settings=settings("vocabulary", "task", "dataset"),
        shell:
            command(
                "params.settings input.base input.tokens input.train output=output.check"
            )

    rule trim_vocabulary:
        input:
            **program("trim_vocabulary"),
            **folder("model", "<results>/merged"),
            **folder("tokens", "<results>/tokens"),
            check="<results>/vocabulary_check.json",
            train="<results>/dataset/train.jsonl",
            test="<results>/dataset/test.jsonl",
        output:
            trimmed=directory(SHIPPED_MODEL),
            manifest=f"{SHIPPED_MODEL}.sha256",
            vocabulary=VOCABULARY,
        log:
            "<results>/logs/trim_vocabulary.log",
        benchmark:
            "<results>/benchmarks/trim_vocabulary.tsv"
        conda:
            "../envs/train.yaml"
        resources:
            mem_mb=memory(4000, "merge"),
            runtime="30m",
        params:
            settings=settings("vocabulary", "task", "dataset"),
        shell:
            command(
                "params.settings input.model input.tokens input.train input.test"
                " output=output.trimmed output.vocabulary"
            )

    # A text that train has not may fall apart into other tokens than before.
    use rule tokenize as tokenize_trimmed with:
        input:
            **program("tokenize_dataset"),
            **folder("model", SHIPPED_MODEL),
            train="<results>/dataset/train.jsonl",
            validation="<results>/dataset/validation.jsonl",
            test="<results>/dataset/test.jsonl",
        output:
            tokens=directory(SHIPPED_TOKENS),
            manifest=f"{SHIPPED_TOKENS}.sha256",
        log:
            "<results>/logs/tokenize_trimmed.log",
        benchmark:
            "<results>/benchmarks/tokenize_trimmed.tsv"


rule convert:
    input:
        **program("convert_model"),
        **folder("model", SHIPPED_MODEL),
        **(folder("whole", "<results>/merged") if TRIM else {"whole": []}),
        **folder("adapter", "<results>/adapter"),
        **folder("converter", CONVERTER),
    output:
        gguf="<results>/f16.gguf",
    log:
        "<results>/logs/convert.log",
    benchmark:
        "<results>/benchmarks/convert.tsv"
    conda:
        "../envs/llama_cpp.yaml"
    resources:
        mem_mb=memory(4000, "convert"),
        runtime="30m",
    params:
        settings=settings("model", "dataset", "task", "card"),
    shell:
        command(
            "input.model input.whole input.adapter input.converter params.settings"
            " output=output.gguf"
        )


# The gate: no file is quantized of an F16 that is not the merged model.
rule check_parity:
    input:
        **program("check_parity"),
        **folder("base", BASE_MODEL),
        **folder("adapter", "<results>/adapter"),
        **folder("model", SHIPPED_MODEL),
        **folder("tokens", SHIPPED_TOKENS),
        vocabulary=VOCABULARY,
        gguf="<results>/f16.gguf",
        records="<results>/dataset/test.jsonl",
    output:
        parity="<results>/parity.json",
    log:
        "<results>/logs/check_parity.log",
    benchmark:
        "<results>/benchmarks/check_parity.tsv"
    conda:
        "../envs/llama_cpp.yaml"
    threads: 4
    resources:
        mem_mb=memory(8000, "check_parity"),
        runtime="1h",
    params:
        settings=settings("task", "dataset", "card"),
    shell:
        command(
            "params.settings input.base input.adapter input.model input.vocabulary input.gguf"
            " input.tokens input.records threads output=output.parity"
        )


if IMPORTANCE:

    rule measure_importance:
        input:
            **program("measure_importance"),
            **folder("model", "<results>/merged"),
            **folder("tokens", "<results>/tokens"),
        output:
            importance="<results>/importance.gguf",
        log:
            "<results>/logs/measure_importance.log",
        benchmark:
            "<results>/benchmarks/measure_importance.tsv"
        conda:
            "../envs/llama_cpp.yaml"
        threads: 4
        resources:
            gpu_turn=GPU_TURN,
            mem_mb=memory(8000, "evaluate (PyTorch)"),
            runtime="2h",
        shell:
            command("input.model input.tokens threads output=output.importance")


rule quantize:
    input:
        **program("quantize_model"),
        gguf="<results>/f16.gguf",
        importance=variant_importance,
        parity="<results>/parity.json",
    output:
        gguf="<results>/{variant}.gguf",
    log:
        "<results>/logs/quantize_{variant}.log",
    benchmark:
        "<results>/benchmarks/quantize_{variant}.tsv"
    wildcard_constraints:
        variant="|".join(GGUF_VARIANTS),
    conda:
        "../envs/llama_cpp.yaml"
    threads: 4
    resources:
        mem_mb=memory(4000, "quantize"),
        runtime="1h",
    params:
        settings=variant_settings,
    shell:
        command(
            "params.settings source=input.gguf input.importance threads"
            " output=output.gguf"
        )
