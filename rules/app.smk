# A page that asks the bundle's file in a browser, on a phone or a desktop. Made only when it is asked for.


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
        **folder("bundle", "<results>/bundle"),
        **folder("tokens", SHIPPED_TOKENS),
        **folder("wllama", WLLAMA),
        page=PAGE,
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
            "params.settings input.bundle input.tokens input.wllama input.page"
            " output=output.app"
        )
