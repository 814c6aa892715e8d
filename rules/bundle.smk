# What leaves the workflow for a phone.


# A copy, so it needs no more than the disk; only when it is asked for.
rule bundle:
    input:
        **program("make_bundle"),
        **folder("model", SHIPPED_MODEL),
        **folder("tokens", SHIPPED_TOKENS),
        page="report/bundle.md.j2",
        records=f"<results>/dataset/{SPLIT}.jsonl",
        gguf=f"<results>/{BUNDLED}.gguf",
        choice="<results>/best.json" if BUNDLED == "best" else [],
        predictions=expand(
            "<results>/predictions/{file}.parquet", file=BUNDLE_CANDIDATES
        ),
        metrics="<results>/metrics.json",
        card="<results>/card.md",
    output:
        bundle=directory("<results>/bundle"),
        manifest="<results>/bundle.sha256",
    log:
        "<results>/logs/bundle.log",
    benchmark:
        "<results>/benchmarks/bundle.tsv"
    conda:
        "../envs/llama_cpp.yaml"
    threads: 4
    resources:
        mem_mb=memory(4000),
        runtime="30m",
    params:
        settings=bundle_settings,
    shell:
        command(
            "params.settings input.model input.tokens input.records input.gguf input.choice"
            " input.predictions input.metrics input.card input.page threads output=output.bundle"
        )


# The same for every model, and of no use to the workflow: only when it is asked for. The benchmark does
# not lie in a run's results, where another run would miss it and have all compiled again.
rule build_phone:
    input:
        **program("build_phone"),
        sources=expand(
            "scripts/pockettune/phone/{file}", file=["score.cpp", "rows.h", "meters.h"]
        ),
    output:
        programs=directory("resources/phone"),
        manifest="resources/phone.sha256",
    log:
        "<results>/logs/build_phone.log",
    benchmark:
        "resources/phone.tsv"
    conda:
        "../envs/data.yaml"
    threads: 4
    resources:
        mem_mb=memory(4000),
        runtime="1h",
    params:
        version=LLAMA_CPP_PYTHON,
    shell:
        command(
            "params.version downloads=resources/downloads threads output=output.programs"
        )
