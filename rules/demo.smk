# What runs/demo.yaml is fed with: generated reviews, and a small base model trained on the spot.


rule make_demo_data:
    input:
        **program("make_demo_data"),
    output:
        train="resources/demo/train.csv",
        validation="resources/demo/validation.csv",
        test="resources/demo/test.csv",
        corpus="resources/demo/corpus.txt",
    log:
        "<results>/logs/make_demo_data.log",
    benchmark:
        "<results>/benchmarks/make_demo_data.tsv"
    conda:
        "../envs/data.yaml"
    params:
        folder="resources/demo",
    shell:
        command("output=params.folder")


rule make_demo_base:
    input:
        **program("make_demo_base"),
        corpus="resources/demo/corpus.txt",
    output:
        config="resources/demo/base/config.json",
        weights="resources/demo/base/model.safetensors",
        tokenizer="resources/demo/base/tokenizer.json",
        tokenizer_config="resources/demo/base/tokenizer_config.json",
    log:
        "<results>/logs/make_demo_base.log",
    benchmark:
        "<results>/benchmarks/make_demo_base.tsv"
    conda:
        "../envs/train.yaml"
    threads: 4
    params:
        folder="resources/demo/base",
    shell:
        command("input.corpus threads output=params.folder")
