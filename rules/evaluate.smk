# Every stage is scored on the same rows; the scores are put side by side and into the report.


localrules:
    compare,
    choose,
    report,


rule evaluate_tfidf:
    input:
        **program("evaluate_tfidf"),
        **folder("tokens", "<results>/tokens"),
        train="<results>/dataset/train.jsonl",
        split=f"<results>/dataset/{SPLIT}.jsonl",
    output:
        metrics="<results>/metrics/tfidf.json",
        predictions="<results>/predictions/tfidf.parquet",
    log:
        "<results>/logs/evaluate_tfidf.log",
    benchmark:
        "<results>/benchmarks/evaluate_tfidf.tsv"
    conda:
        "../envs/report.yaml"
    resources:
        mem_mb=memory(4000),
        runtime="1h",
    params:
        settings=evaluation_settings("split", "limit"),
    shell:
        command(
            "params.settings input.tokens input.train input.split"
            " output.metrics output.predictions"
        )


rule evaluate_base:
    input:
        **program("evaluate_model"),
        **folder("model", BASE_MODEL),
        **folder("tokens", "<results>/tokens"),
        adapter=[],
        vocabulary=[],
        reference=[],
        records=RECORDS,
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
        gpu_turn=GPU_TURN,
        mem_mb=memory(8000, "evaluate (PyTorch)"),
        runtime="2h",
    params:
        settings=evaluation_settings("split", "limit", "pytorch_limit", *SAMPLED),
    shell:
        command(
            "params.settings input.model input.adapter input.tokens input.vocabulary"
            " input.reference input.records threads output.metrics output.predictions"
        )


use rule evaluate_base as evaluate_adapter with:
    input:
        **program("evaluate_model"),
        **folder("model", BASE_MODEL),
        **folder("adapter", "<results>/adapter"),
        **folder("tokens", "<results>/tokens"),
        vocabulary=VOCABULARY,
        reference=REFERENCE,
        records=RECORDS,
    output:
        metrics="<results>/metrics/adapter.json",
        predictions="<results>/predictions/adapter.parquet",
    log:
        "<results>/logs/evaluate_adapter.log",
    benchmark:
        "<results>/benchmarks/evaluate_adapter.tsv"


use rule evaluate_base as evaluate_merged with:
    input:
        **program("evaluate_model"),
        **folder("model", "<results>/merged"),
        **folder("tokens", "<results>/tokens"),
        adapter=[],
        vocabulary=VOCABULARY,
        reference=REFERENCE,
        records=RECORDS,
    output:
        metrics="<results>/metrics/merged.json",
        predictions="<results>/predictions/merged.parquet",
    log:
        "<results>/logs/evaluate_merged.log",
    benchmark:
        "<results>/benchmarks/evaluate_merged.tsv"


if TRIM:

    use rule evaluate_base as evaluate_trimmed with:
        input:
            **program("evaluate_model"),
            **folder("model", SHIPPED_MODEL),
            **folder("tokens", SHIPPED_TOKENS),
            adapter=[],
            vocabulary=[],
            reference=REFERENCE,
            records=RECORDS,
        output:
            metrics="<results>/metrics/trimmed.json",
            predictions="<results>/predictions/trimmed.parquet",
        log:
            "<results>/logs/evaluate_trimmed.log",
        benchmark:
            "<results>/benchmarks/evaluate_trimmed.tsv"


# Its answers over the whole vocabulary are kept: the other stages are compared with them.
rule evaluate_f16:
    input:
        **program("evaluate_gguf"),
        **folder("tokens", SHIPPED_TOKENS),
        model="<results>/f16.gguf",
        reference=[],
        records=RECORDS,
    output:
        metrics="<results>/metrics/f16.json",
        predictions="<results>/predictions/f16.parquet",
        reference=KEPT_LOGITS,
    log:
        "<results>/logs/evaluate_f16.log",
    benchmark:
        "<results>/benchmarks/evaluate_f16.tsv"
    conda:
        "../envs/llama_cpp.yaml"
    threads: 4
    resources:
        mem_mb=memory(4000, "evaluate (llama.cpp)"),
        runtime="2h",
    params:
        settings=evaluation_settings("split", "limit", "greedy_rows"),
    shell:
        command(
            "params.settings input.model input.tokens input.reference input.records threads"
            " write-reference=output.reference output.metrics output.predictions"
        )


