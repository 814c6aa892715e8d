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
        mem_mb=4000,
        runtime="30m",
    params:
        name=model_label(),
    shell:
        "python {input.program:q}"
        " --model {input.model:q}"
        " --converter {input.converter:q}"
        " --name {params.name:q}"
        " --output {output.gguf:q}"
        " --log {log:q}"


rule quantize:
    input:
        program="scripts/quantize_model.py",
        modules=modules("scripts/quantize_model.py"),
        gguf="<results>/f16.gguf",
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
        mem_mb=4000,
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
