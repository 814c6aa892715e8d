# GGUF files: 16-bit by llama.cpp's converter, then a quantized file for each variant.


rule convert:
    input:
        program="scripts/convert_model.py",
        modules=modules("scripts/convert_model.py"),
        model="<results>/merged",
        converter=CONVERTER,
    output:
        gguf="<results>/f16.gguf",
    log:
        "<results>/logs/convert.log",
    benchmark:
        "<results>/benchmarks/convert.tsv"
    conda:
        "../envs/llama_cpp.yaml"
    resources:
        mem_mb=memory(4000),
        runtime="30m",
    params:
        settings=settings("model", "dataset", "task", "card"),
    shell:
        "python {input.program:q}"
        " --model {input.model:q}"
        " --converter {input.converter:q}"
        " --settings {params.settings:q}"
        " --output {output.gguf:q}"
        " --log {log:q}"


# The gate: no file is quantized of an F16 that is not the merged model.
rule check_parity:
    input:
        program="scripts/check_parity.py",
        modules=modules("scripts/check_parity.py"),
        base=BASE_MODEL,
        adapter="<results>/adapter",
        model="<results>/merged",
        gguf="<results>/f16.gguf",
        tokens="<results>/tokens",
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
        mem_mb=memory(8000),
        runtime="1h",
    shell:
        "python {input.program:q}"
        " --base {input.base:q}"
        " --adapter {input.adapter:q}"
        " --model {input.model:q}"
        " --gguf {input.gguf:q}"
        " --tokens {input.tokens:q}"
        " --threads {threads}"
        " --output {output.parity:q}"
        " --log {log:q}"


rule quantize:
    input:
        program="scripts/quantize_model.py",
        modules=modules("scripts/quantize_model.py"),
        gguf="<results>/f16.gguf",
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
        mem_mb=memory(4000),
        runtime="1h",
    params:
        settings=variant_settings,
    shell:
        "python {input.program:q}"
        " --settings {params.settings:q}"
        " --source {input.gguf:q}"
        " --threads {threads}"
        " --output {output.gguf:q}"
        " --log {log:q}"
