# LiteRT files: exported of the merged model, quantized, bundled for apps, checked and scored in LiteRT.


if LITERT_VARIANTS:

    # The float rung: what it loses is the exporter's, what a variant loses besides is quantization's.
    rule export_litert:
        input:
            **program("export_litert"),
            **folder("model", SHIPPED_MODEL),
        output:
            tflite="<results>/litert_float.tflite",
        log:
            "<results>/logs/export_litert_float.log",
        benchmark:
            "<results>/benchmarks/export_litert_float.tsv"
        conda:
            "../envs/litert.yaml"
        threads: 4
        resources:
            mem_mb=memory(4000, "export (LiteRT)"),
            runtime="2h",
        params:
            settings=settings("tokenize"),
        shell:
            command("params.settings input.model threads output=output.tflite")

    # The gate: no LiteRT file is quantized where the exporter's float one is not the merged model.
    rule check_parity_litert:
        input:
            **program("check_parity_litert"),
            **folder("model", SHIPPED_MODEL),
            **folder("tokens", SHIPPED_TOKENS),
            export="<results>/litert_float.tflite",
            records="<results>/dataset/test.jsonl",
        output:
            parity="<results>/parity_litert.json",
        log:
            "<results>/logs/check_parity_litert.log",
        benchmark:
            "<results>/benchmarks/check_parity_litert.tsv"
        conda:
            "../envs/litert.yaml"
        threads: 4
        resources:
            mem_mb=memory(8000, "check_parity (LiteRT)"),
            runtime="1h",
        params:
            settings=export_settings,
        shell:
            command(
                "params.settings input.model input.export input.tokens input.records threads"
                " output=output.parity"
            )

    rule quantize_litert:
        input:
            **program("quantize_litert"),
            **folder("model", SHIPPED_MODEL),
            **folder("tokens", SHIPPED_TOKENS),
            source="<results>/litert_float.tflite",
            parity="<results>/parity_litert.json",
        output:
            tflite="<results>/{variant}.tflite",
            bundle="<results>/{variant}.litertlm",
        log:
            "<results>/logs/export_{variant}.log",
        benchmark:
            "<results>/benchmarks/export_{variant}.tsv"
        wildcard_constraints:
            variant="|".join(LITERT_VARIANTS),
        conda:
            "../envs/litert.yaml"
        resources:
            mem_mb=memory(4000, "quantize (LiteRT)"),
            runtime="1h",
        params:
            settings=export_settings,
        shell:
            command(
                "params.settings input.source input.model input.tokens output.bundle"
                " output=output.tflite"
            )

    rule evaluate_litert_float:
        input:
            **program("evaluate_litert"),
            **folder("tokens", SHIPPED_TOKENS),
            model="<results>/litert_float.tflite",
            bundle=[],
            reference="<results>/logits/f16.npy",
        output:
            metrics="<results>/metrics/litert_float.json",
            predictions="<results>/predictions/litert_float.parquet",
        log:
            "<results>/logs/evaluate_litert_float.log",
        benchmark:
            "<results>/benchmarks/evaluate_litert_float.tsv"
        conda:
            "../envs/litert.yaml"
        threads: 4
        resources:
            mem_mb=memory(4000, "evaluate (LiteRT)"),
            runtime="2h",
        params:
            settings=evaluation_settings("split", "limit", "pytorch_limit"),
        shell:
            command(
                "params.settings input.model input.bundle input.tokens input.reference threads"
                " output.metrics output.predictions"
            )

    use rule evaluate_litert_float as evaluate_litert with:
        input:
            **program("evaluate_litert"),
            **folder("tokens", SHIPPED_TOKENS),
            model="<results>/{variant}.tflite",
            bundle="<results>/{variant}.litertlm",
            reference="<results>/logits/f16.npy",
        output:
            metrics="<results>/metrics/{variant}.json",
            predictions="<results>/predictions/{variant}.parquet",
        log:
            "<results>/logs/evaluate_{variant}.log",
        benchmark:
            "<results>/benchmarks/evaluate_{variant}.tsv"
        wildcard_constraints:
            variant="|".join(LITERT_VARIANTS),
        params:
            settings=evaluation_settings("split", "limit", "greedy_rows"),

    # It measures time: with --cores 4 it runs alone, on a cluster it has its cores to itself.
    rule measure_speed_litert:
        input:
            **program("measure_speed_litert"),
            model="<results>/{file}.tflite",
        output:
            speed="<results>/speed/{file}.json",
        log:
            "<results>/logs/measure_speed_{file}.log",
        benchmark:
            "<results>/benchmarks/measure_speed_{file}.tsv"
        wildcard_constraints:
            file="|".join(["litert_float", *LITERT_VARIANTS]),
        conda:
            "../envs/litert.yaml"
        threads: 4
        resources:
            mem_mb=memory(4000, "evaluate (LiteRT)"),
            runtime="30m",
        shell:
            command("input.model threads output=output.speed")