use rule evaluate_f16 as evaluate_variant with:
    input:
        **program("evaluate_gguf"),
        **folder("tokens", SHIPPED_TOKENS),
        model="<results>/{variant}.gguf",
        reference=REFERENCE,
        records=RECORDS,
    output:
        metrics="<results>/metrics/{variant}.json",
        predictions="<results>/predictions/{variant}.parquet",
        reference=[],
    log:
        "<results>/logs/evaluate_{variant}.log",
    benchmark:
        "<results>/benchmarks/evaluate_{variant}.tsv"
    wildcard_constraints:
        variant="|".join(GGUF_VARIANTS),


# It measures time: with --cores 4 it runs alone, on a cluster it has its cores to itself.
rule measure_speed:
    input:
        **program("measure_speed"),
        model="<results>/{file}.gguf",
    output:
        speed="<results>/speed/{file}.json",
    log:
        "<results>/logs/measure_speed_{file}.log",
    benchmark:
        "<results>/benchmarks/measure_speed_{file}.tsv"
    wildcard_constraints:
        file="|".join(["f16", *GGUF_VARIANTS]),
    conda:
        "../envs/llama_cpp.yaml"
    threads: 4
    resources:
        mem_mb=memory(4000),
        runtime="30m",
    shell:
        command("input.model threads output=output.speed")


rule compare:
    input:
        **program("compare_stages"),
        **folder("adapter", "<results>/adapter"),
        records=f"<results>/dataset/{SPLIT}.jsonl",
        metrics=expand("<results>/metrics/{stage}.json", stage=STAGES),
        predictions=expand("<results>/predictions/{stage}.parquet", stage=STAGES),
    output:
        json="<results>/metrics.json",
        csv=report(
            "<results>/metrics.csv",
            caption="../report/metrics.rst",
            category="Metrics",
        ),
        flips="<results>/flips.json",
        samples=SAMPLES,
    log:
        "<results>/logs/compare.log",
    benchmark:
        "<results>/benchmarks/compare.tsv"
    conda:
        "../envs/report.yaml"
    params:
        settings=evaluation_settings("margin"),
    shell:
        command(
            "params.settings input.records input.metrics input.predictions input.adapter"
            " output.json output.csv output.flips output.samples"
        )


rule choose:
    input:
        **program("choose_file"),
        metrics="<results>/metrics.json",
        speed=expand("<results>/speed/{file}.json", file=["f16", *VARIANTS]),
        files=expand("<results>/{variant}.gguf", variant=GGUF_VARIANTS),
    output:
        json="<results>/best.json",
        gguf="<results>/best.gguf",
    log:
        "<results>/logs/choose.log",
    benchmark:
        "<results>/benchmarks/choose.tsv"
    conda:
        "../envs/report.yaml"
    params:
        settings=choice_settings,
    shell:
        command(
            "params.settings input.metrics input.speed input.files output.gguf output.json"
        )


rule report:
    input:
        **program("write_report"),
        **folder("tokens", SHIPPED_TOKENS),
        **folder("adapter", "<results>/adapter"),
        **folder("base", BASE_MODEL),
        vocabulary=VOCABULARY,
        templates=["report/report.html.j2", "report/card.md.j2", "report/text.html.j2"],
        sentences=SENTENCES,
        metrics="<results>/metrics.json",
        flips="<results>/flips.json",
        samples=SAMPLES,
        parity="<results>/parity.json",
        format_parity=expand("<results>/parity_{kind}.json", kind=FORMATS),
        speed=expand("<results>/speed/{file}.json", file=["f16", *VARIANTS]),
        audit="<results>/dataset/audit.json",
        benchmarks=expand("<results>/benchmarks/{job}.tsv", job=JOBS),
    output:
        html=report(
            "<results>/report.html",
            caption="../report/page.rst",
            category="Report",
        ),
        card="<results>/card.md",
    log:
        "<results>/logs/report.log",
    benchmark:
        "<results>/benchmarks/report.tsv"
    # The page is there to say why, should choose find no file within its budget.
    priority: 1
    conda:
        "../envs/report.yaml"
    params:
        settings=report_settings,
    shell:
        command(
            "params.settings input.templates input.sentences input.metrics input.flips input.samples input.parity"
            " format-parity=input.format_parity input.speed"
            " input.audit input.vocabulary input.tokens input.adapter input.base input.benchmarks"
            " output.html output.card"
        )
