# ONNX folders: exported of the merged model, checked and scored in ONNX Runtime.


if ONNX_VARIANTS:

    # The float rung: what it loses is the exporter's, what a variant loses besides is quantization's.
    rule export_onnx_float:
        input:
            **program("export_onnx"),
            **folder("model", SHIPPED_MODEL),
        output:
            folder=directory("<results>/onnx_float.onnx"),
            manifest="<results>/onnx_float.onnx.sha256",
        log:
            "<results>/logs/export_onnx_float.log",
        benchmark:
            "<results>/benchmarks/export_onnx_float.tsv"
        conda:
            "../envs/onnx.yaml"
        threads: 4
        resources:
            mem_mb=memory(4000, "export (ONNX)"),
            runtime="1h",
        params:
            settings=export_settings,
        shell:
            command("params.settings input.model threads output=output.folder")

    # The gate: no ONNX file is quantized where the exporter's float one is not the merged model.
    rule check_parity_onnx:
        input:
            **program("check_parity_onnx"),
            **folder("model", SHIPPED_MODEL),
            **folder("tokens", SHIPPED_TOKENS),
            **folder("export", "<results>/onnx_float.onnx"),
            records="<results>/dataset/test.jsonl",
        output:
            parity="<results>/parity_onnx.json",
        log:
            "<results>/logs/check_parity_onnx.log",
        benchmark:
            "<results>/benchmarks/check_parity_onnx.tsv"
        conda:
            "../envs/onnx.yaml"
        threads: 4
        resources:
            mem_mb=memory(8000, "check_parity (ONNX)"),
            runtime="1h",
        params:
            settings=settings("task", "dataset", "card"),
        shell:
            command(
                "params.settings input.model input.export input.tokens input.records threads"
                " output=output.parity"
            )

    use rule export_onnx_float as export_onnx with:
        input:
            **program("export_onnx"),
            **folder("model", SHIPPED_MODEL),
            parity="<results>/parity_onnx.json",
        output:
            folder=directory("<results>/{variant}.onnx"),
            manifest="<results>/{variant}.onnx.sha256",
        log:
            "<results>/logs/export_{variant}.log",
        benchmark:
            "<results>/benchmarks/export_{variant}.tsv"
        wildcard_constraints:
            variant="|".join(ONNX_VARIANTS),

    rule evaluate_onnx_float:
        input:
            **program("evaluate_onnx"),
            **folder("model", "<results>/onnx_float.onnx"),
            **folder("tokens", SHIPPED_TOKENS),
            reference="<results>/logits/f16.npy",
        output:
            metrics="<results>/metrics/onnx_float.json",
            predictions="<results>/predictions/onnx_float.parquet",
        log:
            "<results>/logs/evaluate_onnx_float.log",
        benchmark:
            "<results>/benchmarks/evaluate_onnx_float.tsv"
        conda:
            "../envs/onnx.yaml"
        threads: 4
        resources:
            mem_mb=memory(4000, "evaluate (ONNX)"),
            runtime="2h",
        params:
            settings=evaluation_settings("split", "limit", "pytorch_limit"),
        shell:
            command(
                "params.settings input.model input.tokens input.reference threads"
                " output.metrics output.predictions"
            )

    use rule evaluate_onnx_float as evaluate_onnx with:
        input:
            **program("evaluate_onnx"),
            **folder("model", "<results>/{variant}.onnx"),
            **folder("tokens", SHIPPED_TOKENS),
            reference="<results>/logits/f16.npy",
        output:
            metrics="<results>/metrics/{variant}.json",
            predictions="<results>/predictions/{variant}.parquet",
        log:
            "<results>/logs/evaluate_{variant}.log",
        benchmark:
            "<results>/benchmarks/evaluate_{variant}.tsv"
        wildcard_constraints:
            variant="|".join(ONNX_VARIANTS),
        params:
            settings=evaluation_settings("split", "limit", "greedy_rows"),

    # It measures time: with --cores 4 it runs alone, on a cluster it has its cores to itself.
    rule measure_speed_onnx:
        input:
            **program("measure_speed_onnx"),
            **folder("model", "<results>/{file}.onnx"),
        output:
            speed="<results>/speed/{file}.json",
        log:
            "<results>/logs/measure_speed_{file}.log",
        benchmark:
            "<results>/benchmarks/measure_speed_{file}.tsv"
        wildcard_constraints:
            file="|".join(["onnx_float", *ONNX_VARIANTS]),
        conda:
            "../envs/onnx.yaml"
        threads: 4
        resources:
            mem_mb=memory(4000, "evaluate (ONNX)"),
            runtime="30m",
        shell:
            command("input.model threads output=output.speed")
