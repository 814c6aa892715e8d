# A page that asks the chosen file in a browser, on a phone or a desktop. Made only when it is asked for.


localrules:
    fetch_wllama,
    app,


rule fetch_wllama:
    input:
        **program("fetch_wllama"),
    output:
        wllama=directory(WLLAMA),
        manifest=f"{WLLAMA}.sha256",
    log:
        "<results>/logs/fetch_wllama.log",
    benchmark:
        "<results>/benchmarks/fetch_wllama.tsv"
    conda:
        "../envs/data.yaml"
    shell:
        command("downloads=resources/downloads output=output.wllama")


rule app:
    input:
        **program("make_app"),
        **folder("tokens", "<results>/tokens"),
        **folder("wllama", WLLAMA),
        page=PAGE,
        best="<results>/best.json",
        model="<results>/best.gguf",
        records=f"<results>/dataset/{SPLIT}.jsonl",
        predictions=expand("<results>/predictions/{variant}.parquet", variant=VARIANTS),
    output:
        app=directory("<results>/app"),
        manifest="<results>/app.sha256",
    log:
        "<results>/logs/app.log",
    benchmark:
        "<results>/benchmarks/app.tsv"
    conda:
        "../envs/report.yaml"
    params:
        settings=app_settings,
    shell:
        command(
            "params.settings input.page input.wllama input.model input.best input.tokens"
            " input.records input.predictions output=output.app"
        )
