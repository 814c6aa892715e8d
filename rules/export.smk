# GGUF files: 16-bit by llama.cpp's converter, then a quantized file for each variant.


rule convert:
    input:
        **program("convert_model"),
        **folder("model", "<results>/merged"),
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
            "input.model input.adapter input.converter params.settings output=output.gguf"
        )


# The gate: no file is quantized of an F16 that is not the merged model.
rule check_parity:
    input:
        **program("check_parity"),
        **folder("base", BASE_MODEL),
        **folder("adapter", "<results>/adapter"),
        **folder("model", "<results>/merged"),
        **folder("tokens", "<results>/tokens"),
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
            "params.settings input.base input.adapter input.model input.gguf input.tokens"
            " input.records threads output=output.parity"
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
        variant="|".join(VARIANTS),
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
